"""Panoptic narrative grounding. Upstream: flmm/datasets/png.py (PNGDataset).

Layout: png_coco_{split}.json [{image_id, segments [{utterance, segment_ids, plural}]}], panoptic_{split}.json with its
folder of PNGs (segment id = R + 256 G + 65536 B), pictures <image_id, 12 digits>.jpg.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from common.errors import UserError
from flmm.data.samples import read_json
from flmm.data.transforms import load_image


class PNGDataset(Dataset):
    """One record per caption. Captions without any grounded utterance are left out at load: upstream replaces them at random,
    in evaluation too, so that some pictures count twice."""

    def __init__(self, json_file, panoptic_json_file, panoptic_png_path, image_path, build=None):
        panoptic = read_json(panoptic_json_file, "panoptic annotations")
        captions = read_json(json_file, "narrative captions")
        try:
            self.isthing = {c["id"]: bool(c["isthing"]) for c in panoptic["categories"]}
            self.files = {int(image["id"]): image["file_name"] for image in panoptic["images"]}
            self.annotations = {int(a["image_id"]): a for a in panoptic["annotations"]}
            self.items = [c for c in captions if any(s["segment_ids"] for s in c["segments"])]
        except (KeyError, TypeError) as error:
            raise UserError(f"{json_file} or {panoptic_json_file}: field {error} is missing") from error
        if unknown := [c["image_id"] for c in self.items if int(c["image_id"]) not in self.annotations]:
            raise UserError(f"{panoptic_json_file}: no annotation for image {unknown[0]} of {json_file}")
        self.pngs, self.images, self.build = Path(panoptic_png_path), Path(image_path), build

    def __len__(self):
        return len(self.items)

    def record(self, index):
        item = self.items[index]
        annotation = self.annotations[int(item["image_id"])]
        png = self.pngs / annotation["file_name"]
        if not png.is_file():
            raise UserError(f"{png}: no such panoptic picture")
        with Image.open(png) as opened:
            rgb = np.asarray(opened.convert("RGB"), np.int64)
        segments = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        category = {s["id"]: s["category_id"] for s in annotation["segments_info"]}
        pieces, masks, infos = [], [], []
        for part in item["segments"]:
            ids = [int(i) for i in part["segment_ids"]]
            pieces.append((part["utterance"], len(masks) if ids else -1))
            if not ids:
                continue
            if unknown := [i for i in ids if i not in category]:
                raise UserError(f"{png}: segment {unknown[0]} of the caption is not in segments_info")
            plural = bool(part["plural"])
            masks.append(np.isin(segments, ids))
            infos.append({"plural": plural, "isthing": plural or self.isthing[category[ids[0]]], "text": part["utterance"]})
        name = self.files.get(int(item["image_id"]), annotation["file_name"])
        path = self.images / name
        if not path.is_file():
            path = path.with_suffix(".jpg")
        image = load_image(path, (segments.shape[1], segments.shape[0]))
        return {"image": image, "pieces": pieces, "masks": np.stack(masks).astype(np.uint8), "mask_infos": infos,
                "file_name": path.name}

    def __getitem__(self, index):
        return self.build(self.record(index))
