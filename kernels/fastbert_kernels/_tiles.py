"""Block sizes of the Triton kernels: a table, `tiles.json`, and its look-up.

Nothing is tuned at run time. Ranks that tuned for themselves could pick different tiles, stall each
other and round differently. `python -m benchmarks.kernels.tune` regenerates the table on a GPU.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tiles.json")

Row = dict[str, Any]  # "bits" and "size", by which a row is found, and the launch options

_choosers: list[Callable[[str, Row], Row]] = []  # the tuner's: see `chosen_by`


@functools.cache
def _table() -> dict[str, dict[str, list[Row]]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def known_architecture(name: str) -> str:
    """Return the entry of the table that serves an architecture.

    That is its own entry, else the newest one of NVIDIA that is not newer, else that of AMD.
    """
    table = _table()
    if name in table:
        return name
    if not name.startswith("sm_"):
        return "gfx942"
    generations = sorted(
        int(known.removeprefix("sm_")) for known in table if known.startswith("sm_")
    )
    older = [g for g in generations if g <= int(name.removeprefix("sm_"))]
    return f"sm_{max(older, default=generations[0])}"


def tile(kernel: str, architecture: str, dtype: torch.dtype, size: int) -> dict[str, int]:
    """Return the launch options of a kernel: block sizes, num_warps, num_stages.

    Args:
        kernel: its name in the table, such as "attention_forward".
        architecture: "sm_90", "gfx942", ... (`_triton.architecture`).
        dtype: of the inputs; fp16 and bf16 share their rows.
        size: by what the rows of the table are ordered: head size, hidden size, ... The smallest
            row that is not smaller serves.
    """
    row = _row(kernel, architecture, dtype, size)
    for choose in _choosers:
        row = choose(kernel, row)
    return {name: value for name, value in row.items() if name not in ("bits", "size")}


@functools.cache
def _row(kernel: str, architecture: str, dtype: torch.dtype, size: int) -> Row:
    rows = _table()[known_architecture(architecture)][kernel]
    fitting = [row for row in rows if row["bits"] == dtype.itemsize * 8]
    row = min(
        (row for row in fitting if row["size"] >= size), key=lambda row: row["size"], default=None
    )
    return row or max(fitting, key=lambda row: row["size"])


def being_tuned() -> bool:
    """Whether this is inside `chosen_by`, where a tile may differ from one look-up to the next."""
    return bool(_choosers)


@contextlib.contextmanager
def chosen_by(choose: Callable[[str, Row], Row]) -> Generator[None]:
    """Inside, `choose(kernel, row of the table)` says which row serves; for the tuner.

    It also does in the thread of a backward pass.
    """
    _choosers.append(choose)
    try:
        yield
    finally:
        _choosers.remove(choose)
