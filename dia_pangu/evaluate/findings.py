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
    included, as upstream, so that two that never occur cost a perfect model a seventh; macro_occurring is the
    mean over the others. example is the mean over the reports, where a report without a positive on either
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
        "macro_occurring": mean([row for c, row in enumerate(rows) if truth[:, c].any()] or rows),
        "micro": _prf(hit.sum(), extra.sum(), missed.sum()),
        "example": mean(examples),
        "per_finding": per_finding,
    }


def score_intervals(truth, predicted, draws: int = 500, seed: int = 0) -> dict:
    """Return 95 % bootstrap intervals, all from the same draws of reports: of the F1 of every finding
    ("per_finding"), of the four means of `finding_scores`, and of "CRG"."""
    rng, count = np.random.default_rng(seed), len(truth)
    weights = rng.multinomial(count, np.full(count, 1 / count), draws).astype(float)
    hit, extra, missed = (
        weights @ part for part in (truth & predicted, ~truth & predicted, truth & ~predicted)
    )
    positive, occurs = (hit + missed).sum(1), hit + missed > 0
    single = hit / (hit + (extra + missed) / 2 + EPSILON)
    right, told = (truth & predicted).sum(1), truth.sum(1) + predicted.sum(1)
    values = {
        "micro": hit.sum(1) / (hit + (extra + missed) / 2 + EPSILON / hit.shape[1]).sum(1),
        "macro": single.mean(1),
        "macro_occurring": (single * occurs).sum(1) / np.maximum(occurs.sum(1), 1),
        "example": weights @ (2 * right / np.maximum(told, 1)) / count,
    }
    # As `crg_score`; a draw without any positive has none.
    rest, drawn = (truth.size - positive) / 2, (positive > 0) & (positive < truth.size)
    gained = rest / np.maximum(positive, 1) * (hit - missed).sum(1) - extra.sum(1)
    values["CRG"] = (rest / np.maximum(2 * rest - gained, 1e-9))[drawn]

    def interval(drawn) -> tuple[float, float]:
        return tuple(map(float, np.percentile(drawn, (2.5, 97.5)))) if len(drawn) else (float("nan"),) * 2

    return {name: interval(drawn) for name, drawn in values.items()} | {
        "per_finding": [interval(column) for column in single.T]
    }


def crg_score(truth, predicted) -> float:
    """Return the CRG score of CT-RATE's authors: hits and misses weigh as much more than false alarms as
    findings are rarer than their absence. 1 is perfect, 1/3 is what a report without any finding gets.

    With X labels, of which A are positive: r = (X - A) / 2A, U = (X - A) / 2, s = r TP - r FN - FP, and the
    score is U / (2U - s).
    """
    truth, predicted = np.asarray(truth).astype(bool), np.asarray(predicted).astype(bool)
    positive, rest = truth.sum(), (truth.size - truth.sum()) / 2
    if not positive or not rest:
        return float("nan")
    weight = rest / positive
    gained = weight * (truth & predicted).sum() - weight * (truth & ~predicted).sum()
    return float(rest / (2 * rest - (gained - (~truth & predicted).sum())))


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
