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

CONTROLS = {"blank volume": "blank", "other patient": "swap", "other patient's image tokens": "swap-visual"}


def measured(test: dict, evidence: int, more: dict | None = None):
    """The test volumes, once, and under controls; the baselines, which need no report model; one table.

    test: flags of test.py. more: names of further folders of test.py.
    """
    stage("dia_pangu/test.py", **test, evidence=evidence, out=out / "test-none")
    for control in CONTROLS.values():
        stage("dia_pangu/test.py", **test, control=control, out=out / f"test-{control}")
    data = {"data": test["data"], "size": "tiny", "cache": test["cache"]}
    stage("studies/dia_pangu/baselines.py", **data, out=out / "baselines")
    folders = {name: out / f"test-{control}" for name, control in CONTROLS.items()} | (more or {})
    stage(
        "studies/dia_pangu/compare.py",
        data=test["data"],
        model=out / "test-none",
        baselines=out / "baselines",
        control=[f"{name}={folder}" for name, folder in folders.items()],
        out=out,
    )


def main():
    builtin_model.main()

    # The same model also without side and place in the prompt.
    model = {"ckpt_path": out / "ft-hidden", "lang_encoder_path": out / "llm/model"}
    test = {**model, "data": data, "cache": vision["cache"], "batch_size": 50}
    test["max_new_tokens"] = size(120, smoke=8)
    hidden = {control: out / f"test-{control}-hidden" for control in ("none", "swap-visual")}
    for control, folder in hidden.items():
        stage("dia_pangu/test.py", **test, control=control, hide_places=True, evidence=0, out=folder)
    more = {
        "no place in the prompt": hidden["none"],
        "no place in the prompt, other patient's image tokens": hidden["swap-visual"],
    }
    measured(test, size(6, smoke=2), more)
    scores = out / "test-none/scores.json"
    reports = {"csv": out / "test-none/dia-pangu.csv", "no_meteor": size(False, smoke=True)}
    stage("dia_pangu/evaluate/nlg_eval.py", **reports, out=scores)


if __name__ == "__main__":
    recipe(main)
