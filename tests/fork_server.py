"""`python -m tests.fork_server`: has imported all that is heavy, and forks a rank that is ready to run for each request.

Importing torch and DeepSpeed takes 3 s a process; a fork takes 30 ms. It is sound since nothing here ever starts a thread: the server
refuses to serve otherwise. multiprocessing's own fork server was tried: its children keep it alive when the tests are gone, and they leave
by `os._exit`, so that nothing of what happens at the end of a real process happens.

A request is a line of JSON on stdin: {"arguments", "environment", "folder", "out", "err"}
and, if wanted, {"namespaces": id of a process whose mounts it is to see}. The answers are lines on stdout: {"started": pid}, in the
order of the requests, and at any time {"ended": pid, "code": as subprocess has it}. When stdin ends, so does the server, and with it every rank.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import sys
from typing import Any

# The loop, and what is imported only when a run begins or its picture is drawn: 5 s more.
HEAVY = (
    "fastbert.training.loop",
    "torch._dynamo",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which stages 1 to 3 ask for: it compiles, at least its decorators
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)
PR_SET_PDEATHSIG = 1  # prctl.h


def serve() -> dict[str, Any] | None:
    """Answer requests. Returns one in the process that is to become its rank, and None in the server, at the end."""
    assert (threads := len(os.listdir("/proc/self/task"))) == 1, (
        f"{threads} threads: forking is not sound"
    )
    watched = selectors.DefaultSelector()
    watched.register(0, selectors.EVENT_READ, None)
    unread = b""
    while True:
        for key, _ in watched.select():
            if key.data is not None:  # a rank has ended
                watched.unregister(key.fd)
                os.close(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                _answer({"ended": key.data, "code": code})
                continue
            read = os.read(0, 1 << 16)
            if not read:
                return None
            *lines, unread = (unread + read).split(b"\n")
            for line in lines:
                server = os.getpid()
                bound, binds = os.pipe()
                pid = os.fork()
                if pid == 0:
                    watched.close()  # now: it is in a cycle, and a late collection would close whatever has its number by then
                    _die_with(server)
                    os.close(binds)
                    return json.loads(line)
                os.close(binds)
                os.read(
                    bound, 1
                )  # until it has: nobody knows its number before, to stop it when it would still outlive the server
                os.close(bound)
                watched.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                _answer({"started": pid})


def become(request: dict[str, Any]) -> None:
    """Make this process look as if it had been started by a shell."""
    os.setsid()
    if "namespaces" in request:
        _enter_namespaces(request["namespaces"])
    files = [
        os.open(os.devnull, os.O_RDONLY),
        *(
            os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for name in ("out", "err")
        ),
    ]
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 4096)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = ["fastbert", *request["arguments"]]


def _answer(answer: dict[str, int]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _enter_namespaces(pid: int) -> None:
    """See the mounts that another process sees, as the user that it is there."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "mnt"):
        path = f"/proc/{pid}/ns/{kind}"
        if os.readlink(path) != os.readlink(f"/proc/self/ns/{kind}") and libc.setns(
            os.open(path, os.O_RDONLY), 0
        ):
            raise OSError(ctypes.get_errno(), f"setns {path}")


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was quicker
        os._exit(1)


if __name__ == "__main__":
    from fastbert.cli import main

    for module in HEAVY:
        importlib.import_module(module)
    gc.freeze()  # or a rank's first collection would copy the pages of all that was imported
    if (request := serve()) is not None:
        become(request)
        main()
