"""Loading windows for cwt_mae: throughput, and memory that does not grow with the number of records.

    python bench/cwt_loader.py [--records 100 1000 10000]

For each number of records: the store is built from that many files of one minute at 100 Hz, then a fresh
process maps it and draws 20,000 random windows of 10 s. Beside it, the same windows by reading and
uncompressing the record's npz file for every window, which is what a loader without a store does. Writes
bench/results/cwt_loader.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from bench.measure import resident_mb
from common.checkpoint import atomic_write
from cwt_mae.dataset import PhysioSignalDataset, Preprocess, Store, build_store, read_records

ROOT = Path(__file__).resolve().parents[1]


def draw(folder: str, windows: int):
    """Run in a process of its own: one JSON line with windows/s and this process's own memory (without mapped
    files)."""
    before = resident_mb("RssAnon")
    dataset = PhysioSignalDataset(Store(folder), 1000, num_patches=20)
    places = np.random.default_rng(0).integers(len(dataset), size=windows)
    start = time.perf_counter()
    for place in places:
        dataset[int(place)]
    print(
        json.dumps(
            {
                "windows_per_s": windows / (time.perf_counter() - start),
                "own_mb": resident_mb("RssAnon") - before,
                "peak_mb": resident_mb("VmHWM"),
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--records", type=int, nargs="+", default=[100, 1000, 10000], help="numbers of files")
    parser.add_argument("--windows", type=int, default=20000, help="windows to draw")
    parser.add_argument("--draw", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        return draw(args.draw, args.windows)
    rng, rows = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for count in args.records:
            data = folder / f"data{count}"
            data.mkdir()
            for i in range(count):
                np.savez(
                    data / f"r{i:06d}.npz",
                    sig=(1000 * rng.standard_normal(6000)).astype(np.int16),
                    fs=100,
                    gain=200,
                )
            start = time.perf_counter()
            store = build_store([data], Preprocess(100.0), folder / "cache")
            build = time.perf_counter() - start
            out = subprocess.run(
                [sys.executable, __file__, "--draw", str(store.folder), "--windows", str(args.windows)],
                capture_output=True,
                text=True,
                check=True,
            )
            row = {
                "records": count,
                "store_mb": store.records["length"].sum() * 4 / 1e6,
                "build_records_per_s": count / build,
                **json.loads(out.stdout),
            }
            start, n = time.perf_counter(), 200
            prepare = Preprocess(100.0)
            for i in rng.integers(count, size=n):
                record = read_records(data / f"r{i:06d}.npz")[0]
                signal = prepare.signal(next(iter(record.channels.values())), record.fs, "")
                prepare.window(signal[:1000], 1000)
            row["file_each_time_windows_per_s"] = n / (time.perf_counter() - start)
            rows.append(row)
            print(" | ".join(f"{k} {v:,.1f}" for k, v in row.items()), flush=True)
    atomic_write(ROOT / "bench" / "results" / "cwt_loader.json", json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
