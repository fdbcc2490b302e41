"""The batch of each step: a fixed set of examples, shared out evenly, in packs of limited size.

Example number g = step * sequences + k of a run is example g % n of epoch g // n. With several
sources, g gives the source and the number there (mixture.py), and with phases, the number of a
step's first example is a function of the step (phases.py). None of this depends on the number of
ranks, so there is no state to save.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fastbert.config import ObjectiveConfig, RunConfig
from fastbert.data.dataset import TokenDataset
from fastbert.data.examples import Examples, Spans
from fastbert.data.lanes import Facts, lanes_for
from fastbert.data.masking import Masking, selected_counts
from fastbert.data.packing import PackedBatch, pack, pack_texts
from fastbert.data.padding import pad
from fastbert.data.phases import Position, Stretch, Timetable
from fastbert.data.stream import Epochs, Stream
from fastbert.data.streams import Streams
from fastbert.errors import InputError

__all__ = ["Batches", "PackedBatch", "heldout_batches", "pack_texts"]

# They are not those of the run, so all runs on a dataset are evaluated on the same examples and
# masks.
HELDOUT_SEED = 0
HELDOUT_MASK_RATE = 0.15  # BERT's


class Batches:
    """Training batches.

    Args:
        dataset: its split "train" is read; or the datasets of a mixture, as in config.data.
        config: objective, batch, phase, stop, seed, weights and runtime.cuda_graphs are used.
        origin: where a branch of another run begins.

    Raises:
        InputError: the dataset has no example for this objective, or its vocabulary has no token
            to mask with; or the phases or the weights do not fit the datasets.
    """

    def __init__(
        self,
        dataset: TokenDataset | Sequence[TokenDataset],
        config: RunConfig,
        origin: Position | None = None,
    ):
        datasets = [dataset] if isinstance(dataset, TokenDataset) else dataset
        self.config = config
        self.streams = Streams(datasets, config)
        self.timetable = Timetable(config, self.streams, origin)
        if problem := self.timetable.epochs_problem():
            raise InputError(problem)
        self._packers = {
            (stretch.phase, stretch.era): self._packer(stretch)
            for stretch in self.timetable.stretches
        }

    def _packer(self, stretch: Stretch) -> _Packer:
        config = self.timetable.phases[stretch.phase].config
        longest = config.batch.max_length if config.runtime.cuda_graphs else None
        mixture = self.streams.mixture(self.timetable.eras[stretch.era])
        return _Packer(self.streams.datasets[0], mixture, config.objective, longest)

    @property
    def examples_per_epoch(self) -> int:
        """Examples of all sources together, at the recipe's max_length."""
        length = self.config.batch.max_length
        return sum(self.streams.epoch(i, length) for i in range(len(self.streams)))

    def check(self, world: int) -> None:
        """Raise InputError where a step has too few sequences for the ranks.

        A rank without a sequence would fall out of step with the others.
        """
        for stretch in self.timetable.stretches:
            phase = self.timetable.phases[stretch.phase]
            batch, sequences = phase.config.batch, stretch.sequences
            uneven = sequences % world != 0
            if sequences < world or (uneven and batch.micro_batch_tokens < 2 * batch.max_length):
                where = f"phase {phase.number}: " if self.config.phase else ""
                raise InputError(
                    f"{where}batch.sequences = {sequences} cannot be shared by {world} ranks in "
                    f"packs of batch.micro_batch_tokens = {batch.micro_batch_tokens}; "
                    f"make it a multiple of {world}"
                )

    def step(self, step: int, rank: int = 0, world: int = 1, at_once: int = 1) -> list[PackedBatch]:
        """Return this rank's packs of one step.

        Every rank gets the same number of packs, a multiple of `at_once`. No pack is empty, and
        none has more than `micro_batch_tokens / at_once` tokens, or one sequence.

        Args:
            step: counted from 0.
            rank: in [0, world).
            world: ranks that share the step.
            at_once: packs that a rank computes at once; at most its number of sequences.

        Raises:
            InputError: as `check`.
        """
        self.check(world)
        spans = self.draw(step)
        masked, pairs = self._packer_of(step).totals(spans)
        return self.pack(step, spans, Facts(masked, pairs, at_once), rank, world, at_once)

    def draw(self, step: int, lane: int = 0, lanes: int = 1) -> Spans:
        """Return the examples of a lane of a step, whose text is opened and verified; see lanes.py.

        Raises:
            InputError: it is damaged.
        """
        stretch = self.timetable.at(step)
        first = stretch.number + (step - stretch.first) * stretch.sequences
        begin, end = (first + stretch.sequences * n // lanes for n in (lane, lane + 1))
        return self._packer_of(step).stream.draw(np.arange(begin, end))

    def facts(self, step: int, spans: Spans, ranks: int, at_once: int = 1) -> Facts:
        """Return what the packs of these examples depend on, shared by `world` ranks."""
        bins = share_out(spans.lengths, ranks * at_once, self._limit(step, at_once))
        return Facts(*self._packer_of(step).totals(spans), len(bins) // ranks)

    def pack(
        self, step: int, spans: Spans, facts: Facts, rank: int, ranks: int, at_once: int = 1
    ) -> list[PackedBatch]:
        """Return a rank's packs of the examples of its lane.

        Args:
            step: counted from 0.
            spans: of the lane.
            facts: of the whole step; a rank gets as many packs as they say, or more where its lane
                needs more.
            rank, ranks: which rank of the lane, and how many it has.
            at_once: as in `step`.
        """
        limit, packs = self._limit(step, at_once), facts.packs // at_once
        bins = share_out(spans.lengths, ranks * at_once, limit, packs)
        return self._packer_of(step).packs(spans, bins[rank::ranks], facts.masked, facts.pairs)

    def lanes(self, world: int) -> int:
        """Return the number of lanes, the same in all phases; see lanes.py."""
        common = math.gcd(*(stretch.sequences for stretch in self.timetable.stretches))
        return lanes_for(world, common)

    def _limit(self, step: int, at_once: int) -> int:
        """Tokens of a pack, at most."""
        batch = self.timetable.phases[self.timetable.at(step).phase].config.batch
        return max(batch.micro_batch_tokens // at_once, batch.max_length)

    def _packer_of(self, step: int) -> _Packer:
        stretch = self.timetable.at(step)
        return self._packers[stretch.phase, stretch.era]


def heldout_batches(dataset: TokenDataset, config: RunConfig, sequences: int) -> list[PackedBatch]:
    """Return a fixed set of held-out examples with fixed masks.

    It is the same for every run with this objective and maximum length, whatever the share of
    tokens that it trains on: more masks leave fewer words to predict from, so losses at different
    shares could not be compared.

    Args:
        dataset: its split "heldout" is read.
        config: objective without its mask_rate, max_length and micro_batch_tokens are used.
        sequences: the number of examples; all of them where the split has fewer.

    Returns:
        Packs of at most `micro_batch_tokens` tokens; their totals are those of the whole set.

    Raises:
        InputError: the held-out split has no example for this objective.
    """
    objective = replace(config.objective, mask_rate=HELDOUT_MASK_RATE)
    examples = Examples(
        dataset.split("heldout"),
        objective,
        config.batch.max_length,
        HELDOUT_SEED,
        f"{dataset.path}: split heldout",
    )
    spans = examples.draw(0, np.arange(min(sequences, len(examples))))
    packer = _Packer(dataset, Epochs(examples), objective)
    bins = share_out(spans.lengths, 1, config.batch.micro_batch_tokens)
    return packer.packs(spans, bins, *packer.totals(spans))


class _Packer:
    """Reads the tokens of examples, masks them and packs them."""

    def __init__(
        self,
        dataset: TokenDataset,
        stream: Stream,
        objective: ObjectiveConfig,
        pad_for: int | None = None,
    ):
        # Where packs are padded to a few shapes: the length of the longest sequence allowed.
        self.pad_for = pad_for
        self.special = dataset.special
        self.objective = objective
        self.masking = Masking(dataset, objective)
        self.stream = stream

    def totals(self, spans: Spans) -> tuple[int, int]:
        """Return the masked tokens of these examples, and how many are pairs."""
        masked = int(selected_counts(spans.ordinary, self.objective).sum())
        return masked, int((spans.labels >= 0).sum())

    def packs(
        self, spans: Spans, packs: list[np.ndarray], masked_total: int, pairs_total: int
    ) -> list[PackedBatch]:
        """Return one batch for each array of positions in `spans`.

        Args:
            spans: examples.
            packs: positions in `spans`, one array for each batch.
            masked_total, pairs_total: masked tokens and pairs of the whole step.
        """
        return [self._pack(spans.take(order), masked_total, pairs_total) for order in packs]

    def _pack(self, spans: Spans, masked_total: int, pairs_total: int) -> PackedBatch:
        tokens = self.stream.tokens(spans)
        words = self.stream.begins_word(spans) if self.masking.needs_words else None
        seen, chosen = self.masking(tokens, spans.ordinary, spans.keys, words)
        packed, slots = pack(seen, spans.a_length, spans.b_length, self.special)
        # The tensors share the memory of the arrays.
        packed = replace(
            packed,
            masked_positions=torch.from_numpy(slots[chosen]),
            labels=torch.from_numpy(tokens[chosen]),
            next_sentence_labels=torch.from_numpy(spans.labels),
            dropout_seeds=torch.from_numpy(spans.keys),
            examples=torch.from_numpy(spans.index),
            masked_total=masked_total,
            pairs_total=pairs_total,
        )
        if self.pad_for is not None:
            packed = pad(packed, self.objective.mask_rate, self.pad_for)
        return packed.pinned() if torch.cuda.is_available() else packed


def share_out(lengths: np.ndarray, world: int, limit: int, least: int = 1) -> list[np.ndarray]:
    """Share sequences out over world * packs bins, with as few packs per rank as possible.

    No bin gets more than `limit` tokens. The longest sequences are placed first, each into the bin
    with the fewest tokens so far. So bins have similar sizes, and lengths within a bin descend. The
    attention on a CPU uses this order to process sequences of similar length together.

    Args:
        lengths: int64 [B], tokens; none above `limit`.
        world: number of ranks.
        limit: tokens.
        least: packs per rank, at least.

    Returns:
        world * packs arrays of positions, int64; rank r takes every world-th array from r on.

    Source: Graham, 1969, "Bounds on Multiprocessing Timing Anomalies" (longest processing time
    first).
    """
    order = np.argsort(-lengths, kind="stable")
    bins = world * max(least, -(-int(lengths.sum()) // (world * limit)))
    if bins == 1:
        return [order]
    while True:
        members: list[list[int]] = [[] for _ in range(bins)]
        loads = [(0, i) for i in range(bins)]
        for position, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
            load, lightest = loads[0]
            members[lightest].append(position)
            heapq.heapreplace(loads, (load + length, lightest))
        if max(loads)[0] <= limit:
            return [np.array(m, np.int64) for m in members]
        bins += world
