"""Baselines: how well simple count models predict a masked token, to compare a training loss with.

For every held-out token w with its left and right neighbours l and r, in nats per token:

    unigram             p(w)
    left_bigram         p(w | l)
    two_sided_bigram    a p(w | l) + b p(w | r) + c p(w)
    two_sided_trigram   p(w | l, r), backing off to a mixture of the three terms above and of their
                        product, p(w | l) p(w | r) / p(w), normalised over the vocabulary

As in training, each neighbour is masked with probability HIDDEN, and a model then uses what is
left. Conditional models are interpolated with modified Kneser-Ney discounts. The weights of the
mixtures are fitted on a twentieth of the training tokens, which is not counted. A model that knows
only frequencies reaches the first baseline, and one that looks at one neighbour reaches the second.
A model below the last one has learned more than its two neighbours.

Source: Chen and Goodman, 1999, "An empirical study of smoothing techniques for language modeling",
section 3.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fastbert.data.split import Split, positions
from fastbert.machine import usable_cores

HIDDEN = 0.15 * 0.8  # mask_rate * mask_token of the default objective
TRAIN_TOKENS = 1 << 23  # counted at most; this takes 0.4 GB of memory
TUNE_TOKENS = 1 << 15
HELDOUT_TOKENS = 1 << 17
_GATHERED = 1 << 11  # documents at once
_COUNTED = 1 << 16  # words at once: bincount copies them as int64
_ROWS = 32  # contexts whose words are looked up at once
_STEPS = 30  # of expectation maximisation; the weights no longer change after ten


def measure(train: Split, heldout: Split, vocab_size: int) -> dict[str, float]:
    """Return the baselines in nats per token, and the numbers of tokens they are based on.

    The result is a pure function of the splits.
    """
    counted = _sample(train, TRAIN_TOKENS, vocab_size)
    tested = _sample(heldout, HELDOUT_TOKENS, vocab_size)
    cut = len(counted) - min(len(counted) // 20, TUNE_TOKENS)
    models = _Models(counted[:cut], vocab_size)
    test, tune = models.predict(tested, 2), models.predict(counted[cut:], 1)
    probabilities = {
        "unigram": test.unigram,
        "left_bigram": test.left,
        "two_sided_bigram": test.mix(tune.fit("left", "right", "unigram")),
        "two_sided_trigram": test.back_off(tune.fit("left", "right", "unigram", "product")),
    }
    # Values are rounded, because the last digits of a long sum differ between processors.
    result = {name: round(float(-np.log(p).mean()), 4) for name, p in probabilities.items()}
    return result | {
        "train_tokens": int((counted[:cut] != vocab_size).sum()),
        "heldout_tokens": len(test.unigram),
    }


def nats(
    train: Split, vocab_size: int, left: np.ndarray, word: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the loss of the unigram and of the left bigram at the given positions of a text.

    The models are counted as in `measure`.

    Args:
        train: the split that is counted.
        vocab_size: V.
        left: int64 [N], the token before each position; V for a boundary, -1 where it is masked.
        word: int64 [N], the token to predict at each position.

    Returns:
        The losses by model, float64 [N] each, in nats.
    """
    counted = _sample(train, TRAIN_TOKENS, vocab_size)
    before, here, _ = _neighbours(counted, vocab_size)
    unigram = _unigram(here, vocab_size)[word]
    part, rest = _Conditional(before, here, vocab_size + 1).look_up(np.maximum(left, 0), word)
    return {
        "unigram": -np.log(unigram),
        "left_bigram": -np.log(np.where(left < 0, unigram, part + rest * unigram)),
    }


def counts(train: Split, vocab_size: int) -> np.ndarray:
    """Return how often each token occurs in the text that `measure` counts, int64 [V]."""
    sample = _sample(train, TRAIN_TOKENS, vocab_size)
    return np.bincount(sample, minlength=vocab_size + 1)[:vocab_size]


