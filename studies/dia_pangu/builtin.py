"""Recipe of the built-in study: data and model (builtin_model.py), test, controls, baselines, comparison.

    python studies/dia_pangu/builtin.py

SEED=1 RUNS=runs/seed-1 trains from another seed, SMOKE=1 runs the smallest sizes. RESULTS.md holds what came
out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in

from studies.dia_pangu import builtin_model
from studies.dia_pangu.bases import data, out, vision
from studies.recipe import recipe, size, stage

CONTROLS = ("none", "blank", "swap", "swap-visual")


def main():
    builtin_model.main()

    # The test set, once, and the same model under controls; then without side and place in the prompt.
    model = {"ckpt_path": out / "ft-hidden", "lang_encoder_path": out / "llm/model"}
    test = {**model, "data": data, "cache": vision["cache"], "batch_size": 50, "max_new_tokens": 120}
    for control in CONTROLS:
        evidence = size(6, smoke=2)
        stage("dia_pangu/test.py", **test, control=control, evidence=evidence, out=out / f"test-{control}")
    for control in ("none", "swap-visual"):
        hidden = out / f"test-{control}-hidden"
        stage("dia_pangu/test.py", **test, control=control, hide_places=True, evidence=0, out=hidden)
    scores = out / "test-none/scores.json"
    stage("dia_pangu/evaluate/nlg_eval.py", csv=out / "test-none/dia-pangu.csv", out=scores)

    # What needs no report model, and all of it in one table.
    stage("studies/dia_pangu/baselines.py", data=data, **vision, out=out / "baselines")
    stage(
        "studies/dia_pangu/compare.py",
        data=data,
        model=out / "test-none",
        baselines=out / "baselines",
        control=[
            f"blank volume={out / 'test-blank'}",
            f"other patient={out / 'test-swap'}",
            f"other patient's image tokens={out / 'test-swap-visual'}",
            f"no place in the prompt={out / 'test-none-hidden'}",
            f"no place in the prompt, other patient's image tokens={out / 'test-swap-visual-hidden'}",
        ],
        out=out,
    )


if __name__ == "__main__":
    recipe(main)
