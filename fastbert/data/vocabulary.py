"""Train a WordPiece vocabulary: the same texts always give the same one."""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from fastbert.data.byte_level import SMALLEST
from fastbert.data.token_roles import BERT_TOKENS
from fastbert.data.tokenizer import LONGEST_WORD, assemble
from fastbert.errors import InputError

ALGORITHMS = WORDPIECE, BPE = "wordpiece", "bpe"
VOCAB_SIZES = (100, 1 << 20)
# A character outside the alphabet makes its whole word [UNK]. One such character in 10,000 affects
# about one word in 2,000.
ALPHABET_COVERAGE = 0.9999
# Of the vocabulary at most, so that a small one has room for words, where it needs that.
ALPHABET_SHARE = 0.5


_LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, lowercase: bool = True, keep_accents: bool = False
) -> Tokenizer:
    """Train a WordPiece vocabulary; the same texts always give the same vocabulary.

    Args:
        texts: the documents.
        vocab_size: the vocabulary is smaller where too few words occur twice.
        lowercase: whether capitals are converted to small letters; accents and vowel signs are then
            dropped too, as in BERT.
        keep_accents: do not drop them.

    Raises:
        InputError: a vocabulary size out of range, or texts without any character.
    """
    check_vocab_size(vocab_size)
    strip_accents = False if keep_accents else None  # None: as lowercase says
    normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    normalized = [_with_short_words(_normalized(text, normalizer)) for text in texts]
    most = int(vocab_size * ALPHABET_SHARE)
    first, inner, whole = _alphabet(normalized, most)
    if not first:
        raise InputError("no text to train a vocabulary on: every document is empty")
    tokens = _pieces(normalized, vocab_size, first, inner)
    if not whole and len(tokens) < vocab_size:
        # Words do not fill their half, as in Chinese, where a character is a word of its own.
        first, inner, _ = _alphabet(normalized, most + vocab_size - len(tokens))
        tokens = _pieces(normalized, vocab_size, first, inner)
    return assemble(tokens, lowercase, strip_accents)


def _pieces(
    normalized: list[str], vocab_size: int, first: list[str], inner: list[str]
) -> list[str]:
    """Return the tokens of a vocabulary for normalised texts, given its alphabet."""
    # The trainer numbers the pieces "##x" in the order of a hash map, and breaks ties between pairs
    # by these numbers. So two runs would differ. Special tokens are numbered first, in the given
    # order, so the pieces are passed as special tokens.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[
            *BERT_TOKENS.values(),
            *first,
            *("##" + character for character in inner),
        ],
        initial_alphabet=first,
        # Exactly these characters: the trainer's own choice among equally rare ones is random.
        limit_alphabet=len(first),
    )
    trained = Tokenizer(models.WordPiece(unk_token=BERT_TOKENS["unk"]))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(normalized, trainer)
    ids = trained.get_vocab(with_added_tokens=True)
    return sorted(ids, key=ids.__getitem__)


def check_vocab_size(vocab_size: int, algorithm: str = WORDPIECE) -> None:
    """Raise InputError where the size is out of range; called before hours of reading."""
    low, high = VOCAB_SIZES
    usual = "BERT's is 30522"
    if algorithm == BPE:
        low, usual = SMALLEST, "ModernBERT's is 50368"
    if not low <= vocab_size <= high:
        raise InputError(f"--vocab-size {vocab_size}: must be from {low} to {high:,} ({usual})")


def _normalized(text: str, normalizer: normalizers.BertNormalizer) -> str:
    """Return what BERT's normalizer makes of a text; ASCII takes a twentieth of its time here."""
    if not text.isascii():
        return normalizer.normalize_str(text)
    return (text.lower() if normalizer.lowercase else text).translate(_CLEAN)


# As clean_text of BERT's normalizer: white space is a space, and control characters are removed.
_CLEAN: dict[int, str | None] = dict.fromkeys((*range(32), 127))
_CLEAN |= {ord(character): " " for character in "\t\n\r"}


def _with_short_words(text: str) -> str:
    """Return a normalised text with a space after each 100 characters of a longer word.

    The encoder cuts such words in the same way. The trainer's time grows with the square of the
    longest word.
    """
    begin = 0
    while len(text) - begin > LONGEST_WORD:
        space = text.rfind(" ", begin, begin + LONGEST_WORD + 1)
        if space < 0:
            return _LONG_RUN.sub(_cut_words, text)
        begin = space + 1
    return text


def _cut_words(run: re.Match[str]) -> str:
    """Cut the words of a run without whitespace; the run may have punctuation inside."""
    parts, held = list[str](), 0
    for character in run[0]:
        held = 0 if _breaks_word(character) else held + 1
        if held > LONGEST_WORD:
            parts.append(" ")
            held = 1
        parts.append(character)
    return "".join(parts)


def _alphabet(texts: list[str], most: int) -> tuple[list[str], list[str], bool]:
    """Return the characters that get a piece of their own, and those that get one inside a word.

    Both lists are sorted, and the second is part of the first. The most frequent characters are
    taken until they cover ALPHABET_COVERAGE of the texts, or make `most` pieces; the last value is
    whether all of them had room.
    """
    seen, inside = np.zeros((2, sys.maxunicode + 1), np.int64)
    breaks = np.zeros(sys.maxunicode + 1, bool)
    for i in range(0, len(texts), 4096):
        codes = np.frombuffer("\n".join(texts[i : i + 4096]).encode("utf-32-le"), np.uint32)
        counts = np.bincount(codes, minlength=len(seen))
        for code in np.flatnonzero((counts > 0) & (seen == 0)):
            breaks[code] = _breaks_word(chr(code))
        seen += counts
        part = ~breaks[codes]
        inside += np.bincount(codes[1:][part[1:] & part[:-1]], minlength=len(inside))
    seen[[code for code in np.flatnonzero(seen) if chr(code).isspace()]] = 0
    order = np.argsort(-seen, kind="stable")[: np.count_nonzero(seen)]
    covered = np.cumsum(seen[order]) - seen[order] < ALPHABET_COVERAGE * seen.sum()
    pieces = np.cumsum(1 + (inside[order] > 0))
    chosen = np.sort(order[covered & (pieces <= most)])
    inner = [chr(code) for code in chosen if inside[code]]
    return [chr(code) for code in chosen], inner, len(chosen) == np.count_nonzero(covered)


@functools.cache
def _breaks_word(character: str) -> bool:
    """Whether BERT's pre-tokenizer ends a word here: whitespace, punctuation, and ASCII symbols."""
    return (
        character.isspace()
        or unicodedata.category(character)[0] == "P"
        or ("!" <= character <= "~" and not character.isalnum())
    )
