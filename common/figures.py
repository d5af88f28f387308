"""Pictures with one look, drawn without a screen and written whole."""

import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.font_manager import fontManager

from common.checkpoint import atomic_csv, atomic_path

COLOURS = ("#2a6fbb", "#d1603d", "#4f9d69", "#8a5fb0", "#c9a227", "#5b6770")
# Fonts that draw Chinese names of files, models and classes where the first one cannot: those installed
CHINESE = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC"),
)
plt.rcParams.update(
    {
        "axes.grid": True,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.family": ["sans-serif", *(name for name in CHINESE if name in fontManager.get_font_names())],
        "font.size": 10,
        "grid.alpha": 0.25,
        "image.cmap": "viridis",
        "legend.frameon": False,
        "savefig.dpi": 130,
        "text.parse_math": False,  # a run's name may hold a dollar sign
    }
)


def new_figure(rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 3.6, **options):
    """`plt.subplots` of `rows` x `columns` axes, each `width` x `height` inches; returns (figure, axes)."""
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), **options)


def save_figure(figure, path):
    """Write `figure` to `path` (.png, .svg or .pdf by its suffix), whole or not at all, and close it.

    Letters that no installed font has are boxes in the picture; one line says so.
    """
    with atomic_path(path) as temporary, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        figure.savefig(temporary)
    plt.close(figure)
    boxes = [warning for warning in caught if "missing from" in str(warning.message)]
    for warning in caught:
        if warning not in boxes:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if boxes:
        print(
            f"{path}: {len(boxes)} letters are boxes, no installed font has them; for Chinese install "
            "Noto Sans CJK",
            file=sys.stderr,
        )
    return path


def draw_confusion(matrix, names: list[str], path, title: str = ""):
    """Picture of a confusion matrix, and its counts as CSV beside it.

    matrix: (C, C) counts, true class by row and predicted class by column. The colour is the fraction of the
    row.
    """
    matrix = np.asarray(matrix)
    side = 0.4 * len(names)
    figure, axis = new_figure(width=side + 2.5, height=side + 2)
    image = axis.imshow(matrix / matrix.sum(1, keepdims=True).clip(1), vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(xlabel="predicted", ylabel="true", title=title)
    axis.grid(False)
    if len(names) <= 10:
        for (row, column), count in np.ndenumerate(matrix):
            axis.text(column, row, str(count), ha="center", va="center", color="w", fontsize=8)
    figure.colorbar(image, ax=axis, shrink=0.7, label="fraction of the true class")
    save_figure(figure, path)
    atomic_csv(
        Path(path).with_suffix(".csv"),
        [{"true": name, **dict(zip(names, row))} for name, row in zip(names, matrix.tolist())],
    )
