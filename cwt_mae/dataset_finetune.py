"""Labelled windows for fine-tuning and testing.

Three tasks on the same store of prepared signals (dataset.py):

    beat    a window centred on every annotated beat; AAMI classes N S V F; what the record's other beats say about this
            one (rhythm and shape relative to the record's own median beat) goes to the head as numbers
    rhythm  windows side by side, labelled by the rhythm annotation in force; windows across a change are left out
    series  one label for a whole record: UCR sets, and npz files with a field `label`; longer records give several windows

Records are split by subject: part "train" or "test" from the files themselves (UCR), a split file, or the inter-patient
list DS1 of de Chazal et al. 2004, in which a record of any other name belongs to the test part.

Upstream file: dataset_cls.py (PPGAugmentor, DownstreamClassificationDataset).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root: every way of starting this file finds it
from common.errors import UserError
from cwt_mae.dataset import Store, sample_rng

DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
AAMI = {"N": "NLRejB", "S": "AaJSn", "V": "VEr", "F": "F", "Q": "/fQ?"}  # WFDB beat codes of each AAMI class
AAMI_OF = {code.encode(): name for name, codes in AAMI.items() for code in codes}
NOT_BEATS = set("[!]xp()tu`'^|~+sTD=\"@*&") | {"p", "t", ""}
BEAT_CLASSES = ["N", "S", "V", "F"]  # Q (paced, unclassifiable) is left out, as usual
ITEMS = np.dtype([("record", "i4"), ("start", "i8"), ("label", "i2"), ("beat", "i4")])


@dataclass
class Task:
    """Labelled windows of one task. items: ITEMS, start in samples (negative: begins before the record).

    features: (beats, F) float32 that the head gets, F = 0 but for beats.
    """

    kind: str
    classes: list
    items: np.ndarray
    features: np.ndarray

    def select(self, keep) -> "Task":
        return Task(self.kind, self.classes, self.items[keep], self.features)

    def counts(self) -> np.ndarray:
        return np.bincount(self.items["label"], minlength=len(self.classes))


def load_task(store: Store, kind: str, signal_len: int, classes=None, skip_bad: bool = False) -> Task:
    """All labelled windows of a store. classes: known class names, in order; a label outside them is an error."""
    makers = {"beat": beat_items, "rhythm": rhythm_items, "series": series_items}
    names, rows, features = makers[kind](store, signal_len)
    if not rows:
        raise UserError(f"{store.about['files']} files hold no label for task {kind}: expected {LABELS[kind]}")
    classes = classes or (BEAT_CLASSES if kind == "beat" else sorted(set(names), key=natural))
    index = {name: i for i, name in enumerate(classes)}
    unknown = [i for i, name in enumerate(names) if name not in index and not (kind == "beat" and name == "Q")]
    if unknown and not skip_bad:
        record, start = rows[unknown[0]][:2]
        raise UserError(
            f"{store.where(record)}: label {names[unknown[0]]!r} at sample {start} is none of {', '.join(classes)}; "
            "mend it or pass --skip-bad"
        )
    if unknown:
        print(f"skipped {len(unknown)} windows whose label is none of {', '.join(classes)}", file=sys.stderr)
    kept = [(r, s, index[name], b) for name, (r, s, b) in zip(names, rows) if name in index]
    return Task(kind, list(classes), np.array(kept, ITEMS), features)


LABELS = {
    "beat": "beat annotations (.atr, or ann_sample and ann_symbol)",
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
    """(record index, its events) for each record that has any."""
    edges = np.searchsorted(store.events["record"], np.arange(len(store.records) + 1))
    for record, (first, last) in enumerate(zip(edges[:-1], edges[1:])):
        if last > first:
            yield record, store.events[first:last]


def beats_of(store: Store):
    """(record index, its beat events) for each record with at least three beats; UserError for an unknown annotation code."""
    for record, events in events_of(store):
        events = events[events["seconds"] >= 0]
        odd = [s.decode() for s in set(events["symbol"]) if s not in AAMI_OF and s.decode() not in NOT_BEATS]
        if odd:
            raise UserError(f"{store.where(record)}: field ann_symbol holds {odd[0]!r}, which is no WFDB annotation code")
        beats = events[[s in AAMI_OF for s in events["symbol"]]]
        if len(beats) >= 3:
            yield record, beats


def beat_items(store: Store, signal_len: int):
    """One window around each beat, with the features of `beat_features`."""
    names, rows, features = [], [], []
    for record, beats in beats_of(store):
        rate = store.prepare.fs or float(store.records[record]["fs"])
        centres = np.round(beats["seconds"] * rate).astype(int)
        features.append(beat_features(store.signal(record), centres, beats["seconds"], rate, signal_len))
        names += [AAMI_OF[s] for s in beats["symbol"]]
        rows += [(record, int(c) - signal_len // 2, len(rows) + i) for i, c in enumerate(centres)]
    return names, rows, np.concatenate(features) if features else np.zeros((0, 0), np.float32)


def cut_edges(signal: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Windows (n, length) from `starts`; beyond its ends the record goes on with its first or last sample."""
    return signal[np.clip(starts[:, None] + np.arange(length), 0, len(signal) - 1)]


