"""InternVL3 and InternVL3.5 (the transformers form, "-hf") as frozen bases: tiles, then a thumbnail."""

import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from flmm.models.frozen_base import given, positions
from flmm.models.frozen_tiles import FrozenTiles, tile_sample


class InternVLImageProcessor:
    """transformers' own processor, and how many tiles it cut. max_patches: most tiles, without the
    thumbnail."""

    def __init__(self, side, max_patches=12, **options):
        self.side, self.max_patches = side, max_patches
        self.processor = GotOcr2ImageProcessorPil(size={"height": side, "width": side}, **options)

    def __call__(self, image):
        options = dict(crop_to_patches=self.max_patches > 1, min_patches=1, max_patches=self.max_patches)
        pixels = self.processor(image, return_tensors="pt", **options)["pixel_values"]
        columns, rows = get_optimal_tiled_canvas(
            (image.height, image.width), (self.side, self.side), 1, self.max_patches
        )
        # a single tile has no thumbnail beside it
        return tile_sample(pixels, (0, 0) if len(pixels) == 1 else (rows, columns), self.side, image)


class FrozenInternVL(FrozenTiles):
    architecture = "InternVLForConditionalGeneration"
    image_text, chat_image, template = "<img><IMG_CONTEXT></img>\n", "<IMG_CONTEXT>\n", "chat"

    @staticmethod
    def make_processor(config, preprocessing):
        side = config.vision_config.image_size
        stated = given(preprocessing, "max_patches", "image_mean", "image_std")
        return InternVLImageProcessor(side[0] if isinstance(side, (list, tuple)) else side, **stated)

    def tile_side(self):
        vision = self.model.config.vision_config
        return int(vision.image_size[0] // vision.patch_size[0] * self.model.config.downsample_ratio)

    def build_inputs(self, samples, input_ids, attention_mask):
        pixels = torch.cat([s["pixel_values"] for s in samples]).to(self.device, self.model.dtype)
        return {"pixel_values": pixels, "position_ids": positions(attention_mask)}
