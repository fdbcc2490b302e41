"""The order of examples or of blocks in an epoch: a permutation of [0, n), computed, not stored."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from fastbert.data.philox import Purpose, random_words

ROUNDS = 8
# The multipliers of splitmix64 (Steele et al., 2014).
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
HALF = np.uint64(32)


def permute(
    indices: np.ndarray,
    n: int,
    seed: int,
    epoch: int,
    number: int = 0,
    purpose: Purpose = Purpose.ORDER,
) -> np.ndarray:
    """Apply a permutation of [0, n) of the epoch: a Feistel network with cycle walking.

    A number below rows * columns, which is slightly above n, is split into (row, column). Each
    round adds a hash of one to the other. This can be undone, so the network is a bijection.
    Results of n or above go through the network again until they are below n.

    Args:
        indices: int64 [N], each in [0, n).
        n: at least 1, below 2**62.
        seed: in [0, 2**63).
        epoch: below 2**32.
        number: which of the epoch's permutations; at least 0.
        purpose: what it permutes.

    Returns:
        int64 [N], each in [0, n).

    Source: Black and Rogaway, 2002, "Ciphers with Arbitrary Finite Domains", section 5 (the
    network) and 4 (cycle walking).
    """
    columns = math.isqrt(n - 1) + 1 if n > 1 else 1
    rows = -(-n // columns)
    keys = _round_keys(seed, epoch, number, purpose)
    result = _network(indices.astype(np.uint64), rows, columns, keys)
    while len(outside := np.flatnonzero(result >= n)):
        result[outside] = _network(result[outside], rows, columns, keys)
    return result.astype(np.int64)


def _network(values: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    sizes = np.array([columns, rows], np.uint64)
    row = values // sizes[0]
    column = values - row * sizes[0]
    for number in range(0, ROUNDS, 2):
        column = (column + _hash(row, keys[number], sizes[0])) % sizes[0]
        row = (row + _hash(column, keys[number + 1], sizes[1])) % sizes[1]
    return row * sizes[0] + column


def _hash(values: np.ndarray, key: np.uint64, size: np.uint64) -> np.ndarray:
    mixed = (values + key) * MIX_1
    mixed ^= mixed >> HALF
    mixed *= MIX_2
    return ((mixed >> HALF) * size) >> HALF


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int, number: int, purpose: Purpose) -> np.ndarray:
    """uint64 [ROUNDS]."""
    words = random_words(seed, purpose, ROUNDS * number + np.arange(ROUNDS), epoch)
    return words[0] << HALF | words[1]
