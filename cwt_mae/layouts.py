"""Which files hold recordings, and whose they are: names, subjects, parts and labels.

A recording's name is its path relative to the data root, without suffix: two files never share one. The
subject is, in this order, what the manifest says, what the tables of a known database say, what the file
says, the innermost folder called like a person (patient001, Person_01, p10000032, sub-01), else the name.

    manifest csv      path, subject, fold, fs, label, label_<name>: see `read_manifest`
    PTB-XL            ptbxl_database.csv, scp_statements.csv: patients, folds, six levels of labels
    CODE-15           exams.csv beside exams_part*.hdf5
    MIMIC-IV-ECG      record_list.csv, or files/p1000/p10000032/s.../
    Sleep-EDF         SC4ssNE0-PSG.edf with SC4ssNEC-Hypnogram.edf
    PhysioNet Challenge, MIT-BIH, PTB, ECG-ID    by their headers and folders
"""

import ast
import csv
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.files import reading
from common.index import expand, scan
from cwt_mae.recording import Recording, check_rate
from cwt_mae.text import read_text

# What a folder is searched for; the readers stand in dataset.py's READERS
SUFFIXES = ".hea .edf .bdf .dcm .npz .npy .csv .tsv .h5 .hdf5 .ts .arff .tar".split()
PERSON = re.compile(r"(?i)(p|pat|patient|person|subject|subj|sub|participant)[-_ ]?\d+[a-z]?$")
# Tables that accompany recordings and are none themselves
TABLES = {
    f"{name}.csv"
    for name in "ptbxl_database scp_statements exams record_list records reference waveform_note_links "
    "machine_measurements machine_measurements_data_dictionary conditionnames_snomed-ct dx_mapping_scored "
    "dx_mapping_unscored".split()
}
SLEEP = re.compile(r"((SC4|ST7)\d\d)\d[A-Z]\w-(PSG|Hypnogram)$")
PARTS = {"": "", "test": "test", "testing": "test", "train": "train", "training": "train"}
PARTS |= dict.fromkeys(("val", "valid", "validation", "dev", "验证", "验证集"), "val")
PARTS |= {"训练": "train", "训练集": "train", "测试": "test", "测试集": "test"}
YES, NO = ("1", "1.0", "true", "yes", "y", "t", "是"), ("", "0", "0.0", "false", "no", "n", "f", "nan", "否")
LEVELS = ("all", "diagnostic", "subdiagnostic", "superdiagnostic", "form", "rhythm")  # of PTB-XL


@dataclass
class About:
    """What tables say about one recording; None or {} where they are silent."""

    subject: str | None = None
    part: str | None = None
    labels: dict = field(default_factory=dict)


@dataclass
class Found:
    """Files of recordings below a root: [(path, name)], what tables say, {name: About}, and rates in Hz that
    a manifest states, {name of a file: rate}."""

    files: list
    about: dict
    manifest: bool = False
    rates: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)

    def describe(self, record: Recording, name: str) -> Recording | None:
        """Give a recording read from the file called `name` its full name, subject, part and labels.

        None: a manifest is given and does not list it.
        """
        folder, inner = name.rpartition("/")[0], record.name.removeprefix(record.source.stem)
        record.name, plain = name + inner, name_of(name) + inner
        keys = (name + inner, plain, name, name_of(name))  # as a manifest, and as a table calls it
        about = next((self.about[key] for key in keys if key in self.about), None)
        if about is None and self.manifest:
            return None
        about = about or About()
        own = record.subject
        if record.series and own:
            own = f"{folder}/{own}" if folder else own
        record.subject = about.subject or own or person_of(record.source, plain) or plain
        record.part = record.part if about.part is None else about.part
        record.labels = record.labels | about.labels
        return record


def person_of(path: Path, name: str) -> str:
    """The innermost folder of a relative name that is called like a person, with the folders above it; "" if
    none is."""
    folders = name.split("/")[:-1]
    for depth in range(len(folders), 0, -1):
        if PERSON.match(folders[depth - 1]):
            return "/".join(folders[:depth])
    # A file that was given alone, out of the folder of its person
    if not folders and PERSON.match(parent := path.resolve().parent.name):
        return parent
    sleep = SLEEP.match(path.stem)
    return sleep[1] if sleep else ""


def name_of(path) -> str:
    """A path as a name: with slashes, without the suffix of a signal file."""
    text = path if isinstance(path, str) else path.as_posix()
    stem, suffix = os.path.splitext(text)
    return stem if suffix.lower() in SUFFIXES else text


