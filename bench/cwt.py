"""The wavelet front end of cwt_mae against direct convolution, PyWavelets and ptwt.

    python bench/cwt.py [--batch 32] [--length 3000] [--scales 64] [--repeats 3]
    python bench/cwt.py --only day csv                          # some of its parts: methods, day, csv
    bash -c 'source common/env.sh; "$PYTHON" bench/cwt.py'      # as launchers start it: freed memory stays

Signals (batch, length), their first and second differences, all Ricker scales: every method makes a new
output tensor (batch, 3, scales, length) from the same signals. Methods take turns within a repeat, so that a
busy machine hurts them alike; each number is the median over the repeats.

  cpu_ms      processor time on one thread, user and system; a busy machine changes it least
  wall_ms     time on the clock with 2 threads, and with 4 where there are 4 cores
  memory_mb   highest resident memory above that before the call, in a process of its own; the output counts
  error       largest difference from the same transform by direct convolution in float64, as a fraction of
              its peak, of the worst channel

The direct method is upstream's: conv1d with 630 taps and zeros beyond the ends (legacy), then mean and
deviation. `cwt_wrap legacy` computes the same numbers; `cwt_wrap` is the default, with 631 taps and reflected
ends, compared with the direct form of that. PyWavelets and ptwt (pip install pywavelets ptwt; left out where
missing) sample an integrated wavelet and round its length, so their error is a difference of method; they
have no scale below 0.5, for which they get scale 1.

`cwt_wrap out=` writes into a tensor that is used again, and `cwt_wrap vmap` maps over signals. Beside the
table: the highest resident memory of a process that encodes a day at 250 Hz with a small model, and the time
to read a csv file of a million lines, beside pandas where it is installed.

Writes bench/results/cwt.json with the processor's name: ratios differ between processors.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
import torch.nn.functional as F

from bench.measure import added_peak_mb, resident_mb
from common.checkpoint import atomic_write
from cwt_mae.model import create_ricker_wavelets, cwt_wrap

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["methods", "day", "csv"]


def direct(x, scales, points, reflect=False):
    """Upstream's way, in the dtype of x: differences, one conv1d with all kernels. reflect: the default of
    `cwt_wrap`."""
    half, length = points // 2, x.shape[1]
    if reflect:
        edge = F.pad((x - x.mean(1, keepdim=True))[:, None], (half + 1, half + 1), mode="reflect")[:, 0]
        now, before, after = edge[:, 1:-1], edge[:, 1:-1] - edge[:, :-2], edge[:, 2:] - edge[:, 1:-1]
        rows, padding = torch.stack([now, (before + after) / 2, after - before], 1), 0
    else:
        first = torch.diff(F.pad(x[:, None], (1, 1), mode="replicate")[:, 0])
        rows, padding = torch.stack([x, first[:, :-1], torch.diff(first)], 1), half
    kernels = create_ricker_wavelets(points, scales.to(x.dtype))
    return F.conv1d(rows.flatten(0, 1)[:, None], kernels, padding=padding)[..., :length].unflatten(0, (-1, 3))


def normalized(imgs):
    """Upstream's instance normalisation."""
    return (imgs - imgs.mean((2, 3), keepdim=True)) / imgs.std((2, 3), keepdim=True).clamp(min=1e-5)


def rows_of(x):
    first = torch.diff(F.pad(x[:, None], (1, 1), mode="replicate")[:, 0])
    return torch.stack([x, first[:, :-1], torch.diff(first)], 1).flatten(0, 1)


