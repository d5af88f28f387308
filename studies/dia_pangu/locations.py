"""What a report's own words say of side and place, and how often side and place are right."""

import re

import numpy as np

from dia_pangu.evaluate.labeler import PATTERNS, clauses
from dia_pangu.src.Dataset.prompt import PLACES, SIDES

WORDS = {
    "right": r"\bright\b|右",
    "left": r"\bleft\b|左",
    "upper": r"\bupper\b|上(?:肺)?(?:野|部|叶)",
    "middle": r"\bmiddle\b|中(?:肺)?(?:野|部|叶)",
    "lower": r"\blower\b|\bbase\b|下(?:肺)?(?:野|部|叶)|底",
}


def reported(text: str, finding: str) -> dict:
    """Return the side and the place that a report's own words give to a finding; empty where it gives
    none."""
    for clause in clauses(text):
        if PATTERNS[finding].search(clause):
            hits = {word: re.search(pattern, clause, re.I) for word, pattern in WORDS.items()}
            return {
                "side": next((s for s in SIDES if hits[s]), ""),
                "place": next((p for p in PLACES if hits[p]), ""),
            }
    return {"side": "", "place": ""}


def location_scores(attributes: dict, found: dict) -> dict:
    """Return the accuracy of side and place over the findings that are present and were found.

    attributes: id -> finding -> {side, place} as they are. found: the same, as they were reported. Returns
    for each of "side" and "place" its accuracy (None without any finding) and its count.
    """
    out = {}
    for what in ("side", "place"):
        pairs = [
            (truth[what], found[name][finding].get(what, ""))
            for name, findings in attributes.items()
            for finding, truth in findings.items()
            if truth.get(what) and finding in found.get(name, {})
        ]
        out[what] = {
            "accuracy": float(np.mean([a == b for a, b in pairs])) if pairs else None,
            "count": len(pairs),
        }
    return out
