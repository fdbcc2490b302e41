"""What this machine can do: usable cores, rates of matrix products and memory, and bf16.

Rates are measured on the few shapes that an encoder has, in a fraction of a second each. torch is
imported inside the functions, because `fastbert doctor` must work on a machine without it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert import child
from fastbert.errors import InputError

if TYPE_CHECKING:
    import torch

# T, D, F of the timed products: a micro-batch of BERT-small. On the machines tried, the rates of
# BERT-mini to BERT-base are within a tenth of this one.
GEMM_SHAPE = (2048, 512, 2048)
BANDWIDTH_BYTES = 256 * 1024**2  # well over the largest last-level cache
# bf16 costs accuracy, so a smaller gain in the products is not worth it.
WORTH_IT = 1.5
PROBE_TIMEOUT_S = 60
# A process takes at least this many sequences of a step. With fewer, the fixed time of each
# operation outweighs what it gains.
SEQUENCES_PER_PROCESS = 8
# Beyond, operations are divided over OpenMP's threads as well. Each process holds the libraries,
# 0.2 GB, and a copy of the gradients.
MOST_PROCESSES = 8


@dataclass(frozen=True)
class Bf16Probe:
    """What became of matrix products with operands in bf16 on this processor."""

    right: bool  # they have the right values, and the process survives them
    gain: float  # their rate over that of fp32, with the conversions; 0 where it was not measured
    why: str  # a clause on the result, for messages

    @property
    def pays(self) -> bool:
        return self.right and self.gain >= WORTH_IT


def usable_cores() -> int:
    """Return the number of cores that this process may use.

    It is lower than the machine's number where the affinity of the process or the CPU quota of its
    control group is lower. A part of a core counts as a core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota()
    return min(cores or 1, math.ceil(quota) if quota else sys.maxsize)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores' time the control groups of this process allow; None without a limit.

    A container's limit (`docker run --cpus 2`, Kubernetes' `limits.cpu`) is such a quota. torch
    does not read it. The lowest one counts, from the process's own group up to the root.

    Args:
        root: of the file system, for tests.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst, `cpu.max`, and
    scheduler/sched-bwc.rst, `cpu.cfs_quota_us`, for version 1.
    """
    quotas = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            mount, names = root / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # In a container the path may be one of the host, of which only the root is visible.
        folder = mount / group.lstrip("/")
        for place in (folder, *folder.parents):
            words = " ".join(line for name in names for line in _lines(place / name)).split()
            # Without a limit the quota is "max", or -1.
            if len(words) == 2 and words[0].isdigit():
                quotas.append(int(words[0]) / int(words[1]))
            if place == mount:
                break
    return min(quotas, default=None)


def share_cores(processes: int) -> int:
    """Divide the cores among the processes that compute on them, and let torch know.

    A number that the user set for OpenMP, or that torchrun set, wins.

    Args:
        processes: of this run on this machine.

    Returns:
        The number of threads that this process should compute on.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cores()) // processes))
    return torch.get_num_threads()


