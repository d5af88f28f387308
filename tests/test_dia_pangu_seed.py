"""dia_pangu: the seed's path as its users know it: sh scripts/train.sh, its names, openPangu's marks, and
what a 7B run costs."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.tiny_llm import make_tokenizer
from dia_pangu.src import train as script
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate
from dia_pangu.src.Dataset.preprocess import Grid
from dia_pangu.src.Dataset.prompt import ReportText
from dia_pangu.src.Model.build import build_model
from dia_pangu.src.Model.multimodality_model import TRAINED, token_loss
from dia_pangu.src.Model.pangu import load_tokenizer
from studies.recipe import options
from tests import forked
from tests.golden import ROOT
from tests.tiny_dia import *  # noqa: F403  the fixtures data, llm and model_text
from tests.tiny_dia import SMALL, call

LAUNCHERS = [
    *ROOT.glob("*/run_*.sh"),
    *ROOT.glob("*/scripts/*.sh"),
    ROOT / "run_all.sh",
    ROOT / "run_tests.sh",
]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_launcher_starts_with_sh(path):
    """Where sh is dash it knows neither pipefail nor BASH_SOURCE."""
    shell = shutil.which("dash") or "sh"
    environment = {**os.environ, "PYTHON": shutil.which("true")}
    command = [shell, path.name, "--help"]
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_test_launcher_finds_what_the_train_launcher_made(tmp_path):
    """And scores what it has written, but not scans of one's own, for which no report is there."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if name not in ("CKPT", "DATA", "LLM", "OUT")}
    environment = {**plain, "PYTHON": str(python), "RUNS": str(tmp_path / "runs"), "SMOKE": "1"}
    (tmp_path / "runs/smoke/dia_pangu/base").mkdir(parents=True)

    def told(*arguments) -> str:
        command = ["bash", ROOT / "dia_pangu/run_test.sh", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "data/dia_pangu_smoke" in told() and "results/dia-pangu.csv" in told()
    for arguments in (("--out", "my reports"), ("--out=my reports",)):
        assert "--csv my reports/dia-pangu.csv" in told(*arguments)
    for arguments in (("--volume", "a.nii"), ("--volumes=scans", "--out", "x")):
        assert "nlg_eval" not in told(*arguments) and "--data" not in told(*arguments)
        assert "smoke/dia_pangu/llm/model" in told(*arguments)


def test_bases_that_are_stopped_say_that_the_same_command_goes_on(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *bases.py*) echo "SKIP_DONE=$SKIP_DONE"; exit 130 ;; esac\n')
    python.chmod(0o755)
    given = {"PYTHON": str(python), "RUNS": str(tmp_path / "runs"), "DATA": "", "SMOKE": "1"}
    done = subprocess.run(
        ["bash", ROOT / "dia_pangu/run_train.sh"], env={**os.environ, **given}, capture_output=True, text=True
    )
    assert done.returncode == 130 and "SKIP_DONE=1" in done.stdout
    assert "the same command goes on" in done.stderr


def test_the_seeds_names_are_there():
    import dia_pangu.src.Dataset.dataset_test as of_test
    import dia_pangu.src.Dataset.dataset_train as of_train
    from dia_pangu.src.Model.multimodality_model import load_language_model
    from dia_pangu.src.Model.My_embedding import MyEmbedding

    assert callable(of_test.dataset_test) and callable(of_train.dataset_train)
    assert MyEmbedding and callable(load_language_model)
    listed = (ROOT / "dia_pangu/requirements.txt").read_text().split()
    assert (ROOT / "dia_pangu" / listed[listed.index("-r") + 1]).resolve() == ROOT / "requirements.txt"


def launched(tmp_path, *arguments, checkpoint: bool) -> list[str]:
    """What scripts/train.sh hands to train.py, in a copy of the launcher and with a stand-in for Python."""
    room = tmp_path / "repository/dia_pangu"
    shutil.copytree(ROOT / "dia_pangu/scripts", room / "scripts", dirs_exist_ok=True)
    (tmp_path / "repository/common").mkdir(exist_ok=True)
    shutil.copy(ROOT / "common/env.sh", tmp_path / "repository/common")
    if checkpoint:
        (room / "checkpoint").mkdir(exist_ok=True)
        (room / "checkpoint/dia-llama.bin").touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "DATA": "ctrg", "LLM": "pangu"}
    environment.pop("OUT", None)
    command = ["sh", "scripts/train.sh", *arguments]
    done = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_launcher_gives_a_large_run_what_it_needs(tmp_path):
    words = launched(tmp_path, checkpoint=False)
    assert "--gradient-checkpointing" in words and words[words.index("--precision") + 1] == "bf16"
    assert int(words[words.index("--workers") + 1]) > 0 and "--cache" in words and "--start" not in words
    assert Path(words[words.index("--out") + 1]).name == "checkpoint_new"
    words = launched(tmp_path, "--precision", "no", checkpoint=True)
    assert words[words.index("--start") + 1].endswith("checkpoint/dia-llama.bin")
    assert words.index("bf16") < words.index("no")  # of two values the last counts
    assert "--start" not in launched(tmp_path, "--stage", "ft", checkpoint=True)
    assert launched(tmp_path, "--start", "x.bin", checkpoint=True).count("--start") == 1


