"""Decides whether quotes in a tsv file surround its fields or belong to the texts.

pandas and Python's csv module quote a field that has a tab, a quote or a line end, and double the
quotes in it. GLUE's files quote nothing. The name does not tell which form a file has, but each
leaves signs that the other cannot: the first such sign decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from fastbert.data.sources import Source, open_source
from fastbert.data.unpack import LONGEST_TEXT_BYTES, lines, unpacked
from fastbert.errors import InputError

_QUOTED = '"[^"]*(?:""[^"]*)*"'
_FIELD = f'(?:{_QUOTED}|[^"\t]*)'
_ROW = re.compile(f"{_FIELD}(?:\t{_FIELD})*")
# A quoted field with a quote in it, and the beginning of any quoted field.
_DOUBLED = re.compile('(?:^|\t)"[^"]*(?:""[^"]*)+"(?=\t|$)')
_OPENED = re.compile('(?:^|\t)"')


def has_quoted_fields(source: Source) -> bool:
    """Return whether the fields of a tsv file are quoted where they need it.

    Raises:
        InputError: fields that may be quoted or may hold quotes, and nothing in the file that
            tells, or a file that cannot be read.
    """
    with open_source(source) as file:
        if not any(b'"' in piece for piece in unpacked(source, file)):
            return False
        file.seek(0)
        doubtful = None
        for line, sign in _signs(lines(source, file, strict=False)):
            if sign is not None:
                return sign
            doubtful = doubtful or line
    if doubtful is None:
        return False
    raise InputError(
        f"{source.path}: line {doubtful}: a field is in quotes, and the file does not tell whether "
        "they belong to the text; if not, name the file .csv, else write JSON lines"
    )


def _signs(text: Iterator[str]) -> Iterator[tuple[int, bool | None]]:
    """Yield line and meaning of each row with quotes: True: quoted, False: text, None: either."""
    columns, line = 0, 0
    for row in text:
        line += 1
        row = row.rstrip("\r\n")
        is_header, columns = not columns, columns or row.count("\t") + 1
        if '"' not in row:
            continue
        if is_header and _ROW.fullmatch(row):
            yield line, True  # no name of a column has quotes around it
        elif not _OPENED.search(row):
            yield line, False  # a quote inside of a field that is not quoted
        elif row.count('"') % 2 == 0:
            as_text = row.count("\t") + 1 == columns
            if not _ROW.fullmatch(row) or (as_text and _columns(row) != columns):
                yield line, False
            elif _columns(row) == columns:
                yield line, None if as_text and not _DOUBLED.search(row) else True
        else:
            # A quoted field would continue on the next lines, up to its closing quote.
            rest = _up_to_quote(text, LONGEST_TEXT_BYTES - len(row))
            whole = "".join([f"{row}\n", *rest]).rstrip("\r\n")
            begin, line = line, line + len(rest)
            if not _ROW.fullmatch(whole) or _columns(whole) != columns:
                yield begin, False
            elif any(part.count("\t") + 1 != columns for part in whole.split("\n")):
                yield begin, True
            else:
                yield begin, None


def _columns(row: str) -> int:
    """Return the number of columns of a row of quoted fields."""
    return re.sub(_QUOTED, "", row).count("\t") + 1


def _up_to_quote(text: Iterator[str], most: int) -> list[str]:
    """Take lines until one has an odd number of quotes, or they are longer than `most`."""
    taken, size = list[str](), 0
    for line in text:
        taken.append(line)
        size += len(line)
        if line.count('"') % 2 or size > most:
            break
    return taken
