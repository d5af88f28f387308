"""Where in the volume a finding is seen: maps over the patch grid, side and place, and pictures.

The maps are those of the model's evidence head where it has one (it was trained on masks, so that it knows
places). Otherwise a map is the finding's prototype weights times how much more similar each patch is to the
positive memory than to the negative one, which every checkpoint has.
"""

import gzip
import textwrap

import nibabel
import numpy as np
import torch
from scipy.ndimage import binary_dilation
from torch.nn import functional as F

from common.checkpoint import atomic_write
from common.figures import new_figure, save_figure
from dia_pangu.evaluate.labeler import language_of
from dia_pangu.src.Dataset.preprocess import WINDOWS
from dia_pangu.src.Dataset.prompt import FINDINGS, LATERAL, PLACES, SIDES
from dia_pangu.src.Dataset.scan import read_native
from dia_pangu.src.Dataset.verdict import between, find_lungs

# Findings of the lungs and the pleura, whose maps are shown inside the chest alone.
IN_CHEST = set(LATERAL) - {"fracture"} | {"edema"}

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
    share = (dark & between(~dark, 0) & between(~dark, 1)).mean((0, 1))
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
    layer, tokens: torch.Tensor, vision_x: torch.Tensor, preprocess: str, verdicts=()
) -> tuple[torch.Tensor, list[dict]]:
    """Return the evidence maps (B, 14, h, w, d), and per sample {finding: (side, place)} for the findings
    that lie on one side.

    tokens: (B, S, n_tok, dim) of vision_x (B, S, 3, H, W, D). preprocess: only the `windows` preparation
    shows where the lungs begin and end; with `upstream` the thirds are those of the whole volume. verdicts:
    of the volumes; where left and right are unknown no side is named, and with `upstream`, which keeps the
    stored axes, no place either.
    """
    maps = evidence_maps(layer, tokens, layer.vision_encoder.grid(vision_x.shape))
    places = []
    for volume, own in zip(vision_x[:, 0].cpu(), maps.numpy()):
        lungs = lung_range(volume) if preprocess == "windows" else (0.0, 1.0)
        where = {name: locate(own[FINDINGS.index(name)], lungs) for name in LATERAL}
        places.append({name: (at["side"], at["place"]) for name, at in where.items()})
    for where, verdict in zip(places, verdicts):
        if verdict.side != "known":
            kept = preprocess == "windows"
            where.update({name: ("", place if kept else "") for name, (_, place) in where.items()})
    return maps, places


def stretch(count: int, step: float, parts: int, field: float) -> np.ndarray:
    """Return (count, parts): how a map of `parts` patches over `field` mm is interpolated linearly at `count`
    voxels of `step` mm around the same centre; voxels outside the field get nothing."""
    place = (np.arange(count) + 0.5 - count / 2) * step
    at = np.clip((place / field + 0.5) * parts - 0.5, 0, parts - 1)
    low = np.minimum(at.astype(int), max(parts - 2, 0))
    weights = np.zeros((count, parts), np.float32)
    weights[np.arange(count), low] = 1 - (at - low)
    if parts > 1:
        weights[np.arange(count), low + 1] += at - low
    weights[np.abs(place) > field / 2] = 0
    return weights


def spread(field, shape, steps, fov_mm) -> np.ndarray:
    """Return a map (h, w, d) at the voxels of a volume of `shape` and `steps` mm, float32."""
    h, w, d = (stretch(n, s, m, f) for n, s, m, f in zip(shape, steps, field.shape, fov_mm))
    return np.einsum("ah,bw,cd,hwd->abc", h, w, d, field.astype(np.float32), optimize=True)


