"""The steps of bench/gpu.py: each builds its models straight on the device, measures, and prints one line a
row.

The rooms' own modules do the work and are imported inside each step, so that a step whose room has changed
fails alone. Only the baselines are written here. With `dry` every size is tiny and the device is the CPU.
"""

import contextlib
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from bench.gpu_shapes import FM9G, LLAVA_TEXT, PANGU, QWEN_TEXT, QWEN_VISION, TINY_EMBEDDING, smaller

ROOT = Path(__file__).resolve().parents[1]
# Dense bfloat16 FLOP/s that the makers publish, by a part of the card's name; the longer name is looked for
# first.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}


# ---- measuring


def emit(what, value, unit, baseline=None, baseline_value=None, ratio=None, goal=None, reached=None, note=""):
    """Print a row for bench/gpu.py: `value` of `what`, beside `baseline_value` of the way that `baseline`
    names."""
    row = {
        "what": what,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "baseline_value": baseline_value,
        "ratio": ratio,
        "goal": goal,
        "reached": None if reached is None else bool(reached),
        "note": note,
    }
    print("ROW " + json.dumps(row), flush=True)


def device_of(dry: bool) -> torch.device:
    """The CUDA device; the CPU in a dry run. RuntimeError where a real run finds no GPU."""
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device here; --dry-run exercises the code on the CPU")
    return torch.device("cuda")


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device):
    """Give memory back between two parts; the caller has dropped its own references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(work, device, repeats: int = 3, warm: int = 1) -> float:
    """Median seconds of `work`() by CUDA events (on the CPU by the clock), after `warm` calls that do not
    count."""
    for _ in range(warm):
        work()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def start_peak(device) -> int:
    """Begin a new peak; returns the bytes that are allocated now."""
    free(device)
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_gib(device, before: int = 0) -> float:
    """GiB at the highest since `start_peak`, above `before`; 0 on the CPU, where nobody counts."""
    return (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else 0.0


def measure(work, device, repeats: int = 3, warm: int = 1) -> dict:
    """Seconds, peak and extra memory of `work`(); "out of memory" instead of seconds where the card is too
    small."""
    before, seconds = start_peak(device), None
    with contextlib.suppress(torch.OutOfMemoryError):
        seconds = timed(work, device, repeats, warm)
    if seconds is None:
        free(device)  # only now, when the exception no longer holds the frames
        return {"seconds": None, "peak": None, "extra": None, "note": "out of memory"}
    return {"seconds": seconds, "peak": peak_gib(device), "extra": peak_gib(device, before), "note": ""}


def compare(what, ours, theirs, baseline, unit="s", key="seconds", goal=None, least=None, note=""):
    """Emit ours[key] beside theirs[key] with the ratio theirs / ours, which `least` says how large it
    should be."""
    ratio = theirs[key] / ours[key] if theirs[key] and ours[key] else None
    reached = None if least is None else ratio is not None and ratio >= least
    notes = "; ".join(
        n for n in (note, theirs["note"] and f"{baseline}: {theirs['note']}", ours["note"]) if n
    )
    emit(what, ours[key], unit, baseline, theirs[key], ratio, goal, reached, notes)


@contextlib.contextmanager
def building(device, dtype):
    """Modules built inside have their weights made on `device` in `dtype`: nothing large ever lies on the
    CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16)


def relative(a, b) -> float:
    """Distance of two tensors in parts of the second one's norm."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def published_peak(device) -> float | None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def matmul_rate(device, dry) -> float:
    """FLOP/s of a large bfloat16 matrix product on random data."""
    side = 256 if dry else 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / timed(lambda: a @ b, device, 10, 3)


def emit_mfu(what, flop, seconds, device, dry, note):
    """Model FLOPs utilisation: FLOP that the mathematics need, over seconds, over the card's published
    peak."""
    peak, measured = published_peak(device), matmul_rate(device, dry)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    divisor, source = (peak, f"published dense bf16 of {name}") if peak else (measured, "measured matmul")
    rate, share = flop / seconds, 100 * flop / seconds / divisor
    notes = [
        f"{rate / 1e12:.0f} of {divisor / 1e12:.0f} TFLOP/s ({source})",
        f"{100 * rate / measured:.0f} % of a measured 8192^3 matmul ({measured / 1e12:.0f} TFLOP/s)",
        note,
    ]
    emit(what, share, "%", goal=">= 45 %", reached=share >= 45, note="; ".join(notes))


def decoder_flop(config, tokens: int, length: int, head_tokens: int) -> float:
    """FLOP of forward, and of backward to the activations only, of a frozen decoder on `tokens` in rows of
    `length`.

    Four a weight and token (weights under LoRA get no gradient; what checkpointing computes again does not
    count), the head for `head_tokens`, and causal attention: 2 n d forward for a layer and token, twice
    that backward.
    """
    width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    kv = width // heads * config["num_key_value_heads"]
    weights = layers * (2 * width * width + 2 * width * kv + 3 * width * config["intermediate_size"])
    attention = 6 * length * width * layers * tokens
    return 4.0 * weights * tokens + 4.0 * width * config["vocab_size"] * head_tokens + attention


def float_trained(model, also=()):
    """Keep what is trained, and parameters whose names begin with one of `also`, in float32."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name.startswith(tuple(also)):
            parameter.data = parameter.data.float()


# ---- dia_pangu


def one_hot_lookup(weight, extra, ids):
    """Upstream's embedding step: a one-hot matrix times a copy of the table for each sample."""
    table = torch.cat((weight.expand(len(extra), -1, -1), extra), dim=1)
    return F.one_hot(ids, table.shape[1]).to(table) @ table


def report_batch(size, length, padded, vocabulary, rows, grid, device) -> dict:
    """Reports of `length` tokens, image rows first, labels on the last 40 %, padded on the right to
    `padded`."""
    ids = torch.randint(3, vocabulary, (size, padded), device=device)
    ids[:, : rows + 2] = torch.arange(vocabulary, vocabulary + rows + 2, device=device)
    real = (torch.arange(padded, device=device) < length).expand(size, -1)
    ids = torch.where(real, ids, 0)
    labels = torch.where(real & (torch.arange(padded, device=device) >= int(0.6 * length)), ids, -100)
    return {
        "lang_x": ids,
        "attention_mask": real.long(),
        "labels": labels,
        "cls_labels": torch.randint(0, 2, (size, 14), device=device),
        "vision_x": torch.rand(size, 1, 3, *grid, device=device),
    }


