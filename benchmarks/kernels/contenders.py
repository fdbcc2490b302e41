"""Which contenders take part when a case is timed: those that run, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.harness.timing import Contender, differentiated
from benchmarks.kernels.rivals import Rival


def that_run(offered: Mapping[str, Rival | str]) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that ran once, forward and backward, and a line on each of the others."""
    found: dict[str, Contender] = {}
    notes: dict[str, str] = {}
    for name, rival in offered.items():
        if isinstance(rival, str):
            notes[name] = rival
            continue
        try:
            forward, gradients = rival
            result = forward()
            contender = differentiated(forward, gradients, torch.randn_like(result))
            contender.backward(result)
            found[name] = contender
        except Exception as failure:  # a rival may raise anything; the others are still measured
            notes[name] = (
                f"failed: {type(failure).__name__}: {str(failure).partition(chr(10))[0][:200]}"
            )
    return found, notes
