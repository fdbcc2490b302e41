"""Select the tokens to predict, and replace them (Devlin et al., 2019, section 3.1, task 1).

The number of selected tokens depends only on an example's length. So every rank knows the count of
the whole step without reading tokens. Which tokens are selected depends only on the example's key,
not on the batch it is in.
"""

from __future__ import annotations

import numpy as np

from fastbert.config import ObjectiveConfig
from fastbert.data.dataset import TokenDataset
from fastbert.data.philox import Purpose, below, random_words
from fastbert.errors import InputError

# A token's sort key: its example's index in the pack, 28 random bits, its index in the example. The
# widths are fixed. With widths that depend on the pack, ties between random bits, and so the masks,
# would depend on the batch.
PACK_BITS, RANDOM_BITS, PLACE_BITS = 18, 28, 18


def selected_counts(lengths: np.ndarray, objective: ObjectiveConfig) -> np.ndarray:
    """Return how many tokens of each example are selected: rounded, and at least one, int64 [B].

    Args:
        lengths: int64 [B], tokens of each example without [CLS] and [SEP]; at least 1.
    """
    return np.maximum(np.floor(objective.mask_rate * lengths + 0.5).astype(np.int64), 1)


def replaced_counts(
    selected: np.ndarray, objective: ObjectiveConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many selected tokens become [MASK], and how many another token, int64 [B] each.

    Both are rounded. The rest of the `selected` (int64 [B]) stay as they are.
    """
    masked = np.floor(objective.mask_token * selected + 0.5).astype(np.int64)
    other = np.floor(objective.random_token * selected + 0.5).astype(np.int64)
    return masked, np.minimum(other, selected - masked)


class Masking:
    """Selects and replaces tokens.

    Args:
        dataset: its vocabulary and special ids.
        objective: rates, and whether whole words are selected.

    Raises:
        InputError: the vocabulary has no ordinary token that could replace another.
    """

    def __init__(self, dataset: TokenDataset, objective: ObjectiveConfig):
        self.objective = objective
        self.mask_id = dataset.special.mask
        self.ordinary_ids = dataset.ordinary_ids
        if len(self.ordinary_ids) < 2:
            raise InputError(
                f"{dataset.path}: its vocabulary has {len(self.ordinary_ids)} ordinary tokens, "
                "and masking replaces some tokens by another one; "
                "prepare the text again with a larger vocabulary"
            )
        # The index of each id among the ordinary ones. Special ids, of which only [UNK] occurs in
        # text, get the number of ordinary ids.
        self._place = np.full(dataset.vocab_size, len(self.ordinary_ids))
        self._place[self.ordinary_ids] = np.arange(len(self.ordinary_ids))
        # The dataset says it of each token of its text, or with BERT's of each of the vocabulary.
        self.needs_words = objective.whole_word and dataset.has_words
        by_token = objective.whole_word and not dataset.has_words
        self._continues_word = dataset.continues_word if by_token else None

    def __call__(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        keys: np.ndarray,
        begins_word: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask a pack of examples.

        Args:
            tokens: int64 [N], the tokens of all examples without [CLS] and [SEP], one example after
                another. [UNK] counts as a token.
            lengths: int64 [B], tokens of each example; at least 1.
            keys: int64 [B], the examples' random keys.
            begins_word: bool [N], whether a word begins at the token; where `needs_words`.

        Returns:
            The tokens that the model sees, int64 [N], and the selected positions, int64 [M],
            ascending. The labels are `tokens` at these positions.
        """
        assert len(lengths) < 1 << PACK_BITS and lengths.max(initial=0) < 1 << PLACE_BITS
        selected = selected_counts(lengths, self.objective)
        starts = _starts(lengths)
        if self._continues_word is not None:
            begins_word = ~self._continues_word[tokens]
        order, draws = self._shuffle(lengths, starts, keys, begins_word)

        # Take the first `selected` of each example's shuffled tokens. `rank` is the index of each
        # among them: the first become [MASK], the next are replaced, the last stay.
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
        self,
        lengths: np.ndarray,
        starts: np.ndarray,
        keys: np.ndarray,
        begins_word: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return positions in random order within each example, and a random word per token.

        Returns:
            int64 [N] and uint64 [N].
        """
        example = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(example)) - starts[example]
        # One call of the generator gives two words to each of two neighbouring tokens.
        blocks = (lengths + 1) >> 1
        block_starts = _starts(blocks)
        block = np.arange(blocks.sum()) - np.repeat(block_starts, blocks)
        words = random_words(np.repeat(keys, blocks), Purpose.MASK, block)
        words = words.T.reshape(-1, 2)[2 * block_starts[example] + place]
        random = words[:, 0] >> np.uint64(32 - RANDOM_BITS)
        if begins_word is not None:
            # All tokens of a word get the bits of its first token, so they stay adjacent.
            begins = (place == 0) | begins_word
            random = random[begins][np.cumsum(begins) - 1]
        sort_key = (
            (example << (RANDOM_BITS + PLACE_BITS)).astype(np.uint64)
            | random << np.uint64(PLACE_BITS)
            | place.astype(np.uint64)
        )
        sort_key.sort()
        places = (sort_key & np.uint64((1 << PLACE_BITS) - 1)).astype(np.int64)
        return starts[example] + places, words[:, 1]

    def _another(self, tokens: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Replace each token by a different ordinary token, uniform over all others."""
        place = self._place[tokens]
        # One ordinary token is excluded unless the token itself is special. Ids from it on move up.
        drawn = below(draws, len(self.ordinary_ids) - (place < len(self.ordinary_ids)))
        return self.ordinary_ids[drawn + (drawn >= place)]


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Return where each run of these lengths begins when they follow one another."""
    return np.cumsum(lengths) - lengths
