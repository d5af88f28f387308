"""Run the projects one beside the other and show what came out (started by run_all.sh).

For each project: studies/<project>/builtin.py, which makes the data, trains, runs the controls and tests. A
project that fails does not stop the others. pruning works on dia_pangu's model and so starts when that is
there.

--real starts studies/<project>/real.py instead: pretrained weights (studies/real_models.py) on the real data
of DATA_ROOT, with results in RUNS/real. A second start leaves out every stage that has ended well.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from common.arguments import Parser, number
from common.errors import UserError, catch_stops, run
from common.files import cores
from common.lock import hold
from studies.recipe import RUNS
from studies.summary import collect, draw_curves, table, write_summary

ROOT = Path(__file__).resolve().parents[1]
# dia_pangu first: pruning waits for its model
PROJECTS = ("dia_pangu", "cwt_mae", "em_mllm", "flmm", "pruning")
NEEDS = {"pruning": ("dia_pangu", "ft/metrics.json")}
# What the real study of a project reads below DATA_ROOT
FOLDERS = {"dia_pangu": "ct", "cwt_mae": "ecg", "em_mllm": "rf", "flmm": "grounding", "pruning": "ct"}
# Minutes that the real study of a project takes on one core, from which the time left is told. The
# longest starts first, so that none is left to run alone.
REAL_MINUTES = {"pruning": 51, "dia_pangu": 38, "flmm": 28, "em_mllm": 27, "cwt_mae": 19}


def parse_args():
    parser = Parser(
        prog="run_all.sh",
        description="Train and test the projects; write a table, runs/summary.json and runs/summary.html.",
    )
    parser.add_argument(
        "projects",
        nargs="*",
        metavar="project",
        type=lambda word: word.rstrip("/"),  # as the shell completes a folder
        help=f"any of {', '.join(PROJECTS)} (default: all)",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="smallest sizes, 2 minutes on 4 cores: shows that all runs, not how well",
    )
    parser.add_argument(
        "--real",
        action="store_true",
        help="train and test pretrained models on the real data of DATA_ROOT; a second start goes on where "
        "the first one ended",
    )
    parser.add_argument(
        "--jobs",
        type=number(int, 0),
        default=0,
        help="projects side by side, sharing the cores; 0: as many as cores",
    )
    return parser.parse_args()


def run_project(name: str, threads: int, args, runs: Path) -> dict:
    """Run one project's recipe to its end; returns name, status, seconds, peak_mb (largest process) and
    rows."""
    log = runs / name / "run_all.log"
    if not args.real:  # a real run goes on: what its stages have written stays
        shutil.rmtree(runs / name / "results", ignore_errors=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "RUNS": str(runs),
        "SMOKE": "1" if args.smoke else "",
        "SKIP_DONE": "1" if args.real else "",
    }
    print(f"{name}: started, log {log}", flush=True)
    command = [sys.executable, str(ROOT / "studies" / name / ("real.py" if args.real else "builtin.py"))]
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        running[log] = process
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - start
    state = "ok" if process.returncode == 0 else f"failed with exit status {process.returncode}"
    print(f"{name}: {state} after {seconds:.0f} s", flush=True)
    return {
        "name": name,
        "status": state,
        "seconds": seconds,
        "peak_mb": usage.ru_maxrss / 1024,
        "rows": collect(runs, name),
        "log": log,
    }


def can_start(name: str, names: list, finished: set, runs: Path, since: float) -> bool:
    """Whether what a project needs of another one was made after `since` (seconds of the epoch), or will not
    come any more."""
    other, made = NEEDS.get(name, (None, None))
    if other not in names or other in finished:
        return True
    made = runs / other / made
    return made.is_file() and made.stat().st_mtime > since


def minutes_left(waiting: list, started: dict, jobs: int) -> float:
    """Minutes until the real studies end, `jobs` side by side, by what each takes on one core. started: when
    those that run now began (`time.monotonic`)."""
    now = time.monotonic()
    left = [max(1, REAL_MINUTES[name] - (now - begin) / 60) for name, begin in started.items()]
    left += [REAL_MINUTES[name] for name in waiting]
    return max([sum(left) / jobs, *left], default=0)


running: dict[Path, subprocess.Popen] = {}  # by log


def stop(signum, frame):
    """What asks to stop reaches every project. The prompt comes back when all have saved themselves, so that
    the next command finds no folder in use; a second signal does not wait for them."""

    def leave(*_):
        logs = ", ".join(map(str, running))
        print(f"stopped; the logs are {logs}; run the same command to start again", file=sys.stderr)
        os._exit(128 + signum)

    catch_stops(leave)
    alive = [process for process in running.values() if process.returncode is None]
    for process in alive:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(process.pid, signal.SIGTERM)

    # the threads of run_project wait for them and take their exit statuses
    print(
        f"{signal.Signals(signum).name}: {len(alive)} projects save themselves ...",
        file=sys.stderr,
        flush=True,
    )
    while any(process.returncode is None for process in alive):
        time.sleep(0.1)
    leave()


def main(args):
    here = [p for p in PROJECTS if (ROOT / p).is_dir()]
    unknown = [p for p in args.projects if p not in here]
    if unknown:
        raise UserError(f"{unknown[0]}: no such project; choose from {', '.join(here)}")
    data_root = os.environ.get("DATA_ROOT")
    if args.real and not (data_root and Path(data_root).is_dir()):
        wrong = f"DATA_ROOT={data_root}: no such folder" if data_root else "DATA_ROOT is not set"
        raise UserError(
            f"{wrong}; --real needs the folder that holds ecg/, rf/, grounding/, ct/, ctrg/: "
            "DATA_ROOT=folder bash run_all.sh --real"
        )
    names = [p for p in here if not args.projects or p in args.projects]
    if args.real:
        names.sort(key=REAL_MINUTES.get, reverse=True)
    lacking = [p for p in names if args.real and not (Path(data_root) / FOLDERS[p]).is_dir()]
    if lacking:
        folders = " and ".join(f"{FOLDERS[p]}/ for {p}" for p in lacking)
        raise UserError(f"DATA_ROOT={data_root}: holds no {folders}; add it, or name the other projects")
    jobs = min(args.jobs or cores(), len(names))
    threads = max(1, cores() // jobs)
    runs = RUNS / ("real" if args.real else "")
    for name in names:  # a second start would delete the results of the first, and end in its run folders
        try:
            (runs / name).mkdir(parents=True, exist_ok=True)
            hold(runs / name)
        except OSError as error:
            raise UserError(f"{runs / name}: cannot write there ({error.strerror}); set RUNS") from error
    if args.real:  # before the projects start side by side, so that it is made once
        made = subprocess.run(
            [sys.executable, str(ROOT / "studies/real_models.py")], env={**os.environ, "RUNS": str(runs)}
        )
        if made.returncode:
            sys.exit(made.returncode)
        print(f"about {minutes_left(names, {}, jobs):.0f} minutes with {jobs} side by side")
    catch_stops(stop)
    start, since, waiting, pending, done = time.monotonic(), time.time(), list(names), {}, []
    started = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or pending:
            finished = {d["name"] for d in done}
            for name in [n for n in waiting if args.real or can_start(n, names, finished, runs, since)][
                : jobs - len(pending)
            ]:
                waiting.remove(name)
                started[name] = time.monotonic()
                pending[pool.submit(run_project, name, threads, args, runs)] = name
            # wakes up for a signal that came just before
            ready, _ = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            for future in ready:
                del pending[future]
                done.append(future.result())
                del started[done[-1]["name"]]
                if args.real and (left := minutes_left(waiting, started, jobs)):
                    print(f"about {left:.0f} minutes left", flush=True)
    done = [
        {**d, "curves": draw_curves(runs, d["name"])}
        for d in sorted(done, key=lambda d: PROJECTS.index(d["name"]))
    ]
    about = (
        f"{'smoke run (numbers mean nothing)' if args.smoke else 'full run'} on "
        f"{'real data from ' + data_root if args.real else 'built-in data'}, "
        f"{time.strftime('%Y-%m-%d %H:%M')}, {cores()} cores, {jobs} side by side, "
        f"{time.monotonic() - start:.0f} s in all"
    )
    write_summary(runs, done, about)
    print("\n" + table(done) + f"\n\n{about}\n{runs / 'summary.html'}")
    failed = [d for d in done if d["status"] != "ok"]
    for project in failed:
        lines = project["log"].read_text(errors="replace").strip().splitlines()
        said = [line for line in lines if line.startswith("error: ")][-1:] or lines[-3:]
        print(f"{project['name']} {project['status']}: {' / '.join(said)}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main, parse_args())
