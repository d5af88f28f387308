"""From CT files to model input: reading NIfTI and DICOM, orientation, spacing, HU windows; and upstream's
exact preparation.

A CT is kept as HU (H, W, D): H runs from front to back, W from the patient's right to left, D from feet to
head, so that image[:, :, k] is the usual radiological view of a slice. Spacing is in mm along the same axes.
"""

import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from nibabel import orientations
from torch.nn import functional as F

from common.errors import UserError

AIR_HU = -1024.0
# (low, high) HU of the three channels of the default preparation: lung, soft tissue, bone.
WINDOWS = ((-1350.0, 150.0), (-160.0, 240.0), (-500.0, 1300.0))
PREPROCESS = ("windows", "upstream")


@dataclass(frozen=True)
class Grid:
    """What the model sees: the size in voxels (H, W, D), the field of view in mm along the same axes, and the
    preparation."""

    size: tuple = (256, 256, 64)
    fov_mm: tuple = (384.0, 384.0, 320.0)
    preprocess: str = "windows"

    @property
    def spacing_mm(self) -> tuple:
        return tuple(f / s for f, s in zip(self.fov_mm, self.size))


def read_nifti(path) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels as stored (X, Y, Z) and the 4x4 affine to RAS mm; raise UserError for a file that is no
    3-D volume."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such volume; the annotation names an id without a file")
    try:
        image = nibabel.load(path)
        voxels = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, nibabel.filebasedimages.ImageFileError, zlib.error) as error:
        raise UserError(
            f"{path}: not a readable NIfTI file ({str(error).splitlines()[0]}); was the copy cut short?"
        ) from error
    if voxels.ndim == 4 and voxels.shape[3] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3:
        raise UserError(
            f"{path}: has {voxels.ndim} dimensions {voxels.shape}, expected one 3-D volume; split the series"
        )
    return voxels, image.affine


@dataclass
class Slice:
    """One DICOM slice: position (mm) and direction cosines in DICOM's axes, pixel size (row, column; mm), HU
    (rows, columns)."""

    position: np.ndarray
    cosines: np.ndarray
    pixel_mm: np.ndarray
    hu: np.ndarray
    series: str
    thickness_mm: float


def read_slices(folder: Path) -> list[Slice]:
    """Read the DICOM slices of a folder, in the order of the file names; files that are not DICOM are passed
    over."""
    try:
        import pydicom
    except ImportError as error:
        raise UserError("reading DICOM needs pydicom; pip install 'pydicom' (extra [dicom])") from error
    slices = []
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        try:
            data = pydicom.dcmread(path)
            slope, offset = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
            slices.append(
                Slice(  # a position or pixel size that is absent raises: the geometry would be a guess
                    position=np.array(data.ImagePositionPatient, float),
                    cosines=np.array(data.ImageOrientationPatient, float),
                    pixel_mm=np.array(data.PixelSpacing, float),
                    hu=(data.pixel_array * slope + offset).astype(np.float32),
                    series=str(data.get("SeriesInstanceUID", "")),
                    thickness_mm=float(data.get("SliceThickness", 1) or 1),
                )
            )
        except pydicom.errors.InvalidDicomError:
            continue
        except (AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"{path}: not a usable CT slice ({str(error).splitlines()[0]})") from error
    return slices


def check_slices(slices: list[Slice], folder: Path):
    """Raise UserError unless the slices are those of one series with one size and one orientation."""
    if not slices:
        raise UserError(f"{folder}: holds no DICOM slices")
    if len({s.series for s in slices}) > 1:
        raise UserError(f"{folder}: holds {len({s.series for s in slices})} series; give a folder with one")
    alike = all(np.allclose(s.cosines, slices[0].cosines, atol=1e-3) for s in slices)
    if len({s.hu.shape for s in slices}) > 1 or not alike:
        raise UserError(
            f"{folder}: slices differ in size or orientation; give a folder with one axial series"
        )


