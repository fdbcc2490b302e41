"""The figures in the README and in docs/results.md, taken from the results on record: `python -m benchmarks.figures` rewrites them.

The places that a page has for a record in benchmarks/results/ are filled here; tests/test_figures.py fails where it differs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.bench_downstream import downstream_table, models_table
from benchmarks.bench_quality import sooner_table
from benchmarks.bench_step import step_table
from benchmarks.pages import filled, places
from benchmarks.record import Record, read_record, table
from benchmarks.sweep import sweep_table

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs/results.md")
MACHINE = "amd-epyc-2-cores"  # whose results they quote


def _machine(record: Record, *libraries: str) -> str:
    facts = record.header
    versions = "".join(f", {name} {facts[name]}" for name in ("torch", *libraries))
    return f"{facts['device']}{versions}, commit {facts['commit']}:"


def _step(record: Record) -> str:
    return f"{_machine(record, 'transformers')}\n\n{step_table(list(record.rows))}"


def _quality(record: Record) -> str:
    return f"{_machine(record)}\n\n{sooner_table(list(record.rows))}"


def _data(record: Record) -> str:
    ours = [row for row in record.rows if row["part"] == "prepare" and "ratio" in row]
    prepare = [
        [
            f"{row['mb']:.0f} MB",
            f"{row['cores']}",
            f"{row['mb_per_s']:.1f} MB/s",
            f"{row['tokens_per_s'] / 1e6:.1f} M",
            f"**{row['ratio']:.1f}x** ({row['ratio_low']:.1f} to {row['ratio_high']:.1f})",
        ]
        for row in ours
    ]
    loaders = [row for row in record.rows if row["part"] == "loader"]
    loader = [
        [
            row["loader"],
            f"{row['tokens_per_s'] / 1e6:.1f} M ({row['low'] / 1e6:.1f} to {row['high'] / 1e6:.1f})",
        ]
        for row in loaders
    ]
    columns = (
        "text",
        "workers",
        "",
        "tokens/s",
        "datasets + tokenizers' time over ours (quartiles)",
    )
    return f"{_machine(record)}\n\n{table(columns, prepare)}\n\n{table(('loader, one core', 'tokens/s (quartiles)'), loader)}"


def _startup(record: Record) -> str:
    shown = (
        "fastbert --help",
        "import fastbert",
        "import torch",
        "from transformers import BertForPreTraining",
    )
    commands = [
        [f"`{row['name']}`", f"{row['seconds']:.2f} s"]
        for row in record.rows
        if row["part"] == "command" and row["name"] in shown
    ]
    steps = [
        [f"{row['name']}, to the end of the first step", f"{row['step_s']:.1f} s"]
        for row in record.rows
        if row["part"] == "first step"
    ]
    return f"{_machine(record)}\n\n{table(('a process from its start', ''), [*commands, *steps])}"


def _downstream(record: Record) -> str:
    picture = f"![accuracy over labelled examples](../benchmarks/results/{MACHINE}/downstream.png)"
    return f"{_machine(record)}\n\n{downstream_table(record.rows)}\n\n{models_table(record.rows)}\n\n{picture}"


def _sweep(record: Record) -> str:
    return f"{_machine(record)}\n\n{sweep_table(list(record.rows))}"


FIGURES: dict[str, Callable[[Record], str]] = {
    "step": _step,
    "quality": _quality,
    "data": _data,
    "startup": _startup,
    "downstream": _downstream,
    "sweep": _sweep,
}  # by the record's name


def renewed(text: str) -> str:
    """The page with the figures on record."""
    return filled(
        text,
        {
            name: FIGURES[name](read_record(ROOT / f"benchmarks/results/{MACHINE}/{name}.json"))
            for name in places(text)
        },
    )


def main() -> None:
    for page in PAGES:
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
