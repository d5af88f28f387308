"""Healing: what trains, every option's effect, exact resuming, and that no test sample is trained on."""

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from common.tiny_llm import make_llm, make_tokenizer
from common.train import lr_at, make_accelerator
from pruning import test, train
from pruning.layers import without_layers
from pruning.report_model import Encoded, collate_encoded, load_report_model, training_set
from pruning.sensitivity_analyse.load_model import load_model
from tests import forked
from tests.effects import RUN_BASE, RUN_FLAGS, Effect, check_effects
from tests.parity import assert_same_first_step
from tests.pruning_world import heal_args, merged, prune_map, world
from tests.pruning_zoo import call

__all__ = ["world"]
ROOT = Path(__file__).resolve().parents[1]


def losses_of(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def texts_file(folder):
    lines = [f"The heart is of normal size, case {i}, and the lungs are clear." for i in range(8)]
    (folder / "texts.txt").write_text("\n".join(lines))
    return folder / "texts.txt"


def heal(world, out, **flags):
    train.main(train.parse_args(heal_args(world, out, **flags)))


@pytest.mark.slow
def test_healing_lowers_the_loss_and_touches_lora_alone(world, tmp_path):
    heal(world, tmp_path / "healed", max_steps=12, drop_layers=2)
    curve = losses_of(tmp_path / "healed")
    assert np.mean(curve[-3:]) < np.mean(curve[:3])
    files = (merged(world), tmp_path / "healed" / "pytorch_model.bin")
    before, after = (torch.load(file, weights_only=True) for file in files)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all("lora_" in k for k in changed) and before.keys() == after.keys()
    assert json.loads((tmp_path / "healed" / "timing.json").read_text())["status"] == "finished"
    _, _, config = load_report_model(tmp_path / "healed", world / "llm", prune_map(world))
    assert config["lora"]["alpha"] == 16
    with pytest.raises(UserError, match="name side and place"):
        heal(world, tmp_path / "x", places=None)
    with pytest.raises(UserError, match="drop-layers"):
        heal(world, tmp_path / "x", drop_layers=1)


def test_upstreams_names_and_underscores_are_understood():
    flags = {"--output_dir": "y", "--save_steps": "7", "--lora_dropout": "0.2", "--num_train_epochs": "3"}
    flags |= {"--per_device_train_batch_size": "2", "--gradient_accumulation_steps": "5"}
    words = [word for pair in {**flags, "--warmup_steps": "9"}.items() for word in pair]
    args = train.parse_args(["--pruned_merged_ckpt", "x", "--prune_map", "m", *words])
    assert (str(args.pruned_model_path), str(args.prune_map_path), str(args.out)) == ("x", "m", "y")
    assert (args.save_every, args.lora_dropout, args.epochs, args.warmup) == (7, 0.2, 3.0, 9)
    assert (args.batch_size, args.accum) == (2, 5)
    assert train.parse_args(["--pruned_model_path=x", "--out=y"]).lora_r == 4


def test_full_healing_trains_the_layers_and_nothing_else(world):
    model, _, _ = load_report_model(world / "base", world / "llm")
    names = train.set_trained(model.half(), full=True)
    assert names and all(".layers." in n and n.startswith("lang_model.") for n in names)
    types = {p.dtype for p in model.parameters() if p.requires_grad}
    assert types == {torch.float32}, "steps of AdamW vanish in half precision"


@pytest.mark.slow
def test_a_bfloat16_report_model_is_healed_in_full_and_saved_as_it_was(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "half")
    file = tmp_path / "half" / "pytorch_model.bin"
    half = {
        key: value.bfloat16() if key.startswith(("lang_model.", "embedding_layer.weight")) else value
        for key, value in torch.load(file).items()
    }
    torch.save(half, file)
    own = {"pruned_model_path": tmp_path / "half", "data": world / "data", "lang_model_path": world / "llm"}
    run = {"full": True, "out": tmp_path / "out", "max_steps": 1, "accum": 1}
    call(train, **own, **run)
    healed = torch.load(tmp_path / "out" / "pytorch_model.bin")
    assert {k: v.dtype for k, v in healed.items()} == {k: v.dtype for k, v in half.items()}
    assert any(not torch.equal(healed[key], half[key]) for key in half)

    # what has no LoRA has no alpha
    with pytest.raises(UserError, match="--lora-alpha has no effect"):
        call(train, **own, **run, lora_alpha=16)
    with pytest.raises(UserError, match="--lora-alpha has no effect"):
        call(test, **own, out_dir=tmp_path / "scores", lora_alpha=16)


def test_distillation_from_itself_starts_at_distance_zero_and_mixes(world, tmp_path):
    model, text, config = load_report_model(world / "lora", world / "llm")
    teacher = load_report_model(world / "lora", world / "llm")[0]
    samples = Encoded(model, text, config, world / "data", "train", 2)
    batch = collate_encoded([samples[0], samples[1]])
    inputs = {name: batch[name] for name in train.INPUTS if name in batch}
    out = train.Healing(model, teacher, 0.25)(**inputs)
    assert out["distance"].item() == pytest.approx(0, abs=1e-6)
    assert out["loss"].item() == pytest.approx(0.75 * out["lm_loss"].item(), rel=1e-5)
    with without_layers(model.lang_model, [1]):
        away = train.Healing(model, teacher, 0.25)(**inputs)
    assert away["distance"].item() > 1e-4
    mixed = 0.75 * away["lm_loss"] + 0.25 * away["distance"]
    assert away["loss"].item() == pytest.approx(mixed.item(), rel=1e-5)


def test_the_distance_is_that_of_the_teachers_distribution_to_the_students(world, tmp_path):
    """KL(teacher || student) in closed form, over the scored tokens alone."""
    student, teacher = load_model(world / "pruned/hf_drop2_2")[0], load_model(world / "llm")[0]
    ids = torch.tensor([[5, 9, 33, 21, 7, 40]])
    labels = ids.clone()
    labels[0, :3] = -100
    batch = {"lang_x": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.no_grad():
        found = train.Healing(student, teacher, 1.0)(**batch)["distance"].item()
        p = teacher(ids).logits[0, 2:-1].double().softmax(-1)
        q = student(ids).logits[0, 2:-1].double().softmax(-1)
    assert found == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)


def test_a_loss_in_pieces_is_that_of_all_logits_at_once_and_so_is_its_gradient(world, monkeypatch):
    student, teacher = load_model(world / "pruned/hf_drop2_2")[0], load_model(world / "llm")[0]
    ids = torch.arange(5, 19).view(2, 7)
    batch = {"lang_x": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    runs, calls = [], []
    head = student.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[-2]))
    for most in (1 << 30, 5 * student.config.vocab_size):
        monkeypatch.setattr(train, "LOGITS", most)
        student.zero_grad()
        out = train.Healing(student, teacher, 0.5)(**batch)
        out["loss"].backward()
        gradients = [p.grad.clone() for p in student.parameters()]
        runs.append(([value.item() for value in out.values()], gradients, max(calls)))
        calls.clear()
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5) and [run[2] for run in runs] == [12, 5]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(runs[0][1], runs[1][1]))


