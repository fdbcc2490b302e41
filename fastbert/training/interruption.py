"""SIGINT, SIGTERM and SIGUSR1 as a wish that the loop grants at its next step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """While this context is entered, such a signal only sets `asked`; a second Ctrl-C, for those who cannot wait, ends the process.

    Not under a launcher: there one Ctrl-C arrives twice, from the terminal and from the launcher.
    """

    def __init__(self) -> None:
        self.asked: str | None = None  # the signal's name
        self._before: dict[int, Any] = {}
        self._launched = "WORLD_SIZE" in os.environ

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        if number == signal.SIGINT and not self._launched:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
