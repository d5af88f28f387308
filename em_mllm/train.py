"""Join the signal encoder to a language model and train them on questions about signals (upstream train_mllm.py).

    python em_mllm/train.py --task-dir data/em_mllm/train --signal-encoder-path runs/em_mllm/pretrain/encoder \\
        --llm-model-path data/em_mllm_llm --output-dir runs/em_mllm/base
    torchrun --nproc_per_node=4 em_mllm/train.py ... --llm-model-path 9G4B --use-lora --freeze-signal-encoder \\
        --precision bf16 --dtype bfloat16

Writes output-dir/model/ (adapter or LLM, tokenizer, projector, encoder), which test.py and model.load_model read, and metrics.json with the
validation loss. Signals go before the text: [<IQ_START>] IQ [<IQ_END>] question answer; the loss is on the answer alone.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from torch.utils.data import DataLoader, Subset

from common.checkpoint import atomic_write, find_resume, load_step, save_step
from common.errors import UserError, run
from common.run import Log, StopSignal, check_finite, describe, loader_worker, open_run, seed_everything
from em_mllm.dataset import DEFAULT_FS, QuestionCollator, QuestionDataset, task_pairs
from em_mllm.model import (
    LORA_TARGETS,
    PROJECTORS,
    build_model,
    load_model,
    load_tokenizer,
    read_notes,
    save_model,
    set_trainable,
)
from em_mllm.optim import lr_at, make_optimizers, set_lr


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--task-dir", type=Path, help="folder in which every x.h5 has its x.json")
    data.add_argument(
        "--task-files", type=Path, nargs="+", help="h5 json h5 json ... (used when no --task-dir is given)"
    )
    data.add_argument(
        "--val-dir",
        type=Path,
        help="such a folder for validation (default: 50 training items of a seeded shuffle are held out, as upstream)",
    )
    data.add_argument(
        "--questions-per-signal",
        type=int,
        default=0,
        help="n: an item is a signal with n of its questions, encoded once (default 0: an item is a question)",
    )
    data.add_argument(
        "--noise-db",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="add white noise at a random SNR of this range (default: none)",
    )
    data.add_argument(
        "--shift-hz", type=float, default=0.0, help="shift each signal in frequency by up to this (default 0)"
    )
    data.add_argument(
        "--roll",
        action="store_true",
        help="turn each signal by a random number of points; for captures that begin anywhere",
    )
    data.add_argument(
        "--fs",
        type=float,
        default=DEFAULT_FS,
        help="sampling rate in Hz where the .h5 has no attribute fs (default 20e6)",
    )
    data.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out and count unusable questions and signals instead of stopping",
    )
    data.add_argument("--workers", type=int, default=0, help="loader processes (default 0)")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--signal-encoder-path",
        type=Path,
        required=True,
        help="encoder folder (config.json, model.safetensors) or weight file",
    )
    model.add_argument(
        "--llm-model-path",
        type=Path,
        required=True,
        help="folder of any causal LM and its tokenizer; FM9G-4B: 9G4B/",
    )
    model.add_argument(
        "--trained-dir",
        type=Path,
        help="continue from the model/ folder of an earlier run (new run, fresh optimizer)",
    )
    model.add_argument(
        "--projector",
        choices=PROJECTORS,
        default="linear",
        help="linear: the seed's; mlp: starter kit; merlin (default linear)",
    )
    model.add_argument(
        "--signal-tokens",
        type=int,
        default=0,
        help="n: give the LLM n means over stretches of the signal and the cls vector (default 0: every patch)",
    )
    model.add_argument(
        "--max-points", type=int, help="longest signal in points (default: the encoder's config)"
    )
    model.add_argument(
        "--attention-type",
        choices=("eager", "sdpa", "fa2"),
        default="sdpa",
        help="encoder attention (default sdpa)",
    )
    model.add_argument(
        "--max-length",
        type=int,
        default=512,
        help="most text tokens of a question with its answer (default 512)",
    )
    model.add_argument(
        "--chat-template",
        action="store_true",
        help="lay the text out by the tokenizer's chat template instead of question eos answer eos",
    )
    model.add_argument("--freeze-llm", action="store_true", help="train projector, IQ rows and encoder only")
    model.add_argument("--freeze-signal-encoder", action="store_true", help="leave the encoder as it is")
    model.add_argument(
        "--use-lora", action="store_true", help="adapters on the LLM, which itself stays frozen"
    )
    model.add_argument("--lora-r", type=int, default=8, help="rank of the adapters (default 8)")
    model.add_argument("--lora-alpha", type=int, default=16, help="their scale is alpha / r (default 16)")
    model.add_argument(
        "--lora-dropout", type=float, default=0.1, help="dropout before the adapters (default 0.1)"
    )
    model.add_argument(
        "--lora-targets",
        nargs="+",
        default=list(LORA_TARGETS),
        help="layers that get an adapter (default q_proj v_proj)",
    )
    model.add_argument(
        "--random-encoder", action="store_true", help="control: the encoder's sizes without its weights"
    )
    model.add_argument(
        "--legacy",
        action="store_true",
        help="the starter kit's arithmetic and labels, for those who hold its checkpoints",
    )
    model.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code in the LLM folder; only for folders that you trust",
    )
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--batch-size", type=int, default=4, help="items per process (default 4)")
    optim.add_argument("--accum", type=int, default=1, help="batches per optimizer step (default 1)")
    optim.add_argument("--epochs", type=int, default=3, help="passes over the data (default 3)")
    optim.add_argument("--max-steps", type=int, help="stop after this many optimizer steps instead")
    optim.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default 1e-4)")
    optim.add_argument(
        "--schedule",
        choices=("linear", "cosine"),
        default="linear",
        help="fall of the rate (default linear, upstream's)",
    )
    optim.add_argument(
        "--warmup", type=float, default=0.1, help="share of the steps that the rate rises over (default 0.1)"
    )
    optim.add_argument("--weight-decay", type=float, default=0.01, help="of the matrices (default 0.01)")
    optim.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="muon: orthogonalised momentum for the layers' matrices",
    )
    optim.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default 1)")
    optim.add_argument(
        "--precision", choices=("no", "bf16", "fp16"), default="no", help="autocast (default no)"
    )
    optim.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="storage of the LLM weights (default float32; bfloat16 for a frozen or adapted LLM)",
    )
    optim.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations: less memory, a third more time",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", type=Path, default=Path("output"), help="default ./output")
    group.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    group.add_argument("--log-every", type=int, default=20, help="steps between log lines (default 20)")
    group.add_argument(
        "--save-every", type=int, default=1000, help="steps between checkpoints (default 1000)"
    )
    group.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of --output-dir"
    )
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run in --output-dir")
    return parser.parse_args()


def make_data(args, tokenizer, chat):
    """(all training questions, training set, validation set): the last is the validation folder, or 50 items of a seeded shuffle."""
    common = dict(
        tokenizer=tokenizer, max_length=args.max_length, chat=chat, skip_bad=args.skip_bad, default_fs=args.fs
    )
    train = QuestionDataset(
        task_pairs(args.task_dir, args.task_files),
        questions_per_signal=args.questions_per_signal,
        seed=args.seed,
        noise_db=args.noise_db,
        shift_hz=args.shift_hz,
        roll=args.roll,
        **common,
    )
    if args.val_dir:
        return train, train, QuestionDataset(task_pairs(args.val_dir), **common)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(42)).tolist()
    held = min(50, len(train) // 10)
    return train, Subset(train, order[held:]), Subset(train, order[:held])


def make_model(args, files):
    """(model, tokenizer) from the three paths, or from --trained-dir, with what is to be trained set; refuses signals that are too long."""
    if args.trained_dir:
        model, tokenizer = load_model(args.trained_dir, args.llm_model_path, args.trust_remote_code)
    else:
        model, tokenizer = build_model(
            args.llm_model_path,
            args.signal_encoder_path,
            args.projector,
            args.signal_tokens,
            args.dtype,
            args.legacy,
            args.trust_remote_code,
            args.random_encoder,
            args.max_points,
            args.attention_type,
        )
    config = model.signal_encoder.config
    longest = (config.num_positions - config.num_special) * config.patch_size[0]
    for file in files:
        if file.points > longest:
            raise UserError(
                f"{file.path}: signals of {file.points} points, the encoder takes {longest}; give --max-points {file.points} or cut them"
            )
    set_trainable(
        model,
        args.freeze_llm,
        args.freeze_signal_encoder,
        args.use_lora,
        {
            "r": args.lora_r,
            "lora_alpha": args.lora_alpha,
            "lora_dropout": args.lora_dropout,
            "target_modules": args.lora_targets,
        },
    )
    if args.gradient_checkpointing:
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.signal_encoder.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return model, tokenizer


@torch.no_grad()
def validation_loss(model, loader, accelerator) -> float:
    """Mean loss per answer token over the validation set, the same whatever the number of processes."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in loader:
        batch.pop("rows")
        count = (batch["labels"] != -100).sum()
        total += torch.stack([model(**batch)["loss"].double() * count, count.double()])
    model.train()
    total = accelerator.reduce(total, "sum")
    return float(total[0] / total[1].clamp(min=1))


