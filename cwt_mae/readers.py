"""Readers of signal files: each turns one file into recordings (recording.py).

    WFDB .hea, EDF and BDF, DICOM waveforms .dcm, npz, npy, HDF5, UCR .ts .tsv .arff; tables: tables.py

A reader states what the file says and nothing else: every channel keeps its own rate and unit, annotations
become seconds by their own clock, what was not measured is nan. Who a recording belongs to is layouts.py's
business.
"""

import csv
import importlib
import os
import re
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np

from common.errors import UserError
from common.files import hdf5_item, open_npz, reading
from cwt_mae.layouts import parts_of
from cwt_mae.recording import Event, Recording, as_channel, check_rate, unique
from cwt_mae.text import decoded, encoding_of, read_text

ANNOTATORS = ("atr", "qrs", "ecg", "ari", "ecg_ann", "wqrs", "epi")  # the first that a record has
LEADS = "I II III AVR AVL AVF V1 V2 V3 V4 V5 V6".split()  # the order of 12 unnamed channels
RATES = ("fs", "sampling_rate", "sampling_frequency", "sample_rate", "frequency", "rate", "hz")
EDF_NOTES = ("EDF Annotations", "BDF Annotations")
# Fields that say something about the signals: clocks, annotations, labels, and of one number the rates
ABOUT = ("gain", "leads?", "names", "subject", r"units?|\w+_unit", "labels?", r"ann_\w+", *RATES)
ABOUT = re.compile(rf"(?i){'|'.join(ABOUT)}|t|times?([_ ]?(stamps?|axis|s|ms|us|ns|sec|seconds))?")
RATE_OF = re.compile(r"(?i)(fs|rate)_\w+|\w+_(fs|rate)")


