"""Signals for pre-training: read once from any common format, kept on disk, cut into windows.

    files --layouts.py--> names and subjects --readers.py--> recordings: channels at their own rates
    --build_store--> flat float32 files at the model's rate, cut at gaps --PhysioSignalDataset--> windows

The store is memory-mapped, so memory does not grow with the number or the length of records. Pre-training,
fine-tuning and inference all read it: one resampling, one band-pass and one normalisation for the three of
them.

Upstream file: dataset.py (PhysioSignalDataset). Its pickles are read by convert_pickles.py only.
"""

import bisect
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from scipy.signal import butter, firwin, resample_poly, sosfilt, sosfilt_zi
from torch.utils.data import Dataset

from common.checkpoint import atomic_dir
from common.errors import UserError, write_problem
from common.files import cores, inside, reading
from common.index import expand, fingerprint, in_parallel, only_one, scan, tar_members
from common.run import on_main
from cwt_mae.layouts import SUFFIXES, Found, find_recordings, hypnogram_of, name_of, of_store, tell
from cwt_mae.readers import (
    edf_events,
    extra,
    read_arff,
    read_dicom,
    read_edf,
    read_hdf5,
    read_npy,
    read_npz,
    read_ts,
    read_wfdb,
)
from cwt_mae.recording import Recording
from cwt_mae.tables import read_table as read_csv
from cwt_mae.text import read_text

ROOT = Path(__file__).resolve().parents[1]
SHARD = 1000  # files of signals in one shard of a store, at most
BYTES = 1 << 28  # of their bytes, about
# The code that turns files into a store: where it has changed, they are read again. Its text is taken at the
# import, because what is edited later does not run.
CODE = ("dataset.py", "layouts.py", "readers.py", "recording.py", "tables.py", "text.py")
EDITION = fingerprint((), [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in CODE])
DAY = 86400.0  # seconds over which resampling keeps every sample in its place


