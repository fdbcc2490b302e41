"""Figures of the results in results.jsonl, if matplotlib is installed: attention and curves.

    python -m benchmarks.gpu.pictures FOLDER

Attention is plotted over the sequence length.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.gpu import curves
from benchmarks.gpu.report import latest
from benchmarks.gpu.results import Line, read
from benchmarks.harness.tables_and_plots import colour, figure_of, save
from fastbert.training.picture import INK, MUTED

OURS_COLOURS = {"triton": "#1d4ed8", "triton, best tiles": "#0891b2"}


def draw_attention(lines: list[Line], path: Path) -> None:
    """Plot TFLOP/s of each implementation over the length, forward and backward.

    There is a row of panels for each dropout.
    """
    found: dict[tuple[float, str], dict[str, list[tuple[int, float]]]] = {}
    for line in latest(lines, "time"):
        if (
            line["operation"] == "attention"
            and line["shape"]["K"] == 64
            and line["pass"] != "both"
            and line["rate"]
        ):
            panel = found.setdefault((line["dropout_p"], line["pass"]), {})
            panel.setdefault(line["implementation"], []).append(
                (line["shape"]["longest"], line["rate"] / 1e12)
            )
    if not found:
        return
    figure, axes = figure_of(2, 2)
    for ax, dropout, which in (
        (axes[i][j], (0.0, 0.1)[i], ("forward", "backward")[j]) for i in range(2) for j in range(2)
    ):
        _lines(ax, found.get((dropout, which), {}))
        ax.set_title(
            f"{which}, dropout {dropout:g}", loc="left", color=INK, fontsize=10, fontweight="bold"
        )
        ax.set(xscale="log")
        ax.set_ylim(bottom=0)
        ax.set_ylabel("TFLOP/s", color=MUTED)
    save(figure, path)


def draw_curves(lines: list[Line], path: Path) -> None:
    found = curves.joined(lines)
    if not found:
        return
    dropouts = sorted({dropout for dropout, _ in found})
    figure, axes = figure_of(1, len(dropouts))
    for ax, dropout in zip(axes[0], dropouts, strict=True):
        _lines(
            ax,
            {name: list(enumerate(losses)) for (p, name), losses in found.items() if p == dropout},
        )
        ax.set_title(f"dropout {dropout:g}", loc="left", color=INK, fontsize=10, fontweight="bold")
        ax.set_ylabel("loss, nats", color=MUTED)
    save(figure, path)


def _lines(ax, named: Mapping[str, list[tuple[int, float]]]) -> None:
    for name, points in named.items():
        ax.plot(
            *zip(*sorted(points), strict=True),
            label=name,
            color=OURS_COLOURS.get(name, colour(name)),
            linewidth=2.0 if name in OURS_COLOURS else 1.2,
        )
    if named:
        ax.legend(frameon=False, fontsize=8, labelcolor=INK)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder of results.jsonl")
    folder = parser.parse_args().folder
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "matplotlib is not installed: no figures here; "
            "the same command draws them on another machine from results.jsonl"
        )
        return 0
    lines = read(folder)
    draw_attention(lines, folder / "attention.png")
    draw_curves(lines, folder / "curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
