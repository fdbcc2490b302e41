"""Progress of `prepare` on stderr: bars on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import threading
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
        self._size, self._ended, self._lines = size, threading.Event(), None
        show = show and sys.stderr is not None
        # Where bars cannot be redrawn they are not shown, and the lines say where they stand.
        self._bars = _bars(show)
        if show and self._bars.disable:
            self._lines = threading.Thread(target=self._print_lines, daemon=True)

    def __enter__(self) -> Progress:
        self._bars.start()
        if self._lines:
            self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
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
        task = self._bars.add_task(name, total=self._size, completed=done)
        yield lambda size: self._bars.advance(task, size)
        self._bars.update(task, completed=self._size)

    @contextmanager
    def wait(self, name: str) -> Iterator[None]:
        """Show that work of unknown length is running."""
        task = self._bars.add_task(name, total=None)
        yield
        self._bars.update(task, total=1, completed=1)

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_EVERY_S):
            task = next(iter(self._bars.tasks[-1:]), None)
            if task is None or task.finished:
                continue
            share = "" if task.total is None else f", {task.percentage:.0f} %"
            line = f"prepare: {task.description}{share}, {task.elapsed or 0:.0f} s"
            try:
                print(line, file=sys.stderr, flush=True)
            except (OSError, ValueError):
                return  # its reader is gone


def _bars(show: bool) -> Any:
    """Return rich's progress bars, disabled where they cannot be redrawn."""
    from rich.console import Console
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
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not (show and can_redraw(console)))
