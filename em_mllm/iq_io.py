"""Recordings of any common format as (N, 2) float32 with their sampling rate, and long ones as windows.

.h5 (IQ_data)  .npy  .mat  .cu8 .cs8 .cs16 .cf32 .cfile .cs32 .cf64 (raw, interleaved I and Q)  .sigmf-meta /
.sigmf-data / .sigmf .wav (I left, Q right)
"""

import re
import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np
import scipy.io
import scipy.io.wavfile
import scipy.signal

from common.errors import UserError
from common.files import reading
from em_mllm.dataset import SignalFile

RAW = {
    ".cu8": "u1",
    ".cs8": "i1",
    ".cs16": "<i2",
    ".sc16": "<i2",
    ".cs32": "<i4",
    ".cf32": "<f4",
    ".cfile": "<f4",
    ".fc32": "<f4",
    ".cf64": "<f8",
}
FORMATS = ".h5 .npy .mat .wav .sigmf-meta .sigmf-data .sigmf " + " ".join(RAW)


def read_iq(path, index: int = 0) -> tuple[np.ndarray, float | None]:
    """(N, 2) float32 and the sampling rate in Hz (None if the file does not say).

    index: which signal of a .h5, .npy or .mat that holds many. Raises UserError for an unknown format, an
    empty or cut file, a wrong shape, nan or inf, and a signal of zeros.
    """
    path = Path(path)
    if path.name.endswith((".sigmf-meta", ".sigmf-data", ".sigmf")):
        iq, fs = read_sigmf(path)
    elif not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    elif path.suffix == ".h5":
        file = SignalFile(path)
        if not 0 <= index < len(file):
            raise UserError(f"{path}: --index {index} is past the end, the file holds {len(file)} signals")
        iq, fs = file.read(index), file.fs
    elif path.suffix == ".npy":
        with reading(path, "array of plain numbers"):
            iq, fs = two_columns(np.load(path, mmap_mode="r"), path, index), None
    elif path.suffix == ".mat":
        iq, fs = read_mat(path, index)
    elif path.suffix == ".wav":
        with reading(path, "WAV file"):
            rate, samples = scipy.io.wavfile.read(path)
        fs, samples = float(rate), samples.astype(np.float32) - (128 if samples.dtype == np.uint8 else 0)
        iq = analytic(samples, path) if samples.ndim == 1 else samples[:, :2]
    elif path.suffix in RAW:
        iq, fs = read_raw(path, RAW[path.suffix]), rate_in_name(path.name)
    else:
        raise UserError(f"{path}: format {path.suffix or '(none)'} is not known; known are {FORMATS}")
    iq = np.ascontiguousarray(iq, np.float32)
    if len(iq) == 0:
        raise UserError(f"{path}: holds no samples; was the copy cut short?")
    if not np.isfinite(iq).all():
        raise UserError(
            f"{path}: sample {int(np.nonzero(~np.isfinite(iq).all(1))[0][0])} is nan or inf; mend or cut the "
            "recording"
        )
    if not iq.any():
        raise UserError(f"{path}: every sample is zero; nothing was recorded")
    return iq, fs


def read_raw(path: Path, dtype: str) -> np.ndarray:
    """Interleaved I, Q of a numpy dtype; unsigned bytes are centred on 127.5."""
    width = 2 * np.dtype(dtype).itemsize
    size = path.stat().st_size
    if size % width:
        raise UserError(
            f"{path}: {size} bytes are no whole number of {width}-byte IQ pairs; was the copy cut short, or "
            "is the suffix wrong?"
        )
    iq = np.fromfile(path, dtype).reshape(-1, 2).astype(np.float32)
    return iq - 127.5 if dtype == "u1" else iq


def rate_in_name(name: str) -> float | None:
    """250000.0 from g001_433.92M_250k.cu8, as rtl_433 names its captures: the last number with k, else
    None."""
    found = re.findall(r"_(\d+(?:\.\d+)?)([kM])(?:sps|Hz)?(?=[_.])", name)
    return float(found[-1][0]) * {"k": 1e3, "M": 1e6}[found[-1][1]] if found else None


