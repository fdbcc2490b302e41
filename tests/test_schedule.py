"""The learning rate over the course of a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.config import ScheduleConfig
from fastbert.training.schedule import factor


@pytest.mark.parametrize("decay", ["linear", "constant", "cosine", "wsd"])
def test_warmup_is_linear_and_ends_at_the_peak(decay):
    schedule = ScheduleConfig(warmup=0.2, decay=decay, cooldown=0.25)
    assert [factor(schedule, s) for s in (0.0, 0.05, 0.1, 0.2)] == pytest.approx(
        [0.0, 0.25, 0.5, 1.0]
    )


@pytest.mark.parametrize(
    "decay, expected",
    [
        ("linear", [1.0, 0.5, 0.25, 0.0]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("cosine", [1.0, 0.5, 0.5 * (1 - 2**-0.5), 0.0]),
        ("wsd", [1.0, 1.0, 0.8, 0.0]),
    ],
)
def test_what_follows_the_warmup(decay, expected):
    schedule = ScheduleConfig(warmup=0.2, decay=decay, cooldown=0.25)
    assert [factor(schedule, s) for s in (0.2, 0.6, 0.8, 1.0)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "done, expected", [(0.0, 1.0), (0.01, 0.9), (0.25, 0.5), (0.64, 0.2), (1.0, 0.0)]
)
def test_a_cooldown_by_the_square_root(done, expected):
    schedule = ScheduleConfig(warmup=0.2, decay="wsd", cooldown=0.5, cooldown_shape="1-sqrt")
    assert factor(schedule, 0.5 + 0.5 * done) == pytest.approx(expected)


def test_past_the_end_stays_at_the_end():
    assert factor(ScheduleConfig(decay="linear"), 1.7) == 0.0


@pytest.mark.parametrize(
    "schedule", [ScheduleConfig(warmup=1.0), ScheduleConfig(warmup=0.0, decay="wsd", cooldown=0.0)]
)
def test_edges_divide_by_nothing(schedule):
    assert factor(schedule, 1.0) == 1.0


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["linear", "constant", "cosine", "wsd"]),
)
def test_never_outside_0_to_1(share, warmup, cooldown, decay):
    assert (
        0.0
        <= factor(
            ScheduleConfig(warmup=warmup, cooldown=min(cooldown, 1 - warmup), decay=decay), share
        )
        <= 1.0
    )
