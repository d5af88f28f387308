"""em_mllm: every option of its training scripts does what it is for, or is refused."""

import json

import h5py
import numpy as np
import pytest
import torch

import em_mllm.finetune
import em_mllm.make_data
import em_mllm.pretrain
import em_mllm.train
import studies.em_mllm.make_llm
from common.weights import read_weights
from tests import forked
from tests.effects import RUN_BASE, RUN_FLAGS, Effect, check_effects
from tests.em_world import tiny_sizes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Signals with questions, a tiny language model, two encoders, and a joined model."""
    folder = tmp_path_factory.mktemp("em_effects")

    def make(script, *arguments):
        done = forked.call(script, arguments, folder / "log.txt")
        assert done.returncode == 0, done.text

    data = folder / "data"
    counts = ("--train", 4, "--val", 1, "--test", 1, "--points", 128, "--snr", 0, 20)
    make(em_mllm.make_data, "--out", data, *counts)
    make(studies.em_mllm.make_llm, "--out", folder / "llm", "--steps", 1, "--hidden-size", 16)
    (folder / "sizes.json").write_text(json.dumps(tiny_sizes(initializer_range=0.1)))
    train = ("--data", data / "train", "--config", folder / "sizes.json", "--max-steps", 1, "--batch-size", 2)
    make(em_mllm.pretrain, *train, "--out", folder / "mae")
    make(em_mllm.pretrain, *train, "--seed", 9, "--out", folder / "other")
    parts = ("--signal-encoder-path", folder / "mae/encoder", "--llm-model-path", folder / "llm")
    make(em_mllm.train, *parts, "--task-dir", data / "train", "--max-steps", 1, "--out", folder / "joined")

    radar = [data / part / "radar_jamming.h5" for part in ("train", "test")]
    encoder = ("--signal-encoder-path", folder / "mae/encoder", "--max-steps", 1, "--batch-size", 2)
    make(em_mllm.finetune, "--train", radar[0], "--test", radar[1], *encoder, "--out", folder / "teacher")

    # a copy of the training signals of which one holds nan
    (folder / "bad").mkdir()
    for path in (data / "train").iterdir():
        (folder / "bad" / path.name).write_bytes(path.read_bytes())
    with h5py.File(folder / "bad/radar_jamming.h5", "r+") as file:
        file["IQ_data"][0] = np.nan
        del file.attrs["fs"]
    return folder


@pytest.mark.slow
def test_every_option_of_pretrain_has_its_effect(world, tmp_path):
    data, sizes = world / "data", world / "sizes.json"
    base = [*RUN_BASE, "--data", data / "train", "--config", sizes, "--min-points", 64]
    table = {
        **{name: effect for name, effect in RUN_FLAGS.items() if name != "--eval-every"},
        "--data": Effect([data / "train/modulation.h5"], "weights"),
        "--val": [
            Effect([data / "val"], ("files", "same weights")),
            Effect([data / "train/modulation.h5"], "refused"),
        ],
        "--min-points": Effect(32, "weights"),
        "--row-tokens": Effect(24, "weights"),
        "--noise-db": Effect([0, 5], "weights"),
        "--shift-hz": Effect(1e6, "weights"),
        "--roll": Effect(True, "weights"),
        "--phase": Effect(True, "weights"),
        "--conjugate": Effect(True, "weights"),
        "--target": [Effect("clean", "weights", given=("--noise-db", 0, 5)), Effect("clean", "refused")],
        "--skip-bad": Effect(True, ("text", "weights"), alone=("--data", world / "bad")),
        "--preset": Effect("tiny", "refused"),  # beside --config
        "--config": "the sizes that a run needs: every test of this room",
        "--init": Effect(world / "other/encoder", "weights"),
        "--patch": Effect(32, "shape"),
        "--stem": Effect("overlap", "shape"),
        "--mask-ratio": Effect(0.5, "weights"),
        "--norm-pix-loss": Effect(True, "weights"),
        "--spectrum-weight": [Effect(0.5, "shape"), Effect(1.0, "weights", given=("--spectrum-weight", 0.5))],
        "--contrast-weight": [
            Effect(0.5, "shape", given=("--roll",)),
            Effect(1.0, "weights", given=("--roll", "--contrast-weight", 0.5)),
            Effect(0.5, "refused"),  # two equal views
        ],
        "--optimizer": Effect("muon", "weights"),
        "--gradient-checkpointing": Effect(True, computed_again),
    }
    check_effects(em_mllm.pretrain, base, table, tmp_path)


def computed_again(base, variant) -> str:
    """For options that change how a loss is computed and not the loss; that they reach the model is the next
    test's."""
    one, two = ([line["loss"] for line in trial.log() if "loss" in line] for trial in (base, variant))
    same = np.allclose(one, two, rtol=1e-4)
    return "" if same else "the losses differ"


