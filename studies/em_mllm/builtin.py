"""The built-in study: data, pre-training without labels, class labels, a tiny language model, joint training,
controls and tests.

    python studies/em_mllm/builtin.py
    SEEDS="3 4" python studies/em_mllm/builtin.py

8 to 11 minutes on one core a seed (SMOKE=1: about one). Seeds 0, 1 and 2 run side by side on three cores or
more, seed 0 alone where run_all.sh shares the machine out. real.py is the study on real captures.
"""

import os
import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from studies.em_mllm.joint import ENCODER, LLM_STEPS, join
from studies.recipe import CORES, DATA, RUNS, SMOKE, recipe, side_by_side, size, stage

BASE, RUN = DATA / "em_mllm" / size("", smoke="smoke"), RUNS / "em_mllm"
LABEL_STEPS = size(800, smoke=2)


def learn_classes(data, out, seed, **options):
    """Train the encoder of this seed on class labels; the accuracy is measured on validation signals."""
    stage(
        "em_mllm/finetune.py",
        train=sorted((data / "train").glob("*.h5")),
        test=sorted((data / "val").glob("*.h5")),
        signal_encoder_path=RUN / f"seed-{seed}/pretrain/encoder",
        optimizer="muon",
        lr=2e-3,
        max_steps=LABEL_STEPS,
        log_every=100,
        seed=seed,
        out=out,
        overwrite=True,
        **options,
    )


def one_seed(seed: int, threads: int | None):
    """Everything that depends on the seed: data, training, its controls, tests."""
    data, run = BASE / f"seed-{seed}/data", RUN / f"seed-{seed}"
    questions = dict(task_dir=data / "train", val_dir=data / "val", threads=threads)
    counts = size({}, smoke=dict(train=12, val=2, test=2))
    stage("em_mllm/make_data.py", out=data, seed=100 + seed, overwrite=True, threads=threads, **counts)

    # the encoder learns from signals alone, then the names of their classes
    stage(
        "em_mllm/pretrain.py",
        data=data / "train",
        val=data / "val",
        out=run / "pretrain",
        preset="tiny",
        max_steps=size(400, smoke=2),
        seed=seed,
        threads=threads,
        **ENCODER,
    )
    learn_classes(data, run / "finetune", seed, threads=threads)

    # encoder and language model are joined and asked about test signals; control: another class's signal
    join(run / "joint", seed, run / "finetune/model", BASE / "llm", **questions)
    stage(
        "em_mllm/test.py",
        model=run / "joint/model",
        task_dir=data / "test",
        calibrate_dir=data / "val",
        wrong_signal=True,
        out=run / "joint/test",
        threads=threads,
    )

    # control: the same without pre-training
    learn_classes(data, run / "finetune_random", seed, random_encoder=True, threads=threads)
    join(run / "joint_random", seed, run / "finetune_random/model", BASE / "llm", **questions)
    stage(
        "em_mllm/test.py",
        model=run / "joint_random/model",
        task_dir=data / "test",
        out=run / "joint_random/test",
        threads=threads,
    )

    # controls: a CNN on the same signals; few labels, with and without pre-training
    stage(
        "studies/em_mllm/baseline.py",
        train=data / "train",
        test=data / "test",
        steps=size(300, smoke=3),
        seed=seed,
        out=run / "cnn",
        overwrite=True,
        threads=threads,
    )
    stage(
        "studies/em_mllm/fewshot.py",
        train=data / "train/modulation.h5",
        test=data / "test/modulation.h5",
        signal_encoder_path=run / "pretrain/encoder",
        shots=size([1, 5, 10, 50, 100], smoke=[1, 5]),
        draws=2,
        methods=["probe"],
        seed=seed,
        out=run / "fewshot",
        overwrite=True,
        threads=threads,
    )


def main():
    several = CORES >= 3
    seeds = [int(s) for s in os.environ.get("SEEDS", "").split()] or (
        [0, 1, 2] if several and not SMOKE else [0]
    )
    # a tiny language model, trained on text alone, the same for every seed
    stage("studies/em_mllm/make_llm.py", out=BASE / "llm", steps=LLM_STEPS, overwrite=True, threads=1)
    if several:  # small models gain more from one core each
        side_by_side(*(lambda seed=seed: one_seed(seed, threads=1) for seed in seeds))
    else:
        for seed in seeds:
            one_seed(seed, threads=None)
    stage("studies/em_mllm/report.py", "builtin", runs=RUN, seeds=seeds, smoke=SMOKE)


if __name__ == "__main__":
    recipe(main)
