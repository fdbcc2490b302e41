"""Encode a chunk of text as token ids and collect counts: the hot path of `fastbert prepare`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from fastbert.data.damage import Damage, find_damage
from fastbert.data.documents import Chunk, parse
from fastbert.data.encoder import Encoder, Losses
from fastbert.data.manifest import token_dtype
from fastbert.data.sentences import sentence_starts, split_sentences
from fastbert.data.text_encoder import TextEncoder
from fastbert.data.tokenizer import is_bert, special_ids

# tokens; a longer sentence is cut, so that two of them and three special tokens still fit into 512
LONGEST_SENTENCE = 254
BAD_EXAMPLES = 3  # records that cannot be read and are quoted
_HASHED_SPANS = 1 << 16  # at a time: hashing takes 100 bytes a token


@dataclass(frozen=True)
class Part:
    """The contribution of a chunk to one split, as ShardWriter.add takes it."""

    tokens: np.ndarray  # [T], in the dtype on disk
    sentences: np.ndarray  # int64 [S], tokens of each
    documents: np.ndarray  # int64 [N], sentences of each
    # bool [T]: the token begins a word; None where the token itself says so, as in BERT
    begins_word: np.ndarray | None = None


@dataclass(frozen=True)
class EncodedChunk:
    """The non-empty documents of a chunk, and the counts that the report needs."""

    train: Part
    heldout: Part
    document_hashes: np.ndarray  # uint64 [N], of the text of documents of both splits
    sentence_hashes: np.ndarray  # uint64, of the ids; a sentence that was cut counts as one
    empty_documents: int
    cut_sentences: int
    unknown_tokens: int
    losses: Losses
    damage: Damage
    bad_records: int  # records that are left out, because they cannot be read
    bad_examples: tuple[str, ...]  # what is wrong with the first of them


class ChunkEncoder:
    """Encodes chunks one after another.

    Args:
        tokenizer: as `Tokenizer.to_str` returns it.
        text_field: see documents.py.
        heldout_below: documents with a hash below this one are held out.
        skip_bad: leave out records that cannot be read, instead of raising InputError.
    """

    def __init__(self, tokenizer: str, text_field: str, heldout_below: int, skip_bad: bool = False):
        self._skip_bad = skip_bad
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._tokenizer.encode_special_tokens = True
        # BERT's tokenizer treats a document as its sentences, one after another; others do not.
        bert = is_bert(self._tokenizer)
        self._encode = Encoder(self._tokenizer) if bert else None
        self._encode_texts = None if bert else TextEncoder(self._tokenizer)
        self._unknown = special_ids(self._tokenizer, "tokenizer").unk
        self._dtype = token_dtype(self._tokenizer.get_vocab_size())
        self._text_field, self._heldout_below = text_field, heldout_below

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        bad = list[str]()
        texts = parse(chunk, self._text_field, bad if self._skip_bad else None)
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
        sentence_hashes = _hash_spans(tokens, lengths)
        pieces = -(-lengths // LONGEST_SENTENCE)
        lengths, owners = _cut(lengths, pieces), np.repeat(owners, pieces)
        documents = np.bincount(owners, minlength=len(texts))
        heldout = hashes < self._heldout_below

        def part(chosen: np.ndarray) -> Part:
            sentences = chosen[owners]
            of_tokens = np.repeat(sentences, lengths)
            return Part(
                tokens[of_tokens].astype(self._dtype),
                lengths[sentences],
                documents[chosen & (documents > 0)],
                None if begins is None else begins[of_tokens],
            )

        return EncodedChunk(
            train=part(~heldout),
            heldout=part(heldout),
            document_hashes=hashes[documents > 0],
            sentence_hashes=sentence_hashes,
            empty_documents=int((documents == 0).sum()),
            cut_sentences=int((pieces > 1).sum()),
            unknown_tokens=0 if self._unknown is None else int((tokens == self._unknown).sum()),
            losses=losses,
            damage=find_damage(texts),
            bad_records=len(bad),
            bad_examples=tuple(bad[:BAD_EXAMPLES]),
        )


def hash_text(text: str) -> int:
    """Return a hash of 64 bits of a document's text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


def _cut(lengths: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Cut each length into `pieces` parts, all but the last of LONGEST_SENTENCE tokens."""
    result = np.full(int(pieces.sum()), LONGEST_SENTENCE)
    result[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * LONGEST_SENTENCE
    return result


def _hash_spans(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
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
    mixed = _mix(_mix(tokens.astype(np.uint64) + np.uint64(1)) + places)
    return _mix(np.add.reduceat(mixed, starts))


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix the bits of each number. Source: Steele et al., 2014, the finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
