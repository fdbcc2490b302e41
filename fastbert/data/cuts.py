"""Where a text may be cut so that the ids of its parts, one after another, are those of the text.

A text is cut before a space that follows a letter, a digit, a mark of punctuation or a symbol. The
space stays with what follows it. Three properties make this exact, and each is decided from the
components of the tokenizer by rule, never by trying texts:

- Its normalizer changes both parts as it changes the whole.
- Its pre-tokenizer ends a word at the cut, and a part that begins with a space is split as the end
  of the whole. Where it does not split at spaces at all, the model must be a BPE without any token
  that goes on across the cut: then no merge of two pieces does either.
- None of its added tokens reaches across the cut.

Where one of them is not known to hold, a text is not cut.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.data.token_roles import part_of
from fastbert.data.tokenizer import extra_tokens

_SPACE, _METASPACE, _BYTE_SPACE = " ", "▁", "Ġ"

# Normalizers that change each character, or each letter with its marks, for itself. None of them
# composes a space with what precedes it.
_LOCAL_NORMALIZERS = (
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"),
    *("Nmt", "Precompiled", "ByteLevel"),
)
# Pre-tokenizers that always split before a space and look at nothing beyond it.
_SPLIT_AT_SPACES = ("WhitespaceSplit", "Whitespace", "BertPreTokenizer")
# Those that may leave the space inside a piece, but split on both sides as without the cut.
_SPLIT_ELSEWHERE = ("Digits", "Punctuation")
# Patterns of published tokenizers. In each a space is matched by the first character of an
# alternative or within a run of white space, and no alternative looks back.
_KNOWN_PATTERNS = (
    # GPT-2
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3, and with single digits Qwen 2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # GPT-4
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
    # GPT-4o
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Runs of spaces that become one space, or one mark.
_RUNS_OF_SPACES = (" {2,}", " +", "\\s+")
# Letters that form one cluster with the character after them, even with a space: a normalizer that
# looks at clusters sees both. Source: Unicode 15, Grapheme_Cluster_Break=Prepend.
_PREPENDED = frozenset(
    "\u0d4e\U000111c2\U000111c3\U0001193f\U00011941\U00011a3a\U00011a84\U00011a85\U00011a86"
    "\U00011a87\U00011a88\U00011a89\U00011d46\U00011f02"
)
_ACROSS = re.compile(r"\S\s|▁")  # in an added token: text on both sides of a cut
_UNKNOWN, _SAFE, _UNSAFE = range(3)


class Cuts:
    """Finds the cuts of texts for one tokenizer.

    Attributes:
        problem: why its texts are not cut, in words; None where they are.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._normalizer = tokenizer.normalizer
        extra = extra_tokens(tokenizer)
        across = [
            token
            for token in extra
            if token.rstrip
            or _ACROSS.search(token.content)
            # What precedes its space decides whether it is a word of its own.
            or (token.single_word and token.content[0].isspace())
        ]
        # A text that contains one of these is not cut.
        self._across = [token.content for token in across if not token.normalized]
        self.problem = _problem(tokenizer, [t.content for t in across if t.normalized])
        # Of each character whether a space after it may be cut off.
        self._before = np.zeros(sys.maxunicode + 1, np.uint8)

    def split(self, text: str) -> list[str]:
        """Return the parts of a text, in order; together they are the text."""
        if self.problem is not None or any(token in text for token in self._across):
            return [text]
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        spaces = np.flatnonzero(codes[1:] == ord(_SPACE))
        kinds = self._before[codes[spaces]]
        if not kinds.all():
            for code in np.unique(codes[spaces][kinds == _UNKNOWN]):
                self._before[code] = _SAFE if self._is_safe(chr(code)) else _UNSAFE
            kinds = self._before[codes[spaces]]
        bounds = [0, *(spaces[kinds == _SAFE] + 1).tolist(), len(text)]
        return [text[a:b] for a, b in pairwise(bounds)]

    def start(self, text: str, size: int) -> str:
        """Return at least `size` characters of a text, from its start to a cut, or all of it."""
        if self.problem is not None or any(token in text for token in self._across):
            return text
        at = text.find(_SPACE, size)
        while at > 0 and not self._is_safe(text[at - 1]):
            at = text.find(_SPACE, at + 1)
        return text[:at] if at > 0 else text

    def _is_safe(self, character: str) -> bool:
        """Whether a space may be cut off after a character, which the normalizer may change."""
        after = character
        if self._normalizer is not None:
            after = self._normalizer.normalize_str(character)
        return (
            character not in _PREPENDED
            and len(after) > 0
            and all(
                unicodedata.category(c)[0] in "LNPS" and c != _METASPACE for c in character + after
            )
        )


