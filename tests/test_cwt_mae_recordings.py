"""cwt_mae: what recordings say about themselves: rates, clocks, gaps, units, subjects, parts and labels."""

import json
import tarfile
from datetime import time

import h5py
import numpy as np
import pytest
from scipy.signal import sosfiltfilt

from common.errors import UserError
from cwt_mae.dataset import (
    Preprocess,
    build_store,
    filtered_both_ways,
    preferred,
    ratio_of,
    read_records,
    resampled,
    sections_of,
)
from cwt_mae.dataset_finetune import beats_of, load_task, rhythm_spans, split_parts
from cwt_mae.layouts import find_recordings
from cwt_mae.readers import plain_wfdb
from cwt_mae.recording import as_channel, sentinels
from cwt_mae.test import record_rows

FS = 100


def ecg(fs, seconds, phase=0.0):
    return np.sin(2 * np.pi * (1.2 * np.arange(int(fs * seconds)) / fs + phase)) ** 31


def store_of(tmp_path, source=None, **options):
    prepare = options.pop("prepare", Preprocess(FS, 0.0))
    return build_store([source or tmp_path / "data"], prepare, tmp_path / "cache", **options)


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


def npz(path, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **fields)
    return path


def wfdb_record(path, channels, fs, **options):
    wfdb = pytest.importorskip("wfdb")
    path.parent.mkdir(parents=True, exist_ok=True)
    names, columns = list(channels), np.stack(list(channels.values()), 1)
    units, fmt = ["mV"] * len(names), ["16"] * len(names)
    wfdb.wrsamp(path.name, fs, units, names, columns, fmt=fmt, write_dir=str(path.parent), **options)
    return path.with_suffix(".hea")


@pytest.mark.parametrize(
    "more", [{}, {"comments": ["Age: 50", "Dx: 1,2"]}, {"base_time": time(1, 2, 3, 4000)}]
)
@pytest.mark.parametrize("fs, count", [(125, 1), (99.5, 2), (360, 12)])
def test_the_quick_way_reads_what_the_wfdb_package_reads(tmp_path, fs, count, more):
    x = np.random.default_rng(0).normal(size=(count, 300))
    x[0, 7] = np.nan
    path = wfdb_record(tmp_path / "r", {f"lead {i}": row for i, row in enumerate(x)}, fs, **more)
    quick = plain_wfdb(path, path.read_text())
    record = pytest.importorskip("wfdb").rdrecord(str(tmp_path / "r"), smooth_frames=False)
    for name in ("fs", "samps_per_frame", "sig_name", "units"):
        assert getattr(quick, name) == getattr(record, name)
    for own, other in zip(quick.e_p_signal, record.e_p_signal, strict=True):
        assert own.dtype == other.dtype and np.array_equal(own, other, equal_nan=True)
    path.with_suffix(".dat").write_bytes(path.with_suffix(".dat").read_bytes()[:-2])
    assert plain_wfdb(path, path.read_text()) is None  # the package says what is wrong


@pytest.mark.parametrize("kind, edges", [("highpass", (0.5,)), ("bandpass", (0.5, 40)), ("lowpass", (30,))])
def test_the_filter_is_scipys_to_the_bit(kind, edges):
    sections, rest = sections_of(125, kind, *edges)
    for length in (31, 250, 3001):
        x = 3 + np.random.default_rng(0).normal(size=length)
        assert np.array_equal(filtered_both_ways(x, sections, rest), sosfiltfilt(sections, x))


def test_an_edge_beyond_the_rate_is_no_filter_and_what_leaves_nothing_is_refused():
    x = np.random.default_rng(0).normal(size=3000)
    low, both = Preprocess(0, 0, 8).filtered(x, 25), Preprocess(0, 4, 8).filtered(x, 25)
    # A rate of each file's own may leave the low-pass alone
    assert np.array_equal(Preprocess(0, 4, 8).filtered(x, 7), Preprocess(0, 0, 3.43).filtered(x, 7))
    assert low.std() > 1.3 * both.std()
    for wrong in ((50, 25), (50, 30), (100, 10, 5), (0, 8, 8)):
        with pytest.raises(UserError, match="--low-hz .* leaves nothing"):
            Preprocess(*wrong)


# ---- clocks


@pytest.mark.parametrize("fs, ticks", [(360, 250), (250, 1000), (128, 128), (500, 62.5)])
def test_annotations_of_another_clock_than_the_signal_lie_on_their_peaks(fs, ticks, tmp_path):
    wfdb = pytest.importorskip("wfdb")
    peaks = np.arange(2, 58, 2.0)
    x = np.zeros(60 * fs)
    x[np.round(peaks * fs).astype(int)] = 1
    header = wfdb_record(tmp_path / "a", {"MLII": x}, fs)
    samples = np.round(peaks * ticks).astype(int)
    wfdb.wrann("a", "atr", samples, ["N"] * len(peaks), fs=ticks, write_dir=str(tmp_path))
    seconds = [event.seconds for event in read_records(header)[0].events]
    assert np.abs(np.array(seconds) - peaks).max() <= 0.5 / ticks


@pytest.mark.parametrize("annotator, wanted", [("", "N"), ("qrs", "V"), (".qrs", "V")])
def test_the_annotator_can_be_named(annotator, wanted, tmp_path):
    wfdb = pytest.importorskip("wfdb")
    header = wfdb_record(tmp_path / "a", {"II": ecg(FS, 10)}, FS)
    for suffix, symbol in (("atr", "N"), ("qrs", "V")):
        wfdb.wrann("a", suffix, np.array([100, 200, 300]), [symbol] * 3, write_dir=str(tmp_path))
    assert {event.symbol for event in read_records(header, annotator=annotator)[0].events} == {wanted}
    with pytest.raises(UserError, match="no annotation file .ecg"):
        read_records(header, annotator="ecg")


RATES = [(249.89, 250), (249.8899, 250), (116.98775447, 100), (100, 100.0003), (360, 90), (1 / 3, 0.5)]


@pytest.mark.parametrize("fs, rate", [*RATES, (999.97, 1000)])
def test_nearly_equal_rates_drift_by_less_than_a_sample_in_a_day(fs, rate):
    assert abs(float(ratio_of(fs, rate)) * fs / rate - 1) * 86400 * max(fs, rate) < 1


@pytest.mark.parametrize("fs, rate", [(249.89, 250), (116.98775447, 100), (360, 90)])
def test_a_resampled_wave_stays_in_phase_to_its_end(fs, rate):
    seconds, hz = 600, 7.3
    x = np.sin(2 * np.pi * hz * np.arange(int(seconds * fs)) / fs)
    y = resampled(x, fs, rate)
    wanted = np.sin(2 * np.pi * hz * np.arange(len(y)) / rate)
    assert abs(len(y) / rate - seconds) < 2 / rate and np.abs(y - wanted)[50:-50].max() < 0.02


def test_channels_of_one_npz_file_have_the_rates_that_it_states(tmp_path):
    path = npz(tmp_path / "a.npz", ecg=ecg(250, 20), ppg=ecg(50, 20), fs_ecg=250, fs_ppg=50)
    assert read_records(path)[0].rates == {"ecg": 250.0, "ppg": 50.0}
    path = npz(tmp_path / "b.npz", ecg=ecg(250, 20), ppg=ecg(50, 20), fs=[250, 50])
    assert read_records(path)[0].rates == {"ecg": 250.0, "ppg": 50.0}
    for channel in ("ecg", "ppg"):
        store = store_of(tmp_path, path, prepare=Preprocess(FS, 0, channel=channel))
        assert store.records["length"] == 2000
    with pytest.raises(UserError, match="holds 3 rates for 2 channels"):
        read_records(npz(tmp_path / "c.npz", ecg=ecg(250, 20), ppg=ecg(50, 20), fs=[250, 50, 1]))
    fields = dict(ecg=ecg(250, 20), ppg=ecg(50, 20), fs=[250, 50], ann_sample=[5], ann_symbol=["N"])
    with pytest.raises(UserError, match="add ann_fs"):
        read_records(npz(tmp_path / "d.npz", **fields))
    assert read_records(npz(tmp_path / "e.npz", **fields, ann_fs=50))[0].events[0].seconds == 0.1


