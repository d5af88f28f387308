"""LLaVA-NeXT (1.6, Vicuna or Mistral) as a frozen base. Upstream: flmm/models/frozen_llava_next.py.

The image span is the base tile (coarse grid), then the unpadded tiles (fine grid) with a newline token after
every row.
"""

import math

import torch
import torch.nn.functional as F

from flmm.data.transforms import LlavaNextImageProcessor, fine_grid
from flmm.models.frozen_base import FrozenBase, mean_and_std


class FrozenLlavaNext(FrozenBase):
    architecture = "LlavaNextForConditionalGeneration"
    image_text, template = "<image>\n", "vicuna"
    maps_per_head = 2
    unpad = False  # the fine grid is unpadded by the model itself

    @staticmethod
    def make_processor(config, preprocessing):
        return LlavaNextImageProcessor(
            config.vision_config.image_size,
            config.image_grid_pinpoints,
            *mean_and_std(preprocessing),
            config.vision_config.patch_size,
        )

    def grid(self, sample):
        """((coarse rows, columns), (fine rows, columns))."""
        vision, canvas = self.model.config.vision_config, sample["meta_data"]["padded_shape"]
        side = vision.image_size // vision.patch_size
        fine = fine_grid((canvas["height"], canvas["width"]), vision.patch_size, sample["image_sizes"])
        # LLaVA-OneVision ("anyres_max_9") shrinks what is more than so many tiles
        most = getattr(self.model.config, "vision_aspect_ratio", "anyres").partition("_max_")[2]
        ratio = math.sqrt(fine[0] * fine[1] / (int(most) * side**2)) if most else 0
        if ratio > 1.1:
            fine = int(fine[0] // ratio), int(fine[1] // ratio)
        return (side, side), fine

    def image_tokens(self, sample):
        (ch, cw), (fh, fw) = self.grid(sample)
        return ch * cw + fh * (fw + 1)

    def to_grid(self, maps, grid):
        """Coarse maps enlarged to the fine grid (bilinear), then the fine maps without the newline column."""
        (ch, cw), (fh, fw) = grid
        maps = torch.cat(maps).transpose(0, 1)  # (n, L * H, N)
        coarse = F.interpolate(maps[..., : ch * cw].unflatten(-1, (ch, cw)), size=(fh, fw), mode="bilinear")
        fine = maps[..., ch * cw :].unflatten(-1, (fh, fw + 1))[..., :-1]
        return torch.cat([coarse, fine], dim=1)

    def build_inputs(self, samples, input_ids, attention_mask):
        sizes = torch.tensor([list(s["image_sizes"]) for s in samples], device=self.device)
        return {**super().build_inputs(samples, input_ids, attention_mask), "image_sizes": sizes}
