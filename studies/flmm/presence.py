"""Does the answer tell what is there from what is not? Fresh scenes, asked for present and for absent things.

    python studies/flmm/presence.py --config CONFIG --set base.path=... --head HEAD --out OUT.json

The head needs its calibration beside it (flmm/scripts/calibrate.py, on validation scenes). For the first
phrase of each scene four phrases are asked that it does not hold: a colour that is not there, a shape that is
not there, both, and invented words. OUT gets the AUC of presence and of score against each, N-acc and T-acc,
and the correlation of score and true IoU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
from PIL import Image

from common.arguments import Parser, number
from common.checkpoint import atomic_json
from common.errors import UserError, run
from flmm.build import add_config_arguments, read_config
from flmm.conversation import Grounder
from flmm.data.absent import nonsense
from flmm.data.scenes import COLOURS, SHAPES, make_scene
from flmm.metrics import target_accuracies
from flmm.models.calibration import auc

SEED = 977  # of scenes that no data set holds


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_config_arguments(parser, data=False)
    parser.add_argument("--head", type=Path, required=True, help="trained head with its calibration.json")
    parser.add_argument("--scenes", type=number(int, 4), default=200, help="number of scenes")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    return parser.parse_args(argv)


def absent(scene, rng):
    """{kind: phrase that the scene does not hold} of its first phrase."""
    phrase, first = scene["phrases"][0], scene["objects"][0]
    colours = [c for c in COLOURS if c not in {o["colour"] for o in scene["objects"]}]
    shapes = [s for s in SHAPES if s not in {o["shape"] for o in scene["objects"]}]
    colour, shape = str(rng.choice(colours)), str(rng.choice(shapes))
    recoloured = phrase.replace(first["colour"], colour)
    return {
        "swapped colour": recoloured,
        "swapped shape": phrase.replace(first["shape"], shape),
        "absent object": recoloured.replace(first["shape"], shape),
        "nonsense": nonsense(rng),
    }


def main(args):
    grounder = Grounder.load(read_config(args.config, args.set), args.head)
    if grounder.calibration is None:
        raise UserError(f"{args.head}: no calibration.json beside it; run flmm/scripts/calibrate.py first")
    rng = np.random.default_rng(0)
    numbers, ious, found = {"present": []}, [], {"present": []}
    for index in range(args.scenes):
        scene = make_scene(SEED, index)
        for kind, phrase in {"present": scene["phrases"][0], **absent(scene, rng)}.items():
            result = grounder.ground(Image.fromarray(scene["image"]), [phrase])
            [there], [score], mask = result["presence"], result["scores"], result["masks"][0]
            numbers.setdefault(kind, []).append((there, score))
            found.setdefault(kind, []).append(there >= 0.5 and bool(mask.any()))
            if kind == "present":
                true = scene["masks"][0]
                ious.append(float((mask & true).sum() / max(1, (mask | true).sum())))

    # Every kind against what is present, then all of them together.
    present = np.array(numbers.pop("present"))
    all_absent = [pair for pairs in numbers.values() for pair in pairs]
    results = {"scenes": args.scenes, "mIoU": float(np.mean(ious))}
    for kind, pairs in {**numbers, "all": all_absent}.items():
        pairs = np.array(pairs)
        results[f"presence_auc, {kind}"] = auc(present[:, 0], pairs[:, 0])
        results[f"score_auc, {kind}"] = auc(present[:, 1], pairs[:, 1])
    results["score_iou_correlation"] = float(np.corrcoef(present[:, 1], ious)[0, 1])
    seen = found.pop("present")
    missing = [value for values in found.values() for value in values]
    results |= target_accuracies([*seen, *missing], [True] * len(seen) + [False] * len(missing))
    atomic_json(args.out, results)
    print(", ".join(f"{name} {value:.3f}" for name, value in results.items() if name != "scenes"))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main, parse_args())