def test_no_channel_replaces_one_that_has_its_name(tmp_path):
    x = ecg(250, 20)
    path = npz(tmp_path / "a.npz", ecg=np.stack([x, -x]), ecg0=2 * x, fs=250)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["ecg"], file["ecg0"], file["fs"] = np.stack([x, -x]), 2 * x, 250
    for record in read_records(path) + read_records(tmp_path / "a.h5"):
        assert list(record.channels) == ["ecg0", "ecg1", "ecg0#2"]
        assert np.allclose(record.channels["ecg0#2"], 2 * x)


def test_a_rate_is_known_by_its_name_in_any_case_and_is_one_number(tmp_path):
    for fields in (dict(FS=250), dict(ECG_Fs=250), dict(Sampling_Rate=np.array([[250]]))):
        assert read_records(npz(tmp_path / "a.npz", ecg=ecg(250, 20), **fields))[0].fs == 250
    for bad in (True, "fast", [250, 250], 0, np.nan):
        with pytest.raises(UserError, match="a.npz: field fs"):
            read_records(npz(tmp_path / "a.npz", ecg=ecg(250, 20), fs=bad))


def test_annotations_at_no_time_are_refused(tmp_path):
    fields = dict(ecg=ecg(250, 20), fs=250, ann_seconds=[1.0, np.nan], ann_symbol=["N", "V"])
    with pytest.raises(UserError, match="ann_seconds.*finite"):
        read_records(npz(tmp_path / "a.npz", **fields))


