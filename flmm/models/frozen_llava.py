"""LLaVA-1.5 as a frozen base. Upstream: flmm/models/frozen_llava.py."""

import torch

from flmm.data.transforms import CLIP_MEAN, CLIP_STD, LlavaImageProcessor
from flmm.models.frozen_base import FrozenBase


def positions(attention_mask):
    """Position of every token counted from the first real one (B, S): left padding must not shift the rotary
    phase."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


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

    def build_inputs(self, samples, input_ids, attention_mask):
        pixels = torch.stack([s["pixel_values"] for s in samples])
        return {
            "pixel_values": pixels.to(self.device, self.model.dtype),
            "position_ids": positions(attention_mask),
        }
