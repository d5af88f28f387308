"""The command `python -m tests.mutants`; the package's docstring says what it does."""

import argparse
import importlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.checkpoint import atomic_write
from common.errors import UserError, run
from tests.golden import SHARED
from tests.mutants import __doc__ as ABOUT

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RESULTS = ROOT / "bench/results/mutants.json"
LISTS = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("__init__", "__main__", "worker"))
PYTEST = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rooms", nargs="*", metavar="room", help=f"any of {', '.join(LISTS)}; none: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("-k", dest="word", default="", help="only where meaning or file holds this word")
    parser.add_argument("--check", action="store_true", help="only look whether every text is found once")
    parser.add_argument("--seconds", type=float, default=900, help="after which a mutant's tests are killed")
    return parser.parse_args()


def read_lists(rooms, word):
    """[(room, mutant)] of the named rooms; UserError for a text that does not stand once in its file."""
    unknown = [room for room in rooms if room not in LISTS]
    if unknown:
        raise UserError(f"{unknown[0]}: no such list; choose from {', '.join(LISTS)}")
    chosen, wrong = [], []
    for room in rooms or LISTS:
        for mutant in importlib.import_module(f"tests.mutants.{room}").MUTANTS:
            path = ROOT / mutant.file
            count = path.read_text().count(mutant.old) if path.is_file() else 0
            if count != 1 or mutant.old == mutant.new:
                wrong.append(f"{room}: {mutant.file} holds {mutant.old!r} {count} times ({mutant.means})")
            if word in mutant.file or word in mutant.means:
                chosen.append((room, mutant))
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        raise UserError(f"{len(wrong)} texts do not stand exactly once in their files; mend the lists")
    return chosen


class Worker:
    """A copy of the repository and a process in it that runs pytest."""

    def __init__(self, folder: Path):
        self.tree, self.log = folder / "tree", folder / "log.txt"
        names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT)
        for name in names.decode().split("\0")[:-1]:
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.tree / name)
        beside = {"GOLDEN_DIR": SHARED / "golden", "DATA_ROOT": SHARED / "data"}  # not beside the copy
        environment = {
            **{name: str(path) for name, path in beside.items() if path.is_dir()},
            **os.environ,
            "PYTHONPATH": str(self.tree),
            "PYTHONDONTWRITEBYTECODE": "1",  # two versions within a second would share it
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")],
            cwd=self.tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def test(self, arguments, seconds):
        """pytest's exit status, or "timeout"; what it printed is in self.log."""
        job = {"arguments": [*PYTEST, *arguments], "log": str(self.log), "seconds": seconds}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def try_mutant(self, mutant, seconds):
        path = self.tree / mutant.file
        whole = path.read_text()
        path.write_text(whole.replace(mutant.old, mutant.new))
        try:
            return self.test(["-x", *mutant.tests.split()], seconds)
        finally:
            path.write_text(whole)


def main(args):
    chosen = read_lists(args.rooms, args.word)
    print(f"{len(chosen)} mutants")
    if args.check or not chosen:
        return
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(Path(folder) / str(i)) for i in range(max(1, min(args.jobs, len(chosen))))]
        tests = sorted({test for _, mutant in chosen for test in mutant.tests.split()})
        status = workers[0].test(tests, args.seconds * 10)
        if status != 0:
            print(workers[0].log.read_text()[-5000:], file=sys.stderr)
            raise UserError(f"the named tests fail without a mutant (pytest's exit status {status})")
        free = queue.SimpleQueue()
        for worker in workers:
            free.put(worker)

        def judge(room, mutant):
            worker, began = free.get(), time.monotonic()
            status = worker.try_mutant(mutant, args.seconds)
            seen = {0: "UNSEEN", 1: "seen", 2: "seen", "timeout": "seen"}.get(
                status, f"pytest status {status}"
            )
            text = worker.log.read_text(errors="replace")
            by = next(
                (line.split(" - ")[0][7:] for line in text.splitlines() if line.startswith("FAILED ")), ""
            )
            free.put(worker)
            spent = time.monotonic() - began
            by = by or {2: "tests that cannot start", "timeout": "tests that never end"}.get(status, "")
            print(f"{seen:8}{room}: {mutant.means} ({mutant.file}; {spent:.0f} s) {by}", flush=True)
            return {"room": room, **mutant._asdict(), "result": seen, "by": by, "seconds": round(spent, 1)}

        with ThreadPoolExecutor(len(workers)) as pool:
            found = list(pool.map(lambda pair: judge(*pair), chosen))
        for worker in workers:
            worker.process.stdin.close()
            worker.process.wait()
    report(found, whole=not args.word)


def report(found, whole: bool):
    """Print the shares, and keep them beside those of other rooms where `whole` rooms were run."""
    rooms = sorted({row["room"] for row in found})
    table = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for room in rooms:
        own = [row for row in found if row["room"] == room]
        seen = sum(row["result"] == "seen" for row in own)
        kept = ("file", "means", "result", "by", "seconds")
        table[room] = {"seen": seen, "of": len(own), "mutants": [{k: row[k] for k in kept} for row in own]}
        print(f"{room}: {seen} of {len(own)} seen, {seen / len(own):.0%}")
    if whole:
        atomic_write(RESULTS, json.dumps(dict(sorted(table.items())), indent=1, ensure_ascii=False) + "\n")
    sys.exit(any(table[room]["seen"] < 0.9 * table[room]["of"] for room in rooms))


if __name__ == "__main__":
    run(main, parse_args())