def test_checkpointing_and_attention_reach_the_model(world):
    parts = ("--signal-encoder-path", world / "mae/encoder", "--llm-model-path", world / "llm")
    command = ("--task-dir", "x", *parts, "--gradient-checkpointing", "--attention-type", "eager")
    model, _ = em_mllm.train.make_model(em_mllm.train.parse_args(list(map(str, command))), [])
    assert model.signal_encoder.config.attention_type == "eager"
    assert model.llm.is_gradient_checkpointing and model.signal_encoder.is_gradient_checkpointing
    command = ("--data", "x", "--out", "y", "--config", world / "sizes.json", "--gradient-checkpointing")
    args = em_mllm.pretrain.parse_args(list(map(str, command)))
    assert em_mllm.pretrain.make_model(args, em_mllm.pretrain.make_config(args)).is_gradient_checkpointing


def encoder_kept(folder):
    """For options that freeze the encoder of `folder`: it moves in the base, and not in the variant."""

    def look(base, variant) -> str:
        was = read_weights(folder / "model.safetensors")
        name = lambda key: f"sit.{key.rpartition('/')[2].removeprefix('sit.')}"
        moved = lambda k, value: name(k) in was and not torch.equal(value, was[name(k)])
        one, two = (any(moved(*item) for item in t.weights().items()) for t in (base, variant))
        return "" if one and not two else f"the encoder moves in the base: {one}, in the variant: {two}"

    return look


@pytest.mark.slow
def test_every_option_of_finetune_has_its_effect(world, tmp_path):
    data = world / "data"
    radar = data / "train/radar_jamming.h5"
    test, val = data / "test/radar_jamming.h5", data / "val/radar_jamming.h5"
    base = [*RUN_BASE, "--train", radar, "--test", test, "--signal-encoder-path", world / "mae/encoder"]
    table = {
        **RUN_FLAGS,
        "--eval-every": [Effect(1, ("log", "same weights"), alone=("--val", val)), Effect(1, "refused")],
        "--train": [
            Effect([data / "train/modulation.h5"], "shape", alone=("--test", data / "test/modulation.h5")),
            Effect([test], "refused", alone=("--test", test)),
        ],
        "--test": [Effect([val], ("predictions", "same weights")), Effect([radar], "refused")],
        "--val": [
            Effect([val], ("log", "same weights"), alone=("--eval-every", 1)),
            Effect([radar], "refused", alone=("--eval-every", 1)),
            Effect([val], "refused"),
        ],
        "--multitask": Effect(True, "shape"),
        "--noise-db": Effect([0, 5], "weights"),
        "--shift-hz": Effect(1e6, "weights"),
        "--roll": Effect(True, "weights"),
        "--phase": Effect(True, "weights"),
        "--conjugate": Effect(True, "weights"),
        "--skip-bad": Effect(True, ("text", "weights"), alone=("--train", world / "bad/radar_jamming.h5")),
        "--encoder": [
            Effect("cnn", "refused")  # beside --signal-encoder-path: tests/test_em_mllm_train.py has it alone
        ],
        "--pooling": Effect("mean", "weights"),
        "--teacher": [
            Effect(world / "teacher/model", "weights", given=("--noise-db", 0, 5)),
            Effect(world / "teacher/model", "refused"),
        ],
        "--signal-encoder-path": Effect(world / "other/encoder", "weights"),
        "--random-encoder": Effect(True, "weights"),
        "--linear-probe": Effect(True, ("weights", encoder_kept(world / "mae/encoder"))),
        "--optimizer": [Effect("muon", "weights"), Effect("muon", "refused", given=("--linear-probe",))],
    }
    # a file that is refused as --test or --val is named by that option
    table["--train"] = table["--train"][0]
    check_effects(em_mllm.finetune, base, table, tmp_path)


