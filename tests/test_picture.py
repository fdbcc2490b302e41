"""Pictures show users' texts unchanged, and a failed picture ends no run."""

from __future__ import annotations

import functools
import io
import warnings
import xml.etree.ElementTree as tree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from fastbert.recipe import load_config
from fastbert.tasks import scores
from fastbert.tasks.run_report import report
from fastbert.training.history import History
from fastbert.training.loop import pretrain
from fastbert.training.picture import draw_mlm, loss_figure, svg, write_picture
from tests.trials import Laboratory

NAMES = [r"cost_$5_vs_$6", r"$\frac{$", r"\$a_{b}^c$", "中文 हिन्दी 🙂", "two\nlines"]
UNREADABLE = "\ud800"  # half a character, as JSON can hold it


def history() -> History:
    found = History(("loss_mlm", "loss_nsp"))
    found.read([{"step": step, "loss_mlm": 7.0 / step, "loss_nsp": None} for step in (1, 2, 3)])
    return found


def words(figure: Any) -> set[str]:
    """Return the texts of a figure, as they are in its SVG with text kept as text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        figure.savefig(buffer, format="svg")
    return {
        "".join(element.itertext())
        for element in tree.fromstring(buffer.getvalue()).iter("{http://www.w3.org/2000/svg}text")
    }


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_there_as_they_are(tmp_path, name):
    table, labels = np.array([[3, 1], [0, 2]]), [name, "b"]
    drawn = write_picture(
        tmp_path / "loss.png", lambda: loss_figure(history(), name, {"unigram": 6.7})
    )
    assert drawn is None
    assert scores.draw_confusion(table, labels, tmp_path / "confusion.png") is None
    for picture in ("loss.png", "confusion.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    if "\n" not in name:
        assert name in words(loss_figure(history(), name, {})) and name in words(
            scores._confusion_figure(table, labels)
        )


def test_no_text_of_users_is_read_as_a_formula():
    """In no figure of fastbert may a text without a formula be taken for one."""
    for figure in (
        loss_figure(history(), "a", {"unigram": 6.7}),
        scores._confusion_figure(np.eye(2, dtype=int), ["a", "b"]),
    ):
        shown = [text for text in figure.findobj(Text) if text.get_text() in ("a", "b")]
        assert shown and not any(text.get_parse_math() for text in shown)


# What a matplotlibrc, or plt.style.use in a notebook, may hold.
STYLES = {
    "latex": {"text.usetex": True},
    "look": {"savefig.dpi": 900, "font.size": 60, "axes.facecolor": "black", "axes.grid": False},
}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_the_style_of_the_user_changes_no_picture(tmp_path, style):
    def drawn(folder: Path) -> list[bytes]:
        folder.mkdir()
        figure = functools.partial(loss_figure, history(), "run", {"unigram": 6.7})
        assert write_picture(folder / "loss.png", figure) is None
        table = np.array([[3, 1], [0, 2]])
        assert scores.draw_confusion(table, ["a", "b"], folder / "confusion.png") is None
        page = svg("loss", lambda ax: draw_mlm(ax, history(), {}))
        return [(folder / n).read_bytes() for n in ("loss.png", "confusion.png")] + [page.encode()]

    wanted = drawn(tmp_path / "plain")
    with matplotlib.rc_context(style):
        before = dict(matplotlib.rcParams)
        assert drawn(tmp_path / "styled") == wanted
        assert matplotlib.rcParams == before


def directory(path: Path) -> None:
    (path / "x.png").mkdir()


def gone(path: Path) -> None:
    path.rmdir()


@pytest.mark.parametrize("obstacle", [directory, gone])
def test_what_cannot_be_written_is_told(tmp_path, obstacle: Callable[[Path], None]):
    folder = tmp_path / "folder"
    folder.mkdir()
    obstacle(folder)
    before = sorted(tmp_path.rglob("*"))
    problem = write_picture(folder / "x.png", lambda: loss_figure(history(), "run", {}))
    assert (
        problem is not None
        and problem.startswith(f"{folder / 'x.png'} could not be drawn: ")
        and "\n" not in problem
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_drawn_is_told(tmp_path):
    problem = scores.draw_confusion(np.eye(2, dtype=int), [UNREADABLE, "b"], tmp_path / "x.png")
    assert (
        problem is not None
        and problem.startswith(f"{tmp_path / 'x.png'} could not be drawn: ")
        and list(tmp_path.iterdir()) == []
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("pictures"), small_dataset.path)


@pytest.mark.slow
def test_a_run_with_two_dollar_signs_in_its_name(lab, capsys):
    """Such a run is trained, resumed and reported."""
    trial = lab.trial(steps=3)
    run = trial.folder / "cost_$5_vs_$6"
    for more in ([], ["stop.steps=5"]):
        config = load_config(trial.recipe, [f"run={run}", *more])
        assert pretrain(config, str(trial.recipe), resume=bool(more)).exit_code == 0
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
        (run / "loss.png").unlink()
    assert "could not be drawn" not in (run / "log.txt").read_text()
    assert "cost_$5_vs_$6" in report(run).read_text()


def test_a_picture_that_cannot_be_drawn_ends_no_run(lab):
    trial = lab.trial(steps=3)
    trial.resume(1, "stop.steps=2")
    (trial.run / "loss.png").unlink()
    (trial.run / "loss.png").mkdir()
    trial.resume()
    assert trial.records("stop")[-1]["reason"] == "stop.steps = 3"
    (line,) = [
        line
        for line in (trial.run / "log.txt").read_text().splitlines()
        if "could not be drawn" in line
    ]
    assert "loss.png could not be drawn: IsADirectoryError" in line and "WARNING" in line
