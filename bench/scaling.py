"""How time and memory grow with length, batch, phrases, layers and data-set size: slopes on logarithmic axes.

    python bench/scaling.py

A slope of 1 is growth in proportion, 2 is quadratic, 0 none. Every size runs in a fork of its own on one
thread: CPU seconds of a call (median of --repeats), and the memory that one call adds at its peak.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import h5py
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SamConfig, SamModel

from bench.measure import added_peak_mb
from common.checkpoint import atomic_write
from common.errors import run
from cwt_mae.model import cwt_wrap
from em_mllm.dataset import SignalFile
from em_mllm.em_foundation.models.configuration_em import SiTMAEConfig
from em_mllm.em_foundation.models.modeling_em import SiTMAEModelWithoutMask
from em_mllm.em_foundation.utils.utils import first_fit, pack_sequence, with_special_patches
from flmm.models.mask_head.mask_refiner import SAMWrapper
from pruning.sensitivity_analyse import layer_sensitivity_scan as scanner

ROOT = Path(__file__).resolve().parents[1]


def transform(length: int = 3000, batch: int = 8):
    x = torch.randn(batch, length)
    return lambda: cwt_wrap(x)


def encoder(points: int = 1024, signals: int = 16):
    """The packed IQ encoder, rows of 514 tokens."""
    config = SiTMAEConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        attention_type="sdpa",
    )
    model, rng = SiTMAEModelWithoutMask(config).eval(), np.random.default_rng(0)
    given = [with_special_patches(rng.standard_normal((points, 2)), 8, 20.0) for _ in range(signals)]
    rows = first_fit([s.shape[1] // 8 for s in given], 514)
    inputs = pack_sequence([[given[i] for i in row] for row in rows], 8, 514 * 8)
    return lambda: model(*inputs)


def refiner(phrases: int):
    """Mask decoding of the phrases of one picture that is encoded already."""
    refine = SAMWrapper(
        SamModel(
            SamConfig(
                vision_config={"image_size": 512, "num_hidden_layers": 1},
                prompt_encoder_config={"image_size": 512},
            )
        ),
        per_phrase_pad=True,
    )
    embedding, coarse = torch.randn(256, 32, 32), torch.randn(phrases, 32, 32)
    words = [torch.randn(3, 256) for _ in range(phrases)]
    return lambda: refine([embedding], [(256, 256)], [coarse], [words])


def scan(layers: int):
    """Wavefront scan of one prompt of 64 tokens: at layer i there are i + 1 variants, so quadratic is what
    can be had."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=512,
        )
    ).eval()
    prompt = {"name": "p", "input_ids": torch.arange(64)[None] % 512}
    variants = [("v", layer, None) for layer in range(layers)]
    return lambda: scanner.scan_batch(model, [prompt], variants, ("l1_mean",), "wavefront")


def signals(count: int):
    """200 random signals out of an .h5 of `count`."""
    with h5py.File("signals.h5", "w") as file:
        data = file.create_dataset("IQ_data", (count, 1024, 2), "f4")
        for start in range(0, count, 256):
            data[start : start + 256] = np.ones((min(256, count - start), 1024, 2), np.float32)
    file = SignalFile(Path("signals.h5"))
    return lambda: [file.read(i) for i in np.random.default_rng(0).integers(count, size=200)]


# (what grows, what is measured, its sizes, function of a size)
CASES = [
    ("signal length", "wavelet transform", (1500, 3000, 6000, 12000), lambda n: transform(length=n)),
    ("batch", "wavelet transform", (4, 8, 16, 32), lambda n: transform(batch=n)),
    ("signal length", "IQ encoder, packed", (256, 512, 1024, 2048, 4096), lambda n: encoder(points=n)),
    ("signals", "IQ encoder, packed", (16, 32, 64, 128), lambda n: encoder(signals=n)),
    ("phrases of a picture", "mask refiner", (2, 4, 8, 16), refiner),
    ("layers", "sensitivity scan, wavefront", (4, 8, 16, 32), scan),
    ("signals in the file", "reading 200 of them", (500, 1000, 2000, 4000, 8000), signals),
]


def measure(make, size: int, repeats: int, work) -> dict:
    """{"size", "seconds", "megabytes"} of one call of make(size), in a fork whose working directory is
    `work`."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.chdir(work)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        with torch.no_grad():
            call = make(size)
            megabytes, seconds = added_peak_mb(call), []
            for _ in range(repeats):
                start = time.process_time()
                call()
                seconds.append(time.process_time() - start)
        os.write(
            write,
            json.dumps({"size": size, "seconds": float(np.median(seconds)), "megabytes": megabytes}).encode(),
        )
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.wait()
    return json.loads(text)


def slope(rows, field: str) -> float:
    """Of the straight line through log(size), log(field); what is below 0.1 MB counts as that."""
    least = 0.1 if field == "megabytes" else 0.0
    return float(
        np.polyfit(np.log([r["size"] for r in rows]), np.log([max(r[field], least) for r in rows]), 1)[0]
    )


def main(args):
    table = []
    for grows, what, sizes, make in CASES:
        with tempfile.TemporaryDirectory() as work:
            rows = [measure(make, size, args.repeats, work) for size in sizes]
        table.append(
            {
                "grows": grows,
                "what": what,
                "rows": rows,
                "time": slope(rows, "seconds"),
                "memory": slope(rows, "megabytes"),
            }
        )
        print(f"{what}, {grows}: time ~ n^{table[-1]['time']:.2f}, memory ~ n^{table[-1]['memory']:.2f}")
        for row in rows:
            print(f"  {row['size']:>6}{1e3 * row['seconds']:>10.1f} ms{row['megabytes']:>10.1f} MB")
    atomic_write(args.out, json.dumps(table, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed calls at each size (default 5)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench/results/scaling.json", help="JSON with the numbers"
    )
    run(main, parser.parse_args())
