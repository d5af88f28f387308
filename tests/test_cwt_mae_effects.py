"""cwt_mae: every option of the training scripts does what it is for, or is refused."""

import numpy as np
import pytest

from cwt_mae import finetune, make_data, train
from studies.cwt_mae import cnn
from tests import forked
from tests.effects import RUN_BASE, RUN_FLAGS, Effect, check_effects
from tests.tiny_cwt import CHANGES


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Records with rhythms and beats, two channels in one of them, a pre-trained model: options and paths by
    name."""
    folder = tmp_path_factory.mktemp("effects")
    words = ["--out", folder / "data", "--subjects", 9, "--seconds", 60, "--ppg", 0]
    assert forked.call(make_data, words, folder / "log.txt").returncode == 0
    labelled = folder / "data" / "labelled"
    with np.load(labelled / "s000.npz") as file:
        record = dict(file)
    record["sig"] = np.stack([record["sig"], record["sig"][::-1]])
    np.savez(labelled / "s000.npz", **record | {"names": np.array(["MLII", "V5"])})
    (folder / "split6.json").write_text(
        '{"train": ["s000", "s001", "s003", "s004"], "test": ["s002", "s005"]}'
    )
    options = ["--data", labelled, "--split", labelled / "split.json", "--cache", folder / "cache"]
    config = folder / "config.yaml"
    lines = "".join(f"  {change.replace('=', ': ')}\n" for change in CHANGES)
    config.write_text(f"model:\n{lines}")
    tiny = ["--model-fs", 50, "--config", config]
    base = [*options, *tiny, "--max-steps", 1, "--batch-size", 8, "--out", folder / "base"]
    done = forked.call(train, base, folder / "log.txt")
    assert done.returncode == 0, done.text
    model = folder / "base" / "model.safetensors"
    return {"folder": folder, "labelled": labelled, "options": options, "tiny": tiny, "model": model}


def bad_record(world):
    """A folder with one bad record beside the good ones, as an additional value of --data."""
    folder = world["folder"] / "bad"
    folder.mkdir(exist_ok=True)
    np.savez(folder / "bad.npz", sig=np.zeros(20000), fs=50)
    return folder


def six_records(world) -> Effect:
    """Fewer records, and the split that belongs to them."""
    files = [world["labelled"] / f"s00{i}.npz" for i in range(6)]
    return Effect(files, "weights", alone=("--split", world["folder"] / "split6.json"))


def six_listed(world) -> Effect:
    """A manifest of fewer records, and the split that belongs to them."""
    path = world["labelled"].parent / "list.csv"
    path.write_text("path\n" + "".join(f"labelled/s00{i}.npz\n" for i in range(6)))
    return Effect(path, "weights", alone=("--split", world["folder"] / "split6.json"))


def skipped(base, variant):
    """For --skip-bad: the record is left out and said so."""
    return "" if "skipped 1 bad records" in variant.text else f"not skipped: {variant.text[-300:]}"


@pytest.mark.slow
def test_every_option_of_train_has_its_effect(world, tmp_path):
    few = "--batch-size 8 --windows 40 --eval-windows 16".split()
    tenth = ("--max-steps", 0, "--epochs", 0.2)
    check_effects(
        train,
        [*RUN_BASE, *world["options"], *world["tiny"], *few],
        {
            **RUN_FLAGS,
            "--batch-size": Effect(4, "weights"),
            "--epochs": [Effect(2, "refused"), Effect(1, "weights", given=tenth)],
            "--data": six_records(world),
            "--split": Effect("ds1", "refused"),  # no record of the list DS1 is among these
            "--manifest": six_listed(world),
            "--annotator": Effect("qrs", "refused"),  # none of the records is a WFDB one
            "--cache": Effect(tmp_path / "cache", "same weights"),
            "--model-fs": Effect(60, "weights"),
            "--input-fs": Effect(77, "refused"),  # the files state another rate
            "--low-hz": Effect(2, "weights"),
            "--high-hz": Effect(10, "weights"),
            "--channel": Effect("all", "weights"),
            "--min-seconds": Effect(1000, "refused"),  # the records have 60 s
            "--skip-bad": Effect(True, skipped, alone=("--data", world["labelled"], bad_record(world))),
            "--windows": Effect(24, ("weights", "text")),
            "--val-fraction": Effect(0.4, "log"),
            "--config": Effect(config_of(world), "shape"),
            "--set": Effect(["depth=2"], "shape"),
            "--min-lr": [Effect(9e-5, "weights"), Effect(1.0, "refused")],
            "--betas": Effect([0.5, 0.6], "weights"),
            "--eval-windows": Effect(3, ("log", "same weights")),
            "--probe": Effect("rhythm", ("log", "same weights")),
        },
        tmp_path,
    )


def config_of(world):
    path = world["folder"] / "wider.yaml"
    path.write_text((world["folder"] / "config.yaml").read_text().replace("embed_dim: 16", "embed_dim: 24"))
    return path


MLP = ("--head", "mlp")
BEATS = ("--task", "beat")


@pytest.mark.slow
def test_every_option_of_finetune_has_its_effect(world, tmp_path):
    other = world["folder"] / "other.safetensors"
    words = [*world["options"], *world["tiny"], "--max-steps", 1, "--batch-size", 8, "--seed", 5]
    done = forked.call(train, [*words, "--out", world["folder"] / "other"], world["folder"] / "log.txt")
    assert done.returncode == 0, done.text
    (world["folder"] / "other" / "model.safetensors").rename(other)
    split = world["folder"] / "split.json"
    split.write_text('{"train": ["s000", "s001", "s003", "s004", "s006"], "test": ["s002"]}')
    base = f"--pretrained {world['model']} --task rhythm --folds 3 --batch-size 8 --lr 1e-3 --select last"
    compared = (*MLP, "--center-columns", 4, "--freeze")
    check_effects(
        finetune,
        [*RUN_BASE, *world["options"], *base.split()],
        {
            **RUN_FLAGS,
            "--batch-size": Effect(4, "weights"),
            "--lr": Effect(3e-3, "weights"),
            "--data": six_records(world),
            "--task": Effect("beat", "shape"),
            "--split": Effect(split, "weights"),
            "--manifest": six_listed(world),
            "--annotator": Effect("qrs", "refused"),  # none of the records is a WFDB one
            "--level": Effect("form", "refused"),  # for task labels: tests/test_cwt_mae_leads.py
            "--folds": Effect(2, "weights"),
            "--fold": [Effect(1, "weights"), Effect(5, "refused"), Effect(-1, "refused")],
            "--label-share": Effect(0.2, "weights"),
            "--cache": Effect(tmp_path / "cache", "same weights"),
            "--input-fs": Effect(77, "refused"),  # the files state another rate
            "--skip-bad": Effect(True, skipped, alone=("--data", world["labelled"], bad_record(world))),
            "--pretrained": Effect(other, "weights"),
            "--random-init": Effect(True, "weights"),
            "--signal-len": Effect(100, "shape"),
            "--freeze": Effect(True, "weights"),
            "--head": Effect("mlp", "shape"),
            "--center-columns": [Effect(4, "shape", given=MLP), Effect(4, "refused")],
            "--set": [
                Effect(["num_reasoning_tokens=3"], "shape"),
                Effect(["hidden_dim=8"], "shape", given=MLP),
                Effect(["num_res_blocks=1"], "shape", given=MLP),
                Effect(["dropout_rate=0.5"], "weights", given=MLP),
                Effect(["input_dropout=0.5"], "weights"),
                Effect(["hidden_dim=8"], "refused"),
                Effect(["num_reasoning_tokens=3"], "refused", given=MLP),
            ],
            "--features": [Effect(False, "shape", given=BEATS), Effect(False, "refused")],
            "--amplitude": [Effect(True, "shape", given=BEATS), Effect(True, "refused")],
            "--hierarchy": [Effect(True, "shape", given=BEATS), Effect(True, "refused")],
            "--compare": [Effect(True, "shape", given=compared), Effect(True, "refused")],
            "--schedule": Effect("constant", "weights"),
            "--layer-decay": [Effect(0.9, "weights"), Effect(0.9, "refused", given=("--freeze",))],
            "--label-smoothing": Effect(0.3, "weights"),
            "--class-weights": Effect(True, "weights"),
            "--sampling-power": Effect(0.0, "weights"),
            "--mixup": Effect(0.5, "weights"),
            "--augment": Effect(1, "weights"),
            "--flip": [Effect(True, "weights", given=("--augment", 1)), Effect(True, "refused")],
            "--jitter": Effect(5, "weights"),
            "--fibrillation": [Effect(0.9, "weights", given=BEATS), Effect(0.9, "refused")],
            "--select": Effect("best", ("weights",), given=("--eval-every", 1)),
        },
        tmp_path,
    )


@pytest.mark.slow
def test_every_option_of_the_convolutional_control_has_its_effect(world, tmp_path):
    flags = {name: effect for name, effect in RUN_FLAGS.items() if name != "--eval-every"}
    base = "--batch-size 8 --task rhythm --model-fs 50 --signal-len 200 --resamples 0".split()
    check_effects(
        cnn,
        [*RUN_BASE, *world["options"], *base],
        {
            **flags,
            "--batch-size": Effect(4, "weights"),
            "--data": six_records(world),
            "--task": Effect("beat", "shape"),
            "--split": Effect(world["folder"] / "split6.json", "weights"),
            "--folds": [Effect(2, "weights", given=("--fold", 0)), Effect(2, "refused")],
            "--fold": Effect(0, "weights"),
            "--validate": [Effect(True, "predictions", given=("--fold", 0)), Effect(True, "refused")],
            "--model-fs": Effect(60, "weights"),
            "--low-hz": Effect(2, "weights"),
            "--signal-len": Effect(240, "weights"),
            "--cache": Effect(tmp_path / "cache", "same weights"),
            "--amplitude": [Effect(True, "shape", given=BEATS), Effect(True, "refused")],
            "--resamples": Effect(5, ("predictions", "same weights")),
            "--sampling-power": Effect(0.0, "weights"),
            "--augment": Effect(0.1, "weights"),
            "--jitter": Effect(0, "weights"),
            "--fibrillation": [Effect(0.9, "weights", given=BEATS), Effect(0.9, "refused")],
        },
        tmp_path,
    )
