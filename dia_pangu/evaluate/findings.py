"""Precision, recall and F1 of the 14 findings, averaged in three ways; calibration of thresholds."""

import numpy as np

from dia_pangu.src.Dataset.prompt import FINDINGS

EPSILON = 1e-6  # in upstream's denominators


def _prf(tp, fp, fn) -> dict:
    """Return precision, recall and F1 from counts of true positives, false positives and false negatives."""
    return {
        "P": float(tp / (tp + fp + EPSILON)),
        "R": float(tp / (tp + fn + EPSILON)),
        "F1": float(tp / (tp + 0.5 * (fp + fn) + EPSILON)),
    }


def finding_scores(truth, predicted, names=FINDINGS) -> dict:
    """Return the scores "macro", "micro", "example" and "per_finding", each with precision P, recall R and
    F1.

    truth, predicted: (N, len(names)) of 0 and 1. macro is the mean over the findings, those that never occur
    included, as upstream. example is the mean over the reports, where a report without a positive on either
    side counts 0.
    """
    truth, predicted = np.asarray(truth).astype(bool), np.asarray(predicted).astype(bool)
    hit, extra, missed = truth & predicted, ~truth & predicted, truth & ~predicted
    rows = [_prf(hit[:, c].sum(), extra[:, c].sum(), missed[:, c].sum()) for c in range(len(names))]
    examples = [_prf(h.sum(), e.sum(), m.sum()) for h, e, m in zip(hit, extra, missed)]

    def mean(scores):
        return {key: float(np.mean([score[key] for score in scores])) for key in ("P", "R", "F1")}

    per_finding = {
        name: {**row, "count": int(truth[:, c].sum())} for c, (name, row) in enumerate(zip(names, rows))
    }
    return {
        "macro": mean(rows),
        "micro": _prf(hit.sum(), extra.sum(), missed.sum()),
        "example": mean(examples),
        "per_finding": per_finding,
    }


def micro_f1(truth, predicted) -> float:
    """Return F1 over all findings and reports together; truth, predicted: bool arrays of one shape."""
    hit = (truth & predicted).sum()
    return float(hit / (hit + 0.5 * (truth ^ predicted).sum() + EPSILON))


def calibrate(probability, truth, rounds: int = 3, least: float = 0.005) -> list[float]:
    """Return the 14 thresholds with the best micro-F1 on validation data, changing one at a time and starting
    from 0.5.

    probability, truth: (N, 14). A threshold moves only if that gains `least` of micro-F1: a finding that the
    model cannot see keeps 0.5 instead of being reported in everyone, and smaller gains on a few hundred
    volumes do not hold on others.
    """
    probability, truth = np.asarray(probability), np.asarray(truth).astype(bool)
    grid = sorted(np.round(np.arange(0.1, 0.91, 0.05), 2), key=lambda cut: abs(cut - 0.5))
    thresholds = np.full(truth.shape[1], 0.5)
    best = micro_f1(truth, probability >= thresholds)
    for _ in range(rounds):
        for c in range(truth.shape[1]):
            for cut in grid:
                trial = thresholds.copy()
                trial[c] = cut
                score = micro_f1(truth, probability >= trial)
                if score > best + least:
                    thresholds, best = trial, score
    return [float(value) for value in thresholds]
