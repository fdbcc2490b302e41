"""What rotary embeddings look up: cosines and sines by position, and the position of each token."""

import torch
from torch import Tensor


def rotary_table(
    length: int, size: int, theta: float = 10000.0, device: torch.device | str | None = None
) -> Tensor:
    """Return cosines and sines for rotary embeddings, which a model computes once for each theta.

    The angle of position p and column i is p * theta**(-2 i / size), in fp32 as in transformers:
    frequencies are rounded first, then angles. They are computed on the CPU, so that every device
    has the same ones.

    Args:
        length: N, number of positions: at least that of the longest sequence.
        size: K, the head size, even.
        theta: base of the frequencies, positive. ModernBERT has 160,000 for global layers and
            10,000 for local ones.
        device: where the table goes; the CPU if None.

    Returns:
        fp32 [N, K]: cosines in the first K / 2 columns, sines in the others.

    Raises:
        ValueError: an odd or empty head size, or a theta that is not positive.

    Source: Su et al., 2021 (RoFormer), equation 15.
    """
    if size < 2 or size % 2:
        raise ValueError(f"rotary_table: size = {size}; must be an even number of at least 2")
    if not theta > 0:
        raise ValueError(f"rotary_table: theta = {theta}; must be positive")
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(device)


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Return the position of each packed token in its sequence, once for a batch.

    Nothing waits for the device.

    Args:
        cu_seqlens: int32 [B + 1], first token of each sequence, then the end of the last one.
        total: T. Tokens behind the last sequence have position 0.

    Returns:
        int64 [T], the `position_ids` of `rotary_embedding` and `embedding_layer_norm`.
    """
    tokens = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
    return torch.where(tokens < cu_seqlens[-1], tokens - cu_seqlens[sequence], 0)
