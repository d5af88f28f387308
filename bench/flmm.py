"""flmm: what reading only the needed attention costs, what decoding phrases together saves, what the feature
cache saves.

    OMP_NUM_THREADS=1 python bench/flmm.py            # CPU, about three minutes
    python bench/flmm.py --gpu                        # the shapes of Qwen2.5-VL-3B and LLaVA-1.5-7B, bf16

Modes are interleaved within one process and the least of several rounds is kept; memory is measured in a
fresh process for each mode. Prints tables and writes bench/results/flmm.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from PIL import Image
from transformers import AutoModel, LlamaConfig, SamConfig, SamModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from bench.measure import added_peak_mb, processor
from common.checkpoint import atomic_write
from common.errors import UserError, run
from flmm.data.samples import SampleBuilder, caption_of_phrases
from flmm.data.scenes import make_scene
from flmm.models.attention_rows import NAME, AttentionRows, merge_rows, rows_attention
from flmm.models.flmm import FLMM, extract
from flmm.models.frozen_llava import FrozenLlava
from flmm.models.frozen_qwen import FrozenQwen
from flmm.models.mask_head.mask_decoder import UNetHead
from flmm.models.mask_head.mask_refiner import SAMImageEncoder, SAMWrapper
from flmm.models.tiny import tiny_model, tiny_sam, tiny_tokenizer

LAYERS, HEADS, TOKENS, ROWS, COLUMNS, WIDTH = 24, 16, 900, 32, 576, 1024


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of which the least time counts (default 5)"
    )
    parser.add_argument("--gpu", action="store_true", help="also the real configurations on an accelerator")
    # one mode in a process of its own
    parser.add_argument("--peak", choices=["eager", "rows", "sdpa"], help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "flmm.json", help="JSON to write"
    )
    return parser.parse_args()


def least(functions, rounds, clock=time.process_time):
    """{name: least seconds of `rounds` calls}, the functions taking turns; processor time, which a busy
    machine changes least."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return {name: min(values) for name, values in times.items()}


def wanted():
    """4 phrases of 8 rows each behind an image of 576 tokens."""
    rows = torch.arange(TOKENS - ROWS, TOKENS)
    return AttentionRows([rows], [torch.arange(ROWS) // (ROWS // 4)], [torch.arange(20, 20 + COLUMNS)])


def language_model():
    torch.manual_seed(0)
    return AutoModel.from_config(
        LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            vocab_size=64,
            max_position_embeddings=2048,
        )
    ).eval()


@torch.no_grad()
def forward(model, mode, ids):
    """One pass; returns per layer the (heads, phrases, columns) maps, None for plain SDPA."""
    model.set_attn_implementation({"rows": NAME}.get(mode, mode))
    want = wanted()
    if mode == "rows":
        model(input_ids=ids, use_cache=False, attention_rows=want)
        return [layer[0] for layer in want.maps]
    out = model(input_ids=ids, use_cache=False, output_attentions=mode == "eager")
    if mode == "eager":
        return [
            merge_rows(a[0][:, want.rows[0]][..., want.columns[0]], want.parts[0]) for a in out.attentions
        ]


def peak(mode):
    """Print the memory in MiB that one pass adds at its peak: run in a process of its own."""
    model, ids = (
        language_model(),
        torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1)),
    )
    forward(model, "sdpa", ids[:, :64])  # libraries load their buffers
    print(added_peak_mb(lambda: forward(model, mode, ids)))


