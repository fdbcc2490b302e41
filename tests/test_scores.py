"""Scores, against those of scikit-learn and SciPy."""

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
    assert scores.accuracy(answers, truth) == pytest.approx(sklearn.metrics.accuracy_score(truth, answers))
    assert scores.f1(answers, truth) == pytest.approx(sklearn.metrics.f1_score(truth, answers, average=average))
    assert scores.matthews(answers, truth) == pytest.approx(sklearn.metrics.matthews_corrcoef(truth, answers))
    assert np.array_equal(
        scores.confusion(answers, truth, classes), sklearn.metrics.confusion_matrix(truth, answers, labels=range(classes))
    )


@pytest.mark.parametrize("seed", range(4))
def test_of_numbers(seed):
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 6, 40).astype(np.float64)  # many are equal
    answers = truth + draw.normal(size=40).round(1)
    assert scores.pearson(answers, truth) == pytest.approx(scipy.stats.pearsonr(answers, truth)[0])
    assert scores.spearman(answers, truth) == pytest.approx(scipy.stats.spearmanr(answers, truth)[0])


def test_answers_that_are_all_alike_correlate_with_nothing():
    same, truth = np.zeros(4, np.int64), np.array([0, 1, 0, 1])
    assert scores.matthews(same, truth) == 0 and scores.f1(same, truth) == 0
    assert scores.spearman(same.astype(float), truth.astype(float)) == 0


def test_the_picture_of_a_table(tmp_path):
    scores.draw_confusion(np.array([[3, 1], [0, 0]]), ["a label with a very long name indeed", "b"], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
