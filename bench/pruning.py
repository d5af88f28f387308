"""pruning: the scan by three methods, its memory at a large vocabulary, and pruning 8 B values in little RAM.

    python bench/pruning.py [--repeats 3] [--model path/to/llm] [--only real_vocabulary] [--out file]

scan       24 layers x 256, vocabulary 4096, 12 prompts of 9 to 30 tokens, v masked in every layer, float32.
           naive is upstream's way: one full forward pass for each layer and prompt, and the distance from two
           sets of logits.
real_vocabulary  the same on --model, a pretrained one, or at SmolLM2-135M's sizes, where output head and
           distances weigh as much as the layers; CPU seconds, and the memory that each scan adds.
memory     34 layers x 64 at vocabulary 153376: peak memory above that of the loaded model, with all
           log-probabilities of a prompt at once and in chunks.
prune      safetensors shards with openPangu-7B's shapes (8.03 B values, bfloat16, 16 GB, sparse files): peak
           memory and seconds of prune_llm.py.
real_size  only with an accelerator: 34 layers x 4096 in bfloat16, random weights; naive against wavefront,
           and the latency of 34, 28 and 17 layers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from bench.measure import added_peak_mb
from common.checkpoint import atomic_write
from common.errors import run
from common.llm import load_llm
from pruning.layers import without_layers
from pruning.pruning_tools.shards import NAMES
from pruning.sensitivity_analyse import scan_methods
from pruning.sensitivity_analyse.eval_metric import position_distances
from pruning.sensitivity_analyse.layer_mask import mask_attention_layer

LENGTHS = (9, 11, 12, 14, 16, 17, 19, 21, 23, 25, 28, 30)
PANGU = dict(
    vocab_size=153376,
    hidden_size=4096,
    intermediate_size=12800,
    num_hidden_layers=34,
    num_attention_heads=32,
    num_key_value_heads=8,
    attention_bias=True,
    tie_word_embeddings=False,
)


PARTS = ("scan", "real_vocabulary", "memory", "prune", "real_size")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--repeats", type=int, default=3, help="timed runs of each method; the fastest counts (default 3)"
    )
    p.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "pruning.json", help="JSON with the numbers"
    )
    p.add_argument(
        "--model",
        type=Path,
        help="a pretrained model's folder; default random weights of SmolLM2-135M's sizes",
    )
    p.add_argument("--only", choices=PARTS, help="measure this part alone, and keep the others of --out")
    p.add_argument(
        "--work", type=Path, help="folder for the synthetic checkpoint (sparse); default a temporary one"
    )
    # the child process of `memory`
    p.add_argument("--peak-memory", type=int, metavar="CHUNK", help=argparse.SUPPRESS)
    return p.parse_args(argv)


def make_model(layers, hidden, vocabulary, device="cpu", dtype=torch.float32, **config):
    torch.manual_seed(0)
    settings = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(4, hidden // 128),
        "num_key_value_heads": max(2, hidden // 512),
        "vocab_size": vocabulary,
        "attention_bias": True,
        **config,
    }
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(LlamaConfig(**settings)).eval()
        finally:
            torch.set_default_dtype(before)


def make_prompts(vocabulary, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [
        {"name": str(n), "input_ids": torch.randint(3, vocabulary, (1, n), generator=generator)}
        for n in lengths
    ]


def seconds(call, repeats, sync=lambda: None):
    times = []
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        call()
        sync()
        times.append(time.perf_counter() - start)
    return min(times)  # other work on the machine only ever adds


@torch.no_grad()
def upstream_scan(model, prompts):
    """{(prompt, layer): distance} the way upstream works."""
    base = [model(input_ids=p["input_ids"]).logits[0] for p in prompts]
    scores = {}
    for layer in range(len(model.model.layers)):
        enable_mask, disable_mask, restore = mask_attention_layer(model, layer, "v_only")
        enable_mask()
        for i, prompt in enumerate(prompts):
            logits = model(input_ids=prompt["input_ids"]).logits[0]
            scores[i, layer] = (
                position_distances(base[i].log_softmax(-1), logits.log_softmax(-1), "l1_mean").mean().item()
            )
        disable_mask()
        restore()
    return scores


def our_scan(model, prompts, variants, method, batch=1):
    records = []
    for first in range(0, len(prompts), batch):
        records += scan_methods.scan_batch(
            model, prompts[first : first + batch], variants, ("l1_mean",), method
        )
    return {
        (i, v["layer"]): v["l1_mean"]
        for i, r in enumerate(records)
        for v in r["variants"]
        if v["mode"] == "v"
    }


@torch.no_grad()
def real_vocabulary(repeats, folder=None):
    """The scan of a pretrained model, or at SmolLM2-135M's sizes: the fastest of `repeats`, and the most
    memory."""
    model = load_llm(folder, "float32") if folder else make_model(30, 576, 49152)
    prompts = make_prompts(model.config.vocab_size, (9, 19, 30))
    variants = [("v", layer, None) for layer in range(model.config.num_hidden_layers)]
    cases = {
        "naive (upstream)": lambda: upstream_scan(model, prompts),
        "wavefront": lambda: our_scan(model, prompts, variants, "wavefront"),
        "wavefront, all prompts in one batch": lambda: our_scan(model, prompts, variants, "wavefront", 3),
    }
    print(f"\nscan of {folder.name if folder else 'SmolLM2-135M at random'}, 3 prompts, best of {repeats}")
    spent, added = {}, {}
    for name, case in cases.items():
        times = []
        for _ in range(repeats):
            start = time.process_time()
            added[name] = max(added.get(name, 0), added_peak_mb(case))
            times.append(time.process_time() - start)
        spent[name] = min(times)
        faster = spent["naive (upstream)"] / spent[name]
        print(f"{name:38}{spent[name]:9.2f} CPU s{faster:9.2f}x{added[name]:9.0f} MB", flush=True)
    speedup = {name: spent["naive (upstream)"] / seconds for name, seconds in spent.items()}
    return {"cpu_seconds": spent, "speedup": speedup, "megabytes": added}


def scan_speed(repeats):
    model, prompts = make_model(24, 256, 4096), make_prompts(4096)
    variants = [("v", layer, None) for layer in range(24)]
    wide = scan_methods.list_variants(model, ["v"])
    cases = {
        "naive (upstream)": lambda: upstream_scan(model, prompts),
        "cached": lambda: our_scan(model, prompts, variants, "cached"),
        "cached, 4 prompts in one batch": lambda: our_scan(model, prompts, variants, "cached", 4),
        "wavefront": lambda: our_scan(model, prompts, variants, "wavefront"),
        "wavefront, 12 prompts in one batch": lambda: our_scan(model, prompts, variants, "wavefront", 12),
        "wavefront with leave-one-out": lambda: our_scan(model, prompts, wide, "wavefront"),
    }
    scores = {name: case() for name, case in cases.items()}
    rows, cpu = {}, {}
    for name, case in cases.items():
        start = time.process_time()
        rows[name] = seconds(case, repeats)
        # the clock counts others that use the machine too
        cpu[name] = (time.process_time() - start) / repeats
    reference = scores["naive (upstream)"]
    worst = {name: max(abs(s[k] - v) / v for k, v in reference.items()) for name, s in scores.items()}
    print(f"\nscan, 24 layers x 256, 12 prompts, {torch.get_num_threads()} thread(s), best of {repeats}")
    times = f"{'seconds':>9}{'speed-up':>10}{'CPU s':>9}{'speed-up':>10}"
    print(f"{'method':38}{times}{'largest relative difference':>30}")
    for name, spent in rows.items():
        faster, cpu_faster = (some["naive (upstream)"] / some[name] for some in (rows, cpu))
        times = f"{spent:9.2f}{faster:9.2f}x{cpu[name]:9.2f}{cpu_faster:9.2f}x"
        print(f"{name:38}{times}{worst[name]:30.1e}")
    return {
        "seconds": rows,
        "cpu_seconds": cpu,
        "speedup": {k: rows["naive (upstream)"] / v for k, v in rows.items()},
        "largest_relative_difference": worst,
    }


def peak_memory(chunk):
    """In a process of its own: peak memory of a wavefront at vocabulary 153376, above that of the loaded
    model; printed in MB."""
    scan_methods.CHUNK = chunk
    model, prompts = make_model(34, 64, PANGU["vocab_size"]), make_prompts(4096, (30,))
    print(
        added_peak_mb(
            lambda: scan_methods.scan_batch(
                model, prompts, [("v", i, None) for i in range(34)], ("l1_mean", "kl")
            )
        )
    )


def scan_memory():
    rows = {}
    for name, chunk in (("all at once", 1 << 40), ("in pieces of 32 MB", 1 << 23)):
        child = subprocess.run(
            [sys.executable, __file__, "--peak-memory", str(chunk)],
            capture_output=True,
            text=True,
            check=True,
        )
        rows[name] = float(child.stdout)
    print("\npeak memory of a scan above the loaded model, vocabulary 153376, 34 layers, prompt of 30 tokens")
    for name, value in rows.items():
        print(f"{name:38}{value:9.0f} MB")
    return {"megabytes": rows}


def pangu_shapes() -> dict:
    """{key: shape} of openPangu-Embedded-7B."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**PANGU))
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def write_sparse(folder: Path, shapes: dict, shards: int = 4):
    """safetensors shards of these shapes in bfloat16 that take no room on disk: headers, and holes for the
    values."""
    keys, weight_map = list(shapes), {}
    for number in range(shards):
        part = keys[number * len(keys) // shards : (number + 1) * len(keys) // shards]
        header, offset = {}, 0
        for key in part:
            size = 2 * torch.Size(shapes[key]).numel()
            header[key] = {
                "dtype": NAMES[torch.bfloat16],
                "shape": shapes[key],
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "PanguEmbedded",
                "architectures": ["PanguEmbeddedForCausalLM"],
                "bias": True,
                **{k: v for k, v in PANGU.items() if k != "attention_bias"},
            }
        )
    )


