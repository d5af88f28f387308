"""Numbers of the pruning study: quality with 95 % intervals, paired differences, and what can be claimed.

An evaluation is {"before": measured, "after": measured}, before and after healing; measured is
{"losses": (N, 2) summed loss and tokens of each test sample, "counts": (N, 2) of `counts` or None}.
A choice is {"criterion", "ratio", "drop_layers", "layers_left"}: one set of layers that one criterion chose.
"""

import numpy as np

CRITERIA = ("sensitivity", "block_influence", "leave_one_out", "greedy")
CONTROLS = ("last", "random", "random_keep0")
STAGES = ("before", "after")
DRAWS = 1000
WHOLE = ""  # the set of no layers


def counts(labels, reported) -> np.ndarray:
    """(N, 2) true positives and errors of each report; labels and reported are (N, 14) of bool.

    Sums over reports give micro-F1, also over resampled reports.
    """
    return np.stack([(labels & reported).sum(1), (labels ^ reported).sum(1)], 1).astype(float)


def f1(rows) -> np.ndarray:
    """Micro-F1 of summed counts (..., 2)."""
    return rows[..., 0] / (rows[..., 0] + 0.5 * rows[..., 1] + 1e-6)


def mean_perplexity(rows) -> np.ndarray:
    """Perplexity of summed losses and tokens (..., 2)."""
    return np.exp(np.minimum(rows[..., 0] / rows[..., 1], 50))


def resampled(rows, seed=0) -> np.ndarray:
    """(DRAWS, 2) sums over resampled rows; equal seeds draw equal rows, which pairs differences."""
    index = np.random.default_rng(seed).integers(0, len(rows), (DRAWS, len(rows)))
    return np.asarray(rows)[index].sum(1)


def quality(measured: list[dict], metric: str) -> tuple[float, np.ndarray]:
    """Return (value, DRAWS bootstrap values) of "f1" or "perplexity", the mean over one criterion's sets.

    Test samples are resampled, and the sets too: another draw of random sets would have another mean.
    """
    rows = [m["counts" if metric == "f1" else "losses"] for m in measured]
    score = f1 if metric == "f1" else mean_perplexity
    draws = np.stack([score(resampled(r)) for r in rows])  # (sets, DRAWS)
    sets = np.random.default_rng(1).integers(0, len(rows), draws.shape)
    value = np.mean([score(np.sum(r, 0)) for r in rows])
    return value, np.take_along_axis(draws, sets, 0).mean(0)


def interval(draws) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap values."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return low, high


def tabulate(choices, evaluations, costs, metrics) -> list[dict]:
    """One row a ratio and criterion: quality before and after healing with its interval, and cost.

    The first row is the unpruned model, which is healed too: what more training alone does. costs: {layers
    left: numbers of that model}.
    """
    groups = {(0.0, "unpruned"): []}
    for choice in choices:
        groups.setdefault((choice["ratio"], choice["criterion"]), []).append(choice)
    rows = []
    for (ratio, criterion), group in groups.items():
        specs = [choice["drop_layers"] for choice in group] or [WHOLE]
        left = group[0]["layers_left"] if group else max(costs)
        row = {"ratio": ratio, "criterion": criterion, "sets": " ".join(specs), "layers": left, **costs[left]}
        for stage in STAGES:
            for metric in metrics:
                value, draws = quality([evaluations[spec][stage] for spec in specs], metric)
                low, high = interval(draws)
                name = f"{metric}_{stage}"
                row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def pairs(names) -> list[tuple[str, str]]:
    """Every criterion with every control, every later criterion, and its own choice on another base."""
    return [
        (criterion, other)
        for i, criterion in enumerate(CRITERIA)
        for other in names
        if other in (*CONTROLS, *CRITERIA[i + 1 :], f"{criterion}_elsewhere")
    ]


def verdict(difference: float, low: float, high: float, metric: str) -> str:
    """What an interval of a difference says: no difference where it holds 0; a low perplexity is better."""
    if low <= 0 <= high:
        return "no difference"
    return "better" if (difference > 0) == (metric == "f1") else "worse"


def compare(choices, evaluations, metrics) -> list[dict]:
    """Paired differences of all `pairs` at every ratio, with 95 % intervals and the verdict."""
    names, rows = list(dict.fromkeys(c["criterion"] for c in choices)), []
    for ratio in dict.fromkeys(c["ratio"] for c in choices):
        sets = {name: [] for name in names}
        for choice in choices:
            if choice["ratio"] == ratio:
                sets[choice["criterion"]].append(evaluations[choice["drop_layers"]])
        for metric in metrics:
            for stage in STAGES:
                found = {name: quality([e[stage] for e in some], metric) for name, some in sets.items()}
                for criterion, other in pairs(names):
                    (own, own_draws), (its, its_draws) = found[criterion], found[other]
                    low, high = interval(own_draws - its_draws)
                    row = {"ratio": ratio, "metric": metric, "stage": stage}
                    row |= {"criterion": criterion, "control": other, "difference": own - its}
                    row |= {"low": low, "high": high, "verdict": verdict(own - its, low, high, metric)}
                    rows.append(row)
    return rows


def claims(comparisons, ratios, metrics) -> list[str]:
    """One sentence a ratio, metric and control: which criteria are better, worse or no different, healed."""
    sentences = []
    for ratio in ratios:
        for metric in metrics:
            for control in CONTROLS:
                wanted = (ratio, metric, "after", control)
                groups = {"better": [], "worse": [], "no difference": []}
                for row in comparisons:
                    if (row["ratio"], row["metric"], row["stage"], row["control"]) == wanted:
                        groups[row["verdict"]].append(row["criterion"])
                text = "; ".join(f"{name}: {', '.join(some)}" for name, some in groups.items() if some)
                sentences.append(f"{ratio:.0%} removed, healed, {metric} against {control}: {text}")
    return sentences