def extra(module: str, path):
    """Import what `path`, a file or an option, needs, or say which package to install."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{path}: needs the package {package}; pip install {package}") from None


def rows_of(array, name, source) -> dict:
    """{channel name: row} of an array (L,) or (channels, L)."""
    array = np.asarray(array)
    if array.ndim == 2 and array.shape[1] == 1:  # one channel in a column, as MATLAB keeps it
        array = array[:, 0]
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


# ---- WFDB


def read_wfdb(path: Path, fs=None, annotator: str = "") -> list[Recording]:
    """A WFDB header (.hea) with its signal files, of one or several segments and frequencies, and its
    annotations.

    annotator: suffix of the annotation file; without it the first of ANNOTATORS that there is. A header line
    `# Dx: code,code` (PhysioNet Challenge) becomes labels.
    """
    wfdb, stem = extra("wfdb", path), str(path.with_suffix(""))
    with reading(path, "WFDB record"):
        text = read_text(path)
        header = record = plain_wfdb(path, text) or wfdb.rdrecord(stem, smooth_frames=False, m2s=False)
        if isinstance(header, wfdb.MultiRecord):
            record = header.multi_to_single(physical=True, expanded=True)
    if not record.e_p_signal or not len(record.e_p_signal[0]):
        raise UserError(f"{path}: holds no signal, only a header; give the record that uses it")
    rate = check_rate(header.fs, path, fs)
    frames = record.samps_per_frame or [1] * len(record.sig_name)
    units = record.units if hasattr(record, "units") and record.units else [""] * len(record.sig_name)
    names = unique(name or "" for name in record.sig_name)  # a header may leave them out
    channels = {
        name: as_channel(x, rate * count, unit=unit or "")
        for name, x, count, unit in zip(names, record.e_p_signal, frames, units)
    }
    lines = map(str.strip, text.split("\n"))
    comments = [line.strip(" \t#") for line in lines if line.startswith("#")]
    comments += getattr(record, "comments", None) or []  # of segments
    codes = next((text.split(":", 1)[1] for text in comments if re.match(r"\s*Dx\s*:", text)), "")
    labels = [code for code in re.split(r"[,，、\s]+", codes.strip()) if code and code.lower() != "unknown"]
    who = (
        re.match(r"(?i)\W*(?:patient|subject)(?:[ _](?:id|number|no))?\s*[:=]\s*(\S+)", c) for c in comments
    )
    subject = next((found[1] for found in who if found), "")
    events = wfdb_events(wfdb, path, rate, annotator)
    return [Recording(path.stem, path, channels, subject, events, {"": labels} if labels else {})]


def plain_wfdb(path: Path, text: str):
    """What `wfdb.rdrecord` reads of the simplest and most frequent kind of record: one segment, one file in
    format 16, one rate, and a header `text` that states everything; None for any other.

    The package looks each field of a header up in a pandas table: of a hundred thousand short records that
    alone would take minutes.
    """
    from wfdb.io.header import parse_header_content, rx_record, rx_signal, wfdb_strptime

    lines, _ = parse_header_content(text)
    matches = [pattern.match(line) for pattern, line in zip((rx_record, *[rx_signal] * len(lines)), lines)]
    if len(matches) < 2 or None in matches:
        return None
    head, *signals = (match.groupdict() for match in matches)
    one = {"fmt": ("16",), "samps_per_frame": ("", "1"), "skew": ("", "0"), "byte_offset": ("", "0")}
    plain = all(s[name] in values for s in signals for name, values in one.items())
    plain &= len({s["file_name"] for s in signals}) == 1 and int(head["n_sig"]) == len(signals)
    plain &= all(head[name] for name in ("fs", "sig_len")) and not head["n_seg"]
    if not plain or not all(s["adc_gain"] and (s["baseline"] or s["adc_zero"]) for s in signals):
        return None
    if head["base_time"]:  # a time that is none is an error, as there
        wfdb_strptime(head["base_time"])
    if head["base_date"]:
        datetime.strptime(head["base_date"], "%d/%m/%Y")
    count, file = len(signals) * int(head["sig_len"]), path.parent / signals[0]["file_name"]
    if not file.is_file() or file.stat().st_size < 2 * count:
        return None
    samples = np.fromfile(file, "<i2", count)
    found = []
    for s, x in zip(signals, samples.reshape(-1, len(signals)).T):
        physical = (x.astype(np.float64) - int(s["baseline"] or s["adc_zero"])) / (
            float(s["adc_gain"]) or 200.0
        )
        physical[x == np.iinfo(np.int16).min] = np.nan
        found.append(physical)
    return SimpleNamespace(
        fs=float(head["fs"]),
        samps_per_frame=[1] * len(signals),
        sig_name=[s["sig_name"] for s in signals],
        units=[s["units"] or "mV" for s in signals],
        e_p_signal=found,
    )


def wfdb_events(wfdb, path: Path, rate: float, annotator: str) -> list[Event]:
    """Annotations of a record in seconds: by the annotation file's own ticks, else by the record's frames."""
    wanted = [annotator.lstrip(".")] if annotator else ANNOTATORS
    stem = str(path.with_suffix(""))
    suffix = next((s for s in wanted if os.path.isfile(f"{stem}.{s}")), None)
    if suffix is None:
        if annotator:
            raise UserError(f"{path}: has no annotation file .{wanted[0]}; check --annotator")
        return []
    with reading(path.with_suffix(f".{suffix}"), "WFDB annotation file"):
        found = wfdb.rdann(stem, suffix)
    ticks = float(found.fs or rate)
    texts = (text.strip("\x00 ") for text in found.aux_note)
    return [
        Event(s / ticks, symbol, text) for s, symbol, text in zip(found.sample.tolist(), found.symbol, texts)
    ]


# ---- EDF


def read_edf(path: Path, fs=None) -> list[Recording]:
    """An EDF, EDF+ or BDF file: every channel at its own rate, annotations in seconds, gaps of EDF+D kept."""
    edfio = extra("edfio", path)
    with reading(path, "EDF file"):
        # Without a signal some versions of the package fail in many ways, so the header is asked first.
        names, units, onsets, duration = edf_head(path)
    if not names:
        raise UserError(
            f"{path}: holds annotations but no signal; a *-Hypnogram.edf is read with the *-PSG.edf beside it"
        )
    with reading(path, "EDF file"):
        read = edfio.read_bdf if path.suffix.lower() == ".bdf" else edfio.read_edf
        edf = read(path)
        raw = list(zip(unique(names), units, edf.signals, strict=True))
        raw = [(name, unit, s.data, s.sampling_frequency) for name, unit, s in raw]
        events = edf_events(edf)
        plus = str(edf.reserved).startswith(("EDF+", "BDF+"))
        code = str(getattr(edf.patient, "code", "X")) if plus else "X"
    channels = {}
    for name, unit, x, rate in raw:
        jumps = edf_jumps(onsets, duration, rate)
        channels[name] = as_channel(x, check_rate(rate, path, fs), unit=unit, jumps=jumps)
    return [Recording(path.stem, path, channels, "" if code in ("X", "") else code, events)]


def edf_jumps(onsets: list, duration: float, rate: float) -> list[tuple[int, float]]:
    """[(sample, its second)] of the data records that begin more than a sample off the end of those before
    them. Onsets are rounded, and clocks drift."""
    jumps, first = [], 0
    for i, onset in enumerate(onsets):
        if abs(onset - onsets[first] - (i - first) * duration) > 1 / rate:
            jumps.append((round(i * rate * duration), onset))
            first = i
    return jumps


def edf_events(edf) -> list[Event]:
    """The annotations of an open EDF file."""
    return [Event(float(a.onset), "", a.text.strip(), float(a.duration or 0)) for a in edf.annotations]


def edf_head(path: Path) -> tuple[list[str], list[str], list[float], float]:
    """(names and units of the ordinary signals, onset of each data record in seconds, its duration) from the
    bytes of an EDF file. Names are ASCII by the book, but µV is written, and Chinese.

    Onsets stand in the first annotation list of each record; [] where there is none: the file is continuous.
    """
    with open(path, "rb") as file:
        head = file.read(256)
        size, duration, count = int(head[184:192]), float(head[244:252]), int(head[252:256])
        table = file.read(256 * count)
        texts = [table[16 * i : 16 * i + 16] for i in range(count)]
        texts += [table[96 * count + 8 * i : 96 * count + 8 * i + 8] for i in range(count)]
        texts = decoded(b"\n".join(text.strip(b"\0 ") for text in texts), path).split("\n")
        at, ordinary = 216 * count, [i for i in range(count) if texts[i] not in EDF_NOTES]
        names, units = ([texts[start + i] for i in ordinary] for start in (0, count))
        lengths = [int(table[at + 8 * i : at + 8 * i + 8]) for i in range(count)]
        width = 3 if path.suffix.lower() == ".bdf" else 2
        notes = [i for i in range(count) if texts[i] in EDF_NOTES]
        if not notes:
            return names, units, [], duration
        onsets, whole = [], width * sum(lengths)
        # As many records as the file holds, whatever the header counted when the recording began
        for record in range((path.stat().st_size - size) // max(1, whole)):
            file.seek(size + record * whole + width * sum(lengths[: notes[0]]))
            found = re.match(rb"([+-]\d+(?:\.\d*)?)\x14", file.read(width * lengths[notes[0]]))
            if not found:
                return names, units, [], duration
            onsets.append(float(found[1]))
    # The clock of the file begins with its first record, as its annotations do.
    return names, units, [onset - onsets[0] for onset in onsets], duration


# ---- DICOM


def read_dicom(path: Path, fs=None) -> list[Recording]:
    """A DICOM ECG or other waveform: a recording for each multiplex group, channels in physical units."""
    pydicom = extra("pydicom", path)
    with reading(path, "DICOM file"):
        data = pydicom.dcmread(path)
        groups = list(data.get("WaveformSequence", []))
        multiplex = pydicom.waveforms.multiplex_array
        found = [(data.waveform_array(i), multiplex(data, i, as_raw=True)) for i in range(len(groups))]
    if not found:
        raise UserError(f"{path}: a DICOM file without a waveform; pictures are not read here")
    records = []
    for i, (group, (x, raw)) in enumerate(zip(groups, found)):
        names, units = [], []
        for channel in group.ChannelDefinitionSequence:
            source = channel.get("ChannelSourceSequence") or [None]
            meaning = str(source[0].get("CodeMeaning", "")) if source[0] is not None else ""
            lead = re.match(r"(?i)lead\s+([a-z]+\d?)", meaning)
            names.append(lead[1] if lead else meaning or str(channel.get("ChannelLabel", "channel")))
            unit = channel.get("ChannelSensitivityUnitsSequence") or [None]
            units.append(str(unit[0].get("CodeValue", "")) if unit[0] is not None else "")
        rate = check_rate(float(group.SamplingFrequency), path, fs)
        columns = zip(unique(names), x.T, units, raw.T)
        channels = {n: as_channel(v, rate, unit=unit, raw=own) for n, v, unit, own in columns}
        name = str(group.get("MultiplexGroupLabel", "") or i) if len(found) > 1 else ""
        subject = str(data.get("PatientID", "") or "")
        records.append(Recording(f"{path.stem}:{name}" if i else path.stem, path, channels, subject))
    return records


# ---- npz and npy


def read_npz(path: Path, fs=None) -> list[Recording]:
    """npz: one recording (`sig`, or one array per channel; `fs`, or `fs_<channel>`; gain, names, subject,
    ann_*, label), many series (`X` (N, T) or (N, C, T) and `y`), or a UCR set (x_train, y_train, x_test ...).
    """
    with reading(path, "npz file of plain arrays"), open_npz(path) as file:
        data = dict(file)
        for key, x in data.items():  # words that were kept as bytes are words
            if x.dtype.kind == "S":
                data[key] = np.char.decode(x, encoding_of(b" ".join(x.ravel().tolist()), path), "replace")
    lower = {key.lower(): value for key, value in data.items()}
    if "x_train" in lower:
        return ucr_records(path, lower)
    if "x" in lower and np.ndim(lower["x"]) >= 2 and set(lower) & {"y", "label", "labels", "target"}:
        return series_records(path, lower, fs)
    arrays = npz_arrays(path, data)
    rates = npz_rates(path, lower, list(arrays), fs)
    gains = npz_gains(path, data, list(arrays))
    channels = {
        n: as_channel(x, rates[n], gains[n], unit_of(data, i)) for i, (n, x) in enumerate(arrays.items())
    }
    subject = str(np.ravel(data["subject"])[0]) if np.size(data.get("subject", [])) else ""
    labels = [w for w in words(np.ravel(data["label"] if "label" in data else data.get("labels", []))) if w]
    events = npz_events(path, data, channels)
    return [Recording(path.stem, path, channels, subject, events, {"": labels} if labels else {})]


def words(values: np.ndarray) -> list[str]:
    """Labels as words; a whole number is the same with and without a decimal point, nan is none: ""."""
    values = np.asarray(values)
    found = values.astype(str).tolist()
    return found if values.dtype.kind != "f" else ["" if w == "nan" else w.removesuffix(".0") for w in found]


def npz_arrays(path, data: dict) -> dict:
    """{channel: samples} of an npz file."""
    if "sig" in data:
        rows = list(rows_of(data["sig"], "sig", path).items())
        names = named(data.get("names", data.get("lead", [])), [key for key, _ in rows])
        return dict(zip(names, (row for _, row in rows)))
    arrays = {}
    for key, array in data.items():
        if not ABOUT.fullmatch(key) and not (np.size(array) == 1 and RATE_OF.fullmatch(key)):
            for name, row in rows_of(array, key, path).items():
                arrays[unique([*arrays, name])[-1]] = row
    if not arrays:
        raise UserError(
            f"{path}: holds no signal (fields: {', '.join(data) or 'none'}); expected sig, or one array per "
            "channel"
        )
    return arrays


def named(given, plain: list) -> list[str]:
    """Names of channels without doubles: the given ones as far as they go, then the plain ones."""
    return unique([*np.atleast_1d(given), *plain[np.size(given) :]][: len(plain)])


def unit_of(data: dict, index: int) -> str:
    units = np.atleast_1d(data.get("units", ""))
    return str(units[index]) if index < len(units) else str(units[0]) if units.size == 1 else ""


def npz_rates(path, data: dict, names: list, fs) -> dict:
    """{channel: rate}: a field of the channel's own, else one number for all, else a number for each. data:
    by names in small letters."""
    shared = next((data[key] for key in RATES if key in data), None)
    rates = {}
    for i, name in enumerate(names):
        plain = (name.lower(), re.sub(r"\d+$", "", name.lower()))
        keys = [k.format(n) for n in plain for k in ("fs_{}", "{}_fs", "rate_{}", "{}_rate")]
        own = next((data[key] for key in keys if key in data), None)
        if own is None and shared is not None and np.size(shared) > 1:
            if np.size(shared) != len(names):
                raise UserError(
                    f"{path}: field fs holds {np.size(shared)} rates for {len(names)} channels "
                    f"({', '.join(names)}); give one, or one for each"
                )
            own = np.ravel(shared)[i]
        rates[name] = check_rate(shared if own is None else own, path, fs)
    return rates


def npz_gains(path, data: dict, names: list) -> dict:
    """{channel: units per physical unit}: one number for all, or one for each."""
    gain = np.asarray(data.get("gain", 1.0))
    good = gain.dtype.kind in "iuf" and np.isfinite(gain).all() and bool((gain > 0).all())
    if not good or gain.size not in (1, len(names)):
        raise UserError(
            f"{path}: field gain is {gain}, expected one number above 0 (units per physical unit), or one "
            "for each channel"
        )
    return dict(zip(names, np.broadcast_to(gain.ravel(), (len(names),)).tolist()))


def npz_events(path, data: dict, channels: dict) -> list[Event]:
    """ann_sample (or ann_seconds), ann_symbol and ann_aux as events. Samples count at `ann_fs`, else at the
    channels' common rate."""
    if "ann_sample" not in data and "ann_seconds" not in data:
        return []
    key = "ann_seconds" if "ann_seconds" in data else "ann_sample"
    places = np.asarray(data[key])
    lengths = {k: np.shape(data[k]) for k in (key, "ann_symbol", "ann_aux") if k in data}
    if len(set(lengths.values())) > 1 or not {"ann_symbol", "ann_aux"} & set(data):
        raise UserError(
            f"{path}: fields ann_* have the shapes {lengths}, expected {key} and ann_symbol of one length"
        )
    whole = key == "ann_sample"
    good = places.dtype.kind in ("iu" if whole else "iuf") and places.ndim == 1
    if not good or not np.isfinite(places).all():
        raise UserError(
            f"{path}: field {key} is {places.dtype} {places.shape}, expected "
            f"{'whole' if whole else 'finite'} numbers (beats,)"
        )
    rates = {channel.fs for channel in channels.values()} if whole else {1.0}
    if whole and "ann_fs" in data:
        rates = {check_rate(data["ann_fs"], f"{path}: ann_fs")}
    if len(rates) > 1:
        raise UserError(
            f"{path}: field ann_sample counts samples, but the channels have the rates "
            f"{', '.join(f'{r:g}' for r in sorted(rates))} Hz; add ann_fs or give ann_seconds"
        )
    rate = rates.pop()
    symbols, texts = (data.get(k, [""] * len(places)) for k in ("ann_symbol", "ann_aux"))
    return [Event(s / rate, str(a), str(b)) for s, a, b in zip(places.tolist(), symbols, texts)]


