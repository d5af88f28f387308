"""cwt_mae: the scripts from end to end, interrupted, on two processes, and with bad inputs."""

import csv
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from cwt_mae import finetune, make_data, test, train, visualize
from cwt_mae.dataset import Preprocess, build_store
from cwt_mae.dataset_finetune import DownstreamClassificationDataset, load_task
from cwt_mae.model_finetune import load_model
from studies.cwt_mae import cnn, forest, probe
from tests import forked
from tests.parity import assert_same_first_step, assert_same_scores
from tests.quick_python import python
from tests.tiny_cwt import CHANGES, run

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--model-fs", "50", "--set", *CHANGES]
TINY += "--batch-size 8 --windows 40 --eval-windows 16 --lr 1e-3 --log-every 1".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Built-in data, a pre-trained model and a rhythm classifier, all tiny: paths by name."""
    folder = tmp_path_factory.mktemp("cwt")
    words = ["--out", str(folder / "data"), *"--subjects 9 --seconds 90 --ppg 2".split()]
    run(make_data, *words)
    paths = {"folder": folder} | {name: folder / name for name in ("data", "cache", "base", "tuned")}
    paths |= {"labelled": folder / "data/labelled", "split": folder / "data/labelled/split.json"}
    pretrain(paths, paths["base"], "--max-steps", "6", "--probe", "rhythm", "--eval-every", "3")
    tune(paths, paths["tuned"], "--max-steps", "6")
    return paths


def given(paths, data="labelled"):
    """Options that name the data, the split and the cache."""
    return ["--data", str(paths[data]), "--split", str(paths["split"]), "--cache", str(paths["cache"])]


def pretraining(paths, out, *options):
    """The options of a tiny pre-training."""
    return [*given(paths, "data"), "--out", str(out), *TINY, *options]


def tuning(paths, out, *options):
    """The options of a tiny fine-tuning."""
    sizes = "--task rhythm --folds 3 --batch-size 8 --lr 1e-3 --log-every 1".split()
    model = str(paths["base"] / "model.safetensors")
    return [*given(paths), "--pretrained", model, *sizes, "--out", str(out), *options]


def pretrain(paths, out, *options):
    run(train, *pretraining(paths, out, *options))


def tune(paths, out, *options):
    run(finetune, *tuning(paths, out, *options))


def run_apart(script, options, log):
    """Run a script in a process of its own, which may fork loader workers."""
    done = forked.call(script, options, log)
    assert done.returncode == 0, done.text


def losses(out):
    """{step: logged training loss} of a run."""
    lines = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def same(a, b):
    one, two = load_file(Path(a) / "model.safetensors"), load_file(Path(b) / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
def test_pre_training_logs_both_losses_beside_the_trivial_ones_and_draws(world):
    lines = [json.loads(line) for line in (world["base"] / "log.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "val_spec" in line)
    assert {"val_time", "spec_mean", "spec_line", "time_mean", "time_line", "probe_f1"} <= set(first)
    assert first["step"] == 0
    # The mean of normalised targets misses them by 1.
    assert 0.9 < first["spec_mean"] < 1.1 and 0.9 < first["time_mean"] < 1.1
    assert {"loss_spec", "loss_time", "lr", "grad"} <= set(next(line for line in lines if "loss" in line))
    assert (world["base"] / "figures" / "reconstruction.png").stat().st_size > 10_000
    assert losses(world["base"])[6] < losses(world["base"])[1]


def test_the_test_part_is_scored_with_tables_intervals_and_pictures(world):
    out = world["folder"] / "scored"
    common = ["--model", str(world["tuned"] / "model.safetensors"), *given(world)]
    run(test, *common, "--out", out, "--resamples", "50")
    result = json.loads((out / "metrics.json").read_text())
    records = (out / "per_record.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in records[1:]} == set(json.loads(world["split"].read_text())["test"])
    assert result["macro_f1_95"][0] <= result["macro_f1"] <= result["macro_f1_95"][1]
    windows = len((out / "per_window.csv").read_text().splitlines()) - 1
    assert result["records"] == 3 and sum(map(sum, result["confusion"])) == result["windows"] == windows
    assert (out / "figures" / "confusion.png").is_file()
    everything = [*common[:4], "--cache", str(world["cache"]), "--unlabelled", "--stride", "50"]
    run(test, *everything, "--out", world["folder"] / "read")
    line = (world["folder"] / "read" / "per_record.csv").read_text().splitlines()[1].split(",")
    # Windows of 200 every 50 samples of 4,500, the last at the end
    assert int(line[3]) == -(-(90 * 50 - 200) // 50) + 1


def test_ensemble_of_one_model_twice_is_that_model(world):
    model = world["tuned"] / "model.safetensors"
    once, twice = world["folder"] / "once", world["folder"] / "twice"
    for models, out in (([model], once), ([model, model], twice)):
        words = ["--model", *models, *given(world), "--out", out, "--resamples", 0]
        run(test, *words)
    assert_same_scores(once / "per_window.csv", twice / "per_window.csv")


@pytest.mark.slow
def test_the_probe_the_picture_and_the_controls_run(world):
    model, out = str(world["base"] / "model.safetensors"), str(world["folder"] / "probe")
    words = ["--model", model, "--task", "rhythm", *given(world), "--out", out, "--random-seeds", "1"]
    run(probe, *words)
    result = json.loads((world["folder"] / "probe" / "metrics.json").read_text())
    assert result["chance"] < result["random_mean"]
    assert result["interval"][0] <= result["macro_f1"] <= result["interval"][1]
    data = ["--data", str(world["labelled"]), "--cache", str(world["cache"])]
    words = ["--model", model, *data, "--out", str(world["folder"] / "p.png"), "--window", "3"]
    run(visualize, *words)
    table = np.loadtxt(world["folder"] / "p.csv", delimiter=",", skiprows=1)
    assert table.shape == (200, 4) and set(table[:, 3]) == {0.0, 1.0}
    options = "--task rhythm --model-fs 50 --signal-len 200 --resamples 0".split()
    for kind in ("nn", "forest"):
        out = world["folder"] / kind
        run(forest, *options, *given(world), "--kind", kind, "--out", out)
        assert 0 < json.loads((out / "metrics.json").read_text())["macro_f1"] <= 1
    out = world["folder"] / "cnn"
    run(cnn, *options, *given(world), "--max-steps", "5", "--out", out)
    assert 0 < json.loads((out / "metrics.json").read_text())["accuracy"] <= 1


def test_heads_modes_and_losses_of_fine_tuning(world):
    before = load_file(world["base"] / "model.safetensors")
    for name, options in {
        "frozen": ["--freeze"],
        "compared": ["--freeze", "--compare", "--head", "mlp", "--center-columns", "4"],
        "mlp": ["--head", "mlp", "--mixup", "0.2", "--class-weights", "--augment", "1", "--jitter", "2"],
        "random": ["--random-init", "--seed", "7"],
        "longer": ["--signal-len", "400", "--sampling-power", "0.5"],
    }.items():
        out = world["folder"] / f"tuned_{name}"
        tune(world, out, "--max-steps", "3", "--select", "last", *options)
        after = load_file(out / "model.safetensors")
        key = "blocks.0.attn.qkv.weight"
        moved = float((after[f"encoder_model.{key}"] - before[key]).abs().max())
        assert (moved == 0) == (name in ("frozen", "compared")), (name, moved)
        assert (moved > 0.05) == (name == "random"), (name, moved)


def test_a_model_that_compares_is_scored_with_the_median_tokens_of_each_record(world):
    compare = "--max-steps 3 --freeze --compare --head mlp --center-columns 4".split()
    tune(world, world["folder"] / "compares", *compare)
    model, out = world["folder"] / "compares" / "model.safetensors", world["folder"] / "compares_scored"
    options = ["--model", str(model), *given(world), "--out", str(out), "--resamples", "0"]
    run(test, *options)
    told = {"s002": [], "s005": []}
    for line in csv.DictReader(open(out / "per_window.csv")):
        told.get(line["record"], []).append([float(line["p_N"]), float(line["p_AFIB"])])
    classifier = load_model(model)
    store = build_store([world["labelled"]], Preprocess(**classifier.config["preprocess"]), world["cache"])
    task = load_task(store, "rhythm", 200)
    for name, wanted in told.items():
        here = task.select(np.char.decode(store.records["name"][task.items["record"]]) == name)
        windows = [DownstreamClassificationDataset(store, here, 200)[i] for i in range(len(here.items))]
        with torch.no_grad():
            tokens = classifier.middle(torch.stack([w["x"] for w in windows]))
            found = classifier.head(tokens - tokens.median(0).values).softmax(1).numpy()
        assert np.abs(found[:, [task.classes.index(c) for c in ("N", "AFIB")]] - wanted).max() < 2e-4, name


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit_with_loader_workers(world):
    whole, cut, log = world["folder"] / "whole", world["folder"] / "cut", world["folder"] / "resumed.txt"
    options = "--max-steps 8 --save-every 3 --workers 2".split()  # epochs of 5 steps: step 3 is in mid-epoch
    run_apart(train, pretraining(world, whole, *options), log)
    shutil.copytree(whole, cut, symlinks=True)
    for step in (6, 8):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:08d}")
    (cut / "model.safetensors").unlink()
    run_apart(train, pretraining(world, cut, *options, "--resume"), log)
    assert same(whole, cut) and losses(whole) == losses(cut)
    whole, cut = world["folder"] / "tuned_whole", world["folder"] / "tuned_cut"
    options = "--max-steps 8 --save-every 3 --workers 1 --augment 1 --head mlp --set dropout_rate=0.5".split()
    options += ["--select", "last"]
    run_apart(finetune, tuning(world, whole, *options), log)
    shutil.copytree(whole, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints" / "step-00000008")
    run_apart(finetune, tuning(world, cut, *options, "--resume"), log)
    assert same(whole, cut) and losses(whole) == losses(cut)


def bash(script, *options, cwd, **variables):
    """Start one of the room's launchers from `cwd`."""
    command = ["bash", os.path.relpath(ROOT / "cwt_mae" / script, cwd), *options]
    env = os.environ | {"PYTHON": python()} | variables
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_take_the_first_step_of_one(world):
    for processes in (1, 2):
        options = ["--batch-size", 8 // processes, "--max-steps", 1]
        options += ["--out", world["folder"] / f"p{processes}"]
        script = ROOT / "cwt_mae" / "train.py"
        done = forked.run_file(script, *given(world), *TINY, *options, processes=processes)
        assert done.returncode == 0, done.stderr
    assert_same_first_step(world["folder"] / "p1", world["folder"] / "p2")


TUNED = "--data {labelled} --pretrained {base}/model.safetensors"


@pytest.mark.parametrize(
    "script, options, wanted",
    [
        (train, "--data nowhere", "nowhere"),
        (train, "--data {data} --set signal_len=210", "patch_size_time"),
        (train, "--data {data} --batch-size 100000", "--batch-size"),
        (finetune, "--data {labelled} --task rhythm --pretrained none.safetensors", "none.safetensors"),
        (finetune, f"{TUNED} --task series", "no label for task series"),
        (finetune, f"{TUNED} --task rhythm", "--split"),
        (finetune, f"{TUNED} --task rhythm --split {{split}} --compare", "--freeze"),
        (test, "--data {labelled} --model {base}/model.safetensors", "finetune.py"),
        (probe, "--data {labelled} --task rhythm --model {tuned}/model.safetensors", "pre-trained"),
    ],
)
def test_bad_inputs_are_errors_of_one_line_before_anything_is_written(script, options, wanted, world):
    out = world["folder"] / "never"
    options = options.format(**world).split()
    if script is train:
        options = [*TINY, "--max-steps", "1", *options]
    with pytest.raises(UserError) as error:
        run(script, *options, "--cache", world["cache"], "--out", out)
    assert wanted in str(error.value) and "\n" not in str(error.value) and not out.exists()


def test_a_bad_input_ends_with_status_2_and_no_traceback(world):
    options = ["--data", "nowhere.npz", "--out", world["folder"] / "never"]
    done = forked.run_file(ROOT / "cwt_mae" / "train.py", *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: nowhere.npz")


@pytest.mark.slow
def test_the_launchers_go_from_data_to_scores(world, tmp_path):
    """From the project's folder; data and outputs are relative to the caller, without OUT a run goes below
    RUNS."""
    cwd = ROOT / "cwt_mae"
    given = {"RUNS": os.path.relpath(tmp_path, cwd), "DATA": os.path.relpath(world["data"], cwd)}
    options = ["--split", str(world["split"]), "--cache", str(world["cache"]), *TINY, "--max-steps", "2"]
    done = bash("run_train.sh", *options, cwd=cwd, **given)
    base = tmp_path / "cwt_mae/base/model.safetensors"
    assert done.returncode == 0 and base.is_file(), done.stderr
    places = {
        "DATA": world["labelled"],
        "OUT": tmp_path / "a classifier",
        "SPLIT": world["split"],
        "MODEL": base,
    }
    given |= {name: os.path.relpath(place, cwd) for name, place in places.items()} | {"TASK": "rhythm"}
    options = ["--cache", str(world["cache"]), "--max-steps", "2", "--folds", "3"]
    done = bash("run_finetune.sh", *options, cwd=cwd, **given)
    assert done.returncode == 0, done.stderr
    told = shlex.split(done.stdout.strip().rpartition(": python cwt_mae/test.py ")[2])  # it can be pasted
    pasted = test.parse_args(told)
    assert Path(pasted.model[0]).samefile(tmp_path / "a classifier/model.safetensors")
    assert Path(pasted.data[0]).samefile(world["labelled"]) and (cwd / pasted.split).samefile(world["split"])
    kept = (tmp_path / "a classifier" / "model.safetensors").stat().st_mtime_ns
    given |= {"OUT": str(tmp_path / "scored"), "MODEL": str(tmp_path / "a classifier" / "model.safetensors")}
    done = bash("run_test.sh", "--cache", str(world["cache"]), cwd=cwd, **given)
    assert done.returncode == 0 and (tmp_path / "scored" / "metrics.json").is_file(), done.stderr
    assert not (tmp_path / "scored" / "checkpoints").exists()  # it trains nothing
    assert (tmp_path / "a classifier" / "model.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize("script, wanted", [("run_finetune.sh", "base"), ("run_test.sh", "classifier")])
def test_launchers_look_into_the_folder_RUNS(script, wanted, tmp_path):
    done = bash(script, cwd=ROOT / "cwt_mae", RUNS=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/cwt_mae/{wanted}/model.safetensors: no such")


def test_upstreams_names_are_doors(world, tmp_path):
    from cwt_mae import dataset_cls, dataset_finetune, inference

    assert dataset_cls.DownstreamClassificationDataset is dataset_finetune.DownstreamClassificationDataset
    assert inference.main is test.main and inference.parse_args is test.parse_args


@pytest.mark.slow
def test_four_epochs_make_as_many_steps_as_whole_steps_fit(world, tmp_path):
    """Three batches an epoch, two in a step: one whole step an epoch, and the loop makes all four."""
    options = "--max-steps 0 --epochs 4 --accum 2 --windows 24 --log-every 1".split()
    pretrain({**world, "data": world["labelled"]}, tmp_path / "run", *options)
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]
