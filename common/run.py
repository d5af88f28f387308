"""One run: its directory, seeds, log, progress bar, and how it stops.

out/config.json   arguments, package versions, commit, number of processes
out/log.jsonl     one line per logged step; the same numbers under out/tb/ for TensorBoard
"""

import contextlib
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
import threading
import time
import uuid
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import atomic_write
from common.errors import Interrupted, UserError, catch_stops, write_problem
from common.lock import hold
from common.together import from_all, from_main, group

# What --overwrite deletes: all that a training or a test leaves, so that nothing of an earlier run, such as
# the calibration of its head, is taken for part of this one. Whatever else somebody put there stays.
OURS = (
    "config.json log.jsonl metrics.json results.json tb checkpoints figures last best model encoder base "
    "model.safetensors head.safetensors vision.safetensors sam_tiny.safetensors pytorch_model.bin "
    "dia_config.json adapter_config.json places.json calibration.json reliability.png timing.json "
    "masks.json phrases.csv overlays per_window.csv per_record.csv"
).split()

if not torch.accelerator.is_available():  # else accelerate would run each of torchrun's processes alone
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
# What nobody can act on: peft asks transformers by an old name, and accelerate stores tied weights once.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def one_process(processes: int, what: str):
    """UserError where torchrun started several processes of a script that writes its files alone; what: "a
    model is scored"."""
    if processes > 1:
        raise UserError(f"{what} by one process; start the script without torchrun")


def open_run(out, args, accelerator, resume: bool | str = False, overwrite: bool = False) -> Path:
    """Make, lock and describe the run directory `out`; every process calls this once, after checking its
    inputs.

    A directory that holds a run is refused unless `resume` (go on with it) or `overwrite` (delete it) is
    given, one that holds anything else always; so is one that another process is writing to. args: the
    argparse namespace. resume: False, True, or "auto" (go on if there is a run, else start one).
    """
    out = Path(out)
    if getattr(args, "dry_run", False):  # which writes nothing
        return out

    try:
        str(out).encode()  # as safetensors and TensorBoard will do
    except UnicodeEncodeError as error:
        raise UserError(f"{out}: is no name in UTF-8; choose another folder with --out") from error
    _refuse_private_disk(out, accelerator)
    on_main(accelerator, lambda: _open(out, args, accelerator.num_processes, resume, overwrite))
    return out


PROBE_SECONDS = 10  # a network file system shows a new file after a while