@pytest.mark.slow
def test_two_processes_heal_as_one_and_resume_is_exact(world, tmp_path):
    def launch(processes, out, **flags):
        line = [ROOT / "pruning/train.py", *heal_args(world, out, **flags)]
        done = forked.run_file(*line, processes=processes, CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 0, done.stderr

    launch(1, tmp_path / "one", max_steps=3, save_every=1)
    launch(2, tmp_path / "two", max_steps=1, batch_size=1)
    assert_same_first_step(tmp_path / "one", tmp_path / "two")
    held = load_file(tmp_path / "one/checkpoints/step-00000003/model.safetensors")
    assert held and all("lora_" in name for name in held), "a checkpoint holds what never changes"
    (tmp_path / "one" / "last").unlink()
    shutil.copytree(tmp_path / "one", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000003")
    launch(1, tmp_path / "cut", max_steps=3, save_every=1, resume=True)
    a, b = (torch.load(tmp_path / n / "pytorch_model.bin", weights_only=True) for n in ("one", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a), "the resumed run ended elsewhere"


def test_a_stop_signal_in_a_step_that_also_saves_is_obeyed(world, tmp_path, monkeypatch):
    texts, real = texts_file(tmp_path), train.update

    def update(run, *more):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(run, *more)

    monkeypatch.setattr(train, "update", update)
    flags = {"pruned_model_path": world / "pruned/hf_drop2_2", "texts": texts, "out": tmp_path / "out"}
    flags |= {"max_steps": 3, "save_every": 1, "accum": 1}
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(train.Interrupted, match="--resume"):
            call(train, **flags)
    finally:
        signal.signal(signal.SIGTERM, before)
    saved = [path.name for path in (tmp_path / "out/checkpoints").iterdir()]
    assert saved == ["step-00000001"], "the run went on after the signal"
    assert json.loads((tmp_path / "out/timing.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize("schedule", train.SCHEDULES)
def test_the_learning_rate_follows_upstreams_schedules(world, tmp_path, schedule):
    flags = {"pruned_model_path": world / "pruned/hf_drop2_2", "texts": texts_file(tmp_path)}
    flags |= {"out": tmp_path / "out", "max_steps": 4, "accum": 1, "lr": 0.01, "log_every": 1}
    flags |= {"lr_scheduler_type": schedule} | ({} if schedule == "constant" else {"warmup": 2})
    call(train, **flags)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    wanted = {
        "constant": [1, 1, 1, 1],
        "constant_with_warmup": [0.5, 1, 1, 1],
        "cosine": [0.5, 1, lr_at(2, 4, 2), 0.5],
    }
    assert rates == pytest.approx([0.01 * factor for factor in wanted[schedule]])


@pytest.mark.slow
def test_plain_language_models_heal_and_test_on_texts(world, tmp_path):
    texts, hf = texts_file(tmp_path), world / "pruned" / "hf_drop2_2"
    flags = {"pruned_model_path": hf, "texts": texts, "out": tmp_path / "healed", "max_steps": 10}
    flags |= {"batch_size": 4, "accum": 1, "lr": 0.02, "distill": 0.3, "teacher": world / "llm"}
    call(train, **flags)
    found = []
    for path in (hf, tmp_path / "healed" / "model"):
        flags = {"pruned_model_path": path, "texts": texts, "out_dir": tmp_path, "tag_override": path.name}
        call(test, **flags)
        found.append(json.loads((tmp_path / f"llm_{path.name}_scores.json").read_text()))
    model, tokenizer = load_model(hf)
    losses = []
    with torch.no_grad():
        for text in texts.read_text().splitlines():
            ids = torch.tensor([tokenizer(text).input_ids])
            logits = model(ids).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert found[0]["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)
    assert found[1]["perplexity"] < found[0]["perplexity"]
    assert found[1]["parameters"] == found[0]["parameters"]


@pytest.mark.slow
def test_the_training_set_is_the_training_partition_alone(world):
    """Names, and the volumes and reports that reach the model."""
    model, text, config = load_report_model(merged(world), world / "llm", prune_map(world))
    args = train.parse_args(heal_args(world, "x"))
    train_set = training_set(model, text, config, args)
    partitions = json.loads((world / "data/annotation_en.json").read_text())
    seen = {train_set[i]["id"]: train_set[i]["vision_x"] for i in range(len(train_set))}
    assert set(seen) == {item["id"] for item in partitions["train"]}
    for split in ("val", "test"):
        other = Encoded(model, text, config, world / "data", split, 0)
        assert not set(seen) & {item["id"] for item in partitions[split]}
        for i in range(len(other)):
            volume = other.source.sample(i)
            assert not any(volume["report"] == train_set[k]["report"] for k in range(len(train_set)))


def test_a_text_is_cut_ends_with_the_end_token_and_padding_is_not_scored(tmp_path):
    tokenizer = make_tokenizer(["one two three four five"], 300)
    (tmp_path / "texts.txt").write_text("one two three four five\none\n")
    rows = [train.text_rows(tmp_path / "texts.txt", tokenizer, n)[i] for n, i in ((4, 0), (100, 1))]
    assert len(rows[0]["ids"]) == 4 and rows[1]["ids"][-1] == tokenizer.eos_token_id
    batch = train.collate_texts(rows)
    real = len(rows[1]["ids"])
    assert (batch["labels"][1, real:] == -100).all() and (batch["labels"][1, :real] != -100).all()
    assert batch["attention_mask"].sum(1).tolist() == [4, real]
    assert len(train.text_rows(tmp_path / "texts.txt", tokenizer, 9, limit=1)) == 1


def test_a_sample_that_cannot_be_read_ends_the_run_with_its_line(world):
    accelerator = make_accelerator(train.parse_args(heal_args(world, "x")))
    train.refuse_bad_sample(accelerator, {"id": ["a"]})
    with pytest.raises(UserError, match="a.nii.gz: no such volume"):
        train.refuse_bad_sample(accelerator, {"error": "a.nii.gz: no such volume"})


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
EARLIER = "the effect shows with --texts"


@pytest.mark.slow
def test_every_option_of_healing_a_language_model_has_its_effect(tmp_path):
    texts = texts_file(tmp_path)
    tokenizer = make_tokenizer(texts.read_text().splitlines(), 300)
    for seed, name in enumerate(("llm", "other")):
        make_llm(tmp_path / name, tokenizer, seed=seed, **SIZES)
    llm, other = tmp_path / "llm", tmp_path / "other"
    distilled = ("--distill", "0.5", "--teacher", llm)
    table = {name: effect for name, effect in RUN_FLAGS.items() if name != "--eval-every"} | {
        "--pruned-model-path": "the model itself",
        "--texts": "the data themselves: " + "the other tests here",
        "--data": Effect(tmp_path, "refused"),
        "--prune-map-path": Effect("map.json", "refused"),
        "--drop-layers": Effect(1, "refused"),
        "--lang-model-path": Effect(llm, "refused"),
        "--teacher": [Effect(other, "weights", given=distilled), Effect(other, "refused")],
        "--teacher-lang-model-path": Effect(llm, "refused"),
        "--trust-remote-code": "a folder with code of its own: tests/test_common_llm.py",
        "--limit": Effect(4, "weights"),
        "--max-length": Effect(4, "weights"),
        "--cache": Effect(tmp_path, "refused"),
        "--flip": Effect(0.5, "refused"),
        "--places": Effect("places.json", "refused"),
        "--full": [Effect(True, "weights"), Effect(True, "refused", given=("--repair", "last"))],
        "--repair": [Effect("last", "weights"), Effect("linear", "refused")],
        "--repair-texts": Effect(4, "refused"),
        "--also": Effect("head", "weights"),
        "--pack": Effect(True, "weights", given=("--max-length", 8)),
        "--lora-target-modules": [
            Effect("k_proj", "weights"),
            Effect("k_proj", "refused", given=("--full",)),
        ],
        "--lora-r": [Effect(2, "weights"), Effect(2, "refused", given=("--full",))],
        "--lora-alpha": [Effect(2, "weights"), Effect(2, "refused", given=("--full",))],
        "--lora-dropout": [Effect(0.5, "weights"), Effect(0.5, "refused", given=("--full",))],
        "--distill": [Effect(0.5, "weights", alone=("--teacher", other)), Effect(0.5, "refused")],
        "--lr-scheduler-type": Effect("cosine", "weights"),
        "--adam-beta2": Effect(0.9, "weights"),
    }
    base = [*RUN_BASE, "--lr", 0.01, "--pruned-model-path", llm, "--texts", texts]
    check_effects(train, base, table, tmp_path / "runs")


@pytest.mark.slow
def test_every_option_of_healing_a_report_model_has_its_effect(world, tmp_path):
    elsewhere = {name: ["right", "lower"] for name in json.loads((world / "places.json").read_text())["1"]}
    (tmp_path / "places.json").write_text(json.dumps({str(i): elsewhere for i in range(1, 11)}))

    def cached(base, variant):
        return "" if any((tmp_path / "cache").rglob("*")) else "nothing was cached"

    distilled = ("--distill", "0.5", "--teacher", world / "lora")
    table = {name: EARLIER for name in RUN_FLAGS if name != "--eval-every"} | {
        "--pruned-model-path": "the model itself",
        "--data": "the data themselves",
        "--texts": Effect("texts.txt", "refused"),
        "--prune-map-path": "without it the checkpoint does not fit: tests/test_pruning_report.py",
        "--drop-layers": [Effect(2, "same weights"), Effect(1, "refused")],
        "--lang-model-path": "without it nothing is loaded: tests/test_pruning_report.py",
        "--teacher": Effect(world / "lora", "refused"),
        "--teacher-lang-model-path": [
            Effect(world / "llm", "same weights", given=distilled),
            Effect(world / "llm", "refused"),
        ],
        "--trust-remote-code": Effect(True, "refused"),
        "--limit": Effect(4, "weights"),
        "--max-length": Effect(4, "refused"),
        "--cache": Effect(tmp_path / "cache", (cached, "same weights")),
        "--flip": Effect(0.9, "weights"),
        "--places": Effect(tmp_path / "places.json", "weights"),
        "--full": Effect(True, "weights"),
        "--repair": Effect("last", "refused"),
        "--repair-texts": Effect(4, "refused"),
        "--also": Effect("head", "refused"),
        "--pack": Effect(True, "refused"),
        "--lora-target-modules": [Effect("q_proj,v_proj", "same weights"), Effect("q_proj", "refused")],
        "--lora-r": [Effect(2, "same weights"), Effect(4, "refused")],
        "--lora-alpha": [Effect(16, "same weights"), Effect(4, "refused")],
        "--lora-dropout": Effect(0.5, ("weights", "predictions")),  # and in the settings beside them
        "--distill": Effect(0.5, "weights", alone=("--teacher", world / "lora")),
        "--lr-scheduler-type": EARLIER,
        "--adam-beta2": EARLIER,
    }
    base = [*heal_args(world, "x", max_steps=2, warmup=0)]
    check_effects(train, base, table, tmp_path / "runs")


def test_warm_up_without_one_is_refused(tmp_path):
    words = ["--pruned-model-path", "x", "--texts", "t", "--out", "y", "--warmup", "5"]
    with pytest.raises(UserError, match="--warmup has no effect"):
        train.check(train.parse_args([*words, "--lr-scheduler-type", "constant"]))


@pytest.mark.slow
def test_a_language_model_goes_the_whole_way_without_dia_pangu(tmp_path, monkeypatch):
    """Scan, choose, prune, heal and test where dia_pangu cannot be imported, each script imported anew."""
    texts, llm, pruned = texts_file(tmp_path), tmp_path / "llm", tmp_path / "pruned"
    make_llm(llm, make_tokenizer(texts.read_text().splitlines(), 300), **SIZES)
    for name in [name for name in sys.modules if name.split(".")[0] in ("dia_pangu", "pruning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dia_pangu", None)

    def anew(name, **flags):
        call(importlib.import_module(f"pruning.{name}"), **flags)

    records = tmp_path / "s.records.jsonl"
    anew("sensitivity_analyse.layer_sensitivity_scan", model=llm, prompts=texts, out=tmp_path / "s.csv")
    anew("sensitivity_analyse.choose_layers", records=records, ratio=0.5, out=tmp_path / "plan.json")
    anew("pruning_tools.prune_llm", ckpt=llm, out_dir=pruned, plan=tmp_path / "plan.json", tag="one")
    run = {"out": tmp_path / "healed", "max_steps": 1, "accum": 1}
    anew("train", pruned_model_path=pruned / "hf_one", texts=texts, **run)
    anew("test", pruned_model_path=tmp_path / "healed/model", texts=texts, out=tmp_path / "results")
    for name in ("count_params", "inspect_ckpt", "prune_width", "export_gguf"):
        importlib.import_module(f"pruning.pruning_tools.{name}")
    assert not any(name.startswith("dia_pangu.") for name in sys.modules)
    assert json.loads(next((tmp_path / "results").glob("*_scores.json")).read_text())["layers"] == 1


def test_dia_pangu_is_named_in_one_file_of_the_room():
    named = [
        path.name
        for path in (ROOT / "pruning").rglob("*.py")
        if any(
            line.startswith(("from dia_pangu", "import dia_pangu")) for line in path.read_text().splitlines()
        )
    ]
    assert named == ["report_model.py"]
