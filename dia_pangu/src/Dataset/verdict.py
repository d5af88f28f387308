"""What a scan is, and how that is known: HU or not, millimetres or not, which side is which, a chest or not.

Nothing is inferred from absence: what a file does not say is looked for in its voxels, and what they do not
show either is called unknown. The verdict of a scan is stored beside its report and stands over its picture.
"""

import sys
from dataclasses import asdict, dataclass, field

import numpy as np
from scipy.ndimage import label

from common.errors import UserError

AIR_HU = -1024.0
# What scanners and converters add to HU to store them without a sign.
OFFSETS = (0, 1000, 1024, 2000, 2048, 8192, 31744, 32768)
# Factors to mm of the units that a header can name; a volume is between 3 cm and 3 m long.
UNITS = {"mm": 1.0, "meter": 1000.0, "micron": 0.001}
NAMES = {"mm": "mm", "meter": "metres", "micron": "microns"}
LONGEST_MM, SHORTEST_MM = 3000.0, 30.0
HU, GREY, OTHER = "HU", "grey levels", "no HU"
_said = set()


@dataclass
class Verdict:
    """What is known of one scan. values: HU, GREY or OTHER; offset: what is taken off the stored values to
    get HU; why: how the values were recognised. side: whether left and right are "known" or "unknown".
    chest: "yes", "no" or "unclear". notes: what a reader of the report has to know, one sentence each."""

    format: str
    values: str = HU
    offset: float = 0.0
    why: str = ""
    units: str = "mm by the header"
    side: str = "known"
    orientation: str = "by the header"
    spacing: str = "regular"
    tilt: str = "none"
    phases: str = "one"
    chest: str = "unclear"
    series: str = ""
    notes: list = field(default_factory=list)

    def note(self, text: str):
        if text not in self.notes:
            self.notes.append(text)

    def row(self) -> dict:
        """Return the verdict as one flat row of a table."""
        return {**asdict(self), "offset": f"{self.offset:g}", "notes": "; ".join(self.notes)}

    def line(self) -> str:
        """Return the verdict as one short line for a picture or a terminal."""
        values = self.values + (f" - {self.offset:g}" if self.offset else "")
        parts = [self.format, values, f"side {self.side}", f"chest {self.chest}"]
        return ", ".join([*parts, *self.notes])


def say(path, notes, once_per_kind: bool = False):
    """Print the notes of a scan to stderr, each once for a file, or once for all files of a data set."""
    for text in notes:
        key = text if once_per_kind else (str(path), text)
        if key not in _said:
            _said.add(key)
            print(f"note: {path}: {text}", file=sys.stderr, flush=True)


def thin(values: np.ndarray, most: int = 100_000) -> np.ndarray:
    """Return about `most` voxels of a volume, evenly spread, as a flat float array."""
    step = max(1, int(np.ceil((values.size / most) ** (1 / values.ndim))))
    return values[(slice(None, None, step),) * values.ndim].ravel().astype(np.float64)


def likeness(values: np.ndarray) -> tuple[float, float, float]:
    """Return how much values look like HU: the share of the dark ones that are air or lung, the share of the
    rest that are soft tissue, and the share of dark ones."""
    values = values[values > -1200]  # below is padding
    if not len(values):
        return 0.0, 0.0, 0.0
    dark = values < -400
    air = np.mean((values[dark] > -1150) & (values[dark] < -650)) if dark.any() else 0.0
    soft = np.mean((values[~dark] > -200) & (values[~dark] < 250)) if not dark.all() else 0.0
    return float(air), float(soft), float(dark.mean())


