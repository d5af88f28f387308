"""DETR decoder of RadFM. Upstream: src/Model/transformer_decoder.py; Dia-Pangu carries it but does not call it.

Post-norm keeps upstream's result: the output of self-attention is thrown away there (no residual add), so the layer
does not compute it; the weights stay for the state dict.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F


def with_pos(tensor, pos):
    return tensor if pos is None else tensor + pos


class TransformerDecoderLayer(nn.Module):
    """Sequence first: tgt (T, B, C), memory (S, B, C). Returns the new tgt and the attention map (B, T, S)."""

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
    """A stack of layers. Returns (output, attention maps), or with return_intermediate the normed outputs of all."""

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