def methods(num_scales, length) -> dict:
    """{name: function of x (B, L) -> (B, 3, S, L)}."""
    scales = torch.arange(num_scales) + 0.1
    largest = float(scales[-1])
    points = int(min(10 * largest, length) + (min(10 * largest, length) % 2 == 0))
    found = {
        "conv1d": lambda x: direct(x, scales, points),
        "cwt_wrap legacy": lambda x: cwt_wrap(x, num_scales, legacy=True),
        "cwt_wrap": lambda x: cwt_wrap(x, num_scales),
        "conv1d + norm": lambda x: normalized(direct(x, scales, points)),
        "cwt_wrap legacy + norm": lambda x: cwt_wrap(x, num_scales, legacy=True, normalize=True),
        "cwt_wrap + norm": lambda x: cwt_wrap(x, num_scales, normalize=True),
    }
    kept = {}

    def reuse(x):
        key = len(x)
        if key not in kept:
            kept[key] = torch.empty(len(x), 3, num_scales, x.shape[1])
        return cwt_wrap(x, num_scales, out=kept[key])

    found["cwt_wrap out="] = reuse
    found["cwt_wrap vmap"] = torch.func.vmap(lambda z: cwt_wrap(z[None], num_scales)[0])
    other = scales.clone()
    other[0] = 1.0
    try:
        import pywt

        for how in ("fft", "conv"):
            found[f"pywt mexh {how}"] = lambda x, how=how: (
                torch.from_numpy(pywt.cwt(rows_of(x).numpy(), other.numpy(), "mexh", method=how, axis=-1)[0])
                .transpose(0, 1)
                .unflatten(0, (-1, 3))
            )
    except ImportError:
        print("pywt is not installed: left out (pip install pywavelets)")
    try:
        import ptwt

        found["ptwt mexh"] = lambda x: (
            ptwt.cwt(rows_of(x), other, "mexh")[0].transpose(0, 1).unflatten(0, (-1, 3))
        )
    except ImportError:
        print("ptwt is not installed: left out (pip install ptwt)")
    return found


def test_signal(batch, length):
    """Pulses, drift, offset and noise, as in a record that nobody prepared."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(length) / 100
    rate = 1 + 0.3 * torch.rand(batch, 1, generator=generator)
    noise = torch.randn(batch, length, generator=generator)
    return (
        torch.sin(2 * torch.pi * rate * t).clamp(min=0) ** 15 + 0.3 * torch.sin(0.9 * t) + 0.5 + 0.03 * noise
    )


def memory(name, args):
    """Run in a process of its own: MB of resident memory that one call adds at its highest."""
    method, x = methods(args.scales, args.length)[name], test_signal(args.batch, args.length)
    torch.set_num_threads(1)
    method(x[:1])  # libraries, kernel spectra and thread stacks are there before
    print(json.dumps(added_peak_mb(lambda: method(x))))


def day_mb() -> float:
    """Run in a process of its own: MB of resident memory at the highest while a day at 250 Hz is encoded."""
    from cwt_mae.model_finetune import TF_MAE_Classifier

    torch.set_num_threads(1)
    sizes = dict(cwt_scales=16, patch_size_freq=16, embed_dim=64, depth=1, num_heads=4)
    model = TF_MAE_Classifier(None, 2, **sizes, preprocess={"fs": 100.0})
    signal = np.random.default_rng(0).standard_normal(86400 * 250, dtype=np.float32)
    model.encode(signal, 250.0, tokens=False)
    return resident_mb("VmHWM")


def csv_seconds(lines: int = 1_000_000) -> dict:
    """Seconds to read a csv file of `lines` lines, and with pandas alone."""
    from cwt_mae.dataset import read_records

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        values = np.round(np.random.default_rng(0).standard_normal(lines), 4).tolist()
        path.write_text("time_s,ecg\n" + "".join(f"{i / 250:.3f},{v}\n" for i, v in enumerate(values)))
        start = time.perf_counter()
        read_records(path)
        found = {"read_records": time.perf_counter() - start}
        try:
            import pandas
        except ImportError:
            return found
        start = time.perf_counter()
        pandas.read_csv(path)
        return found | {"pandas": time.perf_counter() - start}


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def turns(found: dict, x, repeats: int, clock) -> dict:
    """Median milliseconds of each method on `clock`; the order within a repeat is drawn anew."""
    for method in found.values():
        method(x)
    spent = {name: [] for name in found}
    for repeat in range(repeats):
        for name in random.Random(repeat).sample(list(found), len(found)):
            start = clock()
            found[name](x)
            spent[name].append(1e3 * (clock() - start))
    return {name: statistics.median(times) for name, times in spent.items()}


def errors(found: dict, x, num_scales) -> dict:
    """Worst channel's largest difference from float64 direct convolution, in parts of its peak."""
    scales, x = torch.arange(num_scales) + 0.1, x[:4]
    largest = min(10 * float(scales[-1]), x.shape[1])
    legacy = direct(x.double(), scales, int(largest + (largest % 2 == 0)))
    centred = direct(x.double(), scales, 2 * int(5 * float(scales[-1]) + 1e-3) + 1, reflect=True)
    worst = {}
    for name, method in found.items():
        expected = centred if name.startswith("cwt_wrap") and "legacy" not in name else legacy
        expected = normalized(expected) if "norm" in name else expected
        peak = expected.abs().amax((0, 2, 3))
        worst[name] = ((method(x).double() - expected).abs().amax((0, 2, 3)) / peak).max().item()
    return worst


