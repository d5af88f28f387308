"""Recordings of any common format as (N, 2) float32 with their sampling rate, whole or piece by piece, and
long ones as windows.

.h5 .hdf5 (IQ_data)  .npy .npz .mat  .wav (I left, Q right)  .sigmf-meta .sigmf-data .sigmf  .sdriq; raw,
interleaved I and Q: .cu8 .cs8 .cs16 .cf32 .cfile .cu16 .cs32 .cf64 .complex .complex16u .complex16s ...; .raw
.iq .bin .dat, whose format stands in their name, as in x_250k_cs16.bin, or is given. Suffixes in capital
letters are the same.
"""

import heapq
import json
import math
import re
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import scipy.io
import scipy.io.wavfile
import scipy.signal

from common.errors import UserError
from common.files import check, check_size, hdf5_item, inside, open_npz, reading
from em_mllm.prepare import AS_RECORDED
from em_mllm.signal_file import (
    DEFAULT_FS,
    RATE_NAME,
    SCALES,
    SignalFile,
    centred,
    plain_text,
    read_json_text,
    stated_rates,
)

# suffixes of interleaved I and Q, and others that mean the same, as of Universal Radio Hacker and PortaPack
RAW = ("cu8", "cs8", "cu16", "cs16", "cu32", "cs32", "cf32", "cf64")
ALIASES = {
    "cu8": "complex16u",
    "cs8": "c8 sc8 complex16s",
    "cu16": "complex32u",
    "cs16": "c16 sc16 complex32s",
    "cf32": "cfile fc32 complex complex64",
    "cf64": "complex128",
}
SUFFIXES = {f".{name}": name for name in RAW}
SUFFIXES |= {f".{alias}": name for name, aliases in ALIASES.items() for alias in aliases.split()}
UNNAMED = (".raw", ".iq", ".bin", ".dat", ".data")
SIGMF = (".sigmf-meta", ".sigmf-data", ".sigmf")
H5 = (".h5", ".hdf5")
MANY = (*H5, ".npy", ".npz", ".mat")  # formats of which a file may hold many signals
DESCRIBED = (*MANY, ".wav", ".sdriq", *SIGMF)  # formats that say how their samples are stored
FORMATS = " ".join((*DESCRIBED, *SUFFIXES, *UNNAMED))
BLOCK = 2**18  # samples read at a time


class Recording:
    """One signal of a file: `length` samples, `fs` in Hz (None if the file does not say), done (view, factor)
    as in `SignalFile`, and `read(start, count)` -> (count, 2) float32. stated False: fs is a default.
    """

    def __init__(self, path, length: int, fs, read, done=AS_RECORDED, stated=True):
        self.path, self.length, self.fs, self._read, self.done = Path(path), length, fs, read, done
        self.stated = stated
        if not length:
            raise UserError(f"{path}: holds no samples; was the copy cut short?")

    def read(self, start: int, count: int) -> np.ndarray:
        with reading(self.path, "recording"):
            iq = np.ascontiguousarray(self._read(start, count), np.float32)
        if not np.isfinite(iq).all():
            bad = start + int(np.nonzero(~np.isfinite(iq).all(1))[0][0])
            raise UserError(f"{self.path}: sample {bad} is nan or inf; mend or cut the recording")
        return iq

    def blocks(self, size: int = BLOCK):
        """Yield (first sample, samples) from the beginning to the end."""
        for start in range(0, self.length, size):
            yield start, self.read(start, min(size, self.length - start))


def read_iq(path, index: int = 0, iq_format: str | None = None) -> tuple[np.ndarray, float | None]:
    """(N, 2) float32 and the sampling rate in Hz (None if the file does not say).

    index: which signal of a .h5, .npy, .npz or .mat that holds many. iq_format: of raw samples whose suffix
    does not say it, such as "cs16". Raises UserError for an unknown format, an empty or cut file, a wrong
    shape, nan or inf, and a signal of zeros.
    """
    recording = open_recording(path, index, iq_format)
    iq = recording.read(0, recording.length)
    if not iq.any():
        raise UserError(f"{path}: every sample is zero; nothing was recorded")
    return iq, recording.fs


