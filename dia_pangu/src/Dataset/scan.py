"""One reader for every form in which a scan comes: NIfTI, Analyze, MGH, DICOM, MetaImage, NRRD, and folders
of pictures as CTRG publishes them.

    scan = read_scan(path)          voxels as stored, the way to millimetres, and what is known of both
    hu, spacing_mm = read_hu(path)  HU in the axes front to back, right to left, feet to head
"""

import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel import orientations
from PIL import Image
from scipy.ndimage import affine_transform

from common.errors import UserError
from common.files import check_size, inside, reading
from dia_pangu.src.Dataset.dicom import is_dicom, read_dicom
from dia_pangu.src.Dataset.verdict import (
    AIR_HU,
    Verdict,
    filled_outside,
    judge_chest,
    judge_values,
    require_hu,
    say,
    to_mm,
)

NIFTI = (".nii", ".nii.gz", ".img", ".hdr", ".img.gz", ".hdr.gz", ".mgh", ".mgz")
ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
SUFFIXES = (*NIFTI, *ITK, ".dcm", ".dicom", ".ima")
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # its repairs of headers are judged here
PACKED = (".gz", ".mgz", ".bz2", ".zst")


@dataclass
class Scan:
    """voxels: (X, Y, Z), rescaled by the header. affine: voxel to RAS mm. verdict: what is known."""

    voxels: np.ndarray
    affine: np.ndarray
    verdict: Verdict


def scan_name(path) -> str:
    """Return the name of a scan without the suffix of its format; a folder named by a UID keeps its dots."""
    path = Path(os.path.abspath(path))  # a link keeps its own name
    lower = path.name.lower()
    fits = [suffix for suffix in SUFFIXES if lower.endswith(suffix)]
    return path.name if path.is_dir() or not fits else path.name[: -max(map(len, fits))] or path.name


def check_header(path, shape, bytes_each: int, stored: int, packed: bool):
    """Raise UserError for a header that declares more voxels than are stored or than fit in memory, before
    they are read. stored: bytes of the files; packed: whether they are compressed."""
    shape = tuple(int(n) for n in shape)
    count = math.prod(shape)
    if min(shape, default=0) < 1:
        raise UserError(f"{path}: its header says {shape} voxels; the header is damaged")
    if not packed and count * bytes_each > stored:
        raise UserError(
            f"{path}: its header says {shape} voxels, {count * bytes_each:,} bytes, but only {stored:,} are "
            "stored; was the copy cut short?"
        )
    check_size(path, "its header", count * bytes_each, stored)
    check_size(path, "its preparation", 12 * count, 12 * count)  # float32, turned and resampled


def plain(voxels: np.ndarray, path) -> np.ndarray:
    """Return real voxels with three axes; UserError for colours, complex numbers, phases, one slice."""
    if voxels.dtype.names or voxels.dtype.kind not in "iufb":
        kind = "colours" if voxels.dtype.names else f"{voxels.dtype} numbers"
        raise UserError(f"{path}: voxels are {kind}, no CT values; give the CT itself")
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3:
        what = f"{voxels.shape[3]} phases or channels; " if voxels.ndim == 4 else ""
        raise UserError(
            f"{path}: has {voxels.ndim} dimensions {voxels.shape}, {what}expected one 3-D volume; split the "
            "series"
        )
    if min(voxels.shape) < 2:
        raise UserError(f"{path}: is {voxels.shape} voxels; one slice is not a volume")
    return voxels.astype(np.uint8) if voxels.dtype.kind == "b" else voxels


