"""The order of a dataset that is larger than memory: window by window.

In each epoch the blocks are permuted, and as many as fit `order.window` make a window; the last one
takes the remainder. A window is a split of its own: its examples are permuted, and the ring of
NotNext (examples.py) lies within it. So each block is read once an epoch, as a whole, and not at
random places. How well the sources of a corpus mix depends on the blocks in a window: with b blocks
of one source in it, a batch of S sequences has a chi square per degree of freedom of 1 + S / n,
where n is the number of pieces of one origin in the window.

The next window is opened by a thread while the current one is trained on. Every block is verified
when its window is opened, before an example of it is drawn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from fastbert.config import ObjectiveConfig
from fastbert.data.block_split import BlockSplit
from fastbert.data.block_table import Blocks, per_window
from fastbert.data.dataset import TokenDataset
from fastbert.data.example_counts import LENGTHS, count_examples, room_for
from fastbert.data.examples import Examples, Spans
from fastbert.data.permutation import permute
from fastbert.data.philox import Purpose
from fastbert.data.remote_blocks import BEHIND
from fastbert.data.split import running_total
from fastbert.data.stream import Epochs, SourceStream, draw_by, read_by
from fastbert.data.verify import AGAIN, THREADS
from fastbert.errors import InputError
from fastbert.machine import usable_cores

BLOCKS_AT_ONCE = 256  # of which examples are counted


def open_stream(
    dataset: TokenDataset, objective: ObjectiveConfig, max_length: int, seed: int, window: int
) -> SourceStream:
    """Return the training examples of a dataset.

    Args:
        dataset: its split "train" is read.
        objective, max_length, seed: as in Examples.
        window: bytes of token ids, as `order.window`. A dataset that fits one window is shuffled as
            a whole, in the order that it has on the disk.

    Raises:
        InputError: as Examples and Windows.
    """
    source, blocks = f"{dataset.path}: split train", dataset.blocks.get("train")
    if blocks is not None and blocks.windows(window) > 1:
        return Windows(blocks, objective, max_length, seed, window, source)
    return Epochs(Examples(dataset.split("train"), objective, max_length, seed, source))


class Windows:
    """The examples of blocks, window by window.

    Example number i is example i % n of epoch i // n, as in Epochs.

    Args:
        blocks: of a split.
        objective, max_length, seed, source: as in Examples.
        window: bytes of token ids.

    Raises:
        InputError: a window may have no example, or a document that holds more than half of its
            examples where they are pairs.
    """

    def __init__(
        self,
        blocks: Blocks,
        objective: ObjectiveConfig,
        max_length: int,
        seed: int,
        window: int,
        source: str,
    ):
        self.blocks, self.objective, self.max_length = blocks, objective, max_length
        self.seed, self.source = seed, source
        self.windows, self._per_window = blocks.windows(window), per_window(window)
        self._counts = count_by_block(blocks, objective, max_length)
        self._total = int(self._counts.sum())
        self._check(window)
        self._epochs: dict[int, _Epoch] = {}
        self._open: dict[int, Examples] = {}
        self._ahead: _Ahead | None = None
        self._dropped: int | None = None  # fetched windows before this one were freed

    def __len__(self) -> int:
        return self._total

    def draw(self, numbers: np.ndarray) -> Spans:
        epochs, indices = np.divmod(np.asarray(numbers, np.int64), len(self))
        windows = np.empty_like(epochs)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            first = self._epoch(epoch).first
            windows[chosen] = np.searchsorted(first, indices[chosen], "right") - 1
        windows += epochs * self.windows

        def draw(number: int, chosen: np.ndarray) -> Spans:
            epoch, window = divmod(number, self.windows)
            first = int(self._epoch(epoch).first[window])
            spans = self._window(number).draw(epoch, indices[chosen], window, first)
            return replace(spans, split=np.full_like(spans.split, number))

        spans = draw_by(windows, draw)
        self._keep(int(windows.min()), int(windows.max()))
        return spans

    def tokens(self, spans: Spans) -> np.ndarray:
        return read_by(
            spans.split,
            spans,
            np.int64,
            lambda n, own: self._window(n).split.gather(*own.segments),
        )

    def begins_word(self, spans: Spans) -> np.ndarray:
        return read_by(
            spans.split,
            spans,
            bool,
            lambda n, own: self._window(n).split.begins_word(*own.segments),
        )

    def blocks_of(self, number: int) -> Blocks:
        """Return the blocks of a window, in order; windows are counted over all epochs."""
        epoch, window = divmod(number, self.windows)
        return self.blocks.take(self._epoch(epoch).order[self._bounds(window)])

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            count = len(self.blocks)
            order = permute(np.arange(count), count, self.seed, number, purpose=Purpose.BLOCKS)
            before = running_total(self._counts[order])
            found = _Epoch(order, before[self._per_window * np.arange(self.windows)])
            near = {n: epoch for n, epoch in self._epochs.items() if abs(n - number) == 1}
            self._epochs = near | {number: found}
            return found
        return self._epochs[number]

    def _bounds(self, window: int) -> slice:
        """The places of a window's blocks in the order of an epoch."""
        last = window == self.windows - 1
        return slice(window * self._per_window, None if last else (window + 1) * self._per_window)

    def _window(self, number: int) -> Examples:
        if number not in self._open:
            ahead, self._ahead = self._ahead, None
            if ahead is not None and ahead.number == number:
                self._open[number] = ahead.result()
            else:
                self._open[number] = self._open_window(number, min(THREADS, usable_cores()))
        return self._open[number]

    def _keep(self, first: int, last: int) -> None:
        """Close all windows but these, and begin to open the one after them."""
        for number in [n for n in self._open if not first <= n <= last + 1]:
            del self._open[number]
        self._drop(first - BEHIND, last + 2)
        if last + 1 not in self._open and (self._ahead is None or self._ahead.number != last + 1):
            self._ahead = _Ahead(last + 1, lambda: self._open_window(last + 1, 1))

    def _drop(self, before: int, end: int) -> None:
        """Free the space of windows before one, but for blocks that are in those up to `end`."""
        if self.blocks.remote is None:
            return
        if self._dropped is None:
            self._dropped = max(before, 0)
        if before <= self._dropped:
            return
        near = {piece for n in range(before, end) for piece in self.blocks_of(n).pieces()}
        for number in range(self._dropped, before):
            blocks = self.blocks_of(number)
            gone = np.array([piece not in near for piece in blocks.pieces()])
            blocks.take(np.flatnonzero(gone)).drop()
        self._dropped = before

    def _open_window(self, number: int, threads: int) -> Examples:
        """Fetch a window's blocks where they are elsewhere, verify them, and map them."""
        blocks = self.blocks_of(number)
        blocks.fetch()
        problem = first_problem(blocks, threads)
        if problem and blocks.remote:  # the copy may be what a machine left that went down
            blocks.drop(again=True)
            blocks.fetch()
            problem = first_problem(blocks, threads)
        if problem:
            raise InputError(f"{problem}; {AGAIN}")
        examples = Examples(
            BlockSplit(blocks), self.objective, self.max_length, self.seed, self.source
        )
        epoch, window = divmod(number, self.windows)
        expected = self._counts[self._epoch(epoch).order[self._bounds(window)]].sum()
        if len(examples) != expected:
            raise InputError(
                f"{self.source}: a window has {len(examples):,} examples, and the table of blocks "
                f"says {expected:,}; {AGAIN}"
            )
        return examples

    def _check(self, size: int) -> None:
        """Check that any window has examples enough, whatever blocks come together in it."""
        # A window with a certain block has at least the examples of the smallest others besides.
        count = self._per_window
        smallest = np.sort(self._counts)[:count]
        least = np.maximum(self._counts, smallest[-1]) + smallest[:-1].sum()
        most = most_by_block(self.blocks, self.objective, self.max_length)
        advice = f"raise order.window (now {size / 2**20:,.0f} MiB)"
        if least.min() == 0:
            raise InputError(
                f"{self.source}: a window of {count:,} blocks may have no example: no document "
                f'with two sentences; {advice}, or set objective.kind = "mlm"'
            )
        wrong = self.objective.pairs & (least < 2 * most)
        if wrong.any():
            block = int(wrong.argmax())
            raise InputError(
                f"{self.source}: a window of {count:,} blocks may have only {int(least[block]):,} "
                f"examples, and a document in {self.blocks.name(block)} gives up to "
                f"{int(most[block]):,}, more than half: {advice}"
            )


