"""The machine: device, driver, versions and installed packages.

Also checks whether matrix products and memory run at their usual rates.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.gpu.items import Item, Part, in_one_line, program
from benchmarks.harness.machine import header
from fastbert.machine import measure_bandwidth, measure_gemm_rate

OPTIONAL = (
    "pytest",
    "pytest_benchmark",
    "liger_kernel",
    "cut_cross_entropy",
    "flash_attn",
    "matplotlib",
)
ASKED = (
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "persistence_mode",
    "mig.mode.current",
    "compute_mode",
)


def items(part: Part) -> list[Item]:
    return [
        Item("machine", lambda _: machine(part)),
        Item("driver", lambda _: driver(part)),
        Item("rates", lambda _: rates(part)),
    ]


def machine(part: Part) -> None:
    device = part.place.device
    facts: dict[str, Any] = {**header(device)} | {
        "architecture": part.place.architecture,
        "processor cores": len(os.sched_getaffinity(0)),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "multiprocessors": properties.multi_processor_count,
            "memory GB": round(properties.total_memory / 1e9, 1),
            "L2 MB": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
            "cuDNN": torch.backends.cudnn.version(),
        }
    installed = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    tools = [name for name in ("nvidia-smi", "ncu", "gcc") if shutil.which(name)]
    part.results.add("machine", facts=facts, installed=installed, tools=tools)


def driver(part: Part) -> None:
    """Query each property separately, because another driver may not know one of them."""
    if not shutil.which("nvidia-smi"):
        return
    answers = {}
    for name in ASKED:
        command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=5)
            answers[name] = (
                said.stdout.splitlines()[0].strip() if said.returncode == 0 and said.stdout else "-"
            )
        except subprocess.SubprocessError as failure:
            answers[name] = in_one_line(failure)
    part.results.add("driver", answers=answers)


def rates(part: Part) -> None:
    """Measure the rates; they reveal a card that is throttled, shared or defective."""
    device, dry = str(part.place.device), part.place.dry
    seconds = 0.05 if dry else 0.3
    gemm = measure_gemm_rate(torch.float32 if dry else torch.bfloat16, seconds, device)
    peak = part.place.peak()
    bandwidth = measure_bandwidth(seconds, device)
    shares = (
        {}
        if dry
        else {
            "gemm_share_of_peak": gemm / peak.flops,
            "bandwidth_share_of_peak": bandwidth / peak.bandwidth,
        }
    )
    part.results.add("rates", gemm=gemm, bandwidth=bandwidth, peak=peak._asdict(), **shares)


if __name__ == "__main__":
    program("environment", items)
