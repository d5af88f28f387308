"""Labelled windows for fine-tuning and testing.

Four tasks on the same store of prepared signals (dataset.py):

    beat    a window centred on every annotated beat, and the rhythm around it as features, perhaps its
            amplitude in the record too; AAMI classes N, S, V and F
    rhythm  windows side by side, labelled by the rhythm annotation in force; windows across a change are
            left out
    series  one label for a whole record: UCR sets, and npz files with a field `label`; longer records give
            several windows
    labels  none, one or several labels for a whole record: PTB-XL, PhysioNet Challenge, CODE-15, manifests

Records are split by subject: part "train" or "test" from the files themselves (UCR), a split file, or the
inter-patient list DS1 of de Chazal et al. 2004, in which a record of any other name belongs to the test part.

Upstream file: dataset_cls.py (PPGAugmentor, DownstreamClassificationDataset).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.files import read_json
from cwt_mae.dataset import Store, sample_rng
from cwt_mae.layouts import name_of
from cwt_mae.readers import extra

DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
AAMI = {"N": "NLRejB", "S": "AaJSn", "V": "VEr", "F": "F", "Q": "/fQ?"}  # WFDB beat codes of each AAMI class
AAMI_OF = {code.encode(): name for name, codes in AAMI.items() for code in codes}
NOT_BEATS = {*"[!]xp()tu`'^|~+sTD=\"@*&", ""}
RHYTHM = 11  # numbers of `rhythm_features`
BEAT_CLASSES = ["N", "S", "V", "F"]  # Q (paced, unclassifiable) is left out, as usual
ITEMS = np.dtype([("record", "i4"), ("start", "i8"), ("label", "i2"), ("beat", "i4")])


@dataclass
class Task:
    """Labelled windows of one task. items: ITEMS, start in samples (negative: begins before the record).

    features: (beats, F) float32 that the head gets, F = 0 but for beats. targets: (windows, C) bool of a task
    in which several labels may apply to a window; its items have the label 0.
    """

    kind: str
    classes: list
    items: np.ndarray
    features: np.ndarray
    targets: np.ndarray | None = None

    def select(self, keep) -> "Task":
        """The windows that `keep` picks, a mask or indices."""
        targets = None if self.targets is None else self.targets[keep]
        return Task(self.kind, self.classes, self.items[keep], self.features, targets)

    def without_features(self) -> "Task":
        """The same windows for a head that gets no features."""
        return Task(self.kind, self.classes, self.items, self.features[:, :0], self.targets)

    def counts(self) -> np.ndarray:
        """Windows of each class: (classes,)."""
        if self.targets is not None:
            return self.targets.sum(0)
        return np.bincount(self.items["label"], minlength=len(self.classes))


def load_task(
    store: Store,
    kind: str,
    signal_len: int,
    classes=None,
    skip_bad: bool = False,
    level: str = "",
    amplitude: bool = False,
) -> Task:
    """All labelled windows of a store. classes: known class names, in order; a label outside them is an
    error. level: which labels of a record count, for task labels. amplitude: see `beat_features`."""
    if kind == "labels":
        return many_labels(store, signal_len, classes, skip_bad, level)
    if kind == "beat":
        names, rows, features = beat_items(store, signal_len, amplitude)
    else:
        names, rows, features = {"rhythm": rhythm_items, "series": series_items}[kind](store, signal_len)
    if not rows:
        raise UserError(
            f"{store.about['files']} files hold no label for task {kind}: expected {LABELS[kind]}"
        )
    classes = classes or (BEAT_CLASSES if kind == "beat" else sorted(set(names), key=natural))
    index = {name: i for i, name in enumerate(classes)}
    unknown = [
        i for i, name in enumerate(names) if name not in index and not (kind == "beat" and name == "Q")
    ]
    if unknown and not skip_bad:
        record, start = rows[unknown[0]][:2]
        raise UserError(
            f"{store.where(record)}: label {names[unknown[0]]!r} at sample {start} is none of "
            f"{', '.join(classes)}; mend it or pass --skip-bad"
        )
    if unknown:
        print(f"skipped {len(unknown)} windows whose label is none of {', '.join(classes)}", file=sys.stderr)
    kept = [(r, s, index[name], b) for name, (r, s, b) in zip(names, rows) if name in index]
    return Task(kind, list(classes), np.array(kept, ITEMS), features)


def many_labels(store: Store, signal_len: int, classes, skip_bad: bool, level: str) -> Task:
    """Windows side by side over each record that has labels of `level`, all of which apply to each window."""
    levels = sorted(set(np.char.decode(store.labels["level"]).tolist()))
    if level not in levels:
        known = ", ".join(name or "''" for name in levels) or "none"
        raise UserError(
            f"the records have no labels of level {level!r}; levels: {known}; choose one with --level"
        )
    rows = store.labels[store.labels["level"] == level.encode()]
    own = {}
    for record, label in zip(rows["record"].tolist(), np.char.decode(rows["label"]).tolist()):
        own.setdefault(record, set()).update({label} - {""})
    names = sorted(set().union(*own.values()), key=natural)
    classes = list(classes or names)
    unknown = sorted(set(names) - set(classes))
    if unknown and not skip_bad:
        raise UserError(f"label {unknown[0]!r} is none of {', '.join(classes)}; mend it or pass --skip-bad")
    items, targets = [], []
    for record in (r for r in store.anchors.tolist() if r in own):
        total, applies = int(store.records[record]["length"]), [name in own[record] for name in classes]
        for start in range(0, max(1, total - signal_len + 1), signal_len):
            items.append((record, start, 0, 0))
            targets.append(applies)
    if not items:
        raise UserError(f"{store.about['files']} files hold no label for task labels")
    return Task(
        "labels", classes, np.array(items, ITEMS), np.zeros((1, 0), np.float32), np.array(targets, bool)
    )


LABELS = {
    "beat": "at least three beats of a record (.atr, or ann_sample and ann_symbol)",
    "rhythm": "rhythm annotations such as (AFIB in ann_aux",
    "series": "a field label, or a UCR set",
}


def natural(name: str):
    """Sort key: numbers by value, then text."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def events_of(store: Store):
    """(record index, its events) for each record that windows are counted on and that has any."""
    edges = np.searchsorted(store.events["record"], np.arange(len(store.records) + 1))
    for record in store.anchors.tolist():
        if edges[record + 1] > edges[record]:
            yield record, store.events[edges[record] : edges[record + 1]]


