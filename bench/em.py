"""em_mllm against the ways of the published starter kit: encoder, training step, data loading, generation.

    python bench/em.py [--repeats 3] [--parts encoder step loading generation gpu]

Every variant runs in a process of its own; `seconds` is processor time of one thread (median over the
repeats, variants in turn), `peak_mb` the resident memory that the work adds at its peak (on a GPU:
torch's peak allocation), `ratio` the other way's number divided by ours.

  encoder     64 signals of 128 to 4096 points: packed rows and SDPA against one padded row a signal and
              eager attention; outputs compared
  step        one training step with frozen LLM, vocabulary 32,000: logits only where a label is, against
              all logits, question and padding
  loading     resident memory after reading random signals of a small and a tenfold .h5; signals a second
              with 0, 2 and 4 workers
  generation  64 new tokens for 4 questions: one batch with cache against running each whole prefix again
  recording   memory above that before the work while the strongest windows of a raw capture of 40 and of 400
              MB are cut, and of the whole file read at once
  options     log-likelihoods of four options: the prompt read once against once for each option
  chunks      500 random signals of a gzip .h5 after it was copied once, against as it is stored
  checkpoint  bytes of a LoRA checkpoint against one with the frozen language model in it
  gpu         where CUDA is there: the 86 M encoder, and a random FM9G-4B in bf16 with LoRA (tokens a second,
              peak memory, MFU)

Writes bench/results/em.json; parts that were not measured this time stay as they are.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import h5py
import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.measure import added_peak_mb, processor, resident_mb
from common.checkpoint import atomic_write
from common.sharding import keep_trained
from em_mllm.dataset import SignalCollator, SignalDataset
from em_mllm.em_foundation.models import SiTMAEConfig, SiTMAEModelWithoutMask
from em_mllm.em_foundation.models.embedder import sample_id_matrix
from em_mllm.em_foundation.utils.utils import first_fit, pack_sequence, with_special_patches
from em_mllm.fm9g import granite_config
from em_mllm.iq_io import open_recording, strong_windows, windows
from em_mllm.model import MultiModalModel, set_trainable
from em_mllm.signal_file import SignalFile

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "encoder": ("ours", "starter kit"),
    "step": ("ours", "starter kit"),
    "loading": ("small", "tenfold", "workers"),
    "generation": ("ours", "starter kit"),
    "recording": ("small", "tenfold", "whole"),
    "options": ("ours", "starter kit"),
    "chunks": ("ours", "starter kit"),
    "checkpoint": ("ours", "starter kit"),
    "gpu": ("ours",),
}

ONCE = ("loading", "recording", "chunks", "checkpoint", "gpu")  # measured once, whatever --repeats


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--one",
        nargs=2,
        metavar=("PART", "VARIANT"),
        help="measure one variant in this process and print it as JSON",
    )
    return parser.parse_args()


def measured(work) -> dict:
    """Processor seconds of `work`(), its value, and how much resident memory it adds at its peak."""
    result = {}

    def call():
        start = time.process_time()
        result["value"] = work()
        result["seconds"] = time.process_time() - start

    return {"peak_mb": added_peak_mb(call), **result}


def encoder(variant):
    config = SiTMAEConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=1024,
        attention_type="sdpa" if variant == "ours" else "eager",
    )
    torch.manual_seed(0)
    model = SiTMAEModelWithoutMask(config).eval()
    rng = np.random.default_rng(0)
    lengths = (np.exp(rng.uniform(np.log(128), np.log(4096), 64)) // 8 * 8).astype(int)
    signals = [with_special_patches(rng.standard_normal((n, 2)), 8, 20.0) for n in lengths]
    tokens = [s.shape[1] // 8 for s in signals]
    rows = first_fit(tokens, 514) if variant == "ours" else [[i] for i in range(len(signals))]
    patches, positions, ids = pack_sequence([[signals[i] for i in row] for row in rows], 8, 514 * 8)

    @torch.no_grad()
    def work():
        cls = {}
        for start in range(0, len(rows), 8):  # the same number of tokens a batch
            h = model(
                patches[start : start + 8], positions[start : start + 8], ids[start : start + 8]
            ).last_hidden_state
            where = (positions[start : start + 8] == 0) & (sample_id_matrix(ids[start : start + 8], 514) >= 0)
            cls.update(
                zip([i for row in rows[start : start + 8] for i in row], h[where].norm(dim=1).tolist())
            )
        return [cls[i] for i in range(len(signals))]

    return measured(work) | {"signals": len(signals), "rows": len(rows)}


def multimodal(vocabulary=32000):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
        )
    )
    encoder = SiTMAEModelWithoutMask(
        SiTMAEConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            attention_type="sdpa",
        )
    )
    model = MultiModalModel(llm, encoder, "linear", 3, 4)
    set_trainable(model, freeze_llm=True, freeze_signal_encoder=False, use_lora=False)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(24, 200, (16,), generator=generator)
    ids = torch.randint(10, vocabulary, (16, 200), generator=generator)
    mask = (torch.arange(200) < lengths[:, None]).long()
    labels = torch.where((torch.arange(200) >= lengths[:, None] - 8) & mask.bool(), ids, -100)
    iq = torch.randn(16, 1024, 2, generator=generator)
    return model, {
        "iq": iq / 4,
        "fs": torch.full((16,), 20e6),
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
    }


def step(variant):
    model, batch = multimodal()
    if variant == "starter kit":  # all logits, loss over question and padding too
        batch["labels"] = batch["input_ids"]

    def work():
        loss = model(**batch, all_logits=variant == "starter kit")["loss"]
        loss.backward()
        model.zero_grad()
        return float(loss.detach())

    return measured(work)


def generation(variant):
    model, batch = multimodal(2000)
    prompt = {k: batch[k][:4] for k in ("iq", "fs", "input_ids", "attention_mask")}
    if variant == "ours":
        return measured(
            lambda: model.generate(
                **prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
            ).tolist()
        )

    @torch.no_grad()
    def work():
        out = []
        for row in range(4):
            ids = batch["input_ids"][row : row + 1, : int(batch["attention_mask"][row].sum())]
            for _ in range(64):
                logits = model(batch["iq"][row : row + 1], ids, torch.ones_like(ids), fs=batch["fs"][:1])[
                    "logits"
                ]
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            out.append(ids[0, -64:].tolist())
        return out

    return measured(work)


def loading(variant):
    count = {"small": 2000, "tenfold": 20000, "workers": 8000}[variant]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.h5"
        with h5py.File(path, "w") as file:
            data = file.create_dataset("IQ_data", (count, 1024, 2), "float32")
            block = np.random.default_rng(0).standard_normal((1000, 1024, 2)).astype(np.float32)
            for start in range(0, count, 1000):
                data[start : start + 1000] = block
        del block
        signals = SignalDataset([path])
        if variant != "workers":
            order = np.random.default_rng(0).permutation(count)[:2000]
            result = measured(lambda: sum(float(signals[int(i)]["iq"][0, 0]) for i in order))
            return result | {"file_mb": path.stat().st_size / 1e6, "resident_mb": resident_mb()}
        rates, collate = {}, SignalCollator(SiTMAEConfig(max_seq_len=(1024, 1)))
        for workers in (0, 2, 4):
            start = time.perf_counter()
            for _ in DataLoader(signals, 64, shuffle=True, num_workers=workers, collate_fn=collate):
                pass
            rates[workers] = count / (time.perf_counter() - start)
        return {"seconds": 0.0, "peak_mb": 0.0, "value": rates}


def recording(variant):
    count = 20_000_000 if variant == "small" else 200_000_000  # samples of two bytes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "g_433.92M_250k.cu8"
        block = np.random.default_rng(0).integers(0, 255, 2 * 1_000_000).astype(np.uint8)
        with open(path, "wb") as file:
            for _ in range(count // 1_000_000):
                file.write(block)
        del block

        def work():
            found = open_recording(path)
            if variant == "whole":
                return len(windows(found.read(0, found.length), 1024))
            return len(strong_windows(found, 1024))

        return measured(work) | {"file_mb": path.stat().st_size / 1e6}


def options(variant):
    model, batch = multimodal(2000)
    model.eval()
    prompt = {k: batch[k] for k in ("iq", "fs", "input_ids", "attention_mask")}
    tails = [[[10 + k, 20, 30 + k, 40, 50, 60, 70, 80] for k in range(4)] for _ in range(16)]
    if variant == "ours":
        work = lambda: [v.tolist() for v in model.option_scores(options=tails, **prompt)]
        return measured(work)

    @torch.no_grad()
    def work():
        scores = []
        for k in range(4):  # prompt and option as one text
            rows = []
            for row in range(16):
                ids = batch["input_ids"][row, : int(batch["attention_mask"][row].sum())]
                rows.append(torch.cat([ids, torch.tensor(tails[row][k])]))
            longest = max(map(len, rows))
            ids = torch.stack([torch.nn.functional.pad(r, (0, longest - len(r))) for r in rows])
            mask = torch.stack([(torch.arange(longest) < len(r)).long() for r in rows])
            labels = ids.masked_fill(mask == 0, -100)
            for row, r in enumerate(rows):
                labels[row, : len(r) - 8] = -100
            out = model(batch["iq"], ids, mask, labels, fs=batch["fs"])
            learned = out["labels"] != -100
            chosen = out["logits"].log_softmax(-1).gather(-1, out["labels"].clamp(min=0)[..., None])[..., 0]
            scores.append((chosen * learned).sum(1))
        return torch.stack(scores, 1).tolist()

    return measured(work)


def chunks(variant):
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EM_MLLM_CACHE"] = folder
        path = Path(folder) / "x.h5"
        x = np.random.default_rng(0).standard_normal((4000, 1024, 2)).astype(np.float32)
        with h5py.File(path, "w") as file:
            file.create_dataset(
                "IQ_data", data=x, chunks=(512, 1024, 2), compression="gzip", compression_opts=1
            )
        del x
        signals, order = SignalFile(path), np.random.default_rng(0).permutation(4000)[:500]
        if variant == "ours":
            signals.pack()
        return measured(lambda: float(sum(signals.read(i)[0, 0] for i in order)))


def checkpoint(variant):
    model, _ = multimodal()
    set_trainable(model, freeze_llm=False, freeze_signal_encoder=True, use_lora=True)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    if variant == "ours":
        keep_trained(accelerator)
    with tempfile.TemporaryDirectory() as folder:
        result = measured(lambda: accelerator.save_state(folder))
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    return result | {"value": None, "checkpoint_mb": size / 1e6}


def gpu(variant):
    """Real sizes on one CUDA device: encoder samples a second, and a LoRA step of a random FM9G-4B in
    bf16."""
    device, out = torch.device("cuda"), {}
    config = SiTMAEConfig(attention_type="sdpa")
    encoder = SiTMAEModelWithoutMask(config).to(device, torch.bfloat16).eval()
    rng = np.random.default_rng(0)
    rows = [
        [with_special_patches(rng.standard_normal((1024, 2)), 8, 20.0) for _ in range(3)] for _ in range(64)
    ]
    patches, positions, ids = pack_sequence(rows, 8, 514 * 8)
    batch = patches.to(device), positions.to(device), sample_id_matrix(ids, 514, device)
    with torch.no_grad():
        out["encoder_signals_per_second"] = 192 / timed(lambda: encoder(*batch))
    fm9g = dict(
        vocab_size=73448,
        hidden_size=2560,
        intermediate_size=6400,
        num_hidden_layers=62,
        num_attention_heads=40,
        num_key_value_heads=4,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=256,
        rope_theta=1e6,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        llm = AutoModelForCausalLM.from_config(granite_config(fm9g))
    torch.set_default_dtype(torch.float32)
    model = MultiModalModel(
        llm, SiTMAEModelWithoutMask(SiTMAEConfig(attention_type="sdpa")), "linear", 3, 4
    ).to(device)
    set_trainable(model, False, True, True)
    model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.llm.enable_input_require_grads()
    text = torch.randint(10, 70000, (8, 256), device=device)
    labels = torch.where(torch.arange(256, device=device) >= 240, text, -100)
    inputs = dict(
        iq=torch.randn(8, 1024, 2, device=device) / 4,
        fs=torch.full((8,), 20e6, device=device),
        input_ids=text,
        attention_mask=torch.ones_like(text),
        labels=labels,
    )
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: model.train()(**inputs)["loss"].backward())
    tokens = 8 * (256 + 130)
    out |= {
        "lora_tokens_per_second": tokens / seconds,
        "lora_peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        # 4 FLOP a parameter and token: forward, and backward to the activations; what checkpointing computes
        # again does not count
        "mfu_percent_of_989_tflops": 100 * 4 * 4.13e9 * tokens / seconds / 989e12,
        "device": torch.cuda.get_device_name(),
    }
    return {"seconds": seconds, "peak_mb": torch.cuda.max_memory_allocated() / 1e6, "value": out}


def timed(work, repeats=5):
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def main(args):
    if args.one:
        torch.set_num_threads(1)
        print("RESULT " + json.dumps(globals()[args.one[0]](args.one[1])))
        return
    path = ROOT / "bench" / "results" / "em.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    table, where = stored.get("table", {}), stored.get("processor", {})
    for part in args.parts:
        if part == "gpu" and not torch.cuda.is_available():
            print("gpu: no CUDA device here, left out")
            continue
        runs = {variant: [] for variant in PARTS[part]}
        for _ in range(1 if part in ONCE else args.repeats):
            for variant in PARTS[part]:  # in turn, so that a busy machine hurts them alike
                done = subprocess.run(
                    [sys.executable, __file__, "--one", part, variant],
                    capture_output=True,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
                if done.returncode:
                    sys.exit(f"{part}, {variant}: {done.stderr[-2000:]}")
                runs[variant].append(json.loads(done.stdout.split("RESULT ")[-1]))
        rows = {
            v: {
                **r[0],
                "seconds": statistics.median(x["seconds"] for x in r),
                "peak_mb": statistics.median(x["peak_mb"] for x in r),
            }
            for v, r in runs.items()
        }
        table[part], where[part] = rows, processor()
        if "starter kit" in rows:
            ours, theirs = rows["ours"], rows["starter kit"]
            table[part]["ratio"] = {
                "seconds": theirs["seconds"] / ours["seconds"],
                "memory": theirs["peak_mb"] / max(ours["peak_mb"], 1e-9),
            }
            if part in ("encoder", "options"):
                table[part]["largest_difference"] = float(
                    np.abs(np.array(ours.pop("value")) - np.array(theirs.pop("value"))).max()
                )
            if part == "generation":
                table[part]["equal_tokens"] = ours.pop("value") == theirs.pop("value")
        for name, row in table[part].items():
            said = str(row)
            if isinstance(row, dict):
                said = ", ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                )
            print(f"{part:10s} {name:18s} {said}")
    content = {"torch": torch.__version__, "processor": where, "table": table}
    atomic_write(path, json.dumps(content, indent=1))
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(parse_args())
