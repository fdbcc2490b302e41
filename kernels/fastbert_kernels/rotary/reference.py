"""The definition of `rotary_embedding` in the plainest torch."""

import torch
from torch import Tensor


def reference(qkv: Tensor, position_ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated by the angles of their positions, and the values as they are.

    Arguments and result are as in `op.py`.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    cos, sin = table[position_ids].to(wide)[:, None].chunk(2, dim=-1)

    def rotated(x: Tensor) -> Tensor:
        a, b = x.to(wide).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    q, k, v = qkv.unbind(1)
    return rotated(q), rotated(k), v
