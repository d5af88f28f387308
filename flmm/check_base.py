"""Check that a base is read rightly: run it once for every new base, before heads are trained on it.

    python flmm/check_base.py --config flmm/configs/internvl/frozen_internvl3_2b_unet_sam_l_refcoco_png.yaml
    python flmm/check_base.py --tiny smolvlm          # random weights of the real class, no download

Prints one line a check and ends with status 1 if one of them failed. The rows that SDPA gives are compared
with full matrices; pictures of five shapes in one left-padded batch with each alone; bfloat16 with float32; a
change somewhere in a picture must show at that place of the grid; and the prompt of the configuration is
compared with the tokenizer's own chat template.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from common.arguments import Parser, refuse
from common.errors import UserError, end, run
from flmm.build import FAMILIES, add_config_arguments, build_base, read_config
from flmm.data.samples import SampleBuilder, caption_of_phrases
from flmm.models.flmm import unpad_crop
from flmm.models.frozen_base import CHAT
from flmm.models.tiny_bases import tiny_base

SIZES = ((160, 96), (96, 160), (90, 96), (320, 256), (31, 64))  # width x height of the pictures
PLACES = ((0.1, 0.3), (0.3, 0.85), (0.7, 0.15), (0.9, 0.65))  # down and to the right, of the picture's sides
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_config_arguments(parser, data=False, required=False)
    parser.add_argument("--base-path", help="folder or hub name of the base instead of base.path")
    parser.add_argument("--tiny", choices=sorted(FAMILIES), help="check this family with random weights")
    return parser.parse_args(argv)


def picture(size, seed=0):
    """A random picture of (width, height) pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def sample(base, size, phrases=("a red car", "the blue sky over there")):
    """A sample of a random picture with phrases and empty masks."""
    masks = np.zeros((len(phrases), size[1], size[0]), np.uint8)
    record = {"image": picture(size), "pieces": caption_of_phrases(phrases), "masks": masks}
    return SampleBuilder.of(base)(record)


def distance(first, second, key):
    """Largest difference between two outputs of a base relative to the largest value."""
    return max(
        ((a[key] - b[key]).abs().max() / b[key].abs().max().clamp(min=1e-12)).item()
        for a, b in zip(first, second)
    )


def reread(base, samples, attention, dtype=None):
    """Outputs for each sample alone with another attention or number format; the base is left as it was."""
    before, own = base.attention, base.model.dtype
    try:
        base.read_attention(attention)
        if dtype is not None:  # a base in 4 bits takes no .to at all
            base.model.to(dtype)
        return [base([s])[0] for s in samples]
    finally:
        base.read_attention(before)
        if dtype is not None:
            base.model.to(own)


@torch.no_grad()
def embedded(base, one):
    """(n, d) input embeddings of the picture's tokens."""
    kept = {}

    def keep(module, args, inputs):
        kept["x"] = inputs["inputs_embeds"][0]

    hook = base.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        base([one])
    finally:
        hook.remove()
    ids = base.expand(one["input_ids"], one)
    return kept["x"].float().cpu()[ids == base.image_token_id]


def places_found(base, size):
    """How many of PLACES, changed in a picture of `size`, change the token at that place of the grid most."""
    one = sample(base, size)
    plain, image, found = embedded(base, one), one["image"], 0
    for down, right in PLACES:
        changed = np.array(image)
        y, x = int(down * image.height), int(right * image.width)
        high, wide = max(1, image.height // 12), max(1, image.width // 12)
        part = slice(max(0, y - high), y + high), slice(max(0, x - wide), x + wide)
        changed[part] = 255 * (changed[part] < 128)
        changed = Image.fromarray(changed)
        moved = (embedded(base, {**one, "image": changed, **base.image_processor(changed)}) - plain).norm(
            dim=1
        )

        # as the map of one head and one phrase; the last one is the finer where there are two
        grid = base.to_grid([moved[None, None]], base.grid(one))[0, -1]
        if base.unpad:
            grid = unpad_crop(grid[None], one["meta_data"])[0]
        h, w = grid.shape
        row, column = divmod(int(grid.argmax()), w)
        near = abs(row + 0.5 - down * h) <= max(1, h / 8), abs(column + 0.5 - right * w) <= max(1, w / 8)
        found += all(near)
    return found


def check_base(base):
    """Rows (what is checked, result, is it right) of one base."""
    lines, samples = [], []
    for size in SIZES:
        one = sample(base, size)
        tokens = int((base.expand(one["input_ids"], one) == base.image_token_id).sum())
        grid = tuple(base([one])[0]["mask_attentions"].shape)
        right = tokens == base.image_tokens(one) and grid[1] == base.channels
        lines.append((f"picture of {size[0]} x {size[1]}", f"{tokens} image tokens, maps {grid}", right))
        samples.append(one)
    limit = ROUNDING.get(base.model.dtype, 2e-2)
    alone = [base([s])[0] for s in samples]
    for name, other in (
        ("rows against full matrices", reread(base, samples, "eager")),
        ("left-padded batch of five pictures against each alone", base(samples)),
    ):
        for key, what in (("mask_attentions", "attention"), ("hidden_states", "hidden states")):
            gap = distance(other, alone, key)
            lines.append((f"{name}, {what}", f"{gap:.1e} (limit {limit:.0e})", gap < limit))
    if base.model.dtype == torch.float32:
        gap = distance(reread(base, samples, "rows", torch.bfloat16), alone, "mask_attentions")
        lines.append(("bfloat16 against float32, attention", f"{gap:.1e} (limit 3e-01)", gap < 0.3))
    for size in SIZES[:2]:
        found, all_of_them = places_found(base, size), len(PLACES)
        name = f"places of {size[0]} x {size[1]} on the grid"
        lines.append((name, f"{found} of {all_of_them}", found == all_of_them))
    return [*lines, *check_prompt(base)]


def check_prompt(base):
    """The prompt and the tokenizer's own template, which may differ where published heads were trained so."""
    ids = base.encode_prompt()
    lines = [
        (
            "image tokens in the prompt",
            str(ids.count(base.image_token_id)),
            ids.count(base.image_token_id) == 1,
        )
    ]
    used, base.template = base.template, CHAT
    try:
        own = base.encode_prompt()
        same = "equals" if own == ids else f"{len(ids)} tokens, its own {len(own)}: differs from"
        lines.append((f"prompt {used}", f"{same} the tokenizer's chat template", True))
    except UserError as error:
        lines.append((f"prompt {used}", str(error), True))
    finally:
        base.template = used
    return lines


def main(args):
    if bool(args.tiny) == bool(args.config):
        raise UserError("give --config, or --tiny with the name of a family")
    if args.tiny:
        refuse(args, ["set", "base_path"], "beside --tiny")
        base = tiny_base(args.tiny)
    else:
        base = build_base(read_config(args.config, args.set, args.base_path)).to(Accelerator().device)
    print(f"{type(base).__name__}: {base.num_layers} layers, {base.channels} channels, {base.model.dtype}")
    lines = check_base(base)
    width = max(len(name) for name, _, _ in lines)
    for name, result, right in lines:
        print(f"{'ok  ' if right else 'FAIL'}  {name:{width}}  {result}")
    wrong = sum(not right for _, _, right in lines)
    print(f"{len(lines) - wrong} of {len(lines)} checks passed")
    if wrong:
        end(1)


if __name__ == "__main__":
    run(main, parse_args())
