"""What autocast means for a fused operation: casts as torch does for its own op of that kind.

The first tensor tells the device; the others may be None.
"""

from typing import Any

import torch


def cast_low(*tensors: Any) -> tuple[Any, ...]:
    """Cast to the autocast dtype where autocast is on, as matrix products and attention do."""
    return _cast(tensors, None)


def cast_fp32(*tensors: Any) -> tuple[Any, ...]:
    """Cast to fp32 where autocast is on, as LayerNorm and losses do."""
    return _cast(tensors, torch.float32)


def _cast(tensors: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = dtype or torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
