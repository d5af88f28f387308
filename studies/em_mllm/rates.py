"""Does the declared sampling rate count? Signals of three rates are asked for their bandwidth in MHz.

The samples tell it as a share of the rate, so that a wrong rate has to cost accuracy, and the right one not.

    python studies/em_mllm/rates.py

The questions are those of `make_data.py --fs 10e6 20e6 40e6` (bandwidth.json); the encoder's sampling-rate
token is all that tells the language model the rate. The wrong rate is another one of the three.
"""

import json
import shutil
import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import h5py
import numpy as np

from em_mllm.make_data import NOUN
from em_mllm.signals import RATE_TASKS
from studies.em_mllm.joint import ENCODER
from studies.recipe import DATA, RUNS, recipe, size, stage
from studies.summary import write_result

RATES = (10e6, 20e6, 40e6)
BASE, RUN = DATA / "em_mllm" / size("rates", smoke="rates_smoke"), RUNS / "em_mllm/rates"


def declare_wrong(right: Path, wrong: Path):
    """Copy the bandwidth test with the next of the three rates declared for every signal."""
    shutil.rmtree(wrong, ignore_errors=True)
    wrong.mkdir(parents=True)
    for suffix in ("h5", "json"):
        shutil.copy(right / f"bandwidth.{suffix}", wrong)
    with h5py.File(wrong / "bandwidth.h5", "r+") as file:
        file["fs"][:] = [[RATES[(RATES.index(fs) + 1) % len(RATES)]] for fs in file["fs"][:, 0]]


def main():
    data, pair = BASE / "data", ["bandwidth.h5", "bandwidth.json"]
    counts = size(dict(train=600, val=20, test=80), smoke=dict(train=8, val=2, test=2))
    stage("em_mllm/make_data.py", out=data, fs=RATES, snr=(0, 20), overwrite=True, **counts)
    declare_wrong(data / "test", BASE / "wrong")
    task = {"bandwidth": {"noun": NOUN["bandwidth"], "names": RATE_TASKS["bandwidth"]}}
    (BASE / "tasks.json").write_text(json.dumps(task, ensure_ascii=False), encoding="utf-8")
    llm = BASE / "llm"
    stage(
        "studies/em_mllm/make_llm.py", out=llm, tasks=BASE / "tasks.json", steps=size(400, 4), overwrite=True
    )
    stage(
        "em_mllm/pretrain.py",
        data=data / "train/bandwidth.h5",
        out=RUN / "pretrain",
        preset="tiny",
        max_steps=size(60, smoke=2),
        **ENCODER,
    )
    stage(
        "em_mllm/finetune.py",
        train=data / "train/bandwidth.h5",
        test=data / "val/bandwidth.h5",
        signal_encoder_path=RUN / "pretrain/encoder",
        optimizer="muon",
        lr=2e-3,
        max_steps=size(250, smoke=2),
        log_every=50,
        out=RUN / "finetune",
        overwrite=True,
    )
    stage(
        "em_mllm/train.py",
        task_files=[data / "train" / name for name in pair],
        signal_encoder_path=RUN / "finetune/model",
        llm_model_path=llm,
        signal_tokens=2,
        align_projector=True,
        freeze_signal_encoder=True,
        lr=1e-3,
        batch_size=32,
        max_steps=size(100, smoke=2),
        out=RUN / "joint",
        overwrite=True,
    )
    scores = {}
    for name, folder in (("right", data / "test"), ("wrong", BASE / "wrong")):
        files = [folder / part for part in pair]
        stage("em_mllm/test.py", model=RUN / "joint/model", task_files=files, out=RUN / f"test_{name}")
        scores[name] = json.loads((RUN / f"test_{name}/metrics.json").read_text())
    write_result(
        RUNS / "em_mllm",
        "bandwidth in MHz, rates 10, 20 and 40 MHz",
        "accuracy",
        scores["right"]["accuracy"],
        {"chance": scores["right"]["chance"], "wrong rate declared": scores["wrong"]["accuracy"]},
        scores["right"]["interval"],
        note=f"{scores['right']['four_choice']} questions, SNR 0 to 20 dB",
    )
    print({name: float(np.round(s["accuracy"], 3)) for name, s in scores.items()})


if __name__ == "__main__":
    recipe(main)
