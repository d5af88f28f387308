"""LLaVA-OneVision as a frozen base: the span of LLaVA-NeXT, with more tiles that are shrunk beyond nine."""

from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from flmm.data.transforms import LlavaNextImageProcessor
from flmm.models.frozen_base import mean_and_std
from flmm.models.frozen_llava_next import FrozenLlavaNext


class LlavaOnevisionImageProcessor(LlavaNextImageProcessor):
    """transformers' own processor, plus where the picture lies on the tiled canvas."""

    def native(self, **options):
        return LlavaOnevisionImageProcessorPil(size={"height": self.size, "width": self.size}, **options)


class FrozenLlavaOnevision(FrozenLlavaNext):
    architecture = "LlavaOnevisionForConditionalGeneration"
    image_text, template = "<image>\n", "chat"

    @staticmethod
    def make_processor(config, preprocessing):
        half = (0.5, 0.5, 0.5)
        return LlavaOnevisionImageProcessor(
            config.vision_config.image_size,
            config.image_grid_pinpoints,
            *mean_and_std(preprocessing, half, half),
            config.vision_config.patch_size,
        )
