"""Packed batches: sequences one after another, without padding, as the model reads them.

A sequence is [CLS] A [SEP] B [SEP], or [CLS] A [SEP]. Its token types are 0 up to and including the
first [SEP], and 1 after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.data.manifest import SpecialIds


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of T tokens in all, of which M are selected for prediction.

    Attributes:
        input_ids: int64 [T].
        token_type_ids: int64 [T], 0 in [CLS] A [SEP], 1 in B [SEP].
        position_ids: int64 [T], counted from 0 in each sequence.
        cu_seqlens: int32 [B + 1], where each sequence begins; the last entry is T.
        max_seqlen: tokens of the longest sequence.
        masked_positions: int64 [M], ascending, indices into the T tokens.
        labels: int64 [M], the original tokens at these positions.
        next_sentence_labels: int64 [B], 0 IsNext, 1 NotNext, -100 where there is no pair.
        dropout_seeds: int64 [B], not negative; an example has the same seed in every pack.
        examples: int64 [B], index within the epoch, or within the input of `pack_texts`.
        masked_total, pairs_total: totals of the whole step, over all its packs and ranks. The sums
            of the two losses are divided by them.
        padding_tokens, padding_sequences: how many of T and of B are padding (data/padding.py).
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    masked_positions: Tensor
    labels: Tensor
    next_sentence_labels: Tensor
    dropout_seeds: Tensor
    examples: Tensor
    masked_total: int
    pairs_total: int
    padding_tokens: int = 0
    padding_sequences: int = 0

    @property
    def tokens(self) -> int:
        return len(self.input_ids) - self.padding_tokens

    @property
    def sequences(self) -> int:
        return len(self.examples) - self.padding_sequences

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the same batch on another device; the copy is asynchronous if it is `pinned`."""
        whole = self._whole()
        if whole is not None:
            return self._cut(whole.to(device, non_blocking=True))
        return replace(self, **{name: x.to(device) for name, x in self._tensors().items()})

    def pinned(self, page_locked: bool = True) -> PackedBatch:
        """Return the same batch in one piece of page-locked memory.

        `to` copies such a batch to a GPU in one asynchronous copy. A copy from ordinary memory
        waits for everything queued on the GPU, and there would be nine of them. The one copy is
        queued like a kernel on the current stream, and should take about 20 us for 16,384 tokens
        (an estimate). torch keeps the memory alive until the copy is done, even if the batch has
        been deleted by then.
        """
        joined = self.buffer(pin_memory=page_locked)
        joined.take_over(self)
        return joined

    def buffer(self, **options: Any) -> PackedBatch:
        """Return uninitialised tensors of the same sizes in one piece of memory.

        `options` are those of `torch.empty`.
        """
        words = sum(_words(x) for x in self._tensors().values())
        return self._cut(torch.empty(words, dtype=torch.int64, **options))

    def take_over(self, other: PackedBatch) -> None:
        """Copy the contents of a batch of the same sizes.

        This is one asynchronous copy where both batches are in one piece and `other` is `pinned`.
        """
        mine, theirs = self._whole(), other._whole()
        pairs = (
            zip(self._tensors().values(), other._tensors().values(), strict=True)
            if mine is None or theirs is None
            else [(mine, theirs)]
        )
        for to, source in pairs:
            to.copy_(source, non_blocking=True)

    def as_numpy(self) -> dict[str, Any]:
        """Return the fields by name, tensors as arrays, which pickle faster than tensors do."""
        arrays = {name: x.numpy() for name, x in self._tensors().items()}
        return {f.name: getattr(self, f.name) for f in fields(self)} | arrays

    @staticmethod
    def from_numpy(values: dict[str, Any]) -> PackedBatch:
        """Undo `as_numpy`."""

        def field(x: Any) -> Any:
            return torch.from_numpy(x) if isinstance(x, np.ndarray) else x

        return PackedBatch(**{name: field(x) for name, x in values.items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }

    def _whole(self) -> Tensor | None:
        """Return the memory that holds all tensors in the layout of `_cut`, int64.

        The result is None where they do not share it, for example after one was replaced.
        """
        whole, place = self.input_ids._base, 0
        if whole is None:
            return None
        for x in self._tensors().values():
            apart = x.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
            if apart or x.storage_offset() * x.element_size() != 8 * place:
                return None
            place += _words(x)
        return whole if place == whole.numel() else None

    def _cut(self, whole: Tensor) -> PackedBatch:
        """Return a batch whose tensors are consecutive pieces of `whole`, int64."""
        tensors = self._tensors()
        pieces = whole.split([_words(x) for x in tensors.values()])
        cut = {}
        for (name, x), piece in zip(tensors.items(), pieces, strict=True):
            cut[name] = piece if x.dtype == whole.dtype else piece.view(x.dtype)[: len(x)]
        return replace(self, **cut)


def _words(x: Tensor) -> int:
    """Return how many words of 8 bytes x needs."""
    return -(-x.numel() * x.element_size() // 8)


def pack(
    tokens: np.ndarray, a_length: np.ndarray, b_length: np.ndarray, special: SpecialIds
) -> tuple[PackedBatch, np.ndarray]:
    """Add [CLS] and [SEP] to the segments and pack the sequences, without labels.

    Args:
        tokens: int64 [N], the tokens that the model sees, one segment after another: A of the first
            sequence, its B, A of the second, and so on.
        a_length, b_length: int64 [B], tokens; without B the sequence is [CLS] A [SEP].
        special: ids of [CLS] and [SEP].

    Returns:
        The batch, whose examples are numbered from 0; and int64 [N], where each of the N tokens is
        among its T.
    """
    lengths = a_length + b_length + 2 + (b_length > 0)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    total = int(lengths.sum())
    input_ids = np.empty(total, np.int64)
    ordinary = np.ones(total, bool)
    # Where there is no B, the second [SEP] coincides with the first.
    for positions, token in (
        (starts, special.cls),
        (starts + a_length + 1, special.sep),
        (ends - 1, special.sep),
    ):
        input_ids[positions] = token
        ordinary[positions] = False
    slots = np.flatnonzero(ordinary)
    input_ids[slots] = tokens
    position_ids = np.arange(total) - np.repeat(starts, lengths)
    packed = PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        token_type_ids=torch.from_numpy(
            (position_ids > np.repeat(a_length + 1, lengths)).astype(np.int64)
        ),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int(lengths.max(initial=0)),
        masked_positions=torch.empty(0, dtype=torch.int64),
        labels=torch.empty(0, dtype=torch.int64),
        next_sentence_labels=torch.full((len(lengths),), -100),
        dropout_seeds=torch.zeros(len(lengths), dtype=torch.int64),
        examples=torch.arange(len(lengths)),
        masked_total=0,
        pairs_total=0,
    )
    return packed, slots


def pack_texts(
    token_ids_a: Sequence[Sequence[int]],
    token_ids_b: Sequence[Sequence[int]] | None,
    special: SpecialIds,
) -> PackedBatch:
    """Pack texts for inference in the given order, without labels.

    Args:
        token_ids_a: ids of each text, without special tokens.
        token_ids_b: ids of each second text, or None; an empty one gives [CLS] A [SEP].
        special: ids of [CLS] and [SEP].
    """
    token_ids_b = token_ids_b if token_ids_b is not None else [[]] * len(token_ids_a)
    tokens = [
        token
        for a, b in zip(token_ids_a, token_ids_b, strict=True)
        for ids in (a, b)
        for token in ids
    ]
    a_length, b_length = (
        np.array([len(ids) for ids in texts], np.int64) for texts in (token_ids_a, token_ids_b)
    )
    return pack(np.array(tokens, np.int64), a_length, b_length, special)[0]
