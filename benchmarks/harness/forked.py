"""Call a function on a list of jobs, each in its own process forked from the same state.

It is meant for compilation. LLVM's choices depend on the memory addresses of its objects, so the
same kernel could get other registers after other compilations in the same process. Jobs need not be
picklable, but results must be. They come in the order of the jobs.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

WORKERS = 2  # the tests share the machine

Result = TypeVar("Result")
_work: list[tuple[Callable[..., Any], tuple]] = []  # of the current pool, inherited by its workers


def forked(function: Callable[..., Result], jobs: Iterable[tuple]) -> Iterator[Result]:
    """`function(*job)` for each job; only one call may run at a time.

    Closing the iterator early kills the remaining jobs.
    """
    _work[:] = [(function, job) for job in jobs]
    with multiprocessing.get_context("fork").Pool(WORKERS, maxtasksperchild=1) as pool:
        yield from pool.imap(_call, range(len(_work)), chunksize=1)


def _call(number: int) -> Any:
    function, job = _work[number]
    return function(*job)
