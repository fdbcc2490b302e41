"""The conditions that end a run, and its progress."""

from __future__ import annotations

import math

import pytest

from fastbert.config import RunConfig, ScheduleConfig, StopConfig
from fastbert.training.train_state import StopCriteria, TrainState


def criteria(over: str = "steps", steps_per_epoch: float = 12.5, **stop) -> StopCriteria:
    return StopCriteria(
        RunConfig(data="dataset", stop=StopConfig(**stop), schedule=ScheduleConfig(over=over)),
        steps_per_epoch,
    )


@pytest.mark.parametrize(
    "stop, before, after, reason",
    [
        ({"steps": 5}, TrainState(step=4), TrainState(step=5), "stop.steps = 5"),
        ({"epochs": 2.0}, TrainState(step=24), TrainState(step=25), "stop.epochs = 2"),
        ({}, TrainState(step=12), TrainState(step=13), "stop.epochs = 1"),
        (
            {"tokens": 900},
            TrainState(step=3, tokens=899),
            TrainState(step=4, tokens=901),
            "stop.tokens = 900",
        ),
        ({"seconds": 1.5}, TrainState(seconds=1.4), TrainState(seconds=1.6), "stop.seconds = 1.5"),
        (
            {"loss": 3.0},
            TrainState(heldout_loss=3.1),
            TrainState(heldout_loss=3.0),
            "stop.loss = 3.0: the held-out loss is 3.0000",
        ),
        (
            {"patience": 2},
            TrainState(evals_since_best=1),
            TrainState(evals_since_best=2, best_loss=4.0),
            "stop.patience = 2: no better than 4.0000 for 2 evaluations",
        ),
        (
            {"steps": 9, "tokens": 5},
            TrainState(step=8),
            TrainState(step=8, tokens=6),
            "stop.tokens = 5",
        ),
    ],
)
def test_each_condition_ends_the_run_and_is_named(stop, before, after, reason):
    assert criteria(**stop).reached(before) is None
    assert criteria(**stop).reached(after) == reason


def test_min_delta_decides_what_is_better():
    done = TrainState()
    for loss, best, evals_since_best in [
        (5.0, 5.0, 0),
        (4.95, 5.0, 1),
        (4.9, 4.9, 0),
        (6.0, 4.9, 1),
        (4.81, 4.9, 2),
    ]:
        done.update_best(loss, min_delta=0.1 - 1e-9)
        assert (done.best_loss, done.evals_since_best, done.heldout_loss) == (
            best,
            evals_since_best,
            loss,
        )


def test_an_equal_loss_is_no_better_without_min_delta():
    done = TrainState()
    done.update_best(5.0, 0.0)
    done.update_best(5.0, 0.0)
    assert done.evals_since_best == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(bad):
    """This holds even for the first loss, after which no other would be better."""
    done, limits = TrainState(step=1), criteria(steps=99, loss=3.0, patience=3)
    for loss, best, evals_since_best in [
        (bad, None, 1),
        (5.0, 5.0, 0),
        (bad, 5.0, 1),
        (4.0, 4.0, 0),
        (bad, 4.0, 1),
        (bad, 4.0, 2),
    ]:
        done.update_best(loss, 0.0)
        assert (done.best_loss, done.evals_since_best, done.heldout_loss) == (
            best,
            evals_since_best,
            None if loss is bad else loss,
        )
        assert limits.reached(done) is None
    done.update_best(bad, 0.0)
    assert limits.reached(done) == "stop.patience = 3: no better than 4.0000 for 3 evaluations"
    never = TrainState(step=1)
    for _ in range(3):
        never.update_best(bad, 0.0)
    assert limits.reached(never) == "stop.patience = 3: none has been finite for 3 evaluations"


def test_weights_are_proven_by_a_later_step_that_was_applied():
    done = TrainState()
    done.applied(10)
    assert done.applied_since(0) and not done.applied_since(1)
    done.skip()
    done.skip()
    assert not done.applied_since(1)
    done.applied(10)
    assert done.applied_since(1) and done.applied_since(3) and not done.applied_since(4)


def test_the_schedule_follows_its_own_unit_and_the_nearest_limit():
    done = TrainState(step=5, tokens=300, seconds=8.0)
    assert criteria("steps", steps=10, tokens=400).scheduled(done) == 0.5
    assert criteria("tokens", steps=10, tokens=400).scheduled(done) == 0.75
    assert criteria("seconds", steps=10, seconds=10.0).scheduled(done) == 0.8
    # Half an epoch is 6.25 steps.
    assert criteria("steps", steps=10, epochs=0.5).scheduled(done) == 0.8
    assert criteria("steps", tokens=400).scheduled(done) == 0.0  # a flat schedule needs no criteria


def test_share_and_time_left_follow_the_limit_that_comes_first():
    done = TrainState(step=5, tokens=300, seconds=9.0)
    limits = criteria(steps=10, tokens=400)
    assert limits.share(done) == 0.75
    assert limits.seconds_left(done) == pytest.approx(3.0)
    assert limits.seconds_left(TrainState()) is None


def test_skipped_steps_are_no_updates():
    """AdamW's bias correction counts updates, and a resumed run continues from this number."""
    assert TrainState(step=7, skipped=2, skipped_in_a_row=1).updates == 5
