"""Forty-nine kinds of made-up scan files through the reader: what comes out, and what is said about it.

    python studies/dia_pangu/scan_kinds.py          prints the table of RESULTS.md

The error is the mean difference in HU from the made-up chest, on a grid of 8 x 8 x 11 mm; sampling alone
makes about 10 on the grid of the files and 40 where they are interpolated.
"""

import math
import sys
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import nibabel
import numpy as np
from PIL import Image

from common.arguments import Parser
from common.errors import UserError, run
from dia_pangu.src.Dataset.preprocess import Grid, resample
from dia_pangu.src.Dataset.scan import read_ct
from studies.dia_pangu.ct_files import RAS, chest_hu, enhanced, save, screenshot, series, spoil, volume

GRID = Grid((40, 40, 24), (320.0, 320.0, 264.0))


def truth() -> np.ndarray:
    """Return the HU of the chest where GRID has its voxels, (H, W, D)."""
    axes = [(np.arange(n) + 0.5) * f / n - f / 2 for n, f in zip(GRID.size, GRID.fov_mm)]
    h, w, d = np.meshgrid(*axes, indexing="ij")
    return chest_hu(np.stack([w, h, d], -1)).clip(-1000, 400)


def nifti_kinds(place: Path):
    """Yield (name, path) of NIfTI files and their like."""
    hu = volume()
    whole = hu.astype(np.int16)

    def written(name, *arguments, **header):
        return name, save(place / f"{len(list(place.iterdir()))}.nii.gz", *arguments, **header)

    yield written("NIfTI, int16, HU", whole)
    yield written("float64", hu.astype(np.float64))
    for offset in (1000, 1024, 32768):
        yield written(f"uint16, HU + {offset}", (hu + offset).clip(0).astype(np.uint16))
    yield written("uint8, 0 to 255", ((hu + 1350) / 1500 * 255).clip(0, 255).astype(np.uint8))
    yield written("float, 0 to 1", ((hu + 1000) / 1400).clip(0, 1))
    yield written("-HU (air bright)", -whole)
    yield written("uint16, 3071 - HU", (3071 - hu).clip(0).astype(np.uint16))
    yield written("uint8, 255 - grey", 255 - ((hu + 1350) / 1500 * 255).clip(0, 255).astype(np.uint8))
    yield written("z-scores", (hu - hu.mean()) / hu.std())
    yield written("soft-tissue window, -160 to 240", hu.clip(-160, 240))
    yield written("mask", (hu > 0).astype(np.uint8))
    yield written("RGB", np.zeros(hu.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    yield written("complex", hu.astype(np.complex64))
    yield written("two phases (4-D)", np.stack([whole, whole], -1))
    yield written("two trailing axes of 1", whole[..., None, None])
    yield written("NaN border", np.where(np.arange(len(hu))[:, None, None] < 2, np.nan, hu))
    yield written("padding of -3024", np.where(np.arange(len(hu))[:, None, None] < 3, -3024, hu))
    yield written("spacing in microns", whole, np.diag([1e3, 1e3, 1e3, 1]) @ RAS, unit="micron")
    yield written("spacing in metres", whole, np.diag([1e-3, 1e-3, 1e-3, 1]) @ RAS, unit="meter")
    yield written("mm, the header says microns", whole, unit="micron")
    yield written("form codes 0", whole, qform_code=0, sform_code=0)
    yield written("identity affine", whole, np.eye(4))
    yield written("front and back exchanged", whole, np.diag([8.0, 8.0, 9.0, 1.0]))
    nibabel.save(nibabel.AnalyzeImage(whole, RAS), place / "a.img")
    yield "Analyze", place / "a.img"
    nibabel.save(nibabel.MGHImage(hu, RAS), place / "a.mgz")
    yield "MGH", place / "a.mgz"
    for name in ("jpg", "png"):
        (place / name).mkdir()
    for k, plane in enumerate(((hu + 1000) / 1400 * 255).clip(0, 255).astype(np.uint8).transpose(2, 1, 0)):
        Image.fromarray(plane).save(place / f"jpg/{k + 1}.jpg", quality=90)
        Image.fromarray((hu[..., k].T + 32768).astype(np.uint16)).save(place / f"png/{k + 1}.png")
    yield "CTRG: a folder of JPG slices", place / "jpg"
    yield "a folder of 16-bit PNG slices, HU + 32768", place / "png"


def dicom_kinds(place: Path):
    """Yield (name, path) of DICOM series."""

    def louder(data, n):
        if n % 2:
            data.PixelData = (np.frombuffer(data.PixelData, np.uint16) + 99).astype(np.uint16).tobytes()

    def numbered(data, n):
        data.AcquisitionNumber = 1 + n % 2
        louder(data, n)

    t = math.radians(20)
    twice = [k for k in range(30) for _ in range(2)]
    yield "DICOM series", series(place / "plain")
    yield "gantry tilt of 20 degrees", series(place / "tilt", cosines=(1, 0, 0, 0, math.cos(t), math.sin(t)))
    changing = [*range(15), *np.arange(15, 29.5, 1.4)]
    yield "spacing of 9, then 12.6 mm", series(place / "changing", heights=changing)
    yield "a slice twice", series(place / "dup", heights=[*range(30), 4])
    yield "two acquisitions, one UID, numbered", series(place / "two", heights=twice, change=numbered)
    yield "two acquisitions, one UID, not numbered", series(place / "mixed", heights=twice, change=louder)
    yield "two slices missing", series(place / "gap", change=lambda d, n: n not in (9, 10))
    bare = {"RescaleSlope": None, "RescaleIntercept": None}
    yield "no rescale tags, stored HU + 1024", series(place / "bare", **bare)
    upside_down = {"RescaleSlope": -1, "RescaleIntercept": 1024}
    yield "RescaleSlope of -1: air bright", series(place / "inverted", **upside_down)
    yield "8 bits under the rescale tags of HU", series(place / "screen", change=screenshot)
    yield "empty RescaleSlope", series(place / "slope", change=spoil("RescaleSlope", ""))
    yield "empty PixelSpacing", series(place / "spacing", change=spoil("PixelSpacing", ""))
    yield "empty position in one slice", series(place / "place", change=spoil("ImagePositionPatient", "", 5))
    yield "MR", series(place / "mr", Modality="MR")
    series(place / "many/a", SeriesInstanceUID="1.2.1", SeriesDescription="ABDOMEN")
    series(place / "many/b", SeriesInstanceUID="1.2.2", SeriesDescription="CHEST")
    series(place / "many/c", SeriesInstanceUID="1.2.3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    yield "abdomen, chest and localizer in one folder", place / "many"
    yield "enhanced multi-frame", enhanced(place / "enhanced.dcm")
    yield "30 frames in a file, no places", series(place / "frames", heights=[0], NumberOfFrames=30)
    tagged = series(place / "tagged", GantryDetectorTilt=18)
    yield "GantryDetectorTilt of 18, slices placed without one", tagged
    Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save(tagged / "preview.jpg")
    yield "the same beside a preview as JPG", tagged
    yield "one file of a series", place / "plain/007.dcm"


def main(args):
    expected = truth()
    print("| kind | error, HU | verdict |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for make in (nifti_kinds, dicom_kinds):
            place = Path(folder) / make.__name__
            place.mkdir()
            for name, path in make(place):
                try:
                    with redirect_stderr(StringIO()):  # the table of series
                        hu, spacing_mm, verdict = read_ct(path)
                    error = np.abs(resample(hu, spacing_mm, GRID).numpy().clip(-1000, 400) - expected).mean()
                    print(f"| {name} | {error:.0f} | {'; '.join(verdict.notes) or 'read as it is'} |")
                except UserError as refusal:
                    said = str(refusal).replace(f"{path}: ", "").replace(f"{folder}/", "")
                    print(f"| {name} | refused | {said.replace(f'{path}', path.name)} |")


if __name__ == "__main__":
    run(main, Parser(__doc__).parse_args())
