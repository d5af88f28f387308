"""The pruning study and its recipes at the smallest sizes; intervals and verdicts against closed forms."""

import csv
import json
import shutil
from argparse import Namespace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from common.errors import UserError
from common.tiny_llm import make_llm, make_tokenizer
from pruning.layers import without_layers
from pruning.pruning_tools import prune_llm
from pruning.report_model import Encoded, load_report_model, report_losses
from pruning.sensitivity_analyse.layer_sensitivity_scan import layer_scores, scan, summarise, text_prompts
from pruning.sensitivity_analyse.load_model import load_model
from pruning.test import text_losses
from studies import recipe
from studies.dia_pangu import bases, builtin_model
from studies.pruning import builtin, real, real_llm, second_base, skills, study, tables, texts
from studies.recipe import options
from tests import forked
from tests.pruning_world import world

__all__ = ["world"]
ROOT = Path(__file__).resolve().parents[1]


def study_args(world, out, **flags):
    own = {"model": world / "base", "lang_model_path": world / "llm", "data": world / "data", "out": out}
    own |= {"ratio": 0.5, "calibration": 2, "train_samples": 4, "test_samples": 4, "heal_steps": 2}
    own |= {"heal_batch": 2, "random_sets": 1, "max_new_tokens": 6}
    return study.parse_args(options({**own, **flags}))


@pytest.mark.slow
def test_the_study_leaves_the_model_as_it_was_and_reuses_equal_sets(world, tmp_path, monkeypatch, capsys):
    out, original, calls, states = tmp_path / "study", study.evaluate_set, [], []

    def watched(task, drop, *more):
        calls.append(tuple(drop))
        states.append({k: v.clone() for k, v in task.model.state_dict().items()})
        return original(task, drop, *more)

    monkeypatch.setattr(study, "evaluate_set", watched)
    study.main(study_args(world, out))
    assert len(calls) == len(set(calls)), "a set was evaluated twice"
    assert all(torch.equal(states[0][k], s[k]) for s in states for k in s), "healing leaked into the next set"
    table = list(csv.DictReader(open(out / "table.csv")))
    assert [r["criterion"] for r in table] == ["unpruned", *tables.CRITERIA, *tables.CONTROLS]
    assert all(float(r["parameters"]) < float(table[0]["parameters"]) for r in table[1:])
    assert all(r["perplexity_before"] != r["perplexity_after"] for r in table), "healing changed nothing"
    assert "largest difference of a test sample's loss is 0.0e+00" in capsys.readouterr().out
    for name in ("tradeoff.png", "healing.png", "layer_sensitivity.png"):
        assert (out / name).stat().st_size > 5000
    result = json.loads(next((tmp_path / "results").glob("*f1.json")).read_text())
    assert {"unpruned", "before healing", "last", "random", "random_keep0"} <= result["controls"].keys()

    # the same again, with the sets of "another" study, which is this one
    before = len(calls)
    study.main(study_args(world, out, also=out))
    assert len(calls) == before, "the second run should find everything in evaluations.json"
    rows = {r["criterion"]: r for r in csv.DictReader(open(out / "table.csv"))}
    for name in tables.CRITERIA:
        assert rows[f"{name}_elsewhere"]["perplexity_after"] == rows[name]["perplexity_after"]
    assert capsys.readouterr().out.count("1.00, without layer 0 1.00") == 5
    with pytest.raises(UserError, match="another study"):
        study.main(study_args(world, out, heal_steps=3))


@pytest.mark.slow
def test_a_study_of_a_model_that_was_trained_again_is_not_continued(world, tmp_path):
    (tmp_path / "study").mkdir()
    stamp = {"stamp": {"weights": "of an earlier training"}, "sets": {}}
    (tmp_path / "study" / "evaluations.json").write_text(json.dumps(stamp))
    with pytest.raises(UserError, match="another study"):
        study.main(study_args(world, tmp_path / "study", calibration=1, train_samples=2, test_samples=2))


