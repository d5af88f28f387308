"""One .h5 of signals, read row by row.

IQ_data real (Num, T, 2); optional, as attributes of the file or of IQ_data, or as data sets: fs (Hz; a
number, text such as "1 MHz", or one for each signal), classes (a JSON list, or an array of names), view and
view_factor (what `prepare.view` did to the rows); optional columns, one value for each signal: label, snr,
pulse_width, ... Groups and other data sets may stand beside them.
"""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

import h5py
import numpy as np

from common.arguments import number
from common.checkpoint import atomic_path
from common.errors import UserError
from common.files import first_line, hdf5_item, reading
from common.index import only_one, remember, scan
from common.run import progress
from em_mllm.em_foundation.models.configuration_em import REGRESSION_TASKS
from em_mllm.prepare import VIEWS

DEFAULT_FS = 20e6  # Hz, what the seed script assumes
HERTZ = number(float, 1, 1e12)  # type of a flag that is a sampling rate
RATE_NAME = re.compile(
    r"(?i)(?:core:)?(?:f_?s|samp(?:le|ling)?[_ -]?(?:rate|freq|frequency)|采样率|采样频率)"
    r"(?:[_ -]?(?:in[_ ])?[(\[（]?([kmg]?)(?:hz|sps)[)\]）]?)?"
)
SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
COLUMNS = ("label", "snr", *REGRESSION_TASKS)
BLOCK = 2**22  # values read at a time


def plain_text(value) -> str:
    return decoded(value) if isinstance(value, bytes) else str(value)


def read_json_text(path: Path):
    """Parsed JSON of a file, with or without a byte-order mark; see `decoded`."""
    with reading(path, "JSON file"):
        return json.loads(decoded(Path(path).read_bytes()))


def decoded(content: bytes) -> str:
    """Text in UTF-8 or UTF-16, or in the Chinese encoding GBK where it is neither."""
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("gb18030", "replace")


def centred(x: np.ndarray) -> np.ndarray:
    """Samples as float32; unsigned numbers, as receivers of 8 bits give them, around zero."""
    centre = np.iinfo(x.dtype).max / 2 if x.dtype.kind == "u" else 0
    return x.astype(np.float32) - np.float32(centre)


def stated_rates(beside: dict, where, count: int | None = None) -> np.ndarray | None:
    """The sampling rates in Hz under those names in `beside` that mean them, (1,) or one for each of `count`
    signals (None: of any number); None where there are none. A unit in the name counts, as in fs_khz, and one
    beside it, fs_unit or the attribute `units` of a data set."""
    found = {}
    for name, match in ((name, RATE_NAME.fullmatch(name.rpartition("/")[2])) for name in beside):
        value = beside[name] if match else None
        around = {**beside, **{f"{name}_{k}": v for k, v in getattr(value, "attrs", {}).items()}}
        value = value[()] if isinstance(value, h5py.Dataset) else value
        if value is None or isinstance(value, h5py.Empty):
            continue
        many = np.size(value) > 1 and count in (None, np.size(value))
        rates = np.ravel(value) if many else [value]
        if not many or rates.dtype.kind not in "iuf":
            rates = np.array([read_rate(rate, f"{where}: {name}") for rate in rates])
        if not (np.isfinite(rates) & (rates > 0)).all():
            raise UserError(f"{where}: {name} holds values that are no rate in Hz above 0")
        has_unit = re.search(r"(?i)hz|s/s|sps", str(value))
        unit = next((around[k] for k in (f"{name}_unit", f"{name}_units") if k in around), "")
        prefix = match[1] or "".join(re.findall(r"(?i)^\s*([kmg])(?:hz|sps|s/s)", plain_text(unit)))
        found[name] = rates * (1.0 if has_unit else SCALES[prefix.lower()])
    if len({tuple(np.round(rates, 3)) for rates in found.values()}) > 1:
        raise UserError(f"{where}: {' and '.join(found)} state different sampling rates; leave one of them")
    return next(iter(found.values()), None)


