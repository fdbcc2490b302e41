"""Three look-ups, LayerNorm and dropout in one pass, and the gradients of the tables.

    z = word_embeddings[input_id] + position_embeddings[position_id]
        + token_type_embeddings[token_type_id]      mean, rstd, h of z as in `norm/kernel.py`
    y = c (h * norm_weight + norm_bias) * keep      c = 1 / probability to be kept

    dh = c dy * keep        dz from dh as in `norm/kernel.py`
    dnorm_weight, dnorm_bias = sums over the rows of dh * h, dh
    dtable[r] = sum of the dz of the tokens whose index is r

ModernBERT has neither positions nor token types here: both tables may be left out.

Saved: the indices, and mean and rstd of each row; the rows are looked up again. Tiles, chunks and
shares are those of `norm/kernel.py`. An index outside its table reads nothing and makes its token's
mean NaN, and so y, and in the backward pass every sum it is part of.

The gradients of the tables are computed without atomics, so they are deterministic. For this the
three tables count as one, words above positions above token types, of which every token uses three
rows. `_backward_kernel` writes the row of each use, int32 [3 T]. The uses are sorted by row, in a
stable order, and each program of `_rows_kernel` owns a row of the table. It adds up, in fp32, the
dz of the uses of its row, or none, so no zeros need to be written before. A row with more than BIN
uses ([MASK], [CLS], each token type) would make the others wait. So the sorted uses are divided
into bins of BIN, and `_pieces_kernel` first adds up the piece of each such row in each bin. In a
bin only the row of its first use and that of its last one can be so long, so a bin has two slots
for pieces.

dz has the dtype of the tables, as in torch's autograd, which halves the bytes in 16 bits. The error
(RMS) of the tables' gradients is then 1.1 to 1.3 times what fp32 would give, and torch's own is 2
to 20 times that (bf16 and fp16, T = 2,048, V = 100).
"""

import torch
import triton
import triton.language as tl

from fastbert_kernels._dropout import keep_scale, threshold
from fastbert_kernels._launch import Kernel
from fastbert_kernels._rows import (
    columns,
    dropout,
    gradient,
    load_vector,
    mask_keys,
    plus,
    row_programs,
    statistics,
    store_share,
    times,
    zeros,
)

# Uses that one program adds up in turn. At 128, the two token types alone would not fill the device
# at T = 16,384.
_BIN = 64


@triton.jit
def _look_up(index_ptr, table_ptr, stride, size, row, T):
    """Return where each token's row of a table begins, [BLOCK_T, 1], and whether it exists."""
    index = tl.load(index_ptr + row, mask=row < T, other=0)
    return table_ptr + index * stride, (index >= 0) & (index < size)