def dia(dry):
    """One training step of stage ft and generation at openPangu-7B's size."""
    from common.llm import add_lora
    from dia_pangu.src.Model import my_embedding_layer
    from dia_pangu.src.Model.multimodality_model import LORA, TRAINED, MultiPanguForCausalLM
    from dia_pangu.src.Model.pangu import PanguEmbeddedConfig, PanguEmbeddedForCausalLM

    device, shape = device_of(dry), smaller(PANGU) if dry else PANGU
    length, padded, grid = (96, 160, (64, 64, 16)) if dry else (512, 2048, (256, 256, 64))
    vocabulary, rows = shape["vocab_size"], 8 if dry else 32
    torch.manual_seed(0)
    with building(device, torch.bfloat16):
        llm = PanguEmbeddedForCausalLM(PanguEmbeddedConfig(**shape))
        layer = my_embedding_layer.MyEmbedding(
            num_embeddings=1, embedding_dim=shape["hidden_size"], **(TINY_EMBEDDING if dry else {})
        )
    layer.weight = torch.nn.Parameter(torch.empty(vocabulary, shape["hidden_size"], device="meta"))
    model = MultiPanguForCausalLM(add_lora(llm, **LORA), layer)
    model.set_trained(TRAINED["ft"])
    float_trained(model)
    for name, parameter in model.embedding_layer.named_parameters():
        if name != "weight":  # the word table is the language model's and stays in bfloat16
            parameter.data = parameter.data.float()
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    model.lang_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()

    def step(batch):
        with autocast(device):
            loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def batch_of(size, width):
        return report_batch(size, length, width, vocabulary, rows, grid, device)

    # The same reports both ways: the text is cut to the batch's own length, or padded and looked up as
    # upstream does.
    size = 2
    fitted, wide = batch_of(size, length), batch_of(size, padded)
    for key in ("lang_x", "labels"):
        wide[key][:, :length] = fitted[key]
    wide["vision_x"], wide["cls_labels"] = fitted["vision_x"], fitted["cls_labels"]
    ours = measure(lambda: step(fitted), device)
    own_lookup = my_embedding_layer.lookup
    my_embedding_layer.lookup = one_hot_lookup
    try:
        theirs = measure(lambda: step(wide), device, repeats=2)
    finally:
        my_embedding_layer.lookup = own_lookup
    upstream = f"padding to {padded} and one-hot lookup"
    note = f"{size} reports of {length} tokens, LoRA, checkpointing"
    compare("dia_pangu, training step", ours, theirs, upstream, note=note)
    compare("dia_pangu, training step, peak memory", ours, theirs, upstream, "GiB", "peak", note=note)
    model.eval()  # without dropout both ways must give one loss
    with torch.no_grad(), autocast(device):
        one = model(**fitted)["loss"].item()
        my_embedding_layer.lookup = one_hot_lookup
        try:
            two = model(**wide)["loss"].item()
        except torch.OutOfMemoryError:
            two = None
        finally:
            my_embedding_layer.lookup = own_lookup
    emit("dia_pangu, loss", one, "", upstream, two, None if two is None else two / one)
    model.train()
    wide = None
    free(device)

    # The largest of these batches that fits gives tokens a second and MFU.
    for size in (2,) if dry else (16, 8, 4):
        batch = batch_of(size, length)
        large = measure(lambda batch=batch: step(batch), device)
        batch = None
        if large["seconds"]:
            break
    if large["seconds"]:
        tokens = size * length
        emit(f"dia_pangu, training step of {size} reports", large["seconds"], "s", note=f"{tokens} tokens")
        emit("dia_pangu, training, peak memory", large["peak"], "GiB", note=f"{size} reports")
        emit("dia_pangu, training", tokens / large["seconds"], "tokens/s")
        vision = sum(p.numel() for p in layer.vision_encoder.transformer.parameters())
        flop = decoder_flop(shape, tokens, length, tokens) + 6.0 * vision * layer.n_tok * size
        emit_mfu(
            "dia_pangu, MFU of the training step",
            flop,
            large["seconds"],
            device,
            dry,
            "4 FLOP a frozen weight and token, 6 a trained one of the ViT; recomputation not counted",
        )
    optimizer.zero_grad(set_to_none=True)
    free(device)

    # Reports: eight at once with a key-value cache, against one after the other, as upstream.
    model.eval()
    model.lang_model.gradient_checkpointing_disable()
    new, prompts = (4, 2) if dry else (64, 8)
    batch = batch_of(prompts, 256 if not dry else length)
    options = dict(min_new_tokens=new, max_new_tokens=new, do_sample=False, pad_token_id=0)

    @torch.no_grad()
    def write(count, **more):
        with autocast(device):
            tokens = model.encode(batch["vision_x"][:count])
            mask = torch.ones_like(batch["lang_x"][:count])
            return model.generate(batch["lang_x"][:count], mask, tokens, **options, **more)

    write(1, use_cache=True)  # warm-up
    together = measure(lambda: write(prompts, use_cache=True), device, repeats=1, warm=0)
    alone = measure(lambda: write(1, use_cache=True), device, repeats=1, warm=0)
    for row, count in ((together, prompts), (alone, 1)):
        row["per_report"] = row["seconds"] and row["seconds"] / count
    emit(f"dia_pangu, generation, batch {prompts}", prompts * new / together["seconds"], "tokens/s")
    emit("dia_pangu, generation, peak memory", together["peak"], "GiB")
    compare(
        "dia_pangu, generation, a report",
        together,
        alone,
        "one by one",
        key="per_report",
        note=f"{new} new tokens",
    )


# ---- em_mllm


