"""DICOM series as volumes: the tags of all files first, then the choice of a series, its geometry, and only
then the pixels of the slices that are kept.

A folder may hold several series, localizers, dose pages, a DICOMDIR and folders of its own. Positions are mm
in DICOM's axes, which count towards left, back and head.
"""

import os
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import check_size, first_line, reading
from dia_pangu.src.Dataset.verdict import AIR_HU, Verdict

# Transfer syntax -> what decodes it; RLE and what is not compressed need nothing beside pydicom.
JPEG_2000 = "pylibjpeg pylibjpeg-openjpeg"
DECODERS = {
    f"1.2.840.10008.1.2.4.{number}": (name, package)
    for name, package, numbers in (
        ("JPEG Lossless", "python-gdcm", (57, 70)),
        ("JPEG", "python-gdcm", (50, 51)),
        ("JPEG-LS", "pyjpegls", (80, 81)),
        ("JPEG 2000", JPEG_2000, (90, 91)),
        ("HTJ2K", JPEG_2000, (201, 202, 203)),
    )
    for number in numbers
}
WRAPPED_HU = 32767  # more than any scanner's extended scale
DICOMDIR = "1.2.840.10008.1.3.10"
# Tags that tell two acquisitions under one series UID apart, tried in this order.
PHASES = (
    *("AcquisitionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex"),
    *("NominalPercentageOfCardiacPhase", "TriggerTime", "ConvolutionKernel", "KVP", "ImageType"),
    *("SeriesNumber", "SeriesDescription", "ContrastBolusAgent", "ReconstructionDiameter", "SliceThickness"),
    *("AcquisitionDateTime", "AcquisitionTime", "ContentTime"),
)
DESCRIPTION = ("SeriesDescription", "ProtocolName", "BodyPartExamined")
WORDS = ("Modality", "SeriesInstanceUID", *DESCRIPTION, "SOPClassUID", "PatientID")
# Classes of CT images, for files without the tag Modality.
CT_CLASSES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
FACTS = ("ImageType", "RescaleType", "SeriesNumber", "GantryDetectorTilt", "ModalityLUTSequence")
GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
TAGS = [
    *(*WORDS, *FACTS, *GEOMETRY, *PHASES, "Rows", "Columns", "NumberOfFrames", "RescaleSlope"),
    *("RescaleIntercept", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    "PixelPaddingValue",
]
CHEST = ("chest", "thorax", "thorac", "lung", "torax", "pulmo", "胸", "肺")
ELSEWHERE = ("head", "brain", "skull", "neck", "abdomen", "pelvis", "knee", "spine", "foot", "ankle", "hand")
COMPUTED = ("MIP", "MINIP", "PROJECTION", "SUBTRACT", "IODINE", "PERFUSION", "MATERIAL", "ZEFF", "VNC")
RULES = (
    "chosen are: a chest by its words before others, original before derived images, 15 cm of length and "
    "more, then the most slices, then the first in the table"
)


@dataclass
class Slice:
    """One slice or frame. position, cosines (6), pixel_mm (row, column) are None where the file has none;
    marks: the values of the tags PHASES."""

    path: Path
    frame: int | None
    frames: int
    shape: tuple
    position: np.ndarray | None
    cosines: np.ndarray | None
    pixel_mm: np.ndarray | None
    thickness_mm: float
    slope: float | None
    offset: float | None
    words: dict
    marks: dict

    def missing(self) -> str:
        """Return the name of the first geometry tag that this slice lacks, or an empty string."""
        given = dict(zip(GEOMETRY, (self.position, self.cosines, self.pixel_mm)))
        return next((name for name, value in given.items() if value is None), "")


@dataclass
class Series:
    """The slices of one series with one size and one orientation, and why they cannot be used, if so."""

    slices: list
    reason: str = ""
    notes: list = field(default_factory=list)

    @property
    def words(self) -> dict:
        return self.slices[0].words

    def length_mm(self) -> float:
        """Return how far the slices reach along their normal."""
        whole = [part for part in self.slices if not part.missing()]
        if len(whole) < 2:
            return 0.0
        height = heights(whole)
        return float(height.max() - height.min())

    def text(self) -> str:
        return " ".join(str(self.words.get(name, "")) for name in DESCRIPTION).lower()

    def rank(self) -> tuple:
        """Return what the series are sorted by; the smallest is taken. See RULES."""
        text = self.text()
        place = 0 if any(word in text for word in CHEST) else 2 if any(w in text for w in ELSEWHERE) else 1
        derived = "DERIVED" in str(self.words.get("ImageType", ""))
        return place, derived, self.length_mm() < 150, -len(self.slices)

    def row(self) -> str:
        rows, columns = self.slices[0].shape
        uid = str(self.words.get("SeriesInstanceUID", ""))
        what = str(self.words.get("SeriesDescription", "")) or "no description"
        end = self.reason or "usable"
        size = f"{len(self.slices)} x {columns} x {rows}, {self.length_mm():.0f} mm"
        modality = self.words.get("Modality") or "?"
        return f"{modality:3} {what[:30]:30} {size:26} ...{uid[-8:]:8}  {end}"


def need_pydicom():
    """Return the module pydicom; UserError where it is not installed."""
    try:
        import pydicom
    except ImportError as error:
        raise UserError("reading DICOM needs pydicom; pip install 'pydicom' (extra [dicom])") from error
    return pydicom


@contextmanager
def quiet():
    """Keep pydicom from printing paragraphs about values that are not quite as the standard wants them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def files_below(folder) -> list[Path]:
    """Return the files of a folder and of all folders in it, also behind links; each folder once."""
    found, seen = [], set()
    for place, inner, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            inner.clear()
            continue
        seen.add(os.path.realpath(place))
        found += [Path(place) / name for name in names]
    return sorted(path for path in found if path.is_file())


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by its preamble, or because it begins with a low group number."""
    with reading(path, "file"), open(path, "rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or head[:2] in (b"\x02\x00", b"\x08\x00")


def open_tags(path: Path):
    """Return the tags of a DICOM file without its pixels, or None for a file of another kind."""
    pydicom = need_pydicom()
    if not is_dicom(path):
        return None
    with reading(path, "DICOM file"), quiet():
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS, force=True)


def numbers(value, count: int) -> np.ndarray | None:
    """Return a tag's value as `count` finite floats, or None where it is absent, empty or something else."""
    try:
        array = np.atleast_1d(np.array(value, float)) if value is not None else np.zeros(0)
    except (TypeError, ValueError):
        return None
    return array if len(array) == count and np.isfinite(array).all() else None


def number(value) -> float | None:
    """Return a tag's value as one finite float, or None."""
    array = numbers(value, 1)
    return None if array is None else float(array[0])


def make_slice(path: Path, data, frame: int | None, groups: list) -> Slice:
    """Return a slice from tags. groups: what is asked first, the frame's before the shared ones."""

    def get(name):
        for group in (*groups, data):
            value = group.get(name)
            if value is not None and str(value) != "":
                return value
        return None

    pixel = numbers(get("PixelSpacing"), 2)
    cosines = numbers(get("ImageOrientationPatient"), 6)
    if cosines is not None:
        axes = cosines.reshape(2, 3)
        cosines = cosines if np.allclose(axes @ axes.T, np.eye(2), atol=0.01) else None
    return Slice(
        path=path,
        frame=frame,
        frames=int(number(data.get("NumberOfFrames")) or 1),
        shape=(int(data.get("Rows") or 0), int(data.get("Columns") or 0)),
        position=numbers(get("ImagePositionPatient"), 3),
        cosines=cosines,
        pixel_mm=pixel if pixel is not None and (pixel > 0).all() else None,
        thickness_mm=number(get("SliceThickness")) or 1.0,
        slope=number(get("RescaleSlope")),
        offset=number(get("RescaleIntercept")),
        words={name: data.get(name) or "" for name in (*WORDS, *FACTS)},
        marks={name: str(get(name)) for name in PHASES if get(name) is not None},
    )


def inner_groups(item) -> list:
    """Return the data sets one level inside a functional group of an enhanced file."""
    out = []
    for element in item or ():
        if element.VR == "SQ" and len(element.value):
            out.append(element.value[0])
    return out


def file_slices(path: Path, data) -> list[Slice]:
    """Return the slices of one file: one, or the frames of an enhanced multi-frame file."""
    frames = int(number(data.get("NumberOfFrames")) or 1)
    per_frame = data.get("PerFrameFunctionalGroupsSequence") or []
    if frames < 2 or not len(per_frame):
        return [make_slice(path, data, None, [])]
    if len(per_frame) != frames:
        raise UserError(f"{path}: NumberOfFrames is {frames}, but {len(per_frame)} frames are described")
    shared = inner_groups((data.get("SharedFunctionalGroupsSequence") or [None])[0])
    return [make_slice(path, data, i, inner_groups(item) + shared) for i, item in enumerate(per_frame)]


def read_tags(files) -> tuple[list[Slice], list[str]]:
    """Return the slices of all DICOM files among `files`, and what could not be read."""
    slices, damaged = [], []
    for path in (p for p in files if not p.name.startswith(".") and p.name.upper() != "DICOMDIR"):
        try:
            if path.stat().st_size == 0 and path.suffix.lower() in ("", ".dcm"):
                raise UserError(f"{path}: is empty")
            data = open_tags(path)
            if data is None:
                continue
            with reading(path, "DICOM file"), quiet():
                if not data.get("Rows") and not data.get("SOPClassUID"):
                    raise UserError(f"{path}: ends before its image tags; was the copy cut short?")
                if data.get("SOPClassUID") != DICOMDIR and data.get("Rows"):
                    slices += file_slices(path, data)
        except UserError as error:
            damaged.append(str(error))
        except OSError as error:
            damaged.append(f"{path}: {first_line(error)}")
    return slices, damaged


def heights(slices) -> np.ndarray:
    """Return the position of slices along the normal of the first, in mm."""
    return np.array([s.position for s in slices]) @ normal_of(slices[0])


def normal_of(part: Slice) -> np.ndarray:
    return np.cross(part.cosines[:3], part.cosines[3:])


def same_series(one: Slice, other: Slice) -> bool:
    """Return whether two slices have the same series UID, modality and size, and not two patients."""
    alike = all(one.words[name] == other.words[name] for name in ("SeriesInstanceUID", "Modality"))
    patients = {part.words["PatientID"] for part in (one, other)} - {""}
    return one.shape == other.shape and alike and len(patients) < 2


def same_orientation(one: Slice, other: Slice) -> bool:
    """Return whether two slices have the same orientation, but for rounding, or both none."""
    if one.cosines is None or other.cosines is None:
        return one.cosines is other.cosines
    return np.allclose(one.cosines, other.cosines, atol=0.01)


def group_series(slices: list[Slice]) -> list[Series]:
    """Group slices by series and orientation, in the order of the files."""
    groups = []
    for part in slices:
        homes = [g for g in groups if same_series(g[0], part) and same_orientation(g[0], part)]
        if homes:
            homes[0].append(part)
        else:
            groups.append([part])
    # A slice without an orientation belongs to the stack of its series, and is missing there.
    for lost in [group for group in groups if group[0].cosines is None]:
        stacks = [group for group in groups if group is not lost and same_series(group[0], lost[0])]
        if stacks:
            max(stacks, key=len).extend(lost)
            groups = [group for group in groups if group is not lost]
    return [judge_series(Series(group)) for group in groups]


def judge_series(series: Series) -> Series:
    """Fill in why a series cannot be read as a CT volume."""
    words = series.words
    kinds = str(words.get("ImageType", "")).upper()
    lacking = [part for part in series.slices if part.missing()]
    named = str(words["Modality"]).upper() or ("CT" if words["SOPClassUID"] in CT_CLASSES else "")
    if named != "CT":
        series.reason = f"modality {words.get('Modality') or 'not given'}; only CT is read"
    elif series.slices[0].frame is None and series.slices[0].frames > 1:
        series.reason = f"{series.slices[0].frames} frames in one file, whose places no tag tells"
    elif len(lacking) == len(series.slices):
        series.reason = f"no {lacking[0].missing()}: no place in the patient"
    elif "LOCALIZER" in kinds or "SCOUT" in kinds:
        series.reason = "a localizer"
    elif len(series.slices) < 2:
        series.reason = "one slice is not a volume"
    elif str(words.get("RescaleType") or "HU").upper() not in ("HU", "US", "UNSPECIFIED"):
        series.reason = f"RescaleType {words['RescaleType']}: no HU"
    elif words.get("ModalityLUTSequence"):
        series.reason = "its values go through a ModalityLUTSequence, which is not read"
    return series


def choose_series(found: list[Series], wanted, folder) -> Series:
    """Return the series to read. wanted: its number in the table, or the end of its UID; None: the best by
    RULES. The table of all is printed where there is a choice."""
    found = sorted(found, key=lambda s: (bool(s.reason), s.rank()))
    usable = [series for series in found if not series.reason]
    table = "\n".join(f"  {i}: {series.row()}" for i, series in enumerate(found, 1))
    if wanted is not None:
        hits = [s for i, s in enumerate(found, 1) if str(i) == str(wanted)] or [
            s for s in found if str(s.words.get("SeriesInstanceUID", "")).endswith(str(wanted))
        ]
        if len(hits) != 1:
            print(f"{folder}:\n{table}", file=sys.stderr)
            raise UserError(
                f"--series {wanted}: {len(hits)} series of {folder} fit; take a number of the table"
            )
        if hits[0].reason:
            raise UserError(f"{folder}: series {wanted} cannot be read: {hits[0].reason}")
        return hits[0]
    if not usable:
        reasons = "; ".join(dict.fromkeys(series.reason for series in found))
        raise UserError(f"{folder}: no CT volume among {len(found)} series ({reasons})")
    if len(usable) > 1:
        print(
            f"{folder}: {len(found)} series, number 1 is taken (--series takes another); {RULES}",
            file=sys.stderr,
        )
        print(table, file=sys.stderr)
    best = usable[0]
    if len(usable) > 1:
        best.notes.append(f"the best of {len(usable)} CT series is taken")
    return best


def split_phases(slices: list[Slice], verdict: Verdict) -> list[Slice]:
    """Return one acquisition where a series holds several that lie over each other.

    Stations of one table run follow each other and stay together; acquisitions that cover the same heights
    are told apart by the first tag of PHASES that can. The largest is kept, of equals the first.
    """
    for name in PHASES:
        groups = {}
        for part in slices:
            groups.setdefault(part.marks.get(name, ""), []).append(part)
        groups = [group for _, group in sorted(groups.items()) if len(group) > 2]
        if len(groups) < 2 or sum(map(len, groups)) < len(slices):
            continue
        spans = sorted((heights(group).min(), heights(group).max()) for group in groups)
        shared = max(0.0, spans[0][1] - spans[1][0])
        if shared > 0.5 * min(high - low for low, high in spans):
            kept = max(groups, key=len)
            verdict.phases = f"{len(groups)} acquisitions under one UID ({name}), one is taken"
            verdict.note(verdict.phases)
            return kept
    return slices


def same_place(slices: list[Slice], near_mm: float = 0.01) -> list[list[Slice]]:
    """Return the slices, sorted by height, in groups that lie at one place."""
    order = np.argsort(heights(slices), kind="stable")
    groups = []
    for i in order:
        part = slices[i]
        if groups and np.abs(part.position - groups[-1][0].position).max() < near_mm:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def check_steps(slices: list[Slice], folder, verdict: Verdict) -> tuple[np.ndarray, np.ndarray]:
    """Return the displacement from slice to slice (3,) in mm and the heights of the slices, sorted.

    Raises UserError for missing slices and for slices that are shifted against each other.
    """
    normal, height = normal_of(slices[0]), heights(slices)
    moves = np.diff([part.position for part in slices], axis=0)
    steps = np.diff(height)
    step = float(np.median(steps))
    if steps.min() < 0.01:
        raise UserError(f"{folder}: slices lie side by side at one height; give a folder with one of them")
    slide = (moves - steps[:, None] * normal) / steps[:, None]  # in the plane, for each mm along the normal
    # Of slices far from each other, so that a jitter of the places is no tilt.
    half = len(height) // 2
    rise = (height[half:] - height[:-half])[:, None]
    far = np.array([part.position for part in slices])
    usual = np.median((far[half:] - far[:-half]) / rise - normal, axis=0)
    if np.abs((slide - usual) * steps[:, None]).max() > 1.5:
        raise UserError(f"{folder}: slices are shifted against each other in their plane; give one series")
    wide = steps > 1.75 * step
    if wide.any() and wide.sum() <= max(1, 0.1 * len(steps)):
        raise UserError(
            f"{folder}: slices are missing (gaps of {steps.max():.1f} mm at a spacing of {step:.1f} mm)"
        )
    if np.abs(steps - step).max() > max(0.02 * step, 0.03):
        verdict.spacing = f"from {steps.min():.2f} to {steps.max():.2f} mm, resampled to {step:.2f} mm"
        verdict.note(f"the slice spacing changes {verdict.spacing}")
    return (normal + usual) * step, height


def read_pixels(part: Slice, frames: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the rescaled pixels of a slice (rows, columns), float32, and where they are padding.

    frames: kept between calls, so that a multi-frame file is decoded once.
    """
    if part.path not in frames:
        frames.clear()
        frames[part.path] = decode_file(part)
    stored, low, high = frames[part.path]
    stored = stored if part.frame is None else stored[part.frame]
    if stored.shape != part.shape:
        raise UserError(
            f"{part.path}: pixels are {stored.shape}, Rows and Columns say {part.shape}; no CT slice"
        )
    slope = 1.0 if part.slope is None else part.slope
    value = stored.astype(np.float32) * slope + (part.offset or 0.0)
    return value.astype(np.float32), (stored >= low) & (stored <= high)


def decode_file(part: Slice) -> tuple[np.ndarray, float, float]:
    """Return the stored pixels of a slice's file, and the lowest and the highest value that are padding."""
    pydicom = need_pydicom()
    declared = 2 * part.shape[0] * part.shape[1] * part.frames
    check_size(part.path, "its header", declared, part.path.stat().st_size)
    with reading(part.path, "DICOM file"), quiet():
        data = pydicom.dcmread(part.path, force=True)
        syntax = str(getattr(data.file_meta, "TransferSyntaxUID", "") or "")
    if syntax in DECODERS and not pydicom.pixels.get_decoder(syntax).is_available:
        name, package = DECODERS[syntax]
        raise UserError(f"{part.path}: {name} needs a decoder; pip install {package} (extra [dicom])")
    colours = str(data.get("PhotometricInterpretation") or "MONOCHROME2")
    if not colours.startswith("MONOCHROME"):
        raise UserError(f"{part.path}: its pixels are colours ({colours}), no CT values; give the CT itself")
    if not syntax:  # a file without preamble
        implicit = data.original_encoding[0]
        form = "ImplicitVRLittleEndian" if implicit else "ExplicitVRLittleEndian"
        data.file_meta.TransferSyntaxUID = getattr(pydicom.uid, form)
    padding, limit = number(data.get("PixelPaddingValue")), number(data.get("PixelPaddingRangeLimit"))
    low, high = np.inf, -np.inf
    if padding is not None:
        low, high = sorted((padding, padding if limit is None else limit))
    try:
        with quiet():
            return data.pixel_array, low, high
    except Exception as error:  # decoders of foreign files raise anything
        raise UserError(f"{part.path}: not a usable CT slice ({first_line(error)})") from error


def decode(groups: list[list[Slice]], folder, verdict: Verdict) -> tuple[np.ndarray, np.ndarray]:
    """Return the values (X, Y, Z) of the first slice of each group and where they are padding; the others of
    a group must be copies of it."""
    frames, copies, volume, empty = {}, 0, [], []
    for group in groups:
        first, padding = read_pixels(group[0], frames)
        for other in group[1:]:
            if not np.array_equal(read_pixels(other, frames)[0], first):
                raise UserError(
                    f"{folder}: {group[0].path.name} and {other.path.name} lie at one place with different "
                    "pixels, and no tag tells their acquisitions apart; give a folder with one"
                )
            copies += 1
        volume.append(first.T)
        empty.append(padding.T)
    if copies:
        verdict.note(f"{copies} slices are there twice with equal pixels; one of each is kept")
    return np.stack(volume, axis=-1), np.stack(empty, axis=-1)


def even(volume: np.ndarray, height: np.ndarray, step: float) -> np.ndarray:
    """Return a volume (X, Y, Z) of uneven slices, resampled linearly to even steps from the first."""
    target = np.arange(height[0], height[-1] + 0.01 * step, step)
    after = np.clip(np.searchsorted(height, target), 1, len(height) - 1)
    share = (target - height[after - 1]) / (height[after] - height[after - 1])
    share = share.clip(0, 1).astype(np.float32)
    return volume[..., after - 1] * (1 - share) + volume[..., after] * share


def read_dicom(folder, series=None, only=None) -> tuple[np.ndarray, np.ndarray, Verdict, bool]:
    """Read one series of a folder: values (X, Y, Z) float32, affine to RAS mm, verdict, and whether its
    rescale tags say that the values are HU.

    series: see `choose_series`. only: a file whose series is wanted, from the files beside it.
    """
    folder = Path(folder)
    files = files_below(folder) if only is None else sorted(p for p in folder.iterdir() if p.is_file())
    if only is not None:
        own = read_tags([Path(only)])[0]
        files = [Path(only)] if len(own) > 1 else files  # a multi-frame file is a volume of its own
    slices, damaged = read_tags(files)
    if not slices:
        nothing = (
            f"{folder}: holds no DICOM slices and no pictures; give the file or the folder of the scan itself"
        )
        raise UserError(damaged[0] if damaged else nothing)
    found = group_series(slices)
    if only is not None:
        found = [s for s in found if any(part.path == Path(only) for part in s.slices)]
        if not found:
            raise UserError(damaged[0] if damaged else f"{only}: no DICOM image")
    chosen = choose_series(found, series, folder)
    verdict = Verdict("DICOM", notes=list(chosen.notes))
    verdict.series = str(chosen.words.get("SeriesInstanceUID", ""))
    try:
        return (*build(chosen, folder, verdict), verdict, all(s.slope is not None for s in chosen.slices))
    except UserError as error:
        if damaged:
            raise UserError(
                f"{error}; {len(damaged)} files could not be read, the first: {damaged[0]}"
            ) from error
        raise


def build(chosen: Series, folder, verdict: Verdict) -> tuple[np.ndarray, np.ndarray]:
    """Return values (X, Y, Z) and affine to RAS mm of a chosen series, and fill in its verdict."""
    for part in chosen.slices:
        if part.missing():
            raise UserError(f"{part.path}: {part.missing()} is missing or empty; repair or remove the slice")
        if part.slope == 0:
            raise UserError(f"{part.path}: RescaleSlope is 0; repair or remove the slice")
    if any(not np.allclose(part.pixel_mm, chosen.slices[0].pixel_mm, rtol=1e-3) for part in chosen.slices):
        raise UserError(f"{folder}: PixelSpacing differs between the slices of one series; give one series")
    given = {part.slope is not None for part in chosen.slices}, {p.offset is not None for p in chosen.slices}
    if any(len(some) > 1 for some in given):
        raise UserError(
            f"{folder}: some slices have RescaleSlope and RescaleIntercept, others not; repair them"
        )
    if len({(part.slope, part.offset) for part in chosen.slices}) > 1:
        verdict.note("RescaleSlope or RescaleIntercept differ between the slices")
    words = chosen.text()
    if any(w in words for w in ELSEWHERE) and not any(w in words for w in CHEST):
        verdict.note(f"the header speaks of another body part ({' '.join(words.split())})")
    computed = [word for word in COMPUTED if word in str(chosen.words["ImageType"]).upper()]
    if computed:
        verdict.note(f"ImageType says {computed[0]}: computed from other images, no plain CT")

    # Geometry, from the tags alone.
    groups = same_place(split_phases(chosen.slices, verdict))
    slices = [group[0] for group in groups]
    if len(slices) < 2:
        raise UserError(f"{folder}: all slices lie at one place; one slice is not a volume")
    move, height = check_steps(slices, folder, verdict)
    tilt, aside = abs(number(chosen.words.get("GantryDetectorTilt")) or 0.0), np.sort(np.abs(move))[1]
    if 2 <= tilt < 45 and aside < 0.03 * np.abs(move).max() and abs(normal_of(slices[0])).max() > 0.999:
        verdict.note(f"GantryDetectorTilt is {tilt:g} degrees, but the slices are placed without a tilt")
    row_mm, column_mm = slices[0].pixel_mm
    if abs(row_mm / column_mm - 1) > 0.01:
        verdict.note(f"pixels are not square ({row_mm:g} x {column_mm:g} mm)")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = slices[0].cosines[:3] * column_mm, slices[0].cosines[3:] * row_mm
    affine[:3, 2], affine[:3, 3] = move, slices[0].position
    affine[:2] *= -1  # DICOM counts towards left and back, NIfTI towards right and front

    size = 12 * len(slices) * int(np.prod(slices[0].shape, dtype=float))
    check_size(folder, "the series", size, size)

    # Pixels. Padding outside the scanned circle is air, whatever value stands for it.
    values, empty = decode(groups, folder, verdict)
    wrapped = values > WRAPPED_HU
    if wrapped.any():
        empty |= wrapped
        verdict.note(
            f"values above {WRAPPED_HU} HU are negative padding read without its sign; taken for air"
        )
    values[empty] = min(AIR_HU, float(values[~empty].min())) if not empty.all() else AIR_HU
    if verdict.spacing != "regular":
        values = even(values, height, float(np.median(np.diff(height))))
    return values, affine
