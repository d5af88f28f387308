"""Measure every claim of speed and memory, and write them as one table to bench/RESULTS.md.

    python bench/run_all.py                 # all benches, three times: fifty minutes on one core
    python bench/run_all.py cwt pruning     # some of them
    python bench/run_all.py --table         # only the table, from the numbers in bench/results/

Each bench runs in a process of its own and writes bench/results/<name>.json. A claim is a ratio to a named
baseline measured in the same run; `CLAIMS` says where it stands in that file.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

from bench.measure import processor
from common.checkpoint import atomic_json, atomic_write
from common.errors import UserError, run

HERE = Path(__file__).resolve().parent
BENCHES = ("cwt", "cwt_loader", "em", "flmm", "dia", "pruning", "scaling", "index")


# bench: (claim, size, baseline, how the numbers are said, function of the bench's JSON -> the numbers)
CLAIMS = {
    "cwt": [
        (
            "wavelet transform, CPU time on one thread",
            "32 x 3000 samples, 64 scales, 3 channels",
            "conv1d bank, as upstream",
            "{:.1f} x faster, {:.1f} x into a tensor used again",
            lambda d: [d["methods"][m]["ratio_cpu"] for m in ("cwt_wrap", "cwt_wrap out=")],
        ),
        (
            "transform and instance normalisation, CPU time on one thread",
            "same",
            "conv1d bank and separate normalisation",
            "{:.1f} x faster",
            lambda d: [d["methods"]["cwt_wrap + norm"]["ratio_cpu"]],
        ),
        (
            "the same on the clock, 2 threads",
            "same",
            "same",
            "{:.1f} x faster",
            lambda d: [d["methods"]["cwt_wrap + norm"]["ratio_wall_2"]],
        ),
        (
            "extra peak memory of transform and normalisation",
            "same",
            "same",
            "{:.0f} MB instead of {:.0f} MB",
            lambda d: [d["methods"][m]["memory_mb"] for m in ("cwt_wrap + norm", "conv1d + norm")],
        ),
        (
            "largest error in parts of the peak",
            "same",
            "float64 direct transform",
            "{:.0e}",
            lambda d: [d["methods"]["cwt_wrap"]["error"]],
        ),
    ],
    "cwt_loader": [
        (
            "windows per second from memory-mapped signals",
            "10,000 records",
            "opening the file each time",
            "{:.0f} x more",
            lambda d: [d[-1]["windows_per_s"] / d[-1]["file_each_time_windows_per_s"]],
        ),
        (
            "memory of the loader beside the mapped file",
            "100, 1,000 and 10,000 records",
            "none",
            "{:.2f} MB, {:.2f} MB, {:.2f} MB",
            lambda d: [r["own_mb"] for r in d],
        ),
    ],
    "em": [
        (
            "encoder, time and peak memory",
            "64 signals of 128 to 4096 points",
            "padded, eager (starter kit)",
            "{:.1f} x faster, {:.1f} x less",
            lambda d: ratio(d, "encoder", "seconds", "memory"),
        ),
        (
            "multimodal training step, frozen LLM",
            "vocabulary 32,000",
            "padded, full logits (starter kit)",
            "{:.1f} x faster, {:.1f} x less",
            lambda d: ratio(d, "step", "seconds", "memory"),
        ),
        (
            "generation",
            "4 questions, 64 new tokens",
            "one by one, prefix run again",
            "{:.1f} x faster",
            lambda d: ratio(d, "generation", "seconds"),
        ),
        (
            "resident memory while loading",
            "file of 16 MB and of 164 MB",
            "none",
            "{:.0f} MB and {:.0f} MB: flat",
            lambda d: [d["table"]["loading"][k]["resident_mb"] for k in ("small", "tenfold")],
        ),
        (
            "extra memory while the strongest windows of a raw capture are cut",
            "file of 40 MB and of 400 MB",
            "the 400 MB read at once",
            "{:.0f} MB and {:.0f} MB instead of {:.0f} MB",
            lambda d: [d["table"]["recording"][k]["peak_mb"] for k in ("small", "tenfold", "whole")],
        ),
        (
            "likelihoods of four options",
            "16 questions of up to 200 tokens",
            "the prompt read for each option",
            "{:.1f} x faster",
            lambda d: ratio(d, "options", "seconds"),
        ),
        (
            "500 random signals of a gzip .h5",
            "4,000 signals in chunks of 512",
            "as it is stored; ours was copied once",
            "{:.0f} x faster",
            lambda d: ratio(d, "chunks", "seconds"),
        ),
        (
            "a LoRA checkpoint before the first step",
            "language model of 20 M parameters",
            "the frozen language model in it",
            "{:.2f} MB instead of {:.0f} MB",
            lambda d: [d["table"]["checkpoint"][k]["checkpoint_mb"] for k in ("ours", "starter kit")],
        ),
    ],
    "flmm": [
        (
            "attention functions, phrase rows only",
            "24 layers x 16 heads x 900 tokens",
            "eager, full matrices",
            "{:.1f} x faster, {:.0f} x less extra memory",
            lambda d: [d["rows"]["attention_speedup"], d["rows"]["memory_ratio"]],
        ),
        (
            "whole model with attention rows",
            "same",
            "plain SDPA, no attention returned",
            "{:.2f} x its time",
            lambda d: [d["rows"]["model_rows_over_sdpa"]],
        ),
        (
            "refiner, 8 phrases of one picture",
            "SAM-B shapes",
            "one by one, encoding again",
            "{:.1f} x faster",
            lambda d: [d["refiner"]["speedup"]],
        ),
        (
            "head training step from the cache",
            "tiny base",
            "running the base",
            "{:.1f} x faster",
            lambda d: [d["cache"]["speedup"]],
        ),
    ],
    "dia": [
        (
            name,
            size,
            "upstream's way",
            "{:,.1f} x faster",
            lambda d, name=name: [next(r["ratio"] for r in d["rows"] if r["what"] == name)],
        )
        for name, size in (
            ("embedding step", "vocabulary 153,376, 512 tokens, batch 2"),
            ("finding pooling", "14 findings"),
            ("ViT blocks", "one volume"),
            ("ViT passes of a report", "one report"),
            ("generation, per report", "batch 8, 300 tokens"),
            ("training step, tiny, batch 4", "tiny model"),
            ("training step, one layer of openPangu's width", "width 4096"),
        )
    ],
    "pruning": [
        (
            "sensitivity scan, cached and wavefront, CPU time",
            "24 layers x 256, 12 prompts",
            "naive scan (upstream)",
            "{:.1f} x and {:.1f} x faster",
            lambda d: [
                d["scan"]["cpu_seconds"]["naive (upstream)"] / d["scan"]["cpu_seconds"][method]
                for method in ("cached", "wavefront")
            ],
        ),
        (
            "peak memory of a scan",
            "vocabulary 153,376, 34 layers",
            "log-probabilities all at once",
            "{:.0f} MB instead of {:.0f} MB",
            lambda d: list(d["memory"]["megabytes"].values())[::-1],
        ),
        (
            "peak memory of pruning on disk",
            "8.03 B values, 34 to 28 layers",
            "none",
            "{:.0f} MB",
            lambda d: [d["prune"]["23-28"]["peak_megabytes"]],
        ),
    ],
}
# results/runs.json: {bench: {"processor", "cores", "load", "date", "numbers": [run][claim][number]}}


def ratio(data, part, *names):
    """Ratios of a part of an em.json."""
    return [data["table"][part]["ratio"][name] for name in names]


def result(name):
    """The JSON of a bench, None if it was not run."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def measure(name: str, runs: int) -> bool:
    """Run a bench `runs` times, note the numbers of its claims, and return whether all runs ended well."""
    numbers, loads = [], []
    for _ in range(runs):
        loads.append(os.getloadavg()[0])
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if subprocess.run([sys.executable, str(HERE / f"{name}.py")], env=environment).returncode:
            return False
        numbers.append([numbers_of(result(name)) for *_, numbers_of in CLAIMS.get(name, ())])
    if name in CLAIMS:
        noted = result("runs") or {}
        noted[name] = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "load": max(loads),
            "date": time.strftime("%Y-%m-%d"),
            "numbers": numbers,
        }
        atomic_json(HERE / "results/runs.json", noted)
    return True


