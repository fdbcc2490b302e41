"""A function over a list of jobs, each in a process of its own that is forked from the same state; results in order.

For compiling: LLVM's choices depend on where its objects lie in memory, so what was compiled before, or at the same time, in one process would move
registers to and fro. Jobs need not be picklable, results must be.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

WORKERS = 2  # the tests share the machine

Result = TypeVar("Result")
_work: list[tuple[Callable[..., Any], tuple]] = []  # of the pool that runs, for its processes


def forked(function: Callable[..., Result], jobs: Iterable[tuple]) -> Iterator[Result]:
    """`function(*job)` for each job. Closing the iterator early ends what still runs; one runs at a time."""
    _work[:] = [(function, job) for job in jobs]
    with multiprocessing.get_context("fork").Pool(WORKERS, maxtasksperchild=1) as pool:
        yield from pool.imap(_call, range(len(_work)), chunksize=1)


def _call(number: int) -> Any:
    function, job = _work[number]
    return function(*job)
