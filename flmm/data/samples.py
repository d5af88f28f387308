"""From a picture with phrases and masks to the sample that a base and a head read.

A record is what every data set yields: {"image" RGB PIL, "pieces" [(text, k)] with k = -1 for words of no
phrase, "masks" (n, H, W) uint8, "mask_infos" [{"plural", "isthing", "text"}], "file_name"}. `SampleBuilder`
turns it into tensors. Upstream: the sample code of flmm/datasets/{png,transforms}.py.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import UserError
from flmm.data.text import encode_text

FAR = 100_000  # pixels from the picture's corner, more than any corner of a polygon lies away from it


def caption_of_phrases(phrases, lead=""):
    """Upstream's RefCOCO caption: each expression, then a full stop that belongs to no phrase. lead: words
    before each that belong to no phrase either."""
    before = [(lead, -1)] if lead else []
    return [piece for k, text in enumerate(phrases) for piece in (*before, (text, k), (".", -1))]


class SampleBuilder:
    """record -> sample, with the tokenizer, prompt and image processor of one base.

    Pieces are tokenised one by one without special tokens and joined: the ids are not those of the joined
    text (SentencePiece adds a space to each piece), and published heads were trained so. image_marker: (image
    token id, -200) writes the marker of bases with their own image expansion (HPT, MGM). prepare: of a
    SAMImageEncoder; what it makes of a picture is sample["sam_pixels"], made in a loader's workers.
    """

    def __init__(self, tokenizer, prompt_ids, image_processor, image_marker=None, prepare=None):
        self.tokenizer, self.image_processor, self.prepare = tokenizer, image_processor, prepare
        token, marker = image_marker or (None, None)
        self.prompt_ids = [marker if token is not None and i == token else i for i in prompt_ids]

    @classmethod
    def of(cls, base, sam_encoder=None):
        prepare = sam_encoder.prepare if sam_encoder is not None else None
        return cls(base.tokenizer, base.encode_prompt(), base.image_processor, prepare=prepare)

    def encode(self, pieces, source=""):
        """pieces [(text, k)] -> input_ids, mask_ids, labels (S,); labels are -100 on the prompt."""
        input_ids, mask_ids = list(self.prompt_ids), [-1] * len(self.prompt_ids)
        for text, k in pieces:
            ids = encode_text(self.tokenizer, text, source)
            if k >= 0 and not (text.strip() and ids):
                raise UserError(f"{source}: phrase {k} ({text!r}) has no token; leave out empty phrases")
            input_ids += ids
            mask_ids += [k] * len(ids)
        labels = [-100] * len(self.prompt_ids) + input_ids[len(self.prompt_ids) :]
        return torch.tensor(input_ids), torch.tensor(mask_ids), torch.tensor(labels)

    def __call__(self, record):
        """Sample: ids, the processor's output, masks (n, h, w) at the processed unpadded size, padded_masks
        on the padded canvas, gt_masks (n, H, W) at the original size, image, mask_infos, file_name. No masks
        key: no mask keys."""
        image, source = record["image"], record.get("file_name", "input")
        input_ids, mask_ids, labels = self.encode(record["pieces"], source)
        sample = {
            "input_ids": input_ids,
            "mask_ids": mask_ids,
            "labels": labels,
            "image": image,
            "file_name": source,
            "mask_infos": record.get("mask_infos"),
            **self.image_processor(image),
        }
        if self.prepare is not None:
            sample["sam_pixels"] = self.prepare(image)
        if record.get("masks") is None:
            return sample
        gt = torch.from_numpy(np.ascontiguousarray(record["masks"], np.uint8))
        if tuple(gt.shape[1:]) != (image.height, image.width):
            raise UserError(
                f"{source}: masks are {gt.shape[2]} x {gt.shape[1]} pixels, the picture is "
                f"{image.width} x {image.height}; annotation and picture do not belong together"
            )
        meta = sample["meta_data"]
        h, w = meta["image_shape"]["height"], meta["image_shape"]["width"]
        masks = F.interpolate(gt[None].float(), size=(h, w), mode="nearest")[0].to(torch.uint8)
        sides = ("before_width", "after_width", "before_height", "after_height")
        padded = F.pad(masks, [meta["padding"][side] for side in sides])
        return {**sample, "gt_masks": gt, "masks": masks, "padded_masks": padded}


def polygon_parts(parts, source):
    """The parts of a COCO polygon that have an area: three corners or more. UserError where none is left, or
    a part is no list of x, y pairs."""
    for part in parts:
        numbers = isinstance(part, list) and all(isinstance(v, (int, float)) for v in part)
        # pycocotools walks every pixel of an edge, however far out it lies, and numbers overflow there
        if not numbers or len(part) % 2 or not all(abs(v) <= FAR for v in part):
            raise UserError(f"{source}: a polygon is no list of x, y pairs in pixels: {str(part)[:60]}")
    kept = [part for part in parts if len(part) >= 6]
    if not kept:
        raise UserError(f"{source}: no polygon has three corners; leave the annotation out")
    return kept


def rle_counts(text: bytes) -> list[int]:
    """Run lengths of a compressed COCO RLE: five bits a letter, each run from the third on relative to the
    last but one. IndexError where the text ends in the middle of a number."""
    counts, at = [], 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            letter = text[at] - 48
            value |= (letter & 31) << shift
            shift, at, more = shift + 5, at + 1, letter & 32
        if letter & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def to_rle(segmentation, height, width, source):
    """COCO polygons, compressed or uncompressed RLE -> compressed RLE of a picture of width x height pixels.

    UserError names `source` where it is none, is of another size, or has runs that do not fill the picture:
    pycocotools would decode those into memory that nothing has written.
    """
    from pycocotools import mask as coco

    if isinstance(segmentation, list):
        return coco.merge(coco.frPyObjects(polygon_parts(segmentation, source), height, width))
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise UserError(f"{source}: segmentation is neither polygons nor an RLE with size and counts")
    size, counts = segmentation["size"], segmentation["counts"]
    try:
        if isinstance(counts, str):
            counts = counts.encode("ascii")
        runs = rle_counts(counts) if isinstance(counts, bytes) else [int(c) for c in counts if c == int(c)]
        h, w = map(int, size)
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{source}: segmentation does not decode ({type(error).__name__}: {error})") from None
    if (h, w) != (height, width):
        raise UserError(f"{source}: segmentation is {w} x {h} pixels, the picture {width} x {height}")
    if len(runs) != len(counts) and not isinstance(counts, bytes) or min(runs, default=0) < 0:
        raise UserError(f"{source}: segmentation does not decode (a run is no whole number from 0 on)")
    if sum(runs) != height * width:
        raise UserError(
            f"{source}: segmentation does not decode (its runs have {sum(runs)} pixels, the picture "
            f"{height * width})"
        )
    return coco.frPyObjects({"size": [h, w], "counts": runs}, h, w)


def decode_segmentation(segmentation, height, width, source):
    """`to_rle` as a mask (height, width) uint8."""
    from pycocotools import mask as coco

    return coco.decode(to_rle(segmentation, height, width, source))


def encode_rle(mask):
    """(H, W) bool -> COCO RLE {"size", "counts"} with counts as text, ready for JSON."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}
