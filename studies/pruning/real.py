"""Recipe: a pretrained language model without a part of its layers, on real CT reports and plain English.

    bash run_all.sh --real pruning          or    DATA_ROOT=path/to/data python studies/pruning/real.py

The model is SmolLM2-135M-Instruct (studies/real_models.py); the reports are ct/ct_reports_{train,val}.json
below DATA_ROOT. SMOKE=1 runs the smallest sizes. An interrupted study goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in

from common.errors import UserError
from studies import real_models
from studies.recipe import REAL, RUNS, recipe, size, stage

out = RUNS / "pruning"


def main():
    if REAL is None:
        raise UserError("DATA_ROOT is not set; give the folder that holds ct/ct_reports_train.json")
    stage(
        "studies/pruning/real_llm.py",
        model=real_models.smollm2(),
        reports=REAL / "ct/ct_reports_train.json",
        test_reports=REAL / "ct/ct_reports_val.json",
        out=out / "llm",
        ratio=size([0.1, 0.25, 0.33, 0.5], smoke=[0.25]),
        draws=size(3, smoke=1),
        calibration=size([8, 32], smoke=[2, 4]),
        calibration_tokens=size(32, smoke=16),
        test_tokens=size(2048, smoke=64),
        window=size(2048, smoke=32),
        heal_steps=size(12, smoke=1),
        heal_tokens=size(640, smoke=32),
        repair_pieces=size(8, smoke=4),
        repair_tokens=size(512, smoke=24),
        held_out=size(6, smoke=2),
        skill_items=size(20, smoke=1),
    )


if __name__ == "__main__":
    recipe(main)