def read_dicom(folder) -> tuple[np.ndarray, np.ndarray]:
    """Read one DICOM series as HU (X, Y, Z) and its affine to RAS mm; slices are sorted by their position
    along the normal."""
    folder = Path(folder)
    slices = read_slices(folder)
    check_slices(slices, folder)
    first = slices[0]
    along_x, along_y = first.cosines[:3], first.cosines[3:]  # direction of rising column and row index
    normal = np.cross(along_x, along_y)
    slices.sort(key=lambda s: float(s.position @ normal))
    height = np.array([s.position @ normal for s in slices])
    step = float(np.median(np.diff(height))) if len(slices) > 1 else first.thickness_mm
    if len(slices) > 2 and np.any(np.abs(np.diff(height) - step) > 0.5 * step):
        raise UserError(
            f"{folder}: slices are missing (gaps of {np.diff(height).max():.1f} mm at a spacing of "
            f"{step:.1f} mm)"
        )
    row_mm, column_mm = slices[0].pixel_mm
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = along_x * column_mm, along_y * row_mm, normal * step
    affine[:3, 3] = slices[0].position
    affine[:2] *= -1  # DICOM counts towards left and back, NIfTI towards right and front
    return np.stack([s.hu.T for s in slices], axis=-1), affine


def turn_to_lps(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what turns a volume to right-left, front-back, feet-head (nibabel's form), and the spacing in mm
    along those axes."""
    turn = orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.axcodes2ornt(("L", "P", "S"))
    )
    spacing_mm = np.empty(3)
    spacing_mm[turn[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    return turn, spacing_mm


def read_hu(path) -> tuple[np.ndarray, tuple]:
    """Read a NIfTI file or a DICOM folder as HU float32 (H, W, D) in the axes of this file, and its spacing
    in mm."""
    path = Path(path)
    voxels, affine = read_dicom(path) if path.is_dir() else read_nifti(path)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise UserError(f"{path}: the affine cannot be inverted, so orientation and spacing are unknown")
    if min(voxels.shape) < 2:
        raise UserError(f"{path}: is {voxels.shape} voxels; one slice is not a volume")
    turn, spacing_mm = turn_to_lps(affine)
    hu = orientations.apply_orientation(voxels, turn).astype(np.float32)  # (W, H, D)
    hu = np.ascontiguousarray(hu.transpose(1, 0, 2))
    check_hu(hu, path)
    return hu, (float(spacing_mm[1]), float(spacing_mm[0]), float(spacing_mm[2]))


def check_hu(hu: np.ndarray, path):
    """Raise UserError for a volume with NaN or infinite voxels, or with one value everywhere."""
    if not np.isfinite(hu).all():
        raise UserError(
            f"{path}: {int((~np.isfinite(hu)).sum())} voxels are NaN or infinite; repair the file"
        )
    if hu.max() == hu.min():
        raise UserError(f"{path}: every voxel is {hu.max():g}; an empty volume")


def resample(hu: np.ndarray, spacing_mm, grid: Grid) -> torch.Tensor:
    """Resample HU (H, W, D) onto the grid, centred, float32: averaged where the grid is coarser, linear in
    between, air outside."""
    volume = torch.from_numpy(hu)[None, None] - AIR_HU
    spacing = np.array(spacing_mm, float)
    # Averaging before a coarser grid; the factor is the whole number nearest to the ratio of the spacings.
    pool = [max(1, min(int(round(t / s)), n)) for t, s, n in zip(grid.spacing_mm, spacing, hu.shape)]
    if max(pool) > 1:
        volume = F.avg_pool3d(volume, pool)
    sizes, steps = volume.shape[2:], spacing * pool
    if tuple(sizes) == grid.size and np.allclose(steps, grid.spacing_mm, rtol=1e-3):
        return volume[0, 0] + AIR_HU
    axes = []
    for size, step, target, field in zip(sizes, steps, grid.size, grid.fov_mm):
        centre_mm = (torch.arange(target, dtype=torch.float64) + 0.5) * (field / target) - field / 2
        axes.append((2 * centre_mm / (size * step)).float())  # -1 and 1 are the outer faces of the volume
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
    values = torch.from_numpy(volume.astype(np.float64)).permute(2, 0, 1)[:, None]
    plane = F.interpolate(values, size=(512, 512), mode="bilinear", align_corners=False)[:, 0]
    if np.issubdtype(volume.dtype, np.integer):
        plane = plane.round()
    depth = plane.shape[0]
    picked = np.floor(np.arange(64) * (depth - 1) / 63 + 0.5).astype(int)
    image = plane[torch.from_numpy(picked)].permute(1, 2, 0)
    low, high = image.min(), image.max()
    if low == high:
        raise UserError("every voxel has the same value; an empty volume")
    return ((image - low) / (high - low)).float().expand(3, -1, -1, -1)


def to_test_grid(image: torch.Tensor, size=(256, 256, 64)) -> torch.Tensor:
    """Resize (3, H, W, D) to (1, 3, *size) by the nearest neighbour, as upstream's collate does."""
    return F.interpolate(image[None], size=tuple(size), mode="nearest")


def prepare(path, grid: Grid) -> np.ndarray:
    """Prepare a volume file without the last scaling: uint8 (3, H, W, D), or float32 (1, H, W, D) with
    upstream's preparation."""
    if grid.preprocess == "upstream":
        path = Path(path)
        voxels, _ = read_dicom(path) if path.is_dir() else read_nifti(path)
        check_hu(np.asarray(voxels, np.float32), path)
        return to_test_grid(upstream_image(voxels.transpose(2, 1, 0))[:1], grid.size)[0].numpy()
    return windows(resample(*read_hu(path), grid)).numpy()


def to_input(prepared: np.ndarray) -> torch.Tensor:
    """Turn the array of `prepare` into vision input (3, H, W, D) float32 in [0, 1]."""
    tensor = torch.from_numpy(prepared)
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.expand(3, -1, -1, -1)


def cached(path, cache, settings: str, make) -> np.ndarray:
    """Return the array `make()` of a volume file, kept in the folder `cache` (None: made afresh).

    settings: what else the array depends on. The key also holds the file's size and time, so that a changed
    file is read again, and several workers may fill the folder at once.
    """
    if cache is None:
        return make()
    path = Path(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: no such volume; the annotation names an id without a file") from error
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {settings}"
    stored = Path(cache) / f"{hashlib.sha1(key.encode()).hexdigest()}.npy"
    if stored.is_file():
        return np.load(stored)
    made = make()
    stored.parent.mkdir(parents=True, exist_ok=True)
    temporary = stored.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, made)
    os.replace(temporary, stored)
    return made


def load_volume(path, grid: Grid, cache=None) -> torch.Tensor:
    """Read and prepare a volume as (3, H, W, D) float32 in [0, 1]. cache: folder for prepared arrays."""
    return to_input(cached(path, cache, f"{grid} {WINDOWS}", lambda: prepare(path, grid)))


def patch_labels(path, grid: Grid, patch, cache=None, least: float = 0.08) -> torch.Tensor:
    """Turn a bit mask volume (bit c = finding c) into labels per patch token (n_tok, 14) float32, d fastest
    as in the ViT.

    A patch carries a finding when at least the fraction `least` of its voxels does, or when it is the
    finding's fullest patch. patch: size of a patch in voxels (H, W, D).
    """
    made = cached(
        path, cache, f"{grid} {tuple(patch)} {least}", lambda: _patch_labels(path, grid, patch, least)
    )
    return torch.from_numpy(made).float()


def _patch_labels(path, grid: Grid, patch, least: float) -> np.ndarray:
    voxels, affine = read_nifti(path)
    turn, step = turn_to_lps(affine)
    bits = torch.from_numpy(orientations.apply_orientation(voxels, turn).astype(np.int32)).permute(1, 0, 2)
    index = []
    for size, mm, target, field in zip(bits.shape, (step[1], step[0], step[2]), grid.size, grid.fov_mm):
        at = (
            (np.arange(target) + 0.5) * field / target - field / 2
        ) / mm + size / 2  # nearest voxel of the mask
        index.append(torch.from_numpy(np.clip(np.floor(at), 0, size - 1).astype(int)))
    bits = bits[index[0]][:, index[1]][:, :, index[2]]
    planes = torch.stack([((bits >> c) & 1).float() for c in range(14)])
    share = F.avg_pool3d(planes[None], tuple(patch))[0].flatten(1)
    full = share.max(1, keepdim=True).values
    return ((share >= least) | ((share == full) & (full > 0))).T.contiguous().numpy()