def read_records(path, fs=None, annotator: str = "") -> list[Recording]:
    """All recordings of one file; UserError naming the file and the field when it cannot be used.

    fs: rate in Hz of a file that does not state it. annotator: suffix of the annotation file of WFDB records.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown format {path.suffix!r}; known: {', '.join(SUFFIXES)}")
    if suffix in (".hea", ".tar"):
        return list(READERS[suffix](path, fs, annotator))
    records = READERS[suffix](path, fs)
    if (stages := hypnogram_of(path)) is not None:
        with reading(stages, "EDF file"):
            records[0].events += edf_events(extra("edfio", stages).read_edf(stages))
    return records


def tar_records(path: Path, fs=None, annotator: str = "", usable=lambda work, *what: work(*what)):
    """Yield the recordings of a tar shard in the form of WebDataset, one file after the other: signal files
    of any of these formats, and for each, if there is one, a file of the same name with .cls instead of its
    suffix, which holds the label.

    Who a recording belongs to does not depend on the shard: the folder of a person in the shard, or its name.
    usable: calls the reader of one file, or leaves out what it raises.
    """

    def told(work, *what):
        """work(*what), whose errors and remarks tell of the shard, not of the folder."""
        rename = lambda text: str(text).replace(f"{folder}/", f"{path}: ").replace(folder, str(path))
        screen = sys.stderr
        with contextlib.redirect_stderr(io.StringIO()) as remarks:
            try:
                return work(*what)
            except UserError as error:
                raise UserError(rename(error)) from None
            finally:
                screen.write(rename(remarks.getvalue()))

    def read(file: Path) -> list[Recording]:
        records, label = read_records(file, fs, annotator), file.with_suffix(".cls")
        if label.is_file():
            text = read_text(label).strip()
            for record in records:
                record.labels = {"": [text]}
        return records

    with tempfile.TemporaryDirectory() as folder:
        told(unpack, path, folder)
        found = told(find_recordings, [folder])
        for file, name in found.files:
            for record in usable(told, read, file) or []:
                record = found.describe(record, name)
                record.name, record.source = f"{path.stem}/{record.name}", path
                yield record


def unpack(path: Path, folder: str):
    """Write the files of a tar below `folder`."""
    with open(path, "rb") as archive:
        for name, first, size in tar_members(path):
            place = inside(folder, name)
            archive.seek(first)
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with open(place, "wb") as file:
                    while size and (block := archive.read(min(size, 1 << 20))):
                        file.write(block)
                        size -= len(block)
            except OSError as error:
                if write_problem(error):
                    raise
                raise UserError(f"{path}: {name} cannot be unpacked ({error.strerror})") from error


READERS = {".hea": read_wfdb, ".dcm": read_dicom, ".npz": read_npz, ".npy": read_npy, ".tar": tar_records}
READERS |= {".ts": read_ts, ".arff": read_arff} | dict.fromkeys((".edf", ".bdf"), read_edf)
READERS |= dict.fromkeys((".csv", ".tsv"), read_csv) | dict.fromkeys((".h5", ".hdf5"), read_hdf5)
assert set(READERS) == set(SUFFIXES), "a format stands in SUFFIXES of layouts.py and in READERS of dataset.py"


@dataclass(frozen=True)
class Preprocess:
    """What turns a raw channel into the model's signal; stored in every checkpoint and used wherever it is
    run.

    fs: rate of the model in Hz; 0 keeps each file's own rate (series without a time unit). low_hz, high_hz:
    edges of a zero-phase Butterworth filter in Hz, 0 = none. channel: "auto", "all", a name or an index; or
    several names with commas between them, the leads of a model of several leads.
    """

    fs: float = 100.0
    low_hz: float = 0.5
    high_hz: float = 0.0
    channel: str = "auto"

    def __post_init__(self):
        top = min(filter(None, (self.high_hz, self.fs / 2)), default=np.inf)
        if 0 < top <= self.low_hz:
            raise UserError(
                f"--low-hz {self.low_hz:g} leaves nothing of a signal that ends at {top:g} Hz (--high-hz, or "
                "half of --model-fs); lower it"
            )

    @property
    def leads(self) -> list[str]:
        """Names of the leads of a model of several leads, else []."""
        return [name.strip() for name in self.channel.split(",")] if "," in self.channel else []

    def least(self, fs: float) -> float:
        """Samples of the shortest usable run at `fs` Hz: 8 of them, which give 2 at the model's rate."""
        return max(8, 2 * fs / (self.fs or fs))

    def signal(self, x, fs: float, where: str) -> np.ndarray:
        """Raw channel (L,) at `fs` Hz -> float32 (L',) at the model's rate. UserError naming `where` for NaN
        or a flat line."""
        self.check(x, where)
        return self.filtered(x, fs)

    @staticmethod
    def check(x, where: str):
        """UserError naming `where` for NaN or a flat line."""
        x = np.asarray(x)
        bad = ~np.isfinite(x)
        if bad.any():
            raise UserError(
                f"{where}: {bad.sum()} of {len(x)} samples are NaN or infinite, the first is sample "
                f"{bad.argmax()}; mend it or pass --skip-bad"
            )
        if is_flat(x):
            raise UserError(
                f"{where}: flat line, all {len(x)} samples are {float(x[0]):g}; check the electrode or pass "
                "--skip-bad"
            )

    def filtered(self, x, fs: float, mean=None) -> np.ndarray:
        """`signal` without its checks. mean: of the whole that x is a piece of."""
        rate = self.fs or fs
        x = resampled(np.asarray(x, np.float64), fs, rate, mean)
        edges = [edge for edge in (self.low_hz, min(self.high_hz, 0.49 * rate)) if 0 < edge < 0.5 * rate]
        if edges and len(x) > 30:
            kind = "bandpass" if len(edges) == 2 else "highpass" if edges == [self.low_hz] else "lowpass"
            x = filtered_both_ways(x, *sections_of(rate, kind, *edges))
        return x.astype(np.float32)

    def pieces(self, x, fs: float, where: str, seconds: float = 1800.0):
        """Yield `signal` in pieces of about `seconds`, so that a day needs little memory. Each is filtered
        with so much of its neighbours that nobody sees where it was cut; a signal whose mean is left in, or
        whose rate fits no piece, comes as a whole."""
        ratio = ratio_of(fs, self.fs or fs)
        margin = 30 / self.low_hz if self.low_hz else np.inf
        step, beside = (
            int(t * fs) // ratio.denominator * ratio.denominator if np.isfinite(t) else 0
            for t in (seconds, margin)
        )
        if not self.low_hz or not step or not beside or len(x) < 2 * step:
            yield self.signal(x, fs, where)
            return
        self.check(x, where)
        mean = np.mean(x, dtype=np.float64)
        for first in range(0, len(x), step):
            begin, end = max(0, first - beside), min(len(x), first + step + beside)
            found = self.filtered(x[begin:end], fs, mean)
            skip = int((first - begin) * ratio)
            last = len(found) if first + step >= len(x) else skip + int(step * ratio)
            yield found[skip:last]

    @staticmethod
    def window(x: np.ndarray, length: int, lead: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """z-score of the samples there are, then padding: x (n,), n + lead <= length -> float32 (length,),
        bool (length,) True = real."""
        out, real = np.zeros(length, np.float32), np.zeros(length, bool)
        out[lead : lead + len(x)] = (x - x.mean()) / max(float(x.std()), 1e-6)
        real[lead : lead + len(x)] = True
        return out, real


def is_flat(x: np.ndarray) -> bool:
    """Whether x (L,) is one value throughout."""
    low, high = float(x.min()), float(x.max())
    return high - low <= 1e-9 * max(1.0, abs(low), abs(high))


@functools.lru_cache(1024)
def ratio_of(fs: float, rate: float) -> Fraction:
    """rate / fs as the simplest fraction that is off by less than a tenth of a sample in a day."""
    exact = Fraction(rate) / Fraction(fs)
    error = Fraction(0.1) / (Fraction(max(rate, fs)) * int(DAY)) * exact
    limit = 1
    while abs((found := exact.limit_denominator(limit)) - exact) > error or found == 0:
        limit *= 2
    return found


def resampled(x: np.ndarray, fs: float, rate: float, mean=None) -> np.ndarray:
    """x (L,) at `fs` Hz, less its mean -> at `rate` Hz, by a polyphase filter; sample k of the result lies at
    k / rate seconds."""
    ratio = ratio_of(fs, rate)
    if ratio == 1:
        return x
    up, down = ratio.numerator, ratio.denominator
    mean = x.mean() if mean is None else mean
    return resample_poly(x - mean, up, down, window=low_pass(max(up, down)), padtype="line")


@functools.lru_cache(8)
def sections_of(rate: float, kind: str, *edges: float) -> tuple[np.ndarray, np.ndarray]:
    """Second-order sections (n, 6) of a Butterworth filter, and their state at rest (n, 2); rate and edges in
    Hz."""
    sections = butter(4 // len(edges), edges if len(edges) == 2 else edges[0], kind, fs=rate, output="sos")
    return sections, sosfilt_zi(sections)


def filtered_both_ways(x: np.ndarray, sections: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """`scipy.signal.sosfiltfilt(sections, x)` to the bit, which would work the state at rest out anew for
    each signal: of a short one that takes longer than the filter."""
    edge = 3 * (2 * len(sections) + 1)
    x = np.concatenate([2 * x[0] - x[edge:0:-1], x, 2 * x[-1] - x[-2 : -edge - 2 : -1]])
    for _ in range(2):
        x = sosfilt(sections, x, zi=rest * x[0])[0][::-1]
    return x[edge:-edge]


@functools.lru_cache(8)
def low_pass(largest: int) -> np.ndarray:
    """The filter that `scipy.signal.resample_poly` makes for itself, kept: for rates that are nearly equal it
    has a million taps."""
    return firwin(20 * largest + 1, 1 / largest, window=("kaiser", 5.0))


def lay(samples: np.ndarray, place: int, x: np.ndarray, real: np.ndarray):
    """Write `samples` into x (length,) from `place` on, as far as they fall into it; real (length,) marks
    them."""
    begin, end = max(0, place), min(len(x), place + len(samples))
    if begin < end:
        x[begin:end] = samples[begin - place : end - place]
        real[begin:end] = True


def standardised_leads(x: np.ndarray, real: np.ndarray) -> np.ndarray:
    """x (M, length), each lead with mean 0 and deviation 1 over its real samples, and 0 elsewhere."""
    for lead in np.flatnonzero(real.any(1)):
        cut = x[lead, real[lead]]
        x[lead, real[lead]] = (cut - cut.mean()) / max(float(cut.std()), 1e-6)
    return np.where(real, x, np.float32(0))


LEAD = re.compile(
    r"(?i)^(?:ECG|EKG)?[ _-]*(?:LEAD)?[ _-]*(ML?I{1,3}|I{1,3}|AV[RLF]|V[1-9]?|MV[1-9]|MCL[1-6])$"
)
ECG = re.compile(r"(?i)(?<![a-z])(?:ECG|EKG)(?![a-z])|^(?:ECG|EKG)")
PULSE = re.compile(r"(?i)(?<![a-z])(?:PLETH|PPG|BVP)")


def lead_of(name: str) -> str:
    """The ECG lead that a channel's name states, "ECG II" -> "II"; "" if none."""
    found = LEAD.match(name.split("#")[0].strip())
    return found[1].upper() if found else ""


def preferred(names: list[str]) -> str:
    """The channel that --channel auto takes: MLII or II, else another ECG, else a pulse wave, else an ECG
    lead, else the first."""
    tests = (
        lambda n: lead_of(n) == "MLII",
        lambda n: lead_of(n) == "II",
        lambda n: bool(ECG.search(n)),
        lambda n: bool(PULSE.search(n)),
        lambda n: bool(lead_of(n)),
    )
    return next((n for test in tests for n in names if test(n)), names[0])


def find_channel(record: Recording, channel: str) -> str | None:
    """Name of the channel that a name, in any case and with or without "ECG ", or an index means; None if
    there is none."""
    names = list(record.channels)
    if channel in names:
        return channel
    if channel.isdigit() and int(channel) < len(names):
        return names[int(channel)]
    same = [n for n in names if n.lower() == channel.lower()]
    same += [n for n in names if lead_of(n) and lead_of(n) == (lead_of(channel) or channel.upper())]
    return next(iter(same), None)


def pick_channels(record: Recording, channel: str) -> dict:
    """The channels that --channel asks for."""
    if channel == "all":
        return record.channels
    if "," in channel:
        named = [name.strip() for name in channel.split(",")]
        found = {name: find_channel(record, name) for name in named}
        if not any(found.values()):
            raise UserError(
                f"{record.source}: has none of the leads {channel}; it has {', '.join(record.channels)}"
            )
        return {name: record.channels[own] for name, own in found.items() if own}
    name = preferred(list(record.channels)) if channel == "auto" else find_channel(record, channel)
    if name is None:
        raise UserError(f"{record.source}: has no channel {channel!r}; it has {', '.join(record.channels)}")
    return {name: record.channels[name]}


class Store:
    """Prepared signals, memory-mapped: a folder of records.npy, events.npy, labels.npy and about.json, beside
    the shards that hold the samples (SHARD files of signals each).

    records: one row for each channel and gapless run of a recording: name, subject, part, channel, source,
        fs (the file's), start (second of the run on the recording's clock), recording (its number), shard,
        offset (in the shard, samples), length, std.
    events: record (a row), seconds (from the run's start), duration, symbol, aux. labels: record, level,
        label.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.folder, self.about = folder, json.loads((folder / "about.json").read_text())
        self.prepare = Preprocess(**self.about["preprocess"])
        self.records = np.load(folder / "records.npy", mmap_mode="r")
        self.events = np.load(folder / "events.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy", mmap_mode="r")
        self.shards, self._anchors = {}, None

    def __getstate__(self):
        return self.folder  # a loader worker maps the files itself

    def __setstate__(self, folder):
        self.__init__(folder)

    def signal(self, index: int) -> np.ndarray:
        """The whole signal of one record, float32 (length,), a view of the map."""
        row = self.records[index]
        shard = int(row["shard"])
        if shard not in self.shards:
            file = self.folder.parent / self.about["shards"][shard] / "samples.f32"
            self.shards[shard] = np.memmap(file, np.float32, "r")
        return self.shards[shard][int(row["offset"]) : int(row["offset"] + row["length"])]

    @property
    def anchors(self) -> np.ndarray:
        """Rows that windows are counted on: all of them, or of several leads the rows of that one in each
        recording that has most samples."""
        if self._anchors is None:
            self._anchors = np.arange(len(self.records))
            if self.prepare.leads:
                chosen, channels, lengths = [], self.records["channel"], self.records["length"]
                # The rows of a recording stand together.
                edges = np.flatnonzero(np.diff(self.records["recording"], prepend=-1, append=-1))
                for first, last in zip(edges[:-1].tolist(), edges[1:].tolist()):
                    names, sums = channels[first:last], {}
                    for name, length in zip(names, lengths[first:last]):
                        sums[name] = sums.get(name, 0) + int(length)
                    chosen += (first + np.flatnonzero(names == max(sums, key=sums.get))).tolist()
                self._anchors = np.array(chosen)
        return self._anchors

    def leads(self, index: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The window of all leads at sample `start` of the row `index`: float32 (M, length), each lead
        z-scored over what there is of it, and bool, True = real. A missing lead is 0 and not real."""
        row, rate, names = self.records[index], self.rate(index), self.prepare.leads
        x, real = np.zeros((len(names), length), np.float32), np.zeros((len(names), length), bool)
        first = int(index)
        while first and self.records["recording"][first - 1] == row["recording"]:
            first -= 1
        for other in itertools.count(first):
            if other == len(self.records) or self.records["recording"][other] != row["recording"]:
                break
            lead = names.index(self.records["channel"][other].decode())
            # Where the other row's first sample lies in this window
            place = round((float(self.records["start"][other]) - float(row["start"])) * rate) - start
            lay(self.signal(other), place, x[lead], real[lead])
        return standardised_leads(x, real), real

    def recordings(self, items) -> np.ndarray:
        """The number of the recording that each window of `items` lies in: several channels, and gaps, make
        several rows of one recording."""
        return self.records["recording"][items["record"]]

    def rate(self, index: int) -> float:
        """Samples a second of one record's signal here; 1 for series without a time unit."""
        return self.prepare.fs or float(self.records[index]["fs"])

    def hours(self, rows) -> float:
        """Duration of the records `rows`, hours (samples / 3600 for series without a time unit)."""
        rates = self.prepare.fs or self.records["fs"][rows]
        return float((self.records["length"][rows] / rates).sum() / 3600)

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
    manifest=None,
    annotator: str = "",
) -> Store:
    """Read, check and resample every signal under `sources` once; later calls with unchanged files and
    readers reuse the result.

    part: "train" leaves out the recordings that files or tables put into another part (pre-training must not
    see them). min_seconds: shortest usable run without a gap (samples for series without a time unit).
    skip_bad: leave bad records out instead of stopping; named and counted on the screen unless quiet.
    manifest: csv of subjects, folds, rates and labels (layouts.read_manifest). annotator: see `read_records`.
    """
    cache = Path(cache) if cache else ROOT / "data" / "cwt_mae" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    request = dict(preprocess=vars(prepare), fs=fs, part=part, min_seconds=min_seconds, skip_bad=skip_bad)
    request |= dict(annotator=annotator, code=EDITION)
    for source in sources:  # in the words that the user gave
        if not any(map(os.path.exists, expand([source]))):
            raise UserError(f"{source}: no such file or folder; check --data")
    listed = scan([*sources, *beside(sources)], ("",))
    tables = scan([manifest], ("",), "--manifest") if manifest else []  # whatever it is called
    asked = [request, sorted(map(os.path.abspath, sources)), bool(manifest)]
    key = fingerprint([*that_matter(listed), *tables], asked)
    with only_one(cache / key):  # several runs that start together: one makes it, the others wait
        if not (cache / key / "about.json").is_file():
            found = find_recordings(sources, manifest)
            if annotator and not any(path.suffix.lower() == ".hea" for path, _ in found.files):
                raise UserError("--annotator has no effect without WFDB records; leave it out")
            fill(cache / key, found, listed, request, prepare)
    store = Store(cache / key)
    if not quiet:
        tell(store.about["notes"])
        skipped = store.about["skipped"]
        tell([f"skipped: {line}" for line in skipped[:5]])
        if skipped:
            names = len(set(store.records["name"].tolist()))
            tell([f"skipped {len(skipped)} bad records, kept {names}"])
    return store


def read_store(args, prepare: Preprocess, accelerator, part=None, min_seconds: float = 0.0) -> Store:
    """The store of --data that the options of `layouts.add_file_arguments` ask for: one process reads the
    files and tells what it skipped, the others map what it wrote."""

    def load(quiet=False):
        about = (part, min_seconds, args.skip_bad, quiet, args.manifest, args.annotator)
        return build_store(args.data, prepare, args.cache, args.input_fs, *about)

    on_main(accelerator, load)
    return load(quiet=True)


def beside(sources) -> list[str]:
    """Files that are read with those that `sources` name one by one: the folder of a WFDB header, and
    the stages of a Sleep-EDF recording."""
    alone = [Path(source) for source in expand(sources) if os.path.isfile(source)]
    folders = {path.parent for path in alone if path.suffix.lower() == ".hea"}
    names = [folder / name for folder in folders for name in os.listdir(folder) if name[0] != "."]
    stages = [stages for path in alone if (stages := hypnogram_of(path)) is not None]
    return [str(path) for path in (*names, *stages) if path.is_file()]


def that_matter(listed: list) -> list:
    """Of all files, those that recordings can be read from: signals and tables, and what lies beside a WFDB
    header."""
    folders = {file.path.rpartition("/")[0] for file in listed if file.path.lower().endswith(".hea")}
    known = tuple(SUFFIXES)
    matter = [f for f in listed if f.path.lower().endswith(known) or f.path.rpartition("/")[0] in folders]
    return [file for file in matter if not (file.path.endswith(".npy") and of_store(Path(file.path)))]


def fill(folder: Path, found: Found, listed: list, request: dict, prepare: Preprocess):
    """Read the files of `found`, a shard at a time on all cores, and write the store `folder`. Shards whose
    files have not changed are taken as they are."""
    keys, tasks = sorted(found.about), []
    for files, parts in shards_of(found.files, listed):
        about = {}
        for _, name in files:  # what the tables say of these files and of the recordings in them
            plain = name_of(name)
            place = bisect.bisect_left(keys, plain)
            while place < len(keys) and keys[place].startswith(plain):
                about[keys[place]] = found.about[keys[place]]
                place += 1
        rates = {name: found.rates[name] for _, name in files if name in found.rates}
        words = [request, files, rates, sorted((name, vars(value)) for name, value in about.items())]
        key = f"shard-{fingerprint(parts, words)}"
        tasks.append((folder.parent / key, request, prepare, Found(files, about, found.manifest, rates)))
    shards = list(in_parallel(fill_shard, tasks, cores(), "reading signals, in shards"))
    join(folder, shards, found, request, prepare)


def fill_shard(task) -> Path:
    """Read the files of one shard and write its folder, unless it is there; returns the folder."""
    folder, request, prepare, found = task
    with only_one(folder):
        if not (folder / "about.json").is_file():
            with atomic_dir(folder) as temporary:
                Filling(temporary, request, prepare).fill(found)
    return folder


def join(folder: Path, shards: list[Path], found: Found, request: dict, prepare: Preprocess):
    """Write the store `folder`: the tables of its shards one after the other, with rows and recordings
    counted through."""
    tables, abouts = {"records": [], "events": [], "labels": []}, []
    rows = recordings = 0
    for number, shard in enumerate(shards):
        parts = {name: np.load(shard / f"{name}.npy") for name in tables}
        parts["records"]["shard"] = number
        parts["records"]["recording"] += recordings
        for name in ("events", "labels"):
            parts[name]["record"] += rows
        for name, part in parts.items():
            tables[name].append(part)
        abouts.append(json.loads((shard / "about.json").read_text()))
        rows, recordings = rows + len(parts["records"]), recordings + abouts[-1]["recordings"]
    skipped = [line for about in abouts for line in about["skipped"]]
    if not rows:
        raise UserError(
            f"no usable record among {len(found.files)} files; the first problem: "
            f"{skipped[0] if skipped else 'no training part'}"
        )
    about = {
        **request,
        "shards": [shard.name for shard in shards],
        "skipped": skipped,
        "files": len(found.files),
        "lost": sum_of([about["lost"] for about in abouts]),
        "notes": found.notes + notes_of(abouts, prepare),
    }
    with atomic_dir(folder) as temporary:
        for name, parts in tables.items():
            np.save(temporary / f"{name}.npy", np.concatenate(parts))
        (temporary / "about.json").write_text(json.dumps(about, indent=1))


def sum_of(counts: list[dict]) -> dict:
    """Dictionaries of numbers, added up name by name."""
    return {name: sum(c.get(name, 0) for c in counts) for name in dict.fromkeys(k for c in counts for k in c)}


def notes_of(abouts: list[dict], prepare: Preprocess) -> list[str]:
    """What was left out or chosen, in words."""
    notes, lost = [], sum_of([about["lost"] for about in abouts])
    counts = sum_of([about["chosen"] for about in abouts])
    if lost["samples"]:
        notes.append(
            f"left out {lost['samples']} samples ({lost['seconds']:.1f} s) in gaps and short or flat runs "
            f"of {lost['channels']} channels; cut there into {sum(counts.values())} runs"
        )
    if late := sum(about["late"] for about in abouts):
        notes.append(f"left out {late} remarks that lie outside of their recordings")
    if slow := sum(about.get("slow", 0) for about in abouts):
        notes.append(
            f"{slow} channels have less than a fifth of the model's {prepare.fs:g} samples a second: is a "
            "rate wrong? (A series without a time unit counts 1 Hz; its model is trained with --model-fs 0)"
        )
    if prepare.channel == "auto" and not all(ECG.search(c) or PULSE.search(c) or lead_of(c) for c in counts):
        words = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:8])
        if set(counts) - {"x", "sig"}:
            notes.append(f"--channel auto took {words}; name another with --channel")
    return notes