def em(dry):
    """One LoRA step and generation of em_mllm at FM9G-4B's size."""
    from transformers import GraniteForCausalLM

    from em_mllm.em_foundation.models import SiTMAEConfig, SiTMAEModelWithoutMask
    from em_mllm.fm9g import granite_config
    from em_mllm.model import MultiModalModel, set_trainable

    device, shape = device_of(dry), smaller(FM9G) if dry else FM9G
    length, points = (48, 256) if dry else (256, 1024)
    encoder = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    with building(device, torch.bfloat16):
        llm = GraniteForCausalLM(granite_config(shape))
    with building(device, torch.float32):
        signals = SiTMAEModelWithoutMask(SiTMAEConfig(attention_type="sdpa", **(encoder if dry else {})))
    model = MultiModalModel(llm, signals, "linear", 3, 4).to(device)
    set_trainable(model, freeze_llm=False, freeze_signal_encoder=True, use_lora=True)
    float_trained(model)
    model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.llm.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def batch_of(size, width):
        text = torch.randint(10, shape["vocab_size"], (size, width), device=device)
        places = torch.arange(width, device=device)
        return {
            "iq": torch.randn(size, points, 2, device=device) / 4,
            "fs": torch.full((size,), 20e6, device=device),
            "input_ids": torch.where(places < length, text, 0),
            "attention_mask": (places < length).long().expand(size, -1).contiguous(),
            "labels": torch.where((places >= length - 16) & (places < length), text, -100),
        }

    def step(batch, **options):
        model.train()
        with autocast(device):
            loss = model(**batch, **options)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # The starter kit pads the text to a fixed length and computes every logit, with a loss on question and
    # padding too.
    size = 2 if dry else 8
    batch, kit = batch_of(size, length), batch_of(size, 4 * length)
    kit["attention_mask"] = torch.ones_like(kit["attention_mask"])
    kit["labels"] = kit["input_ids"]
    ours = measure(lambda: step(batch), device)
    theirs = measure(lambda: step(kit, all_logits=True), device, repeats=2)
    way = f"text padded to {4 * length}, all logits"
    note = f"{size} questions of {length} tokens and {points // 8} signal vectors, LoRA, checkpointing"
    compare("em_mllm, LoRA step", ours, theirs, way, note=note)
    compare("em_mllm, LoRA step, peak memory", ours, theirs, way, "GiB", "peak", note=note)
    kit = None
    free(device)

    for size in (2,) if dry else (32, 16):
        batch = batch_of(size, length)
        large = measure(lambda batch=batch: step(batch), device)
        if large["seconds"]:
            break
    if large["seconds"]:
        row = length + points // 8 + 2
        emit(f"em_mllm, LoRA step of {size} questions", large["seconds"], "s", note=f"{size * row} tokens")
        emit("em_mllm, training, peak memory", large["peak"], "GiB", note=f"{size} questions")
        emit("em_mllm, training", size * row / large["seconds"], "tokens/s")
        encoder_weights = sum(p.numel() for p in signals.encoder.parameters())
        flop = decoder_flop(shape, size * row, row, size * 16) + 2.0 * encoder_weights * size * points / 8
        emit_mfu(
            "em_mllm, MFU of the LoRA step",
            flop,
            large["seconds"],
            device,
            dry,
            "4 FLOP a frozen weight and token; recomputation not counted; logits only where a label is",
        )
    optimizer.zero_grad(set_to_none=True)
    free(device)

    # Answers: eight at once with a cache, against one by one running the whole prefix again for each token.
    model.eval()
    model.llm.gradient_checkpointing_disable()
    count, new, slow_new = (2, 4, 2) if dry else (8, 64, 8)
    batch = batch_of(count, length)
    prompt = {key: batch[key] for key in ("iq", "fs", "input_ids", "attention_mask")}

    @torch.no_grad()
    def answer(tokens):
        with autocast(device):
            return model.generate(
                **prompt,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                use_cache=True,
            )

    @torch.no_grad()
    def run_prefix_again():
        ids = prompt["input_ids"][:1]
        for _ in range(slow_new):
            with autocast(device):
                logits = model(prompt["iq"][:1], ids, torch.ones_like(ids), fs=prompt["fs"][:1])["logits"]
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)

    answer(2)
    together = measure(lambda: answer(new), device, repeats=1, warm=0)
    alone = measure(run_prefix_again, device, repeats=1, warm=1)
    together["token"], alone["token"] = together["seconds"] / new / count, alone["seconds"] / slow_new
    emit(f"em_mllm, generation, batch {count}", 1 / together["token"], "tokens/s", note=f"{new} new tokens")
    emit("em_mllm, generation, peak memory", together["peak"], "GiB")
    compare("em_mllm, generation, a token", together, alone, "one by one, prefix again", key="token")


# ---- flmm


def flmm(dry):
    """Attention rows of the two published shapes against eager and SDPA, and a head's training step from
    the cache."""
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    from flmm.models.frozen_llava import FrozenLlava
    from flmm.models.frozen_qwen import FrozenQwen
    from flmm.models.tiny import tiny_model, tiny_tokenizer

    device, tokenizer = device_of(dry), tiny_tokenizer()
    token = tokenizer.convert_tokens_to_ids

    def qwen():
        names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
        ids = {f"{name}_token_id": token(text) for name, text in names.items()}
        ids |= {f"vision_{end}_token_id": token(f"<|vision_{end}|>") for end in ("start", "end")}
        config = Qwen2_5_VLConfig(
            text_config=QWEN_TEXT, vision_config=QWEN_VISION, tie_word_embeddings=True, **ids
        )
        return Qwen2_5_VLForConditionalGeneration(config)

    def llava():
        text = LlamaConfig(**LLAVA_TEXT)
        return LlavaForConditionalGeneration(LlavaConfig(text_config=text, image_token_id=token("<image>")))

    def build(family):
        if dry:
            return tiny_model(family, tokenizer)
        with building(device, torch.bfloat16):
            return {"qwen": qwen, "llava": llava}[family]()

    torch.manual_seed(0)
    model = build("qwen")
    for side in (32, 64) if dry else (448, 896, 1344):
        rows_against_eager("Qwen2.5-VL-3B", FrozenQwen, model, tokenizer, side, device)
    head_from_cache(FrozenQwen, model, tokenizer, 64 if dry else 896, device, dry)
    del model
    free(device)
    rows_against_eager("LLaVA-1.5-7B", FrozenLlava, build("llava"), tokenizer, 64 if dry else 336, device)