def find_files(sources) -> list[Path]:
    """Signal files of `sources` (files and folders, searched downwards), sorted."""
    return [path for path, _ in find_recordings(sources).files]


def find_recordings(sources, manifest=None) -> Found:
    """Signal files of `sources`, named relative to their common root, with what manifest and tables say of
    them."""
    sources = [Path(source) for source in expand(sources)]
    for source in sources:
        if not source.exists():
            raise UserError(f"{source}: no such file or folder; check --data")
    root = common_root(sources)
    given = {source for source in sources if source.is_file()}
    paths, tables = [], []
    for source in sources:
        inside = [Path(file.path) for file in scan([source], ("",))] if source.is_dir() else [source]
        for path in inside:
            if of_store(path):
                continue
            table = path.name.lower() in TABLES
            if table:
                tables.append(path)
            if path in given or path.suffix.lower() in SUFFIXES and not table:
                paths.append(path)
    listed = Path(manifest).resolve() if manifest else None
    paths = [p for p in dict.fromkeys(paths) if listed is None or p.resolve() != listed]
    paths = without_parts(paths, given)
    names = [relative(p, root) for p in paths]
    # Files that differ in the suffix alone keep it in their names; their subject is the same.
    counts = Counter(names)
    names = [f"{n}{p.suffix}" if counts[n] > 1 else n for n, p in zip(names, paths)]
    found = Found(list(zip(paths, names)), {}, bool(manifest))
    known = {"ptbxl_database.csv": ptb_xl, "exams.csv": code_15, "record_list.csv": mimic}
    for table in tables:
        if read := known.get(table.name.lower()):
            read(found, table, root)
    if manifest:
        read_manifest(found, Path(manifest), root)
    if not found.files:
        raise UserError(f"{', '.join(map(str, sources))}: holds no signal file ({', '.join(SUFFIXES)})")
    return found


def of_store(path: Path) -> bool:
    """Whether a file is part of a store of prepared signals, which may lie below --data."""
    return path.suffix == ".npy" and (path.parent / "about.json").is_file()


def common_root(sources: list[Path]) -> Path:
    """The folder that names are relative to: the source itself, or what several have in common."""
    folders = [source if source.is_dir() else source.parent for source in (s.resolve() for s in sources)]
    root = folders[0]
    while not all(folder.is_relative_to(root) for folder in folders):
        root = root.parent
    return root


def relative(path: Path, root: Path) -> str:
    """Name of a file relative to the root; links inside the root keep their own name."""
    top = f"{root}/".replace("//", "/")
    for place in (path.absolute, path.resolve):
        if (text := str(place())).startswith(top):
            return name_of(text[len(top) :])
    return name_of(text[1:])


def without_parts(paths: list[Path], given: set) -> list[Path]:
    """Leave out files that belong to another: segments of a multi-segment record, and hypnograms."""
    segments = set()
    for path in paths:
        if path.suffix.lower() != ".hea":
            continue
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = (line for line in file if line.strip() and line[0] != "#")
            if "/" in next(lines, "-").split()[0]:
                segments |= {path.with_name(f"{line.split()[0]}.hea") for line in lines}
    return [p for p in paths if p in given or p not in segments and not p.stem.endswith("-Hypnogram")]


def hypnogram_of(path: Path) -> Path | None:
    """The file of sleep stages that belongs to a recording of Sleep-EDF, or None."""
    if not SLEEP.match(path.stem) or not path.stem.endswith("-PSG"):
        return None
    return next(iter(sorted(path.parent.glob(f"{path.stem[:7]}?-Hypnogram{path.suffix}"))), None)


def rows_in(table: Path, needed: list) -> list[tuple[int, dict]]:
    """[(number of its last line, row)] of a csv file with a header; UserError naming a column that is
    missing."""
    lines = read_text(table).split("\n")
    reader = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count))
    with reading(table, "csv table"):
        head, *rows = ((row, reader.line_num) for row in reader)
    names = [name.strip() for name in head[0]]
    for name in needed:
        if name not in names:
            raise UserError(f"{table}: has no column {name}; it has {', '.join(names)}")
    return [(number, dict(zip(names, [*row, *[""] * len(names)]))) for row, number in rows if any(row)]


def applies(table: Path, number: int, row: dict, column: str) -> bool:
    """Whether a label's column says yes; UserError where it says neither yes nor no."""
    word = row[column].strip().lower()
    if word not in YES and word not in NO:
        raise UserError(f"{table}: line {number}: field {column} is {row[column]!r}, expected 1 or 0")
    return word in YES


