"""em_mllm: recordings and data sets as their formats allow them; what a file does not tell is asked for."""

import base64
import io
import json
import pickle
import shutil
import struct
import tarfile
import zlib

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.io.wavfile

from common.errors import UserError
from common.tiny_llm import make_tokenizer
from em_mllm.convert import main as convert
from em_mllm.convert import parse_args as convert_args
from em_mllm.convert import read_radioml2016
from em_mllm.dataset import QuestionDataset, read_questions, task_pairs
from em_mllm.iq_io import (
    find_recordings,
    format_in_name,
    open_recording,
    rate_in_name,
    read_iq,
    strong_windows,
)
from em_mllm.signal_file import SignalFile, read_names, read_rate
from em_mllm.torchsig import read_torchsig
from tests.em_world import write_questions

N = 3000
T = np.arange(N)
Z = (0.7 * np.exp(2j * np.pi * 0.05 * T) * (1 + 0.3 * np.cos(2 * np.pi * T / 200))).astype(np.complex64)
PAIR = np.stack([Z.real, Z.imag], 1)


def assert_same(iq, z=Z):
    y = iq[:, 0] + 1j * iq[:, 1]
    assert len(y) == len(z)
    assert abs(np.vdot(z, y)) / (np.linalg.norm(z) * np.linalg.norm(y)) > 0.999


# ---- rates


@pytest.mark.parametrize(
    "name, rate",
    [
        ("g001_433.92M_250k.cu8", 250e3),
        ("g001_250k_433.92M.cu8", 250e3),
        ("g001_433.92M.cu8", None),
        ("g001_433920k_1024k.cu8", None),  # two rates: which?
        ("g001_868.3M_1000k.cs16", 1e6),
        ("capture_2.4Msps.cf32", 2.4e6),
        ("capture_2400ksps_cf32.cf32", 2.4e6),
        ("capture_100MHz_2MSps.cf32", 2e6),
        ("RTL-SDR-20200101_000000-433_92MHz-1MSps-1MHz.complex16u", 1e6),
        ("HDSDR_20130101_120000Z_7100kHz_RF.cs16", None),
        ("gqrx_20240101_120000_433920000_1800000_fc.raw", 1.8e6),
        ("recording.cf32", None),
        ("block_3k5.cf32", None),
        ("x_250K.cu8", 250e3),
        ("2024-01-01_12-00-00_2400000SPS_137100000Hz.cs16", 2.4e6),
        ("2024-01-12_2MSps.cf32", 2e6),
        ("RTL-SDR-20200101_000000-433_92MHz-2_4MSps-1MHz.complex16u", 2.4e6),
        ("sigdigger_20210101_120000Z_1000000_433920000_float32_iq.raw", 1e6),
        ("a_samplerate_2000000_433.92M.cs16", 2e6),
        ("x_2.4e6sps.cf32", 2.4e6),
        ("x_250 ksps.cf32", 250e3),
        ("symbol_rate_9600.cf32", None),
        ("HackRF_20200101_120000_433.92MHz_8Msps.c8", 8e6),
        ("x_fs2e6_fc433.92e6.cf32", 2e6),
        ("usrp_sr_2M_fc_915M.sc16", 2e6),
        ("LTE_20MHz_30.72Msps.cf32", 30.72e6),
        ("SDRSharp_20150804_204416Z_162550000Hz_IQ.cs16", None),
    ],
)
def test_rates_in_names_follow_the_conventions_of_sdr_programs(name, rate):
    assert rate_in_name(name) == rate


@pytest.mark.parametrize(
    "name, kind",
    [
        ("g001_433.92M_250k_cs16.bin", "cs16"),
        ("x.ci16_le.raw", "ci16_le"),
        ("x-CF32.iq", "cf32"),
        ("gqrx_20240101_120000_433920000_1800000_fc.raw", "cf32"),
        ("sigdigger_20210101_120000Z_1000000_433920000_float32_iq.raw", "cf32"),
        ("capture_C3.iq", None),
        ("complex_envelope.raw", None),
        ("cu8_to_cs16.bin", None),
    ],
)
def test_a_name_may_say_how_the_samples_are_stored(name, kind):
    assert format_in_name(name) == kind


@pytest.mark.parametrize(
    "value, rate",
    [
        (1e6, 1e6),
        ("1 MHz", 1e6),
        ("250k", 250e3),
        (b"20 MS/s", 20e6),
        (np.array([5e5]), 5e5),
        (np.array([[2]]), 2.0),
        ("1e6", 1e6),
        ("2.5 Msps", 2.5e6),
    ],
)
def test_a_rate_may_be_number_text_or_array(value, rate):
    assert read_rate(value, "x") == rate


@pytest.mark.parametrize("value", ["fast", "", -1.0, np.nan, 0, np.array([1.0, 2.0]), "1 MHz or 2"])
def test_what_is_no_rate_is_refused(value):
    with pytest.raises(UserError, match="x "):
        read_rate(value, "x")


# ---- .h5


def write_h5(path, build=lambda file: None):
    """Three signals, and what `build` adds to the open file."""
    with h5py.File(path, "w") as file:
        file["IQ_data"] = np.stack([PAIR, PAIR * 2, PAIR * 3]).astype("f4")
        build(file)
    return path