def test_data_sets_of_one_hdf5_file_have_their_own_rates(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, fs in (("ecg", 250), ("ppg", 50)):
            file.create_dataset(name, data=ecg(fs, 20)).attrs["sampling_rate"] = fs
        file["FS"], file["gone"] = 10, h5py.SoftLink("/nowhere")
        file.create_dataset("resp", data=ecg(10, 20))
    assert read_records(tmp_path / "a.h5")[0].rates == {"ecg": 250.0, "ppg": 50.0, "resp": 10.0}


def test_what_stands_beside_the_signals_is_no_signal_and_may_say_more_of_them(tmp_path):
    x = ecg(250, 20)
    beside = dict.fromkeys("time t Timestamps time_s".split(), np.arange(5000)) | {"units": np.ones(2)}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, value in (beside | {"ann_sample": np.ones(3), "heart_rate": x, "time_series": x}).items():
            file[name] = value
        item = file.create_dataset("u", data=np.stack([200 * x, 100 * x]))
        item.attrs.update(names=["II", "V1"], gain=[200.0, 100.0], units=["mV", "uV"])
        file.attrs["fs"] = 250
    channels = read_records(tmp_path / "a.h5")[0].channels
    assert {n: c.unit for n, c in channels.items()} == {
        "heart_rate": "",
        "time_series": "",
        "II": "mV",
        "V1": "uV",
    }
    assert all(np.allclose(channel, x) for channel in channels.values())
    record = read_records(npz(tmp_path / "a.npz", heart_rate=x, time_series=x, fs=250, **beside))[0]
    assert list(record.channels) == ["heart_rate", "time_series"]


# ---- EDF


def edf(path, signals, **options):
    edfio = pytest.importorskip("edfio")
    path.parent.mkdir(parents=True, exist_ok=True)
    edfio.Edf([edfio.EdfSignal(x, fs, label=label) for label, x, fs in signals], **options).write(path)
    return path


def test_an_edf_file_keeps_all_channels_with_their_rates_and_its_annotations(tmp_path):
    edfio = pytest.importorskip("edfio")
    notes = [edfio.EdfAnnotation(10, 30, "Sleep stage W"), edfio.EdfAnnotation(40, 20, "AFIB")]
    signals = [("SpO2", ecg(1, 60), 1), ("ECG", ecg(256, 60), 256), ("ECG", -ecg(64, 60), 64)]
    record = read_records(edf(tmp_path / "a.edf", signals, annotations=notes))[0]
    assert record.rates == {"SpO2": 1.0, "ECG": 256.0, "ECG#2": 64.0}
    assert [tuple(event) for event in record.events] == [(10, "", "Sleep stage W", 30), (40, "", "AFIB", 20)]
    store = store_of(tmp_path, tmp_path / "a.edf")
    assert store.records["channel"].tolist() == [b"ECG"] and store.records["length"].tolist() == [6000]
    assert rhythm_spans(store.events, 60.0) == [("Sleep stage W", 10.0, 40.0), ("AFIB", 40.0, 60.0)]
    assert load_task(store, "rhythm", 1000).counts().tolist() == [2, 3]


@pytest.mark.parametrize(
    "name, unit, encoding", [("心电", "µV", "utf-8"), ("Größe", "µV", "latin1"), ("导联", "伏", "gbk")]
)
def test_names_and_units_of_an_edf_file_need_not_be_ascii(name, unit, encoding, tmp_path):
    path = edf(tmp_path / "a.edf", [("ECG" + 13 * "x", ecg(256, 12), 256), ("Resp", ecg(64, 12), 64)])
    content = bytearray(path.read_bytes())
    content[256:272], content[256 + 192 : 256 + 200] = (
        text.encode(encoding).ljust(size, b"\0") for text, size in ((name, 16), (unit, 8))
    )
    path.write_bytes(bytes(content))
    record = read_records(path)[0]
    assert list(record.channels) == [name, "Resp"] and record.channels[name].unit == unit


def discontinuous(path, onsets):
    """Make an EDF+C file with records of a second an EDF+D file whose records begin at `onsets`."""
    b = bytearray(path.read_bytes())
    b[192:197] = b"EDF+D"
    count, header = int(b[252:256]), int(b[184:192])
    sizes = [int(b[256 + 216 * count + 8 * i : 264 + 216 * count + 8 * i]) for i in range(count)]
    labels = [bytes(b[256 + 16 * i : 272 + 16 * i]).decode().strip() for i in range(count)]
    notes, whole = labels.index("EDF Annotations"), 2 * sum(sizes)
    for k, onset in enumerate(onsets):
        at = header + k * whole + 2 * sum(sizes[:notes])
        stamp = f"+{onset}".encode() + b"\x14\x14\x00"
        b[at : at + 2 * sizes[notes]] = stamp.ljust(2 * sizes[notes], b"\x00")
    path.write_bytes(bytes(b))


def test_edf_with_gaps_is_cut_there_and_each_run_knows_when_it_begins(tmp_path):
    edfio = pytest.importorskip("edfio")
    path = tmp_path / "d.edf"
    notes = [edfio.EdfAnnotation(1.5, None, "a remark that is long enough for every time stamp")]
    edf(path, [("ECG", ecg(256, 12), 256)], annotations=notes, data_record_duration=1)
    discontinuous(path, [0, 1, 2, 100.5, 101.5, 102.5, 103.5, 1000, 1001, 1002, 1003, 1004])
    store = store_of(tmp_path, path)
    assert store.records["length"].tolist() == [300, 400, 500]
    assert store.records["start"].tolist() == [0.0, 100.5, 1000.0]
    assert len(set(store.records["recording"].tolist())) == 1 and read_records(path)[0].seconds() == 1005
    content = bytearray(path.read_bytes())
    for count in (b"-1", b"99", b"2"):  # what the header counts is not always what came
        content[236:244] = count.ljust(8)
        path.write_bytes(bytes(content))
        assert [start for _, start in read_records(path)[0].channels["ECG"].runs()] == [0.0, 100.5, 1000.0]
    for step in (1.0002, 0.99995):  # onsets are rounded, clocks drift: no gap
        discontinuous(path, [f"{step * i:.4f}" for i in range(12)])
        assert [len(x) for x, _ in read_records(path)[0].channels["ECG"].runs()] == [12 * 256]


def test_an_edf_file_of_annotations_alone_is_refused_in_one_line(tmp_path):
    edfio = pytest.importorskip("edfio")
    with pytest.raises(UserError, match="holds annotations but no signal"):
        read_records(edf(tmp_path / "n.edf", [], annotations=[edfio.EdfAnnotation(1, None, "x")]))


@pytest.mark.parametrize(
    "names, wanted",
    [
        (["EEG C3-A2", "ECG II"], "ECG II"),
        (["SpO2", "Pleth", "ECG"], "ECG"),
        (["RESP", "PLETH", "V", "AVR", "II"], "II"),
        (["V5", "MLII"], "MLII"),
        (["EOG left", "EKG R-L"], "EKG R-L"),
        (["Resp chest", "PPG 1"], "PPG 1"),
        (["EEG Fpz-Cz", "Resp oro-nasal"], "EEG Fpz-Cz"),
        (["aVF", "lead ii"], "lead ii"),
        (["SECG", "V1"], "V1"),
    ],
)
def test_the_channel_taken_by_itself_is_an_ecg_before_a_pulse_wave_before_anything_else(names, wanted):
    assert preferred(names) == wanted


# ---- WFDB


def test_a_wfdb_record_of_two_frequencies_keeps_both(tmp_path):
    wfdb = pytest.importorskip("wfdb")
    fast, slow = ecg(500, 20), ecg(125, 20)
    wfdb.wrsamp(
        "m", 125, ["mV", "mmHg"], ["ECG", "ABP"], e_p_signal=[fast, slow], samps_per_frame=[4, 1],
        fmt=["16", "16"], write_dir=str(tmp_path),
    )  # fmt: skip
    record = read_records(tmp_path / "m.hea")[0]
    assert record.rates == {"ECG": 500.0, "ABP": 125.0} and record.channels["ABP"].unit == "mmHg"
    assert np.abs(record.channels["ECG"] - fast).max() < 1e-3


def test_a_wfdb_header_may_leave_out_length_and_names(tmp_path):
    header = wfdb_record(tmp_path / "a", {"II": ecg(FS, 10), "V": ecg(FS, 10)}, FS)
    lines = header.read_text().splitlines()
    lines[0] = " ".join(lines[0].split()[:3])
    header.write_text("\n".join([lines[0], *(" ".join(line.split()[:2]) for line in lines[1:3])]) + "\n")
    record = read_records(header)[0]
    assert {name: len(x) for name, x in record.channels.items()} == {"channel": 10 * FS, "channel#2": 10 * FS}


def test_words_that_an_npz_file_keeps_as_bytes_are_words(tmp_path):
    notes = dict(ann_sample=np.array([100, 200, 300]), ann_symbol=np.array([b"N", b"V", b"N"]))
    notes |= dict(subject=np.array(b"p1"), label=np.array(b"AFIB"), t=np.arange(10 * FS) / FS)
    record = read_records(npz(tmp_path / "a.npz", ecg=ecg(FS, 10), fs=FS, **notes))[0]
    assert list(record.channels) == ["ecg"] and record.subject == "p1" and record.labels == {"": ["AFIB"]}
    assert [event.symbol for event in record.events] == ["N", "V", "N"]


def test_records_with_gaps_are_cut_into_runs_and_what_is_lost_is_counted(tmp_path, capsys):
    x = ecg(250, 40)
    x[2500:2520] = np.nan
    wfdb_record(tmp_path / "data" / "g", {"II": x}, 250)
    store = store_of(tmp_path)
    assert store.records["start"].tolist() == [0.0, 2520 / 250]
    assert store.records["length"].tolist() == [1000, 2992]
    assert "left out 20 samples (0.1 s)" in capsys.readouterr().err and store.about["lost"]["samples"] == 20


def test_segments_of_a_record_are_not_counted_again(tmp_path):
    folder = tmp_path / "data"
    for i in (1, 2):
        wfdb_record(folder / f"m_{i}", {"II": ecg(250, 20)}, 250)
    write(folder / "m.hea", "m/2 1 250 10000\nm_1 5000\nm_2 5000\n")
    store = store_of(tmp_path)
    assert store.records["name"].tolist() == [b"m"] and store.records["length"].tolist() == [4000]


def test_a_variable_layout_record_gives_the_segments_of_each_channel(tmp_path):
    folder, n = tmp_path / "data", 5000
    wfdb_record(folder / "v_1", {"II": ecg(250, 20), "V": ecg(250, 20)}, 250)
    wfdb_record(folder / "v_2", {"PLETH": ecg(250, 20)}, 250)
    layout = "v_layout 2 250 0\n~ 0 200/mV 16 0 0 0 0 II\n~ 0 200/mV 16 0 0 0 0 PLETH\n"
    write(folder / "v_layout.hea", layout)
    write(folder / "v.hea", f"v/4 2 250 {2 * n + 1000}\nv_layout 0\nv_1 {n}\n~ 1000\nv_2 {n}\n")
    for channel, start in (("II", 0.0), ("PLETH", 24.0)):
        store = store_of(tmp_path, prepare=Preprocess(FS, 0, channel=channel))
        assert store.records["length"].tolist() == [2000] and store.records["start"].tolist() == [start]


def test_beats_and_rhythms_of_a_record_with_a_gap_stay_where_they_are(tmp_path):
    x, peaks = np.zeros(60 * FS), np.arange(1, 59, 2) * FS
    x[peaks] = 1
    x[2000:2500] = np.nan
    npz(
        tmp_path / "data" / "a.npz", sig=x, fs=FS, ann_sample=np.r_[10, peaks],
        ann_symbol=["+"] + ["N"] * len(peaks), ann_aux=["(AFIB"] + [""] * len(peaks),
    )  # fmt: skip
    store = store_of(tmp_path)
    for row, beats in beats_of(store):
        centres = np.round(beats["seconds"] * FS).astype(int)
        assert store.signal(row)[centres].min() > 0.5
    assert sum(len(beats) for _, beats in beats_of(store)) == len(peaks) - 2  # two beats lie in the gap
    task = load_task(store, "rhythm", 500)
    assert task.classes == ["AFIB"] and set(task.items["record"].tolist()) == {0, 1}
    # Two rows of the store are one record in the results
    rows = record_rows(store, task, np.ones((len(task.items), 1)), labelled=True)
    assert [row["windows"] for row in rows] == [len(task.items)]


@pytest.mark.parametrize("mark, wanted", [(2500, [5, 10]), (2501, [5, 9])])
def test_a_rhythm_that_begins_with_a_run_is_that_of_the_run(mark, wanted, tmp_path):
    x = ecg(FS, 60)
    x[2000:2500] = np.nan
    marks = dict(ann_sample=[0, mark, 4500], ann_symbol=["+"] * 3, ann_aux=["(AFIB", "(N", "(AFIB"])
    npz(tmp_path / "data" / "a.npz", sig=x, fs=FS, **marks)
    task = load_task(store_of(tmp_path), "rhythm", 200)
    assert task.classes == ["AFIB", "N"] and task.counts().tolist() == [10 + 7, wanted[1]]


@pytest.mark.parametrize("value", [-32768, -9999, 99999, 32767])
@pytest.mark.parametrize("kind", [np.int32, np.float64])
def test_values_that_stand_for_nothing_are_gaps(value, kind, tmp_path):
    x = (500 * ecg(FS, 30)).astype(kind)
    x[1000:1050], x[1050:1100] = value, -32768
    store = store_of(tmp_path, npz(tmp_path / "a.npz", sig=x, fs=FS, gain=200))
    assert store.records["length"].tolist() == [1000, 1900]
    assert max(np.abs(store.signal(i)).max() for i in (0, 1)) < 3


def test_a_signal_that_reaches_a_round_value_is_not_taken_for_a_gap():
    x = np.linspace(-9999, 9000, 500)
    assert sentinels(x) is None and len(as_channel(x, 1.0).runs()) == 1
    assert len(as_channel(np.r_[-32768, np.arange(-32000, 32000, 100)].astype(np.int16), 1.0).runs()) == 1


def test_a_record_without_one_measured_sample_is_an_error(tmp_path):
    with pytest.raises(UserError, match="without a single measured sample"):
        store_of(tmp_path, npz(tmp_path / "a.npz", sig=np.full(1000, np.nan), fs=FS))


def test_a_rate_far_below_the_models_is_told(tmp_path):
    slow = store_of(tmp_path / "a", npz(tmp_path / "a/a.npz", sig=ecg(3, 100), fs=3))
    assert any("1 channels have less than a fifth of the model's" in note for note in slow.about["notes"])
    usual = store_of(tmp_path / "b", npz(tmp_path / "b/b.npz", sig=ecg(25, 100), fs=25))
    assert not any("a fifth" in note for note in usual.about["notes"])


# ---- csv


CLOCK = np.arange(400) / 250
VALUES = np.round(ecg(250, 1.6), 4)
ROWS = list(zip(CLOCK, VALUES))
CSV = {
    "tab": "Time (ms)\tecg\n" + "".join(f"{1e3 * t:.0f}\t{v}\n" for t, v in ROWS),
    "Chinese clock": "时间(毫秒),ecg\n" + "".join(f"{1e3 * t:.0f},{v}\n" for t, v in ROWS),
    "Chinese clock in seconds": "\ufeff时间（s）,备注,ecg\n" + "".join(f"{t:.3f},x,{v}\n" for t, v in ROWS),
    "Chinese count": "序号,时间_秒,ecg\n" + "".join(f"{i},{t:.3f},{v}\n" for i, (t, v) in enumerate(ROWS)),
    "decimal comma": "Zeit;ecg\n" + "".join(f"{t:.3f};{v}\n" for t, v in ROWS).replace(".", ","),
    "units line": "'Elapsed time','ecg'\n'seconds','mV'\n" + "".join(f"{t:.3f},{v}\n" for t, v in ROWS),
    "comments": "# a device\n# 2024\nt,ecg\n" + "".join(f"{t:.3f},{v}\n" for t, v in ROWS),
    "header in a comment": "# time_s,ecg\n" + "".join(f"{t:.3f},{v}\n" for t, v in ROWS),
    "iso": "timestamp,ecg\n" + "".join(f"2024-05-01T10:00:{t:09.6f},{v}\n" for t, v in ROWS),
    "time of day": "clock,ecg\n" + "".join(f"23:59:{59 + t:06.3f},{v}\n" for t, v in ROWS[:200]),
    "blanks": "time_us ecg\n" + "".join(f"{1e6 * t:.0f} {v}\n" for t, v in ROWS),
    "sep line": "sep=;\ntime_s;ecg\n" + "".join(f"{t:.3f};{v}\n" for t, v in ROWS),
    "index column": ",time_s,ecg\n" + "".join(f"{i},{t:.3f},{v}\n" for i, (t, v) in enumerate(ROWS)),
    "epoch": "timestamp,ecg\n" + "".join(f"{1700000000 + t:.3f},{v}\n" for t, v in ROWS),
    "text column": "time_s,ecg,note\n" + "".join(f"{t:.3f},{v},fine\n" for t, v in ROWS),
    "empty column": "time_s,ecg,note\n" + "".join(f"{t:.3f},{v},\n" for t, v in ROWS),
    "windows": "time_s,ecg\r\n" + "".join(f"{t:.3f},{v}\r\n" for t, v in ROWS),
    "no header": "".join(f"{t:.3f},{v}\n" for t, v in ROWS),
    "day first": "Datum;ecg\n" + "".join(f"31.05.2024 10:00:{t:06.3f};{v}\n" for t, v in ROWS),
    "afternoon": "time,ecg\n" + "".join(f"05/31/2024 11:59:{50 + t:06.3f} PM,{v}\n" for t, v in ROWS),
    "device lines": "Device,X 1\nSample rate,250 Hz\n\necg\n" + "".join(f"{v}\n" for v in VALUES),
    "title": "ECG of a person\n\ntime_s,ecg\n" + "".join(f"{t:.3f},{v}\n" for t, v in ROWS),
    "gain line": "Gain,2.5\ntime_s,ecg\n" + "".join(f"{t:.3f},{v}\n" for t, v in ROWS),
    "Chinese device lines": "姓名,张三\n采样率,250 赫兹\n\necg\n" + "".join(f"{v}\n" for v in VALUES),
    "rate alone": "fs=250\necg\n" + "".join(f"{v}\n" for v in VALUES),
    "rate with its unit": "Device,X\nSampling rate (Hz),250\necg\n" + "".join(f"{v}\n" for v in VALUES),
    "minutes": "time_min,ecg\n" + "".join(f"{t / 60:.7f},{v}\n" for t, v in ROWS),
    "rate line": "Sampling rate: 0.25 kHz\necg\n" + "".join(f"{v}\n" for v in VALUES),
    "rate cell": "Sample rate,250\ntime_s,ecg\n" + "".join(f"{t:.3f},{v}\n" for t, v in ROWS),
    "rate in the name": "time_s,ecg (fs=250 Hz)\n" + "".join(f"{t:.3f},{v}\n" for t, v in ROWS),
    "one column": "# fs: 250\necg\n" + "".join(f"{v:.4f}\n".replace(".", ",") for v in VALUES),
}


@pytest.mark.parametrize("form", CSV)
def test_a_csv_file_of_any_form_gives_the_signal_and_its_rate(form, tmp_path):
    record = read_records(write(tmp_path / "a.csv", CSV[form]))[0]
    assert len(record.channels) == 1, list(record.channels)
    (name, channel), wanted = *record.channels.items(), VALUES[:200] if form == "time of day" else VALUES
    assert np.abs(channel - wanted).max() < 1e-6 and name == ("c1" if form == "no header" else "ecg")
    assert abs(channel.fs - 250) < 0.01


def test_a_minus_sign_of_a_word_processor_is_a_minus(tmp_path):
    text = "".join(f"{t:.3f},{v - 0.5:.4f}\n".replace("-", "\u2212") for t, v in ROWS)
    (channel,) = read_records(write(tmp_path / "a.csv", "time_s,ecg\n" + text))[0].channels.values()
    assert np.allclose(channel, VALUES - 0.5, atol=1e-4)


@pytest.mark.parametrize(
    "encoding, clock, name, guess",
    [
        ("utf-8-sig", "时间(秒)", "心电", ""),
        ("utf-16", "时间(秒)", "心电", ""),
        ("utf-16-le", "时间(秒)", "心电", ""),
        ("utf-16-be", "t", "Ekg", ""),
        ("utf-32", "时间(秒)", "心电", ""),
        ("utf-32-be", "时间(秒)", "心电", ""),
        ("gbk", "时间（毫秒）", "心电（毫伏）", "gb18030"),
        ("gbk", "t(秒)", "V1导联", "gb18030"),
        ("gb18030", "时刻_秒", "𠀀窦性", "gb18030"),
        ("latin1", "Zeit_s", "Größe µ", "cp1252"),
        ("latin1", "t", "AQUISIÇÃO °C", "cp1252"),
        ("cp1252", "time", "ecg – lead II", "cp1252"),
        ("shift_jis", "t", "心電図", "latin1"),  # nothing says so: told, and readable as bytes
    ],
)
def test_a_csv_file_of_any_encoding_has_its_names_and_a_guess_is_said(
    encoding, clock, name, guess, tmp_path, capsys
):
    scale = 1000 if "毫" in clock else 1
    text = f"{clock},{name}\n" + "".join(f"{scale * t:.3f},{v}\n" for t, v in ROWS)
    ((found, channel),) = read_records(write(tmp_path / "a.csv", text, encoding))[0].channels.items()
    assert (found, channel.unit) == (
        name.partition("（")[0],
        "毫伏" if "（" in name else "",
    ) or guess == "latin1"
    assert channel.fs == pytest.approx(250)
    said = capsys.readouterr().err
    assert f"read as {guess}, a guess" in said and "a.csv" in said if guess else not said


@pytest.mark.parametrize("encoding", ["utf-8", "gbk"])
def test_a_character_that_cannot_be_read_spoils_no_other(encoding, tmp_path, capsys):
    text = "时间(秒),心电,备注\n" + "".join(f"{t:.3f},{v},正常\n" for t, v in ROWS)
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode(encoding).replace("正".encode(encoding), b"\xff", 1))
    assert read_records(path)[0].rates == {"心电": pytest.approx(250)}
    assert "not all UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["manifest", "ts", "arff", "npz", "WFDB", "shard"])
