"""What autocast means for a fused operation: its inputs are cast as torch casts those of its own op of that kind.

The first of the tensors says on which device they are; of the others some may be None.
"""

from typing import Any

import torch


def cast_low(*tensors: Any) -> tuple[Any, ...]:
    """As matrix products and attention: to the autocast dtype, where autocast is on for the tensors' device."""
    return _cast(tensors, None)


def cast_fp32(*tensors: Any) -> tuple[Any, ...]:
    """As LayerNorm and losses: to fp32, where autocast is on for the tensors' device."""
    return _cast(tensors, torch.float32)


def _cast(tensors, dtype):
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = dtype or torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
