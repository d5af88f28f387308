"""Which words of a caption does the tiny base know? Accuracy of each kind of word, choosing among the words
of that kind.

    python studies/flmm/score_words.py --config CONFIG --data DATA --out words.json

Teacher-forced on the test split of make_data.py: before each word of a phrase, the base's most likely word of
the same kind (colour, size, texture, shape). Controls: the same with the next picture, and chance. The first
colour of a caption cannot be known, since objects are named in random order; so colours stay below 1 however
good the base is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch

from common.arguments import Parser
from common.checkpoint import atomic_json
from common.errors import UserError, run
from flmm.build import add_config_arguments, build_base, build_dataset, read_config
from flmm.data.samples import SampleBuilder
from flmm.data.scenes import COLOURS, SHAPES, SIZES, TEXTURES

KINDS = {"colour": list(COLOURS), "size": list(SIZES), "texture": list(TEXTURES[1:]), "shape": list(SHAPES)}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--split", default="test", help="part of the configuration's data")
    parser.add_argument("--out", type=Path, required=True, help=".json to write")
    return parser.parse_args(argv)


@torch.no_grad()
def main(args):
    config = read_config(args.config, args.set)
    base = build_base(config)
    dataset = build_dataset(config, args.split, args.data, SampleBuilder.of(base))
    ids = {}  # kind -> token id of each word
    for kind, words in KINDS.items():
        tokens = [base.tokenizer(" " + word, add_special_tokens=False).input_ids for word in words]
        if any(len(t) != 1 for t in tokens):
            raise UserError(
                f"{args.config}: the base's tokenizer splits scene words; this script is for the tiny bases"
            )
        ids[kind] = torch.tensor([t[0] for t in tokens])
    samples = [dataset[i] for i in range(len(dataset))]
    hits = {kind: {"right picture": [], "next picture": []} for kind in KINDS}
    for i, sample in enumerate(samples):
        other = samples[(i + 1) % len(samples)]
        pictures = {
            k: other[k]
            for k in ("pixel_values", "image_grid_thw", "image_sizes", "meta_data", "image")
            if k in other
        }
        for name, shown in (("right picture", sample), ("next picture", {**sample, **pictures})):
            inputs, _ = base.batch([shown])
            logits = base.model(**inputs).logits[0, :-1].cpu()
            target = base.expand(shown["input_ids"], shown, shown["labels"], fill=-100)[1:]
            for kind, words in ids.items():
                for at in torch.isin(target, words).nonzero().flatten().tolist():
                    hits[kind][name].append(bool(words[logits[at, words].argmax()] == target[at]))
    result = {
        kind: {
            **{name: sum(h) / len(h) for name, h in parts.items()},
            "chance": 1 / len(KINDS[kind]),
            "words": len(parts["right picture"]),
        }
        for kind, parts in hits.items()
    }
    atomic_json(args.out, result)
    for kind, r in result.items():
        print(
            f"{kind}: {r['right picture']:.3f} of {r['words']} words right, with the next picture "
            f"{r['next picture']:.3f}, "
            f"chance {r['chance']:.3f}"
        )


if __name__ == "__main__":
    run(main, parse_args())