@pytest.mark.parametrize("encoding", ["gbk", "utf-8-sig"])
def test_labels_in_any_encoding_are_what_they_say(kind, encoding, tmp_path, capsys):
    if kind == "WFDB":
        pytest.importorskip("wfdb")
    folder, labels = tmp_path / "data", ["房颤", "正常"]
    values = ",".join(map(str, VALUES[:50]))
    for i, label in enumerate(labels):
        if kind in ("manifest", "shard"):
            npz(folder / f"{i}.npz", sig=VALUES, fs=FS)
            write(folder / f"{i}.cls", f"{label}\r\n", encoding)
        elif kind == "npz":
            npz(folder / f"{i}.npz", sig=VALUES, fs=FS, label=np.array(label.encode(encoding)))
        elif kind == "WFDB":
            header = wfdb_record(folder / str(i), {"II": VALUES}, FS)
            write(header, header.read_text() + f"# Dx: {label}\n", encoding.removesuffix("-sig"))
    if kind == "ts":
        write(folder / "a.ts", "@data\n" + "".join(f"{values}:{label}\n" for label in labels), encoding)
    elif kind == "arff":
        lines = "".join(f"{values},{label}\n" for label in labels)
        write(folder / "a.arff", "@relation a\n@data\n" + lines, encoding)
    elif kind == "manifest":
        rows = "".join(f"{i};{label}\r\n" for i, label in enumerate(labels))
        store = store_of(tmp_path, manifest=write(tmp_path / "list.csv", "path;label\r\n" + rows, encoding))
    elif kind == "shard":
        with tarfile.open(tmp_path / "s.tar", "w") as shard:
            shard.add(folder, "p")
        store = store_of(tmp_path, tmp_path / "s.tar")
    if kind not in ("manifest", "shard"):
        store = store_of(tmp_path, prepare=Preprocess(0, 0))
    assert [label.decode() for _, _, label in store.labels.tolist()] == labels
    said = capsys.readouterr().err
    assert ("read as gb18030" in said) == (encoding == "gbk")
    assert kind != "shard" or encoding != "gbk" or "s.tar: p" in said


