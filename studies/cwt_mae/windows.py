"""Which windows the controls cnn.py and forest.py are fitted to and scored on: those of finetune.py and
test.py."""

from dataclasses import dataclass

import numpy as np

from common.arguments import number, refuse
from common.errors import UserError
from cwt_mae.dataset import Preprocess, Store, build_store
from cwt_mae.dataset_finetune import Task, fold_of, load_task, split_parts, training_part
from cwt_mae.layouts import add_split_argument


def add_window_arguments(parser):
    """Options of the data, the split and the scores."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", nargs="+", required=True, help="labelled files, or folders of them")
    data.add_argument(
        "--task", choices=("beat", "rhythm", "series"), required=True, help="what a label belongs to"
    )
    add_split_argument(data)
    data.add_argument("--folds", type=number(int, 2), default=4, help="parts of the training subjects")
    data.add_argument(
        "--fold", type=number(int, -1), default=-1, help="hold this part out for validation, from 0; -1: none"
    )
    data.add_argument(
        "--validate", action="store_true", help="with --fold: score this part, not the test part"
    )
    data.add_argument(
        "--model-fs", type=number(float, 0), default=100.0, help="sampling rate, Hz; 0 keeps each file's"
    )
    data.add_argument("--low-hz", type=number(float, 0), default=0.5, help="high-pass cut-off, Hz; 0: none")
    data.add_argument("--signal-len", type=number(int, 8), default=3000, help="length of the window, samples")
    data.add_argument(
        "--amplitude", action="store_true", help="beats: with numbers about their height, width and shape"
    )
    data.add_argument("--cache", help="folder for the prepared signals; data/cwt_mae/cache without it")
    data.add_argument(
        "--resamples", type=number(int, 0), default=1000, help="bootstrap draws of the intervals; 0: none"
    )


@dataclass
class Windows:
    """Windows to fit, to choose on (or None) and to score; no subject is in two of them, but that scored may
    be validation."""

    store: Store
    train: Task
    validation: Task | None
    scored: Task


def split_windows(args) -> Windows:
    """The windows that the options of `add_window_arguments` ask for."""
    store = build_store(args.data, Preprocess(args.model_fs, args.low_hz), args.cache)
    if args.task != "beat":
        refuse(args, ["amplitude"], f"for --task {args.task}")
    task = load_task(store, args.task, args.signal_len, amplitude=args.amplitude)
    parts = split_parts(store, args.split)
    train, validation = training_part(task, parts), None
    test = task.select(parts[task.items["record"]] == "test")
    if args.fold < 0:
        refuse(args, ["folds", "validate"], "without a validation part (--fold -1)")
    else:
        fold = fold_of(store, train, args.folds)[train.items["record"]]
        train, validation = train.select(fold != args.fold), train.select(fold == args.fold)
    scored = validation if args.validate else test
    if not len(scored.items) or not len(np.unique(train.items["label"])):
        raise UserError("no window to score; check --split, --fold and --data")
    return Windows(store, train, validation, scored)
