"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO. Upstream: mmdet 3.3.0 RefCocoDataset and RefCOCO2PNG of
flmm/datasets/transforms.py.

Layout: instances.json (COCO); refs(unc).p or refs(umd).p, a pickle of plain lists and dictionaries, or
gRefCOCO's grefs(unc).json, whose expressions have any number of objects, also none; COCO train2014.
"""

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from common.errors import UserError
from common.files import check, inside, read_json, read_plain_pickle, reading
from flmm.data.samples import caption_of_phrases, decode_segmentation, polygon_parts
from flmm.data.skip import Bad
from flmm.data.transforms import load_image

# the rest of a picture and of an annotation is looked at where a reference names them
INSTANCES = {"images": [{"id": int}], "annotations": [{"id": int}]}
IMAGE = {"file_name": str, "height": int, "width": int}
ANNOTATION = {"segmentation": (dict, list), "image_id?": int}


def plain(value):
    """Numbers of numpy, which some tools leave in a pickle, as those of Python."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def read_refs(path):
    """List of referring expressions from refs(*).p or grefs(*).json; nothing in the file runs."""
    if Path(path).suffix == ".json":
        refs = read_json(path)
    else:
        with reading(path, "references file"):
            refs = plain(read_plain_pickle(path, "references file", arrays=True))
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise UserError(f"{path}: it does not hold a list of references; take refs(*).p as RefCOCO has it")
    return refs


def annotation_ids(ref) -> tuple:
    """Annotations of a reference's objects, each once and in their order: RefCOCO has one, gRefCOCO a list;
    [-1], -1, [] and None are none."""
    ids = ref["ann_id"]
    ids = ids if isinstance(ids, list) else [ids]
    if ref.get("no_target"):
        ids = []
    ids = [i for i in ids if i not in (-1, None)]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise TypeError(f"ann_id is {ref['ann_id']!r}, expected a whole number or a list of them")
    return tuple(sorted(set(ids)))


class RefCOCODataset(Dataset):
    """One record per picture with all its objects of the split, or one per object, or one per sentence.

    text_mode: "random" (training: one expression per object, drawn anew every epoch from seed, epoch and
    index; upstream drew once at load), "select_first" (evaluation), "original" (every expression, its mask
    repeated), "concat" (expressions of an object joined without separator, as upstream does). one_per_object:
    each object its own record; with "original" that is the standard per-sentence protocol. Of references to
    one annotation mmdet keeps the last, and so do all modes but the per-sentence protocol, which counts all.
    bad: a flmm.data.skip.Bad that collects faulty references instead of raising.
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
        bad=None,
    ):
        if text_mode not in ("random", "select_first", "original", "concat"):
            raise UserError(f"text_mode is {text_mode!r}, expected random, select_first, original or concat")
        instances, refs = read_json(ann_file, INSTANCES), read_refs(split_file)
        self.text_mode, self.seed, self.epoch, self.build = text_mode, seed, 0, build
        self.images_path, self.ann_file, self.split_file = Path(image_path), ann_file, split_file
        self.bad, self.dropped_parts = bad or Bad(), 0
        self.images = {i["id"]: i for i in instances["images"]}
        self.annotations = {a["id"]: a for a in instances["annotations"]}
        sentences = text_mode == "original" and one_per_object
        self.items = []  # (image id, [(annotation ids, [expression])])
        for image, objects in self.group(refs, split, keep_all=sentences).items():
            if text_mode == "original":
                objects = [(ids, [text]) for ids, texts in objects for text in texts]
            if text_mode == "concat":
                objects = [(ids, ["".join(texts)]) for ids, texts in objects]
            self.items += [(image, [one]) for one in objects] if one_per_object else [(image, objects)]

    def group(self, refs, split, keep_all):
        """{image id: [(annotation ids, texts)]} of the references of `split`, in the order of the file.

        keep_all: references to the same objects stay apart; else the last takes the place of the first.
        """
        groups, seen, splits = {}, {}, set()
        for number, ref in enumerate(refs):
            with self.bad.collect(f"{self.split_file}: reference {ref.get('ref_id', number)}"):
                if not isinstance(ref.get("split"), str):
                    raise UserError("field 'split' is missing")
                splits.add(ref["split"])
                if ref["split"] != split:
                    continue
                ids, texts, image = self.checked(ref)
                if ids in seen and ids and not keep_all:
                    image, number = seen[ids]
                    groups[image][number] = (ids, texts)
                    continue
                objects = groups.setdefault(image, [])
                seen[ids] = image, len(objects)
                objects.append((ids, texts))
        if not groups:
            raise UserError(
                f"{self.split_file}: no references of split {split!r}; it has {', '.join(sorted(splits))}"
            )
        return groups

    def checked(self, ref):
        """(annotation ids, texts, image id) of a reference; whatever is wrong with it is raised here."""
        try:
            ids, image = annotation_ids(ref), ref["image_id"]
            texts = [s["raw" if "raw" in s else "sent"].lower() for s in ref["sentences"]]
        except KeyError as error:
            raise UserError(f"field {error} is missing") from error
        except (TypeError, AttributeError) as error:
            raise UserError(f"not as RefCOCO has it ({error})") from error
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise UserError("it has no sentence; leave it out")
        if not isinstance(image, int) or image not in self.images:
            raise UserError(f"image {image!r} is not in {self.ann_file}")
        check(self.images[image], IMAGE, self.ann_file, f"image {image}")
        for i in ids:
            if i not in self.annotations:
                raise UserError(f"annotation {i} is not in {self.ann_file}")
            annotation, where = self.annotations[i], f"{self.ann_file}: annotation {i}"
            check(annotation, ANNOTATION, self.ann_file, f"annotation {i}")
            if annotation.get("image_id", image) != image:
                raise UserError(f"{where} lies in image {annotation['image_id']}, the reference in {image}")
            segmentation = annotation["segmentation"]
            if isinstance(segmentation, list):
                self.dropped_parts += len(segmentation) - len(polygon_parts(segmentation, where))
        return ids, texts, image

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

    def mask(self, ids, height, width):
        """(height, width) uint8: the objects `ids` together; all zero without any."""
        mask = np.zeros((height, width), np.uint8)
        for i in ids:
            where = f"{self.ann_file}: annotation {i}"
            mask |= decode_segmentation(self.annotations[i]["segmentation"], height, width, where)
        return mask

    def record(self, index):
        image_id, objects = self.items[index]
        info = self.images[image_id]
        height, width = info["height"], info["width"]
        phrases = self.phrases(index)
        image = load_image(inside(self.images_path, info["file_name"]), (width, height))
        if image.size != (width, height):
            raise UserError(
                f"{self.ann_file}: image {image_id}: width and height are {width} x {height}, the picture "
                f"{info['file_name']} is {image.width} x {image.height}; one of them is of another picture"
            )
        return {
            "image": image,
            "masks": np.stack([self.mask(ids, height, width) for ids, _ in objects]),
            "pieces": caption_of_phrases(phrases),
            "file_name": info["file_name"],
            "mask_infos": [
                {"plural": len(ids) > 1, "isthing": True, "text": text, "no_target": not ids}
                for (ids, _), text in zip(objects, phrases)
            ],
        }

    def __getitem__(self, index):
        return self.build(self.record(index))
