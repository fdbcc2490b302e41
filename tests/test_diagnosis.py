"""Each rule of the diagnosis fires where it should, and only there."""

from __future__ import annotations

import math

import pytest

from fastbert.config import (
    BertConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
)
from fastbert.training import diagnosis
from fastbert.training.diagnosis import (
    GradientNorm,
    TrainingLoss,
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


RECIPE = RunConfig(data="dataset")
ALONE = RunConfig(data="dataset", objective=ObjectiveConfig(kind="mlm"))


@pytest.mark.parametrize(
    "vocab_size, pairs, loss",
    [(30522, True, 11.02), (30522, True, 11.3), (4096, True, 9.1), (4096, False, 8.32)],
)
def test_a_normal_first_loss(vocab_size, pairs, loss):
    assert first_loss(loss, vocab_size, RECIPE if pairs else ALONE) is None


def test_first_loss_is_ln_v_plus_ln_2():
    assert expected_first_loss(30522, True) == pytest.approx(math.log(30522) + math.log(2))
    assert expected_first_loss(30522, False) == pytest.approx(math.log(30522))


def test_a_first_loss_that_is_too_high_or_too_low():
    high, low = first_loss(40.0, 30522, RECIPE), first_loss(7.0, 30522, RECIPE)
    assert (
        high is not None
        and "the first loss is 40.00, expected is 11.02 (ln 30522 + ln 2)" in high
        and "initializer_range" in high
    )
    assert low is not None and "the first loss is 7.00" in low and "labels" in low


def test_plateau():
    line = plateau(0.4, 6.65, BASELINES, RECIPE)
    assert (
        line is not None
        and "6.65" in line
        and "6.70" in line
        and "optimizer.lr" in line
        and "\n" not in line
    )
    assert plateau(0.1, 6.65, BASELINES, RECIPE) is None  # too early to say
    assert plateau(0.4, 6.2, BASELINES, RECIPE) is None  # it has left the plateau


@pytest.mark.parametrize("loss", [6.3, 6.51, 6.65, 6.7, 6.89, 6.95, 7.4])
def test_the_verdict_and_the_note_use_the_same_words(loss):
    """A loss must be below by a margin: 5.895 against 5.92 was called both below and no better."""
    line, place = plateau(0.4, loss, BASELINES, RECIPE), compare(loss, BASELINES)
    if line is None:
        assert place.startswith("below word frequencies")
    else:
        word = place.partition(" ")[0]
        assert word in ("near", "above") and f", {word} word frequencies (6.70): " in line


@pytest.mark.parametrize(
    ("recipe", "wanted", "unwanted"),
    [
        (RECIPE, 'model.initial_attention = "adjacent", fewer layers, or', "max_grad_norm"),
        (
            RunConfig(data="x", model=BertConfig(initial_attention="adjacent")),
            "optimizer.lr than 0.0001",
            "initial_attention",
        ),
        (RunConfig(data="x", init="y"), "optimizer.lr", "initial_attention"),
        (RunConfig(data="x", model=BertConfig(num_hidden_layers=1)), "batch", "fewer layers"),
    ],
)
def test_what_is_set_already_is_not_advised(recipe, wanted, unwanted):
    line = plateau(0.4, 6.65, BASELINES, recipe)
    assert line is not None and wanted in line and unwanted not in line


@pytest.mark.parametrize(
    ("clip", "advised"), [(0.0, True), (5.0, True), (1.0, False), (0.5, False)]
)
def test_clipping_is_advised_where_there_is_none(clip, advised):
    recipe = RunConfig(data="x", optimizer=OptimizerConfig(max_grad_norm=clip))
    watch = GradientNorm(recipe)
    lines = [watch.add(i, 1.0 if i < 120 else 99.0) for i in range(125)]
    for line in (diverged(30.0, 1000, recipe), next(line for line in lines if line)):
        assert line is not None and ("max_grad_norm = 1.0" in line) == advised


@pytest.mark.parametrize(("scale", "words"), [(0.5, "= 0.02"), (0.02, "below the present 0.02")])
def test_a_smaller_start_is_advised_by_what_it_is(scale, words):
    recipe = RunConfig(data="x", model=BertConfig(initializer_range=scale))
    line = first_loss(40.0, 30522, recipe)
    assert line is not None and words in line


def test_worse_than_chance_is_not_chance():
    for loss, accuracy in ((1.251, 0.0), (0.836, 0.42)):
        line = stuck_pairs(0.6, loss, accuracy)
        assert line is not None and "worse than chance" in line and "no better" not in line
    line = stuck_pairs(0.6, 0.7, 0.5)
    assert line is not None and "no better than chance" in line


def test_stuck_pairs():
    line = stuck_pairs(0.6, 0.692, 0.51)
    assert line is not None and "0.692" in line and "51%" in line and "\n" not in line
    assert stuck_pairs(0.3, 0.692, 0.51) is None
    assert stuck_pairs(0.6, 0.62, 0.66) is None
    assert stuck_pairs(0.6, None, None) is None  # trained without pairs


@pytest.mark.parametrize("loss", [math.nan, math.inf, 7.65e10, 30.0])
def test_a_run_that_has_diverged_is_told_that_and_nothing_else(loss):
    line = diverged(loss, 1000, RECIPE)
    assert (
        line is not None
        and "training has diverged" in line
        and "optimizer.lr" in line
        and "7.60" in line
        and "\n" not in line
    )
    assert ("not finite" in line) != math.isfinite(loss)
    if not math.isfinite(loss):
        assert plateau(1.0, loss, BASELINES, RECIPE) is None and stuck_pairs(1.0, loss, 0.4) is None


@pytest.mark.parametrize("loss", [0.1, 6.9, 7.6, 9.0])
def test_a_loss_that_any_run_may_have_is_no_divergence(loss):
    assert diverged(loss, 1000, RECIPE) is None


@pytest.mark.parametrize(
    "loss, expected",
    [
        (7.0, "above word frequencies (6.70)"),
        (6.89, "near word frequencies (6.70)"),
        (6.51, "near word frequencies (6.70)"),
        (6.49, "below word frequencies (6.70), above the left neighbour (5.10)"),
        (5.9, "below word frequencies (6.70), above the left neighbour (5.10)"),
        (4.3, "below the left neighbour (5.10), above both neighbours (4.30)"),
        (3.0, "below two neighbours a side (3.70)"),
    ],
)
def test_compare(loss, expected):
    assert compare(loss, BASELINES) == expected


def norms(*values: float) -> list[tuple[int, str]]:
    watch = GradientNorm(RECIPE)
    return [(step, line) for step, value in enumerate(values) if (line := watch.add(step, value))]


def losses(*values: float) -> list[tuple[int, str]]:
    watch = TrainingLoss(1000, RECIPE)
    return [
        (step, line) for step, value in enumerate(values, 1) if (line := watch.add(step, value))
    ]


def test_a_training_loss_that_explodes():
    """ln 1000 + ln 2 = 7.6; no evaluation and no window of 100 steps is waited for."""
    found = losses(7.7, 900.0, 8e3, 1e5, 1e5)
    assert [step for step, _ in found] == [4, 5]
    assert (
        "the loss of step 4 is 1e+05, an untrained model has 7.60: training has diverged"
        in found[0][1]
    )
    assert "a lower optimizer.lr than" in found[0][1]


@pytest.mark.parametrize(
    "values",
    [
        [7.7, 900.0, 900.0, 7.0, 900.0, 900.0, 7.0],  # single bad batches
        [40.0, 39.0, 41.0, 30.0, 20.0],  # a start that is too wild, about which `first_loss` speaks
        [7.6, 14.9, 14.9, 14.9],  # less than twice an untrained model's
        [1.0, 3.0, 3.0, 3.0],
    ],
)
def test_a_training_loss_that_does_not_explode(values):
    assert losses(*values) == []


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
    # A slow drift moves the median along.
    assert norms(*usual, *[1.02**i for i in range(150)]) == []
    # It is too early to know what is usual.
    assert norms(*[1.0] * (diagnosis.NORM_WINDOW - 1), 99.0, 99.0, 99.0) == []
