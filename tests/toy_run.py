"""A training script of the smallest size that uses all of common/; the tests start it in every way a project is started."""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from common.checkpoint import find_resume, load_step, save_step
from common.errors import run
from common.run import Log, StopSignal, check_finite, loader_worker, open_run, seed_everything


class Noise(torch.utils.data.Dataset):
    """64 vectors of 8; every value is a function of the index."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return torch.randn(8, generator=torch.Generator().manual_seed(i)), f"record-{i}"


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--width",
        type=int,
        default=16,
        help="hidden width; large makes saving slow enough to be killed in it",
    )
    parser.add_argument("--pause", type=float, default=0, help="seconds of sleep after each step")
    parser.add_argument("--nan-at", type=int, default=0, help="step whose loss becomes nan")
    return parser.parse_args()


def main(args):
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    )
    open_run(args.out, args, accelerator, args.resume, args.overwrite)
    seed_everything(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, args.width), torch.nn.Tanh(), torch.nn.Linear(args.width, 8)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loader = torch.utils.data.DataLoader(
        Noise(),
        args.batch_size,
        shuffle=True,
        generator=torch.Generator(),
        num_workers=args.workers,
        worker_init_fn=loader_worker,
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    state = {"step": 0, "epoch": 0, "batch": 0}
    if args.resume and (found := find_resume(args.out, accelerator)):
        state = load_step(accelerator, found)
    stop, log = StopSignal(accelerator), Log(args.out, accelerator, args.steps, state["step"])
    while state["step"] < args.steps:
        loader.set_epoch(state["epoch"])
        for x, names in accelerator.skip_first_batches(loader, state["batch"]):
            loss = (model(x) - x).square().mean()
            if state["step"] + 1 == args.nan_at:
                loss = loss * torch.nan
            check_finite(loss, state["step"] + 1, names, args.out)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            state["batch"] += 1
            state["step"] += 1
            log.log(state["step"], loss=accelerator.reduce(loss.detach(), "mean"))
            if state["step"] % 5 == 0:
                save_step(accelerator, args.out, state)
            if stop():
                stop.leave(save_step(accelerator, args.out, state))
            time.sleep(args.pause)
            if state["step"] == args.steps:
                break
        else:
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
    log.close()
    if accelerator.is_main_process:
        print(
            "final", torch.cat([p.detach().flatten() for p in model.parameters()]).double().sum().item().hex()
        )


if __name__ == "__main__":
    run(main, parse_args())
