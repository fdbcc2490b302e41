"""Encode whole documents with any tokenizer, and find which tokens belong to which sentence.

Most tokenizers keep spaces and line breaks, so a document is more than its sentences one after
another. It is encoded as a whole, and gets the ids that transformers gives to its text. Where the
tokenizer allows it (cuts.py), a text is cut at spaces, and each distinct part is tokenized once.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from fastbert.data.cuts import Cuts
from fastbert.data.encoder import EXAMPLES, REMOVED, Losses
from fastbert.data.split import positions
from fastbert.data.token_roles import part_of
from fastbert.data.tokenizer import special_ids

_KEPT_PARTS = 1 << 20
_KEPT_TOKENS = 1 << 22
_KEPT_LENGTH = 64  # characters of a part; a longer one hardly occurs again
# Characters of a part that are tokenized at once. A tokenizer takes some 400 bytes for each, and a
# text without any place to cut may have 64 MiB.
_LONGEST_PART = 1 << 20
_EXAMPLE_LENGTH = 24
_INNER_CAPITAL = re.compile("(?<=[a-z0-9])[A-Z]")
# Normalizers that may drop letters, their case or their marks.
_LOSE_LETTERS = ("Lowercase", "StripAccents", "BertNormalizer", "Nmt", "Precompiled", "Replace")


class EncodedTexts(NamedTuple):
    """Documents as token ids."""

    ids: np.ndarray  # int32 [T], of all documents, one after another
    begins_word: np.ndarray  # bool [T]: the token is the first of a word of the pre-tokenizer
    lengths: np.ndarray  # int64 [sentences], tokens of each sentence of all documents
    losses: Losses


class TextEncoder:
    """Encodes documents; equals `tokenizer.encode(text, add_special_tokens=False).ids`.

    There are two differences. A model may know the name of a special token as a piece, and give its
    id for that name in a text: here the name becomes the unknown token, and is counted. A stretch
    of more than a million characters without a place to cut is tokenized in parts.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._cuts = Cuts(tokenizer)
        special = special_ids(tokenizer, "tokenizer")
        self._unknown = special.unk
        self._control = {special.pad, special.cls, special.sep, special.mask} - {special.unk}
        self._lost = _LostWords(tokenizer)
        split, text = tokenizer.pre_tokenizer, "a b"
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        self._splits_words = split is not None and len(split.pre_tokenize_str(text)) > 1
        self._clear()

    def _clear(self) -> None:
        self._parts: dict[str, int] = {}
        # Of all parts, one part after another; `_bounds` says where each begins.
        self._ids, self._bounds = array("i"), array("q", [0])
        self._begins, self._ends = array("b"), array("i")
        # Of each part: words, characters without white space, and how many of these are unknown.
        self._counts = array("q")

    def __call__(self, texts: list[str], starts: list[list[int]]) -> EncodedTexts:
        """Encode documents.

        Args:
            texts: the documents; one without sentences is empty.
            starts: of each document, where its sentences begin, in characters; ascending. A token
                belongs to the sentence in which it ends. So white space between two sentences
                belongs to the first, unless it is part of a token of the second.
        """
        if len(self._parts) > _KEPT_PARTS or len(self._ids) > _KEPT_TOKENS:
            self._clear()
        split = [self._split(text) for text in texts]
        parts = [part for one in split for part in one]
        index = np.array(self._indices(parts), np.int64)
        bounds = np.frombuffer(self._bounds, np.int64)
        first, counts = bounds[index], bounds[index + 1] - bounds[index]
        running = np.append(0, np.cumsum(counts))
        place = positions(first, counts)
        # The characters of all documents are numbered through.
        sizes = np.fromiter(map(len, parts), np.int64, len(parts))
        ends = np.frombuffer(self._ends, np.int32)[place]
        ends = ends + np.repeat(np.cumsum(sizes) - sizes, counts)
        tokens = np.diff(running[np.append(0, np.cumsum([len(one) for one in split]))])
        totals = np.frombuffer(self._counts, np.int64).reshape(-1, 3)[index].sum(0)
        words, characters, unknown = totals.tolist()
        return EncodedTexts(
            np.frombuffer(self._ids, np.int32)[place],
            np.frombuffer(self._begins, np.int8)[place].astype(bool),
            _sentence_lengths(texts, starts, tokens, ends),
            Losses(words, characters, unknown) + self._lost(texts),
        )

    def _split(self, text: str) -> list[str]:
        """Return the parts of a document."""
        parts = self._cuts.split(text)
        if len(text) <= _LONGEST_PART:
            return parts
        return [
            part[i : i + _LONGEST_PART]
            for part in parts
            for i in range(0, len(part), _LONGEST_PART)
        ]

    def _indices(self, parts: list[str]) -> list[int]:
        """Return the index of each part; those that are not known yet are tokenized."""
        known = self._parts
        found = list(map(known.get, parts))
        if None not in found:
            return found  # type: ignore[return-value]
        result = list[int]()
        for part, index in zip(parts, found, strict=True):
            if index is None and (index := known.get(part)) is None:
                index = self._add(part)
                if len(part) <= _KEPT_LENGTH:
                    known[part] = index
            result.append(index)
        return result

    def _add(self, part: str) -> int:
        """Tokenize a part, and return its index."""
        encoding = self._tokenizer.encode(part, add_special_tokens=False)
        ids, offsets, words = encoding.ids, encoding.offsets, encoding.word_ids
        begins = [i == 0 or words[i] != words[i - 1] for i in range(len(ids))]
        if not self._splits_words:  # then a word is white space and what follows it
            blank = [part[a:b].isspace() for a, b in offsets]
            for i in range(1, len(ids)):
                a, before = offsets[i][0], offsets[i - 1][1]
                begins[i] |= not blank[i - 1] and (a > before or part[a : a + 1].isspace())
        unknown = 0
        if not self._control.isdisjoint(ids) or self._unknown in ids:
            kept = list[int]()
            for i, token in enumerate(ids):
                if token == self._unknown or token in self._control:
                    unknown += offsets[i][1] - offsets[i][0]
                    if self._unknown is None:
                        continue
                    ids[i] = self._unknown
                kept.append(i)
            ids, begins = [ids[i] for i in kept], [begins[i] for i in kept]
            offsets = [offsets[i] for i in kept]
        self._ids.extend(ids)
        self._begins.extend(map(int, begins))
        self._ends.extend(end for _, end in offsets)
        self._bounds.append(len(self._ids))
        whole = part.split()
        self._counts.extend((len(whole), sum(map(len, whole)), unknown))
        return len(self._bounds) - 2


