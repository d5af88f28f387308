"""Signals in tar shards, in the form of WebDataset: the files of one sample stand side by side, and their
names differ behind the first dot alone.

    000017.npy     one signal, real (T, 2) or (2, T) or complex (T,); or raw samples: .cf32 .cs16 .cu8 ...
    000017.json    optional: {"fs" (Hz), "label" (number or name), "snr", "pulse_width", ...}
    000017.cls     optional: the label alone

A shard is looked through once, and what lies where is remembered. From then on its signals are a list like
the rows of a .h5, each read where it lies: which process and worker reads what, and where a resumed run goes
on, is decided as for those, to the bit, and memory does not grow with the shards.
"""

import io
import json
import sys
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np

from common.errors import UserError
from common.files import npy_header, reading
from common.index import tar_members
from em_mllm.iq_io import SUFFIXES, raw_type, two_columns
from em_mllm.prepare import AS_RECORDED
from em_mllm.signal_file import COLUMNS, DEFAULT_FS, SignalFile, centred, stated_rates

SIGNALS = (".npy", *SUFFIXES)
ABOUT = (".json", ".cls")


def open_signals(path, default_fs=DEFAULT_FS) -> SignalFile:
    """The signals of a .h5 or of a tar shard; a rate that it does not state is told."""
    file = (TarSignals if Path(path).suffix.lower() == ".tar" else SignalFile)(path, default_fs)
    if not file.fs_stated:
        print(f"{path}: does not state its sampling rate; taken as {default_fs:g} Hz", file=sys.stderr)
    return file


class TarSignals(SignalFile):
    """One tar shard of signals under the interface of SignalFile; they may differ in length."""

    large = 2**20  # slower to look through than a .h5

    def __init__(self, path, default_fs=DEFAULT_FS):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; check the path")
        found = self.found(self._look_through, "shard, 2")
        self._offset, self._size, self._suffix = found["offset"], found["size"], found["suffix"]
        self._points, rates = found["points"], found["fs"]
        self.count, self.points = len(self._points), int(self._points.max())
        self.fs_stated = bool(np.isfinite(rates).all())
        self._rates = np.where(np.isfinite(rates), rates, float(default_fs))
        self.fs = float(self._rates[0])
        self._values = {name: found[name] for name in COLUMNS if np.isfinite(found[name]).any()}
        self.columns = {name: (self.count,) for name in self._values}
        self.classes = found["classes"].tolist() or None
        self.done, self.slow, self.packed = AS_RECORDED, False, None

    def __getstate__(self):
        return self.__dict__

    def _look_through(self) -> dict[str, np.ndarray]:
        """Place, size, length and description of every sample of the shard."""
        rows, labels = [], []
        with open(self.path, "rb") as file:
            known = (member for member in tar_members(self.path) if kind_of(member[0]) in (*SIGNALS, *ABOUT))
            for key, members in groupby(known, lambda member: key_of(member[0])):
                members = list(members)
                parts = {kind_of(member[0]): member for member in members}
                signals = [kind for kind in parts if kind in SIGNALS]
                if len(parts) < len(members):
                    raise UserError(
                        f"{self.path}: sample {key} has two files of one kind; pack each by itself"
                    )
                if len(signals) != 1:
                    raise UserError(
                        f"{self.path}: sample {key} has {len(signals)} signals, expected one of "
                        f"{' '.join(SIGNALS)}"
                    )
                name, offset, size = parts[signals[0]]
                about = self._about(file, parts)
                labels.append(about.pop("label", None))
                points = self._length(file, name, signals[0], offset, size)
                rows.append({"offset": offset, "size": size, "suffix": signals[0], "points": points, **about})
        if not rows:
            raise UserError(f"{self.path}: holds no signal ({' '.join(SIGNALS)})")
        columns = {name: np.array([row[name] for row in rows]) for name in rows[0].keys() - {"fs", *COLUMNS}}
        for name in ("fs", *COLUMNS):
            columns[name] = np.array([row.get(name, np.nan) for row in rows], float)

        # names of classes become numbers
        names = sorted({label for label in labels if isinstance(label, str)})
        if names and not all(isinstance(label, str) for label in labels):
            raise UserError(f"{self.path}: some labels are names such as {names[0]!r}, others are not")
        numbers = {name: number for number, name in enumerate(names)} | {None: np.nan}
        columns["label"] = np.array([numbers.get(label, label) for label in labels], float)
        return {**columns, "classes": np.array(names, str)}

    def _about(self, file, parts: dict) -> dict:
        """{"fs", "label" (number or name), column: value} of what stands beside a signal."""
        stated, found = {}, {}
        for suffix in ABOUT:
            if suffix in parts:
                name, offset, size = parts[suffix]
                file.seek(offset)
                with reading(f"{self.path}: {name}", "description of a signal"):
                    text = file.read(size).decode("utf-8-sig")
                    stated |= {"label": text.strip()} if suffix == ".cls" else dict(json.loads(text))
        where = f"{self.path}: {parts[next(s for s in SIGNALS if s in parts)][0]}"
        if (rates := stated_rates(stated, where, 1)) is not None:
            found["fs"] = float(rates[0])
        for name in COLUMNS:
            value = stated.get(name)
            if name == "label" and isinstance(value, str):
                found[name] = float(value) if value.isdigit() else value
            elif value is not None:
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise UserError(f"{where}: {name} is {value!r}, expected a number")
                found[name] = float(value)
        return found

    def _length(self, file, name: str, suffix: str, offset: int, size: int) -> int:
        """Points of a signal, of which the header alone is read."""
        where = f"{self.path}: {name}"
        if suffix in SUFFIXES:
            width = 2 * np.dtype(raw_type(where, suffix)).itemsize
            if size % width or not size:
                raise UserError(f"{where}: {size} bytes are no whole number of {width}-byte IQ pairs")
            return size // width
        file.seek(offset)
        with reading(where, "array of plain numbers"):
            shape, _, dtype = npy_header(file)
        stored = offset + size - file.tell()
        if stored != np.prod(shape, dtype=float) * dtype.itemsize or not stored:
            raise UserError(f"{where}: an array of shape {shape} {dtype} does not take {stored} bytes")
        layout = np.broadcast_to(np.zeros((), dtype), shape)
        if layout.size > 2 * max(shape, default=1):
            raise UserError(f"{where}: an array of shape {shape}, expected one signal; pack each by itself")
        return len(two_columns(layout, where))

    def lengths(self) -> np.ndarray:
        return self._points

    def read(self, index: int) -> np.ndarray:
        """Signal `index` as (T, 2) float32, as stored."""
        with open(self.path, "rb") as file:  # not kept open: there may be thousands of shards
            file.seek(self._offset[index])
            content = file.read(self._size[index])
        where = f"{self.path}: signal {index}"
        if (suffix := self._suffix[index]) in SUFFIXES:
            return centred(np.frombuffer(content, raw_type(where, suffix)).reshape(-1, 2))
        return centred(two_columns(np.lib.format.read_array(io.BytesIO(content)), where))

    def column(self, name: str) -> np.ndarray:
        if name not in self._values:
            raise UserError(
                f"{self.path}: has no {name} (it has {', '.join(self._values) or 'signals alone'})"
            )
        return self._values[name]

    def _faults(self):
        for i in range(self.count):
            x = self.read(i)
            if not np.isfinite(x).all():
                yield i, "holds nan or inf"
            elif not x.any():
                yield i, "is all zero"


def kind_of(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def key_of(name: str) -> str:
    """The name of a file's sample: its path up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.')[0]}"
