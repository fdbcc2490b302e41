"""Apply a function to many items in several processes, with results in order and flat memory.

No process is left behind. multiprocessing is not used for three reasons: its pools wait for ever
when a worker is killed at the wrong moment; forking breaks the threads of the tokenizer; and its
other start methods import the user's script again, which then must be written for it.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, TypeVar

from fastbert import child
from fastbert.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

REPORT_EVERY_S = 1.0  # a worker reports what it has done of an item at most that often
_WORKER = (
    "from multiprocessing.connection import Connection; from fastbert.data.workers import serve; "
    "serve(Connection(int(sys.argv[1])))"
)


def map_in_order(
    make: Callable[..., Callable[[Item], Result]],
    arguments: tuple[Any, ...],
    items: Iterable[Item],
    workers: int,
    advance: Callable[[int], None] | None = None,
) -> Generator[Result]:
    """Apply `make(*arguments)` to the items and yield the results in order.

    The function is made once in each of `workers` processes. This one is among them: it has
    imported everything already, and would only wait otherwise. A few items per worker are in
    progress at any time. Close the generator to end the other processes.

    Args:
        make, arguments: make the function.
        items: what it is applied to.
        workers: how many processes, with this one.
        advance: is called with what the function reports while it works on an item, in any order of
            the items; `make` then gets a function to report with as its last argument.

    Raises:
        InputError: the function raised one, in the order of the items; or a worker was killed.
    """
    reports = [advance] if advance else []
    if workers == 1:
        yield from map(make(*arguments, *reports), items)
        return
    # Few results wait for an earlier one.
    source = _Source(items, 4 * workers)
    done: dict[int, Result | InputError] = {}
    pool: list[_Worker] = []
    try:
        _start(pool, workers - 1)
        for worker in pool:
            worker.send((make, arguments, advance is not None))
        function = make(*arguments, *reports)
        while True:
            # An idle worker gets an item before this process does. Then each gets a second one, so
            # that it does not wait while this process works. In this order the last items are
            # shared out evenly.
            _feed(pool, source, 1)
            own = source.take()
            _feed(pool, source, 2)
            if own is not None:
                number, item = own
                done[number] = _result(function, item)
            elif source.given == source.taken:
                return
            for number, result in _receive(pool, advance, block=own is None):
                done[number] = result
            while source.given in done:
                result = done.pop(source.given)
                if isinstance(result, InputError):
                    raise result
                source.given += 1
                yield result
    except _Gone:
        raise InputError(
            "a worker ended before its work was done, most likely killed for lack of memory; "
            "try a lower --workers"
        ) from None
    finally:
        _end(pool)


def apply_in_child(
    make: Callable[..., Callable[[Item], Result]], arguments: tuple[Any, ...], item: Item
) -> Result:
    """Return `make(*arguments)(item)`, computed in a process of its own.

    Python handles a signal only between its own instructions, so a call into Rust that takes
    minutes delays Ctrl-C. Here an exception in this process, such as KeyboardInterrupt, ends the
    call at once.

    Raises:
        InputError: the function raised one, or the process was killed.
    """
    pool: list[_Worker] = []
    try:
        _start(pool, 1)
        pool[0].send((make, arguments, False))
        pool[0].send(item)
        pool[0].waiting.append(0)
        ((_, result),) = _receive(pool)
        if isinstance(result, InputError):
            raise result
        return result
    except _Gone:
        raise InputError(
            "a process ended before its work was done, most likely killed for lack of memory"
        ) from None
    finally:
        _end(pool)


class _Source(Generic[Item]):
    """Items with their numbers; at most `most` are taken before their results are given."""

    def __init__(self, items: Iterable[Item], most: int):
        self._items, self._most = enumerate(items), most
        self.taken = self.given = 0

    def take(self) -> tuple[int, Item] | None:
        """Return the next item; None where there is none, or results must be given first."""
        if self.taken - self.given >= self._most:
            return None
        found = next(self._items, None)
        self.taken += found is not None
        return found


@dataclass(frozen=True)
class _Done:
    """What a worker has done of an item since it last said so."""

    amount: int


class _Gone(Exception):
    """A worker process ended unexpectedly."""


@dataclass
class _Worker:
    """A worker process and the items it has not answered yet."""

    process: subprocess.Popen[bytes]
    connection: Connection
    waiting: deque[int]  # numbers of these items

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:
            raise _Gone from None


def _start(pool: list[_Worker], count: int) -> None:
    """Add `count` new workers to the pool."""
    # The workers inherit that SIGINT is blocked. Ctrl-C reaches every process of a terminal, but
    # only this one should act on it. If a signal arrives between the start of a worker and its
    # entry in the pool, the worker ends because its input is closed.
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


def _feed(pool: list[_Worker], source: _Source[Any], most: int) -> None:
    """Send items to the workers that have fewer than `most`."""
    for worker in pool:
        while len(worker.waiting) < most and (taken := source.take()) is not None:
            number, item = taken
            worker.send(item)
            worker.waiting.append(number)


def _receive(
    pool: list[_Worker], advance: Callable[[int], None] | None = None, block: bool = True
) -> Iterator[tuple[int, Any]]:
    """Yield all results that have arrived, with their numbers.

    Args:
        pool: the workers.
        advance: is called with what they report.
        block: wait for a message, if a result is due.
    """
    busy: dict[Any, _Worker] = {worker.connection: worker for worker in pool if worker.waiting}
    for connection in wait(list(busy), None if block else 0) if busy else []:
        worker = busy[connection]
        while worker.waiting:
            try:
                result = worker.connection.recv()
            except (EOFError, OSError):
                raise _Gone from None
            if not isinstance(result, _Done):
                yield worker.waiting.popleft(), result
            elif advance is not None:
                advance(result.amount)
            if not worker.connection.poll():
                break


def _result(function: Callable[[Item], Result], item: Item) -> Result | InputError:
    """Apply a function; an InputError is a result, which has its turn like any other."""
    try:
        return function(item)
    except InputError as error:
        return error


def _end(pool: list[_Worker]) -> None:
    """End the workers, also those that are busy."""
    for worker in pool:
        worker.connection.close()
        worker.process.kill()
    for worker in pool:
        worker.process.wait()


def serve(connection: Connection) -> None:
    """Run a worker: receive items and send results until it is ended.

    It ends at once, also while it is busy, when the other end of the connection is closed, as
    happens when the process there dies.
    """
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        # A separate thread reads, because if both sides wrote at once, neither would ever read.
        try:
            while True:
                messages.put((connection.recv(),))
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    done, reported = 0, time.monotonic()

    def report(amount: int) -> None:
        nonlocal done, reported
        done += amount
        if time.monotonic() - reported >= REPORT_EVERY_S:
            connection.send(_Done(done))
            done, reported = 0, time.monotonic()

    function: Callable[[Any], Any] | None = None
    while True:
        message = messages.get()
        if function is None:
            make, arguments, reports = message[0]
            function = make(*arguments, *([report] if reports else []))
            continue
        result = _result(function, message[0])
        try:
            if done:
                connection.send(_Done(done))
                done = 0
            connection.send(result)
        except OSError:
            return
