"""What the manifests of both formats of a dataset have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
TOKENIZER_FILES = (
    "tokenizer/tokenizer.json",
    "tokenizer/vocab.txt",
    "tokenizer/tokenizer_config.json",
)
BERT_FILES = ("tokenizer/vocab.txt",)  # those that other tokenizers do not have


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens.

    A tokenizer that knows every byte needs no token for what it does not know, so `unk` may be
    None. `cls` and `sep` may be the same.
    """

    pad: int
    unk: int | None
    cls: int
    sep: int
    mask: int

    @property
    def all(self) -> list[int]:
        """The distinct ids, ascending."""
        found = (self.pad, self.unk, self.cls, self.sep, self.mask)
        return sorted({number for number in found if number is not None})


@dataclass(frozen=True)
class Counts:
    """The size of a split or a shard."""

    documents: int
    sentences: int
    tokens: int


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type of token ids on disk."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def tokenizer_files(has_words: bool) -> list[str]:
    """Return the tokenizer's files in a dataset; `has_words` as in TokenDataset."""
    return [name for name in TOKENIZER_FILES if not (has_words and name in BERT_FILES)]


def vocabulary_problem(manifest: dict[str, Any]) -> str | None:
    """Return what is wrong with the vocabulary's size and the special ids, or None.

    Raises:
        TypeError, KeyError: a part is missing or of the wrong kind.
    """
    vocab_size, special = manifest["vocab_size"], SpecialIds(**manifest["special"])
    if (
        not is_count(vocab_size)
        or not all(is_count(i) and i < vocab_size for i in special.all)
        or special.mask in (special.pad, special.unk, special.cls, special.sep)
        or (len(special.all) != 5 and "tokenizer" not in manifest)
    ):
        return "vocab_size and special ids do not agree"
    return None


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