def ptb_xl(found: Found, table: Path, root: Path):
    """Patients, folds and labels of PTB-XL. Of an ECG at both rates the one at 500 Hz is taken."""
    statements = {}
    if (table.parent / "scp_statements.csv").is_file():
        listed = rows_in(table.parent / "scp_statements.csv", ["diagnostic", "form", "rhythm"])
        statements = {next(iter(row.values())): row for _, row in listed}
    rows = rows_in(table, ["patient_id", "scp_codes", "strat_fold", "filename_lr", "filename_hr"])
    have, drop = {name for _, name in found.files}, set()
    base = relative(table.parent / "x", root)[:-1]
    for number, row in rows:
        try:
            codes = ast.literal_eval(row["scp_codes"])
            fold, patient = int(float(row["strat_fold"])), row["patient_id"].removesuffix(".0")
            codes = {str(code): float(weight) for code, weight in codes.items()}
        except (ValueError, SyntaxError, AttributeError) as error:
            raise UserError(f"{table}: line {number}: {error}; copy the file again") from error
        about = About(f"ptb-xl/{patient}", "train" if fold <= 8 else "val" if fold == 9 else "test")
        about.labels = scp_levels(codes, statements)
        names = [base + name_of(Path(row[key])) for key in ("filename_hr", "filename_lr")]
        found.about |= dict.fromkeys(names, about)
        if set(names) <= have:
            drop.add(names[1])
    found.files = [(path, name) for path, name in found.files if name not in drop]
    if drop:
        found.notes.append(
            f"PTB-XL: {len(drop)} ECGs stand there at both rates; those at 100 Hz are left out"
        )


def scp_levels(codes: dict, statements: dict) -> dict:
    """{level: names} of the codes of one ECG, as PTB-XL's own tables group them."""
    levels = {level: set() for level in LEVELS}
    levels["all"] = set(codes)
    for code in codes:
        row = statements.get(code, {})
        for kind in ("diagnostic", "form", "rhythm"):
            if row.get(kind) and float(row[kind]):
                levels[kind].add(code)
        if code in levels["diagnostic"]:
            levels["superdiagnostic"].add(row.get("diagnostic_class") or "")
            levels["subdiagnostic"].add(row.get("diagnostic_subclass") or "")
    return {level: sorted(names - {""}) for level, names in levels.items()}


def code_15(found: Found, table: Path, root: Path):
    """Patients and six diagnoses of CODE-15; the recordings are rows of exams_part*.hdf5."""
    classes = ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF")
    rows = rows_in(table, ["exam_id", "patient_id", "trace_file", *classes])
    base = relative(table.parent / "x", root)[:-1]
    for number, row in rows:
        on = [name for name in classes if applies(table, number, row, name)]
        about = About(f"code-15/{row['patient_id']}", labels={"": on or ["normal"]})
        found.about[f"{base}{name_of(Path(row['trace_file']))}:{row['exam_id']}"] = about


def mimic(found: Found, table: Path, root: Path):
    """Patients of MIMIC-IV-ECG."""
    base = relative(table.parent / "x", root)[:-1]
    for _, row in rows_in(table, ["subject_id", "path"]):
        found.about[base + name_of(Path(row["path"]))] = About(f"mimic-iv/{row['subject_id']}")


