"""Score fine-tuned classifiers on labelled records, or let them read unlabelled ones.

    python cwt_mae/test.py --model runs/cwt_mae/beat/model.safetensors --data FOLDER --out runs/cwt_mae/beat_test
    python cwt_mae/test.py --model ... --data FOLDER --unlabelled --stride 250 --out ...

Writes metrics.json (accuracy, macro-F1, AUROC, per class, 95 % intervals), per_window.csv, per_record.csv and
figures/confusion.png. Several --model are one ensemble: their probabilities are averaged. The prior correction that was
chosen on validation, stored in each model file, is applied.

Upstream file: inference.py (sliding windows, one line a patient), which let the test choose the model; here nothing is chosen.
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.files import reading
from common.run import open_run, progress
from cwt_mae.dataset import Preprocess, build_store
from cwt_mae.dataset_finetune import ITEMS, DownstreamClassificationDataset, Task, load_task, split_parts
from cwt_mae.finetune import corrected, predict, usual_tokens
from cwt_mae.metrics import describe_scores, draw_confusion, scores
from cwt_mae.model_finetune import load_model


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", required=True, help="model.safetensors of finetune.py; several are averaged"
    )
    parser.add_argument("--data", nargs="+", required=True, help="files and folders of them")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument(
        "--part", choices=("test", "train", "all"), default="test", help="which records to score"
    )
    parser.add_argument(
        "--split",
        help="JSON {train: [names], test: [names]} (None: UCR parts, or the list DS1 for training and the rest for the test)",
    )
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="read every record in sliding windows; no label is needed (not for beats)",
    )
    parser.add_argument(
        "--stride", type=int, default=0, help="samples between sliding windows; 0 = half a window"
    )
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap draws for the intervals")
    parser.add_argument("--input-fs", type=float, help="sampling rate of files that do not say it, Hz")
    parser.add_argument("--cache", help="folder for the prepared signals (None: data/cwt_mae/cache)")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave bad records and labels out, counted, instead of stopping",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the results that --out holds")
    return parser.parse_args(argv)


def read_card(path) -> dict:
    """What finetune.py stored beside the weights: task, classes, features, shift, tau; UserError for another file."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        raise UserError(f"{path}: expected the model.safetensors of a finetune.py run")
    with reading(path, "weight file"), safe_open(path, "pt") as file:
        card = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    if "classes" not in card:
        raise UserError(
            f"{path}: holds no task and classes; expected the model.safetensors of a finetune.py run"
        )
    return card


def sliding_items(store, signal_len: int, stride: int) -> np.ndarray:
    """ITEMS of windows every `stride` samples over every record, the last one at its end; label -1."""
    rows = []
    for record, length in enumerate(store.records["length"].tolist()):
        last = max(0, length - signal_len)
        rows += [(record, start, -1, 0) for start in [*range(0, last, stride), last]]
    return np.array(rows, ITEMS)


