"""How commands print on stdout: tables for people, and JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from fastbert import strict_json
from fastbert.terminal import is_terminal, safe


def format_hours(number: float | None) -> str:
    if number is None:
        return "unknown"
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def format_percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def print_json(value: Any) -> None:
    # In another encoding than UTF-8 a letter outside of it would have no way to be written.
    plain = not _encoding().lower().replace("-", "").startswith("utf")
    print(strict_json.dumps(value, ensure_ascii=plain, indent=2))


def print_text(text: str) -> None:
    print(safe(text, _encoding()))


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(safe(title, _encoding())) if title else None,
        box=box.SIMPLE,
        show_header=any(columns),
        title_justify="left",
        title_style="bold",
    )
    for column in columns:
        table.add_column(column)
    for row in rows:
        # Text: "[MASK]" is no markup
        table.add_row(*(Text(safe(cell, _encoding())) for cell in row))
    console().print(table)


def console() -> Any:
    from rich.console import Console

    # A pipe or a file has no width, so lines may be long there.
    return Console(highlight=False, width=None if is_terminal(sys.stdout) else 140)
