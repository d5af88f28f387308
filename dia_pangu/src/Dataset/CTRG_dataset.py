"""CTRG-Chest-548K as published: volumes, reports in two languages, finding labels. Upstream: src/Dataset/my_dataset.

    <data>/annotation.json (Chinese), annotation_en.json (English); other names: annotation*.json
    <data>/CTRG_finding_labels.csv; other names: *finding_labels*.csv
    <data>/volumes/<id>.nii.gz, or <data>/<id>.nii.gz; a DICOM series is a folder <id>

The split is the partition that holds an item; the item's own field `split` contradicts it in the published file.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.files import read_json, reading
from common.run import progress
from dia_pangu.src.Dataset.preprocess import Grid, load_volume, patch_labels
from dia_pangu.src.Dataset.prompt import COLUMNS, FINDINGS, ReportText

SPLITS = ("train", "val", "test")
CODES = {
    "0": 0,
    "0.0": 0,
    "": 0,
    "1": 1,
    "1.0": 1,
    "2": 2,
    "2.0": 2,
    "3": 3,
    "3.0": 3,
}  # blank, present, absent, uncertain


def find_one(folder: Path, names, what: str) -> Path:
    """The first of `names` (globs) that is in `folder`."""
    for name in names:
        found = sorted(folder.glob(name))
        if found:
            return found[0]
    raise UserError(
        f"{folder}: no {what} (looked for {', '.join(names)}); give the folder of the data with --data"
    )


def read_annotation(folder, language: str) -> tuple[Path, dict]:
    """(file, {split: [item, ...]}); every item has a string id and a finding."""
    names = (
        ("annotation_en.json", "annotation_*.json")
        if language == "en"
        else ("annotation.json", "annotation_cn.json")
    )
    path = find_one(Path(folder), (*names, "annotation*.json"), "annotation")
    content = read_json(path, {f"{split}?": [{"id": (str, int), "finding?": str}] for split in SPLITS})
    if not any(split in content for split in SPLITS):
        raise UserError(f"{path}: expected an object with the lists {', '.join(SPLITS)}")
    for item in (item for split in SPLITS for item in content.get(split) or []):
        item["id"] = str(item["id"])
    return path, content


def read_labels(folder) -> tuple[Path, dict]:
    """(file, {id: 14 codes 0 blank, 1 present, 2 absent, 3 uncertain})."""
    path = find_one(Path(folder), ("CTRG_finding_labels.csv", "*finding_labels*.csv"), "label csv")
    with reading(path, "csv file"), open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        fields = [str(field).strip() for field in reader.fieldnames or []]
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
            labels[str(row["id"]).strip()] = [CODES[code] for code in codes]
    return path, labels


def read_places(path) -> dict:
    """{id: {finding: (side, place)}} as pretrain_vit.py writes it."""
    places = read_json(path, dict)
    with reading(path, "places file of pretrain_vit.py"):
        return {
            name: {finding: (side, place) for finding, (side, place) in found.items()}
            for name, found in places.items()
        }


class CTRGDataset(Dataset):
    """One sample: vision_x (1, 3, H, W, D) float32 in [0, 1], cls_labels (14,), and ids of prompt and report.

    text: writes the prompt. flip: share of statuses in the training prompt that are turned over, as the model's own
    diagnosis will be wrong at test time; drawn from (seed, epoch, index). patches: size of a patch in voxels (H, W, D), for
    patch_labels (n_tok, 14) from masks/. places: as `read_places`; the prompt then names side and place of what is present, but for a share
    `hide_places` of the findings, drawn like the flips: what the prompt leaves out, the report has to take from the image tokens.
    Bad inputs raise UserError; inside a loader they come as {"error": message}, so that a worker's error stays one line.
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
        self.flip, self.seed, self.patches, self.vision, self.epoch = flip, seed, patches, vision, 0
        self.places, self.hide_places = places, hide_places
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
        self.epoch = epoch

    def path(self, name: str, folder: Path | None = None) -> Path:
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{self.annotation}: id {name!r} is not a plain name")
        folder = folder or self.folder
        options = [folder / f"{name}.nii.gz", folder / f"{name}.nii", folder / name]
        return next((path for path in options if path.exists()), options[0])

    def codes(self, name: str) -> list[int]:
        if name not in self.labels:
            raise UserError(f"{self.label_file}: id {name} of {self.annotation.name} has no row")
        return self.labels[name]

    def statuses(self, index: int) -> np.ndarray:
        """14 labels, 1 where the code says present."""
        return (np.array(self.codes(self.items[index]["id"])) == 1).astype(np.int64)

    def check(self):
        """UserError for the first item without report, label row or volume file; what a volume holds shows when it is read."""
        for item in self.items:
            self.report(item), self.codes(item["id"])
            if self.vision and not self.path(item["id"]).exists():
                raise UserError(
                    f"{self.path(item['id'])}: no such volume, but {self.annotation} names it; or pass --skip-bad"
                )

    def report(self, item: dict) -> str:
        if not (item.get("finding") or "").strip():
            raise UserError(
                f"{self.annotation}: {self.split} id {item['id']}: field finding is missing or empty"
            )
        return item["finding"]

    def sample(self, index: int) -> dict:
        item = self.items[index]
        name, report = item["id"], self.report(item)
        labels = self.statuses(index)
        out = {"id": name, "report": report, "cls_labels": torch.from_numpy(labels)}
        if self.vision:
            out["vision_x"] = load_volume(self.path(name), self.grid, self.cache)[None]
        if self.text is not None:
            rng = np.random.default_rng([self.seed, self.epoch, index])
            said = np.where(rng.random(len(FINDINGS)) < self.flip, 1 - labels, labels)
            if self.places is not None and name not in self.places:
                raise UserError(
                    f"{self.annotation}: id {name} has no row in the places file; run pretrain_vit.py on these data"
                )
            where = self.places and {
                finding: at for finding, at in self.places[name].items() if rng.random() >= self.hide_places
            }
            out["text"] = self.text.sample(said, report, name, where)
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
        """Read every sample once, leave out those that cannot be used, and say how many (fills the cache on the way)."""
        loader = DataLoader(self, batch_size=1, num_workers=workers, collate_fn=lambda samples: samples[0])
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


def collate(samples: list[dict]) -> dict:
    """Samples to a batch; text is padded to the longest of this batch."""
    errors = [sample["error"] for sample in samples if "error" in sample]
    if errors:
        return {"error": errors[0]}
    batch = {key: [sample[key] for sample in samples] for key in ("id", "report")}
    for key in ("vision_x", "cls_labels", "patch_labels"):
        if key in samples[0]:
            batch[key] = torch.stack([sample[key] for sample in samples])
    if "text" in samples[0]:
        width = max(len(sample["text"]["lang_x"]) for sample in samples)
        fills = {"lang_x": 0, "attention_mask": 0, "labels": -100, "loss_reweight": 0.0}
        for key in samples[0]["text"]:
            rows = [
                sample["text"][key] + [fills[key]] * (width - len(sample["text"][key])) for sample in samples
            ]
            batch[key] = torch.tensor(rows)
    return batch