def ucr_records(path: Path, data: dict) -> list[Recording]:
    """Records of a UCR set. Where the test labels are of another kind (y_test_abnormal), the same kind is
    used in training."""
    records = []
    kind = next((key[len("y_test") :] for key in data if key.startswith("y_test")), "")
    for part in ("train", "val", "test"):
        if f"x_{part}" not in data:
            continue
        y = column_of(data.get(f"y_{part}{kind}"))
        x = series_table(path, f"x_{part}", data[f"x_{part}"], f"y_{part}{kind}", y)
        records += [
            series_record(path, part, i, rows, label) for i, (rows, label) in enumerate(zip(x, row_labels(y)))
        ]
    return records


def column_of(y):
    """Labels (N,) where they stand in a column (N, 1); others as they are."""
    return np.asarray(y)[:, 0] if np.ndim(y) == 2 and np.shape(y)[1] == 1 else y


def row_labels(y, classes=None) -> list:
    """The label of each row of y (N,), None where it is nan; of y (N, K) the names of what applies."""
    y = np.asarray(y)
    if y.ndim == 1:
        return [word or None for word in words(y)]
    names = np.arange(y.shape[1]).astype(str) if classes is None else np.atleast_1d(classes).astype(str)
    return [[str(name) for name, on in zip(names, row) if on > 0] for row in y]


