"""The 3-D vision transformer of RadFM and Dia-LLaMA. Upstream: src/Model/vit_3d.py, with its classes and
state-dict keys.

Attention runs through scaled_dot_product_attention, which gives the numbers of the written-out softmax in
less time.
"""

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import nn
from torch.nn import functional as F

from dia_pangu.src.Model.position_encoding import PositionEmbeddingLearned3d


def pair(size) -> tuple[int, int]:
    """Return an int or an (h, w) tuple as (h, w)."""
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x):
        return self.fn(self.norm(x))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.0):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.dropout = heads, dropout
        self.to_qkv = nn.Linear(dim, inner * 3, bias=False)
        single = heads == 1 and dim_head == dim  # upstream leaves the output projection out in this one case
        self.to_out = nn.Identity() if single else nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))

    def forward(self, x):
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, mlp_dim: int, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, Attention(dim, heads, dim_head, dropout)),
                    PreNorm(dim, FeedForward(dim, mlp_dim, dropout)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x):
        for attention, feed_forward in self.layers:
            x = attention(x) + x
            x = feed_forward(x) + x
        return x


class ViT(nn.Module):
    """Turn a volume into patch tokens.

    video: (B, channels, H, W, D) float in [0, 1]; H, W multiples of image_patch_size, D of frame_patch_size,
    and at most image_size and frames. Returns tokens (B, h*w*d, dim) in (h, w, d) order with d fastest, and
    the position code (B, h*w*d, dim) that was added. dim must divide by 3 (one third each for row, column and
    depth).
    """

    def __init__(
        self,
        *,
        image_size,
        image_patch_size,
        frames: int,
        frame_patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
    ):
        super().__init__()
        (height, width), (p1, p2), pf = pair(image_size), pair(image_patch_size), frame_patch_size
        if height % p1 or width % p2 or frames % pf:
            raise ValueError(
                f"image_size {height}x{width} and frames {frames} must divide by the patch {p1}x{p2}x{pf}"
            )
        if dim % 3:
            raise ValueError(f"dim {dim} must divide by 3: row, column and depth take a third each")
        self.patch = (p1, p2, pf)
        patch_dim = channels * p1 * p2 * pf
        self.to_patch_embedding = nn.Sequential(
            Rearrange("b c (h p1) (w p2) (d pf) -> b (h w d) (p1 p2 pf c)", p1=p1, p2=p2, pf=pf),
            nn.LayerNorm(patch_dim),
            nn.Linear(patch_dim, dim),
            nn.LayerNorm(dim),
        )
        self.pos_embedding = PositionEmbeddingLearned3d(dim // 3, height // p1, width // p2, frames // pf)
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = Transformer(dim, depth, heads, dim_head, mlp_dim, dropout)

    def grid(self, shape) -> tuple[int, int, int]:
        """Return the numbers of patches along H, W and D of a volume of a shape that ends with them."""
        sizes = tuple(shape[-3:])
        if any(size % patch for size, patch in zip(sizes, self.patch)):
            raise ValueError(f"volume {sizes} does not divide by the patch {self.patch}")
        return tuple(size // patch for size, patch in zip(sizes, self.patch))

    def forward(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pos = self.pos_embedding(video.shape[0], *self.grid(video.shape))
        return self.transformer(self.dropout(self.to_patch_embedding(video) + pos)), pos
