"""Where in the volume a finding is seen: maps over the patch grid, side and place, and pictures.

The maps are those of the model's evidence head where it has one (it was trained on masks, so that it knows
places). Otherwise a map is the finding's prototype weights times how much more similar each patch is to the
positive memory than to the negative one, which every checkpoint has.
"""

import textwrap

import numpy as np
import torch
from torch.nn import functional as F

from common.figures import new_figure, save_figure
from dia_pangu.evaluate.labeler import language_of
from dia_pangu.src.Dataset.prompt import FINDINGS, LATERAL, PLACES, SIDES

LUNG_LEVEL = 0.35  # of the lung window's channel; below it is air-filled lung or the outside


@torch.no_grad()
def evidence_maps(layer, tokens: torch.Tensor, grid) -> torch.Tensor:
    """Return the evidence maps (B, 14, h, w, d), none of them negative, of the first volume of each sample.

    layer: MyEmbedding. tokens: (B, S, n_tok, dim). grid: patches along H, W and D.
    """
    first = tokens[:, 0]
    if layer.evidence_head is not None:
        maps = layer.evidence_head(first).sigmoid().transpose(1, 2)
    else:
        positive = F.normalize(layer.pos_sample_memory[:, 0], dim=-1)
        negative = F.normalize(layer.neg_sample_memory[:, 0], dim=-1)
        patches = F.normalize(layer.proj(first), dim=-1)
        margin = torch.einsum("bvd,cd->bcv", patches, positive - negative).clamp(min=0)
        maps = layer.prototype.softmax(-1) * margin
    return maps.unflatten(-1, grid).float().cpu()


def lung_range(vision_x: torch.Tensor) -> tuple[float, float]:
    """Return where the lungs begin and end as fractions of the depth, from a volume (3, H, W, D) of the
    windows preparation.

    Lung is what is dark in the lung window and lies inside the body, that is between brighter voxels of its
    row and column.
    """
    dark = (vision_x[0] < LUNG_LEVEL).numpy()
    solid = ~dark
    inside = (
        np.maximum.accumulate(solid, 1)
        & np.maximum.accumulate(solid[:, ::-1], 1)[:, ::-1]
        & np.maximum.accumulate(solid, 0)
        & np.maximum.accumulate(solid[::-1], 0)[::-1]
    )
    share = (dark & inside).mean((0, 1))
    slices = np.flatnonzero(share > 0.02)
    depth = len(share)
    return (slices[0] / depth, (slices[-1] + 1) / depth) if len(slices) > 1 else (0.0, 1.0)


def locate(evidence: np.ndarray, lungs=(0.0, 1.0)) -> dict:
    """Return the side and the third of the lungs that a map (h, w, d) points to, by the centre of mass of its
    strongest part.

    lungs: first and last slice with lung as fractions of the depth. height in the result: 0 at the lowest, 1
    at the highest of them.
    """
    strong = np.where(evidence >= 0.5 * evidence.max(), evidence, 0.0).astype(float)
    mass = strong.sum()
    if mass <= 0:
        return {"side": "", "place": "", "height": float("nan")}
    _, w, d = evidence.shape
    right = strong[:, : w // 2].sum() + (strong[:, w // 2].sum() / 2 if w % 2 else 0)
    height = (strong.sum((0, 1)) * (np.arange(d) + 0.5)).sum() / mass / d
    height = (height - lungs[0]) / max(lungs[1] - lungs[0], 1e-6)
    place = PLACES[2] if height < 1 / 3 else PLACES[1] if height < 2 / 3 else PLACES[0]
    return {"side": SIDES[0] if right > mass / 2 else SIDES[1], "place": place, "height": float(height)}


def locate_all(
    layer, tokens: torch.Tensor, vision_x: torch.Tensor, preprocess: str
) -> tuple[torch.Tensor, list[dict]]:
    """Return the evidence maps (B, 14, h, w, d), and per sample {finding: (side, place)} for the findings
    that lie on one side.

    tokens: (B, S, n_tok, dim) of vision_x (B, S, 3, H, W, D). preprocess: only the `windows` preparation
    shows where the lungs begin and end; with `upstream` the thirds are those of the whole volume.
    """
    maps = evidence_maps(layer, tokens, layer.vision_encoder.grid(vision_x.shape))
    places = []
    for volume, own in zip(vision_x[:, 0].cpu(), maps.numpy()):
        lungs = lung_range(volume) if preprocess == "windows" else (0.0, 1.0)
        where = {name: locate(own[FINDINGS.index(name)], lungs) for name in LATERAL}
        places.append({name: (at["side"], at["place"]) for name, at in where.items()})
    return maps, places


def draw_evidence(path, vision_x, maps, rows, name: str, report: str, verdict: str = ""):
    """Draw one row of six slices per finding: the lung window with the finding's map over it, under the
    volume's name, report and verdict.

    vision_x: (3, H, W, D). maps: (14, h, w, d). rows: [(finding, caption), ...], of which at most five are
    drawn. A Chinese report is left out, because matplotlib's own font has no Chinese characters.
    """
    title = f"{name}: {report[:400]}" if language_of(report) == "en" else name
    rows = rows[:5] or [("no finding", "nothing above its threshold")]
    depth = vision_x.shape[-1]
    body = np.flatnonzero(vision_x[0].amax((0, 1)).numpy() > 0.5)
    low, high = (body[0], body[-1]) if len(body) else (0, depth - 1)
    slices = np.linspace(low, high, 6)
    figure, axes = new_figure(len(rows), 6, 1.6, 1.9, squeeze=False)
    background = vision_x[0].numpy()
    for axis, k in zip(axes[0], slices.astype(int)):
        axis.text(0.02, 0.98, f"slice {k + 1}", color="white", fontsize=7, va="top", transform=axis.transAxes)
    for line, (finding, text) in zip(axes, rows):
        field = maps[FINDINGS.index(finding)]
        full = F.interpolate(field[None, None], size=vision_x.shape[1:], mode="nearest")[0, 0].numpy()
        for axis, k in zip(line, slices.astype(int)):
            axis.imshow(background[:, :, k], cmap="gray", vmin=0, vmax=1)
            if finding != "no finding":
                axis.imshow(
                    full[:, :, k],
                    cmap="inferno",
                    alpha=0.55 * full[:, :, k] / max(full.max(), 1e-9),
                    vmin=0,
                    vmax=full.max(),
                )
            axis.set_axis_off()
        line[0].set_title(text, loc="left", fontsize=8)
    figure.suptitle("\n".join(textwrap.fill(text, 130) for text in (title, verdict) if text), fontsize=8)
    return save_figure(figure, path)
