"""Qwen2.5-VL as a frozen base: pictures of any size, M-RoPE. Upstream: flmm/models/frozen_qwen.py of the Qwen
fork."""

import torch

from flmm.data.transforms import QwenImageProcessor
from flmm.models.frozen_base import FrozenBase, given


class FrozenQwen(FrozenBase):
    architecture = "Qwen2_5_VLForConditionalGeneration"
    image_text, template = "<|vision_start|><|image_pad|><|vision_end|>", "qwen"

    @staticmethod
    def make_processor(config, preprocessing):
        vision = config.vision_config
        return QwenImageProcessor(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            **given(preprocessing, "min_pixels", "max_pixels", "size", "image_mean", "image_std"),
        )

    def grid(self, sample):
        merge = self.model.config.vision_config.spatial_merge_size
        _, h, w = sample["image_grid_thw"].flatten().tolist()
        return h // merge, w // merge

    def build_inputs(self, samples, input_ids, attention_mask):
        return {
            "pixel_values": torch.cat([s["pixel_values"] for s in samples]).to(self.device, self.model.dtype),
            "image_grid_thw": torch.cat([s["image_grid_thw"].view(1, 3) for s in samples]).to(self.device),
            # without the token types the model silently falls back to plain positions
            "mm_token_type_ids": (input_ids == self.image_token_id).int(),
        }
