"""Which tokens make an example: a pure function of (seed, epoch, index), so the loader keeps no state.

Pairs. A join is a place where one sentence ends and the next begins. A is the text before it, cut at its front; B the text after it, cut at
its end. With segments = "single" every join of the corpus is an example and each side is one sentence; with "fill" a document has
ceil(tokens / room) joins, evenly spread and moved every epoch, and each side reaches through the document as far as its budget does.
A document of one sentence has no join and gives no pair; of a sentence longer than its side's budget the part beyond it is not seen.

NotNext. The examples stand on a ring, document by document. The wrong B of an example is the true B of the one `shift` places on, where
shift is uniform over [most, n - most] and `most` is the largest number of examples that any one document has: never the same document, and
for a uniform example the other one is uniform too. How much is cut is settled before the label, by a rule that treats the two examples
alike. So A alone, and B alone, are distributed alike under both labels, and nobody can tell IsNext from NotNext by either. (Both lengths
together tell a little, as in any text: at most 54 % right on encyclopedia openings shorter than max_length, 50 % on long documents.)

No pairs. With "single" an example is one sentence, cut at its end. With "fill" a document has ceil(tokens / room) windows of up to `room`
tokens, which together cover it all, and begin with a sentence where that leaves nothing out.

Memory: 8 bytes for each document of the split, the number of examples before it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fastbert.config import ObjectiveConfig
from fastbert.data.dataset import Split
from fastbert.data.permutation import permute
from fastbert.data.philox import Purpose, random_words, unit
from fastbert.errors import InputError

DOCUMENTS_AT_ONCE = (
    1 << 20
)  # while examples are counted, so that memory does not grow with temporaries
# With segments = "fill":
LEAST_SHARE, MOST_SHARE = 0.15, 0.85  # of the tokens of a pair, A's
SHORT_SHARE = 0.1  # of the examples aim at a random, shorter length, as in google-research/bert, create_pretraining_data.py


@dataclass(frozen=True)
class Spans:
    """Where the tokens of B examples lie in the split.

    Attributes, all int64 [B]:
        a_start, a_length: tokens of segment A; at least one.
        b_start, b_length: tokens of segment B; length 0 where the objective has no pairs, else at least one.
        labels: 0 IsNext, 1 NotNext (as in transformers), -100 where the objective has no pairs.
        keys: each example's own random key, in [0, 2**63): a function of (seed, epoch, index).
    """

    a_start: np.ndarray
    a_length: np.ndarray
    b_start: np.ndarray
    b_length: np.ndarray
    labels: np.ndarray
    keys: np.ndarray

    @property
    def ordinary(self) -> np.ndarray:
        """int64 [B]: tokens of A and B."""
        return self.a_length + self.b_length

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B]: tokens with [CLS] and [SEP]."""
        return self.ordinary + 2 + (self.b_length > 0)

    def take(self, order: np.ndarray) -> Spans:
        """The examples at these positions."""
        return Spans(*(getattr(self, f.name)[order] for f in fields(self)))

    @staticmethod
    def join(parts: list[Spans]) -> Spans:
        """All examples of several, one after another."""
        return Spans(
            *(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Spans))
        )


