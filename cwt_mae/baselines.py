"""Controls that know nothing of wavelets or pre-training, on the same windows, splits and scores as finetune.py and test.py.

python cwt_mae/baselines.py --kind forest --task beat --data FOLDER --out runs/cwt_mae/forest

nn       1-nearest neighbour, Euclidean, on the windows
forest   random forest (200 trees) on every third sample of the window and the features that the fine-tuned head gets
readme   for beats at 180 Hz: the random forest of the data's own description: 130 samples round the beat, every third,
         less their mean, and five numbers of the RR intervals
cnn      small convolutional network (105,000 parameters for beats) on the same windows and features, drawn and augmented alike
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from accelerate import Accelerator
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import DataLoader

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.run import open_run, progress, seed_everything
from cwt_mae.dataset import Preprocess, build_store
from cwt_mae.dataset_finetune import (
    DownstreamClassificationDataset,
    beats_of,
    cut_edges,
    fold_of,
    load_task,
    split_parts,
    training_part,
    usual_of,
)
from cwt_mae.finetune import TAUS, corrected, loss_of, predict
from cwt_mae.metrics import describe_scores, draw_confusion, scores
from cwt_mae.train import lr_at


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kind", choices=("nn", "forest", "readme", "cnn"), required=True, help="see above")
    parser.add_argument(
        "--task", choices=("beat", "rhythm", "series"), required=True, help="what a label belongs to"
    )
    parser.add_argument("--data", nargs="+", required=True, help="labelled files and folders of them")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument(
        "--split",
        help="JSON {train: [names], test: [names]} (None: UCR parts, or DS1 for training and the rest for the test)",
    )
    parser.add_argument("--folds", type=int, default=4, help="parts of the training subjects")
    parser.add_argument(
        "--fold",
        type=int,
        default=-1,
        help="leave this part out of training (the cnn chooses its prior correction on it); -1: none",
    )
    parser.add_argument(
        "--model-fs", type=float, default=100.0, help="sampling rate, Hz; 0 keeps each file's own"
    )
    parser.add_argument("--low-hz", type=float, default=0.5, help="high-pass edge, Hz; 0 = none")
    parser.add_argument("--signal-len", type=int, default=3000, help="window, samples")
    parser.add_argument("--trees", type=int, default=200, help="forest, readme: trees")
    parser.add_argument("--max-steps", type=int, default=1000, help="cnn: optimizer steps")
    parser.add_argument("--batch-size", type=int, default=64, help="cnn: windows in a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="cnn: peak learning rate")
    parser.add_argument(
        "--sampling-power", type=float, default=1.0, help="cnn: a class is drawn in proportion to count^power"
    )
    parser.add_argument("--augment", type=float, default=1.0, help="cnn: strength of gain, drift and noise")
    parser.add_argument("--jitter", type=int, default=2, help="cnn: largest shift of a window, samples")
    parser.add_argument("--irregular", type=float, default=0.0, help="cnn: as in finetune.py")
    parser.add_argument(
        "--validate", action="store_true", help="score the validation part --fold instead of the test part"
    )
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap draws for the intervals")
    parser.add_argument("--cache", help="folder for the prepared signals (None: data/cwt_mae/cache)")
    parser.add_argument("--seed", type=int, default=0, help="of trees, weights and windows")
    parser.add_argument("--overwrite", action="store_true", help="replace the results that --out holds")
    return parser.parse_args(argv)


class SmallCNN(nn.Module):
    """Three pairs of convolutions with pooling; the middle third in time of the result, or its mean for long windows; MLP head."""

    def __init__(self, signal_len: int, num_classes: int, num_features: int, centred: bool):
        super().__init__()
        widths, self.centred = (2 if centred else 1, 32, 48, 64), centred
        self.body = nn.Sequential(
            *(
                layer
                for a, b in zip(widths, widths[1:])
                for layer in (
                    nn.Conv1d(a, b, 7, padding=3),
                    nn.BatchNorm1d(b),
                    nn.ReLU(),
                    nn.Conv1d(b, b, 5, padding=2),
                    nn.BatchNorm1d(b),
                    nn.ReLU(),
                    nn.MaxPool1d(2),
                )
            )
        )
        self.columns = signal_len // 8
        joined = 64 * len(range(self.columns)[self.middle()]) if centred else 128
        self.head = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(joined, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, num_classes)
        )
        if num_features:  # beside it, as in TF_MAE_Classifier
            self.feature_head = nn.Sequential(
                nn.Linear(num_features, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, num_classes)
            )

    def middle(self) -> slice:
        return slice(self.columns // 3, self.columns - self.columns // 3)

    def forward(self, x, real=None, features=None, usual=None):
        """x (B, L), for beats the record's median beat usual (B, L) -> logits (B, C). real is not needed: padding is zero."""
        y = self.body(torch.stack([x, x - usual], 1) if self.centred else x[:, None])
        y = y[:, :, self.middle()].flatten(1) if self.centred else torch.cat([y.mean(2), y.amax(2)], 1)
        return self.head(y) if features is None else self.head(y) + self.feature_head(features)


def rr_features(seconds: np.ndarray) -> np.ndarray:
    """The five RR numbers of the data's description: intervals before and after, their ratio to the record's median and to
    the mean of the last ten, and after over before: (beats, 5)."""
    gaps = np.diff(seconds)
    before, after = np.r_[gaps[:1], gaps], np.r_[gaps, gaps[-1:]]
    local = np.array([before[max(0, i - 9) : i + 1].mean() for i in range(len(before))])
    return np.stack([before, after, before / np.median(gaps), before / local, after / before], 1)