def _refuse_private_disk(out: Path, accelerator):
    """UserError unless the processes on all machines see one folder `out`: a checkpoint is written by all."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)) >= accelerator.num_processes:
        return

    # the main process makes a file under a name that only this start can have made
    probe = out / f".probe-{uuid.uuid4().hex}"
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    if accelerator.is_main_process:
        with contextlib.suppress(OSError):  # _open says what is wrong
            out.mkdir(parents=True, exist_ok=True)
            probe.touch()

    # the others look for it, by the main one's name; if it could not be made there is nothing to look for
    name, there = from_main((probe.name, probe.exists()))
    deadline = time.monotonic() + PROBE_SECONDS
    while there and not (seen := (out / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [host for host in from_all(None if not there or seen else platform.node()) if host]

    # nothing may stay behind of a run that does not begin
    if accelerator.is_main_process:
        probe.unlink(missing_ok=True)
        for folder in made if blind else ():
            with contextlib.suppress(OSError):
                folder.rmdir()
    if blind:
        if not accelerator.is_main_process:
            raise SystemExit(2)
        raise UserError(
            f"{blind[0]} does not see {out} of {platform.node()}; give an --out on a disk that all share"
        )


def on_main(accelerator, function):
    """Run `function()` on the main process while the others wait; its UserError ends all of them, told
    once."""
    # an exception on one process alone would leave the others waiting for it
    error = None
    if accelerator.is_main_process:
        try:
            function()
        except UserError as caught:
            error = caught
    if from_main(error is not None):
        raise error or SystemExit(2)


def _open(out: Path, args, processes: int, resume, overwrite: bool):
    # lock and hidden files are no results: a folder that holds nothing else is empty
    present = (
        sorted(p.name for p in out.iterdir() if p.name != "run.lock" and not p.name.startswith("."))
        if out.is_dir()
        else []
    )
    before = _read_config(out)

    # a run, something else, or nothing; somebody's own files are never taken for a run
    if resume == "auto":  # the first start and every later one have the same command
        resume = bool(present)
    if present and not (before or (out / "run.lock").exists()):  # the lock is what a run makes first
        raise UserError(f"{out} holds {present[0]} but no run; choose an empty folder with --out")
    if present and not (resume or overwrite):
        go_on = "--resume to go on with it or " if "resume" in args else ""
        raise UserError(f"{out} already holds a run; add {go_on}--overwrite to start again")
    if resume and not present:
        raise UserError(f"{out} holds no run to resume; leave out --resume to start one")

    # the lock before anything is deleted: another process may be writing there
    try:
        out.mkdir(parents=True, exist_ok=True)
        hold(out)
        _delete(out, OURS if overwrite and not resume else ())
    except OSError as error:
        raise UserError(
            f"{out}: cannot write there ({error.strerror}); choose another folder with --out"
        ) from error

    # a resumed run may have other arguments: what differs is told, because it may be a slip
    arguments = {k: v for k, v in vars(args).items() if not k.startswith("_")}
    arguments = json.loads(json.dumps(arguments, ensure_ascii=False, default=str))
    if resume and not before:
        print(f"{out / 'config.json'} is missing or damaged; going on without the run's own arguments")
    for name in sorted(arguments.keys() - {"resume", "overwrite"}) if resume and before else ():
        if before["arguments"].get(name) != arguments[name]:
            print(f"resuming with {name} = {arguments[name]} (was {before['arguments'].get(name)})")

    # all that is needed to do it again
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

    # What is resumed keeps its description until its checkpoint was seen to fit: see keep_config.
    name = ".config.next.json" if resume and before else "config.json"
    atomic_write(out / name, json.dumps(config, indent=1, ensure_ascii=False))


def keep_config(out):
    """Let the description of a resumed run take the place of the one before."""
    if (Path(out) / ".config.next.json").exists():
        os.replace(Path(out) / ".config.next.json", Path(out) / "config.json")


def _read_config(out: Path) -> dict:
    """The description of the run in `out`; {} where there is none, or a damaged one, or that of a model."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        return config if isinstance(config["arguments"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _delete(out: Path, names):
    """Delete `names` in `out`, and what an earlier deletion, save or export left when it was killed.

    A folder is renamed first, so that nothing half deleted is ever resumed; config.json goes last.
    """
    for name in sorted(names, key="config.json".__eq__):
        path = out / name
        if path.is_dir() and not path.is_symlink():
            path.rename(out / f".deleted-{name}-{os.getpid()}")
        else:
            path.unlink(missing_ok=True)

    for rest in (*out.glob(".deleted-*"), *out.glob("checkpoints/.saving-*"), *out.glob(".*.*[0-9].tmp*")):
        if rest.is_dir():
            shutil.rmtree(rest, ignore_errors=True)
        else:
            rest.unlink()


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
    """Seed Python, numpy and torch. Same `seed` everywhere for the weights; common.train.start adds the rank
    for dropout."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def describe(model) -> str:
    """Parameter counts: `1,234,567 parameters, 34,567 trained`."""
    total = sum(p.numel() for p in model.parameters())
    return f"{total:,} parameters, {sum(p.numel() for p in model.parameters() if p.requires_grad):,} trained"


def progress(iterable=None, accelerator=None, **options):
    """tqdm on the main process and on a terminal only; elsewhere it just iterates."""
    # None: tqdm looks itself whether there is a terminal; in a file each move of the bar is a line
    quiet = accelerator is not None and not accelerator.is_main_process
    return tqdm(iterable, disable=True if quiet else None, dynamic_ncols=True, **options)


class Log:
    """Numbers of a run: one printed line, one line of log.jsonl and TensorBoard scalars per call, main
    process only. What --log-with names gets them too; there a resumed run is a run of its own.

    total: last step, for `step 400/20000` and the progress bar. resume_step: lines after it are dropped from
    an existing log.jsonl, because the resumed run will write them again.
    """

    def __init__(self, out, accelerator, total: int | None = None, resume_step: int = 0):
        self.path, self.total, self.active = Path(out) / "log.jsonl", total, accelerator.is_main_process
        self.accelerator = accelerator
        self.bar = progress(accelerator=accelerator, total=total, initial=resume_step, unit="step")
        if self.active:
            # A second of import that --help need not wait for.
            from torch.utils.tensorboard import SummaryWriter

            # behind the checkpoint that is resumed the lines come again; the last may be half a line
            if self.path.exists():
                lines = self.path.read_text(errors="replace").splitlines()
                kept = (line + "\n" for line in lines if _step_of(line) <= resume_step)
                atomic_write(self.path, "".join(kept))

            # Its thread would print a traceback; the next line of the log tells the error instead.
            hook = threading.excepthook
            threading.excepthook = lambda raised: None if write_problem(raised.exc_value) else hook(raised)
            with self.writing():
                self.board = SummaryWriter(str(Path(out) / "tb"), purge_step=resume_step + 1)
            self._open_trackers(Path(out).resolve())

    def _open_trackers(self, out: Path):
        """Begin a run named after the folder `out`, in the tracker's project named after the script's
        folder."""
        config = {name: str(value) for name, value in _read_config(out).get("arguments", {}).items()}
        names = {"wandb": {"name": out.name}, "mlflow": {"run_name": out.name}}
        try:
            self.accelerator.init_trackers(Path(sys.argv[0]).resolve().parent.name, config, names)
        except Exception as error:  # each has errors of its own: no account, no server
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"--log-with {self.accelerator.log_with[0]}: {lines[0]}") from error

    def log(self, step: int, **numbers):
        """numbers: floats (nan allowed) or tensors of one element; printed in the order given."""
        if not self.active:
            return
        numbers = {k: float(v) for k, v in numbers.items()}  # waits for the device
        with self.writing():
            self._write(step, numbers)

    @contextlib.contextmanager
    def writing(self):
        """Turn a full disk, also one that TensorBoard's thread met, into one line and the way on."""
        try:
            yield
        except Exception as error:
            if not (problem := write_problem(error)):
                raise
            raise UserError(
                f"{self.path}: the log could not be written ({problem}); make room, then --resume"
            ) from error

    def _write(self, step: int, numbers: dict):
        # the line that is read, above the bar
        self.bar.update(step - self.bar.n)
        head = f"step {step}" + (f"/{self.total}" if self.total else "")
        tqdm.write(
            " | ".join([head, *(f"{k} {v:.1e}" if k == "lr" else f"{k} {v:.4g}" for k, v in numbers.items())])
        )

        # the same for programs: opened for each line, so that nothing is lost when the process is killed
        with open(self.path, "a", encoding="utf-8") as file:  # JSON has no nan or inf
            file.write(
                json.dumps({"step": step, **{k: v if math.isfinite(v) else None for k, v in numbers.items()}})
                + "\n"
            )

        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)
        self.accelerator.log(numbers, step)

    def close(self):
        self.bar.close()
        if self.active:
            with self.writing():
                self.board.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()


