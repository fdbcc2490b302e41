"""Encode a chunk of text as token ids and collect counts: the hot path of `fastbert prepare`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from fastbert.data.damage import Damage, find_damage
from fastbert.data.documents import Chunk, parse
from fastbert.data.encoder import Encoder, Losses
from fastbert.data.manifest import token_dtype
from fastbert.data.sentences import sentence_starts, split_sentences
from fastbert.data.text_encoder import TextEncoder
from fastbert.data.tokenizer import is_bert
from fastbert.data.unpack import BadRecord

# tokens; a longer sentence is cut, so that two of them and three special tokens still fit into 512
LONGEST_SENTENCE = 254
_HASHED_SPANS = 1 << 11  # at a time: hashing takes 100 bytes a token, which then stay in the cache


@dataclass(frozen=True)
class Documents:
    """Whole documents as token ids, as `blocks.encode` takes them."""

    tokens: np.ndarray  # [T], in the dtype on disk
    sentences: np.ndarray  # int64 [S], tokens of each, at most LONGEST_SENTENCE
    documents: np.ndarray  # int64 [D], sentences of each, at least 1
    # bool [T]: the token begins a word; None where the token itself says so, as in BERT
    begins_word: np.ndarray | None = None
    # uint64 [S], of `hash_spans`; None where nobody has computed them yet
    sentence_hashes: np.ndarray | None = None

    @property
    def ends(self) -> np.ndarray:
        """int64 [D]: the first token behind each document."""
        return np.cumsum(self.sentences)[np.cumsum(self.documents) - 1]

    @staticmethod
    def join(parts: Sequence[Documents]) -> Documents:
        """Return the documents of at least one part, one part after another, without hashes."""
        begins = [part.begins_word for part in parts if part.begins_word is not None]
        return Documents(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.sentences for part in parts]),
            np.concatenate([part.documents for part in parts]),
            np.concatenate(begins) if begins else None,
        )

    def chosen(self, kept: np.ndarray) -> Documents:
        """Return some of the documents; `kept` is bool [D]."""
        if kept.all():
            return self
        sentences = np.repeat(kept, self.documents)
        tokens = np.repeat(sentences, self.sentences)
        begins = None if self.begins_word is None else self.begins_word[tokens]
        hashes = None if self.sentence_hashes is None else self.sentence_hashes[sentences]
        return Documents(
            self.tokens[tokens], self.sentences[sentences], self.documents[kept], begins, hashes
        )


@dataclass(frozen=True)
class EncodedChunk:
    """The non-empty documents of a chunk, and the counts that the report needs."""

    documents: Documents
    hashes: np.ndarray  # uint64 [D], of the text of each document
    empty_documents: int
    cut_sentences: int
    losses: Losses
    damage: Damage


class ChunkEncoder:
    """Encodes chunks one after another.

    Args:
        tokenizer: as `Tokenizer.to_str` returns it.
        text_field: see documents.py.
    """

    def __init__(self, tokenizer: str, text_field: str):
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._tokenizer.encode_special_tokens = True
        # BERT's tokenizer treats a document as its sentences, one after another; others do not.
        bert = is_bert(self._tokenizer)
        self._encode = Encoder(self._tokenizer) if bert else None
        self._encode_texts = None if bert else TextEncoder(self._tokenizer)
        self._dtype = token_dtype(self._tokenizer.get_vocab_size())
        self._text_field = text_field

    def __call__(self, chunk: Chunk, skipped: list[BadRecord] | None = None) -> EncodedChunk:
        """Encode a chunk; `skipped` as `documents.parse` takes it."""
        return self.encode(parse(chunk, self._text_field, skipped))

    def encode(self, texts: list[str]) -> EncodedChunk:
        """Encode documents."""
        hashes = np.array([hash_text(text) for text in texts], np.uint64)
        split = [split_sentences(text) for text in texts]
        begins = None
        if self._encode is not None:
            tokens, lengths, losses = self._encode(
                [sentence for sentences in split for sentence in sentences]
            )
        else:
            assert self._encode_texts is not None
            whole = [text.strip() for text in texts]
            starts = [sentence_starts(*each) for each in zip(whole, split, strict=True)]
            tokens, begins, lengths, losses = self._encode_texts(whole, starts)
        owners = np.repeat(np.arange(len(texts)), [len(sentences) for sentences in split])
        owners = owners[lengths > 0]
        lengths = lengths[lengths > 0]
        pieces = -(-lengths // LONGEST_SENTENCE)
        lengths, owners = _cut(lengths, pieces), np.repeat(owners, pieces)
        documents = np.bincount(owners, minlength=len(texts))
        return EncodedChunk(
            Documents(tokens.astype(self._dtype), lengths, documents[documents > 0], begins),
            hashes=hashes[documents > 0],
            empty_documents=int((documents == 0).sum()),
            cut_sentences=int((pieces > 1).sum()),
            losses=losses,
            damage=find_damage(texts),
        )


def hash_text(text: str) -> int:
    """Return a hash of 64 bits of a document's text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


def _cut(lengths: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Cut each length into `pieces` parts, all but the last of LONGEST_SENTENCE tokens."""
    result = np.full(int(pieces.sum()), LONGEST_SENTENCE)
    result[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * LONGEST_SENTENCE
    return result


def hash_spans(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a hash of the ids of each span and of their order, uint64 [len(lengths)]."""
    ends = np.cumsum(lengths)
    hashes = [np.zeros(0, np.uint64)]
    for i in range(0, len(lengths), _HASHED_SPANS):
        some = lengths[i : i + _HASHED_SPANS]
        end = ends[i + len(some) - 1]
        hashes.append(_hash_some_spans(tokens[end - some.sum() : end], some))
    return np.concatenate(hashes)


def _hash_some_spans(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    starts = np.cumsum(lengths) - lengths
    places = (np.arange(len(tokens)) - np.repeat(starts, lengths)).astype(np.uint64)
    mixed = mix(mix(tokens.astype(np.uint64) + np.uint64(1)) + places)
    return mix(np.add.reduceat(mixed, starts))


def mix(x: np.ndarray) -> np.ndarray:
    """Mix the bits of each number. Source: Steele et al., 2014, the finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
