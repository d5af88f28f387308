"""Scores of answers: accuracy with its interval, calibration, open questions, and pictures of them.

An answer is a dictionary as test.py writes it to predictions.jsonl: "text", "task", "snr_db", "answer" (the
true one); of a four-choice question also "options" {letter: name}, "pred", "truth", "likeliest" and
"extracted" (letters), "class" (name of the truth) and "scores" (log-likelihood of each option, in their
order).
"""

import re

import numpy as np
import torch

from common.checkpoint import atomic_csv
from common.figures import draw_confusion, new_figure, save_figure

HIGH_SNR_DB = 10.0  # dB; from here on accuracy is reported apart
SNR_STEP_DB = 5  # width of the bins of SNR


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion by Wilson's score; it covers other test items, not other trainings."""
    p, z = hits / count, 1.959964
    centre, half = p + z * z / (2 * count), z * np.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)


def accuracy(answers, key="pred") -> float | None:
    """Fraction of four-choice answers whose letter `key` is the true one; None where there are no answers."""
    return float(np.mean([a[key] == a["truth"] for a in answers])) if answers else None


def accuracy_by(answers, key) -> dict:
    """{value of the field `key`: accuracy} in the order of the values."""
    values = sorted({a[key] for a in answers})
    return {value: accuracy([a for a in answers if a[key] == value]) for value in values}


def fit_temperature(answers) -> float:
    """The temperature T for which softmax(scores / T) is likeliest for the true letters, of 60 between .2 and
    10."""
    scores = [(torch.tensor(a["scores"]), list(a["options"]).index(a["truth"])) for a in answers]
    grid = np.exp(np.linspace(np.log(0.2), np.log(10), 60))
    return float(min(grid, key=lambda t: sum(float(-(s / t).log_softmax(0)[k]) for s, k in scores)))


