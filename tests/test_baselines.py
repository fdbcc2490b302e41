"""Baselines are proper distributions, are close to a known entropy, and have the right order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastbert.data import baselines as baselines
from fastbert.data.baselines import measure
from fastbert.data.dataset import TokenDataset
from fastbert.data.manifest import token_dtype
from fastbert.data.shard_split import ShardSplit
from fastbert.data.split import Split
from tests.shard_writer import ShardWriter


def split_of(folder: Path, documents: np.ndarray) -> Split:
    """A split of documents [N, L] of equal length, one sentence each."""
    count, length = documents.shape
    writer = ShardWriter(folder, token_dtype(1000))
    writer.add(documents.ravel(), np.full(count, length), np.ones(count, np.int64))
    writer.close()
    return ShardSplit(folder, writer.shards, token_dtype(1000))


def test_real_text(small_dataset: TokenDataset) -> None:
    found = small_dataset.baselines
    assert (
        found["unigram"]
        > found["left_bigram"] + 0.5
        > found["two_sided_bigram"] + 0.5
        > found["two_sided_trigram"] + 0.5
    )
    train, heldout = small_dataset.split("train"), small_dataset.split("heldout")
    assert found == measure(train, heldout, 1000)
    assert found["heldout_tokens"] == heldout.tokens
    assert 0.94 * train.tokens < found["train_tokens"] < 0.96 * train.tokens
    # The unigram, counted here in another way.
    tokens = [
        split.gather(np.zeros(1, np.int64), np.array([split.tokens])) for split in (train, heldout)
    ]
    p = (np.bincount(tokens[0], minlength=1000) + 0.5) / (len(tokens[0]) + 500)
    assert found["unigram"] == pytest.approx(-np.log(p[tokens[1]]).mean(), abs=0.02)


def test_independent_tokens(tmp_path: Path) -> None:
    """Where neighbours carry no information, every model ends near the entropy.

    None is below it by more than chance allows.
    """
    p = np.arange(1, 21) / np.arange(1, 21).sum()
    entropy = -(p * np.log(p)).sum()
    draw = np.random.default_rng(1)
    train, heldout = (
        split_of(tmp_path / str(n), draw.choice(20, (n, 50), p=p)) for n in (4000, 400)
    )
    found = measure(train, heldout, 20)
    for name in ("unigram", "left_bigram", "two_sided_bigram", "two_sided_trigram"):
        assert found[name] == pytest.approx(entropy, abs=0.04), name


def test_a_known_process(tmp_path: Path) -> None:
    """Each token follows the previous one with probability 0.8, and otherwise it is any token.

    So the exact losses are known.
    """
    size, count = 50, 3000
    draw = np.random.default_rng(2)
    documents = draw.integers(0, size, (count, 60))
    for i in range(1, 60):
        documents[:, i] = np.where(
            draw.random(count) < 0.8, (documents[:, i - 1] + 1) % size, documents[:, i]
        )
    found = measure(
        split_of(tmp_path / "train", documents[300:]),
        split_of(tmp_path / "heldout", documents[:300]),
        size,
    )
    hidden, rest = baselines.HIDDEN, 0.2 / size
    follows, other = 0.8 + rest, rest
    bigram = -(follows * np.log(follows) + (1 - follows) * np.log(other))
    seen = (1 - hidden) * 59 / 60  # the first token of a document has no left neighbour
    assert found["unigram"] == pytest.approx(np.log(size), abs=0.01)
    assert found["left_bigram"] == pytest.approx(
        seen * bigram + (1 - seen) * np.log(size), abs=0.05
    )
    # Of two neighbours, p(w | l, r) by Bayes: exact, for l and r as far apart as they come.
    step = np.full((size, size), rest) + 0.8 * np.roll(np.eye(size), 1, axis=1)
    joint = step[:, :, None] * step[None] / size  # [l, w, r]
    both = -(joint * np.log(joint / joint.sum(1, keepdims=True))).sum()
    one = seen * bigram + (1 - seen) * np.log(size)
    pair = (1 - hidden) ** 2
    exact = pair * both + 2 * hidden * (1 - hidden) * bigram + hidden**2 * np.log(size)
    assert exact < one - 0.5
    # Documents end, and there are few counts.
    assert found["two_sided_trigram"] == pytest.approx(exact, abs=0.12)
    assert found["two_sided_bigram"] > found["two_sided_trigram"] + 0.03


def test_distributions_sum_to_one(small_dataset: TokenDataset) -> None:
    """Each model's probabilities over the whole vocabulary sum to 1.

    This is checked for some pairs of neighbours that occur in the data and some that do not.
    """
    size = small_dataset.vocab_size
    sample = baselines._sample(small_dataset.split("train"), 20_000, size)
    models, tokens = baselines._Models(sample, size), sample.tolist()
    for left, right in [
        (tokens[1], tokens[3]),
        (size, tokens[1]),
        (tokens[-2], size),
        (0, 0),
        (0, tokens[5]),
    ]:
        words = np.arange(size)
        lefts, rights = np.full(size, left), np.full(size, right)
        (a, a_rest), (b, b_rest) = (
            models.after.look_up(lefts, words),
            models.before.look_up(rights, words),
        )
        p_left, p_right = a + a_rest * models.unigram, b + b_rest * models.unigram
        assert p_left.sum() == pytest.approx(1) and p_right.sum() == pytest.approx(1)
        c, c_rest = models.between.look_up(lefts * models.size + rights, words)
        assert c.sum() + c_rest[0] == pytest.approx(1)
        product = (p_left * p_right / models.unigram).sum()
        total = (
            models._overlap(lefts[:1], rights[:1])
            + (1 - a_rest[0]) * b_rest[0]
            + a_rest[0] * (1 - b_rest[0])
            + a_rest[0] * b_rest[0]
        )
        assert total[0] == pytest.approx(product)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 30)])
def test_tiny_splits(tmp_path: Path, shape: tuple[int, int]) -> None:
    train, heldout = (
        split_of(tmp_path / "train", np.full(shape, 7)),
        split_of(tmp_path / "heldout", np.array([[7, 8, 9]])),
    )
    found = measure(train, heldout, 10)
    assert all(np.isfinite(value) and value > 0 for value in found.values())


def test_a_sample_is_spread_over_the_split(tmp_path: Path) -> None:
    split = split_of(tmp_path / "train", np.repeat(np.arange(100), 10).reshape(100, 10))
    tokens = baselines._sample(split, 200, 100)
    assert tokens.tolist() == [100, *(x for i in range(0, 100, 5) for x in [*[i] * 10, 100])]
    whole = baselines._sample(split, 10_000, 100)
    assert (whole != 100).sum() == 1000 and (whole == 100).sum() == 101
