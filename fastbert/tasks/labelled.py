"""Labelled texts out of files: csv, tsv and jsonl, with our columns, GLUE's, or named ones; every bad row is listed with its line."""

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
LARGEST = 1e15  # of labels that are numbers: the squares of a batch's errors are added up in fp32, which ends at 3.4e38


class Columns(NamedTuple):
    """The names of the columns that matter; `second` is "" where texts stand alone."""

    first: str
    second: str
    label: str


# Ours; then those of GLUE's files, as they come.
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
COLA = ("source", "label", "mark", "sentence")  # CoLA's tsv has no header: its columns


@dataclass(frozen=True)
class Examples:
    """The rows of a file: `second` is empty where texts stand alone; `lines` are their first lines in the file, from 1."""

    file: Path
    columns: Columns
    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Examples:
        """Some of them, in that order."""
        first, second, labels = (
            [part[i] for i in rows] if part else []
            for part in (self.first, self.second, self.labels)
        )
        return Examples(
            self.file, self.columns, first, second, labels, [self.lines[i] for i in rows]
        )

    def numbers(self) -> list[float]:
        """The labels as numbers; raises InputError with the lines of those that are none."""
        bad: list[str] = []
        values: list[float] = []
        for label, line in zip(self.labels, self.lines, strict=True):
            try:
                values.append(float(label))
                if not math.isfinite(values[-1]):
                    bad.append(f"line {line}: {label!r} is no finite number")
                elif abs(values[-1]) > LARGEST:
                    bad.append(
                        f"line {line}: {self.columns.label} {label!r} is beyond {LARGEST:g}, too large to train on"
                    )
            except ValueError:
                bad.append(f"line {line}: {self.columns.label} {label!r} is no number")
        _refuse(self.file, bad)
        return values


def read_examples(
    file: str | Path, first: str | None = None, second: str | None = None, label: str | None = None
) -> Examples:
    """Read and check a file of examples.

    Args:
        file: UTF-8 csv (with quotes), tsv (without, as GLUE has it) or jsonl; by its suffix.
        first, second, label: columns, where they are none of LAYOUTS; `second` alone makes pairs of a layout without.

    Raises:
        InputError: a file that cannot be read, columns that are not there, or bad rows, listed with their lines.
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
                    found = Examples(
                        file,
                        _columns(file, list(row), Columns(first or "", second or "", label or "")),
                    )
                if complaint := _add(found, row, line):
                    bad.append(f"line {line}: {complaint}")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason}); convert it first") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    _refuse(file, bad)
    if found is None:
        raise InputError(f"{file}: no examples; a header and a row below it are the least")
    return found


def _refuse(file: Path, bad: Sequence[str]) -> None:
    if bad:
        more = f" and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
        raise InputError(
            f"{file}: {len(bad):,} bad row{'s' * (len(bad) > 1)}: {'; '.join(bad[:SHOWN])}{more}; mend or delete them"
        )


def _rows(file: Path, handle: Iterator[str]) -> Iterator[tuple[int, dict[str, str] | str]]:
    """The first line and the values by column of each row; a complaint in place of them where it is bad."""
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
            columns = (
                list(COLA) if not quoted and len(row) == len(COLA) and row[1] in ("0", "1") else row
            )
            if columns is row:
                continue
        if len(row) != len(columns):
            surplus = len(row) - len(columns)
            hint = "; put texts with commas in quotes" if quoted and surplus > 0 else ""
            yield (
                at,
                f"{abs(surplus)} {'more' if surplus > 0 else 'fewer'} fields than the header has columns{hint}",
            )
        else:
            yield at, dict(zip(columns, row, strict=True))


def _object(text: str) -> dict[str, str] | str:
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
    """Which columns to read, of those that are there."""
    layout = next(
        (layout for layout in LAYOUTS if set(layout) - {""} <= set(there)), Columns("", "", "")
    )
    chosen = Columns(*(mine or usual for mine, usual in zip(wanted, layout, strict=True)))
    if wanted.first and not wanted.second:
        chosen = chosen._replace(second="")
    absent = [
        name
        for name in (chosen.first, chosen.label, *filter(None, [chosen.second]))
        if name not in there
    ]
    if absent:
        shown = ", ".join(there[:12])
        what = (
            f"no column {absent[0]!r}"
            if absent[0]
            else "the columns do not say which is the text and which the label"
        )
        raise InputError(
            f"{file}: {what}; there are {shown}: name them text (text_b) and label, or give --text, --pair and --label"
        )
    return chosen


def _add(found: Examples, row: dict[str, str], line: int) -> str:
    """Take a row; returns what is wrong with it, or ""."""
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
