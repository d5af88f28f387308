"""A pruned report model: loading, healing, testing, the whole study; on phantoms and a tiny Pangu-class model."""

import csv
import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.tiny_llm import make_llm, make_tokenizer
from dia_pangu import make_data
from dia_pangu.src.Dataset.prompt import LATERAL
from dia_pangu.src.Model.build import TINY, build_model, save_model
from pruning import test, train
from pruning.layers import without_layers
from pruning.pruning_tools import prune_llm
from pruning.report_model import Encoded, load_report_model, report_losses, task_prompts, write_reports
from pruning.sensitivity_analyse import layer_sensitivity_scan as scanner
from pruning.sensitivity_analyse.load_model import load_model
from studies.pruning import study, tables
from tests import forked
from tests.parity import assert_same_first_step

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """data/, llm/ (4 layers), base/ (without LoRA), lora/ (with, alpha 16, and prompts that name places) and pruned/ (lora
    without layer 2), places.json."""
    root = tmp_path_factory.mktemp("world")
    make_data.main(Namespace(out=str(root / "data"), train=8, val=2, test=4, seed=0))
    everywhere = {name: ("left", "upper") for name in LATERAL}
    (root / "places.json").write_text(json.dumps({str(i): everywhere for i in range(1, 11)}))
    reports = [
        item["finding"] for item in json.loads((root / "data" / "annotation_en.json").read_text())["train"]
    ]
    make_llm(
        root / "llm",
        make_tokenizer(reports, 300),
        "PanguEmbedded",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        bias=True,
    )
    for name, lora in (
        ("base", None),
        ("lora", {"r": 2, "alpha": 16, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}),
    ):
        torch.manual_seed(0)
        config = {**TINY, "lora": lora, "embedding": {**TINY["embedding"], "evidence_head": lora is not None}}
        model, _ = build_model(config, root / "llm")
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        save_model(model.state_dict(), root / name, config)
    prune_llm.main(
        prune_llm.parse_args(
            [
                "--ckpt",
                str(root / "lora"),
                "--lang-model-path",
                str(root / "llm"),
                "--out-dir",
                str(root / "pruned"),
                "--drop-layers",
                "2",
                "--hf",
                "merged",
            ]
        )
    )
    return root


def merged(root):
    return root / "pruned" / "pytorch_model_pruned_drop2_2_merged_clean_v0112_en_cpu.bin"


def prune_map(root):
    return root / "pruned" / "prune_layer_map_drop2_2_v0112_en_cpu.json"


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
    with pytest.raises(UserError, match="--prune_map_path"):
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


def heal_args(world, out, *more):
    return [
        "--pruned_model_path",
        str(merged(world)),
        "--prune_map_path",
        str(prune_map(world)),
        "--lang-model-path",
        str(world / "llm"),
        "--data",
        str(world / "data"),
        "--places",
        str(world / "places.json"),
        "--out",
        str(out),
        "--per-device-train-batch-size",
        "2",
        "--gradient-accumulation-steps",
        "1",
        "--learning-rate",
        "0.01",
        "--warmup-steps",
        "1",
        "--logging-steps",
        "1",
        *more,
    ]


