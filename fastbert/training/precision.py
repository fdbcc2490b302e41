"""Resolves runtime.precision to fp32 or bf16 on this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastbert.errors import InputError
from fastbert.machine import Bf16Probe, probe_bf16


def resolve_precision(
    precision: str, device: torch.device, recipe: str, probe: Callable[[], Bf16Probe] = probe_bf16
) -> tuple[str, str]:
    """Choose fp32 or bf16.

    "auto" is bf16 on a GPU that has it, and fp32 on a CPU. On a CPU bf16 must be asked for, for two
    reasons. Its matrix products may run at twice the rate, but a small model's step is still
    slower. And a run must not change its precision with a measurement. Where bf16 is requested on a
    CPU, a child process tries it first (see machine.py), since some processors kill the process
    that multiplies in bf16.

    Args:
        precision: "fp32", "bf16" or "auto".
        device: where the run computes.
        recipe: its path, for messages.
        probe: tries bf16 on this CPU.

    Returns:
        "fp32" or "bf16", and the reason, for the log.

    Raises:
        InputError: bf16 was asked for where it is not safe.
    """
    if precision == "fp32":
        return "fp32", "the recipe says so"
    if device.type == "cuda":
        safe = torch.cuda.is_bf16_supported(including_emulation=False)
        why = "the GPU has bf16" if safe else "the GPU has no bf16"
    elif precision == "auto":
        return "fp32", "the default on a CPU"
    else:
        found = probe()
        safe, why = found.safe, found.why
    if precision == "bf16":
        if not safe:
            raise InputError(f'{recipe}: runtime.precision = "bf16": {why}; use "fp32" or "auto"')
        return "bf16", "the recipe says so"
    return ("bf16" if safe else "fp32"), why