@triton.jit
def _load_z(
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_embeddings_ptr,
    position_embeddings_ptr,
    token_type_embeddings_ptr,
    stride_word,
    stride_position,
    stride_token_type,
    V,
    P,
    S,
    row,
    T,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return z of each token, and whether all its indices are within their tables."""
    word_ptr, valid = _look_up(input_ids_ptr, word_embeddings_ptr, stride_word, V, row, T)
    if position_ids_ptr is not None:
        position_ptr, is_position = _look_up(
            position_ids_ptr, position_embeddings_ptr, stride_position, P, row, T
        )
        valid &= is_position
    if token_type_ids_ptr is not None:
        token_type_ptr, is_token_type = _look_up(
            token_type_ids_ptr, token_type_embeddings_ptr, stride_token_type, S, row, T
        )
        valid &= is_token_type

    z = ()
    for i in tl.static_range(triton.cdiv(D, BLOCK_D)):
        column = columns(i, BLOCK_D)
        mask = (row < T) & valid & (column < D)
        chunk = tl.load(word_ptr + column, mask=mask, other=0.0).to(tl.float32)
        if position_ids_ptr is not None:
            chunk += tl.load(position_ptr + column, mask=mask, other=0.0).to(tl.float32)
        if token_type_ids_ptr is not None:
            chunk += tl.load(token_type_ptr + column, mask=mask, other=0.0).to(tl.float32)
        z += (chunk,)
    return z, valid


@triton.jit(do_not_specialize=["T", "V", "P", "S", "dropout_stream", "threshold"])
def _forward_kernel(
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_embeddings_ptr,
    position_embeddings_ptr,
    token_type_embeddings_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    dropout_seeds_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    stride_word,
    stride_position,
    stride_token_type,
    T,
    V,
    P,
    S,
    eps,
    dropout_stream,
    threshold,
    scale,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    norm_weight = load_vector(norm_weight_ptr, D, BLOCK_D)
    norm_bias = load_vector(norm_bias_ptr, D, BLOCK_D)

    for first in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        keys = mask_keys(dropout_seeds_ptr, first + tl.arange(0, BLOCK_T), T, dropout_stream)
        row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        z, valid = _load_z(
            *(
                input_ids_ptr,
                position_ids_ptr,
                token_type_ids_ptr,
                word_embeddings_ptr,
                position_embeddings_ptr,
                token_type_embeddings_ptr,
            ),
            *(stride_word, stride_position, stride_token_type, V, P, S, row, T, D, BLOCK_D),
        )

        mean, rstd = statistics(z, eps, D, BLOCK_D)
        mean = tl.where(valid, mean, float("nan"))

        for i in tl.static_range(len(z)):
            column = columns(i, BLOCK_D)
            y = (z[i] - mean) * rstd * norm_weight[i]
            if len(norm_bias) > 0:
                y += norm_bias[i]
            y = dropout(y, keys, i, threshold, scale, BLOCK_D)
            tl.store(y_ptr + row * D + column, y, mask=(row < T) & (column < D))
        tl.store(mean_ptr + row, mean, mask=row < T)
        tl.store(rstd_ptr + row, rstd, mask=row < T)


_TABLES = ("word_embeddings_ptr", "position_embeddings_ptr", "token_type_embeddings_ptr")
_FORWARD = Kernel(_forward_kernel, "embedding_forward", wide=_TABLES)


def _about(tables):
    """Return row strides and numbers of rows of the tables, 0 if missing, and which are missing."""
    return (
        [0 if table is None else table.stride(0) for table in tables],
        [0 if table is None else len(table) for table in tables],
        tuple(table is None for table in tables),
    )


def forward(
    input_ids,
    position_ids,
    token_type_ids,
    word_embeddings,
    position_embeddings,
    token_type_embeddings,
    norm_weight,
    norm_bias,
    dropout_seeds,
    eps,
    dropout_p,
    dropout_stream,
):
    """Return y, and mean and rstd, fp32 [T]."""
    T, D = input_ids.shape[0], word_embeddings.shape[1]
    tables = (word_embeddings, position_embeddings, token_type_embeddings)
    y = word_embeddings.new_empty(T, D)
    mean, rstd = (
        word_embeddings.new_empty(T, dtype=torch.float32),
        word_embeddings.new_empty(T, dtype=torch.float32),
    )
    if T and D:
        dropout_seeds = dropout_seeds if dropout_p > 0 else None
        strides, sizes, missing = _about(tables)
        missing += (norm_bias is None, dropout_seeds is None)
        kernel = _FORWARD.prepare(word_embeddings, D, (D,), *strides, *missing)
        kernel(
            (row_programs(kernel.tile, T, word_embeddings.device),),
            (
                input_ids,
                position_ids,
                token_type_ids,
                *tables,
                norm_weight,
                norm_bias,
                dropout_seeds,
                y,
                mean,
                rstd,
            ),
            (
                *strides,
                T,
                *sizes,
                eps,
                dropout_stream,
                threshold(dropout_p),
                keep_scale(dropout_p),
            ),
        )
    return y, mean, rstd


@triton.jit
def _note_use(uses_ptr, index_ptr, first, size, nowhere, row, T):
    """Store the row that each token uses of a table, counted over all three tables.

    It is `nowhere` if the index is outside the table of `size` rows.
    """
    index = tl.load(index_ptr + row, mask=row < T, other=0)
    tl.store(
        uses_ptr + row,
        tl.where((index >= 0) & (index < size), index + first, nowhere).to(tl.int32),
        mask=row < T,
    )


@triton.jit(do_not_specialize=["T", "V", "P", "S", "dropout_stream", "threshold"])
def _backward_kernel(
    dy_ptr,
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_embeddings_ptr,
    position_embeddings_ptr,
    token_type_embeddings_ptr,
    norm_weight_ptr,
    dropout_seeds_ptr,
    mean_ptr,
    rstd_ptr,
    dz_ptr,
    uses_ptr,
    shares_ptr,
    stride_word,
    stride_position,
    stride_token_type,
    T,
    V,
    P,
    S,
    dropout_stream,
    threshold,
    scale,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    norm_weight = load_vector(norm_weight_ptr, D, BLOCK_D)
    dnorm_weight, dnorm_bias = zeros(D, BLOCK_T, BLOCK_D), zeros(D, BLOCK_T, BLOCK_D)

    for first in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        keys = mask_keys(dropout_seeds_ptr, first + tl.arange(0, BLOCK_T), T, dropout_stream)
        row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        mean = tl.load(mean_ptr + row, mask=row < T, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
        z, _ = _load_z(
            *(
                input_ids_ptr,
                position_ids_ptr,
                token_type_ids_ptr,
                word_embeddings_ptr,
                position_embeddings_ptr,
                token_type_embeddings_ptr,
            ),
            *(stride_word, stride_position, stride_token_type, V, P, S, row, T, D, BLOCK_D),
        )
        dh = ()
        for i in tl.static_range(len(z)):
            column = columns(i, BLOCK_D)
            dy = tl.load(dy_ptr + row * D + column, mask=(row < T) & (column < D), other=0.0).to(
                tl.float32
            )
            dh += (dropout(dy, keys, i, threshold, scale, BLOCK_D),)

        h, dz = gradient(dh, z, norm_weight, mean, rstd, D)

        for i in tl.static_range(len(z)):
            column = columns(i, BLOCK_D)
            tl.store(dz_ptr + row * D + column, dz[i], mask=(row < T) & (column < D))
        _note_use(uses_ptr, input_ids_ptr, 0, V, V + P + S, row, T)
        next_ptr = uses_ptr + T
        if position_ids_ptr is not None:
            _note_use(next_ptr, position_ids_ptr, V, P, V + P + S, row, T)
            next_ptr += T
        if token_type_ids_ptr is not None:
            _note_use(next_ptr, token_type_ids_ptr, V + P, S, V + P + S, row, T)
        dnorm_weight, dnorm_bias = plus(dnorm_weight, times(dh, h)), plus(dnorm_bias, dh)

    share_ptr = shares_ptr + tl.program_id(0) * 2 * D
    store_share(share_ptr, dnorm_weight, D, BLOCK_D)
    store_share(share_ptr + D, dnorm_bias, D, BLOCK_D)


@triton.jit
def _sum_uses(
    dz_ptr, order_ptr, begin, end, column, T, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Return the sum of dz over the sorted uses begin to end, fp32 [1, BLOCK_D]."""
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_T):
        place = (first + tl.arange(0, BLOCK_T))[:, None]
        use = tl.load(order_ptr + place, mask=place < end, other=0)
        token = use - tl.where(
            use < T, 0, tl.where(use < 2 * T.to(tl.int64), T, 2 * T.to(tl.int64))
        )
        total += tl.load(dz_ptr + token * D + column, mask=(place < end) & (column < D), other=0.0)
    return tl.sum(total, 0, keep_dims=True)


