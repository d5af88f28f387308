"""What a recipe is made of: `stage` runs one script with keyword arguments, `size` picks the size of a full
or a smoke run.

A recipe is a flat Python script, studies/<room>/builtin.py, real.py or another name beside it, that calls
`stage` once per step:

    data, out = DATA / "cwt_mae/builtin", RUNS / "cwt_mae/base"
    stage("cwt_mae/train.py", data=data, out=out, max_steps=size(1500, smoke=4), overwrite=True)

and ends with `if __name__ == "__main__": recipe(main)`. `studies/run_all.py` starts every room's
builtin.py, or with --real its real.py; by hand: `python studies/<room>/builtin.py`. The environment says the
rest: SMOKE=1 for the smallest sizes, RUNS for the folder of the results, DATA_ROOT for real data,
OMP_NUM_THREADS for the cores, SKIP_DONE=1 to leave out every stage that has ended well before with the same
arguments.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.arguments import Parser
from common.checkpoint import atomic_write
from common.errors import UserError, catch_stops, run
from common.files import cores

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"  # what the generators and converters write
RUNS = Path(os.environ.get("RUNS") or ROOT / "runs").resolve()
REAL = Path(os.environ["DATA_ROOT"]).resolve() if os.environ.get("DATA_ROOT") else None
SMOKE = bool(os.environ.get("SMOKE"))
SKIP_DONE = bool(os.environ.get("SKIP_DONE"))
CORES = int(os.environ.get("OMP_NUM_THREADS") or cores())

# What --help of a recipe without options of its own says below its docstring
ENVIRONMENT = """It takes no options; the environment says the rest: SMOKE=1 for the smallest sizes, RUNS for
the folder of the results, DATA_ROOT for real data, OMP_NUM_THREADS for the cores, SKIP_DONE=1 to leave
out every stage that has ended well before with the same arguments."""

_started, _running, _lock = time.monotonic(), set(), threading.Lock()
_stopping = threading.Event()  # a signal came: no stage begins or counts as done any more


def size(full, smoke):
    """`smoke` where SMOKE is set, else `full`."""
    return smoke if SMOKE else full


def options(flags: dict) -> list[str]:
    """Keyword arguments as command-line options: batch_size=8 -> --batch-size 8, skip_bad=True -> --skip-bad.

    A list or tuple gives several values after one option; False and None leave the option out.
    """
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
    return words


def stage(script: str, *arguments, processes: int = 1, threads: int | None = None, **flags):
    """Run `script` (path below the repository root) with positional `arguments` and `flags`; return when it
    has ended well.

    processes: how many torchrun starts. threads: cores of this stage (default: OMP_NUM_THREADS as it is).
    With SKIP_DONE a stage that has ended well is noted in RUNS/done and left out the next time, if its `out`
    is still there. Raises UserError naming the script when it ends with another status than 0.
    """
    command = [script, *map(str, arguments), *options(flags)]
    words = shlex.join(command)
    note = RUNS / "done" / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.json"
    if SKIP_DONE and note.is_file() and Path(flags.get("out") or RUNS).exists():
        print(f"\n== {words}: done before; delete {note} to run it again", flush=True)
        return
    begin = time.monotonic()
    print(f"\n== {words} ({begin - _started:.0f} s)", flush=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "NPROC_PER_NODE": str(processes), "NNODES": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    launcher = [sys.executable, "-m", "common.launch", str(ROOT / script), *command[1:]]
    with _lock:
        if _stopping.is_set():
            raise UserError(f"{script} was not started: the recipe is being stopped")
        process = subprocess.Popen(launcher, env=environment)
        _running.add(process)
    try:
        status = process.wait()
    finally:
        _running.discard(process)
    if _stopping.is_set():  # the handler has taken the exit status
        raise UserError(f"{script} was stopped")
    if status:
        raise UserError(f"{script} ended with exit status {status}; its own words stand above")
    if SKIP_DONE:
        seconds = round(time.monotonic() - begin)
        atomic_write(note, json.dumps({"stage": words, "seconds": seconds}, ensure_ascii=False) + "\n")


def side_by_side(*parts, cores: int = CORES):
    """Call the functions `parts`, as many at a time as there are cores; the first that fails ends the
    others."""
    errors = []

    def begin(part):
        if errors:
            return
        try:
            part()
        except BaseException as error:
            errors.append(error)
            stop_all()

    with ThreadPoolExecutor(max(1, min(cores, len(parts)))) as pool:
        for part in parts:
            pool.submit(begin, part)
    if errors:
        raise errors[0]


def stop_all():
    """SIGTERM to every stage that runs; each saves itself."""
    for process in list(_running):
        process.terminate()


def _stop(signum, frame):
    """End the stages and wait until they have saved themselves: a prompt that came back before them would
    invite a command that finds their folders in use. A second signal does not wait."""
    if not _stopping.is_set():
        _stopping.set()
        stop_all()
        for process in list(_running):
            try:
                # process.wait() would wait for the lock of the call that we interrupt
                os.waitpid(process.pid, 0)
            except ChildProcessError:
                pass
    again = "goes on" if SKIP_DONE else "without --resume starts anew"
    name = signal.Signals(signum).name
    print(f"stopped by {name}; the same command {again}", file=sys.stderr, flush=True)
    os._exit(128 + signum)


def recipe(main, *arguments):
    """Run the flat function `main` of a recipe: a stop signal ends its stages, a failure is one line and an
    exit status.

    A recipe that parses options itself passes them in `arguments`; any other one explains itself with --help
    and refuses every option, so that a word such as --smoke never starts the full run.
    """
    if not any(isinstance(argument, argparse.Namespace) for argument in arguments):
        Parser(sys.modules["__main__"].__doc__, epilog=ENVIRONMENT).parse_args()
    catch_stops(_stop)
    run(main, *arguments)
