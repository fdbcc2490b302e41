"""Proposed tiles: benchmarks/kernels/proposed_tiles.json, with rows as in tiles.json.

    {"sm_90": {"attention_dkdv": [{"bits": 16, "size": 64, "BLOCK_Q": 64, "BLOCK_K": 128,
                                   "num_warps": 8, "num_stages": 3, "predicted_us": 182}]}}

They are timed against the present ones. A row replaces the present one of the same kernel, bits and
size. "predicted_us" is optional. Further text, such as "note", is for readers.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.results import Line
from benchmarks.kernels.tune import NOISE, Key
from fastbert_kernels._tiles import TABLE, Row, known_architecture

FILE = Path(__file__).parents[1] / "kernels/proposed_tiles.json"
PREDICTED = "predicted_us"


class Proposal(NamedTuple):
    key: Key
    row: Row  # complete, as in tiles.json
    predicted_us: float | None = None

    @property
    def tile(self) -> dict[str, Any]:
        """The tile as written to results.jsonl."""
        return {"kernel": self.key.kernel, **self.row}


def read_proposals(architecture: str, path: Path = FILE) -> list[Proposal]:
    """The proposals for an architecture; empty if there is no file, or nothing in it.

    Raises:
        ValueError: a row would not be valid in tiles.json; the message is one line.
    """
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        return []
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        kernels = table.get(architecture) or {}
        found = [_proposal(kernel, row) for kernel, rows in kernels.items() for row in rows]
    except (json.JSONDecodeError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path.name}: {type(error).__name__}: {error}; "
            'expected {architecture: {kernel: [row, ...]}}, rows with "bits" and "size"'
        ) from error
    present = json.loads(TABLE.read_text(encoding="utf-8"))[known_architecture(architecture)]
    for proposal in found:
        if proposal.key.kernel not in present:
            raise ValueError(
                f"{path.name}: {architecture}: {proposal.key.kernel} is not a kernel of "
                f"tiles.json, which has {', '.join(present)}"
            )
    return [proposal for proposal in found if proposal.row not in present[proposal.key.kernel]]


def _proposal(kernel: str, row: dict[str, Any]) -> Proposal:
    options = {
        name: value
        for name, value in row.items()
        if isinstance(value, int) and not isinstance(value, bool) and name != PREDICTED
    }
    return Proposal(Key(kernel, row["bits"], row["size"]), options, row.get(PREDICTED))


class Winner(NamedTuple):
    """Result of the proposals for one row of the table, over all cases that use it.

    Args:
        key: the row's key.
        row: the best proposal; None if the present row is better.
        ratio: time of the pass with the best proposal over that with the present row, geometric
            mean over the cases.
        cases: number of cases.
    """

    key: Key
    row: Row | None
    ratio: float
    cases: int


def winners(lines: Sequence[Line]) -> list[Winner]:
    """The winners, from the lines on tiles in results.jsonl.

    A row that was wrong or did not run in any one case cannot win.
    """
    ratios: dict[Key, dict[str, list[float]]] = {}
    rows: dict[str, Row] = {}
    failed: set[str] = set()
    for line in lines:
        if line["what"] != "tile":
            continue
        row = {name: value for name, value in line["tile"].items() if name != "kernel"}
        name = json.dumps(line["tile"], sort_keys=True)
        rows[name] = row
        found = ratios.setdefault(
            Key(line["tile"]["kernel"], row["bits"], row["size"]), {}
        ).setdefault(name, [])
        if "ratio" in line:
            found.append(line["ratio"])
        else:
            failed.add(name)
    result = []
    for key, trials in ratios.items():
        means = {
            name: statistics.geometric_mean(values)
            for name, values in trials.items()
            if values and name not in failed
        }
        best = min(means, key=lambda name: means[name], default=None)
        if best is None:
            result.append(Winner(key, None, 1.0, 0))
        else:
            result.append(
                Winner(
                    key, rows[best] if means[best] < NOISE else None, means[best], len(trials[best])
                )
            )
    return result
