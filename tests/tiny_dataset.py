"""A real dataset on disk, whose sentence lengths the test chooses.

Every token is its own position, so a test can tell from a token where in the split it comes from.
Token id 0 is an ordinary token: the special ones are the last five.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastbert.data.block_table import COUNTS
from fastbert.data.dataset import TokenDataset
from fastbert.data.manifest import Counts, token_dtype
from fastbert.data.shard_split import ShardSplit
from fastbert.data.split import Split
from tests.shard_writer import ShardWriter

SHARD_TOKENS = 200  # so that a few documents already make several shards


def write_split(folder: Path, documents: list[list[int]], vocab_size: int) -> list[Counts]:
    """Write a split; `documents` has the sentence lengths of each document, in tokens."""
    writer = ShardWriter(folder, token_dtype(vocab_size), SHARD_TOKENS)
    begin = 0
    for sentences in documents:
        total = sum(sentences)
        writer.add(
            np.arange(begin, begin + total) % (vocab_size - 5),
            np.array(sentences),
            np.array([len(sentences)]),
        )
        begin += total
    writer.close()
    return writer.shards


def tiny_split(folder: Path, documents: list[list[int]], vocab_size: int = 1 << 20) -> Split:
    """Write and open a single split."""
    return ShardSplit(folder, write_split(folder, documents, vocab_size), token_dtype(vocab_size))


def tiny_dataset(
    folder: Path,
    train: list[list[int]],
    heldout: list[list[int]] | None = None,
    vocab_size: int | None = None,
    words: list[str] | None = None,
) -> TokenDataset:
    """Make a dataset; without `vocab_size` every token of the larger split has its own id."""
    splits = {"train": train, "heldout": heldout or train}
    vocab_size = vocab_size or 5 + max(sum(map(sum, documents)) for documents in splits.values())
    (folder / "tokenizer").mkdir(parents=True)
    words = words or [f"w{i}" for i in range(vocab_size - 5)]
    (folder / "tokenizer" / "vocab.txt").write_text(
        "\n".join([*words, "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) + "\n", encoding="utf-8"
    )
    special = {
        name: vocab_size - 5 + i for i, name in enumerate(("pad", "unk", "cls", "sep", "mask"))
    }
    shards = {
        name: write_split(folder / name, documents, vocab_size)
        for name, documents in splits.items()
    }
    manifest = {
        "format": 2,
        "vocab_size": vocab_size,
        "special": special,
        "splits": {
            name: {
                **{column: sum(getattr(counts, column) for counts in of) for column in COUNTS},
                "shards": [vars(counts) for counts in of],
            }
            for name, of in shards.items()
        },
    }
    return TokenDataset(folder, manifest, "0" * 64)
