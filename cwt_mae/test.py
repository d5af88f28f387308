"""Score fine-tuned classifiers on labelled records, or classify the windows of unlabelled ones.

    python cwt_mae/test.py --model runs/cwt_mae/beat/model.safetensors --data FOLDER --out runs/cwt_mae/test
    python cwt_mae/test.py --model ... --data FOLDER --unlabelled --stride 250 --out ...

Writes metrics.json (accuracy, macro-F1, AUROC, scores per class, 95 % intervals), per_window.csv,
per_record.csv and figures/confusion.png. Several --model are one ensemble: their probabilities are averaged.
The correction of the class frequencies that was chosen on validation is stored in each model file and applied
here; nothing is chosen here.

Upstream file: inference.py (sliding windows, one line per patient).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open

from common.arguments import Parser, number, refuse
from common.checkpoint import atomic_csv, atomic_json
from common.errors import UserError, run
from common.figures import draw_confusion
from common.files import reading
from common.run import one_process, open_run, progress
from cwt_mae.dataset import Preprocess, read_store
from cwt_mae.dataset_finetune import (
    ITEMS,
    DownstreamClassificationDataset,
    Task,
    detected_beats,
    load_task,
    split_parts,
)
from cwt_mae.finetune import by_record, corrected, median_tokens, predict, sigmoid
from cwt_mae.layouts import add_file_arguments, add_split_argument
from cwt_mae.metrics import describe_label_scores, describe_scores, label_scores, scores
from cwt_mae.model_finetune import load_model

ABOUT = ("task", "classes", "level", "amplitude")  # what models of one ensemble must share


def parse_args(argv=None):
    parser = Parser(__doc__)
    # What is asked for: classifiers, records, and where the results go.
    parser.add_argument(
        "--model", nargs="+", required=True, help="model.safetensors of finetune.py; several are averaged"
    )
    parser.add_argument("--data", "--data-root", nargs="+", required=True, help="files, or folders of them")
    parser.add_argument("--out", "--output-dir", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--part", choices=("test", "train", "all"), default="test", help="which part of the records is scored"
    )
    add_split_argument(parser)

    # Records without labels are read in sliding windows.
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="classify sliding windows over every record, or for beats those at the R peaks that a "
        "detector finds; no label is needed",
    )
    parser.add_argument(
        "--stride",
        type=number(int, 0),
        default=0,
        help="--unlabelled: samples from window to window; 0: half one",
    )

    # How certain the scores are.
    parser.add_argument(
        "--resamples", type=number(int, 0), default=1000, help="bootstrap draws of the intervals; 0: none"
    )

    # How files are read; the preparation of the signals comes with the model.
    add_file_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the results that --out holds")
    return parser.parse_args(argv)


def read_card(path) -> dict:
    """What finetune.py stored beside the weights: task, classes, features, shift, tau; UserError for another
    file."""
    # Only the metadata are read here; the weights are checked when they are loaded.
    if not Path(path).exists():
        raise UserError(f"{path}: no such weight file; check the path")
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        raise UserError(f"{path}: expected the model.safetensors of a finetune.py run")
    with reading(path, "weight file"), safe_open(path, "pt") as file:
        stored = file.metadata() or {}

        # train.py and checkpoints have a file of the same name, without a task; a checkpoint's is no JSON.
        if "classes" not in stored:
            raise UserError(
                f"{path}: holds no task and classes; expected the model.safetensors of a finetune.py run"
            )
        return {key: json.loads(value) for key, value in stored.items()}


def load_models(paths, device):
    """(models, cards) of an ensemble; UserError unless all were trained for the same task, classes, window
    and preparation."""
    # Averaged probabilities make sense only if the models mean the same classes ...
    cards = [read_card(path) for path in paths]
    if any([card.get(k) for k in ABOUT] != [cards[0].get(k) for k in ABOUT] for card in cards):
        raise UserError("--model: the files were trained for different tasks or classes")

    # ... and see the same window, prepared alike.
    models = [load_model(path).to(device) for path in paths]
    inputs = [(model.encoder_model.signal_len, model.config["preprocess"]) for model in models]
    if any(other != inputs[0] for other in inputs):
        raise UserError("--model: the files take windows of different lengths or preparation")
    return models, cards


def sliding_items(store, signal_len: int, stride: int) -> np.ndarray:
    """ITEMS of windows every `stride` samples over every record, the last one at its end; label -1."""
    rows = []
    for record in store.anchors.tolist():
        length = int(store.records["length"][record])
        # A record shorter than the window gives one, which is padded.
        last = max(0, length - signal_len)
        rows += [(record, start, -1, 0) for start in [*range(0, last, stride), last]]
    return np.array(rows, ITEMS)


def choose_windows(args, store, card: dict, signal_len: int) -> Task:
    """The windows to score: labelled ones of --part, or with --unlabelled sliding ones of all records."""
    amplitude = card.get("amplitude", False)

    # Without labels: at the beats that a detector finds, else one after the other; there is nothing to split.
    if args.unlabelled:
        refuse(args, ["part", "split", "resamples"], "with --unlabelled")
        if card["task"] == "beat":
            refuse(args, ["stride"], "for a beat classifier, whose windows lie at the beats")
            return detected_beats(store, card["classes"], signal_len, amplitude)
        items = sliding_items(store, signal_len, args.stride or signal_len // 2)
        return Task(card["task"], card["classes"], items, np.zeros((1, 0), np.float32))

    # Labelled windows: a label that the model does not know is an error, never class 0.
    refuse(args, ["stride"], "without --unlabelled")
    level = card.get("level", "")
    task = load_task(store, card["task"], signal_len, card["classes"], args.skip_bad, level, amplitude)

    # The parts are those of fine-tuning: the same function says which record is in which.
    if args.part == "all":
        refuse(args, ["split"], "with --part all")
    else:
        task = task.select(split_parts(store, args.split)[task.items["record"]] == args.part)
    if not len(task.items):
        raise UserError(f"no labelled window in part {args.part}; choose another --part or check --split")
    return task


def ensemble(models, cards, store, task, device) -> np.ndarray:
    """Probabilities (windows, C): the mean over the models, each with its own correction of the class
    frequencies."""
    # Every window once, in order, without augmentation.
    dataset = DownstreamClassificationDataset(store, task, models[0].encoder_model.signal_len)
    total = np.zeros((len(task.items), len(task.classes)))
    for model, card in zip(progress(models, desc="scoring", unit="model"), cards):
        # Features are standardised as in training, with the numbers in the model's file.
        scale = None if card["features"] is None else tuple(torch.tensor(f) for f in card["features"])

        # A model that compares needs the median tokens of each record; no label goes into them.
        dataset.median_beats = median_tokens(model, store, task, device) if model.compare else {}
        logits = predict(model, dataset, scale, device)

        # How much of the class frequencies is undone stands in the file; nothing is chosen here.
        several = card["task"] == "labels"
        total += sigmoid(logits) if several else corrected(logits, np.array(card["shift"]), card["tau"])
    return total / len(models)


def true_labels(task, index: int) -> str:
    """The label of a window, several with ; between them; "" where none is known."""
    if task.targets is not None:
        return ";".join(name for name, applies in zip(task.classes, task.targets[index]) if applies)
    label = task.items["label"][index]
    return "" if label < 0 else task.classes[label]


def window_rows(store, task, probabilities) -> list[dict]:
    """One row per window: record, start in seconds, true and predicted class, probabilities."""
    # A row of the store begins somewhere in its recording; series without a time unit count samples.
    rows = []
    for i, (item, values) in enumerate(zip(task.items, probabilities)):
        begin = float(store.records["start"][item["record"]])
        rows.append(
            {
                "record": store.records["name"][item["record"]].decode(),
                "start_s": f"{begin + item['start'] / store.rate(item['record']):.3f}",
                "true": true_labels(task, i),
                "predicted": task.classes[values.argmax()],
                **{f"p_{name}": f"{value:.4f}" for name, value in zip(task.classes, values)},
            }
        )
    return rows


def record_rows(store, task, probabilities, labelled: bool) -> list[dict]:
    """One row for each channel of a record: the mean probability of each class over its windows; with labels,
    how many windows were right."""
    classes, rows = task.classes, []
    # A gap cuts a channel into several rows of the store.
    channels = store.records[["recording", "channel"]][task.items["record"]]
    _, first, number = np.unique(channels, return_index=True, return_inverse=True)
    for begin in np.sort(first):
        here = number == number[begin]
        # A record is predicted as the class of the highest mean probability.
        mean, about = probabilities[here].mean(0), store.records[task.items["record"][begin]]
        row = {
            "record": about["name"].decode(),
            "subject": about["subject"].decode(),
            "channel": about["channel"].decode(),
            "windows": int(here.sum()),
            "predicted": classes[mean.argmax()],
            "confidence": f"{mean.max():.4f}",
            **{f"p_{name}": f"{value:.4f}" for name, value in zip(classes, mean)},
        }

        # Several labels belong to the whole record; one label may change from window to window.
        if labelled and task.targets is not None:
            row["true"] = true_labels(task, begin)
        elif labelled:
            predicted, labels = probabilities[here].argmax(1), task.items["label"][here]
            row["accuracy"] = f"{(predicted == labels).mean():.4f}"
            # How often each class was true, and how often it was predicted
            for title, found in (("true", labels), ("predicted", predicted)):
                counts = np.bincount(found, minlength=len(classes))
                row |= {f"{title}_{name}": count for name, count in zip(classes, counts)}
        rows.append(row)
    return rows


def score_labels(args, out, store, task, probabilities):
    """Scores of several labels for a record: the mean over its windows counts; the intervals draw
    subjects."""
    mean, targets, rows = by_record(probabilities, store, task)
    result = label_scores(mean, targets, task.classes, store.records["subject"][rows], args.resamples)
    about = {"task": task.kind, "part": args.part, "models": [str(path) for path in args.model]}
    atomic_json(out / "metrics.json", about | result)
    print(describe_label_scores(result))
    print(f"results in {out}")


def main(args):
    # Models, and the windows that they are asked about
    accelerator = Accelerator()
    one_process(accelerator.num_processes, "records are scored")
    models, cards = load_models(args.model, accelerator.device)
    signal_len, preprocess = models[0].encoder_model.signal_len, models[0].config["preprocess"] or {}
    store = read_store(args, Preprocess(**preprocess), accelerator)
    task = choose_windows(args, store, cards[0], signal_len)

    # Only now, with models and data known to fit, the folder of the results is made.
    out = open_run(args.out, args, accelerator, overwrite=args.overwrite)

    # Predictions, by window and by record
    probabilities = ensemble(models, cards, store, task, accelerator.device)
    recordings = store.recordings(task.items)
    records = len(np.unique(recordings))
    atomic_csv(out / "per_window.csv", window_rows(store, task, probabilities))
    atomic_csv(out / "per_record.csv", record_rows(store, task, probabilities, not args.unlabelled))
    if args.unlabelled:
        print(f"{len(task.items)} windows of {records} records; predictions in {out / 'per_record.csv'}")
        return

    # Yes or no for each label: no confusion of classes, other scores.
    if task.targets is not None:
        return score_labels(args, out, store, task, probabilities)

    # Scores: the intervals draw whole records, because windows of one record are not independent.
    # Where each record is one window (UCR), windows are drawn instead.
    groups = None if records == len(task.items) else recordings
    result = scores(probabilities, task.items["label"], task.classes, groups, args.resamples)
    result["records"] = records
    if task.kind == "beat":
        # Nearly all F come from one record of the test part; the mean without it is the steadier number.
        result["macro_f1_without_F"] = float(np.mean([result["per_class"][c]["f1"] for c in "NSV"]))

    # Files, then the screen
    title = f"{result['windows']} windows, macro-F1 {result['macro_f1']:.3f}"
    draw_confusion(result["confusion"], task.classes, out / "figures" / "confusion.png", title)
    about = {"task": task.kind, "part": args.part, "models": [str(path) for path in args.model]}
    atomic_json(out / "metrics.json", about | result)

    # A collapsed model can have a fine accuracy where one class dominates, so say it.
    if len(set(probabilities.argmax(1))) == 1:
        print(
            f"warning: every window is predicted as {task.classes[probabilities[0].argmax()]}",
            file=sys.stderr,
        )
    print(describe_scores(result))
    print(f"results in {out}")


if __name__ == "__main__":
    run(main, parse_args())
