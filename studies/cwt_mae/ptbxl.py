"""Twelve-lead ECG with several labels in the files of PTB-XL: train on folds 1 to 8, choose on 9, report 10.

    python studies/cwt_mae/ptbxl.py --out runs/cwt_mae/ptbxl                  # made-up records
    python studies/cwt_mae/ptbxl.py --out runs/cwt_mae/ptbxl --data ptb-xl    # the real set, with records100

Without --data it draws small records with the names, tables and patients of PTB-XL: the layout is real, the
hearts are not, and what comes out says that the path works, nothing about PTB-XL. The controls are the same
encoder with random weights, and a random forest on plain numbers of each lead.
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
from sklearn.ensemble import RandomForestClassifier

from common.arguments import Parser, number
from common.checkpoint import atomic_dir
from common.files import read_json
from cwt_mae.dataset import Preprocess, build_store
from cwt_mae.dataset_finetune import DownstreamClassificationDataset, load_task, split_parts
from cwt_mae.finetune import by_record
from cwt_mae.make_data import draw_ecg
from cwt_mae.metrics import label_scores
from cwt_mae.readers import LEADS, extra
from studies.recipe import ROOT, recipe, size, stage
from studies.summary import write_result

# 10 s at 50 Hz in patches of 0.2 s, as config_small.yaml has them
WINDOW = dict(model_fs=50, channel=",".join(LEADS))
STEPS = 400  # of pre-training
# How the heart's own axis (P, QRS, T) appears in each lead: the made-up leads differ in sign and height.
WEIGHTS = [0.7, 1.0, 0.4, -0.9, 0.3, 0.7, -0.5, 0.2, 0.6, 1.0, 1.1, 0.9]
# code: (description, kind, superclass)
STATEMENTS = {
    "NORM": ("normal ECG", "diagnostic", "NORM"),
    "AMI": ("anterior infarction", "diagnostic", "MI"),
    "CLBBB": ("left bundle branch block", "diagnostic", "CD"),
    "SR": ("sinus rhythm", "rhythm", ""),
    "AFIB": ("atrial fibrillation", "rhythm", ""),
    "LVOLT": ("low voltage", "form", ""),
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder of PTB-XL; without it records are drawn")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; results go to the folder above it"
    )
    parser.add_argument("--level", default="superdiagnostic", help="which level of labels")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="random seed of records and training")
    return parser.parse_args(argv)


def draw_record(rng, fs: int, seconds: float = 10.0):
    """(12 leads (L, 12) in mV, {code: likelihood}) of one made-up heart."""
    signal, notes = draw_ecg(rng, max(60.0, seconds), fs)
    rhythm = notes[0][2].strip("(")
    x = signal[: int(seconds * fs), None] * np.array(WEIGHTS) * rng.uniform(0.8, 1.2, 12)
    codes = {"AFIB" if rhythm == "AFIB" else "SR": 0.0}
    infarct, block = rng.random() < 0.3, rng.random() < 0.3
    if infarct:  # the front wall is silent: V1 to V4 turn over
        x[:, 6:10] *= -0.6
        codes["AMI"] = 100.0
    if block:  # the left ventricle is late: V5, V6, I and aVL are smeared
        width = int(0.12 * fs)
        for lead in (0, 4, 10, 11):
            x[:, lead] = np.convolve(x[:, lead], np.ones(width) / width, "same")
        codes["CLBBB"] = 100.0
    if not infarct and not block:
        codes["NORM"] = 80.0
    if rng.random() < 0.2:
        x[:, :6] *= 0.3
        codes["LVOLT"] = 0.0
    return x + 0.02 * rng.standard_normal(x.shape), codes


def draw(folder: Path, patients: int, seed: int):
    """Write a small data set with PTB-XL's names: records100, ptbxl_database.csv, scp_statements.csv."""
    wfdb = extra("wfdb", folder)
    with atomic_dir(folder) as home:
        rows, number = [], 0
        for patient in range(patients):
            rng = np.random.default_rng((seed, patient))
            for _ in range(1 + (rng.random() < 0.4)):
                number += 1
                name = f"{number // 1000 * 1000:05d}/{number:05d}"
                x, codes = draw_record(rng, 100)
                place = home / "records100" / name.split("/")[0]
                place.mkdir(parents=True, exist_ok=True)
                units, fmt = ["mV"] * 12, ["16"] * 12
                wfdb.wrsamp(f"{number:05d}_lr", 100, units, LEADS, x, fmt=fmt, write_dir=str(place))
                rows.append(
                    {
                        "ecg_id": number,
                        "patient_id": f"{10000 + patient}.0",
                        "scp_codes": str(codes),
                        "strat_fold": patient % 10 + 1,
                        "filename_lr": f"records100/{name}_lr",
                        "filename_hr": f"records500/{name}_hr",
                    }
                )
        with open(home / "ptbxl_database.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        lines = [",description,diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass"]
        for code, (text, kind, group) in STATEMENTS.items():
            marks = ["1.0" if kind == k else "" for k in ("diagnostic", "form", "rhythm")]
            lines.append(",".join([code, text, *marks, group, group and code]))
        (home / "scp_statements.csv").write_text("\n".join(lines) + "\n")


def forest(data, level: str, seed: int, draws: int) -> dict:
    """Scores of fold 10 by a random forest on quantiles, and on mean and largest change, of each lead."""
    store = build_store([data], Preprocess(WINDOW["model_fs"], channel=WINDOW["channel"]))
    length = round(10 * WINDOW["model_fs"])
    task, parts = load_task(store, "labels", length, level=level), split_parts(store)
    train, test = (task.select(parts[task.items["record"]] == part) for part in ("train", "test"))

    def numbers(part):
        dataset = DownstreamClassificationDataset(store, part, length)
        x = np.stack([dataset[i]["x"].numpy() for i in range(len(part.items))])  # (windows, leads, samples)
        change = np.abs(np.diff(x, axis=2))
        quantiles = np.quantile(x, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1), axis=2)
        return np.concatenate([*quantiles, change.mean(2), change.max(2)], 1)

    x, test_x = numbers(train), numbers(test)
    found = np.zeros(test.targets.shape)
    for c in range(len(task.classes)):
        trees = RandomForestClassifier(size(200, smoke=5), random_state=seed)
        trees.fit(x, train.targets[:, c])
        if len(trees.classes_) == 2:
            found[:, c] = trees.predict_proba(test_x)[:, 1]
    mean, targets, rows = by_record(found, store, test)
    return label_scores(mean, targets, task.classes, store.records["subject"][rows], draws)


