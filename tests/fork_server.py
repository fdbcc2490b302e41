"""Import the heavy libraries once, and fork a rank that is ready to run for each request.

Run it as `python -m tests.fork_server`. Importing torch and DeepSpeed takes 3 s per process, and a
fork takes 30 ms. Forking is safe because this process never starts a thread; the server refuses to
serve otherwise. multiprocessing's own fork server does not fit: its children keep it alive after
the tests have ended, and they leave by `os._exit`, which skips everything that happens at the end
of a real process.

A request is a line of JSON on stdin: {"arguments", "environment", "folder", "out", "err"} and
optionally {"namespaces": id of a process whose mounts the rank will see}. The answers are lines on
stdout: {"started": pid}, in the order of the requests, and at any time {"ended": pid, "code": as
subprocess has it}. When stdin ends, the server and all ranks end.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
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
    # Stages 1 to 3 import it. It calls torch.compile, at least in its decorators.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)
PR_SET_PDEATHSIG = 1  # prctl.h


def warm_up() -> None:
    """Do once what every rank would do at its beginning or for its first picture."""
    import torch

    from fastbert.training.history import History
    from fastbert.training.loop import gemm_rate
    from fastbert.training.picture import loss_figure

    gemm_rate(torch.float32, None, "cpu", torch.get_num_threads())
    history = History(("loss_mlm", "loss_nsp"))
    history.add({"step": 1, "loss_mlm": 1.0, "loss_nsp": 1.0})
    loss_figure(history, "", {}).savefig(io.BytesIO(), format="png")


def serve() -> dict[str, Any] | None:
    """Answer requests.

    Returns:
        A request in the process that will be its rank, and None in the server when stdin has ended.
    """
    assert (threads := len(os.listdir("/proc/self/task"))) == 1, (
        f"{threads} threads: forking is not safe"
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
                    # Close it now. It is part of a cycle, and a late collection would close
                    # whatever file has its number by then.
                    watched.close()
                    _die_with(server)
                    os.close(binds)
                    return json.loads(line)
                os.close(binds)
                # Wait until the child has called _die_with. Nobody knows its pid before, so
                # nobody could kill it if it outlived the server.
                os.read(bound, 1)
                os.close(bound)
                watched.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                _answer({"started": pid})


def keep_parameters(dtype: str) -> None:
    """Let DeepSpeed keep the weights in this dtype, as on a GPU; on a CPU no recipe asks for it."""
    from fastbert.training import precision

    precision._on_cpu = lambda *_: precision.Precision(dtype, "a test's", dtype)


def take_measurement(probe: str) -> None:
    """Let "auto" and "bf16" go by a measurement of this machine that was made before, as JSON.

    A rank takes more than two seconds for its own, and most tests train for less.
    """
    from fastbert.machine import Bf16Probe
    from fastbert.training import precision

    known = Bf16Probe(**json.loads(probe))
    precision.resolve_precision.__defaults__ = (lambda: known,)


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
    """Enter the mount namespace of another process, as the user that it runs as."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "mnt"):
        path = f"/proc/{pid}/ns/{kind}"
        if os.readlink(path) != os.readlink(f"/proc/self/ns/{kind}") and libc.setns(
            os.open(path, os.O_RDONLY), 0
        ):
            raise OSError(ctypes.get_errno(), f"setns {path}")


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the child was faster
        os._exit(1)


if __name__ == "__main__":
    from fastbert.cli import main

    # DeepSpeed imports MLflow where that is installed, and MLflow imports pyarrow, which starts a
    # thread.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    for module in HEAVY:
        with contextlib.suppress(ModuleNotFoundError):  # not every DeepSpeed has all of its modules
            importlib.import_module(module)
    warm_up()
    del sys.modules["mlflow"]
    gc.freeze()  # a rank's first collection would copy the pages of all imports
    if (request := serve()) is not None:
        become(request)
        if "FASTBERT_TEST_PARAMETERS" in os.environ:
            keep_parameters(os.environ["FASTBERT_TEST_PARAMETERS"])
        if "FASTBERT_TEST_BF16" in os.environ:
            take_measurement(os.environ["FASTBERT_TEST_BF16"])
        main()
