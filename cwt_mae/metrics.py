"""Scores of a classifier with their intervals."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from common.intervals import bootstrap


def confusion(labels, predicted, classes: int) -> np.ndarray:
    """Counts (classes, classes): row = true class, column = predicted class."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_table(matrix: np.ndarray) -> np.ndarray:
    """Confusion matrix -> (classes, 3): precision, recall, F1; 0 where a class was never predicted or never
    occurs."""
    hits = np.diag(matrix).astype(float)
    precision, recall = hits / np.maximum(matrix.sum(0), 1), hits / np.maximum(matrix.sum(1), 1)
    return np.stack([precision, recall, 2 * hits / np.maximum(matrix.sum(0) + matrix.sum(1), 1)], 1)


def macro_f1(matrix: np.ndarray) -> float:
    """Mean F1 of the classes that occur or were predicted (as scikit-learn's macro average)."""
    seen = (matrix.sum(0) + matrix.sum(1)) > 0
    return float(class_table(matrix)[seen, 2].mean())


def accuracy(matrix: np.ndarray) -> float:
    """Fraction of the windows whose predicted class is the true one."""
    return float(np.trace(matrix) / matrix.sum())


def auroc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of class 1 of two classes; of more, one against the rest, the mean over the
    classes that occur. nan if there is only one class."""
    if probabilities.shape[1] == 2:
        if len(set(labels)) < 2:
            return float("nan")
        return float(roc_auc_score(labels == 1, probabilities[:, 1]))
    areas = label_areas(probabilities, labels[:, None] == np.arange(probabilities.shape[1]))
    return float(np.nanmean(areas)) if np.isfinite(areas).any() else float("nan")


def scores(probabilities, labels, classes: list, groups=None, resamples: int = 0) -> dict:
    """Accuracy, macro-F1, AUROC and a table per class, as plain numbers.

    probabilities (n, C), labels (n,). groups (n,): record of each window. With resamples > 0 there are 95 %
    intervals that draw whole records with replacement (windows where groups is None).
    """
    count, predicted = len(classes), probabilities.argmax(1)
    matrix = confusion(labels, predicted, count)
    per_class = {}
    for name, row, windows in zip(classes, class_table(matrix), matrix.sum(1)):
        per_class[name] = dict(zip(("precision", "recall", "f1"), map(float, row)), windows=int(windows))
    result = {
        "windows": len(labels),
        "accuracy": accuracy(matrix),
        "macro_f1": macro_f1(matrix),
        "auroc": auroc(probabilities, labels),
        "per_class": per_class,
        "confusion": matrix.tolist(),
    }
    if resamples:
        # One confusion matrix per record: a draw of records is a sum of their matrices.
        units = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
        pieces = np.zeros((units.max() + 1, count * count), np.int64)
        np.add.at(pieces, (units, labels * count + predicted), 1)
        for name, score in (("macro_f1", macro_f1), ("accuracy", accuracy)):
            interval = bootstrap(
                lambda drawn, score=score: score(drawn.sum(0).reshape(count, count)), pieces, draws=resamples
            )
            result[f"{name}_95"] = list(interval)
    return result


def best_f1(probabilities, targets) -> float:
    """F_max: the highest F1 of one threshold for all classes, of precision and recall averaged over
    records."""
    best = 0.0
    for threshold in np.unique(np.quantile(probabilities, np.linspace(0, 1, 101))):
        said = probabilities >= threshold
        hits, some = (said & targets).sum(1), said.any(1)
        labelled = targets.any(1)
        if not some.any() or not labelled.any():
            continue
        precision = (hits[some] / said[some].sum(1)).mean()
        recall = (hits[labelled] / targets[labelled].sum(1)).mean()
        best = max(best, 2 * precision * recall / max(precision + recall, 1e-12))
    return float(best)


def label_areas(probabilities, targets) -> np.ndarray:
    """Area under the ROC curve of each class (C,), nan for one that always or never applies."""
    areas = np.full(targets.shape[1], np.nan)
    for c in np.flatnonzero(targets.any(0) & ~targets.all(0)):
        areas[c] = roc_auc_score(targets[:, c], probabilities[:, c])
    return areas


def label_scores(probabilities, targets, classes: list, groups=None, resamples: int = 0) -> dict:
    """Macro-AUROC over the classes for which it is defined, F_max, and AUROC per class, as plain numbers.

    probabilities, targets (n, C), one row a record. groups (n,): subjects. With resamples > 0 there are 95 %
    intervals that draw whole subjects with replacement.
    """
    targets = np.asarray(targets, bool)
    areas = label_areas(probabilities, targets)
    per_class = {
        name: {"auroc": None if np.isnan(area) else float(area), "records": int(count)}
        for name, area, count in zip(classes, areas, targets.sum(0))
    }
    mean = lambda areas: float(np.nanmean(areas)) if np.isfinite(areas).any() else float("nan")
    result = {"records": len(targets), "macro_auroc": mean(areas), "f_max": best_f1(probabilities, targets)}
    if resamples:
        units = np.arange(len(targets)) if groups is None else np.unique(groups, return_inverse=True)[1]
        members, rng = [np.flatnonzero(units == u) for u in range(units.max() + 1)], np.random.default_rng(0)
        drawn = []
        for _ in range(resamples):
            rows = np.concatenate([members[u] for u in rng.integers(len(members), size=len(members))])
            drawn.append(label_areas(probabilities[rows], targets[rows]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a class that no draw holds
            ends = np.nanpercentile(drawn, [2.5, 97.5], axis=0).T.tolist()
            means = [mean(areas) for areas in drawn if np.isfinite(areas).any()]
            if means:
                result["macro_auroc_95"] = np.percentile(means, [2.5, 97.5]).tolist()
        for name, interval in zip(classes, ends):
            per_class[name]["auroc_95"] = interval
    return result | {"per_class": per_class}


def plain(value: float | None) -> float:
    """A score; nan stands in JSON as null."""
    return float("nan") if value is None else value


def describe_label_scores(result: dict) -> str:
    """A few lines for the screen."""
    interval = " [{:.3f}, {:.3f}]".format(*result["macro_auroc_95"]) if "macro_auroc_95" in result else ""
    lines = [
        f"{result['records']} records | macro-AUROC {plain(result['macro_auroc']):.3f}{interval} | F_max "
        f"{result['f_max']:.3f}"
    ]
    for name, row in result["per_class"].items():
        lines.append(f"  {name:12} {row['records']:8d} records  AUROC {plain(row['auroc']):6.3f}")
    return "\n".join(lines)


def linear_probe(train_x, train_y, test_x) -> np.ndarray:
    """Probabilities (n, C) for test_x (n, D) of a logistic regression on standardised features; its strength
    of regularisation is fixed, nothing is tuned."""
    scale = StandardScaler().fit(train_x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = LogisticRegression(max_iter=500, C=0.1, class_weight="balanced").fit(
            scale.transform(train_x), train_y
        )
    return fit.predict_proba(scale.transform(test_x))


def describe_scores(result: dict) -> str:
    """A few lines for the screen."""
    interval = " [{:.3f}, {:.3f}]".format(*result["macro_f1_95"]) if "macro_f1_95" in result else ""
    lines = [
        f"{result['windows']} windows | accuracy {result['accuracy']:.3f} | macro-F1 "
        f"{result['macro_f1']:.3f}{interval} | AUROC {plain(result['auroc']):.3f}",
        f"  {'class':12} {'windows':>8} {'precision':>9} {'recall':>7} {'F1':>6}",
    ]
    for name, row in result["per_class"].items():
        lines.append(
            f"  {name:12} {row['windows']:8d} {row['precision']:9.3f} {row['recall']:7.3f} {row['f1']:6.3f}"
        )
    return "\n".join(lines)