TABLES = {
    "a count after the clock": "time_s,index,ecg\n"
    + "".join(f"{t},{i},{v}\n" for i, (t, v) in enumerate(ROWS)),
    "two clocks": "time_s,time_ms,ecg\n" + "".join(f"{t},{1e3 * t},{v}\n" for t, v in ROWS),
    "clock of packets": "Phone timestamp;sensor timestamp [ns];ecg [uV]\n"
    + "".join(f"2023-01-01T10:00:{int(t):02d}.000;{1e9 * t:.0f};{v}\n" for t, v in ROWS),
    "a temperature called t": "t,time,ecg\n" + "".join(f"{37 + v},{t},{v}\n" for t, v in ROWS),
    "wristband": "1595000000.0\n250.0\n" + "".join(f"{v}\n" for v in VALUES),
    "wristband, axes": "1595000000.0, 1595000000.0\n250, 250\n" + "".join(f"{v},{v}\n" for v in VALUES),
    "a word in each line": "".join(f"{t},{v},fine\n" for t, v in ROWS),
    "numbered names with units": "t,1,2\ns,mV,mV\n" + "".join(f"{t},{v},{v}\n" for t, v in ROWS),
    "a word and numbered names": "lead,1,2,3\n" + "".join(f"V,{v},{v},{v}\n" for v in VALUES),
    "frequencies as names": "time,0.5,1.0\n" + "".join(f"{t},{v},{v}\n" for t, v in ROWS),
    "pandas": ",0,1\n" + "".join(f"{i},{v},{v}\n" for i, v in enumerate(VALUES)),
    "pandas without an index": "0,1,2\n" + "".join(f"{v},{v},{v}\n" for v in VALUES),
    "one row of zero": "0\n" + "".join(f"{v}\n" for v in VALUES[1:]),
}
CHANNELS = {"a temperature called t": "t ecg", "wristband": "c0", "wristband, axes": "c0 c1", "pandas": "0 1"}
CHANNELS |= {"pandas without an index": "0 1 2", "one row of zero": "c0", "a word in each line": "c1"}
CHANNELS |= {"numbered names with units": "1 2", "a word and numbered names": "1 2 3"}
CHANNELS |= {"frequencies as names": "0.5 1.0"}
NO_CLOCK = ("a word and numbered names", "pandas", "pandas without an index", "one row of zero")


@pytest.mark.parametrize("form", TABLES)
def test_clocks_counts_and_names_of_a_table_are_no_signals(form, tmp_path):
    fs = 250 if form in NO_CLOCK else None
    record = read_records(write(tmp_path / "a.csv", TABLES[form]), fs)[0]
    assert list(record.channels) == CHANNELS.get(form, "ecg").split() and record.fs == pytest.approx(250)
    assert np.allclose(list(record.channels.values())[-1], VALUES)


def test_a_nameless_signal_that_rises_is_a_signal(tmp_path):
    x = np.cumsum(VALUES + 0.01)
    record = read_records(write(tmp_path / "a.csv", "".join(f"{v}\n" for v in x)), 250)[0]
    assert list(record.channels) == ["c0"] and np.allclose(record.channels["c0"], x)


def test_a_column_is_one_channel(tmp_path):
    assert len(read_records(npz(tmp_path / "a.npz", sig=VALUES[:, None], fs=FS))[0].channels["sig"]) == 400
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["val"], file["fs"] = VALUES[:, None], np.array([[250.0]])
    assert read_records(tmp_path / "a.h5")[0].rates == {"val": 250.0}


def test_missing_fields_and_jumps_of_the_clock_are_gaps(tmp_path):
    lines = [f"{t:.3f},{v}" for t, v in ROWS]
    lines[100:110] = [line.split(",")[0] + "," for line in lines[100:110]]
    lines[300:] = [f"{t + 60:.3f},{v}" for t, v in ROWS[300:]]
    record = read_records(write(tmp_path / "a.csv", "time_s,ecg\n" + "\n".join(lines) + "\n"))[0]
    found = [(len(x), round(start, 3)) for x, start in record.channels["ecg"].runs()]
    assert found == [(100, 0.0), (190, 0.44), (100, 61.2)]


@pytest.mark.parametrize("fs, digits", [(250, 3), (250, 9), (100, 2), (100, 3), (128, 6), (300, 3), (360, 4)])
def test_lines_that_are_missing_are_gaps_however_few(fs, digits, tmp_path):
    kept = np.delete(np.arange(3000), [500, 501, *range(2000, 2007)])
    text = "time_s,ecg\n" + "".join(f"{i / fs:.{digits}f},{np.sin(i):.4f}\n" for i in kept)
    channel = read_records(write(tmp_path / "a.csv", text))[0].channels["ecg"]
    assert channel.fs == pytest.approx(fs, rel=1e-4)
    assert [(len(x), round(start * fs)) for x, start in channel.runs()] == [
        (500, 0),
        (1498, 502),
        (993, 2007),
    ]


@pytest.mark.parametrize("order", ["{0}-{1}-{2}", "{2}.{1}.{0}", "{0}/2/{2}"])
def test_a_day_and_a_time_in_two_columns_are_one_clock(order, tmp_path):
    days = np.repeat([0, 1], [250, 150]).astype("m8[D]")  # a night without a line
    words = [
        str(t).split("T") for t in np.datetime64("2024-02-27T23:59:59", "ms") + 4 * np.arange(400) + days
    ]
    text = "".join(f"{order.format(*d.split('-'))};{t};{v}\n" for (d, t), v in zip(words, VALUES))
    channel = read_records(write(tmp_path / "a.csv", "date;time;ecg\n" + text))[0].channels["ecg"]
    assert channel.fs == pytest.approx(250) and channel.jumps == [(250, 86401.0)]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("ecg\n1\n2\n1\n", "--input-fs"),
        ("pressure\n1\n2\n3\n", "no channel of numbers"),
        ("time_s,ecg\n0,1\n1,2,3\n", "columns"),
        ("time,ecg\n0,1\n4,2\n8,3\n12,2\n", "time_ms"),
        ("time_s,ecg\n0,1\n1,2\n1.2,3\n7,2\n9,1\n", "evenly"),
        ("name,town\nada,rome\nbob,oslo\n", "no channel of numbers"),
        ("time_s,ecg\n", "no line of data"),
        ("", "no line of data"),
        ("time,ecg\n0 s,1\n1 s,2\n2 s,3\n", "column time holds no times"),
        ("time,ecg\n1/2/2024 1:00:00,1\n1/3/2024 1:00:00,2\n1/4/2024 1:00:00,3\n", "day or the month"),
    ],
)
def test_a_csv_file_that_cannot_be_used_says_why(text, wanted, tmp_path):
    with pytest.raises(UserError, match=wanted) as error:
        read_records(write(tmp_path / "a.csv", text))
    assert "a.csv" in str(error.value)


# ---- series


@pytest.mark.parametrize("labels", ["1212", ["-1", "3", "3", "-1"], "aVaV"])
def test_ucr_files_of_every_form_give_the_same_series(labels, tmp_path):
    x = np.round(np.random.default_rng(0).normal(size=(4, 30)), 3)
    rows = [",".join(map(str, row)) for row in x]
    y = labels
    files = {
        "A_TRAIN.ts": "@problemName A\n@data\n" + "".join(f"{r}:{c}\n" for r, c in zip(rows, y)),
        "B_TRAIN.tsv": "".join(f"{c}\t" + r.replace(",", "\t") + "\n" for r, c in zip(rows, y)),
        "C_TRAIN.arff": "@relation C\n@attribute a numeric\n@DATA\n"
        + "".join(f"{r},{c}\n" for r, c in zip(rows, y)),
    }
    for name, text in files.items():
        records = read_records(write(tmp_path / name, text))
        assert [record.labels[""] for record in records] == [[c] for c in y] and records[0].series
        assert all(np.allclose(r.channels["x"], row) for r, row in zip(records, x)), name
        assert {record.part for record in records} == {"train"}


