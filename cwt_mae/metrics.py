"""Scores of a classifier with intervals, and the files and pictures that show them."""

import sys
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.figures import new_figure, save_figure


def confusion(labels, predicted, classes: int) -> np.ndarray:
    """(classes, classes) counts: row = true class, column = predicted."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_table(matrix: np.ndarray) -> np.ndarray:
    """Confusion matrix -> (classes, 3): precision, recall, F1; 0 where a class was never predicted or never occurs."""
    hits = np.diag(matrix).astype(float)
    precision, recall = hits / np.maximum(matrix.sum(0), 1), hits / np.maximum(matrix.sum(1), 1)
    return np.stack([precision, recall, 2 * hits / np.maximum(matrix.sum(0) + matrix.sum(1), 1)], 1)


def macro_f1(matrix: np.ndarray) -> float:
    """Mean F1 of the classes that occur or were predicted (as scikit-learn's macro average)."""
    seen = (matrix.sum(0) + matrix.sum(1)) > 0
    return float(class_table(matrix)[seen, 2].mean())


def auroc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: of class 1 of two, else one against the rest, mean over the classes that occur; nan if one class."""
    if probabilities.shape[1] == 2:
        return (
            float(roc_auc_score(labels == 1, probabilities[:, 1])) if len(set(labels)) == 2 else float("nan")
        )
    areas = [
        roc_auc_score(labels == c, probabilities[:, c])
        for c in range(probabilities.shape[1])
        if 0 < (labels == c).sum() < len(labels)
    ]
    return float(np.mean(areas)) if areas else float("nan")


def scores(probabilities, labels, classes: list, groups=None, resamples: int = 0, seed: int = 0) -> dict:
    """Accuracy, macro-F1, AUROC and a table per class, as plain numbers.

    probabilities (n, C), labels (n,). groups (n,): record of each window; with resamples > 0 the 95 % intervals come from
    drawing whole records (or windows where groups is None) with replacement.
    """
    count, predicted = len(classes), probabilities.argmax(1)
    matrix = confusion(labels, predicted, count)
    result = {
        "windows": len(labels),
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": macro_f1(matrix),
        "auroc": auroc(probabilities, labels),
        "per_class": {
            name: dict(zip(("precision", "recall", "f1"), map(float, row)), windows=int(n))
            for name, row, n in zip(classes, class_table(matrix), matrix.sum(1))
        },
        "confusion": matrix.tolist(),
    }
    if resamples:
        rng = np.random.default_rng(seed)
        units = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
        pieces = np.zeros((units.max() + 1, count * count), np.int64)
        np.add.at(pieces, (units, labels * count + predicted), 1)
        draws = [
            pieces[rng.integers(len(pieces), size=len(pieces))].sum(0).reshape(count, count)
            for _ in range(resamples)
        ]
        for name, value in (("macro_f1", macro_f1), ("accuracy", lambda m: np.trace(m) / m.sum())):
            result[f"{name}_95"] = [float(v) for v in np.percentile([value(m) for m in draws], [2.5, 97.5])]
    return result


def linear_probe(train_x, train_y, test_x) -> np.ndarray:
    """Probabilities (n, C) for test_x (n, D) of a logistic regression; its strength of regularisation is fixed, nothing is tuned."""
    scale = StandardScaler().fit(train_x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = LogisticRegression(max_iter=500, C=0.1, class_weight="balanced").fit(
            scale.transform(train_x), train_y
        )
    return fit.predict_proba(scale.transform(test_x))


def describe_scores(result: dict) -> str:
    """A few lines for the screen."""
    lines = [
        f"{result['windows']} windows | accuracy {result['accuracy']:.3f} | macro-F1 {result['macro_f1']:.3f}"
        + (" [{:.3f}, {:.3f}]".format(*result["macro_f1_95"]) if "macro_f1_95" in result else "")
        + f" | AUROC {result['auroc']:.3f}",
        f"  {'class':12} {'windows':>8} {'precision':>9} {'recall':>7} {'F1':>6}",
    ]
    for name, row in result["per_class"].items():
        lines.append(
            f"  {name:12} {row['windows']:8d} {row['precision']:9.3f} {row['recall']:7.3f} {row['f1']:6.3f}"
        )
    return "\n".join(lines)


def draw_confusion(matrix, classes: list, path, title: str = ""):
    """Confusion matrix: colour by share of the true class, counts written in."""
    matrix = np.asarray(matrix)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = max(3.2, 0.7 * len(classes) + 1.6)
    figure, axis = new_figure(1, 1, width=size + 0.8, height=size)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.grid(False)
    for i in range(len(classes)):
        for j in range(len(classes)):
            axis.text(
                j,
                i,
                f"{matrix[i, j]}\n{share[i, j]:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if share[i, j] > 0.6 else "black",
            )
    axis.set_xticks(range(len(classes)), classes)
    axis.set_yticks(range(len(classes)), classes)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title(title, fontsize=10)
    save_figure(figure, path)