def rows_against_eager(name, kind, model, tokenizer, side, device):
    """Emit time and extra memory of one forward pass that keeps the phrase rows, against eager, and against
    plain SDPA."""
    import numpy as np
    from PIL import Image

    from flmm.data.samples import SampleBuilder, caption_of_phrases

    phrases = caption_of_phrases(["a red car", "the man in the blue shirt", "sky", "two small dogs"])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))
    processor = kind.make_processor(model.config, {})
    found, maps = {}, {}
    for mode in ("rows", "eager", "sdpa"):
        if mode != "sdpa":
            base = kind(model, tokenizer, processor, attention=mode)
            sample = SampleBuilder.of(base)({"image": picture, "pieces": phrases})
            found[mode] = measure(lambda base=base, sample=sample: base([sample]), device)
            if found[mode]["seconds"]:
                maps[mode] = base([sample])[0]["mask_attentions"]
        else:  # the same pass without anything kept
            model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
            inputs = base.batch([sample])[0]

            @torch.no_grad()
            def plain(inputs=inputs):
                model.model(**inputs)

            found[mode] = measure(plain, device)
    tokens = inputs["input_ids"].shape[1]
    what, rows = f"flmm, {name}, {side} pixels", found["rows"]
    compare(f"{what}, rows", rows, found["eager"], "eager, full matrices", note=f"{tokens} tokens")
    compare(
        f"{what}, rows, extra memory",
        rows,
        found["eager"],
        "eager, full matrices",
        "GiB",
        "extra",
        goal=">= 8 x less",
        least=8,
    )
    ratio = (
        rows["seconds"] / found["sdpa"]["seconds"] if rows["seconds"] and found["sdpa"]["seconds"] else None
    )
    emit(
        f"{what}, rows over SDPA",
        rows["seconds"],
        "s",
        "SDPA, nothing kept",
        found["sdpa"]["seconds"],
        ratio,
        "ratio <= 1.2",
        ratio is not None and ratio <= 1.2,
        "ratio is ours / baseline",
    )
    if len(maps) == 2:
        emit(f"{what}, difference of the maps", relative(maps["rows"], maps["eager"]), "of norm")


def head_from_cache(kind, model, tokenizer, side, device, dry):
    """Emit the training step of a head from cached features against running base and SAM encoder for each
    step."""
    import numpy as np
    from PIL import Image
    from transformers import SamConfig, SamModel

    from flmm.data.samples import SampleBuilder, caption_of_phrases
    from flmm.models.flmm import FLMM, extract
    from flmm.models.mask_head.mask_refiner import SAMImageEncoder
    from flmm.models.tiny import tiny_sam

    base = kind(model, tokenizer, kind.make_processor(model.config, {}))
    with building(device, torch.float32):
        sam = tiny_sam() if dry else SamModel(SamConfig())
    encoder = SAMImageEncoder(sam)
    head = FLMM(base.channels, base.num_layers, base.hidden_size, sam, {"base_channels": 8} if dry else None)
    head.to(device)
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=1e-4)
    build, rng = SampleBuilder.of(base), np.random.default_rng(0)
    samples = []
    for _ in range(2):
        masks = np.zeros((4, side, side), np.uint8)
        for k in range(4):
            masks[k, k * side // 8 : side // 2 + k * side // 8, side // 4 : side // 2] = 1
        picture = Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))
        pieces = caption_of_phrases(["a red car", "the man", "sky", "two dogs"])
        samples.append(build({"image": picture, "pieces": pieces, "masks": masks}))
    targets = [s["masks"].to(device) for s in samples]
    features = extract(base, encoder, samples)

    def step(given):
        with autocast(device):
            loss = head.compute_loss(head(given), targets)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    cached = measure(lambda: step(features), device)
    live = measure(lambda: step(extract(base, encoder, samples)), device)
    compare(
        "flmm, head training step from the cache",
        cached,
        live,
        "running the base and SAM's encoder",
        note=f"2 pictures of {side} pixels, SAM-B",
    )


# ---- cwt_mae