def processes_for(sequences: int, cores: int) -> int:
    """Return how many packs a rank should compute at once, each in a process of its own.

    Args:
        sequences: of this rank in a step.
        cores: that this rank may use.
    """
    return max(1, min(cores, sequences // SEQUENCES_PER_PROCESS, MOST_PROCESSES))


def measure_gemm_rate(
    dtype: torch.dtype | None = None,
    seconds: float = 0.3,
    device: str = "cpu",
    operands: torch.dtype | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure the FLOP/s of the three products of a linear layer's forward and backward pass.

    torch's current number of threads is used. The best round counts: other processes on the machine
    can only make a round slower, so the best one is closest to the peak.

    Args:
        dtype: of the factors; fp32 by default. Where bf16 is not safe (see `probe_bf16`), measuring
            it kills the process.
        seconds: how long to measure, approximately; a slow processor multiplies fewer rows, so
            that it needs no longer than a few times this.
        device: "cpu", "cuda" or "cuda:N".
        operands: bf16 to round factors in fp32 to it, as `fastbert_kernels.linear` does; the time
            of the conversions counts.
        clock: seconds. `time.process_time` leaves out the time of other programs.
    """
    import torch

    from fastbert_kernels import linear

    T, D, F = GEMM_SHAPE
    rows = T // 64
    while True:
        x, weight, dy = (
            torch.randn(shape, device=device).to(dtype or torch.float32)
            for shape in ((rows, D), (F, D), (rows, F))
        )
        leaves = x.requires_grad_(), weight.requires_grad_()

        def layer(x=x, weight=weight, dy=dy, leaves=leaves) -> None:
            torch.autograd.grad(
                linear(
                    x,
                    weight,
                    operands=operands,
                    impl="cpu" if device == "cpu" else "reference",
                ),
                leaves,
                dy,
            )

        # Where bf16 is emulated, a round of all rows takes over 15 s. So the rows grow only while
        # the next size fits the time, which takes two rounds of four times as many rows.
        if 8 * _best(layer, 0.0, device, clock) > seconds or rows == T:
            return 6.0 * rows * D * F / _best(layer, seconds, device, clock)
        rows *= 4


def measure_bandwidth(seconds: float = 0.3, device: str = "cpu") -> float:
    """Measure the bytes/s of a copy between two buffers that do not fit any cache.

    Bytes read and bytes written both count.
    """
    import torch

    source = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * BANDWIDTH_BYTES / _best(lambda: target.copy_(source), seconds, device)


def _best(
    work: Any, seconds: float, device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds of the fastest call of `work` within about `seconds`."""
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    work()
    wait()
    best, end = float("inf"), clock() + seconds
    while True:
        start = clock()
        work()
        wait()
        now = clock()
        best = min(best, now - start)
        if now >= end:
            return best


def check_threads(what: str, wanted: int) -> None:
    """Check that as many further threads as `what` needs can be started.

    Where one cannot, libraries abort, report a broken network, or wait for it forever.

    Raises:
        InputError: they cannot.
    """
    if (found := startable_threads(wanted)) < wanted:
        raise InputError(
            f"only {found} more threads can be started here, and {what} needs {wanted}; raise the "
            "limit of this user (ulimit -u) or of this container (pids)"
        )


def startable_threads(wanted: int) -> int:
    """Return how many of `more` further threads this process can start: all, unless limited.

    Limits are those of the user (`ulimit -u`) and of the container (pids.max).
    """
    done, threads = threading.Event(), list[threading.Thread]()
    try:
        for _ in range(wanted):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:  # "can't start new thread"
        pass
    finally:
        done.set()
        for thread in threads:
            thread.join()
    return len(threads)


def probe_bf16() -> Bf16Probe:
    """Try products with operands in bf16 in a child process: a failure there cannot be caught.

    Some virtual machines advertise Intel's AMX and kill the process that uses it (SIGILL). For a
    processor without bf16 instructions no child is started. Otherwise this takes about two seconds,
    mostly for the child's import of torch.
    """
    flags = _cpu_flags()
    if flags and not flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return Bf16Probe(True, 0.0, "the processor has no bf16 instructions")
    # With one thread, the processor's time is that of the products.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = child.command("from fastbert.machine import try_bf16; try_bf16()")
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Bf16Probe(False, 0.0, f"the probe gave no answer in {PROBE_TIMEOUT_S} s")
    return judge_bf16(ended.returncode, ended.stdout, ended.stderr)


def try_bf16() -> None:
    """Print, as JSON, what the child of `probe_bf16` finds.

    These are the rates in fp32 and bf16, and whether the three products of a layer are right in
    bf16. Their factors are -1, 0 and 1, and their sums are integers below 256, so each result is
    exact in bf16, in whatever order it is added up.
    """
    import torch

    from fastbert_kernels import linear

    draw = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randint(-1, 2, shape, generator=draw).float().requires_grad_()
        for shape in ((250, 250), (250, 250), (250, 250))
    )
    y = linear(x, weight, operands=torch.bfloat16, impl="cpu")
    found = y, *torch.autograd.grad(y, (x, weight), dy)
    exact = x @ weight.T, dy @ weight, dy.T @ x
    right = all(map(torch.equal, found, exact))
    rates = [
        measure_gemm_rate(seconds=0.15, operands=operands, clock=time.process_time)
        for operands in (None, torch.bfloat16)
    ]
    print(json.dumps([right, *rates]))


def judge_bf16(returncode: int, stdout: str, stderr: str) -> Bf16Probe:
    """Conclude from the child's return code and from what it printed."""
    if returncode == -signal.SIGILL:
        advice = "set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 before the start"
        why = "a bf16 product kills the process (SIGILL): AMX is advertised but not available"
        return Bf16Probe(False, 0.0, f"{why}; {advice}")
    if returncode:
        last = (stderr.strip().splitlines() or ["no message"])[-1]
        return Bf16Probe(False, 0.0, f"the probe ended with {returncode}: {last}")
    right, fp32, bf16 = json.loads(stdout.strip().splitlines()[-1])
    if not right:
        return Bf16Probe(False, 0.0, "bf16 products have wrong values here")
    return Bf16Probe(
        True, bf16 / fp32, f"bf16 products run at {bf16 / fp32:.1f} times the fp32 rate"
    )


def _cpu_flags() -> set[str]:
    """Return the instruction sets that the Linux kernel lists; empty where it lists none."""
    for line in cpu_info():
        if line.lower().startswith(("flags", "features")):
            return set(line.partition(":")[2].split())
    return set()


def cpu_info() -> list[str]:
    """Return the lines of /proc/cpuinfo; empty where it cannot be read."""
    return _lines(Path("/proc/cpuinfo"))


def _lines(file: Path) -> list[str]:
    """Return the lines of a file of the system's; empty where it cannot be read."""
    try:
        return file.read_text().splitlines()
    except OSError:  # not Linux, or a file that this system does not have
        return []


def memory_sizes() -> tuple[int, int]:
    """Return total and free memory in bytes, bounded by the limit of the container."""
    import psutil

    machine = psutil.virtual_memory()
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroup v2, or the limit is the word "max"
        return machine.total, machine.available
    return min(machine.total, limit), min(machine.available, max(0, limit - used))
