"""Encode many sentences fast: each distinct word is tokenized once, then looked up."""

from __future__ import annotations

import re
import string
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from fastbert.data.split import positions
from fastbert.data.tokenizer import extra_tokens

EXAMPLES = 3  # words that a Losses quotes


@dataclass(frozen=True)
class Losses:
    """What a tokenizer drops of a text.

    A word is what lies between ASCII whitespace and punctuation. Characters exclude spaces.
    """

    words: int = 0
    characters: int = 0
    unknown_characters: int = 0  # of the pieces that became [UNK]
    cut_characters: int = 0  # of words that were too long and were cut into pieces
    marked_words: int = 0  # words that lost an accent or a vowel sign
    marks: int = 0  # how many of these they lost
    inner_capitals: int = 0  # capitals after a small letter or a digit that became small
    removed_words: int = 0  # words that lost characters of REMOVED, as if they were not there
    examples: tuple[str, ...] = ()  # of marked words: "für → fur"
    removed: tuple[str, ...] = ()  # some of those characters: "U+200B"

    def __add__(self, other: Losses) -> Losses:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Losses)}
        for name in ("examples", "removed"):
            sums[name] = tuple(dict.fromkeys(sums[name]))[:EXAMPLES]
        return Losses(**sums)


class Encoded(NamedTuple):
    """Many sentences as token ids."""

    ids: np.ndarray  # int32 [T], of all sentences, one after another
    lengths: np.ndarray  # int64 [sentences], tokens of each; 0 for a sentence without text
    losses: Losses


