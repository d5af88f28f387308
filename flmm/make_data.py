"""Write the built-in data set: scenes of coloured shapes in the formats of panoptic narrative grounding and of RefCOCO.

    python flmm/make_data.py --out data/flmm

OUT/png/    png_coco_{train,val,test,overlap}.json, panoptic_{...}.json, panoptic_{...}/*.png, images/*.png
OUT/refcoco/ instances.json, refs(unc).p (plain lists and dictionaries), images: those of png/
The same code that reads the real data sets reads these.
"""

import argparse
import json
import pickle
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import numpy as np
from PIL import Image

from common.checkpoint import atomic_dir
from common.errors import UserError, run
from common.run import progress
from flmm.data.samples import encode_rle
from flmm.data.scenes import SHAPES, make_scene

# far apart, so that no split and no pre-training scene (seed 0, index < 1,000,000) ever coincide
FIRST_INDEX = {"train": 10_000_000, "val": 20_000_000, "test": 30_000_000, "overlap": 40_000_000}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write; must be new, or hold an earlier built-in set",
    )
    parser.add_argument("--train", type=int, default=500, help="scenes for the heads (default 500)")
    parser.add_argument("--val", type=int, default=100, help="scenes for choosing settings (default 100)")
    parser.add_argument("--test", type=int, default=200, help="held-out scenes (default 200)")
    parser.add_argument(
        "--overlap",
        type=int,
        default=100,
        help="held-out scenes in which objects hide each other (default 100)",
    )
    parser.add_argument("--side", type=int, default=64, help="picture side in pixels (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default 0)")
    return parser.parse_args()


def main(args):
    if args.side < 32 or min(args.train, args.val, args.test, args.overlap) < 1:
        raise UserError("--side must be at least 32 and every split needs at least one scene")
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / "png" / "built-in.json").exists():
        raise UserError(f"{args.out}: holds other files; choose a new folder")
    with atomic_dir(args.out) as out:
        png, ref = out / "png", out / "refcoco"
        (png / "images").mkdir(parents=True)
        ref.mkdir()
        instances, refs = (
            {
                "images": [],
                "annotations": [],
                "categories": [{"id": i + 1, "name": s} for i, s in enumerate(SHAPES)],
            },
            [],
        )
        for split in FIRST_INDEX:
            narratives, panoptic = (
                [],
                {
                    "images": [],
                    "annotations": [],
                    "categories": [{"id": i + 1, "name": s, "isthing": 1} for i, s in enumerate(SHAPES)],
                },
            )
            (png / f"panoptic_{split}").mkdir()
            for i in progress(range(getattr(args, split)), desc=split):
                index = FIRST_INDEX[split] + i
                scene = make_scene(args.seed, index, args.side, overlap=split == "overlap")
                name = f"{index:012d}.png"
                Image.fromarray(scene["image"]).save(png / "images" / name)
                segments = np.zeros((args.side, args.side), np.uint8)
                infos = []
                for k, (mask, obj) in enumerate(zip(scene["masks"], scene["objects"])):
                    segments[mask] = k + 1
                    category = SHAPES.index(obj["shape"]) + 1
                    infos.append(
                        {"id": k + 1, "category_id": category, "iscrowd": 0, "area": int(mask.sum())}
                    )
                    annotation = len(instances["annotations"])
                    instances["annotations"].append(
                        {
                            "id": annotation,
                            "image_id": index,
                            "category_id": category,
                            "iscrowd": 0,
                            "area": int(mask.sum()),
                            "segmentation": encode_rle(mask),
                        }
                    )
                    sentences = [scene["phrases"][k], f"{obj['colour']} {obj['size']} {obj['shape']}"]
                    refs.append(
                        {
                            "ref_id": len(refs),
                            "ann_id": annotation,
                            "image_id": index,
                            "category_id": category,
                            "split": split,
                            "file_name": name,
                            "sentences": [{"raw": s, "sent": s, "tokens": s.split()} for s in sentences],
                        }
                    )
                Image.fromarray(np.stack([segments, 0 * segments, 0 * segments], -1)).save(
                    png / f"panoptic_{split}" / name
                )
                size = {"id": index, "file_name": name, "height": args.side, "width": args.side}
                panoptic["images"].append(size)
                panoptic["annotations"].append({"image_id": index, "file_name": name, "segments_info": infos})
                instances["images"].append(size)
                narratives.append(
                    {
                        "image_id": str(index),
                        "segments": [
                            {
                                "utterance": text,
                                "segment_ids": [str(k + 1)] if k >= 0 else [],
                                "plural": False,
                            }
                            for text, k in scene["pieces"]
                        ],
                    }
                )
            (png / f"png_coco_{split}.json").write_text(json.dumps(narratives))
            (png / f"panoptic_{split}.json").write_text(json.dumps(panoptic))
        (ref / "instances.json").write_text(json.dumps(instances))
        (ref / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
        (png / "built-in.json").write_text(json.dumps({k: v for k, v in vars(args).items() if k != "out"}))
    print(
        f"wrote {args.train} + {args.val} + {args.test} + {args.overlap} scenes of {args.side} x {args.side} pixels to {args.out}"
    )


if __name__ == "__main__":
    run(main, parse_args())