def counts_of_threads() -> list[int]:
    return [threads for threads in (2, 4) if threads <= max(2, os.cpu_count() or 1)]


def in_own_process(name: str, args):
    """What this script prints with --memory `name`, read as JSON."""
    sizes = [f"--{k}={getattr(args, k)}" for k in ("batch", "length", "scales")]
    command = [sys.executable, __file__, "--memory", name, *sizes]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


@torch.no_grad()
def measure_methods(args) -> dict:
    """{method: its row}: times, memory and error of every method, and ratios to its rival."""
    found, x = methods(args.scales, args.length), test_signal(args.batch, args.length)
    torch.set_num_threads(1)
    cpu = turns(found, x, args.repeats, time.process_time)
    rows = {name: {"cpu_ms": value} for name, value in cpu.items()}
    for threads in counts_of_threads():
        torch.set_num_threads(threads)
        for name, value in turns(found, x, args.repeats, time.perf_counter).items():
            rows[name][f"wall_ms_{threads}"] = value
    torch.set_num_threads(1)
    for name, error in errors(found, x, args.scales).items():
        rows[name] |= {"error": error, "memory_mb": in_own_process(name, args)}
    for name, row in rows.items():
        rival = rows["conv1d + norm" if "norm" in name else "conv1d"]
        row["ratio_cpu"] = rival["cpu_ms"] / row["cpu_ms"]
        for threads in counts_of_threads():
            row[f"ratio_wall_{threads}"] = rival[f"wall_ms_{threads}"] / row[f"wall_ms_{threads}"]
    return rows


def print_methods(rows: dict):
    """The table of `measure_methods`."""
    counts = counts_of_threads()
    walls = "".join(f"{f'{t} threads':>11}{'x':>6}" for t in counts)
    print(f"{'method':24}{'cpu ms':>8}{'x':>6}{walls}{'memory MB':>11}{'error':>9}")
    for name, row in rows.items():
        walls = "".join(f"{row[f'wall_ms_{t}']:11.0f}{row[f'ratio_wall_{t}']:6.1f}" for t in counts)
        numbers = f"{row['cpu_ms']:8.0f}{row['ratio_cpu']:6.1f}{walls}"
        print(f"{name:24}{numbers}{row['memory_mb']:11.0f}{row['error']:9.0e}")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32, help="signals")
    parser.add_argument("--length", type=int, default=3000, help="samples of each signal")
    parser.add_argument("--scales", type=int, default=64, help="0.1, 1.1, ... samples")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each number; their median")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to measure")
    parser.add_argument("--out", type=Path, help="where the numbers go; all parts: bench/results/cwt.json")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.memory == "a day":
        return print(json.dumps(day_mb()))
    if args.memory:
        return memory(args.memory, args)
    found, begin = {}, time.monotonic()
    about = {k: getattr(args, k) for k in ("batch", "length", "scales", "repeats")}
    about |= {"torch": torch.__version__, "processor": processor(), "cores": os.cpu_count()}
    about |= {"load": os.getloadavg()[0], "memory_stays": os.environ.get("MALLOC_MMAP_THRESHOLD_", "")}
    print(
        f"{args.batch} signals x {args.length} samples x {args.scales} scales x 3 channels, output "
        f"{args.batch * 3 * args.scales * args.length * 4 / 1e6:.0f} MB; {about['processor']}, torch "
        f"{about['torch']}, {about['cores']} cores, load {about['load']:.1f}",
        flush=True,
    )
    if "methods" in args.only:
        found["methods"] = measure_methods(args)
        print_methods(found["methods"])
    if "day" in args.only:
        found["day_mb"] = in_own_process("a day", args)
        print(f"a day at 250 Hz encoded: {found['day_mb']:.0f} MB at the highest", flush=True)
    if "csv" in args.only:
        found["csv_s"] = csv_seconds()
        times = ", ".join(f"{name} {value:.2f} s" for name, value in found["csv_s"].items())
        print(f"csv, a million lines: {times}")
    print(f"measured in {time.monotonic() - begin:.0f} s")
    # A part alone does not stand beside numbers of another machine
    whole = ROOT / "bench" / "results" / "cwt.json" if set(args.only) == set(PARTS) else None
    if path := args.out or whole:
        atomic_write(path, json.dumps({"about": about, **found}, indent=1))


if __name__ == "__main__":
    main()
