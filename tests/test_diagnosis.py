"""Each rule of the diagnosis fires where it should, and only there."""

from __future__ import annotations

import math

import pytest

from fastbert.training import diagnosis
from fastbert.training.diagnosis import (
    GradientNorm,
    compare,
    diverged,
    expected_first_loss,
    first_loss,
    plateau,
    stuck_pairs,
)

BASELINES = {
    "unigram": 6.7,
    "left_bigram": 5.1,
    "two_sided_bigram": 4.3,
    "two_sided_trigram": 3.7,
    "tokens": 1e6,
}


@pytest.mark.parametrize(
    "vocab_size, pairs, loss",
    [(30522, True, 11.02), (30522, True, 11.3), (4096, True, 9.1), (4096, False, 8.32)],
)
def test_a_normal_first_loss(vocab_size, pairs, loss):
    assert first_loss(loss, vocab_size, pairs) is None


def test_first_loss_is_ln_v_plus_ln_2():
    assert expected_first_loss(30522, True) == pytest.approx(math.log(30522) + math.log(2))
    assert expected_first_loss(30522, False) == pytest.approx(math.log(30522))


def test_a_first_loss_that_is_too_high_or_too_low():
    high, low = first_loss(40.0, 30522, True), first_loss(7.0, 30522, True)
    assert (
        high is not None
        and "the first loss is 40.00, expected is 11.02 (ln 30522 + ln 2)" in high
        and "initializer_range" in high
    )
    assert low is not None and "the first loss is 7.00" in low and "labels" in low


def test_plateau():
    line = plateau(0.4, 6.65, BASELINES)
    assert (
        line is not None
        and "6.65" in line
        and "6.70" in line
        and "optimizer.lr" in line
        and "\n" not in line
    )
    assert plateau(0.1, 6.65, BASELINES) is None  # too early to say
    assert plateau(0.4, 6.2, BASELINES) is None  # it has left it


def test_stuck_pairs():
    line = stuck_pairs(0.6, 0.692, 0.51)
    assert line is not None and "0.692" in line and "51%" in line and "\n" not in line
    assert stuck_pairs(0.3, 0.692, 0.51) is None
    assert stuck_pairs(0.6, 0.62, 0.66) is None
    assert stuck_pairs(0.6, None, None) is None  # trained without pairs


@pytest.mark.parametrize("loss", [math.nan, math.inf, 7.65e10, 30.0])
def test_a_run_that_has_diverged_is_told_that_and_nothing_else(loss):
    line = diverged(loss, 1000, True)
    assert (
        line is not None
        and "training has diverged" in line
        and "optimizer.lr" in line
        and "7.60" in line
        and "\n" not in line
    )
    assert ("not finite" in line) != math.isfinite(loss)
    if not math.isfinite(loss):
        assert plateau(1.0, loss, BASELINES) is None and stuck_pairs(1.0, loss, 0.4) is None


@pytest.mark.parametrize("loss", [0.1, 6.9, 7.6, 9.0])
def test_a_loss_that_any_run_may_have_is_no_divergence(loss):
    assert diverged(loss, 1000, True) is None


@pytest.mark.parametrize(
    "loss, expected",
    [
        (6.9, "above word frequencies (6.70)"),
        (5.9, "below word frequencies (6.70), above the left neighbour (5.10)"),
        (4.3, "below the left neighbour (5.10), above both neighbours (4.30)"),
        (3.0, "below two neighbours a side (3.70)"),
    ],
)
def test_compare(loss, expected):
    assert compare(loss, BASELINES) == expected


def norms(*values: float) -> list[tuple[int, str]]:
    watch = GradientNorm()
    return [(step, line) for step, value in enumerate(values) if (line := watch.add(step, value))]


def test_an_exploding_gradient():
    usual = [1.0 + 0.3 * math.sin(i) for i in range(150)]
    found = norms(*usual, 20.0, 40.0, 80.0, 160.0)
    assert [step for step, _ in found] == [152, 153]
    assert (
        "the gradient norm is 80 at step 152, 80 times its running median" in found[0][1]
        and "optimizer.lr" in found[0][1]
    )
    assert norms(*usual, float("inf"), float("inf"), float("inf"))


def test_a_gradient_that_does_not_explode():
    usual = [1.0 + 0.3 * math.sin(i) for i in range(150)]
    assert norms(*usual, 50.0, 1.0, 50.0, 60.0, 1.0) == []  # single bad batches
    assert norms(*[50.0 * 0.97**i for i in range(300)]) == []  # the fall from a high start
    assert (
        norms(*usual, *[1.02**i for i in range(150)]) == []
    )  # a slow drift moves the median along
    assert (
        norms(*[1.0] * (diagnosis.NORM_WINDOW - 1), 99.0, 99.0, 99.0) == []
    )  # too early to know what is usual
