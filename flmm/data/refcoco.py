"""RefCOCO, RefCOCO+, RefCOCOg. Upstream: mmdet 3.3.0 RefCocoDataset and RefCOCO2PNG of
flmm/datasets/transforms.py.

Layout: instances.json (COCO) and refs(unc).p or refs(umd).p, a pickle of plain lists and dictionaries; COCO
train2014.
"""

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from common.errors import UserError
from common.files import inside, read_json, read_plain_pickle
from flmm.data.samples import caption_of_phrases, decode_segmentation
from flmm.data.transforms import load_image


def read_refs(path):
    """List of referring expressions from refs(*).p; nothing in the file runs."""
    refs = read_plain_pickle(path, "references file")
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise UserError(f"{path}: it does not hold a list of references; take refs(*).p as RefCOCO has it")
    return refs


INSTANCES = {
    "images": [{"id": int, "file_name": str, "height": int, "width": int}],
    "annotations": [{"id": int, "segmentation": (dict, list)}],
}


class RefCOCODataset(Dataset):
    """One record per picture with all its objects of the split, or one per object, or one per sentence.

    text_mode: "random" (training: one expression per object, drawn anew every epoch from seed, epoch and
    index; upstream drew once at load), "select_first" (evaluation), "original" (every expression, its mask
    repeated), "concat" (expressions of an object joined without separator, as upstream does). one_per_object:
    each object its own record. With "original" that is the standard per-sentence protocol.
    """

    def __init__(
        self,
        ann_file,
        split_file,
        image_path,
        split,
        text_mode="random",
        one_per_object=False,
        seed=0,
        build=None,
    ):
        instances, refs = read_json(ann_file, INSTANCES), read_refs(split_file)
        self.text_mode, self.seed, self.epoch, self.build = text_mode, seed, 0, build
        self.images_path, self.ann_file = Path(image_path), ann_file
        try:
            self.images = {i["id"]: i for i in instances["images"]}
            self.annotations = {a["id"]: a for a in instances["annotations"]}
            groups = {}
            for ref in refs:
                if ref["split"] == split:
                    texts = [s["raw"].lower() for s in ref["sentences"]]
                    groups.setdefault(ref["image_id"], []).append((ref["ann_id"], texts))
        except (KeyError, TypeError) as error:
            raise UserError(f"{ann_file} or {split_file}: field {error} is missing") from error
        if not groups:
            raise UserError(
                f"{split_file}: no references of split {split!r}; it has "
                f"{sorted({r.get('split') for r in refs})}"
            )
        for image_id, objects in groups.items():
            lost = [ann for ann, _ in objects if ann not in self.annotations]
            if image_id not in self.images or lost:
                raise UserError(
                    f"{ann_file}: image {image_id} or annotation {lost[:1]} of {split_file} is missing"
                )
        if text_mode == "original":
            groups = {
                i: [(ann, [text]) for ann, texts in objects for text in texts]
                for i, objects in groups.items()
            }
        if text_mode == "concat":
            groups = {i: [(ann, ["".join(texts)]) for ann, texts in objects] for i, objects in groups.items()}
        self.items = list(groups.items())  # (image id, [(annotation id, [expression])])
        if one_per_object:
            self.items = [(i, [one]) for i, objects in self.items for one in objects]

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.items)

    def phrases(self, index):
        """The expressions of one record in this epoch."""
        objects = self.items[index][1]
        if self.text_mode != "random":
            return [texts[0] for _, texts in objects]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        return [texts[rng.integers(len(texts))] for _, texts in objects]

    def record(self, index):
        image_id, objects = self.items[index]
        info = self.images[image_id]
        height, width = info["height"], info["width"]
        masks = np.stack(
            [
                decode_segmentation(
                    self.annotations[ann]["segmentation"], height, width, f"{self.ann_file}: annotation {ann}"
                )
                for ann, _ in objects
            ]
        )
        phrases = self.phrases(index)
        return {
            "image": load_image(inside(self.images_path, info["file_name"]), (width, height)),
            "masks": masks,
            "pieces": caption_of_phrases(phrases),
            "file_name": info["file_name"],
            "mask_infos": [{"plural": False, "isthing": True, "text": text} for text in phrases],
        }

    def __getitem__(self, index):
        return self.build(self.record(index))
