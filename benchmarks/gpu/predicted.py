"""What was predicted before anything was measured: predicted.json, by kind of GPU, case and pass."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert_kernels._tiles import Row

FILE = Path(__file__).with_name("predicted.json")
UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9}  # of rates


def predicted_ms(
    device: str,
    case: str,
    which: str,
    rows: Mapping[str, Row] | None = None,
    work: float | None = None,
) -> float | None:
    """Milliseconds of a pass, or None if nothing is on record for this device and these tiles.

    Args:
        device: its name, as the driver has it.
        rows: the row of the tiles that each kernel runs with.
        work: of the pass, FLOP or bytes; needed where a rate was predicted.
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
