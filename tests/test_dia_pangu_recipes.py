"""studies/dia_pangu: the recipes run to their end at smoke size and leave what others look for."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from studies.dia_pangu import bases
from studies.dia_pangu.compare import Row
from tests import forked
from tests.golden import ROOT
from tests.tiny_dia import *  # noqa: F403  the fixture llm

RECIPES = ("bases", "builtin_model", "real", "builtin")


@pytest.fixture
def recipes(tmp_path, monkeypatch, data_root):
    """The recipes, loaded at smoke size with data and runs below tmp_path, and real data of a few reports
    and one scan; every stage runs in a fork, which costs what its steps cost."""
    real = tmp_path / "real/ct"
    (real / "volumes").mkdir(parents=True)
    for part in ("train", "val"):
        content = json.loads((data_root / f"ct/ct_reports_{part}.json").read_text())
        content["cases"] = content["cases"][:30]
        (real / f"ct_reports_{part}.json").write_text(json.dumps(content))
    for file in (data_root / "ct/volumes").glob("ts_example_3mm*"):
        (real / "volumes" / file.name).symlink_to(file)
    for name, value in {"SMOKE": "1", "RUNS": tmp_path / "runs", "DATA_ROOT": tmp_path / "real"}.items():
        monkeypatch.setenv(name, str(value))
    # Other tests of this process keep their modules, as entries and as attributes of the package.
    for name in ("studies.recipe", *(f"studies.dia_pangu.{name}" for name in RECIPES)):
        package, _, last = name.rpartition(".")
        if hasattr(sys.modules.get(package), last):
            monkeypatch.setattr(sys.modules[package], last, getattr(sys.modules[package], last))
        monkeypatch.delitem(sys.modules, name, raising=False)
    recipe = importlib.import_module("studies.recipe")
    recipe.DATA = tmp_path / "data"
    stages = []

    def stage(script, *arguments, **flags):
        stages.append(Path(script).name)
        done = forked.run_file(ROOT / script, *arguments, *recipe.options(flags))
        assert done.returncode == 0, f"{script}: {done.stderr[-3000:]}"

    recipe.stage = stage
    found = {name: importlib.import_module(f"studies.dia_pangu.{name}") for name in RECIPES}
    yield found, stages, tmp_path / "runs/dia_pangu"
    for name in ("studies.recipe", *(f"studies.dia_pangu.{name}" for name in RECIPES)):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("go_on", [False, True])
def test_bases_start_anew_or_go_on(go_on, monkeypatch, tmp_path):
    stages = []
    monkeypatch.setattr(bases, "SKIP_DONE", go_on)
    monkeypatch.setattr(bases, "stage", lambda script, **flags: stages.append(flags))
    monkeypatch.setattr(bases, "data", tmp_path / "data")
    (tmp_path / "data").mkdir()
    bases.main()
    assert (tmp_path / "data").is_dir() == go_on and len(stages) == 4
    for flags in stages[1:]:
        assert (flags["overwrite"], flags.get("resume")) == ((False, "auto") if go_on else (True, None))


@pytest.mark.slow
def test_the_built_in_recipe_runs_to_its_end(recipes):
    found, stages, out = recipes
    found["builtin"].main()
    assert stages.count("train.py") == 3 and stages.count("pretrain_vit.py") == 2
    assert stages.count("test.py") == 6 and "baselines.py" in stages
    assert (out / "ft/metrics.json").is_file()  # run_all starts pruning when it sees this
    assert (out / "ft-hidden/pytorch_model.bin").is_file()
    rows = {p.stem: json.loads(p.read_text()) for p in (out / "results").glob("*.json")}
    assert {"findings-of-a-volume", "findings-of-the-report"} <= set(rows)
    table = rows["findings-of-a-volume"]["details"]["table"]
    assert all(set(row) == set(Row.__dataclass_fields__) for row in table.values())
    assert {"model", "linear", "nearest", "common", "all positive", "other patient"} <= set(table)
    shown = rows["findings-of-a-volume"]
    assert table["model"]["diagnosis_micro"] == shown["value"] and "linear" in shown["controls"]
    assert "common" not in shown["controls"]  # it has no diagnosis


@pytest.mark.slow
def test_the_real_recipe_runs_to_its_end(recipes, llm):
    """With a tiny language model in SmolLM2's place."""
    found, stages, out = recipes
    found["real"].smollm2 = lambda: llm
    found["real"].main()
    assert stages.count("test.py") == 5 and stages.count("warm_llm.py") == 2 and "impressions.py" in stages
    rows = {p.stem: json.loads(p.read_text()) for p in (out / "results").glob("*.json")}
    assert {"labeler-on-real-reports", "report-model-on-real-text"} <= set(rows)
    assert {"findings-of-the-report", "impression-from-the-findings-of-a-real-report"} <= set(rows)
    assert "organs-on-their-side-after-reading" in rows
    bits = rows["report-model-on-real-text"]
    assert {"SmolLM2 as it is", "unigram"} < set(bits["controls"]) and bits["value"] > 0
    labels = rows["labeler-on-real-reports"]
    assert labels["value"] > max(labels["controls"].values())