def bench_rows(rounds):
    """Attention functions alone, the whole model, memory, and the largest difference from the full path."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, TOKENS, WIDTH // HEADS) for _ in range(3))
    causal = torch.full((TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1)[None, None]

    class Layer(torch.nn.Module):
        num_key_value_groups, is_causal = 1, True

    layer, scale = Layer().eval(), (WIDTH // HEADS) ** -0.5

    def eager():
        kept = [
            eager_attention_forward(layer, query, key, value, causal, scaling=scale)[1] for _ in range(LAYERS)
        ]
        want = wanted()
        return [merge_rows(a[0][:, want.rows[0]][..., want.columns[0]], want.parts[0]) for a in kept]

    def rows():
        want = wanted()
        for _ in range(LAYERS):
            rows_attention(layer, query, key, value, None, want, scaling=scale)

    def sdpa():
        for _ in range(LAYERS):
            sdpa_attention_forward(layer, query, key, value, None, scaling=scale)

    with torch.no_grad():
        alone = least({"eager": eager, "rows": rows, "sdpa": sdpa}, rounds)
    model, ids = (
        language_model(),
        torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1)),
    )
    difference = max(
        (a - b).abs().max().item() for a, b in zip(forward(model, "rows", ids), forward(model, "eager", ids))
    )
    whole = least(
        {m: lambda m=m: forward(model, m, ids) for m in ("eager", "rows", "sdpa")}, max(3, rounds - 2)
    )
    extra = {
        m: float(
            subprocess.run(
                [sys.executable, __file__, "--peak", m], check=True, capture_output=True, text=True
            ).stdout
        )
        for m in ("eager", "rows", "sdpa")
    }
    return {
        "attention_seconds": alone,
        "model_seconds": whole,
        "extra_MiB": extra,
        "largest_difference": difference,
        "attention_speedup": alone["eager"] / alone["rows"],
        "model_rows_over_sdpa": whole["rows"] / whole["sdpa"],
        "memory_ratio": extra["eager"] / extra["rows"],
    }


@torch.no_grad()
def bench_refiner(rounds, phrases=8):
    """k phrases of a picture: encoded once and decoded together, against one by one with encoding each
    time."""
    torch.manual_seed(0)
    # SAM-B, half the side
    sam = SamModel(SamConfig(vision_config={"image_size": 512}, prompt_encoder_config={"image_size": 512}))
    encoder, refiner = SAMImageEncoder(sam), SAMWrapper(sam, per_phrase_pad=True)
    image, generator = Image.fromarray(make_scene(0, 0, 256)["image"]), torch.Generator().manual_seed(0)
    coarse = torch.randn(phrases, 32, 32, generator=generator)
    words = [torch.randn(3, 256, generator=generator) for _ in range(phrases)]

    def embedding():
        """Of the picture, encoded anew: the encoder would find the one that it has kept."""
        encoder.kept.clear()
        return encoder([image])[0]

    def together():
        [(masks, _)] = refiner([embedding()], [(256, 256)], [coarse], [words])
        return masks

    def one_by_one():
        return torch.cat(
            [
                refiner([embedding()], [(256, 256)], [coarse[k : k + 1]], [[words[k]]])[0][0]
                for k in range(phrases)
            ]
        )

    difference = (together() - one_by_one()).abs().max().item()
    times = least({"together": together, "one_by_one": one_by_one}, min(2, rounds))
    return {
        "phrases": phrases,
        "seconds": times,
        "speedup": times["one_by_one"] / times["together"],
        "largest_difference": difference,
    }


def bench_cache(rounds, pictures=8):
    """One training step of a head: with the base and SAM's encoder, and from features."""
    tokenizer, sam = tiny_tokenizer(), tiny_sam()
    model = tiny_model("llava", tokenizer)
    base = FrozenLlava(
        model, tokenizer, FrozenLlava.make_processor(model.config, {}), template="plain", question="Describe."
    )
    encoder, head = (
        SAMImageEncoder(sam),
        FLMM(base.channels, 3, 128, sam, {"base_channels": 8, "upsample_input": 32}),
    )
    builder, scenes = SampleBuilder.of(base), [make_scene(0, i) for i in range(pictures)]
    samples = [
        builder({"image": Image.fromarray(s["image"]), "pieces": s["pieces"], "masks": s["masks"]})
        for s in scenes
    ]
    features = extract(base, encoder, samples)

    def step(given):
        head.compute_loss(head(given), [s["masks"] for s in samples])["loss"].backward()
        head.zero_grad()

    def live():
        encoder.kept.clear()  # as if the pictures were new
        step(extract(base, encoder, samples))

    times = least({"live": live, "cached": lambda: step(features)}, rounds)
    return {"pictures": pictures, "seconds": times, "speedup": times["live"] / times["cached"]}


@torch.no_grad()
def bench_head(rounds, phrases=4):
    """The mask head with its channels mixed before the maps are enlarged, against the other order."""
    out, own = {"phrases": phrases}, UNetHead.mixes_first
    for channels in (1024, 2048):
        torch.manual_seed(0)
        head, maps = UNetHead(channels).eval(), torch.rand(phrases, channels, 24, 24)
        logits = {}

        def whole(cheap, head=head, maps=maps, logits=logits):
            UNetHead.mixes_first = cheap
            with torch.no_grad():
                logits[cheap] = head(maps)

        seconds = least({"first": lambda: whole(True), "after": lambda: whole(False)}, rounds)
        difference = (logits[True] - logits[False]).abs().max() / logits[False].abs().max()
        out[channels] = {
            "seconds": seconds,
            "speedup": seconds["after"] / seconds["first"],
            "largest_difference": difference.item(),
        }
    UNetHead.mixes_first = own
    return out


