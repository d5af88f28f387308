"""Where in the volume a finding was seen: maps over the patch grid, the side and place they point to, and pictures.

The maps are those of the model's evidence head where it has one (pretrain_vit.py trains it on masks, so it knows places);
otherwise the finding's prototype weights times how far each patch leans to the positive memory, which every checkpoint has.
"""

import re
import textwrap

import numpy as np
import torch
from torch.nn import functional as F

from common.figures import new_figure, save_figure
from dia_pangu.evaluate.labeler import PATTERNS, clauses, language_of
from dia_pangu.src.Dataset.prompt import FINDINGS, LATERAL, PLACES, SIDES

LUNG_LEVEL = 0.35  # of the lung window's channel: below is air-filled lung or outside
SAID = {
    "right": r"\bright\b|右",
    "left": r"\bleft\b|左",
    "upper": r"\bupper\b|上(?:肺)?(?:野|部|叶)",
    "middle": r"\bmiddle\b|中(?:肺)?(?:野|部|叶)",
    "lower": r"\blower\b|\bbase\b|下(?:肺)?(?:野|部|叶)|底",
}


@torch.no_grad()
def evidence_maps(layer, tokens: torch.Tensor, grid) -> torch.Tensor:
    """(B, 14, h, w, d), not negative; tokens (B, S, n_tok, dim), first volume of each sample."""
    first = tokens[:, 0]
    if layer.evidence_head is not None:
        maps = layer.evidence_head(first).sigmoid().transpose(1, 2)
    else:
        memory = F.normalize(layer.pos_sample_memory[:, 0], dim=-1) - F.normalize(
            layer.neg_sample_memory[:, 0], dim=-1
        )
        lean = torch.einsum("bvd,cd->bcv", F.normalize(layer.proj(first), dim=-1), memory).clamp(min=0)
        maps = layer.prototype.softmax(-1) * lean
    return maps.unflatten(-1, grid).float().cpu()


def lung_range(vision_x: torch.Tensor) -> tuple[float, float]:
    """Lowest and highest slice with lung, as shares of the depth; vision_x (3, H, W, D) of the windows preparation.

    Lung is what is dark in the lung window and lies inside the body, that is between brighter voxels of its row.
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
    """Side and third of the lungs that a map (h, w, d) points to, by the centre of mass of its strongest part."""
    strong = np.where(evidence >= 0.5 * evidence.max(), evidence, 0.0).astype(float)
    mass = strong.sum()
    if mass <= 0:
        return {"side": "", "place": "", "height": float("nan")}
    _, w, d = evidence.shape
    right = strong[:, : w // 2].sum() + (strong[:, w // 2].sum() / 2 if w % 2 else 0)
    height = (strong.sum((0, 1)) * (np.arange(d) + 0.5)).sum() / mass / d
    height = (height - lungs[0]) / max(
        lungs[1] - lungs[0], 1e-6
    )  # 0 at the lowest, 1 at the highest lung slice
    place = PLACES[2] if height < 1 / 3 else PLACES[1] if height < 2 / 3 else PLACES[0]
    return {"side": SIDES[0] if right > mass / 2 else SIDES[1], "place": place, "height": float(height)}


def locate_all(
    layer, tokens: torch.Tensor, vision_x: torch.Tensor, preprocess: str
) -> tuple[torch.Tensor, list[dict]]:
    """(evidence maps (B, 14, h, w, d), [{finding: (side, place)}] for the findings that lie on one side).

    tokens (B, S, n_tok, dim) of vision_x (B, S, 3, H, W, D); the lungs' height is seen in the `windows` preparation only.
    """
    maps = evidence_maps(layer, tokens, layer.vision_encoder.grid(vision_x.shape))
    places = []
    for volume, own in zip(vision_x[:, 0].cpu(), maps.numpy()):
        lungs = lung_range(volume) if preprocess == "windows" else (0.0, 1.0)
        where = {name: locate(own[FINDINGS.index(name)], lungs) for name in LATERAL}
        places.append({name: (at["side"], at["place"]) for name, at in where.items()})
    return maps, places


def said(text: str, finding: str) -> dict:
    """Side and place that a report's own words give to a finding; empty where it gives none."""
    language = language_of(text)
    for clause in clauses(text, language):
        if PATTERNS[language][finding].search(clause):
            hits = {word: re.search(pattern, clause, re.I) for word, pattern in SAID.items()}
            return {
                "side": next((s for s in SIDES if hits[s]), ""),
                "place": next((p for p in PLACES if hits[p]), ""),
            }
    return {"side": "", "place": ""}


def location_scores(attributes: dict, found: dict) -> dict:
    """Agreement on side and place. attributes: id -> finding -> {side, place}; found: the same, for findings reported.

    Counts findings that are there and were found; returns share right (None of none) and count for each of side and place.
    """
    out = {}
    for what in ("side", "place"):
        pairs = [
            (truth[what], found[name][finding].get(what, ""))
            for name, findings in attributes.items()
            for finding, truth in findings.items()
            if truth.get(what) and finding in found.get(name, {})
        ]
        out[what] = {
            "share": float(np.mean([a == b for a, b in pairs])) if pairs else None,
            "count": len(pairs),
        }
    return out


def draw_evidence(path, vision_x, maps, rows, name: str, report: str):
    """One row of slices per shown finding: the lung window with the finding's map laid over it, under the volume's name and report.

    vision_x: (3, H, W, D); maps: (14, h, w, d); rows: [(finding, text), ...], at most five are drawn. A Chinese report is left to
    the csv: matplotlib's own font has no Chinese characters.
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
    figure.suptitle(textwrap.fill(title, 130), fontsize=8)
    return save_figure(figure, path)
