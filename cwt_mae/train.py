"""Pre-train CWT-MAE-RoPE: hide patches of wavelet images and reconstruct them, and the signal, from what is
visible.

Recipe of the public repository Dryilv/Wearable-Foundation-Model (train.py), after He et al. 2022: AdamW,
linear warm-up and cosine decay per step, gradient clipping. README.md lists the differences.

    python cwt_mae/train.py --data FOLDER --out runs/cwt_mae/base
    python cwt_mae/train.py --data FOLDER --out runs/cwt_mae/small --config cwt_mae/config_small.yaml
    torchrun --nproc_per_node 2 cwt_mae/train.py --data FOLDER --out runs/cwt_mae/base

The same command with --resume goes on after a stop. The log shows both losses beside what two trivial
predictors reach on the same hidden patches: the mean, and straight lines between what is visible. A model
that is not below them has learned nothing.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from common.arguments import Parser, add_run_arguments, number, refuse
from common.checkpoint import atomic_json
from common.errors import UserError, run
from common.run import describe, open_run, seed_everything
from common.sharding import refuse_sharding
from common.together import from_main
from common.train import (
    batches,
    check_finite,
    finish,
    finish_step,
    lr_at,
    make_accelerator,
    make_loader,
    parameter_groups,
    plan_steps,
    start,
    update,
    watched,
)
from cwt_mae.config import SHAPE, parse_changes, read_config
from cwt_mae.dataset import PhysioSignalDataset, Preprocess, read_store
from cwt_mae.dataset_finetune import split_parts
from cwt_mae.layouts import add_file_arguments
from cwt_mae.model import CWT_MAE_RoPE
from cwt_mae.model_finetune import save_model
from cwt_mae.validation import make_probe, only_padded, probe_score, validate
from cwt_mae.visualize import draw_reconstruction

HERE = Path(__file__).resolve().parent


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_data_arguments(parser)
    # Sizes stand in a YAML file with upstream's names, so that the two can be compared line by line.
    model = parser.add_argument_group("model")
    model.add_argument(
        "--config", type=Path, default=HERE / "config.yaml", help="YAML file with the model's sizes"
    )
    model.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="sizes that differ from --config, such as cwt_scales=16 depth=3",
    )
    # The shared run flags follow; these two belong to this script alone.
    optim = parser.add_argument_group("learning rate and AdamW")
    optim.add_argument(
        "--min-lr", type=number(float, 0), default=1e-6, help="learning rate at the end of the cosine"
    )
    optim.add_argument(
        "--betas",
        type=number(float, 0, 1),
        nargs=2,
        default=(0.9, 0.95),
        help="AdamW's (upstream: 0.9 0.999)",
    )
    # The learning rate is upstream's for any batch size.
    defaults = dict(lr=1.5e-4, batch_size=256, epochs=100.0, weight_decay=0.05, clip=3.0, seed=42)
    add_run_arguments(parser, **defaults, log_every=50, eval_every=1000)
    # What is measured at step 0, every --eval-every steps, and at the end.
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument(
        "--eval-windows", type=number(int, 1), default=256, help="validation windows at most"
    )
    evaluation.add_argument(
        "--probe",
        choices=("none", "beat", "rhythm", "series"),
        default="none",
        help="at each evaluation, fit a linear probe of the frozen features to this task, on training "
        "records only",
    )
    return parser.parse_args(argv)


def add_data_arguments(parser: argparse.ArgumentParser):
    """Options that say which signals are read and how they are prepared."""
    # Which records: files, and the test part to leave out.
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", nargs="+", required=True, help="signal files, or folders of them, in any format"
    )
    data.add_argument(
        "--split",
        help="leave the test records out: a JSON file {train: [names], test: [names]}, or the word ds1 for "
        "the list DS1",
    )
    # How a raw channel becomes the signal; it is stored with the weights, and every later script repeats it.
    data.add_argument(
        "--model-fs",
        type=number(float, 0),
        default=100.0,
        help="rate of the model, Hz; 0 keeps each file's own",
    )
    data.add_argument("--low-hz", type=number(float, 0), default=0.5, help="high-pass cut-off, Hz; 0: none")
    data.add_argument("--high-hz", type=number(float, 0), default=0.0, help="low-pass cut-off, Hz; 0: none")
    data.add_argument(
        "--channel", default="auto", help="auto (an ECG, else a pulse wave), all, names or an index"
    )
    # What is too short or damaged is an error by default, because silence would hide it.
    data.add_argument(
        "--min-seconds", type=number(float, 0), default=0.0, help="shortest usable record, seconds"
    )
    add_file_arguments(data)
    # How many windows an epoch draws, and whose are held out.
    data.add_argument(
        "--windows",
        type=number(int, 0),
        default=0,
        help="windows of an epoch; 0: as many as fit side by side",
    )
    data.add_argument(
        "--val-fraction",
        type=number(float, 0, 1),
        default=0.1,
        help="fraction of the subjects held out for validation; none are with fewer than 5 subjects",
    )


def read_signals(args, accelerator):
    """The store of prepared signals, and the part of each record ("train", "test", "" or None if nothing asks
    for it)."""
    prepare = Preprocess(args.model_fs, args.low_hz, args.high_hz, args.channel)
    store = read_store(args, prepare, accelerator, "train", args.min_seconds)
    # Only --split and the probe ask for parts; other data need not belong to any split.
    if not args.split and args.probe == "none":
        return store, None
    return store, split_parts(store, None if args.split in (None, "ds1") else args.split)


def split_records(args, store, parts) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the validation records: no subject is in both, no test record in
    either."""
    usable = store.anchors
    if args.split:
        usable = usable[parts[usable] != "test"]
    if not len(usable):
        raise UserError(
            f"--split {args.split}: every record belongs to the test part; none is left to train on"
        )
    # Subjects are held out, not records: two records of one heart resemble each other.
    subjects = np.unique(store.records["subject"][usable])
    count = int(np.ceil(len(subjects) * args.val_fraction))
    if len(subjects) < 5:
        refuse(args, ["val_fraction"], f"with {len(subjects)} subjects, fewer than 5")
        count = 0
    if count == len(subjects):
        raise UserError(f"--val-fraction {args.val_fraction:g} leaves no subject to train on; lower it")
    # The same seed holds out the same subjects on every process and after a resume.
    held_out = np.random.default_rng(args.seed).permutation(subjects)[:count]
    is_validation = np.isin(store.records["subject"][usable], held_out)
    return usable[~is_validation], usable[is_validation]