@dataclass(frozen=True)
class _Epoch:
    """The order of an epoch."""

    order: np.ndarray  # int64 [N], the blocks in their order
    first: np.ndarray  # int64 [windows], the examples before each window


class _Ahead:
    """A window that a thread opens."""

    def __init__(self, number: int, make: Callable[[], Examples]):
        self.number = number
        self._found: Examples | BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(make,), name=f"window {number}", daemon=True
        )
        self._thread.start()

    def result(self) -> Examples:
        """Wait for the window; an exception of the thread is raised here."""
        self._thread.join()
        if isinstance(self._found, BaseException):
            raise self._found
        assert self._found is not None
        return self._found

    def _run(self, make: Callable[[], Examples]) -> None:
        try:
            self._found = make()
        except BaseException as error:
            self._found = error


def first_problem(blocks: Blocks, threads: int) -> str | None:
    """Return what is wrong with the first of these blocks that has something wrong, or None."""
    claims = blocks.claims()
    if threads == 1:
        return next(filter(None, (claim.problem(blocks.folder) for claim in claims)), None)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda claim: claim.problem(blocks.folder), claims)
        return next(filter(None, found), None)


def count_by_block(blocks: Blocks, objective: ObjectiveConfig, max_length: int) -> np.ndarray:
    """Return the number of examples of each block, int64 [N].

    The table has them for the usual lengths. For others, the offsets of all blocks are read.
    """
    pairs, entries = objective.pairs, blocks.entries
    if objective.segments == "single":
        return entries["sentences"].astype(np.int64) - entries["documents"] * int(pairs)
    if max_length in LENGTHS:
        return entries["examples"][:, int(pairs), LENGTHS.index(max_length)].astype(np.int64)
    if blocks.remote is not None:
        raise InputError(
            f"batch.max_length = {max_length}: {blocks.remote.url} is read in windows, and counts "
            f"examples only of {', '.join(map(str, LENGTHS))} tokens; choose one of these"
        )
    counts = list[np.ndarray]()
    for start in range(0, len(blocks), BLOCKS_AT_ONCE):
        some = blocks.take(np.arange(start, min(start + BLOCKS_AT_ONCE, len(blocks))))
        found = count_examples(BlockSplit(some), room_for(max_length, pairs), pairs, single=False)
        first = running_total(some.entries["documents"])[:-1]
        counts.append(np.add.reduceat(found, first))
    return np.concatenate(counts)


def most_by_block(blocks: Blocks, objective: ObjectiveConfig, max_length: int) -> np.ndarray:
    """Return a bound of the examples of a block's largest document, int64 [N]."""
    joins = blocks.entries["most_sentences"].astype(np.int64) - 1
    if objective.segments == "single":
        return joins if objective.pairs else joins + 1
    room = room_for(max_length, objective.pairs)
    count = -(-blocks.entries["most_tokens"].astype(np.int64) // room)
    return np.minimum(count, joins) if objective.pairs else count
