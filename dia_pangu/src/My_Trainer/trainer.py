"""One small training loop for every stage. Upstream: src/My_Trainer/trainer.py, which ignored accumulation,
schedule, weight decay, saving, evaluation and resume, and ran several processes as independent copies.

A model here is a module whose forward(**batch, num_tokens=, num_samples=) returns {"loss": ..., ...}: the
share of this batch in the mean over the global batch, so that accumulation and several processes give the
loss curve of one large batch.
"""

import math
import time

import torch
from torch.utils.data import DataLoader

from common.checkpoint import find_resume, load_step, save_step
from common.errors import UserError
from common.run import Log, StopSignal, check_finite, loader_worker

SCHEDULES = ("constant_with_warmup", "cosine", "constant")


def add_optimization(parser, **defaults):
    """The arguments of the loop, with upstream's names; every stage has its own defaults."""
    group = parser.add_argument_group("optimization")
    value = {
        "learning_rate": 5e-5,
        "weight_decay": 0.0,
        "warmup_steps": 20,
        "num_train_epochs": 3.0,
        "max_steps": 0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "adam_beta2": 0.999,
        **defaults,
        "lr_scheduler_type": defaults.get("lr_scheduler_type", "cosine"),
    }
    shown = "(default %(default)s)"
    group.add_argument(
        "--learning-rate", type=float, default=value["learning_rate"], help=f"peak rate of AdamW {shown}"
    )
    group.add_argument("--weight-decay", type=float, default=value["weight_decay"], help=shown)
    group.add_argument("--adam-beta2", type=float, default=value["adam_beta2"], help=shown)
    group.add_argument(
        "--warmup-steps", type=int, default=value["warmup_steps"], help=f"optimizer steps {shown}"
    )
    group.add_argument(
        "--lr-scheduler-type", choices=SCHEDULES, default=value["lr_scheduler_type"], help=shown
    )
    group.add_argument("--num-train-epochs", type=float, default=value["num_train_epochs"], help=shown)
    group.add_argument(
        "--max-steps", type=int, default=value["max_steps"], help=f"optimizer steps; 0: by epochs {shown}"
    )
    group.add_argument(
        "--per-device-train-batch-size",
        type=int,
        default=value["per_device_train_batch_size"],
        help=f"samples per process and forward pass {shown}",
    )
    group.add_argument(
        "--gradient-accumulation-steps", type=int, default=value["gradient_accumulation_steps"], help=shown
    )
    group.add_argument(
        "--max-grad-norm", type=float, default=1.0, help=f"gradients are clipped to this norm {shown}"
    )
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", "--out", required=True, help="run directory")
    group.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --output-dir"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="delete the run in --output-dir and start again"
    )
    group.add_argument(
        "--save-steps", type=int, default=1000, help=f"optimizer steps between checkpoints {shown}"
    )
    group.add_argument("--save-total-limit", type=int, default=3, help=f"newest checkpoints to keep {shown}")
    group.add_argument(
        "--eval-steps",
        type=int,
        default=0,
        help=f"optimizer steps between evaluations; 0: at the end {shown}",
    )
    group.add_argument("--logging-steps", type=int, default=20, help=shown)
    group.add_argument("--dataloader-num-workers", type=int, default=0, help=shown)
    group.add_argument(
        "--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help=f"{shown}; upstream bf16"
    )
    group.add_argument("--seed", type=int, default=42, help=shown)


def with_dashes(arguments) -> list[str]:
    """Upstream writes --save_steps, we --save-steps; both are understood, also as --save_steps=100."""
    parts = [argument.partition("=") for argument in arguments]
    return [
        name.replace("_", "-") + sign + value if name.startswith("--") else name + sign + value
        for name, sign, value in parts
    ]


