"""Precision, recall and F1 over the 14 findings, per finding and averaged three ways; thresholds; bootstrap intervals."""
import numpy as np

from dia_pangu.src.Dataset.prompt import FINDINGS

EPSILON = 1e-6  # in upstream's denominators


def _prf(tp, fp, fn) -> dict:
    return {"P": float(tp / (tp + fp + EPSILON)), "R": float(tp / (tp + fn + EPSILON)),
            "F1": float(tp / (tp + 0.5 * (fp + fn) + EPSILON))}


def finding_scores(truth, predicted, names=FINDINGS) -> dict:
    """truth, predicted: (N, len(names)) of 0 and 1. Returns macro, micro, example and per_finding, each with P, R, F1.

    macro: mean over findings, those that never occur included, as upstream. example: mean over reports; a report with no
    positive on either side counts 0.
    """
    truth, predicted = np.asarray(truth).astype(bool), np.asarray(predicted).astype(bool)
    hit, extra, missed = truth & predicted, ~truth & predicted, truth & ~predicted
    rows = [_prf(hit[:, c].sum(), extra[:, c].sum(), missed[:, c].sum()) for c in range(len(names))]
    examples = [_prf(h.sum(), e.sum(), m.sum()) for h, e, m in zip(hit, extra, missed)]

    def mean(scores):
        return {key: float(np.mean([score[key] for score in scores])) for key in ("P", "R", "F1")}

    per_finding = {name: {**row, "count": int(truth[:, c].sum())} for c, (name, row) in enumerate(zip(names, rows))}
    return {"macro": mean(rows), "micro": _prf(hit.sum(), extra.sum(), missed.sum()), "example": mean(examples),
            "per_finding": per_finding}


def bootstrap(function, *arrays, draws: int = 500, seed: int = 0) -> tuple[float, float]:
    """95 % interval of function(*arrays) over resampled rows of the arrays."""
    rng, count = np.random.default_rng(seed), len(arrays[0])
    values = []
    for _ in range(draws):
        rows = rng.integers(0, count, count)
        values.append(function(*(array[rows] for array in arrays)))
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def micro_f1(truth, predicted) -> float:
    hit = (truth & predicted).sum()
    return float(hit / (hit + 0.5 * (truth ^ predicted).sum() + EPSILON))


def calibrate(probability, truth) -> list[float]:
    """For each finding the threshold with the best F1 on validation data; 0.5 where a finding has fewer than 5 cases.

    Among equal ones the threshold nearest to 0.5 wins. probability, truth: (N, 14).
    """
    grid = np.round(np.arange(0.05, 0.96, 0.05), 2)
    thresholds = []
    for p, t in zip(np.asarray(probability).T, np.asarray(truth).astype(bool).T):
        if t.sum() < 5:
            thresholds.append(0.5)
            continue
        scores = [micro_f1(t, p >= cut) for cut in grid]
        best = [cut for cut, score in zip(grid, scores) if score >= max(scores) - 1e-9]
        thresholds.append(float(min(best, key=lambda cut: abs(cut - 0.5))))
    return thresholds
