"""Progress of `prepare` on stderr: bars on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastbert.terminal import can_redraw

LINE_EVERY_S = 10.0


class Progress:
    """Shows which part of the work is running, and its progress.

    Args:
        size: bytes of the sources on disk.
        show: whether to show anything.
    """

    def __init__(self, size: int, show: bool):
        self._size, self._bars = size, None
        # What the lines say: the current part, when it began, bytes done (None: unknown).
        self._part: tuple[str, float] | None = None
        self._done: int | None = None
        self._ended = threading.Event()
        self._lines = None
        if show and sys.stderr is not None:
            self._bars = _bars()
            if self._bars is None:
                self._lines = threading.Thread(target=self._print_lines, daemon=True)

    def __enter__(self) -> Progress:
        if self._bars:
            self._bars.start()
        if self._lines:
            self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._bars:
            self._bars.stop()
        if self._lines:
            self._lines.join()

    @contextmanager
    def count(self, name: str, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Show how many bytes of the sources are done; yield a function that adds to them.

        Args:
            name: of the work.
            done: bytes whose work was done before.
        """
        self._done, self._part = done, (name, time.monotonic())
        task = None
        if self._bars:
            task = self._bars.add_task(name, total=self._size, completed=done)

        def advance(size: int) -> None:
            self._done = (self._done or 0) + size
            if self._bars and task is not None:
                self._bars.advance(task, size)

        yield advance
        if self._bars and task is not None:
            self._bars.update(task, completed=self._size)
        self._part = None

    @contextmanager
    def wait(self, name: str) -> Iterator[None]:
        """Show that work of unknown length is running."""
        self._done, self._part = None, (name, time.monotonic())
        task = self._bars.add_task(name, total=None) if self._bars else None
        yield
        if self._bars and task is not None:
            self._bars.update(task, total=1, completed=1)
        self._part = None

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_EVERY_S):
            part, done = self._part, self._done
            if part is None:
                continue
            name, begin = part
            share = "" if done is None else f", {100 * done / max(self._size, 1):.0f} %"
            line = f"prepare: {name}{share}, {time.monotonic() - begin:.0f} s"
            try:
                print(line, file=sys.stderr, flush=True)
            except (OSError, ValueError):
                return  # its reader is gone


def _bars() -> Any:
    """Return rich's progress bars, or None where they cannot be redrawn."""
    from rich.console import Console

    console = Console(stderr=True)
    if not can_redraw(console):
        return None
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class OfBytes(ProgressColumn):
        """A column that is empty for work of unknown length."""

        def __init__(self, column: ProgressColumn):
            super().__init__()
            self._column = column

        def render(self, task: Task) -> Any:
            return self._column.render(task) if (task.total or 0) > 1 else Text()

    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        OfBytes(DownloadColumn()),
        OfBytes(TransferSpeedColumn()),
        OfBytes(TimeRemainingColumn()),
    )
    return Progress(*columns, console=console)