def losses_of(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_healing_lowers_the_loss_and_touches_lora_alone(world, tmp_path):
    train.main(
        train.parse_args(heal_args(world, tmp_path / "healed", "--max-steps", "12", "--drop_layers", "2"))
    )
    curve = losses_of(tmp_path / "healed")
    assert np.mean(curve[-3:]) < np.mean(curve[:3])
    before, after = (
        torch.load(p, weights_only=True) for p in (merged(world), tmp_path / "healed" / "pytorch_model.bin")
    )
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all("lora_" in k for k in changed) and before.keys() == after.keys()
    assert json.loads((tmp_path / "healed" / "timing.json").read_text())["status"] == "finished"
    healed, _, config = load_report_model(tmp_path / "healed", world / "llm", prune_map(world))
    assert config["lora"]["alpha"] == 16
    with pytest.raises(UserError, match="name side and place"):
        train.main(train.parse_args([a for a in heal_args(world, tmp_path / "x") if "places" not in a]))
    with pytest.raises(UserError, match="drop_layers"):
        train.main(train.parse_args(heal_args(world, tmp_path / "x", "--drop_layers", "1")))


def test_upstreams_names_and_underscores_are_understood():
    flags = {"--output_dir": "y", "--save_steps": "7", "--lora_dropout": "0.2", "--num_train_epochs": "3"}
    flags |= {
        "--per_device_train_batch_size": "2",
        "--gradient_accumulation_steps": "5",
        "--warmup_steps": "9",
    }
    words = [word for pair in flags.items() for word in pair]
    args = train.parse_args(["--pruned_merged_ckpt", "x", "--prune_map", "m", *words])
    assert (str(args.pruned_model_path), str(args.prune_map_path), str(args.out)) == ("x", "m", "y")
    assert (args.save_every, args.lora_dropout, args.epochs, args.warmup) == (7, 0.2, 3.0, 9)
    assert (args.batch_size, args.accum) == (2, 5)
    assert train.parse_args(["--pruned-model-path=x", "--out=y"]).lora_r == 4


def test_full_healing_trains_the_layers_and_nothing_else(world):
    model, _, _ = load_report_model(world / "base", world / "llm")
    names = train.set_trained(model, full=True)
    assert names and all(".layers." in n and n.startswith("lang_model.") for n in names)


def test_distillation_from_itself_starts_at_distance_zero_and_mixes(world, tmp_path):
    model, text, config = load_report_model(world / "lora", world / "llm")
    teacher = load_report_model(world / "lora", world / "llm")[0]
    samples = Encoded(model, text, config, world / "data", "train", 2)
    from pruning.report_model import collate_encoded

    batch = {k: v for k, v in collate_encoded([samples[0], samples[1]]).items() if k in train.INPUTS}
    out = train.Healing(model, teacher, 0.25)(**batch)
    assert out["distance"].item() == pytest.approx(0, abs=1e-6)
    assert out["loss"].item() == pytest.approx(0.75 * out["lm_loss"].item(), rel=1e-5)
    with without_layers(model.lang_model, [1]):
        assert train.Healing(model, teacher, 0.25)(**batch)["distance"].item() > 1e-4
    with pytest.raises(UserError, match="--teacher"):
        train.check(train.parse_args(heal_args(world, tmp_path, "--distill", "0.5")))


@pytest.mark.slow
def test_two_processes_heal_as_one_and_resume_is_exact(world, tmp_path):

    def launch(processes, out, *more):
        line = [ROOT / "pruning/train.py", *heal_args(world, out, *more)]
        done = forked.run_file(*line, processes=processes, CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 0, done.stderr

    launch(1, tmp_path / "one", "--max-steps", "3", "--save-steps", "1")
    launch(2, tmp_path / "two", "--max-steps", "1", "--per-device-train-batch-size", "1")
    assert_same_first_step(tmp_path / "one", tmp_path / "two")
    (tmp_path / "one" / "last").unlink()
    shutil.copytree(tmp_path / "one", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000003")
    launch(1, tmp_path / "cut", "--max-steps", "3", "--save-steps", "1", "--resume")
    a, b = (torch.load(tmp_path / n / "pytorch_model.bin", weights_only=True) for n in ("one", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a), "the resumed run ended elsewhere"


def test_testing_writes_upstreams_files(world, tmp_path):
    test.main(
        test.parse_args(
            [
                "--pruned_model_path",
                str(merged(world)),
                "--prune_map_path",
                str(prune_map(world)),
                "--lang-model-path",
                str(world / "llm"),
                "--data",
                str(world / "data"),
                "--out_dir",
                str(tmp_path),
                "--tag_style",
                "c",
                "--max-new-tokens",
                "8",
            ]
        )
    )
    rows = list(csv.DictReader(open(tmp_path / "dia-pangu-pruned_c2_2.csv", encoding="utf-8")))
    assert list(rows[0]) == ["ID", "Question", "Ground Truth", "Pred", "GT_labels"] and len(rows) == 4
    timing = json.loads((tmp_path / "dia-pangu-pruned_c2_2_timing.json").read_text())
    assert timing["min_ms"] <= timing["p50_ms"] <= timing["p99_ms"] <= timing["max_ms"]
    scores = json.loads((tmp_path / "dia-pangu-pruned_c2_2_scores.json").read_text())
    assert (
        scores["layers"] == 3
        and scores["perplexity"] > 1
        and {"finding_micro_f1", "BLEU_4", "ROUGE_L", "CIDEr"} <= scores.keys()
    )


@pytest.mark.parametrize("script", [train, test])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "data"], "--lang-model-path"),
        ([], "--data"),
        (["--data", "data", "--texts", "t"], "--texts"),
        (["--data", "data", "--lang-model-path", "llm", "--prune_map_path", "missing.json"], "missing.json"),
        (["--data", "data", "--lang-model-path", "nowhere"], "nowhere"),
        (
            [
                "--data",
                "gone",
                "--lang-model-path",
                "llm",
                "--prune_map_path",
                "pruned/prune_layer_map_drop2_2_v0112_en_cpu.json",
            ],
            "gone",
        ),
        (["--texts", "gone.txt", "--pruned_model_path", "llm"], "gone.txt"),
        (["--data", "data", "--lang-model-path", "llm", "--pruned_model_path", "gone.bin"], "gone.bin"),
    ],
)
def test_mistakes_of_healing_and_testing_are_named(world, script, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    with pytest.raises(UserError, match=message):
        script.main(
            script.parse_args(
                ["--pruned_model_path", str(merged(world)), "--out", str(tmp_path / "out"), *arguments]
            )
        )
    assert not (tmp_path / "out").exists()


def test_percentiles_are_nearest_rank():
    assert [test.nearest_rank([5, 1, 4, 2, 3], p) for p in (0.5, 0.9, 0.99)] == [3, 5, 5]


def test_plain_language_models_heal_and_test_on_texts(world, tmp_path):
    (tmp_path / "texts.txt").write_text(
        "\n".join(f"The heart is of normal size, case {i}." for i in range(8))
    )
    hf = world / "pruned" / "hf_drop2_2"
    train.main(
        train.parse_args(
            [
                "--pruned_model_path",
                str(hf),
                "--texts",
                str(tmp_path / "texts.txt"),
                "--out",
                str(tmp_path / "healed"),
                "--max-steps",
                "10",
                "--per-device-train-batch-size",
                "4",
                "--gradient-accumulation-steps",
                "1",
                "--learning-rate",
                "0.02",
                "--distill",
                "0.3",
                "--teacher",
                str(world / "llm"),
            ]
        )
    )
    found = []
    for path in (hf, tmp_path / "healed" / "model"):
        test.main(
            test.parse_args(
                [
                    "--pruned_model_path",
                    str(path),
                    "--texts",
                    str(tmp_path / "texts.txt"),
                    "--out_dir",
                    str(tmp_path),
                    "--tag_override",
                    path.name,
                ]
            )
        )
        found.append(json.loads((tmp_path / f"dia-pangu-pruned_{path.name}_scores.json").read_text()))
    model, tokenizer = load_model(hf)
    rows = [
        torch.tensor([tokenizer(text).input_ids])
        for text in (tmp_path / "texts.txt").read_text().splitlines()
    ]
    with torch.no_grad():
        losses = torch.cat(
            [
                torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
                for ids in rows
            ]
        )
    assert found[0]["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert (
        found[1]["perplexity"] < found[0]["perplexity"] and found[1]["parameters"] == found[0]["parameters"]
    )


@pytest.mark.slow
def test_the_study_leaves_the_model_as_it_was_and_reuses_equal_sets(world, tmp_path, monkeypatch, capsys):
    args = study.parse_args(
        [
            "--model",
            str(world / "base"),
            "--lang-model-path",
            str(world / "llm"),
            "--data",
            str(world / "data"),
            "--out",
            str(tmp_path / "study"),
            "--ratio",
            "0.5",
            "--calibration",
            "2",
            "--train-samples",
            "4",
            "--test-samples",
            "4",
            "--heal-steps",
            "2",
            "--heal-batch",
            "2",
            "--random-sets",
            "2",
            "--max-new-tokens",
            "6",
        ]
    )
    real, calls, states = study.evaluate_set, [], []

    def watched(task, drop, *more):
        calls.append(tuple(drop))
        states.append({k: v.clone() for k, v in task.trained.state_dict().items()})
        return real(task, drop, *more)

    monkeypatch.setattr(study, "evaluate_set", watched)
    study.main(args)
    assert len(calls) == len(set(calls)), "a set was evaluated twice"
    assert all(torch.equal(states[0][k], s[k]) for s in states for k in s), (
        "healing one set leaked into the next"
    )
    out = tmp_path / "study"
    table = list(csv.DictReader(open(out / "table.csv")))
    assert [r["criterion"] for r in table] == ["unpruned", *tables.CRITERIA, *tables.CONTROLS]
    assert all(float(r["parameters"]) < float(table[0]["parameters"]) for r in table[1:])
    assert "largest difference of a test sample's loss is 0.0e+00" in capsys.readouterr().out
    for name in ("tradeoff.png", "healing.png", "layer_sensitivity.png"):
        assert (out / name).stat().st_size > 5000
    result = json.loads(next((tmp_path / "results").glob("*f1.json")).read_text())
    assert {"unpruned", "before healing", "last", "random", "random_keep0"} <= result["controls"].keys()
    before = len(calls)
    args.also = out  # the sets of "another" study, which is this one
    study.main(args)
    assert len(calls) == before, "the second run should find everything in evaluations.json"
    rows = {r["criterion"]: r for r in csv.DictReader(open(out / "table.csv"))}
    assert all(
        rows[f"{name}_elsewhere"]["perplexity_after"] == rows[name]["perplexity_after"]
        for name in tables.CRITERIA
    )
    assert capsys.readouterr().out.count("1.00, without layer 0 1.00") == 5
    with pytest.raises(UserError, match="another study"):
        study.main(
            study.parse_args(
                [
                    *(
                        "--model",
                        str(world / "base"),
                        "--lang-model-path",
                        str(world / "llm"),
                        "--data",
                        str(world / "data"),
                    ),
                    "--out",
                    str(out),
                    "--heal-steps",
                    "3",
                    "--calibration",
                    "2",
                    "--train-samples",
                    "4",
                    "--test-samples",
                    "4",
                    "--ratio",
                    "0.5",
                ]
            )
        )


@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, reverse=True)])
def test_each_set_is_checked_with_its_own_map_when_names_begin_alike(world, tmp_path, monkeypatch, order):
    glob = Path.glob
    monkeypatch.setattr(
        Path, "glob", lambda *args: iter(order(glob(*args)))
    )  # a folder may list its files in any order
    args = Namespace(model=world / "lora", lang_model_path=world / "llm", out=tmp_path, texts=None)
    model, text, config = load_report_model(world / "lora", world / "llm")
    task, evaluations = Namespace(test_set=Encoded(model, text, config, world / "data", "test", 2)), {}
    for spec in ("1", "1,3"):  # drop1 and drop1_3
        with without_layers(model.lang_model, prune_llm.parse_drop_layers(spec)):
            evaluations[spec] = {"before": {"losses": report_losses(model, text, task.test_set).tolist()}}
    choices = [{"criterion": "sensitivity", "drop_layers": spec} for spec in evaluations]
    assert study.check_on_disk(task, args, choices, evaluations) == 0


def test_a_study_of_a_model_that_was_trained_again_is_not_continued(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    arguments = [
        "--model",
        str(tmp_path / "base"),
        "--lang-model-path",
        str(world / "llm"),
        "--data",
        str(world / "data"),
        "--out",
        str(tmp_path / "study"),
        "--calibration",
        "1",
        "--train-samples",
        "2",
        "--test-samples",
        "2",
        "--ratio",
        "0.5",
    ]
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "evaluations.json").write_text(
        '{"stamp": {"weights": "of an earlier training"}, "sets": {}}'
    )
    with pytest.raises(UserError, match="another study"):
        study.main(study.parse_args(arguments))


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
