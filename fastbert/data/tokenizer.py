"""The WordPiece tokenizer: train, load and save its vocabulary, and encode many sentences fast.

The algorithm is that of Hugging Face's `tokenizers`, in Rust. Two things are added here. Training
gives the same vocabulary every time. `Encoder` calls Rust once for each distinct word instead of
once for each occurrence.
"""

from __future__ import annotations

import json
import string
import sys
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from fastbert.data.dataset import SpecialIds
from fastbert.errors import InputError

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
VOCAB_SIZES = (100, 1 << 20)
# A character outside the alphabet makes its whole word [UNK]. One such character in 10,000 affects
# about one word in 2,000.
ALPHABET_COVERAGE = 0.9999
ALPHABET_SHARE = 0.5  # of the vocabulary at most, so that a small one has room for words


def train_tokenizer(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> Tokenizer:
    """Train a WordPiece vocabulary; the same texts always give the same vocabulary.

    Args:
        texts: the documents.
        vocab_size: the vocabulary is smaller where too few words occur twice.
        lowercase: whether capitals are converted to small letters.

    Raises:
        InputError: a vocabulary size out of range, or texts without any character.
    """
    check_vocab_size(vocab_size)
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    normalized = [normalizer.normalize_str(text) for text in texts]
    first, inner = _alphabet(normalized, int(vocab_size * ALPHABET_SHARE))
    if not first:
        raise InputError("no text to train a vocabulary on: every document is empty")
    # The trainer numbers the pieces "##x" in the order of a hash map, and breaks ties between pairs
    # by these numbers. So two runs would differ. Special tokens are numbered first, in the given
    # order, so the pieces are passed as special tokens.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[
            *SPECIAL_TOKENS.values(),
            *first,
            *("##" + character for character in inner),
        ],
        initial_alphabet=first,
        # Exactly these characters: the trainer's own choice among equally rare ones is random.
        limit_alphabet=len(first),
    )
    trained = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk"]))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(normalized, trainer)
    ids = trained.get_vocab(with_added_tokens=True)
    return _assemble(sorted(ids, key=ids.__getitem__), lowercase)


def check_vocab_size(vocab_size: int) -> None:
    """Raise InputError where the size is out of range; called before hours of reading."""
    low, high = VOCAB_SIZES
    if not low <= vocab_size <= high:
        raise InputError(
            f"--vocab-size {vocab_size}: must be from {low} to {high:,} (BERT's is 30522)"
        )


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether equal ids mean equal tokens, and both tokenizers normalise text in the same way."""
    return (
        a.get_vocab() == b.get_vocab()
        and json.loads(a.to_str())["normalizer"] == json.loads(b.to_str())["normalizer"]
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a BERT tokenizer from a folder with tokenizer.json or vocab.txt, or from a vocab.txt.

    A vocab.txt alone does not say whether text is lower-cased. A tokenizer_config.json beside it
    does. Without one, a vocabulary without capital letters is assumed to be lower-cased.

    Raises:
        InputError: there is no tokenizer, it cannot be read or is not a WordPiece tokenizer like
            BERT's, a special token is missing, a token occurs twice, or ids have gaps.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        names = ("tokenizer.json", "vocab.txt")
        file = next((path / name for name in names if (path / name).is_file()), path)
        if file == path:
            raise InputError(
                f"{path}: no tokenizer.json and no vocab.txt in this folder; "
                "give the folder of a BERT tokenizer"
            )
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such tokenizer; give the folder of a BERT tokenizer or a vocab.txt"
        ) from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: not UTF-8 at byte {error.start}; a vocabulary is a text file"
        ) from None
    tokenizer = _from_json(text, file) if file.suffix == ".json" else _from_vocabulary(text, file)
    special_ids(tokenizer, file)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise InputError(
            f"{file}: its {len(vocabulary)} tokens do not have the ids 0 to "
            f"{len(vocabulary) - 1}; renumber them"
        )
    if any("\n" in token or "\r" in token for token in vocabulary):
        raise InputError(
            f"{file}: a token contains a line break, which vocab.txt cannot represent; remove it"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "[MASK]" in a text is six ordinary characters
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json, vocab.txt and tokenizer_config.json, as AutoTokenizer loads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    normalizer, ids = tokenizer.normalizer, tokenizer.get_vocab()
    config = {
        "tokenizer_class": "BertTokenizerFast",
        "do_lower_case": normalizer.lowercase,
        "strip_accents": normalizer.strip_accents,
        "tokenize_chinese_chars": normalizer.handle_chinese_chars,
        "model_max_length": 512,
        **{f"{name}_token": token for name, token in SPECIAL_TOKENS.items()},
    }
    texts = {
        # Not tokenizer.save, which reports a full disk as a bare Exception.
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "vocab.txt": "".join(token + "\n" for token in sorted(ids, key=ids.__getitem__)),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def special_ids(tokenizer: Tokenizer, source: str | Path) -> SpecialIds:
    """Return the ids of the five special tokens.

    Raises:
        InputError: one is missing; the message names the tokenizer by `source`.
    """
    ids = {name: tokenizer.token_to_id(token) for name, token in SPECIAL_TOKENS.items()}
    missing = [SPECIAL_TOKENS[name] for name, number in ids.items() if number is None]
    if missing:
        raise InputError(
            f"{source}: the vocabulary has no {', '.join(missing)}; "
            f"a BERT vocabulary needs {' '.join(SPECIAL_TOKENS.values())}"
        )
    return SpecialIds(**{name: number for name, number in ids.items() if number is not None})


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


def _assemble(
    tokens: Sequence[str], lowercase: bool, strip_accents: bool | None = None, chinese: bool = True
) -> Tokenizer:
    """Return BERT's tokenizer for a vocabulary, in the order of its ids."""
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _alphabet(texts: list[str], most: int) -> tuple[list[str], list[str]]:
    """Return the characters that get a piece of their own, and those that get one inside a word.

    Both lists are sorted, and the second is part of the first. The most frequent characters are
    taken until they cover ALPHABET_COVERAGE of the texts or make `most` pieces.
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
    return [chr(code) for code in chosen], [chr(code) for code in chosen if inside[code]]


def _breaks_word(character: str) -> bool:
    """Whether BERT's pre-tokenizer ends a word here: whitespace, punctuation, and ASCII symbols."""
    return (
        character.isspace()
        or unicodedata.category(character)[0] == "P"
        or ("!" <= character <= "~" and not character.isalnum())
    )


