"""Every tile of every sequence is listed once, long sequences first, and nothing else is."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert_kernels._worklist import ITEM, attention_worklist


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5 * ITEM), max_size=20))
def test_each_tile_once_and_the_longest_first(lengths):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    work = attention_worklist(bounds, sum(lengths))
    assert work.dtype == torch.int32
    items = [tuple(item) for item in work.tolist() if item[0] >= 0]
    assert sorted(items) == [(i, first) for i, length in enumerate(lengths) for first in range(0, length, ITEM)]
    order = [lengths[sequence] for sequence, _ in items]
    assert order == sorted(order, reverse=True)


def test_an_uneven_batch():
    bounds = torch.tensor([0, 1, 1 + 8192, 1 + 8192 + 130], dtype=torch.int32)
    work = attention_worklist(bounds, int(bounds[-1]))
    assert work[:3].tolist() == [[1, 0], [1, 128], [1, 256]]
    assert work[64:67].tolist() == [[2, 0], [2, 128], [0, 0]]
    assert (work[67:, 0] == -1).all()
