"""The plan of `prepare`: which segments of the text make a piece, and which train the vocabulary.

It follows from the sizes of the files. Segments are numbered in the order of the sources, and a
Feistel permutation of their numbers mixes the text at the scale of a segment. Consecutive ones of
that order make a piece of about PIECE_BYTES, in which they are in the order of the sources again.
So a text of one piece keeps its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastbert.data.permutation import permute
from fastbert.data.segments import SEGMENT_BYTES, File

# Bytes on disk. A piece is encoded by one task in one to two seconds.
PIECE_BYTES = 16 << 20
# Bytes that the vocabulary is trained on, spread evenly over the text.
VOCABULARY_BYTES = 64 << 20
_SEED = 0  # of the permutation, the same for every text


@dataclass(frozen=True)
class Part:
    """A part of a file: the number of the file, and that of its segment."""

    file: int
    segment: int


@dataclass(frozen=True)
class Plan:
    """How a text is divided among tasks.

    Args:
        files: the sources, in order.
        piece_bytes: text that one task encodes, about.
    """

    files: Sequence[File]
    piece_bytes: int = PIECE_BYTES

    @cached_property
    def first_segment(self) -> np.ndarray:
        """int64 [files + 1]: the number of each file's first segment."""
        return np.append(0, np.cumsum([file.segments for file in self.files])).astype(np.int64)

    @cached_property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)

    @cached_property
    def _sizes(self) -> np.ndarray:
        """int64 [segments], bytes."""
        sizes = np.empty(int(self.first_segment[-1]), np.int64)
        for file, first in zip(self.files, self.first_segment[:-1].tolist(), strict=True):
            if file.groups:
                sizes[first : first + file.segments] = np.diff(file.places)
            else:
                sizes[first : first + file.segments] = file.step or file.size
                last = first + file.segments - 1
                sizes[last] = file.size - (file.segments - 1) * file.step
        return sizes

    @cached_property
    def _pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """The segments by piece, in order within each; and where each piece begins."""
        count = len(self._sizes)
        order = permute(np.arange(count), count, _SEED, 0)
        sizes = self._sizes[order]
        large = sizes >= self.piece_bytes  # a piece of its own
        total = int(sizes[~large].sum())
        # Pieces of equal size, so that no worker gets a small rest.
        pieces = max(-(-total // self.piece_bytes), 1)
        small = np.where(large, 0, sizes)
        owner = (np.cumsum(small) - small) * pieces // max(total, 1)
        owner[large] = pieces + np.arange(int(large.sum()))
        # Pieces are numbered in the order in which they begin.
        _, first, owner = np.unique(owner, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        owner = rank[owner]
        sort = np.lexsort((order, owner))
        bounds = np.searchsorted(owner[sort], np.arange(len(first) + 1))
        return order[sort], bounds

    @property
    def pieces(self) -> int:
        """The number of pieces."""
        return len(self._pieces[1]) - 1

    def piece(self, number: int) -> list[Part]:
        """Return the segments of a piece, in the order of the sources."""
        segments, bounds = self._pieces
        return self._parts(segments[bounds[number] : bounds[number + 1]])

    def piece_size(self, number: int) -> int:
        """Return the bytes on disk of a piece."""
        segments, bounds = self._pieces
        return int(self._sizes[segments[bounds[number] : bounds[number + 1]]].sum())

    def stretch(self, ids: int, longest: int) -> float:
        """Return the mean bytes of token ids that follow one another as in the sources.

        A stretch is a segment, or a block of a file that is not cut. The mean is over the bytes.

        Args:
            ids: bytes of the ids of the whole text.
            longest: the most bytes of a stretch.
        """
        sizes = self._sizes * (ids / max(self.size, 1))
        return float((sizes * np.minimum(sizes, longest)).sum() / max(sizes.sum(), 1.0))

    def sample(self, most: int = VOCABULARY_BYTES) -> list[tuple[Part, int]]:
        """Return segments spread evenly over the text, and how many bytes to read of each.

        These are all segments, every second, every third, and so on; at most `most` bytes in all.
        """
        usual = np.minimum(self._sizes, SEGMENT_BYTES)
        stride = max(int(usual.sum()) // most, 1)
        while len(usual[::stride]) > 1 and usual[::stride].sum() > most:
            stride += 1
        chosen = np.arange(0, len(usual), stride)
        limits = _level(self._sizes[chosen], most)
        return list(zip(self._parts(chosen), limits.tolist(), strict=True))

    def _parts(self, segments: np.ndarray) -> list[Part]:
        files = np.searchsorted(self.first_segment, segments, "right") - 1
        local = segments - self.first_segment[files]
        return [Part(*pair) for pair in zip(files.tolist(), local.tolist(), strict=True)]


def _level(sizes: np.ndarray, most: int) -> np.ndarray:
    """Cut the largest sizes to one level, so that the sum is at most `most`; at least 1 each."""
    if sizes.sum() <= most:
        return sizes
    ascending = np.sort(sizes)
    left = len(sizes) - np.arange(len(sizes))
    # The level if all sizes before an index stay whole, and it and all behind it are cut.
    levels = (most - (np.cumsum(ascending) - ascending)) // left
    level = levels[np.argmax(levels <= ascending)]
    return np.minimum(sizes, max(int(level), 1))
