"""The machine of a benchmark: the header of each report, and the peaks to which shares refer."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness.children import ROOT
from fastbert.machine import measure_bandwidth, measure_gemm_rate
from fastbert.planning.plan import GPUS


class Peak(NamedTuple):
    flops: float  # dense matrix products, FLOP/s: bf16 on a GPU, fp32 on a CPU
    bandwidth: float  # bytes/s
    source: str


# Keys are the names that the driver reports.
PEAKS = {
    name: Peak(GPUS[kind].bf16, GPUS[kind].bandwidth, "data sheet, bf16")
    for name, kind in (
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    )
}


def peak_of(device: torch.device) -> Peak:
    """The peak from the data sheet for a known GPU, else a measured one."""
    known = PEAKS.get(device_name(device))
    return known or Peak(
        measure_gemm_rate(device=str(device)),
        measure_bandwidth(device=str(device)),
        "measured: products in fp32, a copy",
    )


def device_name(device: torch.device) -> str:
    """The name from driver or system: "NVIDIA H200", "AMD EPYC 9B14, 2 cores, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"
    )


def folder_name(device: torch.device) -> str:
    """The folder for results of such a machine: "nvidia-h200", "amd-epyc-2-cores"."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{_processor()} {len(os.sched_getaffinity(0))} cores"
    )
    return folder_of(name)


def folder_of(machine: str) -> str:
    """The folder for results of a machine, by its name."""
    return "-".join(re.findall(r"[a-z0-9]+", machine.lower()))


def _processor() -> str:
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def header(device: torch.device) -> dict[str, str]:
    """Device, driver, versions and commit, in the order in which reports print them."""
    gpu = device.type == "cuda"
    driver = (
        _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None
    )
    changed = _said_by("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "device": device_name(device),
        "driver": driver.splitlines()[0] if driver else "-",
        "CUDA or HIP": (torch.version.cuda or torch.version.hip or "-") if gpu else "-",
        "torch": torch.__version__,
        "Triton": _version("triton"),
        "Python": platform.python_version(),
        "commit": (_said_by("git", "rev-parse", "--short", "HEAD") or "unknown")
        + (" with changes" if changed else ""),
    }


def header_line(facts: dict[str, str]) -> str:
    return ", ".join(
        value if name == "device" else f"{name} {value}" for name, value in facts.items()
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _said_by(*command: str) -> str | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
