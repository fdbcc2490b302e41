"""What this machine is: usable cores, the rates of its matrix products and memory, and whether bf16 is safe and faster.

Rates are measured in the few shapes that an encoder has, in a fraction of a second each. torch is imported inside the functions, since
`fastbert doctor` must answer on a machine without it, too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert import child

if TYPE_CHECKING:
    import torch

# T, D, F of the products that are timed: a micro-batch of BERT-small. On the machines tried, BERT-mini to base come within a tenth.
GEMM_SHAPE = (2048, 512, 2048)
BANDWIDTH_BYTES = 256 * 1024**2  # well over the largest last-level cache
WORTH_IT = 1.3  # a step in bf16 also converts and keeps its sums in fp32: a smaller gain in the products alone would be lost
PROBE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Bf16Probe:
    """Whether matrix products in bf16 can be trusted on this processor, whether they pay, and why that is the answer."""

    safe: bool
    faster: bool
    why: str


def usable_cores() -> int:
    """Cores that this process may use; fewer than the machine has where its affinity was restricted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_gemm_rate(
    dtype: torch.dtype | None = None, seconds: float = 0.3, device: str = "cpu"
) -> float:
    """FLOP/s of the three products that a linear layer needs for a forward and a backward pass, with the threads that torch has now.

    The best round counts: whatever else runs on the machine can only make a round slower, so the best is nearest to its peak.

    Args:
        dtype: of the factors; fp32 by default. Where bf16 is not safe (see `probe_bf16`) measuring it kills the process.
        seconds: about how long to measure, a warm-up round not counted.
    """
    import torch

    from fastbert_kernels import linear

    T, D, F = GEMM_SHAPE
    x, weight, dy = (
        torch.randn(shape, device=device).to(dtype or torch.float32)
        for shape in ((T, D), (F, D), (T, F))
    )
    leaves = x.requires_grad_(), weight.requires_grad_()

    def layer() -> None:
        torch.autograd.grad(
            linear(x, weight, impl="cpu" if device == "cpu" else "reference"), leaves, dy
        )

    return 6.0 * T * D * F / _best(layer, seconds, device)


def measure_bandwidth(seconds: float = 0.3, device: str = "cpu") -> float:
    """Bytes/s of a copy between two buffers that no cache holds; what is read and what is written both count."""
    import torch

    source = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * BANDWIDTH_BYTES / _best(lambda: target.copy_(source), seconds, device)


def _best(work: Any, seconds: float, device: str) -> float:
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    work()
    wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        wait()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def probe_bf16() -> Bf16Probe:
    """Try bf16 products in a child process, since what can go wrong there cannot be caught.

    Some virtual machines advertise Intel's AMX and kill the process that uses it (SIGILL). A processor without bf16
    instructions is answered without a child. Else about two seconds, most of them the child's import of torch.
    """
    flags = _cpu_flags()
    if flags and not flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return Bf16Probe(True, False, "the processor has no bf16 instructions")
    import torch

    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = child.command("from fastbert.machine import print_rates; print_rates()")
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Bf16Probe(False, False, f"the probe gave no answer in {PROBE_TIMEOUT_S} s")
    return judge_bf16(ended.returncode, ended.stdout, ended.stderr)


def print_rates() -> None:
    """What the child of `probe_bf16` does: print the rates in fp32 and bf16 as JSON."""
    import torch

    print(
        json.dumps(
            [measure_gemm_rate(torch.float32, 0.15), measure_gemm_rate(torch.bfloat16, 0.15)]
        )
    )


def judge_bf16(returncode: int, stdout: str, stderr: str) -> Bf16Probe:
    """The answer from how the child ended and what it printed."""
    if returncode == -signal.SIGILL:
        cure = "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, set before the start, cures it"
        return Bf16Probe(
            False,
            False,
            f"a bf16 product kills the process (SIGILL): AMX is advertised but not there; {cure}",
        )
    if returncode:
        last = (stderr.strip().splitlines() or ["no message"])[-1]
        return Bf16Probe(False, False, f"the probe ended with {returncode}: {last}")
    fp32, bf16 = json.loads(stdout.strip().splitlines()[-1])
    ratio = bf16 / fp32
    return Bf16Probe(
        True,
        ratio >= WORTH_IT,
        f"bf16 products run at {ratio:.1f} times the fp32 rate ({WORTH_IT} pays)",
    )


def _cpu_flags() -> set[str]:
    """The instruction sets that the kernel lists; empty where it lists none."""
    for line in cpu_info():
        if line.lower().startswith(("flags", "features")):
            return set(line.partition(":")[2].split())
    return set()


def cpu_info() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