def test_what_is_chosen_on_and_healed_on_is_no_test_sample(world, tmp_path):
    """Names, volumes and reports of the samples as they reach the model."""
    task = study.ReportTask(study_args(world, tmp_path, train_samples=8), torch.device("cpu"))
    partitions = json.loads((world / "data/annotation_en.json").read_text())
    names = {split: {item["id"] for item in some} for split, some in partitions.items()}
    healed = [task.train_set[i] for i in range(len(task.train_set))]
    tested = [task.test_set[i] for i in range(len(task.test_set))]
    assert {s["id"] for s in healed} == names["train"] and {s["id"] for s in tested} <= names["test"]
    assert len(task.prompts) == 2 and {p["name"] for p in task.prompts} <= names["train"]
    assert not any(torch.equal(a["tokens"], b["tokens"]) for a in healed for b in tested)
    assert not {s["report"] for s in healed} & {s["report"] for s in tested}
    assert task.labels.tolist() == [(s["cls_labels"] == 1).tolist() for s in tested]


@pytest.mark.slow
@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, reverse=True)])
def test_each_set_is_checked_with_its_own_map_when_names_begin_alike(world, tmp_path, monkeypatch, order):
    glob = Path.glob
    monkeypatch.setattr(
        Path, "glob", lambda *args: iter(order(glob(*args)))
    )  # a folder may list its files in any order
    args = Namespace(model=world / "lora", lang_model_path=world / "llm", out=tmp_path)
    model, text, config = load_report_model(world / "lora", world / "llm")
    task, evaluations = Namespace(test_set=Encoded(model, text, config, world / "data", "test", 2)), {}
    for spec in ("1", "1,3"):  # drop1 and drop1_3
        with without_layers(model.lang_model, prune_llm.parse_drop_layers(spec)):
            evaluations[spec] = {"before": {"losses": report_losses(model, text, task.test_set).tolist()}}
    choices = [{"criterion": "sensitivity", "drop_layers": spec} for spec in evaluations]
    assert study.check_on_disk(task, args, choices, evaluations) == 0


def test_intervals_are_paired_and_say_when_nothing_differs():
    def evaluation(errors):
        rows = [[2.0, float(e)] for e in errors]
        return {s: {"counts": rows, "losses": [[1.0 + e, 10.0] for e in errors]} for s in ("before", "after")}

    sets = {"0": evaluation([1, 2] * 20), "1": evaluation([1, 2] * 20), "2": evaluation([4, 5] * 20)}
    choices = [
        {
            "criterion": c,
            "ratio": 0.5,
            "drop_layers": "0" if c in tables.CRITERIA else "1" if c == "last" else "2",
        }
        for c in (*tables.CRITERIA, *tables.CONTROLS)
    ]
    verdicts = {
        (c["metric"], c["control"]): c["verdict"] for c in tables.compare(choices, sets, ("f1", "perplexity"))
    }
    for metric in ("f1", "perplexity"):
        assert verdicts[metric, "last"] == "no difference" and verdicts[metric, "random"] == "better"
        assert (
            verdicts[metric, "greedy"] == "no difference" and (metric, "sensitivity") not in verdicts
        )  # each pair of criteria once


def test_the_interval_of_a_random_control_covers_its_sets():
    sets = [
        {"counts": [[2.0, errors]] * 30, "losses": [[1.0 + errors, 10.0]] * 30} for errors in (0.0, 4.0)
    ]  # all reports alike
    for metric in ("f1", "perplexity"):
        assert np.ptp(tables.quality(sets[:1], metric)[1]) < 1e-9
        ends = [tables.quality([s], metric)[0] for s in sets]
        low, high = np.percentile(tables.quality(sets, metric)[1], (2.5, 97.5))
        assert (low, high) == pytest.approx(sorted(ends))


def test_quality_is_micro_f1_and_perplexity_and_its_interval_is_of_95_percent():
    rng = np.random.default_rng(3)
    labels, reported = rng.random((40, 14)) < 0.3, rng.random((40, 14)) < 0.3
    losses = np.stack([rng.random(40) * 9 + 1, rng.integers(5, 9, 40)], 1)
    measured = {"counts": tables.counts(labels, reported).tolist(), "losses": losses.tolist()}
    value, draws = tables.quality([measured], "f1")
    assert value == pytest.approx(f1_score(labels, reported, average="micro"), abs=1e-6)
    perplexity, _ = tables.quality([measured], "perplexity")
    assert perplexity == pytest.approx(np.exp(losses[:, 0].sum() / losses[:, 1].sum()))
    low, high = tables.interval(draws)
    assert np.mean((draws >= low) & (draws <= high)) == pytest.approx(0.95, abs=0.003)
    normal = NormalDist(value, np.std(draws))  # of a mean of 40 reports the bootstrap is nearly normal
    assert (low, high) == pytest.approx((normal.inv_cdf(0.025), normal.inv_cdf(0.975)), abs=0.02)


