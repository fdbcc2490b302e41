"""Predictions made before the measurements: predicted.json, by kind of GPU, case and pass."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert_kernels._tiles import Row

FILE = Path(__file__).with_name("predicted.json")
UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9}  # units of a predicted rate


def predicted_ms(
    device: str,
    case: str,
    which: str,
    rows: Mapping[str, Row] | None = None,
    work: float | None = None,
) -> float | None:
    """Predicted milliseconds of a pass; None without a prediction for this device and these tiles.

    Args:
        device: its name, as the driver reports it.
        case: name of the case.
        which: the pass.
        rows: the row of tiles that each kernel runs with.
        work: FLOP or bytes of the pass; needed if the prediction is a rate.
    """
    for entry in _entries(device):
        fits = all(
            (rows or {}).get(kernel, {}).get(name) == value
            for kernel, options in entry.get("where", {}).items()
            for name, value in options.items()
        )
        if entry["case"] == case and entry["pass"] == which and fits:
            if "ms" in entry:
                return entry["ms"]
            return next(
                (
                    1e3 * work / (entry[unit] * scale)
                    for unit, scale in UNITS.items()
                    if work and unit in entry
                ),
                None,
            )
    return None


@functools.cache
def _entries(device: str) -> list[dict[str, Any]]:
    table = json.loads(FILE.read_text(encoding="utf-8"))
    return next(
        (entries for kind, entries in table.items() if kind != "source" and kind in device), []
    )
