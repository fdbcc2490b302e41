"""Progress of long work on stderr: bars on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from fastbert.terminal import can_redraw

LINE_EVERY_S = 10.0

Item = TypeVar("Item")

# What shows how many of some items are done, such as Progress.follow: the items and the name of the
# work are given, and it yields the items.
Follow = Callable[[Sequence[Any], str], Iterable[Any]]


def unseen(items: Sequence[Item], _name: str) -> Iterable[Item]:
    """A Follow that shows nothing."""
    return items


class Progress:
    """Shows which part of the work is running, and its progress.

    Args:
        command: the work as a whole, with which each line begins.
        show: whether to show anything.
    """

    def __init__(self, command: str, show: bool = True):
        self._command, self._ended, self._lines = command, threading.Event(), None
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
    def count(self, name: str, size: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Show how many bytes are done; yield a function that adds to them.

        Args:
            name: of the work.
            size: bytes in all.
            done: bytes whose work was done before.
        """
        task = self._bars.add_task(name, total=size, completed=done, bytes=True)
        yield lambda more: self._bars.advance(task, more)
        self._bars.update(task, completed=size)

    @contextmanager
    def wait(self, name: str) -> Iterator[None]:
        """Show that work of unknown length is running."""
        task = self._bars.add_task(name, total=None, bytes=False)
        yield
        self._bars.update(task, total=1, completed=1)

    def follow(self, items: Sequence[Item], name: str) -> Iterator[Item]:
        """Yield the items, and show how many are done; the bar disappears with the last one."""
        task = self._bars.add_task(name, total=len(items), bytes=False)
        for item in items:
            yield item
            self._bars.advance(task)
        self._bars.remove_task(task)

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_EVERY_S):
            task = next(iter(self._bars.tasks[-1:]), None)
            if task is None or task.finished:
                continue
            share = "" if task.total is None else f", {task.percentage:.0f} %"
            line = f"{self._command}: {task.description}{share}, {task.elapsed or 0:.0f} s"
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

    class Where(ProgressColumn):
        """A column that is empty for tasks that it cannot describe."""

        def __init__(self, describes: Callable[[Task], bool], column: ProgressColumn):
            super().__init__()
            self._describes, self._column = describes, column

        def render(self, task: Task) -> Any:
            return self._column.render(task) if self._describes(task) else Text()

    def in_bytes(task: Task) -> bool:
        return task.fields["bytes"]

    def known(task: Task) -> bool:
        return (task.total or 0) > 1

    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        Where(in_bytes, DownloadColumn()),
        Where(in_bytes, TransferSpeedColumn()),
        Where(known, TimeRemainingColumn()),
    )
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not (show and can_redraw(console)))