def as_csv(header: list, rows) -> str:
    """One csv text of a header and rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def record_lines(store, items, probabilities, classes, labelled: bool):
    """One line a record: mean probability of each class over its windows, and how many windows were right."""
    header = [
        "record",
        "subject",
        "channel",
        "windows",
        "predicted",
        "confidence",
        *(f"p_{name}" for name in classes),
    ]
    header += (
        ["accuracy", *(f"true_{name}" for name in classes), *(f"predicted_{name}" for name in classes)]
        if labelled
        else []
    )
    rows = []
    for record in np.unique(items["record"]):
        here = items["record"] == record
        mean, row = probabilities[here].mean(0), store.records[record]
        line = [
            row["name"].decode(),
            row["subject"].decode(),
            row["channel"].decode(),
            int(here.sum()),
            classes[mean.argmax()],
            f"{mean.max():.4f}",
            *(f"{p:.4f}" for p in mean),
        ]
        if labelled:
            predicted, labels = probabilities[here].argmax(1), items["label"][here]
            line += [
                f"{(predicted == labels).mean():.4f}",
                *np.bincount(labels, minlength=len(classes)),
                *np.bincount(predicted, minlength=len(classes)),
            ]
        rows.append(line)
    return as_csv(header, rows)


def main(args):
    accelerator = Accelerator()
    cards = [read_card(path) for path in args.model]
    task_name, classes = cards[0]["task"], cards[0]["classes"]
    if any((card["task"], card["classes"]) != (task_name, classes) for card in cards):
        raise UserError("--model: the files were trained for different tasks or classes")
    models = [load_model(path).to(accelerator.device) for path in args.model]
    signal_len, prepare = models[0].encoder_model.signal_len, models[0].config["preprocess"]
    if any(
        (model.encoder_model.signal_len, model.config["preprocess"]) != (signal_len, prepare)
        for model in models
    ):
        raise UserError("--model: the files take windows of different lengths or preparation")
    store = build_store(
        args.data, Preprocess(**(prepare or {})), args.cache, args.input_fs, skip_bad=args.skip_bad
    )
    if args.unlabelled:
        if task_name == "beat":
            raise UserError(
                "--unlabelled: a beat classifier needs the beats' positions; give records with beat annotations"
            )
        task = Task(
            task_name,
            classes,
            sliding_items(store, signal_len, args.stride or signal_len // 2),
            np.zeros((1, 0), np.float32),
        )
    else:
        task = load_task(store, task_name, signal_len, classes, args.skip_bad)
        if args.part != "all":
            task = task.select(split_parts(store, args.split)[task.items["record"]] == args.part)
    if not len(task.items):
        raise UserError(f"no labelled window in part {args.part}; choose another --part or check --split")
    out = open_run(args.out, args, accelerator, overwrite=args.overwrite)

    dataset, probabilities = DownstreamClassificationDataset(store, task, signal_len), 0.0
    for model, card in zip(progress(models, desc="scoring", unit="model"), cards):
        features = None if card["features"] is None else tuple(torch.tensor(f) for f in card["features"])
        dataset.usual = usual_tokens(model, store, task, accelerator.device) if model.compare else {}
        logits = predict(model, dataset, features, accelerator.device)
        probabilities = probabilities + corrected(logits, np.array(card["shift"]), card["tau"]) / len(models)

    items = task.items
    names, rate = np.char.decode(store.records["name"][items["record"]]), store.prepare.fs or 1.0
    truth = ["" if label < 0 else classes[label] for label in items["label"]]
    atomic_write(
        out / "per_window.csv",
        as_csv(
            ["record", "start_s", "true", "predicted", *(f"p_{c}" for c in classes)],
            (
                [n, f"{s / rate:.3f}", t, classes[p.argmax()], *(f"{v:.4f}" for v in p)]
                for n, s, t, p in zip(names, items["start"], truth, probabilities)
            ),
        ),
    )
    atomic_write(
        out / "per_record.csv", record_lines(store, items, probabilities, classes, not args.unlabelled)
    )
    if args.unlabelled:
        print(
            f"{len(items)} windows of {len(np.unique(items['record']))} records read; predictions in {out / 'per_record.csv'}"
        )
        return
    groups = None if len(np.unique(items["record"])) == len(items) else items["record"]
    result = scores(probabilities, items["label"], classes, groups, args.resamples)
    result["records"] = len(np.unique(items["record"]))
    if len(classes) == 4 and task_name == "beat":
        result["macro_f1_without_F"] = float(np.mean([result["per_class"][c]["f1"] for c in classes[:3]]))
    draw_confusion(
        result["confusion"],
        classes,
        out / "figures" / "confusion.png",
        f"{result['windows']} windows, macro-F1 {result['macro_f1']:.3f}",
    )
    atomic_write(
        out / "metrics.json",
        json.dumps({"task": task_name, "part": args.part, "models": args.model, **result}, indent=1),
    )
    if len(set(probabilities.argmax(1))) == 1:
        print(f"warning: every window is called {classes[probabilities[0].argmax()]}", file=sys.stderr)
    print(describe_scores(result))
    print(f"results in {out}")


if __name__ == "__main__":
    run(main, parse_args())
