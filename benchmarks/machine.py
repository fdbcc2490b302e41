"""What a benchmark ran on: the lines at the head of each report, and the peaks that shares are taken of.

`python -m benchmarks.machine` prints it; exit code 2 without a GPU.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from fastbert.plan import GPUS

ROOT = Path(__file__).parents[1]


class Peak(NamedTuple):
    bf16: float  # dense matrix products, FLOP/s
    bandwidth: float  # bytes/s


# By the name that the driver gives. Source of the bandwidths: NVIDIA's data sheets, SXM parts.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": Peak(GPUS["a100"].bf16, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Peak(GPUS["a100"].bf16, 2.039e12),
    "NVIDIA H100 80GB HBM3": Peak(GPUS["h100"].bf16, 3.35e12),
    "NVIDIA H200": Peak(GPUS["h200"].bf16, 4.8e12),
}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def header(device: torch.device) -> dict[str, str]:
    """Device, driver, versions and commit, in the order in which reports print them."""
    gpu = device.type == "cuda"
    driver = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None
    changed = _said_by("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "device": device_name(device),
        "driver": driver.splitlines()[0] if driver else "-",
        "CUDA or HIP": (torch.version.cuda or torch.version.hip or "-") if gpu else "-",
        "torch": torch.__version__,
        "Triton": _version("triton"),
        "Python": platform.python_version(),
        "commit": (_said_by("git", "rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else ""),
    }


def header_line(facts: dict[str, str]) -> str:
    return ", ".join(value if name == "device" else f"{name} {value}" for name, value in facts.items())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _said_by(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in header(here).items():
        print(f"{name:12} {value}")
    sys.exit(0 if here.type == "cuda" else 2)
