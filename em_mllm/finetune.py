"""The encoder alone with labels: classification, or classification with the five regressions, fine-tuned whole or as a linear probe.

    python em_mllm/finetune.py --train data/em_mllm/train/radar_jamming.h5 --test data/em_mllm/test/radar_jamming.h5 \\
        --signal-encoder-path runs/em_mllm/pretrain/encoder --multitask --out runs/em_mllm/multitask

Writes out/model (SiTMAEForClassification or SiTForMultiTask, upstream's key names), metrics.json with the chance level or the error of the
training median beside each number, and a confusion matrix.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from torch.utils.data import DataLoader

from common.checkpoint import atomic_dir, atomic_write, find_resume, load_step, save_step
from common.errors import UserError, run
from common.run import Log, StopSignal, check_finite, describe, loader_worker, open_run, seed_everything
from em_mllm.dataset import SignalCollator, SignalDataset, encoder_inputs
from em_mllm.em_foundation.models import SiTForMultiTask, SiTMAEForClassification
from em_mllm.em_foundation.models.configuration_em import REGRESSION_TASKS
from em_mllm.em_foundation.utils.utils import load_encoder, read_config
from em_mllm.figures import draw_confusion
from em_mllm.optim import lr_at, make_optimizers, set_lr


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--train",
        type=Path,
        nargs="+",
        required=True,
        help=".h5 files with label; their classes are joined by name",
    )
    parser.add_argument(
        "--test", type=Path, nargs="+", required=True, help=".h5 files to measure on, once, at the end"
    )
    parser.add_argument(
        "--signal-encoder-path", type=Path, required=True, help="encoder folder or weight file"
    )
    parser.add_argument(
        "--random-encoder", action="store_true", help="control: the encoder's sizes without its weights"
    )
    parser.add_argument("--linear-probe", action="store_true", help="train the head alone")
    parser.add_argument(
        "--multitask",
        action="store_true",
        help=f"also regress {', '.join(REGRESSION_TASKS)} where the files have these columns",
    )
    parser.add_argument(
        "--noise-db",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="add white noise at a random SNR of this range in training",
    )
    parser.add_argument(
        "--shift-hz", type=float, default=0.0, help="shift in frequency by up to this in training (default 0)"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out signals with nan, inf or only zeros instead of stopping",
    )
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps (default 500)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="signals per process and batch (default 32)"
    )
    parser.add_argument("--accum", type=int, default=1, help="batches per optimizer step (default 1)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="muon: orthogonalised momentum for the layers' matrices (default adamw)",
    )
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of the matrices (default 0.05)")
    parser.add_argument(
        "--precision", choices=("no", "bf16", "fp16"), default="no", help="autocast (default no: float32)"
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default 0)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints, model, metrics and pictures"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument("--log-every", type=int, default=50, help="steps between log lines (default 50)")
    parser.add_argument(
        "--save-every", type=int, default=1000, help="steps between checkpoints (default 1000)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --out")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    return parser.parse_args()


def join_classes(train, test) -> list[str]:
    """Names of all classes of the training files; the labels of both data sets are renumbered to this list.

    A file without class names counts its labels as the first training file does.
    """
    first = train.files[0].classes or [str(i) for i in range(int(train.columns["label"].max()) + 1)]
    names = list(dict.fromkeys([*first, *(n for file in train.files for n in file.classes or ())]))
    for data in (train, test):
        for f, file in enumerate(data.files):
            rows, own = data.owner == f, file.classes or first
            label = data.columns["label"][rows].astype(int)
            if label.max() >= len(own):
                raise UserError(
                    f"{file.path}: label {label.max()} is not among the {len(own)} classes {', '.join(own)}"
                )
            if unknown := [own[k] for k in np.unique(label) if own[k] not in names]:
                raise UserError(
                    f"{file.path}: class {unknown[0]} is not among the training classes {', '.join(names)}"
                )
            data.columns["label"][rows] = [names.index(own[k]) for k in label]
    return names


def split_labels(batch, scale):
    """A collated batch -> inputs of the model, labels of the model (regressions divided by their training scale)."""
    inputs, label = encoder_inputs(batch), batch["label"].long()
    if not scale:
        return inputs, label
    return inputs, {
        "classification": label,
        **{name: batch[name].float() / value for name, value in scale.items()},
    }


@torch.no_grad()
def measure(model, data, scale, batch_size=64):
    """Predicted class and regressions (in the columns' units) for every signal."""
    model.eval()
    collate, classes, values = SignalCollator(model.config), [], {name: [] for name in scale}
    for batch in DataLoader(data, batch_size, collate_fn=collate):
        inputs = encoder_inputs(batch, model.device)
        logits, where = model(**inputs).logits, (inputs["patch_positions"], inputs["sample_ids_seq"])
        classes.append(
            model.per_signal(logits["classification"] if scale else logits, *where).argmax(-1).cpu()
        )
        for name in scale:
            values[name].append(model.per_signal(logits[name], *where)[:, 0].cpu() * scale[name])
    return torch.cat(classes).numpy(), {name: torch.cat(v).numpy() for name, v in values.items()}


def main(args):
    accelerator = Accelerator(
        mixed_precision=args.precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.accum, sync_with_dataloader=False
        ),
    )
    seed_everything(args.seed)
    regressions = REGRESSION_TASKS if args.multitask else ()
    columns = ("label", "snr", *regressions)
    train = SignalDataset(args.train, columns, args.skip_bad, args.seed, args.noise_db, args.shift_hz)
    test = SignalDataset(args.test, columns, args.skip_bad)
    for path, data in ((args.train[0], train), (args.test[0], test)):
        if not np.isfinite(data.columns["label"]).all() or (data.columns["label"] < 0).any():
            raise UserError(
                f"{path}: label is missing or not a class number; write a dataset label (Num, 1) of 0, 1, 2, ..."
            )
    classes = join_classes(train, test)
    scale = {
        name: float(np.nanmean(np.abs(train.columns[name])))
        for name in regressions
        if np.isfinite(train.columns[name]).any()
    }
    if args.multitask and not scale:
        raise UserError(f"--multitask: {args.train[0]} has none of {', '.join(REGRESSION_TASKS)}")
    config = read_config(args.signal_encoder_path, num_labels=len(classes), attention_type="sdpa")
    model = (SiTForMultiTask if scale else SiTMAEForClassification)(config)
    if not args.random_encoder:
        load_encoder(model, args.signal_encoder_path)
    torch.nn.init.zeros_(
        model.classifier.weight
    )  # the un-normalised features are loud: start undecided rather than wrong
    model.sit.requires_grad_(not args.linear_probe)
    model.sit.layernorm.requires_grad_(False)  # the heads read the un-normalised output, as upstream
    if not config.use_fs:
        model.sit.embeddings.fs_embedder.requires_grad_(False)
    if scale:
        for name in set(REGRESSION_TASKS) - set(scale):
            getattr(model, f"regression_head_{name}").requires_grad_(False)
    size = min(args.batch_size, len(train))
    per_step = size * accelerator.num_processes * args.accum
    steps_per_epoch = len(train) // per_step
    if steps_per_epoch < 1:
        raise UserError(
            f"{len(train)} signals are fewer than one step of {size} x {accelerator.num_processes} x {args.accum}; lower --batch-size"
        )
    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)
    loader = DataLoader(
        train,
        size,
        shuffle=True,
        collate_fn=SignalCollator(config),
        num_workers=args.workers,
        worker_init_fn=loader_worker,
        drop_last=True,
        generator=torch.Generator(),
    )
    accelerator.print(
        f"{describe(model)}; {len(train)} training and {len(test)} test signals, {len(classes)} classes, "
        f"{per_step} signals a step, {args.steps} steps, lr {args.lr:g}"
    )
    model, loader, *optimizers = accelerator.prepare(
        model, loader, *make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    )
    state = {"step": 0, "epoch": 0, "batch": 0}
    if args.resume and (found := find_resume(out, accelerator)):
        state = load_step(accelerator, found)
        accelerator.print(f"resumed from {found}")
    log, stop = Log(out, accelerator, args.steps, state["step"]), StopSignal(accelerator)
    model.train()
    while state["step"] < args.steps:
        loader.set_epoch(state["epoch"])
        train.set_epoch(state["epoch"])
        for batch in accelerator.skip_first_batches(loader, state["batch"]):
            if state["batch"] >= steps_per_epoch * args.accum:  # the rest would make an incomplete step
                break
            inputs, labels = split_labels(batch, scale)
            with accelerator.accumulate(model):
                loss = model(**inputs, labels=labels).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    lr = set_lr(optimizers, lr_at(state["step"], args.steps, 0.05))
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            state["batch"] += 1
            if not accelerator.sync_gradients:
                continue
            state["step"] += 1
            if state["step"] % args.log_every == 0 or state["step"] == 1:
                mean = accelerator.reduce(loss.detach(), "mean")
                check_finite(mean, state["step"], batch["index"].tolist(), out)
                log.log(state["step"], loss=mean, lr=lr, grad=grad_norm)
            last = state["step"] == args.steps
            if state["step"] % args.save_every == 0 or last:
                save_step(accelerator, out, state)
            if not last and stop():
                stop.leave(save_step(accelerator, out, state))
            if last:
                break
        if state["batch"] >= steps_per_epoch * args.accum:
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
    log.close()

    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        with atomic_dir(out / "model") as folder:
            model.save_pretrained(folder)
        predicted, values = measure(model, test, scale)
        label, snr = test.columns["label"].astype(int), test.columns["snr"]
        hit = predicted == label
        metrics = {
            "accuracy": float(hit.mean()),
            "chance": float(np.bincount(label).max() / len(label)),
            "count": len(label),
        }
        if np.isfinite(snr).any():
            metrics["accuracy_high_snr"] = float(hit[snr >= 10].mean())
        for name, guess in values.items():
            known = np.isfinite(test.columns[name])
            truth, median = test.columns[name][known], float(np.nanmedian(train.columns[name]))
            metrics[f"mae_{name}"] = {
                "model": float(np.abs(guess[known] - truth).mean()),
                "training median": float(np.abs(median - truth).mean()),
            }
        atomic_write(out / "metrics.json", json.dumps(metrics, indent=1))
        matrix = np.zeros((len(classes), len(classes)), int)
        np.add.at(matrix, (label, predicted), 1)
        draw_confusion(matrix, classes, "share of signals", out / "figures" / "confusion.png")
        print("\n".join(f"{k}: {v}" for k, v in metrics.items()))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run(main, parse_args())
