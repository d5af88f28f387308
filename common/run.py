"""One run: its directory, seeds, log, progress bar, and how it stops.

out/config.json   arguments, package versions, commit, number of processes
out/log.jsonl     one line per logged step; the same numbers under out/tb/ for TensorBoard
"""

import fcntl
import json
import logging
import math
import os
import platform
import random
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from common.checkpoint import atomic_write
from common.errors import Interrupted, UserError

OURS = (
    "config.json",
    "log.jsonl",
    "metrics.json",
    "model.safetensors",
    "head.safetensors",
    "model",
    "encoder",
    "tb",
    "checkpoints",
    "figures",
    "last",
    "best",
)
if not torch.accelerator.is_available():  # else accelerate would run each of torchrun's processes alone
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
# What nobody can act on: peft asks transformers by an old name, and accelerate stores tied weights once.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
_locks = {}  # open files: a lock lives as long as its file


def open_run(out, args, accelerator, resume: bool = False, overwrite: bool = False) -> Path:
    """Make, lock and describe the run directory `out`; every process calls this once, after checking its
    inputs.

    A directory that holds a run is refused unless `resume` (go on with it) or `overwrite` (delete it) is
    given, one that holds anything else always; so is one that another process is writing to. args: the
    argparse namespace.
    """
    out = Path(out)
    on_main(accelerator, lambda: _open(out, args, accelerator.num_processes, resume, overwrite))
    return out


def on_main(accelerator, function):
    """Run `function()` on the main process while the others wait; its UserError ends all of them, told
    once."""
    error = None
    if accelerator.is_main_process:
        try:
            function()
        except UserError as caught:
            error = caught
    if broadcast_object_list([error is not None])[0]:
        raise error or SystemExit(2)


def _open(out: Path, args, processes: int, resume: bool, overwrite: bool):
    present = (
        sorted(p.name for p in out.iterdir() if p.name != "run.lock" and not p.name.startswith("."))
        if out.is_dir()
        else []
    )
    if present and "config.json" not in present:
        raise UserError(f"{out} holds {present[0]} but no run; choose an empty folder with --out")
    if present and not (resume or overwrite):
        go_on = "--resume to go on with it or " if "resume" in args else ""
        raise UserError(f"{out} already holds a run; add {go_on}--overwrite to start again")
    if resume and not present:
        raise UserError(f"{out} holds no run to resume; leave out --resume to start one")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _lock(out)
    except OSError as error:
        raise UserError(
            f"{out}: cannot write there ({error.strerror}); choose another folder with --out"
        ) from error
    if overwrite and not resume:
        for name in OURS:
            path = out / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    arguments = {
        k: v if isinstance(v, (int, float, bool, list, type(None))) else str(v)
        for k, v in vars(args).items()
        if not k.startswith("_")
    }
    if resume:
        before = json.loads((out / "config.json").read_text())["arguments"]
        for name in sorted(arguments.keys() - {"resume", "overwrite"}):
            if before.get(name) != arguments[name]:
                print(f"resuming with {name} = {arguments[name]} (was {before.get(name)})")
    config = {
        "arguments": arguments,
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "processes": processes,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "transformers", "accelerate")},
        },
    }
    atomic_write(out / "config.json", json.dumps(config, indent=1, ensure_ascii=False, default=str))