def beats_of(store: Store):
    """(record index, its beat events) for each record with at least three beats; UserError for an unknown
    annotation code."""
    for record, events in events_of(store):
        odd = [s.decode() for s in set(events["symbol"]) if s not in AAMI_OF and s.decode() not in NOT_BEATS]
        if odd:
            raise UserError(
                f"{store.where(record)}: field ann_symbol holds {odd[0]!r}, which is no WFDB annotation code"
            )
        beats = events[[s in AAMI_OF for s in events["symbol"]]]
        if len(beats) >= 3:
            yield record, beats


def beat_items(store: Store, signal_len: int, amplitude: bool):
    """One window around each beat, with `beat_features`."""
    names, rows, features = [], [], []
    for record, beats in beats_of(store):
        rate = store.rate(record)
        centres = np.round(beats["seconds"] * rate).astype(int)
        features.append(beat_features(store, record, beats["seconds"], amplitude))
        names += [AAMI_OF[s] for s in beats["symbol"]]
        rows += [(record, int(c) - signal_len // 2, len(rows) + i) for i, c in enumerate(centres)]
    return names, rows, np.concatenate(features) if features else np.zeros((0, 0), np.float32)


def detected_beats(store: Store, classes: list, signal_len: int, amplitude: bool = False) -> Task:
    """Windows without labels at the R peaks that the detector XQRS of the package wfdb finds in each record,
    with `beat_features`."""
    processing = extra("wfdb.processing", "--unlabelled with a beat classifier")
    items, features = [], []
    for record in store.anchors.tolist():
        rate, signal = store.rate(record), store.signal(record)
        if len(signal) < rate:  # the detector's filters want more, and a second holds no three beats
            continue
        peaks = processing.xqrs_detect(signal.astype(np.float64), rate, verbose=False)
        if len(peaks) < 3:
            continue
        peaks = on_the_peak(signal, np.asarray(peaks), round(0.06 * rate))
        items += [(record, int(p) - signal_len // 2, -1, len(items) + i) for i, p in enumerate(peaks)]
        features.append(beat_features(store, record, peaks / rate, amplitude))
    if not items:
        raise UserError("no record holds three heart beats that the detector finds; check --channel")
    return Task("beat", classes, np.array(items, ITEMS), np.concatenate(features))


def on_the_peak(signal: np.ndarray, peaks: np.ndarray, reach: int) -> np.ndarray:
    """Places (n,) moved by up to `reach` samples to where the signal lies furthest from its median."""
    near = np.clip(peaks[:, None] + np.arange(-reach, reach + 1), 0, len(signal) - 1)
    return near[np.arange(len(peaks)), np.abs(signal[near] - np.median(signal)).argmax(1)]


def cut_edges(signal: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Windows (n, length) from `starts`; beyond its ends the record goes on with its first or last sample."""
    return signal[np.clip(starts[:, None] + np.arange(length), 0, len(signal) - 1)]


def beat_features(store: Store, record: int, seconds: np.ndarray, amplitude: bool) -> np.ndarray:
    """`rhythm_features` of a record's beats, and with `amplitude` its `amplitude_features`: (beats, 11 or
    19)."""
    rhythm, rate = rhythm_features(seconds), store.rate(record)
    if not amplitude:
        return rhythm
    shape = amplitude_features(store.signal(record), np.round(seconds * rate).astype(int), rate)
    return np.concatenate([rhythm, shape], 1)


def amplitude_features(signal: np.ndarray, centres: np.ndarray, rate: float) -> np.ndarray:
    """How large and how wide each beat is beside the others of its record, (beats, 8) float32: what the
    windows, z-scored one by one, do not show.

    The scale is the record's own median height of a QRS complex. Of the beat from .25 s before to .45 s after
    its centre: height and area (logarithms), highest and lowest point, width, all less their medians or over
    them; correlation with the record's median beat, and distance from it in the whole and around the QRS.
    """
    before, reach = round(0.25 * rate), max(1, round(0.1 * rate))
    x = cut_edges(signal, centres - before, round(0.7 * rate))
    x = x - np.median(x, 1, keepdims=True)
    qrs = x[:, before - reach : before + reach + 1]
    height, area = np.ptp(qrs, axis=1) + 1e-6, np.abs(x).sum(1) + 1e-6
    x, scale = x / np.median(height), np.median(height)
    usual = np.median(x, 0)
    beside = x - usual
    core = slice(max(0, before - reach), before + reach + 1)
    width = (np.abs(qrs - np.median(qrs, 1, keepdims=True)) > 0.3 * height[:, None]).mean(1)
    centred, pattern = x - x.mean(1, keepdims=True), usual - usual.mean()
    alike = centred @ pattern / (np.linalg.norm(centred, axis=1) * np.linalg.norm(pattern) + 1e-9)
    columns = [
        np.log(height / scale),
        np.log(area / np.median(area)),
        x.max(1) - np.median(x.max(1)),
        x.min(1) - np.median(x.min(1)),
        4 * (width - np.median(width)),
        alike,
        np.sqrt(np.square(beside).mean(1)),
        np.sqrt(np.square(beside[:, core]).mean(1)),
    ]
    return np.clip(np.stack(columns, 1), -4, 4).astype(np.float32)


def rhythm_features(seconds: np.ndarray) -> np.ndarray:
    """What a record's beat times, in seconds, say about each beat, without using any label: (beats, 11)
    float32.

    Logarithms of the intervals before and after it, relative to the record's or the neighbourhood's own (a
    ratio means the same in every patient), and how irregular that neighbourhood is (an early beat means
    little in atrial fibrillation). Clipped to +-4.
    """
    gaps = np.clip(np.diff(seconds), 0.15, 3.0)
    before, after = np.r_[gaps[:1], gaps], np.r_[gaps, gaps[-1:]]
    near, whole = median_filter(before, 21, mode="nearest"), np.median(gaps)
    sums = np.cumsum(np.r_[0, before])
    # Mean of this and the ten intervals before
    place = np.arange(len(before))
    lows = np.maximum(0, place - 10)
    past = (sums[1:] - sums[lows]) / (place + 1 - lows)
    early = np.log(before / near)
    spread = median_filter(np.abs(early), 41, mode="nearest")
    change = median_filter(np.abs(np.diff(np.r_[before[:1], before])) / near, 41, mode="nearest")
    columns = [
        early,
        np.log(after / near),
        np.log(after / before),
        np.log(before / whole),
        np.log(before / past),
        np.log(np.r_[before[:1], before[:-1]] / near),
        np.log(np.r_[after[1:], after[-1:]] / near),
        np.log(near / whole),
        np.log(spread + 0.01) + 4,
        np.log(change + 0.01) + 4,
        early / (spread + 0.03) / 2,
    ]
    return np.clip(np.stack(columns, 1), -4, 4).astype(np.float32)


def fibrillation(records: int = 64, beats: int = 500) -> np.ndarray:
    """`rhythm_features` of simulated atrial fibrillation, intervals that vary by 10 to 25 % without order:
    (records * beats, 11)."""
    rng = np.random.default_rng(0)
    spreads = rng.uniform(0.1, 0.25, (records, 1))
    gaps = np.clip(0.75 * np.exp(spreads * rng.standard_normal((records, beats))), 0.3, 2.0)
    return np.concatenate([rhythm_features(seconds) for seconds in np.cumsum(gaps, axis=1)])


def rhythm_items(store: Store, signal_len: int):
    """Windows side by side within each stretch of one rhythm; the label is the annotation's text without its
    bracket."""
    names, rows = [], []
    for record, events in events_of(store):
        rate, total = store.rate(record), int(store.records[record]["length"])
        for name, begin, end in rhythm_spans(events, total / rate):
            first = round(begin * rate)
            for start in range(first, min(round(end * rate), total) - signal_len + 1, signal_len):
                names.append(name)
                rows.append((record, start, 0))
    return names, rows, np.zeros((1, 0), np.float32)


def rhythm_spans(events: np.ndarray, seconds: float) -> list[tuple[str, float, float]]:
    """(name, begin, end) in seconds of each stretch of one rhythm: from a mark "(AFIB" to the next one, or as
    long as an annotation states."""
    marks = events[[aux.startswith(b"(") for aux in events["aux"]]]
    ends = np.r_[marks["seconds"][1:], seconds]
    spans = [(m["aux"].decode()[1:], float(m["seconds"]), float(end)) for m, end in zip(marks, ends)]
    for event in events[(events["duration"] > 0) & (events["aux"] != b"")]:
        if not event["aux"].startswith(b"("):
            begin = float(event["seconds"])
            spans.append((event["aux"].decode(), begin, begin + float(event["duration"])))
    return spans


def series_items(store: Store, signal_len: int):
    """Windows side by side over each labelled record; a record shorter than the window gives one, padded."""
    names, rows = [], []
    for record, label in labels_of(store).items():
        total = int(store.records[record]["length"])
        starts = range(0, max(1, total - signal_len + 1), signal_len)
        names += [label] * len(starts)
        rows += [(record, start, 0) for start in starts]
    return names, rows, np.zeros((1, 0), np.float32)


def labels_of(store: Store) -> dict:
    """{record: label}: the one label of each labelled record; UserError where one has several or none."""
    found = {}
    rows = store.labels[store.labels["level"] == b""]
    for row in rows[np.isin(rows["record"], store.anchors)]:
        record = int(row["record"])
        if record in found or not row["label"]:
            raise UserError(
                f"{store.where(record)}: has {'several labels' if row['label'] else 'no label'}, but --task "
                "series wants one for each record"
            )
        found[record] = row["label"].decode()
    return found


# ---- splits


def split_parts(store: Store, split_file=None) -> np.ndarray:
    """(records,) str: "train", "val", "test" or "" (in no list of a split file).

    In this order: split_file, JSON {"train": [names], "test": [names], "val": [names]}; the parts that the
    files themselves, a manifest or a database's tables state, and what has none there is in none; a record
    named in DS1 is for training and any other is for the test.
    """
    names = np.char.decode(store.records["name"])
    if split_file:
        parts = listed_parts(store, split_file, names)
    else:
        own = np.char.decode(store.records["part"])
        ds1 = np.array([name_of(Path(name)).rpartition("/")[2] in DS1 for name in names])
        parts = own if (own != "").any() else np.where(ds1, "train", "test")
    check_parts(store, parts)
    return parts


def listed_parts(store: Store, split_file, names: np.ndarray) -> np.ndarray:
    """The part of each record in the lists of a split file. A listed name is a record's whole name, or the
    end of it where only one record ends so; a file that holds several records stands for all of them."""
    lists = read_json(split_file, {"train": [str], "test": [str], "val?": [str]})
    whole, ends, said = {}, {}, {}  # the records that a name, or the end of one, means; a record's part
    for name in set(names.tolist()):
        plain, file = name_of(name), name.partition(":")[0]
        for text in {name, plain, file}:
            whole.setdefault(text, set()).add(name)
        for text in {plain, file}:
            for place in range(text.count("/") + 1):
                ends.setdefault(text.split("/", place)[-1], set()).add(name)
    for part in ("train", "val", "test"):
        listed, lost = lists.get(part) or [], []
        for entry in listed:
            wanted = name_of(Path(entry))
            found = whole.get(entry, set()) | whole.get(wanted, set()) or ends.get(wanted, set())
            if wanted not in whole and len({name.partition(":")[0] for name in found}) > 1:
                raise UserError(
                    f"{split_file}: {entry} could be {' or '.join(sorted(found)[:3])}; write the whole name"
                )
            if not found:
                lost.append(entry)
            if {said.get(name, part) for name in found} - {part}:
                raise UserError(f"{split_file}: {entry} stands in two lists; leave it in one")
            said |= dict.fromkeys(found, part)
        if 0 < len(lost) < len(listed) and not store.about["skipped"]:
            raise UserError(
                f"{split_file}: the data hold {len(listed) - len(lost)} records of {part}, but not "
                f"{', '.join(sorted(lost)[:5])}"
            )
    listed = [entry for part in ("train", "val", "test") for entry in lists.get(part) or []]
    if listed and not said:
        several = lambda texts: ", ".join(texts[:2]) + ", ..." * (len(texts) > 2)
        raise UserError(
            f"{split_file}: none of its {len(listed)} names ({several(listed)}) is a record of the data; "
            f"those are called {several(list(dict.fromkeys(names.tolist())))}"
        )
    return np.array([said.get(name, "") for name in names.tolist()], "<U5")


def check_parts(store: Store, parts: np.ndarray):
    """UserError for a subject that has records in two parts."""
    subjects = store.records["subject"]
    for first, second in (("train", "test"), ("train", "val"), ("val", "test")):
        both = set(subjects[parts == first]) & set(subjects[parts == second])
        if both:
            names = {"train": "training", "val": "validation", "test": "test"}
            raise UserError(
                f"subject {sorted(both)[0].decode()} has records in the {names[first]} and in the "
                f"{names[second]} part; put them into one"
            )


def training_part(task: Task, parts: np.ndarray) -> Task:
    """The windows of the training records; UserError if there are none."""
    train = task.select(parts[task.items["record"]] == "train")
    if not len(train.items):
        raise UserError(
            f"no labelled window for task {task.kind} belongs to the training part (the list train of "
            "--split, else what the data state, else records named in DS1); check --split"
        )
    return train


def share_of(task: Task, share: float, seed: int, recordings) -> np.ndarray:
    """(windows,) bool: a share of the labels, drawn by `seed`, of each class alike, and at least one. A
    smaller share is part of a larger one. Where a label is a recording's, whole recordings are drawn;
    recordings (windows,): `Store.recordings`."""
    unit = recordings if task.kind in ("series", "labels") else np.arange(len(task.items))
    units, first = np.unique(unit, return_index=True)
    order = np.random.default_rng(seed).permutation(len(units))
    labels, chosen = task.items["label"][first[order]], []
    for label in np.unique(labels):
        own = units[order[labels == label]]
        chosen += own[: max(1, round(share * len(own)))].tolist()
    return np.isin(unit, chosen)


def fold_of(store: Store, task: Task, folds: int) -> np.ndarray:
    """(records,) int: which of `folds` validation folds each record's subject is in; -1 for a record without
    a window.

    Subjects are sorted by how many windows of the rarest classes they have and dealt out in turn, so that
    every fold holds some of each class where that is possible.
    """
    counts = np.zeros((len(store.records), len(task.classes)), int)
    np.add.at(counts, (task.items["record"], task.items["label"]), 1)
    subjects, number = np.unique(store.records["subject"], return_inverse=True)
    table = np.zeros((len(subjects), len(task.classes)), int)
    np.add.at(table, number, counts)
    rare_first = np.argsort(table.sum(0), kind="stable")
    present = np.flatnonzero(table.sum(1))
    if len(present) < folds:
        raise UserError(f"--folds {folds}: only {len(present)} subjects have labels; use fewer folds")
    order = sorted(present, key=lambda s: [-table[s, c] for c in rare_first])
    fold = np.full(len(subjects), -1)
    fold[order] = np.arange(len(order)) % folds
    return fold[number]


# ---- windows


def augment(x: np.ndarray, rng: np.random.Generator, rate: float, strength: float, flip: bool) -> np.ndarray:
    """Gain, slow drift and noise of a z-scored window (L,), and its sign if `flip` (PPG, not ECG). strength 0
    = none."""
    time = np.arange(len(x)) / rate
    drift = np.sin(2 * np.pi * (rng.uniform(0.1, 0.5) * time + rng.random()))
    sign = -1 if flip and rng.random() < 0.5 else 1
    return sign * (
        x * rng.uniform(1 - 0.2 * strength, 1 + 0.2 * strength)
        + strength * rng.uniform(0, 0.15) * drift
        + strength * rng.uniform(0, 0.08) * rng.standard_normal(len(x))
    )


class DownstreamClassificationDataset(Dataset):
    """Windows of a task. An item is a pure function of (seed, epoch, index) and holds

        x, real        signal float32 (signal_len,) or (M, signal_len), and bool, False = padding
        label          index of the class, or for task labels float32 (C,), 1 for each that applies
        features       float32 (F,), the rhythm around a beat; F = 0 for other tasks
        index, name    place among the task's items, and "record@first sample"
        median_beat    median over the windows of the record, where the attribute `median_beats` holds it
        label2, blend  with mixup: the second window's label, and the weight of the first one

    Without `draws` every window comes once, in order. With draws > 0 (training) an epoch is that many draws
    with replacement. A class is drawn in proportion to its count to the power `power`: 1 keeps the data's own
    distribution, 0 makes all classes equally frequent. Windows are shifted by up to `jitter` samples and
    augmented by `strength`, their features perturbed. A fraction `fibrillation_fraction` of the beats other
    than S gets the features of simulated atrial fibrillation: few patients have it, and an early normal beat
    is normal there. mixup > 0 blends each window with a second draw, by a weight from Beta(mixup, mixup).
    """

    def __init__(
        self,
        store: Store,
        task: Task,
        signal_len: int,
        seed: int = 0,
        draws: int = 0,
        power: float = 1.0,
        strength: float = 0.0,
        jitter: int = 0,
        flip: bool = False,
        mixup: float = 0.0,
        fibrillation_fraction: float = 0.0,
    ):
        self.store, self.task, self.signal_len, self.seed, self.draws = store, task, signal_len, seed, draws
        self.strength, self.jitter, self.flip, self.mixup = strength, jitter, flip, mixup
        self.fibrillation_fraction = fibrillation_fraction
        self.fibrillation = fibrillation() if fibrillation_fraction else None
        self.median_beats = {}
        if draws:
            counts = task.counts()
            powers = np.where(counts > 0, counts.astype(float) ** power, 0.0)
            self.drawn_prior = powers / powers.sum()
            weights = (self.drawn_prior / np.maximum(counts, 1))[task.items["label"]]
            if task.targets is not None:  # no window belongs to one class
                weights = np.ones(len(task.items))
            self.cumulative = np.cumsum(weights) / weights.sum()
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
        """Draw the windows of an epoch."""
        self.epoch = epoch
        if self.draws:
            self.drawn = self.pick(np.random.default_rng((self.seed, epoch)).random(self.draws))

    def pick(self, places):
        """Items at `places` in [0, 1) of the drawing distribution."""
        return np.minimum(np.searchsorted(self.cumulative, places), len(self.cumulative) - 1)

    def __len__(self):
        return self.draws or len(self.task.items)

    def __getitem__(self, index):
        place = int(self.drawn[index]) if self.draws else int(index)
        rng = sample_rng(self.seed, self.epoch, int(index))
        item = self.window(place, rng)
        if self.draws and self.mixup:
            other = self.window(int(self.pick(rng.random())), rng)
            blend = np.float32(rng.beta(self.mixup, self.mixup))
            item["real"] &= other["real"]
            for name in {"x", "features", "median_beat"} & set(item):
                item[name] = blend * item[name] + (1 - blend) * other[name]
            item["x"][~item["real"]] = 0
            item |= {"label2": other["label"], "blend": blend}
        return item

    def window(self, place: int, rng: np.random.Generator) -> dict:
        """Item `place` of the task, augmented in training."""
        item = self.task.items[place]
        record, start = int(item["record"]), int(item["start"])
        signal, row = self.store.signal(record), self.store.records[record]
        if self.draws and self.jitter:
            start += int(rng.integers(-self.jitter, self.jitter + 1))
        # A beat stays in the middle of its window, so what lies before the record is padded on the left.
        lead = max(0, -start) if self.task.kind == "beat" else 0
        cut = signal[max(0, start) : max(0, start) + self.signal_len - lead]
        features = self.features_of(item, rng)
        if self.draws and self.strength:
            rate = self.store.rate(record)
            standard = (cut - cut.mean()) / max(float(cut.std()), 1e-6)
            cut = augment(standard, rng, rate, self.strength, self.flip)
            noise = rng.standard_normal(len(features), np.float32)
            features = features + np.float32(0.1 * self.strength) * noise
        if self.store.prepare.leads:
            x, real = self.several_leads(record, start, rng)
        else:
            x, real = self.store.prepare.window(cut, self.signal_len, lead)
        found = {
            "x": torch.from_numpy(x),
            "real": torch.from_numpy(real),
            "label": self.label(place),
            "features": torch.from_numpy(features),
            "index": place,
            "name": f"{row['name'].decode()}@{start}",
        }
        if record in self.median_beats:
            found["median_beat"] = self.median_beats[record]
        return found

    def label(self, place: int):
        """Index of the class, or where several labels may apply 1 for each that does: float32 (C,)."""
        if self.task.targets is None:
            return int(self.task.items["label"][place])
        return self.task.targets[place].astype(np.float32)

    def several_leads(self, record: int, start: int, rng: np.random.Generator):
        """The window of all leads, augmented lead by lead in training."""
        x, real = self.store.leads(record, start, self.signal_len)
        if self.draws and self.strength:
            for lead in np.flatnonzero(real.any(1)):
                x[lead] = augment(x[lead], rng, self.store.rate(record), self.strength, self.flip)
            x[~real] = 0
        return x, real

    def features_of(self, item, rng: np.random.Generator) -> np.ndarray:
        """The beat's own features, or in training now and then those of simulated fibrillation (not for
        S)."""
        if self.draws and self.fibrillation_fraction and self.task.classes[item["label"]] != "S":
            if rng.random() < self.fibrillation_fraction:
                found = self.fibrillation[rng.integers(len(self.fibrillation))]
                return np.concatenate([found, self.task.features[item["beat"], len(found) :]])
        return self.task.features[item["beat"]]


@torch.no_grad()
def median_beats(
    measure, store: Store, task: Task, signal_len: int, batch: int = 512, at_most: int = 512
) -> dict:
    """{record: median over its windows of measure(x, real)}: what is the patient's own; rare beats do not
    move a median.

    measure: x (B, L) float32, real (B, L) bool -> (B, M) on the CPU, of `batch` windows at once. No label is
    used. at_most: windows of each record, evenly spread.
    """
    found = {}
    for record in np.unique(task.items["record"]).tolist():
        here = np.flatnonzero(task.items["record"] == record)
        here = here[np.linspace(0, len(here) - 1, min(at_most, len(here))).astype(int)]
        windows = DownstreamClassificationDataset(store, task.select(here), signal_len)
        batches = DataLoader(windows, batch, generator=torch.Generator())
        found[record] = torch.cat([measure(b["x"], b["real"]) for b in batches]).median(0).values
    return found