class Encoder:
    """Encodes many sentences; equals `tokenizer.encode(sentence, add_special_tokens=False).ids`.

    There is one difference. WordPiece makes a word of more than 100 characters one [UNK], which may
    hide a page of a script without spaces, of code or of a sequence of bases. Here such a word is
    cut into pieces of 100 characters, and each is encoded as a word.

    BERT's normalizer and pre-tokenizer never look across ASCII whitespace or punctuation. So the
    ids of a text are the ids of its words, when the text is cut there. Few of the words are
    distinct: Rust tokenizes each once, and a dictionary keeps the result. In front of the
    dictionary is a hash table for words of up to 16 bytes, whose keys are two integers. numpy looks
    up all words of a text in it at once.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._lowercase: bool = tokenizer.normalizer.lowercase
        self._normalize = tokenizer.normalizer.normalize_str
        extra = extra_tokens(tokenizer)
        self._extra = [token.content for token in extra if not token.normalized]
        # Such a token is compared with the normalised text, so a sentence does not show it.
        self._any_extra = len(self._extra) < len(extra)
        self._clear()

    def _clear(self) -> None:
        """Clear the dictionary and the table."""
        self._words = _Words(self._tokenizer)
        # The key, and the index, of the last word in each slot of the table.
        self._keys = np.zeros((2, _SLOTS), np.uint64)
        self._index = np.zeros(_SLOTS, np.int32)

    def __call__(self, sentences: list[str]) -> Encoded:
        """Encode sentences, and count what is lost."""
        whole = self._with_extra(sentences)
        if not whole:
            return self._by_words(sentences)
        # Extra tokens may contain spaces and punctuation, so such a sentence is not cut into words.
        rest = self._by_words(["" if i in whole else s for i, s in enumerate(sentences)])
        losses, lengths, ids = rest.losses, rest.lengths.copy(), list[int]()
        places = np.cumsum(lengths)
        for i in sorted(whole):
            encoding = self._tokenizer.encode(sentences[i], add_special_tokens=False)
            lengths[i] = len(encoding.ids)
            ids += encoding.ids
            losses += _lost_of(sentences[i], encoding, self._words.unknown_id)
        inserted = np.insert(rest.ids, np.repeat(places, lengths * (rest.lengths == 0)), ids)
        return Encoded(inserted.astype(np.int32, copy=False), lengths, losses)

    def _with_extra(self, sentences: list[str]) -> set[int]:
        """Return which sentences may contain one of the tokens that the model has added."""
        if self._any_extra:
            return set(range(len(sentences)))
        return {i for content in self._extra for i, text in enumerate(sentences) if content in text}

    def _by_words(self, sentences: list[str]) -> Encoded:
        """Encode sentences without extra tokens."""
        characters = sum(map(len, sentences))
        if characters <= _SLICE:
            return self._encode_slice(sentences, characters)
        # A slice takes up to 300 bytes a byte. BERT's tokenizer never looks across a space, so a
        # sentence that is longer than a slice is cut there.
        long = any(len(sentence) > _SLICE for sentence in sentences)
        parts = [list(_cut_at_spaces(sentence)) for sentence in sentences] if long else [sentences]
        slices = [
            self._encode_slice(part, sum(map(len, part)))
            for part in _slices(chain.from_iterable(parts))
        ]
        ids, lengths, losses = zip(*slices, strict=True)
        ids, lengths = np.concatenate(ids), np.concatenate(lengths)
        if long:
            counts = np.array([len(part) for part in parts])
            lengths = np.add.reduceat(lengths, np.cumsum(counts) - counts)
        return Encoded(ids, lengths, sum(losses, Losses()))

    def _encode_slice(self, sentences: list[str], characters: int) -> Encoded:
        """Encode a few sentences; `characters` is the sum of their lengths."""
        if len(self._words) > _KEPT_WORDS or len(self._words.ids) > _KEPT_TOKENS:
            self._clear()
        text = _END.join([*map(str.encode, sentences), b""])
        continued = len(text) - len(sentences) - characters  # bytes of characters of several
        text = b" " + text + b" " * (_KEY_BYTES + 8)
        kinds = np.frombuffer(text.translate(_KINDS), np.uint8)
        starts, ends, inside = _split(kinds & _KIND)
        inner_capitals = 0
        if self._lowercase:
            inner = (kinds[1:] & _CAPITAL) & (kinds[:-1] << 1)  # of which _SMALL is _CAPITAL
            inner_capitals = int(np.count_nonzero(inner))
            # lower() of bytes changes ASCII letters only; the tokenizer lower-cases the others.
            text = text.lower()
        words = self._look_up(text, starts, ends)
        losses = Losses(
            words=inside,
            characters=int(ends.sum() - starts.sum()) - len(sentences) - continued,
            inner_capitals=inner_capitals,
            **self._lost(text, words, starts, ends),
        )
        bounds = np.frombuffer(self._words.bounds, np.int64)
        counts = bounds[words + 1] - bounds[words]
        ids = np.frombuffer(self._words.ids, np.int32)[positions(bounds[words], counts)]
        ends = np.cumsum(counts)
        return Encoded(ids, np.diff(ends[words == _END_INDEX], prepend=0), losses)

    def _lost(
        self, text: bytes, words: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> dict[str, Any]:
        """Return the fields of Losses that are counted word by word."""
        rows = np.frombuffer(self._words.row, np.int32)[words]
        at = np.flatnonzero(rows)
        counts = np.frombuffer(self._words.counts, np.int64).reshape(-1, 4)
        unknown, cut, marks, removed = counts[rows[at]].T
        examples: dict[str, None] = {}
        for i in at[marks > 0]:
            word = text[starts[i] : ends[i]].decode()[:_EXAMPLE_LENGTH]
            example = f"{word} → {self._normalize(word)}"
            examples[repr(example)[1:-1]] = None  # a control character is shown, not obeyed
            if len(examples) == EXAMPLES:
                break
        characters: dict[str, None] = {}
        for i in at[removed > 0]:
            found = REMOVED.findall(text[starts[i] : ends[i]].decode())
            characters |= dict.fromkeys(f"U+{ord(character):04X}" for character in found)
            if len(characters) >= EXAMPLES:
                break
        return {
            "unknown_characters": int(unknown.sum()),
            "cut_characters": int(cut.sum()),
            "marked_words": int(np.count_nonzero(marks)),
            "marks": int(marks.sum()),
            "removed_words": int(np.count_nonzero(removed)),
            "examples": tuple(examples),
            "removed": tuple(characters)[:EXAMPLES],
        }

    def _look_up(self, text: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the index of each word of the text, int64 [words].

        `text` ends with at least as many spaces as a key has bytes.
        """
        lengths = ends - starts
        # The integer of the eight bytes from each byte on.
        eight = np.ndarray(len(text) - 7, "<u8", text, strides=(1,))
        capped = np.minimum(lengths, _KEY_BYTES)
        first = np.take(eight, starts) & _FIRST[capped]
        second = np.take(eight, starts + 8) & _SECOND[capped]
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


def _lost_of(sentence: str, encoding: Encoding, unknown_id: int | None) -> Losses:
    """Return the words, characters and unknown characters of a sentence."""
    spans = zip(encoding.ids, encoding.offsets, strict=True)
    return Losses(
        words=len(sentence.split()),
        characters=len(sentence) - sentence.count(" "),
        unknown_characters=sum(b - a for token, (a, b) in spans if token == unknown_id),
    )


