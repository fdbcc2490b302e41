"""Finds what earlier processing has left in a text: markup, escapes, broken words and letters.

The text is not changed: only its owner knows whether `&amp;` is damage or the subject. `prepare`
counts the documents in which something is found, and its report shows examples.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html.entities import name2codepoint
from itertools import islice

EXAMPLES = 3  # of each kind
_EXAMPLE_LENGTH = 24  # characters

_NAMES = sorted({*name2codepoint, "apos"})
_TAGS = (
    "a abbr article b big blockquote body br button center code dd del div dl dt em font footer "
    "form h1 h2 h3 h4 h5 h6 head header hr html i iframe img input ins label li link meta nav "
    "nobr nowiki ol option p pre q ref s script section select small span strike strong style sub "
    "sup table tbody td textarea th thead title tr tt u ul"
)
# What UTF-8 gives when it is read as Windows-1252 or Latin-1. The first letters may be right, as in
# "MANHÃ”"; what follows them here is a sign that no word ends in.
_WRONG_LETTERS = (
    "(?<=Ã)[\x80-\x9f¡-ª¬-º¼-¿‰Ÿ]",  # á ç é ñ ö ü ß É
    "(?<=Â)[\x80-\xbf]",  # no-break space, degree, pound
    "(?<=â)[€\x80]",  # quotes and dashes
    "(?<=[ÐÑ])[°-¿€‚ƒ„…†‡ˆ‰Š‹Œ\x80-\x8f]",  # Cyrillic
    "(?<=ï)(?:»¿|¿½)",  # a byte order mark, and U+FFFD
)


@dataclass(frozen=True)
class Kind:
    """One kind of damage: its name, the characters without which there is none, and its form."""

    name: str
    marks: str
    pattern: re.Pattern[str]
    around: int = 0  # characters that an example shows on each side

    def find(self, text: str) -> Iterator[str]:
        """Yield where it occurs in a text."""
        if not any(mark in text for mark in self.marks):
            return
        for match in self.pattern.finditer(text):
            begin, end = match.start() - self.around, match.end() + self.around
            yield text[max(begin, 0) : end][:_EXAMPLE_LENGTH]


# Each pattern begins with one of the marks, and then looks at the next letter alone: so the search
# is fast where nothing is found.
ENTITIES = Kind(
    "HTML entities",
    "&",
    re.compile(
        f"&(?=[#a-zA-Z][a-zA-Z0-9]{{1,8}};)(?:#[0-9]+|#[xX][0-9a-fA-F]+|{'|'.join(_NAMES)});"
    ),
)
TAGS = Kind(
    "HTML tags",
    "<",
    re.compile(
        f"<(?=[/a-zA-Z])/?(?:{_TAGS.replace(' ', '|')})(?=[\\s/>])[^<>]{{0,200}}>", re.IGNORECASE
    ),
)
ESCAPES = Kind(
    "escapes",
    "\\",
    re.compile(r"\\(?:u[0-9a-fA-F]{4}|r\\n|n\\n|(?<=[.!?]\\)n(?=[A-Z0-9\"\\]|$))", re.MULTILINE),
)
JSON = Kind("JSON", "{", re.compile(r'\{(?<=^\{)\s*"[^"\n]{1,60}"\s*:', re.MULTILINE))
HYPHENS = Kind(
    "words broken at line ends",
    "-",
    re.compile("-(?=\r?\n)(?<=[a-zß-öø-ÿ]-)\r?\n[ \t]*(?=[a-zß-öø-ÿ])"),
    around=4,
)
LIGATURES = Kind("ligatures", "ﬀﬁﬂﬃﬄﬅﬆ", re.compile("[ﬀ-ﬆ]"))
DECOMPOSED = Kind(
    "letters apart from their accents",
    "\u0300\u0301\u0302\u0303\u0308\u030a\u030c\u0327",
    re.compile("[A-Za-z][\u0300-\u0303\u0308\u030a\u030c\u0327]"),
)
LETTERS = Kind(
    "letters decoded wrongly",
    "ÃÂâÐÑï",
    re.compile(f"[ÃÂâÐÑï](?:{'|'.join(_WRONG_LETTERS)})"),
)
IN_ASCII = (ENTITIES, TAGS, ESCAPES, JSON, HYPHENS)
KINDS = (*IN_ASCII, LETTERS, LIGATURES, DECOMPOSED)


@dataclass(frozen=True)
class Damage:
    """In how many documents each kind was found, by its name, and the first examples of each."""

    documents: dict[str, int] = field(default_factory=dict)
    examples: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __add__(self, other: Damage) -> Damage:
        documents, examples = dict(self.documents), dict(self.examples)
        for name, count in other.documents.items():
            documents[name] = documents.get(name, 0) + count
            both = (*examples.get(name, ()), *other.examples[name])
            examples[name] = tuple(dict.fromkeys(both))[:EXAMPLES]
        return Damage(documents, examples)


def find_damage(texts: Iterable[str]) -> Damage:
    """Search documents for every kind of damage."""
    documents, examples = dict[str, int](), dict[str, dict[str, None]]()
    for text in texts:
        kinds = IN_ASCII if text.isascii() else KINDS
        for kind in kinds:
            found = kind.find(text)
            if (first := next(found, None)) is None:
                continue
            documents[kind.name] = documents.get(kind.name, 0) + 1
            known = examples.setdefault(kind.name, {})
            if len(known) < EXAMPLES:
                known |= dict.fromkeys([first, *islice(found, 2 * EXAMPLES)])
    return Damage(documents, {name: tuple(found)[:EXAMPLES] for name, found in examples.items()})
