"""Recipe: which layers of dia_pangu's built-in model matter, what is lost without them, and what heals.

    python studies/pruning/builtin.py

The model is made first (studies/dia_pangu/builtin_model.py) where it is not there yet. SMOKE=1 runs the
smallest sizes. RESULTS.md holds what came out; real.py studies a pretrained model.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in

from studies.dia_pangu import bases, builtin_model
from studies.recipe import RUNS, recipe, size, stage

data, dia = bases.data, bases.out
out = RUNS / "pruning"
# Sizes of the study; second_base.py repeats it with the same.
sizes = {
    "ratio": size([0.25, 0.33, 0.5], smoke=[0.5]),
    "test_samples": size(100, smoke=8),
    "train_samples": size(320, smoke=24),
    "calibration": size(16, smoke=4),
    "heal_steps": size(30, smoke=2),
    "heal_batch": size(8, smoke=4),
    "heal_lr": 1e-3,
    "random_sets": size(5, smoke=2),
    "max_new_tokens": size(120, smoke=16),
}


def made_on(model: Path, data: Path) -> bool:
    """Whether `model` is a whole run of dia_pangu/train.py on `data`, whose annotation is still there."""
    config = model / "config.json"
    if not all(f.is_file() for f in (config, model / "pytorch_model.bin", data / "annotation_en.json")):
        return False
    return json.loads(config.read_text())["arguments"]["data"] == str(data)


def main():
    if not made_on(dia / "ft", data):
        builtin_model.main()

    # Scan, choose, prune, heal, test; on the test volumes of the phantoms.
    stage(
        "studies/pruning/study.py",
        model=dia / "ft",
        lang_model_path=dia / "llm/model",
        data=data,
        cache=data / "cache",
        out=out / "study",
        overwrite=True,
        **sizes,
    )


if __name__ == "__main__":
    recipe(main)
