"""What a model has to beat: the most common report, the nearest neighbour by voxels, and a linear model on voxels.

    python dia_pangu/evaluate/baselines.py --data data/dia_pangu --size tiny --out runs/dia_pangu/baselines

Writes a csv of reports for the first two, in the form of test.py, and baselines.json with the finding scores. The linear model
(PCA of the prepared voxels, then one balanced logistic regression per finding) is fitted on the training volumes; its
thresholds are calibrated on validation, as the model's are.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # repository root: every way of starting this file finds it

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.run import progress
from dia_pangu.evaluate.findings import calibrate, finding_scores
from dia_pangu.evaluate.labeler import positives
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset
from dia_pangu.src.Model.build import SIZES, make_grid, read_config
from dia_pangu.src.test import write_csv


def features(data: CTRGDataset, pool: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of the soft-tissue and lung windows, averaged `pool` x `pool` in the plane, and the labels."""
    rows, labels = [], []
    for sample in progress(data, desc=f"voxels of {data.split}"):
        if "error" in sample:
            raise UserError(sample["error"])
        rows.append(
            F.avg_pool3d(sample["vision_x"][:, :2], (pool, pool, 1)).flatten().numpy().astype(np.float32)
        )
        labels.append(sample["cls_labels"].numpy())
    return np.stack(rows), np.stack(labels)


def linear(train, val, test, parts: int, seed: int):
    """Predicted findings of the test volumes by PCA and logistic regression."""
    (x, y), (vx, vy), (tx, _) = train, val, test
    pca = PCA(min(parts, len(x) - 1), random_state=seed, svd_solver="randomized").fit(x)
    scale = pca.transform(x).std(0) + 1e-6
    x, vx, tx = (pca.transform(part) / scale for part in (x, vx, tx))
    val_p, test_p = np.zeros(vy.shape), np.zeros((len(tx), y.shape[1]))
    for c in range(y.shape[1]):
        if 0 < y[:, c].sum() < len(y):
            model = LogisticRegression(C=0.1, max_iter=500).fit(x, y[:, c])
            val_p[:, c], test_p[:, c] = model.predict_proba(vx)[:, 1], model.predict_proba(tx)[:, 1]
    return test_p >= np.array(calibrate(val_p, vy))


def main(args):
    config = read_config(args)
    sets = [
        CTRGDataset(
            args.data,
            split,
            make_grid(config),
            language=config["language"],
            cache=args.cache,
            limit=args.limit,
        )
        for split in ("train", "val", "test")
    ]
    train, val, test = parts = [features(data, args.pool) for data in sets]
    reports = [item["finding"] for item in sets[0].items]
    common = Counter(reports).most_common(1)[0][0]
    square = (train[0] ** 2).sum(1)
    nearest = [int(np.argmin(square - 2 * train[0] @ row)) for row in test[0]]
    truths, names = [item["finding"] for item in sets[2].items], [item["id"] for item in sets[2].items]
    predictions = {"common": [common] * len(truths), "nearest": [reports[i] for i in nearest]}
    said = positives(truths)
    scores = {}
    for name, predicted in predictions.items():
        rows = [
            [i, "", truth, pred, json.dumps(label.tolist())]
            for i, truth, pred, label in zip(names, truths, predicted, test[1])
        ]
        write_csv(
            Path(args.out) / f"{name}.csv", ["ID", "Question", "Ground Truth", "Pred", "GT_labels"], rows
        )
        scores[name] = {"report": finding_scores(said, positives(predicted))}
    scores["nearest"]["diagnosis"] = finding_scores(test[1], train[1][nearest])
    scores["linear"] = {"diagnosis": finding_scores(test[1], linear(*parts, args.parts, args.seed))}
    scores["all positive"] = {"diagnosis": finding_scores(test[1], np.ones_like(test[1]))}
    atomic_write(Path(args.out) / "baselines.json", json.dumps(scores, indent=1))
    for name, kinds in scores.items():
        for kind, score in kinds.items():
            print(
                f"{name:14s} {kind:10s} micro-F1 {score['micro']['F1']:.3f} macro-F1 {score['macro']['F1']:.3f}"
            )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder in the CTRG format")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="grid of the voxels (default %(default)s)"
    )
    parser.add_argument("--config", help="JSON file with the keys of dia_config.json, instead of --size")
    parser.add_argument("--language", choices=("en", "cn"))
    parser.add_argument("--preprocess", choices=("windows", "upstream"))
    parser.add_argument("--cache", help="folder for prepared volumes")
    parser.add_argument("--limit", type=int, default=0, help="only the first samples of each split; 0: all")
    parser.add_argument(
        "--pool",
        type=int,
        default=2,
        help="voxels averaged along each side of the plane (default %(default)s)",
    )
    parser.add_argument("--parts", type=int, default=100, help="principal components (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args())
