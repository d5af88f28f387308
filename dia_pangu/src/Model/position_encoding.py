"""Learned position table of the 3-D ViT. Upstream: src/Model/position_encoding.py.

State-dict keys: row_embed.weight, col_embed.weight, dep_embed.weight. Upstream's file also holds two 2-D
tables that no model calls; they are in tests/upstream_dia_pangu.py, where their golden tensors are still
compared.
"""

import torch
from torch import nn


class PositionEmbeddingLearned3d(nn.Module):
    """A learned position table per axis; grids smaller than the table take evenly spread rows of it.

    forward(batch, h, w, d) returns (batch, h*w*d, 3 * num_pos_feats), the tokens in (h, w, d) order with d
    fastest.
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
