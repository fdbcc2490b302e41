"""Scores of predictions: accuracy, F1, Matthews, Pearson and Spearman correlation, confusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.training.picture import INK, write_picture

SHOWN = 30  # classes in the picture


def accuracy(answers: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of correct predictions; both arguments are int [N]."""
    return float((answers == truth).mean())


def confusion(answers: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Return how often each true class (row) was predicted as each class (column).

    The result is int64 [classes, classes].
    """
    counts = np.bincount(truth * classes + answers, minlength=classes * classes)
    return counts.reshape(classes, classes)


def f1(answers: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Return the F1 score.

    Of a task of two classes it is that of the second one, as in GLUE (1 among 0 and 1). Of more
    classes it is the mean over those that occur.
    """
    table = confusion(answers, truth, classes)
    right, either = np.diag(table), table.sum(0) + table.sum(1)
    scores = 2 * right / np.maximum(either, 1)
    return float(scores[1]) if classes == 2 else float(scores[either > 0].mean())


def matthews(answers: np.ndarray, truth: np.ndarray) -> float:
    """Return the Matthews correlation; 0 where all predictions, or all true classes, are equal.

    Source: Gorodkin, 2004, for any number of classes.
    """
    table = confusion(answers, truth, int(max(answers.max(), truth.max())) + 1).astype(np.float64)
    n, given, true = table.sum(), table.sum(0), table.sum(1)
    spread = (n * n - given @ given) * (n * n - true @ true)
    return float((np.trace(table) * n - given @ true) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(answers: np.ndarray, truth: np.ndarray) -> float:
    """Return the Pearson correlation of numbers, float [N]; 0 where either does not vary."""
    # fp64, because squares of large numbers overflow fp32.
    answers, truth = answers.astype(np.float64), truth.astype(np.float64)
    a, b = answers - answers.mean(), truth - truth.mean()
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else 0.0


def spearman(answers: np.ndarray, truth: np.ndarray) -> float:
    """Return the Pearson correlation of the ranks; equal values get the mean of their ranks."""
    return pearson(_ranks(answers), _ranks(truth))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((2 * ends - counts - 1) / 2)[inverse]


Score = Callable[[np.ndarray, np.ndarray], float]
OF_NUMBERS: dict[str, Score] = {"spearman": spearman, "pearson": pearson}


def of_classes(classes: int) -> dict[str, Score]:
    """The scores of a classification task; some of its classes may not occur."""
    return {"accuracy": accuracy, "f1": partial(f1, classes=classes), "matthews": matthews}


def draw_confusion(table: np.ndarray, labels: Sequence[str], path: Path) -> str | None:
    """Draw the confusion matrix: rows are true classes, columns predictions, shades row shares.

    Of more than SHOWN classes the most frequent ones are drawn, and the others as one class,
    without numbers. The time and the memory for a picture grow with the square of the classes.

    Returns:
        One line on why it could not be drawn, or None.
    """
    return write_picture(path, lambda: _confusion_figure(table, labels))


def _confusion_figure(table: np.ndarray, labels: Sequence[str]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole, classes = len(labels) <= SHOWN, len(labels)
    if not whole:
        table, labels = _most_frequent(table, labels)
    size = 2.0 + (0.55 if whole else 0.3) * len(labels)
    figure = Figure(figsize=(size + 1.2, size), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    picture = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if whole:
        for (row, column), count in np.ndenumerate(table):
            shade = "white" if shares[row, column] > 0.6 else INK
            ax.text(
                column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=shade
            ).set_in_layout(False)
    else:
        figure.colorbar(picture, label="share of the row", shrink=0.5)
        ax.set_title(
            f"the {SHOWN} most frequent of {classes:,} classes", loc="left", color=INK, fontsize=10
        )
    names = [label if len(label) <= 24 else label[:23] + "…" for label in labels]
    places = range(len(names))
    # The labels come from the user: "$" in them does not start a formula.
    ax.set_xticks(
        places, names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8, parse_math=False
    )
    ax.set_yticks(places, names, fontsize=8, parse_math=False)
    ax.set(xlabel="answered", ylabel="true")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return figure


def _most_frequent(table: np.ndarray, labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Merge all classes but the SHOWN most frequent ones, which keep their order."""
    kept = np.sort(np.argsort(-table.sum(1), kind="stable")[:SHOWN])
    places = np.full(len(labels), SHOWN)
    places[kept] = np.arange(SHOWN)
    small = np.zeros((SHOWN + 1, SHOWN + 1), table.dtype)
    np.add.at(small, (places[:, None], places[None, :]), table)
    return small, [*(labels[int(i)] for i in kept), f"{len(labels) - SHOWN:,} others"]