def correlation(windows: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row of (n, m) with (m,)."""
    windows, shape = windows - windows.mean(1, keepdims=True), shape - shape.mean()
    return windows @ shape / (np.sqrt((windows**2).sum(1) * (shape**2).sum()) + 1e-6)


def beat_features(signal, centres, seconds, rate: float, length: int) -> np.ndarray:
    """What the rest of the record says about each beat, without using any label: (beats, 26) float32.

    11 of the rhythm: logarithms of the intervals relative to the record's or the neighbourhood's own (a ratio means the same
    in every patient), and how irregular the neighbourhood is (an early beat means little in atrial fibrillation). 15 of the
    shape: likeness to the record's median beat before, in and after the QRS complex, its height, extremes, roughness and
    width, and likeness to the beat before and after. Clipped to +-4.
    """
    gaps = np.clip(np.diff(seconds), 0.15, 3.0)
    before, after = np.r_[gaps[:1], gaps], np.r_[gaps, gaps[-1:]]
    near, whole = median_filter(before, 21, mode="nearest"), np.median(gaps)
    sums = np.cumsum(np.r_[0, before])
    lows = np.maximum(0, np.arange(len(before)) - 10)
    past = (sums[1:] - sums[lows]) / (np.arange(len(before)) + 1 - lows)  # mean of this and the ten intervals before
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
    windows = cut_edges(signal, centres - length // 2, length)
    windows = windows - np.median(windows, axis=1, keepdims=True)
    median = np.median(windows, axis=0)

    def part(low, high):  # seconds from the centre, within the window
        return slice(max(0, length // 2 + int(low * rate)), min(length, length // 2 + int(high * rate) + 1))

    height = np.ptp(median[part(-0.17, 0.17)]) + 1e-6
    for low, high in ((-0.35, -0.08), (-0.12, 0.12), (0.1, 0.45)):
        there = part(low, high)
        rest = (windows - median)[:, there] / height
        columns += [correlation(windows[:, there], median[there]), np.log(rest.std(1) + 1e-2) + 3]
    qrs, usual = windows[:, part(-0.15, 0.15)] / height, median[part(-0.15, 0.15)] / height
    rough = np.abs(np.diff(windows[:, part(-0.2, 0.25)], axis=1)).sum(1) / height
    swing = np.abs(qrs - np.median(qrs, axis=1, keepdims=True))
    wide = (swing > 0.3 * swing.max(1, keepdims=True)).mean(1)
    spans = travel_time(np.r_[windows, median[None]][:, part(-0.2, 0.2)], rate) * 9
    columns += [
        np.log(np.ptp(qrs, 1) + 1e-2),
        qrs.max(1) - usual.max(),
        qrs.min(1) - usual.min(),
        rough - np.median(rough),
        5 * (wide - np.median(wide)),
        spans[:-1],
        spans[:-1] - spans[-1],
    ]
    form = windows[:, part(-0.12, 0.2)]
    form = form - form.mean(1, keepdims=True)
    form = form / (np.linalg.norm(form, axis=1, keepdims=True) + 1e-6)
    like = (form[1:] * form[:-1]).sum(1)
    columns += [np.r_[1, like], np.r_[like, 1]]
    return np.clip(np.stack(columns, 1), -4, 4).astype(np.float32)


def travel_time(windows: np.ndarray, rate: float) -> np.ndarray:
    """Seconds in which the middle 80 % of each row's up and down is travelled, a measure of how wide its QRS complex is: (n,)."""
    way = np.cumsum(np.abs(np.diff(windows, axis=1)), axis=1)
    way = way / (way[:, -1:] + 1e-6)
    return ((way > 0.9).argmax(1) - (way > 0.1).argmax(1)) / rate


def rhythm_items(store: Store, signal_len: int):
    """Windows side by side within each stretch of one rhythm; the label is the annotation's text without its bracket."""
    names, rows = [], []
    for record, events in events_of(store):
        marks = events[[aux.startswith(b"(") for aux in events["aux"]]]
        rate, total = store.prepare.fs or float(store.records[record]["fs"]), int(store.records[record]["length"])
        ends = np.r_[marks["seconds"][1:], total / rate]
        for mark, end in zip(marks, ends):
            first = round(float(mark["seconds"]) * rate)
            for start in range(first, min(round(end * rate), total) - signal_len + 1, signal_len):
                names.append(mark["aux"].decode()[1:])
                rows.append((record, start, 0))
    return names, rows, np.zeros((1, 0), np.float32)


def series_items(store: Store, signal_len: int):
    """Windows side by side over each labelled record; a record shorter than the window gives one, padded."""
    names, rows = [], []
    for record, events in events_of(store):
        labels = events[events["seconds"] < 0]
        if len(labels):
            total = int(store.records[record]["length"])
            starts = range(0, max(1, total - signal_len + 1), signal_len)
            names += [labels[0]["symbol"].decode()] * len(starts)
            rows += [(record, start, 0) for start in starts]
    return names, rows, np.zeros((1, 0), np.float32)


# ---- splits -----------------------------------------------------------------------------------------------------------


def split_parts(store: Store, split_file=None) -> np.ndarray:
    """(records,) str: "train", "test" or "" (in neither list of a split file).

    In this order: split_file, JSON {"train": [names], "test": [names]}; the parts of a UCR set; a record named in DS1 is
    for training and any other is for the test.
    """
    names = np.char.decode(store.records["name"])
    if split_file:
        path = Path(split_file)
        try:
            lists = json.loads(path.read_text())
            lists = {part: set(map(lambda n: Path(str(n)).stem, lists[part])) for part in ("train", "test")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: expected JSON with the lists train and test ({error!r})") from error
        parts = np.array(["train" if n in lists["train"] else "test" if n in lists["test"] else "" for n in names])
    else:
        own = {record: events[0]["aux"].decode() for record, events in events_of(store) if events[0]["seconds"] < 0 and events[0]["aux"]}
        parts = np.array([own.get(i) or ("train" if n in DS1 else "test") for i, n in enumerate(names)])
    both = set(store.records["subject"][parts == "train"]) & set(store.records["subject"][parts == "test"])
    if both:
        raise UserError(f"subject {sorted(both)[0].decode()} has records in the training and in the test part; put them into one")
    return parts


def training_part(task: Task, parts: np.ndarray) -> Task:
    """The windows of the training records; UserError if there are none."""
    train = task.select(parts[task.items["record"]] == "train")
    if not len(train.items):
        raise UserError(
            f"no labelled window for task {task.kind} belongs to the training part (UCR training series, records named in DS1); "
            "pass --split with a JSON file of the lists train and test"
        )
    return train


def fold_of(store: Store, task: Task, folds: int) -> np.ndarray:
    """(records,) int: which of `folds` validation folds each record's subject is in; -1 for a record without a window.

    Subjects are sorted by how many windows of the rarest classes they have and dealt out in turn, so that every fold holds
    some of each class where that is possible.
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


# ---- windows ----------------------------------------------------------------------------------------------------------


def augment(x: np.ndarray, rng: np.random.Generator, rate: float, strength: float, flip: bool) -> np.ndarray:
    """Gain, slow drift and noise of a z-scored window (L,), and its sign if `flip` (PPG, not ECG). strength 0 = none."""
    time = np.arange(len(x)) / rate
    drift = np.sin(2 * np.pi * (rng.uniform(0.1, 0.5) * time + rng.random()))
    sign = -1 if flip and rng.random() < 0.5 else 1
    return sign * (
        x * rng.uniform(1 - 0.2 * strength, 1 + 0.2 * strength)
        + strength * rng.uniform(0, 0.15) * drift
        + strength * rng.uniform(0, 0.08) * rng.standard_normal(len(x))
    )


class DownstreamClassificationDataset(Dataset):
    """Windows of a task: x and real as in pre-training, label, features (F,), index into the task's items, name.

    Without `draws` every window once, in order. With draws > 0 (training) an epoch is that many draws with replacement,
    each with probability in proportion to count(class)^power / count(class): power 1 keeps the data's own distribution, 0
    makes all classes equally frequent; windows are then moved by up to `jitter` samples, augmented by `strength`, their
    features perturbed, and (mixup > 0) blended with a second draw: `share` is the part of `label`, the rest of `label2`.
    An item is a pure function of (seed, epoch, index).
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
    ):
        self.store, self.task, self.signal_len, self.seed, self.draws = store, task, signal_len, seed, draws
        self.strength, self.jitter, self.flip, self.mixup = strength, jitter, flip, mixup
        if draws:
            counts = task.counts()
            present = counts > 0
            self.drawn_prior = np.where(present, counts.astype(float) ** power, 0.0) / (counts[present].astype(float) ** power).sum()
            weights = (self.drawn_prior / np.maximum(counts, 1))[task.items["label"]]
            self.cumulative = np.cumsum(weights) / weights.sum()
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
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
            other, share = self.window(int(self.pick(rng.random())), rng), np.float32(rng.beta(self.mixup, self.mixup))
            item["real"] &= other["real"]
            for name in ("x", "features"):
                item[name] = share * item[name] + (1 - share) * other[name]
            item["x"][~item["real"]] = 0
            item |= {"label2": other["label"], "share": share}
        return item

    def window(self, place: int, rng: np.random.Generator) -> dict:
        """Item `place` of the task, augmented in training."""
        item = self.task.items[place]
        record, start = int(item["record"]), int(item["start"])
        signal, row = self.store.signal(record), self.store.records[record]
        if self.draws and self.jitter:
            start += int(rng.integers(-self.jitter, self.jitter + 1))
        lead = max(0, -start) if self.task.kind == "beat" else 0  # a beat stays in the middle of its window
        cut = signal[max(0, start) : max(0, start) + self.signal_len - lead]
        features = self.task.features[item["beat"]]
        if self.draws and self.strength:
            rate = self.store.prepare.fs or float(row["fs"])
            cut = augment((cut - cut.mean()) / max(float(cut.std()), 1e-6), rng, rate, self.strength, self.flip)
            features = features + np.float32(0.1 * self.strength) * rng.standard_normal(len(features), np.float32)
        x, real = self.store.prepare.window(cut, self.signal_len, lead)
        return {
            "x": torch.from_numpy(x),
            "real": torch.from_numpy(real),
            "label": int(item["label"]),
            "features": torch.from_numpy(features),
            "index": place,
            "name": f"{row['name'].decode()}@{start}",
        }
