"""Read labelled texts from tables, with our columns, GLUE's, or named ones.

Every bad row is reported with its line, or in Parquet with its number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from fastbert.data.rows import class_names, read_rows, shown
from fastbert.data.sources import TABLES, file_source
from fastbert.errors import InputError

SHOWN = 5  # bad rows that the message quotes
# The largest label that is a number: the squares of a batch's errors are summed in fp32, whose
# largest value is 3.4e38.
LARGEST = 1e15
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


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


@dataclass(frozen=True)
class Examples:
    """The rows of a file.

    `second` is empty where a row has a single text. `lines` are the numbers of the rows' first
    lines in the file, from 1; for Parquet and Arrow those of the rows. `classes` are the names of
    the classes that the file gives; the labels are then their numbers.
    """

    file: Path
    columns: Columns
    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What `lines` counts."""
        return "row" if self.file.suffix.lower() in (".parquet", ".arrow") else "line"

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Examples:
        """Return these rows, in that order."""
        first, second, labels = (
            [part[i] for i in rows] if part else []
            for part in (self.first, self.second, self.labels)
        )
        lines = [self.lines[i] for i in rows]
        return Examples(self.file, self.columns, first, second, labels, lines, self.classes)

    def named(self, other: Examples) -> Examples:
        """Return the same with names of classes for labels, where one of two files gives them.

        A file without names has numbers where it was made from the same dataset, such as by
        `Dataset.to_csv`.
        """
        classes = self.classes or other.classes
        names = {str(number): name for number, name in enumerate(classes)}
        if not names or not set(self.labels) <= names.keys():
            return self
        labels = [names[label] for label in self.labels]
        return replace(self, labels=labels, classes=classes)

    def numbers(self) -> list[float]:
        """Return the labels as numbers.

        Raises:
            InputError: labels that are not numbers, with their lines.
        """
        bad: list[str] = []
        values: list[float] = []
        for label, line in zip(self.labels, self.lines, strict=True):
            value = number(label)
            if value is not None and abs(value) <= LARGEST:
                values.append(value)
                continue
            problem = (
                "is not a plain decimal number such as 3 or -0.25"
                if value is None
                else f"is beyond {LARGEST:g}, too large to train on"
            )
            bad.append(f"{self.unit} {line}: {self.columns.label} {label!r} {problem}")
        _raise_if_bad(self.file, bad)
        return values


def number(text: str) -> float | None:
    """Return a plain decimal number, or None where the text is no such number.

    float() also takes "1_0" for 10, the digits of other scripts, "nan" and "infinity". In a file
    of labels these are more likely an identifier, an export's mark for a missing value or a slip.
    """
    return float(text) if _NUMBER.fullmatch(text) else None


def read_examples(
    file: str | Path, first: str | None = None, second: str | None = None, label: str | None = None
) -> Examples:
    """Read and check a file of examples.

    Args:
        file: csv, tsv, jsonl or Parquet, by its suffix; see `fastbert.data.rows`.
        first, second, label: names of columns, where they match none of LAYOUTS. `second` alone
            adds a second text to a layout of single texts.

    Raises:
        InputError: a file that cannot be read, missing columns, or bad rows, listed with their
            lines.
    """
    file = Path(file)
    found, bad = list[Examples](), list[str]()

    def choose(there: list[str]) -> tuple[str, ...]:
        wanted = Columns(first or "", second or "", label or "")
        columns = _columns(file, there, wanted)
        found.append(Examples(file, columns, classes=class_names(source, columns.label)))
        return tuple(filter(None, found[0].columns))

    source = file_source(file, formats=TABLES)
    for line, row in read_rows(source, choose):
        if complaint := row if isinstance(row, str) else _add(found[0], row, line):
            bad.append(f"{found[0].unit if found else 'line'} {line}: {complaint}")
    _raise_if_bad(file, bad)
    if not found or not len(found[0]):
        raise InputError(f"{file}: no examples; it needs a header and at least one row")
    return found[0]


def _raise_if_bad(file: Path, bad: Sequence[str]) -> None:
    """Raise InputError where there are bad rows."""
    if bad:
        count = f"{len(bad):,} bad row{'s' * (len(bad) > 1)}"
        more = f" and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
        raise InputError(f"{file}: {count}: {'; '.join(bad[:SHOWN])}{more}; fix or remove them")


def _columns(file: Path, there: list[str], wanted: Columns) -> Columns:
    """Return the columns to read among those in the file."""
    layout = next((known for known in LAYOUTS if set(known) - {""} <= set(there)), None)
    layout = layout or Columns("", "", "")
    chosen = Columns(*(mine or usual for mine, usual in zip(wanted, layout, strict=True)))
    if wanted.first and not wanted.second:
        chosen = chosen._replace(second="")
    needed = (chosen.first, chosen.label, *filter(None, [chosen.second]))
    absent = [name for name in needed if not name or name not in there]
    if absent:
        what = (
            f"no column {absent[0]!r}"
            if absent[0]
            else "the columns do not say which is the text and which the label"
        )
        raise InputError(
            f"{file}: {what}; there are {shown(there)}: name them text (text_b) and label, "
            "or give --text, --pair and --label"
        )
    return chosen


def _add(found: Examples, row: dict[str, str], line: int) -> str:
    """Add a row; return what is wrong with it, or ""."""
    names = [name for name in found.columns if name]
    values = [row[name] for name in names]
    if empty := next(
        (name for name, value in zip(names, values, strict=True) if not value.strip()), None
    ):
        return f"{empty} is empty"
    if found.classes and not 0 <= int(values[-1]) < len(found.classes):
        what = ", which stands for no label" if values[-1] == "-1" else ""
        return (
            f"{names[-1]} is {values[-1]}{what}; the file names the classes 0 to "
            f"{len(found.classes) - 1}"
        )
    found.first.append(values[0])
    found.labels.append(values[-1].strip())  # "1 " is no class beside "1"
    found.lines.append(line)
    if found.columns.second:
        found.second.append(values[1])
    return ""