def table_of(kind: str, store, task, signal_len: int) -> np.ndarray:
    """Inputs of nn and forests: (windows, numbers)."""
    items, length = task.items, 130 if kind == "readme" else signal_len
    windows = np.zeros((len(items), length), np.float32)
    for record in np.unique(items["record"]):
        here = np.flatnonzero(items["record"] == record)
        starts = items["start"][here] + (signal_len // 2 - 65 if kind == "readme" else 0)
        windows[here] = cut_edges(store.signal(record), starts.astype(int), length)
    windows -= windows.mean(1, keepdims=True)
    if kind == "readme":
        numbers = np.concatenate([rr_features(beats["seconds"]) for _, beats in beats_of(store)])
        return np.concatenate([windows[:, ::3], numbers[items["beat"]]], 1)
    windows /= windows.std(1, keepdims=True) + 1e-6
    if kind == "nn":
        return windows
    columns = [windows[:, ::3], task.features[items["beat"]]]
    if task.kind == "beat":
        usual = usual_of(lambda x, real: x, store, task, signal_len)
        columns.append(
            windows[:, ::3] - np.stack([usual[record][::3] for record in items["record"].tolist()])
        )
    return np.concatenate(columns, 1)


def fit_table(args, store, train, scored) -> np.ndarray:
    """Probabilities (windows of `scored`, C) of a nearest neighbour or a forest fitted to `train`."""
    if args.kind == "nn":
        model = KNeighborsClassifier(1)
    else:
        model = RandomForestClassifier(args.trees, random_state=args.seed)
    model.fit(table_of(args.kind, store, train, args.signal_len), train.items["label"])
    found = np.zeros((len(scored.items), len(train.classes)))
    found[:, model.classes_] = model.predict_proba(table_of(args.kind, store, scored, args.signal_len))
    return found


def fit_cnn(args, store, train, validation, scored) -> np.ndarray:
    """Probabilities (windows of `scored`, C) of the small network; its prior correction is chosen on `validation`, if there is one."""
    seed_everything(args.seed)

    def windows(part, **options):
        dataset = DownstreamClassificationDataset(store, part, args.signal_len, args.seed, **options)
        if part.kind == "beat":
            dataset.usual = usual_of(lambda x, real: x, store, part, args.signal_len)
        return dataset

    drawn = windows(
        train,
        draws=args.batch_size * args.max_steps,
        power=args.sampling_power,
        strength=args.augment,
        jitter=args.jitter,
        irregular=args.irregular,
    )
    numbers = train.features[train.items["beat"]]
    features = (
        (torch.from_numpy(numbers.mean(0)), torch.from_numpy(numbers.std(0) + 1e-3))
        if numbers.shape[1]
        else None
    )
    model = SmallCNN(args.signal_len, len(train.classes), numbers.shape[1], train.kind == "beat")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step, batch in enumerate(progress(DataLoader(drawn, args.batch_size), desc="cnn", unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.max_steps, args.max_steps // 20, args.lr, 0.0)
        numbers = None if features is None else (batch["features"] - features[0]) / features[1]
        loss = loss_of(model(batch["x"], None, numbers, batch.get("usual")), batch, 0.05, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    counts = train.counts()
    shift = np.where(
        counts > 0, np.log(np.maximum(drawn.drawn_prior, 1e-9) / np.maximum(counts / counts.sum(), 1e-9)), 0.0
    )
    tau = 0.0
    if args.sampling_power != 1 and validation is not None:
        logits = predict(model, windows(validation), features, "cpu")
        tau = max(
            TAUS,
            key=lambda t: (
                scores(corrected(logits, shift, t), validation.items["label"], train.classes)["macro_f1"],
                -t,
            ),
        )
    return corrected(predict(model, windows(scored), features, "cpu"), shift, tau)


def main(args):
    store = build_store(args.data, Preprocess(args.model_fs, args.low_hz), args.cache)
    parts = split_parts(store, args.split)
    task = load_task(store, args.task, args.signal_len)
    part = parts[task.items["record"]]
    train, scored, validation = training_part(task, parts), task.select(part == "test"), None
    if args.kind == "readme" and (args.task != "beat" or args.model_fs != 180):
        raise UserError("--kind readme: it is defined for --task beat --model-fs 180")
    if args.fold >= 0:
        held = fold_of(store, train, args.folds)[train.items["record"]] == args.fold
        train, validation = train.select(~held), train.select(held)
    if args.validate:
        scored = validation
    out = open_run(args.out, args, Accelerator(), overwrite=args.overwrite)
    start = time.process_time()
    found = (
        fit_cnn(args, store, train, validation, scored)
        if args.kind == "cnn"
        else fit_table(args, store, train, scored)
    )
    groups = None if len(np.unique(scored.items["record"])) == len(scored.items) else scored.items["record"]
    result = scores(found, scored.items["label"], task.classes, groups, args.resamples)
    draw_confusion(
        result["confusion"],
        task.classes,
        out / "figures" / "confusion.png",
        f"{args.kind}, macro-F1 {result['macro_f1']:.3f}",
    )
    atomic_write(
        out / "metrics.json",
        json.dumps({"kind": args.kind, "cpu_seconds": time.process_time() - start, **result}, indent=1),
    )
    print(f"{args.kind}: {describe_scores(result)}")


if __name__ == "__main__":
    run(main, parse_args())
