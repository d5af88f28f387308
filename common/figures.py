"""Pictures with one look, drawn without a screen and written whole."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.checkpoint import atomic_path

COLOURS = ("#2a6fbb", "#d1603d", "#4f9d69", "#8a5fb0", "#c9a227", "#5b6770")
plt.rcParams.update(
    {
        "axes.grid": True,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "grid.alpha": 0.25,
        "image.cmap": "viridis",
        "legend.frameon": False,
        "savefig.dpi": 130,
    }
)


def new_figure(rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 3.6, **options):
    """`plt.subplots` of `rows` x `columns` axes, each `width` x `height` inches; returns (figure, axes)."""
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), **options)


def save_figure(figure, path):
    """Write `figure` to `path` (.png, .svg or .pdf by its suffix), whole or not at all, and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)
    return path
