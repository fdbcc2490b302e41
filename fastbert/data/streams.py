"""The streams of a run's datasets: one for each source and maximum length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastbert.config import RunConfig
from fastbert.data.dataset import TokenDataset
from fastbert.data.mixture import BLOCK, Mixture, quotas, source_seed
from fastbert.data.stream import SourceStream
from fastbert.data.window_order import open_stream
from fastbert.errors import InputError

# Examples of a source whose mean length is taken for that of all. With a standard deviation of a
# third of the mean, the mean of this many has one of 0.3 %.
SAMPLE = 16_384
RATE_UNIT = BLOCK * SAMPLE  # `Streams.rate` counts tokens in parts of this size, in whole numbers


@dataclass(frozen=True)
class Era:
    """A part of a run in which the examples form one sequence, with its own numbers from 0."""

    max_length: int  # tokens
    quotas: tuple[int, ...]  # examples of each source in a block of the mixture
    first: tuple[int, ...]  # the running number of each source's first example


class Streams:
    """The train splits of a run's datasets as streams.

    Args:
        datasets: in the order of config.data.
        config: objective and seed are used.

    Raises:
        InputError: from any method: a split has no example for this objective.
    """

    def __init__(self, datasets: Sequence[TokenDataset], config: RunConfig):
        self.datasets, self._config = datasets, config
        self._found: dict[tuple[int, int], SourceStream] = {}
        self._lengths: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.datasets)

    def source(self, number: int, max_length: int) -> SourceStream:
        """The examples of one source."""
        if (number, max_length) not in self._found:
            self._found[number, max_length] = open_stream(
                self.datasets[number],
                self._config.objective,
                max_length,
                source_seed(self._config.seed, number),
                self._config.order.window,
            )
        return self._found[number, max_length]

    def epoch(self, number: int, max_length: int) -> int:
        """Return how many examples an epoch of a source has."""
        return len(self.source(number, max_length))

    def mixture(self, era: Era) -> Mixture:
        """The examples of an era."""
        streams = [self.source(i, era.max_length) for i in range(len(self))]
        return Mixture(streams, era.quotas, era.first, self._config.seed)

    def rate(self, era: Era) -> int:
        """Return the mean tokens of an example of an era, in parts of 1 / RATE_UNIT.

        It is estimated from the first examples of each source, so it is the same on every rank and
        after every resume, and no example of the run has to be drawn for it.
        """
        return sum(
            quota * self._sampled(i, era.max_length) for i, quota in enumerate(era.quotas) if quota
        )

    def quotas(self, config: RunConfig) -> tuple[int, ...]:
        """Return the examples of each source in a block, by the weights of a recipe or a phase.

        Raises:
            InputError: a weight above 0 is so small that it gives no example.
        """
        if len(self) == 1:
            return (BLOCK,)
        weights = self._weights(config)
        found = quotas(weights)
        for source, weight, quota in zip(config.sources, weights, found, strict=True):
            if weight and not quota:
                raise InputError(
                    f"data: {source.path} has a share of {weight / sum(weights):.2g} of the "
                    f"examples, less than 1 in {2 * BLOCK:,}; raise its weight or set it to 0"
                )
        return found

    def _weights(self, config: RunConfig) -> list[float]:
        weights = config.weights
        if isinstance(weights, tuple):
            return list(weights)
        given = [source.weight for source in config.sources if source.weight is not None]
        if weights is None and given:
            return given
        # Without any weights the shares are those of the sizes.
        exponent = float(weights.removeprefix("size^")) if weights else 1.0
        return [dataset.counts("train").tokens ** exponent for dataset in self.datasets]

    def _sampled(self, number: int, max_length: int) -> int:
        """Return the tokens of the first SAMPLE examples of a source."""
        if (number, max_length) not in self._lengths:
            spans = self.source(number, max_length).draw(np.arange(SAMPLE))
            self._lengths[number, max_length] = int(spans.lengths.sum())
        return self._lengths[number, max_length]
