"""Bases that read a picture as tiles and, behind them, an overview of the whole: their common part."""

import torch
import torch.nn.functional as F

from flmm.models.frozen_base import FrozenBase


def tile_sample(pixel_values, tiles, side, image):
    """Processor output of a picture that was squashed onto (rows, columns) tiles of `side` pixels."""
    rows, columns = tiles
    shape = {"height": max(1, rows) * side, "width": max(1, columns) * side}
    border = ("before_height", "after_height", "before_width", "after_width")
    return {
        "pixel_values": pixel_values,
        "tiles": (rows, columns),
        "image_sizes": (image.height, image.width),
        "meta_data": {"padding": dict.fromkeys(border, 0), "image_shape": shape, "padded_shape": dict(shape)},
    }


class FrozenTiles(FrozenBase):
    """sample["tiles"] is (rows, columns); (0, 0) is a picture of one tile, which is its own overview.

    A subclass says with `tile_side` how many tokens a side one tile becomes.
    """

    maps_per_head = 2
    unpad = False  # the picture is squashed onto its tiles, nothing is padded

    def tile_side(self):
        raise NotImplementedError

    def grid(self, sample):
        """((rows, columns) of tiles, tokens along the side of a tile)."""
        return tuple(sample["tiles"]), self.tile_side()

    def image_tokens(self, sample):
        (rows, columns), side = self.grid(sample)
        return (rows * columns + 1) * side**2

    def to_grid(self, maps, grid):
        """The overview enlarged to the grid of all tiles (bilinear), then the tiles put together."""
        (rows, columns), side = grid
        maps = torch.cat(maps).transpose(0, 1)  # (n, L * H, N)
        overview = maps[..., -(side**2) :].unflatten(-1, (side, side))
        if rows * columns == 0:
            return torch.cat([overview, overview], 1)
        tiles = maps[..., : -(side**2)].unflatten(-1, (rows, columns, side, side))
        tiles = tiles.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)  # (n, L * H, rows * side, ...)
        return torch.cat([F.interpolate(overview, size=tiles.shape[-2:], mode="bilinear"), tiles], 1)
