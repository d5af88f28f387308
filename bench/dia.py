"""Side-by-side measurements of dia_pangu against upstream's way of computing the same numbers.

    python bench/dia.py                 CPU: everything but the real model
    python bench/dia.py --gpu           on a GPU: the real sizes too (8 B model, random weights, bf16)

Prints a table and writes it as JSON. Both ways run in this process, on the same inputs, alternately; the
median counts, and the results are compared before anything is timed. Ratios depend little on the machine,
seconds do.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from torch import nn
from torch.nn import functional as F

from common.checkpoint import atomic_write
from common.errors import run
from common.llm import add_lora
from common.tiny_llm import make_tokenizer
from dia_pangu.src.Dataset.prompt import ReportText, status_text
from dia_pangu.src.Model.build import TINY
from dia_pangu.src.Model.multimodality_model import LORA, TRAINED, MultiPanguForCausalLM
from dia_pangu.src.Model.my_embedding_layer import MyEmbedding, lookup
from dia_pangu.src.Model.pangu import PanguEmbeddedConfig, PanguEmbeddedForCausalLM
from dia_pangu.src.Model.vit_3d import Attention, Transformer

PANGU = dict(
    vocab_size=153376,
    hidden_size=4096,
    intermediate_size=12800,
    num_hidden_layers=34,
    num_attention_heads=32,
    num_key_value_heads=8,
    bias=True,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
    rope_theta=16000000.0,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=45892,
)
TINY_LLM = dict(
    PANGU,
    vocab_size=700,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=2,
)
WIDE_LLM = dict(PANGU, vocab_size=1000, num_hidden_layers=1, eos_token_id=2)
# about 100 words
REPORT = "A small right pleural effusion is present. The heart is of normal size. No fracture is seen. " * 5


def medians(first, second, rounds: int) -> tuple[float, float]:
    """Median seconds of two functions that take turns."""
    times = [[], []]
    for _ in range(rounds + 1):
        for function, kept in zip((first, second), times):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            kept.append(time.perf_counter() - start)
    # the first round warms up, unless it is the only one
    return tuple(statistics.median(kept[1:] or kept) for kept in times)


def allocated(function) -> int:
    """Bytes that `function` asks of the CPU allocator."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    return sum(max(0, event.self_cpu_memory_usage) for event in seen.key_averages())


def embedding(rounds: int, width: int = 64):
    """Rows by lookup against one_hot(ids) @ [weight; image rows] (upstream), V = 153376, 512 ids, batch 2."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(153376, width, generator=generator)
    extra = torch.randn(2, 34, width, generator=generator)
    ids = torch.randint(0, 153376 + 34, (2, 512), generator=generator)

    def one_hot():
        table = torch.cat((weight.expand(2, -1, -1), extra), dim=1)
        return F.one_hot(ids, table.shape[1]).to(table) @ table

    assert torch.equal(one_hot(), lookup(weight, extra, ids))
    slow, fast = medians(one_hot, lambda: lookup(weight, extra, ids), rounds)
    memory = {
        v: allocated(lambda v=v: lookup(weight[:v], extra, ids.clamp(max=v + 33))) for v in (16000, 153376)
    }
    assert 0 < memory[16000] == memory[153376] < allocated(one_hot) / 100, memory
    return (
        slow,
        fast,
        f"bit-equal; width {width}; {memory[153376] / 1e6:.1f} MB at V = 16,000 and at V = 153,376",
    )


def pooling(rounds: int):
    """Finding features by one matmul against the (14, 1024, 768) product, batch 2."""
    tokens, weights = torch.randn(2, 1024, 768), torch.randn(14, 1024).softmax(-1)
    slow_way = lambda: (weights[None, :, :, None] * tokens[:, None]).sum(2)
    assert torch.allclose(slow_way(), weights @ tokens, atol=1e-5)
    return *medians(slow_way, lambda: weights @ tokens, rounds), "batch 2"


class WrittenOut(Attention):
    """Upstream's attention: scores, softmax and weights as tensors of their own."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


def vit(rounds: int, depth: int = 2):
    """Real-width ViT blocks on 1024 tokens."""
    ours = Transformer(768, depth, 8, 64, 2048).eval()
    theirs = Transformer(768, depth, 8, 64, 2048).eval()
    for attention, _ in theirs.layers:
        attention.fn.__class__ = WrittenOut
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 1024, 768)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-4)
        return *medians(lambda: theirs(x), lambda: ours(x), rounds), f"{depth} of 12 blocks, 1024 tokens"


def vit_passes(rounds: int):
    """Diagnosis and visual tokens of one report: two ViT passes against one."""
    layer = MyEmbedding(num_embeddings=8, embedding_dim=64, vit={"depth": 2}).eval()
    volume, ids = torch.rand(1, 1, 3, 256, 256, 64), torch.tensor([[1, 2, 3]])

    def twice():
        layer(volume, mode="cls")
        layer(volume, text_input=ids)

    def once():
        tokens = layer.encode(volume)
        layer(tokens=tokens, mode="cls")
        layer(text_input=ids, tokens=tokens)

    with torch.no_grad():
        return *medians(twice, once, rounds), "2 of 12 blocks, 256 x 256 x 64 voxels"


def make_model(llm_config: dict, embedding: dict, lora: bool):
    llm = PanguEmbeddedForCausalLM(PanguEmbeddedConfig(**llm_config))
    layer = MyEmbedding(num_embeddings=1, embedding_dim=llm_config["hidden_size"], **embedding)
    layer.weight = nn.Parameter(
        torch.empty(llm_config["vocab_size"], llm_config["hidden_size"], device="meta")
    )
    return MultiPanguForCausalLM(add_lora(llm, **LORA) if lora else llm, layer)


