"""`History`: what metrics.jsonl says about a run, with its steps as columns of numbers."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

POINTS = 150  # of a smoothed line; each is the mean over a block of steps


class History:
    """Steps, evaluations and events of a run.

    A step or an evaluation that is done again, after a resume, replaces itself and all later ones.

    Args:
        keys: of a step's record, the ones to keep beside "step". Each takes 8 bytes a step, where
            the records of a run of a million steps would take 2 GB.

    Attributes:
        evaluations: the records of the evaluations.
        events: the records of all other events.
        bad: the numbers of the lines that cannot be read, from 1.
    """

    def __init__(self, keys: Iterable[str]):
        self._columns = {key: array("d") for key in ("step", *keys)}
        self.evaluations: list[Mapping[str, Any]] = []
        self.events: list[Mapping[str, Any]] = []
        self.bad: list[int] = []

    def __len__(self) -> int:
        return len(self._columns["step"])

    def add(self, record: Mapping[str, Any]) -> None:
        """Add an object of metrics.jsonl."""
        event, step = record.get("event"), record["step"]
        if event == "evaluate":
            while self.evaluations and self.evaluations[-1]["step"] >= step:
                self.evaluations.pop()
            self.evaluations.append(record)
        elif event is not None:
            self.events.append(record)
        else:
            steps = self._columns["step"]
            while steps and steps[-1] >= step:
                for column in self._columns.values():
                    column.pop()
            for key, column in self._columns.items():
                column.append(_number(record.get(key)))

    def read(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            self.add(record)

    def column(self, key: str) -> np.ndarray:
        """The values of all steps, float64 [steps]; NaN where there is none."""
        return np.array(self._columns[key])

    def smooth(self, key: str) -> tuple[list[float], list[float]]:
        """Means over at most POINTS blocks of steps, each placed at its block's middle."""
        values = self.column(key)
        known = ~np.isnan(values)
        steps, values = self.column("step")[known], values[known]
        block = max(1, -(-len(steps) // POINTS))
        starts = range(0, len(steps), block)
        x, y = ([float(a[i : i + block].mean()) for i in starts] for a in (steps, values))
        return x, y

    def evaluated(self, key: str) -> tuple[list[int], list[float]]:
        """The values of all evaluations that have one, and their steps."""
        found = [(e["step"], _number(e.get(key))) for e in self.evaluations]
        found = [(step, value) for step, value in found if not math.isnan(value)]
        return [step for step, _ in found], [value for _, value in found]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
