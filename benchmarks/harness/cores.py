"""Run one job on each core, so that concurrent jobs do not disturb each other."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from benchmarks.harness.machine import ROOT

Job = TypeVar("Job")
Result = TypeVar("Result")


def one_on_each(
    work: Callable[[Job], Result], jobs: Iterable[Job], cores: int | None = None
) -> Iterator[Result]:
    """The results in the order of the jobs.

    Each job runs in a thread that is pinned to its own core; processes that it starts inherit this.

    Args:
        cores: maximum number of cores; by default all that this process may use.
    """
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    chosen = sorted(os.sched_getaffinity(0))[-cores if cores else None :]
    for core in chosen:
        free.put(core)
    # Linux pins only the calling thread; processes that it starts inherit this.
    with ThreadPoolExecutor(
        len(chosen), initializer=lambda: os.sched_setaffinity(0, {free.get()})
    ) as pool:
        yield from pool.map(work, jobs)


def run_module(name: str, arguments: Sequence[object], what: str) -> str:
    """Run `python -m name` with one thread and return its standard output.

    If it fails, raise SystemExit with `what` and the end of its error output.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    command = [sys.executable, "-m", name, *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{what}: {ended.stderr.strip()[-2000:]}")
    return ended.stdout
