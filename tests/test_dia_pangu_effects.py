"""dia_pangu: every option of the training scripts has its effect, or is refused where it has none."""

import json

import pytest
import torch
from safetensors.torch import load_file

import dia_pangu.src.train
import studies.dia_pangu.pretrain_vit
import studies.dia_pangu.warm_llm
from common.tiny_llm import make_llm, make_tokenizer
from dia_pangu.src.Model.build import build_model, save_model
from tests import forked
from tests.effects import RUN_BASE, RUN_FLAGS, Effect, check_effects
from tests.tiny_dia import *  # noqa: F403  the fixtures data and llm
from tests.tiny_dia import SMALL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(data, llm, tmp_path_factory):
    """A folder with small.json, wide.json and flat.json (other sizes), contrast/ (evidence head and
    places), other/ (a second language model with another tokenizer) and model/ (a whole checkpoint)."""
    home = tmp_path_factory.mktemp("dia_effects")
    (home / "small.json").write_text(json.dumps(SMALL))
    wide = json.loads(json.dumps(SMALL))
    wide["embedding"]["perceiver_num"] = 5
    (home / "wide.json").write_text(json.dumps(wide))
    flat = json.loads(json.dumps(SMALL))
    flat["embedding"]["vit"]["mlp_dim"] = 16
    (home / "flat.json").write_text(json.dumps(flat))
    script = studies.dia_pangu.pretrain_vit
    common = ["--data", data, "--config", home / "small.json", "--max-steps", 1, "--batch-size", 2]
    for arguments in (
        ["--out", home / "patches"],
        ["--start", home / "patches", "--contrast", 2, "--out", home / "contrast"],
    ):
        done = forked.call(script, [*common, *arguments], home / "log.txt")
        assert done.returncode == 0, done.text
    tokenizer = make_tokenizer(["The heart is of normal size. A nodule is found in the right lung."] * 9, 400)
    make_llm(home / "other", tokenizer, "PanguEmbedded", hidden_size=32, num_attention_heads=4, bias=True)
    config = {**SMALL, "lora": dict(zip(("r", "alpha", "dropout"), (4, 16, 0.1)))}
    config["lora"]["targets"] = ["q_proj", "v_proj"]
    model, _ = build_model(config, llm)
    for parameter in model.parameters():
        parameter.data += 0.01
    save_model(model.state_dict(), home / "model", config)
    return home


def filled(folder):
    """The folder has prepared volumes in it, which the run has put there."""

    def look(base, variant):
        return "" if list(folder.glob("*.npy")) else f"{folder} is empty"

    return look


def test_every_option_of_train_has_its_effect(world, data, llm, tmp_path):
    frozen = ("--start", world / "contrast", "--freeze", "vision_encoder")
    places = ("--places", world / "contrast/places.json")
    base = ["--stage", "ft", "--data", data, "--lang-encoder-path", llm, "--config", world / "small.json"]
    check_effects(
        dia_pangu.src.train,
        [*base, *RUN_BASE],
        {
            **RUN_FLAGS,
            "--data": "the data themselves: tests/test_dia_pangu_data.py",
            "--cache": Effect(tmp_path / "cache", (filled(tmp_path / "cache"), "same weights")),
            "--limit": Effect(4, "weights"),
            "--skip-bad": Effect(True, ("text", "same weights")),
            "--places": [Effect(places[1], ("weights", "shape"), given=frozen), Effect(places[1], "refused")],
            "--hide-places": [Effect(0.9, "weights", given=(*frozen, *places)), Effect(0.9, "refused")],
            "--key-weight": Effect(3, "weights"),
            "--flip": Effect(0.9, "weights"),
            "--lang-encoder-path": "the language model itself: tests/test_dia_pangu_weights.py",
            "--tokenizer-path": Effect(world / "other", "weights"),
            "--size": Effect("tiny", "refused"),  # beside --config
            "--config": Effect(world / "wide.json", "shape"),
            "--language": Effect("cn", "weights"),
            "--prompt": Effect("positives", "weights"),
            "--preprocess": Effect("upstream", "weights"),
            "--attn": Effect("eager", "weights"),  # the same numbers, summed in another order
            "--trust-remote-code": "tests/test_common_llm.py",
            "--stage": Effect("pre", "shape"),
            "--start": Effect(world / "contrast", "weights"),
            "--take": [
                Effect("all", "weights", given=("--start", world / "model")),
                Effect("all", "refused"),
            ],
            "--train": Effect(["perceiver."], "weights"),
            "--freeze": Effect(["vision_encoder"], "weights"),
            "--lora-r": [Effect(2, "shape"), Effect(2, "refused", given=("--stage", "pre"))],
            "--lora-alpha": [Effect(99, "weights"), Effect(2, "refused", given=("--stage", "pre"))],
            "--lora-dropout": [Effect(0.7, "weights"), Effect(0.7, "refused", given=("--stage", "pre"))],
            "--lora-targets": [
                Effect(["o_proj"], "shape"),
                Effect("o_proj", "refused", given=("--stage", "pre")),
            ],
            "--llm-lr-scale": [Effect(9, "weights"), Effect(9, "refused", given=("--stage", "pre"))],
            "--lr-scheduler-type": [Effect("cosine", "weights"), Effect("linear", "weights")],
            "--adam-beta2": Effect(0.5, "weights"),
            "--gradient-checkpointing": "memory, not numbers: tests/test_dia_pangu_train.py",
            "--dry-run": Effect(True, ("files", "text")),
        },
        tmp_path / "runs",
    )


