"""Transformer layer of the encoder with three equal ways to attend (upstream block.py)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers.activations import ACT2FN

from em_mllm.em_foundation.models.padding import pad_input, unpad_input

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None


class SiTMAESelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with the scores written out; the only one that returns probabilities or
    takes a head mask.

    hidden_states (B, M, D), attn_mask (B, M, M) bool or None (all see all), sample_ids (B, M) -> (B, M, D),
    probabilities or None. A row of the mask without any True (padding) attends evenly to everything; its
    output must not be used.
    """

    def __init__(self, hidden_size, heads, dropout, attention_dropout, bias):
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.heads, self.attention_dropout, self.dropout = heads, attention_dropout, nn.Dropout(dropout)

    def project(self, hidden_states):
        return [
            rearrange(f(hidden_states), "b m (h d) -> b h m d", h=self.heads)
            for f in (self.query, self.key, self.value)
        ]

    def finish(self, context):
        return self.dropout(self.dense(rearrange(context, "b h m d -> b m (h d)")))

    def probabilities(self, q, k, attn_mask, head_mask):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if attn_mask is not None:
            low = max(-1e9, torch.finfo(scores.dtype).min)  # -1e9 overflows in half precision
            scores = scores.masked_fill(~attn_mask[:, None], low)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        return weights if head_mask is None else weights * head_mask[:, None, None]

    def forward(
        self, hidden_states, attn_mask=None, sample_ids=None, head_mask=None, output_attentions=False
    ):
        q, k, v = self.project(hidden_states)
        weights = self.probabilities(q, k, attn_mask, head_mask)
        return self.finish(weights @ v), weights if output_attentions else None


class SiTMAESdpaSelfAttention(SiTMAESelfAttention):
    """The same weights through torch's fused kernels; memory does not grow with M * M per head."""

    def forward(
        self, hidden_states, attn_mask=None, sample_ids=None, head_mask=None, output_attentions=False
    ):
        if output_attentions or head_mask is not None:
            return super().forward(hidden_states, attn_mask, sample_ids, head_mask, output_attentions)
        q, k, v = self.project(hidden_states)
        if attn_mask is not None:  # padding rows may see everything: no row is empty
            attn_mask = (attn_mask | ~attn_mask.any(-1, keepdim=True))[:, None]
        dropout = self.attention_dropout if self.training else 0.0
        return self.finish(F.scaled_dot_product_attention(q, k, v, attn_mask, dropout)), None


class SiTMAEFlashAttention2(SiTMAESdpaSelfAttention):
    """Fused weights (Wqkv rows: q, k, v; Wo), valid tokens only through the variable-length kernel.

    That kernel needs CUDA and half precision; float32 activations are cast to bf16 for it, as upstream.
    Elsewhere the SDPA path gives the same numbers. The output keeps the shape (B, M, D).
    """

    def __init__(self, hidden_size, heads, dropout, attention_dropout, bias):
        nn.Module.__init__(self)
        self.Wqkv = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.Wo = nn.Linear(hidden_size, hidden_size)
        self.heads, self.attention_dropout, self.dropout = heads, attention_dropout, nn.Dropout(dropout)

    def project(self, hidden_states):
        qkv = self.Wqkv(hidden_states)
        return rearrange(qkv, "b m (three h d) -> three b h m d", three=3, h=self.heads).unbind(0)

    def finish(self, context):
        return self.dropout(self.Wo(rearrange(context, "b h m d -> b m (h d)")))

    def forward(
        self, hidden_states, attn_mask=None, sample_ids=None, head_mask=None, output_attentions=False
    ):
        dropout = self.attention_dropout if self.training else 0.0
        if sample_ids is None or not uses_varlen(hidden_states, dropout, head_mask, output_attentions):
            return super().forward(hidden_states, attn_mask, sample_ids, head_mask, output_attentions)
        rows, length, _ = hidden_states.shape
        tokens, indices, cu_seqlens, longest = unpad_input(hidden_states, sample_ids)
        qkv = rearrange(self.Wqkv(tokens), "t (three h d) -> three t h d", three=3, h=self.heads)
        q, k, v = qkv.unbind(0)
        half = q.dtype if q.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
        context = varlen_attn(q.to(half), k.to(half), v.to(half), cu_seqlens, cu_seqlens, longest, longest)
        out = self.dropout(self.Wo(rearrange(context, "t h d -> t (h d)").to(tokens.dtype)))
        return pad_input(out, indices, rows, length), None


def has_varlen_kernel(hidden_states: torch.Tensor) -> bool:
    """Whether torch's variable-length kernel can take these activations."""
    return varlen_attn is not None and hidden_states.is_cuda


def uses_varlen(hidden_states, dropout: float, head_mask, output_attentions: bool) -> bool:
    """Whether "fa2" attends by the variable-length kernel, which needs no mask."""
    return has_varlen_kernel(hidden_states) and not dropout and head_mask is None and not output_attentions


SITMAE_ATTENTION_CLASSES = {
    "eager": SiTMAESelfAttention,
    "sdpa": SiTMAESdpaSelfAttention,
    "fa2": SiTMAEFlashAttention2,
}


class SiTMAELayer(nn.Module):
    """Pre-norm layer: h += attention(norm1(h)); h += w_2(act(w_1(norm2(h))))."""

    def __init__(self, config, hidden_size, heads, intermediate_size):
        super().__init__()
        dropout = (config.hidden_dropout_prob, config.attention_probs_dropout_prob)
        kind = SITMAE_ATTENTION_CLASSES[config.attention_type]
        self.attention = kind(hidden_size, heads, *dropout, config.qkv_bias)
        self.norm1 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.w_1 = nn.Linear(hidden_size, intermediate_size)
        self.w_2 = nn.Linear(intermediate_size, hidden_size)
        self.act, self.dropout = ACT2FN[config.hidden_act], nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states, attn_mask=None, sample_ids=None, head_mask=None, output_attentions=False
    ):
        attended, weights = self.attention(
            self.norm1(hidden_states), attn_mask, sample_ids, head_mask, output_attentions
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.dropout(self.w_2(self.act(self.w_1(self.norm2(hidden_states)))))
        return hidden_states, weights


def run_layers(
    owner,
    layers,
    hidden_states,
    attn_mask,
    sample_ids,
    head_mask=None,
    output_attentions=False,
    output_hidden_states=False,
):
    """Apply `layers` in turn; returns the output, (embedding output and every layer's) and attentions, each
    None if not asked for.

    head_mask: (heads,) or (layers, heads). owner: the module whose layers they are, which says whether
    activations are computed again in the backward pass.
    """
    states, attentions = [hidden_states], []
    for i, layer in enumerate(layers):
        own_mask = head_mask if head_mask is None or head_mask.dim() == 1 else head_mask[i]
        arguments = (attn_mask, sample_ids, own_mask, output_attentions)
        if owner.gradient_checkpointing and owner.training:
            again = owner._gradient_checkpointing_func  # transformers sets it
            hidden_states, weights = again(layer.__call__, hidden_states, *arguments)
        else:
            hidden_states, weights = layer(hidden_states, *arguments)
        if output_hidden_states:
            states.append(hidden_states)
        attentions.append(weights)
    states = tuple(states) if output_hidden_states else None
    return hidden_states, states, tuple(attentions) if output_attentions else None
