"""Pictures of the pruning study, from the rows of `tables.tabulate`."""

import numpy as np

from common.figures import COLOURS, new_figure, save_figure
from studies.pruning.tables import CONTROLS, CRITERIA

LABELS = {"f1": "finding micro-F1", "perplexity": "perplexity"}
COSTS = {
    "parameters": "values of the language model",
    "seconds": "s for 64 + 32 tokens",
    "megabytes": "MB of weights and a 1024-token KV-cache",
}


def values_and_bars(rows, metric, stage):
    """(values, (2, N) lengths of the error bars) for matplotlib."""
    name = f"{metric}_{stage}"
    value, low, high = (np.array([row[name + end] for row in rows]) for end in ("", "_low", "_high"))
    return value, np.stack([value - low, high - value])


def frame(ax, metric, rows):
    """Set the y axis. It fits all but random sets without layer 0, whose perplexities reach hundreds."""
    ax.set_ylabel(LABELS[metric])
    if metric == "f1":
        ax.set_ylim(0, 1)
    else:
        others = [row for row in rows if row["criterion"] != "random"]
        lowest = min(row["perplexity_after_low"] for row in others)
        highest = max(row["perplexity_before_high"] for row in others)
        ax.set_ylim(0.97 * lowest, 1.05 * highest)


def draw_tradeoff(table, metrics, path):
    """Quality after healing against parameters, latency and memory of the language model."""
    colours = dict(zip((*CRITERIA, *CONTROLS), (*COLOURS, "#111111")))
    figure, axes = new_figure(len(metrics), len(COSTS), width=4.4, height=3.2, squeeze=False)
    for row, metric in enumerate(metrics):
        for ax, (cost, label) in zip(axes[row], COSTS.items()):
            for criterion, colour in colours.items():
                points = [table[0], *(r for r in table if r["criterion"] == criterion)]
                value, bars = values_and_bars(points, metric, "after")
                line = "--" if criterion in CONTROLS else "-"
                style = {"color": colour, "label": criterion, "ls": line, "marker": "o", "ms": 4, "lw": 1.3}
                ax.errorbar([r[cost] for r in points], value, yerr=bars, elinewidth=0.5, capsize=2, **style)
            ax.set_xlabel(label)
            ax.locator_params(axis="x", nbins=4)
            frame(ax, metric, table)
    axes[0][0].legend(fontsize=7, loc="lower right")
    figure.suptitle(
        "Healed. Solid: criteria, dashed: controls; bars: 95 % intervals over test samples and random sets"
    )
    save_figure(figure, path)


def draw_healing(table, metrics, path):
    """Quality before and after healing, side by side, one column a ratio."""
    ratios = sorted({row["ratio"] for row in table} - {0.0})
    figure, axes = new_figure(len(metrics), len(ratios), width=4.4, height=3.2, squeeze=False)
    for row, metric in enumerate(metrics):
        for ax, ratio in zip(axes[row], ratios):
            rows = [r for r in table if r["ratio"] == ratio]
            x = np.arange(len(rows))
            for shift, stage, colour in ((-0.2, "before", COLOURS[1]), (0.2, "after", COLOURS[0])):
                value, bars = values_and_bars(rows, metric, stage)
                ax.bar(x + shift, value, 0.38, yerr=bars, color=colour, label=f"{stage} healing", capsize=2)
            ax.axhline(table[0][f"{metric}_before"], color="#5b6770", lw=1, ls=":", label="unpruned")
            ax.set_xticks(x, [r["criterion"] for r in rows], rotation=40, ha="right", fontsize=8)
            ax.set_title(f"{ratio:.0%} of the layers removed")
            frame(ax, metric, rows)
    axes[0][0].legend(fontsize=7, ncols=3, loc="upper left")
    save_figure(figure, path)
