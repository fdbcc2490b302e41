"""The bytes and products that the tiles of attention and of the MLM loss require.

`traffic.py` compares what the kernels do with these. They are worked out from the lengths of the
sequences and the rows of `tiles.json`, without the kernels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from fastbert_kernels._tile_schedule import ITEM, one_tile
from fastbert_kernels._tiles import tile
from fastbert_kernels._triton import architecture, dot_precision

CPU = torch.device("cpu")
SMALL = ITEM // 2  # tokens: longest sequence that fits into the small tile


class Work(NamedTuple):
    """The prediction for a kernel from its tiles; `bytes` is None if only the spec states them."""

    bytes: int | None
    flops: int


class Visit(NamedTuple):
    """What a program owns and loops over."""

    own: int  # rows
    walked: int  # rows that it loads in its loop
    tiles: int  # of its loop
    again: int  # tiles for which it loads its own rows again


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def attention_work(given: dict[str, Any]) -> dict[str, Work]:
    """Every row of a matrix counts once for the tile that owns it, and once for each tile that
    loops over it. With a window, these are the tiles within its reach.

    If one tile holds a sequence, the tile has 64 rows for up to 64 tokens, and 128 for more. Rows
    behind the last sequence are zeros in every result. Small amounts are counted too: first rows of
    sequences and tile schedules (int32) once per program, and the seed of a sequence (int64) if
    there is a mask.
    """
    q, bounds, query_indices = given["q"], given["cu_seqlens"], given.get("query_indices")
    (_, heads, size), dtype = q.shape, q.dtype
    first_rows = (
        bounds if query_indices is None else torch.searchsorted(query_indices, bounds.long())
    )
    # Of each sequence: number of outputs, and length.
    rows, tokens = first_rows.diff().tolist(), bounds.diff().tolist()
    # Behind the last sequence.
    rest_rows, rest_tokens = len(q) - int(first_rows[-1]), len(given["k"]) - int(bounds[-1])
    drop = int(given["dropout_p"] > 0)
    window, cut = given.get("window"), query_indices is not None
    place = 8 if drop and cut else 0  # the entry of a row in query_indices
    seen = 8 if window is not None and cut else 0  # the same, for the window
    row = size * dtype.itemsize

    def multiplied(products: int, a: int, b: int) -> int:
        return products * 2 * a * b * power_of_2(size)

    if one_tile(dtype, given["max_seqlen"]):
        longest = given["max_seqlen"]
        small = max(16, power_of_2(min(longest, SMALL)))
        # Every launch has a program for each sequence, which reads its bounds, and the last launch
        # has eight for the rest.
        looks = 16 * len(rows) * (2 if longest > SMALL else 1)
        forward = looks + 8 * 4 + row * rest_rows
        backward = looks + 8 * 8 + row * (rest_rows + 2 * rest_tokens)
        flops = [0, 0]
        for mine, others in zip(rows, tokens, strict=True):
            block = ITEM if others > SMALL else small
            if mine:  # q, out; k, v
                forward += (2 * row + place + seen) * mine + 2 * row * others + 8 * drop
                flops[0] += multiplied(2, block, block)
            if others:  # q, dout, dq; k, v, dk, dv
                backward += (3 * row + place + seen) * mine + 4 * row * others + 8 * drop
                flops[1] += multiplied(5, block, block)
        return {
            "_forward_short_kernel": Work(heads * forward, heads * flops[0]),
            "_backward_short_kernel": Work(heads * backward, heads * flops[1]),
        }

    # The positions of the queries of each sequence.
    asked = torch.arange(len(given["k"])) if query_indices is None else query_indices
    places = [
        [int(token) - int(start) for token in asked[first : first + mine]]
        for start, first, mine in zip(bounds, first_rows, rows, strict=False)
    ]

    def over_keys(block: tuple[int, int]) -> list[list[Visit]]:
        """What the programs of each sequence visit that own queries and loop over keys."""
        found = []
        for mine, length in zip(places, tokens, strict=True):
            visits = []
            for own in (mine[i : i + block[0]] for i in range(0, len(mine), block[0])):
                begin, end = 0, length
                if window is not None:
                    last = own[-1] if cut else own[0] + block[0] - 1
                    begin = max(own[0] - window, 0) // 16 * 16
                    end = min(last + 1 + window, length)
                tiles = cdiv(end - begin, block[1])
                again = length // block[1] if window is None else tiles
                walked = min(begin + tiles * block[1], length) - begin
                visits.append(Visit(len(own), walked, tiles, again))
            found.append(visits)
        return found

    def over_queries(block: tuple[int, int]) -> list[list[Visit]]:
        """What the programs of each sequence visit that own keys and loop over queries."""
        found = []
        for others, length in zip(places, tokens, strict=True):
            visits = []
            for first in range(0, length, block[0]):
                own, last = min(block[0], length - first), first + block[0] - 1
                near = others
                if window is not None:
                    near = [p for p in others if first - window <= p <= last + window]
                again = len(near) // block[1] if window is None else cdiv(len(near), block[1])
                visits.append(Visit(own, len(near), cdiv(len(near), block[1]), again))
            found.append(visits)
        return found

    def work(
        products: int,
        visited: list[list[Visit]],
        rest: int,
        block: tuple[int, int],
        owned: int,
        walked: int,
        again: int = 0,
        **tables: int,
    ) -> Work:
        """The work of a kernel whose programs own rows and loop over the sequence's other rows.

        A program owns `block[0]` rows and loops over `block[1]` at a time. `owned` and `walked` are
        the bytes of such a row. `again` are the bytes that are loaded once more for each tile of
        the loop (but for a last one that is not full), `filled` those stored for a row behind the
        last sequence.
        """
        shares = ITEM // block[0]  # programs of an item of the tile schedule
        own, filled = [sum(v.own for v in visits) for visits in visited], tables.get("filled", 0)
        # The schedule, which has room for more items than there are.
        total = 8 * shares * ((sum(own) + rest) // ITEM + len(own) + 1)
        total += filled * rest + (4 * shares * cdiv(rest, ITEM) if filled else 0)
        flops = 0
        for mine, visits in zip(own, visited, strict=True):
            total += tables.get("item", 8) * shares * cdiv(mine, ITEM)
            for visit in visits:
                total += tables.get("tile", 8) + walked * visit.walked
                total += (owned + again * visit.again) * visit.own
                flops += multiplied(products * visit.tiles, *block)
        return Work(heads * total, heads * flops)

    def blocks(kernel: str, own: str, over: str) -> tuple[int, int]:
        if window is not None and own != over:
            kernel += "_window"
        options = tile(kernel, architecture(CPU), dtype, size)
        return options[own], options[over]

    facts = 12 + 8 * drop  # row_max, inv_sum and delta of a row; the two keys of its mask
    # Operands that do not stay in registers are loaded again.
    again = row if dtype == torch.float32 and dot_precision(dtype) == "ieee" else 0
    of_forward = blocks("attention_forward", "BLOCK_Q", "BLOCK_K")
    of_prepare = blocks("attention_prepare", "BLOCK_Q", "BLOCK_Q")
    of_dkdv = blocks("attention_dkdv", "BLOCK_K", "BLOCK_Q")
    of_dq = blocks("attention_dq", "BLOCK_Q", "BLOCK_K")
    bounds_in_reach = 16 if seen else 0  # positions of a tile's first and last query
    return {
        "_forward_kernel": work(
            2,
            over_keys(of_forward),
            rest_rows,
            of_forward,
            2 * row + 8 + place + seen,
            2 * row,
            again,
            tile=8 + 8 * drop + bounds_in_reach,
            filled=row + 8,  # with its statistics
        ),
        "_prepare_kernel": work(
            0,
            over_keys(of_prepare),
            rest_rows,
            of_prepare,
            2 * row + 4 + 8 * drop + place,
            0,
            item=8 + 16 * drop,
            tile=0,
        ),
        "_dkdv_kernel": work(
            4,
            over_queries(of_dkdv),
            rest_tokens,
            of_dkdv,
            4 * row,
            2 * row + facts + seen,
            2 * again,
            tile=8 + (8 if seen else 0),  # two entries of the first query of each token
            filled=2 * row,
        ),
        "_dq_kernel": work(
            3,
            over_keys(of_dq),
            rest_rows,
            of_dq,
            3 * row + facts + seen,
            2 * row,
            2 * again,
            tile=8 + bounds_in_reach,
            filled=row,
        ),
    }


def mlm_loss_work(given: dict[str, Any]) -> dict[str, Work]:
    """The logits twice, in whole tiles, for a vocabulary that fits one slab."""
    M, (V, D), dtype = len(given["labels"]), given["weight"].shape, given["hidden"].dtype

    def logits(kernel: str) -> Work:
        options = tile(kernel, architecture(CPU), dtype, D)
        padded = [
            cdiv(n, options[block]) * options[block]
            for n, block in ((M, "BLOCK_M"), (V, "BLOCK_V"), (D, "BLOCK_D"))
        ]
        return Work(None, 2 * math.prod(padded))

    return {
        "_forward_kernel": logits("mlm_loss_forward"),
        "_backward_kernel": logits("mlm_loss_backward"),
    }


PREDICTIONS = {"attention": attention_work, "mlm_loss": mlm_loss_work}
