"""Philox4x32-10, the counter-based random number generator behind all data.

It has no state, and any number can be computed at any time.

Source: Salmon et al., 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3; the
reference code is Random123.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

ROUNDS = 10
MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
LOW_WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)


class Purpose(IntEnum):
    """What a number is drawn for; the last counter word, so that no two uses share a stream."""

    ORDER = 0
    EXAMPLE = 1
    PAIR = 2
    MASK = 3
    BLOCKS = 4
    SOURCE = 5


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return four random words for each counter.

    Args:
        counter: uint64 [4, N], words below 2**32.
        key: uint64 [2, N] or [2, 1], words below 2**32.

    Returns:
        uint64 [4, N], words below 2**32.
    """
    # Words 0 and 2 are multiplied, words 1 and 3 are not. Kept as two arrays of two rows, a round
    # is six numpy calls.
    even, odd = counter[0::2], counter[1::2]
    for round_number in range(ROUNDS):
        if round_number:
            key = (key + KEY_STEPS) & LOW_WORD
        product = even * MULTIPLIERS
        even = (product >> WORD_BITS)[::-1] ^ odd ^ key
        odd = (product & LOW_WORD)[::-1]
    words = np.empty((4, even.shape[1]), np.uint64)
    words[0::2], words[1::2] = even, odd
    return words


def random_words(
    key: int | np.ndarray, purpose: Purpose, counter: np.ndarray, epoch: int = 0
) -> np.ndarray:
    """Return four random words for each (key, purpose, epoch, counter).

    Args:
        key: the run's seed, or int64 [N], the examples' own keys; not negative.
        purpose: selects the stream.
        counter: int64 [N], not negative.
        epoch: below 2**32.

    Returns:
        uint64 [4, N], words below 2**32.
    """
    counter = counter.astype(np.uint64)
    counters = np.empty((4, len(counter)), np.uint64)
    counters[0], counters[1] = counter & LOW_WORD, counter >> WORD_BITS
    counters[2], counters[3] = epoch, int(purpose)
    keys = np.atleast_1d(np.asarray(key, np.int64)).astype(np.uint64)
    return philox4x32(counters, np.stack([keys & LOW_WORD, keys >> WORD_BITS]))


def below(words: np.ndarray, limit: int | np.ndarray) -> np.ndarray:
    """Map random words to integers in [0, limit), int64.

    `limit` is at most 2**31. The probability of a number deviates by a factor of at most
    1 + limit / 2**32 from uniform.
    """
    return ((words * np.asarray(limit).astype(np.uint64)) >> WORD_BITS).astype(np.int64)


def unit(words: np.ndarray) -> np.ndarray:
    """Map random words to float64 in [0, 1)."""
    return words * 2.0**-32
