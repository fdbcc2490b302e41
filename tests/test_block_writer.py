"""A shard holds its documents in order, in blocks that end at the first end of a document."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from fastbert.data import block_writer
from fastbert.data.block_split import BlockSplit
from fastbert.data.block_table import Blocks
from fastbert.data.block_writer import BlockWriter
from fastbert.data.blocks import ALIGNMENT, layout
from fastbert.data.encode import Documents

U2 = np.dtype("<u2")


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("size", [2, 50, 1 << 20])
def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, words: bool) -> None:
    monkeypatch.setattr(block_writer, "BLOCK_BYTES", size)
    draw = np.random.default_rng(2)
    (tmp_path / "part-00000").mkdir()
    path = tmp_path / "part-00000" / "train-00000"
    writer = BlockWriter(path, 0, 0, U2)
    texts, ends, total = list[list[int]](), list[int](), 0
    begins = list[bool]()
    for _ in range(12):  # chunks, some of them empty
        documents = [draw.integers(1, 9, draw.integers(1, 5)) for _ in range(draw.integers(0, 6))]
        tokens = draw.integers(0, 1000, int(sum(map(sum, documents)))).astype(U2)
        bits = draw.random(len(tokens)) < 0.5
        begins += bits.tolist()
        at = 0
        for lengths in documents:
            texts.append(tokens[at : at + lengths.sum()].tolist())
            at += int(lengths.sum())
            total += 2 * int(lengths.sum())
            ends.append(total)
        writer.add(
            Documents(
                tokens,
                np.concatenate([np.zeros(0, np.int64), *documents]),
                np.array(list(map(len, documents)), np.int64),
                bits if words else None,
            )
        )
    table = writer.close()
    wanted, begin = list[int](), 0  # documents of each block
    for i, end in enumerate(ends):
        if end - begin >= size or i == len(ends) - 1:
            wanted.append(i + 1 - sum(wanted))
            begin = end
    assert table["documents"].tolist() == wanted
    data = path.read_bytes()
    end = 0
    for entry in table:
        documents, sentences, tokens = entry["documents"], entry["sentences"], entry["tokens"]
        block = layout(int(documents), int(sentences), int(tokens), 2, words).size
        place = int(entry["offset"])
        assert place % ALIGNMENT == 0 and not any(data[end:place])
        end = place + block
        digest = hashlib.sha256(data[place:end]).digest()
        assert digest == entry["sha256"].tobytes()
    assert end == len(data) == writer_size(path)
    split = BlockSplit(Blocks(tmp_path, table, np.zeros(len(table), int), 2, words, 1000))
    first = split.first_token(split.first_sentence(np.arange(split.documents + 1)))
    found = [split.gather(first[i : i + 1], np.diff(first[i : i + 2])) for i in range(len(texts))]
    assert [tokens.tolist() for tokens in found] == texts
    if words:
        spans = first[:-1], np.diff(first)
        assert split.begins_word(*spans).tolist() == begins


def writer_size(path: Path) -> int:
    return path.stat().st_size


def test_nothing_to_write(tmp_path: Path) -> None:
    assert len(BlockWriter(tmp_path / "a", 1, 0, U2).close()) == 0
    assert (tmp_path / "a").stat().st_size == 0