def test_the_label_of_an_arff_file_stands_where_its_attributes_say(tmp_path):
    x = VALUES[:20].tolist()
    numbers = "".join(f"@attribute a{i} numeric\n" for i in range(20))
    values = ",".join(map(str, x))
    first = f"@relation A\n@ATTRIBUTE class {{1, 2}}\n{numbers}@data\n1,{values}\n2,{values}\n"
    last = f"@relation A\n{numbers}@attribute class {{'a, b',c}}\n@data\n{values},'a, b'\n{values}, c\n"
    several = f"@relation A\n@data\n'{values}\\n{values}',a\n\"{values}\",b\n"
    for text, wanted in ((first, "12"), (last, ["a, b", "c"]), (several, "ab")):
        records = read_records(write(tmp_path / "a.arff", text))
        assert [record.labels[""] for record in records] == [[label] for label in wanted]
        assert all(channel.tolist() == x for record in records for channel in record.channels.values())
    assert [len(record.channels) for record in records] == [2, 1]


def test_missing_values_and_dimensions_of_ts_files(tmp_path):
    text = "@dimensions 2\n@classLabel true a b\n@data\n?,1,2,?,4,5,6,7,8,9:0,1,2,3,4,5,6,7,8,9:a\n"
    record = read_records(write(tmp_path / "m_TEST.ts", text))[0]
    assert list(record.channels) == ["x0", "x1"] and record.part == "test" and record.labels == {"": ["a"]}
    assert record.channels["x0"].tolist() == [1, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_two_sets_in_one_folder_are_different_subjects(tmp_path):
    for name in "ab":
        x = np.random.default_rng(0).normal(size=(3, 40))
        npz(tmp_path / "data" / f"{name}.npz", x_train=x, y_train=[1, 2, 1], x_test=x + 1, y_test=[1, 2, 1])
    store = store_of(tmp_path, prepare=Preprocess(0, 0))
    assert len(set(store.records["subject"].tolist())) == len(set(store.records["name"].tolist())) == 12
    x = np.random.default_rng(0).normal(size=(3, 2, 40))  # two dimensions
    sets = dict(x_train=x, y_train=[1, 2, 1], x_test=x.transpose(0, 2, 1), y_test=[1, 2, 1])
    for record, wanted in zip(read_records(npz(tmp_path / "c.npz", **sets)), [*x, *x]):
        assert np.array_equal([record.channels["x0"], record.channels["x1"]], wanted)
    assert (split_parts(store) == "test").sum() == 6


@pytest.mark.parametrize("shape", [(6, 50), (6, 12, 50), (6, 50, 12)])
def test_npz_of_many_series_and_labels(shape, tmp_path):
    x = np.random.default_rng(0).normal(size=shape)
    records = read_records(npz(tmp_path / "a.npz", X=x, y=np.array([0, 1.0, 0, 1, 0, 1])))
    assert len(records) == 6 and records[1].labels == {"": ["1"]}
    assert len(records[0].channels) == (1 if len(shape) == 2 else 12)
    assert "AVF" in records[0].channels or len(shape) == 2
    many = npz(tmp_path / "b.npz", X=x, y=np.eye(6), classes=list("abcdef"), subject=list("uuvvww"), fs=50)
    records = read_records(many)
    assert records[2].labels == {"": ["c"]} and records[2].subject == "v" and records[2].fs == 50


def test_no_channel_part_subject_or_class_of_a_series_is_lost(tmp_path):
    fields = dict(X=np.random.default_rng(0).normal(size=(3, 3, 50)), y=[0, 1, 1], subject=[1.0, 2.0, np.nan])
    splits = ["Training", "validation", "TEST"], [0, 1, 2], [-3.0, 5.0, 7.0], ["训练", "dev", "test"]
    for split, names in zip(splits, (["I"], ["I", "I", "I", "V"], [], "abc")):
        records = read_records(npz(tmp_path / "a.npz", **fields, split=split, names=list(names)))
        assert [(r.part, len(r.channels)) for r in records] == [("train", 3), ("val", 3), ("test", 3)]
        assert [record.subject for record in records] == ["1", "2", "a:test-2"]
    wrong = (dict(split=["train", "elsewhere", "test"]), dict(part=["train"]), dict(subject=[1, 2]))
    for more in (*wrong, dict(y=np.eye(3), classes=["a", "b"])):
        with pytest.raises(UserError, match=f"a.npz: .*field .*{list(more)[-1]}"):
            read_records(npz(tmp_path / "a.npz", **fields | more))


def test_a_label_that_is_nan_is_none(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 50))
    one = read_records(npz(tmp_path / "a.npz", X=x, y=[426783006, np.nan, 426783012.0], fs=100))
    assert [record.labels for record in one] == [{"": ["426783006"]}, {}, {"": ["426783012"]}]
    several = read_records(npz(tmp_path / "b.npz", X=x, y=[[1, 0], [np.nan, 1], [0, 0]], fs=100))
    assert [record.labels[""] for record in several] == [["0"], ["1"], []]
    ucr = npz(tmp_path / "c.npz", x_train=x, y_train=[1, 2, np.nan], x_test=x, y_test=[1.0, 2, 1])
    assert [r.labels for r in read_records(ucr)][:3] == [{"": ["1"]}, {"": ["2"]}, {}]
    assert read_records(npz(tmp_path / "d.npz", sig=x[0], fs=100, label=np.nan))[0].labels == {}


def test_labels_in_a_column_and_one_hot_are_those_of_a_row(tmp_path):
    x, y = np.random.default_rng(0).standard_normal((3, 50)), np.array([2, 0, 1])
    for form in (y[:, None], np.eye(3)[y]):
        for fields in ({"X": x, "y": form, "fs": 100}, {"x_train": x, "y_train": form}):
            found = [record.labels[""] for record in read_records(npz(tmp_path / "a.npz", **fields))]
            assert found == [["2"], ["0"], ["1"]]
    for wrong in ([[0, 2], [1, 0], [0, 1]], [["a", "b"]] * 3):
        with pytest.raises(UserError, match="other values than 0 and 1"):
            read_records(npz(tmp_path / "b.npz", X=x, y=wrong))


def test_kaggles_beats_are_a_series_a_line(tmp_path):
    rng = np.random.default_rng(0)
    table = np.c_[rng.random((5, 150)) + 0.1, np.zeros((5, 37)), [0, 1, 2, 3, 4]]
    path = write(tmp_path / "mitbih_train.csv", "\n".join(",".join(f"{v:.5e}" for v in row) for row in table))
    records = read_records(path)
    assert len(records) == 5 and records[3].labels == {"": ["3"]} and records[0].part == "train"
    assert len(records[0].channels["x"]) == 150


@pytest.mark.parametrize(
    "labels", ["NAVNAV", "010101", ["房颤", "正常"] * 3, ["1", "", "0"] * 2, ["a", "", "b"] * 2]
)
@pytest.mark.parametrize("header", ["", "0,1,...,label\n", ",0,1,...,100\n", "x0,x1,...,x100\n"])
def test_a_series_a_line_may_have_words_as_labels_and_names_above(labels, header, tmp_path):
    x = np.round(np.random.default_rng(0).random((6, 100)) + 0.1, 4)
    between = ",".join(f"{'x' if 'x' in header else ''}{i}" for i in range(2, 100))
    rows = [",".join(map(str, row)) + f",{label}\n" for row, label in zip(x, labels)]
    index = [f"{i}," if header.startswith(",") else "" for i in range(6)]
    text = header.replace("...", between) + "".join(i + row for i, row in zip(index, rows))
    records = read_records(write(tmp_path / "a.csv", text))
    assert [record.labels.get("", [""])[0] for record in records] == list(labels)
    assert np.allclose([record.channels["x"] for record in records], x)


