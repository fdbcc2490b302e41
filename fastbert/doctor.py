"""What this machine can do: `fastbert doctor`, and the two measurements that training asks for.

Everything is measured in the few shapes that an encoder has, in about two seconds. torch is imported inside the functions: a machine
without it gets an answer too.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
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
PACKAGES = ("torch", "triton", "deepspeed", "tokenizers", "safetensors", "transformers")


@dataclass(frozen=True)
class Bf16Probe:
    """Whether matrix products in bf16 can be trusted on this processor, whether they pay, and why that is the answer."""

    safe: bool
    faster: bool
    why: str


@dataclass(frozen=True)
class Gpu:
    """Rates in FLOP/s, bandwidth in bytes/s, memory in bytes; `capability` is the compute capability, such as 9.0."""

    name: str
    capability: str
    memory: int
    gemm_fp32: float
    gemm_bf16: float
    bandwidth: float


@dataclass(frozen=True)
class Diagnosis:
    """What `fastbert doctor` found. Memory and disk in bytes, rates in FLOP/s, bandwidth in bytes/s; None: could not be measured."""

    processor: str
    cores: int
    threads: int | None
    memory: int
    memory_free: int
    disk_free: int
    system: str
    python: str
    versions: dict[str, str | None]
    tools: dict[str, str | None]
    gemm_fp32: float | None
    bandwidth: float | None
    bf16: Bf16Probe | None
    gpus: list[Gpu]
    advice: list[str]


def measure_gemm_rate(dtype: torch.dtype | None = None, seconds: float = 0.3, device: str = "cpu") -> float:
    """FLOP/s of the three products that a linear layer needs for a forward and a backward pass, with the threads that torch has now.

    The best round counts: whatever else runs on the machine can only make a round slower, so the best is nearest to its peak.

    Args:
        dtype: of the factors; fp32 by default. Where bf16 is not safe (see `probe_bf16`) measuring it kills the process.
        seconds: about how long to measure, a warm-up round not counted.
    """
    import torch

    from fastbert_kernels import linear

    T, D, F = GEMM_SHAPE
    x, weight, dy = (torch.randn(shape, device=device).to(dtype or torch.float32) for shape in ((T, D), (F, D), (T, F)))
    leaves = x.requires_grad_(), weight.requires_grad_()

    def layer() -> None:
        torch.autograd.grad(linear(x, weight, impl="cpu" if device == "cpu" else "reference"), leaves, dy)

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
    command = child.command("from fastbert.doctor import print_rates; print_rates()")
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Bf16Probe(False, False, f"the probe gave no answer in {PROBE_TIMEOUT_S} s")
    return judge_bf16(ended.returncode, ended.stdout, ended.stderr)


def print_rates() -> None:
    """What the child of `probe_bf16` does: print the rates in fp32 and bf16 as JSON."""
    import torch

    print(json.dumps([measure_gemm_rate(torch.float32, 0.15), measure_gemm_rate(torch.bfloat16, 0.15)]))


def judge_bf16(returncode: int, stdout: str, stderr: str) -> Bf16Probe:
    """The answer from how the child ended and what it printed."""
    if returncode == -signal.SIGILL:
        cure = "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, set before the start, cures it"
        return Bf16Probe(False, False, f"a bf16 product kills the process (SIGILL): AMX is advertised but not there; {cure}")
    if returncode:
        last = (stderr.strip().splitlines() or ["no message"])[-1]
        return Bf16Probe(False, False, f"the probe ended with {returncode}: {last}")
    fp32, bf16 = json.loads(stdout.strip().splitlines()[-1])
    ratio = bf16 / fp32
    return Bf16Probe(True, ratio >= WORTH_IT, f"bf16 products run at {ratio:.1f} times the fp32 rate ({WORTH_IT} pays)")


def diagnose(folder: Path = Path()) -> Diagnosis:
    """Look at this machine, measure, and say what to do where something is missing. `folder`: whose disk counts."""
    versions = {package: _version(package) for package in PACKAGES}
    tools = {tool: shutil.which(tool) for tool in ("g++", "ninja", "nvidia-smi")}
    memory, free = _memory()
    threads = gemm = bandwidth = bf16 = None
    gpus: list[Gpu] = []
    if versions["torch"]:
        import torch

        threads = torch.get_num_threads()
        gemm, bandwidth, bf16 = measure_gemm_rate(), measure_bandwidth(), probe_bf16()
        gpus = [_gpu(i) for i in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": threads,
        "memory": memory,
        "memory_free": free,
        "disk_free": shutil.disk_usage(folder).free,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "tools": tools,
        "gemm_fp32": gemm,
        "bandwidth": bandwidth,
        "bf16": bf16,
        "gpus": gpus,
    }
    return Diagnosis(**found, advice=advise(**found))


def advise(
    *,
    versions: dict[str, str | None],
    tools: dict[str, str | None],
    cores: int,
    threads: int | None,
    memory_free: int,
    disk_free: int,
    bf16: Bf16Probe | None,
    gpus: list[Gpu],
    **_: Any,
) -> list[str]:
    """One line for each thing that is missing or slow, with what to do about it."""
    lines = [f"{name} is not installed: pip install {name}" for name in PACKAGES if not versions[name] and name != "triton"]
    if gpus and not versions["triton"]:
        lines.append("triton is not installed: pip install triton; without it a GPU has runtime.kernels = reference alone")
    if tools["nvidia-smi"] and versions["torch"] and not gpus:
        lines.append("there is a GPU driver, but torch sees no GPU: install a torch built for CUDA")
    if not tools["g++"]:
        lines.append("g++ is missing: apt-get install g++ (DeepSpeed compiles its CPU communication at first use)")
    elif not tools["ninja"]:
        lines.append("ninja is missing: pip install ninja (DeepSpeed compiles its CPU communication at first use)")
    if threads and not gpus and threads < cores:
        lines.append(f"torch uses {threads} of {cores} cores: unset OMP_NUM_THREADS, or set it to {cores}")
    if bf16 and not bf16.safe and not gpus:
        lines.append(f'bf16 is not safe here: {bf16.why}; keep runtime.precision = "auto" or "fp32"')
    if memory_free < 2 * 1024**3:
        lines.append(f"{_gib(memory_free)} of memory are free: lower batch.micro_batch_tokens, or close something")
    if disk_free < 5 * 1024**3:
        lines.append(f"{_gib(disk_free)} of disk are free: a checkpoint takes 12 bytes a parameter; lower checkpoint.keep")
    return lines


def describe(found: Diagnosis) -> list[tuple[str, str]]:
    """The rows of the table that a person reads."""
    versions = {"Python": found.python, **found.versions}
    rows = [
        ("processor", f"{found.processor}, {found.cores} cores" + (f", torch uses {found.threads}" if found.threads else "")),
        ("memory", f"{_gib(found.memory)}, {_gib(found.memory_free)} free"),
        ("disk", f"{_gib(found.disk_free)} free here"),
        ("versions", ", ".join(f"{name} {version or '-'}" for name, version in versions.items())),
    ]
    if found.gemm_fp32 and found.bandwidth and found.bf16:
        safe, faster = "safe" if found.bf16.safe else "NOT safe", "faster" if found.bf16.faster else "not faster"
        rows.append(("matrix products", f"{found.gemm_fp32 / 1e9:,.0f} GFLOP/s in fp32; memory {found.bandwidth / 1e9:,.0f} GB/s"))
        rows.append(("bf16", f"{safe}, {faster}: {found.bf16.why}"))
    for gpu in found.gpus:
        rates = f"{gpu.gemm_bf16 / 1e12:,.0f} TFLOP/s in bf16, {gpu.gemm_fp32 / 1e12:,.0f} in fp32; memory {gpu.bandwidth / 1e9:,.0f} GB/s"
        rows.append(("GPU", f"{gpu.name}, compute capability {gpu.capability}, {_gib(gpu.memory)}; {rates}"))
    return rows


def _gib(size: float) -> str:
    return f"{size / 1024**3:,.1f} GiB"


def _gpu(index: int) -> Gpu:
    import torch

    device = f"cuda:{index}"
    facts = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        fp32, bf16 = (measure_gemm_rate(dtype, 0.3, device) for dtype in (torch.float32, torch.bfloat16))
        return Gpu(facts.name, f"{facts.major}.{facts.minor}", facts.total_memory, fp32, bf16, measure_bandwidth(0.3, device))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> set[str]:
    """The instruction sets that the kernel lists; empty where it lists none."""
    for line in _cpuinfo():
        if line.lower().startswith(("flags", "features")):
            return set(line.partition(":")[2].split())
    return set()


def _processor() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []


def _memory() -> tuple[int, int]:
    """Total and free memory in bytes; the limit of the container counts where it is lower."""
    import psutil

    machine = psutil.virtual_memory()
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroup v2, or the limit is the word "max"
        return machine.total, machine.available
    return min(machine.total, limit), min(machine.available, max(0, limit - used))
