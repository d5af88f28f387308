"""Perceiver resampler and tanh-gated cross-attention of Flamingo (Alayrac et al. 2022). Upstream: src/Model/helpers.py.

Dia-Pangu uses the resampler; the gated block belongs to the same file upstream and is kept exact.
"""

import torch
from einops import rearrange, repeat
from torch import nn
from torch.nn import functional as F


def FeedForward(dim: int, mult: int = 4) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear without biases; keys 0, 1 and 3."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


class PerceiverAttention(nn.Module):
    """Latents (b, T, n, D) attend to the media x (b, T, v, D) and to themselves."""

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8):
        super().__init__()
        inner = dim_head * heads
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, latents):
        x, latents = self.norm_media(x), self.norm_latents(latents)
        q = rearrange(self.to_q(latents), "b t n (h d) -> b t h n d", h=self.heads)
        k, v = rearrange(
            self.to_kv(torch.cat((x, latents), dim=-2)),
            "b t n (two h d) -> two b t h n d",
            two=2,
            h=self.heads,
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "b t h n d -> b t n (h d)"))


class PerceiverResampler(nn.Module):
    """Any number of visual features to `num_latents` per medium: x (b, T, F, v, D) -> (b, T, num_latents, D)."""

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: int = 4,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim)) if max_num_frames else None
        self.media_time_embs = nn.Parameter(torch.randn(max_num_media, 1, dim)) if max_num_media else None
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads), FeedForward(dim, ff_mult)]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, media, frames, v = x.shape[:4]
        if self.frame_embs is not None:
            x = x + self.frame_embs[:frames, None]
        x = x.flatten(2, 3)
        if self.media_time_embs is not None:
            x = x + self.media_time_embs[:media]
        latents = repeat(self.latents, "n d -> b t n d", b=b, t=media)
        for attention, feed_forward in self.layers:
            latents = attention(x, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm(latents)


class MaskedCrossAttention(nn.Module):
    """Text x (B, N, dim) attends to media (B, T, n, dim_visual) that came before it.

    media_locations: (B, N) bool, True where a medium starts; None lets every token see all media. With
    only_attend_immediate_media a token sees the latest medium alone, and a token before any medium gets zeros.
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
    """Cross-attention and MLP added through tanh gates that start at 0, so that a new block changes nothing."""

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