def make_model(args, preprocess: dict) -> CWT_MAE_RoPE:
    """The model that --config and --set describe; UserError for sizes that do not fit each other."""
    sizes = read_config(args.config) | parse_changes(args.set, SHAPE)  # --set wins
    leads = Preprocess(**preprocess).leads
    if sizes.get("leads") not in (None, leads):
        raise UserError("the leads of a model are those of --channel; leave them out of --config and --set")
    sizes["leads"] = leads or None
    try:
        return CWT_MAE_RoPE(**sizes, preprocess=preprocess)
    except ValueError as error:
        raise UserError(str(error)) from error


def make_sets(args, store, parts, model: CWT_MAE_RoPE):
    """(training set, evaluation windows, what to call them in the log): "val" of held-out subjects, "train"
    if there are none."""
    train, validation = split_records(args, store, parts)
    length, patches = model.signal_len, model.num_patches
    train_set = PhysioSignalDataset(store, length, "train", args.seed, patches, args.windows, train)
    # Side by side and with fixed masks, so that the evaluations of one run can be compared.
    rows = validation if len(validation) else train
    windows = PhysioSignalDataset(store, length, "test", args.seed, patches, 0, rows)
    # At most --eval-windows of them, spread evenly over all records.
    spread = np.linspace(0, len(windows) - 1, min(args.eval_windows, len(windows))).astype(int)
    return train_set, Subset(windows, spread.tolist()), "val" if len(validation) else "train"