def _cut_at_spaces(sentence: str) -> Iterator[str]:
    """Yield parts of about _SLICE characters; one without a space may be longer."""
    begin = 0
    while len(sentence) - begin > _SLICE and (end := sentence.find(" ", begin + _SLICE)) >= 0:
        yield sentence[begin:end]
        begin = end
    yield sentence[begin:]


def _slices(parts: Iterable[str]) -> Iterator[list[str]]:
    """Group parts to about _SLICE characters, and at most as many parts."""
    held, size = list[str](), 0
    for part in parts:
        held.append(part)
        size += len(part) + 1
        if size >= _SLICE:
            yield held
            held, size = [], 0
    if held:
        yield held


def _split(kind: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return where each word and each punctuation mark starts and ends, and the number of words.

    `kind` is that of each byte of a text that begins and ends with a space.
    """
    inside = (kind == _INSIDE).view(np.uint8)
    starts = np.flatnonzero(kind[1:] > inside[:-1]) + 1
    ends = np.flatnonzero(kind[:-1] > inside[1:]) + 1
    return starts, ends, len(starts) - int(np.count_nonzero(kind == _ALONE))


_END = b"\xff"  # a separate word after each sentence; this byte does not occur in UTF-8
_END_INDEX = 1
_SPACE, _INSIDE, _ALONE = range(3)
_KIND = 3  # the bits for these; the next two say more of an ASCII letter or digit
_SMALL, _CAPITAL = 4, 8
_ISOLATED = string.punctuation.encode() + _END
# Control characters stay inside a word: the tokenizer removes them and joins the rest.
_KINDS = bytes(
    (_SPACE if byte in b" \t\n\r" else _ALONE if byte in _ISOLATED else _INSIDE)
    + (_CAPITAL if byte in string.ascii_uppercase.encode() else 0)
    + (_SMALL if byte in (string.ascii_lowercase + string.digits).encode() else 0)
    for byte in range(256)
)
_KEY_BYTES = 16
# The bytes of both halves of a key that belong to a word, by its length.
_FIRST = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(_KEY_BYTES + 1)], np.uint64)
_SECOND = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(_KEY_BYTES + 1)], np.uint64)
_MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd, of mixed bits
_SLOT_BITS = 20
_SLOTS = 1 << _SLOT_BITS
_KEPT_WORDS = 1 << 20  # about 150 MB of a worker's memory
_KEPT_TOKENS = 1 << 22
# bytes; text without spaces has "words" as long as sentences, which do not occur again
_KEPT_LENGTH = 64
_SLICE = 1 << 21  # characters; more than a chunk of ordinary documents has
_LONGEST_RUN = 4000  # characters without ASCII whitespace or punctuation that go to Rust at a time
# Before these a word ends in any case: whitespace, ideographs, and their punctuation.
_BOUNDARY = re.compile("[\\s\u3001\u3002\u3008-\u3011\uff01\uff0c\uff1a\uff1b\uff1f]")
_BOUNDARY_OR_IDEOGRAPH = re.compile(f"{_BOUNDARY.pattern[:-1]}\u4e00-\u9fff]")
# What BERT's normalizer removes from the middle of a word although it separates words (page breaks,
# U+200B), shapes them (U+200C, U+200D) or is a letter (private use, and whatever became U+FFFD).
# Byte order marks, soft hyphens and marks of direction are removed too, where nothing is lost.
REMOVED = re.compile(
    "[\0-\x08\v\f\x0e-\x1f\x7f-\x9f\u200b-\u200d\ue000-\uf8ff\ufffd"
    "\U000f0000-\U000ffffd\U00100000-\U0010fffd]"
)
_EXAMPLE_LENGTH = 24  # characters of a word that are shown
_ID = attrgetter("id")


class _Words(dict[bytes, int]):
    """Maps a word to its index; a word that is missing is encoded when it is looked up.

    Index 0 has no tokens. It stands for the word whose key is that of an empty slot, which consists
    of NUL bytes. _END_INDEX stands for the end of a sentence.

    Attributes:
        ids: of all words, one word after another. An array cannot grow while a view shares its
            memory. Drop views of the arrays before the next word is looked up.
        bounds: where the ids of each word begin, and at the end the number of ids.
        row: of each word the row of `counts`; row 0, of zeros, for nearly all.
        counts: four numbers a row: characters that became [UNK], characters in pieces of more than
            the model takes, accents and vowel signs that were lost, characters of REMOVED.
    """

    def __init__(self, tokenizer: Tokenizer):
        self[_END] = _END_INDEX
        self._encode, self._tokenize = tokenizer.encode, tokenizer.model.tokenize
        self._tokenizer, self.unknown_id = tokenizer, tokenizer.token_to_id("[UNK]")
        normalizer = tokenizer.normalizer
        strips = normalizer.strip_accents
        self._strips: bool = normalizer.lowercase if strips is None else strips
        self._cleans: bool = normalizer.clean_text
        self._longest: int = tokenizer.model.max_input_chars_per_word
        self._longest = min(self._longest, _LONGEST_RUN // 2)
        self._boundary = _BOUNDARY_OR_IDEOGRAPH if normalizer.handle_chinese_chars else _BOUNDARY
        self.ids, self.bounds = array("i"), array("q", [0, 0, 0])
        self.row, self.counts = array("i", [0, 0]), array("q", [0, 0, 0, 0])

    def __missing__(self, word: bytes) -> int:
        ids, bounds = self.ids, self.bounds
        if word.isalnum() and len(word) <= self._longest:
            # For bytes this means ASCII only, for which the model alone is enough. It takes a third
            # of the time of the whole tokenizer.
            found = list(map(_ID, self._tokenize(word.decode())))
            ids.extend(found)
            lost = (len(word), 0, 0, 0) if self.unknown_id in found else None
        else:
            lost = self._add_any(word.decode())
        bounds.append(len(ids))
        if lost:
            self.counts.extend(lost)
        self.row.append(len(self.counts) // 4 - 1 if lost else 0)
        index = len(bounds) - 2
        if len(word) <= _KEPT_LENGTH:
            self[word] = index
        return index

    def _add_any(self, word: str) -> tuple[int, int, int, int] | None:
        """Append the ids of any word; return its row of `counts`, None for zeros."""
        unknown = cut = marks = 0
        removed = len(REMOVED.findall(word)) if self._cleans else 0
        for text in self._runs(word) if len(word) > _LONGEST_RUN else (word,):
            encoding = self._encode(text, add_special_tokens=False)
            ids, longest = encoding.ids, 0
            if self.unknown_id in ids:
                at = zip(ids, encoding.offsets, strict=True)
                spans = [b - a for i, (a, b) in at if i == self.unknown_id]
                longest = max(spans)
                unknown += sum(spans)
            if self._strips and not text.isascii():
                decomposed = unicodedata.normalize("NFD", text)
                marks += len(decomposed) - len(decomposed.translate(_WITHOUT_MARKS))
            # A character decomposes into at most four.
            if 4 * longest > self._longest:
                unknown -= sum(spans)
                unknown_here, cut_here = self._piece_by_piece(text)
                unknown, cut = unknown + unknown_here, cut + cut_here
            else:
                self.ids.extend(ids)
        return (unknown, cut, marks, removed) if unknown or cut or marks or removed else None

    def _runs(self, word: str) -> Iterator[str]:
        """Cut a word of more than _LONGEST_RUN characters, at the end of a word if there is one.

        Rust takes some 300 bytes a character, and text without spaces may be one word of 60 MB.
        """
        begin = 0
        while len(word) - begin > _LONGEST_RUN:
            end = begin + _LONGEST_RUN
            # Without a boundary in the last characters there is a word that is cut in any case.
            first = end - self._longest
            places = [match.start() for match in self._boundary.finditer(word[first:end])]
            if places:
                end = first + places[-1]
            else:
                # A mark stays with its letter.
                while end > begin + 1 and unicodedata.category(word[end])[0] == "M":
                    end -= 1
            yield word[begin:end]
            begin = end
        yield word[begin:]

    def _piece_by_piece(self, text: str) -> tuple[int, int]:
        """Append the ids of a word; return how many characters are unknown, and how many cut."""
        unknown = cut = 0
        normalized = self._tokenizer.normalizer.normalize_str(text)
        for piece, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(normalized):
            cut += len(piece) if len(piece) > self._longest else 0
            for i in range(0, len(piece), self._longest):
                part = piece[i : i + self._longest]
                ids = [token.id for token in self._tokenize(part)]
                unknown += len(part) if self.unknown_id in ids else 0
                self.ids.extend(ids)
        return unknown, cut


class _WithoutMarks(dict[int, int | None]):
    """A table for str.translate that removes what BERT's normalizer strips with the accents."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code)) == "Mn" else code
        return self[code]


_WITHOUT_MARKS = _WithoutMarks()