def shards_of(files: list, listed: list):
    """Yield (files, everything that they are read from, as `scan` lists it) of one shard after the other:
    SHARD files or about BYTES bytes, whichever comes first."""
    known, names = {file.path: file for file in listed}, {}
    for place in known:
        folder, _, name = place.rpartition("/")
        names.setdefault(folder, []).append(name)
    places = [files_of(Path(os.path.abspath(path)), names) for path, _ in files]
    # What no record's name claims may be a segment of one: a change there counts for all of the folder.
    free, others = known.keys() - itertools.chain(*places), {}
    for place in sorted(free):
        others.setdefault(place.rpartition("/")[0], []).append(known[place])
    shard, parts, size = [], {}, 0
    for (path, name), own in zip(files, places):
        own = [known.get(place) or scan([place], ("",))[0] for place in own]
        more = sum(file.size for file in own)
        if shard and (len(shard) == SHARD or size + more > BYTES):
            yield shard, list(parts)
            shard, parts, size = [], {}, 0
        shard.append((path, name))
        parts |= dict.fromkeys(own)
        if path.suffix.lower() == ".hea":
            parts |= dict.fromkeys(others.get(own[0].path.rpartition("/")[0], ()))
        size += more
    if shard:
        yield shard, list(parts)


def files_of(path: Path, names=None) -> list[str]:
    """Every file that the recordings of one are read from: of WFDB the signals and annotations too, of
    Sleep-EDF the stages. names: {folder: names in it, sorted}, where they are known."""
    if path.suffix.lower() != ".hea":
        return [str(path), *map(str, filter(None, [hypnogram_of(path)]))]
    # All names that begin as this one does: signals, annotations, segments
    folder, stem = str(path.parent), path.stem
    names = (names or {}).get(folder) or sorted(os.listdir(folder))
    first, last = bisect.bisect_left(names, stem), bisect.bisect_right(names, f"{stem}\U0010ffff")
    return [f"{folder}/{name}" for name in names[first:last]]


