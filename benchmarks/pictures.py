"""The look of the benchmarks' figures: a colour for each side, and plain axes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastbert.training.picture import GRID, HELDOUT, MUTED

OURS = HELDOUT
COLOURS = {  # of the rivals, the same in every figure
    "eager": "#9ca3af",
    "torch.compile": "#b45309",
    "SDPA": "#d97706",
    "varlen_attn": "#059669",
    "linear_cross_entropy": "#059669",
    "Liger": "#7c3aed",
    "CCE": "#db2777",
    "FlashAttention": "#dc2626",
    "transformers": "#d97706",
}


def colour(name: str) -> str:
    """The colour of an implementation; ours is blue."""
    return COLOURS.get(name, OURS)


def figure_of(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure, and its axes as an array [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(4.8 * columns, 3.2 * rows), dpi=130, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GRID)
        ax.tick_params(colors=MUTED, length=0)
        ax.grid(axis="y", color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write to another name first, so that a viewer never reads an incomplete file."""
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png")
    os.replace(partial, path)