def _step_of(line: str) -> float:
    """The step of a line of log.jsonl; infinite for one that a kill or a power cut has spoilt."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class StopSignal:
    """Turns Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 into a question that the loop asks after each step:
    `if stop(): save; stop.leave(path)`.

    at_once: the checkpoint that holds everything, once the last step is saved; a signal then ends the run
    where it stands. Give loaders `worker_init_fn=loader_worker`. A second Ctrl-C ends the process at once.
    """

    def __init__(self, accelerator):
        self.accelerator, self.signum, self.at_once = accelerator, 0, ""
        self.before = catch_stops(self._handle)

    def _handle(self, signum, frame):
        # A terminal's Ctrl-C arrives twice under torchrun, which passes it on: not what a user means by it.
        if self.signum and signum == signal.SIGINT and time.monotonic() - self.asked > 1:
            raise KeyboardInterrupt

        # only noted, unless all is saved: a handler comes in the middle of a step, which has to end first
        self.asked = self.asked if self.signum else time.monotonic()
        self.signum = signum
        # A loader's worker that the signal ends, too, must not end the save: torch looks at each child's end.
        self.before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))
        if self.at_once:
            self.leave(self.at_once)
        if self.accelerator.is_main_process:
            print(f"{signal.Signals(signum).name}: saving after this step ...", file=sys.stderr, flush=True)

    def __call__(self) -> bool:
        """True on every process once any process has been asked to stop."""
        if group() is not None:  # signals reach the processes at different steps; no device is waited for
            flag = torch.tensor([int(self.signum)])
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group())
            self.signum = self.signum or int(flag)
        return bool(self.signum)

    def restore(self):
        """Give the signals back to whoever had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, saved):
        """End the run: the main process raises Interrupted saying where it is saved and how to resume."""
        if not self.accelerator.is_main_process:
            sys.exit(128 + self.signum)
        told = f"saved {saved}" if Path(saved).exists() else "nothing is to be saved before the first step"
        raise Interrupted(f"stopped; {told}; run the same command with --resume to go on", self.signum)


def loader_worker(worker_id: int):
    """`worker_init_fn` of every DataLoader: a stop signal sent to the whole process group must not take the
    workers from a parent that still finishes its step. The alarm ends a worker that outlives its parent."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # not ignored for good: without its parent a worker would never end; 5 minutes are for the step to be made
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(300))
