"""Every tile of every sequence is listed once, long sequences first."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert_kernels._tile_schedule import ITEM, attention_tile_schedule


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5 * ITEM), max_size=20), st.integers(0, 3 * ITEM))
def test_each_tile_once_the_longest_first_and_the_rest_last(lengths, rest):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    total = sum(lengths) + rest
    schedule = attention_tile_schedule(bounds, total)
    assert schedule.dtype == torch.int32 and len(schedule) == total // ITEM + len(lengths) + 1
    items = [tuple(item) for item in schedule.tolist() if item[0] >= 0]
    assert sorted(items) == [
        (i, first) for i, length in enumerate([*lengths, rest]) for first in range(0, length, ITEM)
    ]
    sequences = [sequence for sequence, _ in items]
    order = [lengths[sequence] for sequence in sequences if sequence < len(lengths)]
    assert order == sorted(order, reverse=True)
    assert all(sequence == len(lengths) for sequence in sequences[len(order) :])


def test_an_uneven_batch():
    bounds = torch.tensor([0, 1, 1 + 8192, 1 + 8192 + 130], dtype=torch.int32)
    schedule = attention_tile_schedule(bounds, int(bounds[-1]))
    assert schedule[:3].tolist() == [[1, 0], [1, 128], [1, 256]]
    assert schedule[64:67].tolist() == [[2, 0], [2, 128], [0, 0]]
    assert (schedule[67:, 0] == -1).all()
