"""Let OpenMP's threads sleep while they wait, where other programs keep the cores busy.

torch divides an operation over the threads of libgomp, which meet after each one. A thread that
waits there spins for some milliseconds before it sleeps. On idle cores that is right, because it
takes long to wake a thread: where threads always sleep (OMP_WAIT_POLICY=PASSIVE) a step takes up to
1.8 times as long. Beside a busy program on each core, spinning takes the core from the very thread
that is waited for, and a step takes up to 105 times as long (docs/how-to/cpu.md).

So a thread of Python looks how long the threads of this process have waited for a core. Where that
is long, libgomp's threads sleep for a while. libgomp has no call for this after its start, but
it spins 100 times in place of 300,000 while there are more of its threads than processors. So
another team of its threads is kept meanwhile. It computes nothing, and operations are divided as
before, so every result is the same to the last digit.

Source: the manual of GNU libgomp, GOMP_SPINCOUNT.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

POLICIES = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"  # a user's own choice
# How long all threads together wait for a core, per second. With two threads, beside programs that
# use half of each core, it is 0.6, and spinning is still faster; beside busy ones it is 0.8 to 1.1.
CONTENDED = 0.7
LOOK_S = 0.1  # from one look to the next
# How long they sleep at first, and at most. It doubles where the look after it finds the same, so
# these looks cost 1 % in the end. Contention with threads of this process, as at a start, is brief.
ASLEEP_S = 0.5, 8.0
_TASKS = Path("/proc/self/task")
_begin = threading.Lock()
_watching: set[int] = set()  # ids of processes; a fork has none of the threads of its parent


def wait_policy() -> str:
    """Return how OpenMP's threads of this process wait for each other, in words."""
    if own := [f"{name}={os.environ[name]}" for name in POLICIES if name in os.environ]:
        return f"as set by {' and '.join(own)}"
    if _libgomp() is None:
        return "as OpenMP's default is"
    return "by spinning, and asleep beside busy programs"


def watch_contention() -> None:
    """Begin to watch, once in this process; call it when torch's number of threads is set.

    Nothing is done where OpenMP has one thread, where the user has set a wait policy, and on
    systems without libgomp or without Linux's account of the time that threads wait.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or any(name in os.environ for name in POLICIES):
        return
    with _begin:
        if os.getpid() in _watching or (gomp := _libgomp()) is None:
            return
        _watching.add(os.getpid())
    team = max(2, gomp.omp_get_num_procs() - threads + 2)
    threading.Thread(target=_watch, args=(gomp, team), daemon=True, name="contention").start()


def _libgomp() -> ctypes.CDLL | None:
    """Return the libgomp that torch has loaded; None where it cannot be kept from spinning."""
    import torch  # noqa: F401

    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD) if _delays() else None
    except OSError:
        return None


def _watch(gomp: ctypes.CDLL, team: int) -> None:
    shortest, longest = ASLEEP_S
    seconds = shortest
    while True:
        if waited(LOOK_S) > CONTENDED:
            # libgomp keeps a team as long as the thread lives that made it.
            holder = threading.Thread(target=_hold, args=(gomp, team, seconds), daemon=True)
            holder.start()
            holder.join()
            seconds = min(2 * seconds, longest)
        else:
            seconds = shortest


def _hold(gomp: ctypes.CDLL, team: int, seconds: float) -> None:
    """Keep a team of this many threads for a while."""
    nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
    gomp.GOMP_parallel(nothing, None, ctypes.c_uint(team), ctypes.c_uint(0))
    time.sleep(seconds)


def waited(seconds: float) -> float:
    """Return how long the threads of this process wait for a core, per second, from now on."""
    start, before = time.monotonic(), _delays()
    time.sleep(seconds)
    more = sum(delay - before.get(thread, 0) for thread, delay in _delays().items())
    return more / 1e9 / (time.monotonic() - start)


def _delays() -> dict[str, int]:
    """Return how many nanoseconds each thread has waited for a core while it was ready to run.

    Source: Linux, Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat.
    """
    found = {}
    try:
        for thread in os.listdir(_TASKS):
            try:
                found[thread] = int((_TASKS / thread / "schedstat").read_text().split()[1])
            except (OSError, ValueError, IndexError):  # it has ended; or nothing is counted
                continue
    except OSError:  # not Linux
        pass
    return found
