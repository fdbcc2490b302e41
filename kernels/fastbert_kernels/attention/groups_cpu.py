"""How `cpu.py` splits a pack: into groups of bins of similar length, padded to the longest one.

A bin is one sequence, or several short ones that do not see each other. Bins of a common length
take more multiplications and fewer, larger operations, of shapes that come again in every pack.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert_kernels.attention.products_cpu import SCORES

# The tokens of a bin of several sequences. Operands in bf16 make large products so fast that the
# waste pays: attention of sequences of 45 tokens takes two thirds of the time.
BIN = 128
# A group ends where a bin is shorter than this share of its longest one: about seven groups for
# ordinary text without bins of several sequences.
_SHRINK = 0.85
# A dropout mask may begin at every sixteenth column of a sequence (`_dropout.py`).
_COLUMNS = 16
ROUND = 16  # bins of several sequences have a multiple of this many queries


class Group(NamedTuple):
    """The rows of q and of k and v for the padded [B_G, n] of a group of B_G bins."""

    # A slice, or int64 [B_G * n]; padding points at the spare row R of q, or T of k and v.
    query_rows: Tensor | slice
    query_padding: Tensor  # int64 [any]: which of them are padding
    key_rows: Tensor | slice
    mask: Tensor | None  # [B_G, n_q or 1, n_k], 0 or -inf; None where every key is seen
    # int32 [B_G * n_q]: in the sequence of each query, the column of the bin's first key; None
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
    starts, lengths = bounds[order], lengths[order]
    query_starts, query_lengths = query_bounds[order], query_lengths[order]
    tokens: list[int] = lengths.tolist()  # type: ignore[type-arg]
    queries: list[int] = query_lengths.tolist()  # type: ignore[type-arg]
    rooms = [_room(n, dropout) for n in tokens]
    found: list[Group] = []
    for width, mine in arrange(tokens, heads, size, dropout):
        several = any(len(own) > 1 for own in mine)
        query_width = max(sum(queries[i] for i in own) for own in mine)
        if several:  # shapes that come again
            query_width = width if query_indices is None else -(-query_width // ROUND) * ROUND
        numbers = torch.tensor([i for own in mine for i in own])
        places = _places(mine, rooms, width)
        key_rows, key_of = _spread(
            starts[numbers], lengths[numbers], places, len(mine) * width, total
        )
        query_rows, query_of = _spread(
            query_starts[numbers],
            query_lengths[numbers],
            _places(mine, queries, query_width),
            len(mine) * query_width,
            rows,
        )
        keys, asking = key_of.view(-1, 1, width), query_of.view(-1, query_width, 1)
        # Padding sees everything, so that no softmax is empty.
        hidden = (keys != asking) & (asking >= 0) if several else keys < 0
        mask = first_columns = None
        if hidden.any():
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        if several and dropout:
            first_columns = -(places % width)[query_of].to(torch.int32)
        padding = (query_of < 0).nonzero()[:, 0]
        found.append(Group(query_rows, padding, key_rows, mask, first_columns, len(mine), several))
    return found


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
    return -(-length // _COLUMNS) * _COLUMNS if dropout else length


def _in_bins(rooms: list[int], size: int) -> list[list[int]]:
    """Return the numbers of the sequences in each bin.

    The longest sequence that is left goes into the fullest bin that has room for it. The rooms that
    the sequences need descend.
    """
    bins: list[list[int]] = []
    with_room: list[list[list[int]]] = [[] for _ in range(size + 1)]
    for number, room in enumerate(rooms):
        left = next((left for left in range(room, size + 1) if with_room[left]), None)
        if left is None:
            own, left = [], max(size, room)
            bins.append(own)
        else:
            own = with_room[left].pop()
        own.append(number)
        with_room[left - room].append(own)
    return bins


def _places(bins: list[list[int]], rooms: list[int], width: int) -> Tensor:
    """Return where each sequence begins, int64 [sequences], in bins of `width` rows in a row."""
    places: list[int] = []
    for index, own in enumerate(bins):
        place = index * width
        for number in own:
            places.append(place)
            place += rooms[number]
    return torch.tensor(places)


def _spread(
    starts: Tensor, lengths: Tensor, places: Tensor, size: int, spare: int
) -> tuple[Tensor | slice, Tensor]:
    """Return the rows of a group, and the sequences that they belong to, int64 [size].

    Padding is the row `spare`, of sequence -1.
    """
    if len(starts) == 1 and int(lengths) == size:
        return slice(int(starts), int(starts) + size), torch.zeros(size, dtype=torch.int64)
    sequence = torch.repeat_interleave(torch.arange(len(starts)), lengths)
    column = torch.arange(len(sequence)) - (lengths.cumsum(0) - lengths)[sequence]
    where = places[sequence] + column
    rows = torch.full((size,), spare).index_copy_(0, where, starts[sequence] + column)
    return rows, torch.full((size,), -1).index_copy_(0, where, sequence)
