"""LLaVA-1.5 as a frozen base. Upstream: flmm/models/frozen_llava.py."""

from flmm.data.transforms import LlavaImageProcessor
from flmm.models.frozen_base import FrozenBase, mean_and_std, positions

__all__ = ["FrozenLlava", "positions"]


class FrozenLlava(FrozenBase):
    architecture = "LlavaForConditionalGeneration"
    image_text, template = "<image>\n", "vicuna"

    @staticmethod
    def make_processor(config, preprocessing):
        return LlavaImageProcessor(config.vision_config.image_size, *mean_and_std(preprocessing))

    def grid(self, sample):
        patch, shape = self.model.config.vision_config.patch_size, sample["meta_data"]["padded_shape"]
        return shape["height"] // patch, shape["width"] // patch
