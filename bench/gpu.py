"""Measures the five systems at their published sizes on one GPU, each number beside a named baseline of the
same process.

    PYTHON=python3 bash bench/gpu.sh                   every step, most important first
    bash bench/gpu.sh --dry-run                        tiny shapes on the CPU: the numbers mean nothing
    bash bench/gpu.sh --steps dia cwt --budget 300     some steps, and no more than 300 seconds

Each step runs in a process of its own with its own time limit. A step that fails or runs out of time is
reported with its reason and keeps the rows that it measured before; the other steps go on. The table and
`gpu.json` are written after each step, so that a run that is cut off keeps what it has.

  dia        one training step and generation of dia_pangu at openPangu-7B's size, against upstream's way
  em         one LoRA step and generation of em_mllm at FM9G-4B's size, against the starter kit's way
  flmm       attention rows of a Qwen2.5-VL-3B and a LLaVA-1.5-7B, against eager and plain SDPA; head
             training from the cache
  cwt        wavelet transform and pre-training step of cwt_mae at the published size, against conv1d and
             upstream's form
  pruning    sensitivity scan of 34 layers x 4096 with 153,376 words: naive, cached, wavefront
  attention  attention back ends against eager
  parity     CUDA against the CPU in float32, golden files on CUDA, torch.compile
  scripts    the five training scripts in bfloat16
  sharding   FSDP2 with CPU offload, and DDP, each in one process
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # repository root: every way of starting this file finds it

# Seconds after which a step is stopped; the order is that of importance.
LIMITS = {
    "dia": 115,
    "em": 100,
    "flmm": 110,
    "cwt": 75,
    "pruning": 100,
    "attention": 50,
    "parity": 100,
    "scripts": 110,
    "sharding": 60,
}
LEAST = 20  # seconds: with less left of the budget a step is not started


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", nargs="+", choices=LIMITS, default=list(LIMITS), help="the steps to run (default: all)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run tiny shapes on the CPU to exercise the code"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "bench" / "results",
        help="the folder of gpu.json (default %(default)s)",
    )
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds for all steps together (default %(default)s)"
    )
    parser.add_argument("--one", choices=LIMITS, help=argparse.SUPPRESS)  # the child process of a step
    return parser.parse_args()


def run_step(name: str, dry_run: bool, limit: float) -> dict:
    """Run one step in a fresh process and return its rows, its seconds and, where it failed, the reason in
    one line."""
    command = [sys.executable, __file__, "--one", name] + ["--dry-run"] * dry_run
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    start, tail, result = time.monotonic(), [], {"rows": [], "about": {}}
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,  # so that the step's own children end with it
    )
    late = threading.Event()

    def stop():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    def stop_late():
        late.set()
        stop()

    timer = threading.Timer(limit, stop_late)
    timer.start()
    try:
        for line in child.stdout:
            if line.startswith("ROW "):
                result["rows"].append(json.loads(line[4:]))
                print(f"  {show_row(result['rows'][-1])}", flush=True)
            elif line.startswith("ABOUT "):
                result["about"] = json.loads(line[6:])
            elif line.strip():
                tail = [*tail[-40:], line.rstrip()]
        status = child.wait()
    finally:
        timer.cancel()
        stop()  # what the step has left running ends too
    result["seconds"] = round(time.monotonic() - start, 1)
    if late.is_set():
        result["failed"] = f"stopped after its {limit:.0f} seconds"
    elif status:
        result["failed"] = tail[-1][:300] if tail else f"ended with status {status}"
        result["output"] = tail[-25:]
    return result


def number(value) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def show_row(row: dict) -> str:
    """One line: what, value and unit, then the baseline by name, the ratio and whether the goal was
    reached."""
    text = f"{row['what']:58s} {number(row['value']):>10s} {row['unit']:10s}"
    if row.get("baseline"):
        text += f" | {row['baseline']}: {number(row['baseline_value'])}"
        if row.get("ratio") is not None:
            text += f", ratio {row['ratio']:.3g}"
    if row.get("goal"):
        text += f" | goal {row['goal']}: {'reached' if row['reached'] else 'not reached'}"
    return text + (f" | {row['note']}" if row.get("note") else "")


def show_table(results: dict) -> str:
    lines = [""]
    for name, result in results["steps"].items():
        lines.append(f"{name} ({result['seconds']} s)" if "seconds" in result else name)
        lines += [f"  {show_row(row)}" for row in result.get("rows", [])]
        if result.get("failed"):
            lines.append(f"  FAILED: {result['failed']}")
        if result.get("skipped"):
            lines.append(f"  skipped: {result['skipped']}")
    return "\n".join(lines)


def main(args):
    if args.one:
        from bench import gpu_steps

        return gpu_steps.run_one(args.one, args.dry_run)
    from common.checkpoint import atomic_write

    args.out.mkdir(parents=True, exist_ok=True)
    results = {"dry_run": args.dry_run, "budget_s": args.budget, "about": {}, "steps": {}}
    start = time.monotonic()
    for name in [name for name in LIMITS if name in args.steps]:
        left = args.budget - (time.monotonic() - start)
        if left < LEAST:
            results["steps"][name] = {"skipped": f"{max(left, 0):.0f} s of the budget were left"}
        else:
            limit = left if args.dry_run else min(left, LIMITS[name])  # a CPU may be slow
            print(f"{name}: at most {limit:.0f} s", flush=True)
            result = run_step(name, args.dry_run, limit)
            results["about"] |= result.pop("about")
            results["steps"][name] = result
            if result.get("failed"):
                print(f"  FAILED: {result['failed']}", flush=True)
        results["seconds"] = round(time.monotonic() - start, 1)
        atomic_write(args.out / "gpu.json", json.dumps(results, indent=1))
    print(show_table(results))
    print(f"\n{json.dumps(results['about'])}\n{results.get('seconds', 0)} s; wrote {args.out / 'gpu.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()) or 0)