def lr_at(step: int, total: int, args) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant or half a cosine to
    0."""
    if step < args.warmup_steps and args.lr_scheduler_type != "constant":
        return args.learning_rate * (step + 1) / args.warmup_steps
    if args.lr_scheduler_type != "cosine":
        return args.learning_rate
    done = (step - args.warmup_steps) / max(1, total - args.warmup_steps)
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Trainer:
    """train(), evaluate(), save() around one model.

    groups: AdamW parameter groups; a key `lr_scale` multiplies the common rate. inputs: batch keys that the
    model takes. evaluate: function (model, loader, accelerator) -> {name: number}, run on all processes.
    """

    def __init__(
        self,
        model,
        args,
        accelerator,
        train_dataset,
        data_collator,
        inputs,
        groups=None,
        eval_dataset=None,
        evaluate=None,
    ):
        self.args, self.accelerator, self.inputs, self.train_dataset = (
            args,
            accelerator,
            inputs,
            train_dataset,
        )
        self.out, self.evaluate_with = args.output_dir, evaluate
        if args.per_device_train_batch_size < 1 or args.gradient_accumulation_steps < 1:
            raise UserError(
                "--per-device-train-batch-size and --gradient-accumulation-steps must be at least 1"
            )
        groups = groups or [{"params": [p for p in model.parameters() if p.requires_grad]}]
        for group in groups:
            group.setdefault("lr_scale", 1.0)
        optimizer = torch.optim.AdamW(
            groups, lr=args.learning_rate, betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay
        )
        options = {
            "num_workers": args.dataloader_num_workers,
            "worker_init_fn": loader_worker,
            "collate_fn": data_collator,
        }
        loader = DataLoader(
            train_dataset,
            args.per_device_train_batch_size,
            shuffle=True,
            generator=torch.Generator(),
            **options,
        )
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        self.eval_loader = None
        if eval_dataset is not None:
            self.eval_loader = accelerator.prepare(
                DataLoader(eval_dataset, args.per_device_train_batch_size, **options)
            )
        self.per_epoch = (
            len(self.loader) // args.gradient_accumulation_steps
        )  # a short last window is left out
        if self.per_epoch < 1:
            raise UserError(
                f"{len(train_dataset)} training samples make {len(self.loader)} batches a process, fewer "
                f"than --gradient-accumulation-steps {args.gradient_accumulation_steps}; lower it"
            )
        self.total = args.max_steps or max(1, round(args.num_train_epochs * self.per_epoch))

    def _check(self, batch):
        """A bad sample ends every process with its one line, also when only one process met it."""
        message = batch.get("error")
        flag = torch.tensor([float(message is not None)], device=self.accelerator.device)
        if self.accelerator.num_processes == 1 and message:
            raise UserError(message)
        if self.accelerator.num_processes > 1 and self.accelerator.reduce(flag).item():
            raise UserError(message or "another process met a bad sample")

    def _window(self, batches) -> list | None:
        """The batches of one optimizer step, or None at the end of the epoch."""
        window = []
        for batch in batches:
            self._check(batch)
            window.append(batch)
            if len(window) == self.args.gradient_accumulation_steps:
                return window
        return None

    def _totals(self, window) -> dict:
        """Label tokens and samples of this step over all processes."""
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window if "labels" in batch)
        samples = sum(len(batch["id"]) for batch in window)
        counts = torch.tensor([float(tokens), float(samples)], device=self.accelerator.device)
        tokens, samples = self.accelerator.reduce(counts, reduction="sum").tolist()
        return {"num_tokens": max(tokens, 1.0), "num_samples": samples}

    def train(self) -> dict:
        """Train to the last step; returns the last evaluation's numbers."""
        args, accelerator = self.args, self.accelerator
        state = {"step": 0, "epoch": 0, "batch": 0}
        if args.resume:
            found = find_resume(self.out, accelerator)
            if found is not None:
                state = load_step(accelerator, found)
                accelerator.print(f"resumed from {found}")
        log, stop = Log(self.out, accelerator, self.total, state["step"]), StopSignal(accelerator)
        share = (
            accelerator.num_processes * args.gradient_accumulation_steps
        )  # undone by DDP's mean and by backward
        scores, clock, seen = {}, time.monotonic(), 0
        self.model.train()
        while state["step"] < self.total:
            self.loader.set_epoch(state["epoch"])
            self.train_dataset.set_epoch(state["epoch"])
            batches = iter(accelerator.skip_first_batches(self.loader, state["batch"]))
            while state["step"] < self.total and (window := self._window(batches)):
                totals, sums = self._totals(window), {}
                for group in self.optimizer.param_groups:
                    group["lr"] = lr_at(state["step"], self.total, args) * group["lr_scale"]
                for i, batch in enumerate(window):
                    last = i == len(window) - 1
                    with accelerator.no_sync(self.model) if not last else torch.enable_grad():
                        out = self.model(**{key: batch[key] for key in self.inputs if key in batch}, **totals)
                        check_finite(out["loss"].detach(), state["step"] + 1, batch["id"], self.out)
                        accelerator.backward(out["loss"] * share)
                    for key, value in out.items():
                        if value.ndim == 0:
                            sums[key] = sums.get(key, 0) + value.detach()
                norm = accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                state["step"] += 1
                state["batch"] += len(window)
                seen += totals["num_samples"]
                if state["step"] % args.logging_steps == 0 or state["step"] == self.total:
                    numbers = {key: accelerator.reduce(value, reduction="sum") for key, value in sums.items()}
                    rate = seen / (time.monotonic() - clock)
                    log.log(
                        state["step"],
                        **numbers,
                        lr=lr_at(state["step"] - 1, self.total, args),
                        grad=norm,
                        samples_per_s=rate,
                    )
                    clock, seen = time.monotonic(), 0
                ends = state["step"] == self.total
                if self.eval_loader is not None and (
                    ends or (args.eval_steps and state["step"] % args.eval_steps == 0)
                ):
                    scores = self.evaluate()
                    log.log(state["step"], **{f"eval_{key}": value for key, value in scores.items()})
                if state["step"] % args.save_steps == 0 or ends:
                    save_step(accelerator, self.out, state, args.save_total_limit)
                elif stop():
                    stop.leave(save_step(accelerator, self.out, state, args.save_total_limit))
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
        if self.eval_loader is not None and not scores:  # resumed after the last step
            scores = self.evaluate()
        log.close()
        return scores

    def evaluate(self) -> dict:
        self.model.eval()
        with torch.no_grad():
            scores = self.evaluate_with(self.model, self.eval_loader, self.accelerator)
        self.model.train()
        return scores