@pytest.mark.slow
def test_dry_run_tells_the_memory_of_the_run_that_it_plans(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    settings = {"model_type": "PanguEmbedded", "vocab_size": 50000, "num_key_value_heads": 8, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    weights, activations = {}, {}
    named = {"data": tmp_path, "lang_encoder_path": tmp_path, "out": tmp_path / "o", "size": "tiny"}
    for kind, more in (("no", ()), ("bf16", ()), ("saving", ("--gradient-checkpointing",))):
        precision = "no" if kind == "no" else "bf16"
        arguments = [*options(named), "--dry-run", "--precision", precision, *more]
        done = call(script, *arguments, log=tmp_path / "log.txt")
        assert done.returncode == 0 and "no text can be read" in done.text, done.text
        line = next(line for line in done.text.splitlines() if "weights (" in line)
        assert ("bf16" in line) == (precision == "bf16")
        weights[kind] = float(line.rsplit(":", 1)[1].split()[0])
        row = next(line for line in done.text.splitlines() if line.startswith("one GPU"))
        activations[kind] = float(row.split()[-2])
    with torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    frozen = sum(p.numel() for p in model.parameters())
    assert weights["no"] - weights["bf16"] == pytest.approx(2 * frozen / 2**30, abs=0.02)
    assert activations["saving"] < activations["bf16"] < activations["no"]


def test_thinking_and_marks_never_stand_in_a_report():
    tokenizer = make_tokenizer(["The lungs are clear."] * 9, 400, ["[unused10]", "[unused16]", "[unused17]"])
    text = ReportText(tokenizer, 500, 2)
    for written, shown in (
        ("[unused16]Look at it.[unused17]Clear.", "Clear."),
        ("Clear.[unused17]", "Clear."),
        ("The lungs[unused17] are clear.", "The lungs are clear."),
        ("[unused16]never ends", ""),
        ("[unused16]a[unused17]One.[unused16]b[unused17] Two.[unused10]", "One. Two."),
        ("[unused16][unused16]a[unused17]One.", "One."),
        ("Clear.", "Clear."),
    ):
        assert text.decode(tokenizer(written, add_special_tokens=False).input_ids) == shown, written
    # A tokenizer that has them in pieces.
    plain = make_tokenizer(["The lungs are clear."] * 9, 400)
    pieces = plain("[unused16]Look.[unused17]Clear.[unused10]", add_special_tokens=False).input_ids
    assert ReportText(plain, 500, 2).decode(pieces) == "Clear."


def test_marks_are_found_in_a_folder_of_openpangus_form(tmp_path):
    """Its marks are listed in added_tokens_decoder and are user-defined pieces of the sentencepiece model."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.vocab_size = 2, 153376
    model.trainer_spec.pad_id, model.trainer_spec.unk_id = -1, 0
    model.trainer_spec.bos_id, model.trainer_spec.eos_id = 1, 2
    model.normalizer_spec.name, model.normalizer_spec.add_dummy_prefix = "identity", False
    marks = {45892: "[unused10]", 45974: "[unused16]", 45982: "[unused17]"}
    letters = {100: "C", 101: "l", 102: "e", 103: "a", 104: "r", 105: "."}
    for i in range(153376):
        name = {0: "<unk>", 1: "<s>", 2: "</s>", **marks, **letters}.get(i, f"p{i}p")
        kind = 2 if i == 0 else 3 if i < 3 else 4 if i in marks else 1
        model.pieces.add(piece=name, score=-float(i), type=kind)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    listed = {0: "<unk>", 1: "<s>", 2: "</s>", **marks}
    decoder = {str(i): {"content": name, "special": True} for i, name in listed.items()}
    names = {"bos_token": "<s>", "eos_token": "[unused10]", "pad_token": "<unk>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PanguTokenizer", "added_tokens_decoder": decoder, **names}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = ReportText(load_tokenizer(tmp_path), 153376)
    clear = list(letters)
    assert text.decode([45974, *clear, 45982, *clear, 45892]) == "Clear."
    assert text.decode([*clear, 45982]) == text.decode([*clear, 45974, 101]) == "Clear."


def test_logits_at_the_labels_give_the_loss_and_the_gradients_of_all(data, llm):
    config = {**SMALL, "lora": {"r": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj"]}}
    torch.manual_seed(0)
    model, text = build_model(config, llm)
    model.set_trained(TRAINED["ft"])
    text.key_weight = 3.0
    batch = collate([CTRGDataset(data, "train", Grid((16, 16, 16)), text)[i] for i in range(3)])
    keys = (*script.BATCH_KEYS, "loss_reweight")
    model.train()
    out = model(**{key: batch[key] for key in keys})
    out["lm_loss"].backward()
    found = model.embedding_layer.fc.weight.grad.clone()
    assert len(out["logits"]) == (batch["labels"][:, 1:] != -100).sum()

    model.zero_grad()
    tokens = model.encode(batch["vision_x"])
    embeds = model.embedding_layer(text_input=batch["lang_x"], tokens=tokens)
    full = model.lang_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = token_loss(full, labels, batch["loss_reweight"][:, 1:]) / (labels != -100).sum()
    loss.backward()
    assert torch.allclose(out["lm_loss"], loss, rtol=1e-5)
    assert torch.allclose(found, model.embedding_layer.fc.weight.grad, rtol=1e-3, atol=1e-6)
    # What the sums are divided by may be given.
    both = model(**{key: batch[key] for key in keys}, num_tokens=7, num_samples=5)
    assert torch.allclose(both["lm_loss"] * 7, loss * (labels != -100).sum(), rtol=1e-5)
    assert torch.allclose(both["ctr_loss"] * 5, out["ctr_loss"] * 3, rtol=1e-5)


def test_checkpoints_hold_what_trains_and_are_resumed_on_the_same_weights_alone(data, llm, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    sizes = {"batch_size": 2, "accum": 1, "warmup": 0, "eval_every": 1, "config": tmp_path / "small.json"}
    arguments = options({"stage": "pre", "data": data, "out": tmp_path / "run", **sizes})
    log = tmp_path / "log.txt"
    done = forked.call(script, [*arguments, "--lang-encoder-path", llm, "--max-steps", 1], log)
    assert done.returncode == 0, done.text
    saved = load_file(tmp_path / "run/last/model.safetensors")
    assert saved and all(key.startswith("embedding_layer.perceiver.") for key in saved)
    whole = torch.load(tmp_path / "run/pytorch_model.bin", weights_only=True)
    assert set(saved) < set(whole) and any(key.startswith("lang_model.") for key in whole)
    # Another language model under the same run is noticed.
    shutil.copytree(llm, tmp_path / "other")
    weights = load_file(tmp_path / "other/model.safetensors")
    from safetensors.torch import save_file

    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name] + 1}, tmp_path / "other/model.safetensors", {"format": "pt"})
    other = ["--lang-encoder-path", tmp_path / "other", "--max-steps", 2, "--resume"]
    done = forked.call(script, [*arguments, *other], log)
    assert done.returncode == 2 and "other start weights" in done.text, done.text