def two_columns(x: np.ndarray, path, index: int = 0) -> np.ndarray:
    """An array as (N, 2): complex (N,), real (N, 2) or (2, N), or entry `index` of a stack of these."""
    x = np.squeeze(np.asarray(x))
    if x.dtype.kind not in "fiuc":
        raise UserError(f"{path}: holds {x.dtype}, expected real or complex numbers")
    is_pair = not np.iscomplexobj(x) and 2 in x.shape[-2:]
    if x.ndim == (2 if np.iscomplexobj(x) else 3):
        if not 0 <= index < len(x):
            raise UserError(f"{path}: --index {index} is past the end, the file holds {len(x)} signals")
        x = x[index]
    if np.iscomplexobj(x) and x.ndim == 1:
        return np.stack([x.real, x.imag], 1)
    if is_pair and x.ndim == 2:
        return x if x.shape[1] == 2 else x.T
    raise UserError(f"{path}: an array of shape {x.shape}, expected complex (N,) or real (N, 2)")


def analytic(samples: np.ndarray, path) -> np.ndarray:
    """A real recording as the analytic signal, its positive frequencies."""
    print(f"{path}: one real channel; its analytic signal stands for IQ")
    z = scipy.signal.hilbert(samples)
    return np.stack([z.real, z.imag], 1)


def read_mat(path: Path, index: int):
    """The array of a MATLAB file that can be IQ, and fs or Fs or sample_rate if it is there. Version 7.3
    files are HDF5."""
    with reading(path, "MATLAB file"):
        try:
            content = {k: v for k, v in scipy.io.loadmat(path).items() if not k.startswith("__")}
        except NotImplementedError:
            with h5py.File(path, "r") as file:
                content = {k: v[()] for k, v in file.items() if isinstance(v, h5py.Dataset)}
            content = {k: v["real"] + 1j * v["imag"] if v.dtype.names else v for k, v in content.items()}
    fs = next(
        (float(np.asarray(content[k]).ravel()[0]) for k in ("fs", "Fs", "sample_rate") if k in content), None
    )
    arrays = {k: v for k, v in content.items() if getattr(v, "size", 0) > 16 and v.dtype.kind in "fiuc"}
    if not arrays:
        raise UserError(f"{path}: holds no array of samples (variables: {', '.join(content) or 'none'})")
    name = next(
        (n for n in ("IQ_data", "iq", "IQ", "x", "signal") if n in arrays),
        max(arrays, key=lambda n: arrays[n].size),
    )
    return two_columns(arrays[name], f"{path}: {name}", index), fs


def read_sigmf(path: Path):
    """First channel of a SigMF recording (meta and data beside each other, or an archive) and its sampling
    rate."""
    try:
        import sigmf
    except ImportError as error:
        raise UserError(f"{path}: reading SigMF needs the package sigmf; pip install sigmf") from error
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    meta = path.with_suffix(".sigmf-meta") if path.suffix == ".sigmf-data" else path
    with reading(path, "SigMF recording (.sigmf-meta and .sigmf-data side by side)"):
        recording = sigmf.sigmffile.fromfile(str(meta))
        samples = recording.read_samples()
        rate = recording.get_global_field("core:sample_rate")
    if rate is not None and not (isinstance(rate, (int, float)) and rate > 0):
        raise UserError(f"{path}: core:sample_rate is {rate!r}, expected samples per second")
    if samples.ndim == 2:
        print(f"{path}: {samples.shape[1]} channels; the first is read")
        samples = samples[:, 0]
    iq = np.stack([samples.real, samples.imag], 1) if np.iscomplexobj(samples) else analytic(samples, path)
    return iq, None if rate is None else float(rate)


def windows(
    iq: np.ndarray, points: int, most: int = 16, below_db: float = 10.0
) -> list[tuple[int, np.ndarray]]:
    """Cut a capture into windows of `points`: (first sample, window), at most `most`, in order of time.

    Windows more than below_db weaker than the strongest are left out (a capture is mostly silence), then the
    strongest are taken. A capture shorter than one window is returned whole.
    """
    if len(iq) <= points:
        return [(0, iq)]
    starts = np.arange(0, len(iq) - points + 1, points)
    centred = iq - iq.mean(0)
    power = np.array([np.mean(centred[s : s + points] ** 2) for s in starts])
    kept = np.nonzero(power >= power.max() * 10 ** (-below_db / 10))[0]
    kept = np.sort(kept[np.argsort(-power[kept])[:most]])
    return [(int(starts[k]), iq[starts[k] : starts[k] + points]) for k in kept]