def _from_json(text: str, file: Path) -> Tokenizer:
    """Load a file of `tokenizers`, if it does what BERT's tokenizer does.

    Encoder and the masking rely on this.
    """
    try:
        settings = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, file))
        model, normalizer = settings["model"], settings["normalizer"]
        kinds = [part and part["type"] for part in (model, normalizer, settings["pre_tokenizer"])]
        prefix, unknown = model.get("continuing_subword_prefix"), model.get("unk_token")
        clean = normalizer and normalizer.get("clean_text")
        added = [token["content"] for token in settings["added_tokens"] if not token["special"]]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: not the file of a BERT tokenizer ({type(error).__name__}: {error}); "
            "give one, or its vocab.txt"
        ) from None
    if kinds != ["WordPiece", "BertNormalizer", "BertPreTokenizer"]:
        raise InputError(
            f"{file}: it is {', '.join(map(str, kinds))}; it must be WordPiece, BertNormalizer, "
            "BertPreTokenizer, as in BERT"
        )
    if (prefix, unknown, clean) != ("##", "[UNK]", True):
        raise InputError(
            f"{file}: prefix {prefix!r}, unknown {unknown!r}, clean_text {clean}; they must be "
            "'##', '[UNK]', true, as in BERT"
        )
    if added:
        raise InputError(
            f"{file}: {len(added)} added tokens ({added[0]!r}, ...) outside the WordPiece model; "
            "move them into its vocabulary"
        )
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the Rust side raises no narrower type
        raise InputError(f"{file}: not a valid tokenizer: {error}") from None


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        double = next(
            name for i, (name, _) in enumerate(pairs) if name in {other for other, _ in pairs[:i]}
        )
        raise InputError(f"{file}: {double!r} occurs twice; keep one")
    return values


def _from_vocabulary(text: str, file: Path) -> Tokenizer:
    """Load a list of tokens, one per line; the line's number, from 0, is the id."""
    tokens = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if not token.strip():
            raise InputError(f"{file}: line {i + 1} is empty; a vocabulary has one token per line")
        if token in ids:
            raise InputError(
                f"{file}: line {i + 1}: {token!r} is already in line {ids[token] + 1}; keep one"
            )
        ids[token] = i
    special_ids(Tokenizer(models.WordPiece(ids, unk_token="[UNK]")), file)
    config_file = file.with_name("tokenizer_config.json")
    try:
        config = {}
        if config_file.is_file():
            config = json.loads(config_file.read_text(encoding="utf-8"))
        lowercase, accents = config.get("do_lower_case"), config.get("strip_accents")
        chinese = config.get("tokenize_chinese_chars", True)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{config_file}: cannot be read as a tokenizer's settings: {error}"
        ) from None
    if lowercase is None:
        ordinary = (t for t in tokens if not (t.startswith("[") and t.endswith("]")))
        lowercase = not any(token != token.lower() for token in ordinary)
    try:
        return _assemble(tokens, lowercase, accents, chinese)
    except TypeError as error:
        raise InputError(
            f"{config_file}: do_lower_case, strip_accents or tokenize_chinese_chars has the wrong "
            f"type: {error}"
        ) from None