def _unigram(words: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.full(vocab_size, 0.5)
    for part in np.array_split(words, 1 + len(words) // _COUNTED):
        counts += np.bincount(part, minlength=vocab_size)
    return counts / counts.sum()


def _sample(split: Split, most: int, boundary: int) -> np.ndarray:
    """Return about `most` tokens of documents that are spread evenly over the split, [N].

    `boundary`, the largest number, stands before, between and after the documents. The type is as
    small as possible: most of the time goes into memory that is touched for the first time.
    """
    documents = np.arange(0, split.documents, -(-split.tokens // most))
    starts, ends = (split.first_token(split.first_sentence(documents + i)) for i in (0, 1))
    lengths = ends - starts
    kept = np.cumsum(lengths) - lengths < most
    starts, lengths = starts[kept], np.minimum(lengths[kept], most)
    parts = [np.full(1, boundary, np.min_scalar_type(boundary))]
    for i in range(0, len(starts), _GATHERED):
        some = lengths[i : i + _GATHERED]
        tokens = split.gather(starts[i : i + _GATHERED], some).astype(parts[0].dtype)
        parts.append(np.insert(tokens, np.cumsum(some), boundary))
    return np.concatenate(parts)


def _neighbours(tokens: np.ndarray, boundary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the left neighbour, the token and the right neighbour of every token.

    Boundaries are not tokens.
    """
    around = np.concatenate([tokens[-1:], tokens, tokens[:1]])
    kept = tokens != boundary
    return around[:-2][kept], tokens[kept], around[2:][kept]


@dataclass(frozen=True)
class _Predictions:
    """Probabilities of each token under each model, float64 [N] unless stated otherwise."""

    unigram: np.ndarray
    left: np.ndarray  # p(w | l); the unigram where l is masked
    right: np.ndarray
    single: np.ndarray  # from the neighbour that is visible, if any
    pair: np.ndarray  # bool: both neighbours are visible
    product: np.ndarray  # 0 unless both are visible
    trigram: np.ndarray  # its discounted part
    trigram_rest: np.ndarray  # the probability mass left for the model it backs off to

    def fit(self, *parts: str) -> dict[str, float]:
        """Fit the weights of a mixture by expectation maximisation.

        Only tokens with both neighbours visible count.
        """
        p = np.stack([getattr(self, part) for part in parts])[:, self.pair]
        weights = np.full(len(p), 1 / len(p))
        for _ in range(_STEPS if p.size else 0):
            shares = weights[:, None] * p
            weights = (shares / shares.sum(0)).mean(1)
        return dict(zip(parts, weights.tolist(), strict=True))

    def mix(self, weights: dict[str, float]) -> np.ndarray:
        """Return the mixture where both neighbours are visible, else the single-neighbour model."""
        mixture = np.sum([weight * getattr(self, part) for part, weight in weights.items()], axis=0)
        return np.where(self.pair, mixture, self.single)

    def back_off(self, weights: dict[str, float]) -> np.ndarray:
        """Return the trigram, backing off to the mixture, where both neighbours are visible."""
        lower = self.mix(weights)
        return np.where(self.pair, self.trigram + self.trigram_rest * lower, lower)


class _Models:
    """Count models of a text."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        self.size = vocab_size + 1  # the boundary is a neighbour too
        left, word, right = _neighbours(tokens, vocab_size)
        self.unigram = _unigram(word, vocab_size)
        # The pairs take as long as left and right together.
        contexts = _joined(left, right, self.size, self.size), left, right
        # Sorting takes most of the time, and numpy sorts without Python's lock.
        with ThreadPoolExecutor(min(len(contexts), usable_cores())) as pool:
            self.between, self.after, self.before = pool.map(
                lambda context: _Conditional(context, word, self.size), contexts
            )

    def predict(self, tokens: np.ndarray, seed: int) -> _Predictions:
        left, word, right = _neighbours(tokens.astype(np.int64), self.size - 1)
        hidden = np.random.Generator(np.random.Philox(seed)).random((2, len(word))) < HIDDEN
        hidden &= np.stack([left, right]) != self.size - 1  # a boundary stands for [CLS] or [SEP]
        pair = ~hidden.any(0)
        # The overlap takes as long as all look-ups, which go on meanwhile.
        with ThreadPoolExecutor(1) as pool:
            overlap = pool.submit(self._overlap, left[pair], right[pair])
            trigram, trigram_rest = self.between.look_up(left * self.size + right, word)
            left_part, left_rest = self.after.look_up(left, word)
            right_part, right_rest = self.before.look_up(right, word)
        unigram = self.unigram[word]
        p_left = np.where(hidden[0], unigram, left_part + left_rest * unigram)
        p_right = np.where(hidden[1], unigram, right_part + right_rest * unigram)
        # The product is normalised by its sum over the vocabulary, the sum over v of
        # (part_l(v) + rest_l u(v)) (part_r(v) + rest_r u(v)) / u(v), where each part sums to
        # 1 - rest.
        a, b = left_rest[pair], right_rest[pair]
        total = overlap.result() + (1 - a) * b + a * (1 - b) + a * b
        product = np.zeros(len(word))
        product[pair] = p_left[pair] * p_right[pair] / unigram[pair] / total
        return _Predictions(
            unigram,
            p_left,
            p_right,
            np.where(hidden[0], p_right, p_left),
            pair,
            product,
            trigram,
            trigram_rest,
        )

    def _overlap(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the sum over v of part_l(v) part_r(v) / u(v) for each pair of neighbours."""
        pairs, inverse = np.unique(right * self.size + left, return_inverse=True)
        rights, lefts = np.divmod(pairs, self.size)
        sums = np.empty(len(pairs))
        # The words of the neighbour that was seen with fewer are looked up among the other's.
        fewer = self.after.seen(lefts) < self.before.seen(rights)
        for listed, dense, few, many, chosen in (
            (self.after, self.before, lefts, rights, fewer),
            (self.before, self.after, rights, lefts, ~fewer),
        ):
            sums[chosen] = _products(listed, dense, few[chosen], many[chosen], 1 / self.unigram)
        return sums[inverse]


def _products(
    listed: _Conditional,
    dense: _Conditional,
    few: np.ndarray,
    many: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """Return the sum over v of listed(v | few) dense(v | many) weights(v) for pairs of contexts.

    Args:
        listed, dense: the models, of which the discounted parts count.
        few, many: int64 [N], contexts of these.
        weights: float64 [V].

    Returns:
        float64 [N].
    """
    if not len(many):
        return np.zeros(0)
    order = np.argsort(many, kind="stable")
    edges = _edges(many[order])
    sums = np.empty(len(many))
    # The parts of some contexts of `dense`, as rows over the vocabulary.
    rows = np.zeros((_ROWS, len(weights)))
    for first in range(0, len(edges) - 1, _ROWS):
        bounds = edges[first : first + _ROWS + 1]
        pairs = order[bounds[0] : bounds[-1]]
        at, counts = dense.rows(many[order[bounds[:-1]]])
        filled = np.repeat(np.arange(len(counts)), counts), dense.words[at]
        rows[filled] = dense.parts[at] * weights[filled[1]]
        at, counts = listed.rows(few[pairs])
        row = np.repeat(np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)), counts)
        products = rows[row, listed.words[at]] * listed.parts[at]
        owner = np.repeat(np.arange(len(pairs)), counts)
        sums[pairs] = np.bincount(owner, products, minlength=len(pairs))
        rows[filled] = 0
    return sums


class _Conditional:
    """p(word | context), as a discounted part for the pairs seen and a rest for the back-off."""

    def __init__(self, contexts: np.ndarray, words: np.ndarray, size: int):
        self._size = size
        # Sorting 32-bit keys takes half the time of 64-bit keys.
        keys = _joined(contexts, words, int(contexts.max(initial=0)) + 1, size)
        keys.sort()
        pairs = _edges(keys)
        self._keys, counts = keys[pairs[:-1]].astype(np.int64), np.diff(pairs)
        pair_contexts, self.words = np.divmod(self._keys, size)
        # Where the words of each context begin; the last entry is the number of pairs.
        self._first = _edges(pair_contexts)
        self._contexts = pair_contexts[self._first[:-1]]
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        totals = np.add.reduceat(counts, self._first[:-1])
        self.parts = (counts - discounts) / np.repeat(totals, np.diff(self._first))
        rests = np.add.reduceat(discounts, self._first[:-1]) / totals
        self._rests = np.append(rests, 1.0)  # the last one is for a context that was never seen

    def look_up(self, contexts: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the discounted part of each pair and the rest of each context, float64 [N]."""
        keys = contexts * self._size + words
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        parts = np.where(self._keys[at] == keys, self.parts[at], 0.0)
        return parts, self._rests[self._index(contexts)]

    def seen(self, contexts: np.ndarray) -> np.ndarray:
        """Return how many words were seen in each context, int64 [N]."""
        index = self._index(contexts)
        return self._first[np.minimum(index + 1, len(self._contexts))] - self._first[index]

    def rows(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices into `words` and `parts` for the contexts, and their number for each.

        The indices of the contexts follow one another in the order of `contexts`.
        """
        first = self._first[self._index(contexts)]
        lengths = self.seen(contexts)
        return positions(first, lengths), lengths

    def _index(self, contexts: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(self._contexts, contexts), len(self._contexts) - 1)
        return np.where(self._contexts[at] == contexts, at, len(self._contexts))


def _joined(first: np.ndarray, second: np.ndarray, firsts: int, seconds: int) -> np.ndarray:
    """Return `first * seconds + second` in the smallest type; all are below `firsts`, `seconds`."""
    keys = first.astype(np.min_scalar_type(firsts * seconds))
    keys *= seconds
    keys += second
    return keys


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return the discounts of counts of 0, 1, 2, and 3 or more.

    They are clipped to bounds, because a small text does not determine them.
    """
    _, ones, twos, threes, fours = np.bincount(np.minimum(counts, 5), minlength=6)[:5].clip(1)
    share = ones / (ones + 2 * twos)
    one, two, three = (
        1 - 2 * share * twos / ones,
        2 - 3 * share * threes / twos,
        3 - 4 * share * fours / threes,
    )
    return np.array([0, one, two, three]).clip([0, 0.1, 0.2, 0.3], [0, 0.9, 1.8, 2.7])


def _edges(values: np.ndarray) -> np.ndarray:
    """Return where each run of equal values begins, and the length of `values` at the end."""
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1, [len(values)]])
