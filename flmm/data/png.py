"""Panoptic narrative grounding. Upstream: flmm/datasets/png.py (PNGDataset).

Layout: png_coco_{split}.json [{image_id, segments [{utterance, segment_ids, plural}]}], panoptic_{split}.json
with its folder of PNGs (segment id = R + 256 G + 65536 B), pictures <image_id, 12 digits>.jpg.
"""

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from common.errors import UserError
from common.files import check, inside, read_json
from flmm.data.skip import Bad
from flmm.data.transforms import load_image, load_segments

CAPTION = {
    "image_id": (int, str),
    "segments": [{"utterance": str, "segment_ids": [(int, str)], "plural": (int, bool)}],
}
PANOPTIC = {
    "images": [{"id": (int, str), "file_name": str}],
    "categories": [{"id": int, "isthing": (int, bool)}],
    "annotations": [{"image_id": (int, str)}],  # the rest is looked at where a caption names the picture
}
ANNOTATION = {"file_name": str, "segments_info": [{"id": int, "category_id": int}]}


def key(caption) -> str:
    """Image id as in file names, 12 digits: the captions write it as text, the annotations as a number."""
    return str(caption["image_id"]).zfill(12)


class PNGDataset(Dataset):
    """One record per caption. Captions without any grounded utterance are left out at load: upstream replaces
    them at random, in evaluation too, so that some pictures count twice.

    bad: a flmm.data.skip.Bad that collects faulty captions instead of raising.
    """

    def __init__(self, json_file, panoptic_json_file, panoptic_png_path, image_path, build=None, bad=None):
        self.bad = bad or Bad()
        panoptic = read_json(panoptic_json_file, PANOPTIC)
        captions = read_json(json_file, [dict])
        self.isthing = {c["id"]: bool(c["isthing"]) for c in panoptic["categories"]}
        self.files = {str(image["id"]).zfill(12): image["file_name"] for image in panoptic["images"]}
        self.annotations = {str(a["image_id"]).zfill(12): a for a in panoptic["annotations"]}
        self.items = []
        for number, item in enumerate(captions):
            with self.bad.collect():
                check(item, CAPTION, json_file, f"[{number}]")
                if any(s["segment_ids"] for s in item["segments"]):
                    self.check_segments(item, json_file, panoptic_json_file)
                    self.items.append(item)
        if not self.items:
            raise UserError(f"{json_file}: no caption has a grounded phrase (segment_ids)")
        self.pngs, self.images, self.build = Path(panoptic_png_path), Path(image_path), build

    def __len__(self):
        return len(self.items)

    def check_segments(self, item, json_file, panoptic_json_file):
        """The caption's picture must be annotated, and a single segment be of a known category.

        Segments of a plural may be missing in segments_info, as some are in the published file: upstream
        takes the pixels that there are and looks up no category.
        """
        annotation = self.annotations.get(key(item))
        if annotation is None:
            raise UserError(
                f"{panoptic_json_file}: no annotation for image {item['image_id']} of {Path(json_file).name}"
            )
        check(annotation, ANNOTATION, panoptic_json_file, f"annotation of image {item['image_id']}")
        category = {s["id"]: s["category_id"] for s in annotation["segments_info"]}
        for part in item["segments"]:
            if part["segment_ids"] and not part["utterance"].strip():
                raise UserError(f"{json_file}: image {item['image_id']}: a grounded utterance has no words")
            for i in part["segment_ids"]:
                where = (
                    f"{panoptic_json_file}: image {item['image_id']}: segment {i} of {Path(json_file).name}"
                )
                number = str(i).isdecimal() and len(str(i)) < 20  # of very many digits Python makes none
                if not number or not part["plural"] and int(i) not in category:
                    raise UserError(f"{where} is not in segments_info")
                if not part["plural"] and category[int(i)] not in self.isthing:
                    raise UserError(f"{where}: category_id {category[int(i)]} is not in categories")

    def record(self, index):
        item = self.items[index]
        annotation = self.annotations[key(item)]
        segments = load_segments(inside(self.pngs, annotation["file_name"]), colours=True)
        category = {s["id"]: s["category_id"] for s in annotation["segments_info"]}
        pieces, masks, infos = [], [], []
        for part in item["segments"]:
            ids = [int(i) for i in part["segment_ids"]]
            pieces.append((part["utterance"], len(masks) if ids else -1))
            if not ids:
                continue
            masks.append(np.isin(segments, ids))
            plural = bool(part["plural"])
            thing = plural or self.isthing[category[ids[0]]]
            infos.append({"plural": plural, "isthing": thing, "text": part["utterance"]})
        name = self.files.get(key(item), annotation["file_name"])
        path = inside(self.images, name)
        if not path.is_file():
            path = path.with_suffix(".jpg")
        image = load_image(path, (segments.shape[1], segments.shape[0]))
        return {
            "image": image,
            "pieces": pieces,
            "masks": np.stack(masks).astype(np.uint8),
            "mask_infos": infos,
            "file_name": path.name,
        }

    def __getitem__(self, index):
        return self.build(self.record(index))
