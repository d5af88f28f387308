"""Pre-train CWT-MAE-RoPE: hide patches of wavelet images and have them, and the signal, reconstructed.

Recipe of the public repository Dryilv/Wearable-Foundation-Model (train.py), after He et al. 2022: AdamW, warm-up and
cosine per step, clipping. Differences: README.md.

One process:    python cwt_mae/train.py --data FOLDER --out runs/cwt_mae/base
Two GPUs:       torchrun --nproc_per_node 2 cwt_mae/train.py --data FOLDER --out runs/cwt_mae/base
Go on:          the same command with --resume

The log shows both losses beside what two trivial predictors get on the same hidden patches: the mean, and straight lines
between what is visible. A model that is not below them has learned nothing.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_write, find_resume, load_step, save_step
from common.errors import UserError, run
from common.run import (
    Log,
    StopSignal,
    check_finite,
    describe,
    loader_worker,
    on_main,
    open_run,
    seed_everything,
)
from cwt_mae.dataset import PhysioSignalDataset, Preprocess, build_store
from cwt_mae.dataset_finetune import (
    DownstreamClassificationDataset,
    fold_of,
    load_task,
    split_parts,
    training_part,
)
from cwt_mae.metrics import confusion, linear_probe, macro_f1
from cwt_mae.model import CWT_MAE_RoPE
from cwt_mae.model_finetune import save_model
from cwt_mae.visualize import draw_reconstruction


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = argparse.BooleanOptionalAction
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="signal files and folders of them: WFDB, EDF, npz, npy, csv, HDF5, ts",
    )
    data.add_argument(
        "--split", help="JSON {train: [names], test: [names]}, or the word ds1: leave the test records out"
    )
    data.add_argument("--cache", help="folder for the prepared signals (None: data/cwt_mae/cache)")
    data.add_argument(
        "--model-fs",
        type=float,
        default=100.0,
        help="sampling rate of the model, Hz; 0 keeps each file's own",
    )
    data.add_argument("--input-fs", type=float, help="sampling rate of files that do not say it, Hz")
    data.add_argument("--low-hz", type=float, default=0.5, help="high-pass edge, Hz; 0 = none")
    data.add_argument("--high-hz", type=float, default=0.0, help="low-pass edge, Hz; 0 = none")
    data.add_argument(
        "--channel",
        default="auto",
        help="auto (MLII, II, ECG, PLETH, PPG, else the first), all, a name or an index",
    )
    data.add_argument("--min-seconds", type=float, default=0.0, help="shortest usable record, seconds")
    data.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave bad records out, named and counted, instead of stopping",
    )
    data.add_argument(
        "--windows", type=int, default=0, help="windows in an epoch; 0 = as many as fit side by side"
    )
    data.add_argument(
        "--val-share",
        type=float,
        default=0.1,
        help="share of the subjects kept for validation (none if fewer than 5)",
    )
    data.add_argument("--workers", type=int, default=0, help="loader processes for each training process")
    model = parser.add_argument_group("model (upstream names; its published sizes are the defaults)")
    model.add_argument("--signal-len", type=int, default=3000, help="window, samples at the model's rate")
    model.add_argument("--cwt-scales", type=int, default=64, help="rows of the wavelet image")
    model.add_argument("--lowest-scale", type=float, default=0.1, help="narrowest wavelet, samples")
    model.add_argument("--scale-step", type=float, default=1.0, help="distance of the scales, samples")
    model.add_argument("--log-scales", action=flag, default=False, help="the same ends, equal ratios")
    model.add_argument("--patch-size-time", type=int, default=50, help="patch width, samples")
    model.add_argument("--patch-size-freq", type=int, default=4, help="patch height, scales")
    model.add_argument("--embed-dim", type=int, default=768, help="width of the encoder's tokens")
    model.add_argument("--depth", type=int, default=12, help="blocks of the encoder")
    model.add_argument("--num-heads", type=int, default=12, help="attention heads of the encoder")
    model.add_argument("--decoder-embed-dim", type=int, default=512, help="width of the decoder's tokens")
    model.add_argument("--decoder-depth", type=int, default=8, help="blocks of the decoder")
    model.add_argument("--decoder-num-heads", type=int, default=16, help="attention heads of the decoder")
    model.add_argument("--mask-ratio", type=float, default=0.75, help="hidden share of the patches")
    model.add_argument(
        "--mlp-rank-ratio", type=float, default=0.5, help="rank of the encoder's MLPs relative to full"
    )
    model.add_argument(
        "--time-loss-weight", type=float, default=1.0, help="weight of the signal's loss beside the image's"
    )
    model.add_argument(
        "--column-masking", action=flag, default=False, help="hide all scales of a moment together"
    )
    model.add_argument(
        "--masked-time-loss", action=flag, default=False, help="signal loss on hidden columns only"
    )
    model.add_argument("--patch-norm", action=flag, default=True, help="LayerNorm after the patch embedding")
    model.add_argument(
        "--raw-patches", action=flag, default=False, help="embed the plain signal beside the image"
    )
    model.add_argument("--legacy", action=flag, default=False, help="upstream's numerics")
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--max-steps", type=int, default=0, help="optimizer steps; 0 = --epochs")
    optim.add_argument("--epochs", type=int, default=100, help="passes over the data, where --max-steps is 0")
    optim.add_argument(
        "--batch-size", type=int, default=256, help="windows for each process and accumulated step"
    )
    optim.add_argument("--accum", type=int, default=1, help="batches accumulated in an optimizer step")
    optim.add_argument(
        "--lr", type=float, default=1.5e-4, help="peak learning rate (upstream: for any batch)"
    )
    optim.add_argument("--min-lr", type=float, default=1e-6, help="learning rate at the end")
    optim.add_argument(
        "--warmup-steps", type=int, default=-1, help="steps of linear warm-up; -1 = 5 %% of all"
    )
    optim.add_argument(
        "--weight-decay", type=float, default=0.05, help="not on biases, norms, tokens and positions"
    )
    optim.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95), help="AdamW (upstream 0.9 0.999)")
    optim.add_argument("--clip", type=float, default=3.0, help="largest gradient norm")
    optim.add_argument(
        "--bf16", action="store_true", help="bfloat16 mixed precision (the wavelets stay float32)"
    )
    out = parser.add_argument_group("run")
    out.add_argument("--out", required=True, help="run folder")
    out.add_argument("--seed", type=int, default=42, help="of weights, windows and masks")
    out.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --out")
    out.add_argument(
        "--overwrite", action="store_true", help="delete the run that --out holds and start again"
    )
    out.add_argument("--log-every", type=int, default=50, help="steps")
    out.add_argument("--save-every", type=int, default=1000, help="steps")
    out.add_argument(
        "--eval-every", type=int, default=1000, help="steps between validations, pictures and linear probes"
    )
    out.add_argument("--eval-windows", type=int, default=256, help="validation windows")
    out.add_argument(
        "--probe",
        choices=("none", "beat", "rhythm", "series"),
        default="none",
        help="linear probe of frozen features on this task, training records only",
    )
    return parser.parse_args(argv)


MODEL_ARGS = (
    "signal_len cwt_scales lowest_scale scale_step log_scales patch_size_time patch_size_freq embed_dim depth num_heads decoder_embed_dim "
    "decoder_depth decoder_num_heads mask_ratio mlp_rank_ratio time_loss_weight column_masking masked_time_loss patch_norm raw_patches "
    "legacy"
).split()


def lr_at(step: int, total: int, warmup: int, base: float, low: float) -> float:
    """Learning rate set before optimizer step `step` (0 ...): linear from 0, then half a cosine to `low`."""
    if step < warmup:
        return base * step / warmup
    return low + (base - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """Two groups: matrices with weight decay; biases, norms, gains, tokens and position tables without."""
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "pos_embed" in n or "token" in n]
    decayed = [p for n, p in model.named_parameters() if not (p.ndim < 2 or "pos_embed" in n or "token" in n)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def only_padded(real):
    """The padding mask, or None if the batch has no padding: the model is then faster."""
    return None if bool(real.all()) else real


def bridge(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """image (C, L) with the columns hidden (L,) replaced by straight lines between the visible ones; 0 if none is visible."""
    seen = np.flatnonzero(~hidden)
    if not len(seen):
        return np.zeros_like(image)
    right = np.searchsorted(seen, np.arange(len(hidden))).clip(max=len(seen) - 1)
    left = np.where(seen[right] > np.arange(len(hidden)), (right - 1).clip(min=0), right)
    a, b = seen[left], seen[right]
    share = np.where(b > a, (np.arange(len(hidden)) - a) / np.maximum(b - a, 1), 0.0).astype(image.dtype)
    return image[:, a] * (1 - share) + image[:, b] * share


def trivial_losses(model, out: dict, real) -> dict:
    """Losses of the two trivial predictors on the same hidden patches: the mean (0 after normalisation), and straight lines
    in time between the visible patches of the same scales (for the signal: between columns of which anything is visible)."""
    imgs, signal, mask = out["imgs"].float(), out["signal"].float(), out["mask"]
    (height, width), rows = model.grid_size, model.patch_size_freq
    hidden = (
        mask.bool().reshape(-1, height, width).repeat_interleave(model.patch_size_time, 2).cpu().numpy()
    )  # (B, H, L)
    lines, straight = imgs.cpu().numpy().copy(), signal.cpu().numpy().copy()
    for i in range(len(lines)):
        for h in range(height):
            band = lines[i, :, h * rows : (h + 1) * rows]
            lines[i, :, h * rows : (h + 1) * rows] = bridge(
                band.reshape(-1, band.shape[-1]), hidden[i, h]
            ).reshape(band.shape)
        straight[i] = bridge(straight[i][None], hidden[i].all(0))[0]
    lines, straight = torch.from_numpy(lines).to(imgs), torch.from_numpy(straight).to(signal)
    return {
        "spec_mean": model.forward_loss_spec(imgs, model.patchify(torch.zeros_like(imgs)), mask, real),
        "spec_line": model.forward_loss_spec(imgs, model.patchify(lines), mask, real),
        "time_mean": model.forward_loss_time(signal, torch.zeros_like(signal), mask, real),
        "time_line": model.forward_loss_time(signal, straight, mask, real),
    }


@torch.no_grad()
def validate(model, loader, device) -> tuple[dict, dict]:
    """Mean losses over the validation windows, with the trivial predictors' beside them; and the first batch."""
    model.eval()
    sums, count, first = {}, 0, None
    for batch in loader:
        real = only_padded(batch["real"])
        real = None if real is None else real.to(device)
        out = model(batch["x"].to(device), batch["noise"].to(device), real, details=True)
        losses = {
            "val_spec": out["loss_spec"],
            "val_time": out["loss_time"],
            **trivial_losses(model, out, real),
        }
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch["x"])
        count += len(batch["x"])
        first = first or batch
    model.train()
    return {name: value / count for name, value in sums.items()}, first


