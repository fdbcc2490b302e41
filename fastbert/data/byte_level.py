"""Train a byte-level BPE vocabulary, as GPT-2's and ModernBERT's: it knows every text.

The same texts always give the same vocabulary, on any number of threads. At each step the trainer
merges the most frequent pair of tokens, and among equally frequent ones that of the smallest ids.
All bytes have their ids beforehand, so this is a strict order as long as a pair is queued once.
It is: a merge is applied to every place where its pair stands, so two places of the same characters
are divided in the same way unless a token reaches across their ends. So no token is ever made of
two different pairs, and all places of a pair come into being at one step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from fastbert.data.token_roles import BERT_TOKENS, TokenRoles
from fastbert.data.tokenizer import with_roles
from fastbert.errors import InputError

# A vocabulary's size is a multiple of this, so that the products with the embeddings have sizes
# that are fast on a GPU.
MULTIPLE = 64
SMALLEST = 320  # 256 bytes and the special tokens, rounded up
# Characters of a word that the trainer sees at once. Its time grows with the square.
LONGEST_WORD = 100
# How ByteLevel splits texts into words.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def rounded_up(vocab_size: int) -> int:
    """Return the size of the vocabulary that is trained where `vocab_size` is asked for."""
    return -(-max(vocab_size, SMALLEST) // MULTIPLE) * MULTIPLE


def train_byte_level(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE vocabulary; the same texts always give the same one.

    Text is composed (NFC), and otherwise kept as it is: case, accents, spaces and line breaks.

    Args:
        texts: the documents.
        vocab_size: rounded up to a multiple of 64. Where too few pairs occur twice the vocabulary
            is smaller, and filled up to a multiple of 64 with [unused0], [unused1], ...

    Raises:
        InputError: texts without any character.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.FixedLength(LONGEST_WORD),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=rounded_up(vocab_size),
        min_frequency=2,
        show_progress=False,
        special_tokens=list(BERT_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    seen = False

    def noticed() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text.strip())
            yield text

    trained.train_from_iterator(noticed(), trainer)
    if not seen:
        raise InputError("no text to train a vocabulary on: every document is empty")
    model = json.loads(trained.to_str())["model"]
    ids: dict[str, int] = model["vocab"]
    for i in range(-len(ids) % MULTIPLE):
        ids[f"[unused{i}]"] = len(ids)
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # A mask takes the space before it, as the token of a word does that it stands for.
    tokenizer.add_special_tokens(
        [
            AddedToken(name, special=True, lstrip=role == "mask")
            for role, name in BERT_TOKENS.items()
        ]
    )
    settings = json.loads(tokenizer.to_str())
    return with_roles(tokenizer, settings, TokenRoles(dict(BERT_TOKENS)))