def conv1d_images(x, num_scales=64, lowest_scale=0.1, step=1.0, *args, normalize=False, **options):
    """Upstream's front end: differences, one conv1d with all kernels, and a normalisation of its own."""
    from cwt_mae.model import create_ricker_wavelets

    scales = torch.arange(num_scales, device=x.device) * step + lowest_scale
    points = min(10 * float(scales[-1]), x.shape[1])  # a float, as upstream's: 630 taps for 64 scales
    points = int(points + (points % 2 == 0))
    first = torch.diff(F.pad(x[:, None], (1, 1), mode="replicate")[:, 0])
    rows = torch.stack([x, first[:, :-1], torch.diff(first)], 1).flatten(0, 1)
    kernels = create_ricker_wavelets(points, scales.to(x.dtype))
    images = F.conv1d(rows[:, None], kernels, padding=points // 2)[..., : x.shape[1]].unflatten(0, (-1, 3))
    if normalize:
        images = images - images.mean((2, 3), keepdim=True)
        images = images / images.std((2, 3), keepdim=True).clamp(min=1e-5)
    return images


def cwt(dry):
    """Wavelet transform and pre-training step at the published size."""
    from cwt_mae import model as cwt_model
    from cwt_mae import wavelet

    device = device_of(dry)
    batch, length, scales = (2, 300, 16) if dry else (64, 3000, 64)
    torch.manual_seed(0)
    x = torch.randn(batch, length, device=device).cumsum(1) / 10

    @torch.no_grad()
    def ours():
        return cwt_model.cwt_wrap(x, scales, normalize=True)

    def differentiable():
        return cwt_model.cwt_wrap(x.clone().requires_grad_(), scales, normalize=True)

    @torch.no_grad()
    def direct():
        # Both in full float32: TF32 would leave three digits.
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(allow_tf32=False):
            return conv1d_images(x, scales, normalize=True)

    found = {name: measure(f, device, 10, 3) for name, f in (("ours", ours), ("plain", differentiable))}
    found["conv1d"] = measure(direct, device, 3, 1)
    # What must move at least: the images written once; a copy of the same size tells the card's speed.
    images = torch.empty(batch, 3, scales, length, device=device)
    other = torch.empty_like(images)
    copy = timed(lambda: other.copy_(images), device, 10, 3)  # reads once, writes once
    share = copy / 2 / found["ours"]["seconds"]
    fast = found["conv1d"]["seconds"] / found["ours"]["seconds"]
    emit(
        "cwt_mae, transform and normalisation",
        found["ours"]["seconds"],
        "s",
        "conv1d, 630 taps, then normalisation",
        found["conv1d"]["seconds"],
        fast,
        ">= 20 x, or half the memory bound",
        fast >= 20 or share >= 0.5,
        f"{batch} x {length} samples, {scales} scales; writing the images once takes {100 * share:.0f} %",
    )
    compare("cwt_mae, transform, extra memory", found["ours"], found["conv1d"], "conv1d", "GiB", "extra")
    compare(
        "cwt_mae, transform without gradient",
        found["ours"],
        found["plain"],
        "plain, differentiable operations",
    )
    emit("cwt_mae, difference from plain", relative(ours(), differentiable()), "of norm")
    forms = ", ".join(sorted({form.__name__ for form in wavelet._FASTER.values()})) or "threads of the CPU"
    emit("cwt_mae, transform, seconds with its form", found["ours"]["seconds"], "s", note=forms)
    images = other = None
    free(device)

    # Pre-training steps: ours, and upstream's form (its numerics, conv1d images, normalisation apart).
    sizes = dict(signal_len=length, cwt_scales=scales)
    if dry:
        sizes |= dict(
            embed_dim=48, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
        )
    results, own = {}, cwt_model.cwt_wrap
    for name, legacy in (("ours", False), ("upstream", True)):
        with building(device, torch.float32):
            model = cwt_model.CWT_MAE_RoPE(**sizes, legacy=legacy)
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

        def step(model=model, optimizer=optimizer):
            with autocast(device):
                loss = model(x)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        cwt_model.cwt_wrap = conv1d_without_autocast(device) if legacy else own
        try:
            results[name] = measure(step, device, 5, 2)
        finally:
            cwt_model.cwt_wrap = own
        if name == "ours":
            parameters = sum(p.numel() for p in model.parameters())
        model = optimizer = step = None
        free(device)
    way = "upstream's form (conv1d, float32 images, its numerics)"
    note = f"{batch} windows, {parameters / 1e6:.1f} M parameters, bf16 autocast"
    emit("cwt_mae, pre-training", batch / results["ours"]["seconds"], "windows/s")
    compare("cwt_mae, pre-training step", results["ours"], results["upstream"], way, note=note)
    compare("cwt_mae, pre-training, peak memory", results["ours"], results["upstream"], way, "GiB", "peak")


def conv1d_without_autocast(device):
    def images(x, *args, **options):
        with torch.autocast(device.type, enabled=False):
            return conv1d_images(x, *args, **options)

    return images


# ---- pruning


@torch.no_grad()
def pruning(dry):
    """Sensitivity scan of all layers at openPangu-7B's size by three methods."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pruning.sensitivity_analyse import scan_methods

    device, shape = device_of(dry), smaller(PANGU) if dry else PANGU
    lengths = (9, 12) if dry else (9, 11, 12, 14, 16, 17, 19, 21, 23, 25, 28, 30)
    torch.manual_seed(0)
    with building(device, torch.bfloat16):
        config = {key: value for key, value in shape.items() if key not in ("bias", "rope_theta")}
        model = LlamaForCausalLM(LlamaConfig(**config, attention_bias=True)).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [
        {"name": str(n), "input_ids": torch.randint(3, shape["vocab_size"], (1, n), generator=generator)}
        for n in lengths
    ]
    variants = [("v", layer, None) for layer in range(shape["num_hidden_layers"])]
    scores = {}

    def scan(method, batch):
        records = []
        for first in range(0, len(prompts), batch):
            some = prompts[first : first + batch]
            records += scan_methods.scan_batch(model, some, variants, ("l1_mean", "kl"), method)
        found = [{v["layer"]: v["kl"] for v in record["variants"]} for record in records]
        scores[method, batch] = torch.tensor([[row[layer] for _, layer, _ in variants] for row in found])

    scan_methods.scan_batch(model, prompts[:1], variants[:2], ("l1_mean", "kl"), "naive")  # warm-up
    ways = (
        ("wavefront", len(prompts)),
        ("wavefront", 1),
        ("cached", len(prompts)),
        ("cached", 1),
        ("naive", 1),
    )
    found = {}
    for method, batch in ways:
        warm = 1 if method == "wavefront" else 0
        found[method, batch] = measure(lambda m=method, b=batch: scan(m, b), device, repeats=1, warm=warm)
    naive, way = found["naive", 1], "naive, a full pass for each layer and prompt"
    for method, batch in ways[:-1]:
        together = f"{batch} prompts at once" if batch > 1 else "one prompt at a time"
        goal = {"goal": ">= 10 x", "least": 10} if method == "wavefront" and batch > 1 else {}
        name = f"pruning, scan, {method}, {together}"
        compare(name, found[method, batch], naive, way, note=f"{len(variants)} layers", **goal)
        if batch > 1:
            difference = relative(scores[method, batch], scores["naive", 1])
            emit(f"pruning, scores of {method} from naive's", difference, "of norm", note="bfloat16")
    compare(
        "pruning, scan, extra memory", found["wavefront", len(prompts)], naive, way, unit="GiB", key="extra"
    )


# ---- attention back ends


@torch.no_grad()
def attention(dry):
    """Every attention back end against eager: outputs and time, alone and in the signal encoder and a
    language model."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = device_of(dry)
    b, h, n, d = (1, 2, 32, 16) if dry else (4, 16, 1024, 64)
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, h, n, d, device=device) for _ in range(3))
    causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    exact = ((q.double() @ k.double().transpose(-1, -2) * d**-0.5).masked_fill(~causal, -torch.inf)).softmax(
        -1
    ) @ v.double()

    def eager(q, k, v):
        return (q @ k.transpose(-1, -2) * d**-0.5).masked_fill(~causal, -torch.inf).softmax(-1) @ v

    half = [t.bfloat16() for t in (q, k, v)]
    base = measure(lambda: eager(*half), device, 5, 2)
    own_error = relative(eager(*half), exact)
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):

        def fused(name=name):
            with sdpa_kernel(getattr(SDPBackend, name)):
                return F.scaled_dot_product_attention(*half, is_causal=True)

        try:
            error = relative(fused(), exact)
        except RuntimeError as reason:
            emit(f"attention, sdpa {name.lower()}", None, "s", note=f"not available: {str(reason)[:80]}")
            continue
        row = measure(fused, device, 5, 2)
        compare(f"attention, sdpa {name.lower()}, bf16", row, base, "eager, bf16")
        emit(
            f"attention, sdpa {name.lower()}, error to float64",
            error,
            "of norm",
            "eager, bf16",
            own_error,
            goal="<= 1.5 x eager's",
            reached=error <= 1.5 * own_error,
        )
    encoder_back_ends(device, dry)
    decoder_back_ends(device, dry)


