"""Signals for pre-training: read once from any common format, kept on disk, cut into windows.

    files (WFDB, EDF, npz, npy, csv, HDF5) --read_records--> channels in physical units at their own rate
    --build_store--> one flat float32 file at the model's rate --PhysioSignalDataset--> windows

The store is memory-mapped, so memory does not grow with the number or the length of records. Pre-training,
fine-tuning and inference all read it: one resampling, one band-pass and one normalisation for the three of
them.

Upstream file: dataset.py (PhysioSignalDataset). Its pickles are read by convert_pickles.py only.
"""

import fcntl
import hashlib
import json
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from scipy.signal import butter, resample_poly, sosfiltfilt
from torch.utils.data import Dataset

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import atomic_dir
from common.errors import UserError
from common.files import reading
from common.run import progress

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".hea", ".edf", ".npz", ".npy", ".csv", ".h5", ".hdf5", ".ts")
RECORDS = np.dtype(
    [
        ("name", "S64"),
        ("subject", "S64"),
        ("channel", "S32"),
        ("source", "S256"),
        ("fs", "f8"),
        ("offset", "i8"),
        ("length", "i8"),
        ("std", "f4"),
    ]
)
EVENTS = np.dtype(
    [("record", "i4"), ("seconds", "f8"), ("symbol", "S16"), ("aux", "S16")]
)  # seconds -1: the whole record
PREFERRED = (
    "MLII",
    "II",
    "ECG",
    "PLETH",
    "PPG",
)  # --channel auto takes the first of these, else the first channel
NOT_SIGNALS = ("fs", "gain", "lead", "names", "subject", "units", "label")


@dataclass
class Record:
    """One recording. channels: {name: float array (L,)}; events: sample index, symbol and aux text, all of
    one length."""

    name: str
    source: Path
    fs: float
    channels: dict
    subject: str = ""
    events: list = field(default_factory=list)


def check_rate(fs, source, given=None) -> float:
    """The sampling rate in Hz: from the file, else `given` (--input-fs); UserError when absent, impossible or
    contradicted."""
    if fs is None and given is None:
        raise UserError(f"{source}: has no field fs; pass the sampling rate in Hz with --input-fs")
    if fs is not None and given is not None and abs(float(np.asarray(fs).reshape(-1)[0]) / given - 1) > 0.01:
        raise UserError(
            f"{source}: field fs is {float(np.asarray(fs).reshape(-1)[0]):g} Hz but --input-fs says "
            f"{given:g}; "
            "leave it out or mend the file"
        )
    try:
        rate = float(given if fs is None else np.asarray(fs).reshape(-1)[0])
    except (ValueError, IndexError):
        raise UserError(f"{source}: field fs is {fs!r}, expected a number in Hz") from None
    if not 0.1 <= rate <= 1e6:
        raise UserError(
            f"{source}: field fs is {rate:g} Hz, expected 0.1 to 1,000,000; mend the file or pass --input-fs"
        )
    return rate


def rows_of(array, name, source) -> dict:
    """{channel name: row} of an array (L,) or (channels, L)."""
    array = np.asarray(array)
    if array.ndim not in (1, 2) or array.dtype.kind not in "iuf" or not array.size:
        raise UserError(
            f"{source}: field {name} is {array.dtype} {array.shape}, expected numbers (L,) or (channels, L)"
        )
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        raise UserError(
            f"{source}: field {name} is {array.shape}, expected (channels, L) with fewer channels than "
            "samples; transpose it"
        )
    return {name: array} if array.ndim == 1 else {f"{name}{i}": row for i, row in enumerate(array)}


def read_wfdb(path: Path, fs=None) -> list[Record]:
    """A WFDB header (.hea) with its signal files and, where there is one, its .atr beat and rhythm
    annotations."""
    wfdb = extra("wfdb", path)
    stem = str(path.with_suffix(""))
    with reading(path, "WFDB record"):
        header = wfdb.rdheader(stem)
        record = wfdb.rdrecord(stem)
        atr = wfdb.rdann(stem, "atr") if path.with_suffix(".atr").is_file() else None
    channels = {str(name): record.p_signal[:, i] for i, name in enumerate(record.sig_name)}
    events = (
        []
        if atr is None
        else list(zip(atr.sample.tolist(), atr.symbol, (a.strip("\x00 ") for a in atr.aux_note)))
    )
    return [Record(path.stem, path, check_rate(header.fs, path, fs), channels, events=events)]