def series_table(path, name: str, x, name_y: str, y) -> np.ndarray:
    """Series (N, T), (N, C, T) or (N, T, C) with their labels (N,) or (N, K), checked -> (N, C, T)."""
    x, shape_y = np.asarray(x), np.shape(y)
    fits = x.ndim in (2, 3) and x.dtype.kind in "iuf" and len(shape_y) in (1, 2) and len(x) == shape_y[0]
    if not fits or not x.size:
        found = "missing" if y is None else shape_y
        raise UserError(
            f"{path}: fields {name} {x.shape} and {name_y} {found} do not belong together; expected (N, T) "
            "or (N, channels, T), and N labels"
        )
    numbers = np.asarray(y).dtype.kind in "biuf"
    if len(shape_y) == 2 and not (numbers and np.isin(np.nan_to_num(y), (0, 1)).all()):
        raise UserError(
            f"{path}: field {name_y} {shape_y} holds other values than 0 and 1, one for each class"
        )
    if x.ndim == 2:
        return x[:, None]
    return x.transpose(0, 2, 1) if x.shape[1] > x.shape[2] else x


def series_record(path, part: str, index: int, rows, label: str | list | None, names=()) -> Recording:
    """One series of one or several dimensions (L,), called x or x0, x1 ..., without a time unit; ends where
    nothing was measured are cut off, lines go over the gaps between. label: None where there is none."""
    rows = bridged(list(rows))
    names = named(names, ["x"] if len(rows) == 1 else [f"x{i}" for i in range(len(rows))])
    channels = {name: as_channel(x, 1.0) for name, x in zip(names, rows)}
    name = f"{path.stem}:{part + '-' if part else ''}{index}"
    labels = {} if label is None else {"": [label] if isinstance(label, str) else label}
    return Recording(name, path, channels, name, labels=labels, part=part, series=True)


