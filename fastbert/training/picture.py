"""Draws curves: loss.png, and those of the page of `fastbert report`; and writes any picture."""

from __future__ import annotations

import contextlib
import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastbert.durable import replacing
from fastbert.training.diagnosis import NAMES
from fastbert.training.history import History

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
# Sources differ by dashes first, so that the first ones do not compete with the main curves.
_SOURCES, _DASHES = (MUTED, "#0f766e", "#be185d", "#92400e"), ("-", "--", ":")
TRAIN, HELDOUT, MASKED, NSP = "#93b4e8", "#1d4ed8", "#d97706", "#7c3aed"
_DOTS: dict[str, Any] = {"marker": "o", "markersize": 3.2, "linewidth": 1.4}


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
            with own_style():
                draw().savefig(staging, format="png")
    except Exception as error:
        return f"{path} could not be drawn: " + " ".join(f"{type(error).__name__}: {error}".split())
    return None


@contextlib.contextmanager
def own_style(settings: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """Draw with matplotlib's defaults and these settings, whatever the user's matplotlibrc says.

    A user may have fonts of 30 points, a black background, or LaTeX for every text, which fails
    where no LaTeX is installed.
    """
    import matplotlib

    # The backend is chosen by the class of the canvas; matplotlib warns where it is set here.
    defaults: Any = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
    with matplotlib.rc_context(defaults | dict(settings)):
        yield


def loss_figure(history: History, title: str, baselines: Mapping[str, float]) -> Any:
    """The losses of a run with the corpus's baselines, as a figure for loss.png.

    Args:
        history: with the columns loss_mlm and loss_nsp.
        title: the run's name.
        baselines: the corpus's baselines by name, in nats.
    """
    # The import takes 0.9 s, so it is done for the first picture and not at the start.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = bool(history.smooth("loss_nsp")[0])
    figure = Figure(
        figsize=(9, 6.4 if pairs else 4.8), dpi=130, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        2 if pairs else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1] if pairs else [1]
    )[:, 0]
    draw_mlm(axes[0], history, baselines)
    axes[0].set_ylabel("MLM loss, nats per token", color=MUTED)
    if pairs:
        draw_nsp(axes[1], history)
        axes[1].set_ylabel("NSP loss", color=MUTED)
    # The user chooses the run's name, and a "$" in it must not begin a formula.
    axes[0].set_title(
        title, loc="left", color=INK, fontsize=12, fontweight="bold", parse_math=False
    )
    axes[-1].set_xlabel("optimizer steps", color=MUTED)
    last = [*history.column("step")[-1:], *(e["step"] for e in history.evaluations[-1:])]
    axes[0].set_xlim(0, max(last, default=1))
    for ax in axes:
        _plain(ax)
    return figure


def draw_mlm(ax: Any, history: History, baselines: Mapping[str, float]) -> None:
    """Draw the MLM losses, with each baseline as a line and its name to the right.

    Dotted vertical lines show where a phase begins.
    """
    ax.plot(*history.smooth("loss_mlm"), color=TRAIN, linewidth=1.6, label="training batches")
    ax.plot(*history.evaluated("loss_mlm"), color=HELDOUT, label="held-out", **_DOTS)
    shown = history.evaluated("loss_mask_token")
    ax.plot(*shown, color=MASKED, label="held-out, [MASK] alone", **_DOTS)
    # The sources of a mixture, whose mean is the held-out line. Their names are in the legend.
    styles = itertools.cycle(itertools.product(_SOURCES, _DASHES))
    names = dict.fromkeys(name for e in history.evaluations for name in e.get("sources", {}))
    for name, (colour, dashes) in zip(names, styles, strict=False):
        found = [(e["step"], e["sources"][name]["loss_mlm"]) for e in history.evaluations]
        ax.plot(*zip(*found, strict=True), color=colour, linestyle=dashes, linewidth=1, label=name)
    for value, name in sorted((value, name) for name, value in baselines.items() if name in NAMES):
        _level(ax, value, f"{NAMES[name]} {value:.2f}")
    begun = {e["first_step"] for e in history.events if e["event"] == "phase"}
    for step in begun - {0}:
        ax.axvline(step, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    legend = ax.legend(frameon=False, labelcolor=INK, fontsize="small", loc="best")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a source is named after a folder, which may contain a $


def draw_nsp(ax: Any, history: History) -> None:
    """Draw the NSP losses, with chance as a line."""
    ax.plot(*history.smooth("loss_nsp"), color=TRAIN, linewidth=1.6)
    ax.plot(*history.evaluated("loss_nsp"), color=NSP, **_DOTS)
    _level(ax, math.log(2), "chance (ln 2)")
    ax.set_ylim(bottom=0)


def draw_accuracy(ax: Any, history: History) -> None:
    """Draw the held-out accuracies in percent."""
    for key, colour, name in (
        ("accuracy_mlm", HELDOUT, "masked tokens"),
        ("accuracy_nsp", NSP, "next sentences"),
    ):
        x, y = history.evaluated(key)
        if x:
            ax.plot(x, [100 * value for value in y], color=colour, label=name, **_DOTS)
            ax.legend(frameon=False, labelcolor=INK, fontsize="small")
    ax.set_ylim(0, 100)


def svg(title: str, draw: Callable[[Any], Any]) -> str:
    """Return what `draw` draws on its axes as an SVG that fills the width it is given."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    # Text stays text, in the reader's own font. Ids are derived from the title, so that two curves
    # have different ids and the page is reproducible.
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.size": 8.0,
    }
    with own_style(settings):
        figure = Figure(figsize=(4.0, 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        ax = figure.subplots()
        draw(ax)
        ax.set_title(title, loc="left", color=INK, fontsize=9, fontweight="bold")
        ax.set_xlabel("steps", color=MUTED)
        _plain(ax)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # Without its metadata and its fixed size, the SVG scales with the page.
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    for side in ("height", "width"):
        text = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRID)
    ax.tick_params(colors=MUTED, length=0)
    ax.grid(axis="y", color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)


def _level(ax: Any, value: float, text: str) -> None:
    """Draw a horizontal line, and its name to the right of the axes."""
    ax.axhline(value, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
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
