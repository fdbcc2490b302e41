"""Which tile of which sequence a program of a varlen launch owns: a list made on the device, longest sequences first."""

import torch

ITEM = 128  # rows of an item; every tile that a program owns divides it


def attention_tile_schedule(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """The items of all sequences, those of the longest first, so that the last programs to run are short ones.

    Behind them come those of the rows that belong to no sequence, as if they were one more. Nothing waits for the device: as many items
    are listed as there could be, and those too many say so. A list is good for every layer and both passes, so a model makes it once
    for a batch.

    Args:
        cu_seqlens: int32 [B + 1], first row of each sequence, then the end of the last, at most `total`.
        total: rows in all.

    Returns:
        int32 [total // ITEM + B + 1, 2]: sequence (B: the rows behind the last one, -1: no item), and first row within it, a multiple of
        ITEM.
    """
    lengths, order = cu_seqlens.diff().sort(descending=True, stable=True)
    lengths = torch.cat((lengths, total - cu_seqlens[-1:]))
    order = torch.nn.functional.pad(order, (0, 1), value=len(order))
    items = (lengths + (ITEM - 1)) // ITEM
    ends = items.cumsum(0)
    index = torch.arange(total // ITEM + len(items), device=cu_seqlens.device)
    place = torch.searchsorted(ends, index, right=True).clamp_(max=len(items) - 1)
    sequence = torch.where(index < ends[-1:], order[place], -1)
    first = (index - ends[place] + items[place]) * ITEM
    return torch.stack((sequence, first), dim=1).to(torch.int32)


def one_tile(dtype: torch.dtype, max_seqlen: int) -> bool:
    """Whether a program holds all scores of a sequence at once, so that no list is needed; fp32 products leave no registers for that."""
    return max_seqlen <= ITEM and dtype.itemsize == 2
