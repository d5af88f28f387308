"""LLaVA-1.5 as a frozen base. Upstream: flmm/models/frozen_llava.py."""

from flmm.data.transforms import CLIP_MEAN, CLIP_STD, LlavaImageProcessor
from flmm.models.frozen_base import FrozenBase, positions

__all__ = ["FrozenLlava", "positions"]


class FrozenLlava(FrozenBase):
    architecture = "LlavaForConditionalGeneration"
    image_text, template = "<image>\n", "vicuna"

    @staticmethod
    def make_processor(config, preprocessing):
        return LlavaImageProcessor(
            config.vision_config.image_size,
            preprocessing.get("image_mean", CLIP_MEAN),
            preprocessing.get("image_std", CLIP_STD),
        )

    def grid(self, sample):
        patch, shape = self.model.config.vision_config.patch_size, sample["meta_data"]["padded_shape"]
        return shape["height"] // patch, shape["width"] // patch
