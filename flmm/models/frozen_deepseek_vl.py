"""DeepSeek-VL 1.3B (SigLIP) and 7B (SigLIP + SAM-B hybrid) as frozen bases. Upstream:
flmm/models/frozen_deepseek_vl.py."""

from flmm.data.transforms import DeepseekImageProcessor
from flmm.models.frozen_base import FrozenBase, mean_and_std


class FrozenDeepseekVL(FrozenBase):
    architecture = "DeepseekVLForConditionalGeneration"
    image_text, template = "<image_placeholder>", "deepseek"

    @staticmethod
    def make_processor(config, preprocessing):
        high = getattr(config, "high_res_vision_config", None)
        return DeepseekImageProcessor(
            config.vision_config.image_size,
            *mean_and_std(preprocessing),
            preprocessing.get("min_size") or 14,
            high.image_size if high else None,
        )

    def grid(self, sample):
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        return side, side

    def build_inputs(self, samples, input_ids, attention_mask):
        inputs = super().build_inputs(samples, input_ids, attention_mask)
        if (name := "high_res_pixel_values") in samples[0]:
            inputs[name] = self.pixels(samples, name)
        return inputs


class FrozenDeepseekVLHybrid(FrozenDeepseekVL):
    architecture = "DeepseekVLHybridForConditionalGeneration"
