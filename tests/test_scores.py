"""Scores equal those of scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from fastbert.tasks import scores


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_of_classes(classes, seed):
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, classes, 50)
    answers = np.where(draw.random(50) < 0.6, truth, draw.integers(0, classes, 50))
    average = "binary" if classes == 2 else "macro"
    assert scores.accuracy(answers, truth) == pytest.approx(
        sklearn.metrics.accuracy_score(truth, answers)
    )
    assert scores.f1(answers, truth, classes) == pytest.approx(
        sklearn.metrics.f1_score(truth, answers, average=average)
    )
    assert scores.matthews(answers, truth) == pytest.approx(
        sklearn.metrics.matthews_corrcoef(truth, answers)
    )
    assert np.array_equal(
        scores.confusion(answers, truth, classes),
        sklearn.metrics.confusion_matrix(truth, answers, labels=range(classes)),
    )


@pytest.mark.parametrize("seed", range(4))
def test_of_numbers(seed):
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 6, 40).astype(np.float64)  # many values are equal
    answers = truth + draw.normal(size=40).round(1)
    assert scores.pearson(answers, truth) == pytest.approx(scipy.stats.pearsonr(answers, truth)[0])
    assert scores.spearman(answers, truth) == pytest.approx(
        scipy.stats.spearmanr(answers, truth)[0]
    )


def test_f1_where_two_of_three_classes_occur():
    """The mean over both, as of every task of more than two classes, and not that of class 1."""
    truth, answers = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    expected = sklearn.metrics.f1_score(truth, answers, average="macro")
    assert scores.of_classes(3)["f1"](answers, truth) == pytest.approx(expected)
    assert scores.of_classes(2)["f1"](answers, truth) == pytest.approx(2 / 3)
    assert expected != pytest.approx(2 / 3)


def test_answers_that_are_all_alike_correlate_with_nothing():
    same, truth = np.zeros(4, np.int64), np.array([0, 1, 0, 1])
    assert scores.matthews(same, truth) == 0 and scores.f1(same, truth, 2) == 0
    assert scores.spearman(same.astype(float), truth.astype(float)) == 0


def test_the_picture_of_a_table(tmp_path):
    scores.draw_confusion(
        np.array([[3, 1], [0, 0]]),
        ["a label with a very long name indeed", "b"],
        tmp_path / "x.png",
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_many_classes_are_counted_together(tmp_path):
    """Beyond 30 classes the most frequent ones keep rows and columns, and the rest is summed."""
    draw = np.random.default_rng(0)
    table, labels = draw.integers(0, 9, (75, 75)), [f"c{i}" for i in range(75)]
    table[40] += 100
    small, names = scores._most_frequent(table, labels)
    assert small.shape == (31, 31) and names[-1] == "45 others" and small.sum() == table.sum()
    kept = [int(name[1:]) for name in names[:-1]]
    assert (
        kept == sorted(kept)
        and 40 in kept
        and min(table.sum(1)[kept]) >= max(np.delete(table.sum(1), kept))
    )
    rest = np.setdiff1d(np.arange(75), kept)
    assert np.array_equal(small[:-1, :-1], table[np.ix_(kept, kept)])
    assert np.array_equal(small[-1, :-1], table[np.ix_(rest, kept)].sum(0))
    assert np.array_equal(small[:-1, -1], table[np.ix_(kept, rest)].sum(1))
    assert scores.draw_confusion(table, labels, tmp_path / "x.png") is None


@pytest.mark.parametrize("classes, texts", [(30, 900), (31, 0)])
def test_cells_have_numbers_while_there_is_room(classes, texts):
    figure = scores._confusion_figure(
        np.ones((classes, classes), np.int64), [f"c{i}" for i in range(classes)]
    )
    assert len(figure.axes[0].texts) == texts
