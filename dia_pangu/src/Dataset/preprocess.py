"""From CT files to model input: orientation, spacing, HU windows; and upstream's exact preparation.

scan.py reads the files. A CT is kept as HU (H, W, D): H runs from front to back, W from the patient's right
to left, D from feet to head, so that image[:, :, k] is the usual radiological view of a slice. Spacing is in
mm along the same axes.
"""

import glob
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from nibabel import aff2axcodes
from torch.nn import functional as F

from common.checkpoint import atomic_json, atomic_path
from common.errors import UserError
from dia_pangu.src.Dataset.dicom import files_below
from dia_pangu.src.Dataset.scan import read_ct, read_hu, read_labels_volume, read_scan  # noqa: F401  read_hu is used from here
from dia_pangu.src.Dataset.verdict import AIR_HU, OTHER, Verdict, say

# Part of the cache's key: arrays of an earlier reader are made anew.
READER = 3
# (low, high) HU of the three channels of the default preparation: lung, soft tissue, bone.
WINDOWS = ((-1350.0, 150.0), (-160.0, 240.0), (-500.0, 1300.0))
PREPROCESS = ("windows", "upstream")


@dataclass(frozen=True)
class Grid:
    """What the model sees: size in voxels (H, W, D), field of view in mm along these axes, preparation."""

    size: tuple = (256, 256, 64)
    fov_mm: tuple = (384.0, 384.0, 320.0)
    preprocess: str = "windows"

    @property
    def spacing_mm(self) -> tuple:
        return tuple(f / s for f, s in zip(self.fov_mm, self.size))


def resample(hu: np.ndarray, spacing_mm, grid: Grid) -> torch.Tensor:
    """Resample HU (H, W, D) onto the grid, centred, float32: averaged where the grid is coarser, linear in
    between, air outside."""
    volume = torch.from_numpy(hu)[None, None] - AIR_HU
    spacing = np.array(spacing_mm, float)
    # Averaging before a coarser grid; the factor is the whole number nearest to the ratio of the spacings.
    pool = [max(1, min(int(round(t / s)), n)) for t, s, n in zip(grid.spacing_mm, spacing, hu.shape)]
    if max(pool) > 1:
        volume = F.avg_pool3d(volume, pool, ceil_mode=True)  # the last of an axis may average fewer
    sizes, steps = np.array(volume.shape[2:]), spacing * pool
    beyond = sizes * pool - hu.shape  # voxels that the last one lacks, which move the middle
    if tuple(sizes) == grid.size and not beyond.any() and np.allclose(steps, grid.spacing_mm, rtol=1e-3):
        return volume[0, 0] + AIR_HU
    axes = []
    for size, step, off, target, field in zip(sizes, steps, beyond * spacing, grid.size, grid.fov_mm):
        place_mm = (torch.arange(target, dtype=torch.float64) + 0.5) * (field / target) - (field + off) / 2
        axes.append((2 * place_mm / (size * step)).float())  # -1 and 1 are the outer faces of the volume
    h, w, d = torch.meshgrid(*axes, indexing="ij")
    where = torch.stack((d, w, h), dim=-1)[None]
    return F.grid_sample(volume, where, mode="bilinear", align_corners=False)[0, 0] + AIR_HU


def windows(hu: torch.Tensor) -> torch.Tensor:
    """Turn HU (H, W, D) into three windowed channels (3, H, W, D) uint8: lung, soft tissue, bone."""
    channels = [(hu - low).div(high - low).clamp(0, 1) for low, high in WINDOWS]
    return torch.stack(channels).mul(255).round().byte()


def upstream_image(volume: np.ndarray) -> torch.Tensor:
    """Prepare a (D, H, W) array exactly as upstream: (3, 512, 512, 64) float32 in [0, 1].

    It rotates the axes only where D < W, interpolates in the plane with rounding to the stored integer type,
    takes the nearest slice, and scales by the volume's own minimum and maximum; no orientation, no spacing,
    no HU window.
    """
    if volume.shape[0] < volume.shape[2]:
        volume = np.moveaxis(volume, 0, 2)
    picked = np.floor(np.arange(64) * (volume.shape[2] - 1) / 63 + 0.5).astype(int)
    picked, places = np.unique(picked, return_inverse=True)  # a short volume gives each slice several times
    values = torch.from_numpy(volume[:, :, picked].astype(np.float64)).permute(2, 0, 1)[:, None]
    plane = F.interpolate(values, size=(512, 512), mode="bilinear", align_corners=False)[:, 0]
    if np.issubdtype(volume.dtype, np.integer):
        plane = plane.round()
    low, high = plane.min(), plane.max()
    if low == high:
        raise UserError("every voxel has the same value; an empty volume")
    image = ((plane - low) / (high - low)).float()[torch.from_numpy(places)]
    return image.permute(1, 2, 0).expand(3, -1, -1, -1)


def to_test_grid(image: torch.Tensor, size=(256, 256, 64)) -> torch.Tensor:
    """Resize (3, H, W, D) to (1, 3, *size) by the nearest neighbour, as upstream's collate does."""
    return F.interpolate(image[None], size=tuple(size), mode="nearest")