def read_manifest(found: Found, manifest: Path, root: Path):
    """Apply a manifest: a csv with the column path and any of subject, fold, fs, label and label_<name>.

    path: relative to the manifest's folder or to the data root, with or without suffix; `file:inner` names a
    recording inside a file, whose fs is the file's. fold: train, val or test, or numbers, of which the last
    tests and the last but one validates; empty: no part. label: names with ; between them (or | or 、);
    label_<name>: 1 where it applies. What the manifest does not list is left out.
    """
    rows, about, listed = rows_in(manifest, ["path"]), {}, set()
    if not rows:
        raise UserError(f"{manifest}: lists no recording; add a line for each")
    folds = parts_of(manifest, [(f"line {number}", row.get("fold", "")) for number, row in rows])
    # A file is known by its place, with and without suffix, and by its name.
    names = {name for _, name in found.files}
    known = {os.path.abspath(place): name for path, name in found.files for place in (name_of(path), path)}
    for (number, row), part in zip(rows, folds):
        path = row["path"].strip()
        inner = path.rpartition(":")[2] if ":" in path else ""
        file = path.removesuffix(f":{inner}") if inner else path
        plain = name_of(Path(file))
        written = (file, plain, file.replace("\\", "/"))  # the last as Windows writes it
        places = (os.path.abspath(manifest.parent / place) for place in written)
        name = next((known[place] for place in places if place in known), None)
        name = name or next((n for n in (path, plain, name_of(written[2])) if n in names), None)
        if name is None:
            raise UserError(f"{manifest}: line {number}: {path} is no signal file below --data")
        tail = f":{inner}" if inner else ""
        key, plain = name + tail, name_of(name) + tail
        if key in about:
            raise UserError(f"{manifest}: line {number}: {path} is listed twice")
        if rate := row.get("fs", "").strip():
            rate = check_rate(rate, f"{manifest}: line {number}")
            if found.rates.setdefault(name, rate) != rate:
                raise UserError(
                    f"{manifest}: line {number}: field fs is {rate:g} Hz, another line of this file says "
                    f"{found.rates[name]:g}; leave fs empty where the file states its rates"
                )
        labels = [v.strip() for v in re.split("[;|；｜、]", row.get("label", "")) if v.strip()]
        named = [c for c in row if c.startswith("label_")]
        labels += [c[6:] for c in named if applies(manifest, number, row, c)]
        stated = bool(named) or "label" in row
        subject = row.get("subject", "").strip() or None
        said = About(subject, part if "fold" in row else None, {"": labels} if stated else {})
        about[key] = merged(found.about.get(key) or found.about.get(plain), said)
        listed.add(name)
    # What a table says of a recording inside a file that is listed as a whole
    for key, old in found.about.items():
        if key not in about and (file := key.rpartition(":")[0]) in about:
            about[key] = merged(old, about[file])
    left_out = names - listed
    if left_out:
        found.notes.append(f"{manifest}: {len(left_out)} files that it does not list are left out")
    found.files = [(path, name) for path, name in found.files if name not in left_out]
    found.about = about


def merged(old: About | None, new: About) -> About:
    """What the manifest says, and where it is silent what a table said."""
    if old is None:
        return new
    part = old.part if new.part is None else new.part
    return About(new.subject or old.subject, part, old.labels | new.labels)


def parts_of(source, folds: list[tuple[str, str]], field: str = "fold") -> list[str]:
    """The part of each (place in the source, fold): by its word, or by its number."""
    words = [fold.strip().lower() for _, fold in folds]
    if all(word in PARTS for word in words):
        return [PARTS[word] for word in words]
    whole = re.compile(r"-?\d+(\.0*)?")
    odd = [i for i, word in enumerate(words) if word and not whole.fullmatch(word)]
    if odd:  # beside words it knows, or beside numbers
        place, fold = folds[next((i for i in odd if words[i] not in PARTS), odd[0])]
        raise UserError(
            f"{source}: {place}: field {field} is {fold!r}, expected train, val, test, or numbers alone"
        )
    values = [int(float(word)) if word else None for word in words]
    order = sorted(set(values) - {None})
    if len(order) < 2:
        raise UserError(
            f"{source}: field {field} has one value, {order[0]}; two are needed, to train and to test"
        )
    names = dict.fromkeys(order, "train") | {order[-1]: "test", None: ""}
    if len(order) > 2:
        names[order[-2]] = "val"
    return [names[value] for value in values]


def add_file_arguments(group):
    """Options that say how files are read, the same in every script; `dataset.read_store` follows them."""
    group.add_argument(
        "--manifest", help="csv of recordings: path, and subject, fold, fs, label, label_<name> where known"
    )
    group.add_argument(
        "--annotator", default="", help="suffix of the annotation files of WFDB records, such as atr or qrs"
    )
    group.add_argument("--input-fs", type=float, help="sampling rate of files that do not state it, Hz")
    group.add_argument("--cache", help="folder for the prepared signals; data/cwt_mae/cache without it")
    group.add_argument(
        "--skip-bad", action="store_true", help="leave out bad records and labels, counted, and go on"
    )


def add_split_argument(group):
    """The option that says which records train and which test (`dataset_finetune.split_parts`)."""
    group.add_argument(
        "--split",
        "--split-file",
        help="JSON file {train: [names], test: [names]}; without it the parts that the data state, else the "
        "list DS1 for training and every other record for the test",
    )


def tell(notes: list):
    """Print remarks about what was left out."""
    for note in notes:
        print(note, file=sys.stderr)
