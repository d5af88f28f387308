"""Perceiver resampler of Flamingo (Alayrac et al. 2022). Upstream: src/Model/helpers.py.

Upstream's file also holds a gated cross-attention that no model calls; it is in tests/upstream_dia_pangu.py.
"""

import torch
from einops import rearrange, repeat
from torch import nn
from torch.nn import functional as F


def FeedForward(dim: int, mult: int = 4) -> nn.Sequential:
    """Return LayerNorm, Linear, GELU and Linear, without biases; state-dict keys 0, 1 and 3."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


class PerceiverAttention(nn.Module):
    """Let latents (b, T, n, D) attend to the media x (b, T, v, D) and to themselves."""

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
    """Resample features to `num_latents` per medium: (b, T, F, v, D) -> (b, T, num_latents, D).

    max_num_media, max_num_frames: sizes of upstream's optional time embeddings; the published model has none.
    """

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
