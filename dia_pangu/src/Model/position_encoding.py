"""Position tables: learned 3-D (used by the ViT), and the 2-D sine and learned forms of DETR, kept for its decoder.

Upstream: src/Model/position_encoding.py. State-dict keys: row_embed.weight, col_embed.weight, dep_embed.weight.
"""

import math

import torch
from torch import nn


class PositionEmbeddingSine(nn.Module):
    """Fixed 2-D code from a padding mask (Parmar et al. 2018, as in DETR).

    mask: (B, H, W), True or 1 = padded. Returns (B, 2 * num_pos_feats, H, W): rows first, then columns.
    """

    def __init__(
        self,
        num_pos_feats: int = 64,
        temperature: float = 10000,
        normalize: bool = False,
        scale: float | None = None,
    ):
        super().__init__()
        if scale is not None and not normalize:
            raise ValueError("scale: only used with normalize=True")
        self.num_pos_feats, self.temperature, self.normalize = num_pos_feats, temperature, normalize
        self.scale = 2 * math.pi if scale is None else scale

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        real = ~mask.bool()
        y, x = real.cumsum(1, dtype=torch.float32), real.cumsum(2, dtype=torch.float32)
        if self.normalize:
            y = y / (y[:, -1:, :] + 1e-6) * self.scale
            x = x / (x[:, :, -1:] + 1e-6) * self.scale
        index = torch.arange(self.num_pos_feats, dtype=torch.float32, device=mask.device)
        period = self.temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / self.num_pos_feats)

        def waves(position):  # (B, H, W) -> (B, H, W, num_pos_feats), sine and cosine take turns
            angle = position[..., None] / period
            return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=4).flatten(3)

        return torch.cat((waves(y), waves(x)), dim=3).permute(0, 3, 1, 2)


class PositionEmbeddingLearned(nn.Module):
    """Learned 2-D table for grids up to 50 x 50. Returns (B, 2 * num_pos_feats, H, W): columns first, then rows."""

    def __init__(self, num_pos_feats: int = 256):
        super().__init__()
        self.row_embed = nn.Embedding(50, num_pos_feats)
        self.col_embed = nn.Embedding(50, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, batch: int, h: int, w: int) -> torch.Tensor:
        row = self.row_embed.weight[:h, None].expand(h, w, -1)
        col = self.col_embed.weight[None, :w].expand(h, w, -1)
        return torch.cat((col, row), dim=-1).permute(2, 0, 1)[None].expand(batch, -1, -1, -1)


class PositionEmbeddingLearned3d(nn.Module):
    """Learned 3-D table; smaller grids take evenly spread rows of it.

    forward(batch, h, w, d) returns (batch, h*w*d, 3 * num_pos_feats), tokens in (h, w, d) order, d fastest.
    """

    def __init__(
        self, num_pos_feats: int = 256, h_patch_num: int = 16, w_patch_num: int = 16, d_patch_num: int = 64
    ):
        super().__init__()
        self.row_embed = nn.Embedding(h_patch_num, num_pos_feats)
        self.col_embed = nn.Embedding(w_patch_num, num_pos_feats)
        self.dep_embed = nn.Embedding(d_patch_num, num_pos_feats)
        for table in (self.row_embed, self.col_embed, self.dep_embed):
            nn.init.uniform_(table.weight)

    @staticmethod
    def _rows(table: nn.Embedding, size: int) -> torch.Tensor:
        if not 1 <= size <= table.num_embeddings:
            raise ValueError(
                f"grid of {size} patches along one axis, but the position table holds "
                f"{table.num_embeddings}; resize the volume or build the ViT larger"
            )
        step = table.num_embeddings // size
        index = (torch.arange(size, device=table.weight.device) + 1) * step - 1
        return table.weight[index]

    def forward(self, batch: int, h: int, w: int, d: int) -> torch.Tensor:
        row = self._rows(self.row_embed, h)[:, None, None].expand(h, w, d, -1)
        col = self._rows(self.col_embed, w)[None, :, None].expand(h, w, d, -1)
        dep = self._rows(self.dep_embed, d)[None, None].expand(h, w, d, -1)
        return torch.cat((row, col, dep), dim=-1).flatten(0, 2)[None].expand(batch, -1, -1)
