"""Turn SIGINT, SIGTERM, SIGUSR1, SIGHUP and the end of the launcher into a stop request.

The loop reads the request at its next step.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from fastbert.cluster.launch_env import launcher

# SIGHUP means that the terminal was closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
LOOK_S = 1.0  # between two looks whether the launcher is there


class StopRequest:
    """While this context is entered, such a signal only sets `asked`.

    A second Ctrl-C ends the process at once. Under a launcher it does not, since there one Ctrl-C
    arrives twice: from the terminal and from the launcher.

    A launcher that is killed cannot stop its ranks. They would train on, keep the GPUs, and nobody
    would restart one that is lost. So its end is a stop request too. That of a shell is none.

    Attributes:
        asked: the name of the signal that arrived; None before.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, Any] = {}
        self._depth = 0  # it may be entered again by what its owner calls
        self._launched = "WORLD_SIZE" in os.environ
        self._parent, self._launcher = os.getppid(), launcher()
        self._over = threading.Event()

    def __enter__(self) -> StopRequest:
        self._depth += 1
        if self._depth == 1 and self._launcher is not None:
            self._over.clear()
            threading.Thread(target=self._watch_parent, daemon=True, name="launcher").start()
        # Python sets signal handlers in the main thread only.
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            # nohup ignores SIGHUP, and that must stay so.
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            self._before = {
                number: signal.signal(number, self._note)
                for number in SIGNALS
                if number != signal.SIGHUP or not ignored
            }
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._over.set()
            for number, handler in self._before.items():
                # None: a handler that was not set by Python, which cannot set it again.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        if number == signal.SIGINT and not self._launched:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def _watch_parent(self) -> None:
        """Thread: the system gives an orphan another parent."""
        while not self._over.wait(LOOK_S):
            if os.getppid() != self._parent:
                self.asked = self.asked or f"the end of {self._launcher}"
                return
