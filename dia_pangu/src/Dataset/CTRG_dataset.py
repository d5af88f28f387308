"""CTRG-Chest-548K as it is published: volumes, reports in two languages, labels of the findings.

Upstream: src/Dataset/my_dataset/CTRG_dataset.py, dataset_train.py, dataset_val.py, dataset_test.py.

    <data>/annotation.json (Chinese), annotation_en.json (English); other names: annotation*.json
    <data>/CTRG_finding_labels.csv; other names: *finding_labels*.csv
    <data>/volumes/<id>.nii.gz, or <data>/<id>.nii.gz; a series of DICOM or JPG files is a folder <id>

The split is the partition that holds an item; the item's own field `split` contradicts it in the published
file. An id belongs to one partition only.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.files import read_json, reading
from common.run import progress
from dia_pangu.src.Dataset.preprocess import Grid, load_scan, patch_labels
from dia_pangu.src.Dataset.prompt import COLUMNS, FINDINGS, PLACES, SIDES, ReportText, pad_texts
from dia_pangu.src.Dataset.scan import SUFFIXES
from dia_pangu.src.Dataset.verdict import say

SPLITS = ("train", "val", "test")
CODES = {"": 0} | {f"{code}{end}": code for code in range(4) for end in ("", ".0")}


def find_one(folder: Path, names, what: str) -> Path:
    """Return the first file of `folder` that matches one of the globs `names`, tried in their order."""
    for name in names:
        found = sorted(folder.glob(name))
        if found:
            return found[0]
    raise UserError(
        f"{folder}: no {what} (looked for {', '.join(names)}); give the folder of the data with --data"
    )


def read_annotation(folder, language: str) -> tuple[Path, dict]:
    """Return (file, {split: [item, ...]}); every item has a string id, which no other partition holds."""
    names = (
        ("annotation_en.json", "annotation_*.json")
        if language == "en"
        else ("annotation.json", "annotation_cn.json")
    )
    path = find_one(Path(folder), (*names, "annotation*.json"), "annotation")
    content = read_json(path, {f"{split}?": [{"id": (str, int), "finding?": str}] for split in SPLITS})
    if not any(split in content for split in SPLITS):
        raise UserError(f"{path}: expected an object with the lists {', '.join(SPLITS)}")
    home = {}
    for split in SPLITS:
        for item in content.get(split) or []:
            item["id"] = str(item["id"])
            if home.setdefault(item["id"], split) != split:
                raise UserError(
                    f"{path}: id {item['id']} is in the partitions {home[item['id']]} and {split}; "
                    "leave it in one, or the test would be about training volumes"
                )
    return path, content


def read_labels(folder) -> tuple[Path, dict]:
    """Return (file, {id: 14 codes}); the codes are 0 blank, 1 present, 2 absent, 3 uncertain."""
    path = find_one(Path(folder), ("CTRG_finding_labels.csv", "*finding_labels*.csv"), "label csv")
    with reading(path, "csv file"), open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        fields = reader.fieldnames = [str(field).strip() for field in reader.fieldnames or []]
        missing = [column for column in ("id", *COLUMNS) if column not in fields]
        if missing:
            raise UserError(f"{path}: column {missing[0]} is missing; expected id and {', '.join(COLUMNS)}")
        labels = {}
        for line, row in enumerate(reader, 2):
            if None in row.values():
                raise UserError(f"{path}: line {line} has fewer cells than the header")
            codes = [row[column].strip() for column in COLUMNS]
            wrong = [f"{column} = {code!r}" for column, code in zip(COLUMNS, codes) if code not in CODES]
            if wrong:
                raise UserError(
                    f"{path}: line {line}: {wrong[0]}; codes are 0 blank, 1 present, 2 absent, 3 uncertain"
                )
            name, codes = row["id"].strip(), [CODES[code] for code in codes]
            if labels.setdefault(name, codes) != codes:
                raise UserError(f"{path}: line {line}: id {name} stands twice, with other codes")
    return path, labels


def read_places(path) -> dict:
    """Return {id: {finding: (side, place)}} from the places.json of studies/dia_pangu/pretrain_vit.py."""
    known = {"", *SIDES, *PLACES}
    with reading(path, "places file"):
        places = {
            name: {finding: (side, place) for finding, (side, place) in found.items()}
            for name, found in read_json(path, dict).items()
        }
        for name, found in places.items():
            words = {word for at in found.values() for word in at}
            if not set(found) <= set(FINDINGS) or not words <= known:
                raise UserError(f"{path}: {name} has a finding, side or place that is none ({found})")
    return places


class CTRGDataset(Dataset):
    """The volumes, labels and reports of one partition.

    A sample holds id, report, cls_labels (14,) with 1 = present, vision_x (1, 3, H, W, D) float32 in [0, 1]
    with its path and its verdict, and text, the ids of prompt and report that `text` writes.

    data: folder in the CTRG format. split: train, val or test. grid: what the model sees. cache: folder for
    prepared volumes. flip: fraction of the statuses in the prompt that are inverted, because the model's own
    diagnosis will sometimes be wrong at test time; drawn from (seed, epoch, index). patches: size of a patch
    in voxels (H, W, D); a sample then also holds patch_labels (n_tok, 14) from masks/. vision: False leaves
    the volume out. limit: use only the first items; 0: all. places: from `read_places`; the prompt then names
    the side and place of what is present, except for a fraction `hide_places` of the findings, drawn like the
    flips: the report has to take those from the image tokens.

    `sample` raises UserError for a bad input; indexing returns {"error": message, "index": index} instead, so
    that an error in a loader's worker stays one line.
    """

    def __init__(
        self,
        data,
        split: str,
        grid: Grid,
        text: ReportText | None = None,
        language: str = "en",
        cache=None,
        flip: float = 0.0,
        seed: int = 0,
        patches=None,
        vision: bool = True,
        limit: int = 0,
        places: dict | None = None,
        hide_places: float = 0.0,
    ):
        self.data, self.split, self.grid, self.text, self.cache = Path(data), split, grid, text, cache
        self.patches, self.vision = patches, vision
        self.places, self.hide_places, self.flip = places, hide_places, flip
        self.seed, self.epoch = seed, 0
        if not self.data.is_dir():
            raise UserError(f"{data}: no such data folder; make the built-in one with dia_pangu/make_data.py")
        self.annotation, partitions = read_annotation(self.data, language)
        self.label_file, self.labels = read_labels(self.data)
        if not partitions.get(split):
            raise UserError(f"{self.annotation}: partition {split} is empty")
        self.items = partitions[split][: limit or None]
        self.folder = self.data / "volumes" if (self.data / "volumes").is_dir() else self.data
        self.skipped = {}

    def __len__(self):
        return len(self.items)

    def set_epoch(self, epoch: int):
        """Begin an epoch: flips and hidden places are drawn anew."""
        self.epoch = epoch

    def path(self, name: str, folder: Path | None = None) -> Path:
        """Return the file or folder of an id in `folder` (default: the volumes), whether it exists or not."""
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{self.annotation}: id {name!r} is not a plain name")
        folder = folder or self.folder
        options = [folder / f"{name}{suffix}" for suffix in (".nii.gz", ".nii", "", *SUFFIXES)]
        return next((path for path in options if path.exists()), options[0])

    def codes(self, name: str) -> list[int]:
        """Return the 14 codes of an id, see `read_labels`."""
        if name not in self.labels:
            raise UserError(f"{self.label_file}: id {name} of {self.annotation.name} has no row")
        return self.labels[name]

    def statuses(self, index: int) -> np.ndarray:
        """Return the 14 labels of a sample, 1 where the code says present."""
        return (np.array(self.codes(self.items[index]["id"])) == 1).astype(np.int64)

    def check(self):
        """Raise UserError for the first item without report, label row or volume; no volume is read."""
        for item in self.items:
            self.report(item)
            self.codes(item["id"])
            if self.vision and not self.path(item["id"]).exists():
                raise UserError(
                    f"{self.path(item['id'])}: no such volume, but {self.annotation} names it; or pass "
                    "--skip-bad"
                )

    def report(self, item: dict) -> str:
        """Return the report of an item, its field `finding`."""
        if not (item.get("finding") or "").strip():
            raise UserError(
                f"{self.annotation}: {self.split} id {item['id']}: field finding is missing or empty"
            )
        return item["finding"]

    def sample(self, index: int) -> dict:
        """Return one sample, see the class; raise UserError for a bad input."""
        item = self.items[index]
        name, report = item["id"], self.report(item)
        labels = self.statuses(index)
        out = {"id": name, "report": report, "cls_labels": torch.from_numpy(labels)}
        if self.vision:
            out["path"] = str(self.path(name))
            volume, out["verdict"] = load_scan(out["path"], self.grid, self.cache)
            out["vision_x"] = volume[None]
            say(out["path"], out["verdict"].notes, once_per_kind=True)
        if self.text is not None:
            rng = np.random.default_rng([self.seed, self.epoch, index])
            statuses = np.where(rng.random(len(FINDINGS)) < self.flip, 1 - labels, labels)
            if self.places is not None and name not in self.places:
                raise UserError(
                    f"{self.annotation}: id {name} has no row in the places file; make that file from these "
                    "data with studies/dia_pangu/pretrain_vit.py"
                )
            where = self.places and {
                finding: at for finding, at in self.places[name].items() if rng.random() >= self.hide_places
            }
            out["text"] = self.text.sample(statuses, report, name, where)
        if self.patches is not None:
            out["patch_labels"] = patch_labels(
                self.path(name, self.data / "masks"), self.grid, self.patches, self.cache
            )
        return out

    def __getitem__(self, index: int) -> dict:
        try:
            return self.sample(index)
        except UserError as error:
            return {"error": str(error), "index": index}

    def drop_bad(self, workers: int = 0):
        """Read every sample once, which fills the cache, and leave out those that cannot be used."""
        # Its own generator, so that checking does not change what the training draws afterwards.
        loader = DataLoader(self, batch_size=None, num_workers=workers, generator=torch.Generator())
        bad = {}
        for sample in progress(loader, desc=f"checking {self.split}"):
            if "error" in sample:
                bad[sample["index"]] = sample["error"]
        for message in list(bad.values())[:5]:
            print(f"skipped: {message}")
        if len(bad) == len(self.items):
            raise UserError(
                f"{self.data}: all {len(bad)} samples of {self.split} are unusable; the first: {bad[0]}"
            )
        print(f"{self.split}: {len(bad)} of {len(self.items)} samples skipped")
        self.skipped = {self.items[i]["id"]: message for i, message in bad.items()}
        self.items = [item for i, item in enumerate(self.items) if i not in bad]


def raise_bad(batch: dict):
    """Raise UserError if a sample of a collated batch could not be read."""
    if "error" in batch:
        raise UserError(batch["error"])


def collate(samples: list[dict]) -> dict:
    """Join samples to a batch; the text is padded on the right to the longest of the batch."""
    errors = [sample["error"] for sample in samples if "error" in sample]
    if errors:
        return {"error": errors[0]}
    batch = {
        key: [s[key] for s in samples] for key in ("id", "path", "report", "verdict") if key in samples[0]
    }
    for key in ("vision_x", "cls_labels", "patch_labels"):
        if key in samples[0]:
            batch[key] = torch.stack([sample[key] for sample in samples])
    if "text" in samples[0]:
        batch |= pad_texts([sample["text"] for sample in samples])
    return batch
