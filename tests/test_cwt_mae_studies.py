"""cwt_mae: the recipes of the study run at their smallest size and write the rows of the closing table."""

import csv
import importlib
import json

import numpy as np
import pytest

from cwt_mae import finetune, make_data, test, train, visualize  # noqa: F401  the server of forks imports them
from studies import recipe
from studies.cwt_mae import builtin, cnn, forest, labels, mitbih, probe, ptbxl, ucr  # noqa: F401
from tests import forked
from tests.tiny_cwt import run

pytestmark = pytest.mark.slow


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Every stage runs in a fork at smoke size; the list holds (script, flags) of each."""
    done = []

    def stage(script, *arguments, processes=1, threads=None, **flags):
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        ended = forked.call(module, [*arguments, *recipe.options(flags)], tmp_path / "log.txt")
        assert ended.returncode == 0, f"{script}: {ended.text[-2000:]}"
        done.append((script, flags))

    monkeypatch.setattr(recipe, "SMOKE", True)
    monkeypatch.setattr(builtin, "OUT", tmp_path / "runs" / "cwt_mae")
    monkeypatch.setattr(builtin, "DATA", tmp_path / "data")
    for module in (builtin, mitbih, ptbxl, ucr):
        monkeypatch.setattr(module, "stage", stage)
    return done


def row_of(folder) -> dict:
    """The one row of the closing table below `folder`."""
    (path,) = sorted((folder / "results").glob("*.json"))
    return json.loads(path.read_text())


def test_the_builtin_recipe_leaves_four_rows_with_their_controls(stages, tmp_path):
    builtin.builtin()
    rows = [json.loads(p.read_text()) for p in (tmp_path / "runs/cwt_mae/results").glob("*.json")]
    assert len(rows) == 4 and all(row["controls"] and np.isfinite(row["value"]) for row in rows)
    assert all(
        "split" in flags for script, flags in stages if script.endswith(("train.py", "tune.py", "test.py"))
    )


def test_the_interval_over_training_seeds_is_students():
    low, high = builtin.interval_of([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)


def test_the_recipe_in_ptb_xls_files_trains_chooses_and_reports_on_its_folds(stages, tmp_path):
    pytest.importorskip("wfdb")
    out = tmp_path / "runs" / "ptbxl"
    run(ptbxl, "--out", out)
    row = row_of(tmp_path / "runs")
    assert len(row["controls"]) == 3 and np.isfinite([row["value"], *row["controls"].values()]).all()
    # Every record of a patient of fold 10 is reported, no other
    with (out / "data" / "ptbxl_database.csv").open() as file:
        names = {r["filename_lr"] for r in csv.DictReader(file) if r["strat_fold"] == "10"}
    with (out / "tuned-test" / "per_record.csv").open() as file:
        assert {r["record"] for r in csv.DictReader(file)} == names


def test_label_curves_stand_beside_random_weights(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "SHARES", (0.1, 1.0))
    out = tmp_path / "runs" / "labels"
    run(labels, "--out", out)
    row = row_of(tmp_path / "runs")
    assert len(row["controls"]) == 5 and all(np.shape(v) == (1, 2) for v in row["details"].values())
    few, all_of_them = (
        json.loads((out / f"full-random-{share}-0" / "config.json").read_text())["arguments"]["label_share"]
        for share in ("0.1", "1")
    )
    assert (few, all_of_them) == (0.1, 1.0) and (out / "figures" / "labels.png").is_file()


def test_the_recipe_of_mit_bih_trains_on_ds1_and_scores_the_others(stages, tmp_path):
    data, out = tmp_path / "mitbih", tmp_path / "runs" / "mitbih"
    options = ["--out", tmp_path / "drawn", "--subjects", 9, "--seconds", 60, "--ppg", 0]
    run(make_data, *options)
    data.mkdir()
    names = ["101", "106", "108", "109", "112", "114", "100", "103", "105"]
    for name, path in zip(names, sorted((tmp_path / "drawn/labelled").glob("*.npz"))):
        with np.load(path) as file:
            record = dict(file)
        symbols = record["ann_symbol"]
        beats = np.flatnonzero(symbols == "N")
        symbols[beats[::9]] = "F"  # all four classes in every record
        symbols[beats[1::9]] = "A"
        symbols[beats[2::9]] = "V"
        np.savez(data / f"{name}.npz", **record | {"ann_symbol": symbols, "subject": name})
    common = ["--data", str(data), "--out", str(out), "--cache", str(tmp_path / "cache")]
    for words in (["train", *common], ["forest", *common], ["score", *common, "--seeds", "0"]):
        run(mitbih, *words)
    row = row_of(tmp_path / "runs")
    assert {"small CNN", "forest (README)", "forest, our input", "random, frozen too", "always N"} <= set(
        row["controls"]
    )
    scored = json.loads((out / "final-0-test" / "metrics.json").read_text())
    assert scored["records"] == 3 and scored["part"] == "test"
    pretrained = [flags for script, flags in stages if script == "cwt_mae/train.py"]
    assert [flags["split"] for flags in pretrained] == ["ds1"]


def test_the_recipe_of_a_ucr_set_scores_its_test_part(stages, tmp_path):
    rng, clock = np.random.default_rng(0), np.arange(96) / 96
    sets = {}
    for part, count in (("train", 20), ("test", 12)):
        labels = np.arange(count) % 2
        waves = np.sin(2 * np.pi * (3 + 2 * labels[:, None]) * clock) + 0.1 * rng.standard_normal((count, 96))
        sets |= {f"x_{part}": waves.astype(np.float32), f"y_{part}": labels}
    np.savez(tmp_path / "waves.npz", **sets)
    words = f"--data {tmp_path}/waves.npz --out {tmp_path}/runs/waves --cache {tmp_path}/cache".split()
    run(ucr, *words)
    row = row_of(tmp_path / "runs")
    assert {"random weights", "small CNN", "1-NN, computed"} <= set(row["controls"])
    scored = json.loads((tmp_path / "runs/waves/pre-trained-0-test/metrics.json").read_text())
    assert scored["windows"] == 12
