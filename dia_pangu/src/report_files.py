"""What test.py writes: a record of each scan, kept while a list is worked off, and their tables."""

import json
import os
from pathlib import Path

from common.checkpoint import atomic_csv, atomic_write
from common.errors import UserError
from common.files import reading

JOURNAL = "reports.jsonl"


class Journal:
    """The records of a run by scan: {"row", "ms", "findings", "verdict"}, the last with the key "error".

    kept: write every record to OUT/reports.jsonl at once, and begin with those that are there already.
    settings: what the reports depend on; records of other settings are refused.
    """

    def __init__(self, out: Path, settings: dict, kept: bool):
        self.out, self.records, self.file = Path(out), {}, None
        if not kept:
            return
        path = self.out / JOURNAL
        self.out.mkdir(parents=True, exist_ok=True)
        whole = []
        with reading(path, "list of reports that are done"):
            for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
                try:
                    whole.append(json.loads(line))
                except ValueError:
                    break  # the end, or the process was ended while it wrote this line
            before = whole[0] if whole else settings
            changed = ", ".join(name for name in settings if before.get(name) != settings[name])
            self.records = {record["id"]: record for record in whole[1:]}
        if changed:
            raise UserError(f"{path}: was written with another {changed}; choose another --out, or delete it")
        if self.records:
            print(f"{path}: {len(self.records)} scans are done already")
        # What was cut short is dropped; from here on a line is added for each scan.
        atomic_write(path, "".join(self.line(entry) for entry in [settings, *self.records.values()]))
        self.file = open(path, "a", encoding="utf-8")

    @staticmethod
    def line(entry: dict) -> str:
        """Return an entry as one line of JSON."""
        return json.dumps(entry, ensure_ascii=False) + "\n"

    def add(self, name: str, record: dict):
        """Keep the record of a scan."""
        self.records[name] = {"id": name, **record}
        if self.file is not None:
            self.file.write(self.line(self.records[name]))
            self.file.flush()
            os.fsync(self.file.fileno())

    def summary(self) -> str:
        """Return in words how many reports there are, and how long one took."""
        records = self.records.values()
        times = [record["ms"] for record in records if record["ms"] is not None]
        empty = sum(not record["row"]["Pred"] for record in records)
        each = sum(times) / max(1, len(times))
        return f"{self.out / 'dia-pangu.csv'}: {len(records)} reports, {empty} empty, {each:.0f} ms each"

    def write_tables(self):
        """Write the four tables; a scan without a report has a row in the first and in the last."""
        records = list(self.records.values())
        atomic_csv(self.out / "dia-pangu.csv", [record["row"] for record in records])
        timing = [{"ID": r["id"], "InferTimeMs": f"{r['ms']:.2f}"} for r in records if r["ms"] is not None]
        atomic_csv(self.out / "dia-pangu_timing.csv", timing)
        atomic_csv(self.out / "findings.csv", [row for record in records for row in record["findings"]])
        atomic_csv(self.out / "verdicts.csv", [record["verdict"] for record in records])


def weights_stamp(path) -> list:
    """Return what tells the weights of a checkpoint apart: the names, sizes and times of its files."""
    path = Path(path)
    kinds = ("*.bin", "*.safetensors", "*.json")
    files = sorted(file for kind in kinds for file in path.glob(kind)) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
