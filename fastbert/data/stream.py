"""An endless sequence of examples: what a run trains on, example number 0, 1, 2 and so on.

A stream is a pure function of the number, so it has no state. It knows where the tokens of its
examples are, which may be in several splits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from fastbert.data.examples import Examples, Spans


class Stream(Protocol):
    """A sequence of examples, and their tokens."""

    def draw(self, numbers: np.ndarray) -> Spans:
        """Return the examples of these numbers, int64 [B], each at least 0.

        Raises:
            InputError: the text that they need is damaged.
        """
        ...

    def tokens(self, spans: Spans) -> np.ndarray:
        """Return the token ids of examples, A before B, one example after another, int64 [T]."""
        ...

    def begins_word(self, spans: Spans) -> np.ndarray:
        """Return whether each of these tokens begins a word, bool [T]."""
        ...


class SourceStream(Stream, Protocol):
    """The examples of one dataset, epoch by epoch."""

    def __len__(self) -> int:
        """Examples per epoch."""
        ...


class Epochs:
    """The examples of one split, reshuffled in each epoch.

    Example number i is example i % n of epoch i // n.
    """

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def draw(self, numbers: np.ndarray) -> Spans:
        epochs, indices = np.divmod(numbers, len(self.examples))
        return draw_by(epochs, lambda epoch, chosen: self.examples.draw(epoch, indices[chosen]))

    def tokens(self, spans: Spans) -> np.ndarray:
        return self.examples.split.gather(*spans.segments)

    def begins_word(self, spans: Spans) -> np.ndarray:
        return self.examples.split.begins_word(*spans.segments)


def draw_by(groups: np.ndarray, draw: Callable[[int, np.ndarray], Spans]) -> Spans:
    """Draw examples group by group, and return them in the order that was asked for.

    Args:
        groups: int64 [B], the group of each example.
        draw: takes a group and the positions of its examples in `groups`.
    """
    found = np.unique(groups).tolist()
    if len(found) == 1:
        return draw(found[0], np.arange(len(groups)))
    places = [np.flatnonzero(groups == group) for group in found]
    parts = [draw(group, chosen) for group, chosen in zip(found, places, strict=True)]
    order = np.concatenate(places)
    return Spans.join(parts).take(np.argsort(order))


def read_by(
    groups: np.ndarray, spans: Spans, dtype: type, read: Callable[[int, Spans], np.ndarray]
) -> np.ndarray:
    """Read the tokens of examples group by group, and return them in the order of `spans`.

    Args:
        groups: int64 [B], the group of each example.
        spans: the examples; there may be none.
        dtype: of the result.
        read: takes a group and its examples; returns a value for each of their tokens.
    """
    found = np.unique(groups).tolist()
    if len(found) == 1:
        return read(found[0], spans)
    of_token = np.repeat(groups, spans.ordinary)
    result = np.empty(len(of_token), dtype)
    for group in found:
        own = spans.take(np.flatnonzero(groups == group))
        result[of_token == group] = read(group, own)
    return result
