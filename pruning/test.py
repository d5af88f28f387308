"""Test a pruned report model: reports and their scores, perplexity, latency, memory (upstream: test_pruned_{CN,EN}_cli.py).

    python pruning/test.py --pruned_model_path pruned/pytorch_model_pruned_drop23_28_merged_clean_v0112_en_cpu.bin \\
        --prune_map_path pruned/prune_layer_map_drop23_28_v0112_en_cpu.json --lang-model-path LLM --data DATA --out_dir results
    python pruning/test.py --pruned_model_path pruned/hf_drop23_28 --texts reports.txt --out_dir results

Writes <prefix>_<tag>.csv (ID, Question, Ground Truth, Pred, GT_labels; UTF-8), <prefix>_<tag>_per_sample_timing.csv, _timing.json
and _scores.json. A plain language model gets perplexity, latency and memory only.
"""

import argparse
import csv
import io
import json
import math
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.run import seed_everything
from dia_pangu.evaluate.findings import bootstrap, finding_scores, micro_f1
from dia_pangu.evaluate.labeler import positives
from dia_pangu.evaluate.nlg_eval import published_scores
from pruning.layers import decoder_layers, head_counts
from pruning.report_model import (
    Encoded,
    load_report_model,
    perplexity,
    read_map,
    report_losses,
    write_reports,
)
from pruning.sensitivity_analyse.load_model import load_model, read_prompts


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--pruned_model_path",
        "--ckpt_path",
        type=Path,
        required=True,
        help="file or folder; of a folder with checkpoints, the newest",
    )
    p.add_argument(
        "--prune_map_path",
        type=Path,
        help="prune_layer_map_*.json; needed when --lang-model-path is the unpruned model",
    )
    p.add_argument(
        "--lang-model-path", type=Path, help="folder with config and tokenizer of the language model"
    )
    p.add_argument(
        "--lora-alpha", "--lora_alpha", type=float, help="of the checkpoint's LoRA, if nothing else says it"
    )
    p.add_argument("--data", type=Path, help="CTRG folder")
    p.add_argument("--texts", type=Path, help="texts, one a line, for a plain language model")
    p.add_argument("--split", choices=("train", "val", "test"), default="test")
    p.add_argument("--limit", type=int, default=0, help="use only the first samples; 0: all")
    p.add_argument("--cache", help="folder for prepared volumes")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--max-new-tokens", type=int, default=300, help="(default 300, upstream's)")
    p.add_argument(
        "--do-sample",
        action="store_true",
        help="sample (temperature 0.7, top-k 50, top-p 0.95, upstream's) instead of greedy",
    )
    p.add_argument("--seed", type=int, default=20, help="of sampling (default 20, upstream's)")
    p.add_argument("--out_dir", "--out", type=Path, required=True)
    p.add_argument("--out_prefix", default="dia-pangu-pruned", help="(default dia-pangu-pruned)")
    p.add_argument("--tag_style", choices=("c", "drop"), default="drop", help="c23_28 or drop23_28")
    p.add_argument("--tag_override", help="the tag itself; default from the map, else the checkpoint's name")
    return p.parse_args(argv)


def make_name(args) -> str:
    if args.tag_override:
        return args.tag_override
    tag = args.pruned_model_path.stem
    if args.prune_map_path:
        tag = read_map(args.prune_map_path).get("tag", tag)
    return tag.replace("drop", "c", 1) if args.tag_style == "c" else tag


def nearest_rank(values, share: float) -> float:
    """Percentile as upstream: the value at position round((n - 1) * share) of the sorted list."""
    return sorted(values)[round((len(values) - 1) * share)]


def report_scores(truths, reports, labels, losses) -> dict:
    """Findings (by the rule-based labeler, against the labels), text scores and perplexity. labels (N, 14); losses (N, 2)."""
    labels, said = np.asarray(labels).astype(bool), np.asarray(positives(reports)).astype(bool)
    published = {
        k: v for k, v in published_scores(truths, reports, with_meteor=False)[0].items() if v is not None
    }
    return {
        "reports": len(reports),
        "finding_micro_f1": micro_f1(labels, said),
        "finding_micro_f1_interval": bootstrap(micro_f1, labels, said),
        "finding_macro_f1": finding_scores(labels, said)["macro"]["F1"],
        "perplexity": perplexity(losses),
        **published,
    }


@torch.no_grad()
def text_losses(model, tokenizer, texts, max_length: int = 512) -> torch.Tensor:
    """(N, 2): summed loss and number of scored tokens of each text."""
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids[:max_length]], device=model.device)
        loss = model(input_ids=ids, labels=ids).loss.double().item()
        rows.append([loss * (ids.shape[1] - 1), ids.shape[1] - 1])
    return torch.tensor(rows, dtype=torch.float64)


