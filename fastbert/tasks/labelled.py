"""Read labelled texts from csv, tsv and jsonl, with our columns, GLUE's, or named ones.

Every bad row is reported with its line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastbert.errors import InputError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
SHOWN = 5  # bad rows that the message quotes
# The largest label that is a number: the squares of a batch's errors are summed in fp32, whose
# largest value is 3.4e38.
LARGEST = 1e15


class Columns(NamedTuple):
    """The names of the columns to read; `second` is "" where a row has a single text."""

    first: str
    second: str
    label: str


# Our own layouts, then those of the unmodified GLUE files.
LAYOUTS = (
    Columns("text", "text_b", "label"),
    Columns("text", "", "label"),
    Columns("sentence1", "sentence2", "gold_label"),  # MNLI
    Columns("sentence1", "sentence2", "score"),  # STS-B
    Columns("sentence1", "sentence2", "label"),  # RTE, WNLI
    Columns("question1", "question2", "is_duplicate"),  # QQP
    Columns("#1 String", "#2 String", "Quality"),  # MRPC
    Columns("question", "sentence", "label"),  # QNLI
    Columns("sentence", "", "label"),  # SST-2
)
COLA = ("source", "label", "mark", "sentence")  # the columns of CoLA's tsv, which has no header


@dataclass(frozen=True)
class Examples:
    """The rows of a file.

    `second` is empty where a row has a single text. `lines` are the numbers of the rows' first
    lines in the file, from 1.
    """

    file: Path
    columns: Columns
    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Examples:
        """Return these rows, in that order."""
        first, second, labels = (
            [part[i] for i in rows] if part else []
            for part in (self.first, self.second, self.labels)
        )
        return Examples(
            self.file, self.columns, first, second, labels, [self.lines[i] for i in rows]
        )

    def numbers(self) -> list[float]:
        """Return the labels as numbers.

        Raises:
            InputError: labels that are not numbers, with their lines.
        """
        bad: list[str] = []
        values: list[float] = []
        for label, line in zip(self.labels, self.lines, strict=True):
            try:
                values.append(float(label))
                if not math.isfinite(values[-1]):
                    bad.append(f"line {line}: {label!r} is not a finite number")
                elif abs(values[-1]) > LARGEST:
                    bad.append(
                        f"line {line}: {self.columns.label} {label!r} is beyond {LARGEST:g}, "
                        "too large to train on"
                    )
            except ValueError:
                bad.append(f"line {line}: {self.columns.label} {label!r} is not a number")
        _raise_if_bad(self.file, bad)
        return values


def read_examples(
    file: str | Path, first: str | None = None, second: str | None = None, label: str | None = None
) -> Examples:
    """Read and check a file of examples.

    Args:
        file: UTF-8; csv (with quotes), tsv (without quotes, as in GLUE) or jsonl, by its suffix.
        first, second, label: names of columns, where they match none of LAYOUTS. `second` alone
            adds a second text to a layout of single texts.

    Raises:
        InputError: a file that cannot be read, missing columns, or bad rows, listed with their
            lines.
    """
    file = Path(file)
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file}: must end in {', '.join(SUFFIXES)}")
    found, bad = None, list[str]()
    try:
        with open(file, encoding="utf-8-sig", newline="") as handle:
            for line, row in _rows(file, handle):
                if isinstance(row, str):
                    bad.append(f"line {line}: {row}")
                    continue
                if found is None:
                    wanted = Columns(first or "", second or "", label or "")
                    found = Examples(file, _columns(file, list(row), wanted))
                if complaint := _add(found, row, line):
                    bad.append(f"line {line}: {complaint}")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason}); convert it first") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    _raise_if_bad(file, bad)
    if found is None:
        raise InputError(f"{file}: no examples; it needs a header and at least one row")
    return found


def _raise_if_bad(file: Path, bad: Sequence[str]) -> None:
    """Raise InputError where there are bad rows."""
    if bad:
        count = f"{len(bad):,} bad row{'s' * (len(bad) > 1)}"
        more = f" and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
        raise InputError(f"{file}: {count}: {'; '.join(bad[:SHOWN])}{more}; fix or remove them")


def _rows(file: Path, handle: Iterator[str]) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Yield the first line of each row with its values by column, or with what is wrong with it."""
    if file.suffix in (".jsonl", ".ndjson"):
        for line, text in enumerate(handle, 1):
            if text.strip():
                yield line, _object(text)
        return
    quoted = file.suffix == ".csv"
    reader = (
        csv.reader(handle, strict=True)
        if quoted
        else csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
    )
    columns: list[str] = []
    line = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, f"not valid {file.suffix[1:]}: {error}"
            return
        if row is None:
            return
        at, line = line, reader.line_num + 1
        if not row:
            continue
        if not columns:
            # CoLA's tsv has no header, but it is recognised by its first row.
            is_cola = not quoted and len(row) == len(COLA) and row[1] in ("0", "1")
            columns = list(COLA) if is_cola else row
            if columns is row:
                continue
        if len(row) != len(columns):
            surplus = len(row) - len(columns)
            hint = "; put texts with commas in quotes" if quoted and surplus > 0 else ""
            difference = f"{abs(surplus)} {'more' if surplus > 0 else 'fewer'}"
            yield at, f"{difference} fields than the header has columns{hint}"
        else:
            yield at, dict(zip(columns, row, strict=True))


def _object(text: str) -> dict[str, str] | str:
    """Return the values of a JSON object as strings, or what is wrong with it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    if not isinstance(value, dict):
        return "not a JSON object"
    return {
        key: v if isinstance(v, str) else "" if v is None else json.dumps(v)
        for key, v in value.items()
    }


def _columns(file: Path, there: list[str], wanted: Columns) -> Columns:
    """Return the columns to read among those in the file."""
    layout = next((known for known in LAYOUTS if set(known) - {""} <= set(there)), None)
    layout = layout or Columns("", "", "")
    chosen = Columns(*(mine or usual for mine, usual in zip(wanted, layout, strict=True)))
    if wanted.first and not wanted.second:
        chosen = chosen._replace(second="")
    needed = (chosen.first, chosen.label, *filter(None, [chosen.second]))
    absent = [name for name in needed if name not in there]
    if absent:
        shown = ", ".join(there[:12])
        what = (
            f"no column {absent[0]!r}"
            if absent[0]
            else "the columns do not say which is the text and which the label"
        )
        raise InputError(
            f"{file}: {what}; there are {shown}: name them text (text_b) and label, "
            "or give --text, --pair and --label"
        )
    return chosen


def _add(found: Examples, row: dict[str, str], line: int) -> str:
    """Add a row; return what is wrong with it, or ""."""
    names = [name for name in found.columns if name]
    values = [row.get(name, "") for name in names]
    if empty := next(
        (name for name, value in zip(names, values, strict=True) if not value.strip()), None
    ):
        return f"{empty} is empty"
    found.first.append(values[0])
    found.labels.append(values[-1])
    found.lines.append(line)
    if found.columns.second:
        found.second.append(values[1])
    return ""
