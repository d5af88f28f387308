"""The convolutional encoder under the language model, and how much five training seeds differ.

    python studies/em_mllm/cnn.py
    SEEDS="0 1" SKIP_DONE=1 python studies/em_mllm/cnn.py

On the built-in data of builtin.py's seed 0, so that the seeds are those of the training alone. For each the
encoder learns the classes with the exact invariances as augmentation and is frozen, and the language model
learns to read it. Control: the two networks of baseline.py, which answer no questions, in as much processor
time. Some 20 minutes on one core.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from studies.em_mllm.joint import LLM_STEPS
from studies.recipe import DATA, RUNS, recipe, size, stage
from studies.summary import write_result

BASE, RUN = DATA / "em_mllm" / size("cnn", smoke="cnn_smoke"), RUNS / "em_mllm/cnn"


def one_seed(seed: int, data: Path) -> dict:
    """Train and join with one seed; returns the scores of the test questions."""
    run = RUN / f"seed-{seed}"
    stage(
        "em_mllm/finetune.py",
        train=sorted((data / "train").glob("*.h5")),
        test=sorted((data / "val").glob("*.h5")),
        encoder="cnn",
        phase=True,
        roll=True,
        conjugate=True,
        lr=3e-3,
        batch_size=64,
        max_steps=size(500, smoke=4),
        log_every=50,
        seed=seed,
        out=run / "classes",
        overwrite=True,
    )
    how = dict(
        task_dir=data / "train",
        val_dir=data / "val",
        freeze_signal_encoder=True,
        weight_decay=0.05,
        warmup=0.03,
        schedule="cosine",
        batch_size=32,
        questions_per_signal=2,
        log_every=25,
        seed=seed,
        overwrite=True,
    )
    # the projector begins with the names of the classes, so that fifty steps of it alone are enough
    stage(
        "em_mllm/train.py",
        signal_encoder_path=run / "classes/model",
        llm_model_path=BASE / "llm",
        signal_tokens=8,
        align_projector=True,
        freeze_llm=True,
        lr=3e-3,
        max_steps=size(50, smoke=2),
        out=run / "aligned",
        **how,
    )
    stage(
        "em_mllm/train.py",
        trained_dir=run / "aligned/model",
        optimizer="muon",
        lr=5e-4,
        max_steps=size(150, smoke=2),
        out=run / "joint",
        **how,
    )
    stage(
        "em_mllm/test.py",
        model=run / "joint/model",
        task_dir=data / "test",
        wrong_signal=seed == 0,
        max_new_tokens=12,
        out=run / "test",
    )
    return json.loads((run / "test/metrics.json").read_text())


def main():
    seeds = [int(s) for s in os.environ.get("SEEDS", size("0 1 2 3 4", smoke="0")).split()]
    data, counts = BASE / "data", size({}, smoke=dict(train=12, val=2, test=5))
    stage("em_mllm/make_data.py", out=data, seed=100, overwrite=True, **counts)
    stage("studies/em_mllm/make_llm.py", out=BASE / "llm", steps=LLM_STEPS, overwrite=True)
    runs = [one_seed(seed, data) for seed in seeds]
    stage(
        "studies/em_mllm/baseline.py",
        train=data / "train",
        test=data / "test",
        steps=size(500, smoke=3),
        out=RUN / "baseline",
        overwrite=True,
    )
    baseline = json.loads((RUN / "baseline/metrics.json").read_text())["four_choice"]

    # what differs between the seeds is training alone: the test questions are the same
    for key, name in (("accuracy", "all SNR"), ("accuracy_high_snr", "SNR >= 10 dB")):
        values = [run[key] for run in runs]
        controls = {"two CNNs, likeliest of the four options": baseline[key]}
        if "wrong_signal" in runs[0]:
            controls["signal of another class"] = runs[0]["wrong_signal"][key]
        write_result(
            RUNS / "em_mllm",
            f"four-choice questions, convolutional encoder, {name}",
            "accuracy",
            float(np.mean(values)),
            controls,
            note=f"{runs[0]['four_choice']} questions; training seeds {' '.join(f'{v:.3f}' for v in values)}",
        )
        print(f"{name}: {values}, mean {np.mean(values):.4f}, spread {np.std(values):.4f}")
        print(f"{name}: CNNs {baseline[key]:.4f}")


if __name__ == "__main__":
    recipe(main)
