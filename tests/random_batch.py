"""A packed batch of random tokens, for tests that need only torch."""

import itertools

import torch

from fastbert.data.packing import PackedBatch

VOCAB = 211


def make_batch(lengths: list[int], seed: int = 0) -> PackedBatch:
    """Random sequences with three masked tokens each (one in the shortest).

    All totals are those of the batch.
    """
    draw = torch.Generator().manual_seed(seed)
    starts = [0, *itertools.accumulate(lengths)]
    ids = torch.randint(5, VOCAB, (starts[-1],), generator=draw)
    masked = torch.cat(
        [
            s + 1 + torch.randperm(n - 2, generator=draw)[: min(3, n - 2)].sort().values
            for s, n in zip(starts, lengths, strict=False)
        ]
    )
    labels = ids[masked].clone()
    ids[masked[::2]] = 4
    return PackedBatch(
        input_ids=ids,
        token_type_ids=torch.cat([(torch.arange(n) > n // 2).long() for n in lengths]),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(lengths),
        masked_positions=masked,
        labels=labels,
        next_sentence_labels=torch.randint(0, 2, (len(lengths),), generator=draw),
        dropout_seeds=torch.randint(0, 2**62, (len(lengths),), generator=draw),
        examples=torch.arange(len(lengths)),
        masked_total=len(masked),
        pairs_total=len(lengths),
    )