def bridged(rows: list) -> list[np.ndarray]:
    """Rows of one series without the ends that all of them miss, and with straight lines over what is missing
    inside."""
    rows = [np.asarray(x) for x in rows]
    if all(x.dtype.kind in "iu" or np.isfinite(x).all() for x in rows):
        return rows
    if len({len(x) for x in rows}) == 1:
        there = np.flatnonzero(np.isfinite(rows).any(0))
        if len(there):
            rows = [x[there[0] : there[-1] + 1] for x in rows]
    filled = []
    for x in rows:
        good = np.isfinite(x)
        filled.append(np.interp(np.arange(len(x)), np.flatnonzero(good), x[good]) if good.any() else x)
    return filled


def series_records(path: Path, data: dict, fs) -> list[Recording]:
    """npz `X` (N, T), (N, C, T) or (N, T, C) and `y` (N,), or (N, K) of zeros and ones; perhaps `fs`,
    `names`, `classes` (K,), `subject` and `part` (N,)."""

    def each(*keys, size=None):
        """The words of the first of these fields that there is, one for each series; "" without it."""
        key = next((key for key in keys if key in data), None)
        found, size = words(np.ravel(data.get(key, [""] * len(x)))), size or len(x)
        if key and len(found) != size:
            raise UserError(f"{path}: field {key} has {len(found)} entries, expected {size}")
        return found

    key = next(k for k in ("y", "label", "labels", "target") if k in data)
    y = column_of(data[key])
    x = series_table(path, "X", data["x"], key, y)
    names = data.get("names", data.get("leads", LEADS if x.shape[1] == 12 else []))
    rate = next((data[k.lower()] for k in RATES if k.lower() in data), fs)
    subjects = each("subject", "subjects", "groups", "patient_id")
    places = [(f"series {i}", word) for i, word in enumerate(each("part", "split"))]
    parts = parts_of(path, places, "part or split")
    classes = each("classes", size=np.shape(y)[1]) if "classes" in data and np.ndim(y) == 2 else None
    records = []
    for i, (rows, label) in enumerate(zip(x, row_labels(y, classes))):
        record = series_record(path, parts[i], i, rows, label, names)
        if rate is not None:
            record.series = False
            for channel in record.channels.values():
                channel.fs = check_rate(rate, path, fs)
        record.subject = subjects[i] or record.subject
        records.append(record)
    return records