def _problem(tokenizer: Tokenizer, across: list[str]) -> str | None:
    """Return why texts may not be cut, or None."""
    if across:
        return f"the added token {across[0]!r} may stand on both sides of a space"
    spaces = {_SPACE}  # what a space may have become
    problem = _problem_of_normalizer(part_of(tokenizer.normalizer), spaces)
    if problem is not None:
        return problem
    splits = _parts(part_of(tokenizer.pre_tokenizer), "pretokenizers")
    for split in splits:
        ends_words, problem = _split_at_cuts(split, spaces)
        if problem is not None:
            return problem
        if ends_words:
            return None
    return _problem_of_model(tokenizer, splits, spaces)


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the components that a sequence of components consists of."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for one in component[key] for part in _parts(one, key)]


def _problem_of_normalizer(component: dict[str, Any] | None, spaces: set[str]) -> str | None:
    """Return why a normalizer may change parts in another way; add what spaces become."""
    for part in _parts(component, "normalizers"):
        kind = part["type"]
        if kind == "ByteLevel":
            spaces.add(_BYTE_SPACE)
        if kind in _LOCAL_NORMALIZERS or (kind == "Strip" and not part["strip_left"]):
            continue
        if kind == "Replace":
            pattern, content = part["pattern"], part["content"]
            found = pattern.get("String")
            if found in spaces and content == _METASPACE:
                spaces.add(_METASPACE)
                continue
            if found is not None and not any(space in found for space in spaces):
                continue
            if pattern.get("Regex") in _RUNS_OF_SPACES and content in (_SPACE, _METASPACE):
                spaces.add(content)
                continue
        return f"its normalizer {kind} may look across spaces"
    return None


def _split_at_cuts(split: dict[str, Any], spaces: set[str]) -> tuple[bool, str | None]:
    """Return whether a pre-tokenizer ends a word at every cut, and why it may do other harm."""
    kind = split["type"]
    if kind in _SPLIT_AT_SPACES:
        return _METASPACE not in spaces and _BYTE_SPACE not in spaces, None
    if kind in _SPLIT_ELSEWHERE:
        return False, None
    if kind == "ByteLevel":
        return split["use_regex"] and spaces == {_SPACE}, None
    if kind == "Metaspace":
        return split.get("split", True) and split["replacement"] == _METASPACE, None
    if kind == "CharDelimiterSplit" and split["delimiter"] == _SPACE:
        return spaces == {_SPACE}, None
    if kind == "Split":
        text, pattern = split["pattern"].get("String"), split["pattern"].get("Regex")
        behavior, isolated = split["behavior"], ("Isolated", "Removed", "MergedWithNext")
        if text == _SPACE and not split["invert"]:
            if behavior in isolated:
                return spaces == {_SPACE}, None
            if spaces >= {_METASPACE}:
                return False, None  # no space is left
        whole = (behavior, split["invert"]) in (("Isolated", False), ("Removed", True))
        if pattern in _KNOWN_PATTERNS and whole and spaces == {_SPACE}:
            return True, None
        return False, "the pattern that it splits words with is not a known one"
    return False, f"its pre-tokenizer {kind} may look across spaces"


def _problem_of_model(
    tokenizer: Tokenizer, splits: list[dict[str, Any]], spaces: set[str]
) -> str | None:
    """Return why a model that sees a text as one word may join both sides of a cut."""
    model = tokenizer.model
    kind = type(model).__name__
    whole = f"it does not split texts into words, and its model {kind}"
    if kind != "BPE":
        return f"{whole} looks at whole texts"
    if model.continuing_subword_prefix or model.end_of_word_suffix:  # type: ignore[attr-defined]
        return f"{whole} marks where words begin or end"
    mark = _METASPACE
    if any(split["type"] == "ByteLevel" for split in splits) or _BYTE_SPACE in spaces:
        mark = _BYTE_SPACE
    elif _METASPACE not in spaces and not any(split["type"] == "Metaspace" for split in splits):
        mark = _SPACE
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if mark not in vocabulary:
        return f"{whole} has no token for a space"
    joined = re.compile(f"[^{mark}]{mark}")
    across = next((token for token in vocabulary if joined.search(token)), None)
    return None if across is None else f"{whole} has the token {across!r}"
