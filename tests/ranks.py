"""Real processes that train together; tests start, signal, stop and kill them.

None of them outlives the tests.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE_S = 120.0  # a guard that a working run never reaches


def environment(**more: str) -> dict[str, str]:
    """Return the environment variables of a fastbert process, for any working directory."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {
        **{k: v for k, v in os.environ.items() if k not in LAUNCHER},
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        **more,
    }


def free_port() -> int:
    """Find a free port below those that the system gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Rank:
    """A separate process; `out` and `err` are the files that it writes to."""

    def __init__(
        self,
        server: _Server,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        folder: Path,
        name: str,
        place: dict[str, int | str],
    ):
        self._server = server
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        outputs = {"out": str(self.out), "err": str(self.err)}
        self.pid = server.start(
            {"arguments": list(arguments), "environment": dict(variables), **outputs, **place}
        )

    @property
    def parent(self) -> int:
        """The fork server's id."""
        return self._server.pid

    @property
    def code(self) -> int | None:
        """Return its exit code: -9 after SIGKILL, and None while it runs."""
        return self._server.ended(self.pid, 0)

    def wait(self, seconds: float = PATIENCE_S) -> int:
        code = self._server.ended(self.pid, seconds)
        if code is None:
            raise TimeoutError(
                f"process {self.pid} is still running after {seconds:g} s; "
                f"its stderr: {self.err.read_text()!r}"
            )
        return code

    def signal(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)


def runs(pid: int) -> bool:
    """Tell whether a process exists and has not ended.

    In a container without an init process nobody reaps an orphan, so an ended process stays
    visible.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return not any(
        line.startswith("State:") and line.split()[1] in "ZX" for line in status.splitlines()
    )


def catches(pid: int, number: int) -> bool:
    """Return whether a process handles a signal, so that it would not die of it."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


class Ranks:
    """The processes of one start of a run: `fastbert ARGUMENTS` on each rank of one machine.

    Leaving the context kills the processes that still run.

    Args:
        arguments: the command line's.
        folder: where `rank0.out`, `rank0.err`, ... are written.
        world: the number of ranks; a single one gets no launcher's variables.
        namespaces: id of a process whose mounts they see; by default the tests' own mounts.
        workplace: the working directory; by default `folder`.
        more: further environment variables.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        world: int = 1,
        namespaces: int | None = None,
        workplace: Path | None = None,
        **more: str,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self.ranks: list[Rank] = []
        try:
            for rank in range(world):
                values = (str(rank), str(world), str(rank), str(world), "127.0.0.1", port)
                launched = dict(zip(LAUNCHER, values, strict=True)) if world > 1 else {}
                place: dict[str, int | str] = {"folder": str(workplace or folder)}
                if namespaces is not None:
                    place["namespaces"] = namespaces
                self.ranks.append(
                    Rank(
                        _server(),
                        arguments,
                        environment(**launched, **more),
                        folder,
                        f"rank{rank}",
                        place,
                    )
                )
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for rank in self.ranks:
            rank.wait()

    def __getitem__(self, rank: int) -> Rank:
        return self.ranks[rank]

    def signal(self, number: int) -> None:
        """Send a signal to all ranks."""
        for rank in self.ranks:
            rank.signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def wait(self, seconds: float = PATIENCE_S) -> list[int]:
        """Wait for all ranks, and return their exit codes."""
        until = time.monotonic() + seconds
        return [rank.wait(max(0.0, until - time.monotonic())) for rank in self.ranks]

    @property
    def codes(self) -> list[int | None]:
        return [rank.code for rank in self.ranks]

    @property
    def errors(self) -> str:
        """Return what the ranks wrote to stderr."""
        return "".join(rank.err.read_text(errors="replace") for rank in self.ranks)


class _Server:
    """The client of fork_server.py; several threads may use it."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.fork_server"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment(),
            bufsize=0,
        )
        self.pid = self._process.pid
        self._news = threading.Condition()
        # Requests made, processes in their order, exit codes by process.
        self._requested, self._started, self._ended = (0, [], {})
        threading.Thread(target=self._listen, daemon=True, name="fork server").start()
        atexit.register(self.close)

    def start(self, request: dict[str, object]) -> int:
        """Start a process, and return its id."""
        assert self._process.stdin is not None
        with self._news:
            mine = self._requested
            self._requested += 1
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._news.wait_for(
                lambda: len(self._started) > mine or self._process.poll() is not None, PATIENCE_S
            )
            if len(self._started) <= mine:
                raise RuntimeError(
                    f"the fork server starts no process; its exit code is {self._process.poll()}"
                )
            return self._started[mine]

    def ended(self, pid: int, seconds: float) -> int | None:
        """Return the exit code of a process that ends within `seconds`."""
        with self._news:
            self._news.wait_for(lambda: pid in self._ended, seconds)
            return self._ended.get(pid)

    def close(self) -> None:
        """End the server and every process that still runs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE_S)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        unread = b""
        while read := self._process.stdout.read(1 << 16):
            *lines, unread = (unread + read).split(b"\n")
            with self._news:
                for answer in map(json.loads, lines):
                    if "started" in answer:
                        self._started.append(answer["started"])
                        # The system reuses an id after some 30,000 others.
                        self._ended.pop(answer["started"], None)
                    else:
                        self._ended[answer["ended"]] = answer["code"]
                self._news.notify_all()
        self._process.wait()
        with self._news:
            self._news.notify_all()


_BEGIN = threading.Lock()


def _server() -> _Server:
    """Return the one server of this test process."""
    with _BEGIN:
        return _begin()


@functools.cache
def _begin() -> _Server:
    return _Server()