def read_npy(path: Path, fs=None) -> list[Recording]:
    """npy: (L,) or (channels, L), memory-mapped; the rate comes from --input-fs."""
    with reading(path, "npy file of plain numbers"):
        array = np.load(path, mmap_mode="r")
    rate = check_rate(None, path, fs)
    channels = {n: as_channel(x, rate) for n, x in rows_of(array, "sig", path).items()}
    return [Recording(path.stem, path, channels)]


# ---- HDF5


def read_hdf5(path: Path, fs=None) -> list[Recording]:
    """HDF5: each data set (L,) or (channels, L) is a recording, or a channel of its group; a rate (attribute
    fs) on it, its group or the file, or a number fs beside it. `tracings` (N, T, 12) and `exam_id` are
    CODE-15.
    """
    records = {}

    def rate_of(item, file):
        places = [item.attrs, item.parent.attrs, file.attrs]
        stated = [value for place in places for key, value in place.items() if key.lower() in RATES]
        near = [f"{item.name.split('/')[-1]}_fs".lower(), *RATES]
        for name in [] if stated else [name for name in item.parent if name.lower() in near]:
            beside = hdf5_item(item.parent, name)
            if isinstance(beside, h5py.Dataset) and beside.size == 1:
                stated.append(beside[()])
        return stated[0] if stated else None

    def visit(name, item):
        plain = isinstance(item, h5py.Dataset) and item.dtype.kind in "iuf" and item.ndim in (1, 2)
        if not plain or item.size < 2 or ABOUT.fullmatch(name.split("/")[-1]):
            return
        item = hdf5_item(file, name)
        group, where = item.parent, f"{path}: {name}"
        key = path.stem + (f":{group.name.strip('/')}" if group.name != "/" else "")
        subject = next((a["subject"] for a in (item.attrs, group.attrs) if "subject" in a), "")
        record = records.setdefault(key, Recording(key, path, {}, word_of(subject, path)))
        rate, rows = check_rate(rate_of(item, file), where, fs), rows_of(item[:], name.split("/")[-1], where)
        said = {k: [word_of(v, path) for v in np.ravel(item.attrs.get(k, []))] for k in ("names", "units")}
        names, gains = named(said["names"], list(rows)), npz_gains(where, item.attrs, list(rows))
        for i, (label, (key, row)) in enumerate(zip(names, rows.items())):
            label = unique([*record.channels, label])[-1]
            record.channels[label] = as_channel(row, rate, gains[key], unit_of(said, i))

    with reading(path, "HDF5 file"), h5py.File(path, "r") as file:
        if "tracings" in file and hdf5_item(file, "tracings", whole=False).ndim == 3:
            return tracings(path, file, fs)
        file.visititems(visit)
    if not records:
        raise UserError(f"{path}: holds no data set of numbers (L,) or (channels, L)")
    return list(records.values())