@pytest.mark.parametrize(
    "build, fs, classes",
    [
        (lambda f: f.create_dataset("fs", data=1e6), 1e6, None),
        (lambda f: f.create_dataset("fs", data=[1e6]), 1e6, None),
        (lambda f: f.create_dataset("sample_rate", data="1 MHz"), 1e6, None),
        (lambda f: f.attrs.update(fs="1 mhz"), 1e6, None),
        (lambda f: f.attrs.update(fs="1,000,000"), 1e6, None),
        (lambda f: f.attrs.update(fs_kHz=1000.0), 1e6, None),
        (lambda f: f.attrs.update(fs_mhz="1"), 1e6, None),
        (lambda f: f.attrs.update(fs_mhz="1 MHz", fs=1e6), 1e6, None),
        (lambda f: f.attrs.update({"sampling rate (Hz)": 1e6}), 1e6, None),
        (lambda f: f.attrs.update(SAMPLE_RATE=1e6), 1e6, None),
        (lambda f: f.attrs.update(Fs=np.array([1e6])), 1e6, None),
        (lambda f: f["IQ_data"].attrs.update(fs=1e6), 1e6, None),
        (lambda f: f.create_dataset("fs", data=np.array([[1e6], [2e6], [3e6]])), 1e6, None),
        (lambda f: f.create_group("meta").create_dataset("x", data=[1]), 20e6, None),
        (lambda f: f.create_dataset("notes", data=np.zeros((7, 2))), 20e6, None),
        (lambda f: f.create_dataset("title", data="a recording"), 20e6, None),
        (lambda f: f.attrs.create("classes", ["AM", "FM"], dtype=h5py.string_dtype()), 20e6, ["AM", "FM"]),
        (lambda f: f.attrs.create("classes", np.array([b"AM", b"FM"])), 20e6, ["AM", "FM"]),
        (lambda f: f.attrs.update(classes='["AM", "FM"]'), 20e6, ["AM", "FM"]),
        (lambda f: f.attrs.update(classes="AM, FM"), 20e6, ["AM", "FM"]),
        (lambda f: f.attrs.update(classes='{"1": "FM", "0": "AM"}'), 20e6, ["AM", "FM"]),
        (
            lambda f: f.create_dataset("classes", data=["AM", "FM"], dtype=h5py.string_dtype()),
            20e6,
            ["AM", "FM"],
        ),
        (lambda f: f.create_dataset("label", data=np.array([b"FM", b"AM", b"FM"])), 20e6, ["AM", "FM"]),
        (lambda f: f.attrs.update(view=[b"iq"], view_factor="1"), 20e6, None),
        (lambda f: f.create_group("meta").attrs.update(fs=1e6), 1e6, None),
        (lambda f: f.create_group("a/b").create_dataset("sample_rate", data="1 MHz"), 1e6, None),
        (lambda f: f.create_dataset("meta/fs", data=[1e6, 2e6, 3e6]), 1e6, None),
        (lambda f: f.create_dataset("meta/classes", data=["AM", "FM"]), 20e6, ["AM", "FM"]),
        (lambda f: (f.attrs.update(fs=1e6), f.create_dataset("raw/fs", data=2e6)), 1e6, None),
        (lambda f: f.attrs.update(fs=1.0, fs_unit="MHz"), 1e6, None),
        (lambda f: f.create_dataset("fs", data=1e3).attrs.update(units=b"kHz"), 1e6, None),
        (lambda f: f.create_dataset("meta/fs", data=[1.0]).attrs.update(unit="MS/s"), 1e6, None),
        (lambda f: f.attrs.update(fs=1e6, fs_unit="Hz"), 1e6, None),
        (lambda f: f.create_group("meta").attrs.update(fs=1.0, fs_units="MHz"), 1e6, None),
        (lambda f: f.attrs.create("fs", h5py.Empty("f8")), 20e6, None),
        (lambda f: f.attrs.update(classes=np.bytes_("调幅，调频".encode("gbk"))), 20e6, ["调幅", "调频"]),
        (lambda f: f.attrs.update({"采样率": "1 MHz"}), 1e6, None),
        (lambda f: f.attrs.update({"core:sample_rate": 1e6}), 1e6, None),
        (lambda f: f.attrs.update({"Fs [kHz]": 1000.0}), 1e6, None),
    ],
)
def test_legal_hdf5_is_read(tmp_path, build, fs, classes):
    path = write_h5(tmp_path / "x.h5", build)
    file = SignalFile(path)
    assert (file.fs, file.classes) == (fs, classes) and len(file) == 3 and not file.bad_signals()
    iq, rate = read_iq(path, 1)
    assert_same(iq)
    assert rate == file.rate(1)