def chest_regions(hu: np.ndarray, spacing_mm) -> tuple[np.ndarray, np.ndarray]:
    """Return where the inside of the chest and where the body is in HU (H, W, D), bool, found on voxels of
    about 4 mm. Inside is what lies between lung in its row or column, and 8 mm around it."""
    small, body, lung, steps = find_lungs(hu, spacing_mm)
    chest = between(lung, 0) | between(lung, 1)
    chest = binary_dilation(chest, iterations=2) & body if chest.any() else body
    index = np.ix_(*(np.minimum(np.arange(n) // s, m - 1) for n, s, m in zip(hu.shape, steps, small.shape)))
    return chest[index], body[index]


class Backdrop:
    """What the evidence is drawn on: the scan at its own resolution, or the model's input where the
    preparation has left no HU to show.

    values: (H, W, D) in [0, 1]. steps: mm of a voxel. fov_mm: what the maps cover. affine: of the array
    (W, H, D), for the heat maps. inside: {finding: bool (H, W, D)} or None: where its map is shown.
    """

    def __init__(self, path, vision_x, grid, series=None):
        if grid.preprocess == "windows":
            hu, self.steps, self.affine, _ = read_native(path, series)
            low, high = WINDOWS[0]
            self.values, self.fov_mm = ((hu - low) / (high - low)).clip(0, 1), grid.fov_mm
            chest, body = chest_regions(hu, self.steps)
            self.inside = {name: chest if name in IN_CHEST else body for name in FINDINGS}
        else:
            self.values, self.steps = vision_x[0].numpy(), (1.0, 1.0, 1.0)
            self.fov_mm, self.affine, self.inside = self.values.shape, np.eye(4), None

    def heat(self, field, finding: str) -> np.ndarray:
        """Return a finding's map (h, w, d) at these voxels, 0 outside where it can be, as a share of its
        largest."""
        out = spread(field, self.values.shape, self.steps, self.fov_mm)
        if self.inside is not None:
            out[~self.inside[finding]] = 0
        return out / max(float(field.max()), 1e-9)


def save_heat(path, heat, affine, finding: str):
    """Write a map (H, W, D) of 0 to 1 as NIfTI over its scan, uint8 with a slope, as viewers read it."""
    stored = (heat * 255).round().clip(0, 255).astype(np.uint8)
    image = nibabel.Nifti1Image(stored.transpose(1, 0, 2), affine)
    image.header.set_slope_inter(1 / 255, 0)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"evidence of {finding}"[:79].encode()
    atomic_write(path, gzip.compress(image.to_bytes(), 1))


def draw_evidence(path, backdrop: Backdrop, maps, rows, name: str, report: str, verdict: str = ""):
    """Draw one row of six slices per finding: the scan with the finding's map over it, under the volume's
    name, report and verdict; and write each map as NIfTI beside the picture.

    maps: (14, h, w, d). rows: [(finding, caption), ...], of which at most five are drawn. A Chinese report is
    left out, because matplotlib's own font has no Chinese characters.
    """
    title = f"{name}: {report[:400]}" if language_of(report) == "en" else name
    rows = rows[:5] or [("no finding", "nothing above its threshold")]
    values, depth = backdrop.values, backdrop.values.shape[-1]
    body = np.flatnonzero(values[::4, ::4].max((0, 1)) > 0.5)
    low, high = (body[0], body[-1]) if len(body) else (0, depth - 1)
    figure, axes = new_figure(len(rows), 6, 1.7, 1.9, squeeze=False)
    colours = None
    for line, (finding, caption) in zip(axes, rows):
        slices, heat = np.linspace(low, high, 6).astype(int), None
        if finding != "no finding":
            heat = backdrop.heat(np.asarray(maps[FINDINGS.index(finding)]), finding)
            file = path.with_name(f"{path.stem}_{finding.replace(' ', '_')}.nii.gz")
            save_heat(file, heat, backdrop.affine, finding)
            # The slice with the strongest evidence is one of the six.
            peak = int(heat.max((0, 1)).argmax())
            slices[np.abs(slices - peak).argmin()] = peak
        for axis, k in zip(line, slices):
            shape = {"vmin": 0, "vmax": 1, "aspect": backdrop.steps[0] / backdrop.steps[1]}
            axis.imshow(values[:, :, k], cmap="gray", **shape)
            if heat is not None:
                over = heat[:, :, k]
                colours = axis.imshow(over, cmap="inferno", alpha=(0.6 * over).clip(0, 1), **shape)
            axis.text(0.02, 0.98, f"slice {k + 1}", color="w", fontsize=6, va="top", transform=axis.transAxes)
            axis.set_axis_off()
        line[0].set_title(caption, loc="left", fontsize=8)
    if colours is not None:
        bar = figure.colorbar(colours, ax=axes, shrink=0.6, aspect=30)
        bar.set_label("evidence, share of\nthe finding's largest", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle("\n".join(textwrap.fill(text, 130) for text in (title, verdict) if text), fontsize=8)
    return save_figure(figure, path)