def word_of(value, path) -> str:
    """An attribute as a word: h5py gives text that is not UTF-8 with surrogates, or as bytes."""
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogateescape")
    return decoded(value, path) if isinstance(value, bytes) else str(value)


def tracings(path: Path, file, fs) -> list[Recording]:
    """Recordings of a CODE-15 file: `tracings` (N, T, 12) at 400 Hz, `exam_id` (N,); zeros that pad both ends
    are gaps."""
    ids = hdf5_item(file, "exam_id")[:] if "exam_id" in file else np.arange(len(file["tracings"]))
    rate, records = check_rate(400.0 if fs is None else fs, path), []
    if len(ids) != len(file["tracings"]):
        raise UserError(f"{path}: {len(file['tracings'])} tracings have {len(ids)} entries of exam_id")
    for exam, x in zip(ids.tolist(), file["tracings"]):
        x = np.array(x, np.float32)
        if not exam and not x.any():  # the last row of each published file is empty
            continue
        there = np.flatnonzero(x.any(1))
        if len(there):
            x[: there[0]], x[there[-1] + 1 :] = np.nan, np.nan
        names = LEADS if x.shape[1] == 12 else [f"x{i}" for i in range(x.shape[1])]
        channels = {n: as_channel(x[:, i], rate) for i, n in enumerate(names)}
        records.append(Recording(f"{path.stem}:{exam}", path, channels))
    return records