def main(args):
    accelerator = Accelerator(
        mixed_precision=args.precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.accum, sync_with_dataloader=False
        ),
    )
    seed_everything(args.seed)
    tokenizer = load_tokenizer(args.llm_model_path, args.trust_remote_code)
    source, train_set, val_set = make_data(args, tokenizer, args.chat_template)
    model, tokenizer = make_model(args, source.files)
    config = model.signal_encoder.config
    per_step = args.batch_size * accelerator.num_processes * args.accum
    steps_per_epoch = len(train_set) // per_step
    if steps_per_epoch < 1:
        raise UserError(
            f"{len(train_set)} items are fewer than one step of "
            f"{args.batch_size} x {accelerator.num_processes} x {args.accum}; lower --batch-size"
        )
    steps = args.max_steps or args.epochs * steps_per_epoch
    out = open_run(args.output_dir, args, accelerator, args.resume, args.overwrite)
    collator = QuestionCollator(config.patch_size[0], tokenizer.pad_token_id, args.legacy)
    loader = DataLoader(
        train_set,
        args.batch_size,
        shuffle=True,
        collate_fn=collator,
        num_workers=args.workers,
        worker_init_fn=loader_worker,
        drop_last=True,
        generator=torch.Generator(),
    )
    val_loader = DataLoader(val_set, args.batch_size, collate_fn=collator, num_workers=args.workers)
    skipped = ", ".join(f"{n} x {why}" for why, n in source.skipped.items()) or "none"
    accelerator.print(
        f"{describe(model)}; {len(train_set)} items ({len(source.records)} questions), skipped: {skipped}; "
        f"{per_step} items a step, {steps_per_epoch} steps an epoch, {steps} steps, lr {args.lr:g}"
    )
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    model, loader, val_loader, *optimizers = accelerator.prepare(model, loader, val_loader, *optimizers)
    state = {"step": 0, "epoch": 0, "batch": 0}
    if args.resume and (found := find_resume(out, accelerator)):
        state = load_step(accelerator, found)
        accelerator.print(f"resumed from {found}")
    log, stop = Log(out, accelerator, steps, state["step"]), StopSignal(accelerator)
    model.train()
    while state["step"] < steps:
        loader.set_epoch(state["epoch"])
        source.set_epoch(state["epoch"])
        for batch in accelerator.skip_first_batches(loader, state["batch"]):
            if state["batch"] >= steps_per_epoch * args.accum:  # the rest would make an incomplete step
                break
            rows = batch.pop("rows")
            with accelerator.accumulate(model):
                tokens = (batch["labels"] != -100).sum()
                share = (
                    tokens * accelerator.num_processes / accelerator.reduce(tokens, "sum")
                )  # processes differ in answer tokens
                loss = model(**batch)["loss"] * share
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.clip)
                    lr = set_lr(optimizers, lr_at(state["step"], steps, args.warmup, args.schedule))
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            state["batch"] += 1
            if not accelerator.sync_gradients:
                continue
            state["step"] += 1
            if state["step"] % args.log_every == 0 or state["step"] == 1:
                mean = accelerator.reduce(loss.detach(), "mean")
                check_finite(mean, state["step"], [f"question {r}" for r in rows.tolist()], out)
                log.log(state["step"], loss=mean, lr=lr, grad=grad_norm)
            last = state["step"] == steps
            if state["step"] % args.save_every == 0 or last:
                save_step(accelerator, out, state)
            if not last and stop():
                stop.leave(save_step(accelerator, out, state))
            if last:
                break
        if state["batch"] >= steps_per_epoch * args.accum:
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
    log.close()

    loss = validation_loss(model, val_loader, accelerator)
    if accelerator.is_main_process:
        save_model(
            out / "model",
            accelerator.unwrap_model(model),
            tokenizer,
            args.llm_model_path,
            args.dtype,
            llm_changed=bool(args.trained_dir) and read_notes(args.trained_dir)["llm"] == "full",
            chat=args.chat_template,
            max_length=args.max_length,
            default_fs=args.fs,
        )
        atomic_write(
            out / "metrics.json",
            json.dumps({"step": state["step"], "validation_loss": loss, "skipped": source.skipped}, indent=1),
        )
        print(f"validation loss {loss:.4f} per answer token; model in {out / 'model'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run(main, parse_args())
