"""Blocks in any order read as the documents that were written, over any number of files."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.block_split import BlockSplit
from fastbert.errors import InputError
from tests.block_dataset import Text, blocks_of

documents_of_sentences = st.lists(
    st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=5), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def text(documents: list[list[list[int]]], words: bool) -> Text:
    sentences = [sentence for document in documents for sentence in document]
    tokens = np.array([token for sentence in sentences for token in sentence])
    return (
        tokens,
        np.array([len(sentence) for sentence in sentences]),
        np.array([len(document) for document in documents]),
        tokens % 3 == 0 if words else None,
    )


@settings(max_examples=60)
@given(
    pieces=st.lists(documents_of_sentences, min_size=1, max_size=6),
    per_shard=st.integers(1, 4),
    vocab_size=st.sampled_from([1000, 70_000]),
    words=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_read_as_one(tmp_path_factory, pieces, per_shard, vocab_size, words, seed):
    draw = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("blocks")
    blocks = blocks_of(folder, [text(piece, words) for piece in pieces], vocab_size, per_shard)
    order = draw.permutation(len(pieces))
    split = BlockSplit(blocks.take(order))

    documents = [document for i in order for document in pieces[i]]
    sentences = [sentence for document in documents for sentence in document]
    tokens = np.array([token for sentence in sentences for token in sentence])
    assert (split.documents, split.sentences, split.tokens) == (
        len(documents),
        len(sentences),
        len(tokens),
    )
    first_sentence = np.cumsum([0] + [len(document) for document in documents])
    first_token = np.cumsum([0] + [len(sentence) for sentence in sentences])
    for read, expected in [
        (split.first_sentence, first_sentence),
        (split.first_token, first_token),
    ]:
        indices = draw.permutation(np.repeat(np.arange(len(expected)), 2))
        assert read(indices).tolist() == expected[indices].tolist()
        assert read(indices).dtype == np.int64
        two = np.stack([indices, indices])
        assert np.array_equal(read(two), expected[two])
    indices = draw.permutation(len(sentences))
    spans = first_token[indices], np.diff(first_token)[indices]
    found, expected = split.gather(*spans), [t for i in indices for t in sentences[i]]
    assert found.tolist() == expected and found.dtype == np.int64
    if words:
        assert split.begins_word(*spans).tolist() == [t % 3 == 0 for t in expected]
    assert split.gather(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
    assert split.gather(first_token, np.zeros_like(first_token)).tolist() == []


def test_more_than_256_sentences_and_65536_tokens_in_a_block(tmp_path):
    """Offsets are two numbers: that of the group of sentences, and that within the group."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 255, 3000)
    lengths[:600] = 254
    texts = []
    for part in np.split(lengths, [1500]):
        ids = draw.integers(0, 999, part.sum())
        texts.append((ids, part, np.full(15, 100), None))
    split = BlockSplit(blocks_of(tmp_path, texts, 1000))
    assert split.first_token(np.arange(3001)).tolist() == [0, *np.cumsum(lengths).tolist()]
    assert split.first_sentence(np.arange(31)).tolist() == list(range(0, 3001, 100))
    tokens = np.concatenate([ids for ids, *_ in texts])
    starts = split.first_token(np.arange(3000))
    assert np.array_equal(split.gather(starts, lengths), tokens)


def test_more_shards_than_descriptors(tmp_path):
    """As under `ulimit -n 256`."""
    texts = [(np.array([i, i + 1, 7]), np.array([2, 1]), np.array([2]), None) for i in range(843)]
    blocks = blocks_of(tmp_path, texts, 1000, per_shard=1)
    assert len(list((tmp_path / "part-00000").iterdir())) == 843
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        split = BlockSplit(blocks)
        tokens = split.gather(np.array([0, 3 * 842, 3]), np.array([3, 2, 1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert tokens.tolist() == [0, 1, 7, 842, 843, 1]


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, words",
    [(Path.unlink, "No such file"), (damaged, "shorter than")],
)
def test_a_file_that_cannot_be_mapped(tmp_path, damage, words):
    texts = [(np.array([i, 7]), np.array([2]), np.array([1]), None) for i in range(5)]
    blocks = blocks_of(tmp_path, texts, 1000)
    damage(tmp_path / "part-00000/train-00001")
    with pytest.raises(InputError, match=f"part-00000/train-00001: .*{words}"):
        BlockSplit(blocks)
