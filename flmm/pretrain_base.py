"""Pre-train a tiny multimodal LLM (a native transformers class) to caption the built-in scenes; it is the base to freeze.

    python flmm/pretrain_base.py --base llava --out runs/flmm/base-0

Next-word loss on the caption only. Scenes are drawn on the fly and never repeat: step and seed name them.
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import torch
from accelerate import Accelerator
from PIL import Image

from common.errors import run
from common.run import Log, describe, open_run, seed_everything
from flmm.build import FAMILIES
from flmm.data.samples import SampleBuilder
from flmm.data.scenes import QUESTION, make_scene
from flmm.models.tiny import TINY_FAMILIES, save_base, tiny_model, tiny_tokenizer

TINY_PICTURES = {
    "min_pixels": 64 * 64,
    "max_pixels": 64 * 64,
}  # Qwen: keep the scenes' size; the others have one anyway


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="run folder; the base is written to OUT/base")
    parser.add_argument(
        "--base", choices=TINY_FAMILIES, default="llava", help="class of the base (default llava)"
    )
    parser.add_argument(
        "--steps", type=int, default=800, help="optimizer steps; 0 writes the random base (default 800)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="scenes per step (default 16)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate (default 1.5e-3)")
    parser.add_argument("--warmup", type=int, default=40, help="warm-up steps (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="weights and scenes (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    return parser.parse_args()


def caption_batch(base, builder, scenes):
    """Scenes -> inputs with labels of one training step (left-padded; the end token closes each caption)."""
    samples = []
    for scene in scenes:
        sample = builder({"image": Image.fromarray(scene["image"]), "pieces": scene["pieces"]})
        end = torch.tensor([base.tokenizer.eos_token_id])
        sample["input_ids"], sample["labels"] = (
            torch.cat([sample["input_ids"], end]),
            torch.cat([sample["labels"], end]),
        )
        samples.append(sample)
    inputs, shifts = base.batch(samples)
    labels = [base.expand(s["input_ids"], s, s["labels"], fill=-100) for s in samples]
    labels = torch.stack([torch.cat([row.new_full((k,), -100), row]) for row, k in zip(labels, shifts)])
    return {**inputs, "labels": labels.to(base.device)}


def main(args):
    accelerator = Accelerator()
    out = open_run(args.out, args, accelerator, overwrite=args.overwrite)
    seed_everything(args.seed)
    tokenizer = tiny_tokenizer()
    model = tiny_model(args.base, tokenizer, args.seed)
    family = FAMILIES[args.base]
    base = family(
        model,
        tokenizer,
        family.make_processor(model.config, TINY_PICTURES),
        template="plain",
        question=QUESTION,
    )
    builder = SampleBuilder.of(base)
    model.requires_grad_(True).train().to(accelerator.device)
    print(f"{family.architecture}: {describe(model)}, vocabulary {len(tokenizer)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    log, start = Log(out, accelerator, total=args.steps), time.time()
    for step in range(args.steps):
        first = (args.seed + 1) * 1_000_000 + step * args.batch_size  # away from every index of make_data.py
        batch = caption_batch(
            base, builder, [make_scene(args.seed, first + i, overlap=True) for i in range(args.batch_size)]
        )
        warm = min(1.0, (step + 1) / args.warmup)
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * cosine
        output = model(**batch)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            labels = batch["labels"][:, 1:]
            hit = (output.logits[:, :-1].argmax(-1) == labels)[labels != -100].float().mean()
            log.log(
                step + 1,
                loss=output.loss.detach(),
                word_accuracy=hit,
                lr=optimizer.param_groups[0]["lr"],
                grad=norm,
                seconds=time.time() - start,
            )
    log.close()
    save_base(model.eval().cpu(), tokenizer, out / "base")
    print(f"wrote {out / 'base'}")


if __name__ == "__main__":
    run(main, parse_args())
