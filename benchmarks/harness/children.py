"""Run commands as child processes, each with a time limit and a log.

No child outlives the program that started it, however that program ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1  # prctl.h
_LIBC = ctypes.CDLL(None)
_REAP_S = 10  # time for a killed process to disappear; one stuck in a driver may stay

_groups: set[int] = set()  # process groups that are running


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs `benchmarks.NAME`."""
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def pretraining(recipe: Path, settings: Mapping[str, object]) -> list[str]:
    """The command that runs `fastbert pretrain` with these settings of the recipe."""
    given = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "fastbert", "pretrain", str(recipe), *given]


def environment() -> dict[str, str]:
    """Environment of the children: this repository on the path, real kernels, no pytest variables.

    If pytest runs this program, its variables would make a pytest in a child act as a worker, and
    pytest-benchmark measures nothing in a worker.
    """
    found = {
        name: value
        for name, value in os.environ.items()
        if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_")
    }
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    found |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    # Some virtual CPUs report AMX support, but its use kills the process.
    found.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    return found


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, even by SIGKILL."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(command: list[str], log: Path, env: Mapping[str, str], seconds: float) -> int | None:
    """Exit code of a command, negative for a signal; None if it was killed after `seconds`.

    Its output is appended to the log and copied to the terminal. All processes that it started are
    killed when it ends.
    """
    process = start(
        command, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    copying = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
    copying.start()
    try:
        code = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        code = None
    stop(process)
    copying.join(timeout=5)
    return code


def start(command: list[str], env: Mapping[str, str], **options: Any) -> subprocess.Popen:
    """A command in a process group of its own; `stop` ends it."""
    options |= {"cwd": ROOT, "env": env, "start_new_session": True}
    # A preexec_fn is safe here, because end_with_parent is one system call and takes no lock.
    process = subprocess.Popen(command, preexec_fn=end_with_parent, **options)  # noqa: PLW1509
    _groups.add(process.pid)
    return process


def stop(process: subprocess.Popen) -> None:
    """Kill a command and the processes that it started, such as compilers."""
    _kill(process.pid)
    _groups.discard(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_REAP_S)


def stop_all() -> None:
    """Kill all running commands and the processes that they started."""
    for group in list(_groups):
        _kill(group)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _copy(lines: Iterable[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            file.flush()
            print(line, end="", flush=True)