def main(args):
    data, out, draws = args.data, args.out, size(1000, smoke=20)  # of patients, for the intervals
    if data is None:
        data = out / "data"
        draw(data, size(300, smoke=40), args.seed)
    common = dict(data=data, seed=args.seed, overwrite=True, threads=1)

    # Pre-training on folds 1 to 8: the tables keep 9 and 10 out of it
    small = size(None, smoke=["depth=1", "embed_dim=16", "decoder_embed_dim=16"])
    sizes = dict(
        WINDOW, config=ROOT / "cwt_mae" / "config_small.yaml", set=small, windows=size(1600, smoke=32)
    )
    steps = dict(batch_size=16, lr=2e-3, max_steps=size(STEPS, smoke=3), eval_windows=size(256, smoke=4))
    stage("cwt_mae/train.py", **common, **sizes, **steps, log_every=50, out=out / "base")

    # Fine-tuning, chosen on fold 9; the same from random weights; both reported on fold 10
    found = {}
    for name in ("tuned", "random"):
        random, base = name == "random", out / "base" / "model.safetensors"
        start = dict(pretrained=base, random_init=random, layer_decay=1 if random else 0.75)
        steps = dict(batch_size=16, lr=1e-3, max_steps=size(200, smoke=3), eval_every=size(50, smoke=3))
        run = dict(common, task="labels", level=args.level, head="mlp", out=out / name)
        stage("cwt_mae/finetune.py", **run, **start, **steps)
        model = out / name / "model.safetensors"
        scored = dict(data=data, resamples=draws, overwrite=True, threads=1, out=out / f"{name}-test")
        stage("cwt_mae/test.py", model=model, **scored)
        found[name] = read_json(out / f"{name}-test" / "metrics.json")
    found["forest"] = forest(data, args.level, args.seed, draws)
    ours = found["tuned"]
    print(
        json.dumps(
            {name: [value["macro_auroc"], value.get("macro_auroc_95")] for name, value in found.items()}
        )
    )
    write_result(
        out.parent,
        "PTB-XL" if args.data else "made-up records in PTB-XL's files",
        f"macro-AUROC of {args.level}",
        ours["macro_auroc"],
        {
            "random weights, fine-tuned": found["random"]["macro_auroc"],
            "random forest, plain numbers of each lead": found["forest"]["macro_auroc"],
            "the same for every record": 0.5,
        },
        interval=ours.get("macro_auroc_95"),
        note=f"12 leads; folds 1 to 8 train, 9 chooses, 10 is reported: {ours['records']} records. The "
        f"interval is a bootstrap over patients. F_max {ours['f_max']:.3f}.",
    )


if __name__ == "__main__":
    recipe(main, parse_args())
