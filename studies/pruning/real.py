"""Recipe: the study on a small language model of real CT reports; perplexity alone, no volumes.

    DATA_ROOT=path/to/data python studies/pruning/real.py

Reads ct/ct_reports_train.json and ct/ct_reports_val.json below DATA_ROOT. SMOKE=1 runs the smallest sizes.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in

from common.checkpoint import atomic_write
from common.errors import UserError
from common.files import read_json
from studies.recipe import REAL, RUNS, recipe, size, stage

out = RUNS / "pruning"


def write_texts(source: Path, target: Path):
    """The reports of one split as .jsonl with the field text."""
    cases = read_json(source, {"cases": [{"report": str}]})["cases"]
    lines = [json.dumps({"text": case["report"]}, ensure_ascii=False) + "\n" for case in cases]
    atomic_write(target, "".join(lines))


def main():
    if REAL is None:
        raise UserError("DATA_ROOT is not set; give the folder that holds ct/ct_reports_train.json")
    reports = {split: REAL / f"ct/ct_reports_{split}.json" for split in ("train", "val")}
    texts = {split: out / f"real_{split}.jsonl" for split in reports}
    for split, file in reports.items():
        write_texts(file, texts[split])

    # A language model of 8 layers reads the training reports.
    stage(
        "studies/dia_pangu/warm_llm.py",
        reports=reports["train"],
        eval_reports=reports["val"],
        make=8,
        width=96,
        max_length=256,
        max_steps=size(200, smoke=6),
        batch_size=8,
        log_every=size(100, smoke=4),
        out=out / "llm_real",
        overwrite=True,
    )

    # The study on it; the held-out reports are scored.
    stage(
        "studies/pruning/study.py",
        model=out / "llm_real/model",
        texts=texts["train"],
        test_texts=texts["val"],
        out=out / "real_reports",
        overwrite=True,
        ratio=0.5,
        calibration=size(16, smoke=4),
        test_samples=size(40, smoke=10),
        train_samples=size(160, smoke=24),
        heal_steps=size(15, smoke=2),
        heal_batch=size(8, smoke=4),
        random_sets=size(3, smoke=2),
    )


if __name__ == "__main__":
    recipe(main)
