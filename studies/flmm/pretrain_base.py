"""Pre-train a tiny multimodal LLM (a native transformers class) to caption the built-in scenes; it is the
base to freeze.

    python studies/flmm/pretrain_base.py --base llava --out runs/flmm/base-0

The loss is that of the next word, on the caption only. Scenes are drawn on the fly and never repeat: seed and
index name them. The base is written to OUT/base.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from PIL import Image

from common.arguments import Parser, add_run_arguments
from common.errors import run
from common.run import describe, open_run, seed_everything
from common.train import (
    batches,
    check_finite,
    finish,
    finish_step,
    lr_at,
    make_accelerator,
    make_loader,
    plan_steps,
    start,
    update,
)
from flmm.build import FAMILIES
from flmm.data.samples import SampleBuilder
from flmm.data.scenes import QUESTION, make_scene
from flmm.models.tiny import TINY_FAMILIES, save_base, tiny_model, tiny_tokenizer

# Qwen: keep the scenes at their size; the other families have one size anyway.
TINY_PICTURES = {"min_pixels": 64 * 64, "max_pixels": 64 * 64}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--base", choices=TINY_FAMILIES, default="llava", help="class of the base")
    add_run_arguments(
        parser,
        omit=["epochs", "eval_every"],
        lr=1.5e-3,
        batch_size=16,
        max_steps=800,
        warmup=40,
        save_every=0,
        log_every=50,
    )
    return parser.parse_args(argv)


class FreshScenes(torch.utils.data.Dataset):
    """`count` scenes as samples of a base, none of which any split of make_data.py holds."""

    def __init__(self, base, seed: int, count: int):
        self.build, self.seed, self.count = SampleBuilder.of(base), seed, count
        self.end = torch.tensor([base.tokenizer.eos_token_id])

    def __len__(self):
        return self.count

    def scene(self, index: int):
        """The scene of one index, beyond all that make_data.py draws."""
        return make_scene(self.seed, 500_000_000 + index, overlap=True)

    def __getitem__(self, index: int):
        scene = self.scene(index)
        sample = self.build(
            {
                "image": Image.fromarray(scene["image"]),
                "pieces": scene["pieces"],
                "file_name": f"scene {index}",
            }
        )
        for name in ("input_ids", "labels"):  # the end token closes each caption
            sample[name] = torch.cat([sample[name], self.end])
        return sample


def caption_batch(base, samples):
    """Inputs of one forward pass with labels (B, S), left-padded; -100 where nothing is to be predicted."""
    inputs, shifts = base.batch(samples)
    labels = [base.expand(s["input_ids"], s, s["labels"], fill=-100) for s in samples]
    labels = torch.stack([torch.cat([row.new_full((k,), -100), row]) for row, k in zip(labels, shifts)])
    return {**inputs, "labels": labels.to(base.device)}


def main(args):
    # A base of random weights, all of which train here and only here.
    accelerator = make_accelerator(args)
    seed_everything(args.seed)
    tokenizer = tiny_tokenizer()
    model = tiny_model(args.base, tokenizer, args.seed)
    family = FAMILIES[args.base]
    processor = family.make_processor(model.config, TINY_PICTURES)
    base = family(model, tokenizer, processor, template="plain", question=QUESTION)
    model.requires_grad_(True).train()
    if args.compile:
        model.compile()

    # Scenes in the order of their index: there are as many as the steps need.
    scenes = FreshScenes(
        base, args.seed, args.max_steps * args.batch_size * args.accum * accelerator.num_processes
    )
    loader = make_loader(scenes, args, collate_fn=list, shuffle=False)
    group = {"params": list(model.parameters()), "lr": args.lr, "peak": args.lr}
    optimizer = torch.optim.AdamW([group], betas=(0.9, 0.98), weight_decay=args.weight_decay)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = plan_steps(args, loader)
    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)
    accelerator.print(f"{family.architecture}: {describe(base.model)}, vocabulary {len(tokenizer)}")

    # The loop. The loss is a mean over the words of the captions, so the share is counted in words.
    training = start(accelerator, args, steps, [optimizer])
    for samples, share in batches(
        training, loader, lambda batch: sum((s["labels"] != -100).sum() for s in batch)
    ):
        with accelerator.accumulate(model):
            batch = caption_batch(base, samples)
            output = model(**batch)
            # Accuracy over the words that are to be predicted, each from those before it.
            labels = batch["labels"][:, 1:]
            hit = (output.logits[:, :-1].argmax(-1) == labels)[labels != -100].float().mean()
            loss = output.loss * share
            check_finite(training, [s["file_name"] for s in samples], loss=loss, word_accuracy=hit * share)
            accelerator.backward(loss)
            factor = lr_at(training.state["step"], steps, args.warmup, floor=0.05)
            grad = update(training, model, [optimizer], factor)
        # After an optimizer step: log, save, stop.
        if accelerator.sync_gradients:
            finish_step(training, grad=grad)

    # The folder that `from_pretrained` reads.
    if accelerator.is_main_process:
        save_base(base.model.eval().cpu(), tokenizer, out / "base")
        print(f"wrote {out / 'base'}")
    finish(training)


if __name__ == "__main__":
    run(main, parse_args())