def test_labels_may_be_names_and_rates_may_differ_from_signal_to_signal(tmp_path):
    def build(file):
        file["label"] = np.array([[b"FM"], [b"AM"], [b"FM"]])
        file["fs"] = np.array([1e6, 2e6, 4e6])
        file["group/inner"] = [1, 2, 3]

    file = SignalFile(write_h5(tmp_path / "x.h5", build))
    assert file.column("label").tolist() == [1, 0, 1] and file.rates() == [1e6, 2e6, 4e6]
    assert file.rate(2) == 4e6 and "group" not in file.columns


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda f: f.attrs.update(fs="fast"), "x.h5: fs is 'fast'"),
        (lambda f: f.create_dataset("fs", data=[1e6, 2e6]), "fs is an array of 2 values"),
        (lambda f: f.create_dataset("fs", data=[1e6, 0, 1e6]), "fs holds values"),
        (lambda f: f.attrs.update(classes='["AM", "AM"]'), "different class names"),
        (lambda f: f.create_dataset("snr", data=[1.0, 2.0]), "snr has 2 rows, IQ_data 3"),
        (lambda f: f.attrs.update(view="waterfall"), "view is waterfall"),
        (lambda f: f.attrs.update(view="polar", view_factor="x"), "view is polar x x"),
        (lambda f: f.attrs.update(fs=1e6 + 0j), "fs is"),
        (lambda f: f.attrs.update(fs=True), "fs is"),
        (lambda f: f.__setitem__("fs", h5py.SoftLink("/nothing")), "fs is a link to nothing"),
        (lambda f: f.attrs.update(fs=1e6, sample_rate=2e6), "fs and sample_rate state different"),
        (lambda f: (f.create_dataset("a/fs", data=1e6), f.create_dataset("b/fs", data=2e6)), "a/fs and b/fs"),
    ],
)
def test_what_cannot_be_meant_in_hdf5_is_one_line(tmp_path, build, words):
    with pytest.raises(UserError, match=words) as error:
        SignalFile(write_h5(tmp_path / "x.h5", build))
    assert "\n" not in str(error.value)


def test_class_names_of_an_object_of_numbers():
    assert read_names('{"FM": 1, "AM": 0}', "x") == ["AM", "FM"]
    for text in (
        '{"1": "AM", "2": "FM"}',
        '{"AM": 1, "FM": 2}',
        '{"AM": 0, "FM": "one"}',
        '{"AM": 0, "FM": 0}',
    ):
        with pytest.raises(UserError, match="x: class number ., expected 0 to 1"):
            read_names(text, "x")


def test_a_column_of_several_values_a_signal_is_refused(tmp_path):
    """Of one-hot labels the first column would be classes 0 and 1."""
    path = write_h5(tmp_path / "x.h5", lambda file: file.create_dataset("label", data=np.eye(3)))
    with pytest.raises(UserError, match="label is .3, 3., expected one value a signal"):
        SignalFile(path).column("label")