class Filling:
    """Writes one shard: samples go to disk run by run, tables at the end."""

    def __init__(self, folder: Path, request: dict, prepare: Preprocess):
        self.folder, self.request, self.prepare = folder, request, prepare
        self.rows, self.events, self.labels, self.skipped = [], [], [], []
        self.offset, self.count, self.late, self.slow = 0, 0, 0, 0
        self.lost = {"samples": 0, "seconds": 0.0, "channels": 0, "short runs": 0, "flat runs": 0}

    def fill(self, found):
        """Read the files of `found` and write the shard."""
        with open(self.folder / "samples.f32", "wb") as out:
            for path, name in found.files:
                self.usable(self.add_all, found, path, name, out)
        self.write()

    def usable(self, work, *what):
        """work(*what), or None where --skip-bad leaves out what it raises."""
        try:
            return work(*what)
        except UserError as error:
            if not self.request["skip_bad"]:
                raise
            self.skipped.append(str(error).rsplit("; ", 1)[0])  # without the advice
            return None

    def add_all(self, found, path: Path, name: str, out):
        """Add the recordings of one file, or tar shard, that belong to the part that is asked for."""
        part, rate = self.request["part"], found.rates.get(name, self.request["fs"])
        how = (rate, self.request["annotator"])
        tar = path.suffix.lower() == ".tar"
        for record in tar_records(path, *how, self.usable) if tar else read_records(path, *how):
            record = found.describe(record, name)
            if record is not None and (not part or record.part in ("", part)):
                self.usable(self.add, record, out)

    def add(self, record: Recording, out):
        """Prepare the runs of the chosen channels of one recording, then write them: all or none, except for
        what --skip-bad leaves out."""
        ready = []
        for name, channel in pick_channels(record, self.prepare.channel).items():
            ready += self.usable(self.runs_of, record, name, channel) or []
        if not ready:
            return
        self.check_events(record)
        for name, channel, start, x in ready:
            row = (record.name, record.subject, record.part, name, str(record.source), channel.fs, start)
            self.rows.append((*row, self.count, 0, self.offset, len(x), x.std()))
            self.add_events(record, start, len(x) / (self.prepare.fs or channel.fs))
            for level, names in record.labels.items():
                # An empty level says that nothing applies, which is a label too.
                self.labels += [(len(self.rows) - 1, level, label) for label in names or [""]]
            out.write(x.tobytes())
            self.offset += len(x)
        self.count += 1

    def runs_of(self, record: Recording, name: str, channel) -> list:
        """[(channel's name, channel, start, prepared samples)] of the runs that are long enough and not
        flat."""
        runs, ready, problem = channel.runs(), [], None
        self.slow += bool(5 * channel.fs < self.prepare.fs)
        needed = max(self.prepare.least(channel.fs), self.request["min_seconds"] * channel.fs)
        for x, start in runs:
            if len(x) < needed:
                self.lost["short runs"] += len(runs) > 1
                continue
            where = f"{record.source}: record {record.name} channel {name}"
            try:
                ready.append((name, channel, start, self.prepare.signal(x, channel.fs, where)))
            except UserError as error:
                problem = error
                self.lost["flat runs"] += len(runs) > 1
        if not ready and problem is not None:
            raise problem
        if not ready:
            longest = max((len(x) for x, _ in runs), default=0)
            asks = self.request["min_seconds"]
            needs = f"at least {math.ceil(needed)} are needed"
            if asks * channel.fs == needed:
                needs = f"--min-seconds {asks:g} asks for more"
            what = "too short" if longest else "without a single measured sample"
            raise UserError(
                f"{record.source}: record {record.name} channel {name} is {what}: {longest} samples "
                f"({longest / channel.fs:.2f} s at {channel.fs:g} Hz), {needs}; leave it out or pass "
                "--skip-bad"
            )
        gone = len(channel) - sum(len(x) for x, start in runs if any(start == s for _, _, s, _ in ready))
        if gone:
            self.lost["samples"] += gone
            self.lost["seconds"] += gone / channel.fs
            self.lost["channels"] += 1
        return ready

    def check_events(self, record: Recording):
        """UserError for a beat outside of the recording: its rate is wrong. Remarks after the end are
        counted."""
        last, end = max((e.seconds for e in record.events if e.symbol), default=0.0), record.seconds()
        first = min((e.seconds for e in record.events if e.symbol), default=0.0)
        if last >= end + 1e-6 or first < 0:
            raise UserError(
                f"{record.source}: annotations (field ann_sample) reach from second {first:.2f} to "
                f"{last:.2f} but record {record.name} lasts {end:.2f} s; is a rate wrong?"
            )
        self.late += sum(e.seconds >= end or e.seconds + e.duration < 0 for e in record.events)

    def add_events(self, record: Recording, start: float, seconds: float):
        """The events of one run, on its own clock; what lasts into it begins with it."""
        row, holding, own = len(self.rows) - 1, [], []
        for e in sorted(record.events, key=lambda e: e.seconds):
            first, last = e.seconds - start, e.seconds + e.duration - start
            if first >= seconds:
                break
            if first < 0 and e.text.startswith("("):
                holding = [(row, 0.0, 0.0, "", e.text)]  # a rhythm holds until the next mark
            if first >= 0 or last > 0:
                duration = min(last, seconds) - max(first, 0.0) if e.duration else 0.0
                own.append((row, max(first, 0.0), duration, e.symbol, e.text))
        self.events += holding + own  # in this order: a mark at the very beginning is the next one

    def write(self):
        """The tables; text fields are as wide as their longest entry."""
        text = "name subject part channel source".split()
        kinds = [*((n, "S") for n in text), ("fs", "f8"), ("start", "f8"), ("recording", "i4")]
        kinds += [("shard", "i4"), ("offset", "i8"), ("length", "i8"), ("std", "f4")]
        np.save(self.folder / "records.npy", table_of(self.rows, kinds))
        kinds = [("record", "i4"), ("seconds", "f8"), ("duration", "f8"), ("symbol", "S"), ("aux", "S")]
        np.save(self.folder / "events.npy", table_of(self.events, kinds))
        kinds = [("record", "i4"), ("level", "S"), ("label", "S")]
        np.save(self.folder / "labels.npy", table_of(self.labels, kinds))
        about = {name: getattr(self, name) for name in ("skipped", "lost", "late", "slow")}
        about |= {"recordings": self.count, "chosen": dict(Counter(row[3] for row in self.rows))}
        (self.folder / "about.json").write_text(json.dumps(about, indent=1))