def read_edf(path: Path, fs=None) -> list[Record]:
    """An EDF or EDF+ file; channels of another rate than the first are left out and named."""
    edfio = extra("edfio", path)
    with reading(path, "EDF file"):
        edf = edfio.read_edf(path)
        rate = edf.signals[0].sampling_frequency
        channels = {s.label: s.data for s in edf.signals if s.sampling_frequency == rate}
    left_out = [s.label for s in edf.signals if s.sampling_frequency != rate]
    if left_out:
        print(f"{path}: channels of another rate left out: {', '.join(left_out)}", file=sys.stderr)
    code = getattr(edf.patient, "code", "X") if hasattr(edf, "patient") else "X"
    return [
        Record(path.stem, path, check_rate(rate, path, fs), channels, subject="" if code == "X" else code)
    ]


def read_npz(path: Path, fs=None) -> list[Record]:
    """npz: one record (`sig` or one array per channel, `fs`, optional gain, names, subject, ann_*) or a UCR
    set.

    A UCR set (x_train, y_train and perhaps x_test, y_test or y_test_<name>) gives a record per series, named
    train-0, test-0 ..., with one event whose symbol is the label and whose aux is the part. Its time axis
    counts as 1 Hz.
    """
    with reading(path, "npz file of plain arrays"), np.load(path) as file:
        data = {key: file[key] for key in file.files}
    if "x_train" in data:
        return ucr_records(path, data)
    gain = np.asarray(data.get("gain", 1.0))
    if gain.size != 1 or gain.dtype.kind not in "iuf" or not np.isfinite(gain).all() or not (gain > 0).all():
        raise UserError(f"{path}: field gain is {gain}, expected one number above 0, units per physical unit")
    gain = float(gain.reshape(()))
    if "sig" in data:
        channels = rows_of(data["sig"], "sig", path)
        names = [str(n) for n in np.atleast_1d(data["names"] if "names" in data else data.get("lead", "sig"))]
        channels = {names[i] if i < len(names) else key: row for i, (key, row) in enumerate(channels.items())}
    else:
        channels = {}
        for key, array in data.items():
            if key not in NOT_SIGNALS and not key.startswith(("ann_", "time")):
                channels |= rows_of(array, key, path)
    if not channels:
        raise UserError(
            f"{path}: holds no signal (fields: {', '.join(data) or 'none'}); expected sig, or one array per "
            "channel"
        )
    channels = {name: row / np.float32(gain) if gain != 1 else row for name, row in channels.items()}
    events = []
    if "ann_sample" in data:
        lengths = {key: len(data[key]) for key in ("ann_sample", "ann_symbol", "ann_aux") if key in data}
        if len(set(lengths.values())) > 1 or "ann_symbol" not in data:
            raise UserError(
                f"{path}: fields ann_* have lengths {lengths}, expected ann_sample and ann_symbol of one "
                "length"
            )
        if data["ann_sample"].dtype.kind not in "iu" or data["ann_sample"].ndim != 1:
            raise UserError(
                f"{path}: field ann_sample is {data['ann_sample'].dtype} {data['ann_sample'].shape}, "
                "expected whole numbers (beats,)"
            )
        aux = data["ann_aux"] if "ann_aux" in data else [""] * len(data["ann_sample"])
        events = list(zip(data["ann_sample"].tolist(), map(str, data["ann_symbol"]), map(str, aux)))
    if "label" in data:
        events.append((-1, str(data["label"]), ""))
    subject = str(data["subject"]) if "subject" in data else ""
    return [Record(path.stem, path, check_rate(data.get("fs"), path, fs), channels, subject, events)]


def ucr_records(path: Path, data: dict) -> list[Record]:
    """Records of a UCR set. Where the test labels are of another kind (y_test_abnormal), the same kind is
    used in training."""
    records = []
    kind = next((key[len("y_test") :] for key in data if key.startswith("y_test")), "")
    for part in ("train", "test"):
        if f"x_{part}" not in data:
            continue
        x, y = data[f"x_{part}"], data.get(f"y_{part}{kind}")
        if x.ndim != 2 or y is None or len(x) != len(y):
            raise UserError(
                f"{path}: fields x_{part} {x.shape} and y_{part}{kind} {getattr(y, 'shape', 'missing')} do "
                "not belong together"
            )
        records += [
            Record(f"{part}-{i}", path, 1.0, {"x": row}, f"{part}-{i}", [(-1, str(label), part)])
            for i, (row, label) in enumerate(zip(x, y))
        ]
    return records


