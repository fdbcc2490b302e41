"""Which tokens make an example: a pure function of (seed, epoch, index), so there is no state.

Pairs. A join is a position where one sentence ends and the next begins. Segment A is the text
before it, cut at its front. Segment B is the text after it, cut at its end. With segments =
"single" every join of the corpus is an example, and each side is one sentence. With "fill" a
document has ceil(tokens / room) joins, which are evenly spread and shift with every epoch, and each
side extends through the document up to its budget. A document of one sentence has no join and gives
no pair. A sentence longer than the budget of its side is cut.

NotNext. The examples form a ring, document by document. The wrong B of an example is the true B of
the example `shift` places further on. `shift` is uniform over [most, n - most], where `most` is the
largest number of examples of any document. So the two never come from the same document, and for a
uniform example the other one is uniform too. How much is cut is decided before the label, by a rule
that treats the two examples symmetrically. So A alone, and B alone, have the same distribution
under both labels, and neither reveals whether the pair is IsNext or NotNext. (Both lengths together
reveal a little, as in any text: at most 54 % accuracy on encyclopedia openings shorter than
max_length, 50 % on long documents.)

No pairs. With "single" an example is one sentence, cut at its end. With "fill" a document has
ceil(tokens / room) windows of up to `room` tokens. Together they cover the document, and they begin
at the start of a sentence where this leaves no token out. They overlap, and a tenth of them are cut
shorter. With "windows" there are as many, but each token is in exactly one: the document is divided
evenly, and each bound is moved to the start of a sentence where one is near enough.

Memory: 8 bytes per document of the split, for the number of examples before it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fastbert.config import ObjectiveConfig
from fastbert.data.example_counts import count_examples, room_for
from fastbert.data.permutation import permute
from fastbert.data.philox import Purpose, random_words, unit
from fastbert.data.split import Split, running_total
from fastbert.errors import InputError

# With segments = "fill":
LEAST_SHARE, MOST_SHARE = 0.15, 0.85  # A's share of the tokens of a pair
# This share of the examples aims at a random, shorter length, as in google-research/bert,
# create_pretraining_data.py.
SHORT_SHARE = 0.1


@dataclass(frozen=True)
class Spans:
    """The positions of the tokens of B examples in a split, or in several; all int64 [B]."""

    a_start: np.ndarray  # the first token of segment A
    a_length: np.ndarray  # its tokens; at least one
    b_start: np.ndarray
    b_length: np.ndarray  # 0 where the objective has no pairs, else at least one
    labels: np.ndarray  # 0 IsNext, 1 NotNext (as in transformers), -100 where there are no pairs
    keys: np.ndarray  # in [0, 2**63): a random function of (seed, epoch, index)
    index: np.ndarray  # the number within the epoch; in a mixture also the source (mixture.py)
    split: np.ndarray  # which of the stream's splits the positions are in; 0 where it has only one

    @property
    def ordinary(self) -> np.ndarray:
        """int64 [B]: tokens of A and B together."""
        return self.a_length + self.b_length

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B]: tokens including [CLS] and [SEP]."""
        return self.ordinary + 2 + (self.b_length > 0)

    @property
    def segments(self) -> tuple[np.ndarray, np.ndarray]:
        """The start and the length of every segment, int64 [2 * B], A before B."""
        starts = np.stack([self.a_start, self.b_start], 1).ravel()
        return starts, np.stack([self.a_length, self.b_length], 1).ravel()

    def take(self, order: np.ndarray) -> Spans:
        """Return the examples at these positions, in that order."""
        return Spans(*(getattr(self, f.name)[order] for f in fields(self)))

    @staticmethod
    def join(parts: list[Spans]) -> Spans:
        """Return all examples of the parts, one part after another."""
        columns = ([getattr(part, f.name) for part in parts] for f in fields(Spans))
        return Spans(*map(np.concatenate, columns))


