"""cwt_mae: no split leaks, at the level of the arrays that reach the models.

Every record is a sine of a frequency of its own, so that whatever reaches a model says which record it came
from."""

import json

import numpy as np
import pytest
import torch

from cwt_mae import finetune, test, train, validation
from cwt_mae.model import CWT_MAE_RoPE
from cwt_mae.model_finetune import TF_MAE_Classifier
from studies.cwt_mae import cnn, forest, probe
from studies.cwt_mae import windows as study_windows
from tests.tiny_cwt import CHANGES, SIZES, run

FS, SECONDS, LENGTH = 50, 40, SIZES["signal_len"]
TINY = ["--model-fs", FS, "--low-hz", 0, "--set", *CHANGES]
# Two records of each subject; s0 to s5 train, s6 to s8 test
NAMES = [f"s{subject}{record}" for subject in range(9) for record in "ab"]
HZ = {name: 2.0 + 0.75 * i for i, name in enumerate(NAMES)}
TEST = {name for name in NAMES if name[1] in "678"}
TRAIN = set(NAMES) - TEST


def subjects(names) -> set:
    return {name[:2] for name in names}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Records with two rhythms each, a split file, and a pre-trained model: paths by name."""
    folder = tmp_path_factory.mktemp("leak")
    (folder / "data").mkdir()
    clock = np.arange(FS * SECONDS) / FS
    marks = dict(ann_sample=[0, FS * SECONDS // 2], ann_symbol=["+", "+"], ann_aux=["(N", "(AFIB"])
    for name in NAMES:
        wave = np.sin(2 * np.pi * HZ[name] * clock).astype(np.float32)
        np.savez(folder / "data" / f"{name}.npz", sig=wave, fs=FS, subject=name[:2], **marks)
    split = {"train": sorted(TRAIN), "test": sorted(TEST)}
    (folder / "split.json").write_text(json.dumps(split))
    paths = {"folder": folder, "base": folder / "base" / "model.safetensors"}
    pretrain(paths, "base", "--max-steps", "1")
    return paths


def given(world):
    places = {"--data": "data", "--split": "split.json", "--cache": "cache"}
    return [word for flag, name in places.items() for word in (flag, str(world["folder"] / name))]


def pretrain(world, name, *options):
    out = ["--out", str(world["folder"] / name)]
    options = [*given(world), *TINY, *out, "--batch-size", "8", "--lr", "1e-3", *options]
    run(train, *options)


def tune(world, name, *options):
    out = ["--out", str(world["folder"] / name), "--pretrained", str(world["base"])]
    options = [*given(world), *out, "--task", "rhythm", "--batch-size", "8", "--max-steps", "20", *options]
    run(finetune, *options)


def records_of(x) -> set:
    """Names of the records that rows x (B, L) were cut from, by the frequency of their highest peak."""
    x = torch.as_tensor(np.asarray(x), dtype=torch.float64).reshape(-1, LENGTH)
    window = torch.hann_window(LENGTH, dtype=torch.float64)
    spectrum = torch.fft.rfft(x * window, 8 * LENGTH).abs()
    spectrum[:, : 8 * LENGTH // FS] = 0  # below 1 Hz: the drift of the augmentation
    peaks = spectrum.argmax(1).double() * FS / (8 * LENGTH)
    names, hz = list(HZ), torch.tensor(list(HZ.values()), dtype=torch.float64)
    distance = (peaks[:, None] - hz).abs()
    assert float(distance.amin(1).max()) < 0.3, "an array is none of the records"
    return {names[i] for i in distance.argmin(1).tolist()}


@pytest.fixture
def seen(monkeypatch):
    """{"train": names, "eval": names} of the records whose arrays reach a model in training and in evaluation
    mode."""
    found = {"train": set(), "eval": set()}

    def watch(owner, name):
        plain = getattr(owner, name)

        def watched(self, x, *arguments, **options):
            found["train" if self.training else "eval"] |= records_of(x.detach())
            return plain(self, x, *arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(CWT_MAE_RoPE, "forward")
    watch(TF_MAE_Classifier, "forward")
    watch(cnn.SmallCNN, "forward")
    return found


@pytest.mark.slow
def test_pre_training_leaves_out_validation_and_test_subjects(world, seen):
    pretrain(world, "pre", "--max-steps", "30", "--val-fraction", "0.3", "--eval-windows", "1000")
    assert len(subjects(seen["eval"])) == 2 and seen["eval"] <= TRAIN
    assert seen["train"] == TRAIN - seen["eval"] and not subjects(seen["train"]) & subjects(seen["eval"])


@pytest.mark.slow
def test_pre_training_without_a_split_takes_every_record_but_the_validation_subjects(world, seen):
    out = ["--out", str(world["folder"] / "all"), "--batch-size", "8", "--lr", "1e-3", "--max-steps", "40"]
    data = given(world)
    run(train, *data[:2], *data[4:], *TINY, *out, "--eval-windows", "1000")
    assert seen["train"] | seen["eval"] == set(NAMES)
    assert len(subjects(seen["eval"])) == 1 and not subjects(seen["train"]) & subjects(seen["eval"])


def test_the_probe_of_pre_training_is_fitted_and_scored_on_different_training_subjects(world, monkeypatch):
    fits = watch_probe(monkeypatch, validation)
    pretrain(world, "probed", "--max-steps", "1", "--probe", "rhythm")
    for x, y, other in fits:
        fitted, scored = records_of(x), records_of(other)
        assert len(x) == len(y) and fitted | scored == TRAIN
        assert not subjects(fitted) & subjects(scored)
    assert len(fits) == 2  # before the first step and after the last


def watch_probe(monkeypatch, module) -> list:
    """(windows, labels, other windows) of each fit of the probe that `module` makes, from now on."""
    fits = []
    stacked = lambda model, dataset, device: np.stack([dataset[i]["x"].numpy() for i in range(len(dataset))])
    fit = lambda x, y, other: fits.append((x, y, other)) or np.full((len(other), 2), 0.5)
    monkeypatch.setattr(module, "probe_features", stacked)
    monkeypatch.setattr(module, "linear_probe", fit)
    return fits


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_fine_tuning_never_sees_its_fold_in_training_nor_a_test_record(world, seen, fold):
    tune(world, f"fold{fold}", "--folds", "3", "--fold", str(fold), "--augment", "1", "--jitter", "2")
    assert len(subjects(seen["eval"])) == 2 and seen["eval"] <= TRAIN
    assert seen["train"] == TRAIN - seen["eval"] and not subjects(seen["train"]) & subjects(seen["eval"])


def test_fine_tuning_on_all_training_records_evaluates_on_none(world, seen):
    tune(world, "whole", "--fold", "-1")
    assert seen["train"] == TRAIN and not seen["eval"]


@pytest.mark.parametrize("part, wanted", [("test", TEST), ("train", TRAIN), ("all", set(NAMES))])
def test_scoring_takes_the_part_that_was_asked_for(world, seen, part, wanted):
    if not (world["folder"] / "tuned").exists():
        tune(world, "tuned", "--folds", "3", "--max-steps", "1")
    seen["train"].clear()
    seen["eval"].clear()
    options = [*given(world)] if part != "all" else [*given(world)[:2], *given(world)[4:]]
    model, out = world["folder"] / "tuned" / "model.safetensors", world["folder"] / f"scored-{part}"
    run(test, *options, "--model", model, "--part", part, "--out", out)
    assert seen["eval"] == wanted and not seen["train"]


def test_the_probe_of_the_study_is_fitted_to_training_and_scored_on_test_records(world, monkeypatch):
    fits = watch_probe(monkeypatch, probe)
    options = ["--model", str(world["base"]), "--task", "rhythm", "--random-seeds", "1", "--resamples", "2"]
    run(probe, *given(world), *options, "--out", world["folder"] / "probe")
    assert [(records_of(x), records_of(other)) for x, _, other in fits] == [(TRAIN, TEST)] * 2


WINDOWS = f"--task rhythm --model-fs {FS} --low-hz 0 --signal-len {LENGTH} --resamples 0".split()


@pytest.mark.parametrize("validate", [False, True])
def test_the_convolutional_control_is_scored_on_what_it_was_not_trained_on(world, seen, validate):
    out = ["--out", str(world["folder"] / f"cnn{validate}"), "--max-steps", "20", "--batch-size", "8"]
    fold = ["--fold", "0", "--folds", "3", "--validate"] if validate else []
    run(cnn, *given(world), *WINDOWS, *out, *fold)
    assert not subjects(seen["train"]) & subjects(seen["eval"])
    assert seen["eval"] == (TRAIN - seen["train"] if validate else TEST)
    assert len(subjects(seen["train"])) == (4 if validate else 6)


def test_the_forest_is_scored_on_what_it_was_not_fitted_to(world, monkeypatch):
    tables, plain = [], forest.table_of
    monkeypatch.setattr(forest, "table_of", lambda *arguments: tables.append(plain(*arguments)) or tables[-1])
    out = ["--out", str(world["folder"] / "nn"), "--kind", "nn"]
    run(forest, *given(world), *WINDOWS, *out)
    assert [records_of(table) for table in tables] == [TRAIN, TEST]


def test_train_validation_and_scored_windows_of_the_controls_are_disjoint(world):
    for fold in (0, 1):
        options = [*given(world), *WINDOWS, "--out", "x", "--fold", str(fold), "--folds", "3"]
        split = study_windows.split_windows(cnn.parse_args(options))
        names = [
            set(np.char.decode(split.store.records["name"][task.items["record"]]).tolist())
            for task in (split.train, split.validation, split.scored)
        ]
        assert names[2] == TEST and names[0] | names[1] == TRAIN and len(names[1]) == 4
        assert not subjects(names[0]) & subjects(names[1])
