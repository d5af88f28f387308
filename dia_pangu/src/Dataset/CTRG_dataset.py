"""CTRG-Chest-548K as published: volumes, reports in two languages, finding labels. Upstream: src/Dataset/my_dataset.

    <data>/annotation.json (Chinese), annotation_en.json (English); other names: annotation*.json
    <data>/CTRG_finding_labels.csv; other names: *finding_labels*.csv
    <data>/volumes/<id>.nii.gz, or <data>/<id>.nii.gz; a DICOM series is a folder <id>

The split is the partition that holds an item; the item's own field `split` contradicts it in the published file.
"""
import csv
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.run import progress
from dia_pangu.src.Dataset.preprocess import Grid, load_volume, patch_labels
from dia_pangu.src.Dataset.prompt import COLUMNS, FINDINGS, ReportText

SPLITS = ("train", "val", "test")
CODES = {"0": 0, "0.0": 0, "": 0, "1": 1, "1.0": 1, "2": 2, "2.0": 2, "3": 3, "3.0": 3}  # blank, present, absent, uncertain


def find_one(folder: Path, names, what: str) -> Path:
    """The first of `names` (globs) that is in `folder`."""
    for name in names:
        found = sorted(folder.glob(name))
        if found:
            return found[0]
    raise UserError(f"{folder}: no {what} (looked for {', '.join(names)}); give the folder of the data with --data")


def read_annotation(folder, language: str) -> tuple[Path, dict]:
    """(file, {split: [item, ...]}); every item has a string id and a finding."""
    names = ("annotation_en.json", "annotation_*.json") if language == "en" else ("annotation.json", "annotation_cn.json")
    path = find_one(Path(folder), (*names, "annotation*.json"), "annotation")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not any(split in content for split in SPLITS):
        raise UserError(f"{path}: expected an object with the lists {', '.join(SPLITS)}")
    for split, items in content.items():
        for i, item in enumerate(items):
            if not isinstance(item, dict) or "id" not in item:
                raise UserError(f"{path}: {split}[{i}] has no field id")
            item["id"] = str(item["id"])
    return path, content


def read_labels(folder) -> tuple[Path, dict]:
    """(file, {id: 14 codes 0 blank, 1 present, 2 absent, 3 uncertain})."""
    path = find_one(Path(folder), ("CTRG_finding_labels.csv", "*finding_labels*.csv"), "label csv")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        fields = [str(field).strip() for field in reader.fieldnames or []]
        missing = [column for column in ("id", *COLUMNS) if column not in fields]
        if missing:
            raise UserError(f"{path}: column {missing[0]} is missing; expected id and {', '.join(COLUMNS)}")
        labels = {}
        for line, row in enumerate(reader, 2):
            codes = [str(row[column] or "").strip() for column in COLUMNS]
            wrong = [f"{column} = {code!r}" for column, code in zip(COLUMNS, codes) if code not in CODES]
            if wrong:
                raise UserError(f"{path}: line {line}: {wrong[0]}; codes are 0 blank, 1 present, 2 absent, 3 uncertain")
            labels[str(row["id"]).strip()] = [CODES[code] for code in codes]
    return path, labels


class CTRGDataset(Dataset):
    """One sample: vision_x (1, 3, H, W, D) float32 in [0, 1], cls_labels (14,), and ids of prompt and report.

    text: writes the prompt. flip: share of statuses in the training prompt that are turned over, as the model's own
    diagnosis will be wrong at test time; drawn from (seed, epoch, index). patches: also patch_labels (n_tok, 14) from
    masks/, at `patch` voxels. test: the prompt is left out, because the model's own diagnosis belongs into it.
    Bad inputs raise UserError; inside a loader they come as {"error": message}, so that a worker's error stays one line.
    """

    def __init__(self, data, split: str, grid: Grid, text: ReportText | None = None, language: str = "en", cache=None,
                 flip: float = 0.0, seed: int = 0, patches=None, vision: bool = True, limit: int = 0):
        self.data, self.split, self.grid, self.text, self.cache = Path(data), split, grid, text, cache
        self.flip, self.seed, self.patches, self.vision, self.epoch = flip, seed, patches, vision, 0
        if not self.data.is_dir():
            raise UserError(f"{data}: no such data folder; make the built-in one with dia_pangu/make_data.py")
        self.annotation, partitions = read_annotation(self.data, language)
        self.label_file, self.labels = read_labels(self.data)
        if not partitions.get(split):
            raise UserError(f"{self.annotation}: partition {split} is empty")
        self.items = partitions[split][:limit or None]
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

    def sample(self, index: int) -> dict:
        item = self.items[index]
        name, report = item["id"], item.get("finding")
        if not isinstance(report, str) or not report.strip():
            raise UserError(f"{self.annotation}: {self.split} id {name}: field finding is missing or empty")
        labels = self.statuses(index)
        out = {"id": name, "report": report, "cls_labels": torch.from_numpy(labels)}
        if self.vision:
            out["vision_x"] = load_volume(self.path(name), self.grid, self.cache)[None]
        if self.text is not None:
            rng = np.random.default_rng([self.seed, self.epoch, index])
            said = np.where(rng.random(len(FINDINGS)) < self.flip, 1 - labels, labels)
            out["text"] = self.text.sample(said, report, name)
        if self.patches is not None:
            out["patch_labels"] = patch_labels(self.path(name, self.data / "masks"), self.grid, self.patches)
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
            raise UserError(f"{self.data}: all {len(bad)} samples of {self.split} are unusable; the first: {bad[0]}")
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
        for key, fill in (("lang_x", 0), ("attention_mask", 0), ("labels", -100)):
            rows = [sample["text"][key] + [fill] * (width - len(sample["text"][key])) for sample in samples]
            batch[key] = torch.tensor(rows)
    return batch