def open_nifti(path):
    """Return nibabel's image of a file whose header is possible."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such volume; the annotation names an id without a file")
    with reading(path, "NIfTI file; was the copy cut short?"):
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        if packed != path.name.lower().endswith((".gz", ".mgz")):
            is_not = "compressed; name it .nii.gz" if packed else "not compressed, although its name says so"
            raise UserError(f"{path}: the file is {is_not}")
        image = nibabel.load(path)
        file = Path(image.file_map["image"].filename)
        stored, each = file.stat().st_size, image.get_data_dtype().itemsize
    check_header(path, image.shape, each, stored, file.name.lower().endswith(PACKED))
    if isinstance(image, nibabel.AnalyzeImage):
        check_stored_header(image, path)
    return image


def check_stored_header(image, path):
    """Raise UserError for what nibabel mends in a NIfTI or Analyze header with a guess."""
    holder = image.file_map.get("header") or image.file_map["image"]
    with holder.get_prepare_fileobj("rb") as file:
        header = type(image.header).from_fileobj(file, check=False)
    if isinstance(image, nibabel.Nifti1Image) and header["vox_offset"] < header.single_vox_offset:
        raise UserError(f"{path}: vox_offset {header['vox_offset']:g} lies in the header; mend the header")
    if not ("sform_code" in header and header["sform_code"] > 0) and (header["pixdim"][1:4] == 0).any():
        raise UserError(f"{path}: pixdim is 0, so the spacing is unknown; mend the header")


def nifti_orientation(image, verdict: Verdict):
    """Fill in whether a NIfTI, Analyze or MGH header says which side is which."""
    header = image.header
    if isinstance(image, nibabel.Nifti1Pair):
        codes = int(header["qform_code"]), int(header["sform_code"])
        sform = np.array([header[f"srow_{axis}"] for axis in "xyz"], float)  # also of code 0
        if codes == (0, 0):
            unknown(verdict, "the header has no orientation (form codes 0)")
        elif codes[0] > 0 and np.isfinite(sform).all() and abs(np.linalg.det(sform[:, :3])) > 1e-9:
            names = [
                nibabel.aff2axcodes(form) for form in (image.get_qform(), np.vstack([sform, [0, 0, 0, 1]]))
            ]
            if names[0] != names[1]:
                both = " and ".join("".join(map(str, name)) for name in names)
                unknown(verdict, f"qform and sform contradict each other ({both})")
    elif isinstance(image, nibabel.AnalyzeImage):
        unknown(verdict, "the Analyze format has no orientation")
    elif hasattr(header, "get") and "goodRASFlag" in header and not int(header["goodRASFlag"]):
        unknown(verdict, "the header has no orientation (goodRASFlag 0)")


def unknown(verdict: Verdict, why: str):
    """Fill in that left and right are not known."""
    verdict.side, verdict.orientation = "unknown", f"guessed: {why}"
    verdict.note(f"{why}; orientation is guessed, left and right are unknown")


def scan_nifti(path) -> Scan:
    """Read a file of nibabel's formats."""
    image = open_nifti(path)
    with reading(path, "NIfTI file; was the copy cut short?"):
        voxels = plain(np.asanyarray(image.dataobj), path)
    kind = type(image).__name__.removesuffix("Image").removesuffix("Pair")
    verdict = Verdict(
        kind.replace("Nifti1", "NIfTI").replace("Nifti2", "NIfTI-2").replace("Spm99", "").replace("Spm2", "")
    )
    with reading(path, "NIfTI header"):
        nifti_orientation(image, verdict)
        unit = ""
        if isinstance(image, nibabel.Nifti1Pair):
            unit = image.header.get_xyzt_units()[0]
        elif isinstance(image, nibabel.MGHImage):
            unit = "mm"
        affine = np.array(image.affine, float)
    check_affine(affine, path)
    affine = to_mm(verdict, affine, voxels.shape, unit, path)
    if np.array_equal(affine, np.eye(4)):
        unknown(verdict, "the affine is the identity, which converters leave where they know nothing")
        verdict.spacing = "1 mm, a default and no measurement"
    return Scan(voxels, affine, verdict)