def _sentence_lengths(
    texts: list[str], starts: list[list[int]], tokens: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Return the tokens of each sentence, int64 [sentences].

    Args:
        texts, starts: as TextEncoder gets them.
        tokens: int64 [texts], tokens of each document.
        ends: int64 [T], where each token ends, in characters of all documents.
    """
    sentences = np.array([len(one) for one in starts], np.int64)
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    begins = np.array([start for one in starts for start in one], np.int64)
    begins += np.repeat(np.cumsum(sizes) - sizes, sentences)
    found = np.searchsorted(begins, ends, "left") - 1
    # What comes before the first sentence of a document belongs to it.
    found = np.maximum(found, np.repeat(np.cumsum(sentences) - sentences, tokens))
    return np.bincount(np.maximum.accumulate(found), minlength=len(begins))


class _LostWords:
    """Counts the letters that a normalizer drops or makes small, word by word."""

    def __init__(self, tokenizer: Tokenizer):
        self._normalizer = tokenizer.normalizer
        kept = json.dumps(part_of(self._normalizer))
        self._loses = any(f'"{name}"' in kept for name in _LOSE_LETTERS)
        self._known: dict[str, tuple[int, int, int]] = {}

    def __call__(self, texts: list[str]) -> Losses:
        if not self._loses:
            return Losses()
        if len(self._known) > _KEPT_PARTS:
            self._known.clear()
        marked = marks = capitals = removed = 0
        examples, characters = dict[str, None](), dict[str, None]()
        words = Counter(word for text in texts for word in text.split())
        for word, count in words.items():
            found = self._known.get(word)
            if found is None:
                found = self._known[word] = self._of(word)
            if found == (0, 0, 0):
                continue
            marked += count * (found[0] > 0)
            marks += count * found[0]
            capitals += count * found[1]
            removed += count * (found[2] > 0)
            if found[0] and len(examples) < EXAMPLES:
                after = self._normalizer.normalize_str(word)
                shown = f"{word[:_EXAMPLE_LENGTH]} → {after[:_EXAMPLE_LENGTH]}"
                examples[repr(shown)[1:-1]] = None  # a control character is shown, not obeyed
            if found[2] and len(characters) < EXAMPLES:
                characters |= dict.fromkeys(f"U+{ord(c):04X}" for c in REMOVED.findall(word))
        return Losses(
            marked_words=marked,
            marks=marks,
            inner_capitals=capitals,
            removed_words=removed,
            examples=tuple(examples),
            removed=tuple(characters)[:EXAMPLES],
        )

    def _of(self, word: str) -> tuple[int, int, int]:
        """Return how many marks, inner capitals and letters of REMOVED a word loses."""
        after = self._normalizer.normalize_str(word)
        before = _marks(word), len(_INNER_CAPITAL.findall(word)), len(REMOVED.findall(word))
        left = _marks(after), len(_INNER_CAPITAL.findall(after)), len(REMOVED.findall(after))
        marks, capitals, removed = (max(a - b, 0) for a, b in zip(before, left, strict=True))
        return marks, capitals, removed


def _marks(word: str) -> int:
    """Return the accents and vowel signs of a word."""
    if word.isascii():
        return 0
    return sum(unicodedata.category(c) == "Mn" for c in unicodedata.normalize("NFD", word))
