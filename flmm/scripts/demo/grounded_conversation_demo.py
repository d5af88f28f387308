"""Ground words in a picture, or hold a grounded conversation about it.

    python flmm/scripts/demo/grounded_conversation_demo.py --config CONFIG --head head.safetensors \\
        --image street.jpg --text "a red car"
    ... --image street.jpg                   # the base describes the picture; its noun phrases are grounded
    ... --image street.jpg --question "Where can I sit?" "What colour is it?"     # one turn after another

Of several pictures the base sees all, and words are looked for in the first. Writes OUT.png (the picture
with its masks) and OUT.json (phrases, boxes in pixels, scores, COCO RLE). Asks nothing at the terminal.
Without --config and --head the model of the built-in study is used, which `bash run_all.sh flmm` makes.
"""

import os
import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from common.arguments import Parser, refuse
from common.checkpoint import atomic_json
from common.errors import UserError, run
from common.files import read_json
from flmm.build import add_config_arguments, read_config
from flmm.conversation import Grounder
from flmm.data.transforms import load_image
from flmm.draw import labelled_strip, save_image

ROOT = Path(__file__).resolve().parents[3]


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--image", type=Path, nargs="+", required=True, help="the picture, of any format and mode, or several"
    )
    parser.add_argument("--text", help="the phrase to ground; several are separated by ';'")
    parser.add_argument(
        "--question",
        nargs="+",
        help="what to ask the base where there is no --text, instead of a description; of several questions "
        "each is asked after the answer to the one before",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("grounded"), help="name of the results without their suffix"
    )
    return parser.parse_args(argv)


def add_model_arguments(parser):
    """--config, --set, --head and --selector, alike in both demos."""
    add_config_arguments(parser, data=False, required=False)
    parser.add_argument("--head", type=Path, help="trained head, .safetensors or .pth")
    parser.add_argument(
        "--selector",
        type=Path,
        help="trained keyword selector; without one, noun phrases are found by spaCy or by rule",
    )


def load_grounder(args) -> Grounder:
    """The model that the options name, or the one that the built-in study left behind."""
    if bool(args.config) != bool(args.head):
        raise UserError("give --config and --head together, or neither for the built-in model")
    if args.config:
        return Grounder.load(read_config(args.config, args.set), args.head, args.selector)
    runs = Path(os.environ.get("RUNS") or ROOT / "runs") / "flmm"
    head, selector = runs / "head-llava-0" / "head.safetensors", runs / "selector-llava" / "model.safetensors"
    if not head.is_file():
        raise UserError(
            "there is no --config and no --head, and the built-in study has not been run yet: give both, or "
            "run bash run_all.sh flmm first"
        )
    steps = read_json(head.with_name("metrics.json"), {"steps": int})["steps"]
    if steps < 100:
        print(
            f"{head}: trained for {steps} steps, as --smoke does, so masks and presence mean nothing; run "
            "bash run_all.sh flmm",
            file=sys.stderr,
        )
    overrides = [
        f"base.path={runs / 'base-llava-0' / 'base'}",
        f"sam.path={runs / 'sam' / 'sam_tiny.safetensors'}",
    ]
    config = read_config(ROOT / "flmm/configs/tiny/scenes.yaml", [*overrides, *args.set])
    return Grounder.load(config, head, args.selector or (selector if selector.is_file() else None))


def main(args):
    # Read what was asked before the model is loaded.
    images, phrases = [load_image(path) for path in args.image], None
    image = images[0]
    if args.text is not None:
        refuse(args, ["question", "selector"], "beside --text")
        if len(images) > 1:
            raise UserError("--text is looked for in one picture; give one --image")
        phrases = [phrase.strip() for phrase in args.text.split(";")]
        if not all(phrases):
            raise UserError(
                f"--text {args.text!r}: an empty phrase cannot be grounded; write the words to look for"
            )

    # Ground the phrases, or let the base answer and ground its words.
    grounder = load_grounder(args)
    history = []
    if phrases:
        result = grounder.ground(image, phrases)
    else:
        for question in args.question or [None]:
            result = grounder.converse(images, question, history=history)
            history.append((question, result["answer"]))
            print(f"answer: {result['answer']}")
    rows = zip(result["phrases"], result["boxes"], result["scores"], result["presence"])
    for phrase, box, score, there in rows:
        found, sure = f"box {box}" if box else "nothing found,", ""
        if result["calibrated"]:
            sure = f", presence {there:.2f}" + (" (probably not there)" if there < 0.5 else "")
        print(f"{phrase}: {found} score {score:.2f}{sure}")

    # The picture with its masks, and everything but the masks' pixels as JSON.
    height = min(512, max(256, image.height))
    picture = labelled_strip(image, [("grounded", result["masks"])], result["phrases"], height=height)
    save_image(picture, args.out.with_name(args.out.name + ".png"))
    kept = {name: value for name, value in result.items() if name not in ("masks", "coarse_masks")}
    atomic_json(args.out.with_name(args.out.name + ".json"), {"image": args.image[0].name, **kept})
    print(f"wrote {args.out}.png and {args.out}.json")


if __name__ == "__main__":
    run(main, parse_args())