def open_recording(
    path, index: int = 0, iq_format: str | None = None, default_fs: float = DEFAULT_FS
) -> Recording:
    """The recording in a file, of which nothing but its description is read yet; see `read_iq`.

    default_fs: of a .h5 that does not state its rate.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    if iq_format is not None and not needs_format(path):
        raise UserError(
            f"{path}: --iq-format has no effect on {suffix}, which names its format; leave it out"
        )
    if index and suffix not in MANY:
        raise UserError(f"{path}: --index {index} is past the end, a {suffix} file holds one signal")
    known = SUFFIXES.get(suffix) or iq_format or format_in_name(path.name)
    if known and suffix not in DESCRIBED:
        return open_raw(path, raw_type(path, known))
    if suffix in SIGMF:
        return open_sigmf(path)
    if suffix == ".sdriq":
        return open_sdriq(path)
    if suffix in H5:
        file = SignalFile(path, default_fs)
        if not 0 <= index < len(file):
            raise UserError(f"{path}: --index {index} is past the end, the file holds {len(file)} signals")
        read = lambda start, count: file.read(index, start, count)
        return Recording(path, file.points, file.rate(index), read, file.done, file.fs_stated)
    if suffix == ".wav":
        return open_wav(path)
    if suffix in MANY:
        return open_arrays(path, suffix, index)
    if suffix in UNNAMED:
        raise UserError(
            f"{path}: its name does not say how the samples are stored; say it with --iq-format, one of "
            f"{', '.join(RAW)}"
        )
    raise UserError(
        f"{path}: format {suffix or '(none)'} is not known; known are {FORMATS}; say how raw samples of "
        "another name are stored with --iq-format"
    )


def needs_format(path: Path) -> bool:
    """Whether a file's suffix does not say how its samples are stored."""
    return path.suffix.lower() not in (*DESCRIBED, *SUFFIXES)


# ---- raw samples


def raw_type(where, name: str) -> str:
    """numpy type of a raw format: a name of RAW, a suffix that means one, or SigMF's, such as ci16_be."""
    plain = name.lower().lstrip(".")
    match = re.fullmatch(r"c([fius])(8|16|32|64)(_le|_be)?", SUFFIXES.get(f".{plain}", plain))
    if not match or match[1] == "f" and match[2] in ("8", "16"):
        raise UserError(
            f"{where}: the format {name!r} is not known; known are {', '.join(RAW)} and SigMF's names"
        )
    return f"{'>' if match[3] == '_be' else '<'}{match[1].replace('s', 'i')}{int(match[2]) // 8}"