def bench_gpu(rounds):
    """The published shapes with random weights: pictures/s and peak memory of rows against eager, and the
    largest picture."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    device, out, tokenizer = torch.accelerator.current_accelerator(), {}, tiny_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    qwen = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        ),
        vision_config=dict(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            patch_size=14,
            out_hidden_size=2048,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
        ),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    llava = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            vocab_size=32064,
        ),
        image_token_id=token("<image>"),
    )
    phrases = caption_of_phrases(["a red car", "the man in the blue shirt", "sky", "two small dogs"])
    for name, config, kind, architecture, sides in (
        (
            "Qwen2.5-VL-3B",
            qwen,
            FrozenQwen,
            Qwen2_5_VLForConditionalGeneration,
            (448, 896, 1344, 1792, 2688, 3584),
        ),
        ("LLaVA-1.5-7B", llava, FrozenLlava, LlavaForConditionalGeneration, (336,)),
    ):
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            model = architecture(config)
            torch.set_default_dtype(torch.float32)
        for mode in ("rows", "eager"):
            base = kind(
                model, tokenizer, kind.make_processor(config, {"max_pixels": 4096 * 4096}), attention=mode
            )
            for side in sides:
                sample = SampleBuilder.of(base)(
                    {"image": Image.new("RGB", (side, side), "grey"), "pieces": phrases}
                )
                torch.accelerator.empty_cache()
                torch.accelerator.reset_peak_memory_stats()
                try:
                    base([sample])
                    torch.accelerator.synchronize()
                    seconds = least(
                        {"pass": lambda b=base, s=sample: (b([s]), torch.accelerator.synchronize())},
                        rounds,
                        time.perf_counter,
                    )["pass"]
                except torch.OutOfMemoryError:
                    out[f"{name} {mode} {side}"] = "out of memory"
                    break
                out[f"{name} {mode} {side}"] = {
                    "pictures_per_s": 1 / seconds,
                    "peak_GiB": torch.accelerator.max_memory_allocated() / 2**30,
                }
        del model, base  # the next one needs the room
    return out


def main(args):
    if args.peak:
        return peak(args.peak)
    if args.gpu and not torch.accelerator.is_available():
        raise UserError("--gpu: no accelerator here; leave the option out")
    results = {
        "machine": {
            "cpu": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load": os.getloadavg()[0],
        },
        "rows": bench_rows(args.rounds),
        "refiner": bench_refiner(args.rounds),
        "cache": bench_cache(args.rounds),
        "head": bench_head(args.rounds),
    }
    rows, refiner, cache = results["rows"], results["refiner"], results["cache"]
    print(
        f"attention rows, {LAYERS} layers x {HEADS} heads x {TOKENS} tokens, {ROWS} rows x {COLUMNS} "
        "columns, "
        f"{torch.get_num_threads()} thread(s)"
    )
    print(f"{'':24}{'eager':>10}{'rows':>10}{'sdpa':>10}")
    for label, key, unit in (
        ("attention functions", "attention_seconds", "s"),
        ("whole model", "model_seconds", "s"),
        ("extra memory", "extra_MiB", "MiB"),
    ):
        print(
            f"{label:24}" + "".join(f"{rows[key][m]:>10.3g}" for m in ("eager", "rows", "sdpa")) + f"  {unit}"
        )
    print(
        f"rows against eager: attention {rows['attention_speedup']:.2f} x faster (claim: 3), "
        f"memory {rows['memory_ratio']:.1f} x less (claim: 8), difference {rows['largest_difference']:.1e} "
        "(claim: 1e-6); "
        f"whole model rows / sdpa {rows['model_rows_over_sdpa']:.3f} (claim: 1.05)"
    )
    print(
        f"refiner (SAM-B at 512 pixels), {refiner['phrases']} phrases: encoded once, decoded together "
        f"{refiner['speedup']:.2f} x faster "
        f"(claim: {0.8 * refiner['phrases']:.1f}), difference {refiner['largest_difference']:.1e}"
    )
    print(f"head training step: from the cache {cache['speedup']:.2f} x faster than with the tiny base")
    for channels in (1024, 2048):
        head = results["head"][channels]
        print(
            f"mask head at {channels} channels: channels mixed before the maps are enlarged "
            f"{head['speedup']:.2f} x faster, difference {head['largest_difference']:.1e} of the largest one"
        )
    if args.gpu:
        results["gpu"] = bench_gpu(args.rounds)
        for name, value in results["gpu"].items():
            print(
                f"{name}: "
                + (
                    value
                    if isinstance(value, str)
                    else f"{value['pictures_per_s']:.2f} pictures/s, peak {value['peak_GiB']:.1f} GiB"
                )
            )
    atomic_write(args.out, json.dumps(results, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main, parse_args())
