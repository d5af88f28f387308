"""Linear probe: how much do frozen features say about a task, with trained weights and with random ones?

    python cwt_mae/probe.py --model runs/cwt_mae/base/model.safetensors --task rhythm --data FOLDER --out runs/cwt_mae/probe

A logistic regression on the mean and the deviation of the frozen encoder's tokens, fitted to the training records and scored
on the test records. The same encoder with random weights (--random-seeds of them) is the control: on many tasks it is
hard to beat.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from common.run import open_run
from cwt_mae.dataset import Preprocess, build_store
from cwt_mae.dataset_finetune import DownstreamClassificationDataset, load_task, split_parts, training_part
from cwt_mae.metrics import describe_scores, draw_confusion, linear_probe, scores
from cwt_mae.model import CWT_MAE_RoPE
from cwt_mae.model_finetune import load_model
from cwt_mae.train import probe_features


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model.safetensors of train.py")
    parser.add_argument(
        "--task", choices=("beat", "rhythm", "series"), required=True, help="what a label belongs to"
    )
    parser.add_argument("--data", nargs="+", required=True, help="labelled files and folders of them")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument(
        "--split",
        help="JSON {train: [names], test: [names]} (None: UCR parts, or DS1 for training and the rest for the test)",
    )
    parser.add_argument(
        "--random-seeds", type=int, default=3, help="encoders with random weights to compare with"
    )
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap draws for the interval")
    parser.add_argument("--cache", help="folder for the prepared signals (None: data/cwt_mae/cache)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results that --out holds")
    return parser.parse_args(argv)


def main(args):
    accelerator = Accelerator()
    trained = load_model(args.model).to(accelerator.device)
    if not isinstance(trained, CWT_MAE_RoPE):
        raise UserError(f"{args.model}: is a fine-tuned classifier; give the pre-trained model")
    store = build_store(args.data, Preprocess(**(trained.config["preprocess"] or {})), args.cache)
    task = load_task(store, args.task, trained.signal_len)
    parts = split_parts(store, args.split)
    split = training_part(task, parts), task.select(parts[task.items["record"]] == "test")
    train, test = (DownstreamClassificationDataset(store, part, trained.signal_len) for part in split)
    if len(set(train.task.items["label"])) < len(task.classes) or not len(test):
        raise UserError("the training part lacks a class, or the test part has no window; check --split")
    out = open_run(args.out, args, accelerator, overwrite=args.overwrite)
    results = {}
    for name, seed in [("pre-trained", None), *((f"random {i}", i) for i in range(args.random_seeds))]:
        model = trained
        if seed is not None:
            torch.manual_seed(seed)
            model = CWT_MAE_RoPE(**trained.config).to(accelerator.device)
        x = [probe_features(model, part, accelerator.device) for part in (train, test)]
        found = linear_probe(x[0], train.task.items["label"], x[1])
        groups = test.task.items["record"]
        results[name] = scores(found, test.task.items["label"], task.classes, groups, args.resamples)
        print(f"{name}: {describe_scores(results[name])}")
    values = {name: result["macro_f1"] for name, result in results.items()}
    chance = scores(
        np.tile(np.eye(len(task.classes))[train.task.counts().argmax()], (len(test), 1)),
        test.task.items["label"],
        task.classes,
    )["macro_f1"]
    figure, axis = new_figure(1, 1)
    axis.bar(list(values), list(values.values()), color=["#2a6fbb"] + ["#5b6770"] * args.random_seeds)
    low, high = results["pre-trained"]["macro_f1_95"]
    axis.errorbar(
        [0],
        [values["pre-trained"]],
        yerr=[[max(0, values["pre-trained"] - low)], [max(0, high - values["pre-trained"])]],
        color="black",
        capsize=4,
    )
    axis.axhline(chance, color="0.4", ls=":", label="always the most frequent class")
    axis.set_ylabel("macro-F1 of a linear probe")
    axis.legend()
    save_figure(figure, out / "figures" / "probe.png")
    draw_confusion(
        results["pre-trained"]["confusion"],
        task.classes,
        out / "figures" / "confusion.png",
        "linear probe, pre-trained encoder",
    )
    random_mean = float(np.mean([v for n, v in values.items() if n != "pre-trained"]))
    atomic_write(
        out / "metrics.json",
        json.dumps(
            {
                "macro_f1": values["pre-trained"],
                "interval": [low, high],
                "random_mean": random_mean,
                "chance": chance,
                "results": results,
            },
            indent=1,
        ),
    )


if __name__ == "__main__":
    run(main, parse_args())
