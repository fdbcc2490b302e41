"""A function over many items on several processes, results in order, memory flat, and no process left behind.

Not multiprocessing: its pools wait for ever when a worker is killed at the wrong moment; it forks, which threads of the
tokenizer do not survive, or imports the user's script again, which then must be written for it.
"""

from __future__ import annotations

import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar

from fastbert import child
from fastbert.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()
_WORKER = "from multiprocessing.connection import Connection; from fastbert.data.workers import serve; serve(Connection(int(sys.argv[1])))"


def map_in_order(
    make: Callable[..., Callable[[Item], Result]],
    arguments: tuple[Any, ...],
    items: Iterable[Item],
    workers: int,
) -> Generator[Result]:
    """Apply `make(*arguments)`, made once in each of `workers` processes (1: in this one), to the items.

    A few items a worker are on their way at any time. Close the generator to end the processes.

    Raises:
        InputError: one that the function raised, in the order of the items; or a worker was killed.
    """
    if workers == 1:
        yield from map(make(*arguments), items)
        return
    source: Iterator[Any] = iter(items)
    more, sent, given = (
        True,
        0,
        0,
    )  # whether there are items left; how many went to workers; how many results came out
    done: dict[int, Result | InputError] = {}
    pool: list[_Worker] = []
    try:
        _start(pool, workers)
        for worker in pool:
            worker.send((make, arguments))
        while more or given < sent:
            # Two for each worker, so that none has to wait; but never far ahead of what can be given out.
            for worker in pool:
                while more and len(worker.waiting) < 2 and sent - given < 4 * workers:
                    item = next(source, _END)
                    if item is _END:
                        more = False
                    else:
                        worker.send(item)
                        worker.waiting.append(sent)
                        sent += 1
            for number, result in _receive(pool):
                done[number] = result
            while given in done:
                result = done.pop(given)
                if isinstance(result, InputError):
                    raise result
                yield result
                given += 1
    finally:
        for worker in pool:
            worker.connection.close()  # a worker that comes to the end of its input ends
        for worker in pool:
            worker.process.wait()


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    waiting: deque[int]  # numbers of the items it has

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:
            raise _killed() from None


def _start(pool: list[_Worker], count: int) -> None:
    """Add `count` new workers to the pool."""
    # The workers inherit that SIGINT is blocked: Ctrl-C reaches every process of a terminal, but it is for this one to act
    # on it. A worker that is started and not listed, because a signal came between, finds its input ended.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(count):
            ours, theirs = Pipe()
            command = child.command(_WORKER, str(theirs.fileno()))
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
            theirs.close()
            pool.append(_Worker(process, ours, deque()))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _receive(pool: list[_Worker]) -> Iterator[tuple[int, Any]]:
    """Wait for at least one result, if any is to come; give all that are there, with their numbers."""
    busy: dict[Any, _Worker] = {worker.connection: worker for worker in pool if worker.waiting}
    for connection in wait(list(busy)) if busy else []:
        try:
            result = busy[connection].connection.recv()
        except (EOFError, OSError):
            raise _killed() from None
        yield busy[connection].waiting.popleft(), result


def _killed() -> InputError:
    return InputError(
        "a worker ended before its work was done, most likely killed for want of memory; try fewer --workers"
    )


def serve(connection: Connection) -> None:
    """A worker: items in, results out, until the other end is closed, be it because that process is gone."""
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        # In a thread of its own: if both sides were writing at once, neither would ever read.
        try:
            while True:
                messages.put((connection.recv(),))
        except (EOFError, OSError):
            messages.put(None)

    threading.Thread(target=read, daemon=True).start()
    function: Callable[[Any], Any] | None = None
    while (message := messages.get()) is not None:
        if function is None:
            make, arguments = message[0]
            function = make(*arguments)
            continue
        try:
            result = function(message[0])
        except InputError as error:
            result = error
        try:
            connection.send(result)
        except OSError:
            return