def confidences(answers, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the likeliest option of each answer, and whether that option is the true one."""
    sure = [float((torch.tensor(a["scores"]) / temperature).softmax(0).max()) for a in answers]
    return np.array(sure), np.array([a["likeliest"] == a["truth"] for a in answers])


def choose_threshold(answers, temperature: float, target: float) -> dict:
    """The lowest confidence from which on answers to validation questions reach the accuracy `target`.

    Returns {"threshold", "target_accuracy", "questions", "coverage", "accuracy", "curve"}, the coverage being
    the share of questions answered at all; where no threshold reaches the target, the one of the surest
    tenth, and what it reaches.
    """
    sure, hit = confidences(answers, temperature)
    order = np.argsort(-sure, kind="stable")
    reached = np.cumsum(hit[order]) / np.arange(1, len(order) + 1)
    least = max(1, len(order) // 10)  # fewer answers prove nothing
    good = np.nonzero(reached[least - 1 :] >= target)[0]
    last = least - 1 + (int(good[-1]) if len(good) else 0)
    shares = [round(len(order) * k / 10) - 1 for k in range(1, 11)]
    curve = [
        {"coverage": (k + 1) / len(order), "threshold": float(sure[order[k]]), "accuracy": float(reached[k])}
        for k in shares
        if k >= 0
    ]
    return {
        "threshold": float(sure[order[last]]),
        "target_accuracy": target,
        "questions": len(answers),
        "coverage": (last + 1) / len(order),
        "accuracy": float(reached[last]),
        "curve": curve,
    }


def coverage(answers, temperature: float, threshold: float) -> dict:
    """The share of answers at least as sure as `threshold`, and their accuracy (None where there are
    none)."""
    sure, hit = confidences(answers, temperature)
    given = sure >= threshold
    return {
        "threshold": threshold,
        "coverage": float(given.mean()),
        "accuracy": float(hit[given].mean()) if given.any() else None,
    }


def calibration_error(answers, temperature: float, bins: int = 10) -> float:
    """Expected calibration error: |accuracy - confidence| of the likeliest options, averaged over equal bins
    of confidence by their counts."""
    confidence, hit = confidences(answers, temperature)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, hit - confidence)  # summed, so that a bin counts by what is in it
    return float(np.abs(gaps).sum() / len(hit))


class Words:
    """Tokenizer for ROUGE: each Chinese character, and each run of letters and digits, is a word."""

    def tokenize(self, text):
        return re.findall(r"[\u4e00-\u9fff]|[A-Za-z0-9\-]+", text.lower())


def open_scores(answers) -> dict:
    """ROUGE-L (F), BLEU (0 to 1) and exact match without white space of answers to open questions."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import BLEU

    true, given = [a["answer"] for a in answers], [a["text"] for a in answers]
    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    rouge = [scorer.score(t, g)["rougeL"].fmeasure for t, g in zip(true, given)]
    bleu = BLEU(tokenize="zh", effective_order=True).corpus_score(given, [true])
    same = [re.sub(r"\s", "", t) == re.sub(r"\s", "", g) for t, g in zip(true, given)]
    return {
        "count": len(answers),
        "rougeL": float(np.mean(rouge)),
        "bleu": bleu.score / 100,
        "exact": float(np.mean(same)),
    }


def at_high_snr(answers) -> list[dict]:
    """The answers about signals of at least HIGH_SNR_DB."""
    return [a for a in answers if a["snr_db"] is not None and a["snr_db"] >= HIGH_SNR_DB]


def choice_scores(choice, temperature: float) -> dict:
    """Scores of the four-choice answers `choice`; temperature: of the confidence, see `fit_temperature`."""
    high = at_high_snr(choice)
    in_bins = [
        {**a, "bin": int(a["snr_db"] // SNR_STEP_DB) * SNR_STEP_DB} for a in choice if a["snr_db"] is not None
    ]
    letters = sorted({a["pred"] for a in choice})
    return {
        "four_choice": len(choice),
        "accuracy": accuracy(choice),
        "interval": wilson(sum(a["pred"] == a["truth"] for a in choice), len(choice)),
        "accuracy_by_likelihood": accuracy(choice, "likeliest"),
        "valid_letters": float(np.mean([a["extracted"] is not None for a in choice])),
        "high_snr_count": len(high),
        "accuracy_high_snr": accuracy(high),
        "accuracy_high_snr_by_likelihood": accuracy(high, "likeliest"),
        "high_snr_interval": wilson(sum(a["pred"] == a["truth"] for a in high), len(high)) if high else None,
        "by_task": accuracy_by(choice, "task"),
        "by_class": accuracy_by(choice, "class"),
        "by_class_high_snr": accuracy_by(high, "class"),
        "by_snr": {str(low): value for low, value in accuracy_by(in_bins, "bin").items()},
        "letters_given": {letter: sum(a["pred"] == letter for a in choice) for letter in letters},
        "temperature": temperature,
        "calibration_error": calibration_error(choice, temperature),
    }


def score(answers, calibration: dict | None = None) -> dict:
    """Everything that metrics.json holds about one pass over the questions.

    calibration: {"temperature", "threshold"}; without a threshold everything is answered.
    """
    calibration = {"temperature": 1.0, **(calibration or {})}
    metrics = {"questions": len(answers)}
    if choice := [a for a in answers if a.get("truth")]:
        metrics |= choice_scores(choice, calibration["temperature"])
        if "threshold" in calibration:
            metrics["coverage"] = coverage(choice, calibration["temperature"], calibration["threshold"])
    if free := [a for a in answers if "options" not in a and a.get("answer")]:
        metrics["open"] = open_scores(free)
        if high := at_high_snr(free):
            metrics["open"]["exact_high_snr"] = open_scores(high)["exact"]
    return metrics


def draw(answers, metrics, folder):
    """Draw accuracy against SNR, and the chosen option for each class; a .csv with the numbers beside
    each."""
    choice = [a for a in answers if a.get("truth")]
    if not choice:
        return
    if metrics["by_snr"]:
        rows = [{"snr_from_db": int(low), "accuracy": value} for low, value in metrics["by_snr"].items()]
        chance = np.mean([1 / len(a["options"]) for a in choice])
        middle = [row["snr_from_db"] + SNR_STEP_DB / 2 for row in rows]
        figure, axis = new_figure()
        axis.plot(middle, [row["accuracy"] for row in rows], marker="o")
        axis.axhline(chance, color="0.6", ls="--", lw=1)
        axis.set(xlabel=f"SNR (dB, {SNR_STEP_DB} dB bins)", ylabel="accuracy", ylim=(0, 1.02))
        axis.set_title("four-choice accuracy; dashed: chance")
        save_figure(figure, folder / "accuracy_snr.png")
        atomic_csv(folder / "accuracy_snr.csv", rows)
    names = sorted({name for a in choice for name in a["options"].values()})
    matrix = np.zeros((len(names), len(names)), int)
    for a in choice:
        matrix[names.index(a["class"]), names.index(a["options"][a["pred"]])] += 1
    draw_confusion(matrix, names, folder / "confusion.png", "fraction of questions")
