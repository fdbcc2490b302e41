"""Split documents into sentences by rules: fast, deterministic, and good on edited prose.

A line break always ends a sentence. Within a line a sentence ends at . ! ? or … before whitespace,
unless the context says otherwise: an abbreviation, an initial, a list number, or a small letter
after it. 。！？ need no whitespace.
"""

from __future__ import annotations

import re

_CLOSING = r"\"'”’»)\]」』）》"
_OPENING = r"\"'“‘«(\[¿¡„"
# The pattern begins with one set of characters, so the regex engine scans text at 200 MB/s. The
# context of a mark is inspected in Python, about once per sentence.
_MARKS = "[.!?…。！？।॥؟۔։።]"
# The look-behind is for speed too: only the first mark of a run is tried. Otherwise a long run
# would take quadratic time.
_MARK = re.compile(
    rf"{_MARKS}(?<!{_MARKS}{_MARKS}){_MARKS}*[{_CLOSING}]*(?:\s+|(?<=[。！？」』）》]))"
)
_NEXT = re.compile(rf"[{_OPENING}]*(\w*)(\.?)")
_LIST_NUMBER = re.compile(r"\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]+)")
_LONGEST_WORD = 24  # characters before a mark that are inspected
_DOTTED = re.compile(r"(?:[^\W\d_]{1,3}\.)+[^\W\d_]{1,3}")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never the end of a sentence: a name or an explanation follows.
_NEVER = _words("""
    adm brig capt cmdr col cpl dr drs fr ft gen gov hon lt maj messrs mlle mme mr mrs ms msgr mt mx
    prof pvt rep rev sen sgt st ste supt ven vs v cf viz lit pron orig abbr transl approx ca c b d r
    fl née e.g i.e a.k.a z.b d.h bzw vgl
""")
# Not the end where a number follows: "no. 5", but "He said no."
_BEFORE_NUMBER = _words("no nos nr vol vols p pp fig figs eq eqs ch chap sec art op pt lot")
# The end only before a word that often begins a sentence: "in the U.S. The", but not "the U.S.
# Senate". The same holds for initials, "world war I. The" but "John F. Kennedy", and for words with
# a period inside, such as "Ph.D.".
_SOMETIMES = _words("""
    jan feb mar apr jun jul aug sep sept oct nov dec etc inc ltd co corp cos llc plc gmbh bros jr sr
    esq dept univ assn al est ed eds sq tel ext ave blvd rd mi km kg lb lbs oz
""")
_STARTERS = _words("""
    The A An In On At It He She They We You I This That These Those His Her Its Their Our My Your
    There Here As After Although Since When While Where Who What Why How However For From By During
    Many Most Some Several Both Each Every Other Another All Also One Two Three With Without Within
    Under Over Between Among According Because Before Until If Though Unlike Like Today Then Thus
    Therefore Moreover Furthermore Nevertheless Meanwhile Later Once Only Early But And Or So Yet
    Not No To Of Following Based Despite Due Through Throughout Along Additionally Originally
    Currently Historically Initially Finally First Second
""")


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a document, without surrounding whitespace; none is empty."""
    sentences = []
    all_lower = text.islower()  # then a small letter after a mark says nothing
    for line in text.split("\n"):
        begin, first = 0, -1
        for match in _MARK.finditer(line):
            if first < 0:
                first = len(line) - len(line.lstrip())
            end = match.end()
            if end < len(line) and _ends(line, begin, first, match.start(), end, all_lower):
                sentences.append(line[begin:end].strip())
                begin = end
        rest = line[begin:].strip()
        if rest:
            sentences.append(rest)
    return sentences


def sentence_starts(text: str, sentences: list[str]) -> list[int]:
    """Return where the sentences that `split_sentences` found begin in the text, in characters."""
    starts, at = list[int](), 0
    for sentence in sentences:
        at = text.index(sentence, at)
        starts.append(at)
        at += len(sentence)
    return starts


def _ends(line: str, begin: int, first: int, mark: int, end: int, all_lower: bool) -> bool:
    """Whether the mark at `mark` ends the sentence that starts at `begin`.

    `first` is where the text of the line starts, and `end` where the next sentence would. All are
    indices into `line`.
    """
    if line[mark] not in ".!?…":
        return True  # the mark has no other use
    following = _NEXT.match(line, end)
    assert following is not None
    next_word, dot = following.groups()
    if next_word[:1].islower() and not all_lower:
        return False
    if line[mark] != "." or line[mark + 1] in ".!?…":
        return True
    begin_word = max(begin, mark - _LONGEST_WORD)
    word = line[max(line.rfind(" ", begin_word, mark) + 1, begin_word) : mark].lstrip("\"'“‘«([„")
    if len(word) > 6 and "." not in word:
        return True  # no abbreviation is longer; most marks return here
    lower = word.lower()
    if lower in _NEVER or (lower in _BEFORE_NUMBER and next_word[:1].isdigit()):
        return False
    if _LIST_NUMBER.fullmatch(line, max(begin, first), mark):
        return False
    if lower in _SOMETIMES or (len(word) == 1 and word.isupper()) or _DOTTED.fullmatch(word):
        return (next_word.capitalize() if all_lower else next_word) in _STARTERS and not (
            dot and len(next_word) == 1
        )
    return True