def find_offset(values: np.ndarray, fill: float | None = None) -> float | None:
    """Return what was added to HU, if just one offset puts both air and soft tissue in place; else None.

    fill: of `corner_fill`; where there is other air, its peak is looked for in that alone.
    """
    found, other = [], values != fill
    for offset in OFFSETS:
        air, soft, dark = likeness(values - offset)
        if air > 0.7 and soft > 0.5 and 0.02 < dark < 0.98:
            low = np.rint(values - offset)
            near = (low > -1060) & (low < -930)
            low = low[near & other] if (near & other).any() else low[near]
            inner = low[low > values.min() - offset]  # air's noise that is cut off piles up at the lowest
            low = inner if 2 * len(inner) > len(low) else low
            peak = np.bincount((low + 1060).astype(int)).argmax() - 1060 if len(low) else -930
            found.append((abs(peak + 1000), offset))
    return min(found)[1] if found else None


def is_inverted(values: np.ndarray, offset: float | None, corner: float) -> bool:
    """Return whether values look like HU upside down: air the brightest, tissue 1000 below it, bone below
    that. offset: of `find_offset`; corner: the median of `corners`.

    Two peaks at this distance fit HU either way up, with tissue in the place of air. But beyond tissue there
    is bone, and beyond air nothing but padding, which fills the corners or is one value far from the others.
    """
    found = np.unique(values)
    far = [found[end] for end, inner in ((0, 1), (-1, -2)) if abs(found[end] - found[inner]) > 450]
    padding = np.isin(values, far)
    offsets = [offset]
    if offset is None:  # as if one of the two highest peaks were air
        counts, edges = np.histogram(values, 100, np.percentile(values, (0.5, 99.5)))
        highest = counts.argmax()
        apart = np.abs(np.arange(100) - highest) > 20
        offsets = [edges[peak] + 1000 for peak in (highest, (counts * apart).argmax())]
    for offset in offsets:
        hu = values - offset
        air, soft, dark = likeness(hu)
        below, above = np.mean((hu < -1300) & ~padding), np.mean((hu > 300) & ~padding)
        two_peaks = air > 0.7 and soft > 0.5 and 0.02 < dark < 0.98
        if two_peaks and below > max(0.005, 4 * above) and corner - offset > -1200:
            return True
    return False