def prepare(path, grid: Grid, series=None) -> tuple[np.ndarray, Verdict]:
    """Prepare a volume file without the last scaling: uint8 (3, H, W, D), or float32 (1, H, W, D) with
    upstream's preparation; and return what is known of the scan."""
    if grid.preprocess == "upstream":
        scan = read_scan(path, series)
        if scan.verdict.values == OTHER:
            scan.verdict.note(f"no HU and no grey levels ({scan.verdict.why})")
        # The axes stay as they are stored; `evidence.locate` counts them from the right and from the feet.
        width, _, depth = scan.voxels.shape
        if scan.verdict.side == "known" and (aff2axcodes(scan.affine)[::2] != ("L", "S") or depth >= width):
            scan.verdict.side = "unknown"
            scan.verdict.note(
                "upstream's preparation keeps the stored axes, which do not run from right to left and from "
                "feet to head: left and right are unknown"
            )
        image = upstream_image(scan.voxels.transpose(2, 1, 0))[:1]
        return to_test_grid(image, grid.size)[0].numpy(), scan.verdict
    hu, spacing_mm, verdict = read_ct(path, series)
    return windows(resample(hu, spacing_mm, grid)).numpy(), verdict


def to_input(prepared: np.ndarray) -> torch.Tensor:
    """Turn the array of `prepare` into vision input (3, H, W, D) float32 in [0, 1]."""
    tensor = torch.from_numpy(prepared)
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.expand(3, -1, -1, -1)


def stamp(path: Path) -> str:
    """Return what changes when a volume is written anew: size and times of its file and of the files beside
    it that belong to it, or of all files of a folder."""
    files = [path]
    if path.is_dir():
        files = files_below(path)
    elif path.suffix in (".mhd", ".nhdr"):
        files = sorted({path, *path.parent.glob(f"{glob.escape(path.stem)}.*")})
    elif pair := re.search(r"\.(?:img|hdr)((?:\.gz)?)$", path.name):
        both = [path.with_name(f"{path.name[: pair.start()]}.{kind}{pair[1]}") for kind in ("hdr", "img")]
        files = [file for file in both if file.exists()] or [path]
    try:
        stats = [(p.name, p.stat()) for p in files]
    except OSError as error:
        raise UserError(f"{path}: no such volume; the annotation names an id without a file") from error
    return " ".join(f"{n} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for n, s in stats)


def cached(path, cache, settings: str, make):
    """Return (array, verdict) that `make()` gives of a volume file, kept in the folder `cache` (None: made
    afresh).

    settings: what else they depend on. The key also holds sizes and times of the files, so that a changed
    file is read again, and several workers may fill the folder at once.
    """
    if cache is None:
        return make()
    path = Path(path)
    key = f"{path.resolve()} {stamp(path)} {READER} {settings}"
    stored = Path(cache) / f"{hashlib.sha1(key.encode()).hexdigest()}.npy"
    if stored.is_file():
        facts = json.loads(stored.with_suffix(".json").read_text(encoding="utf-8"))
        return np.load(stored), Verdict(**facts) if facts else None
    made, verdict = make()
    # The verdict is there before the array, so that an array never stands alone.
    atomic_json(stored.with_suffix(".json"), asdict(verdict) if verdict else None)
    with atomic_path(stored) as temporary:
        np.save(temporary, made)
    return made, verdict


def load_scan(path, grid: Grid, cache=None, series=None) -> tuple[torch.Tensor, Verdict]:
    """Read and prepare a volume as (3, H, W, D) float32 in [0, 1], and return what is known of the scan.

    cache: folder for prepared arrays. series: of a DICOM folder with several, see dicom.choose_series.
    """
    settings = f"{grid} {WINDOWS} {series}"
    prepared, verdict = cached(path, cache, settings, lambda: prepare(path, grid, series))
    return to_input(prepared), verdict


def load_volume(path, grid: Grid, cache=None, series=None) -> torch.Tensor:
    """Read and prepare a volume as (3, H, W, D) float32 in [0, 1]; what is doubtful about it is printed."""
    image, verdict = load_scan(path, grid, cache, series)
    say(path, verdict.notes)
    return image


def patch_labels(path, grid: Grid, patch, cache=None, least: float = 0.08) -> torch.Tensor:
    """Turn a bit mask volume (bit c = finding c) into labels per patch token (n_tok, 14) float32, d fastest
    as in the ViT.

    A patch carries a finding when at least the fraction `least` of its voxels does, or when it is the
    finding's fullest patch. patch: size of a patch in voxels (H, W, D).
    """
    settings = f"{grid} {tuple(patch)} {least}"
    made, _ = cached(path, cache, settings, lambda: (_patch_labels(path, grid, patch, least), None))
    return torch.from_numpy(made).float()


def _patch_labels(path, grid: Grid, patch, least: float) -> np.ndarray:
    voxels, step = read_labels_volume(path)
    index = []
    for size, mm, target, field in zip(voxels.shape, step, grid.size, grid.fov_mm):
        place_mm = (np.arange(target) + 0.5) * field / target - field / 2
        nearest = np.floor(place_mm / mm + size / 2).astype(int)
        index.append(np.where((nearest >= 0) & (nearest < size), nearest, size))
    # Outside of the mask nothing is found: a layer of zeros behind its last voxels stands for that.
    bits = torch.from_numpy(np.pad(voxels.astype(np.int32), (0, 1))[np.ix_(*index)])
    planes = torch.stack([((bits >> c) & 1).float() for c in range(14)])
    share = F.avg_pool3d(planes[None], tuple(patch))[0].flatten(1)
    full = share.max(1, keepdim=True).values
    return ((share >= least) | ((share == full) & (full > 0))).T.contiguous().numpy()