@torch.no_grad()
def probe_features(model, dataset, device) -> np.ndarray:
    """Mean and deviation over the patches of the frozen encoder's tokens, class token left out: (windows, 2 D)."""
    model.eval()
    rows = []
    for batch in DataLoader(dataset, 256, generator=torch.Generator()):
        real = only_padded(batch["real"])
        imgs, signal, real = model.images(batch["x"].to(device), None if real is None else real.to(device))
        tokens = model.forward_encoder(imgs, signal, model.real_patches(real))[:, 1:].float()
        rows.append(torch.cat([tokens.mean(1), tokens.std(1)], 1).cpu().numpy())
    model.train()
    return np.concatenate(rows)


def make_probe(args, store, parts):
    """Labelled windows of the training records, at most 1,500, and which of them are for the probe's own test (by subject)."""
    task = load_task(store, args.probe, args.signal_len, skip_bad=True)
    task = training_part(task, parts)
    fold = fold_of(store, task, 3)
    chosen = np.random.default_rng(args.seed).permutation(len(task.items))[:1500]
    task = task.select(np.sort(chosen))
    return DownstreamClassificationDataset(store, task, args.signal_len), fold[task.items["record"]] == 0


def probe_score(model, probe, device) -> float:
    """Macro-F1 of a logistic regression on frozen features, tested on other subjects than it was fitted to."""
    dataset, held = probe
    x, y = probe_features(model, dataset, device), dataset.task.items["label"]
    found = np.zeros((held.sum(), len(dataset.task.classes)))
    found[:, np.unique(y[~held])] = linear_probe(x[~held], y[~held], x[held])
    return macro_f1(confusion(y[held], found.argmax(1), found.shape[1]))