@pytest.mark.parametrize(
    "options", [{"compression": "gzip"}, {"chunks": (64, 200, 1)}, {"chunks": (256, 8, 2)}]
)
def test_chunked_signals_are_copied_once_and_read_the_same(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setenv("EM_MLLM_CACHE", str(tmp_path / "cache"))
    x = np.random.default_rng(0).standard_normal((300, 200, 2)).astype("f4")
    x[7, 3, 0], x[200] = np.nan, 0
    chunks = {"chunks": (64, 200, 2), **options}
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("IQ_data", data=x, **chunks)
    for said in (1, 0):
        file = SignalFile(tmp_path / "x.h5")
        assert file.slow
        file.pack()
        assert capsys.readouterr().out.count("copied once") == said
        assert file.bad_signals() == {7: "holds nan or inf", 200: "is all zero"}
        assert all(np.array_equal(file.read(i), x[i], equal_nan=True) for i in (0, 7, 64, 299))
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["IQ_data"] = x
    assert not SignalFile(tmp_path / "plain.h5").slow


# ---- raw


RAW = {
    ".cu8": ("u1", 120, 127.5),
    ".complex16u": ("u1", 120, 127.5),
    ".cs8": ("i1", 120, 0),
    ".complex16s": ("i1", 120, 0),
    ".cs16": ("<i2", 30000, 0),
    ".cu16": ("<u2", 30000, 32767.5),
    ".cs32": ("<i4", 1e9, 0),
    ".cf32": ("<f4", 1, 0),
    ".cfile": ("<f4", 1, 0),
    ".complex": ("<f4", 1, 0),
    ".cf64": ("<f8", 1, 0),
    ".C8": ("i1", 120, 0),
    ".C16": ("<i2", 30000, 0),
    ".CU8": ("u1", 120, 127.5),
    ".Cf32": ("<f4", 1, 0),
}


def stored(dtype, scale, offset):
    values = PAIR.astype(float) * scale + offset
    return (values if np.dtype(dtype).kind == "f" else values.round()).astype(dtype)


@pytest.mark.parametrize("suffix", RAW)
def test_raw_formats_of_any_spelling(tmp_path, suffix):
    stored(*RAW[suffix]).tofile(tmp_path / f"a_250k{suffix}")
    iq, fs = read_iq(tmp_path / f"a_250k{suffix}")
    assert_same(iq)
    assert fs == 250e3


@pytest.mark.parametrize("suffix", [".raw", ".iq", ".bin", ".dat", ".DAT"])
def test_a_suffix_that_names_no_format_is_asked_for(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    stored(*RAW[".cs16"]).tofile(path)
    with pytest.raises(UserError, match="--iq-format") as error:
        read_iq(path)
    assert "\n" not in str(error.value)
    assert_same(read_iq(path, iq_format="cs16")[0])
    stored(*RAW[".cs16"]).astype(">i2").tofile(path)
    assert_same(read_iq(path, iq_format="ci16_be")[0])
    with pytest.raises(UserError, match="'cs12' is not known"):
        read_iq(path, iq_format="cs12")


def test_a_recording_of_sdrangel_says_rate_and_bits(tmp_path):
    for bits, dtype in ((16, "<i2"), (24, "<i4")):
        head = struct.pack("<IQQII", 48000, 433920000, 1, bits, 0)
        samples = (PAIR * 30000).round().astype(dtype).tobytes()
        (tmp_path / "a.sdriq").write_bytes(head + struct.pack("<I", zlib.crc32(head)) + samples)
        iq, fs = read_iq(tmp_path / "a.sdriq")
        assert_same(iq)
        assert fs == 48e3
    (tmp_path / "a.sdriq").write_bytes(head + bytes(4) + samples)
    with pytest.raises(UserError, match="does not begin with the header"):
        read_iq(tmp_path / "a.sdriq")


def test_a_format_that_a_file_names_itself_is_not_overruled(tmp_path):
    np.save(tmp_path / "a.npy", Z)
    with pytest.raises(UserError, match="--iq-format has no effect"):
        read_iq(tmp_path / "a.npy", iq_format="cs16")
    stored(*RAW[".cf32"]).tofile(tmp_path / "a.cf32")
    with pytest.raises(UserError, match="--iq-format has no effect"):
        read_iq(tmp_path / "a.cf32", iq_format="cs16")
    with pytest.raises(UserError, match="--index 2"):
        read_iq(tmp_path / "a.cf32", 2)


# ---- arrays


def mat73(path, content):
    with h5py.File(path, "w", userblock_size=512) as file:
        for key, value in content.items():
            value = np.atleast_2d(value).T  # MATLAB writes its columns first
            if np.iscomplexobj(value):
                both = np.empty(value.shape, [("real", "f4"), ("imag", "f4")])
                both["real"], both["imag"] = value.real, value.imag
                value = both
            file.create_dataset(key, data=value)
    mat73_head(path)


def mat73_head(path):
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon Jan 1 00:00:00 2024 HDF5 schema 1.00 ."
    with open(path, "r+b") as file:
        file.write(head.ljust(116) + b" " * 8 + b"\x00\x02IM")


def test_a_matlab_file_that_leads_out_or_fills_the_memory_is_one_line(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "other.mat", "w") as file:
        file["x"] = PAIR
    mat73(tmp_path / "link.mat", {"y": PAIR})
    with h5py.File(tmp_path / "link.mat", "r+") as file:
        file["x"] = h5py.ExternalLink("other.mat", "/x")
    with pytest.raises(UserError, match="link.mat: x lies in another file, other.mat"):
        read_iq(tmp_path / "link.mat")
    scipy.io.savemat(tmp_path / "bomb.mat", {"x": np.zeros((1 << 23, 2))}, do_compression=True)
    monkeypatch.setattr("common.files.free_memory", lambda: 1 << 26)
    with pytest.raises(UserError, match="bomb.mat: x takes .* GB of memory are free"):
        read_iq(tmp_path / "bomb.mat")


@pytest.mark.parametrize("write", [scipy.io.savemat, mat73])
@pytest.mark.parametrize(
    "content, index",
    [
        ({"x": Z[:, None]}, 0),
        ({"x": Z[None]}, 0),
        ({"x": np.stack([Z, Z * 0 + 1, Z * 0 + 2], 1)}, 0),
        ({"x": np.stack([Z * 0 + 1, Z * 0 + 2, Z], 1)}, 2),
        ({"x": np.stack([Z * 0 + 1, Z], 1)}, 1),
        ({"x": np.stack([PAIR * 0, PAIR])}, 1),
        ({"x": PAIR}, 0),
        ({"x": PAIR.T}, 0),
        ({"x": np.stack([PAIR.T * 0, PAIR.T, PAIR.T * 0])}, 1),  # (Num, 2, T)
        ({"I": PAIR[:, 0], "Q": PAIR[:, 1]}, 0),
        ({"other": np.zeros(40), "iq": Z}, 0),
        ({"t": np.arange(2 * N), "sig": Z}, 0),
        ({"x": np.stack([PAIR * 0, PAIR, PAIR * 0], 2)}, 1),  # (T, 2, Num)
        ({"x": np.stack([PAIR * 0, PAIR], 2)}, 1),  # (T, 2, 2)
        ({"x": np.stack([PAIR.T * 0, PAIR.T])}, 1),  # (2, 2, T)
    ],
)
def test_both_mat_versions_give_the_same_signal(tmp_path, write, content, index):
    write(tmp_path / "a.mat", {**content, "Fs": 1e6})
    iq, fs = read_iq(tmp_path / "a.mat", index)
    assert_same(iq)
    assert fs == 1e6


def test_the_fields_of_a_matlab_structure_are_variables(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"s": {"x": Z, "about": {"Fs": 1e6}}})
    with h5py.File(tmp_path / "b.mat", "w", userblock_size=512) as file:
        file["s/x"], file["#refs#/y"] = PAIR.T, np.zeros((9 * N, 2))
        file["s/about/fs"] = np.array([[ord(c)] for c in "1 MHz"], "u2")
        file["s/about/fs"].attrs["MATLAB_class"] = np.bytes_("char")
    mat73_head(tmp_path / "b.mat")
    for name in ("a.mat", "b.mat"):
        iq, fs = read_iq(tmp_path / name)
        assert_same(iq)
        assert fs == 1e6


@pytest.mark.parametrize("names", [("re", "im"), ("r", "i"), ("I", "Q")])
def test_i_and_q_may_be_two_fields_or_two_arrays_and_unsigned(tmp_path, names):
    fields = np.zeros(N, [(name, "f4") for name in names])
    fields[names[0]], fields[names[1]] = PAIR.T
    np.save(tmp_path / "a.npy", fields)
    assert_same(read_iq(tmp_path / "a.npy")[0])
    np.savez(tmp_path / "a.npz", I=PAIR[:, 0], Q=PAIR[:, 1], fs_hz=1e6)
    assert_same(read_iq(tmp_path / "a.npz")[0])
    assert read_iq(tmp_path / "a.npz")[1] == 1e6
    np.savez(tmp_path / "b.npz", iq=np.stack([PAIR * 0, PAIR]), fs=[1e6, 2e6])
    assert read_iq(tmp_path / "b.npz", 1)[1] == 2e6
    for dtype, scale, centre in (("u1", 120, 127.5), ("u2", 30000, 32767.5)):
        np.save(tmp_path / "u.npy", stored(dtype, scale, centre))
        assert_same(read_iq(tmp_path / "u.npy")[0])
        with h5py.File(tmp_path / "u.h5", "w") as file:
            file["IQ_data"] = stored(dtype, scale, centre).reshape(1, -1, 2)
        assert_same(read_iq(tmp_path / "u.h5")[0])
        assert_same(SignalFile(tmp_path / "u.h5").read(0))


def test_npz_and_stacks_and_wav(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", iq=np.stack([PAIR * 0 + 1, PAIR]), fs=5e5, y=np.array([{}, None]))
    iq, fs = read_iq(tmp_path / "a.npz", 1)
    assert_same(iq)
    assert fs == 5e5
    np.savez(tmp_path / "b.npz", iq=stored("u1", 120, 127.5))
    (tmp_path / "b.npz").rename(tmp_path / "b.NPZ")
    assert_same(read_iq(tmp_path / "b.NPZ")[0])
    for stack, index in (
        (Z, 0),
        (np.stack([Z * 0, Z]), 1),
        (np.stack([Z * 0, Z], 1), 1),  # (T, Num)
        (np.stack([PAIR.T * 0, PAIR.T]), 1),  # (2, 2, T)
        (np.stack([PAIR.T] * (N + 1)), N),  # (Num, 2, T), more captures than samples
        (np.stack([PAIR * 0, PAIR], 2), 1),  # (T, 2, 2)
    ):
        np.save(tmp_path / "a.npy", stack)
        assert_same(read_iq(tmp_path / "a.npy", index)[0])
    capsys.readouterr()
    np.savez(tmp_path / "two.npz", rx=Z, tx=Z * 0)
    assert_same(read_iq(tmp_path / "two.npz")[0])
    assert "holds rx, tx; rx is read" in capsys.readouterr().out
    scipy.io.wavfile.write(tmp_path / "a.WAV", 48000, (PAIR * 30000).astype("i2"))
    iq, fs = read_iq(tmp_path / "a.WAV")
    assert_same(iq)
    assert fs == 48000
    scipy.io.wavfile.write(tmp_path / "real.wav", 48000, PAIR[:, 0].astype("f4"))
    recording = open_recording(tmp_path / "real.wav")
    assert_same(np.concatenate([block for _, block in recording.blocks(700)])[50:-50], Z[50:-50])


# ---- SigMF

BODY, HEAD = (PAIR * 30000).round().astype("<i2").tobytes(), b"\x7f" * 64


def sigmf(folder, data, captures, name="a", **more):
    settings = {"core:datatype": "ci16_le", "core:sample_rate": 1e6, "core:version": "1.2.0", **more}
    meta = {"global": settings, "captures": captures, "annotations": []}
    (folder / more.get("core:dataset", f"{name}.sigmf-data")).write_bytes(data)
    (folder / f"{name}.sigmf-meta").write_text(json.dumps(meta))
    return folder / f"{name}.sigmf-meta"


FIRST = [{"core:sample_start": 0}]


@pytest.mark.parametrize(
    "data, captures, more",
    [
        (BODY, FIRST, {}),
        (BODY, [], {}),
        (HEAD + BODY, [{"core:sample_start": 0, "core:header_bytes": 64}], {}),
        (
            HEAD + BODY[:8000] + HEAD + BODY[8000:],
            [{"core:sample_start": s, "core:header_bytes": 64} for s in (0, 2000)],
            {"core:dataset": "a.iq"},
        ),
        (
            BODY[:8000] + HEAD + BODY[8000:],
            [*FIRST, {"core:sample_start": 2000, "core:header_bytes": 64}],
            {},
        ),
        (b"\x07\x00" * 1000 + BODY, [{"core:sample_start": 500}], {}),
        (BODY + b"12345678", FIRST, {"core:trailing_bytes": 8}),
        (BODY, [{"core:sample_start": 700}], {"core:offset": 700}),
        (BODY, [{"core:sample_start": None, "core:header_bytes": None}], {"core:num_channels": None}),
        (BODY, [{"core:sample_start": 2000}, *FIRST], {}),
        ((PAIR * 30000).round().astype(">i2").tobytes(), FIRST, {"core:datatype": "ci16_be"}),
        ((PAIR * 120 + 127.5).round().astype("u1").tobytes(), FIRST, {"core:datatype": "cu8"}),
        (PAIR.astype("<f8").tobytes(), FIRST, {"core:datatype": "cf64_le"}),
        (
            np.repeat(PAIR[:, None], 2, 1).tobytes(),
            FIRST,
            {"core:datatype": "cf32_le", "core:num_channels": 2},
        ),
    ],
)
def test_sigmf_as_the_specification_allows_it(tmp_path, data, captures, more):
    iq, fs = read_iq(sigmf(tmp_path, data, captures, **more))
    assert_same(iq)
    assert fs == 1e6


def test_a_sigmf_recording_in_capital_letters_and_with_a_byte_order_mark(tmp_path):
    path = sigmf(tmp_path, BODY, FIRST)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_same(read_iq(path)[0])
    for old in (path, path.with_suffix(".sigmf-data")):
        old.rename(tmp_path / old.name.upper())
    assert_same(read_iq(tmp_path / "A.SIGMF-META")[0])


def test_a_sigmf_archive_is_read_where_it_lies(tmp_path):
    path = sigmf(tmp_path, HEAD + BODY, [{"core:sample_start": 0, "core:header_bytes": 64}])
    with tarfile.open(tmp_path / "a.sigmf", "w") as archive:
        for part in (path, path.with_suffix(".sigmf-data")):
            archive.add(part, f"a/{part.name}")
    assert_same(read_iq(tmp_path / "a.sigmf")[0])
    with tarfile.open(tmp_path / "a.sigmf", "a") as archive:
        archive.add(path, "b/a.sigmf-meta")
    with pytest.raises(UserError, match="holds 2 .sigmf-meta and 1 .sigmf-data"):
        read_iq(tmp_path / "a.sigmf")


@pytest.mark.parametrize(
    "data, captures, more, words",
    [
        (BODY, FIRST, {"core:datatype": "ci12"}, "core:datatype: the format 'ci12' is not known"),
        (BODY, FIRST, {"core:sample_rate": "fast"}, "core:sample_rate is text"),
        (BODY, [{"core:sample_start": "0"}], {}, "sample_start is text"),
        (BODY, [{"core:sample_start": 0, "core:header_bytes": -4}], {}, "below 0"),
        (BODY, FIRST, {"core:trailing_bytes": "3"}, "trailing_bytes is text"),
        (BODY, [{"core:sample_start": 9000}], {}, "outside the data"),
        (b"", FIRST, {}, "no samples there"),
    ],
)
def test_sigmf_that_cannot_be_meant_is_one_line(tmp_path, data, captures, more, words):
    with pytest.raises(UserError, match=words) as error:
        read_iq(sigmf(tmp_path, data, captures, **more))
    assert "\n" not in str(error.value)


def test_a_sigmf_data_set_may_not_lie_elsewhere(tmp_path):
    (tmp_path / "in").mkdir()
    path = sigmf(tmp_path / "in", BODY, FIRST, **{"core:dataset": "a.iq"})
    path.write_text(path.read_text().replace("a.iq", "../b.iq"))
    (tmp_path / "b.iq").write_bytes(BODY)
    with pytest.raises(UserError, match="lies outside"):
        read_iq(path)


# ---- streams


def test_windows_of_a_stream_are_those_of_the_whole(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50000, 2)).astype("f4") * 0.01
    for start in (4000, 20000, 20200, 41000):
        x[start : start + 900] += PAIR[:900] * rng.uniform(1, 2)
    x.tofile(tmp_path / "a.cf32")
    recording = open_recording(tmp_path / "a.cf32")
    whole = {s: x[s : s + 256] for s in range(0, 50000 - 255, 128)}
    power = {s: w.var(0).sum() for s, w in whole.items()}
    strong = [s for s in power if power[s] >= max(power.values()) / 10]
    expected = sorted(sorted(strong, key=lambda s: -power[s])[:6])
    recording.blocks = lambda size, blocks=recording.blocks: blocks(1000)  # every border is crossed
    found = strong_windows(recording, 256, 128, most=6)
    assert [start for start, _ in found] == expected
    for stride in (128, 1500):  # a stride beyond a block, too
        for start, window in strong_windows(recording, 256, stride, most=6):
            assert start % stride == 0 and np.array_equal(window, x[start : start + 256])


def test_folders_stand_for_the_recordings_below_them(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    for name in ("b.cf32", "a.CU8", "sub/c.h5", "notes.txt", "d.sigmf-meta", "d.sigmf-data"):
        (tmp_path / name).write_bytes(b"")
    names = [p.name for p in find_recordings([tmp_path, tmp_path / "b.cf32"])]
    assert names == ["a.CU8", "b.cf32", "d.sigmf-meta", "c.h5"]
    sigmf(tmp_path, BODY, FIRST, **{"core:dataset": "e.cs16"})  # its samples are no recording of their own
    assert [p.name for p in find_recordings([tmp_path])] == ["a.CU8", "a.sigmf-meta", *names[1:]]
    assert capsys.readouterr().err == ""
    find_recordings([tmp_path], tell=True)
    assert f"{tmp_path}: left out 1 file of another kind: notes.txt\n" == capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/only.sigmf-data").write_bytes(b"")
    with pytest.raises(UserError, match="holds no recording"):
        find_recordings([tmp_path / "empty"])


# ---- questions


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["Which? (A) FM (B) AM"] * 3, 300)


def questions(path, *h5_paths, encoding="utf-8"):
    about = {"question": "哪个？(A) FM (B) AM", "answer": "(A) FM"}
    rows = [{**about, "iq_index_in_h5": i % 3, "h5_path": name} for i, name in enumerate(h5_paths)]
    return write_questions(path, rows, encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16"])
def test_question_files_of_any_usual_encoding(tmp_path, encoding):
    read = read_questions(questions(tmp_path / "x.json", "x.h5", encoding=encoding))
    assert read[0]["question"].startswith("哪个")


def test_a_pair_put_together_by_the_user_wins_over_what_the_questions_name(tmp_path, tokenizer):
    (tmp_path / "signals").mkdir()
    (tmp_path / "texts").mkdir()
    h5 = write_h5(tmp_path / "signals/renamed.h5", lambda f: f.attrs.update(fs=1e6))
    write_h5(tmp_path / "texts/x.h5")
    for named in ("x.h5", "/data/elsewhere/x.h5", "../signals/renamed.h5", "absent.h5", None):
        pair = task_pairs(None, [h5, questions(tmp_path / "texts/x.json", named, named)])
        data = QuestionDataset(pair, tokenizer)
        assert [f.path for f in data.files] == [h5] and data[1]["fs"] == [1e6]
    # in a folder, a file that a question names lies in the folder
    for named, words in (("/data/elsewhere/x.h5", "lies outside"), ("../signals/renamed.h5", "lies outside")):
        questions(tmp_path / "texts/x.json", named)
        with pytest.raises(UserError, match=words):
            QuestionDataset(task_pairs(tmp_path / "texts"), tokenizer)
    # questions that name several files are about those
    write_h5(tmp_path / "texts/y.h5")
    pair = task_pairs(None, [h5, questions(tmp_path / "texts/x.json", "x.h5", "y.h5")])
    assert [f.path.name for f in QuestionDataset(pair, tokenizer).files] == ["x.h5", "y.h5"]


def test_one_file_of_signals_under_two_names_is_one_file(tmp_path, tokenizer):
    """Or its signals would count as others where validation is held out."""
    write_h5(tmp_path / "x.h5")
    (tmp_path / "y.h5").symlink_to("x.h5")
    questions(tmp_path / "a.json", None)
    names = (tmp_path / "x.h5", tmp_path / "y.h5", tmp_path / "../" / tmp_path.name / "x.h5")
    pairs = task_pairs(task_files=[part for name in names for part in (name, tmp_path / "a.json")])
    data = QuestionDataset(pairs, tokenizer)
    assert len(data.files) == 1 and {frozenset(data.signals_of(i)) for i in range(3)} == {frozenset({(0, 0)})}


def test_nulls_and_empty_names_in_a_question_file_are_as_absent(tmp_path, tokenizer):
    write_h5(tmp_path / "x.H5")
    row = {"question": "Which? (A) FM (B) AM", "answer": None, "h5_path": "", "iq_index_in_h5": 1}
    write_questions(tmp_path / "x.json", [row])
    data = QuestionDataset(task_pairs(tmp_path), tokenizer, with_answers=False)
    assert len(data) == 1 and data.files[0].path.name == "x.H5" and not data.unread


def test_a_radioml_pickle_that_was_saved_again_is_read(tmp_path):
    names = (np.str_("AM"), b"FM")  # of a file that two editions of Python wrote
    cells = {(name, np.int64(snr)): np.ones((2, 2, 8), "f4") for name in names for snr in (18, -4)}
    for protocol in (2, 5):
        (tmp_path / "r.pkl").write_bytes(pickle.dumps(cells, protocol=protocol))
        read = list(read_radioml2016(tmp_path / "r.pkl"))
        assert [(name, snr, x.shape) for name, snr, x in read][:2] == [
            ("AM", -4.0, (2, 8, 2)),
            ("AM", 18.0, (2, 8, 2)),
        ]


def test_an_object_in_a_resaved_pickle_still_runs_nothing(tmp_path):
    evil = type("Evil", (), {"__reduce__": lambda self: (open, (str(tmp_path / "ran"), "w"))})()
    buffer = io.BytesIO()
    np.save(buffer, np.array([evil], object), allow_pickle=True)
    (tmp_path / "r.pkl").write_bytes(pickle.dumps({("AM", 0): np.array([evil], object)}))
    with pytest.raises(UserError):
        list(read_radioml2016(tmp_path / "r.pkl"))
    assert not (tmp_path / "ran").exists()


# ---- TorchSig

STRING = h5py.string_dtype()


def one_group_a_sample(file, signals, names):
    """The layout of TorchSig 2.0."""
    for n, (signal, name) in enumerate(zip(signals, names)):
        file[f"{n}/data"] = signal
        about = file.create_group(f"{n}/metadata/0")
        about["class_name"], about["snr_db"], about["sample_rate"] = name, 3.5, 1e6


def by_key(file, signals, names):
    """The layout of TorchSig 2.1: the class stands with the component, the rate with what it belongs to."""
    file.create_group("component_signals")
    file["metadata/set/sample_rate"] = 1e6
    file["metadata/set/parent_metadata_id"] = "set"  # a ring ends, too
    for n, (signal, name) in enumerate(zip(signals, names)):
        file[f"index/{n}"], file[f"data/s{n}"], file[f"data/c{n}"] = f"s{n}", signal, signal
        file[f"metadata/s{n}/parent_metadata_id"] = "set"
        file[f"metadata/c{n}/class_name"], file[f"metadata/c{n}/snr_db"] = name, 3.5
        file.create_dataset(f"component_signals/s{n}", data=[f"c{n}"], dtype=STRING)
    n = len(names)  # one of two signals, which has no class
    file[f"index/{n}"], file["data/two"] = "two", signals[0]
    file.create_group("metadata/two")
    file.create_dataset("component_signals/two", data=["c0", "c1"], dtype=STRING)


def homogeneous(file, signals, names):
    """The layout of TorchSig 2.2 for signals of one length."""
    buffer = io.BytesIO()
    np.save(buffer, np.float64(3.5))
    level = {
        "__torchsig_type__": "ndarray",
        "data": base64.b64encode(buffer.getvalue()).decode(),
        "scalar": True,
    }
    wrap = lambda **items: json.dumps({"__torchsig_type__": "dict", "items": items})
    file["data"] = np.stack(signals)
    file.create_dataset("metadata", data=[wrap(sample_rate=1e6)] * len(names), dtype=STRING)
    file["component_offsets"] = np.arange(len(names) + 1, dtype="u8")
    parts = [wrap(class_name=name, snr_db=level) for name in names]
    file.create_dataset("component_metadata", data=parts, dtype=STRING)


@pytest.mark.parametrize("layout", [one_group_a_sample, by_key, homogeneous])
def test_torchsig_files_of_every_layout_come_in(tmp_path, layout):
    signals, names = [Z[:64] * (k + 1) for k in range(12)], ["fm", "am-dsb"] * 6
    with h5py.File(tmp_path / "data.h5", "w") as file:
        layout(file, signals, names)
    out = tmp_path / "out"
    convert(convert_args(["torchsig", str(tmp_path / "data.h5"), "--out", str(out)]))
    parts = [SignalFile(out / part / "modulation.h5") for part in ("train", "val", "test")]
    assert [len(file) for file in parts] == [6, 2, 4] and parts[0].fs == 1e6
    assert parts[0].classes == ["am-dsb", "fm"] and set(parts[0].column("snr")) == {3.5}
    for file in parts:
        for row, label in enumerate(file.column("label")):
            z = file.read(row) @ [1, 1j]
            k = int(np.argmin([np.abs(z - signal).max() for signal in signals]))
            assert np.abs(z - signals[k]).max() < 1e-5 and names[k] == file.classes[int(label)]


@pytest.mark.parametrize("layout", [one_group_a_sample, by_key, homogeneous])
def test_no_part_of_a_torchsig_file_is_read_from_another_file(tmp_path, layout):
    names = []
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        layout(file, [Z[:64]] * 2, ["fm", "am-dsb"])
        file.visit(names.append)
    read = [name for name in names if not name.startswith("data/c")]  # the components' own signals are not
    for name in read:
        shutil.copy(tmp_path / "whole.h5", tmp_path / "data.h5")
        with h5py.File(tmp_path / "data.h5", "a") as file:
            del file[name]
            file[name] = h5py.ExternalLink("whole.h5", f"/{name}")
        with pytest.raises(UserError, match="lies in another file"):
            read_torchsig(tmp_path / "data.h5")
    assert len(read) >= 4


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda f: f.create_group("records"), "is of no layout"),
        (lambda f: one_group_a_sample(f, [Z[:64], Z[:32]], ["fm", "fm"]), "lengths"),
        (lambda f: one_group_a_sample(f, [PAIR], ["fm"]), r"expected complex \(T,\)"),
        (lambda f: f.update({"0/data": Z, "0/metadata/0/snr_db": 1.0}), "has no class_name"),
        (lambda f: f.update({"0/data": Z, "0/metadata/0/class_name": "fm"}), "give it in Hz with --fs"),
        (lambda f: f.update({"0/metadata/0/class_name": "fm"}), "not a readable TorchSig file"),
    ],
)
def test_torchsig_files_that_cannot_be_meant_are_one_line(tmp_path, build, words):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        build(file)
    with pytest.raises(UserError, match=words) as error:
        convert(convert_args(["torchsig", str(tmp_path / "data.h5"), "--out", str(tmp_path / "out")]))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