class Examples:
    """The examples of one split.

    Args:
        split: of the dataset.
        objective: kind and segments are used.
        max_length: tokens of the longest example, including [CLS] and [SEP]; at least 8.
        seed: in [0, 2**63).
        source: names the split in errors.

    Raises:
        InputError: the split has no example, or one document holds so much of it that a wrong next
            sentence could come from the same document.
    """

    def __init__(
        self, split: Split, objective: ObjectiveConfig, max_length: int, seed: int, source: str
    ):
        self.split, self.pairs, self.seed = split, objective.pairs, seed
        self.single = objective.segments == "single"
        self.once = objective.segments == "windows"
        self.room = room_for(max_length, self.pairs)
        counts = count_examples(split, self.room, self.pairs, self.single)
        self._most = int(counts.max(initial=0))
        # Examples before each document; the last one is their total.
        self._before = running_total(counts)
        what = f'objective.kind = "{objective.kind}"'
        if len(self) == 0:
            raise InputError(
                f"{source}: none of its {split.documents} documents has two sentences, and {what} "
                "learns from a sentence and its next one; "
                'prepare other text or set objective.kind = "mlm"'
            )
        if self.pairs and len(self) < 2 * self._most:
            largest = int(np.diff(self._before).argmax())
            raise InputError(
                f"{source}: document {largest} gives {self._most} of the {len(self)} examples, "
                f"more than half: {what} cannot draw as many wrong next sentences from other "
                "documents; split this one into several, add text "
                'or set objective.kind = "mlm"'
            )

    def __len__(self) -> int:
        """Examples per epoch."""
        return int(self._before[-1])

    def draw(self, epoch: int, indices: np.ndarray, window: int = 0, first: int = 0) -> Spans:
        """Return the examples at these positions of the epoch's shuffled order.

        Args:
            epoch: below 2**32.
            indices: int64 [B], each in [first, first + len(self)).
            window: which window of the epoch the split is; see window_order.py.
            first: examples of the epoch in the windows before.
        """
        indices = np.asarray(indices, np.int64)
        places = permute(indices - first, len(self), self.seed, epoch, window)
        words = random_words(self.seed, Purpose.EXAMPLE, indices, epoch)
        keys = (words[0] >> np.uint64(1) << np.uint64(32) | words[1]).astype(np.int64)
        words = random_words(keys, Purpose.PAIR, np.zeros_like(keys))
        draw = self._draw_pairs if self.pairs else self._draw_windows
        return draw(places, keys, words, indices)

    def _draw_pairs(
        self, places: np.ndarray, keys: np.ndarray, words: np.ndarray, indices: np.ndarray
    ) -> Spans:
        # Word 0 gives the label (1 bit). The other 31 bits and 17 bits of word 1 give the shift:
        # with 48 bits, the probability of a shift deviates by a factor of 1 + n / 2**48 at most.
        labels = (words[0] >> np.uint64(31)).astype(np.int64)
        share = (words[0] & np.uint64((1 << 31) - 1)) << np.uint64(17) | words[1] >> np.uint64(15)
        shift = self._most + (share * 2.0**-48 * (len(self) - 2 * self._most + 1)).astype(np.int64)
        if self.single:
            fraction, target = np.full(len(places), 0.5), np.full(len(places), self.room)
        else:
            fraction = LEAST_SHARE + (MOST_SHARE - LEAST_SHARE) * unit(words[2])
            target = self._target_length(words[3], shortest=2)
        return Spans(
            *self.cut_pairs(places, (places + shift) % len(self), labels, fraction, target),
            labels,
            keys,
            indices,
            np.zeros_like(indices),
        )

    def cut_pairs(
        self,
        places: np.ndarray,
        others: np.ndarray,
        labels: np.ndarray,
        fraction: np.ndarray,
        target: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the first four fields of Spans for these examples.

        Args, all [B]:
            places: the examples.
            others: the examples whose B is taken where the label is 1.
            labels: 0 or 1.
            fraction: A's budget, as a fraction of the target.
            target: the largest number of tokens of A and B together; at least 2.
        """
        count = len(places)
        lowest, join, highest = self._joins(np.concatenate([places, others]), np.tile(fraction, 2))
        # The part of A's budget that neither of the two examples needs goes to B, and the other way
        # round. The larger of the two needs stays the same when the examples swap places, as they
        # do under the other label, so the budgets reveal nothing about the label.
        a_need, b_need = (
            np.maximum(need[:count], need[count:]) for need in (join - lowest, highest - join)
        )
        a_budget = np.clip(np.rint(fraction * target).astype(np.int64), 1, target - 1)
        a_length = np.minimum((join - lowest)[:count], np.maximum(a_budget, target - b_need))
        b_start = np.where(labels == 1, join[count:], join[:count])
        b_end = np.where(labels == 1, highest[count:], highest[:count])
        b_length = np.minimum(b_end - b_start, np.maximum(target - a_budget, target - a_need))
        return join[:count] - a_length, a_length, b_start, b_length

    def _draw_windows(
        self, places: np.ndarray, keys: np.ndarray, words: np.ndarray, indices: np.ndarray
    ) -> Spans:
        if self.single:
            document, number, _ = self._locate(places)
            sentence = self.split.first_sentence(document) + number
            start, end = self.split.first_token(np.stack([sentence, sentence + 1]))
            length = np.minimum(end - start, self.room)
        elif self.once:
            start, end = self._parts(places)
            length = end - start
        else:
            start, end = self._windows(places, unit(words[2]))
            length = np.minimum(end - start, self._target_length(words[3], shortest=1))
        nothing = np.zeros_like(start)
        labels = np.full_like(start, -100)
        return Spans(start, length, nothing, nothing, labels, keys, indices, nothing)

    def _joins(self, places: np.ndarray, fraction: np.ndarray) -> np.ndarray:
        """Return token offsets int64 [3, N]: A's earliest token, B's first and B's latest end."""
        document, number, count = self._locate(places)
        if self.single:
            sentence = self.split.first_sentence(document) + number
            return self.split.first_token(np.stack([sentence, sentence + 1, sentence + 2]))
        first, following = self.split.first_sentence(np.stack([document, document + 1]))
        begin, end = self.split.first_token(np.stack([first, following]))
        target = begin + ((number + fraction) * (end - begin) / count).astype(np.int64)
        return np.stack([begin, self._nearest_start(target, first + 1, following - 1), end])

    def _windows(self, places: np.ndarray, fraction: np.ndarray) -> np.ndarray:
        """Return token offsets int64 [2, N]: the start of a window, and the end of its document."""
        document, number, count = self._locate(places)
        first, following = self.split.first_sentence(np.stack([document, document + 1]))
        begin, end = self.split.first_token(np.stack([first, following]))
        # The document is divided evenly into `count` parts of at most `room` tokens. A window may
        # begin anywhere as long as it covers its part.
        latest = begin + number * (end - begin) // count
        earliest = np.maximum(begin, begin + (number + 1) * (end - begin) // count - self.room)
        target = earliest + (fraction * (latest - earliest + 1)).astype(np.int64)
        sentence = self._nearest_start(target, first, following - 1)
        starts = np.where((earliest <= sentence) & (sentence <= latest), sentence, target)
        return np.stack([starts, end])

    def _parts(self, places: np.ndarray) -> np.ndarray:
        """Return token offsets int64 [2, N]: the start and the end of a part of a document."""
        document, number, count = self._locate(places)
        first, following = self.split.first_sentence(np.stack([document, document + 1]))
        begin, end = self.split.first_token(np.stack([first, following]))
        # Both bounds of an even part may move by half of the room that it leaves.
        most = (self.room - -(-(end - begin) // count)) // 2

        def bound(number: np.ndarray) -> np.ndarray:
            even = begin + number * (end - begin) // count
            sentence = self._nearest_start(even, first, following - 1)
            inner = (number > 0) & (number < count)
            return np.where(inner & (np.abs(sentence - even) <= most), sentence, even)

        return np.stack([bound(number), bound(number + 1)])

    def _target_length(self, words: np.ndarray, shortest: int) -> np.ndarray:
        """Return the number of tokens to aim at, int64 [B].

        It is `room`, or for a tenth of the examples uniform in [shortest, room].
        """
        high, low = words >> np.uint64(16), words & np.uint64(0xFFFF)
        shorter = shortest + (low * 2.0**-16 * (self.room - shortest + 1)).astype(np.int64)
        return np.where(high < SHORT_SHARE * 2**16, shorter, self.room)

    def _locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return each example's document, its index within it, and the document's examples."""
        document = np.searchsorted(self._before, places, "right") - 1
        before = self._before[document]
        return document, places - before, self._before[document + 1] - before

    def _nearest_start(self, target: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Return the sentence start nearest to the token `target`, as a token offset.

        Args, all int64 [N]:
            target: token offset.
            low, high: first and last sentence to consider.
        """
        bottom, top = low, high
        while (bottom < top).any():  # bisection for the first sentence at or after the target
            middle = (bottom + top) >> 1
            is_before = self.split.first_token(middle) < target
            above = np.minimum(middle + 1, top)
            bottom, top = np.where(is_before, above, bottom), np.where(is_before, top, middle)
        before, after = self.split.first_token(np.stack([np.maximum(top - 1, low), top]))
        return np.where(np.abs(target - before) <= np.abs(after - target), before, after)
