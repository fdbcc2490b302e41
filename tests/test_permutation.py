"""The shuffled order is a bijection for every size, differs by epoch and shows no pattern."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data.permutation import permute
from fastbert.data.philox import Purpose


@given(n=st.integers(1, 2000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**32 - 1))
def test_bijection(n, seed, epoch):
    np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@given(n=st.integers(1, 2**40), index=st.floats(0, 1, exclude_max=True))
def test_stays_in_range_however_large(n, index):
    place = permute(np.array([int(index * n)]), n, 1, 0)
    assert 0 <= place[0] < n


def test_an_index_goes_to_the_same_place_whatever_it_is_asked_with():
    whole = permute(np.arange(1000), 1000, 5, 3)
    some = np.array([999, 0, 17, 17])
    np.testing.assert_array_equal(permute(some, 1000, 5, 3), whole[some])


def test_seeds_and_epochs_give_other_orders():
    orders = [permute(np.arange(500), 500, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 10  # unrelated ones agree in one place on average


def test_numbers_and_purposes_give_other_orders():
    """The windows of an epoch, and its blocks, have orders of their own."""
    assert (permute(np.arange(500), 500, 3, 2) == permute(np.arange(500), 500, 3, 2, 0)).all()
    orders = [
        permute(np.arange(500), 500, 3, epoch, number, purpose)
        for epoch in (0, 1)
        for number in (0, 1, 2, 9)
        for purpose in (Purpose.ORDER, Purpose.BLOCKS)
    ]
    for i, one in enumerate(orders):
        assert (np.sort(one) == np.arange(500)).all()
        for other in orders[:i]:
            assert (one == other).sum() < 10


def test_every_index_goes_everywhere_equally_often_over_the_epochs():
    n, epochs = 12, 6000
    places = np.stack([permute(np.arange(n), n, 1, epoch) for epoch in range(epochs)])
    counts = np.stack([np.bincount(places[:, i], minlength=n) for i in range(n)])
    expected = epochs / n
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 190  # (n - 1)**2 = 121 degrees of freedom: 1 in 10,000 lies above


def test_neighbours_do_not_stay_together():
    n = 10_000
    distance = np.abs(np.diff(permute(np.arange(n), n, 1, 0)))
    assert abs(distance.mean() - n / 3) < n / 50 and (distance < 10).mean() < 0.005