def said(form: str, runs: list[list[float]]) -> str:
    """The numbers of a claim in words: the median of its runs, and the least and the largest where they
    differ in what is shown."""
    words = []
    for values, spec in zip(zip(*runs), re.findall(r"{[^}]*}", form)):
        middle, low, high = (spec.format(f(values)) for f in (statistics.median, min, max))
        words.append(middle if low == high else f"{middle} ({low} to {high})")
    return re.sub(r"{[^}]*}", "{}", form).format(*words)


def claims_table() -> list[str]:
    """Every claim with the spread of its runs; a bench that was never run is named as not measured."""
    lines, noted = [], result("runs") or {}
    for name, claims in CLAIMS.items():
        data, runs = result(name), noted.get(name)
        for i, (claim, size, baseline, form, numbers_of) in enumerate(claims):
            if runs:
                measured = said(form, [numbers[i] for numbers in runs["numbers"]])
            else:
                measured = said(form, [numbers_of(data)]) if data else "not measured yet"
            lines.append(f"| {claim} | {size} | {baseline} | {measured} | `python bench/{name}.py` |")
    lines.append("")
    for name, runs in noted.items():
        lines.append(
            f"* {name}: median of {len(runs['numbers'])} runs (least to largest), {runs['date']}, "
            f"{runs['processor']}, {runs['cores']} cores, load {runs['load']:.0f}"
        )
    alone = [name for name in CLAIMS if name not in noted]
    if alone:
        lines.append(f"* {', '.join(alone)}: one run on an Intel Xeon, 2 to 4 shared cores")
    return lines


