"""MGM (Mini-Gemini): how its attention becomes maps. Upstream: flmm/models/frozen_mgm.py.

transformers has no MGM class and its two vision towers are not published in any of its formats, so there is
no adapter that runs: with a class that gives the attention rows, `mgm_maps` is the `to_grid` of one layer.
Its data side is `Pad2Square` and `SampleBuilder(image_marker=...)`.
"""

import torch
import torch.nn.functional as F


def mgm_maps(attention, image_grid, image_global, clip_shape):
    """Attention over MGM's image columns -> maps of one layer.

    attention: (H, S, N), columns = [global ch * cw, if image_global or image_grid == 1] + [g * g tiles of ch
    * cw each]. Returns (H, S, g * ch, g * cw), or (2 H, ...) with the global map, enlarged bilinearly, before
    the tiled one.
    """
    (ch, cw), g = clip_shape, image_grid
    tiles = attention
    if g > 1 and image_global:
        tiles, overview = attention[..., ch * cw :], attention[..., : ch * cw].unflatten(-1, (ch, cw))
    tiles = tiles.unflatten(-1, (g, g, ch, cw)).transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
    if g > 1 and image_global:
        overview = F.interpolate(overview.float(), scale_factor=g, mode="bilinear").to(tiles.dtype)
        return torch.cat([overview, tiles])
    return tiles