def test_every_option_of_pretrain_vit_has_its_effect(world, data, tmp_path):
    contrast = ("--start", world / "patches", "--contrast", 2)
    check_effects(
        studies.dia_pangu.pretrain_vit,
        ["--data", data, "--config", world / "small.json", *RUN_BASE],
        {
            **RUN_FLAGS,
            "--data": "the data themselves: tests/test_dia_pangu_data.py",
            "--cache": Effect(tmp_path / "cache", (filled(tmp_path / "cache"), "same weights")),
            "--limit": Effect(4, "weights"),
            "--size": Effect("tiny", "refused"),  # beside --config
            "--config": Effect(world / "flat.json", "shape"),
            "--preprocess": Effect("upstream", "weights"),
            "--start": Effect(world / "patches", "weights"),
            "--contrast": Effect(2, ("weights", "files")),
            "--prototype-lr-scale": [Effect(9, "weights", given=contrast), Effect(9, "refused")],
            "--adam-beta2": Effect(0.5, "weights"),
        },
        tmp_path / "runs",
    )


def test_every_option_of_warm_llm_has_its_effect(world, data, llm, tmp_path):
    reports = tmp_path / "reports.json"
    cases = [{"id": i, "report": f"Report {i}: the right lung is clear."} for i in range(9)]
    reports.write_text(json.dumps({"cases": cases}))
    places = world / "contrast/places.json"
    make = ("--make", 1, "--width", 16)
    check_effects(
        studies.dia_pangu.warm_llm,
        ["--data", data, *make, *RUN_BASE],
        {
            **RUN_FLAGS,
            "--lr": Effect(1e-2, "weights"),
            "--data": "the data themselves: tests/test_dia_pangu_data.py",
            "--places": Effect(places, "weights"),
            "--reports": Effect(reports, "refused"),
            "--eval-reports": Effect(reports, "refused"),
            "--limit": Effect(4, "weights"),
            "--language": Effect("cn", "weights"),
            "--max-length": Effect(24, "weights"),
            "--key-weight": Effect(3, "weights"),
            "--lang-encoder-path": Effect(llm, "refused"),  # beside --make
            "--make": Effect(2, "shape"),
            "--width": Effect(24, "shape"),
            "--vocab-size": Effect(450, "shape"),
            "--trust-remote-code": Effect(True, "refused"),  # with --make
            "--lora-r": Effect(2, "refused"),  # with --make; without it: the test below
            "--full": Effect(True, "refused"),
            "--adam-beta2": Effect(0.5, "weights"),
        },
        tmp_path / "runs",
    )


def test_a_given_language_model_trains_by_lora_or_in_full(llm, tmp_path):
    """Each way changes what it says, at its own rate, and keeps float32."""
    reports = tmp_path / "reports.json"
    cases = [{"id": i, "report": f"Report {i}: the right lung is clear."} for i in range(9)]
    reports.write_text(json.dumps({"cases": cases}))
    base = ["--reports", reports, "--eval-reports", reports, "--lang-encoder-path", llm, *RUN_BASE]
    start, made, rates = load_file(llm / "model.safetensors"), {}, {}
    for name, options in (("lora", ()), ("small", ("--lora-r", 2)), ("full", ("--full",))):
        done = forked.call(
            studies.dia_pangu.warm_llm, [*base, *options, "--out", tmp_path / name], tmp_path / "log"
        )
        assert done.returncode == 0, done.text
        made[name] = load_file(tmp_path / name / "model/model.safetensors")
        rates[name] = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["lr"]
        assert made[name].keys() == start.keys() and all(
            v.dtype == torch.float32 for v in made[name].values()
        )
    changed = {name: {k for k in start if not torch.equal(start[k], new[k])} for name, new in made.items()}
    assert changed["lora"] == changed["small"] and all("proj." in key for key in changed["lora"])
    assert changed["lora"] < changed["full"] and "model.embed_tokens.weight" in changed["full"]
    assert rates["full"] < rates["lora"] == rates["small"] < 3e-3
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(made["lora"][name], made["small"][name])