def index_table() -> list[str]:
    """The section on data sets of many small files, from the JSON of bench/index.py."""
    data = result("index") or {}
    lines = [
        "",
        "## Data sets of many small files",
        "",
        "`python bench/index.py`, records of 250 samples; without the imports, files in the system's cache. "
        "cwt_mae reads, checks, filters",
        "and stores each record, em_mllm looks each signal up where it lies. Memory: what the main process "
        "holds more than before, and",
        "the peak of one of its readers with the imports. In brackets: seconds of processor, of all of them.",
        "",
        "| files | records | first index | second start | memory | a reader | reading then |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, rows in data.items():
        first, second = rows["first"], rows["second"]
        once, again = (f"{r['seconds']:.2f} s ({r['processor_seconds']:.2f})" for r in (first, second))
        cores = "1 core" if rows["cores"] == 1 else f"{rows['cores']} cores"
        row = [kind, f"{first['records']:,}", f"{once}, {cores}, load {rows['load']:.0f}", again]
        row.append(f"{first['memory_mb']:.0f} MB, {second['memory_mb']:.0f} MB")
        row.append(f"{first['peak_of_a_reader_mb']:.0f} MB" if rows["cores"] > 1 else "")
        row.append(f"{second['signals_per_s']:,.0f} signals/s" if "signals_per_s" in second else "")
        lines.append(f"| {' | '.join(row)} |")
    return lines if data else []


def gpu_table() -> list[str]:
    """The section on the GPU, from the JSON of `bench/gpu.sh`: every row, whether its goal was reached or
    not."""
    data = result("gpu")
    if data is None:
        return ["", "No GPU was at hand; `bash bench/gpu.sh` measures the real sizes on one."]
    about = data["about"]
    lines = [
        "",
        "## On a GPU, at the real sizes",
        "",
        f"`bash bench/gpu.sh` on one {about['device']}, torch {about['torch']}, transformers "
        f"{about['transformers']}; "
        "random weights, bfloat16. The ratio is how many times faster or smaller ours is, unless the note "
        "says otherwise.",
        "",
        "| what | ours | baseline | ratio | goal | note |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for step in data["steps"].values():
        for row in step.get("rows", []):
            ours = "-" if row["value"] is None else f"{row['value']:.4g} {row['unit']}"
            baseline = row["baseline"] or ""
            if row["baseline_value"] is not None:
                baseline += f": {row['baseline_value']:.4g}"
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
            goal = f"{row['goal']}: {'' if row['reached'] else 'not '}reached" if row["goal"] else ""
            lines.append(f"| {row['what']} | {ours} | {baseline} | {ratio} | {goal} | {row['note'] or ''} |")
    for name, step in data["steps"].items():
        if why := step.get("failed") or step.get("skipped"):
            lines.append(f"| the rest of the step `{name}` | not measured: {why} | | | | |")
    return lines


def write_table():
    """bench/RESULTS.md from the JSON files that are there; a bench without one is named as not measured."""
    lines = [
        "# Measured claims",
        "",
        "Ratios to a baseline in the same run, on CPU; each from the command in the last column, which "
        "prints absolute times too. In brackets the spread over runs.",
        "Machines differ and this one was shared, so expect other ratios on yours. Made by `python "
        "bench/run_all.py`.",
        "",
        "| claim | size | baseline | measured | command |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += claims_table()
    lines += [
        "",
        "## Growth",
        "",
        "Slopes on logarithmic axes, `python bench/scaling.py`: 1 is growth in proportion, 0 none. Memory is "
        "what a call adds at its",
        "peak, with the part that does not grow.",
        "",
        "| what | grows with | sizes | time | memory | at the largest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in result("scaling") or []:
        sizes, last = [row["size"] for row in case["rows"]], case["rows"][-1]
        lines.append(
            f"| {case['what']} | {case['grows']} | {sizes[0]:,} to {sizes[-1]:,} | {case['time']:.2f} | "
            f"{case['memory']:.2f} | "
            f"{1e3 * last['seconds']:.0f} ms, {last['megabytes']:.0f} MB |"
        )
    lines += index_table() + gpu_table()
    lines += ["", (HERE / "proof.md").read_text().rstrip()]  # written by hand: what was seen, and when
    atomic_write(HERE / "RESULTS.md", "\n".join(lines) + "\n")


def main(args):
    unknown = [name for name in args.benches if name not in BENCHES]
    if unknown:
        raise UserError(f"{unknown[0]}: no such bench; choose from {', '.join(BENCHES)}")
    failed = []
    for name in [] if args.table else args.benches or BENCHES:
        print(f"== {name}", flush=True)
        failed += [] if measure(name, args.runs) else [name]
    write_table()
    if failed:
        raise UserError(f"{', '.join(failed)} failed; the table keeps their earlier numbers")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "benches", nargs="*", metavar="bench", help=f"any of {', '.join(BENCHES)} (default: all)"
    )
    parser.add_argument(
        "--runs", type=int, default=3, help="times that each bench is run; the table gives their spread"
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="measure nothing, write the table from the numbers that are there",
    )
    run(main, parser.parse_args())