def read_rate(value, where: str) -> float:
    """A sampling rate in Hz from a number, an array of one, or text such as "1 MHz" or "250k"."""
    value = np.asarray(value)
    if value.size != 1:
        raise UserError(f"{where} is an array of {value.size} values, expected one rate in Hz")
    value = value.ravel()[0]
    if isinstance(value, (bytes, str)):
        text = plain_text(value)
        number, unit = (
            r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?",
            r"[hH]z|HZ|[sS]ps|SPS|[sS]a?/s",
        )
        match = re.fullmatch(rf"\s*({number})\s*([kKMG]?|[mg](?={unit}))(?:{unit})?\s*", text)
        if not match:
            raise UserError(f"{where} is {text!r}, expected a rate such as 1000000 or '1 MHz'")
        value = float(match[1].replace(",", "")) * SCALES[match[2].lower()]
    rate = float(value) if isinstance(value, float) or np.asarray(value).dtype.kind in "iuf" else float("nan")
    if not (np.isfinite(rate) and rate > 0):
        raise UserError(f"{where} is {value!r}, expected a rate in Hz above 0")
    return rate


def read_names(value, where: str) -> list[str]:
    """Class names from a JSON list or object, from text with commas, or from an array of names."""
    if isinstance(value, (bytes, str, np.bytes_, np.str_)):
        text = plain_text(value)
        try:
            value = json.loads(text)
        except ValueError:
            value = [part.strip() for part in re.split(r"[,;，；、\n]", text) if part.strip()]
    if isinstance(value, dict):  # number -> name, or name -> number
        numbered = all(re.fullmatch(r"\d+", str(k)) for k in value)
        by_number = {str(k): v for k, v in (value.items() if numbered else zip(value.values(), value))}
        if wrong := by_number.keys() ^ set(map(str, range(len(value)))):
            raise UserError(f"{where}: class number {min(wrong)}, expected 0 to {len(value) - 1}, each once")
        value = [by_number[str(number)] for number in range(len(value))]
    names = [plain_text(name) for name in np.asarray(value, object).ravel().tolist()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{where}: expected a list of different class names, it holds {names[:8]}")
    return names


def cache_folder() -> Path:
    """EM_MLLM_CACHE, or a folder of the temporary files."""
    return Path(os.environ.get("EM_MLLM_CACHE") or f"{tempfile.gettempdir()}/em_mllm-{os.getuid()}")


class SignalFile:
    """One .h5 of signals, opened anew in each process (an HDF5 handle must not cross a fork) and read row by
    row.

    Attributes: count, points (T), fs in Hz (of the first signal where they differ; `rate(i)` of each),
    fs_stated (whether the file says it), classes (list of names or None), columns {name: shape}, done (view,
    factor) of the rows. UserError says what is wrong.
    """

    large = 2**24  # bytes of a file from which what was found in it is remembered

    def __init__(self, path, default_fs=DEFAULT_FS):
        self.path = Path(path)
        self._file, self._pid, self._rates = None, None, None
        self.packed, self._map = None, None  # see `pack`
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; check the path")
        try:
            with h5py.File(self.path, "r") as file:
                self._look(file, default_fs)
        except OSError as error:
            raise UserError(
                f"{path}: not a readable HDF5 file ({first_line(error)}); was the copy cut short?"
            ) from error

    def _look(self, file, default_fs):
        """Read the shapes and everything that stands beside the signals."""
        path = self.path
        if "IQ_data" not in file.keys() or not isinstance(hdf5_item(file, "IQ_data", False), h5py.Dataset):
            raise UserError(
                f"{path}: has no dataset IQ_data (it has {', '.join(file) or 'nothing'}); store the signals "
                "there"
            )
        data = hdf5_item(file, "IQ_data", whole=False)
        if data.ndim != 3 or data.shape[2] != 2:
            raise UserError(
                f"{path}: IQ_data is {data.shape}, expected (Num, T, 2); put I and Q on the last axis"
            )
        if data.dtype.kind not in "fiu":
            raise UserError(
                f"{path}: IQ_data is {data.dtype}, expected real numbers such as float32; store I and Q as "
                "two columns"
            )
        self.count, self.points = data.shape[:2]
        if self.count == 0 or self.points == 0:
            raise UserError(f"{path}: IQ_data is empty, {(self.count, self.points, 2)}")
        beside = [name for name in file.keys() if name != "IQ_data" and not self._leads_out(file, name)]
        try:
            sets = {name: hdf5_item(file, name, whole=False) for name in beside}
        except KeyError as error:
            raise UserError(f"{path}: {error.args[0]} is a link to nothing; store the data there") from error
        holds = lambda item: isinstance(item, h5py.Dataset) and item.shape is not None
        sets = {name: item for name, item in sets.items() if holds(item)}
        self.columns = {name: item.shape for name, item in sets.items() if item.shape[:1] == (self.count,)}
        for name in COLUMNS:
            if name in sets and name not in self.columns:
                rows = sets[name].shape[0] if sets[name].shape else "no"
                raise UserError(
                    f"{path}: {name} has {rows} rows, IQ_data {self.count}; write one row per signal"
                )
        inner = self._in_groups(file)
        outer = {**sets, **data.attrs, **file.attrs}
        beside = {**{name.rpartition("/")[2]: value for name, value in inner.items()}, **outer}
        rates = stated_rates(outer, path, self.count)
        rates = stated_rates(inner, path, self.count) if rates is None else rates
        self.fs_stated = rates is not None
        self.fs = float(default_fs) if rates is None else float(rates[0])
        self._rates = rates if self.fs_stated and len(rates) > 1 else None
        names = beside.get("classes")
        names = names[()] if isinstance(names, h5py.Dataset) else names
        absent = isinstance(names, (h5py.Empty, type(None)))
        self.classes = None if absent else read_names(names, f"{path}: classes")
        if self.classes is None and "label" in sets and sets["label"].dtype.kind in "OSU":
            self.classes = sorted({plain_text(name) for name in sets["label"][()].ravel()})
        kind, by = (
            plain_text(np.ravel(beside.get(k, d))[0]) for k, d in (("view", "iq"), ("view_factor", 1))
        )
        if kind not in VIEWS or not re.fullmatch(r"[1-9]\d*(\.0)?", by):
            known = " or ".join(VIEWS)
            raise UserError(f"{path}: view is {kind} x {by}, expected {known}; update or convert again")
        self.done = (kind, int(float(by)))
        # a chunk is read and unpacked whole, also for one row of it
        self.slow = data.chunks is not None and data.chunks[0] > 4

    def _in_groups(self, file) -> dict:
        """What the groups beside the signals say of them: {path: value} of rates and class names."""
        found = {}
        wanted = lambda name: name.endswith(("classes", "_unit", "_units")) or RATE_NAME.fullmatch(name)

        def look(name, item):
            found.update({f"{name}/{key}": value for key, value in item.attrs.items() if wanted(key)})
            is_inner = isinstance(item, h5py.Dataset) and "/" in name
            if is_inner and wanted(name.rpartition("/")[2]) and item.shape is not None:
                found[name] = hdf5_item(file, name)

        file.visititems(look)  # which follows no link
        return found

    @staticmethod
    def _leads_out(file, name: str) -> bool:
        """Whether something that is not read here is a link to another file or to nothing."""
        link = file.get(name, getlink=True)
        wanted = name in (*COLUMNS, "classes", "view", "view_factor") or RATE_NAME.fullmatch(name)
        return not wanted and not isinstance(link, h5py.HardLink)

    def rate(self, index: int) -> float:
        """Sampling rate of signal `index` in Hz."""
        return self.fs if self._rates is None else float(self._rates[int(index)])

    def rates(self) -> list[float]:
        """The different sampling rates of the file in Hz, in ascending order."""
        return [self.fs] if self._rates is None else sorted(set(self._rates.tolist()))

    def lengths(self) -> np.ndarray:
        """Points of every signal."""
        return np.full(self.count, self.points)

    @property
    def file(self):
        if self._pid != os.getpid():
            self._file, self._pid = h5py.File(self.path, "r"), os.getpid()
        return self._file

    def __getstate__(self):
        return {**self.__dict__, "_file": None, "_pid": None, "_map": None}

    def __len__(self):
        return self.count

    def _rows(self, rows) -> np.ndarray:
        try:
            if self.packed is not None:
                if self._map is None:
                    self._map = np.load(self.packed, mmap_mode="r")
                return np.array(self._map[rows])
            return centred(self.file["IQ_data"][rows])
        except OSError as error:
            span = f"{rows.start}:{rows.stop}" if isinstance(rows, slice) else rows
            raise UserError(
                f"{self.path}: IQ_data[{span}] cannot be read ({error}); was the copy cut short?"
            ) from error

    def read(self, index: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """Signal `index` as (T, 2) float32, as stored; or `count` of its samples from `start` on."""
        if start or count is not None:
            stop = self.points if count is None else start + count
            return centred(self.file["IQ_data"][int(index), start:stop])
        return self._rows(int(index))

    def column(self, name: str) -> np.ndarray:
        """A per-signal column as a flat array: `label`, `snr`, `pri`, ...; class names as their numbers."""
        if name not in self.columns:
            raise UserError(
                f"{self.path}: has no dataset {name} (it has {', '.join(self.columns) or 'IQ_data alone'})"
            )
        values = self.file[name][()]
        if values.size != self.count:
            raise UserError(f"{self.path}: {name} is {values.shape}, expected one value a signal, (Num, 1)")
        values = values.ravel()
        if values.dtype.kind not in "OSU":
            return values
        names = [plain_text(value) for value in values]
        if name == "label" and not (unknown := set(names) - set(self.classes)):
            return np.array([self.classes.index(n) for n in names], float)
        raise UserError(
            f"{self.path}: {name} holds text such as {names[0]!r}"
            + (f"; {min(unknown)!r} is not among the classes" if name == "label" else ", expected numbers")
        )

    def pack(self):
        """Copy signals that are stored in large or compressed chunks once, row by row, into a cache, from
        which single signals are read a hundred times as fast.

        The cache lies in EM_MLLM_CACHE, or in a folder of the temporary files; other content, another copy.
        """
        if not self.slow or self.packed is not None:
            return
        state = self.path.stat()
        key = f"{self.path.resolve()}:{state.st_size}:{state.st_mtime_ns}"
        folder = cache_folder()
        cache = folder / f"{hashlib.sha1(key.encode()).hexdigest()}.npy"
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(cache):  # one process copies, the others wait
            if not cache.is_file():
                size = 8 * self.count * self.points / 1e6
                print(f"{self.path}: stored in chunks; copied once to {cache} ({size:.0f} MB) to be quick")
                with atomic_path(cache) as temporary, open(temporary, "wb") as out:
                    header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.points, 2)}
                    np.lib.format.write_array_header_1_0(out, header)
                    for part in self._blocks():
                        out.write(self._rows(part).astype("<f4").tobytes())
        self.packed = cache

    def _blocks(self):
        """Slices of rows that are read at a time: whole chunks of the file."""
        chunks = self.file["IQ_data"].chunks
        rows = max(1, BLOCK // (2 * self.points))
        if chunks:
            rows = max(1, rows // chunks[0]) * chunks[0]
        starts = progress(range(0, self.count, rows), desc=f"reading {self.path.name}", leave=False)
        return (slice(start, min(start + rows, self.count)) for start in starts)

    def found(self, look, what: str) -> dict[str, np.ndarray]:
        """What `look` finds in the file; of a large one it is remembered for the next start."""
        if self.path.stat().st_size < self.large:
            return look()
        return remember(look, scan([self.path], ("",)), what, cache_folder())

    def bad_signals(self) -> dict[int, str]:
        """{index: what is wrong} for signals with nan, inf or nothing but zeros; reads the file once, block
        by block."""

        def look():
            bad = dict(self._faults())
            return {"row": np.array(list(bad), int), "why": np.array(list(bad.values()), str)}

        bad = self.found(look, "bad signals, 1")
        return dict(zip(bad["row"].tolist(), bad["why"].tolist()))

    def _faults(self):
        """Yield (index, what is wrong)."""
        for part in self._blocks():
            x = self._rows(part)
            finite = np.isfinite(x).all((1, 2))
            silent = ~np.any(x, (1, 2))
            for i in np.nonzero(~finite | silent)[0]:
                yield part.start + int(i), "is all zero" if finite[i] else "holds nan or inf"
