"""Controls without wavelets and pre-training: nearest neighbour and random forests on the windows of
finetune.py and test.py.

    python studies/cwt_mae/forest.py --kind forest --task beat --data FOLDER --out runs/cwt_mae/forest

    nn       1-nearest neighbour, Euclidean, on the windows
    forest   random forest on every third sample of the window and on the features that the head gets
    readme   for beats at 180 Hz, the random forest of the data's own description: every third of 130 samples
             around the beat, less their mean, and five numbers of the RR intervals
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
from accelerate import Accelerator
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier

from common.arguments import Parser, number, refuse
from common.errors import UserError, run
from common.run import open_run
from cwt_mae.dataset_finetune import beats_of, cut_edges, median_beats
from studies.cwt_mae.cnn import save_scores
from studies.cwt_mae.windows import add_window_arguments, split_windows


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--kind", choices=("nn", "forest", "readme"), required=True, help="see above")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--trees", type=number(int, 1), default=200, help="forest, readme: number of trees")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="forest, readme: random seed")
    parser.add_argument("--overwrite", action="store_true", help="replace the results that --out holds")
    add_window_arguments(parser)
    return parser.parse_args(argv)


def rr_features(seconds: np.ndarray) -> np.ndarray:
    """The five RR numbers of the data's description, (beats, 5): the intervals before and after a beat, their
    ratio to the record's median and to the mean of the last ten, and after over before."""
    gaps = np.diff(seconds)
    before, after = np.r_[gaps[:1], gaps], np.r_[gaps, gaps[-1:]]
    local = np.array([before[max(0, i - 9) : i + 1].mean() for i in range(len(before))])
    return np.stack([before, after, before / np.median(gaps), before / local, after / before], 1)


def table_of(kind: str, store, task, signal_len: int) -> np.ndarray:
    """Inputs of the nearest neighbour and of the forests: (windows, numbers)."""
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
        medians = median_beats(lambda x, real: x, store, task, signal_len)
        columns.append(
            windows[:, ::3] - np.stack([medians[record][::3] for record in items["record"].tolist()])
        )
    return np.concatenate(columns, 1)


def main(args):
    if args.kind == "readme" and (args.task != "beat" or args.model_fs != 180):
        raise UserError("--kind readme: it is defined for --task beat --model-fs 180")
    if args.kind == "nn":
        refuse(args, ["trees", "seed"], "with --kind nn")
    windows = split_windows(args)
    out = open_run(args.out, args, Accelerator(), overwrite=args.overwrite)

    # Fit to the training windows, then probabilities of the scored ones; a class that training lacks keeps 0
    model = KNeighborsClassifier(1)
    if args.kind != "nn":
        model = RandomForestClassifier(args.trees, random_state=args.seed)
    train, scored = windows.train, windows.scored
    model.fit(table_of(args.kind, windows.store, train, args.signal_len), train.items["label"])
    found = np.zeros((len(scored.items), len(train.classes)))
    found[:, model.classes_] = model.predict_proba(
        table_of(args.kind, windows.store, scored, args.signal_len)
    )
    save_scores(out, args.kind, found, windows, args.resamples)


if __name__ == "__main__":
    run(main, parse_args())
