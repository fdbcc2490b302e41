"""Masking: exact counts, chosen tokens, replacements, whole words, independence from the pack."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.config import ObjectiveConfig
from fastbert.data.dataset import TokenDataset
from fastbert.data.masking import Masking, replaced_counts, selected_counts
from fastbert.errors import InputError
from tests.tiny_dataset import tiny_dataset

# Ids 0 to 39 are ordinary, and every fourth of them continues a word. Then come [PAD], [UNK],
# [CLS], [SEP] and [MASK].
VOCAB = 45
UNK, MASK = 41, 44
DEFAULT = ObjectiveConfig()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    words = [f"##w{i}" if i % 4 == 3 else f"w{i}" for i in range(VOCAB - 5)]
    return tiny_dataset(
        tmp_path_factory.mktemp("dataset") / "dataset", [[50]], vocab_size=VOCAB, words=words
    )


def text(n: int, seed: int = 0) -> np.ndarray:
    """Random tokens 0 to 39 and, rarely, [UNK]."""
    drawn = np.random.default_rng(seed).integers(0, 41, n)
    return np.where(drawn == 40, UNK, drawn)


def keys(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, n)


def rounded(number: Fraction) -> int:
    return (number + Fraction(1, 2)).__floor__()


# Counts


@pytest.mark.parametrize(
    "objective",
    [
        DEFAULT,
        ObjectiveConfig(mask_rate=0.3, mask_token=0.5, random_token=0.5),
        ObjectiveConfig(mask_rate=1.0),
    ],
)
def test_counts_are_rounded_exactly_for_every_length(objective):
    lengths = np.arange(1, 1025)
    selected = selected_counts(lengths, objective)
    masked, other = replaced_counts(selected, objective)
    rate, mask_token, random_token = (
        Fraction(str(getattr(objective, name)))
        for name in ("mask_rate", "mask_token", "random_token")
    )
    for n, s, m, r in zip(
        lengths.tolist(), selected.tolist(), masked.tolist(), other.tolist(), strict=True
    ):
        assert s == max(1, rounded(rate * n)) <= n
        assert m == rounded(mask_token * s)
        assert r == min(rounded(random_token * s), s - m)


def test_200_tokens_are_30_selected_24_masked_3_random_3_kept(dataset):
    tokens = text(200 * 50)
    seen, chosen = Masking(dataset, DEFAULT)(tokens, np.full(50, 200), keys(50))
    for i in range(50):
        of = chosen[(chosen >= 200 * i) & (chosen < 200 * (i + 1))]
        masked = seen[of] == MASK
        kept = seen[of] == tokens[of]
        assert (len(of), masked.sum(), (~masked & ~kept).sum(), kept.sum()) == (30, 24, 3, 3)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12),
    rate=st.sampled_from([0.01, 0.15, 0.4, 1.0]),
    shares=st.sampled_from([(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)]),
    whole_word=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_pack_has_exact_counts_and_nothing_else_changes(
    dataset, lengths, rate, shares, whole_word, seed
):
    objective = ObjectiveConfig(
        mask_rate=rate, mask_token=shares[0], random_token=shares[1], whole_word=whole_word
    )
    lengths = np.array(lengths)
    tokens = text(lengths.sum(), seed)
    seen, chosen = Masking(dataset, objective)(tokens, lengths, keys(len(lengths), seed))
    selected = selected_counts(lengths, objective)
    masked, other = replaced_counts(selected, objective)
    example = np.repeat(np.arange(len(lengths)), lengths)

    def count(positions: np.ndarray) -> list[int]:
        return np.bincount(example[positions], minlength=len(lengths)).tolist()

    assert (np.diff(chosen) > 0).all() and count(chosen) == selected.tolist()
    assert count(chosen[seen[chosen] == MASK]) == masked.tolist()
    changed = np.flatnonzero(seen != tokens)
    assert np.isin(changed, chosen).all() and count(changed) == (masked + other).tolist()
    assert seen[seen != MASK].max(initial=0) <= UNK


# Which tokens, and what is put in their place


def test_every_token_of_an_example_is_selected_equally_often(dataset):
    n, length = 8000, 20
    _, chosen = Masking(dataset, DEFAULT)(text(n * length), np.full(n, length), keys(n))
    counts = np.bincount(chosen % length, minlength=length)
    expected = n * 3 / length
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 45  # 19 degrees of freedom: 1 in 1,400 lies above


@pytest.mark.parametrize("original", [0, 7, 39, UNK])
def test_random_tokens_are_uniform_over_all_other_ordinary_ones(dataset, original):
    n = 400
    objective = ObjectiveConfig(mask_rate=1.0, mask_token=0.0, random_token=1.0)
    seen, _ = Masking(dataset, objective)(np.full(n * 100, original), np.full(n, 100), keys(n))
    counts = np.bincount(seen, minlength=VOCAB)
    others = [i for i in range(40) if i != original]
    assert counts[others].sum() == n * 100
    expected = n * 100 / len(others)
    assert (
        (counts[others] - expected) ** 2 / expected
    ).sum() < 78  # 38 or 39 degrees of freedom: 1 in 5,000 lies above


def test_an_unknown_word_and_token_0_are_selected_like_any_other(dataset):
    tokens = np.tile([0, UNK, 5, 6], 10_000)
    seen, chosen = Masking(dataset, DEFAULT)(tokens, np.full(1000, 40), keys(1000))
    share = np.bincount(chosen % 4, minlength=4) / len(chosen)
    np.testing.assert_allclose(share, 0.25, atol=0.02)
    # 6 are selected, and 5 of them masked.
    np.testing.assert_allclose(
        [(seen[chosen[chosen % 4 == i]] == MASK).mean() for i in range(4)], 5 / 6, atol=0.03
    )


# Whole words


def test_whole_words_are_selected_together(dataset):
    lengths = np.full(500, 60)
    tokens = text(lengths.sum())
    _, chosen = Masking(dataset, ObjectiveConfig(whole_word=True))(tokens, lengths, keys(500))
    place = np.arange(len(tokens)) % 60
    begins = (place == 0) | ~dataset.continues_word[tokens]
    word = np.cumsum(begins) - 1
    size, hit = np.bincount(word), np.bincount(word[chosen], minlength=word[-1] + 1)
    broken = np.flatnonzero((hit > 0) & (hit < size))
    example_of_word = np.flatnonzero(begins) // 60
    # Only the last selected word may be cut to fit the count.
    assert np.bincount(example_of_word[broken], minlength=500).max() == 1
    assert len(broken) < 0.6 * 500 and (hit[size > 1] == size[size > 1]).sum() > 500
    several = size >= 2
    assert (
        abs(hit[several].sum() / size[several].sum() - 0.15) < 0.01
        and abs(hit[~several].sum() / size[~several].sum() - 0.15) < 0.01
    )


# Functions of the key alone


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    whole_word=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_an_example_is_masked_alike_in_every_pack(dataset, lengths, whole_word, seed):
    masking = Masking(
        dataset,
        ObjectiveConfig(mask_rate=0.5, mask_token=0.4, random_token=0.4, whole_word=whole_word),
    )
    lengths, all_keys = np.array(lengths), keys(len(lengths), seed)
    tokens = text(lengths.sum(), seed)
    seen, chosen = masking(tokens, lengths, all_keys)
    for i, start in enumerate(np.cumsum(lengths) - lengths):
        end = start + lengths[i]
        alone_seen, alone_chosen = masking(
            tokens[start:end], lengths[i : i + 1], all_keys[i : i + 1]
        )
        np.testing.assert_array_equal(alone_seen, seen[start:end])
        np.testing.assert_array_equal(
            alone_chosen + start, chosen[(chosen >= start) & (chosen < end)]
        )


def test_other_keys_give_other_masks(dataset):
    tokens = np.tile(text(100), 200)
    # These are neighbouring keys.
    _, chosen = Masking(dataset, DEFAULT)(tokens, np.full(200, 100), np.arange(200))
    sets = [frozenset(row) for row in (chosen % 100).reshape(200, 15)]
    assert len(set(sets)) == 200
    overlap = np.mean([len(a & b) for a, b in pairwise(sets)])
    assert abs(overlap - 15 * 0.15) < 0.4


def test_an_empty_pack(dataset):
    seen, chosen = Masking(dataset, DEFAULT)(
        np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    )
    assert len(seen) == len(chosen) == 0


def test_a_vocabulary_without_ordinary_tokens(tmp_path: Path):
    bare = tiny_dataset(tmp_path / "bare", [[3]], vocab_size=6)
    with pytest.raises(InputError, match=r"bare: its vocabulary has 1 ordinary tokens"):
        Masking(bare, DEFAULT)