@pytest.mark.slow
def test_every_option_of_train_has_its_effect(world, tmp_path):
    data, joined = world / "data", world / "joined/model"
    pair = [data / "train/radar_jamming.h5", data / "train/radar_jamming.json"]
    encoder, llm = ("--signal-encoder-path", world / "mae/encoder"), ("--llm-model-path", world / "llm")
    base = [*RUN_BASE, "--task-files", *pair, *encoder, *llm]
    table = {
        **RUN_FLAGS,
        "--task-dir": "excludes --task-files of the base: test_every_option_of_train_that_excludes_another",
        "--task-files": Effect([data / "train/modulation.h5", data / "train/modulation.json"], "weights"),
        "--val-dir": Effect(data / "val", "predictions"),
        "--questions-per-signal": Effect(2, ("text", "weights")),
        "--noise-db": Effect([0, 5], "weights"),
        "--shift-hz": Effect(1e6, "weights"),
        "--roll": Effect(True, "weights"),
        "--phase": Effect(True, "weights"),
        "--conjugate": Effect(True, "weights"),
        "--fs": Effect(
            1e6,
            "weights",
            given=(
                "--skip-bad",
                "--task-files",
                world / "bad/radar_jamming.h5",
                world / "bad/radar_jamming.json",
            ),
        ),
        "--skip-bad": Effect(
            True,
            ("text", "weights"),
            alone=("--task-files", world / "bad/radar_jamming.h5", world / "bad/radar_jamming.json"),
        ),
        "--remove-dc": Effect(True, ("weights", "predictions")),
        "--resample": Effect(True, "predictions"),  # kept for signals of other rates: tests of the contract
        "--signal-encoder-path": Effect(world / "other/encoder", "weights"),
        "--llm-model-path": "the language model that a run needs: every test of this room",
        "--trained-dir": "excludes the paths of the base: test_every_option_of_train_that_excludes_another",
        "--projector": Effect("mlp", "shape"),
        "--signal-tokens": Effect(2, "weights"),
        "--attention-type": Effect("eager", computed_again),  # the same mathematics
        "--max-length": Effect(5, "refused"),  # every text is longer
        "--chat-template": Effect(True, "weights"),
        "--freeze-llm": Effect(True, "files"),
        "--freeze-signal-encoder": Effect(True, ("weights", encoder_kept(world / "mae/encoder"))),
        "--use-lora": Effect(True, "files"),
        "--load-in-4bit": Effect(True, "refused"),  # the language model of the base is trained
        "--lora-r": [Effect(4, "shape", given=("--use-lora",)), Effect(4, "refused")],
        "--lora-alpha": [Effect(64, "weights", given=("--use-lora",)), Effect(4, "refused")],
        "--lora-dropout": [Effect(0.9, "weights", given=("--use-lora",)), Effect(0.5, "refused")],
        "--lora-targets": [Effect(["k_proj"], "shape", given=("--use-lora",)), Effect(["k_proj"], "refused")],
        "--legacy": Effect(True, "weights"),
        "--trust-remote-code": "a folder with code of its own: tests/test_em_mllm_model.py",
        "--optimizer": [
            Effect("muon", "weights"),
            Effect("muon", "refused", given=("--freeze-llm", "--freeze-signal-encoder")),
        ],
        "--schedule": Effect("cosine", "weights"),
        "--select": Effect(
            "last", "refused"
        ),  # without --eval-every; with it: tests/test_em_mllm_contract.py
        "--patience": Effect(1, "refused"),
        "--align-projector": [Effect(True, "weights"), Effect(True, "refused", given=("--projector", "mlp"))],
        "--dtype": Effect("bfloat16", "weights"),
        "--gradient-checkpointing": Effect(True, computed_again),
    }
    check_effects(em_mllm.train, base, table, tmp_path)

    # what the options of the base exclude
    run = (*RUN_BASE, "--max-steps", 1, "--task-dir", data / "train", "--val-dir", data / "val")
    cases = (
        (["--trained-dir", joined], ""),
        ([*encoder, *llm], ""),
        ([*encoder, *llm, "--task-files", *pair], "--task-files"),
        ([*llm], "--signal-encoder-path"),
        (
            ["--trained-dir", joined, "--signal-encoder-path", world / "other/encoder"],
            "--signal-encoder-path",
        ),
        (["--trained-dir", joined, "--projector", "mlp"], "--projector"),
        (["--trained-dir", joined, "--val-dir", data / "train"], "--val-dir"),
    )
    for number, (options, refused) in enumerate(cases):
        command = [*run, *options, "--out", tmp_path / f"case-{number}"]
        done = forked.call(em_mllm.train, command, tmp_path / "log.txt")
        assert done.returncode == (2 if refused else 0) and f"error: {refused}" * bool(refused) in done.text
