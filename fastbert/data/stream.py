"""An endless sequence of examples: what a run trains on, example number 0, 1, 2 and so on.

A stream is a pure function of the number, so it has no state. It knows where the tokens of its
examples are, which may be in several splits.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fastbert.data.examples import Examples, Spans


class Stream(Protocol):
    """A sequence of examples, and their tokens."""

    def draw(self, numbers: np.ndarray) -> Spans:
        """Return the examples of these numbers, int64 [B], each at least 0."""
        ...

    def tokens(self, spans: Spans) -> np.ndarray:
        """Return the token ids of examples, A before B, one example after another, int64 [T]."""
        ...

    def begins_word(self, spans: Spans) -> np.ndarray:
        """Return whether each of these tokens begins a word, bool [T]."""
        ...


class Epochs:
    """The examples of one split, shuffled anew in each epoch.

    Example number i is example i % n of epoch i // n.
    """

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        """Examples per epoch."""
        return len(self.examples)

    def draw(self, numbers: np.ndarray) -> Spans:
        epochs, indices = np.divmod(numbers, len(self.examples))
        drawn = [
            self.examples.draw(int(epoch), indices[epochs == epoch]) for epoch in np.unique(epochs)
        ]
        return drawn[0] if len(drawn) == 1 else Spans.join(drawn)

    def tokens(self, spans: Spans) -> np.ndarray:
        return self.examples.split.gather(*spans.segments)

    def begins_word(self, spans: Spans) -> np.ndarray:
        return self.examples.split.begins_word(*spans.segments)
