"""The README's figures, taken from the results on record: `python -m benchmarks.figures` rewrites them.

What stands between `<!-- figures: NAME -->` and `<!-- end of figures -->` is made here, of the records in benchmarks/results/; tests/test_figures.py
fails where it differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.bench_step import step_table
from benchmarks.record import Record, read_record

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MACHINE = "amd-epyc-2-cores"  # whose results the README quotes
PLACE = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)


def _step(record: Record) -> str:
    facts = record.header
    line = f"{facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}, commit {facts['commit']}:"
    return f"{line}\n\n{step_table(list(record.rows))}\n"


FIGURES: dict[str, Callable[[Record], str]] = {"step": _step}  # by the name of the record


def renewed(text: str) -> str:
    """The page with the figures on record."""

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        return match[1] + FIGURES[name](read_record(ROOT / "benchmarks/results" / MACHINE / f"{name}.json")) + match[4]

    return PLACE.sub(replace, text)


def main() -> None:
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
