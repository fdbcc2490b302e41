"""`fastbert doctor`: report what this machine has and can do, and advise what to change.

It takes about two seconds. torch is imported inside the functions, so that the command works on a
machine without torch.
"""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from fastbert.contention import wait_policy
from fastbert.machine import (
    Bf16Probe,
    cpu_info,
    cpu_quota,
    measure_bandwidth,
    measure_gemm_rate,
    memory_sizes,
    probe_bf16,
    processes_for,
    share_cores,
    usable_cores,
)

PACKAGES = ("torch", "triton", "deepspeed", "tokenizers", "safetensors", "transformers")


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are in FLOP/s, the bandwidth in bytes/s, the memory in bytes.

    `capability` is the compute capability, such as "9.0".
    """

    name: str
    capability: str
    memory: int
    gemm_fp32: float
    gemm_bf16: float
    bandwidth: float


@dataclass(frozen=True)
class Diagnosis:
    """The findings of `fastbert doctor`.

    Memory and disk are in bytes, rates in FLOP/s, bandwidth in bytes/s. None means that the value
    could not be measured. Training computes in `processes` where a step has enough sequences.
    """

    processor: str
    cores: int
    quota: float | None
    threads: int | None
    processes: int | None
    wait_policy: str | None
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


def diagnose() -> Diagnosis:
    """Inspect and measure this machine, and the disk of the current folder."""
    versions = {package: _version(package) for package in PACKAGES}
    tools = {tool: shutil.which(tool) for tool in ("g++", "ninja", "nvidia-smi")}
    memory, free = memory_sizes()
    threads = processes = policy = gemm = bandwidth = bf16 = None
    gpus: list[Gpu] = []
    if versions["torch"]:
        import torch

        threads = share_cores(1)
        processes, policy = processes_for(sys.maxsize, threads), wait_policy()
        gemm, bandwidth, bf16 = measure_gemm_rate(), measure_bandwidth(), probe_bf16()
        gpus = [_gpu(i) for i in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": usable_cores(),
        "quota": cpu_quota(),
        "threads": threads,
        "processes": processes,
        "wait_policy": policy,
        "memory": memory,
        "memory_free": free,
        "disk_free": shutil.disk_usage(".").free,
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
    """Return one line for each thing that is missing or slow, with what to do about it."""
    lines = [
        f"{name} is not installed: pip install {name}"
        for name in PACKAGES
        if not versions[name] and name != "triton"
    ]
    if gpus and not versions["triton"]:
        lines.append(
            "triton is not installed: pip install triton; without it, runtime.kernels = "
            '"reference" is the only choice on a GPU'
        )
    if tools["nvidia-smi"] and versions["torch"] and not gpus:
        lines.append("there is a GPU driver, but torch sees no GPU: install a torch built for CUDA")
    if not tools["g++"]:
        lines.append(
            "g++ is missing: apt-get install g++ "
            "(DeepSpeed compiles its CPU communication at first use)"
        )
    elif not tools["ninja"]:
        lines.append(
            "ninja is missing: pip install ninja "
            "(DeepSpeed compiles its CPU communication at first use)"
        )
    if threads and not gpus and threads < cores:
        lines.append(
            f"torch uses {threads} of {cores} cores: unset OMP_NUM_THREADS, or set it to {cores}"
        )
    if bf16 and not bf16.right and not gpus:
        lines.append(
            f'bf16 products do not work here: {bf16.why}; keep runtime.precision = "auto" or "fp32"'
        )
    if memory_free < 2 * 1024**3:
        lines.append(
            f"{_gib(memory_free)} of memory are free: lower batch.micro_batch_tokens, "
            "or close other programs"
        )
    if disk_free < 5 * 1024**3:
        lines.append(
            f"{_gib(disk_free)} of disk are free: a checkpoint takes 12 bytes per parameter; "
            "lower checkpoint.keep"
        )
    return lines


def describe(found: Diagnosis) -> list[tuple[str, str]]:
    """Return the rows of the printed table: name and value."""
    versions = {"Python": found.python, **found.versions}
    quota = f" (CPU quota {found.quota:.3g})" if found.quota else ""
    rows = [("processor", f"{found.processor}, {found.cores} cores{quota}")]
    if found.threads:
        uses = f"torch uses {found.threads}"
        if found.threads > 1:
            uses += f"; training computes in up to {found.processes} processes"
            uses += f"; threads wait {found.wait_policy}"
        rows.append(("threads", uses))
    rows += [
        ("memory", f"{_gib(found.memory)}, {_gib(found.memory_free)} free"),
        ("disk", f"{_gib(found.disk_free)} free here"),
        ("versions", ", ".join(f"{name} {version or '-'}" for name, version in versions.items())),
    ]
    if found.gemm_fp32 and found.bandwidth and found.bf16:
        rate = f"{found.gemm_fp32 / 1e9:,.0f} GFLOP/s in fp32"
        bandwidth = f"memory {found.bandwidth / 1e9:,.0f} GB/s"
        rows.append(("matrix products", f"{rate}; {bandwidth}"))
        rows.append(("bf16 on the CPU", _bf16(found.bf16)))
    for gpu in found.gpus:
        rates = (
            f"{gpu.gemm_bf16 / 1e12:,.0f} TFLOP/s in bf16, {gpu.gemm_fp32 / 1e12:,.0f} in fp32; "
            f"memory {gpu.bandwidth / 1e9:,.0f} GB/s"
        )
        rows.append(
            ("GPU", f"{gpu.name}, compute capability {gpu.capability}, {_gib(gpu.memory)}; {rates}")
        )
    return rows


def _bf16(probe: Bf16Probe) -> str:
    """What was found, and what `runtime.precision` makes of it."""
    if not probe.right:
        return f"NOT usable: {probe.why}"
    takes = "bf16" if probe.pays else "fp32"
    return f'right; {probe.why}; runtime.precision = "auto" takes {takes}'


def _gib(size: float) -> str:
    return f"{size / 1024**3:,.1f} GiB"


def _gpu(index: int) -> Gpu:
    import torch

    device = f"cuda:{index}"
    facts = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        fp32, bf16 = (
            measure_gemm_rate(dtype, 0.3, device) for dtype in (torch.float32, torch.bfloat16)
        )
        return Gpu(
            facts.name,
            f"{facts.major}.{facts.minor}",
            facts.total_memory,
            fp32,
            bf16,
            measure_bandwidth(0.3, device),
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in cpu_info():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
