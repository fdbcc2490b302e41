"""Tables and plots: Markdown tables, how plots look, and the parts of a page that a program fills.

Such a part stands between `<!-- NAME -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
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
PLACE = re.compile(r"(<!-- (?P<name>\w+) -->\n).*?(<!-- end of (?P=name) -->)", re.DOTALL)


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


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [list(columns), ["---"] * len(columns), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def places(page: str) -> list[str]:
    """The names of the places in the text."""
    return [match["name"] for match in PLACE.finditer(page)]


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The text with these parts in their places.

    Raises:
        SystemExit: a part has no place, or more than one.
    """
    there = places(page)
    for name in parts:
        if (times := there.count(name)) != 1:
            raise SystemExit(
                f"<!-- {name} --> ... <!-- end of {name} --> is there {times} times; "
                "it must be there once"
            )
    return PLACE.sub(
        lambda match: (
            f"{match[1]}{parts[match['name']]}\n{match[3]}" if match["name"] in parts else match[0]
        ),
        page,
    )