@triton.jit(do_not_specialize=["T", "uses", "rows"])
def _pieces_kernel(
    dz_ptr,
    order_ptr,
    sorted_ptr,
    starts_ptr,
    pieces_ptr,
    T,
    uses,
    rows,
    D,
    BIN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Two a bin: one for the row of its first use, one for that of its last, if that is another.
    slot = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    bin_begin = slot // 2 * BIN
    bin_end = tl.minimum(bin_begin + BIN, uses)

    row = tl.load(sorted_ptr + (bin_begin if slot % 2 == 0 else bin_end - 1))
    if row < rows:
        begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
        if (end - begin > BIN) & ((begin > bin_begin) == (slot % 2 == 1)):
            piece = _sum_uses(
                dz_ptr,
                order_ptr,
                tl.maximum(begin, bin_begin),
                tl.minimum(end, bin_end),
                column,
                T,
                D,
                BLOCK_T,
                BLOCK_D,
            )
            tl.store(pieces_ptr + slot.to(tl.int64) * D + column, piece, mask=column < D)


@triton.jit(do_not_specialize=["T"])
def _rows_kernel(
    dz_ptr,
    order_ptr,
    starts_ptr,
    pieces_ptr,
    dtables_ptr,
    T,
    D,
    BIN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)

    if end - begin <= BIN:
        total = _sum_uses(dz_ptr, order_ptr, begin, end, column, T, D, BLOCK_T, BLOCK_D)
    else:
        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for first in range(begin // BIN, tl.cdiv(end, BIN), BLOCK_T):
            place = (first + tl.arange(0, BLOCK_T))[:, None]
            slot = 2 * place.to(tl.int64) + (begin > place * BIN)
            total += tl.load(
                pieces_ptr + slot * D + column, mask=(place * BIN < end) & (column < D), other=0.0
            )
        total = tl.sum(total, 0, keep_dims=True)

    tl.store(dtables_ptr + row.to(tl.int64) * D + column, total, mask=column < D)


_BACKWARD = Kernel(_backward_kernel, "embedding_backward", wide=(*_TABLES, "dy_ptr"))
_PIECES = Kernel(_pieces_kernel, "embedding_table", wide=("dz_ptr",))
_ROWS = Kernel(_rows_kernel, "embedding_table", wide=("dz_ptr", "pieces_ptr"))


def _table_gradients(dz: torch.Tensor, uses: torch.Tensor, rows: int) -> torch.Tensor:
    """Return [rows, D] from dz [T, D] and the rows that tokens use, int32 [3 T] in [0, rows].

    With fewer tables, tokens have fewer uses: [2 T] or [T].

    A use of row `rows` counts for nothing.
    """
    T, D = dz.shape
    ordered, order = torch.sort(uses, stable=True)
    starts = torch.searchsorted(
        ordered, torch.arange(rows + 1, dtype=torch.int32, device=dz.device), out_int32=True
    )
    pieces_kernel, rows_kernel = (kernel.prepare(dz, D, (_BIN,), D) for kernel in (_PIECES, _ROWS))
    bins, blocks = -(-len(uses) // _BIN), -(-D // rows_kernel.tile["BLOCK_D"])
    pieces = dz.new_empty(2 * bins, D, dtype=torch.float32)
    dtables = dz.new_empty(rows, D)
    pieces_kernel((2 * bins, blocks), (dz, order, ordered, starts, pieces), (T, len(uses), rows, D))
    rows_kernel((rows, blocks), (dz, order, starts, pieces, dtables), (T, D))
    return dtables


def backward(
    dy,
    input_ids,
    position_ids,
    token_type_ids,
    word_embeddings,
    position_embeddings,
    token_type_embeddings,
    norm_weight,
    dropout_seeds,
    mean,
    rstd,
    dropout_p,
    dropout_stream,
):
    """Return the gradients of the three tables, one below the other, and those of the vectors.

    The latter, dnorm_weight and dnorm_bias, are the rows of [2, D].
    """
    T, D = dy.shape
    indices, tables = (
        (input_ids, position_ids, token_type_ids),
        (word_embeddings, position_embeddings, token_type_embeddings),
    )
    strides, sizes, missing = _about(tables)
    if not (T and D):
        return dy.new_zeros(sum(sizes), D), dy.new_zeros(2, D)
    dropout_seeds = dropout_seeds if dropout_p > 0 else None
    kernel = _BACKWARD.prepare(dy, D, (D,), *strides, *missing, dropout_seeds is None)
    programs = row_programs(kernel.tile, T, dy.device)
    dz = dy.new_empty(T, D)
    uses = dy.new_empty((3 - sum(missing)) * T, dtype=torch.int32)
    shares = dy.new_empty(programs, 2, D, dtype=torch.float32)
    kernel(
        (programs,),
        (dy, *indices, *tables, norm_weight, dropout_seeds, mean, rstd, dz, uses, shares),
        (*strides, T, *sizes, dropout_stream, threshold(dropout_p), keep_scale(dropout_p)),
    )
    return _table_gradients(dz, uses, sum(sizes)), shares.sum(0).to(dy.dtype)
