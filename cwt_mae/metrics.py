"""Scores of a classifier with their intervals."""

import sys
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

# repository root: every way of starting a script of this folder finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
    areas = [
        roc_auc_score(labels == c, probabilities[:, c])
        for c in range(probabilities.shape[1])
        if 0 < (labels == c).sum() < len(labels)
    ]
    return float(np.mean(areas)) if areas else float("nan")


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
        f"{result['macro_f1']:.3f}{interval}"
        f" | AUROC {result['auroc'] if result['auroc'] is not None else float('nan'):.3f}",
        f"  {'class':12} {'windows':>8} {'precision':>9} {'recall':>7} {'F1':>6}",
    ]
    for name, row in result["per_class"].items():
        lines.append(
            f"  {name:12} {row['windows']:8d} {row['precision']:9.3f} {row['recall']:7.3f} {row['f1']:6.3f}"
        )
    return "\n".join(lines)
