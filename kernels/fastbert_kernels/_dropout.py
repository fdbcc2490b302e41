"""Counter-based dropout: which elements are kept is a pure function of (seed of the sequence, position, dropout stream, head, column).

The definition, in plain torch; every implementation draws the very same masks. A mask therefore does not depend on the
rank that holds an example, on the place of the example in the pack, or on what else is in the pack.

    row    = splitmix64(seed + (position + 1) * GOLDEN)                       one 64-bit seed a token, `row_seeds`
    lo, hi = halves of splitmix64(row + (stream * 2**16 + head + 1) * GOLDEN) two 32-bit keys a row of one operation
    x      = (lo | 1) * (column // 16 * 8 + column % 8) + hi
    x      = (x ^ x >> 15) * 0x735A2D97                                     32 bits: a word, 16 for each of two columns
    half   = low 16 bits if column % 16 < 8, else high 16 bits              as a signed number
    keep   = half >= threshold(p) - 2**15

A row costs a good hash, an element only two multiplications, a shift and an XOR for two columns: attention hashes every score, and on
a GPU its integer units, not its matrix units, would set the pace. Two keys a row, because with a single one rows whose keys lie near
each other would hold shifted copies of one mask; with random `lo` and `hi` the words of a row are pairwise independent before the last
line, which breaks up the arithmetic progression. Columns c and c + 8 share a word, because the matrix units of a GPU leave both to one
thread, in the scores as in the transposed scores of the backward pass; neighbours would lie apart in the latter. Signed halves are what a
CPU compares fastest. Probabilities are multiples of 2**-16, so p = 0.1 acts as 0.10000610; kept values are scaled by exactly its inverse.

Source: SplitMix64 (Steele, Lea, Flood, 2014); multiply-add as in the universal hashing of Dietzfelbinger (1996), section 2; the last
line is a half of lowbias32 (Wellons, "Prospecting for hash functions").
"""

import torch

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Of 65,536 values, how many drop an element."""
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """What kept values are multiplied by: the inverse of the probability to be kept."""
    return 65536 / (65536 - threshold(p))


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: int64's own shift copies the sign


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def row_seeds(dropout_seeds: torch.Tensor, cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """One seed a packed token, int64 [T], from one seed a sequence, `dropout_seeds` int64 [B]; `cu_seqlens` int32 [B + 1], T = `total`.

    Tokens behind the last sequence count as one more sequence, of the seed 0.
    """
    tokens = torch.arange(total, device=dropout_seeds.device)
    sequence = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
    dropout_seeds = torch.nn.functional.pad(dropout_seeds, (0, 1))
    return _splitmix64(dropout_seeds[sequence] + (tokens - cu_seqlens[sequence] + 1) * GOLDEN)


def stream_keys(
    rows: torch.Tensor, dropout_stream: int, heads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two 32-bit keys, as int64 [R, heads] in [0, 2**32), that dropout stream `dropout_stream` has for each row."""
    offsets = (
        torch.arange(
            dropout_stream * 65536 + 1, dropout_stream * 65536 + 1 + heads, device=rows.device
        )
        * GOLDEN
    )
    mixed = _splitmix64(rows[:, None] + offsets)
    return mixed & _WORD, _shift(mixed, 32)


def keep_mask(lo: torch.Tensor, hi: torch.Tensor, columns: int, p: float) -> torch.Tensor:
    """Which elements are kept: bool [*lo.shape, columns], from the two keys of each row."""
    column = torch.arange(columns, device=lo.device)
    x = ((lo[..., None] | 1) * (column // 16 * 8 + column % 8) + hi[..., None]) & _WORD
    x = ((x ^ x >> 15) * 0x735A2D97) & _WORD
    half = torch.where(column % 16 < 8, x, x >> 16) & 0xFFFF
    return (half ^ 2**15) >= threshold(p)  # the same as signed, less 2**15


def row_multiplier(
    seeds: torch.Tensor, dropout_stream: int, columns: int, p: float, dtype: torch.dtype
) -> torch.Tensor:
    """What dropout multiplies a [R, columns] tensor by: 0, or the inverse of the probability to be kept."""
    lo, hi = stream_keys(seeds, dropout_stream)
    return keep_mask(lo[:, 0], hi[:, 0], columns, p).to(dtype) * keep_scale(p)
