"""Train F-LMM's heads (UNet mask head, text projection, SAM decoder) on a frozen multimodal LLM. arXiv 2406.05821.

    python flmm/train.py --config flmm/configs/llava/frozen_llava_1_5_vicuna_7b_unet_sam_l_refcoco_png.yaml \\
        --data /data/coco --out runs/flmm/llava
    torchrun --nproc_per_node 8 flmm/train.py ...          # DDP: every GPU holds the base (bf16) and the heads

Upstream: `xtuner train configs/...py --deepspeed deepspeed_zero2`. Only the heads are trained and saved; OUT/head.safetensors
has upstream's key names. With --cache-attention the base runs once over the data and is then not needed.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from common.checkpoint import atomic_path, atomic_write, find_resume, load_step, save_step
from common.errors import UserError, run
from common.run import Log, StopSignal, check_finite, describe, loader_worker, open_run, seed_everything
from common.weights import read_weights
from flmm.build import add_config_arguments, build_base, build_dataset, build_head, build_sam, read_config
from flmm.data.cache import CachedFeatures, write_cache
from flmm.data.samples import SampleBuilder
from flmm.evaluation import phrase_rows
from flmm.models.flmm import extract
from flmm.schedule import lr_at


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data and model")
    add_config_arguments(data)
    data.add_argument(
        "--base-path", help="folder or hub name of the base (default: base.path of the configuration)"
    )
    data.add_argument(
        "--random-base", type=int, metavar="SEED", help="control: random weights instead of the base's"
    )
    data.add_argument(
        "--attention",
        choices=["rows", "eager"],
        help="how attention is read (default rows; eager: full matrices)",
    )
    data.add_argument(
        "--shard-base",
        action="store_true",
        help="FSDP2 for the frozen base: every process keeps only its part of the decoder layers",
    )
    data.add_argument(
        "--cache-attention",
        type=Path,
        metavar="DIR",
        help="keep frozen features here and train from them; expressions are then drawn once",
    )
    data.add_argument("--init-head", type=Path, help="start from this head instead of a random one")
    data.add_argument(
        "--targets",
        choices=["processed", "original"],
        default="processed",
        help="size of the masks that supervise SAM; upstream: processed (default)",
    )
    optim = parser.add_argument_group("optimisation (defaults: the configuration, there upstream's)")
    optim.add_argument("--epochs", type=int, help="passes over the data (upstream 8)")
    optim.add_argument("--max-steps", type=int, help="optimizer steps, instead of --epochs")
    optim.add_argument("--batch-size", type=int, help="pictures per process (upstream 1, with 8 processes)")
    optim.add_argument("--accum", type=int, help="batches per optimizer step (upstream 1)")
    optim.add_argument("--lr", type=float, help="peak learning rate (upstream 1e-4)")
    optim.add_argument(
        "--mixed-precision",
        choices=["no", "bf16", "fp16"],
        default=None,
        help="autocast (default: accelerate's)",
    )
    job = parser.add_argument_group("run")
    job.add_argument("--out", type=Path, required=True, help="run folder")
    job.add_argument("--seed", type=int, default=0, help="weights, order, drawn expressions (default 0)")
    job.add_argument("--workers", type=int, default=0, help="loader processes per process (default 0)")
    job.add_argument("--log-every", type=int, default=20, help="steps between log lines (default 20)")
    job.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (upstream 500)")
    job.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUT")
    job.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    return parser.parse_args()


def to_device(features, device):
    """Move the tensors of feature dictionaries; pictures and texts stay."""
    return [{k: v.to(device) if torch.is_tensor(v) else v for k, v in f.items()} for f in features]


@torch.no_grad()
def validate(head, loader, get_features, accelerator):
    """Mean phrase IoU at original size, coarse and refined, over the samples of this loader and all processes."""
    head.eval()
    rows = []
    for samples in loader:
        features = get_features(samples)
        for sample, output in zip(samples, head(features)):
            rows += phrase_rows(output, sample["gt_masks"])
    head.train()
    sums = (
        torch.tensor([[r["iou_coarse"], r["iou"], 1.0] for r in rows], dtype=torch.float64)
        .reshape(-1, 3)
        .sum(0)
    )
    sums = accelerator.reduce(sums.float().to(accelerator.device))
    return {"val_miou_coarse": sums[0] / sums[2], "val_miou": sums[1] / sums[2]}


def frozen_part(config, args, accelerator, sam):
    """The base with its data sets, or the features that it left in args.cache_attention; a split missing there is written first.

    Returns the base (None if its features are cached), {"train": data set, "val": another where the configuration names one},
    and the base's (channels, layers, hidden size).
    """
    splits, cache = (
        [s for s in ("train", "val") if s == "train" or config["data"].get(s)],
        args.cache_attention,
    )
    missing = [s for s in splits if cache is None or not any((cache / s).glob("features-*.h5"))]
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    base = None
    if missing:
        base = build_base(config, random_seed=args.random_base, attention=args.attention)
        base = (base.shard(accelerator.device) if args.shard_base else base).to(accelerator.device)
        builder, dims = SampleBuilder.of(base), (base.channels, base.num_layers, base.hidden_size)
        sets = {split: build_dataset(config, split, args.data, builder, args.seed) for split in missing}
    if cache is None:
        return base, sets, dims
    origin = {
        "base": config["base"],
        "random_base": args.random_base,
        "data_root": str(args.data.resolve()),
        "sam": config["sam"].get("path"),
    }
    if missing:
        encoder = build_head(config, dims, sam)[1]
        for split, dataset in sets.items():
            write_cache(
                cache / split,
                base,
                encoder and encoder.to(accelerator.device),
                dataset,
                {**origin, "data": config["data"][split]},
                accelerator,
            )
    sets = {
        split: CachedFeatures(cache / split, {**origin, "data": config["data"].get(split)})
        for split in splits
    }
    return None, sets, sets["train"].dims


def main(args):
    config = read_config(args.config, args.set)
    optim = config["optim"]
    lr, epochs = args.lr or optim.get("lr", 1e-4), args.epochs or optim.get("epochs", 8)
    batch_size, accum = args.batch_size or optim.get("batch_size", 1), args.accum or optim.get("accum", 1)
    accelerator = Accelerator(
        gradient_accumulation_steps=accum,
        mixed_precision=args.mixed_precision,
        # parts of SAM's prompt encoder and its IoU head get no gradient
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    if args.base_path:
        config["base"]["path"] = args.base_path
    if args.shard_base and (accelerator.num_processes == 1 or args.cache_attention):
        raise UserError("--shard-base needs several processes (NPROC_PER_NODE=8) and no --cache-attention")
    seed_everything(args.seed)

    sam = build_sam(config)
    base, sets, dims = frozen_part(config, args, accelerator, sam)
    seed_everything(args.seed)  # the same head whether or not features were cached just now
    head, sam_encoder = build_head(config, dims, sam)
    if args.init_head:
        print(head.load_upstream(read_weights(args.init_head), args.init_head))
    if sam_encoder is not None:
        sam_encoder.to(accelerator.device)

    def get_features(samples):
        """Cached features only move; live ones are computed here, outside the trained module."""
        return to_device(samples if base is None else extract(base, sam_encoder, samples), accelerator.device)

    optimizer = torch.optim.AdamW(
        [p for p in head.parameters() if p.requires_grad],
        lr=lr,
        betas=(0.9, 0.999),
        weight_decay=optim.get("weight_decay", 0.01),
    )
    loader = DataLoader(
        sets["train"],
        batch_size,
        shuffle=True,
        collate_fn=list,
        num_workers=args.workers,
        worker_init_fn=loader_worker,
        generator=torch.Generator(),
    )
    model, optimizer, loader = accelerator.prepare(head, optimizer, loader)
    val_loader = None
    if "val" in sets:
        total = len(sets["val"])
        if (
            args.shard_base
        ):  # every process must run the base equally often: up to one sample a process is left out
            total -= total % accelerator.num_processes
        mine = torch.utils.data.Subset(
            sets["val"], range(accelerator.process_index, total, accelerator.num_processes)
        )
        val_loader = DataLoader(mine, batch_size, collate_fn=list)
    per_epoch = math.ceil(len(loader) / accum)
    total = args.max_steps or epochs * per_epoch

    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)
    state = {"step": 0, "epoch": 0, "batch": 0}
    if args.resume and (path := find_resume(out, accelerator)):
        state = load_step(accelerator, path)
        accelerator.print(f"resumed from {path}")
    if accelerator.is_main_process:
        frozen = "cached features"
        if base is not None:
            frozen = (
                f"{type(base).__name__} {describe(base.model)}, {base.values_here:,} held by this process"
            )
        print(f"base: {frozen}; attention channels {dims[0]}\nhead: {describe(head)}")
        print(
            f"{len(sets['train'])} samples, effective batch {batch_size * accum * accelerator.num_processes}, {total} steps, lr {lr:g}"
        )
    log, stop = Log(out, accelerator, total, state["step"]), StopSignal(accelerator)
    model.train()
    started, means = time.time(), {}
    while state["step"] < total:
        loader.set_epoch(state["epoch"])
        for samples in accelerator.skip_first_batches(loader, state["batch"]):
            with accelerator.accumulate(model):
                features = get_features(samples)
                outputs = model(features, refine=state["step"] >= optim.get("coarse_first", 0))
                targets = [
                    s["gt_masks" if args.targets == "original" else "masks"].to(accelerator.device)
                    for s in samples
                ]
                # every phrase of the global batch weighs the same, however the pictures fall to processes
                count = torch.tensor(float(sum(len(t) for t in targets)), device=accelerator.device)
                count = accelerator.reduce(count) / accelerator.num_processes
                parts = accelerator.unwrap_model(model).compute_loss(outputs, targets, count)
                accelerator.backward(parts["loss"])
                if accelerator.sync_gradients:
                    grad = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    for group in optimizer.param_groups:
                        group["lr"] = lr_at(state["step"], lr, total)
                optimizer.step()
                optimizer.zero_grad()
            state["batch"] += 1
            if not accelerator.sync_gradients:
                continue
            state["step"] += 1
            if state["step"] % args.log_every == 0 or state["step"] == total:
                means = {k: accelerator.reduce(v.detach(), "mean") for k, v in parts.items()}
                check_finite(means["loss"], state["step"], [s["file_name"] for s in samples], out)
                log.log(
                    state["step"],
                    **means,
                    lr=optimizer.param_groups[0]["lr"],
                    grad=grad,
                    pictures_per_s=args.log_every
                    * batch_size
                    * accum
                    * accelerator.num_processes
                    / (time.time() - started),
                )
                started = time.time()
            if state["step"] % args.save_every == 0 or state["step"] == total or stop():
                path = save_step(accelerator, out, state)
                if stop():
                    stop.leave(path)
            if state["step"] == total:
                break
        state["epoch"], state["batch"] = state["epoch"] + 1, 0
    log.close()

    # the head alone, under upstream's names
    head = accelerator.unwrap_model(model)
    scores = (
        {k: float(v) for k, v in validate(head, val_loader, get_features, accelerator).items()}
        if val_loader
        else {}
    )
    if accelerator.is_main_process:
        with atomic_path(out / "head.safetensors") as temporary:
            save_file(head.upstream_state(), temporary, metadata={"dims": json.dumps(dims)})
        atomic_write(
            out / "metrics.json",
            json.dumps({"steps": total, **scores, **{k: float(v) for k, v in means.items()}}, indent=1),
        )
        print(" ".join([f"wrote {out / 'head.safetensors'}", *(f"{k} {v:.3f}" for k, v in scores.items())]))
    # DDP's reducer must go before the process group: the other way round gloo waits for ever
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    run(main, parse_args())
