"""How many floating-point operations a packed batch is worth. Pure Python: numbers in, a number out.

A multiplication and an addition are two operations; only matrix products are counted, as is usual for a share of the peak (MFU).
The backward pass costs twice the forward: a product with the weight for the input's gradient, one with the input for the weight's.

Source: Kaplan et al., 2020, "Scaling Laws for Neural Language Models", section 2.1 (there without the attention's n^2 term).
"""

from __future__ import annotations

from collections.abc import Sequence

from fastbert.config import ModelConfig

BACKWARD = 2.0  # times the forward pass


def training_flops(
    model: ModelConfig, vocab_size: int, lengths: Sequence[int], masked: int, pairs: int
) -> float:
    """Useful operations of one forward and backward pass: the definition of the model on real tokens, no padding.

    Every layer counts all its rows, and the head the masked ones only. The training step computes less than this, since the last
    layer is cut to the rows that a loss needs (`executed_flops`): the share of the peak reported from this number is therefore
    the one that may be compared with other trainers, and may in a small model come close to 1.

    Args:
        model: the encoder's sizes.
        vocab_size: V, rows of the tied decoder.
        lengths: tokens of each sequence of the batch, [CLS] and [SEP] counted.
        masked: M, masked positions over the whole batch.
        pairs: sequences that carry a next-sentence label.
    """
    return (1 + BACKWARD) * (
        model.num_hidden_layers * _layer(model, lengths) + _heads(model, vocab_size, masked, pairs)
    )


def executed_flops(
    model: ModelConfig, vocab_size: int, lengths: Sequence[int], masked: int, pairs: int
) -> float:
    """What a training step computes: as `training_flops`, the last layer's queries and feed-forward on masked and [CLS] rows only.

    The masked positions are taken to be spread over the sequences by length, as the masking does it.
    """
    full = (model.num_hidden_layers - 1) * _layer(model, lengths)
    return (1 + BACKWARD) * (
        full + _last_layer(model, lengths, masked) + _heads(model, vocab_size, masked, pairs)
    )


def _layer(model: ModelConfig, lengths: Sequence[int]) -> float:
    """Query, key, value and output (4 D^2), up and down (2 D F) for each token; scores and their sum over the values (2 n^2 D)."""
    D, F = model.hidden_size, model.intermediate_size
    return 2.0 * (sum(lengths) * (4 * D * D + 2 * D * F) + sum(n * n for n in lengths) * 2 * D)


def _last_layer(model: ModelConfig, lengths: Sequence[int], masked: int) -> float:
    """Keys and values of all tokens; everything else on R = masked + [CLS] rows."""
    D, F = model.hidden_size, model.intermediate_size
    T = sum(lengths)
    rows = masked + len(lengths)
    scores = sum(n * (1 + masked * n / T) for n in lengths) if T else 0.0
    return 2.0 * (T * 2 * D * D + rows * (2 * D * D + 2 * D * F) + scores * 2 * D)


def _heads(model: ModelConfig, vocab_size: int, masked: int, pairs: int) -> float:
    """The transform and the decoder on masked rows, the pooler and the two classes on [CLS]."""
    D = model.hidden_size
    return 2.0 * (masked * (D * D + D * vocab_size) + pairs * (D * D + 2 * D))
