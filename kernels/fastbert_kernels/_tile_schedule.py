"""Which tile of which sequence a program of the attention owns: a list, longest sequences first."""

import torch

ITEM = 128  # rows of an item; every tile that a program owns divides it


def attention_tile_schedule(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """List the items of all sequences, those of the longest first, so that short ones run last.

    The items of the rows that belong to no sequence come at the end, as if these rows were one more
    sequence. Nothing waits for the device: the list is as long as it could have to be, and spare
    entries are marked. A list is good for every layer and for both passes, so a model makes it once
    for each batch.

    Args:
        cu_seqlens: int32 [B + 1], first row of each sequence, then the end of the last one, at most
            `total`.
        total: number of rows.

    Returns:
        int32 [total // ITEM + B + 1, 2]: the sequence (B: rows behind the last one, -1: no item),
        and its first row within the sequence, a multiple of ITEM.
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
    """Whether a program holds all scores of a sequence at once, so that no list is needed.

    fp32 products leave no registers for that.
    """
    return max_seqlen <= ITEM and dtype.itemsize == 2
