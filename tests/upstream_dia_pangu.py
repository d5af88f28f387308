"""Modules that upstream carries and never calls, kept exact so that their golden tensors are still compared.

The DETR decoder (upstream: src/Model/transformer_decoder.py), two 2-D position codes (position_encoding.py)
and Flamingo's tanh-gated cross-attention (helpers.py). Post-norm in the decoder keeps upstream's result:
the output of self-attention is thrown away there (no residual is added), so the layer does not compute it;
the weights stay for the state dict.
"""

import copy
import math

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from dia_pangu.src.Model.helpers import FeedForward


def with_pos(tensor, pos):
    return tensor if pos is None else tensor + pos


class TransformerDecoderLayer(nn.Module):
    """Sequence first: tgt (T, B, C), memory (S, B, C). Returns the new tgt and the attention map (B, T,
    S)."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2, self.norm3 = (
            nn.LayerNorm(d_model),
            nn.LayerNorm(d_model),
            nn.LayerNorm(d_model),
        )
        self.dropout = nn.Dropout(dropout)
        activations = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}
        if activation not in activations:
            raise ValueError(f"activation {activation!r}: expected one of {', '.join(activations)}")
        self.activation = activations[activation]
        self.normalize_before = normalize_before

    def _cross(self, x, memory, memory_mask, memory_key_padding_mask, pos, query_pos):
        return self.multihead_attn(
            with_pos(x, query_pos),
            with_pos(memory, pos),
            memory,
            attn_mask=memory_mask,
            key_padding_mask=memory_key_padding_mask,
        )

    def _mlp(self, x):
        return self.linear2(self.dropout(self.activation(self.linear1(x))))

    def forward(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        pos=None,
        query_pos=None,
    ):
        cross_args = (memory, memory_mask, memory_key_padding_mask, pos, query_pos)
        if self.normalize_before:
            normed = self.norm1(tgt)
            q = with_pos(normed, query_pos)
            attended = self.self_attn(
                q, q, normed, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask
            )[0]
            tgt = tgt + self.dropout(attended)
            attended, weights = self._cross(self.norm2(tgt), *cross_args)
            tgt = tgt + self.dropout(attended)
            return tgt + self.dropout(self._mlp(self.norm3(tgt))), weights
        tgt = self.norm1(tgt)
        attended, weights = self._cross(tgt, *cross_args)
        tgt = self.norm2(tgt + self.dropout(attended))
        return self.norm3(tgt + self.dropout(self._mlp(tgt))), weights


class TransformerDecoder(nn.Module):
    """A stack of layers. Returns (output, attention maps), or with return_intermediate the normed outputs
    of all."""

    def __init__(
        self,
        decoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        return_intermediate: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(decoder_layer) for _ in range(num_layers))
        self.norm = norm
        self.return_intermediate = return_intermediate

    def forward(self, tgt, memory, **masks):
        output, maps, steps = tgt, [], []
        for layer in self.layers:
            output, weights = layer(output, memory, **masks)
            maps.append(weights)
            steps.append(output if self.norm is None else self.norm(output))
        return torch.stack(steps) if self.return_intermediate else (steps[-1], maps)


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
    """Learned 2-D table for grids up to 50 x 50. Returns (B, 2 * num_pos_feats, H, W): columns first, then
    rows."""

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


class MaskedCrossAttention(nn.Module):
    """Text x (B, N, dim) attends to media (B, T, n, dim_visual) that came before it.

    media_locations: (B, N) bool, True where a medium starts; None lets every token see all media. With
    only_attend_immediate_media a token sees the latest medium alone, and a token before any medium gets
    zeros.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        only_attend_immediate_media: bool = True,
    ):
        super().__init__()
        inner = dim_head * heads
        self.heads, self.scale = heads, dim_head**-0.5
        self.only_attend_immediate_media = only_attend_immediate_media
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim_visual, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, media, media_locations=None):
        count, size = media.shape[1:3]
        q = rearrange(self.to_q(self.norm(x)), "b n (h d) -> b h n d", h=self.heads) * self.scale
        k, v = rearrange(self.to_kv(media), "b t n (two h d) -> two b h (t n) d", two=2, h=self.heads)
        scores = q @ k.transpose(-1, -2)
        if media_locations is not None:
            text_time = media_locations.bool().cumsum(-1)  # how many media have started at each token
            media_time = torch.arange(1, count + 1, device=x.device).repeat_interleave(size)
            seen, when = text_time[:, None, :, None], media_time
            visible = seen == when if self.only_attend_immediate_media else seen >= when
            scores = scores.masked_fill(~visible, -torch.finfo(scores.dtype).max)
        weights = scores.softmax(-1)
        if media_locations is not None and self.only_attend_immediate_media:
            weights = weights.masked_fill(text_time[:, None, :, None] == 0, 0.0)
        return self.to_out(rearrange(weights @ v, "b h n d -> b n (h d)"))


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention and MLP added through tanh gates that start at 0, so that a new block changes
    nothing."""

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        only_attend_immediate_media: bool = True,
    ):
        super().__init__()
        self.attn = MaskedCrossAttention(
            dim=dim,
            dim_visual=dim_visual,
            dim_head=dim_head,
            heads=heads,
            only_attend_immediate_media=only_attend_immediate_media,
        )
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = FeedForward(dim, ff_mult)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, media, media_locations=None):
        x = self.attn(x, media, media_locations) * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x