def corners(stored: np.ndarray) -> np.ndarray:
    """Return the eight corners of a volume, a tenth of it along each axis, where air or padding is."""
    ends = [np.r_[: max(1, n // 10), n - max(1, n // 10) : n] for n in stored.shape]
    return stored[np.ix_(*ends)]


def corner_fill(stored: np.ndarray) -> float | None:
    """Return the one value that all corners of a volume hold, as a filling does and measured air does not."""
    low, high = (float(end(corners(stored))) for end in (np.min, np.max))
    return low if low == high else None


def filled_outside(stored: np.ndarray, offset: float) -> np.ndarray | None:
    """Return where a volume is filled from its corners on with a value that no air has; None: nowhere.

    The lowest value of a volume is air, cut off at a window's end. offset: what was added to HU.
    """
    fill = corner_fill(stored)
    if fill is None or fill - offset < AIR_HU + 124 or fill < float(stored.min()) + 100:
        return None
    parts, _ = label(stored == fill)
    return np.isin(parts, np.unique(corners(parts)))


def judge_values(verdict: Verdict, stored: np.ndarray, declared: bool = False):
    """Fill in what the stored values are. declared: a CT whose header has rescale tags says that they are
    HU, which only a clear offset in the voxels overrules."""
    values = thin(stored)
    low, high = float(stored.min()), float(stored.max())
    span = f"values from {low:g} to {high:g}"
    # What the voxels show beyond doubt overrules the header. Without bone, bright corners show which way up.
    offset, corner = find_offset(values, corner_fill(stored)), np.median(corners(stored))
    bright = corner > low + 0.85 * (high - low)
    distinct = len(np.unique(values))
    if distinct < 3:
        verdict.values, verdict.why = OTHER, "2 different values: a mask, not a scan"
        return
    if is_inverted(values, offset, corner) or offset and bright:
        verdict.values, verdict.why = OTHER, f"{span}: inverted, air is brighter than tissue"
        return
    if offset:
        verdict.offset, verdict.why = offset, f"{span}; air and soft tissue lie {offset:g} above their HU"
        verdict.note(f"the stored values are HU + {offset:g}; {offset:g} is taken off")
        return
    air, soft, dark = likeness(values)
    usual = air > 0.5 and soft > 0.25
    grey = low >= 0 and 60 < high <= 255.5  # of a CT with HU the air alone lies below
    if declared and (usual or not (bright or grey)):
        verdict.why = "rescale tags of a CT"
        if not usual:
            verdict.note(f"{span}: HU by the header, but air and soft tissue do not lie at their usual HU")
        return
    if low < -200 and usual:
        verdict.why = f"{span}; air and soft tissue lie at their HU"
        return
    # No air in the volume: a soft-tissue window, or a piece cut out of the body.
    if not bright and -500 <= low < -20 and high > 100 and dark < 0.005 and soft > 0.6:
        verdict.why = f"{span}; soft tissue lies at its HU, there is no air"
        verdict.note(f"{span}: likely HU cut off at {low:g}, or a piece without air; lungs cannot be seen")
        return
    # No HU: say what it is instead.
    verdict.values = OTHER
    if distinct <= 16 and low >= 0:
        verdict.why = f"{distinct} different values: a mask, not a scan"
    elif grey:
        verdict.values, verdict.why = GREY, f"{span}: 8-bit grey levels, as pictures hold them"
        if bright:
            verdict.note("the corners are bright: the grey levels are likely inverted, air bright")
    elif -1.5 <= low and high <= 1.5:
        verdict.why = f"{span}: normalised"
    elif bright:
        verdict.why = f"{span}: the corners are bright, as in an inverted scan"
    else:
        verdict.why = f"{span}: air and soft tissue are not found at their HU, nor a known offset above them"


def require_hu(verdict: Verdict, path):
    """Raise UserError where the windows preparation has nothing to work on."""
    if verdict.values == HU:
        if verdict.spacing == "unknown":
            raise UserError(f"{path}: no spacing is known, which a model of HU windows needs")
        return
    if verdict.values == GREY:
        way_out = "a model with --preprocess upstream reads them; for one of HU windows give the CT itself"
    else:
        way_out = "give the CT in HU"
    raise UserError(f"{path}: no HU ({verdict.why}); {way_out}")


def find_lungs(hu: np.ndarray, spacing_mm) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return HU (H, W, D) on voxels of about 4 mm, where the body is in it, where lung is, and the steps that
    were taken. Lung is what has lung's HU between solid voxels of its row and of its column."""
    steps = np.array([max(1, round(4.0 / step)) for step in spacing_mm])
    small = hu[:: steps[0], :: steps[1], :: steps[2]]
    solid = small > -400
    body = between(solid, 0) & between(solid, 1)
    return small, body, body & (small > -960) & (small < -550), steps


def judge_chest(verdict: Verdict, hu: np.ndarray, spacing_mm):
    """Fill in whether lungs are seen in HU (H, W, D), and look whether the spine lies at the back.

    A chest has at least 0.4 litres of lung, over at least 12 cm; of a child a twelfth of the body, over two
    fifths of its width.
    """
    small, inside, lung, steps = find_lungs(hu, spacing_mm)
    h_mm, w_mm, d_mm = steps * spacing_mm
    litres, body = (float(part.sum() * h_mm * w_mm * d_mm / 1e6) for part in (lung, inside))
    width_mm = float(inside.any((0, 2)).sum() * w_mm)
    area_mm2 = min(2000.0, 0.05 * width_mm**2)  # of lung in a slice that counts
    tall_mm = float((lung.sum((0, 1)) * h_mm * w_mm > area_mm2).sum() * d_mm)
    enough, tall = min(0.4, body / 12), min(120.0, 0.4 * width_mm)
    verdict.chest = "unclear" if litres >= min(0.15, body / 30) else "no"
    if litres >= enough > 0 and tall_mm >= tall:
        verdict.chest = "yes"
    if 0 < width_mm < 70:
        verdict.chest = "unclear"
        verdict.note(f"the body is {width_mm:.0f} mm wide, which no patient is; is the spacing right?")
    elif verdict.chest != "yes":
        what = "this is no chest" if verdict.chest == "no" else "only part of a chest"
        verdict.note(f"{litres:.2f} litres of lung over {tall_mm:.0f} mm are seen: {what}")
    # A scan cuts the body off at head and feet; one that is cut off at its sides alone has other axes.
    ends = []
    for axis in range(3):
        area = (small > -400).sum(tuple({0, 1, 2} - {axis})) / max(1, np.delete(small.shape, axis).prod())
        ends.append(area[[0, -1]] / max(area.max(), 1e-9))
    if ends[2].max() < 0.05 and max(ends[0].min(), ends[1].min()) > 0.3:
        verdict.side, verdict.orientation = "unknown", "contradicted by the body"
        verdict.note(
            "the body ends in air at head and feet, but not at its sides: the axes are in another order "
            "than the header says, left and right are unknown"
        )
    # Bone near the middle is the spine; the header may be wrong, the spine is not. In front there may also be
    # a breastbone, calcified ribs, or a heart full of contrast: then the spine is still seen at the back.
    body, bone = np.argwhere((small > -400).any(2)), np.argwhere(small > 350)
    if len(body) < 100 or len(bone) < 100:
        return
    (top, left), (bottom, right) = body.min(0), body.max(0)
    middle = bone[np.abs(bone[:, 1] - (left + right) / 2) < 0.15 * max(1, right - left)]
    if len(middle) < 50 or verdict.chest == "no":
        return
    band = slice(*np.round((left + right) / 2 + np.array([-0.15, 0.15]) * (right - left)).astype(int))
    behind_mm2 = np.median((small[(top + bottom) // 2 :, band] > 150).sum((0, 1))) * h_mm * w_mm
    in_front = (middle[:, 0].mean() - (top + bottom) / 2) / max(1, (bottom - top) / 2) < -0.35
    if in_front and behind_mm2 < 800:
        verdict.side, verdict.orientation = "unknown", "contradicted by the spine"
        verdict.note("the spine lies in front: the header's orientation is wrong, left and right are unknown")


def between(solid: np.ndarray, axis: int) -> np.ndarray:
    """Return which voxels have a solid one on either side of them along an axis."""
    back = np.flip(np.maximum.accumulate(np.flip(solid, axis), axis), axis)
    return np.maximum.accumulate(solid, axis) & back


def to_mm(verdict: Verdict, affine: np.ndarray, shape, unit: str, path) -> np.ndarray:
    """Return an affine in mm. unit: what the header names, or "" where it names none.

    A length that no patient has overrules the header where exactly one other unit gives a possible one.
    """
    sizes = np.linalg.norm(affine[:3, :3], axis=0) * np.array(shape)
    longest = float(sizes.max())
    if np.median(sizes) < 0.02 * longest:
        told = " x ".join(f"{size:.4g}" for size in sizes)
        raise UserError(f"{path}: the volume would be {told} mm; correct the spacing of its axes")
    possible = [name for name, f in UNITS.items() if SHORTEST_MM <= longest * f <= LONGEST_MM]
    taken = unit if unit in UNITS else "mm"
    verdict.units = f"{unit} by the header" if unit in UNITS else "mm, the header names no unit"
    if taken not in possible:
        size = f"the volume would be {longest * UNITS[taken]:.4g} mm long"
        others = [name for name in possible if name != taken]
        if len(others) != 1:
            raise UserError(f"{path}: {size} with the header's spacing; correct the spacing or its unit")
        taken = others[0]
        verdict.units = f"{taken}, guessed"
        verdict.note(f"{size}; the spacing is read in {NAMES[taken]} instead, because only that is possible")
    out = affine.copy()
    out[:3] *= UNITS[taken]
    if taken != "mm" and unit == taken:
        verdict.note(f"the header's spacing is in {NAMES[taken]}; read in mm")
    return out
