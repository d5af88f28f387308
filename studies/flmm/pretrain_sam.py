"""Pre-train a tiny SAM (transformers' SamModel) on the built-in scenes, prompted by boxes and by blurred
masks.

    python studies/flmm/pretrain_sam.py --out runs/flmm/sam

It knows no words: it learns to cut out what a prompt points at, as the published SAM does.
OUT/sam_tiny.safetensors has the original key names, so that the built-in run loads it through the same
conversion as sam_vit_l_0b3195.pth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from common.arguments import Parser, add_run_arguments
from common.checkpoint import atomic_path
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
from flmm.data.scenes import make_scene
from flmm.losses import average_iou, bce_loss, dice_loss
from flmm.models.mask_head.mask_refiner import SAMImageEncoder, SAMWrapper, original_keys
from flmm.models.tiny import tiny_sam


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_run_arguments(
        parser,
        omit=["epochs", "eval_every"],
        lr=1.5e-3,
        batch_size=8,
        max_steps=500,
        warmup=40,
        save_every=0,
        log_every=50,
    )
    return parser.parse_args(argv)


def blurred_logits(masks, generator):
    """Coarse logits (n, 32, 32) of masks (n, H, W): what an attention map might give, about 8 x 8 in detail
    and noisy."""
    coarse = F.interpolate(masks[:, None].float(), size=(8, 8), mode="area")
    coarse = coarse + 0.15 * torch.randn(coarse.shape, generator=generator)
    return F.interpolate(6 * (coarse - 0.4), size=(32, 32), mode="bilinear")[:, 0]


class Prompts(torch.utils.data.Dataset):
    """`count` scenes with a blurred version of every mask, none of which any other part of this repository
    draws."""

    def __init__(self, seed: int, count: int):
        self.seed, self.count = seed, count

    def __len__(self):
        return self.count

    def scene(self, index: int):
        """The scene of one index, beyond all that make_data.py and pretrain_base.py draw."""
        return make_scene(self.seed, 900_000_000 + index, overlap=True)

    def __getitem__(self, index: int):
        scene = self.scene(index)
        masks = torch.from_numpy(scene["masks"])
        generator = torch.Generator().manual_seed(self.seed * 1_000_000 + index)
        return {
            "image": Image.fromarray(scene["image"]),
            "masks": masks,
            "blurred": blurred_logits(masks, generator),
            "file_name": f"scene {index}",
        }


class PromptedSAM(torch.nn.Module):
    """The whole tiny SAM, image encoder included, which trains here and only here."""

    def __init__(self, sam):
        super().__init__()
        self.sam, self.encoder, self.refiner = sam, SAMImageEncoder(sam), SAMWrapper(sam, use_text=False)
        sam.requires_grad_(True)
        self.refiner.prompt_encoder.shared_embedding.requires_grad_(False)

    def forward(self, samples, use_mask: bool):
        """Logits (n, H, W) and predicted IoU (n,) of all masks of the samples; their boxes are always
        prompts."""
        pixels = torch.stack([self.encoder.preprocess(s["image"]) for s in samples])
        embeddings = self.encoder.encoder(pixels.to(next(self.parameters()).device)).last_hidden_state
        self.refiner.use_mask = use_mask
        refined = self.refiner(
            list(embeddings),
            [s["masks"].shape[1:] for s in samples],
            [s["blurred"].to(embeddings.device) for s in samples],
            [[None] * len(s["masks"]) for s in samples],
        )
        return torch.cat([logits for logits, _ in refined]), torch.cat([scores for _, scores in refined])


def main(args):
    # A random SAM, all of which trains.
    accelerator = make_accelerator(args)
    seed_everything(args.seed)
    sam = tiny_sam(args.seed)
    prompted = PromptedSAM(sam)
    if args.compile:
        sam.vision_encoder.compile()

    # Scenes in the order of their index: there are as many as the steps need.
    scenes = Prompts(args.seed, args.max_steps * args.batch_size * args.accum * accelerator.num_processes)
    loader = make_loader(scenes, args, collate_fn=list, shuffle=False)
    group = {"params": [p for p in sam.parameters() if p.requires_grad], "lr": args.lr, "peak": args.lr}
    optimizer = torch.optim.AdamW([group], weight_decay=args.weight_decay)
    model, optimizer, loader = accelerator.prepare(prompted, optimizer, loader)
    steps = plan_steps(args, loader)
    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)
    accelerator.print(f"tiny SAM: {describe(sam)}")

    # The loop: one step with boxes alone, the next with boxes and blurred masks.
    training = start(accelerator, args, steps, [optimizer])
    for samples, share in batches(training, loader, lambda batch: sum(len(s["masks"]) for s in batch)):
        with accelerator.accumulate(model):
            logits, scores = model(samples, use_mask=training.state["step"] % 2 == 1)
            target = torch.cat([s["masks"] for s in samples]).to(logits.device)
            # The predicted IoU is trained towards the true one.
            with torch.no_grad():
                inside = logits > 0
                hits = (inside & target).sum((1, 2)) / (inside | target).sum((1, 2)).clamp(min=1)
            loss = dice_loss(logits, target) + bce_loss(logits, target) + F.mse_loss(scores, hits)
            iou = average_iou(logits.detach(), target)
            check_finite(training, [s["file_name"] for s in samples], loss=loss * share, iou=iou * share)
            accelerator.backward(loss * share)
            factor = lr_at(training.state["step"], steps, args.warmup, floor=0.05)
            grad = update(training, model, [optimizer], factor)
        # After an optimizer step: log, save, stop.
        if accelerator.sync_gradients:
            finish_step(training, grad=grad)

    # Under the original names, in which published SAMs come.
    if accelerator.is_main_process:
        state = {k: v for k, v in sam.state_dict().items() if not k.startswith("shared_image_embedding")}
        names = original_keys(state)
        with atomic_path(out / "sam_tiny.safetensors") as temporary:
            save_file({names[k]: v.cpu().contiguous().clone() for k, v in state.items()}, temporary)
        print(f"wrote {out / 'sam_tiny.safetensors'}")
    finish(training)


if __name__ == "__main__":
    run(main, parse_args())