def itk_files(path: Path, head: str) -> tuple[int, bool]:
    """Return the bytes that a MetaImage or NRRD file and the files of its voxels hold, and whether these are
    compressed. Raises UserError where the header names a file outside its own folder."""
    packed = re.search(r"^\s*(?:CompressedData\s*=\s*True|encoding\s*:(?!\s*raw))", head, re.I | re.M)
    named = re.search(r"^\s*(?:ElementDataFile\s*=|data ?file\s*:)\s*(\S.*)$", head, re.I | re.M)
    names = [named[1].strip()] if named else []
    if names and names[0].upper().startswith("LIST"):
        names = [line.strip() for line in head[named.end() :].splitlines() if line.strip()]
    files = {path}
    for name in names:
        if name.upper() == "LOCAL":
            continue
        file = inside(path.parent, name)
        # "slice%03d.raw 1 20 1" names many.
        files |= {file} if file.is_file() else set(path.parent.glob("*")) if "%" in name else set()
    return sum(file.stat().st_size for file in files if file.is_file()), bool(packed)


def scan_itk(path) -> Scan:
    """Read a MetaImage or NRRD file with SimpleITK, whose axes count towards left, back and head."""
    try:
        import SimpleITK
    except ImportError as error:
        raise UserError(f"{path}: needs SimpleITK; pip install SimpleITK (extra [itk])") from error
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    path = Path(path)
    with reading(path, "image file"):
        with open(path, "rb") as file:
            head = file.read(1 << 16).decode("latin1")
        stored, packed = itk_files(path, head)
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        each = SimpleITK.Image([1] * len(reader.GetSize()), reader.GetPixelID()).GetSizeOfPixelComponent()
        each *= reader.GetNumberOfComponents()
        check_header(path, reader.GetSize(), each, stored, packed)
        image = reader.Execute()
        if image.GetNumberOfComponentsPerPixel() > 1:
            raise UserError(f"{path}: voxels are colours or vectors, no CT values; give the CT itself")
        voxels = SimpleITK.GetArrayFromImage(image).T
        space, origin = np.array(image.GetSpacing()), np.array(image.GetOrigin())
        turn = np.array(image.GetDirection()).reshape(len(space), -1)
    voxels = plain(voxels, path)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn[:3, :3] * space[:3], origin[:3]
    affine[:2] *= -1
    check_affine(affine, path)
    verdict = Verdict("NRRD" if head.startswith("NRRD") else "MetaImage")
    unit = itk_orientation(head, affine, verdict, path)
    return Scan(voxels, to_mm(verdict, affine, voxels.shape, unit, path), verdict)


# Unit of a NRRD header's space -> its name in verdict.UNITS.
NRRD_UNITS = {"mm": "mm", "um": "micron", "\u00b5m": "micron", "\u03bcm": "micron", "m": "meter"}


def itk_orientation(head: str, affine, verdict: Verdict, path) -> str:
    """Fill in what a MetaImage or NRRD header, whose gaps SimpleITK fills with defaults, says of spacing and
    sides; return the unit of its lengths, or "" where it names none."""

    def field(name: str) -> str:
        found = re.search(rf"^\s*(?:{name})\s*[=:]\s*(\S.*)$", head, re.I | re.M)
        return found[1].strip() if found else ""

    spacing = field("ElementSpacing|ElementSize|spacings|space directions")
    if verdict.format == "MetaImage" and "-" in spacing:
        raise UserError(f"{path}: ElementSpacing {spacing}: a length is negative; correct the header")
    if not spacing:
        verdict.spacing = "unknown"
    units = set(re.findall(r'"([^"]+)"', field("space units").encode("latin1").decode("utf-8", "replace")))
    if len(units) > 1 or units - set(NRRD_UNITS):
        raise UserError(f"{path}: space units are {', '.join(sorted(units))}; give lengths in mm")
    # MetaImage names the ends that the axes begin at, nibabel those that they lead to.
    opposite = dict(zip("LRAPSI", "RLPAIS"))
    begins = "".join(opposite[axis] for axis in nibabel.aff2axcodes(affine))
    named = field("AnatomicalOrientation").upper()
    if np.array_equal(affine, np.diag([-1.0, -1.0, 1.0, 1.0])):
        unknown(verdict, "the header has no orientation")
    elif verdict.format == "MetaImage" and not field("TransformMatrix|Rotation|Orientation"):
        unknown(verdict, "the header has no TransformMatrix")
    elif verdict.format == "NRRD" and not re.match("(?i)left|right|lps|las|ras", field("space")):
        unknown(verdict, "the header names no space of the patient")
    elif re.fullmatch("[LRAPSI]{3}", named) and named != begins:
        unknown(
            verdict, f"AnatomicalOrientation {named} and TransformMatrix ({begins}) contradict each other"
        )
    return NRRD_UNITS[units.pop()] if units else ""


