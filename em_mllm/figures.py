"""Pictures that several scripts make."""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import numpy as np

from common.checkpoint import atomic_write
from common.figures import new_figure, save_figure


def draw_confusion(matrix: np.ndarray, names: list[str], title: str, path: Path):
    """matrix (true, predicted) of counts as shares of each row, and the counts in a .csv beside the picture."""
    figure, axis = new_figure(width=0.34 * len(names) + 2.5, height=0.34 * len(names) + 2)
    image = axis.imshow(matrix / matrix.sum(1, keepdims=True).clip(1), vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(xlabel="answered", ylabel="true", title=title)
    axis.grid(False)
    figure.colorbar(image, ax=axis, shrink=0.7)
    save_figure(figure, path)
    rows = [f"{name}," + ",".join(map(str, row)) for name, row in zip(names, matrix)]
    atomic_write(path.with_suffix(".csv"), "\n".join(["true," + ",".join(names), *rows]) + "\n")
