"""What pre-training is worth at few labels: accuracy against labels per class, with and without it, and beside a CNN. Embeddings to a file.

    python em_mllm/fewshot.py --train data/em_mllm/train/modulation.h5 --test data/em_mllm/test/modulation.h5 \\
        --signal-encoder-path runs/em_mllm/pretrain/encoder --out runs/em_mllm/fewshot
    python em_mllm/fewshot.py --embed embeddings.h5 --test data/em_mllm/test/modulation.h5 \\
        --signal-encoder-path runs/em_mllm/pretrain/encoder

probe: ridge regression on [cls, mean, spread] of the frozen encoder's normalised output, its strength chosen by leave-one-out error inside
the shots. finetune: the whole encoder. Every draw takes other shots and, for the random encoder, other weights.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import h5py
import numpy as np
import torch
from accelerate import Accelerator
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Subset

from common.checkpoint import atomic_path, atomic_write
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from common.run import open_run, progress, seed_everything
from em_mllm.baseline import predict, train_cnn
from em_mllm.dataset import SignalCollator, SignalDataset, encoder_inputs
from em_mllm.em_foundation.models import SiTMAEForClassification, SiTMAEModelWithoutMask
from em_mllm.em_foundation.utils.utils import load_encoder, read_config
from em_mllm.optim import lr_at, make_optimizers, set_lr

METHODS = ("probe", "finetune", "cnn")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, help=".h5 with label")
    parser.add_argument("--test", type=Path, required=True, help=".h5 with label")
    parser.add_argument(
        "--signal-encoder-path", type=Path, required=True, help="encoder folder or weight file"
    )
    parser.add_argument(
        "--shots",
        type=int,
        nargs="+",
        default=[1, 5, 10, 50, 100],
        help="labels per class (default 1 5 10 50 100)",
    )
    parser.add_argument("--draws", type=int, default=3, help="repetitions with other shots (default 3)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["probe", "cnn"],
        help="default probe cnn; finetune takes longest",
    )
    parser.add_argument("--steps", type=int, default=120, help="steps of finetune and cnn (default 120)")
    parser.add_argument(
        "--finetune-lr", type=float, default=5e-4, help="peak rate of finetune (default 5e-4)"
    )
    parser.add_argument(
        "--embed", type=Path, help="write cls, mean and spread vectors of --test to this .h5 and stop"
    )
    parser.add_argument("--out", type=Path, help="folder for metrics and the curve")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    return parser.parse_args()


def make_encoder(path, random_seed=None):
    """The pre-trained encoder, or one of its sizes with random weights of that seed."""
    encoder = SiTMAEModelWithoutMask(read_config(path, attention_type="sdpa"))
    if random_seed is None:
        load_encoder(encoder, path, quiet=True)
    else:
        torch.manual_seed(random_seed)
        encoder = SiTMAEModelWithoutMask(encoder.config)
    return encoder.eval()


@torch.no_grad()
def embed(encoder, data, device, batch_size=64) -> np.ndarray:
    """(N, 3 D): cls, mean and standard deviation over the IQ tokens of the normalised output."""
    encoder.to(device)
    out, special = [], encoder.config.num_special
    for batch in DataLoader(data, batch_size, collate_fn=SignalCollator(encoder.config)):
        inputs = encoder_inputs(batch, device)
        h = encoder(**inputs).last_hidden_state
        valid = (inputs["sample_ids_seq"] >= 0)[:, special:, None]
        count = valid.sum(1)
        mean = (h[:, special:] * valid).sum(1) / count
        spread = (((h[:, special:] - mean[:, None]) ** 2 * valid).sum(1) / count).sqrt()
        out.append(torch.cat([h[:, 0], mean, spread], 1).cpu())
    return torch.cat(out).numpy()


def probe(x, y, test_x):
    """Ridge regression to the classes; its strength is chosen by leave-one-out error inside the shots."""
    return make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(0, 4, 9))).fit(x, y).predict(test_x)


def fit(encoder_path, pretrained: bool, seed, data, rows, classes, steps, lr, device, batch_size=32):
    """Encoder and linear head, trained for `steps` steps on `rows` of `data`; pretrained False takes the encoder's sizes alone."""
    torch.manual_seed(seed)
    model = SiTMAEForClassification(read_config(encoder_path, attention_type="sdpa", num_labels=classes))
    if pretrained:
        load_encoder(model, encoder_path, quiet=True)
    torch.nn.init.zeros_(model.classifier.weight)  # as finetune.py
    model.to(device).train()
    collate, rng = SignalCollator(model.config), np.random.default_rng(seed)
    optimizers = make_optimizers(model, "muon", lr, 0.05)
    for step in range(steps):
        data.set_epoch(step)  # what it draws at random, it draws anew
        batch = collate([data[i] for i in rng.choice(rows, min(batch_size, len(rows)), replace=False)])
        set_lr(optimizers, lr_at(step, steps, 0.1))
        model(**encoder_inputs(batch, device), labels=batch["label"].long().to(device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def classify(model, data, shifts=1, batch_size=64) -> np.ndarray:
    """Predicted class of every signal.

    shifts: the logits are means over this many circular shifts of the signal inside a patch. Captures begin anywhere, and the grid of
    patches, unlike a convolution, does not move with them.
    """
    collate, patch, classes = SignalCollator(model.config), model.config.patch_size[0], []
    for start in range(0, len(data), batch_size):
        items, logits = [data[i] for i in range(start, min(start + batch_size, len(data)))], 0.0
        for k in range(shifts):
            batch = collate([{**item, "iq": np.roll(item["iq"], k * patch // shifts, 0)} for item in items])
            inputs = encoder_inputs(batch, model.device)
            logits = logits + model.per_signal(
                model(**inputs).logits, inputs["patch_positions"], inputs["sample_ids_seq"]
            )
        classes.append(logits.argmax(-1).cpu())
    return torch.cat(classes).numpy()


def main(args):
    accelerator = Accelerator()
    seed_everything(args.seed)
    test = SignalDataset([args.test], ("label", "snr"))
    if args.embed:
        with atomic_path(args.embed) as temporary, h5py.File(temporary, "w") as file:
            file["embedding"] = embed(make_encoder(args.signal_encoder_path), test, accelerator.device)
            file["label"] = test.columns["label"]
            file.attrs["columns"] = (
                "cls, mean, standard deviation of the normalised encoder output, equally wide"
            )
        print(f"{args.embed}: {len(test)} embeddings")
        return
    if args.train is None or args.out is None:
        raise UserError("give --train and --out, or --embed to write embeddings alone")
    train = SignalDataset([args.train], ("label", "snr"))
    label, test_label, high = (
        train.columns["label"].astype(int),
        test.columns["label"].astype(int),
        test.columns["snr"] >= 10,
    )
    classes = label.max() + 1
    most = int(np.bincount(label).min())
    shots = [k for k in args.shots if k <= most]
    if not shots:
        raise UserError(
            f"{args.train}: the rarest class has {most} signals, fewer than the smallest of --shots"
        )
    out = open_run(args.out, args, accelerator, overwrite=args.overwrite)
    features = {}
    for draw in range(args.draws):
        for kind in ("pre-trained", "random"):
            if "probe" in args.methods and (kind == "random" or draw == 0):
                encoder = make_encoder(
                    args.signal_encoder_path, None if kind == "pre-trained" else args.seed + draw + 1
                )
                features[kind, draw] = encoder, embed(encoder, test, accelerator.device)
    results = {}
    for k in shots:
        for draw in progress(range(args.draws), desc=f"{k} per class"):
            rng = np.random.default_rng((args.seed, k, draw))
            rows = np.concatenate(
                [rng.choice(np.nonzero(label == c)[0], k, replace=False) for c in range(classes)]
            )
            answers = {}
            for kind in ("pre-trained", "random"):
                if "probe" in args.methods:
                    encoder, test_x = features[kind, 0 if kind == "pre-trained" else draw]
                    answers[f"probe, {kind}"] = probe(
                        embed(encoder, Subset(train, rows.tolist()), accelerator.device), label[rows], test_x
                    )
                if "finetune" in args.methods:
                    tuned = fit(
                        args.signal_encoder_path,
                        kind == "pre-trained",
                        0 if kind == "pre-trained" else args.seed + draw + 1,
                        train,
                        rows,
                        int(classes),
                        args.steps,
                        args.finetune_lr,
                        accelerator.device,
                    )
                    answers[f"finetune, {kind}"] = classify(tuned, test)
            if "cnn" in args.methods:
                model = train_cnn(
                    Subset(train, rows.tolist()),
                    int(classes),
                    args.steps,
                    64,
                    3e-3,
                    Accelerator(),
                    args.seed + draw,
                )
                answers["CNN from scratch"] = predict(model, test, accelerator.device).argmax(1)
            for name, guess in answers.items():
                results.setdefault(name, {}).setdefault(k, []).append(
                    [
                        float((guess == test_label).mean()),
                        float((guess == test_label)[high].mean()) if high.any() else None,
                    ]
                )
    summary = {
        name: {
            k: {
                "accuracy": float(np.mean([v[0] for v in runs])),
                "spread": float(np.std([v[0] for v in runs])),
                "accuracy_high_snr": float(np.mean([v[1] for v in runs])) if high.any() else None,
            }
            for k, runs in curve.items()
        }
        for name, curve in results.items()
    }
    atomic_write(
        out / "metrics.json", json.dumps({"chance": float(1 / classes), "curves": summary}, indent=1)
    )
    figure, axis = new_figure()
    for name, curve in summary.items():
        axis.errorbar(
            list(curve),
            [v["accuracy"] for v in curve.values()],
            [v["spread"] for v in curve.values()],
            marker="o",
            capsize=2,
            label=name,
        )
    axis.axhline(1 / classes, color="0.6", ls="--", lw=1)
    axis.set(
        xscale="log",
        xlabel="labels per class",
        ylabel="accuracy",
        title=f"{args.test.stem}, {args.draws} draws; dashed: chance",
    )
    axis.set_xticks(shots, shots)
    axis.minorticks_off()
    axis.legend(fontsize=8)
    save_figure(figure, out / "figures" / "fewshot.png")
    atomic_write(
        out / "figures" / "fewshot.csv",
        "method,labels_per_class,accuracy,spread\n"
        + "".join(
            f"{name},{k},{v['accuracy']:.4f},{v['spread']:.4f}\n"
            for name, curve in summary.items()
            for k, v in curve.items()
        ),
    )
    for name, curve in summary.items():
        print(f"{name}: " + ", ".join(f"{k}: {v['accuracy']:.3f}" for k, v in curve.items()))


if __name__ == "__main__":
    run(main, parse_args())
