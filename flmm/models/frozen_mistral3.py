"""Mistral Small 3.1 and later (Mistral3, a Pixtral encoder) as a frozen base: pictures of any size, a
separator after each row of tokens."""

import torch
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from flmm.data.transforms import fitting
from flmm.models.frozen_base import FrozenBase, given
from flmm.models.frozen_tiles import tile_sample


class Mistral3ImageProcessor:
    """transformers' own processor, and how many tokens the picture becomes. side: pixels of one token's
    side."""

    def __init__(self, side, **options):
        self.side = side
        self.processor = PixtralImageProcessorPil(patch_size={"height": side, "width": side}, **options)

    def __call__(self, image):
        with fitting(image):
            pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
            rows, columns = (length // self.side for length in pixels.shape[-2:])
            if rows * columns == 1:
                raise ValueError("it becomes a single token, which transformers' class cannot take")
        return tile_sample(pixels, (rows, columns), self.side, image)


class FrozenMistral3(FrozenBase):
    architecture = "Mistral3ForConditionalGeneration"
    image_text, template, unpad = "[IMG]", "mistral_v7", False

    @staticmethod
    def make_processor(config, preprocessing):
        largest = {"size": {"longest_edge": config.vision_config.image_size}}
        stated = given(preprocessing, "size", "image_mean", "image_std")
        side = config.vision_config.patch_size * config.spatial_merge_size
        return Mistral3ImageProcessor(side, **{**largest, **stated})

    def grid(self, sample):
        return tuple(sample["tiles"])

    def image_ids(self, sample):
        rows, columns = self.grid(sample)
        text = "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def build_inputs(self, samples, input_ids, attention_mask):
        sizes = torch.tensor([s["pixel_values"].shape[-2:] for s in samples], device=self.device)
        return {**super().build_inputs(samples, input_ids, attention_mask), "image_sizes": sizes}
