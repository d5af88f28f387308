"""What a model has to beat: the most common report, the nearest neighbour, and a linear model on voxels.

    python studies/dia_pangu/baselines.py --data data/dia_pangu --size tiny --out runs/dia_pangu/baselines

Writes a CSV of reports for the first two, in the form of test.py, and baselines.json with the finding
scores. The linear model (PCA of the prepared voxels, then one logistic regression per finding) is fitted on
the training volumes; its thresholds are calibrated on validation, as the model's are.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from common.arguments import Parser, number
from common.checkpoint import atomic_csv, atomic_json
from common.errors import run
from common.run import progress
from dia_pangu.evaluate.findings import calibrate, finding_scores
from dia_pangu.evaluate.labeler import positives
from dia_pangu.src.Dataset.CTRG_dataset import SPLITS, CTRGDataset, raise_bad
from dia_pangu.src.Dataset.preprocess import PREPROCESS
from dia_pangu.src.Dataset.prompt import LANGUAGES
from dia_pangu.src.Model.build import SIZES, make_grid, read_config


def features(data: CTRGDataset, pool: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels of the lung and soft-tissue windows, averaged `pool` x `pool` in the plane, and the
    labels (N, 14)."""
    rows, labels = [], []
    for sample in progress(data, desc=f"voxels of {data.split}"):
        raise_bad(sample)
        pooled = F.avg_pool3d(sample["vision_x"][:, :2], (pool, pool, 1))
        rows.append(pooled.flatten().numpy().astype(np.float32))
        labels.append(sample["cls_labels"].numpy())
    return np.stack(rows), np.stack(labels)


def linear_model(train, val, test_voxels, parts: int, seed: int) -> np.ndarray:
    """Return the findings (N, 14) of the test volumes by PCA and one logistic regression per finding.

    train, val: (voxels, labels); PCA and regressions are fitted on train, the thresholds calibrated on val.
    """
    (x, y), (val_x, val_y) = train, val
    pca = PCA(min(parts, len(x) - 1), random_state=seed, svd_solver="randomized").fit(x)
    scale = pca.transform(x).std(0) + 1e-6
    x, val_x, test_x = (pca.transform(voxels) / scale for voxels in (x, val_x, test_voxels))
    val_p, test_p = np.zeros(val_y.shape), np.zeros((len(test_x), y.shape[1]))
    for c in range(y.shape[1]):
        if 0 < y[:, c].sum() < len(y):
            model = LogisticRegression(C=0.1, max_iter=500).fit(x, y[:, c])
            val_p[:, c], test_p[:, c] = model.predict_proba(val_x)[:, 1], model.predict_proba(test_x)[:, 1]
    return test_p >= np.array(calibrate(val_p, val_y))


def nearest_neighbours(train_voxels, voxels) -> list[int]:
    """Return the index of the training volume with the least squared distance, for each of `voxels` (N,
    features)."""
    square = (train_voxels**2).sum(1)
    return [int(np.argmin(square - 2 * train_voxels @ row)) for row in voxels]


def main(args):
    config = read_config(args)
    options = {"language": config["language"], "cache": args.cache, "limit": args.limit}
    sets = {split: CTRGDataset(args.data, split, make_grid(config), **options) for split in SPLITS}
    voxels, labels = {}, {}
    for split, data in sets.items():
        voxels[split], labels[split] = features(data, args.pool)

    # Two reports that need no model: the most common one, and that of the nearest training volume.
    reports = [item["finding"] for item in sets["train"].items]
    nearest = nearest_neighbours(voxels["train"], voxels["test"])
    truths = [item["finding"] for item in sets["test"].items]
    predictions = {
        "common": [Counter(reports).most_common(1)[0][0]] * len(truths),
        "nearest": [reports[i] for i in nearest],
    }
    truth, scores = positives(truths), {}
    for name, predicted in predictions.items():
        rows = [
            {
                "ID": item["id"],
                "Question": "",
                "Ground Truth": item["finding"],
                "Pred": report,
                "GT_labels": json.dumps(label.tolist()),
            }
            for item, report, label in zip(sets["test"].items, predicted, labels["test"])
        ]
        atomic_csv(Path(args.out) / f"{name}.csv", rows)
        scores[name] = {"report": finding_scores(truth, positives(predicted))}

    # Three diagnoses: the neighbour's labels, the linear model's, and everything present.
    scores["nearest"]["diagnosis"] = finding_scores(labels["test"], labels["train"][nearest])
    train, val = (voxels["train"], labels["train"]), (voxels["val"], labels["val"])
    predicted = linear_model(train, val, voxels["test"], args.parts, args.seed)
    scores["linear"] = {"diagnosis": finding_scores(labels["test"], predicted)}
    scores["all positive"] = {"diagnosis": finding_scores(labels["test"], np.ones_like(labels["test"]))}

    atomic_json(Path(args.out) / "baselines.json", scores)
    for name, kinds in scores.items():
        for kind, score in kinds.items():
            micro, macro = score["micro"]["F1"], score["macro"]["F1"]
            print(f"{name:14s} {kind:10s} micro-F1 {micro:.3f} macro-F1 {macro:.3f}")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="folder in the CTRG format")
    add("--out", required=True, help="folder to write")
    add("--size", choices=SIZES, default="tiny", help="grid of the voxels")
    add("--config", help="JSON file with the keys of dia_config.json, instead of --size")
    add("--language", choices=LANGUAGES, help="language of the reports, instead of the configuration's (en)")
    add("--preprocess", choices=PREPROCESS, help="preparation, instead of the configuration's (windows)")
    add("--cache", help="folder for prepared volumes")
    add("--limit", type=number(int, 0), default=0, help="use only the first samples; 0: all")
    add("--pool", type=number(int, 1), default=2, help="voxels averaged along H and along W")
    add("--parts", type=number(int, 1), default=100, help="principal components")
    add("--seed", type=number(int, 0), default=0, help="random seed of the PCA")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
