"""Scans without labels and reports: one, or all of a folder or of a csv."""

import csv
from collections import Counter
from pathlib import Path

from torch.utils.data import Dataset

from common.errors import UserError
from common.files import reading
from dia_pangu.src.Dataset.CTRG_dataset import collate
from dia_pangu.src.Dataset.dicom import is_dicom
from dia_pangu.src.Dataset.preprocess import Grid, load_scan
from dia_pangu.src.Dataset.scan import ITK, NIFTI, picture_files, scan_name
from dia_pangu.src.Dataset.verdict import say

COLUMNS = ("volume", "path", "file")  # of a csv of scans, the first that it has


def find_scans(source) -> list[tuple[str, Path]]:
    """Return (id, path) of all scans that a folder holds or a csv names, sorted by id.

    In a folder every NIfTI, MetaImage or NRRD file is a scan, and every folder of DICOM files or pictures; an
    id is the path below the folder without the suffix. A csv has a column volume, path or file, with paths
    that may start at its own folder, and may have a column id.
    """
    source = Path(source)
    scans = scans_of_csv(source) if source.is_file() else scans_of_folder(source)
    if not scans:
        raise UserError(
            f"{source}: holds no scans (NIfTI, MetaImage or NRRD files, folders of DICOM or pictures)"
        )
    name, count = Counter(name for name, _ in scans).most_common(1)[0]
    if count > 1:
        raise UserError(f"{source}: two scans have the id {name}; rename one, or give a csv with a column id")
    return sorted(scans)


def scans_of_csv(file: Path) -> list[tuple[str, Path]]:
    """Return (id, path) of the rows of a csv."""
    with reading(file, "csv of scans"), open(file, newline="", encoding="utf-8-sig") as lines:
        rows = list(csv.DictReader(lines))
    column = next((name for name in COLUMNS if rows and name in rows[0]), None)
    if column is None:
        raise UserError(f"{file}: no rows with a column {', '.join(COLUMNS)}; it names the scans")
    scans = []
    for line, row in enumerate(rows, 2):
        path, name = (row[column] or "").strip(), (row.get("id") or "").strip()
        if not path or "\0" in path:
            raise UserError(f"{file}: line {line} names no scan in its column {column}")
        name = name or scan_name(file.parent / path)
        # Files of this name are written below the folder of the results.
        if not name.isprintable() or len(name) > 200 or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{file}: line {line}: id {name[:80]!r} cannot be the name of a file")
        scans.append((name, file.parent / path))
    return scans


def scans_of_folder(folder: Path) -> list[tuple[str, Path]]:
    """Return (id, path) of the scans below a folder; the folder itself may be one."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder or csv; --volumes takes the folder of the scans")
    scans, seen, passed = [], set(), []

    def walk(place: Path):
        # A link may lead back to a folder above it.
        if place.resolve() in seen:
            return
        seen.add(place.resolve())
        files = sorted(p for p in place.iterdir() if not p.name.startswith("."))
        whole = [p for p in files if p.is_file() and p.suffix.lower() not in (".raw", ".zraw", ".csv")]
        volumes = [p for p in whole if p.name.lower().endswith((*NIFTI, *ITK))]
        slices = picture_files(place) if len(picture_files(place)) > 1 else []  # one is no stack
        loose = [p for p in whole if p not in volumes and p not in slices]
        # An Analyze pair is one scan.
        volumes = [p for p in volumes if p.suffix != ".hdr" or not p.with_suffix(".img").exists()]
        scans.extend((str((p.parent / scan_name(p)).relative_to(folder)), p) for p in volumes)
        dicom = any(p.name.upper() == "DICOMDIR" or is_dicom(p) for p in loose)
        if slices or dicom:
            name = str(place.relative_to(folder)) if place != folder else place.resolve().name
            scans.append((name, place))
        if dicom:  # the folders below belong to it
            return
        passed.extend(loose)
        for inner in sorted(files, key=Path.is_symlink):
            if inner.is_dir():
                walk(inner)

    walk(folder)
    if passed:
        names = ", ".join(str(path.relative_to(folder)) for path in passed[:5])
        say(folder, [f"{len(passed)} files are no scans by their names and passed over: {names}"])
    return scans


def collate_scans(samples: list[dict]) -> dict:
    """Join scans to a batch; those that could not be read stand under "failed" as (id, path, error)."""
    good = [sample for sample in samples if "error" not in sample]
    batch = collate(good) if good else {"id": []}
    batch["failed"] = [(s["id"], s["path"], s["error"]) for s in samples if "error" in s]
    return batch


class Scans(Dataset):
    """Prepared scans: {"id", "report": "", "vision_x" (1, 3, H, W, D), "verdict", "path"}, or {"id", "path",
    "error"}.

    scans: (id, path) pairs. series: of a DICOM folder with several, see dicom.choose_series.
    """

    def __init__(self, scans, grid: Grid, cache=None, series=None):
        self.scans, self.grid, self.cache, self.series = scans, grid, cache, series

    def __len__(self):
        return len(self.scans)

    def __getitem__(self, index: int) -> dict:
        name, path = self.scans[index]
        try:
            volume, verdict = load_scan(path, self.grid, self.cache, self.series)
        except UserError as error:
            return {"id": name, "path": str(path), "error": str(error)}
        return {"id": name, "path": str(path), "report": "", "vision_x": volume[None], "verdict": verdict}
