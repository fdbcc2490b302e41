"""The generator gives the known answers of Random123, and correct words, numbers and fractions."""

from __future__ import annotations

import numpy as np
import pytest

from fastbert.data.philox import Purpose, below, philox4x32, random_words, unit

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint64)[:, None]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(answer))


def test_many_at_once_are_what_each_is_alone():
    counters, keys, answers = (
        np.concatenate([words(row[i]) for row in KNOWN], 1) for i in range(3)
    )
    np.testing.assert_array_equal(philox4x32(counters, keys), answers)


def test_keys_purposes_epochs_and_counters_are_streams_of_their_own():
    counter = np.array([0, 1, 2**32, 2**40])  # the counter's high half counts too
    drawn = [
        random_words(key, purpose, counter, epoch)
        for key in (0, 1, 2**32)
        for purpose in Purpose
        for epoch in (0, 1)
    ]
    blocks = np.concatenate(drawn, 1).T
    assert len(np.unique(blocks, axis=0)) == len(blocks)
    np.testing.assert_array_equal(
        random_words(np.array([7, 1, 9, 1]), Purpose.MASK, counter)[:, 3],
        random_words(1, Purpose.MASK, counter)[:, 3],
    )


def test_numbers_are_uniform_and_in_range():
    drawn = random_words(3, Purpose.EXAMPLE, np.arange(60_000)).ravel()
    counts = np.bincount(below(drawn, 12), minlength=12)
    expected = len(drawn) / 12
    # 11 degrees of freedom: 1 in 4,000 lies above.
    assert len(counts) == 12 and ((counts - expected) ** 2 / expected).sum() < 35
    assert below(np.array([0, 2**32 - 1], np.uint64), 2**31).tolist() == [0, 2**31 - 1]
    fractions = unit(drawn)
    assert fractions.min() >= 0 and fractions.max() < 1 and abs(fractions.mean() - 0.5) < 0.003
