"""Draws loss.png, the losses of a run with the corpus's baselines, and writes any picture."""

from __future__ import annotations

import logging
import math
import warnings
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastbert.durable import replacing
from fastbert.training.diagnosis import NAMES

log = logging.getLogger("fastbert")

POINTS = 150  # of the smoothed line; each is the mean over a block of steps
INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
TRAIN, HELDOUT, MASKED, NSP = "#93b4e8", "#1d4ed8", "#d97706", "#7c3aed"


def write_picture(path: Path, draw: Callable[[], Any]) -> str | None:
    """Write the figure that `draw` makes as a PNG.

    It is written under another name first, so that a viewer never reads half of it. Nothing is
    raised, whatever fails, since no picture is worth a run or a model.

    Args:
        path: the file.
        draw: returns a matplotlib figure.

    Returns:
        One line on what went wrong, or None.
    """
    try:
        with replacing(path) as staging, warnings.catch_warnings():
            # Letters that the font does not have are drawn as boxes, each with a warning.
            warnings.simplefilter("ignore")
            draw().savefig(staging, format="png")
    except Exception as error:
        return f"{path} could not be drawn: " + " ".join(f"{type(error).__name__}: {error}".split())
    return None


class LossHistory:
    """Losses by step, at 8 bytes a number.

    A step that is done again, after a resume, replaces itself and all later ones.
    """

    def __init__(self) -> None:
        self._steps = {key: array("d") for key in ("step", "loss_mlm", "loss_nsp")}
        self._evaluations: list[dict[str, Any]] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """Add an object of metrics.jsonl; events other than evaluations are ignored."""
        if record.get("event") == "evaluate":
            losses = {key: record.get(key) for key in ("loss_mlm", "loss_mask_token", "loss_nsp")}
            drawn = {
                "step": record["step"],
                **{key: math.nan if value is None else value for key, value in losses.items()},
            }
            self._evaluations = [e for e in self._evaluations if e["step"] < record["step"]] + [
                drawn
            ]
        elif "event" not in record:
            steps = self._steps["step"]
            while steps and steps[-1] >= record["step"]:
                for column in self._steps.values():
                    column.pop()
            for key, column in self._steps.items():
                column.append(math.nan if record[key] is None else record[key])

    def read(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            self.add(record)

    def draw(self, path: Path, title: str, baselines: Mapping[str, float]) -> None:
        """Write the picture; where that fails, log the reason."""
        if (problem := write_picture(path, lambda: self._figure(title, baselines))) is not None:
            log.warning(problem)

    def _figure(self, title: str, baselines: Mapping[str, float]) -> Any:
        # The import takes 0.9 s, so it is done for the first picture and not at the start.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        pairs = any(not math.isnan(value) for value in self._steps["loss_nsp"])
        figure = Figure(
            figsize=(9, 6.4 if pairs else 4.8), dpi=130, facecolor="white", layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(
            2 if pairs else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1] if pairs else [1]
        )[:, 0]
        self._draw_mlm(axes[0], baselines)
        if pairs:
            self._draw_nsp(axes[1])
        # The user chooses the run's name, and a "$" in it must not begin a formula.
        axes[0].set_title(
            title, loc="left", color=INK, fontsize=12, fontweight="bold", parse_math=False
        )
        axes[-1].set_xlabel("optimizer steps", color=MUTED)
        last = max(
            [*self._steps["step"][-1:], *(e["step"] for e in self._evaluations[-1:])], default=1
        )
        axes[0].set_xlim(0, last)
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.spines[["left", "bottom"]].set_color(GRID)
            ax.tick_params(colors=MUTED, length=0)
            ax.grid(axis="y", color=GRID, linewidth=0.6)
            ax.set_axisbelow(True)
        return figure

    def _draw_mlm(self, ax: Any, baselines: Mapping[str, float]) -> None:
        ax.plot(*self._smooth("loss_mlm"), color=TRAIN, linewidth=1.6, label="training batches")
        steps = [e["step"] for e in self._evaluations]
        dots = {"marker": "o", "markersize": 3.2, "linewidth": 1.4}
        ax.plot(
            steps,
            [e["loss_mlm"] for e in self._evaluations],
            color=HELDOUT,
            label="held-out",
            **dots,
        )
        ax.plot(
            steps,
            [e["loss_mask_token"] for e in self._evaluations],
            color=MASKED,
            label="held-out, [MASK] alone",
            **dots,
        )
        for value, name in sorted(
            (value, name) for name, value in baselines.items() if name in NAMES
        ):
            ax.axhline(value, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
            _label(ax, value, f"{NAMES[name]} {value:.2f}")
        ax.set_ylabel("MLM loss, nats per token", color=MUTED)
        ax.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper right")

    def _draw_nsp(self, ax: Any) -> None:
        ax.plot(*self._smooth("loss_nsp"), color=TRAIN, linewidth=1.6)
        ax.plot(
            [e["step"] for e in self._evaluations],
            [e["loss_nsp"] for e in self._evaluations],
            color=NSP,
            marker="o",
            markersize=3.2,
        )
        ax.axhline(math.log(2), color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        _label(ax, math.log(2), "chance (ln 2)")
        ax.set_ylim(bottom=0)
        ax.set_ylabel("NSP loss", color=MUTED)

    def _smooth(self, key: str) -> tuple[list[float], list[float]]:
        """Means over at most POINTS blocks of steps, each placed at its block's middle."""
        steps, values = self._steps["step"], self._steps[key]
        block = max(1, -(-len(steps) // POINTS))
        starts = range(0, len(steps), block)
        x = [sum(steps[i : i + block]) / len(steps[i : i + block]) for i in starts]
        return x, [sum(values[i : i + block]) / len(values[i : i + block]) for i in starts]


def _label(ax: Any, value: float, text: str) -> None:
    """Write a text to the right of the axes, at the height of `value`."""
    ax.annotate(
        text,
        (1.0, value),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=MUTED,
        fontsize=8,
        annotation_clip=False,
    )