def open_raw(path: Path, dtype: str) -> Recording:
    """Interleaved I, Q of a numpy type; unsigned numbers are centred."""
    width, size = 2 * np.dtype(dtype).itemsize, path.stat().st_size
    if size % width:
        raise UserError(
            f"{path}: {size} bytes are no whole number of {width}-byte IQ pairs; was the copy cut short, or "
            "is the suffix wrong?"
        )
    read = lambda start, count: read_pairs(path, dtype, start * width, count)
    return Recording(path, size // width, rate_in_name(path.name), read)


def read_pairs(path, dtype: str, offset: int, count: int, channels: int = 2, used=slice(0, 2)) -> np.ndarray:
    """`count` samples of `channels` numbers from byte `offset` on, of which the columns `used` are kept."""
    return centred(np.fromfile(path, dtype, count * channels, offset=offset).reshape(-1, channels)[:, used])


def open_sdriq(path: Path) -> Recording:
    """A recording of SDRangel: a header with rate, number of bits and its check sum; then I, Q."""
    with reading(path, "recording of SDRangel"), open(path, "rb") as file:
        head = file.read(32)
        rate, _, _, bits, _, check_sum = struct.unpack("<IQQIII", head)
    dtype = {16: "<i2", 24: "<i4"}.get(bits)
    if not (rate and dtype) or check_sum != zlib.crc32(head[:28]):
        raise UserError(f"{path}: does not begin with the header of SDRangel; was the copy cut short?")
    width = 2 * np.dtype(dtype).itemsize
    read = lambda start, count: read_pairs(path, dtype, 32 + start * width, count)
    return Recording(path, (path.stat().st_size - 32) // width, float(rate), read)


# names of programs that write cf32, in which the rate has a place of its own
PLACED = re.compile(r"gqrx_\d{8}_\d{6}_\d+_(\d+)_fc|sigdigger_\d{8}_\d{6}Z_(\d+)_\d+_float32_iq")
# formats that stand in a name between marks, as rtl_433 reads them
NAMED = re.compile(
    r"(?i)(?<![A-Za-z0-9])(c[fiu](?:8|16|32|64)(?:_[bl]e)?|(?:cs|cu|sc|fc)(?:8|16|32|64)|complex\d+[us]?)"
    r"(?![A-Za-z0-9])"
)


def format_in_name(name: str) -> str | None:
    """ "cs16" from g001_433.92M_250k_cs16.bin: the format of raw samples that a file's name states, else
    None; several are none."""
    if PLACED.match(name):
        return "cf32"
    found = {found.lower() for found in NAMED.findall(name)}
    return found.pop() if len(found) == 1 else None


# a number, its prefix and its unit, and what says before it that it is a rate; URH writes 2_4 for 2.4
NUMBER = re.compile(
    r"(?:(?<![A-Za-z])((?i:fs|sr|samp(?:le|ling)?[_-]?rate))[_=-]?|(?<![A-Za-z0-9.]))"
    r"((?<=Hz-)\d+_\d+|\d+(?:\.\d+)?(?:[eE]\d+)?) ?([kKmMgG]?)((?i:hz|sps|sa?/?s?))?(?![A-Za-z0-9])"
)


def rate_in_name(name: str) -> float | None:
    """250000.0 from g001_433.92M_250k.cu8: the sampling rate that a file's name states, else None.

    As rtl_433 reads names: a bare M or G is the centre frequency, a bare k the rate; Hz is a frequency, Sps a
    rate, whatever the prefix, and so is a number behind fs or samplerate. Several different rates are none.
    """
    if match := PLACED.match(name):
        return float(match[1] or match[2])
    rates = {
        float(number.replace("_", ".")) * SCALES[prefix.lower()]
        for label, number, prefix, unit in NUMBER.findall(name)
        if label or unit.lower() not in ("", "hz", "s") or not unit and prefix in ("k", "K")
    }
    return rates.pop() if len(rates) == 1 and min(rates) > 0 else None


# ---- arrays


PAIRS = (("I", "Q"), ("i", "q"), ("real", "imag"), ("re", "im"), ("r", "i"))  # names of I and Q


def joined(x: np.ndarray) -> np.ndarray:
    """An array with two fields, I and Q, as complex numbers; any other as it is."""
    names = next((pair for pair in PAIRS if set(pair) == set(x.dtype.names or ())), None)
    return x[names[0]] + 1j * x[names[1]] if names else x


def stacked(x: np.ndarray, path, columns: bool) -> np.ndarray:
    """A stack of captures as complex (Num, T) or real (Num, T, 2). They come last where they would have fewer
    than 16 samples otherwise, or (columns) as MATLAB's functions write them, which is said."""
    shape, is_complex = x.shape, np.iscomplexobj(x)
    if not is_complex and shape[1] != 2:
        return x.transpose(2, 1, 0) if shape[0] == 2 != shape[2] else x
    first, last = shape[0], shape[-1]
    by_column = first >= 16 if is_complex else last < first
    come_last = by_column if columns else last < 16 <= first
    x = np.moveaxis(x, -1, 0) if come_last else x
    if not is_complex and not come_last:
        x = x.transpose(0, 2, 1)  # (Num, 2, T)
    if columns or come_last:
        print(f"{path}: {shape}, taken as {len(x)} captures of {x.shape[1]} samples")
    return x


def two_columns(x: np.ndarray, path, index: int = 0, columns: bool = False) -> np.ndarray:
    """An array as (N, 2): complex (N,), real (N, 2) or (2, N), or entry `index` of a stack of these; columns:
    see `stacked`."""
    x = joined(np.asarray(x))
    x = np.squeeze(x, tuple(axis for axis, size in enumerate(x.shape) if size == 1)) if x.ndim > 1 else x
    if x.dtype.kind not in "fiuc":
        raise UserError(f"{path}: holds {x.dtype}, expected real or complex numbers")
    if x.ndim == (2 if np.iscomplexobj(x) else 3):
        x = stacked(x, path, columns)
        if not 0 <= index < len(x):
            raise UserError(f"{path}: --index {index} is past the end, the file holds {len(x)} signals")
        x = x[index]
    elif index:
        raise UserError(f"{path}: --index {index} is past the end, the file holds 1 signal")
    if np.iscomplexobj(x) and x.ndim == 1:
        return np.stack([x.real, x.imag], 1)
    if x.ndim == 2 and 2 in x.shape:
        return x if x.shape[1] == 2 else x.T
    way_out = "; where I and Q alternate store x.reshape(-1, 2), of one real channel scipy.signal.hilbert(x)"
    raise UserError(
        f"{path}: an array of shape {x.shape}, expected complex (N,) or real (N, 2){way_out * (x.ndim == 1)}"
    )


def open_arrays(path: Path, suffix: str, index: int) -> Recording:
    """The array of a .npy, .npz or .mat file that can be IQ, and its rate if it is there."""
    if suffix == ".npy":
        with reading(path, "array of plain numbers"):
            x, fs = two_columns(np.load(path, mmap_mode="r"), path, index), None
    elif suffix == ".npz":
        with reading(path, "archive of plain arrays"), open_npz(path) as file:
            content = plain_arrays(file)
        name, x, fs = choose_array(content, path, index)
        x = two_columns(x, f"{path}: {name}", index)
    else:
        with reading(path, "MATLAB file"):
            content = mat_content(path)
        name, x, fs = choose_array(content, path, index)
        x = two_columns(x, f"{path}: {name}", index, columns=True)
    return Recording(path, len(x), fs, lambda start, count: centred(x[start : start + count]))


def plain_arrays(file) -> dict[str, np.ndarray]:
    """The arrays of an open .npz but those of Python objects, which are not samples and are not unpickled."""
    content = {}
    for name in file:
        try:
            content[name] = file[name]
        except ValueError as error:
            if "Object arrays" not in str(error) or len(file) == 1:
                raise
    return content


def choose_array(content: dict, path, index: int) -> tuple[str, np.ndarray, float | None]:
    """Name and values of the array of samples among the arrays of a file, and the sampling rate or None; I
    and Q may be two of them, and there may be a rate for each signal."""
    for i, q in PAIRS[:-1]:
        if i in content and q in content and content[i].shape == content[q].shape and content[i].size > 16:
            content = {**content, "iq": np.squeeze(content.pop(i)) + 1j * np.squeeze(content.pop(q))}
    rates = stated_rates(content, path)
    fs = None if rates is None else float(rates[index if 0 <= index < len(rates) else 0])
    arrays = {
        k: v
        for k, v in content.items()
        if getattr(v, "size", 0) > 16
        and (v.dtype.kind in "fiuc" or v.dtype.names)
        and not RATE_NAME.fullmatch(k)
    }
    if not arrays:
        raise UserError(f"{path}: holds no array of samples (variables: {', '.join(content) or 'none'})")
    # time axes and labels are one column of real numbers
    fitting = {k: v for k, v in arrays.items() if v.dtype.kind == "c" or v.dtype.names or 2 in v.shape}
    fitting = fitting or arrays
    usual = [n for n in ("IQ_data", "iq", "IQ", "x", "X", "signal", "data") if n in fitting]
    name = (usual or [max(fitting, key=lambda n: fitting[n].size)])[0]
    if len(fitting) > 1:
        print(f"{path}: holds {', '.join(fitting)}; {name} is read")
    return name, fitting[name], fs


def mat_content(path: Path) -> dict:
    """{name: array} of a MATLAB file, with the fields of its structures beside the other variables. Version
    7.3 files are HDF5, whose axes stand the other way round and whose text is made of numbers."""

    def version_73(group) -> dict:
        out = {}
        for name in group.keys() - {"#refs#"}:
            item = hdf5_item(group, name)
            if isinstance(item, h5py.Group):
                out |= version_73(item)
            elif item.shape:
                is_text = plain_text(item.attrs.get("MATLAB_class", "")) == "char"
                out[name] = np.array("".join(map(chr, item[()].ravel()))) if is_text else item[()].T
        return out

    try:
        for name, shape, kind in scipy.io.whosmat(path):  # packed, a small file can declare a large array
            size = {"double": 8, "single": 4}.get(kind, 1)
            check_size(path, name, math.prod(shape) * size, path.stat().st_size)
        content = {k: v for k, v in scipy.io.loadmat(path).items() if not k.startswith("__")}
    except NotImplementedError:
        with h5py.File(path, "r") as file:
            content = version_73(file)
    found = list(content.values())
    for value in found:  # which grows by what a structure in a structure holds
        if value.dtype.names and value.dtype.hasobject and value.size == 1:
            inner = {name: np.asarray(value[name].item()) for name in value.dtype.names}
            content |= inner
            found += inner.values()
    return {k: joined(v) for k, v in content.items()}


# ---- one real channel, WAV


def analytic(samples: np.ndarray) -> np.ndarray:
    """A real recording as the analytic signal, its positive frequencies."""
    z = scipy.signal.hilbert(samples)
    return np.stack([z.real, z.imag], 1)


def analytic_reader(read_real, length: int, edge: int = 4096):
    """`read` of a Recording from one that gives real samples: the analytic signal of the piece, with `edge`
    samples more on both sides."""

    def read(start, count):
        first, last = max(0, start - edge), min(length, start + count + edge)
        return analytic(read_real(first, last - first))[start - first :][:count]

    return read


def open_wav(path: Path) -> Recording:
    """Two channels are I and Q; of one the analytic signal is taken."""
    with reading(path, "WAV file"):
        try:
            rate, samples = scipy.io.wavfile.read(path, mmap=True)
        except ValueError:  # 24 bits and compressed kinds cannot be mapped
            rate, samples = scipy.io.wavfile.read(path)
    centre = 128 if samples.dtype == np.uint8 else 0
    values = lambda start, count: samples[start : start + count].astype(np.float32) - centre
    if samples.ndim == 1:
        print(f"{path}: one real channel; its analytic signal stands for IQ")
        return Recording(path, len(samples), float(rate), analytic_reader(values, len(samples)))
    if samples.shape[1] > 2:
        print(f"{path}: {samples.shape[1]} channels; the first two are read as I and Q")
    return Recording(path, len(samples), float(rate), lambda start, count: values(start, count)[:, :2])


# ---- SigMF

META = {
    "global": {
        "core:datatype": str,
        "core:sample_rate?": (int, float),
        "core:num_channels?": int,
        "core:dataset?": str,
        "core:offset?": int,
        "core:trailing_bytes?": int,
    },
    "captures": [{"core:sample_start?": int, "core:header_bytes?": int}],
}


def beside(path: Path, suffix: str) -> Path:
    """The other half of a SigMF recording, whose suffix may be written in capital letters."""
    return path.with_suffix(suffix if path.suffix.islower() else suffix.upper())


def open_sigmf(path: Path) -> Recording:
    """First channel of a SigMF recording: meta and data beside each other, or an archive of both.

    Header and trailing bytes, a first sample_start above 0, core:offset and non-conforming data sets
    (core:dataset) are as in the specification 1.2.
    """
    base, size = 0, None
    if path.suffix.lower() == ".sigmf":
        meta, data, base, size = read_archive(path)
    else:
        meta = read_json_text(beside(path, ".sigmf-meta"))
    check(meta, META, path)
    parts = (meta["global"], *(meta.get("captures") or []))  # in which null is as absent
    settings, *captures = ({key: value for key, value in part.items() if value is not None} for part in parts)
    if size is None:
        named = settings.get("core:dataset")
        data = inside(path.parent, named) if named else beside(path, ".sigmf-data")
        size = data.stat().st_size if data.is_file() else 0
    if not size:
        raise UserError(f"{data}: no samples there; put the data of the SigMF recording beside its meta file")
    rate = settings.get("core:sample_rate")
    if rate is not None and not rate > 0:
        raise UserError(f"{path}: core:sample_rate is {rate!r}, expected samples per second")
    kind = settings["core:datatype"]
    dtype = raw_type(f"{path}: core:datatype", "c" + kind[1:] if kind[:1] in "rc" else kind)
    numbers = 2 if kind.startswith("c") else 1
    channels = settings.get("core:num_channels", 1)
    if min([channels, *(c.get("core:header_bytes", 0) + 1 for c in captures)]) < 1:
        raise UserError(f"{path}: core:num_channels or core:header_bytes is below 0; mend the meta file")
    if channels > 1:
        print(f"{path}: {channels} channels; the first is read")
    width = np.dtype(dtype).itemsize * numbers * channels
    size -= settings.get("core:trailing_bytes", 0)
    pieces = sigmf_pieces(path, captures or [{}], settings.get("core:offset", 0), base, size, width)
    length = sum(count for _, count in pieces)
    layout = (dtype, width, numbers * channels, slice(0, numbers))
    read = lambda start, count: read_pieces(data, pieces, layout, start, count)
    if numbers == 1:
        print(f"{path}: one real channel; its analytic signal stands for IQ")
        read = analytic_reader(lambda start, count, real=read: real(start, count)[:, 0], length)
    return Recording(path, length, None if rate is None else float(rate), read)


def sigmf_pieces(path, captures, offset: int, base: int, size: int, width: int) -> list[tuple[int, int]]:
    """(first byte, number of samples) of every capture segment in the data file."""
    captures = sorted(captures, key=lambda c: c.get("core:sample_start", 0))
    starts = [c.get("core:sample_start", 0) - (offset if "core:sample_start" in c else 0) for c in captures]
    headers = np.cumsum([c.get("core:header_bytes", 0) for c in captures])
    firsts = [base + start * width + int(head) for start, head in zip(starts, headers)]
    counts = [after - start for start, after in zip(starts, starts[1:])]
    counts.append((base + size - firsts[-1]) // width)
    if min(counts) < 0 or min(starts) < 0:
        raise UserError(f"{path}: a capture begins outside the data; was the copy cut short?")
    return list(zip(firsts, counts))


def read_pieces(data, pieces, layout, start: int, count: int) -> np.ndarray:
    """`count` samples from `start` on of the segments one behind the other."""
    dtype, width, numbers, used = layout
    parts, passed = [], 0
    for first, length in pieces:
        low, high = max(start, passed), min(start + count, passed + length)
        if low < high:
            place = first + (low - passed) * width
            parts.append(read_pairs(data, dtype, place, high - low, numbers, used))
        passed += length
    return np.concatenate(parts)


def read_archive(path: Path):
    """Meta of a .sigmf archive, and (file, first byte, size) of its data, which stand uncompressed in it."""
    with reading(path, "SigMF archive"):
        with tarfile.open(path, "r:") as archive:
            members = {
                kind: [m for m in archive.getmembers() if m.isfile() and m.name.endswith(kind)]
                for kind in (".sigmf-meta", ".sigmf-data")
            }
            if any(len(found) != 1 for found in members.values()):
                held = " and ".join(f"{len(found)} {kind}" for kind, found in members.items())
                raise UserError(f"{path}: holds {held}, one of each is read; unpack it and name a recording")
            ((meta,), (data,)) = members.values()
            return json.load(archive.extractfile(meta)), path, data.offset_data, data.size


# ---- windows


def windows(iq: np.ndarray, points: int, most: int = 16) -> list[tuple[int, np.ndarray]]:
    """Cut samples in memory into windows, as `strong_windows` does."""
    recording = Recording("samples", len(iq), None, lambda start, count: iq[start : start + count])
    return strong_windows(recording, points, points, most)


def strong_windows(
    recording: Recording, points: int, stride: int = 0, most: int = 16, below_db: float = 10.0
) -> list[tuple[int, np.ndarray]]:
    """Windows of `points` samples, `stride` apart: (first sample, window), at most `most`, in order of time.

    Windows more than below_db weaker than the strongest are left out (a capture is mostly silence), then the
    strongest are taken. The recording is read once, piece by piece, and `most` windows of it are held. One
    shorter than a window is returned whole.
    """
    if recording.length <= points:
        return [(0, recording.read(0, recording.length))]
    stride = stride or points
    best, peak, rest, begin, place = [], 0.0, np.zeros((0, 2), np.float32), 0, 0
    for _, block in recording.blocks(max(BLOCK, 4 * points)):
        rest = np.concatenate([rest, block])  # the samples from `begin` on
        while place + points <= begin + len(rest):
            window = rest[place - begin :][:points]
            power = float(window.var(0, dtype=np.float64).sum())  # a carrier at zero is no signal
            peak = max(peak, power)
            if len(best) < most or power > best[0][0]:
                item = (power, -place, window.copy())
                (heapq.heappushpop if len(best) == most else heapq.heappush)(best, item)
            place += stride
        passed = min(place - begin, len(rest))
        rest, begin = rest[passed:], begin + passed
    kept = [(-first, window) for power, first, window in best if power >= peak * 10 ** (-below_db / 10)]
    return sorted(kept, key=lambda item: item[0])


def find_recordings(paths, tell: bool = False) -> list[Path]:
    """The files of `paths`, of which folders stand for the recordings below them, each once and sorted.

    tell: say in one line a folder which of its files are passed over.
    """
    found, known = [], {*FORMATS.split()}
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() != ".sigmf-data")
        inner = [p for p in files if p.suffix.lower() in known]
        if not inner:
            raise UserError(f"{path}: holds no recording; known are {FORMATS}")
        told = {described(p) for p in inner if p.suffix.lower() == ".sigmf-meta"}
        found += [p for p in inner if p not in told]
        other = [p for p in files if p not in told and p.suffix.lower() not in known]
        if tell and other:
            count = f"{len(other)} file{'s' * (len(other) > 1)}"
            print(f"{path}: left out {count} of another kind: {names_of(other)}", file=sys.stderr)
    return list(dict.fromkeys(found))


def names_of(paths, most: int = 10) -> str:
    """The names of files in one line, of many the first."""
    return ", ".join(path.name for path in paths[:most]) + ", ..." * (len(paths) > most)


def described(meta: Path) -> Path | None:
    """The file of samples with a name of its own that a SigMF meta file describes, if it can be read."""
    try:
        return meta.parent / read_json_text(meta)["global"]["core:dataset"]
    except (UserError, KeyError, TypeError):
        return None