class Examples:
    """The examples of one split.

    Args:
        split: of the dataset.
        objective: its kind and segments matter here.
        max_length: tokens of the longest example, [CLS] and [SEP] counted; at least 8.
        seed: in [0, 2**63).
        source: names the split in errors.

    Raises:
        InputError: the split gives no example, or one document holds so much of it that NotNext would be drawn from itself.
    """

    def __init__(
        self, split: Split, objective: ObjectiveConfig, max_length: int, seed: int, source: str
    ):
        self.split, self.pairs, self.single, self.seed = (
            split,
            objective.pairs,
            objective.segments == "single",
            seed,
        )
        self.room = max_length - (3 if self.pairs else 2)
        self._before = self._count()
        self._most = int(np.diff(self._before).max(initial=0))
        what = f'objective.kind = "{objective.kind}"'
        if len(self) == 0:
            raise InputError(
                f"{source}: none of its {split.documents} documents has two sentences, and {what} learns from a sentence and its next one; "
                f'prepare other text or set objective.kind = "mlm"'
            )
        if self.pairs and len(self) < 2 * self._most:
            largest = int(np.diff(self._before).argmax())
            raise InputError(
                f"{source}: document {largest} gives {self._most} of the {len(self)} examples, more than half: {what} cannot draw as many "
                f'wrong next sentences from other documents; split this one into several, add text or set objective.kind = "mlm"'
            )

    def __len__(self) -> int:
        """Examples per epoch."""
        return int(self._before[-1])

    def draw(self, epoch: int, indices: np.ndarray) -> Spans:
        """The examples at these places of the epoch's shuffled order.

        Args:
            epoch: below 2**32.
            indices: int64 [B], each in [0, len(self)).
        """
        indices = np.asarray(indices, np.int64)
        places = permute(indices, len(self), self.seed, epoch)
        words = random_words(self.seed, Purpose.EXAMPLE, indices, epoch)
        keys = (words[0] >> np.uint64(1) << np.uint64(32) | words[1]).astype(np.int64)
        words = random_words(keys, Purpose.PAIR, np.zeros_like(keys))
        return (
            self._draw_pairs(places, keys, words)
            if self.pairs
            else self._draw_windows(places, keys, words)
        )

    def _draw_pairs(self, places: np.ndarray, keys: np.ndarray, words: np.ndarray) -> Spans:
        labels = (words[0] >> np.uint64(31)).astype(np.int64)
        # 48 bits for the shift: none is off its share by more than n / 2**48 of it.
        share = (words[0] & np.uint64((1 << 31) - 1)) << np.uint64(17) | words[1] >> np.uint64(15)
        shift = self._most + (share * 2.0**-48 * (len(self) - 2 * self._most + 1)).astype(np.int64)
        if self.single:
            fraction, target = np.full(len(places), 0.5), np.full(len(places), self.room)
        else:
            fraction, target = (
                LEAST_SHARE + (MOST_SHARE - LEAST_SHARE) * unit(words[2]),
                self._target_length(words[3], shortest=2),
            )
        return Spans(
            *self.cut_pairs(places, (places + shift) % len(self), labels, fraction, target),
            labels,
            keys,
        )

    def cut_pairs(
        self,
        places: np.ndarray,
        others: np.ndarray,
        labels: np.ndarray,
        fraction: np.ndarray,
        target: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The first four fields of Spans for these examples, and the others that give B where the label is 1.

        Args, all [B]:
            fraction: of the target, A's budget.
            target: ordinary tokens of A and B together, at most; at least 2.
        """
        count = len(places)
        lowest, join, highest = self._joins(np.concatenate([places, others]), np.tile(fraction, 2))
        # What neither of the two examples needs of A's budget goes to B's, and the other way. The larger need of the two is the same when
        # they change places, as they do under the other label: the budgets tell nothing of it.
        a_need, b_need = (
            np.maximum(need[:count], need[count:]) for need in (join - lowest, highest - join)
        )
        a_budget = np.clip(np.rint(fraction * target).astype(np.int64), 1, target - 1)
        a_length = np.minimum((join - lowest)[:count], np.maximum(a_budget, target - b_need))
        b_start = np.where(labels == 1, join[count:], join[:count])
        b_end = np.where(labels == 1, highest[count:], highest[:count])
        b_length = np.minimum(b_end - b_start, np.maximum(target - a_budget, target - a_need))
        return join[:count] - a_length, a_length, b_start, b_length

    def _draw_windows(self, places: np.ndarray, keys: np.ndarray, words: np.ndarray) -> Spans:
        if self.single:
            document, number, _ = self._locate(places)
            sentence = self.split.first_sentence(document) + number
            start, end = self.split.first_token(np.stack([sentence, sentence + 1]))
            length = np.minimum(end - start, self.room)
        else:
            start, end = self._windows(places, unit(words[2]))
            length = np.minimum(end - start, self._target_length(words[3], shortest=1))
        nothing = np.zeros_like(start)
        return Spans(start, length, nothing, nothing, np.full_like(start, -100), keys)

    def _joins(self, places: np.ndarray, fraction: np.ndarray) -> np.ndarray:
        """int64 [3, N], token offsets: the first token that A may have, the first one of B, and the end of what B may have."""
        document, number, count = self._locate(places)
        if self.single:
            sentence = self.split.first_sentence(document) + number
            return self.split.first_token(np.stack([sentence, sentence + 1, sentence + 2]))
        first, following = self.split.first_sentence(np.stack([document, document + 1]))
        begin, end = self.split.first_token(np.stack([first, following]))
        target = begin + ((number + fraction) * (end - begin) / count).astype(np.int64)
        return np.stack([begin, self._nearest_start(target, first + 1, following - 1), end])

    def _windows(self, places: np.ndarray, fraction: np.ndarray) -> np.ndarray:
        """int64 [2, N], token offsets: where a window begins, and the end of its document."""
        document, number, count = self._locate(places)
        first, following = self.split.first_sentence(np.stack([document, document + 1]))
        begin, end = self.split.first_token(np.stack([first, following]))
        # The document is divided evenly into `count` parts of at most `room` tokens; a window may begin wherever it covers its part.
        latest = begin + number * (end - begin) // count
        earliest = np.maximum(begin, begin + (number + 1) * (end - begin) // count - self.room)
        target = earliest + (fraction * (latest - earliest + 1)).astype(np.int64)
        sentence = self._nearest_start(target, first, following - 1)
        return np.stack(
            [np.where((earliest <= sentence) & (sentence <= latest), sentence, target), end]
        )

    def _target_length(self, words: np.ndarray, shortest: int) -> np.ndarray:
        """int64 [B]: ordinary tokens to aim at; `room`, or for a tenth of the examples anything from `shortest` to it."""
        high, low = words >> np.uint64(16), words & np.uint64(0xFFFF)
        shorter = shortest + (low * 2.0**-16 * (self.room - shortest + 1)).astype(np.int64)
        return np.where(high < SHORT_SHARE * 2**16, shorter, self.room)

    def _locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each place's document, its number among the document's examples, and how many those are."""
        document = np.searchsorted(self._before, places, "right") - 1
        before = self._before[document]
        return document, places - before, self._before[document + 1] - before

    def _nearest_start(self, target: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The first token, nearest to the token `target`, of a sentence from `low` to `high`, both included; int64 [N] all."""
        bottom, top = low, high
        while (bottom < top).any():  # bisection for the first sentence at or after the target
            middle = (bottom + top) >> 1
            is_before = self.split.first_token(middle) < target
            bottom, top = (
                np.where(is_before, np.minimum(middle + 1, top), bottom),
                np.where(is_before, top, middle),
            )
        before, after = self.split.first_token(np.stack([np.maximum(top - 1, low), top]))
        return np.where(np.abs(target - before) <= np.abs(after - target), before, after)

    def _count(self) -> np.ndarray:
        """int64 [documents + 1]: examples before each document; the last entry is their total."""
        before = np.zeros(self.split.documents + 1, np.int64)
        for start in range(0, self.split.documents, DOCUMENTS_AT_ONCE):
            documents = np.arange(start, min(start + DOCUMENTS_AT_ONCE, self.split.documents) + 1)
            first = self.split.first_sentence(documents)
            joins = np.diff(first) - 1
            if self.single:
                count = joins if self.pairs else joins + 1
            else:
                count = -(-np.diff(self.split.first_token(first)) // self.room)
                if (
                    self.pairs
                ):  # no more than there are joins: a very long sentence adds none, it is cut
                    count = np.minimum(count, joins)
            before[start + 1 : start + len(documents)] = count
        return np.cumsum(before)