# ---- UCR


def read_ts(path: Path, fs=None) -> list[Recording]:
    """A UCR/UEA .ts file, `name_TRAIN.ts` or `name_TEST.ts`: lines `v1,v2,...:w1,w2,...:label` after @data,
    one group of values for each dimension, ? for what is missing."""
    lines, data = data_lines(path, "the UCR .ts format", "#")
    head = {w[0].lower(): [v.lower() for v in w[1:]] for w in map(str.split, lines) if w}
    labelled = head.get("@classlabel", ["true"])[:1] != ["false"] or head.get("@targetlabel") == ["true"]
    if head.get("@timestamps", ["false"])[:1] == ["true"]:
        raise UserError(f"{path}: holds time stamps, which are not read; write the values alone")
    records = []
    for number, line in data:
        groups = line.split(":")
        label = groups.pop().strip() if labelled else ""
        rows = rows_in_line(path, number, [group.split(",") for group in groups], "after a colon")
        records.append(series_record(path, part_of(path), len(records), rows, label or None))
    return records


def read_arff(path: Path, fs=None) -> list[Recording]:
    """A UCR/UEA .arff file: values and a label between commas after @data; dimensions as one quoted value
    with \\n between them. The label is the first attribute that lists its values, else the last one."""
    lines, data = data_lines(path, "the ARFF format", "%")
    attributes = [line.strip() for line in lines if line.strip().lower().startswith("@attribute")]
    place = next((i for i, line in enumerate(attributes) if line.endswith("}")), -1)
    records = []
    for number, line in data:
        quote = '"' if '"' in line else "'"
        values = next(csv.reader([line], quotechar=quote, skipinitialspace=True))
        label = values.pop(place if len(values) == len(attributes) else -1).strip().strip("'\"")
        groups = [group.split(",") for group in values[0].split("\\n")] if len(values) == 1 else [values]
        rows = rows_in_line(path, number, groups, "at the end")
        records.append(series_record(path, part_of(path), len(records), rows, label or None))
    return records


def data_lines(path: Path, form: str, comment: str) -> tuple[list[str], list[tuple[int, str]]]:
    """(lines before @data, [(number, line)] of those after it that are neither empty nor comments)."""
    lines = read_text(path).split("\n")
    start = next((i for i, line in enumerate(lines) if line.strip().lower() == "@data"), None)
    if start is None:
        raise UserError(f"{path}: has no @data line; expected {form}")
    after = [(i + 1, lines[i].strip()) for i in range(start + 1, len(lines))]
    return lines[:start], [(i, line) for i, line in after if line and not line.startswith(comment)]


def rows_in_line(path, number: int, groups: list, place: str) -> list[np.ndarray]:
    """Groups of values in words as rows of numbers, nan for ?; UserError naming the line otherwise."""
    try:
        if not groups:
            raise ValueError
        return [np.array([np.nan if v.strip() == "?" else float(v) for v in group]) for group in groups]
    except ValueError:
        raise UserError(f"{path}: line {number}: not numbers with a label {place}") from None


def part_of(path: Path) -> str:
    """The part that a UCR file's name states: name_TRAIN, name_TEST."""
    return "test" if path.stem.upper().endswith("TEST") else "train"
