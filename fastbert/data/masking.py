"""Which tokens the model must guess, and what it sees in their place (Devlin et al., 2019, section 3.1, task 1).

How many are selected depends on an example's length alone, so that every rank knows the whole step's count without reading a token;
which ones depends on the example's key alone, not on the batch it is in.
"""

from __future__ import annotations

import numpy as np

from fastbert.config import ObjectiveConfig
from fastbert.data.dataset import TokenDataset
from fastbert.data.philox import Purpose, below, random_words
from fastbert.errors import InputError

# A token's place in the sort: its example's place in the pack, 28 random bits, its place in the example. Fixed widths: with widths that
# follow the pack, ties between random bits, and so masks, would depend on the batch.
PACK_BITS, RANDOM_BITS, PLACE_BITS = 18, 28, 18


def selected_counts(lengths: np.ndarray, objective: ObjectiveConfig) -> np.ndarray:
    """How many tokens of examples with so many ordinary ones (int64 [B], at least 1) are selected: rounded, at least one; int64 [B]."""
    return np.maximum(np.floor(objective.mask_rate * lengths + 0.5).astype(np.int64), 1)


def replaced_counts(
    selected: np.ndarray, objective: ObjectiveConfig
) -> tuple[np.ndarray, np.ndarray]:
    """How many of the selected (int64 [B]) become [MASK], and how many another token; rounded, the rest stay; int64 [B] each."""
    masked = np.floor(objective.mask_token * selected + 0.5).astype(np.int64)
    other = np.floor(objective.random_token * selected + 0.5).astype(np.int64)
    return masked, np.minimum(other, selected - masked)


class Masking:
    """Selects and replaces tokens.

    Args:
        dataset: its vocabulary and special ids.
        objective: rates, and whether whole words are selected.

    Raises:
        InputError: the vocabulary has no ordinary token to put in another's place.
    """

    def __init__(self, dataset: TokenDataset, objective: ObjectiveConfig):
        self.objective = objective
        self.mask_id = dataset.special.mask
        self.ordinary_ids = dataset.ordinary_ids
        if len(self.ordinary_ids) < 2:
            raise InputError(
                f"{dataset.path}: its vocabulary has {len(self.ordinary_ids)} ordinary tokens, and masking puts another one in place of some; "
                f"prepare the text again with a larger vocabulary"
            )
        # Place of each id among the ordinary ones; their number for the special ones, of which only [UNK] occurs in text.
        self._place = np.full(dataset.vocab_size, len(self.ordinary_ids))
        self._place[self.ordinary_ids] = np.arange(len(self.ordinary_ids))
        self._continues_word = dataset.continues_word if objective.whole_word else None

    def __call__(
        self, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask a pack of examples.

        Args:
            tokens: int64 [N], the ordinary tokens (without [CLS] and [SEP]) of all examples, end to end; [UNK] is one of them.
            lengths: int64 [B], how many each example has; at least 1.
            keys: int64 [B], the examples' random keys.

        Returns:
            What the model sees, int64 [N], and the selected positions, int64 [M], ascending; what it must say there is `tokens` at them.
        """
        assert len(lengths) < 1 << PACK_BITS and lengths.max(initial=0) < 1 << PLACE_BITS
        selected = selected_counts(lengths, self.objective)
        starts = _starts(lengths)
        order, draws = self._shuffle(tokens, lengths, starts, keys)

        # The first `selected` of each example's shuffled tokens, and each one's rank among them.
        rank = np.arange(selected.sum()) - np.repeat(_starts(selected), selected)
        chosen = order[rank + np.repeat(starts, selected)]
        masked, other = (
            np.repeat(count, selected) for count in replaced_counts(selected, self.objective)
        )
        seen = tokens.copy()
        seen[chosen[rank < masked]] = self.mask_id
        swapped = chosen[(rank >= masked) & (rank < masked + other)]
        seen[swapped] = self._another(tokens[swapped], draws[swapped])
        return seen, np.sort(chosen)

    def _shuffle(
        self, tokens: np.ndarray, lengths: np.ndarray, starts: np.ndarray, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions in random order within each example, int64 [N], and a further random word for each token, uint64 [N]."""
        example = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(tokens)) - starts[example]
        # One call of the generator gives two words to each of two neighbouring tokens.
        blocks = (lengths + 1) >> 1
        block_starts = _starts(blocks)
        block = np.arange(blocks.sum()) - np.repeat(block_starts, blocks)
        words = random_words(np.repeat(keys, blocks), Purpose.MASK, block).T.reshape(-1, 2)[
            2 * block_starts[example] + place
        ]
        random = words[:, 0] >> np.uint64(32 - RANDOM_BITS)
        if (
            self._continues_word is not None
        ):  # all tokens of a word get the bits of its first one, and so come together
            begins = (place == 0) | ~self._continues_word[tokens]
            random = random[begins][np.cumsum(begins) - 1]
        sort_key = (
            (example << (RANDOM_BITS + PLACE_BITS)).astype(np.uint64)
            | random << np.uint64(PLACE_BITS)
            | place.astype(np.uint64)
        )
        sort_key.sort()
        return starts[example] + (sort_key & np.uint64((1 << PLACE_BITS) - 1)).astype(
            np.int64
        ), words[:, 1]

    def _another(self, tokens: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """An ordinary token different from each of these: uniform over all others."""
        place = self._place[tokens]
        drawn = below(draws, len(self.ordinary_ids) - (place < len(self.ordinary_ids)))
        return self.ordinary_ids[drawn + (drawn >= place)]


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of several runs begins when they lie end to end."""
    return np.cumsum(lengths) - lengths
