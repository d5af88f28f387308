"""DeepSeek-VL 1.3B (SigLIP) and 7B (SigLIP + SAM-B hybrid) as frozen bases. Upstream:
flmm/models/frozen_deepseek_vl.py."""

import torch

from flmm.data.transforms import CLIP_MEAN, CLIP_STD, DeepseekImageProcessor
from flmm.models.frozen_base import FrozenBase
from flmm.models.frozen_llava import positions


class FrozenDeepseekVL(FrozenBase):
    architecture = "DeepseekVLForConditionalGeneration"
    image_text, template = "<image_placeholder>", "deepseek"

    @staticmethod
    def make_processor(config, preprocessing):
        high = getattr(config, "high_res_vision_config", None)
        return DeepseekImageProcessor(
            config.vision_config.image_size,
            preprocessing.get("image_mean", CLIP_MEAN),
            preprocessing.get("image_std", CLIP_STD),
            preprocessing.get("min_size", 14),
            high.image_size if high else None,
        )

    def grid(self, sample):
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        return side, side

    def build_inputs(self, samples, input_ids, attention_mask):
        names = ["pixel_values"] + (
            ["high_res_pixel_values"] if "high_res_pixel_values" in samples[0] else []
        )
        return {
            "position_ids": positions(attention_mask),
            **{
                name: torch.stack([s[name] for s in samples]).to(self.device, self.model.dtype)
                for name in names
            },
        }


class FrozenDeepseekVLHybrid(FrozenDeepseekVL):
    architecture = "DeepseekVLHybridForConditionalGeneration"
