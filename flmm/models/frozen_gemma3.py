"""Gemma 3 (4B and larger) as a frozen base: the whole picture squashed to a square, 16 x 16 tokens that see
each other. Pan-and-scan crops are left out."""

from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from flmm.models.frozen_base import FrozenBase, given
from flmm.models.frozen_tiles import tile_sample


class Gemma3ImageProcessor:
    """transformers' own processor."""

    def __init__(self, side, **options):
        self.side = side
        self.processor = Gemma3ImageProcessorPil(size={"height": side, "width": side}, **options)

    def __call__(self, image):
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return tile_sample(pixels, (1, 1), self.side, image)


class FrozenGemma3(FrozenBase):
    architecture = "Gemma3ForConditionalGeneration"
    image_text = "\n\n<start_of_image><image_soft_token><end_of_image>\n\n"
    chat_image, template, unpad = "<start_of_image>", "chat", False

    @staticmethod
    def make_processor(config, preprocessing):
        stated = given(preprocessing, "image_mean", "image_std")
        return Gemma3ImageProcessor(config.vision_config.image_size, **stated)

    def grid(self, sample):
        side = int(self.model.config.mm_tokens_per_image**0.5)
        return side, side

    def build_inputs(self, samples, input_ids, attention_mask):
        # without token types the picture's tokens would be read causally
        types = (input_ids == self.image_token_id).long()
        return {**super().build_inputs(samples, input_ids, attention_mask), "token_type_ids": types}