def _lock(out: Path):
    """Hold out/run.lock until this process ends. A POSIX lock: `kill -9` frees it and loader workers do not
    keep it."""
    file = open(out / "run.lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise UserError(
            f"{out} is in use by process {file.read().strip() or '?'}; wait for it or choose another --out"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _locks[out.resolve()] = file


def _commit() -> str:
    """Commit of this checkout, "" outside git."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def seed_everything(seed: int, rank: int = 0):
    """Seed Python, numpy and torch. Same `seed` everywhere for the weights; add the rank for masks and
    dropout."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def describe(model) -> str:
    """Parameter counts: `1,234,567 parameters, 34,567 trained`."""
    total = sum(p.numel() for p in model.parameters())
    return f"{total:,} parameters, {sum(p.numel() for p in model.parameters() if p.requires_grad):,} trained"


def progress(iterable=None, accelerator=None, **options):
    """tqdm on the main process and on a terminal only; elsewhere it just iterates."""
    quiet = accelerator is not None and not accelerator.is_main_process
    return tqdm(iterable, disable=True if quiet else None, dynamic_ncols=True, **options)


class Log:
    """Numbers of a run: one printed line, one line of log.jsonl and TensorBoard scalars per call, main
    process only.

    total: last step, for `step 400/20000` and the progress bar. resume_step: lines after it are dropped from
    an existing log.jsonl, because the resumed run will write them again.
    """

    def __init__(self, out, accelerator, total: int | None = None, resume_step: int = 0):
        self.path, self.total, self.active = Path(out) / "log.jsonl", total, accelerator.is_main_process
        self.bar = progress(accelerator=accelerator, total=total, initial=resume_step, unit="step")
        if self.active:
            from torch.utils.tensorboard import (
                SummaryWriter,
            )  # a second of import that --help need not wait for

            if self.path.exists():
                whole = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
                atomic_write(
                    self.path,
                    "".join(line + "\n" for line in whole if json.loads(line)["step"] <= resume_step),
                )
            self.board = SummaryWriter(str(Path(out) / "tb"), purge_step=resume_step + 1)

    def log(self, step: int, **numbers):
        """numbers: floats (nan allowed) or tensors of one element; printed in the order given."""
        if not self.active:
            return
        numbers = {k: float(v) for k, v in numbers.items()}
        self.bar.update(step - self.bar.n)
        head = f"step {step}" + (f"/{self.total}" if self.total else "")
        tqdm.write(
            " | ".join([head, *(f"{k} {v:.1e}" if k == "lr" else f"{k} {v:.4g}" for k, v in numbers.items())])
        )
        with open(self.path, "a") as file:  # JSON has no nan or inf
            file.write(
                json.dumps({"step": step, **{k: v if math.isfinite(v) else None for k, v in numbers.items()}})
                + "\n"
            )
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)

    def close(self):
        self.bar.close()
        if self.active:
            self.board.close()


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a question that the loop asks after each step: `if stop(): save;
    stop.leave(path)`.

    at_once: the checkpoint that holds everything, once the last step is saved; a signal then ends the run
    where it stands. Give loaders `worker_init_fn=loader_worker`. A second Ctrl-C ends the process at once.
    """

    def __init__(self, accelerator):
        self.accelerator, self.signum, self.at_once = accelerator, 0, ""
        self.before = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _handle(self, signum, frame):
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if self.at_once:
            self.leave(self.at_once)
        if self.accelerator.is_main_process:
            print(f"{signal.Signals(signum).name}: saving after this step ...", file=sys.stderr, flush=True)

    def __call__(self) -> bool:
        """True on every process once any process has been asked to stop."""
        if self.accelerator.num_processes > 1:  # signals reach the processes at different steps
            flag = torch.tensor(float(self.signum), device=self.accelerator.device)
            most = int(self.accelerator.gather(flag[None]).max())
            self.signum = self.signum or most
        return bool(self.signum)

    def restore(self):
        """Give the signals back to whoever had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, saved):
        """End the run: the main process raises Interrupted saying where it is saved and how to resume."""
        if not self.accelerator.is_main_process:
            sys.exit(128 + self.signum)
        raise Interrupted(f"stopped; saved {saved}; run the same command with --resume to go on", self.signum)


def loader_worker(worker_id: int):
    """`worker_init_fn` of every DataLoader: a stop signal sent to the whole process group must not take the
    workers from a parent that still finishes its step. The alarm ends a worker that outlives its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(30))