def test_the_dicom_waveform_of_pydicom_has_its_leads(tmp_path):
    data = pytest.importorskip("pydicom.data")
    record = read_records(data.get_testdata_file("waveform_ecg.dcm", download=False))[0]
    assert record.fs == 1000 and list(record.channels)[:4] == ["I", "II", "III", "aVR"]
    assert len(record.channels) == 12 and record.seconds() == pytest.approx(10)
    store = store_of(tmp_path, record.source)
    assert store.records["channel"].tolist() == [b"II"] * len(store.records)
    content = pytest.importorskip("pydicom").dcmread(record.source)
    samples = np.frombuffer(content.WaveformSequence[0].WaveformData, "<i2").copy()
    samples[1200:2400] = -32768  # of 12 leads, in the device's numbers
    content.WaveformSequence[0].WaveformData = samples.tobytes()
    content.save_as(tmp_path / "a.dcm")
    assert all(len(x.runs()) == 2 for x in read_records(tmp_path / "a.dcm")[0].channels.values())


# ---- who is it?


@pytest.mark.parametrize(
    "paths, subjects",
    [
        (["Person_01/rec_1", "Person_01/rec_2", "Person_02/rec_1"], ["Person_01", "Person_01", "Person_02"]),
        (["patient001/s0010_re", "patient002/s0010_re"], ["patient001", "patient002"]),
        (["files/p1000/p10000032/s406/406", "files/p1000/p10000032/s407/407"], ["files/p1000/p10000032"] * 2),
        (["sub-01/ses-1/ecg", "sub-02/ses-1/ecg"], ["sub-01", "sub-02"]),
        (["a/100", "b/100"], ["a/100", "b/100"]),
    ],
)
def test_a_name_in_two_folders_is_two_records_and_a_persons_folder_one_subject(paths, subjects, tmp_path):
    for i, path in enumerate(paths):
        npz(tmp_path / "data" / f"{path}.npz", sig=ecg(FS, 10, 0.1 * i), fs=FS)
    store = store_of(tmp_path)
    assert store.records["name"].astype(str).tolist() == sorted(paths)
    assert store.records["subject"].astype(str).tolist() == [s for _, s in sorted(zip(paths, subjects))]


def test_long_names_are_not_cut(tmp_path):
    names, lead = ["x" * 90 + end for end in "ab"], "a lead with a name of many words " * 2
    for name in names:
        npz(tmp_path / "data" / f"{name}.npz", sig=ecg(FS, 10), fs=FS, lead=lead)
    assert store_of(tmp_path).records["name"].astype(str).tolist() == names


def test_the_same_record_in_two_formats_is_one_subject(tmp_path):
    npz(tmp_path / "data" / "a.npz", sig=ecg(FS, 10), fs=FS)
    rows = "".join(f"{i / FS},{v}\n" for i, v in enumerate(ecg(FS, 10)))
    write(tmp_path / "data" / "a.csv", f"time_s,ecg\n{rows}")
    store = store_of(tmp_path)
    assert store.records["name"].astype(str).tolist() == ["a.csv", "a.npz"]
    assert set(store.records["subject"].tolist()) == {b"a"}


def test_a_manifest_states_subjects_parts_rates_and_labels(tmp_path, capsys):
    for name in "abcde":
        npz(tmp_path / "data" / "x" / f"{name}.npz", sig=ecg(FS, 10))
    manifest = write(
        tmp_path / "data" / "list.csv",
        "path, subject ,fold,fs,label\nx/a.npz,p1,1,100,AF;PVC\nx/b,p1,1,100,N\n"
        "x/c.npz,p2,2,100,N\nx/d,p3,3,100,\n",
    )
    store = store_of(tmp_path, manifest=manifest)
    assert store.records["name"].astype(str).tolist() == ["x/a", "x/b", "x/c", "x/d"]
    assert store.records["subject"].astype(str).tolist() == ["p1", "p1", "p2", "p3"]
    assert split_parts(store).tolist() == ["train", "train", "val", "test"]
    labels = [(int(r), b.decode()) for r, _, b in store.labels.tolist()]
    assert labels == [(0, "AF"), (0, "PVC"), (1, "N"), (2, "N"), (3, "")]
    assert "1 files that it does not list are left out" in capsys.readouterr().err
    assert len(store_of(tmp_path, manifest=manifest, part="train").records) == 2
    write(manifest, "path,fold,label_AF,label_N\nx\\a.npz,1,yes,0\nx\\b,,no,T\n./x/c,2,,1.0\n")
    store = store_of(tmp_path, manifest=manifest, fs=FS)
    assert split_parts(store).tolist() == ["train", "", "test"]  # no part is none, and not the test
    assert [b.decode() for _, _, b in store.labels.tolist()] == ["AF", "N", "N"]
    write(manifest, "path,fold,label\nx/a,训练集,房颤；早搏\nx/b,测试,正常、早搏\n", "gbk")
    store = store_of(tmp_path, manifest=manifest, fs=FS)
    assert store.records["part"].tolist() == [b"train", b"test"]
    assert [b.decode() for _, _, b in store.labels.tolist()] == ["房颤", "早搏", "正常", "早搏"]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("file,label\na,N\n", "no column path"),
        ("path,label\nnowhere,N\n", "line 2: nowhere is no signal file"),
        ("path,fold\na,first\n", "field fold is 'first'"),
        ("path,fs\na,fast\n", "line 2: field fs is 'fast'"),
        ("path,fs\na,0\n", "line 2: field fs is 0 Hz"),
        ("path,fold\na,nan\n", "field fold is 'nan'"),
        ("path,fold\n", "lists no recording"),
        ("path,fold\na,3\n", "has one value"),
        ("path\na\na.npz\n", "listed twice"),
        ("path,label_AF\na,0.8\n", "line 2: field label_AF is '0.8'"),
        ('path,note,fold\na,"two\nlines",1\n\nb,,first\n', "line 5: field fold is 'first'"),
        ("path,fold\na,train\nb,3\n", "line 2: field fold is 'train'"),
        ("path,fold\na,1.5\nb,2\n", "line 2: field fold is '1.5'"),
    ],
)
def test_a_manifest_that_is_wrong_says_where(text, wanted, tmp_path):
    npz(tmp_path / "data" / "a.npz", sig=ecg(FS, 10), fs=FS)
    with pytest.raises(UserError, match=wanted):
        store_of(tmp_path, manifest=write(tmp_path / "list.csv", text))


def exams(folder):
    """A file of three recordings in CODE-15's form, and what its table says."""
    with h5py.File(folder / "exams_part0.hdf5", "w") as file:
        file["tracings"] = np.stack([ecg(400, 5)[:, None].repeat(12, 1) + 0.1 * i for i in range(3)])
        file["exam_id"] = np.array([11, 12, 13])
    head = "exam_id,patient_id,trace_file,1dAVb,RBBB,LBBB,SB,ST,AF"
    rows = "".join(f"\n{i},{i},exams_part0.hdf5,0,0,0,0,0,1" for i in (11, 12, 13))
    write(folder / "exams.csv", head + rows + "\n")


def test_a_manifest_leaves_out_recordings_that_a_table_knows(tmp_path):
    (tmp_path / "data").mkdir()
    exams(tmp_path / "data")
    text = "path,fold,subject\nexams_part0:11,train,p\nexams_part0:13,test,q\n"
    store = store_of(tmp_path, manifest=write(tmp_path / "data" / "list.csv", text))
    assert [n.rpartition(b":")[2] for n in dict.fromkeys(store.records["name"].tolist())] == [b"11", b"13"]
    assert set(store.records["subject"].tolist()) == {b"p", b"q"}


def test_a_manifest_that_lists_a_file_speaks_of_all_its_recordings(tmp_path):
    (tmp_path / "data").mkdir()
    exams(tmp_path / "data")
    npz(tmp_path / "data" / "a.npz", sig=ecg(FS, 10), fs=FS)
    text = "path,fold\nexams_part0.hdf5,test\na,train\n"
    store = store_of(tmp_path, manifest=write(tmp_path / "list.csv", text))
    assert store.records["part"].tolist() == [b"train", b"test", b"test", b"test"]
    assert store.records["subject"].tolist()[1:] == [b"code-15/11", b"code-15/12", b"code-15/13"]


def test_a_manifest_names_one_of_two_files_that_differ_in_the_suffix(tmp_path):
    npz(tmp_path / "data" / "a.npz", sig=ecg(FS, 10), fs=FS)
    write(tmp_path / "data" / "a.csv", "\n".join(["time_s,ecg", *(f"{i / FS},{i % 7}" for i in range(900))]))
    store = store_of(tmp_path, manifest=write(tmp_path / "list.csv", "path,subject\na.npz,p\n"))
    assert store.records["subject"].tolist() == [b"p"] and store.records["name"].tolist() == [b"a.npz"]


