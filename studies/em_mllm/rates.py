"""Does the declared sampling rate count? Signals of three rates are asked for their bandwidth in MHz.

The samples tell it as a share of the rate, so that a wrong rate has to cost accuracy, and the right one not.

    python studies/em_mllm/rates.py

The questions are those of `make_data.py --fs 10e6 20e6 40e6` (bandwidth.json); the encoder's sampling-rate
token is all that tells the language model the rate. The wrong rate is another one of the three. Measured
twice: of the encoder with its labels, and of the language model that reads it.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import h5py
import numpy as np

from em_mllm.dataset import SignalDataset
from em_mllm.em_foundation.models import SiTMAEForClassification
from em_mllm.finetune import predict
from em_mllm.make_data import NOUN
from em_mllm.scores import wilson
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


def accuracy_of(model, path: Path) -> dict:
    """{"all", declared rate in MHz: accuracy} of the encoder's own classes."""
    data = SignalDataset([path], ("label",))
    hit = predict(model, data, {})[0] == data.columns["label"]
    rates = np.array([data.files[0].rate(row) for row in data.index])
    return {"all": float(hit.mean()), **{f"{fs / 1e6:g}": float(hit[rates == fs].mean()) for fs in RATES}}


def ask(data: Path, folders: dict, pair: list) -> dict:
    """{"right", "wrong": scores of the test questions} of a language model that knows the four bandwidths by
    name and reads the encoder."""
    task = {"bandwidth": {"noun": NOUN["bandwidth"], "names": RATE_TASKS["bandwidth"]}}
    (BASE / "tasks.json").write_text(json.dumps(task, ensure_ascii=False), encoding="utf-8")
    how = dict(tasks=BASE / "tasks.json", steps=size(200, smoke=4), slots=3, overwrite=True)
    stage("studies/em_mllm/make_llm.py", out=BASE / "llm", **how)
    stage(
        "em_mllm/train.py",
        task_files=[data / "train" / name for name in pair],
        signal_encoder_path=RUN / "finetune/model",
        llm_model_path=BASE / "llm",
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
    for name, folder in folders.items():
        files = [folder / part for part in pair]
        stage("em_mllm/test.py", model=RUN / "joint/model", task_files=files, out=RUN / f"test_{name}")
        scores[name] = json.loads((RUN / f"test_{name}/metrics.json").read_text())
    return scores


def report(alone: dict, scores: dict):
    """Write what the language model says when it is asked for the bandwidth; the letters before the options
    take longer to learn."""
    said = {name: score["open"]["exact"] for name, score in scores.items()}
    count = scores["right"]["open"]["count"]
    write_result(
        RUNS / "em_mllm",
        "bandwidth in MHz, rates 10, 20 and 40 MHz",
        "exact answers",
        said["right"],
        {
            "chance": 1 / len(RATE_TASKS["bandwidth"]),
            "wrong rate declared": said["wrong"],
            "encoder alone": alone["right"]["all"],
            "encoder alone, wrong rate declared": alone["wrong"]["all"],
            "options by likelihood": scores["right"]["accuracy_by_likelihood"],
            "options by likelihood, wrong rate declared": scores["wrong"]["accuracy_by_likelihood"],
        },
        wilson(round(said["right"] * count), count),
        note=f"{count} open questions, SNR 0 to 20 dB",
    )
    print(said)


def main():
    # signals of three rates, and the same test signals with a wrong rate
    data, pair = BASE / "data", ["bandwidth.h5", "bandwidth.json"]
    counts = size(dict(train=400, val=20, test=80), smoke=dict(train=8, val=2, test=2))
    stage("em_mllm/make_data.py", out=data, fs=RATES, points=512, snr=(0, 20), overwrite=True, **counts)
    folders = {"right": data / "test", "wrong": BASE / "wrong"}
    declare_wrong(folders["right"], folders["wrong"])

    # the encoder, without labels and then with them
    stage(
        "em_mllm/pretrain.py",
        data=data / "train/bandwidth.h5",
        out=RUN / "pretrain",
        preset="tiny",
        max_steps=size(100, smoke=2),
        **ENCODER,
    )
    stage(
        "em_mllm/finetune.py",
        train=data / "train/bandwidth.h5",
        test=data / "val/bandwidth.h5",
        signal_encoder_path=RUN / "pretrain/encoder",
        phase=True,
        roll=True,
        optimizer="muon",
        lr=2e-3,
        max_steps=size(250, smoke=2),
        log_every=50,
        out=RUN / "finetune",
        overwrite=True,
    )
    encoder = SiTMAEForClassification.from_pretrained(RUN / "finetune/model").eval()
    alone = {name: accuracy_of(encoder, folder / pair[0]) for name, folder in folders.items()}
    print(f"encoder alone: {alone}")

    report(alone, ask(data, folders, pair))


if __name__ == "__main__":
    recipe(main)
