"""A control group with a CPU quota, as a container has one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.trials import wait_for

GROUPS = Path("/sys/fs/cgroup")
PERIOD_US = 100_000


class Unavailable(RuntimeError):
    """This machine or this user's rights allow no such group; the message says why."""


class Quota:
    """A control group; leaving the context removes it.

    Args:
        cores: whose time its processes may use together.

    Raises:
        Unavailable: on entering.
    """

    def __init__(self, cores: float):
        quota, first = round(cores * PERIOD_US), (GROUPS / "cpu").is_dir()  # version 1
        self._folder = (GROUPS / "cpu" if first else GROUPS) / f"fastbert-tests-{os.getpid()}"
        self._limit = {"cpu.cfs_quota_us": f"{quota}", "cpu.cfs_period_us": f"{PERIOD_US}"}
        if not first:
            self._limit = {"cpu.max": f"{quota} {PERIOD_US}"}

    def __enter__(self) -> Quota:
        try:
            self._folder.mkdir()
            for name, value in self._limit.items():
                (self._folder / name).write_text(value)
        except OSError as error:
            if self._folder.is_dir():
                self._folder.rmdir()
            raise Unavailable(f"{error.filename}: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        wait_for(lambda: not (self._folder / "cgroup.procs").read_text())
        self._folder.rmdir()

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command and all that it starts in the group."""
        inside = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._folder / "cgroup.procs")]
        return subprocess.run([*inside, *command], capture_output=True, text=True, **options)
