"""A first try from nothing: small data, a tiny language model and a tiny encoder, joined and tested in 3
minutes.

    python studies/em_mllm/first.py
    bash em_mllm/run_test.sh --iq capture.cu8 --question "Which one is it? (A) FM (B) OOK (C) MSK (D) 2FSK"

The model goes to runs/em_mllm/base/model, where em_mllm/run_test.sh looks for it.
"""

import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from studies.em_mllm.joint import ENCODER
from studies.recipe import DATA, RUNS, recipe, size, stage

BASE, RUN = DATA / "em_mllm" / size("first", smoke="first_smoke"), RUNS / "em_mllm"


def main():
    data, llm = BASE / "data", BASE / "llm"
    counts = size(dict(train=200, val=20, test=20), smoke=dict(train=8, val=2, test=2))
    stage("em_mllm/make_data.py", out=data, overwrite=True, **counts)
    stage("studies/em_mllm/make_llm.py", out=llm, steps=size(800, smoke=4), overwrite=True)
    stage(
        "em_mllm/pretrain.py",
        data=data / "train",
        val=data / "val",
        out=RUN / "pretrain_first",
        preset="tiny",
        max_steps=size(200, smoke=2),
        **ENCODER,
    )
    stage(
        "em_mllm/train.py",
        task_dir=data / "train",
        val_dir=data / "val",
        signal_encoder_path=RUN / "pretrain_first/encoder",
        llm_model_path=llm,
        freeze_llm=True,
        signal_tokens=8,
        questions_per_signal=2,
        optimizer="muon",
        lr=2e-3,
        batch_size=16,
        epochs=size(2, smoke=0.1),
        output_dir=RUN / "base",
        overwrite=True,
    )
    stage("em_mllm/test.py", model=RUN / "base/model", task_dir=data / "test", out=RUN / "base/test")


if __name__ == "__main__":
    recipe(main)