def table_of(rows: list, kinds: list) -> np.ndarray:
    """A structured array of `rows`; a field of kind "S" becomes as wide as its longest entry, in UTF-8."""
    rows = [tuple(v.encode() if isinstance(v, str) else v for v in row) for row in rows]
    wide = []
    for i, (name, kind) in enumerate(kinds):
        longest = max((len(row[i]) for row in rows), default=0) if kind == "S" else 0
        wide.append((name, f"S{max(1, longest)}" if kind == "S" else kind))
    return np.array(rows, wide)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample of one epoch: the same on every machine, process and loader worker."""
    return np.random.default_rng((seed, epoch, index))


class PhysioSignalDataset(Dataset):
    """Windows of `signal_len` samples for pre-training. An item is a pure function of (seed, epoch, index):

        x, real   signal float32 (signal_len,), z-scored, and bool, False = padding; of several leads
                  (M, signal_len)
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
        self.rows = store.anchors if rows is None else rows
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
        # The last start that still fills the window; upstream misses it.
        room = max(0, len(signal) - self.signal_len)
        for _ in range(20):  # a lead that came off for a while: another place of this record
            start = int(rng.integers(room + 1)) if train else min((window - first) * self.signal_len, room)
            cut = signal[start : start + self.signal_len]
            if not train or cut.std() > 1e-4 * row["std"]:
                break
        if self.store.prepare.leads:
            x, real = self.store.leads(self.rows[place], start, self.signal_len)
        else:
            x, real = self.store.prepare.window(cut, self.signal_len)
        return {
            "x": torch.from_numpy(x),
            "real": torch.from_numpy(real),
            "noise": torch.from_numpy(rng.random(self.num_patches, np.float32)),
            "name": f"{row['name'].decode()}@{start}",
        }