def encoder_back_ends(device, dry):
    """em_mllm's encoder on packed rows: eager, SDPA with the mask, and the variable-length kernel."""
    import numpy as np

    from em_mllm.em_foundation.models import SiTMAEConfig, SiTMAEModelWithoutMask
    from em_mllm.em_foundation.utils.utils import pack_sequence, with_special_patches

    small = (
        dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64) if dry else {}
    )
    rng, rows = np.random.default_rng(0), 2 if dry else 16
    signals = [
        [with_special_patches(rng.standard_normal((1024, 2)), 8, 20.0) for _ in range(3)] for _ in range(rows)
    ]
    patches, positions, ids = pack_sequence(signals, 8, 514 * 8)
    outputs, times, state = {}, {}, None
    for kind in ("eager", "sdpa", "fa2"):
        torch.manual_seed(0)
        with building(device, torch.float32):
            model = SiTMAEModelWithoutMask(SiTMAEConfig(attention_type=kind, **small))
        state = model.state_dict() if state is None else state
        model.load_state_dict(fuse_qkv(state) if kind == "fa2" else state)
        model.to(device).eval()
        valid = torch.zeros(patches.shape[:2], dtype=torch.bool)
        for row, some in enumerate(ids):
            valid[row, : len(some)] = True

        def work(model=model):
            with autocast(device):
                return model(patches.to(device), positions.to(device), ids).last_hidden_state

        outputs[kind] = work()[valid.to(device)]
        times[kind] = measure(work, device, 3, 1)
        model = work = None
    for kind, name in (("sdpa", "sdpa with mask"), ("fa2", "variable-length kernel")):
        compare(
            f"em_mllm encoder, {name}", times[kind], times["eager"], "eager", note=f"{rows} packed rows, bf16"
        )
        difference = relative(outputs[kind], outputs["eager"])
        emit(
            f"em_mllm encoder, {name}, from eager",
            difference,
            "of norm",
            goal="<= 0.02",
            reached=difference <= 0.02,
        )


