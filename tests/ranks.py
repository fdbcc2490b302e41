"""Real processes that train together: started quickly, killed, stopped, signalled, waited for; none outlives the tests."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE_S = 120.0  # a guard, never reached where all is well


def environment(**more: str) -> dict[str, str]:
    """What a process of fastbert runs in, wherever it is started from."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**{k: v for k, v in os.environ.items() if k not in LAUNCHER}, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    """One that nobody listens on, below those that the system gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Rank:
    """A process of its own; `out` and `err` are the files that it writes to."""

    def __init__(
        self, server: _Server, arguments: Sequence[str], variables: Mapping[str, str], folder: Path, name: str, more: dict[str, int]
    ):
        self._server = server
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        where = {"folder": str(folder), "out": str(self.out), "err": str(self.err)}
        self.pid = server.start({"arguments": list(arguments), "environment": dict(variables), **where, **more})

    @property
    def code(self) -> int | None:
        """Its exit code; -9 for a kill -9; None while it runs."""
        return self._server.ended(self.pid, 0)

    def wait(self, seconds: float = PATIENCE_S) -> int:
        code = self._server.ended(self.pid, seconds)
        if code is None:
            raise TimeoutError(f"process {self.pid} runs on after {seconds:g} s; its stderr: {self.err.read_text()!r}")
        return code

    def signal(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def catches(self, number: int) -> bool:
        """Whether it has a handler for a signal, so that it would not die of it."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
        return False


class Ranks:
    """The processes of one start of a run: `fastbert ARGUMENTS` on each rank of one machine. Leaving the context kills what is left.

    Args:
        arguments: of the command line.
        folder: working directory, and where `rank0.out`, `rank0.err`, ... are written, from the start.
        world: how many; a single one is started without any launcher's variables.
        namespaces: id of a process whose mounts they see; by default those of the tests.
        more: environment variables.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, world: int = 1, namespaces: int | None = None, **more: str):
        folder.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self.ranks: list[Rank] = []
        try:
            for rank in range(world):
                values = (str(rank), str(world), str(rank), str(world), "127.0.0.1", port)
                launched = dict(zip(LAUNCHER, values, strict=True)) if world > 1 else {}
                mounts = {} if namespaces is None else {"namespaces": namespaces}
                self.ranks.append(Rank(_server(), arguments, environment(**launched, **more), folder, f"rank{rank}", mounts))
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        for rank in self.ranks:
            rank.wait()

    def __getitem__(self, rank: int) -> Rank:
        return self.ranks[rank]

    def signal(self, number: int) -> None:
        """To all of them."""
        for rank in self.ranks:
            rank.signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def wait(self, seconds: float = PATIENCE_S) -> list[int]:
        """Exit codes, by rank."""
        until = time.monotonic() + seconds
        return [rank.wait(max(0.0, until - time.monotonic())) for rank in self.ranks]

    @property
    def codes(self) -> list[int | None]:
        return [rank.code for rank in self.ranks]

    @property
    def errors(self) -> str:
        """What they wrote on stderr."""
        return "".join(rank.err.read_text(errors="replace") for rank in self.ranks)


class _Server:
    """The other end of fork_server.py."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.fork_server"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment(), bufsize=0)
        self._unread = b""
        self._started: list[int] = []
        self._ended: dict[int, int] = {}
        atexit.register(self.close)

    def start(self, request: dict[str, object]) -> int:
        """Returns the process's id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        until = time.monotonic() + PATIENCE_S
        while not self._started:
            self._read(until)
        return self._started.pop()

    def ended(self, pid: int, seconds: float) -> int | None:
        """The exit code of a process that ends within `seconds`."""
        until = time.monotonic() + seconds
        while pid not in self._ended and self._read(until):
            pass
        return self._ended.get(pid)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE_S)
        self._process.stdout.close()

    def _read(self, until: float) -> bool:
        """Take in what the server says; whether it said something in time."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
            return False
        read = self._process.stdout.read(1 << 16)
        if not read:
            raise RuntimeError(f"the fork server is gone, exit code {self._process.wait()}")
        *lines, self._unread = (self._unread + read).split(b"\n")
        for answer in map(json.loads, lines):
            if "started" in answer:
                self._started.append(answer["started"])
            else:
                self._ended[answer["ended"]] = answer["code"]
        return True


@functools.cache
def _server() -> _Server:
    """One for all tests of this process."""
    return _Server()