def main(args):
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accum,
        mixed_precision="bf16" if args.bf16 else "no",
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    seed_everything(args.seed)

    # data
    prepare = Preprocess(args.model_fs, args.low_hz, args.high_hz, args.channel)
    load = lambda quiet=False: build_store(
        args.data, prepare, args.cache, args.input_fs, "train", args.min_seconds, args.skip_bad, quiet
    )
    on_main(
        accelerator, load
    )  # one process reads the files and tells what it skipped, the others map what it wrote
    store = load(quiet=True)
    usable, parts = np.arange(len(store.records)), None
    if args.split or args.probe != "none":
        parts = split_parts(store, None if args.split in (None, "ds1") else args.split)
        usable = np.flatnonzero(parts != "test") if args.split else usable
        if not len(usable):
            raise UserError(
                f"--split {args.split}: every record belongs to the test part; none is left to train on"
            )
    subjects = np.unique(store.records["subject"][usable])
    held = int(np.ceil(len(subjects) * args.val_share)) if len(subjects) >= 5 and args.val_share else 0
    val_subjects = np.random.default_rng(args.seed).permutation(subjects)[:held]
    is_val = np.isin(store.records["subject"][usable], val_subjects)
    try:
        model = CWT_MAE_RoPE(**{name: getattr(args, name) for name in MODEL_ARGS}, preprocess=vars(prepare))
    except ValueError as error:
        raise UserError(str(error)) from error
    train_set = PhysioSignalDataset(
        store, args.signal_len, "train", args.seed, model.num_patches, args.windows, usable[~is_val]
    )
    val_set = PhysioSignalDataset(
        store, args.signal_len, "test", args.seed, model.num_patches, 0, usable[is_val] if held else usable
    )
    spread = np.linspace(0, len(val_set) - 1, min(args.eval_windows, len(val_set))).astype(int)
    val_loader = DataLoader(
        torch.utils.data.Subset(val_set, spread), min(64, args.batch_size), generator=torch.Generator()
    )
    probe = make_probe(args, store, parts) if args.probe != "none" else None
    global_batch = args.batch_size * accelerator.num_processes * args.accum
    if len(train_set) < global_batch:
        raise UserError(
            f"--batch-size: a step needs {global_batch} windows, an epoch has {len(train_set)}; lower it or set --windows"
        )
    loader = DataLoader(
        train_set,
        args.batch_size,
        shuffle=True,
        generator=torch.Generator(),
        drop_last=True,
        num_workers=args.workers,
        worker_init_fn=loader_worker,
    )

    # model, optimizer, schedule
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay), lr=args.lr, betas=tuple(args.betas)
    )
    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)
    stop = StopSignal(accelerator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    plain = accelerator.unwrap_model(model)
    total = args.max_steps or args.epochs * (len(loader) // args.accum)
    warmup = args.warmup_steps if args.warmup_steps >= 0 else total // 20
    state = {"step": 0, "epoch": 0, "batch": 0}
    if args.resume and (path := find_resume(out, accelerator)):
        state = load_step(accelerator, path)
        accelerator.print(f"resumed from {path}")
    if accelerator.is_main_process:
        seconds = store.records["length"][usable].sum() / (args.model_fs or 1)
        print(
            f"{describe(plain)} | {len(usable)} channels of {len(subjects)} subjects, {seconds / 3600:.2f} h, "
            f"{held} subjects for validation | "
            f"{len(train_set)} windows an epoch | batch {global_batch} | {total} steps, lr {args.lr:g}"
        )
    log = Log(out, accelerator, total, state["step"])

    def evaluate():
        """Validation, picture and probe, on the main process; none of them touches the training's random states."""
        if accelerator.is_main_process:
            numbers, first = validate(plain, val_loader, accelerator.device)
            if probe:
                numbers["probe_f1"] = probe_score(plain, probe, accelerator.device)
            log.log(state["step"], **numbers)
            draw_reconstruction(plain, first, out / "figures" / "reconstruction.png", f"step {state['step']}")
            atomic_write(out / "metrics.json", json.dumps({"step": state["step"], **numbers}, indent=1))
        accelerator.wait_for_everyone()

    def save():
        if accelerator.is_main_process:  # first: killed between the two, the resumed run writes it again
            save_model(out / "model.safetensors", plain)
        return save_step(accelerator, out, state)

    if state["step"] == 0:
        evaluate()  # what random weights reach: the control of every later line
    tick, seen = time.perf_counter(), 0
    while state["step"] < total:
        train_set.set_epoch(state["epoch"])
        loader.set_epoch(state["epoch"])
        for batch in accelerator.skip_first_batches(loader, state["batch"]):
            with accelerator.accumulate(model):
                losses = model(batch["x"], batch["noise"], only_padded(batch["real"]), details=True)
                check_finite(losses["loss"].detach(), state["step"], batch["name"], out)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    grad = accelerator.clip_grad_norm_(model.parameters(), args.clip)
                    for group in optimizer.param_groups:
                        group["lr"] = lr_at(state["step"], total, warmup, args.lr, args.min_lr)
                optimizer.step()
                optimizer.zero_grad()
            state["batch"] += 1
            seen += len(batch["x"]) * accelerator.num_processes
            if not accelerator.sync_gradients:
                continue
            state["step"] += 1
            done = state["step"] == total
            if state["step"] % args.log_every == 0 or done:
                spec, signal = accelerator.gather(
                    torch.stack([losses["loss_spec"], losses["loss_time"]]).detach()[None]
                ).mean(0)
                log.log(
                    state["step"],
                    loss=spec + args.time_loss_weight * signal,
                    loss_spec=spec,
                    loss_time=signal,
                    lr=optimizer.param_groups[0]["lr"],
                    grad=grad,
                    windows_per_s=seen / (time.perf_counter() - tick),
                )
                tick, seen = time.perf_counter(), 0
            if state["step"] % args.eval_every == 0 or done:
                evaluate()
            if stop():
                stop.leave(save())
            if state["step"] % args.save_every == 0 or done:
                save()
            if done:
                break
        else:
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
    log.close()
    accelerator.print(f"done; encoder in {out / 'model.safetensors'}")
    accelerator.end_training()


if __name__ == "__main__":
    run(main, parse_args())
