"""Recipe: phantoms, and the small bases that a report model needs: a vision part and a language model.

    python studies/dia_pangu/bases.py       SMOKE=1 for the smallest sizes, RUNS for the folder of the results

builtin_model.py continues from here, and so does dia_pangu/run_train.sh when no data are given. SEED is the
seed of the training (default 42); the data keep theirs. With SKIP_DONE=1, as run_train.sh starts it, a run
that was stopped goes on: what is made stays, and the training that was stopped goes on at its checkpoint.
"""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in

from studies.recipe import DATA, RUNS, SKIP_DONE, SMOKE, recipe, size, stage

data = DATA / ("dia_pangu_smoke" if SMOKE else "dia_pangu")
out = RUNS / "dia_pangu"
seed = int(os.environ.get("SEED", 42))
run = {"data": data, "overwrite": True, "seed": seed, "log_every": size(100, smoke=2)}  # of every training
vision = {"size": "tiny", "cache": data / "cache"}
places = out / "contrast" / "places.json"


def vision_part(options: dict, steps: int, contrast_steps: int):
    """The vision part learns patch labels first, then prototypes and memories too."""
    pretrain = "studies/dia_pangu/pretrain_vit.py"
    stage(pretrain, **options, max_steps=steps, out=out / "patches")
    contrast = {"start": out / "patches", "contrast": 2, "lr": 1e-3, "max_steps": contrast_steps}
    stage(pretrain, **options, **contrast, out=out / "contrast")


def main():
    # Phantoms. Data seed 1: the recipe was chosen on the validation volumes of seed 0, whose test volumes
    # earlier recipes had seen.
    if not SKIP_DONE:
        shutil.rmtree(data, ignore_errors=True)
    parts = {"train": size(2000, smoke=24), "val": size(200, smoke=8), "test": size(300, smoke=8)}
    stage("dia_pangu/make_data.py", out=data, seed=1, **parts)

    begin = {**run, "overwrite": False, "resume": "auto"} if SKIP_DONE else run
    vision_part({**begin, **vision}, size(1100, smoke=4), size(400, smoke=2))

    # A language model of 8 layers reads the reports alone.
    small = {"make": 8, "width": 96, "key_weight": 4, "batch_size": 8, "max_steps": size(1100, smoke=4)}
    stage("studies/dia_pangu/warm_llm.py", **begin, **small, places=places, out=out / "llm")


if __name__ == "__main__":
    recipe(main)
