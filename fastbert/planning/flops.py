"""Floating-point operations of a packed batch. Pure Python: numbers in, a number out.

A multiplication and an addition count as two operations. Only matrix products are counted, as is
usual for model FLOPs utilisation (MFU). The backward pass costs twice the forward pass: one product
with the weight for the gradient of the input, and one with the input for the gradient of the
weight.

Source: Kaplan et al., 2020, "Scaling Laws for Neural Language Models", section 2.1 (there without
the n^2 term of the attention).
"""

from __future__ import annotations

from collections.abc import Sequence

from fastbert.config import BertConfig, ModelConfig

BACKWARD = 2.0  # times the forward pass


def training_flops(
    model: ModelConfig, vocab_size: int, lengths: Sequence[int], masked: int, pairs: int
) -> float:
    """Return the useful operations of one forward and backward pass.

    These are the operations of the model's definition on real tokens, without padding. Every layer
    counts all its rows, and the MLM head counts the masked rows only. The training step computes
    fewer operations, because the last layer is computed only for the rows that a loss reads
    (`executed_flops`). An MFU from this number can therefore be compared with that of other
    trainers, and can come close to 1 in a small model.

    Args:
        model: the encoder's sizes.
        vocab_size: V, rows of the tied decoder.
        lengths: tokens of each sequence of the batch, including [CLS] and [SEP].
        masked: M, masked positions of the whole batch.
        pairs: sequences that carry a next-sentence label.
    """
    layers = sum(_layer(model, i, lengths) for i in range(model.num_hidden_layers))
    return (1 + BACKWARD) * (layers + _heads(model, vocab_size, masked, pairs))


def executed_flops(
    model: ModelConfig,
    vocab_size: int,
    lengths: Sequence[int],
    masked: int,
    pairs: int,
    recompute: bool = False,
) -> float:
    """Return the operations that a training step computes.

    With `recompute`, the backward pass computes all layers but the last again.

    As `training_flops`, but the last layer's queries and feed-forward network are counted for the
    rows only that a loss reads. The masked positions are assumed to be spread over the sequences in
    proportion to their length, as the masking does it.
    """
    full = sum(_layer(model, i, lengths) for i in range(model.num_hidden_layers - 1))
    rest = _last_layer(model, lengths, masked) + _heads(model, vocab_size, masked, pairs)
    return (1 + BACKWARD) * (full + rest) + recompute * full


def _layer(model: ModelConfig, index: int, lengths: Sequence[int]) -> float:
    """Return the forward operations of a whole layer.

    Each token costs 4 D^2 for query, key, value and output, and 2 D F for the feed-forward network,
    or 3 D F for a gated one. Each pair of a query and a key that it sees costs 2 D for the score
    and its product with the value.
    """
    D, F, count = model.hidden_size, model.intermediate_size, model.feed_forward_matrices
    pairs = sum(visible_pairs(n, model.window_of(index)) for n in lengths)
    return 2.0 * (sum(lengths) * (4 * D * D + count * D * F) + pairs * 2 * D)


def visible_pairs(n: int, window: int | None) -> int:
    """Return how many pairs of a query and a key it sees a sequence of n tokens has.

    With a window of w, a token sees w others on each side, except near the ends.
    """
    if window is None or n <= window + 1:
        return n * n
    return n * (2 * window + 1) - window * (window + 1)


def _last_layer(model: ModelConfig, lengths: Sequence[int], masked: int) -> float:
    """Return the forward operations of the last layer.

    Keys and values are computed for all tokens, everything else for R rows. Those of BERT are the
    masked tokens and [CLS]. Those of ModernBERT are the masked tokens, but its queries are computed
    for all.
    """
    D, F, count = model.hidden_size, model.intermediate_size, model.feed_forward_matrices
    T, window = sum(lengths), model.window_of(model.num_hidden_layers - 1)
    bert = isinstance(model, BertConfig)
    rows, of_all = (masked + len(lengths), 2) if bert else (masked, 3)
    # The masked share of the pairs; BERT's [CLS] sees all n.
    scores = sum(bert * n + masked / T * visible_pairs(n, window) for n in lengths) if T else 0.0
    of_rows = (4 - of_all) * D * D + count * D * F
    return 2.0 * (T * of_all * D * D + rows * of_rows + scores * 2 * D)


def _heads(model: ModelConfig, vocab_size: int, masked: int, pairs: int) -> float:
    """Return the forward operations of the heads.

    The transform and the decoder run on masked rows, the pooler and the classifier on [CLS].
    """
    D = model.hidden_size
    return 2.0 * (masked * (D * D + D * vocab_size) + pairs * (D * D + 2 * D))


def muon_flops(model: ModelConfig, bf16: bool) -> float:
    """Return the FLOPs of Muon's Newton-Schulz iterations in one step, over all ranks.

    Each of five iterations has three products: x x', its square, and p x. Where the sides s < l of
    a matrix differ, in fp32, there are 17 products of s x s and two with the matrix itself.

    Source: fastbert/training/newton_schulz.py.
    """
    D, F = model.hidden_size, model.intermediate_size
    s, l = min(D, F), max(D, F)  # noqa: E741
    pair = 5 * (4 * s * s * l + 2 * s**3) if bf16 or s == l else 4 * s * s * l + 34 * s**3
    return float(model.num_hidden_layers * (4 * 30 * D**3 + model.feed_forward_matrices * pair))
