"""The study on real rtl_433 captures of DATA_ROOT/rf: devices in noise, few captures, unseen devices, and
questions, put to a tiny language model and to SmolLM2-135M.

    DATA_ROOT=... bash run_all.sh --real em_mllm
    DATA_ROOT=... python studies/em_mllm/real.py
    DATA_ROOT=... SEEDS="0 1 2" python studies/em_mllm/real.py        # repeats the device study

rtl433_train.npz is there to learn from, rtl433_test.npz or one of another name to be asked about. A folder
with test captures only is scored with the model of an earlier run. Where SmolLM2's package is missing
(requirements-real.txt), that part says so and is left out.
"""

import json
import os
import shutil
import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.errors import UserError
from em_mllm.options import extract_letter, parse_options
from studies.em_mllm.joint import ENCODER, LLM_STEPS, join
from studies.real_models import smollm2
from studies.recipe import DATA, REAL, ROOT, RUNS, SKIP_DONE, SMOKE, recipe, size, stage

BASE, RUN = DATA / "em_mllm" / size("", smoke="smoke"), RUNS / "em_mllm"
VIEWS = RUN / "rtl433_views"
TASKS = ("device", "coding", "keying")

# How SmolLM2's adapters learn to read the vectors of a frozen encoder
READING = {
    "align_projector": True,
    "dtype": "bfloat16",
    "use_lora": True,
    "lora_r": 16,
    "lora_dropout": 0,
    "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "freeze_signal_encoder": True,
    "lr": 2e-3,
    "warmup": 0.05,
    "schedule": "cosine",
    "batch_size": 8,
    "log_every": 10,
    "overwrite": True,
}


def questions(folder) -> list:
    """The three question files about the captures of one folder, each after its .h5, as --task-files takes
    them."""
    return [path for task in TASKS for path in (folder / "device.h5", folder / f"{task}.json")]


def learn(train, test):
    """Train on the captures `train`: device classifiers once for each of SEEDS, everything else once."""
    seeds = [int(s) for s in os.environ.get("SEEDS", "0").split()]
    stage("em_mllm/convert.py", "rtl433", train, test, out=VIEWS, copies=size(20, smoke=2), sentences=True)
    stage(
        "em_mllm/pretrain.py",
        data=VIEWS / "train",
        val=VIEWS / "val",
        out=RUN / "rtl433_pretrain",
        config=ROOT / "studies/em_mllm/rtl433_config.json",
        max_steps=size(200, smoke=4),
        **ENCODER,
    )

    # devices in noise, from few captures, and devices never seen
    stage(
        "studies/em_mllm/rtl433.py",
        captures=[train, test],
        data=VIEWS,
        signal_encoder_path=RUN / "rtl433_pretrain/encoder",
        steps=size(450, smoke=4),
        seed=seeds[0],
        seeds=len(seeds),
        out=RUN / "rtl433",
        overwrite=True,
    )
    stage("studies/em_mllm/report.py", "devices", runs=RUN, seeds=seeds, smoke=SMOKE)

    # a tiny language model that knows the names of the devices, then joint training
    llm = BASE / "llm_rtl433"
    stage("studies/em_mllm/make_llm.py", out=llm, tasks=VIEWS / "tasks.json", steps=LLM_STEPS, overwrite=True)
    join(
        RUN / "rtl433_joint", 0, RUN / "rtl433/encoder", llm, task_files=questions(VIEWS / "train"), roll=True
    )


def by_name(pairs: list, out: Path) -> list:
    """The question files of `pairs`, each after its .h5, with the text of the right option, without its
    letter, as the answer.

    A model of this size learns to name what it reads in a hundred steps, but not which letter stands before
    which name: with the names themselves in the place of the signal, letters stayed at chance.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for signals, path in zip(pairs[::2], pairs[1::2]):
        records = json.loads(path.read_text(encoding="utf-8"))
        for record in records:
            if options := parse_options(record):
                record["answer"] = options[extract_letter(record["answer"], options)]
        text = json.dumps(records, ensure_ascii=False)
        (out / path.name).write_text(text, encoding="utf-8")
        files += [signals, out / path.name]
    return files


def join_smollm2():
    """The same questions put to SmolLM2-135M-Instruct, whose adapters learn to read the encoder's vectors.

    The projector starts by least squares, so that the signals begin as words which the model knows. Measured:
    answers about the test captures, the same with signals of other devices, and what is left of its English.
    """
    stage(
        "em_mllm/train.py",
        task_files=by_name(questions(VIEWS / "train"), RUN / "smollm2_questions"),
        signal_encoder_path=RUN / "rtl433/encoder",
        llm_model_path=smollm2(),
        signal_tokens=2,
        roll=True,
        max_steps=size(300, smoke=2),
        out=RUN / "smollm2",
        **READING,
    )
    for condition in ("clean", "0dB"):
        stage(
            "em_mllm/test.py",
            model=RUN / "smollm2/model",
            task_files=questions(VIEWS / "test" / condition),
            wrong_signal=condition == "clean",
            limit=size(60, smoke=4),  # two about each capture: a wrong signal needs another one
            batch_size=16,
            out=RUN / f"smollm2/test_{condition}",
        )
    stage(
        "studies/em_mllm/language.py",
        model=RUN / "smollm2/model",
        tokens=size(4096, smoke=64),
        out=RUN / "smollm2/language",
    )
    stage("studies/em_mllm/report.py", "smollm2", runs=RUN, smoke=SMOKE)


def main():
    if not REAL or not (REAL / "rf").is_dir():
        raise UserError("DATA_ROOT: names no folder that holds rf/; set it to the folder of the real data")
    train, test = REAL / "rf/rtl433_train.npz", REAL / "rf/rtl433_test.npz"
    if not test.is_file():
        test = next((p for p in sorted(test.parent.glob("rtl433_*.npz")) if p != train), test)
    if not SKIP_DONE:
        shutil.rmtree(VIEWS, ignore_errors=True)
    if train.is_file():
        learn(train, test)
    elif (RUN / "rtl433_joint/model").is_dir():
        stage("em_mllm/convert.py", "rtl433", test, out=VIEWS, sentences=True)
    else:
        raise UserError(
            f"{train}: no such file, and {RUN / 'rtl433_joint'} holds no model of an earlier run; train on "
            "captures first"
        )
    for condition in ("clean", "10dB", "0dB", "-10dB", "clean_shift"):
        stage(
            "em_mllm/test.py",
            model=RUN / "rtl433_joint/model",
            task_files=questions(VIEWS / "test" / condition),
            wrong_signal=True,
            out=RUN / f"rtl433_joint/test_{condition}",
        )
    stage("studies/em_mllm/report.py", "questions", runs=RUN, smoke=SMOKE)
    if not train.is_file():
        return
    try:
        smollm2()
    except UserError as error:
        print(f"SmolLM2 is left out: {error}", file=sys.stderr)
        return
    join_smollm2()


if __name__ == "__main__":
    recipe(main)