def test_the_bootstrap_draws_the_same_reports_for_every_set():
    rows = np.random.default_rng(0).random((30, 2))
    _, both = tables.quality([{"losses": rows}, {"losses": rows}], "perplexity")
    _, one = tables.quality([{"losses": rows}], "perplexity")
    assert np.allclose(both, one), "of two equal sets no difference may be left"


def test_changes_of_the_loss_are_against_the_whole_model(world):
    model, tokenizer = load_model(world / "llm")
    prompts = text_prompts(["The heart is of normal size."], tokenizer)
    (record,) = scan(model, prompts, [], ("kl",))
    found = layer_scores(summarise([record]), "layer", "nll_change")
    for layer, change in enumerate(found):
        with without_layers(model, [layer]):
            (loss, tokens) = text_losses(model, tokenizer, ["The heart is of normal size."])[0].tolist()
        assert change == pytest.approx(loss / tokens - record["nll"], abs=1e-5)


@pytest.mark.parametrize(
    "difference, low, high, metric, said",
    [
        (0.1, 0.02, 0.2, "f1", "better"),
        (-0.1, -0.2, -0.02, "f1", "worse"),
        (0.1, 0.02, 0.2, "perplexity", "worse"),
        (-0.1, -0.2, -0.02, "perplexity", "better"),
        (0.1, -0.01, 0.2, "f1", "no difference"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero_and_knows_which_way_is_good(
    difference, low, high, metric, said
):
    assert tables.verdict(difference, low, high, metric) == said


def test_claims_name_every_criterion_once_for_each_control_after_healing():
    rows = [
        {"ratio": 0.5, "metric": "f1", "stage": stage, "criterion": c, "control": k, "verdict": verdict}
        for c, verdict in zip(tables.CRITERIA, ("better", "better", "worse", "no difference"))
        for k in tables.CONTROLS
        for stage in tables.STAGES
    ]
    sentences = tables.claims(rows, [0.5], ["f1"])
    assert sentences[0] == (
        "50% removed, healed, f1 against last: better: sensitivity, block_influence; worse: leave_one_out; "
        "no difference: greedy"
    )
    assert len(sentences) == len(tables.CONTROLS)


# ---------------------------------------- recipes


@pytest.fixture
def small(world, tmp_path, monkeypatch):
    """The smallest sizes, folders of this test, stages that run in forks; returns the scripts that ran.

    The study itself, which has its own test, only reads its command line.
    """
    ran = []

    def stage(script, *arguments, processes=1, threads=None, **flags):
        ran.append(script)
        words = [*map(str, arguments), *options(flags)]
        if script == "studies/pruning/study.py":
            assert study.parse_args(words).out.parent == tmp_path / "pruning"
            return
        done = forked.run_file(ROOT / script, *words)
        assert done.returncode == 0, f"{script} {' '.join(words)}\n{done.stderr[-3000:]}"

    for module in (builtin, real, second_base, builtin_model, bases):
        monkeypatch.setattr(module, "stage", stage)
        for name, value in (
            ("out", tmp_path / "pruning"),
            ("data", world / "data"),
            ("dia", tmp_path / "dia"),
        ):
            if hasattr(module, name) and module not in (builtin_model, bases):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(recipe, "SMOKE", True)
    return ran


def test_the_built_in_recipe_studies_the_model_of_dia_pangu(world, tmp_path, small):
    shutil.copytree(world / "lora", tmp_path / "dia/ft")
    shutil.copytree(world / "llm", tmp_path / "dia/llm/model")
    config = {"arguments": {"data": str(world / "data")}}
    (tmp_path / "dia/ft/config.json").write_text(json.dumps(config))
    builtin.main()
    assert small == ["studies/pruning/study.py"], "a model that is there is not made again"


def test_the_built_in_recipe_makes_the_model_where_it_is_not_there_or_of_other_data(world, tmp_path):
    model = tmp_path / "ft"
    assert not builtin.made_on(model, world / "data")
    shutil.copytree(world / "lora", model)
    (model / "config.json").write_text(json.dumps({"arguments": {"data": "elsewhere"}}))
    assert not builtin.made_on(model, world / "data")
    (model / "config.json").write_text(json.dumps({"arguments": {"data": str(world / "data")}}))
    assert builtin.made_on(model, world / "data") and not builtin.made_on(model, tmp_path)


def vision_part(model, folder):
    """A checkpoint as pretrain_vit.py leaves it: without the tensors whose shape a language model decides."""
    tensors = torch.load(model / "pytorch_model.bin", weights_only=True)
    outer = ("lang_model.", "embedding_layer.weight", "embedding_layer.fc.", "embedding_layer.figure_token")
    folder.mkdir(parents=True)
    kept = {key: value for key, value in tensors.items() if not key.startswith(outer)}
    torch.save(kept, folder / "pytorch_model.bin")
    shutil.copy(model / "dia_config.json", folder / "dia_config.json")


@pytest.mark.slow
def test_the_second_base_is_trained_and_studied(world, tmp_path, small, monkeypatch):
    """The shell script of the first edition was refused at its third training."""
    with pytest.raises(UserError, match="run studies/pruning/builtin.py first"):
        second_base.main()
    vision_part(world / "lora", tmp_path / "dia/contrast")
    shutil.copy(world / "places.json", tmp_path / "dia/contrast/places.json")
    (tmp_path / "pruning/study").mkdir(parents=True)
    (tmp_path / "pruning/study/layer_sensitivity.all.csv").touch()
    places = tmp_path / "dia/contrast/places.json"
    monkeypatch.setattr(bases, "places", places)
    folders = {"data": world / "data", "overwrite": True, "log_every": 4}
    monkeypatch.setattr(bases, "run", folders)
    for name in ("model", "finetune"):
        changed = {
            **getattr(builtin_model, name),
            "places": places,
            "cache": tmp_path / "cache",
            "batch_size": 4,
        }
        monkeypatch.setattr(builtin_model, name, changed)
    second_base.main()
    assert small[-1] == "studies/pruning/study.py" and len(small) == 4


@pytest.mark.slow
def test_the_real_study_measures_every_set_and_repair_once_and_goes_on(tmp_path, small, monkeypatch, capsys):
    (tmp_path / "data/ct").mkdir(parents=True)
    for split, start in (("train", 0), ("val", 100)):
        lines = [f"The lungs of case {start + i} are clear. The heart is normal." for i in range(18)]
        cases = json.dumps({"cases": [{"id": f"{split}{i}", "report": t} for i, t in enumerate(lines)]})
        (tmp_path / f"data/ct/ct_reports_{split}.json").write_text(cases)
    make_llm(tmp_path / "llm", make_tokenizer(lines, 300), num_hidden_layers=4)
    monkeypatch.setattr(real, "REAL", tmp_path / "data")
    monkeypatch.setattr(real.real_models, "smollm2", lambda: tmp_path / "llm")
    real.main()
    assert small == ["studies/pruning/real_llm.py"]
    file = tmp_path / "pruning/llm/evaluations.json"
    first = json.loads(file.read_text())["sets"]
    repaired = [name for name in first if "repaired" in name or "tuned" in name]
    assert len(repaired) > len(real_llm.REPAIRS) + 1 and "whole model" in first
    for name in repaired:
        assert set(first[name]["skills"]) == {"choice", "sums", "brackets", "copying"}
    # a closed form is kept only where it helps; what trains changes the model in any case
    kept = {json.dumps(first[name]["reports"]) for name in repaired}
    assert len(kept) >= 4, "repairs that change nothing"
    results = [json.loads(f.read_text()) for f in (tmp_path / "pruning/results").glob("*.json")]
    assert len(results) == 2 and all("lower" in row["metric"] for row in results)
    real.main()
    assert json.loads(file.read_text())["sets"] == first, "what was measured was measured again"
    monkeypatch.setattr(real, "REAL", None)
    with pytest.raises(UserError, match="DATA_ROOT"):
        real.main()


def test_texts_of_the_real_study_do_not_overlap():
    training, held_out = texts.english()
    assert len(training) > 100 and len(held_out) > 30 and not set(training) & set(held_out)


def test_skills_are_counted_by_the_first_choice():
    class Knows:
        """A model that knows the next token of every text of the test: it looks it up."""

        device = torch.device("cpu")

        def __init__(self, shift):
            self.shift = shift

        def __call__(self, input_ids, use_cache=False):
            logits = torch.nn.functional.one_hot((input_ids.roll(-1, 1) + self.shift) % 300, 300).float() * 9
            return Namespace(logits=logits)

    tokenizer = make_tokenizer(["red house river seven cloud"], 300)
    assert skills.score_skills(Knows(0), tokenizer, 3)["copying"] == 1
    assert skills.score_skills(Knows(1), tokenizer, 3)["copying"] == 0
