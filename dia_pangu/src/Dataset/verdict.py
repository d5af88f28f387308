"""What a scan is, and how that is known: HU or not, millimetres or not, which side is which, a chest or not.

Nothing is inferred from absence: what a file does not say is looked for in its voxels, and what they do not
show either is called unknown. The verdict of a scan is stored beside its report and stands over its picture.
"""

import sys
from dataclasses import asdict, dataclass, field

import numpy as np

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


def find_offset(values: np.ndarray) -> float | None:
    """Return what was added to the HU of these values, if air and soft tissue both lie where only one
    offset puts them; else None."""
    found = []
    for offset in OFFSETS:
        air, soft, dark = likeness(values - offset)
        if air > 0.7 and soft > 0.5 and 0.02 < dark < 0.98:
            low = np.rint(values - offset)
            low = low[(low > -1060) & (low < -930)]
            peak = np.bincount((low + 1060).astype(int)).argmax() - 1060 if len(low) else -930
            found.append((abs(peak + 1000), offset))
    return min(found)[1] if found else None


def judge_values(verdict: Verdict, stored: np.ndarray, declared: bool = False):
    """Fill in what the stored values are. declared: a CT whose header has rescale tags says that they are
    HU, which only a clear offset in the voxels overrules."""
    values = thin(stored)
    low, high = float(stored.min()), float(stored.max())
    span = f"values from {low:g} to {high:g}"
    offset = find_offset(values)
    if offset:
        verdict.offset, verdict.why = offset, f"{span}; air and soft tissue lie {offset:g} above their HU"
        verdict.note(f"the stored values are HU + {offset:g}; {offset:g} is taken off")
        return
    air, soft, dark = likeness(values)
    if declared or low < -200 and air > 0.5 and soft > 0.25:
        verdict.why = "rescale tags of a CT" if declared else f"{span}; air and soft tissue lie at their HU"
        if declared and not (air > 0.5 and soft > 0.25):
            verdict.note(f"{span}: HU by the header, but air and soft tissue do not lie at their usual HU")
        return
    # No air in the volume: a soft-tissue window, or a piece cut out of the body.
    if -500 <= low < -20 and high > 100 and dark < 0.005 and soft > 0.6:
        verdict.why = f"{span}; soft tissue lies at its HU, there is no air"
        verdict.note(f"{span}: likely HU cut off at {low:g}, or a piece without air; lungs cannot be seen")
        return
    verdict.values = OTHER
    distinct = len(np.unique(values))
    if distinct <= 16 and low >= 0:
        verdict.why = f"{distinct} different values: a mask, not a scan"
    elif low >= 0 and 60 < high <= 255.5:
        verdict.values = GREY
        verdict.why = f"{span}: 8-bit grey levels, as pictures hold them"
    elif -1.5 <= low and high <= 1.5:
        verdict.why = f"{span}: normalised"
    else:
        verdict.why = f"{span}: air and soft tissue are not found at their HU, nor a known offset above them"


def require_hu(verdict: Verdict, path):
    """Raise UserError where the windows preparation has nothing to work on."""
    if verdict.values == HU:
        return
    if verdict.values == GREY:
        way_out = "a model with --preprocess upstream reads them; for one of HU windows give the CT itself"
    else:
        way_out = "give the CT in HU"
    raise UserError(f"{path}: no HU ({verdict.why}); {way_out}")


def judge_chest(verdict: Verdict, hu: np.ndarray, spacing_mm):
    """Fill in whether lungs are seen in HU (H, W, D), and look whether the spine lies at the back.

    Lung is what has lung's HU between solid voxels of its row and of its column; a chest has at least
    0.4 litres of it, over at least 12 cm.
    """
    steps = [max(1, int(round(4.0 / step))) for step in spacing_mm]
    small = hu[:: steps[0], :: steps[1], :: steps[2]]
    litres = np.prod([step * size for step, size in zip(steps, spacing_mm)]) / 1e6
    solid = small > -400
    inside = between(solid, 0) & between(solid, 1)
    where = inside & (small > -960) & (small < -550)
    lung = float(where.sum() * litres)
    area_mm2 = where.sum((0, 1)) * np.prod([step * size for step, size in zip(steps[:2], spacing_mm[:2])])
    tall_mm = float((area_mm2 > 2000).sum() * steps[2] * spacing_mm[2])
    verdict.chest = "yes" if lung >= 0.4 and tall_mm >= 120 else "no" if lung < 0.15 else "unclear"
    if verdict.chest != "yes":
        verdict.note(
            f"{lung:.2f} litres of lung over {tall_mm:.0f} mm are seen: "
            + ("this is no chest" if verdict.chest == "no" else "only part of a chest")
        )
    # Bone near the middle is the spine; the header may be wrong, the spine is not.
    body, bone = np.argwhere(solid.any(2)), np.argwhere(small > 350)
    if len(body) < 100 or len(bone) < 100:
        return
    (top, left), (bottom, right) = body.min(0), body.max(0)
    middle = bone[np.abs(bone[:, 1] - (left + right) / 2) < 0.15 * max(1, right - left)]
    if len(middle) < 50 or verdict.chest == "no":
        return
    if (middle[:, 0].mean() - (top + bottom) / 2) / max(1, (bottom - top) / 2) < -0.35:
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
    longest = float((np.linalg.norm(affine[:3, :3], axis=0) * np.array(shape)).max())
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
