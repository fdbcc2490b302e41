"""Update the figures on the pages from the recorded results: `python -m benchmarks.figures`.

Each page has marked places for tables of the records in benchmarks/results/. This program fills
them, and tests/test_figures.py fails if a page and its record differ. docs/benchmarks.md has the
whole tables; the README has two rows of each, and one number.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

from benchmarks.harness.machine import ROOT
from benchmarks.harness.record import Record, read_record
from benchmarks.harness.tables_and_plots import filled, places, table
from benchmarks.quality import bench_architectures
from benchmarks.quality.bench_downstream import downstream_table, models_table
from benchmarks.quality.bench_quality import TRAINER, sooner_table
from benchmarks.quality.sweep import sweep_table
from benchmarks.step.bench_step import step_table
from benchmarks.step.bench_threads import threads_table

PAGES = tuple(
    ROOT / name
    for name in ("README.md", "docs/benchmarks.md", "docs/results.md", "docs/how-to/cpu.md")
)
MACHINE = "amd-epyc-2-cores"  # the pages quote this machine's results, and one record of the other
AMX = "intel-r-xeon-r-processor-2-cores"


def _machine(record: Record, *libraries: str) -> str:
    facts = record.header
    versions = "".join(f", {name} {facts[name]}" for name in ("torch", *libraries))
    return f"{facts['device']}{versions}, commit {facts['commit']}:"


def _step(record: Record) -> str:
    return f"{_machine(record, 'transformers')}\n\n{step_table(list(record.rows))}"


def _two_steps(record: Record) -> str:
    """The smallest model on texts of natural lengths, and the case with the lowest ratio."""
    lowest = min(record.rows, key=lambda row: row["to_best"][0])
    return _step(replace(record, rows=[record.rows[0], lowest]))


def _quality(record: Record) -> str:
    return f"{_machine(record)}\n\n{sooner_table(list(record.rows))}"


def _headline(record: Record) -> str:
    """The more conservative of the two figures: complete runs of ours with less time."""
    times = [row["sooner_by_a_shorter_run"] for row in record.rows if row.get("against") == TRAINER]
    return (
        f"On one CPU core fastbert reaches the held-out loss of a tuned Hugging Face Trainer "
        f"**{statistics.median(times):.1f} times sooner** ({len(times)} seeds, "
        f"{min(times):.1f} to {max(times):.1f}; the same text, tokenizer and model size)."
    )


def _prepare(record: Record) -> str:
    rows = [
        [
            f"{row['mb']:.0f} MB",
            f"{row['cores']}",
            f"{row['mb_per_s']:.1f} MB/s",
            f"{row['tokens_per_s'] / 1e6:.1f} M",
            f"**{row['ratio']:.1f}x** ({row['ratio_low']:.1f} to {row['ratio_high']:.1f})",
        ]
        for row in record.rows
        if row["part"] == "prepare" and "ratio" in row
    ]
    columns = (
        "text",
        "workers",
        "speed",
        "tokens/s",
        "datasets + tokenizers' time over ours (quartiles)",
    )
    return table(columns, rows)


def _data(record: Record) -> str:
    loaders = [
        [
            row["loader"],
            f"{row['tokens_per_s'] / 1e6:.1f} M "
            f"({row['low'] / 1e6:.1f} to {row['high'] / 1e6:.1f})",
        ]
        for row in record.rows
        if row["part"] == "loader"
    ]
    columns = ("loader, one core", "tokens/s (quartiles)")
    return f"{_machine(record)}\n\n{_prepare(record)}\n\n{table(columns, loaders)}"


def _largest_text(record: Record) -> str:
    largest = max(row["mb"] for row in record.rows if row["part"] == "prepare")
    rows = [row for row in record.rows if row.get("mb") == largest]
    return f"{_machine(record)}\n\n{_prepare(replace(record, rows=rows))}"


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
    tables = f"{downstream_table(record.rows)}\n\n{models_table(record.rows)}"
    return f"{_machine(record)}\n\n{tables}\n\n{picture}"


def _sweep(record: Record) -> str:
    return f"{_machine(record)}\n\n{sweep_table(list(record.rows))}"


def _architectures(record: Record) -> str:
    return f"{_machine(record)}\n\n{bench_architectures.report(list(record.rows))}"


def _threads(record: Record) -> str:
    facts = record.rows[0]
    recipe = f"recipe {facts['recipe']} in {facts['precision']}"
    return f"{recipe}, {_machine(record)}\n\n{threads_table(record.rows)}"


# By name of the place: the record (of MACHINE, if it names no other) and the function that writes
# the text from it.
FIGURES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "headline": ("quality", _headline),
    "two_steps": ("step", _two_steps),
    "two_qualities": ("quality", _quality),
    "largest_text": ("data", _largest_text),
    "step": ("step", _step),
    "step_amx": (f"{AMX}/step", _step),
    "quality": ("quality", _quality),
    "quality_amx": (f"{AMX}/quality", _quality),
    "data": ("data", _data),
    "startup": ("startup", _startup),
    "downstream": ("downstream", _downstream),
    "sweep": ("sweep", _sweep),
    "architectures": ("architectures", _architectures),
    "threads": ("threads", _threads),
    "architectures_tasks": ("architectures_tasks", _architectures),
}


def _part(name: str) -> str:
    record, write = FIGURES[name]
    path = record if "/" in record else f"{MACHINE}/{record}"
    return write(read_record(ROOT / f"benchmarks/results/{path}.json"))


def renewed(text: str) -> str:
    """The page with the recorded figures."""
    return filled(text, {name: _part(name) for name in places(text)})


def main() -> None:
    for page in PAGES:
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
