"""Encode many sentences fast: each distinct word is tokenized once, then looked up."""

from __future__ import annotations

import string
from array import array
from operator import attrgetter

import numpy as np
from tokenizers import Tokenizer


class Encoder:
    """Encodes many sentences; equals `tokenizer.encode(sentence, add_special_tokens=False).ids`.

    BERT's normalizer and pre-tokenizer never look across ASCII whitespace or punctuation. So the
    ids of a text are the ids of its words, when the text is cut there. Few of the words are
    distinct: Rust tokenizes each once, and a dictionary keeps the result. In front of the
    dictionary is a hash table for words of up to 16 bytes, whose keys are two integers. numpy looks
    up all words of a text in it at once.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._lowercase: bool = tokenizer.normalizer.lowercase
        self._clear()

    def _clear(self) -> None:
        """Clear the dictionary and the table."""
        self._words = _Words(self._tokenizer)
        # The key, and the index, of the last word in each slot of the table.
        self._keys = np.zeros((2, _SLOTS), np.uint64)
        self._index = np.zeros(_SLOTS, np.int32)

    def __call__(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode sentences.

        Returns:
            ids: int32 [T], of all sentences, one after another.
            lengths: int64 [len(sentences)], tokens of each; 0 for a sentence without text.
        """
        if len(self._words) > _KEPT_WORDS or len(self._words.ids) > _KEPT_TOKENS:
            self._clear()
        text = _END.join([*map(str.encode, sentences), b""])
        # lower() of bytes changes ASCII letters only; the tokenizer lower-cases the others.
        text = text.lower() if self._lowercase else text
        text = b" " + text + b" " * (_KEY_BYTES + 8)
        words = self._look_up(text)
        bounds = np.frombuffer(self._words.bounds, np.int64)
        starts = bounds[words]
        counts = bounds[words + 1] - starts
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        places = np.arange(total) + np.repeat(starts - (ends - counts), counts)
        ids = np.frombuffer(self._words.ids, np.int32)[places]
        return ids, np.diff(ends[words == _END_INDEX], prepend=0)

    def _look_up(self, text: bytes) -> np.ndarray:
        """Return the index of each word of the text, int64 [words].

        `text` begins with a space and ends with at least as many spaces as a key has bytes.
        """
        kind = np.frombuffer(text.translate(_KINDS), np.uint8)
        inside = (kind == _INSIDE).view(np.uint8)
        starts = np.flatnonzero(kind[1:] > inside[:-1]) + 1
        ends = np.flatnonzero(kind[:-1] > inside[1:]) + 1
        lengths = ends - starts
        # The integer of the eight bytes from each byte on.
        eight = np.ndarray(len(text) - 7, "<u8", text, strides=(1,))
        first = np.take(eight, starts) & _MASKS[np.minimum(lengths, 8)]
        second = np.take(eight, starts + 8) & _MASKS[np.clip(lengths - 8, 0, 8)]
        mixed = first * _MIX_1 ^ second * _MIX_2
        mixed = (mixed ^ mixed >> np.uint64(32)) * _MIX_1
        slots = (mixed >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
        words = np.empty(len(starts), np.int64)
        long = np.flatnonzero(lengths > _KEY_BYTES)
        words[long] = self._indices_of(text, starts[long], ends[long])
        left = np.flatnonzero(lengths <= _KEY_BYTES)
        while True:
            at = slots[left]
            words[left] = self._index[at]
            left = left[(self._keys[0][at] != first[left]) | (self._keys[1][at] != second[left])]
            if not len(left):
                return words
            # `left` are the words whose slot holds another word. For each slot one of them is
            # inserted, and the others are looked up again.
            at = slots[left]
            self._index[at] = left
            chosen = left[self._index[at] == left]
            at = slots[chosen]
            self._keys[0][at], self._keys[1][at] = first[chosen], second[chosen]
            self._index[at] = self._indices_of(text, starts[chosen], ends[chosen])

    def _indices_of(self, text: bytes, starts: np.ndarray, ends: np.ndarray) -> list[int]:
        """Return the indices of words from the dictionary, which encodes new ones."""
        bounds = zip(starts.tolist(), ends.tolist(), strict=True)
        words = [text[a:b] for a, b in bounds]
        return list(map(self._words.__getitem__, words))


_END = b"\xff"  # a separate word after each sentence; this byte does not occur in UTF-8
_END_INDEX = 1
_SPACE, _INSIDE, _ALONE = range(3)
_ISOLATED = string.punctuation.encode() + _END
# Control characters stay inside a word: the tokenizer removes them and joins the rest.
_KINDS = bytes(
    _SPACE if byte in b" \t\n\r" else _ALONE if byte in _ISOLATED else _INSIDE
    for byte in range(256)
)
_KEY_BYTES = 16
_MASKS = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
_MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd, of mixed bits
_SLOT_BITS = 20
_SLOTS = 1 << _SLOT_BITS
_KEPT_WORDS = 1 << 20  # about 150 MB of a worker's memory
_KEPT_TOKENS = 1 << 22
# bytes; text without spaces has "words" as long as sentences, which do not occur again
_KEPT_LENGTH = 64
_ID = attrgetter("id")


class _Words(dict[bytes, int]):
    """Maps a word to its index; a word that is missing is encoded when it is looked up.

    Index 0 has no tokens. It stands for the word whose key is that of an empty slot, which consists
    of NUL bytes. _END_INDEX stands for the end of a sentence.

    Attributes:
        ids: of all words, one word after another. An array cannot grow while a view shares its
            memory. Drop views of it and of `bounds` before the next word is looked up.
        bounds: where the ids of each word begin, and at the end the number of ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self[_END] = _END_INDEX
        self._encode, self._tokenize = tokenizer.encode, tokenizer.model.tokenize
        self.ids, self.bounds = array("i"), array("q", [0, 0, 0])

    def __missing__(self, word: bytes) -> int:
        ids, bounds = self.ids, self.bounds
        if word.isalnum():
            # For bytes this means ASCII only, for which the model alone is enough. It takes a third
            # of the time of the whole tokenizer.
            ids.extend(map(_ID, self._tokenize(word.decode())))
        else:
            ids.extend(self._encode(word.decode(), add_special_tokens=False).ids)
        bounds.append(len(ids))
        index = len(bounds) - 2
        if len(word) <= _KEPT_LENGTH:
            self[word] = index
        return index
