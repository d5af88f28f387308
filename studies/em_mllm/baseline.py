"""A small convolutional network on the same IQ: the classical baseline beside every number of this project.

    python studies/em_mllm/baseline.py --train data/em_mllm/train --test data/em_mllm/test --out runs/cnn

One network per task (x.h5), trained on `label`. Its four-choice answer to x.json is the likeliest of the four
options.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from common.arguments import Parser, number
from common.checkpoint import atomic_json
from common.errors import UserError, run
from common.run import describe, open_run, progress, seed_everything
from common.train import lr_at
from em_mllm.dataset import SignalDataset, read_questions
from em_mllm.optim import make_optimizers
from em_mllm.options import parse_options
from em_mllm.scores import HIGH_SNR_DB
from studies.em_mllm import short


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--train", type=Path, required=True, help="folder of x.h5 with labels")
    parser.add_argument(
        "--test",
        type=Path,
        required=True,
        help="folder of x.h5 (and x.json for the four-choice score) with the same names",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for metrics.json")
    parser.add_argument("--steps", type=number(int, 1), default=400, help="training steps of each task")
    parser.add_argument("--batch-size", type=number(int, 1), default=64, help="signals of one step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    return parser.parse_args(argv)


class SignalCNN(nn.Module):
    """iq (B, T, 2) -> logits (B, classes): four strided convolutions, then mean and maximum over time."""

    def __init__(self, classes: int, width: int = 64):
        super().__init__()
        block = lambda a, b, k, s: nn.Sequential(nn.Conv1d(a, b, k, s, k // 2), nn.BatchNorm1d(b), nn.ReLU())
        self.body = nn.Sequential(
            block(2, width // 2, 9, 2),
            block(width // 2, width, 9, 2),
            block(width, width, 7, 2),
            block(width, 2 * width, 5, 2),
            block(2 * width, 2 * width, 5, 2),
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, iq):
        h = self.body(iq.transpose(1, 2))
        return self.head(torch.cat([h.mean(-1), h.amax(-1)], 1))


def train_cnn(data, classes, steps, batch_size, lr, accelerator, seed=0):
    """data: SignalDataset with labels, or a Subset of one. Returns the trained network in eval mode."""
    torch.manual_seed(seed)
    model = SignalCNN(classes)
    loader = DataLoader(
        data,
        batch_size,
        shuffle=True,
        drop_last=len(data) >= batch_size,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=lambda items: (
            torch.tensor(np.stack([i["iq"] for i in items])),
            torch.tensor([int(i["label"]) for i in items]),
        ),
    )
    model, loader, *optimizers = accelerator.prepare(
        model, loader, *make_optimizers(model, "adamw", lr, 0.01)
    )
    model.train()
    step, epoch = 0, 0
    while step < steps:
        loader.set_epoch(epoch)
        getattr(data, "dataset", data).set_epoch(epoch)  # of a Subset, its data set
        for iq, label in loader:
            short.step(model, optimizers, F.cross_entropy(model(iq), label), lr_at(step, steps, 0.05))
            step += 1
            if step == steps:
                break
        epoch += 1
    return accelerator.unwrap_model(model).eval()


@torch.no_grad()
def predict(model, data, device, batch_size=256) -> np.ndarray:
    """Log-probabilities (N, classes)."""
    out = []
    for start in range(0, len(data), batch_size):
        iq = torch.tensor(np.stack([data[i]["iq"] for i in range(start, min(start + batch_size, len(data)))]))
        out.append(model(iq.to(device)).log_softmax(-1).cpu())
    return torch.cat(out).numpy()


def four_choice(log_probs, names, questions) -> tuple[np.ndarray, np.ndarray]:
    """For every question with options: (signal index, hit)."""
    index, hits = [], []
    for r in questions:
        options = parse_options(r)
        if not options or "answer" not in r:
            continue
        i = r["iq_index_in_h5"]
        best = max(
            options, key=lambda a: log_probs[i, names.index(options[a])] if options[a] in names else -np.inf
        )
        index.append(i)
        hits.append(f"({best})" in r["answer"])
    return np.array(index), np.array(hits)


def main(args):
    accelerator = Accelerator()
    tasks = sorted(p.stem for p in args.train.glob("*.h5"))
    if not tasks:
        raise UserError(f"--train {args.train}: holds no .h5 file")
    sets = {
        t: (
            SignalDataset([args.train / f"{t}.h5"], ("label", "snr")),
            SignalDataset([args.test / f"{t}.h5"], ("label", "snr")),
        )
        for t in tasks
    }
    out = open_run(args.out, args, accelerator, overwrite=args.overwrite)
    metrics, choice, start = {}, [], time.process_time()
    for task in progress(tasks, desc="CNN"):
        seed_everything(args.seed)
        train, test = sets[task]
        names = train.files[0].classes or [str(i) for i in range(int(train.columns["label"].max()) + 1)]
        model = train_cnn(train, len(names), args.steps, args.batch_size, args.lr, accelerator, args.seed)
        log_probs = predict(model, test, accelerator.device)
        hit, snr = log_probs.argmax(1) == test.columns["label"], test.columns["snr"]
        metrics[task] = {
            "accuracy": float(hit.mean()),
            "accuracy_high_snr": float(hit[snr >= HIGH_SNR_DB].mean()),
            "model": describe(model),
        }
        if (args.test / f"{task}.json").exists():
            index, good = four_choice(log_probs, names, read_questions(args.test / f"{task}.json"))
            choice.append((snr[index], good))
    if choice:
        snr, good = (np.concatenate(x) for x in zip(*choice))
        metrics["four_choice"] = {
            "accuracy": float(good.mean()),
            "accuracy_high_snr": float(good[snr >= HIGH_SNR_DB].mean()),
            "count": len(good),
        }
    metrics["cpu_seconds"] = time.process_time() - start
    atomic_json(out / "metrics.json", metrics)
    print("\n".join(f"{k}: {v}" for k, v in metrics.items()))


if __name__ == "__main__":
    run(main, parse_args())
