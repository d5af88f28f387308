"""Ground words in a picture, or hold a grounded conversation about it.

    python flmm/scripts/demo/grounded_conversation_demo.py --config CONFIG --head head.safetensors --image street.jpg --text "a red car"
    ... --image street.jpg                              # no --text: the base describes the picture, its noun phrases are grounded
    ... --image street.jpg --question "Where can I sit?"

Writes OUT.png (overlay) and OUT.json (phrases, boxes in pixels, scores, COCO RLE). Asks nothing at the terminal.
Without --config and --head the model of the built-in run is used (bash run_all.sh flmm, or bash flmm/run_builtin.sh).
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[3])
)  # repository root: every way of starting this file finds it

from common.checkpoint import atomic_write
from common.errors import UserError, run
from flmm.build import add_config_arguments, read_config
from flmm.conversation import Grounder
from flmm.data.transforms import load_image
from flmm.draw import labelled_strip, save_image

ROOT = Path(__file__).resolve().parents[3]


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, required=True, help="picture, any format and mode")
    parser.add_argument("--text", help="phrase to ground; several are separated by ';'")
    parser.add_argument(
        "--question", help="what to ask the base when there is no --text (default: to describe the picture)"
    )
    add_config_arguments(parser, data=False, required=False)
    parser.add_argument("--head", type=Path, help="trained head, .safetensors or .pth")
    parser.add_argument(
        "--selector", type=Path, help="trained keyword selector; else noun phrases by spaCy or by rule"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("grounded"),
        help="name of the results without suffix (default grounded)",
    )
    return parser.parse_args()


def builtin_model():
    """Configuration, overrides, head and selector that the built-in run left behind."""
    runs = Path(os.environ.get("RUNS", ROOT / "runs")) / "flmm"
    head = runs / "head-llava-0" / "head.safetensors"
    if not head.is_file():
        raise UserError(
            "no --config and --head given, and the built-in run has not been made yet: bash flmm/run_builtin.sh"
        )
    selector = runs / "selector-llava.safetensors"
    return (
        ROOT / "flmm/configs/tiny/scenes.yaml",
        [f"base.path={runs / 'base-llava-0' / 'base'}", f"sam.path={runs / 'sam' / 'sam_tiny.safetensors'}"],
        head,
        selector if selector.is_file() else None,
    )


def main(args):
    if bool(args.config) != bool(args.head):
        raise UserError("give --config and --head together, or neither for the built-in model")
    image = load_image(args.image)
    phrases = [p.strip() for p in args.text.split(";")] if args.text is not None else None
    if phrases is not None and not all(phrases):
        raise UserError(
            f"--text {args.text!r}: an empty phrase cannot be grounded; write the words to look for"
        )
    config, overrides, head, selector = (
        (args.config, args.set, args.head, args.selector) if args.config else builtin_model()
    )
    grounder = Grounder.load(read_config(config, [*overrides, *args.set]), head, args.selector or selector)
    result = grounder.ground(image, phrases) if phrases else grounder.converse(image, args.question)
    if "answer" in result:
        print(f"answer: {result['answer']}")
    for phrase, box, score in zip(result["phrases"], result["boxes"], result["scores"]):
        print(
            f"{phrase}: " + (f"box {box} score {score:.2f}" if box else f"nothing found, score {score:.2f}")
        )
    picture = labelled_strip(
        image, [("grounded", result["masks"])], result["phrases"], height=min(512, max(256, image.height))
    )
    save_image(picture, args.out.with_name(args.out.name + ".png"))
    keep = {k: v for k, v in result.items() if k not in ("masks", "coarse_masks")}
    atomic_write(
        args.out.with_name(args.out.name + ".json"),
        json.dumps({"image": args.image.name, **keep}, indent=1, ensure_ascii=False),
    )
    print(f"wrote {args.out}.png and {args.out}.json")


if __name__ == "__main__":
    run(main, parse_args())