def read_ts(path: Path, fs=None) -> list[Record]:
    """A UCR/UEA .ts file, univariate: `name_TRAIN.ts` or `name_TEST.ts`; lines `v1,v2,...:label` after
    @data."""
    lines, records = path.read_text(errors="replace").splitlines(), []
    part = "test" if path.stem.upper().endswith("TEST") else "train"
    start = next((i for i, line in enumerate(lines) if line.strip().lower() == "@data"), None)
    if start is None:
        raise UserError(f"{path}: has no @data line; expected the UCR .ts format")
    for number, line in enumerate(lines[start + 1 :], start + 2):
        if line.strip():
            values, _, label = line.strip().rpartition(":")
            try:
                row = np.array([float(v) for v in values.split(",")], np.float32)
            except ValueError:
                raise UserError(f"{path}: line {number}: not numbers with a label after a colon") from None
            records.append(
                Record(
                    f"{part}-{len(records)}",
                    path,
                    1.0,
                    {"x": row},
                    f"{part}-{len(records)}",
                    [(-1, label, part)],
                )
            )
    return records


def read_npy(path: Path, fs=None) -> list[Record]:
    """npy: (L,) or (channels, L), memory-mapped; the rate comes from --input-fs."""
    with reading(path, "npy file of plain numbers"):
        array = np.load(path, mmap_mode="r")
    return [Record(path.stem, path, check_rate(None, path, fs), rows_of(array, "sig", path))]


def read_csv(path: Path, fs=None) -> list[Record]:
    """csv: a header line with channel names, one sample a line; a column time, time_s or time_ms gives the
    rate."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        names = [name.strip() for name in file.readline().strip().split(",")]
    try:
        [float(name) for name in names]
        raise UserError(f"{path}: line 1 holds numbers; expected a header line with the channel names")
    except ValueError:
        pass
    try:
        table = np.genfromtxt(
            path, delimiter=",", skip_header=1, ndmin=2, dtype=np.float64, encoding="utf-8-sig"
        )
    except ValueError as error:
        raise UserError(
            f"{path}: lines do not all have {len(names)} columns ({' '.join(str(error).split())[:80]})"
        ) from error
    if table.shape[1] != len(names) or not len(table):
        raise UserError(
            f"{path}: header names {len(names)} columns, the data have {table.shape[1]} in {len(table)} lines"
        )
    columns, rate = dict(zip(names, table.T)), None
    for name, unit in (("time", 1.0), ("time_s", 1.0), ("time_ms", 1e-3)):
        if name in columns:
            steps = np.diff(columns.pop(name)) * unit
            if not len(steps) or not (
                np.isfinite(steps).all() and steps.min() > 0 and np.ptp(steps) < 0.5 * steps.mean()
            ):
                raise UserError(
                    f"{path}: column {name} does not rise evenly; resample it or drop the column and pass "
                    "--input-fs"
                )
            rate = 1 / steps.mean()
    if not columns:
        raise UserError(f"{path}: holds a time column but no channel")
    return [Record(path.stem, path, check_rate(rate, path, fs), columns)]


def read_hdf5(path: Path, fs=None) -> list[Record]:
    """HDF5: each data set (L,) or (channels, L) is a record, or a channel of its group; attribute fs on it,
    its group or the file."""
    import h5py

    records = {}

    def visit(name, item):
        if (
            not isinstance(item, h5py.Dataset)
            or item.ndim not in (1, 2)
            or item.dtype.kind not in "iuf"
            or item.shape[-1] < 2
        ):
            return
        group = item.parent
        rate = next((a["fs"] for a in (item.attrs, group.attrs, file.attrs) if "fs" in a), None)
        subject = next((str(a["subject"]) for a in (item.attrs, group.attrs) if "subject" in a), "")
        key = path.stem + (f":{group.name.strip('/')}" if group.name != "/" else "")
        record = records.setdefault(
            key, Record(key, path, check_rate(rate, f"{path}: {name}", fs), {}, subject)
        )
        record.channels |= rows_of(item[:], name.split("/")[-1], f"{path}: {name}")

    with reading(path, "HDF5 file"), h5py.File(path, "r") as file:
        file.visititems(visit)
    if not records:
        raise UserError(f"{path}: holds no data set of numbers (L,) or (channels, L)")
    return list(records.values())


READERS = {
    ".hea": read_wfdb,
    ".edf": read_edf,
    ".npz": read_npz,
    ".npy": read_npy,
    ".csv": read_csv,
    ".h5": read_hdf5,
    ".hdf5": read_hdf5,
    ".ts": read_ts,
}


def extra(module: str, path: Path):
    """Import a reader of one file format, or say which package to install."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{path}: reading it needs the package {module}; pip install {module}") from None


