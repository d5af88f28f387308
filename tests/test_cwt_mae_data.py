"""cwt_mae: reading, preparing, cutting and splitting signals."""

import io
import json
import os
import pickle
import re
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from common.errors import UserError
from cwt_mae import dataset as dataset_module
from cwt_mae.dataset import PhysioSignalDataset, Preprocess, build_store, read_records
from cwt_mae.dataset_finetune import (
    DS1,
    ITEMS,
    RHYTHM,
    DownstreamClassificationDataset,
    Task,
    amplitude_features,
    fold_of,
    load_task,
    median_beats,
    rhythm_features,
    share_of,
    split_parts,
)
from cwt_mae.validation import bridge
from tests.tiny_cwt import run

FS = 200


def wave(seconds=20.0, fs=FS, hz=3.0, seed=0):
    """A sine of `hz` with a little noise, in mV."""
    time = np.arange(int(seconds * fs)) / fs
    return np.sin(2 * np.pi * hz * time) + 0.01 * np.random.default_rng(seed).standard_normal(len(time))


def beats_npz(path, seed=0, seconds=60.0, fs=FS, subject=None, symbols="N"):
    """A record of sharp beats, one in ten early and of another shape, in the npz form of MIT-BIH."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.uniform(0.7, 0.9, int(seconds / 0.9)))
    times = times[times < seconds - 1]
    codes = np.array([symbols[i % len(symbols)] for i in range(len(times))])
    clock = np.arange(int(seconds * fs)) / fs
    signal = 0.02 * rng.standard_normal(len(clock))
    for time, code in zip(times, codes):
        height, width = (1, 0.015) if code == "N" else (-1.5, 0.05)
        signal += height * np.exp(-0.5 * ((clock - time) / width) ** 2)
    about = dict(fs=np.int32(fs), gain=np.int32(200), lead="MLII")
    about |= {} if subject is None else {"subject": subject}
    notes = dict(ann_symbol=np.r_[["+"], codes], ann_aux=np.array(["(N"] + [""] * len(times)))
    notes["ann_sample"] = np.r_[3, np.round(times * fs)].astype(np.int32)
    np.savez(path, sig=np.round(200 * signal).astype(np.int16), **about, **notes)
    return path


@pytest.fixture
def prepare():
    return Preprocess(fs=100.0, low_hz=0.5)


def store_of(tmp_path, prepare, sources=None, **options):
    return build_store([sources or tmp_path / "data"], prepare, tmp_path / "cache", **options)


def test_the_same_signal_is_read_alike_from_every_format(tmp_path, prepare):
    x = wave().astype(np.float32)
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "a.npz", sig=x, fs=FS)
    np.save(folder / "b.npy", x)
    (folder / "c.csv").write_text(
        "time_s,ecg\n" + "".join(f"{i / FS:.6f},{v:.7f}\n" for i, v in enumerate(x))
    )
    with h5py.File(folder / "d.h5", "w") as file:
        file.create_dataset("ecg", data=x).attrs["fs"] = FS
    edfio = pytest.importorskip("edfio")
    signal = edfio.EdfSignal(x.astype(float), FS, label="ecg", physical_range=(-2, 2))
    edfio.Edf([signal]).write(folder / "e.edf")
    wfdb = pytest.importorskip("wfdb")
    form = dict(fmt=["16"], adc_gain=[10000], baseline=[0], write_dir=str(folder))
    wfdb.wrsamp("f", FS, ["mV"], ["ecg"], x[:, None].astype(float), **form)
    signals = {}
    for path in sorted(folder.glob("*.[!d]*")):
        store = store_of(tmp_path, prepare, path, fs=FS if path.suffix == ".npy" else None)
        assert len(store.records) == 1
        signals[path.suffix] = store.signal(0)
    assert set(signals) == {".npz", ".npy", ".csv", ".h5", ".edf", ".hea"}
    for suffix, signal in signals.items():
        assert len(signal) == len(x) // 2
        assert np.abs(signal - signals[".npz"]).max() < 2e-4, suffix


def test_a_short_record_is_normalised_before_it_is_padded(tmp_path, prepare):
    np.savez(tmp_path / "a.npz", sig=wave(seconds=3) + 50, fs=FS)
    item = PhysioSignalDataset(store_of(tmp_path, prepare, tmp_path / "a.npz"), 1000)[0]
    x, real = item["x"], item["real"]
    assert real.sum() == 300 and not real[300:].any()
    assert abs(float(x[real].std(unbiased=False)) - 1) < 1e-4 and abs(float(x[real].mean())) < 1e-4
    assert not x[300:].any()


def test_an_item_depends_on_seed_epoch_and_index_alone(tmp_path, prepare):
    np.savez(tmp_path / "a.npz", sig=wave(), fs=FS)
    store = store_of(tmp_path, prepare, tmp_path / "a.npz")
    first, second = (PhysioSignalDataset(store, 256, seed=5, num_patches=8) for _ in range(2))
    _ = second[1], torch.rand(3), np.random.rand(3)  # other draws in between change nothing
    for name, value in first[2].items():
        assert torch.equal(value, second[2][name]) if torch.is_tensor(value) else value == second[2][name]
    second.set_epoch(1)
    assert not any(torch.equal(first[2][name], second[2][name]) for name in ("x", "noise"))


def test_every_start_of_a_window_can_be_drawn(tmp_path, prepare):
    np.savez(tmp_path / "a.npz", sig=wave(), fs=FS)
    dataset = PhysioSignalDataset(store_of(tmp_path, prepare, tmp_path / "a.npz"), 1996, windows=300)
    assert {int(dataset[i]["name"].split("@")[1]) for i in range(300)} == {0, 1, 2, 3, 4}


def test_a_store_is_mapped_not_read_and_made_once(tmp_path, prepare):
    np.savez(tmp_path / "a.npz", sig=wave(), fs=FS)
    store = store_of(tmp_path, prepare, tmp_path / "a.npz")
    made = (store.folder / "records.npy").stat().st_mtime_ns
    assert isinstance(store.signal(0).base, np.memmap) and len(pickle.dumps(store)) < 500
    assert (store_of(tmp_path, prepare, tmp_path / "a.npz").folder / "records.npy").stat().st_mtime_ns == made


def test_signals_are_read_again_when_the_code_that_reads_them_has_changed(tmp_path, prepare, monkeypatch):
    np.savez(tmp_path / "a.npz", sig=wave(), fs=FS)
    before = store_of(tmp_path, prepare, tmp_path / "a.npz")
    monkeypatch.setattr(dataset_module, "EDITION", "another")
    after = store_of(tmp_path, prepare, tmp_path / "a.npz")
    assert after.folder != before.folder and after.about["shards"] != before.about["shards"]
    code = [Path(dataset_module.__file__).with_name(name).read_text() for name in dataset_module.CODE]
    used = re.findall(r"^from cwt_mae\.(\w+) import", "\n".join(code), re.M)
    assert set(dataset_module.CODE) == {"dataset.py", *(f"{name}.py" for name in used)}


def test_a_cache_below_the_data_is_no_data(tmp_path, prepare):
    beats_npz(tmp_path / "a.npz")
    first, second = (build_store([tmp_path], prepare, cache=tmp_path / "cache") for _ in range(2))
    assert second.folder == first.folder and len(second.records) == 1


def test_tar_shards_give_what_their_files_give(tmp_path, prepare):
    data = many_files(tmp_path)
    for shard in range(2):
        with tarfile.open(tmp_path / f"s{shard}.tar", "w") as archive:
            archive.add(data / f"p{shard}", f"p{shard}")
            archive.addfile(tarfile.TarInfo(f"p{shard}/r{shard}.cls"))
    tars = build_store([tmp_path / "s{0..1}.tar"], prepare, tmp_path / "cache")
    plain = build_store([data], prepare, tmp_path / "cache")
    assert [n.decode().partition("/")[2] for n in tars.records["name"]] == [
        n.decode() for n in plain.records["name"]
    ]
    assert (tars.records["subject"] == plain.records["subject"]).all()
    assert all((tars.signal(i) == plain.signal(i)).all() for i in range(7))
    assert len(tars.labels) == 2


def test_a_bad_file_of_a_shard_is_left_out_alone_and_records_of_several_files_are_whole(tmp_path, prepare):
    wfdb, signal = pytest.importorskip("wfdb"), wave(10)[:, None]
    for name in ("a", "b", "cut"):
        wfdb.wrsamp(name, FS, ["mV"], ["ECG"], signal, fmt=["16"], write_dir=str(tmp_path))
    segments = f"a {len(signal)}\nb {len(signal)}\n"
    (tmp_path / "whole.hea").write_text(f"whole/2 1 {FS} {2 * len(signal)}\n{segments}")
    (tmp_path / "cut.dat").write_bytes(b"cut")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:  # a record's files need not stand side by side
        for path in (*tmp_path.glob("*.dat"), *tmp_path.glob("*.hea")):
            archive.add(path, f"p1/{path.name}")
    store = build_store([tmp_path / "s.tar"], prepare, tmp_path / "cache", skip_bad=True)
    assert store.records["name"].tolist() == [b"s/p1/whole"] and len(store.signal(0)) == 2000
    assert len(store.about["skipped"]) == 1 and "s.tar: p1/cut.hea" in store.about["skipped"][0]
    with pytest.raises(UserError, match="s.tar: p1/cut.hea"):
        build_store([tmp_path / "s.tar"], prepare, tmp_path / "cache")
    # a segment that changes, changes the record, also where it is given alone
    for name in ("cut.dat", "cut.hea", "s.tar"):
        (tmp_path / name).unlink()
    before = build_store([tmp_path / "whole.hea"], prepare, tmp_path / "cache").signal(0)
    wfdb.wrsamp("b", FS, ["mV"], ["ECG"], -signal, fmt=["16"], write_dir=str(tmp_path))
    after = build_store([tmp_path], prepare, tmp_path / "cache").signal(0)
    assert len(after) == len(before) and not np.allclose(after, before)
    assert np.array_equal(after, build_store([tmp_path / "whole.hea"], prepare, tmp_path / "cache").signal(0))


def test_a_tar_that_leads_out_or_is_broken_is_one_line(tmp_path, prepare):
    def refused(said):
        with pytest.raises(UserError, match=f"a.tar.*{said}"):
            build_store([tmp_path / "a.tar"], prepare, tmp_path / "cache")

    def write(name, content=b"", link=None):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if link:
                info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info, io.BytesIO(content))

    write("../out.npz", b"x")
    refused("../out.npz lies outside")
    write("x.npz", link="/etc/passwd")
    refused("x.npz is a link")
    write("x" * 300 + ".npz", b"x")
    refused("cannot be unpacked .File name too long")
    write("x.npz", b"no npz")
    refused("x.npz: not a readable npz")
    write("readme.txt", b"nothing")
    refused("holds no signal file")
    (tmp_path / "a.tar").write_bytes(b"\0" * 100)
    refused("")
    assert not (tmp_path / "out.npz").exists()


def many_files(tmp_path):
    """Seven files of one or two channels with events, below two folders."""
    rng = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / "data" / f"p{i % 2}" / f"r{i}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        signal = wave() + rng.normal(size=len(wave()))
        np.savez(path, sig=signal, fs=FS, ann_sample=[5, 9 + i], ann_symbol=["N", "V"])
    return tmp_path / "data"


@pytest.mark.parametrize("limit, value", [("SHARD", 3), ("BYTES", 100_000)])
def test_shards_hold_what_one_store_holds(tmp_path, prepare, monkeypatch, limit, value):
    data = many_files(tmp_path)
    whole = build_store([data], prepare, tmp_path / "one")
    monkeypatch.setattr(dataset_module, limit, value)
    monkeypatch.setattr(dataset_module.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    cut = build_store([data], prepare, tmp_path / "three")
    assert len(whole.about["shards"]) == 1 and len(cut.about["shards"]) == 3
    for name in ("name", "subject", "recording", "length", "std"):
        assert (whole.records[name] == cut.records[name]).all()
    assert all((whole.signal(i) == cut.signal(i)).all() for i in range(7))
    assert whole.events.tolist() == cut.events.tolist() and len(cut.events) == 14


def test_a_changed_file_is_read_again_and_the_others_are_not(tmp_path, prepare, monkeypatch):
    data, read = many_files(tmp_path), []
    monkeypatch.setattr(dataset_module, "SHARD", 2)
    monkeypatch.setattr(dataset_module.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    original = dataset_module.read_records
    monkeypatch.setattr(
        dataset_module, "read_records", lambda path, *a: read.append(path.name) or original(path, *a)
    )
    before = build_store([data], prepare, tmp_path / "cache")
    assert len(read) == 7
    np.savez(data / "p1/r3.npz", sig=2 * wave() + 1, fs=FS)
    after = build_store([data], prepare, tmp_path / "cache")
    assert len(read) == 9 and {"r3.npz"} < set(read[7:])
    assert (after.signal(0) == before.signal(0)).all() and len(after.events) == 12


@pytest.mark.slow
def test_several_processes_fill_the_same_store(tmp_path, prepare, monkeypatch):
    data = many_files(tmp_path)
    whole = build_store([data], prepare, tmp_path / "one")
    monkeypatch.setattr(dataset_module, "SHARD", 2)
    monkeypatch.setattr(dataset_module.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    cut = build_store([data], prepare, tmp_path / "two")
    assert (whole.records["name"] == cut.records["name"]).all()
    assert all((whole.signal(i) == cut.signal(i)).all() for i in range(7))


X = wave()
FIELDS = {  # of bad.npz, and what the error must say
    "nan": ({"sig": X * np.nan}, "without a single measured sample"),
    "flat": ({"sig": 0 * X}, "flat line"),
    "rate": ({"sig": X, "fs": -1}, "field fs"),
    "no-rate": ({"sig": X, "fs": None}, "--input-fs; for files of different rates the column fs of a --man"),
    "short": ({"sig": X[:5]}, "too short"),
    "annotation": ({"sig": X, "ann_sample": [10**6], "ann_symbol": ["N"]}, "ann_sample"),
    "annotation-kind": ({"sig": X, "ann_sample": ["a"], "ann_symbol": ["N"]}, "field ann_sample"),
    "gain": ({"sig": X, "gain": [1.0, 2.0]}, "field gain"),
    "no-signal": ({}, "no signal"),
    "text": ({"sig": np.array(["a", "b"])}, "field sig"),
    "objects": ({"sig": np.array([{"a": 1}], dtype=object)}, "plain arrays"),
    "transposed": ({"sig": np.stack([X, X], 1)}, "transpose"),
    "cut": ({"sig": X}, "bad.npz"),
}
FILES = {
    "bad.ts": (b"@data\n1,2,\xa8:1\n", "line 2"),
    "bad.csv": (b"time_s,ecg\n0,1\n1,2,3\n", "columns"),
    "bad.hea": (b"bad 1 200 100\nmissing.dat 16 200 12 0 0 0 0 I\n", "WFDB"),
}


@pytest.mark.parametrize("name", [*FIELDS, *FILES])
def test_a_bad_record_is_an_error_that_names_file_and_field_or_is_skipped_and_counted(
    name, tmp_path, prepare, capsys
):
    folder = tmp_path / "data"
    folder.mkdir()
    if name in FILES:
        content, wanted = FILES[name]
        (folder / name).write_bytes(content)
    else:
        fields, wanted = FIELDS[name]
        np.savez(folder / "bad.npz", **{k: v for k, v in ({"fs": FS} | fields).items() if v is not None})
    if name == "bad.hea":
        pytest.importorskip("wfdb")
    if name == "cut":
        data = (folder / "bad.npz").read_bytes()
        (folder / "bad.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError) as error:
        store_of(tmp_path, prepare)
    assert "bad" in str(error.value) and wanted in str(error.value) and "\n" not in str(error.value)
    np.savez(folder / "good.npz", sig=wave(), fs=FS)
    store = store_of(tmp_path, prepare, skip_bad=True)
    assert len(store.records) == 1 and "skipped 1 bad records, kept 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sources, wanted", [("nowhere", "no such file or folder"), ("data", "holds no signal file")]
)
def test_missing_and_empty_sources_are_errors(sources, wanted, tmp_path, prepare):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=wanted):
        store_of(tmp_path, prepare, tmp_path / sources)


def test_a_contradicted_rate_is_an_error(tmp_path):
    np.savez(tmp_path / "a.npz", sig=wave(), fs=FS)
    with pytest.raises(UserError, match="200 Hz but"):
        read_records(tmp_path / "a.npz", fs=250)


def test_wfdb_and_npz_forms_of_mit_bih_give_the_same_beats(tmp_path, prepare, data_root):
    pytest.importorskip("wfdb")
    prepare = Preprocess(fs=90.0)
    stores = [
        build_store([data_root / "ecg" / p], prepare, tmp_path / "cache")
        for p in ("raw_wfdb/100.hea", "mitbih/100.npz")
    ]
    wfdb, npz = (load_task(store, "beat", 180) for store in stores)
    assert wfdb.counts().tolist() == npz.counts().tolist() == [2239, 33, 1, 0]
    assert (wfdb.items["label"] == npz.items["label"]).all()
    assert np.abs(wfdb.items["start"] - npz.items["start"]).max() <= 1
    sets = (DownstreamClassificationDataset(*both, 180) for both in zip(stores, (wfdb, npz)))
    a, b = (dataset[50]["x"].numpy() for dataset in sets)
    assert np.corrcoef(a, b)[0, 1] > 0.98


def test_a_beat_comes_with_the_rhythm_around_it_and_the_median_beat_of_its_record(tmp_path, prepare):
    beats_npz(tmp_path / "a.npz", symbols="NNNNV")
    store = store_of(tmp_path, prepare, tmp_path / "a.npz")
    task = load_task(store, "beat", 100)
    seconds = store.events[1:]["seconds"]
    assert np.array_equal(task.features, rhythm_features(seconds))
    assert task.features.shape == (len(task.items), 11)
    early = seconds.copy()
    early[20] -= 0.4
    assert rhythm_features(early)[20, 0] < -0.4 < rhythm_features(seconds)[20, 0]
    dataset = DownstreamClassificationDataset(store, task, 100)
    dataset.median_beats = median_beats(lambda x, real: x, store, task, 100)
    median_beat = dataset[0]["median_beat"].numpy()
    assert list(dataset.median_beats) == [0] and median_beat.shape == (100,) and median_beat.argmax() == 50
    close = np.array([np.corrcoef(dataset[i]["x"], median_beat)[0, 1] for i in range(5, 15)])
    odd = task.items["label"][5:15] == 2
    assert close[odd].max() < 0.3 < 0.8 < close[~odd].min()  # the rare shape is not the median_beat one
    few = median_beats(lambda x, real: x, store, task, 100, at_most=20)[0]
    assert np.corrcoef(few, median_beat)[0, 1] > 0.95
    windows = np.sort([dataset[i]["x"].numpy() for i in range(len(task.items))], 0)
    assert np.allclose(median_beat, windows[(len(windows) - 1) // 2])  # what is rare moves a mean
    pieces = median_beats(lambda x, real: x, store, task, 100, batch=7)[0]
    assert np.array_equal(pieces, median_beat)


def test_the_amplitude_of_a_beat_is_told_in_the_scale_of_its_record():
    clock, heights = np.arange(6000) / 100, np.where(np.arange(58) % 9 == 4, 2.5, 1.0)
    signal = sum(h * np.exp(-(((clock - 1 - i) / 0.03) ** 2)) for i, h in enumerate(heights))
    centres = 100 * (1 + np.arange(58))
    found = amplitude_features(signal, centres, 100.0)
    tall = heights > 1
    assert np.allclose(found[tall, 0], np.log(2.5), atol=0.01) and np.allclose(found[~tall, 0], 0, atol=0.01)
    assert found[tall, 2].min() > 1.4 and found[tall, 6:].min() > 0.1 > np.abs(found[~tall, 6:]).max()
    # The gain of the amplifier says nothing, nor does the line's height.
    assert np.allclose(amplitude_features(40 * signal + 7, centres, 100.0), found, atol=1e-3)


def test_simulated_fibrillation_changes_the_rhythm_of_all_but_s(tmp_path, prepare):
    beats_npz(tmp_path / "a.npz", symbols="NNNA")
    store = store_of(tmp_path, prepare, tmp_path / "a.npz")
    task = load_task(store, "beat", 100, amplitude=True)
    dataset = DownstreamClassificationDataset(store, task, 100, draws=200, fibrillation_fraction=1.0)
    items = [dataset[i] for i in range(200)]
    own = [np.array_equal(item["features"], task.features[item["index"]]) for item in items]
    assert own == [item["label"] == 1 for item in items] and 0 < sum(own) < 200
    drawn = np.stack([item["features"] for item in items if item["label"] != 1])
    assert np.median(drawn[:, 8]) > np.median(task.features[:, 8]) + 0.5  # the neighbourhood is irregular
    shapes = {row.tobytes() for row in task.features[:, RHYTHM:]}
    assert {row.tobytes() for row in drawn[:, RHYTHM:]} <= shapes  # and what the beat looks like stays


def test_a_beat_stays_in_the_middle_of_its_window_at_the_ends_of_a_record(tmp_path, prepare):
    beats_npz(tmp_path / "a.npz")
    store = store_of(tmp_path, prepare, tmp_path / "a.npz")
    dataset = DownstreamClassificationDataset(store, load_task(store, "beat", 300), 300)
    item = dataset[0]
    assert not item["real"][0] and item["real"][-1] and abs(int(item["x"].argmax()) - 150) <= 2


def test_records_named_in_ds1_train_and_every_other_one_tests(tmp_path, prepare):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("101", "106", "100", "my_own_record")):
        beats_npz(tmp_path / "data" / f"{name}.npz", seed=i)
    store = store_of(tmp_path, prepare)
    parts = lambda *split: dict(zip(np.char.decode(store.records["name"]), split_parts(store, *split)))
    assert parts() == {"101": "train", "106": "train", "100": "test", "my_own_record": "test"}
    assert len(DS1) == 22
    (tmp_path / "split.json").write_text(json.dumps({"train": ["100"], "test": ["101.npz"]}))
    wanted = {"101": "test", "106": "", "100": "train", "my_own_record": ""}
    assert parts(tmp_path / "split.json") == wanted


def test_a_subject_on_both_sides_of_a_split_is_an_error(tmp_path, prepare):
    (tmp_path / "data").mkdir()
    for name in ("101", "x"):
        beats_npz(tmp_path / "data" / f"{name}.npz", subject="patient7")
    with pytest.raises(UserError, match="patient7"):
        split_parts(store_of(tmp_path, prepare))


def test_folds_keep_subjects_together_and_spread_rare_classes(tmp_path, prepare):
    (tmp_path / "data").mkdir()
    for i in range(8):
        symbols = "NNNV" if i < 4 else "N"
        beats_npz(tmp_path / "data" / f"r{i}.npz", seed=i, subject=f"p{i // 2}", symbols=symbols)
    store = store_of(tmp_path, prepare)
    task = load_task(store, "beat", 100)
    fold = fold_of(store, task, 2)
    by_subject = {s: set(fold[store.records["subject"] == s]) for s in set(store.records["subject"])}
    assert all(len(folds) == 1 for folds in by_subject.values()) and set(fold) == {0, 1}
    v = task.items["label"] == 2
    assert all((v & (fold[task.items["record"]] == f)).any() for f in (0, 1))
    with pytest.raises(UserError, match="--folds 9"):
        fold_of(store, task, 9)


@pytest.mark.parametrize("kind", ["beat", "rhythm", "series", "labels"])
def test_a_share_of_the_labels_holds_every_class_and_lies_within_larger_shares(kind):
    records = np.repeat(np.arange(100), 4)  # four windows each
    items = np.zeros(400, ITEMS)
    items["record"], items["label"] = records, 0 if kind == "labels" else records % 10 // 8 + (records == 99)
    task = Task(kind, ["a", "b", "c"], items, np.zeros((1, 0), np.float32))
    shares = {share: share_of(task, share, 3, records) for share in (0.0, 0.01, 0.1, 0.5, 1.0)}
    sizes = [chosen.sum() for chosen in shares.values()]
    assert sizes == sorted(sizes) and shares[1.0].all() and abs(sizes[3] - 200) <= 8
    for smaller, larger in zip(shares.values(), list(shares.values())[1:]):
        assert set(items["label"][smaller]) == set(items["label"]) and not (smaller & ~larger).any()
    assert (shares[0.1] != share_of(task, 0.1, 4, records)).any()
    whole = shares[0.1].reshape(-1, 4)
    assert (whole.all(1) == whole.any(1)).all() == (kind in ("series", "labels"))


def test_an_unknown_beat_code_is_an_error(tmp_path, prepare):
    beats_npz(tmp_path / "a.npz", symbols="NNX")
    with pytest.raises(UserError, match="no WFDB annotation code"):
        load_task(store_of(tmp_path, prepare, tmp_path / "a.npz"), "beat", 100)


def test_a_label_outside_the_known_classes_is_an_error_and_never_class_zero(tmp_path, capsys):
    for part in ("train", "test"):
        x = np.stack([wave(seconds=1, seed=i) for i in range(6)])
        y = [1, 2, 1, 2, 1, 9 if part == "test" else 2]
        np.savez(tmp_path / f"{part}.npz", x_train=x, y_train=y)
    prepare = Preprocess(0.0, 0.0)
    classes = load_task(store_of(tmp_path, prepare, tmp_path / "train.npz"), "series", 200).classes
    store = store_of(tmp_path, prepare, tmp_path / "test.npz")
    with pytest.raises(UserError, match="label '9'"):
        load_task(store, "series", 200, classes)
    task = load_task(store, "series", 200, classes, skip_bad=True)
    assert len(task.items) == 5 and "skipped 1" in capsys.readouterr().err


def test_pre_training_never_sees_the_test_series_of_a_ucr_set(tmp_path):
    x = np.stack([wave(1, seed=i) for i in range(9)])
    np.savez(tmp_path / "u.npz", x_train=x[:4], y_train=[-1, 1, 1, -1], x_test=x, y_test=[1] * 9)
    lines = "".join(",".join(f"{v:.4f}" for v in row) + ":2\n" for row in x[:3])
    (tmp_path / "u_TEST.ts").write_text(f"@problemName u\n@data\n{lines}")
    prepare = Preprocess(0.0, 0.0)
    assert len(store_of(tmp_path, prepare, tmp_path / "u.npz", part="train").records) == 4
    store = store_of(tmp_path, prepare, tmp_path / "u.npz")
    parts = split_parts(store)
    assert (parts == "train").sum() == 4 and (parts == "test").sum() == 9
    assert load_task(store, "series", 200).classes == ["-1", "1"]
    assert len(store_of(tmp_path, prepare, tmp_path / "u_TEST.ts").records) == 3
    with pytest.raises(UserError, match="no usable record"):
        store_of(tmp_path, prepare, tmp_path / "u_TEST.ts", part="train")


def test_classes_are_drawn_by_power_of_their_frequency(tmp_path, prepare):
    beats_npz(tmp_path / "a.npz", symbols="N" * 9 + "V", seconds=200)
    store = store_of(tmp_path, prepare, tmp_path / "a.npz")
    task = load_task(store, "beat", 100)
    share = {}
    for power in (1.0, 0.0):
        dataset = DownstreamClassificationDataset(store, task, 100, draws=3000, power=power)
        share[power] = (task.items["label"][dataset.drawn] == 2).mean()
        assert abs(share[power] - dataset.drawn_prior[2]) < 0.03
    assert share[1.0] < 0.15 and abs(share[0.0] - 0.5) < 0.03


def test_mixup_blends_windows_and_says_by_how_much(tmp_path, prepare):
    beats_npz(tmp_path / "a.npz", symbols="NV")
    store = store_of(tmp_path, prepare, tmp_path / "a.npz")
    task = load_task(store, "beat", 100)
    plain, mixed = (DownstreamClassificationDataset(store, task, 100, draws=50, mixup=m) for m in (0.0, 1.0))
    item, rng = mixed[3], np.random.default_rng(0)
    rest = (item["x"] - item["blend"] * plain[3]["x"]) / (1 - item["blend"])
    near = lambda i: np.allclose(mixed.window(i, rng)["x"], rest, atol=1e-4)
    other = next(i for i in range(len(task.items)) if near(i))
    assert task.items["label"][other] == item["label2"] and 0 < item["blend"] < 1


def test_rhythm_windows_do_not_cross_a_change(tmp_path, prepare):
    marks = dict(ann_sample=[0, 25 * FS], ann_symbol=["+", "+"], ann_aux=["(N", "(AFIB"])
    np.savez(tmp_path / "a.npz", sig=wave(60), fs=FS, **marks)
    task = load_task(store_of(tmp_path, prepare, tmp_path / "a.npz"), "rhythm", 1000)
    wanted = [(0, 1), (1000, 1), (2500, 0), (3500, 0), (4500, 0)]
    assert task.classes == ["AFIB", "N"] and [tuple(i)[1:3] for i in task.items] == wanted


def test_the_line_baseline_draws_straight_lines_between_what_is_visible():
    image = np.array([[0.0, 5, 5, 3, 9, 9]])
    hidden = np.array([False, True, True, False, True, True])
    assert np.allclose(bridge(image, hidden), [[0, 1, 2, 3, 3, 3]])
    assert not bridge(image, np.ones(6, bool)).any()


def test_upstreams_pickles_are_converted_only_when_allowed(tmp_path, prepare):
    from cwt_mae import convert_pickles

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "p.pkl").write_bytes(
        pickle.dumps({"data": wave()[None], "label": [{"class": 3}], "uid": "u1", "sampling_rate": FS})
    )
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--allow-pickle"):
        run(convert_pickles, *options)
    run(convert_pickles, *options, "--allow-pickle")
    store = store_of(tmp_path, prepare, tmp_path / "out")
    assert store.records["subject"][0] == b"u1" and load_task(store, "series", 500).classes == ["3"]
    with pytest.raises(UserError, match="unknown format"):
        read_records(tmp_path / "in" / "p.pkl")
    (tmp_path / "in" / "p.pkl").write_bytes(pickle.dumps({"data": wave(), "sampling_rate": None}))
    run(convert_pickles, *options, "--allow-pickle", "--fs", "100")
    assert read_records(tmp_path / "out" / "p.npz")[0].fs == 100
    (tmp_path / "in" / "p.pickle").write_bytes(pickle.dumps({"data": wave(), "sampling_rate": FS}))
    with pytest.raises(UserError, match="two files would become"):
        run(convert_pickles, *options, "--allow-pickle")


class Hostile:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["code", "code in the data", "cut", "no pickle"])
def test_a_pickle_that_is_not_plain_data_is_one_line_and_runs_nothing(tmp_path, kind):
    from cwt_mae import convert_pickles

    hostile, whole = Hostile(tmp_path / "made"), pickle.dumps({"data": wave(), "sampling_rate": FS})
    content = {
        "code": pickle.dumps(hostile),
        "code in the data": pickle.dumps({"data": [hostile], "sampling_rate": FS}),
        "cut": whole[: len(whole) // 2],
        "no pickle": b"time,ecg",
    }[kind]
    (tmp_path / "p.pkl").write_bytes(content)
    options = ["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--allow-pickle"]
    with pytest.raises(UserError, match="p.pkl: "):
        run(convert_pickles, *options)
    assert not (tmp_path / "made").exists() and not (tmp_path / "out").exists()