@torch.no_grad()
def latency(lang_model, prompt_tokens: int = 64, new_tokens: int = 32, repeats: int = 3) -> dict:
    """Seconds to generate `new_tokens` after a prompt, fastest of `repeats`; values of the decoder; KV-cache bytes per token."""
    embedding = lang_model.get_input_embeddings().weight
    prompt = torch.arange(prompt_tokens, device=embedding.device)[None] % (len(embedding) - 3) + 3
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        lang_model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        times.append(time.perf_counter() - start)
    _, kv_heads, head_dim = head_counts(lang_model)
    kv = 2 * len(decoder_layers(lang_model)) * kv_heads * head_dim * embedding.element_size()
    unique = {id(p): p for p in lang_model.parameters()}.values()
    return {
        "seconds": min(times),
        "tokens_per_second": new_tokens / min(times),
        "parameters": sum(p.numel() for p in unique),
        "weight_bytes": sum(p.numel() * p.element_size() for p in unique),
        "kv_cache_bytes_per_token": kv,
    }


def write_table(path, header, rows):
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    atomic_write(path, table.getvalue())


def main(args):
    if bool(args.data) == bool(args.texts):
        raise UserError(
            "give either --data (a report model on a CTRG folder) or --texts (a plain language model)"
        )
    if args.data and not args.lang_model_path:
        raise UserError(
            "--lang-model-path is needed with --data: the folder with the language model's config and tokenizer"
        )
    accelerator = Accelerator()
    seed_everything(args.seed)
    stem, started = args.out_dir / f"{args.out_prefix}_{make_name(args)}", time.perf_counter()
    if args.texts:
        model, tokenizer = load_model(args.pruned_model_path)
        model = model.to(accelerator.device)
        losses = text_losses(model, tokenizer, read_prompts(args.texts)[: args.limit or None])
        scores, lang_model = {"texts": len(losses), "perplexity": perplexity(losses)}, model
        loaded = time.perf_counter() - started
    else:
        model, text, config = load_report_model(
            args.pruned_model_path, args.lang_model_path, args.prune_map_path, args.lora_alpha
        )
        model, lang_model = model.to(accelerator.device), model.lang_model
        loaded = time.perf_counter() - started
        samples = Encoded(
            model, text, config, args.data, args.split, args.limit, args.cache, batch=args.batch_size
        )
        generation = (
            {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95} if args.do_sample else {}
        )
        made = write_reports(model, text, samples, args.max_new_tokens, args.batch_size, **generation)
        items = [samples[i] for i in range(len(samples))]
        truths, labels = [s["report"] for s in items], [s["cls_labels"].tolist() for s in items]
        scores = report_scores(
            truths, made["reports"], labels, report_losses(model, text, samples, args.batch_size)
        )
        rows = [
            [s["id"], question, truth, report, json.dumps(codes)]
            for s, question, truth, report, codes in zip(
                items, made["questions"], truths, made["reports"], labels
            )
        ]
        write_table(
            stem.with_name(stem.name + ".csv"), ["ID", "Question", "Ground Truth", "Pred", "GT_labels"], rows
        )
        times = made["milliseconds"]
        write_table(
            stem.with_name(stem.name + "_per_sample_timing.csv"),
            ["ID", "InferTimeMs"],
            [[s["id"], f"{ms:.2f}"] for s, ms in zip(items, times)],
        )
        timing = {
            "load_seconds": loaded,
            "avg_ms": sum(times) / len(times),
            "min_ms": min(times),
            "max_ms": max(times),
            **{f"p{p}_ms": nearest_rank(times, p / 100) for p in (50, 90, 95, 99)},
        }
        atomic_write(stem.with_name(stem.name + "_timing.json"), json.dumps(timing, indent=1))
    scores |= {
        "layers": len(decoder_layers(lang_model)),
        **latency(lang_model),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    atomic_write(stem.with_name(stem.name + "_scores.json"), json.dumps(scores, indent=1))
    for name, value in scores.items():
        print(
            f"  {name:28} {value if not isinstance(value, float) else f'{value:.4f}' if math.isfinite(value) else value}"
        )
    print(f"wrote {stem}_scores.json")


if __name__ == "__main__":
    run(main, parse_args())
