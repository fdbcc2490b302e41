"""The WordPiece vocabulary: trained, loaded, saved, and the fast way from many sentences to ids.

The algorithm is Hugging Face's `tokenizers`, in Rust. Two things are added here: training that gives the same
vocabulary every time, and `Encoder`, which asks Rust once for each distinct word instead of once for each occurrence.
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
# A character outside the alphabet makes its whole word [UNK]: one in 10,000 characters is about one in 2,000 words.
ALPHABET_COVERAGE = 0.9999
ALPHABET_SHARE = 0.5  # of the vocabulary at most, so that a small one keeps room for words


def train_tokenizer(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> Tokenizer:
    """Train a WordPiece vocabulary; the same texts always give the same one.

    It comes out smaller than `vocab_size` where the texts have too few words that occur twice.

    Raises:
        InputError: a vocabulary size out of range, or texts without a single character to learn from.
    """
    check_vocab_size(vocab_size)
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    normalized = [normalizer.normalize_str(text) for text in texts]
    first, inner = _alphabet(normalized, int(vocab_size * ALPHABET_SHARE))
    if not first:
        raise InputError("no text to train a vocabulary on: every document is empty")
    # The trainer numbers the pieces "##x" in the order of a hash map and breaks ties between pairs by these numbers,
    # so that no two runs agree. Pieces given as special tokens are numbered first, in our order.
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
        limit_alphabet=len(
            first
        ),  # exactly ours: among equally rare characters its own choice is random too
    )
    trained = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk"]))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(normalized, trainer)
    ids = trained.get_vocab(with_added_tokens=True)
    return _assemble(sorted(ids, key=ids.__getitem__), lowercase)


def check_vocab_size(vocab_size: int) -> None:
    """Raise InputError where it is out of range; to be asked before hours of reading."""
    low, high = VOCAB_SIZES
    if not low <= vocab_size <= high:
        raise InputError(
            f"--vocab-size {vocab_size}: must be from {low} to {high:,} (BERT's is 30522)"
        )


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether ids mean the same tokens, made from text in the same way."""
    return (
        a.get_vocab() == b.get_vocab()
        and json.loads(a.to_str())["normalizer"] == json.loads(b.to_str())["normalizer"]
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a BERT tokenizer: a Hugging Face folder with tokenizer.json or vocab.txt, or a vocab.txt file.

    A vocab.txt alone does not say whether text is lower-cased: a tokenizer_config.json beside it does, otherwise a
    vocabulary without capital letters is taken as a lower-casing one.

    Raises:
        InputError: nothing there, not readable, not a WordPiece tokenizer of BERT's kind, a special token missing,
            a token twice, or ids with gaps.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        file = next(
            (path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()),
            path,
        )
        if file == path:
            raise InputError(
                f"{path}: no tokenizer.json and no vocab.txt in this folder; give the folder of a BERT tokenizer"
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
            f"{file}: its {len(vocabulary)} tokens do not have the ids 0 to {len(vocabulary) - 1}; renumber them"
        )
    if any("\n" in token or "\r" in token for token in vocabulary):
        raise InputError(
            f"{file}: a token holds a line break, which no vocab.txt can hold; remove it"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "[MASK]" in a text is five ordinary characters
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json, vocab.txt and tokenizer_config.json: what transformers' AutoTokenizer loads."""
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
        "tokenizer.json": tokenizer.to_str(
            pretty=True
        ),  # not tokenizer.save: it reports a full disk as a bare Exception
        "vocab.txt": "".join(token + "\n" for token in sorted(ids, key=ids.__getitem__)),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def special_ids(tokenizer: Tokenizer, source: str | Path) -> SpecialIds:
    """The ids of the five special tokens; `source` names the tokenizer in the error when one is missing."""
    ids = {name: tokenizer.token_to_id(token) for name, token in SPECIAL_TOKENS.items()}
    missing = [SPECIAL_TOKENS[name] for name, number in ids.items() if number is None]
    if missing:
        raise InputError(
            f"{source}: the vocabulary has no {', '.join(missing)}; a BERT vocabulary needs {' '.join(SPECIAL_TOKENS.values())}"
        )
    return SpecialIds(**{name: number for name, number in ids.items() if number is not None})


class Encoder:
    """Ids of many sentences, equal to `tokenizer.encode(sentence, add_special_tokens=False).ids` of each.

    BERT's normalizer and pre-tokenizer never look across ASCII whitespace or punctuation, so the ids of a text are those of
    its words, cut there, end to end. Few of them are distinct: Rust sees each once, and a dictionary knows it from then on.
    Before the dictionary stands a table for words of up to 16 bytes, taken as two numbers: numpy looks up all of a text at once.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._lowercase: bool = tokenizer.normalizer.lowercase
        self._forget()

    def _forget(self) -> None:
        self._words = _Words(self._tokenizer)
        self._keys = np.zeros(
            (2, _SLOTS), np.uint64
        )  # of the word that was last seen in each slot,
        self._index = np.zeros(_SLOTS, np.int32)  # and its index

    def __call__(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode.

        Returns:
            ids: int32 [T], of all sentences, end to end.
            lengths: int64 [len(sentences)], tokens of each; 0 for one without text.
        """
        if len(self._words) > _KEPT_WORDS or len(self._words.ids) > _KEPT_TOKENS:
            self._forget()
        text = _END.join([*map(str.encode, sentences), b""])
        text = (
            b" " + (text.lower() if self._lowercase else text) + b" " * (_KEY_BYTES + 8)
        )  # lower: of bytes, ASCII alone
        words = self._look_up(text)
        bounds = np.frombuffer(self._words.bounds, np.int64)
        starts = bounds[words]
        counts = bounds[words + 1] - starts
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        ids = np.frombuffer(self._words.ids, np.int32)[
            np.arange(total) + np.repeat(starts - (ends - counts), counts)
        ]
        return ids, np.diff(ends[words == _END_INDEX], prepend=0)

    def _look_up(self, text: bytes) -> np.ndarray:
        """int64 [words of the text]: the index of each; `text` begins with a space and ends with as many as a key is long."""
        kind = np.frombuffer(text.translate(_KINDS), np.uint8)
        inside = (kind == _INSIDE).view(np.uint8)
        starts = np.flatnonzero(kind[1:] > inside[:-1]) + 1
        ends = np.flatnonzero(kind[:-1] > inside[1:]) + 1
        lengths = ends - starts
        eight = np.ndarray(
            len(text) - 7, "<u8", text, strides=(1,)
        )  # at each byte, it and the seven behind it
        first = np.take(eight, starts) & _MASKS[np.minimum(lengths, 8)]
        second = np.take(eight, starts + 8) & _MASKS[np.clip(lengths - 8, 0, 8)]
        mixed = first * _MIX_1 ^ second * _MIX_2
        slots = ((mixed ^ mixed >> np.uint64(32)) * _MIX_1 >> np.uint64(64 - _SLOT_BITS)).astype(
            np.int64
        )
        words = np.empty(len(starts), np.int64)
        long = np.flatnonzero(lengths > _KEY_BYTES)
        words[long] = self._ask(text, starts[long], ends[long])
        left = np.flatnonzero(lengths <= _KEY_BYTES)
        while True:
            at = slots[left]
            words[left] = self._index[at]
            left = left[(self._keys[0][at] != first[left]) | (self._keys[1][at] != second[left])]
            if not len(left):
                return words
            # Of the words that are not in the slot that they want one is put there, and the others look again.
            at = slots[left]
            self._index[at] = left
            chosen = left[self._index[at] == left]
            at = slots[chosen]
            self._keys[0][at], self._keys[1][at] = first[chosen], second[chosen]
            self._index[at] = self._ask(text, starts[chosen], ends[chosen])

    def _ask(self, text: bytes, starts: np.ndarray, ends: np.ndarray) -> list[int]:
        return list(
            map(
                self._words.__getitem__,
                [text[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)],
            )
        )


_END = b"\xff"  # a word of its own behind each sentence; no byte of UTF-8
_END_INDEX = 1
_SPACE, _INSIDE, _ALONE = range(3)
_ISOLATED = string.punctuation.encode() + _END
# Control characters stay inside a word: the tokenizer removes them, and joins what stands around.
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
_KEPT_LENGTH = (
    64  # bytes; text without spaces has "words" as long as sentences, which never come again
)
_ID = attrgetter("id")


class _Words(dict[bytes, int]):
    """Word -> its index; a word that is asked for and not there is encoded.

    Index 0 has no tokens, like the word whose key is that of an empty slot: one of NUL bytes. _END_INDEX is the end of a sentence.

    Attributes:
        ids: of all words, end to end. Views of it and of `bounds` must be dropped before the next word is asked for: neither
            array grows while its memory is shared.
        bounds: where the ids of each word begin, and behind them all how many there are.
    """

    def __init__(self, tokenizer: Tokenizer):
        self[_END] = _END_INDEX
        self._encode, self._tokenize = tokenizer.encode, tokenizer.model.tokenize
        self.ids, self.bounds = array("i"), array("q", [0, 0, 0])

    def __missing__(self, word: bytes) -> int:
        ids, bounds = self.ids, self.bounds
        if word.isalnum():  # of bytes: ASCII alone; the model without the tokenizer around it takes a third of the time
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
    """BERT's tokenizer around a vocabulary, in the order of its ids."""
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
    """The characters that get a piece of their own, and those of them that also get one inside a word, both sorted.

    The most frequent ones are taken until they cover ALPHABET_COVERAGE of the texts or make `most` pieces.
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
    """A tokenizers file, taken only if it does what BERT's tokenizer does: Encoder and the masks build on that."""
    try:
        settings = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, file))
        model, normalizer = settings["model"], settings["normalizer"]
        kinds = [part and part["type"] for part in (model, normalizer, settings["pre_tokenizer"])]
        prefix, unknown, clean = (
            model.get("continuing_subword_prefix"),
            model.get("unk_token"),
            normalizer and normalizer.get("clean_text"),
        )
        added = [token["content"] for token in settings["added_tokens"] if not token["special"]]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: not the file of a BERT tokenizer ({type(error).__name__}: {error}); give one, or its vocab.txt"
        ) from None
    if kinds != ["WordPiece", "BertNormalizer", "BertPreTokenizer"]:
        raise InputError(
            f"{file}: it is {', '.join(map(str, kinds))}; needed is WordPiece, BertNormalizer, BertPreTokenizer, as in BERT"
        )
    if (prefix, unknown, clean) != ("##", "[UNK]", True):
        raise InputError(
            f"{file}: prefix {prefix!r}, unknown {unknown!r}, clean_text {clean}; needed is '##', '[UNK]', true, as in BERT"
        )
    if added:
        raise InputError(
            f"{file}: {len(added)} added tokens ({added[0]!r}, ...) outside the WordPiece model; move them into its vocabulary"
        )
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # what the Rust side raises has no narrower type
        raise InputError(f"{file}: not a sound tokenizer: {error}") from None


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        double = next(
            name for i, (name, _) in enumerate(pairs) if name in {other for other, _ in pairs[:i]}
        )
        raise InputError(f"{file}: {double!r} is there twice; keep one")
    return values


def _from_vocabulary(text: str, file: Path) -> Tokenizer:
    """A list of tokens, one a line; the line's number is the id."""
    tokens = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if not token.strip():
            raise InputError(f"{file}: line {i + 1} is empty; a vocabulary has one token a line")
        if token in ids:
            raise InputError(
                f"{file}: line {i + 1}: {token!r} is in line {ids[token] + 1} already; keep one"
            )
        ids[token] = i
    special_ids(Tokenizer(models.WordPiece(ids, unk_token="[UNK]")), file)
    config_file = file.with_name("tokenizer_config.json")
    try:
        config = (
            json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        )
        lowercase, accents, chinese = (
            config.get("do_lower_case"),
            config.get("strip_accents"),
            config.get("tokenize_chinese_chars", True),
        )
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{config_file}: cannot be read as a tokenizer's settings: {error}"
        ) from None
    if lowercase is None:
        lowercase = not any(
            token != token.lower()
            for token in tokens
            if not (token.startswith("[") and token.endswith("]"))
        )
    try:
        return _assemble(tokens, lowercase, accents, chinese)
    except TypeError as error:
        raise InputError(
            f"{config_file}: do_lower_case, strip_accents or tokenize_chinese_chars is of the wrong kind: {error}"
        ) from None