def fuse_qkv(state: dict) -> dict:
    """Weights of the eager layout under the fused layout's names."""
    fused = {}
    for key, value in state.items():
        if ".attention.query." in key:
            parts = [state[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            fused[key.replace(".query.", ".Wqkv.")] = torch.cat(parts)
        elif ".attention.dense." in key:
            fused[key.replace(".dense.", ".Wo.")] = value
        elif ".attention.key." not in key and ".attention.value." not in key:
            fused[key] = value
    return fused


def decoder_back_ends(device, dry):
    """Two layers of openPangu's width with left padding, SDPA against eager."""
    from dia_pangu.src.Model.pangu import PanguEmbeddedConfig, PanguEmbeddedForCausalLM

    shape = smaller(PANGU) if dry else {**PANGU, "num_hidden_layers": 2, "vocab_size": 32000}
    torch.manual_seed(0)
    with building(device, torch.bfloat16):
        model = PanguEmbeddedForCausalLM(PanguEmbeddedConfig(**shape)).eval()
    ids = torch.randint(3, 500, (4, 64 if dry else 512), device=device)
    mask = torch.ones_like(ids)
    mask[1, : ids.shape[1] // 3] = 0
    outputs, times = {}, {}
    for kind in ("eager", "sdpa"):
        model.set_attn_implementation(kind)
        outputs[kind] = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        times[kind] = measure(lambda: model(input_ids=ids, attention_mask=mask), device, 3, 1)
    compare(
        "openPangu's layers, sdpa",
        times["sdpa"],
        times["eager"],
        "eager",
        note="2 layers, left padding, bf16",
    )
    difference = relative(outputs["sdpa"], outputs["eager"])
    emit(
        "openPangu's layers, sdpa from eager",
        difference,
        "of norm",
        goal="<= 0.02",
        reached=difference <= 0.02,
    )


# ---- parity, compile, golden files


def parity(dry):
    """Each room's model on the device against the CPU in float32, torch.compile, and the golden tests on
    the device."""
    device = device_of(dry)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, case in (
        ("em_mllm encoder", parity_em),
        ("cwt_mae, loss and gradient", parity_cwt),
        ("flmm, attention maps", parity_flmm),
        ("dia_pangu, logits and gradient", parity_dia),
    ):
        try:
            difference = max(relative(a, b) for a, b in zip(case(device), case(torch.device("cpu"))))
        except Exception as reason:  # one room that fails does not take the others
            note = f"failed: {type(reason).__name__}: {str(reason).splitlines()[0][:120]}"
            emit(
                f"float32 parity, {name}",
                None,
                "of norm",
                "the same on the CPU",
                reached=False,
                goal="1e-4",
                note=note,
            )
            continue
        emit(
            f"float32 parity, {name}",
            difference,
            "of norm",
            "the same on the CPU",
            goal="<= 1e-4",
            reached=difference <= 1e-4,
        )
    compiled(device, dry)
    golden(dry)


def parity_em(device):
    from em_mllm.em_foundation.models import SiTMAEConfig, SiTMAEModelWithoutMask

    torch.manual_seed(0)
    config = SiTMAEConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attention_type="sdpa",
    )
    model = SiTMAEModelWithoutMask(config).eval()
    patches, positions = torch.randn(2, 66, 16), torch.arange(66).expand(2, -1)
    ids = (torch.arange(66) >= 33).long().expand(2, -1)
    with torch.no_grad():
        return [model.to(device)(*(t.to(device) for t in (patches, positions, ids))).last_hidden_state]


def parity_cwt(device):
    from cwt_mae.model import CWT_MAE_RoPE

    torch.manual_seed(0)
    model = CWT_MAE_RoPE(
        signal_len=300,
        cwt_scales=16,
        embed_dim=48,
        depth=2,
        num_heads=2,
        decoder_embed_dim=32,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    x, noise = torch.randn(3, 300).cumsum(1), torch.rand(3, model.num_patches)
    loss, spectrum, _, images = model.to(device)(x.to(device), noise=noise.to(device))
    loss.backward()
    return [loss, spectrum, images, model.patch_embed.proj.weight.grad]


def parity_flmm(device):
    from PIL import Image

    from flmm.data.samples import SampleBuilder, caption_of_phrases
    from flmm.models.frozen_qwen import FrozenQwen
    from flmm.models.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen", tokenizer).to(device)
    base = FrozenQwen(model, tokenizer, FrozenQwen.make_processor(model.config, {}))
    picture = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    pieces = caption_of_phrases(["red square", "blue circle"])
    out = base([SampleBuilder.of(base)({"image": picture, "pieces": pieces})])[0]
    return [out["mask_attentions"], out["hidden_states"]]


def parity_dia(device):
    from dia_pangu.src.Model.multimodality_model import TRAINED, MultiPanguForCausalLM
    from dia_pangu.src.Model.my_embedding_layer import MyEmbedding
    from dia_pangu.src.Model.pangu import PanguEmbeddedConfig, PanguEmbeddedForCausalLM

    torch.manual_seed(0)
    shape = smaller(PANGU)
    llm = PanguEmbeddedForCausalLM(PanguEmbeddedConfig(**shape))
    layer = MyEmbedding(
        num_embeddings=shape["vocab_size"], embedding_dim=shape["hidden_size"], **TINY_EMBEDDING
    )
    model = MultiPanguForCausalLM(llm, layer)
    model.set_trained(TRAINED["pre"])
    batch = report_batch(2, 48, 48, shape["vocab_size"], 8, (64, 64, 16), torch.device("cpu"))
    out = model.to(device)(**{key: value.to(device) for key, value in batch.items()})
    out["loss"].backward()
    return [out["logits"], out["probability"], model.embedding_layer.perceiver.latents.grad]


def golden(dry):
    """Run the golden tests with everything on the GPU in float32; emit how many pass. Skipped where no
    files are."""
    folder = os.environ.get("GOLDEN_DIR")
    places = [Path(folder)] if folder else [ROOT / "shared" / "golden", ROOT.parent / "shared" / "golden"]
    place = next((p for p in places if p.is_dir()), None)
    if place is None:
        return emit("golden tests", None, "passed", note="no golden files here; set GOLDEN_DIR")
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_golden_*.py"))
    files = files[:1] if dry else files
    for where in ("CPU",) if dry else ("CPU", "CUDA"):
        plugin = ["-p", "bench.gpu_golden"] if where == "CUDA" else []
        command = [sys.executable, "-m", "pytest", "--tb=line", "-p", "no:cacheprovider", *plugin, *files]
        if not dry and importlib.util.find_spec("xdist"):
            command += ["-n", "4"]
        environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "GOLDEN_DIR": str(place)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        lines = done.stdout.strip().splitlines() or [done.stderr[-200:]]
        counts = {word: int(n) for n, word in zip(*[iter(words_of(lines[-1]))] * 2) if n.isdigit()}
        failed = [line[:110] for line in lines if line.startswith(("FAILED", "ERROR"))][:3]
        emit(
            f"golden tests, float32 on {where}",
            counts.get("passed", 0),
            "passed",
            goal="none fails",
            reached=done.returncode == 0,
            note="; ".join([lines[-1], *failed]),
        )


def words_of(summary: str) -> list[str]:
    """ "3 passed, 1 skipped in 2.1s" -> ["3", "passed", "1", "skipped"]."""
    parts = summary.strip("= ").split(" in ")[0].replace(",", "").split()
    return parts if len(parts) % 2 == 0 else []


def compiled(device, dry):
    """One pre-training step of cwt_mae under torch.compile against eager."""
    from cwt_mae.model import CWT_MAE_RoPE

    sizes = dict(signal_len=300, cwt_scales=16, embed_dim=48, depth=1, num_heads=2, decoder_embed_dim=32)
    sizes |= dict(decoder_depth=1, decoder_num_heads=2)
    torch.manual_seed(0)
    with building(device, torch.float32):
        model = CWT_MAE_RoPE(**(sizes if dry else dict(depth=4, decoder_depth=2)))
    model.to(device).train()
    x = torch.randn(2 if dry else 32, model.signal_len, device=device).cumsum(1)
    noise = torch.rand(len(x), model.num_patches, device=device)

    def step(forward):
        with autocast(device):
            loss = forward(x, noise=noise)[0]
        loss.backward()
        model.zero_grad()
        return loss.detach()

    eager = measure(lambda: step(model), device, 3, 1)
    start = time.perf_counter()
    try:
        fast = torch.compile(model, backend="aot_eager" if dry else "inductor")
        loss = step(fast)
    except Exception as reason:
        return emit("cwt_mae, torch.compile", None, "s", note=f"failed: {str(reason).splitlines()[0][:150]}")
    seconds = time.perf_counter() - start
    difference = abs(loss - step(model)).item()
    compare(
        "cwt_mae, pre-training step under torch.compile",
        measure(lambda: step(fast), device, 3, 1),
        eager,
        "without compile",
        note=f"6 of 20 layers; compiling took {seconds:.0f} s; losses differ by {difference:.1e}",
    )


# ---- training scripts

BF16 = """\
# Every Accelerator of the script computes in bfloat16, whatever the recipe asks for.
from accelerate import Accelerator
plain = Accelerator.__init__
def in_bf16(self, *args, **options):
    options["mixed_precision"] = "bf16"
    plain(self, *args, **options)
Accelerator.__init__ = in_bf16
"""


SCRIPT_SECONDS = 95  # less than the step's own limit


def scripts(dry):
    """The five rooms' built-in recipes at their smallest size with bfloat16 autocast; a dry run takes one
    room."""
    device_of(dry)
    rooms = ["cwt_mae"] if dry else ["dia_pangu", "em_mllm", "cwt_mae", "flmm"]
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "sitecustomize.py").write_text(BF16)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([work, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHON": sys.executable,
            "RUNS": f"{work}/runs",
            "SMOKE": "1",
            "OMP_NUM_THREADS": "2",
        }
        environment.pop("DATA_ROOT", None)
        start, started = time.monotonic(), {}

        def begin(room):
            command = [sys.executable, str(ROOT / "studies" / room / "builtin.py")]
            log = open(f"{work}/{room}.log", "w", encoding="utf-8")
            started[room] = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)

        for room in rooms:
            begin(room)
        while started and time.monotonic() - start < SCRIPT_SECONDS:
            time.sleep(0.2)
            for room, child in list(started.items()):
                if child.poll() is None:
                    continue
                del started[room]
                show_recipe(work, room, time.monotonic() - start, child.returncode)
                if room == "dia_pangu" and child.returncode == 0:
                    begin("pruning")  # prunes the model that dia_pangu has just trained
        for room, child in started.items():
            child.kill()
            show_recipe(work, room, SCRIPT_SECONDS, None)


def show_recipe(work, room, seconds, status):
    """Emit how a recipe ended: `status` 0 is well, None means that it was stopped on time."""
    log = Path(f"{work}/{room}.log").read_text(encoding="utf-8", errors="replace")
    lines = log.strip().splitlines() or ["no output"]
    note = "bfloat16, smallest size"
    if status is None:
        note = f"stopped on time, no error so far; last line: {lines[-1][:120]}"
    elif status:
        note = lines[-1][:200]
    goal = {"goal": "ends well", "reached": status == 0}
    emit(f"built-in recipe of {room}", seconds, "s", note=note, **goal)


# ---- sharding


def sharding(dry):
    """FSDP2 with CPU offload and DDP in one process: both losses and updated weights against the plain
    model's."""
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from dia_pangu.src.Model.pangu import PanguEmbeddedConfig, PanguEmbeddedForCausalLM

    device = device_of(dry)
    shape = smaller(PANGU) if dry else {**PANGU, "num_hidden_layers": 4, "vocab_size": 32000}
    if device.type == "cuda":
        torch.cuda.set_device(0)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # one process: no other network is needed
        os.environ.setdefault(name, "lo")
    with tempfile.TemporaryDirectory() as work:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{work}/meet", rank=0, world_size=1)
        ids = torch.randint(3, 500, (2, 32 if dry else 512), device=device)

        def train(wrap):
            """Two steps; returns both losses, a weight, seconds of the second step and peak memory."""
            torch.manual_seed(0)
            with building(device, torch.bfloat16 if device.type == "cuda" else torch.float32):
                model = PanguEmbeddedForCausalLM(PanguEmbeddedConfig(**shape))
            inner = model
            model = wrap(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            losses = []
            before = start_peak(device)

            def step():
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach().float().cpu())

            seconds = timed(step, device, 1, 1)
            weight = inner.model.layers[0].self_attn.q_proj.weight.detach()
            weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            row = {
                "seconds": seconds,
                "peak": peak_gib(device),
                "extra": peak_gib(device, before),
                "note": "",
            }
            return torch.stack(losses), weight.float().cpu(), row

        def shard(model):
            offload = CPUOffloadPolicy() if device.type == "cuda" else OffloadPolicy()
            for layer in model.model.layers:
                fully_shard(layer, offload_policy=offload)
            return fully_shard(model, offload_policy=offload)

        def replicate(model):
            return DistributedDataParallel(model, device_ids=[0] if device.type == "cuda" else None)

        try:
            losses, weight, plain = train(lambda model: model)
            for name, wrap in (("FSDP2 with CPU offload", shard), ("DDP", replicate)):
                free(device)
                try:
                    other, moved, row = train(wrap)
                except Exception as reason:
                    note = f"failed: {type(reason).__name__}: {str(reason).splitlines()[0][:150]}"
                    emit(f"{name}, a step", None, "s", goal="runs", reached=False, note=note)
                    continue
                difference = max(relative(other, losses), relative(moved, weight))
                compare(f"{name}, a step", row, plain, "plain model", note="4 layers of openPangu's width")
                compare(f"{name}, peak memory", row, plain, "plain model", "GiB", "peak")
                emit(
                    f"{name}, losses and weights from the plain model's",
                    difference,
                    "of norm",
                    goal="<= 0.01",
                    reached=difference <= 0.01,
                )
        finally:
            dist.destroy_process_group()


STEPS = {
    "dia": dia,
    "em": em,
    "flmm": flmm,
    "cwt": cwt,
    "pruning": pruning,
    "attention": attention,
    "parity": parity,
    "scripts": scripts,
    "sharding": sharding,
}


def run_one(name: str, dry: bool) -> int:
    """Run one step in this process; prints what it runs on, the rows and, where it fails, the reason as the
    last line."""
    import transformers

    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }
    about["device"] = "CPU (dry run)" if dry else "none"
    if not dry and torch.cuda.is_available():
        about["device"] = torch.cuda.get_device_name()
        about["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    print("ABOUT " + json.dumps(about), flush=True)
    if dry:
        torch.set_num_threads(2)
    try:
        STEPS[name](dry)
    except Exception as reason:
        import traceback

        traceback.print_exc()
        lines = str(reason).strip().splitlines() or ["no message"]
        print(f"{type(reason).__name__}: {lines[0]}", flush=True)
        return 1
    return 0