def batch_of(text: ReportText, shape, length=None, size: int = 1, device="cpu", dtype=torch.float32) -> dict:
    samples = [text.sample([0] * 14, REPORT) for _ in range(size)]
    batch = {key: value.to(device) for key, value in text.pad(samples, length=length).items()}
    return {
        **batch,
        "vision_x": torch.rand((size, 1, 3, *shape), device=device, dtype=dtype),
        "cls_labels": torch.zeros(size, 14, dtype=torch.long, device=device),
    }


def training_step(model, batch):
    model(**batch)["loss"].backward()
    model.zero_grad()


def tokenizer():
    return make_tokenizer([status_text([i % 2] * 14, "en") + " " + REPORT for i in range(3)], 700)


def step(config: dict, size: int, rounds: int):
    """Forward and backward of stage ft, text padded to 2048 as upstream against the batch's own length."""
    model = make_model(config, TINY["embedding"], lora=True)
    model.set_trained(TRAINED["ft"])
    model.train()
    text = ReportText(tokenizer(), config["vocab_size"], TINY["embedding"]["perceiver_num"])
    padded, fitted = (batch_of(text, TINY["grid"]["size"], length, size) for length in (2048, None))
    times = medians(partial(training_step, model, padded), partial(training_step, model, fitted), rounds)
    return *times, f"{fitted['lang_x'].shape[1]} tokens instead of 2048"


@torch.no_grad()
def generation(new_tokens: int):
    """Greedy reports, batch 8 with KV cache against one by one without; seconds per report."""
    model = make_model(TINY_LLM, TINY["embedding"], lora=False).eval()
    text = ReportText(tokenizer(), 700, TINY["embedding"]["perceiver_num"])
    tokens = model.encode(torch.rand(8, 1, 3, *TINY["grid"]["size"]))
    prompt = text.pad([text.sample([0] * 14)] * 8, left=True)
    options = {
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    start = time.perf_counter()
    together = model.generate(prompt["lang_x"], prompt["attention_mask"], tokens, **options)
    fast = (time.perf_counter() - start) / 8
    start = time.perf_counter()
    alone = model.generate(
        prompt["lang_x"][:1], prompt["attention_mask"][:1], tokens[:1], use_cache=False, **options
    )
    slow = time.perf_counter() - start
    assert torch.equal(together[:1], alone)
    return (
        slow,
        fast,
        f"{new_tokens} tokens, {new_tokens / slow:.0f} against {new_tokens / fast:.0f} tokens/s; same tokens",
    )


def real_sizes() -> list[dict]:
    """Step time and peak memory of both stages and one report's latency at the published sizes, bf16, random
    weights."""
    rows = []
    for stage in ("pre", "ft"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        rows += real_stage(stage)
    return rows


def real_stage(stage: str) -> list[dict]:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = make_model(PANGU, {}, lora=stage == "ft")
    torch.set_default_dtype(torch.float32)
    model.set_trained(TRAINED[stage])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or (
            name.startswith("embedding_layer.") and name != "embedding_layer.weight"
        ):
            parameter.data = parameter.data.float()
    model.lang_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    batch = batch_of(ReportText(tokenizer(), PANGU["vocab_size"], 32), (256, 256, 64), None, 1, "cuda")
    model.train()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    def report():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            tokens = model.encode(batch["vision_x"])
            model.diagnose(tokens)
            model.generate(
                batch["lang_x"],
                batch["attention_mask"],
                tokens,
                max_new_tokens=300,
                min_new_tokens=300,
                do_sample=False,
                pad_token_id=0,
            )

    rows = [
        {
            "what": f"real sizes, stage {stage}, one sample a step",
            "seconds": medians(step, step, 5)[1],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "note": f"{batch['lang_x'].shape[1]} tokens",
        }
    ]
    if stage == "ft":
        model.eval()
        model.lang_model.gradient_checkpointing_disable()
        rows.append(
            {
                "what": "real sizes, one report of 300 tokens",
                "seconds": medians(report, report, 1)[1],
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                "note": "ViT once, KV cache",
            }
        )
    return rows


def main(args):
    torch.manual_seed(0)
    few = max(2, args.rounds // 2)
    # a minute on one core
    cases = {
        "embedding step": partial(embedding, args.rounds),
        "finding pooling": partial(pooling, args.rounds),
        "ViT blocks": partial(vit, args.rounds),
        "ViT passes of a report": partial(vit_passes, few),
        "generation, per report": partial(generation, args.new_tokens),
        "training step, tiny, batch 4": partial(step, TINY_LLM, 4, few),
        "training step, one layer of openPangu's width": partial(step, WIDE_LLM, 1, 0),
    }
    rows = []
    print(f"{'what':48s} {'upstream s':>11s} {'here s':>11s} {'ratio':>8s}")
    for name, case in cases.items():
        slow, fast, note = case()
        rows.append({"what": name, "upstream_s": slow, "here_s": fast, "ratio": slow / fast, "note": note})
        print(f"{name:48s} {slow:11.5f} {fast:11.5f} {slow / fast:8.1f}  {note}", flush=True)
    real = []
    if args.gpu:
        real = real_sizes()
        for row in real:
            print(
                f"{row['what']:48s} {row['seconds']:11.3f} s, peak {row['peak_gib']:.1f} GiB; {row['note']}"
            )
    else:
        print("real sizes: not measured here (needs a GPU and --gpu)")
    content = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows, "real": real}
    atomic_write(args.out, json.dumps(content, indent=1))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        default=str(Path(__file__).resolve().parent / "results" / "dia.json"),
        help="JSON file to write",
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=300, help="of the generation (default %(default)s)")
    parser.add_argument(
        "--gpu", action="store_true", help="measure the real sizes too; needs a GPU with 80 GB"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args())