def evaluate(training, model, loader, prefix: str, probe=None) -> dict:
    """Losses on the windows of `loader`, a picture and the probe's score; done by the main process and told
    to all.

    Nothing in here touches the random states of the training.
    """
    accelerator, step, scores = training.accelerator, training.state["step"], {}
    if accelerator.is_main_process:
        # without the wrapper of DDP, which would wait for the other processes
        plain = accelerator.unwrap_model(model)
        losses, batch = validate(plain, watched(training, loader, together=False), accelerator.device)
        scores = {
            f"{prefix}_{name}" if name in ("spec", "time") else name: value for name, value in losses.items()
        }
        # Are the features good for anything? No reconstruction loss answers that.
        if probe:
            scores["probe_f1"] = probe_score(plain, probe, accelerator.device)
        # The first window as a picture, and the scores for whoever reads files
        picture = Path(training.args.out) / "figures" / "reconstruction.png"
        draw_reconstruction(plain, batch, picture, f"step {step}")
        atomic_json(Path(training.args.out) / "metrics.json", {"step": step, **scores})
    else:  # the other processes learn here whether a stop signal ended it
        list(watched(training, [], together=False))
    # All processes need the scores, because they log them together.
    return from_main(scores)


def main(args):
    # Equal seeds on all processes give equal weights; windows and masks follow from (seed, epoch, index).
    accelerator = make_accelerator(args)
    refuse_sharding(accelerator, "it fits on every GPU; leave ACCELERATE_CONFIG unset, for DDP")
    seed_everything(args.seed)
    if args.min_lr > args.lr:
        raise UserError(f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}; lower it")

    # Data: training windows, windows for the evaluation, and a probe where one is asked for
    store, parts = read_signals(args, accelerator)
    model = make_model(args, vars(store.prepare))
    train_set, eval_windows, prefix = make_sets(args, store, parts, model)
    eval_loader = DataLoader(eval_windows, min(64, args.batch_size), generator=torch.Generator())
    probe = None
    if args.probe != "none":
        probe = make_probe(store, parts, args.probe, model.signal_len, args.seed)
    loader = make_loader(train_set, args)

    # Model and optimizer: biases, norms, tokens and position tables are not decayed
    groups = parameter_groups(model, args.lr, args.weight_decay, plain=("pos_embed", "token"))
    optimizer = torch.optim.AdamW(groups, betas=tuple(args.betas))
    if args.compile:
        model.compile()  # all but the wavelet transform
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # Everything that can be wrong was looked at by now; only here the run folder is made.
    steps = plan_steps(args, loader)
    open_run(args.out, args, accelerator, args.resume, args.overwrite)
    accelerator.print(
        f"{describe(model)} | {len(train_set.rows)} channels, {store.hours(train_set.rows):.2f} h, for "
        f"training | {len(train_set)} windows an epoch | {args.batch_size} x {accelerator.num_processes} x "
        f"{args.accum} windows a step | {steps} steps, learning rate {args.lr:g}"
    )

    # The first evaluation is of random weights: the control of every later line of the log.
    def scores():
        return evaluate(training, model, eval_loader, prefix, probe)

    training = start(accelerator, args, steps, [optimizer], scores, owes_evaluation=True)

    # The loop: its body is passed once per batch, an optimizer step is made every --accum batches.
    # The learning rate is 0 at step 0, as upstream's
    floor = args.min_lr / args.lr if args.lr else 0.0
    model.train()
    for batch, share in batches(training, loader):
        with accelerator.accumulate(model):
            # The noise says which patches are hidden; it comes with the window, so a resumed run hides the
            # same.
            out = model(batch["x"], batch["noise"], only_padded(batch["real"]), details=True)
            # share makes the accumulation of k batches equal one batch that is k times as large.
            losses = {name: out[name] * share for name in ("loss", "loss_spec", "loss_time")}
            check_finite(training, batch["name"], **losses)  # before the weights change; names the records
            accelerator.backward(losses["loss"])
            # Linear from 0 at step 0 as upstream, then half a cosine down to --min-lr.
            factor = lr_at(training.state["step"], steps, args.warmup, floor=floor, ramp="zero")
            grad = update(training, model, [optimizer], factor)
        if accelerator.sync_gradients:
            saved = finish_step(training, grad=grad)  # evaluate where it is due, log, save, stop
            # The encoder so far, for whoever does not want to wait for the end
            if saved and accelerator.is_main_process:
                save_model(args.out / "model.safetensors", accelerator.unwrap_model(model))

    # The end: weights first, then what they are worth
    if accelerator.is_main_process:
        save_model(args.out / "model.safetensors", accelerator.unwrap_model(model))
    finish(training, **scores())
    accelerator.print(f"done; the pre-trained model is {args.out / 'model.safetensors'}")


if __name__ == "__main__":
    run(main, parse_args())
