"""A pruned report model: loading, scoring, testing; on phantoms and a tiny Pangu-class model."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from common.errors import UserError
from pruning import report_model, test, train
from pruning.layers import without_layers
from pruning.report_model import Encoded, load_report_model, report_losses, task_prompts, write_reports
from pruning.sensitivity_analyse import layer_sensitivity_scan as scanner
from studies.recipe import options
from tests.pruning_world import merged, prune_map, world

__all__ = ["world"]


@pytest.mark.slow
def test_pruned_checkpoint_scores_as_the_full_one_without_that_layer(world):
    full, text, config = load_report_model(world / "lora", world / "llm")
    samples = Encoded(full, text, config, world / "data", "test", 4)
    with without_layers(full.lang_model, [2]):
        losses, reports = (
            report_losses(full, text, samples),
            write_reports(full, text, samples, 12)["reports"],
        )
    for llm, map_path in ((world / "llm", prune_map(world)), (world / "pruned" / "hf_drop2_2", None)):
        small, small_text, _ = load_report_model(merged(world), llm, map_path)
        assert torch.equal(report_losses(small, small_text, samples), losses)
        assert write_reports(small, small_text, samples, 12)["reports"] == reports
        assert small.embedding_layer.weight is small.lang_model.get_input_embeddings().weight
    assert not torch.allclose(report_losses(full, text, samples), losses), "the dropped layer did nothing"


def test_what_does_not_fit_is_named(world, tmp_path):
    with pytest.raises(UserError, match="--prune-map-path"):
        load_report_model(merged(world), world / "llm")
    other = json.loads(prune_map(world).read_text())
    other |= {"new_layers": 2, "layer_id_map": {"0": 0, "1": 1}}
    (tmp_path / "map.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="another model"):
        load_report_model(merged(world), world / "llm", tmp_path / "map.json")
    (tmp_path / "map.json").write_text("{}")
    with pytest.raises(UserError, match="no field .new_layers"):
        load_report_model(merged(world), world / "llm", tmp_path / "map.json")
    tensors = torch.load(merged(world), weights_only=True)
    del tensors["embedding_layer.fc.bias"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "dia_config.json").write_bytes((world / "lora" / "dia_config.json").read_bytes())
    with pytest.raises(UserError, match="--lora-alpha"):
        load_report_model(tmp_path / "pytorch_model.bin", world / "pruned" / "hf_drop2_2")
    with pytest.raises(UserError, match="fc.bias is missing"):
        load_report_model(tmp_path / "pytorch_model.bin", world / "pruned" / "hf_drop2_2", lora_alpha=16)


def test_alpha_that_upstream_guessed_is_not_believed(world, tmp_path):
    torch.save(torch.load(merged(world), weights_only=True), tmp_path / "pytorch_model.bin")
    upstream = {
        "tag": "drop2_2",
        "old_layers": 4,
        "new_layers": 3,
        "layer_id_map": {"0": 0, "1": 1, "2": 3},
        "lora_alpha": 4,
        "adapter_config_used": False,
    }
    (tmp_path / "map.json").write_text(json.dumps(upstream))
    with pytest.raises(UserError, match="--lora-alpha"):
        load_report_model(tmp_path / "pytorch_model.bin", world / "llm", tmp_path / "map.json")


def test_task_prompts_hold_the_volume_and_score_the_report(world):
    model, text, config = load_report_model(world / "lora", world / "llm")
    prompts = list(task_prompts(model, text, Encoded(model, text, config, world / "data", "train", 3)))
    blank = Encoded(model, text, config, world / "data", "train", 3)
    blank.tokens = [torch.zeros_like(t) for t in blank.tokens]
    assert not torch.equal(
        prompts[0]["inputs_embeds"], next(task_prompts(model, text, blank))["inputs_embeds"]
    )
    records = scanner.scan(model.lang_model, prompts, ["v"], ("kl",))
    losses = report_losses(
        model, text, Encoded(model, text, config, world / "data", "train", 3)
    )  # in one padded batch
    for record, prompt, (loss, tokens) in zip(records, prompts, losses.tolist(), strict=True):
        assert record["scored"] == tokens == int((prompt["labels"] != -100).sum())
        assert record["nll"] * tokens == pytest.approx(loss, rel=1e-5)
    naive = scanner.scan(model.lang_model, prompts, ["v"], ("kl",), method="naive")
    for a, b in zip(records, naive):
        assert [v["kl"] for v in a["variants"]] == pytest.approx(
            [v["kl"] for v in b["variants"]], rel=1e-4, abs=1e-7
        )


def test_a_sample_of_which_nothing_is_scored_is_named(world, tmp_path, monkeypatch):
    labels = torch.tensor([[7, -100, -100]])  # the first token is predicted by none
    bare = [{"name": "case 3", "inputs_embeds": torch.zeros(1, 3, 32), "labels": labels}]
    monkeypatch.setattr(report_model, "task_prompts", lambda *args: bare)
    flags = {"model": world / "lora", "lang_model_path": world / "llm", "task_data": world / "data"}
    with pytest.raises(UserError, match="data: case 3: no token of its report is scored"):
        scanner.main(scanner.parse_args(options({**flags, "task_samples": 1, "out": tmp_path / "s.csv"})))


def test_testing_writes_upstreams_files(world, tmp_path):
    flags = {"pruned_model_path": merged(world), "prune_map_path": prune_map(world), "data": world / "data"}
    flags |= {"lang_model_path": world / "llm", "out_dir": tmp_path, "tag_style": "c", "max_new_tokens": 8}
    test.main(test.parse_args(options(flags)))
    rows = list(csv.DictReader(open(tmp_path / "dia-pangu-pruned_c2_2.csv", encoding="utf-8")))
    assert list(rows[0]) == ["ID", "Question", "Ground Truth", "Pred", "GT_labels"]
    partitions = json.loads((world / "data/annotation_en.json").read_text())
    assert {row["ID"] for row in rows} == {item["id"] for item in partitions["test"]}
    timing = json.loads((tmp_path / "dia-pangu-pruned_c2_2_timing.json").read_text())
    assert timing["min_ms"] <= timing["p50_ms"] <= timing["p99_ms"] <= timing["max_ms"]
    scores = json.loads((tmp_path / "dia-pangu-pruned_c2_2_scores.json").read_text())
    assert scores["layers"] == 3 and scores["perplexity"] > 1
    assert {"finding_micro_f1", "BLEU_4", "ROUGE_L", "CIDEr"} <= scores.keys()


def test_scores_of_reports_are_those_of_scikit_learn_and_their_interval_is_of_95_percent(monkeypatch):
    rng = np.random.default_rng(0)
    labels, reported = rng.random((60, 14)) < 0.3, rng.random((60, 14)) < 0.3
    monkeypatch.setattr(report_model, "positives", lambda reports: reported.tolist())
    texts = [f"The heart is normal in case {i}." for i in range(60)]
    losses = torch.tensor([[2.0, 4.0], [1.0, 2.0]] * 30)
    scores = report_model.report_scores(texts, texts, labels.tolist(), losses)
    assert scores["finding_micro_f1"] == pytest.approx(f1_score(labels, reported, average="micro"), abs=1e-5)
    assert scores["finding_macro_f1"] == pytest.approx(f1_score(labels, reported, average="macro"), abs=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(0.5)) and scores["reports"] == 60
    rows = np.random.default_rng(1).integers(0, 60, (1000, 60))
    hits = (labels & reported)[rows].sum((1, 2))
    draws = hits / (hits + 0.5 * (labels ^ reported)[rows].sum((1, 2)))
    wanted = np.percentile(draws, (2.5, 97.5))
    assert scores["finding_micro_f1_interval"] == pytest.approx(wanted, abs=0.01)


REPORT = ["--data", "data", "--lang-model-path", "llm"]
MAP = "pruned/prune_layer_map_drop2_2_v0112_en_cpu.json"


@pytest.mark.parametrize("script", [train, test])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "data"], "--lang-model-path"),
        ([], "--data"),
        (["--data", "data", "--texts", "t"], "--texts"),
        ([*REPORT, "--prune-map-path", "missing.json"], "missing.json"),
        (["--data", "data", "--lang-model-path", "nowhere"], "nowhere"),
        (["--data", "gone", "--lang-model-path", "llm", "--prune-map-path", MAP], "gone"),
        (["--texts", "gone.txt", "--pruned-model-path", "llm"], "gone.txt"),
        ([*REPORT, "--pruned-model-path", "gone.bin"], "gone.bin"),
        (["--texts", "t", "--cache", "c"], "--cache has no effect with --texts"),
        (["--texts", "t", "--lang-model-path", "llm"], "--lang-model-path has no effect with --texts"),
    ],
)
def test_mistakes_of_healing_and_testing_are_named(world, script, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    words = ["--pruned-model-path", str(merged(world)), "--out", str(tmp_path / "out"), *arguments]
    with pytest.raises(UserError, match=message):
        script.main(script.parse_args(words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*REPORT, "--seed", "1"], "--seed has no effect without --do-sample"),
        (["--texts", "t", "--do-sample"], "--do-sample has no effect with --texts"),
        (["--texts", "t", "--tag-override", "x", "--tag-style", "c"], "--tag-style has no effect beside"),
    ],
)
def test_options_of_testing_without_effect_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        test.main(test.parse_args(["--pruned-model-path", "x", "--out", "y", *arguments]))


def test_percentiles_are_nearest_rank():
    assert [test.nearest_rank([5, 1, 4, 2, 3], p) for p in (0.5, 0.9, 0.99)] == [3, 5, 5]