def holds_slices(folder: Path) -> bool:
    """Return whether DICOM files lie in a folder, beside which pictures are previews or key images."""
    files = (p for p in folder.iterdir() if p.suffix.lower() not in PICTURES and not p.name.startswith("."))
    return any(p.is_file() and is_dicom(p) for p in files)


def natural(path: Path) -> list:
    """Return a key that sorts 2.jpg before 10.jpg."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", path.name)]


def picture_files(folder) -> list[Path]:
    """Return the pictures of a folder in the order of their numbers."""
    files = [p for p in Path(folder).iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith(".")]
    return sorted(files, key=natural)


def read_pictures(folder) -> np.ndarray:
    """Return the pictures of a folder in the order of their numbers, (W, H, D), as grey levels: uint8, or as
    stored where they have more bits."""
    slices, files = [], picture_files(folder)
    with reading(files[0], "picture"), Image.open(files[0]) as image:
        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            raise UserError(f"{files[0]}: holds {image.n_frames} pages; save each slice as a picture")
        shape, each = (image.width, image.height, len(files)), 4 if image.mode[0] in "IF" else 1
    check_header(folder, shape, each, sum(path.stat().st_size for path in files), True)
    for path in files:
        with reading(path, "picture"), Image.open(path) as image:
            if image.width * image.height > 2**26:
                raise UserError(f"{path}: is {image.width} x {image.height} pixels; no CT slice is as large")
            # "I;16", "I" and "F" have more than 8 bits, which a conversion would cut off.
            slices.append(np.asarray(image if image.mode[0] in "IF" else image.convert("L")))
        kinds = [f"{part.shape} {part.dtype}" for part in (slices[-1], slices[0])]
        if kinds[0] != kinds[1]:
            raise UserError(f"{path}: is {kinds[0]} pixels, the slices before {kinds[1]}")
    return plain(np.stack(slices).transpose(2, 1, 0), folder)


def scan_pictures(folder) -> Scan:
    """Read a folder of pictures: grey levels, with nothing known of sizes and sides. The first row of a
    picture is taken for the front, the first column for the right, the first picture for the head."""
    verdict, files = Verdict("pictures", units="unknown", spacing="unknown"), picture_files(folder)
    unknown(verdict, "pictures have no header")
    # The last number of a name counts its slices.
    counted = [re.findall(r"\d+", path.stem)[-1:] for path in files]
    steps = np.diff([int(number) for found in counted for number in found])
    if all(counted) and len(set(steps)) > 1:
        verdict.note(
            "the numbers in the pictures' names do not count on evenly: slices may be missing or mixed"
        )
    middle = files[len(files) // 2]
    with reading(middle, "picture"), Image.open(middle) as image:
        spread = np.ptp(np.asarray(image.convert("RGB")).astype(int), axis=2)
    if (spread > 40).mean() > 0.05:  # more than coloured letters
        verdict.note("the pictures are coloured; only their brightness is read")
    return Scan(read_pictures(folder), np.diag([-1.0, -1.0, -1.0, 1.0]), verdict)


def check_affine(affine: np.ndarray, path):
    """Raise UserError for an affine without an inverse."""
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or (steps == 0).any():
        flat = True
    else:
        flat = abs(np.linalg.det(affine[:3, :3] / steps)) < 1e-4
    if flat:
        raise UserError(f"{path}: the affine cannot be inverted, so orientation and spacing are unknown")


def read_scan(path, series=None) -> Scan:
    """Read a scan of any form and judge its values. series: see `dicom.choose_series`.

    Raises UserError, one line that names the file, for everything that is no scan.
    """
    path, declared = Path(path), False
    lower = path.name.lower()
    if not path.exists():
        raise UserError(f"{path}: no such volume; the annotation names an id without a file")
    # The voxels of an Analyze file may begin as DICOM does.
    holds_dicom = path.is_file() and not lower.endswith((*NIFTI, *ITK)) and is_dicom(path)
    if path.is_dir() and picture_files(path) and not holds_slices(path):
        scan = scan_pictures(path)
    elif path.is_dir() or path.name.upper() == "DICOMDIR" or holds_dicom:
        folder = path if path.is_dir() else path.parent
        only = None if path.is_dir() or path.name.upper() == "DICOMDIR" else path
        values, affine, verdict, declared = read_dicom(folder, series, only)
        check_affine(affine, path)
        scan = Scan(values, to_mm(verdict, affine, values.shape, "mm", path), verdict)
    elif lower.endswith(ITK):
        scan = scan_itk(path)
    elif lower.endswith(PICTURES):
        raise UserError(f"{path}: one picture is not a volume; give the folder of its slices")
    elif not lower.endswith(NIFTI):
        raise UserError(
            f"{path}: no scan by its name (.nii, .nii.gz, .mgz, .mha, .nrrd, or a folder of DICOM files or "
            "pictures); unpack an archive, write an array as NIfTI with its spacing and orientation"
        )
    else:
        scan = scan_nifti(path)
    if series is not None and scan.verdict.format != "DICOM":
        raise UserError(f"--series {series}: {path} is no DICOM folder")
    check_values(scan.voxels, path)
    judge_values(scan.verdict, scan.voxels, declared)
    return scan


def check_values(voxels: np.ndarray, path):
    """Raise UserError for a volume with NaN or infinite voxels, or with one value everywhere."""
    bad = int((~np.isfinite(voxels)).sum()) if voxels.dtype.kind == "f" else 0
    if bad:
        raise UserError(f"{path}: {bad} voxels are NaN or infinite; repair the file")
    if voxels.max() == voxels.min():
        raise UserError(f"{path}: every voxel is {voxels.max():g}; an empty volume")


def turn_to_lps(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return nibabel's turn to right-left, front-back, feet-head, and the spacing in mm along those axes."""
    turn = orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.axcodes2ornt(("L", "P", "S"))
    )
    spacing_mm = np.empty(3)
    spacing_mm[turn[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    return turn, spacing_mm


def straighten(voxels, affine, verdict: Verdict | None = None, order: int = 1, outside: float = 0.0):
    """Resample a tilted or oblique volume (X, Y, Z) to the patient's axes; returns (voxels, affine).

    A gantry tilt shears the volume: its slices lie at an angle to the table, along which they follow each
    other. The centre and the numbers of voxels stay; what then lies outside is cut off. Volumes within two
    degrees of the axes stay as they are. order: 1 interpolates, 0 takes the nearest voxel (for labels).
    """
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    towards = affine[:3, :3] / steps
    # Which world axis each voxel axis is nearest to, and how far it is turned away from it.
    turn = orientations.io_orientation(affine)
    if np.isnan(turn).any():
        raise UserError("the affine cannot be inverted, so orientation and spacing are unknown")
    world, sign = turn[:, 0].astype(int), turn[:, 1]
    angles = np.degrees(np.arccos(np.clip(np.abs(towards[world, range(3)]), 0, 1)))
    if angles.max() < 2.0:
        return voxels, affine
    skew = np.degrees(np.arcsin(np.clip(np.abs(towards.T @ towards - np.eye(3)).max(), 0, 1)))
    sheared = skew > 1.0
    size = np.abs(affine[world, range(3)]) if sheared else steps
    target = np.zeros((3, 3))
    target[world, range(3)] = sign * size
    middle = (np.array(voxels.shape) - 1) / 2
    inverse = np.linalg.inv(affine[:3, :3])
    matrix = inverse @ target
    out = affine_transform(
        voxels.astype(np.float32, copy=False),
        matrix,
        offset=middle - matrix @ middle,
        order=order,
        mode="constant",
        cval=outside,
    )
    straight = np.eye(4)
    straight[:3, :3] = target
    straight[:3, 3] = affine[:3, :3] @ middle + affine[:3, 3] - target @ middle
    if verdict is not None:
        kind = (
            f"slices are tilted by {skew:.1f} degrees" if sheared else f"turned by {angles.max():.1f} degrees"
        )
        verdict.tilt = f"{kind}, straightened"
        verdict.note(f"{kind}; resampled to the patient's axes")
    return out, straight


def orient(voxels, affine, path) -> tuple[np.ndarray, tuple]:
    """Return a volume and its spacing in (H, W, D): front to back, right to left, feet to head."""
    with reading(path, "orientation"):
        turn, spacing_mm = turn_to_lps(affine)
        turned = orientations.apply_orientation(voxels, turn)
    out = np.ascontiguousarray(turned.transpose(1, 0, 2))
    return out, (float(spacing_mm[1]), float(spacing_mm[0]), float(spacing_mm[2]))


def read_labels_volume(path) -> tuple[np.ndarray, tuple]:
    """Read a mask or a segmentation (H, W, D) as stored, in the axes of `read_hu`, and its spacing in mm."""
    scan = scan_nifti(path)
    straight, affine = straighten(scan.voxels, scan.affine, order=0)
    return orient(straight.astype(scan.voxels.dtype), affine, path)


def read_native(path, series=None) -> tuple[np.ndarray, tuple, np.ndarray, Verdict]:
    """Read a scan as HU float32 (H, W, D), its spacing in mm, the affine to RAS mm of the array (W, H, D),
    and its verdict; UserError where it is no HU."""
    scan = read_scan(path, series)
    require_hu(scan.verdict, path)
    hu = scan.voxels.astype(np.float32)
    if scan.verdict.offset:
        hu -= np.float32(scan.verdict.offset)
    outside = filled_outside(scan.voxels, scan.verdict.offset)
    if outside is not None:
        scan.verdict.note(f"the corners are filled with {hu[0, 0, 0]:g} HU, which no air has; taken for air")
        hu[outside] = AIR_HU
    np.maximum(hu, np.float32(AIR_HU), out=hu)  # what lies below air is padding
    hu, affine = straighten(hu, scan.affine, scan.verdict, outside=AIR_HU)
    turned = affine @ orientations.inv_ornt_aff(turn_to_lps(affine)[0], hu.shape)
    hu, spacing_mm = orient(hu, affine, path)
    check_values(hu, path)
    if max(spacing_mm) > 25:
        scan.verdict.note(f"voxels lie {max(spacing_mm):.0f} mm apart; what is smaller is not seen")
    judge_chest(scan.verdict, hu, spacing_mm)
    return hu, spacing_mm, turned, scan.verdict


def read_ct(path, series=None) -> tuple[np.ndarray, tuple, Verdict]:
    """Return HU float32 (H, W, D), spacing in mm and verdict of a scan; UserError where it is no HU."""
    hu, spacing_mm, _, verdict = read_native(path, series)
    return hu, spacing_mm, verdict


def read_hu(path, series=None) -> tuple[np.ndarray, tuple]:
    """Read a scan as HU float32 (H, W, D) and its spacing in mm; what is doubtful about it is printed."""
    hu, spacing_mm, verdict = read_ct(path, series)
    say(path, verdict.notes)
    return hu, spacing_mm
