"""Pad packs to a few shapes, so that a training step can be captured as a CUDA graph.

A captured step reads and writes fixed addresses, so it fits packs of one shape only. A shape here
is four numbers: tokens T, sequences B, masked tokens M, and the maximum sequence length, which is
`batch.max_length`. T and B are rounded up, and M follows from both, so a run sees only a few
shapes.

Padding changes no loss, no gradient and no count:

- An added sequence has one token, and the label -100, which the next-sentence loss ignores.
- Tokens after the last sequence get zeros from the attention, and zero gradients.
- An added masked token has the label -100, which the MLM loss ignores. Its position may be any that
  no loss reads yet, even one in a real sequence. The last layer computes that row, nothing reads
  it, and its gradient is zero.

The shape of a pack follows from the pack alone, after the sequences have been shared out over the
ranks. So padding changes neither the examples of a step nor their order.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastbert.data.packing import PackedBatch

IGNORED = -100  # the label that both losses ignore
# A size is rounded up to a number with this many significant binary digits: 5 digits give 16, 17,
# ..., 31, 32, 34, ..., 62, 64, 68 and so on. Share of padding in T, and number of distinct shapes,
# on the demo's text with three recipes (300, 300 and 60 steps):
#
#   digits of T      demo (T = 2,000)   mini (13,300)   base (16,400 to 32,700)
#   3                10.0 %,  3         7.2 %,  1       15.6 %,  3
#   4                 4.9 %,  5         3.8 %,  2        7.1 %,  4
#   5                 2.3 %,  9         1.9 %,  4        2.8 %,  5
#   6                 1.1 %, 16         0.9 %,  7        1.4 %,  7
#
# Each shape costs a capture, and memory for a set of gradients. The digits of B hardly matter,
# because an added sequence costs one token.
TOKEN_DIGITS = 5
SEQUENCE_DIGITS = 3


def pad(batch: PackedBatch, mask_rate: float, max_length: int) -> PackedBatch:
    """Return the same pack on the CPU, padded.

    Args:
        batch: not padded yet, as data/batches.py makes it. Of n tokens between [CLS] and the last
            [SEP], at most `mask_rate` n + 1 are masked.
        mask_rate: `objective.mask_rate`.
        max_length: the maximum sequence length of the run in tokens, `batch.max_length`.

    Returns:
        A pack whose `tokens`, `sequences` and totals are those of `batch`.
    """
    sequences, masked = batch.sequences, len(batch.labels)
    padded_sequences = round_up(sequences, SEQUENCE_DIGITS)
    added_sequences = padded_sequences - sequences
    padded_tokens = round_up(batch.tokens + added_sequences, TOKEN_DIGITS)
    padded_masked = math.ceil(mask_rate * (padded_tokens - 2 * padded_sequences)) + padded_sequences
    assert masked <= padded_masked

    bounds = np.append(
        batch.cu_seqlens.numpy(), batch.tokens + np.arange(1, added_sequences + 1, dtype=np.int32)
    )
    labels = np.full(padded_tokens, IGNORED)  # of every token
    free = np.ones(padded_tokens, bool)  # whether no loss reads the token
    positions = batch.masked_positions.numpy()
    labels[positions] = batch.labels.numpy()
    free[bounds[:-1]] = free[positions] = False
    last_free = np.flatnonzero(free)[::-1][: padded_masked - masked]
    chosen = np.sort(np.concatenate((positions, last_free)))
    return replace(
        batch,
        input_ids=_extended(batch.input_ids, padded_tokens, 0),
        token_type_ids=_extended(batch.token_type_ids, padded_tokens, 0),
        position_ids=_extended(batch.position_ids, padded_tokens, 0),
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=max_length,
        masked_positions=torch.from_numpy(chosen),
        labels=torch.from_numpy(labels[chosen]),
        next_sentence_labels=_extended(batch.next_sentence_labels, padded_sequences, IGNORED),
        dropout_seeds=_extended(batch.dropout_seeds, padded_sequences, 0),
        examples=_extended(batch.examples, padded_sequences, -1),
        padding_tokens=padded_tokens - batch.tokens,
        padding_sequences=added_sequences,
    )


def round_up(size: int, digits: int) -> int:
    """Return the smallest number >= `size` with at most `digits` significant binary digits."""
    unit = 1 << max(size.bit_length() - digits, 0)
    return -(-size // unit) * unit


def _extended(x: Tensor, size: int, value: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, size - len(x)), value=value)