# Runs a script, then prints its peak memory: what the kernel tells a parent counts the parent's own, too
WITH_PEAK = """
import runpy, sys
from bench.measure import resident_mb
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(resident_mb("VmHWM"))
"""


def prune_big(work):
    rows = {}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        source = Path(folder).resolve() / "source"
        source.mkdir()
        write_sparse(source, pangu_shapes())
        for spec in ("23-28", "17-33"):
            start = time.perf_counter()
            script = ROOT / "pruning/pruning_tools/prune_llm.py"
            options = ["--ckpt", source, "--out-dir", source.parent / "out", "--drop-layers", spec]
            command = [sys.executable, "-c", WITH_PEAK, script, *options, "--overwrite"]
            done = subprocess.run(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"prune_llm.py --drop-layers {spec} failed")
            *_, what, peak = done.stdout.splitlines()
            rows[spec] = {
                "seconds": time.perf_counter() - start,
                "peak_megabytes": float(peak),
                "what": what.split(", in ")[0],
            }
    print("\npruning 8.03 B values (16.1 GB of bfloat16 shards, sparse) on disk")
    for row in rows.values():
        print(f"{row['what']:75}{row['seconds']:6.1f} s{row['peak_megabytes']:8.0f} MB peak")
    return rows


@torch.no_grad()
def real_size(
    device,
    repeats,
    layers=34,
    hidden=4096,
    vocabulary=153376,
    drops=((), range(23, 29), range(17, 34)),
    tokens=64,
):
    """Scan and latency at openPangu's sizes with random weights in bfloat16; smaller sizes exercise the same
    code elsewhere."""
    sync = getattr(torch, device.type).synchronize if device.type != "cpu" else (lambda: None)
    names = ("intermediate_size", "num_attention_heads", "num_key_value_heads") if hidden == 4096 else ()
    size = {name: PANGU[name] for name in names}
    model = make_model(layers, hidden, vocabulary, device, torch.bfloat16, **size)
    prompts = make_prompts(vocabulary)
    variants = [("v", layer, None) for layer in range(layers)]
    rows = {}
    for name, method, batch in (
        ("naive", "naive", 1),
        ("wavefront", "wavefront", 1),
        ("wavefront, 12 prompts in one batch", "wavefront", 12),
    ):

        def scan_all(method=method, batch=batch):
            for first in range(0, len(prompts), batch):
                scan_methods.scan_batch(
                    model, prompts[first : first + batch], variants, ("l1_mean", "kl"), method
                )

        scan_all()
        rows[name] = seconds(scan_all, repeats, sync)
        print(f"{name:38}{rows[name]:9.2f} s{rows['naive'] / rows[name]:9.1f}x")
    prompt = torch.randint(3, vocabulary, (1, 256), device=device)
    for drop in drops:
        with without_layers(model, drop):

            def generate():
                model.generate(
                    prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
                )

            generate()
            spent = seconds(generate, repeats, sync)
        rows[f"latency, {layers - len(drop)} layers"] = spent
        print(
            f"latency of {layers - len(drop)} layers, 256 + {tokens} tokens {spent:9.2f} s, "
            f"{tokens / spent:.0f} tokens/s"
        )
    return rows


def main(args):
    if args.peak_memory:
        return peak_memory(args.peak_memory)
    device = Accelerator().device
    measure = {
        "scan": lambda: scan_speed(args.repeats),
        "real_vocabulary": lambda: real_vocabulary(args.repeats, args.model),
        "memory": scan_memory,
        "prune": lambda: prune_big(args.work),
        "real_size": lambda: real_size(device, args.repeats),
    }
    results = json.loads(args.out.read_text()) if args.only and args.out.is_file() else {}
    results |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for part in [args.only] if args.only else PARTS:
        if part == "real_size" and device.type == "cpu":
            print("\nreal size: no accelerator here, not measured")
        else:
            results[part] = measure[part]()
    atomic_write(args.out, json.dumps(results, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main, parse_args())