def test_a_manifest_of_any_name_is_read_again_when_it_has_changed(tmp_path):
    npz(tmp_path / "data" / "a.npz", sig=ecg(FS, 10), fs=FS)
    for label in ("AF", "sinus"):
        store = store_of(tmp_path, manifest=write(tmp_path / "list.txt", f"path,label\na,{label}\n"))
        assert store.labels["label"].tolist() == [label.encode()]


def test_a_manifest_states_the_rate_of_recordings_inside_a_file(tmp_path):
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "f.h5", "w") as file:
        file["a/ecg"], file["b/ecg"] = ecg(250, 10), ecg(250, 10, 0.3)
    manifest = write(tmp_path / "list.csv", "path,fs\nf:a,250\nf:b,250\n")
    store = store_of(tmp_path, manifest=manifest, fs=FS)
    assert store.records["fs"].tolist() == [250, 250] and store.records["length"].tolist() == [1000, 1000]
    write(manifest, "path,fs\nf:a,250\nf:b,125\n")
    with pytest.raises(UserError, match="line 3: field fs is 125 Hz, another line of this file says 250"):
        store_of(tmp_path, manifest=manifest)


def test_a_run_that_gives_one_sample_at_the_models_rate_is_too_short(tmp_path):
    x = np.sin(np.arange(10000) / 50)
    x[9] = np.nan
    npz(tmp_path / "data" / "a.npz", sig=x, fs=1000)
    assert store_of(tmp_path).records["length"].min() > 1


PTB_XL = """ecg_id,patient_id,report,scp_codes,strat_fold,filename_lr,filename_hr
1,15709.0,"sinus, normal","{'NORM': 100.0, 'SR': 0.0}",3,records100/00000/00001_lr,records500/00000/00001_hr
2,15709.0,x,"{'IMI': 35.0, 'ABQRS': 0.0}",3,records100/00000/00002_lr,records500/00000/00002_hr
3,17.0,x,"{'AFIB': 0.0}",9,records100/00000/00003_lr,records500/00000/00003_hr
4,18.0,x,"{}",10,records100/00000/00004_lr,records500/00000/00004_hr
"""
SCP = """,description,diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass
NORM,normal,1.0,,,NORM,NORM
IMI,infarct,1.0,,,MI,IMI
ABQRS,abnormal QRS,,1.0,,,
SR,sinus,,,1.0,,
AFIB,fibrillation,,,1.0,,
"""


def test_ptb_xl_has_patients_folds_and_six_levels_of_labels(tmp_path):
    folder = tmp_path / "data"
    for i in range(1, 5):
        for rate, end in ((100, "lr"), (500, "hr")):
            leads = {"I": ecg(rate, 10), "II": ecg(rate, 10, 0.1)}
            wfdb_record(folder / f"records{rate}" / "00000" / f"0000{i}_{end}", leads, rate)
    write(folder / "ptbxl_database.csv", PTB_XL)
    write(folder / "scp_statements.csv", SCP)
    store = store_of(tmp_path)
    assert store.records["name"].astype(str).tolist() == [f"records500/00000/0000{i}_hr" for i in range(1, 5)]
    assert len(set(store.records["subject"].tolist())) == 3
    assert split_parts(store).tolist() == ["train", "train", "val", "test"]
    found = {(int(r), level.decode()): label.decode() for r, level, label in store.labels.tolist()}
    assert found[0, "superdiagnostic"] == "NORM" and found[1, "superdiagnostic"] == "MI"
    assert found[1, "subdiagnostic"] == "IMI" and found[1, "form"] == "ABQRS" and found[2, "rhythm"] == "AFIB"
    assert found[3, "superdiagnostic"] == "" == found[2, "diagnostic"]


def test_code_15_and_the_challenge_and_sleep_edf_are_known_by_their_layouts(tmp_path):
    edfio = pytest.importorskip("edfio")
    folder = tmp_path / "code"
    folder.mkdir()
    x = np.zeros((3, 4096, 12), np.float32)
    x[:, 500:3500] = ecg(400, 7.5)[None, :, None]
    with h5py.File(folder / "exams_part0.hdf5", "w") as file:
        file["tracings"], file["exam_id"] = x, np.array([11, 12, 13])
    classes = "1dAVb,RBBB,LBBB,SB,ST,AF"
    rows = "11,5,exams_part0.hdf5,False,True,False,False,False,True\n12,5,exams_part0.hdf5" + ",False" * 6
    write(folder / "exams.csv", f"exam_id,patient_id,trace_file,{classes}\n{rows}\n")
    store = store_of(tmp_path, folder)
    assert store.records["name"].astype(str).tolist() == [f"exams_part0:{i}" for i in (11, 12, 13)]
    assert store.records["subject"].astype(str).tolist()[:2] == ["code-15/5"] * 2
    assert store.records["length"].tolist() == [750] * 3 and 500 <= 400 * store.records["start"][0] < 504
    assert [row[2] for row in store.labels.tolist() if row[0] < 2] == [b"RBBB", b"AF", b"normal"]
    comments = ["Age: 74", "Sex: Male", "Dx: 426783006,59118001"]
    header = wfdb_record(tmp_path / "ch" / "A0001", {"I": ecg(500, 10)}, 500, comments=comments)
    (record,) = read_records(header)
    assert record.labels == {"": ["426783006", "59118001"]}
    sleep = tmp_path / "sleep"
    for night in (1, 2):
        edf(sleep / f"SC400{night}E0-PSG.edf", [("EEG Fpz-Cz", ecg(100, 90), 100)])
        stages = [edfio.EdfAnnotation(0, 60, "Sleep stage W"), edfio.EdfAnnotation(60, 30, "Sleep stage 2")]
        edf(sleep / f"SC400{night}EC-Hypnogram.edf", [], annotations=stages)
    store = store_of(tmp_path, sleep)
    assert store.records["subject"].astype(str).tolist() == ["SC400"] * 2
    assert load_task(store, "rhythm", 3000).counts().tolist() == [2, 4]


def test_mimic_iv_ecg_is_known_by_its_list_of_records(tmp_path):
    folder, rows = tmp_path / "data", ["subject_id,study_id,file_name,ecg_time,path"]
    for subject, study in ((7, 1), (7, 2), (8, 3)):
        path = f"files/p0000/s{study}/{study}"
        wfdb_record(folder / path, {"I": ecg(250, 10), "II": ecg(250, 10, 0.1)}, 250)
        rows.append(f"{subject},{study},{study},2180-07-23 08:44:00,{path}")
    write(folder / "record_list.csv", "\n".join(rows) + "\n")
    write(folder / "machine_measurements.csv", "subject_id,study_id\n7,1\n")
    store = store_of(tmp_path)
    assert store.records["subject"].astype(str).tolist() == ["mimic-iv/7", "mimic-iv/7", "mimic-iv/8"]


def test_a_split_file_names_records_by_path_and_refuses_what_is_ambiguous(tmp_path):
    for i, name in enumerate(("a/100", "b/100", "b/101")):
        npz(tmp_path / "data" / f"{name}.npz", sig=ecg(FS, 10, 0.1 * i), fs=FS)
    store, split = store_of(tmp_path), tmp_path / "split.json"
    write(split, json.dumps({"train": ["a/100"], "test": ["101", "b/100.npz"]}))
    assert split_parts(store, split).tolist() == ["train", "test", "test"]
    write(split, json.dumps({"train": ["100"], "test": ["101"]}))
    with pytest.raises(UserError, match="could be a/100 or b/100"):
        split_parts(store, split)
    write(split, json.dumps({"train": ["a/100"], "test": ["a/100"]}))
    with pytest.raises(UserError, match="stands in two lists"):
        split_parts(store, split)
    write(split, json.dumps({"train": ["s0", "s1"], "test": ["s2"]}))
    with pytest.raises(UserError, match=r"none of its 3 names \(s0, s1, ...\) is .* a/100, b/100, ...$"):
        split_parts(store, split)
    write(split, json.dumps({"train": ["a/100"], "test": ["elsewhere"]}))  # read by another script
    assert split_parts(store, split).tolist() == ["train", "", ""]


def test_find_recordings_names_files_relative_to_what_several_sources_share(tmp_path):
    for name in ("x/a/100.npz", "x/b/100.npz"):
        npz(tmp_path / name, sig=ecg(FS, 10), fs=FS)
    found = find_recordings([tmp_path / "x" / "a", tmp_path / "x" / "b"])
    assert [name for _, name in found.files] == ["a/100", "b/100"]
