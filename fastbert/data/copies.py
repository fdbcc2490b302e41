"""Finds documents that are exact copies of an earlier one, by a hash of their text."""

from __future__ import annotations

import numpy as np


class Seen:
    """The distinct hashes of a stream, as sorted arrays that are merged when they get many."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes, uint64 [N]; return whether each is the first of its kind, bool [N]."""
        # A stable sort keeps the first of equal hashes in front.
        order = np.argsort(hashes, kind="stable")
        first = np.zeros(len(hashes), bool)
        first[order] = np.append(True, np.diff(hashes[order]) != 0)[: len(hashes)]
        for run in self._runs:
            at = np.searchsorted(run, hashes).clip(max=len(run) - 1)
            first &= run[at] != hashes
        new = np.sort(hashes[first])
        # Each array is more than twice as long as the next, so there are few of them.
        while self._runs and len(self._runs[-1]) <= 2 * len(new):
            new = np.sort(np.concatenate([self._runs.pop(), new]), kind="stable")
        if len(new):
            self._runs.append(new)
        return first


def distinct(hashes: np.ndarray) -> np.ndarray:
    """Return the distinct hashes, uint64 ascending; np.unique is a slow hash table in numpy 2.4."""
    hashes = np.sort(hashes)
    return hashes[np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]]
