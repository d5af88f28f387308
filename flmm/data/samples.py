"""From a picture with phrases and masks to the sample that a base and a head read.

A record is what every data set yields: {"image" RGB PIL, "pieces" [(text, k)] with k = -1 for words of no
phrase, "masks" (n, H, W) uint8, "mask_infos" [{"plural", "isthing", "text"}], "file_name"}. `SampleBuilder`
turns it into tensors. Upstream: the sample code of flmm/datasets/{png,transforms}.py.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import UserError


def caption_of_phrases(phrases):
    """Upstream's RefCOCO caption: each expression, then a full stop that belongs to no phrase."""
    return [piece for k, text in enumerate(phrases) for piece in ((text, k), (".", -1))]


class SampleBuilder:
    """record -> sample, with the tokenizer, prompt and image processor of one base.

    Pieces are tokenised one by one without special tokens and joined: the ids are not those of the joined
    text (SentencePiece adds a space to each piece), and published heads were trained so. image_marker: (image
    token id, -200) writes the marker of bases with their own image expansion (HPT, MGM).
    """

    def __init__(self, tokenizer, prompt_ids, image_processor, image_marker=None):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.prompt_ids = [
            image_marker[1] if image_marker and i == image_marker[0] else i for i in prompt_ids
        ]

    @classmethod
    def of(cls, base):
        return cls(base.tokenizer, base.encode_prompt(), base.image_processor)

    def encode(self, pieces, source=""):
        """pieces [(text, k)] -> input_ids, mask_ids, labels (S,); labels are -100 on the prompt."""
        input_ids, mask_ids = list(self.prompt_ids), [-1] * len(self.prompt_ids)
        for text, k in pieces:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
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
        pad = meta["padding"]
        sample.update(
            gt_masks=gt,
            masks=masks,
            padded_masks=F.pad(
                masks, (pad["before_width"], pad["after_width"], pad["before_height"], pad["after_height"])
            ),
        )
        return sample


def decode_segmentation(segmentation, height, width, source):
    """COCO polygons, compressed or uncompressed RLE -> (height, width) uint8. UserError names `source` if it
    is none."""
    from pycocotools import mask as coco

    try:
        if isinstance(segmentation, list):
            rle = coco.merge(coco.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            rle = coco.frPyObjects(segmentation, height, width)
        else:
            rle = {
                "size": segmentation["size"],
                "counts": segmentation["counts"].encode()
                if isinstance(segmentation["counts"], str)
                else segmentation["counts"],
            }
        mask = coco.decode(rle)
    except Exception as error:  # pycocotools raises bare Exception on some inputs
        raise UserError(
            f"{source}: segmentation does not decode ({type(error).__name__}: {error})"
        ) from error
    if mask.shape != (height, width):
        raise UserError(
            f"{source}: segmentation is {mask.shape[1]} x {mask.shape[0]} pixels, the picture {width} x "
            f"{height}"
        )
    return mask


def encode_rle(mask):
    """(H, W) bool -> COCO RLE {"size", "counts"} with counts as text, ready for JSON."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}
