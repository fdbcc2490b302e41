"""Ranks of a toy run: real processes that only join, count steps and add up numbers.

Tests disturb them on the way. multiprocessing's server, which has imported torch, forks each in 30
ms instead of 3 s.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.ranks import LAUNCHER, PATIENCE_S, free_port

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["fastbert.cluster.watchdog", "tests.toy_ranks"])
HOST = os.uname().nodename


class Toys:
    """`world` processes that call a function of a test module, `work(*arguments)`.

    Its result is the exit code. Leaving the context kills the processes that still run.

    Args:
        work: a function at the top level of a module, since only its name is sent.
        arguments: its arguments, which must be picklable.
        folder: the folder for `0.out`, `0.err`, ...
        world: the number of ranks in the variables; with one rank there are none.
        only: the ranks to start; by default all.
        more: further environment variables.
    """

    def __init__(
        self,
        work: Callable[..., int],
        arguments: tuple[Any, ...],
        folder: Path,
        world: int,
        only: Any = None,
        **more: str,
    ):
        self.folder, self.world, self.variables = folder, world, more
        self.port = int(more.get("MASTER_PORT") or free_port())
        self._work, self._arguments = work, arguments
        self.processes: dict[int, Any] = {}
        self.start(range(world) if only is None else only)

    def start(self, ranks: Any) -> None:
        for rank in ranks:
            values = (
                str(rank),
                str(self.world),
                str(rank),
                str(self.world),
                "127.0.0.1",
                str(self.port),
            )
            variables = {
                **(dict(zip(LAUNCHER, values, strict=True)) if self.world > 1 else {}),
                **self.variables,
            }
            self.processes[rank] = FORKED.Process(
                target=_begin,
                args=(self._work, self._arguments, variables, str(self.folder / str(rank))),
            )
            self.processes[rank].start()

    def __enter__(self) -> Toys:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()

    def pid(self, rank: int) -> int:
        return self.processes[rank].pid

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pid(rank), number)

    def wait(self, *ranks: int) -> list[int]:
        """Wait for these ranks, by default all, and return their exit codes."""
        found = []
        for rank in ranks or sorted(self.processes):
            self.processes[rank].join(PATIENCE_S)
            found.append(self.processes[rank].exitcode)
            assert found[-1] is not None, f"rank {rank} runs on; stderr: {self.err(rank)}"
        return found

    def out(self, rank: int) -> str:
        return self._read(rank, "out")

    def err(self, rank: int) -> str:
        return self._read(rank, "err")

    def until(self, rank: int, words: str) -> None:
        """Return when a rank has printed these words."""
        end = time.monotonic() + PATIENCE_S
        while words not in self.out(rank):
            assert time.monotonic() < end and self.processes[rank].is_alive(), (
                f"rank {rank}: {self.out(rank)} {self.err(rank)}"
            )
            time.sleep(0.02)

    def name(self, rank: int) -> str:
        """Return the name of a rank in messages."""
        return f"rank {rank} ({HOST}, process {self.pid(rank)})"

    def _read(self, rank: int, kind: str) -> str:
        path = self.folder / f"{rank}.{kind}"
        return path.read_text() if path.exists() else ""


def _begin(
    work: Callable[..., int], arguments: tuple[Any, ...], variables: Mapping[str, str], name: str
) -> None:
    signal.alarm(int(2 * PATIENCE_S))  # if the tests have ended
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    for variable in LAUNCHER:
        os.environ.pop(variable, None)
    os.environ.update(variables)
    code = work(*arguments)
    sys.stdout.flush()
    sys.exit(code)


def say(*words: Any) -> None:
    """Print a line in one piece, for `Toys.until`."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def listening(*pids: int) -> set[tuple[int, str, int]]:
    """Return (process, address, port) of every TCP socket on which these processes listen."""
    sockets: dict[str, tuple[str, int]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                address, port = fields[1].split(":")
                sockets[f"socket:[{fields[9]}]"] = ADDRESSES.get(address, address), int(port, 16)
    found = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                name = os.readlink(descriptor)
            except FileNotFoundError:  # closed in the meantime
                continue
            if name in sockets:
                found.add((pid, *sockets[name]))
    return found


# The kernel prints the words in this machine's little-endian order.
ADDRESSES = {"0100007F": "127.0.0.1", "00000000": "0.0.0.0", "0" * 32: "::"}
