"""Write the built-in data set: scenes of coloured shapes in the formats of panoptic narrative grounding and
of RefCOCO.

    python flmm/make_data.py --out data/flmm

OUT/png/    png_coco_{train,val,test,overlap}.json, panoptic_{...}.json, panoptic_{...}/*.png, images/*.png
OUT/refcoco/ instances.json, refs(unc).p (plain lists and dictionaries); its pictures are those of png/
OUT/base/   with --base: a tiny multimodal LLM with random weights, for a first try without any download
The code that reads the real data sets reads these.
"""

import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
from PIL import Image

from common.arguments import Parser, number
from common.checkpoint import atomic_dir, atomic_json
from common.errors import UserError, run
from common.run import progress
from flmm.data.samples import encode_rle
from flmm.data.scenes import SHAPES, make_scene
from flmm.models.tiny import TINY_FAMILIES, save_base, tiny_model, tiny_tokenizer

# Far apart, so that no two splits share a scene, nor a split and the pre-training of studies/flmm.
FIRST_INDEX = {"train": 10_000_000, "val": 20_000_000, "test": 30_000_000, "overlap": 40_000_000}


def parse_args(argv=None):
    parser, count = Parser(__doc__), number(int, 1)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write; it must be new, or hold an earlier built-in set",
    )
    for split, default, what in (
        ("train", 500, "scenes that heads learn from"),
        ("val", 100, "scenes to choose settings with"),
        ("test", 200, "held-out scenes"),
        ("overlap", 100, "held-out scenes in which objects hide each other"),
    ):
        parser.add_argument(f"--{split}", type=count, default=default, help=f"number of {what}")
    parser.add_argument(
        "--side", type=number(int, 32), default=64, help="side of the square pictures in pixels"
    )
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="random seed; another one gives other scenes"
    )
    parser.add_argument(
        "--base", choices=TINY_FAMILIES, help="class of a tiny base with random weights to write as well"
    )
    return parser.parse_args(argv)


def segment_picture(masks):
    """(n, H, W) masks as a panoptic PNG: segment k + 1 where mask k lies, in the red channel."""
    segments = np.zeros(masks.shape[1:], np.uint8)
    for k, mask in enumerate(masks):
        segments[mask] = k + 1
    return Image.fromarray(np.stack([segments, 0 * segments, 0 * segments], -1))


def narrative(scene, index):
    """The caption of one scene as panoptic narrative grounding writes it."""
    return {
        "image_id": str(index),
        "segments": [
            {"utterance": text, "segment_ids": [str(k + 1)] if k >= 0 else [], "plural": False}
            for text, k in scene["pieces"]
        ],
    }


def category(thing):
    """COCO's number of a scene object's shape."""
    return SHAPES.index(thing["shape"]) + 1


def panoptic_annotation(scene, index, name):
    """The segments of one scene as COCO's panoptic annotations write them."""
    segments = [
        {"id": k + 1, "category_id": category(thing), "iscrowd": 0, "area": int(mask.sum())}
        for k, (mask, thing) in enumerate(zip(scene["masks"], scene["objects"]))
    ]
    return {"image_id": index, "file_name": name, "segments_info": segments}


def add_references(scene, index, name, split, annotations, refs):
    """Append one scene's objects to RefCOCO's lists: an annotation and two sentences for each."""
    for phrase, mask, thing in zip(scene["phrases"], scene["masks"], scene["objects"]):
        kind, number = {"image_id": index, "category_id": category(thing)}, len(annotations)
        mask_of = {"iscrowd": 0, "area": int(mask.sum()), "segmentation": encode_rle(mask)}
        annotations.append({"id": number, **kind, **mask_of})
        texts = [phrase, f"{thing['colour']} {thing['size']} {thing['shape']}"]
        sentences = [{"raw": text, "sent": text, "tokens": text.split()} for text in texts]
        ids = {"ref_id": len(refs), "ann_id": number, **kind}
        refs.append({**ids, "split": split, "file_name": name, "sentences": sentences})


def write_split(folder, split, args, instances, refs):
    """Draw the scenes of one split, write its pictures and png files, and append to RefCOCO's lists."""
    narratives, panoptic = [], {"images": [], "annotations": []}
    panoptic["categories"] = [{"id": i + 1, "name": shape, "isthing": 1} for i, shape in enumerate(SHAPES)]
    (folder / f"panoptic_{split}").mkdir()
    for i in progress(range(getattr(args, split)), desc=split):
        index = FIRST_INDEX[split] + i
        scene, name = make_scene(args.seed, index, args.side, overlap=split == "overlap"), f"{index:012d}.png"
        Image.fromarray(scene["image"]).save(folder / "images" / name)
        segment_picture(scene["masks"]).save(folder / f"panoptic_{split}" / name)
        size = {"id": index, "file_name": name, "height": args.side, "width": args.side}
        panoptic["images"].append(size)
        panoptic["annotations"].append(panoptic_annotation(scene, index, name))
        narratives.append(narrative(scene, index))
        instances["images"].append(size)
        add_references(scene, index, name, split, instances["annotations"], refs)
    atomic_json(folder / f"png_coco_{split}.json", narratives)
    atomic_json(folder / f"panoptic_{split}.json", panoptic)


def main(args):
    if args.out.is_file() or args.out.is_dir() and any(args.out.iterdir()):
        if not (args.out / "png" / "built-in.json").exists():
            raise UserError(f"{args.out} holds something else; choose a new folder with --out")
    with atomic_dir(args.out) as out:
        png, refcoco = out / "png", out / "refcoco"
        (png / "images").mkdir(parents=True)
        refcoco.mkdir()

        # One list of instances and references over all splits, as RefCOCO has it.
        instances, refs = {"images": [], "annotations": []}, []
        instances["categories"] = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
        for split in FIRST_INDEX:
            write_split(png, split, args, instances, refs)
        atomic_json(refcoco / "instances.json", instances)
        (refcoco / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))

        # A base that has learned nothing, and the mark by which the next run knows a folder of its own.
        if args.base:
            tokenizer = tiny_tokenizer()
            save_base(tiny_model(args.base, tokenizer, args.seed), tokenizer, out / "base")
        counts = {name: getattr(args, name) for name in (*FIRST_INDEX, "side", "seed")}
        atomic_json(png / "built-in.json", counts)
    scenes = " + ".join(str(getattr(args, split)) for split in FIRST_INDEX)
    print(f"wrote {scenes} scenes of {args.side} x {args.side} pixels to {args.out}")


if __name__ == "__main__":
    run(main, parse_args())
