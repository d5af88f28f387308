"""Data sets of many small files: how long the first index takes, how long the second start, and how fast the
signals of tar shards are read.

    python bench/index.py                                          # 10,000 records of each kind
    python bench/index.py --records 200000 --kinds wfdb --folder /path/with/room

Records have 250 samples. cwt_mae's index reads, checks, filters and stores each of them (on all
cores); em_mllm's looks each signal of its tar shards up and then reads it where it lies. Each number is taken
in a process of its own, without its imports. Made files stay in --folder for the next time. Writes
bench/results/index.json; kinds that were not measured this time stay as they are.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import psutil

from bench.measure import resident_mb
from common.checkpoint import atomic_json
from cwt_mae.dataset import Preprocess, build_store
from em_mllm.dataset import SignalDataset
from em_mllm.pretrain import signal_files

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("wfdb", "npz", "cwt_mae tar", "em_mllm tar")
LENGTH, RATE, EACH = 250, 125, 1000  # samples of a record, Hz, records in a folder or shard


def array_file(save, *arrays, **named) -> bytes:
    """What numpy's `save` writes."""
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def record_files(kind: str, name: str, x: np.ndarray) -> dict[str, bytes]:
    """{file name: content} of one record of int16 samples."""
    if kind == "wfdb":
        check = int(x.sum()) & 0xFFFF
        line = f"{name}.dat 16 1000(0)/mV 16 0 {x[0]} {check} 0 ECG\n"
        head = f"{name} 1 {RATE} {LENGTH}\n{line}"
        return {f"{name}.hea": head.encode(), f"{name}.dat": x.astype("<i2").tobytes()}
    if kind == "em_mllm tar":
        return {f"{name}.npy": array_file(np.save, x.reshape(-1, 2)), f"{name}.json": b'{"fs": 1000000.0}'}
    return {f"{name}.npz": array_file(np.savez, sig=x, fs=RATE, gain=1000.0)}


def make(kind: str, folder: Path, records: int):
    """Write the records, EACH in a folder or shard."""
    rng, time_axis = np.random.default_rng(0), np.arange(LENGTH) / 7
    for first in range(0, records, EACH):
        place = folder / f"p{first // EACH:06d}"
        files = {}
        for i in range(first, min(first + EACH, records)):
            x = 1000 * np.sin(time_axis + 6 * rng.random()) + 30 * rng.standard_normal(LENGTH)
            files |= record_files(kind, f"r{i:06d}", x.astype(np.int16))
        if "tar" in kind:
            with tarfile.open(place.with_suffix(".tar"), "w") as archive:
                for name, content in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
            continue
        place.mkdir()
        for name, content in files.items():
            (place / name).write_bytes(content)


class Readers(threading.Thread):
    """Watches the processes that read for this one: the seconds of processor that they took so far, and the
    largest of them."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seconds, self.peak_mb = {}, 0.0
        self.start()

    def run(self):
        while True:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self.seconds[child.pid] = sum(child.cpu_times()[:2])
                    self.peak_mb = max(self.peak_mb, child.memory_info().rss / 2**20)
            time.sleep(0.5)


def index(kind: str, data: Path, cache: Path):
    """Run in a process of its own: one JSON line of what one index took."""
    os.environ["EM_MLLM_CACHE"] = str(cache)
    readers, before = Readers(), resident_mb("RssAnon")
    start, used = time.perf_counter(), time.process_time()
    if kind == "em_mllm tar":
        signals = SignalDataset(signal_files([data]))
        count = len(signals)
    else:
        count = len(build_store([data], Preprocess(float(RATE)), cache, quiet=True).records)
    row = {"records": count, "seconds": time.perf_counter() - start}
    row["processor_seconds"] = time.process_time() - used + sum(readers.seconds.values())
    row |= {"memory_mb": resident_mb("RssAnon") - before, "peak_of_a_reader_mb": readers.peak_mb}
    row["peak_mb"] = resident_mb("VmHWM")
    if kind == "em_mllm tar":
        order = np.random.default_rng(0).permutation(count)[:5000]
        start = time.perf_counter()
        for i in order:
            signals[int(i)]
        row["signals_per_s"] = len(order) / (time.perf_counter() - start)
    print(json.dumps(row))


def measure(kind: str, data: Path, cache: Path) -> dict:
    command = [sys.executable, __file__, "--index", kind, str(data), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(args):
    results = ROOT / "bench" / "results" / "index.json"
    found = json.loads(results.read_text()) if results.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for kind in args.kinds:
            data = folder / f"{kind.replace(' ', '-')}-{args.records}"
            if not data.is_dir():
                half = data.with_name(f".{data.name}")
                half.mkdir(parents=True)
                make(kind, half, args.records)
                half.rename(data)
            cache = folder / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            rows = {"first": measure(kind, data, cache), "second": measure(kind, data, cache)}
            about = {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
            found[kind] = {**rows, **about}
            print(kind, json.dumps(found[kind], indent=1), flush=True)
            atomic_json(results, found)
            shutil.rmtree(cache)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--records", type=int, default=10000, help="records of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="which kinds of files")
    parser.add_argument(
        "--folder", type=Path, help="where the files are made, and kept; else they are deleted"
    )
    parser.add_argument("--index", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.index:
        index(arguments.index[0], *map(Path, arguments.index[1:]))
    else:
        main(arguments)
