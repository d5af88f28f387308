"""Check that pictures reach a Qwen-VL base whole: `image_grid_thw`, the number of image tokens, and the data
sample.

python flmm/diagnose_image_grid_thw.py --path Qwen/Qwen2.5-VL-3B-Instruct      # or a local folder
python flmm/diagnose_image_grid_thw.py                                         # a tiny model of the same
class
"""

import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from common.arguments import Parser
from common.errors import UserError, run
from flmm.data.samples import SampleBuilder, caption_of_phrases
from flmm.models.frozen_qwen import FrozenQwen
from flmm.models.tiny import tiny_model, tiny_tokenizer


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--path", help="Qwen2.5-VL folder or hub name (default: a tiny random model of the same class)"
    )
    parser.add_argument("--width", type=int, default=640, help="test picture, pixels")
    parser.add_argument("--height", type=int, default=480, help="test picture, pixels")
    return parser.parse_args(argv)


def main(args):
    if args.path:
        base = FrozenQwen.load(args.path)
    else:
        tokenizer = tiny_tokenizer()
        model = tiny_model("qwen", tokenizer)
        base = FrozenQwen(model, tokenizer, FrozenQwen.make_processor(model.config, {}))
    image = Image.fromarray(np.full((args.height, args.width, 3), 128, np.uint8))
    processed = base.image_processor(image)
    sample = SampleBuilder.of(base)({"image": image, "pieces": caption_of_phrases(["a red car"])})
    merge, failed = base.model.config.vision_config.spatial_merge_size, []

    def check(passed, what, advice):
        print(("ok      " if passed else "PROBLEM ") + what)
        if not passed:
            failed.append(advice)

    grid = processed.get("image_grid_thw")
    check(
        grid is not None,
        "the processor returns image_grid_thw",
        "use the Qwen2-VL image processor of transformers 5",
    )
    check(
        "image_grid_thw" in sample,
        "the data sample carries it on to the model",
        "keep every key that the processor returns",
    )
    if not failed:
        t, h, w = grid.flatten().tolist()
        check(
            grid.shape == (1, 3),
            f"its shape is (1, 3): {tuple(grid.shape)}",
            "one row per picture is expected",
        )
        check(
            len(sample["pixel_values"]) == t * h * w,
            f"{len(sample['pixel_values'])} patches = {t} x {h} x {w}",
            "patches and grid come from different calls of the processor",
        )
        tokens = (base.expand(sample["input_ids"], sample) == base.image_token_id).sum().item()
        check(
            tokens == t * h * w // merge**2,
            f"{tokens} image tokens = patches / {merge}^2",
            "write one <|image_pad|> per merged patch",
        )
        features = base([sample])[0]["mask_attentions"]
        check(
            tuple(features.shape[-2:]) == (h // merge, w // merge),
            f"attention maps are {h // merge} x {w // merge}",
            "grid and attention columns differ",
        )
    if failed:
        raise UserError("; ".join(failed))
    print("all checks passed")


if __name__ == "__main__":
    run(main, parse_args())
