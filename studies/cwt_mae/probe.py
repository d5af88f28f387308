"""Linear probe: how much do frozen features say about a task, with trained weights and with random ones?

    python studies/cwt_mae/probe.py --model base/model.safetensors --task rhythm --data FOLDER --out probe

A logistic regression on the mean and the standard deviation of the frozen encoder's tokens, fitted to the
training records and scored on the test records. The same encoder with random weights is the control: on many
tasks it is hard to beat.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from accelerate import Accelerator

from common.arguments import Parser, number
from common.checkpoint import atomic_json
from common.errors import UserError, run
from common.figures import draw_confusion, new_figure, save_figure
from common.run import open_run
from cwt_mae.dataset import Preprocess, build_store
from cwt_mae.dataset_finetune import DownstreamClassificationDataset, load_task, split_parts, training_part
from cwt_mae.layouts import add_split_argument
from cwt_mae.metrics import describe_scores, linear_probe, scores
from cwt_mae.model import CWT_MAE_RoPE
from cwt_mae.model_finetune import load_model
from cwt_mae.validation import probe_features


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="model.safetensors of train.py")
    parser.add_argument(
        "--task", choices=("beat", "rhythm", "series"), required=True, help="what a label belongs to"
    )
    parser.add_argument("--data", nargs="+", required=True, help="labelled files, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    add_split_argument(parser)
    parser.add_argument(
        "--random-seeds", type=number(int, 1), default=3, help="encoders with random weights to compare with"
    )
    parser.add_argument(
        "--resamples", type=number(int, 1), default=1000, help="bootstrap draws for the interval"
    )
    parser.add_argument("--cache", help="folder for the prepared signals; data/cwt_mae/cache without it")
    parser.add_argument("--overwrite", action="store_true", help="replace the results that --out holds")
    return parser.parse_args(argv)


def make_sets(args, model):
    """(windows of the training records, windows of the test records), prepared as the model wants them."""
    store = build_store(args.data, Preprocess(**(model.config["preprocess"] or {})), args.cache)
    task, parts = load_task(store, args.task, model.signal_len), split_parts(store, args.split)
    train, test = training_part(task, parts), task.select(parts[task.items["record"]] == "test")
    if len(set(train.items["label"])) < len(task.classes) or not len(test.items):
        raise UserError("the training part lacks a class, or the test part has no window; check --split")
    return tuple(DownstreamClassificationDataset(store, part, model.signal_len) for part in (train, test))


def draw(values: dict, interval, chance: float, path):
    """Macro-F1 of the trained encoder with its interval, of the random ones, and of the most frequent
    class."""
    figure, axis = new_figure(1, 1)
    axis.bar(list(values), list(values.values()), color=["#2a6fbb"] + ["#5b6770"] * (len(values) - 1))
    ours, (low, high) = values["pre-trained"], interval
    axis.errorbar([0], [ours], yerr=[[max(0, ours - low)], [max(0, high - ours)]], color="black", capsize=4)
    axis.axhline(chance, color="0.4", ls=":", label="always the most frequent class")
    axis.set_ylabel("macro-F1 of a linear probe")
    axis.legend()
    save_figure(figure, path)


def main(args):
    accelerator = Accelerator()
    trained = load_model(args.model).to(accelerator.device)
    if not isinstance(trained, CWT_MAE_RoPE):
        raise UserError(f"{args.model}: is a fine-tuned classifier; give the pre-trained model")
    train, test = make_sets(args, trained)
    out = open_run(args.out, args, accelerator, overwrite=args.overwrite)

    # The trained encoder, and the same encoder with random weights
    classes, truth, results = train.task.classes, test.task.items["label"], {}
    recordings = test.store.recordings(test.task.items)
    for name, seed in [("pre-trained", None), *((f"random {i}", i) for i in range(args.random_seeds))]:
        model = trained
        if seed is not None:
            torch.manual_seed(seed)
            model = CWT_MAE_RoPE(**trained.config).to(accelerator.device)
        x = [probe_features(model, part, accelerator.device) for part in (train, test)]
        found = linear_probe(x[0], train.task.items["label"], x[1])
        results[name] = scores(found, truth, classes, recordings, args.resamples)
        print(f"{name}: {describe_scores(results[name])}")

    # The control of both: always the class that is most frequent in training
    frequent = np.tile(np.eye(len(classes))[train.task.counts().argmax()], (len(truth), 1))
    chance = scores(frequent, truth, classes)["macro_f1"]
    values = {name: result["macro_f1"] for name, result in results.items()}
    ours = results["pre-trained"]
    draw(values, ours["macro_f1_95"], chance, out / "figures" / "probe.png")
    draw_confusion(
        ours["confusion"], classes, out / "figures" / "confusion.png", "linear probe, pre-trained encoder"
    )
    about = {
        "macro_f1": ours["macro_f1"],
        "interval": ours["macro_f1_95"],
        "random_mean": float(np.mean([value for name, value in values.items() if name != "pre-trained"])),
        "chance": chance,
        "results": results,
    }
    atomic_json(out / "metrics.json", about)


if __name__ == "__main__":
    run(main, parse_args())
