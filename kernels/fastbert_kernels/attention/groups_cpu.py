"""How `cpu.py` splits a pack: into groups of bins of similar length, padded to the longest one.

A bin is one sequence, or several short ones that do not see each other. Bins of a common length
take more multiplications and fewer, larger operations, of shapes that come again in every pack.
"""

import itertools
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert_kernels._dropout_cpu import COLUMNS
from fastbert_kernels.attention.products_cpu import SCORES

# The tokens of a bin of several sequences. Operands in bf16 make large products so fast that the
# waste pays: attention of sequences of 45 tokens takes two thirds of the time.
BIN = 128
# A group ends where a bin is shorter than this share of its longest one: about seven groups for
# ordinary text without bins of several sequences.
_SHRINK = 0.85
ROUND = 16  # bins of several sequences have a multiple of this many queries


class Group(NamedTuple):
    """The rows of q and of k and v for the padded [B_G, n] of a group of B_G bins."""

    # A slice, or int64 [B_G * n]; padding points at the spare row R of q, or T of k and v.
    query_rows: Tensor | slice
    query_padding: Tensor  # int64 [any]: which of them are padding
    key_rows: Tensor | slice
    mask: Tensor | None  # [B_G, n_q or 1, n_k], 0 or -inf; None where every key is seen
    # int64 [B_G * n_q]: in the sequence of each query, the column of the bin's first key; None
    # where that is 0.
    first_columns: Tensor | None
    bins: int  # B_G
    several: bool  # whether a bin holds more than one sequence


def groups(
    cu_seqlens: Tensor,
    query_indices: Tensor | None,
    rows: int,
    total: int,
    heads: int,
    size: int,
    dropout: bool,
) -> list[Group]:
    """Return the groups of a pack.

    Args:
        cu_seqlens, query_indices: as in `op.py`.
        rows, total: R and T, the rows of q, and those of k and v.
        heads: H.
        size: the tokens of a bin of several sequences; 0 if each has a bin of its own.
        dropout: whether sequences start at a column where a mask may begin.
    """
    bounds = cu_seqlens.long()
    query_bounds = bounds if query_indices is None else torch.searchsorted(query_indices, bounds)
    lengths, query_lengths = bounds.diff(), query_bounds.diff()
    order = lengths.argsort(descending=True, stable=True)
    order = order[query_lengths[order] > 0]
    keys = _Side(bounds[order], _listed(lengths[order]), total)
    queries = _Side(query_bounds[order], _listed(query_lengths[order]), rows)
    return [
        _group(bins, width, keys, queries, query_indices is not None, dropout)
        for width, bins in arrange(keys.lengths, heads, size, dropout)
    ]


def _listed(x: Tensor) -> list[int]:
    return x.tolist()  # type: ignore[type-arg]


class _Side(NamedTuple):
    """The sequences of q, or of k and v, longest first."""

    starts: Tensor  # int64 [sequences], rows of the pack
    lengths: list[int]
    spare: int  # the row that padding points at


def _group(
    bins: list[list[int]], width: int, keys: _Side, queries: _Side, cut: bool, dropout: bool
) -> Group:
    """Build a group of bins of `width` tokens; with `cut`, not all tokens have a query."""
    several = any(len(own) > 1 for own in bins)
    rooms = [[_room(keys.lengths[i], dropout) for i in own] for own in bins]
    asked = [[queries.lengths[i] for i in own] for own in bins]
    query_width = max(map(sum, asked))
    if several:  # shapes that come again
        query_width = -(-query_width // ROUND) * ROUND if cut else width
    numbers = [i for own in bins for i in own]
    places = _places(rooms, width)
    key_rows, key_of = _spread(keys, numbers, places, len(bins) * width)
    query_places = _places(asked, query_width)
    query_rows, query_of = _spread(queries, numbers, query_places, len(bins) * query_width)
    seen_by, asking = key_of.view(-1, 1, width), query_of.view(-1, query_width, 1)
    # Padding sees everything, so that no softmax is empty.
    hidden = (seen_by != asking) & (asking >= 0) if several else seen_by < 0
    mask = first_columns = None
    if hidden.any():
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    if several and dropout:
        first_columns = -(places % width)[query_of]
    padding = (query_of < 0).nonzero()[:, 0]
    return Group(query_rows, padding, key_rows, mask, first_columns, len(bins), several)


def arrange(
    lengths: Sequence[int], heads: int, size: int, dropout: bool
) -> list[tuple[int, list[list[int]]]]:
    """Return n of each group, and its bins, which are lists of the sequences' numbers.

    Args:
        lengths: of the sequences, which descend.
        heads, size, dropout: as for `groups`.
    """
    widths = [
        (lengths[own[0]] if len(own) == 1 else size, own)
        for own in _in_bins([_room(n, dropout) for n in lengths], size)
    ]
    widths.sort(key=itemgetter(0), reverse=True)
    found: list[tuple[int, list[list[int]]]] = []
    while widths:
        width = widths[0][0]
        most = max(1, SCORES // (heads * width**2))
        bins = [own for each, own in widths[:most] if each >= _SHRINK * width]
        found.append((width, bins))
        widths = widths[len(bins) :]
    return found


def _room(length: int, dropout: bool) -> int:
    """Return the columns that a sequence of a bin takes."""
    return -(-length // COLUMNS) * COLUMNS if dropout else length


def _in_bins(rooms: list[int], size: int) -> list[list[int]]:
    """Return the numbers of the sequences in each bin.

    The longest sequence that is left goes into the fullest bin that has room for it. The rooms that
    the sequences need descend.
    """
    bins: list[list[int]] = []
    with_room: list[list[list[int]]] = [[] for _ in range(size + 1)]
    for number, room in enumerate(rooms):
        left = next((left for left in range(room, size + 1) if with_room[left]), None)
        own: list[int] = [] if left is None else with_room[left].pop()
        if left is None:
            left = max(size, room)
            bins.append(own)
        own.append(number)
        with_room[left - room].append(own)
    return bins


def _places(rooms: list[list[int]], width: int) -> Tensor:
    """Return where each sequence begins, int64 [sequences], from the rooms of those in each bin."""
    places: list[int] = []
    for index, own in enumerate(rooms):
        places += itertools.accumulate(own[:-1], initial=index * width)
    return torch.tensor(places)


def _spread(
    side: _Side, numbers: list[int], places: Tensor, size: int
) -> tuple[Tensor | slice, Tensor]:
    """Return the rows of a group, and the sequence of each, as its place in `numbers`.

    Both are int64 [size]. Padding is the spare row, of sequence -1.
    """
    starts = side.starts[torch.tensor(numbers)]
    lengths = torch.tensor([side.lengths[i] for i in numbers])
    if len(numbers) == 1 and int(lengths) == size:
        return slice(int(starts), int(starts) + size), torch.zeros(size, dtype=torch.int64)
    sequence = torch.repeat_interleave(torch.arange(len(numbers)), lengths)
    column = torch.arange(len(sequence)) - (lengths.cumsum(0) - lengths)[sequence]
    where = places[sequence] + column
    rows = torch.full((size,), side.spare).index_copy_(0, where, starts[sequence] + column)
    return rows, torch.full((size,), -1).index_copy_(0, where, sequence)
