"""SmolLM2-135M behind the convolutional encoder, on the built-in signals: as real.py joins it on captures.

    python studies/em_mllm/cnn.py             # first: data, encoders, the tiny language model's answers
    python studies/em_mllm/smollm2.py         # SEED=2 for another of its encoders

Answers by name, as there. LIMIT questions of each test file are asked (default 200, half of them with
options). Controls: the tiny language model on the same questions, and signals of another class. Twenty
minutes on a quiet core.
"""

import json
import os
import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from studies.em_mllm.cnn import BASE, RUN
from studies.em_mllm.real import READING, by_name
from studies.real_models import smollm2
from studies.recipe import RUNS, recipe, size, stage
from studies.summary import write_result

SEED, LIMIT = int(os.environ.get("SEED", 0)), int(os.environ.get("LIMIT", 200))
JOINED = RUN / f"smollm2-{SEED}"


def pairs(folder: Path) -> list:
    """All question files of a folder, each after its .h5."""
    return [path for task in sorted(folder.glob("*.json")) for path in (task.with_suffix(".h5"), task)]


def main():
    stage(
        "em_mllm/train.py",
        task_files=by_name(pairs(BASE / "data/train"), RUN / "smollm2_questions"),
        signal_encoder_path=RUN / f"seed-{SEED}/classes/model",
        llm_model_path=smollm2(),
        signal_tokens=8,
        seed=SEED,
        max_steps=size(300, smoke=2),
        out=JOINED,
        **READING,
    )

    # the same questions to both: the first of each file, which hold every class
    asked = {"limit": size(LIMIT, smoke=4), "task_dir": BASE / "data/test"}
    models = {"smollm2": JOINED / "model", "tiny": RUN / f"seed-{SEED}/joint/model"}
    found = {}
    for name, model in models.items():
        out = JOINED / f"test_{name}"
        stage("em_mllm/test.py", model=model, **asked, wrong_signal=True, batch_size=16, out=out)
        found[name] = json.loads((out / "metrics.json").read_text())
    stage(
        "studies/em_mllm/language.py",
        model=JOINED / "model",
        tokens=size(4096, smoke=64),
        out=JOINED / "language",
    )

    ours, tiny = found["smollm2"], found["tiny"]
    for key, name in (("accuracy", "all SNR"), ("accuracy_high_snr", "SNR >= 10 dB")):
        write_result(
            RUNS / "em_mllm",
            f"four-choice questions, SmolLM2-135M, {name}",
            "accuracy",
            ours[key],
            {"tiny language model": tiny[key], "signal of another class": ours["wrong_signal"][key]},
            note=f"{ours['four_choice']} questions, one training seed",
        )
        print(f"{name}: {ours[key]:.3f}, tiny {tiny[key]:.3f}, other signals {ours['wrong_signal'][key]:.3f}")


if __name__ == "__main__":
    recipe(main)
