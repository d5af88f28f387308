"""Pre-train a tiny SAM (transformers' SamModel) on the built-in scenes, prompted by boxes and by blurred masks.

    python flmm/pretrain_sam.py --out runs/flmm/sam

It knows no words: it learns to cut out what a prompt points at, as the published SAM does. Written to OUT/sam_tiny.safetensors
under the original key names, so that the built-in run loads it through the same conversion as sam_vit_l_0b3195.pth.
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
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

from common.checkpoint import atomic_path
from common.errors import run
from common.run import Log, describe, open_run, seed_everything
from flmm.data.scenes import make_scene
from flmm.losses import average_iou, bce_loss, dice_loss
from flmm.models.mask_head.mask_refiner import SAMImageEncoder, SAMWrapper, original_keys
from flmm.models.tiny import tiny_sam


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps (default 500)")
    parser.add_argument("--batch-size", type=int, default=8, help="scenes per step (default 8)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate (default 1.5e-3)")
    parser.add_argument("--seed", type=int, default=0, help="weights and scenes (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    return parser.parse_args()


def blurred_logits(masks, generator):
    """(n, H, W) masks -> coarse logits (n, 32, 32): what an attention map might give, about 8 x 8 in detail and noisy."""
    coarse = F.interpolate(masks[:, None].float(), size=(8, 8), mode="area")
    coarse = coarse + 0.15 * torch.randn(coarse.shape, generator=generator)
    return F.interpolate(6 * (coarse - 0.4), size=(32, 32), mode="bilinear")[:, 0]


def main(args):
    accelerator = Accelerator()
    out = open_run(args.out, args, accelerator, overwrite=args.overwrite)
    seed_everything(args.seed)
    sam = tiny_sam(args.seed)
    encoder, refiner = SAMImageEncoder(sam), SAMWrapper(sam, use_text=False)
    sam.requires_grad_(True)  # here, and only here, the image encoder learns
    refiner.prompt_encoder.shared_embedding.requires_grad_(False)
    print(f"tiny SAM: {describe(sam)}")
    optimizer = torch.optim.AdamW(
        [p for p in sam.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.01
    )
    generator = torch.Generator().manual_seed(args.seed)
    log, start = Log(out, accelerator, total=args.steps), time.time()
    for step in range(args.steps):
        first = 900_000_000 + step * args.batch_size  # away from every other scene of this repository
        scenes = [make_scene(args.seed, first + i, overlap=True) for i in range(args.batch_size)]
        pixels = torch.stack([encoder.preprocess(Image.fromarray(s["image"])) for s in scenes])
        embeddings = encoder.encoder(pixels).last_hidden_state
        masks = [torch.from_numpy(s["masks"]) for s in scenes]
        refiner.use_mask = step % 2 == 1  # box alone, then box and blurred mask
        refined = refiner(
            list(embeddings),
            [m.shape[1:] for m in masks],
            [blurred_logits(m, generator) for m in masks],
            [[None] * len(m) for m in masks],
        )
        logits, scores, target = (
            torch.cat([r for r, _ in refined]),
            torch.cat([s for _, s in refined]),
            torch.cat(masks),
        )
        with torch.no_grad():
            hits = ((logits > 0) & target).sum((1, 2)) / ((logits > 0) | target).sum((1, 2)).clamp(min=1)
        loss = dice_loss(logits, target) + bce_loss(logits, target) + F.mse_loss(scores, hits)
        for group in optimizer.param_groups:
            group["lr"] = (
                args.lr
                * min(1, (step + 1) / 40)
                * (0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps)))
            )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            log.log(
                step + 1,
                loss=loss.detach(),
                iou=average_iou(logits.detach(), target),
                lr=optimizer.param_groups[0]["lr"],
                grad=norm,
                seconds=time.time() - start,
            )
    log.close()
    state = {k: v for k, v in sam.state_dict().items() if not k.startswith("shared_image_embedding")}
    names = original_keys(state)
    with atomic_path(out / "sam_tiny.safetensors") as temporary:
        save_file({names[k]: v.contiguous().clone() for k, v in state.items()}, temporary)
    print(f"wrote {out / 'sam_tiny.safetensors'}")


if __name__ == "__main__":
    run(main, parse_args())
