"""Counter-based dropout: a mask is a function of (seed, position, stream, head, column).

This is the definition, in plain torch; every implementation draws exactly the same masks. The seed
is that of a sequence, the stream that of an operation of the model. A mask therefore does not
depend on the rank that holds an example, on the place of the example in the pack, or on the
other examples there.

    row    = splitmix64(seed + (position + 1) * GOLDEN)     one 64-bit seed a token, `row_seeds`
    lo, hi = halves of splitmix64(row + (stream * 2**16 + head + 1) * GOLDEN)
                                                            two 32-bit keys, `stream_keys`
    x      = (lo | 1) * (column // 16 * 8 + column % 8) + hi
    x      = (x ^ x >> 15) * 0x735A2D97                     32 bits, 16 for each of two columns
    half   = low 16 bits if column % 16 < 8, else high 16 bits, as a signed number
    keep   = half >= threshold(p) - 2**15

A row costs a good hash, but an element only two multiplications, a shift and an XOR for two
columns. Attention hashes every score, and on a GPU the integer units would be the bottleneck, not
the matrix units. A row has two keys because with a single one, rows whose keys are close would have
shifted copies of one mask. With random `lo` and `hi`, the words of a row are pairwise independent
before the last multiplication, which breaks up the arithmetic progression. Columns c and c + 8
share a word, because the matrix units of a GPU leave both in one thread, in the scores and also in
the transposed scores of the backward pass; neighbours would be in different threads in the latter.
A CPU compares signed halves fastest. Probabilities are multiples of 2**-16, so p = 0.1 acts as
0.10000610, and kept values are scaled by exactly its inverse.

Source: SplitMix64 (Steele, Lea, Flood, 2014); multiply-add as in the universal hashing of
Dietzfelbinger (1996), section 2; the last multiplication is a half of lowbias32 (Wellons,
"Prospecting for hash functions").
"""

import torch

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Return how many of 65,536 values drop an element."""
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """Return the factor of kept values: the inverse of the probability to be kept."""
    return 65536 / (65536 - threshold(p))


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: int64's own shift copies the sign


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def row_seeds(dropout_seeds: torch.Tensor, cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """Return a seed for each packed token from one seed for each sequence.

    Args:
        dropout_seeds: int64 [B].
        cu_seqlens: int32 [B + 1], first token of each sequence, then the end of the last one.
        total: T. Tokens behind the last sequence count as one more sequence, of the seed 0.

    Returns:
        int64 [T], the `dropout_seeds` of `dropout_add_layer_norm` and `embedding_layer_norm`.
    """
    tokens = torch.arange(total, device=dropout_seeds.device)
    sequence = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
    dropout_seeds = torch.nn.functional.pad(dropout_seeds, (0, 1))
    return _splitmix64(dropout_seeds[sequence] + (tokens - cu_seqlens[sequence] + 1) * GOLDEN)


def stream_keys(
    rows: torch.Tensor, dropout_stream: int, heads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two 32-bit keys of each row and head, as int64 [R, heads] in [0, 2**32)."""
    offsets = (
        torch.arange(
            dropout_stream * 65536 + 1, dropout_stream * 65536 + 1 + heads, device=rows.device
        )
        * GOLDEN
    )
    mixed = _splitmix64(rows[:, None] + offsets)
    return mixed & _WORD, _shift(mixed, 32)


def keep_mask(lo: torch.Tensor, hi: torch.Tensor, columns: int, p: float) -> torch.Tensor:
    """Return which elements are kept, bool [*lo.shape, columns], from the two keys of each row."""
    column = torch.arange(columns, device=lo.device)
    x = ((lo[..., None] | 1) * (column // 16 * 8 + column % 8) + hi[..., None]) & _WORD
    x = ((x ^ x >> 15) * 0x735A2D97) & _WORD
    half = torch.where(column % 16 < 8, x, x >> 16) & 0xFFFF
    return (half ^ 2**15) >= threshold(p)  # the same as signed, less 2**15


def row_multiplier(
    seeds: torch.Tensor, dropout_stream: int, columns: int, p: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return the factors [R, columns] of dropout: 0, or `keep_scale(p)`."""
    lo, hi = stream_keys(seeds, dropout_stream)
    return keep_mask(lo[:, 0], hi[:, 0], columns, p).to(dtype) * keep_scale(p)
