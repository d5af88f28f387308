"""A training script of the smallest size that uses all of common/; the tests start it in every way a project
is started."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.arguments import Parser, add_run_arguments
from common.errors import run as run_script
from common.run import open_run, seed_everything
from common.sharding import export_state, prepare
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


class Noise(torch.utils.data.Dataset):
    """64 vectors of 8; every value is a function of the index. A row counts for `weight` things, 1 to 3."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        x = torch.randn(8, generator=torch.Generator().manual_seed(i))
        return {"x": x, "weight": torch.tensor(1 + i % 3), "name": f"record-{i}"}


class Gain(torch.nn.Module):
    """One factor for all: a scalar, which FSDP2 leaves whole on every process."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.factor * x


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--width", type=int, default=16, help="hidden width; large makes saving slow")
    parser.add_argument("--dropout", type=float, default=0, help="dropout of the input")
    parser.add_argument("--pause", type=float, default=0, help="seconds of sleep after each step")
    parser.add_argument(
        "--pause-at-end", type=float, default=0, help="seconds that the closing evaluation takes"
    )
    parser.add_argument("--nan-at", type=int, default=0, help="step whose loss becomes nan")
    parser.add_argument("--wild-at", type=int, default=0, help="step whose update makes the weights infinite")
    parser.add_argument("--die-at", type=int, default=0, help="step after which the first start is killed")
    add_run_arguments(parser, lr=1e-2, batch_size=8, max_steps=20, warmup=0.0, save_every=5, log_every=1)
    return parser.parse_args(argv)


def main(args):
    accelerator = make_accelerator(args)
    open_run(args.out, args, accelerator, args.resume, args.overwrite)
    seed_everything(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, args.width), torch.nn.Tanh(), torch.nn.Linear(args.width, 8), Gain()
    )
    if args.compile:
        model.compile()
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, args.weight_decay))
    model, optimizer, loader = prepare(accelerator, model, optimizer, make_loader(Noise(), args))
    steps = plan_steps(args, loader)

    def evaluate():
        rows = [row for row in watched(run, range(3))]
        return {"odd": run.state["step"] % len(rows[1:])}

    run = start(accelerator, args, steps, [optimizer], evaluate)
    for batch, share in batches(run, loader, count=lambda batch: batch["weight"].sum()):
        with accelerator.accumulate(model):
            x = torch.nn.functional.dropout(batch["x"], args.dropout) if args.dropout else batch["x"]
            error = (model(x) - batch["x"]).square().mean(1)
            loss = (error * batch["weight"]).sum() / batch["weight"].sum() * share
            if run.state["step"] + 1 == args.nan_at:
                loss = loss * torch.nan
            check_finite(run, batch["name"], loss=loss)
            accelerator.backward(loss)
            factor = lr_at(run.state["step"], steps, args.warmup, "constant")
            grad = update(run, model, [optimizer], factor)
        if accelerator.sync_gradients:
            if run.state["step"] == args.wild_at:
                next(model.parameters()).data.fill_(torch.inf)
            finish_step(run, grad=grad)
            if run.state["step"] == args.die_at and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(args.pause)

    time.sleep(args.pause_at_end)
    finish(run)
    if args.dropout:
        print("weights", [p.double().sum().item().hex() for p in model.parameters()])
    weights = export_state(accelerator, model)
    if accelerator.is_main_process:
        total = torch.cat([value.flatten() for value in weights.values()]).double().sum().item()
        print("final", total.hex())


if __name__ == "__main__":
    run_script(main, parse_args())
