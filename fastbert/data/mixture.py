"""A mixture of sources as one stream: in exact shares, and from each source in its own order.

A mixture is made of blocks of 4,096 examples. Each block has the same number from each source, its
quota. The order of the sources within a block is a permutation that depends on (seed, block). The
examples of a source follow one another, wherever the mixture stops: its j-th example in block b has
the running number b * quota + j. So every running number is used exactly once, and the source and
the running number of an example are functions of its own number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fastbert.data.examples import Spans
from fastbert.data.permutation import permute
from fastbert.data.philox import Purpose, random_words
from fastbert.data.stream import Stream, draw_by, read_by

BLOCK = 4096  # examples
# An example's index within its epoch is below 2**48, and the bits above it have its source.
INDEX_BITS = 48


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Round shares to whole examples of a block, by the method of largest remainders.

    Args:
        weights: of each source, at least 0; not all 0.

    Returns:
        Whole numbers whose sum is BLOCK. None is further than 1 from its exact value.
    """
    total = sum(weights)
    exact = [weight * BLOCK / total for weight in weights]
    found = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (found[i] - exact[i], i))
    for i in by_remainder[: BLOCK - sum(found)]:
        found[i] += 1
    return tuple(found)


def source_seed(seed: int, source: int) -> int:
    """Return the seed of a source, in [0, 2**63). Source 0 has that of the run.

    So a run on one dataset, and a mixture whose first source it is, draw the same examples of it.
    """
    return seed if source == 0 else _derived(seed, source)


def source_of(examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split `Spans.index` of a mixture into the source and the index within its epoch, int64."""
    return examples >> INDEX_BITS, examples & ((1 << INDEX_BITS) - 1)


class Mixture:
    """Several streams in fixed shares.

    Args:
        streams: of the sources.
        quotas: examples of each source in a block; their sum is BLOCK.
        first: the running number of each source's first example.
        seed: in [0, 2**63), that of the run.
    """

    def __init__(
        self, streams: Sequence[Stream], quotas: tuple[int, ...], first: Sequence[int], seed: int
    ):
        assert sum(quotas) == BLOCK and len(streams) == len(quotas) == len(first)
        self.streams, self.quotas, self.first = streams, quotas, first
        self._seed = _derived(seed, 0)

    def used(self, number: int) -> list[int]:
        """Return how many examples of each source are among the first `number` of the mixture."""
        blocks, rest = divmod(number, BLOCK)
        source, _ = _layout(self._seed, self.quotas, blocks)
        begun = np.bincount(source[:rest], minlength=len(self.quotas)).tolist()
        return [blocks * quota + n for quota, n in zip(self.quotas, begun, strict=True)]

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source and the running number of examples, int64 [B] each."""
        blocks, within = np.divmod(np.asarray(numbers, np.int64), BLOCK)
        source, running = np.empty_like(within), np.empty_like(within)
        for block in np.unique(blocks):
            chosen = blocks == block
            sources, ranks = _layout(self._seed, self.quotas, int(block))
            source[chosen] = sources[within[chosen]]
            running[chosen] = ranks[within[chosen]]
        shares, first = np.array(self.quotas), np.array(self.first)
        return source, first[source] + blocks * shares[source] + running

    def draw(self, numbers: np.ndarray) -> Spans:
        source, running = self.places(numbers)

        def draw(s: int, chosen: np.ndarray) -> Spans:
            spans = self.streams[s].draw(running[chosen])
            return replace(spans, index=spans.index | s << INDEX_BITS)

        return draw_by(source, draw)

    def tokens(self, spans: Spans) -> np.ndarray:
        source, _ = source_of(spans.index)
        return read_by(source, spans, np.int64, lambda s, own: self.streams[s].tokens(own))

    def begins_word(self, spans: Spans) -> np.ndarray:
        source, _ = source_of(spans.index)
        return read_by(source, spans, bool, lambda s, own: self.streams[s].begins_word(own))


@lru_cache(maxsize=64)
def _layout(seed: int, quotas: tuple[int, ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each example of a block, and its rank there, int64 [BLOCK] each."""
    places = permute(np.arange(BLOCK), BLOCK, seed, block)
    source = np.searchsorted(np.cumsum(quotas), places, "right")
    rank = np.empty(BLOCK, np.int64)
    for s, quota in enumerate(quotas):
        rank[source == s] = np.arange(quota)
    return source, rank


def _derived(seed: int, number: int) -> int:
    words = random_words(seed, Purpose.SOURCE, np.array([number]), 0)[:, 0]
    return int(words[0] >> np.uint64(1)) << 32 | int(words[1])