def read_records(path, fs=None) -> list[Record]:
    """All records of one file; UserError naming the file and the field when it cannot be used."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: unknown format {path.suffix!r}; known: {', '.join(SUFFIXES)}")
    return READERS[path.suffix.lower()](path, fs)


def find_files(sources) -> list[Path]:
    """Signal files of `sources` (files and folders, searched downwards), sorted."""
    paths = []
    for source in map(Path, sources):
        if source.is_dir():
            paths += sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif source.is_file():
            paths.append(source)
        else:
            raise UserError(f"{source}: no such file or folder; check --data")
    if not paths:
        raise UserError(f"{', '.join(map(str, sources))}: holds no signal file ({', '.join(SUFFIXES)})")
    return paths


@dataclass(frozen=True)
class Preprocess:
    """What turns a raw channel into the model's signal; stored in every checkpoint and used wherever it is
    run.

    fs: rate of the model in Hz; 0 keeps each file's own rate (series without a time unit). low_hz, high_hz:
    edges of a zero-phase Butterworth filter in Hz, 0 = none. channel: "auto", "all", a name or an index.
    """

    fs: float = 100.0
    low_hz: float = 0.5
    high_hz: float = 0.0
    channel: str = "auto"

    def signal(self, x, fs: float, where: str) -> np.ndarray:
        """Raw channel (L,) at `fs` Hz -> float32 (L',) at the model's rate. UserError naming `where` for NaN
        or a flat line."""
        x = np.asarray(x, np.float64)
        bad = ~np.isfinite(x)
        if bad.any():
            raise UserError(
                f"{where}: {bad.sum()} of {len(x)} samples are NaN or infinite, the first is sample "
                f"{bad.argmax()}; "
                "mend it or pass --skip-bad"
            )
        if np.ptp(x) <= 1e-9 * max(1.0, abs(x).max()):
            raise UserError(
                f"{where}: flat line, all {len(x)} samples are {x[0]:g}; check the electrode or pass "
                "--skip-bad"
            )
        rate = self.fs or fs
        if fs != rate:
            ratio = Fraction(rate / fs).limit_denominator(1000)
            x = resample_poly(x - x.mean(), ratio.numerator, ratio.denominator, padtype="line")
        edges = [edge for edge in (self.low_hz, min(self.high_hz, 0.49 * rate)) if 0 < edge < 0.5 * rate]
        if edges and len(x) > 30:
            kind = "bandpass" if len(edges) == 2 else "highpass" if self.low_hz else "lowpass"
            x = sosfiltfilt(
                butter(4 // len(edges), edges if len(edges) == 2 else edges[0], kind, fs=rate, output="sos"),
                x,
            )
        return x.astype(np.float32)

    @staticmethod
    def window(x: np.ndarray, length: int, lead: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """z-score of the samples there are, then padding: x (n,), n + lead <= length -> float32 (length,),
        bool (length,) True = real."""
        out, real = np.zeros(length, np.float32), np.zeros(length, bool)
        out[lead : lead + len(x)] = (x - x.mean()) / max(float(x.std()), 1e-6)
        real[lead : lead + len(x)] = True
        return out, real


def pick_channels(record: Record, channel: str) -> dict:
    """The channels that --channel asks for."""
    names = list(record.channels)
    if channel == "all":
        return record.channels
    if channel == "auto":
        channel = next((n for p in PREFERRED for n in names if n.upper() == p), names[0])
    if channel.isdigit() and channel not in names and int(channel) < len(names):
        channel = names[int(channel)]
    if channel not in names:
        raise UserError(f"{record.source}: has no channel {channel!r}; it has {', '.join(names)}")
    return {channel: record.channels[channel]}


class Store:
    """A folder of prepared signals, memory-mapped: samples.f32, records.npy (RECORDS), events.npy (EVENTS),
    about.json."""

    def __init__(self, folder):
        folder = Path(folder)
        self.folder, self.about = folder, json.loads((folder / "about.json").read_text())
        self.prepare = Preprocess(**self.about["preprocess"])
        self.records = np.load(folder / "records.npy", mmap_mode="r")
        self.events = np.load(folder / "events.npy", mmap_mode="r")
        self.samples = np.memmap(folder / "samples.f32", np.float32, "r")

    def __getstate__(self):
        return self.folder  # a loader worker maps the files itself

    def __setstate__(self, folder):
        self.__init__(folder)

    def signal(self, index: int) -> np.ndarray:
        """The whole signal of one record, float32 (length,), a view of the map."""
        row = self.records[index]
        return self.samples[int(row["offset"]) : int(row["offset"] + row["length"])]

    def hours(self, rows) -> float:
        """Duration of the records `rows`, hours (samples / 3600 for series without a time unit)."""
        return float(self.records["length"][rows].sum() / (self.prepare.fs or 1.0) / 3600)

    def where(self, index: int) -> str:
        """File, record and channel of one record, for messages."""
        row = self.records[index]
        return f"{row['source'].decode()} record {row['name'].decode()} channel {row['channel'].decode()}"


def build_store(
    sources,
    prepare: Preprocess,
    cache=None,
    fs=None,
    part=None,
    min_seconds: float = 0.0,
    skip_bad: bool = False,
    quiet: bool = False,
) -> Store:
    """Read, check and resample every signal under `sources` once; later calls with unchanged files reuse the
    result.

    part: "train" leaves out the test series of UCR sets (pre-training must not see them). min_seconds:
    shortest usable record (samples for series without a time unit). skip_bad: leave bad records out instead
    of stopping; named and counted on the screen unless quiet.
    """
    paths = find_files(sources)
    cache = Path(cache) if cache else ROOT / "data" / "cwt_mae" / "cache"
    parts = [
        part for p in paths for part in (sorted(p.parent.glob(f"{p.stem}.*")) if p.suffix == ".hea" else [p])
    ]  # with .dat and .atr
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in parts]
    request = {
        "preprocess": vars(prepare),
        "fs": fs,
        "part": part,
        "min_seconds": min_seconds,
        "skip_bad": skip_bad,
        "version": 1,
    }
    key = hashlib.sha256(json.dumps([request, stats], sort_keys=True).encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with open(
        cache / f"{key}.lock", "w"
    ) as lock:  # several runs that start together: one makes it, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / key / "about.json").is_file():
            with atomic_dir(cache / key) as folder:
                _fill(folder, paths, request, prepare)
    store = Store(cache / key)
    skipped = [] if quiet else store.about["skipped"]
    for line in skipped[:5]:
        print(f"skipped: {line}", file=sys.stderr)
    if skipped:
        print(f"skipped {len(skipped)} bad records, kept {len(store.records)}", file=sys.stderr)
    return store


def _fill(folder: Path, paths, request: dict, prepare: Preprocess):
    """Write one store: samples go to disk record by record."""
    rows, events, skipped, offset = [], [], [], 0
    with open(folder / "samples.f32", "wb") as out:
        for path in progress(paths, desc="reading signals", unit="file"):
            try:
                found = read_records(path, request["fs"])
            except UserError as error:
                if not request["skip_bad"]:
                    raise
                skipped.append(str(error).rsplit("; ", 1)[0])  # without the advice
                continue
            for record in found:
                if request["part"] and any(
                    aux not in ("", request["part"]) for sample, _, aux in record.events if sample == -1
                ):
                    continue
                try:
                    usable = check_record(record, request["min_seconds"])
                    signals = {
                        name: prepare.signal(x, usable.fs, f"{path}: record {record.name} channel {name}")
                        for name, x in pick_channels(record, prepare.channel).items()
                    }
                except UserError as error:
                    if not request["skip_bad"]:
                        raise
                    skipped.append(str(error).rsplit("; ", 1)[0])  # without the advice
                    continue
                for name, x in signals.items():
                    rows.append(
                        (
                            record.name,
                            record.subject or record.name,
                            name,
                            str(path),
                            record.fs,
                            offset,
                            len(x),
                            x.std(),
                        )
                    )
                    events += [
                        (len(rows) - 1, s if s < 0 else s / record.fs, symbol, aux)
                        for s, symbol, aux in record.events
                    ]
                    out.write(x.tobytes())
                    offset += len(x)
    if not rows:
        raise UserError(
            f"no usable record among {len(paths)} files; the first problem: "
            f"{skipped[0] if skipped else 'no training part'}"
        )
    np.save(
        folder / "records.npy",
        np.array(
            [tuple(v.encode()[:256] if isinstance(v, str) else v for v in row) for row in rows], RECORDS
        ),
    )
    np.save(
        folder / "events.npy", np.array([(r, s, a.encode(), b.encode()) for r, s, a, b in events], EVENTS)
    )
    (folder / "about.json").write_text(
        json.dumps({**request, "skipped": skipped, "files": len(paths)}, indent=1)
    )


def check_record(record: Record, min_seconds: float) -> Record:
    """The record, if it is long enough and its annotations lie inside it."""
    length = min(len(x) for x in record.channels.values())
    if length < max(8, min_seconds * record.fs):
        needed = f"--min-seconds {min_seconds:g} asks for more" if min_seconds else "at least 8 are needed"
        raise UserError(
            f"{record.source}: record {record.name} is too short: {length} samples ({length / record.fs:.2f} "
            f"s at {record.fs:g} Hz), {needed}; leave it out or pass --skip-bad"
        )
    last = max((sample for sample, _, _ in record.events), default=0)
    if last >= length or any(sample < -1 for sample, _, _ in record.events):
        raise UserError(
            f"{record.source}: field ann_sample reaches {last} but record {record.name} has {length} "
            "samples; is the rate wrong?"
        )
    return record


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample of one epoch: the same on every machine, process and loader worker."""
    return np.random.default_rng((seed, epoch, index))


class PhysioSignalDataset(Dataset):
    """Windows of `signal_len` samples for pre-training. An item is a pure function of (seed, epoch, index):

        x, real   signal float32 (signal_len,), z-scored, and bool, False = padding
        noise     float32 (num_patches,) in [0, 1), which decides the masks; num_patches = 0: empty
        name      "record@first sample"

    An epoch holds every record ceil(length / signal_len) times, at random places in "train" mode and side by
    side in "test" mode; `windows` > 0 fixes the size of the epoch instead. rows: indices of the records that
    are used; all by default.
    """

    def __init__(
        self,
        store: Store,
        signal_len: int = 3000,
        mode: str = "train",
        seed: int = 0,
        num_patches: int = 0,
        windows: int = 0,
        rows=None,
    ):
        self.store, self.signal_len, self.mode, self.seed = store, signal_len, mode, seed
        self.num_patches, self.windows, self.epoch = num_patches, windows, 0
        self.rows = np.arange(len(store.records)) if rows is None else rows
        self.ends = np.cumsum(-(-store.records["length"][self.rows] // signal_len))

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self):
        return self.windows or int(self.ends[-1])

    def __getitem__(self, index):
        train = self.mode == "train"
        rng = sample_rng(self.seed, self.epoch if train else 0, index)
        window = int(rng.integers(self.ends[-1])) if self.windows else index
        place = int(np.searchsorted(self.ends, window, side="right"))
        first = int(self.ends[place - 1]) if place else 0
        signal, row = self.store.signal(self.rows[place]), self.store.records[self.rows[place]]
        room = max(
            0, len(signal) - self.signal_len
        )  # the last start that still fills the window; upstream misses it
        for _ in range(20):  # a lead that came off for a while: another place of this record
            start = int(rng.integers(room + 1)) if train else min((window - first) * self.signal_len, room)
            cut = signal[start : start + self.signal_len]
            if not train or cut.std() > 1e-4 * row["std"]:
                break
        x, real = self.store.prepare.window(cut, self.signal_len)
        return {
            "x": torch.from_numpy(x),
            "real": torch.from_numpy(real),
            "noise": torch.from_numpy(rng.random(self.num_patches, np.float32)),
            "name": f"{row['name'].decode()}@{start}",
        }
