"""Check that pictures reach a Qwen-VL base whole: `image_grid_thw`, the number of image tokens, and the data
sample.

    python flmm/diagnose_image_grid_thw.py --path Qwen/Qwen2.5-VL-3B-Instruct   # or a folder
    python flmm/diagnose_image_grid_thw.py          # a tiny model of the same class
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

from PIL import Image

from common.arguments import Parser, number
from common.errors import UserError, run
from flmm.data.samples import SampleBuilder, caption_of_phrases
from flmm.models.frozen_qwen import FrozenQwen
from flmm.models.tiny import tiny_model, tiny_tokenizer


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--path", help="Qwen2.5-VL folder or hub name (default: a tiny random model of the same class)"
    )
    parser.add_argument("--width", type=number(int, 1), default=640, help="test picture, pixels")
    parser.add_argument("--height", type=number(int, 1), default=480, help="test picture, pixels")
    return parser.parse_args(argv)


def checks(base, image):
    """(is it right, what is checked, advice) of one picture, up to the first that the others rest on."""
    processed = base.image_processor(image)
    sample = SampleBuilder.of(base)({"image": image, "pieces": caption_of_phrases(["a red car"])})
    grid, merge = processed.get("image_grid_thw"), base.model.config.vision_config.spatial_merge_size
    processor = "use the Qwen2-VL image processor of transformers 5"
    yield grid is not None, "the processor returns image_grid_thw", processor
    carried = "image_grid_thw" in sample
    yield carried, "the data sample carries it on to the model", "keep every key that the processor returns"
    if grid is None or not carried:
        return
    t, h, w = grid.flatten().tolist()
    yield grid.shape == (1, 3), f"its shape is (1, 3): {tuple(grid.shape)}", "one row per picture is expected"
    patches = len(sample["pixel_values"])
    calls = "patches and grid come from different calls of the processor"
    yield patches == t * h * w, f"{patches} patches = {t} x {h} x {w}", calls
    tokens = int((base.expand(sample["input_ids"], sample) == base.image_token_id).sum())
    pads = "write one <|image_pad|> per merged patch"
    yield tokens == t * h * w // merge**2, f"{tokens} image tokens = patches / {merge}^2", pads
    maps, side = base([sample])[0]["mask_attentions"], (h // merge, w // merge)
    yield maps.shape[-2:] == side, f"attention maps are {side[0]} x {side[1]}", "grid and columns differ"


def main(args):
    if args.path:
        base = FrozenQwen.load(args.path)
    else:
        tokenizer = tiny_tokenizer()
        model = tiny_model("qwen", tokenizer)
        base = FrozenQwen(model, tokenizer, FrozenQwen.make_processor(model.config, {}))
    failed = []
    for right, what, advice in checks(base, Image.new("RGB", (args.width, args.height), "grey")):
        print(("ok      " if right else "PROBLEM ") + what)
        if not right:
            failed.append(advice)
    if failed:
        raise UserError("; ".join(failed))
    print("all checks passed")


if __name__ == "__main__":
    run(main, parse_args())
