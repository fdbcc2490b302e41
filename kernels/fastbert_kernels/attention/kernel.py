"""Varlen attention in Triton: online softmax over tiles of keys, with dropout by hash.

Nothing of size n x n is ever in memory. For one head of one sequence, with D the keep mask over its
probability to be kept (1 without dropout), and with exponentials to the base 2, as the hardware has
them:

    S = scale log2(e) Q K'      row_max_i = max_j S_ij      W = 2^(S - row_max)
    inv_sum_i = 1 / sum_j W_ij      P = W inv_sum      O = (P D) V
    dV = (P D)' dO      dP = D (dO V')      delta_i = sum_j P_ij dP_ij = dO_i . O_i
    dS = P (dP - delta)      dQ = scale dS K      dK = scale dS' Q

Saved: q, k, v, O, row_max and inv_sum (fp32 [2, H, R]). The one number row_max - log2(inv_sum)
would not do: W recomputed from it differs from the first W by the rounding of a number of the size
of the scores, which costs fp32 gradients half a digit.

Sequences of any length: a program owns a tile of queries of one head and walks over the keys
(forward, dQ), or owns a tile of keys and walks over the queries (dK and dV, on transposed scores,
so that P' and dS' are first operands as they are). The backward pass computes the scores twice; in
return no program adds to what another one writes, so there are no atomics, and every run gives the
same bits. The tail of a sequence, where columns must be masked, is a tile of its own after the
loop; full tiles are not masked.

Sequences that all fit one tile (`one_tile`): a program owns a whole head of a sequence, forward and
backward. The backward pass then has whole rows of scores, computes them once, and needs only q, k
and v to be saved. The tile has 64 tokens for a sequence of up to 64, and 128 for a longer one, each
in its own launch, so a 40-token sequence does not pay for the longest of its pack.

With a window, query i sees key j where |i - j| <= WINDOW. The loops then visit only the tiles in
reach of the program's own tile, and mask each of them. A smaller tile reaches fewer keys that none
of its queries sees, so these launches have rows of their own in tiles.json. WINDOW is a constant:
None leaves no trace in the machine code.

Rows behind the last sequence of a padded pack are filled with zeros by programs that have nothing
else to do.

Source: Dao, 2023 (FlashAttention-2), algorithms 1 and 2.
"""

import math

import torch
import triton
import triton.language as tl

from fastbert_kernels._dropout import keep_scale, threshold
from fastbert_kernels._launch import Kernel
from fastbert_kernels._tile_schedule import ITEM, attention_tile_schedule, one_tile
from fastbert_kernels._triton import (
    dot_precision,
    keep_mask,
    keep_mask_transposed,
    row_seed,
    stream_keys,
)

_LOG2E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2))
# The maximum of no scores, where a row may see no key of a tile: -inf - -inf would not be a number.
_NO_SCORE = tl.constexpr(-3.0e38)
_ITEM = tl.constexpr(ITEM)
_SMALL = ITEM // 2  # longer sequences take a tile of ITEM, where one tile holds a whole sequence
_REST = 8  # programs of a head that fill the rows behind the last sequence, without a tile schedule
# Not worth a compilation for each value.
_VARIES = [
    "sequences",
    "rows",
    "tokens",
    "over",
    "scale",
    "keep_scale",
    "dropout_stream",
    "threshold",
]


# Shared pieces


@triton.jit
def _load(ptr, row, valid, stride, K: tl.constexpr):
    """Load rows of one head, [BLOCK, K rounded up to a power of two].

    Columns beyond K are zeros, and so are rows that are not `valid` (None: all are).
    """
    COLUMNS: tl.constexpr = triton.next_power_of_2(K)
    column = tl.arange(0, COLUMNS)
    pointers = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    if valid is None:
        if COLUMNS == K:
            rows = tl.load(pointers)
        else:
            rows = tl.load(pointers, mask=(column < K)[None, :], other=0.0)
    else:
        rows = tl.load(pointers, mask=valid[:, None] & (column < K)[None, :], other=0.0)
    return rows


@triton.jit
def _store(ptr, row, valid, stride, values, K: tl.constexpr):
    column = tl.arange(0, triton.next_power_of_2(K))
    pointers = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=valid[:, None] & (column < K)[None, :])


@triton.jit
def _item(schedule_ptr, sequences, BLOCK: tl.constexpr):
    """Return the sequence of this program's item, and the program's first row within it.

    -1 means no item, `sequences` the rows behind the last one. ITEM // BLOCK programs share an
    item.
    """
    SHARE: tl.constexpr = _ITEM // BLOCK
    program = tl.program_id(1)
    entry = schedule_ptr + 2 * (program // SHARE)
    sequence, first = tl.load(entry), tl.load(entry + 1)
    if sequence > sequences or first < 0:  # the schedule of another batch
        sequence = -1
    return sequence, first + program % SHARE * BLOCK


@triton.jit
def _span(bounds_ptr, sequence, total):
    """Return the first row of a sequence and of the next one, within [0, total] in any case."""
    first = tl.minimum(tl.maximum(tl.load(bounds_ptr + sequence), 0), total)
    return first, tl.minimum(tl.maximum(tl.load(bounds_ptr + sequence + 1), first), total)


@triton.jit
def _rest(bounds_ptr, sequences, total):
    """Return the first row behind the last sequence, within [0, total]."""
    return tl.minimum(tl.maximum(tl.load(bounds_ptr + sequences), 0), total)


@triton.jit
def _fill(ptr, first, total, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Store zeros to BLOCK rows."""
    row = first + tl.arange(0, BLOCK)
    _store(
        ptr, row, row < total, H * K, tl.zeros([BLOCK, triton.next_power_of_2(K)], tl.float32), K
    )


@triton.constexpr_function
def _multiplied_by_fma(ptr, precision):
    """Whether dot products run outside the matrix units.

    Operands are then rows of registers. One that is kept through a loop spills (2 KB a thread at
    K = 64), so it is loaded again for each tile, from the L1 cache.
    """
    return ptr.dtype.element_ty == tl.float32 and precision == "ieee"


@triton.jit
def _mask_keys(
    query_indices_ptr,
    dropout_seeds_ptr,
    row,
    valid,
    sequence,
    first_token,
    first_row,
    dropout_stream,
    head,
    HAS_QUERY_INDICES: tl.constexpr,
):
    """Return the two mask keys of each query row, by its position in the sequence."""
    if HAS_QUERY_INDICES:
        position = tl.load(query_indices_ptr + row, mask=valid, other=0) - first_token
    else:
        position = row - first_row
    return stream_keys(
        row_seed(tl.load(dropout_seeds_ptr + sequence), position), dropout_stream, head
    )


@triton.jit
def _positions(query_indices_ptr, row, valid, first_token, first_row, length):
    """Return the position of each query row in its sequence, int32.

    A row that is not `valid` gets any position inside the sequence, so that it sees a key.
    """
    if query_indices_ptr is None:
        position = row - first_row
    else:
        position = tl.load(query_indices_ptr + row, mask=valid, other=0) - first_token
    return tl.minimum(tl.maximum(position, 0), length - 1).to(tl.int32)


@triton.jit
def _sees(position, key, length, WINDOW: tl.constexpr):
    """Whether the query at `position` of a sequence sees the key at `key`.

    As unsigned numbers, distances below -WINDOW are large, so one comparison serves both sides.
    """
    distance = (key - (position - WINDOW)).to(tl.uint32, bitcast=True)
    return (distance <= 2 * WINDOW) & (key < length)


@triton.jit
def _keys_in_reach(
    query_indices_ptr, first, last, first_token, first_row, length, WINDOW: tl.constexpr
):
    """Return the keys that the query rows from `first` to before `last` see: first, end.

    The first one is rounded down to a multiple of 16, where a dropout mask may begin.
    """
    if query_indices_ptr is None:
        begin, end = first - first_row, last - first_row
    else:
        begin = (tl.load(query_indices_ptr + first) - first_token).to(tl.int32)
        end = (tl.load(query_indices_ptr + last - 1) - first_token).to(tl.int32) + 1
    return tl.maximum(begin - WINDOW, 0) // 16 * 16, tl.minimum(end + WINDOW, length)


@triton.jit
def _queries_in_reach(
    first_query_ptr, first, last, first_token, first_row, length, count, WINDOW: tl.constexpr
):
    """Return the query rows of a sequence that see its keys from `first` to before `last`."""
    begin, end = tl.maximum(first - WINDOW, 0), tl.minimum(last + WINDOW, length)
    if first_query_ptr is not None:
        begin = tl.load(first_query_ptr + first_token + begin) - first_row
        end = tl.load(first_query_ptr + first_token + end) - first_row
    return tl.maximum(begin, 0), tl.minimum(end, count)


def _short(long, short, sequences, max_seqlen):
    """Return the launches of a kernel that holds a whole sequence in one tile.

    Each is the `Kernel`, the programs of a head, `over` and BLOCK. Only the device knows how many
    sequences are long and how many are short. So each launch has a program for every sequence, and
    those whose sequence belongs to the other launch end at once. The long ones come first.
    """
    if max_seqlen > _SMALL and sequences:
        yield long, sequences, _SMALL, ITEM
    yield short, sequences + _REST, 0, max(16, 1 << (min(max_seqlen, _SMALL) - 1).bit_length())


def _kind(q, k, v, has_query_indices, dropout_seeds):
    """Return what Triton compiles for besides constants: strides first, then which tables exist."""
    return (
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        has_query_indices,
        dropout_seeds is None,
    )


def _query_bounds(cu_seqlens, query_indices):
    """First query row of each sequence, int32 [B + 1]."""
    return (
        cu_seqlens
        if query_indices is None
        else torch.searchsorted(query_indices, cu_seqlens.long(), out_int32=True)
    )


def _first_queries(query_indices, tokens):
    """First query row at or behind each token, int32 [T + 1]; None if all tokens are queries."""
    if query_indices is None:
        return None
    every = torch.arange(tokens + 1, device=query_indices.device)
    return torch.searchsorted(query_indices, every, out_int32=True)


# Forward


@triton.jit
def _attend(
    q, acc, row_max, row_sum, position, k_ptr, v_ptr, k_row, v_row, start, length, lo, hi, scale,
    threshold,
    K: tl.constexpr, TAIL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the running softmax of a tile of queries.

    `row_max` is the maximum so far, `row_sum` the sum of W, `acc` that of W D V.
    """
    key = start + tl.arange(0, BLOCK_K)
    valid = key < length if TAIL else None
    k = _load(k_ptr, key, valid, k_row, K)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if WINDOW is not None:
        seen = _sees(position[:, None], key[None, :], length, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    elif TAIL:
        scores = tl.where(valid[None, :], scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    weights = tl.exp2(tl.fma(scores, scale, -new_max[:, None]))
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    if DROPOUT:
        # A product: the compiler would move a selection behind the rounding to 16 bits, where pairs
        # are packed. And a product with constants: with keep_scale here, masks wait for the scores
        # as packed bits (three more instructions a score, of 17, on sm_90).
        weights *= tl.where(keep_mask(lo, hi, start, BLOCK_K, threshold), 1.0, 0.0)

    v = _load(v_ptr, key, valid, v_row, K)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=_VARIES)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, row_max_ptr, inv_sum_ptr, schedule_ptr, query_bounds_ptr,
    cu_seqlens_ptr, query_indices_ptr, dropout_seeds_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head,
    sequences, rows, tokens, scale, keep_scale, dropout_stream, threshold,
    H: tl.constexpr, K: tl.constexpr, HAS_QUERY_INDICES: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    sequence, offset = _item(schedule_ptr, sequences, BLOCK_Q)
    if sequence < 0:
        return
    if sequence == sequences:
        start = _rest(query_bounds_ptr, sequences, rows) + offset
        _fill(out_ptr + head * K, start, rows, H, K, BLOCK_Q)
        row = start + tl.arange(0, BLOCK_Q)
        slot, nothing = head.to(tl.int64) * rows + row, tl.zeros([BLOCK_Q], tl.float32)
        tl.store(row_max_ptr + slot, nothing, mask=row < rows)
        tl.store(inv_sum_ptr + slot, nothing, mask=row < rows)
        return
    first_row, last_row = _span(query_bounds_ptr, sequence, rows)
    if first_row + offset >= last_row:
        return
    first_token, last_token = _span(cu_seqlens_ptr, sequence, tokens)
    length = last_token - first_token

    row = first_row + offset + tl.arange(0, BLOCK_Q)
    valid = row < last_row
    q = _load(q_ptr + head.to(tl.int64) * q_head, row, valid, q_row, K)
    k_ptr += first_token.to(tl.int64) * k_row + head.to(tl.int64) * k_head
    v_ptr += first_token.to(tl.int64) * v_row + head.to(tl.int64) * v_head
    lo, hi = row.to(tl.uint32), row.to(tl.uint32)
    if DROPOUT:
        lo, hi = _mask_keys(
            query_indices_ptr,
            dropout_seeds_ptr,
            row,
            valid,
            sequence,
            first_token,
            first_row,
            dropout_stream,
            head,
            HAS_QUERY_INDICES,
        )

    no_score = float("-inf") if WINDOW is None else _NO_SCORE
    row_max = tl.full([BLOCK_Q], no_score, tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, triton.next_power_of_2(K)], tl.float32)
    position, first, full = row, 0, length // BLOCK_K * BLOCK_K
    if WINDOW is not None:
        position = _positions(query_indices_ptr, row, valid, first_token, first_row, length)
        first, full = _keys_in_reach(
            query_indices_ptr,
            first_row + offset,
            tl.minimum(first_row + offset + BLOCK_Q, last_row),
            first_token,
            first_row,
            length,
            WINDOW,
        )
    for start in range(first, full, BLOCK_K):
        if _multiplied_by_fma(q_ptr, PRECISION):
            q = _load(q_ptr + head.to(tl.int64) * q_head, row, valid, q_row, K)
        acc, row_max, row_sum = _attend(
            q, acc, row_max, row_sum, position, k_ptr, v_ptr, k_row, v_row, start, length, lo, hi,
            scale, threshold,
            K, WINDOW is not None, DROPOUT, PRECISION, WINDOW, BLOCK_K,
        )  # fmt: skip
    if WINDOW is None and full < length:
        acc, row_max, row_sum = _attend(
            q, acc, row_max, row_sum, position, k_ptr, v_ptr, k_row, v_row, full, length, lo,
            hi, scale, threshold,
            K, True, DROPOUT, PRECISION, WINDOW, BLOCK_K,
        )  # fmt: skip

    inv_sum = 1.0 / row_sum
    _store(out_ptr + head * K, row, valid, H * K, acc * (inv_sum * keep_scale)[:, None], K)
    slot = head.to(tl.int64) * rows + row
    tl.store(row_max_ptr + slot, row_max, mask=valid)
    tl.store(inv_sum_ptr + slot, inv_sum, mask=valid)


@triton.jit
def _softmax(q, k, seen, scale, PRECISION: tl.constexpr):
    """Return W over the keys of a sequence that are seen, and its sum in each row."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
    weights = tl.exp2((scores - tl.max(scores, 1)[:, None]) * scale)
    return weights, tl.sum(weights, 1)


@triton.jit(do_not_specialize=_VARIES)
def _forward_short_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, query_bounds_ptr, cu_seqlens_ptr, query_indices_ptr,
    dropout_seeds_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head,
    sequences, rows, tokens, over, scale, keep_scale, dropout_stream, threshold,
    H: tl.constexpr, K: tl.constexpr, HAS_QUERY_INDICES: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    if sequence >= sequences:
        first, step = (sequence - sequences) * BLOCK, (tl.num_programs(1) - sequences) * BLOCK
        for start in range(_rest(query_bounds_ptr, sequences, rows) + first, rows, step):
            _fill(out_ptr + head * K, start, rows, H, K, BLOCK)
        return
    first_token, last_token = _span(cu_seqlens_ptr, sequence, tokens)
    first_row, last_row = _span(query_bounds_ptr, sequence, rows)
    length = last_token - first_token
    if (length <= over) | (length > BLOCK) | (first_row == last_row):
        return
    row, token = first_row + tl.arange(0, BLOCK), first_token + tl.arange(0, BLOCK)
    asked, valid = row < last_row, token < last_token
    q = _load(q_ptr + head.to(tl.int64) * q_head, row, asked, q_row, K)
    k = _load(k_ptr + head.to(tl.int64) * k_head, token, valid, k_row, K)
    v = _load(v_ptr + head.to(tl.int64) * v_head, token, valid, v_row, K)

    seen = valid[None, :]
    if WINDOW is not None:
        position = _positions(query_indices_ptr, row, asked, first_token, first_row, length)
        seen = _sees(position[:, None], tl.arange(0, BLOCK)[None, :], length, WINDOW)
    weights, row_sum = _softmax(q, k, seen, scale, PRECISION)
    if DROPOUT:
        lo, hi = _mask_keys(
            query_indices_ptr,
            dropout_seeds_ptr,
            row,
            asked,
            sequence,
            first_token,
            first_row,
            dropout_stream,
            head,
            HAS_QUERY_INDICES,
        )
        weights = tl.where(keep_mask(lo, hi, 0, BLOCK, threshold), weights, 0.0)
    out = (
        tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) * (keep_scale / row_sum)[:, None]
    )

    _store(out_ptr + head * K, row, asked, H * K, out, K)


_QKV = ("q_ptr", "k_ptr", "v_ptr")
_FORWARD = Kernel(_forward_kernel, "attention_forward", wide=_QKV)
_FORWARD_WINDOW = Kernel(_forward_kernel, "attention_forward_window", wide=_QKV)
_FORWARD_SHORT = Kernel(_forward_short_kernel, "attention_forward_short", wide=_QKV)
_FORWARD_SMALL = Kernel(_forward_short_kernel, f"attention_forward_short_{_SMALL}", wide=_QKV)


def forward(
    q,
    k,
    v,
    cu_seqlens,
    tile_schedule,
    query_indices,
    dropout_seeds,
    max_seqlen,
    dropout_p,
    dropout_stream,
    scale,
    window=None,
):
    """Return out [R, H, K] in q's dtype, and row_max and inv_sum, fp32 [2, H, R].

    The latter are empty where sequences fit one tile.
    """
    rows, heads, size = q.shape
    whole, has_query_indices = one_tile(q.dtype, max_seqlen), query_indices is not None
    out = q.new_empty(rows, heads, size)
    statistics = q.new_empty(2, heads, 0 if whole else rows, dtype=torch.float32)
    if rows == 0:
        return out, statistics
    tables = (_query_bounds(cu_seqlens, query_indices), cu_seqlens, query_indices, dropout_seeds)
    kind = _kind(q, k, v, has_query_indices, dropout_seeds)
    sequences, sizes = cu_seqlens.shape[0] - 1, (rows, k.shape[0])
    numbers = (scale * _LOG2E, keep_scale(dropout_p), dropout_stream, threshold(dropout_p))
    constants = (heads, size, has_query_indices, dropout_p > 0, dot_precision(q.dtype), window)
    if whole:
        for one, programs, over, block in _short(
            _FORWARD_SHORT, _FORWARD_SMALL, sequences, max_seqlen
        ):
            kernel = one.prepare(q, size, constants, kind, BLOCK=block)
            kernel(
                (heads, programs),
                (q, k, v, out, *tables),
                (*kind[0], sequences, *sizes, over, *numbers),
            )
    else:
        schedule = (
            attention_tile_schedule(tables[0], rows)
            if tile_schedule is None or has_query_indices
            else tile_schedule
        )
        kernel = (_FORWARD if window is None else _FORWARD_WINDOW).prepare(q, size, constants, kind)
        grid = (heads, schedule.shape[0] * (ITEM // kernel.tile["BLOCK_Q"]))
        kernel(
            grid,
            (q, k, v, out, *statistics.unbind(), schedule, *tables),
            (*kind[0], sequences, *sizes, *numbers),
        )
    return out, statistics


# Backward


@triton.jit(do_not_specialize=_VARIES)
def _prepare_kernel(
    out_ptr, dout_ptr, delta_ptr, lo_ptr, hi_ptr, schedule_ptr, query_bounds_ptr, cu_seqlens_ptr,
    query_indices_ptr, dropout_seeds_ptr,
    sequences, rows, tokens, keep_scale, dropout_stream,
    H: tl.constexpr, K: tl.constexpr, HAS_QUERY_INDICES: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Compute delta = dO . O / keep_scale of each row, and the keys of its mask.

    The other kernels would compute the keys once for each tile of keys. Without keep_scale in
    delta, D is 0 or 1 in the loops, and the factor comes once, at their end.
    """
    head = tl.program_id(0)
    sequence, offset = _item(schedule_ptr, sequences, BLOCK_Q)
    if (sequence < 0) | (sequence == sequences):
        return
    first_row, last_row = _span(query_bounds_ptr, sequence, rows)
    row = first_row + offset + tl.arange(0, BLOCK_Q)
    valid = row < last_row
    out = _load(out_ptr + head * K, row, valid, H * K, K).to(tl.float32)
    dout = _load(dout_ptr + head * K, row, valid, H * K, K).to(tl.float32)

    slot = head.to(tl.int64) * rows + row
    tl.store(delta_ptr + slot, tl.sum(out * dout, 1) / keep_scale, mask=valid)
    if DROPOUT:
        first_token, _ = _span(cu_seqlens_ptr, sequence, tokens)
        lo, hi = _mask_keys(
            query_indices_ptr,
            dropout_seeds_ptr,
            row,
            valid,
            sequence,
            first_token,
            first_row,
            dropout_stream,
            head,
            HAS_QUERY_INDICES,
        )
        tl.store(lo_ptr + slot, lo.to(tl.int32, bitcast=True), mask=valid)
        tl.store(hi_ptr + slot, hi.to(tl.int32, bitcast=True), mask=valid)


@triton.jit
def _row_facts(
    row_max_ptr, inv_sum_ptr, delta_ptr, lo_ptr, hi_ptr, slot, valid, DROPOUT: tl.constexpr
):
    """Load row_max, inv_sum, delta and mask keys of query rows.

    Where there is no row, inv_sum is zero, and so are its weights.
    """
    lo, hi = slot.to(tl.uint32), slot.to(tl.uint32)
    if valid is None:
        row_max, inv_sum, delta = (
            tl.load(row_max_ptr + slot),
            tl.load(inv_sum_ptr + slot),
            tl.load(delta_ptr + slot),
        )
        if DROPOUT:
            lo = tl.load(lo_ptr + slot).to(tl.uint32, bitcast=True)
            hi = tl.load(hi_ptr + slot).to(tl.uint32, bitcast=True)
    else:
        row_max = tl.load(row_max_ptr + slot, mask=valid, other=0.0)
        inv_sum = tl.load(inv_sum_ptr + slot, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + slot, mask=valid, other=0.0)
        if DROPOUT:
            lo = tl.load(lo_ptr + slot, mask=valid, other=0).to(tl.uint32, bitcast=True)
            hi = tl.load(hi_ptr + slot, mask=valid, other=0).to(tl.uint32, bitcast=True)
    return row_max, inv_sum, delta, lo, hi


@triton.jit
def _dkdv_tile(
    k, v, dk, dv, q_ptr, dout_ptr, row_max_ptr, inv_sum_ptr, delta_ptr, lo_ptr, hi_ptr,
    query_indices_ptr, q_row, dout_row, start, end, first_key, first_token, length,
    scale, threshold,
    K: tl.constexpr, TAIL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to dV but for keep_scale, and to dK but for keep_scale and scale.

    delta is divided by keep_scale.
    """
    row = start + tl.arange(0, BLOCK_Q)
    valid = row < end if TAIL else None
    q = _load(q_ptr, row, valid, q_row, K)
    dout = _load(dout_ptr, row, valid, dout_row, K)
    row_max, inv_sum, delta, lo, hi = _row_facts(
        row_max_ptr, inv_sum_ptr, delta_ptr, lo_ptr, hi_ptr, row, valid, DROPOUT
    )

    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # transposed: [keys, queries]
    if WINDOW is not None:
        position = _positions(query_indices_ptr, row, valid, first_token, 0, length)
        key = first_key + tl.arange(0, BLOCK_K)
        seen = _sees(position[None, :], key[:, None], length, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp2(tl.fma(scores, scale, -row_max[None, :])) * inv_sum[None, :]
    dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    if DROPOUT:
        drop = tl.where(keep_mask_transposed(lo, hi, first_key, BLOCK_K, threshold), 1.0, 0.0)
        dv = tl.dot((weights * drop).to(dout.dtype), dout, dv, input_precision=PRECISION)
        dscores = weights * tl.fma(dweights, drop, -delta[None, :])
    else:
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dscores = weights * (dweights - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_VARIES)
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, row_max_ptr, inv_sum_ptr, delta_ptr, lo_ptr, hi_ptr, dk_ptr,
    dv_ptr, schedule_ptr, query_bounds_ptr, cu_seqlens_ptr, query_indices_ptr, first_query_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head,
    sequences, rows, tokens, scale, keep_scale, threshold,
    H: tl.constexpr, K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    sequence, offset = _item(schedule_ptr, sequences, BLOCK_K)
    if sequence < 0:
        return
    if sequence == sequences:
        first = _rest(cu_seqlens_ptr, sequences, tokens) + offset
        _fill(dk_ptr + head * K, first, tokens, H, K, BLOCK_K)
        _fill(dv_ptr + head * K, first, tokens, H, K, BLOCK_K)
        return
    first_token, last_token = _span(cu_seqlens_ptr, sequence, tokens)
    if first_token + offset >= last_token:
        return
    first_row, last_row = _span(query_bounds_ptr, sequence, rows)

    token = first_token + offset + tl.arange(0, BLOCK_K)
    inside = token < last_token
    k = _load(k_ptr + head.to(tl.int64) * k_head, token, inside, k_row, K)
    v = _load(v_ptr + head.to(tl.int64) * v_head, token, inside, v_row, K)
    dk = tl.zeros([BLOCK_K, triton.next_power_of_2(K)], tl.float32)
    dv = tl.zeros([BLOCK_K, triton.next_power_of_2(K)], tl.float32)
    q_ptr += first_row.to(tl.int64) * q_row + head.to(tl.int64) * q_head
    dout_ptr += first_row.to(tl.int64) * H * K + head * K
    slot = head.to(tl.int64) * rows + first_row
    row_max_ptr, inv_sum_ptr, delta_ptr = row_max_ptr + slot, inv_sum_ptr + slot, delta_ptr + slot
    if DROPOUT:
        lo_ptr, hi_ptr = lo_ptr + slot, hi_ptr + slot
    count, length = last_row - first_row, last_token - first_token
    first, full = 0, count // BLOCK_Q * BLOCK_Q
    if WINDOW is not None:
        first, full = _queries_in_reach(
            first_query_ptr,
            offset,
            offset + BLOCK_K,
            first_token,
            first_row,
            length,
            count,
            WINDOW,
        )
        if query_indices_ptr is not None:
            query_indices_ptr += first_row
    for start in range(first, full, BLOCK_Q):
        if _multiplied_by_fma(k_ptr, PRECISION):
            k = _load(k_ptr + head.to(tl.int64) * k_head, token, inside, k_row, K)
            v = _load(v_ptr + head.to(tl.int64) * v_head, token, inside, v_row, K)
        dk, dv = _dkdv_tile(
            k, v, dk, dv, q_ptr, dout_ptr, row_max_ptr, inv_sum_ptr, delta_ptr, lo_ptr, hi_ptr,
            query_indices_ptr, q_row, H * K, start, full, offset, first_token, length,
            scale, threshold,
            K, WINDOW is not None, DROPOUT, PRECISION, WINDOW, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    if WINDOW is None and full < count:
        dk, dv = _dkdv_tile(
            k, v, dk, dv, q_ptr, dout_ptr, row_max_ptr, inv_sum_ptr, delta_ptr, lo_ptr, hi_ptr,
            query_indices_ptr, q_row, H * K, full, count, offset, first_token, length,
            scale, threshold,
            K, True, DROPOUT, PRECISION, WINDOW, BLOCK_Q, BLOCK_K,
        )  # fmt: skip

    _store(
        dk_ptr + head * K, token, inside, H * K, dk * (scale * keep_scale * _LN2), K
    )  # scale holds log2(e): ln 2 takes it out
    _store(dv_ptr + head * K, token, inside, H * K, dv * keep_scale, K)


@triton.jit
def _dq_tile(
    q, dout, dq, row_max, delta, lo, hi, position, k_ptr, v_ptr, k_row, v_row, start, length, scale,
    threshold,
    K: tl.constexpr, TAIL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to dQ, but for the factor scale * keep_scale * inv_sum of each row.

    delta is divided by keep_scale.
    """
    key = start + tl.arange(0, BLOCK_K)
    valid = key < length if TAIL else None
    k = _load(k_ptr, key, valid, k_row, K)
    v = _load(v_ptr, key, valid, v_row, K)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if WINDOW is not None:
        seen = _sees(position[:, None], key[None, :], length, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    elif TAIL:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    weights = tl.exp2(tl.fma(scores, scale, -row_max[:, None]))
    if DROPOUT:
        dweights = tl.where(keep_mask(lo, hi, start, BLOCK_K, threshold), dweights, 0.0)
    dscores = weights * (dweights - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=_VARIES)
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, row_max_ptr, inv_sum_ptr, delta_ptr, lo_ptr, hi_ptr, dq_ptr,
    schedule_ptr, query_bounds_ptr, cu_seqlens_ptr, query_indices_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head,
    sequences, rows, tokens, scale, keep_scale, threshold,
    H: tl.constexpr, K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    sequence, offset = _item(schedule_ptr, sequences, BLOCK_Q)
    if sequence < 0:
        return
    if sequence == sequences:
        _fill(
            dq_ptr + head * K,
            _rest(query_bounds_ptr, sequences, rows) + offset,
            rows,
            H,
            K,
            BLOCK_Q,
        )
        return
    first_row, last_row = _span(query_bounds_ptr, sequence, rows)
    if first_row + offset >= last_row:
        return
    first_token, last_token = _span(cu_seqlens_ptr, sequence, tokens)
    length = last_token - first_token

    row = first_row + offset + tl.arange(0, BLOCK_Q)
    valid = row < last_row
    q = _load(q_ptr + head.to(tl.int64) * q_head, row, valid, q_row, K)
    dout = _load(dout_ptr + head * K, row, valid, H * K, K)
    slot = head.to(tl.int64) * rows + row
    row_max, inv_sum, delta, lo, hi = _row_facts(
        row_max_ptr, inv_sum_ptr, delta_ptr, lo_ptr, hi_ptr, slot, valid, DROPOUT
    )
    k_ptr += first_token.to(tl.int64) * k_row + head.to(tl.int64) * k_head
    v_ptr += first_token.to(tl.int64) * v_row + head.to(tl.int64) * v_head

    dq = tl.zeros([BLOCK_Q, triton.next_power_of_2(K)], tl.float32)
    position, first, full = row, 0, length // BLOCK_K * BLOCK_K
    if WINDOW is not None:
        position = _positions(query_indices_ptr, row, valid, first_token, first_row, length)
        first, full = _keys_in_reach(
            query_indices_ptr,
            first_row + offset,
            tl.minimum(first_row + offset + BLOCK_Q, last_row),
            first_token,
            first_row,
            length,
            WINDOW,
        )
    for start in range(first, full, BLOCK_K):
        if _multiplied_by_fma(q_ptr, PRECISION):
            q = _load(q_ptr + head.to(tl.int64) * q_head, row, valid, q_row, K)
            dout = _load(dout_ptr + head * K, row, valid, H * K, K)
        dq = _dq_tile(
            q, dout, dq, row_max, delta, lo, hi, position, k_ptr, v_ptr, k_row, v_row, start,
            length, scale, threshold,
            K, WINDOW is not None, DROPOUT, PRECISION, WINDOW, BLOCK_K,
        )  # fmt: skip
    if WINDOW is None and full < length:
        dq = _dq_tile(
            q, dout, dq, row_max, delta, lo, hi, position, k_ptr, v_ptr, k_row, v_row, full,
            length, scale, threshold,
            K, True, DROPOUT, PRECISION, WINDOW, BLOCK_K,
        )  # fmt: skip
    _store(
        dq_ptr + head * K,
        row,
        valid,
        H * K,
        dq * (inv_sum * (scale * keep_scale * _LN2))[:, None],
        K,
    )


@triton.jit(do_not_specialize=_VARIES)
def _backward_short_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr, query_bounds_ptr, cu_seqlens_ptr,
    query_indices_ptr, dropout_seeds_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head,
    sequences, rows, tokens, over, scale, keep_scale, dropout_stream, threshold,
    H: tl.constexpr, K: tl.constexpr, HAS_QUERY_INDICES: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    if sequence >= sequences:
        first, step = (sequence - sequences) * BLOCK, (tl.num_programs(1) - sequences) * BLOCK
        for start in range(_rest(query_bounds_ptr, sequences, rows) + first, rows, step):
            _fill(dq_ptr + head * K, start, rows, H, K, BLOCK)
        for start in range(_rest(cu_seqlens_ptr, sequences, tokens) + first, tokens, step):
            _fill(dk_ptr + head * K, start, tokens, H, K, BLOCK)
            _fill(dv_ptr + head * K, start, tokens, H, K, BLOCK)
        return
    first_token, last_token = _span(cu_seqlens_ptr, sequence, tokens)
    first_row, last_row = _span(query_bounds_ptr, sequence, rows)
    length = last_token - first_token
    if (length <= over) | (length > BLOCK):
        return
    row, token = first_row + tl.arange(0, BLOCK), first_token + tl.arange(0, BLOCK)
    asked, valid = row < last_row, token < last_token
    q = _load(q_ptr + head.to(tl.int64) * q_head, row, asked, q_row, K)
    k = _load(k_ptr + head.to(tl.int64) * k_head, token, valid, k_row, K)
    v = _load(v_ptr + head.to(tl.int64) * v_head, token, valid, v_row, K)
    dout = _load(dout_ptr + head * K, row, asked, H * K, K)

    seen = valid[None, :]
    if WINDOW is not None:
        position = _positions(query_indices_ptr, row, asked, first_token, first_row, length)
        seen = _sees(position[:, None], tl.arange(0, BLOCK)[None, :], length, WINDOW)
    weights, row_sum = _softmax(q, k, seen, scale, PRECISION)
    weights /= row_sum[:, None]
    dropped = weights
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        lo, hi = _mask_keys(
            query_indices_ptr,
            dropout_seeds_ptr,
            row,
            asked,
            sequence,
            first_token,
            first_row,
            dropout_stream,
            head,
            HAS_QUERY_INDICES,
        )
        keep = keep_mask(lo, hi, 0, BLOCK, threshold)
        dropped = tl.where(keep, weights, 0.0)
        dweights = tl.where(keep, dweights * keep_scale, 0.0)
    dv = tl.dot(tl.trans(dropped.to(dout.dtype)), dout, input_precision=PRECISION) * keep_scale
    _store(dv_ptr + head * K, token, valid, H * K, dv, K)

    delta = tl.sum(weights * dweights, 1)
    dscores = (weights * (dweights - delta[:, None])).to(k.dtype)
    natural = scale * _LN2  # scale holds log2(e): ln 2 takes it out
    _store(
        dq_ptr + head * K,
        row,
        asked,
        H * K,
        tl.dot(dscores, k, input_precision=PRECISION) * natural,
        K,
    )
    _store(
        dk_ptr + head * K,
        token,
        valid,
        H * K,
        tl.dot(tl.trans(dscores), q, input_precision=PRECISION) * natural,
        K,
    )


_QKV_DOUT = (*_QKV, "dout_ptr")
_BACKWARD_SHORT = Kernel(_backward_short_kernel, "attention_backward_short", wide=_QKV_DOUT)
_BACKWARD_SMALL = Kernel(
    _backward_short_kernel, f"attention_backward_short_{_SMALL}", wide=_QKV_DOUT
)
_PREPARE = Kernel(_prepare_kernel, "attention_prepare", wide=("out_ptr", "dout_ptr"))
_DKDV = Kernel(_dkdv_kernel, "attention_dkdv", wide=_QKV_DOUT)
_DQ = Kernel(_dq_kernel, "attention_dq", wide=_QKV_DOUT)
_DKDV_WINDOW = Kernel(_dkdv_kernel, "attention_dkdv_window", wide=_QKV_DOUT)
_DQ_WINDOW = Kernel(_dq_kernel, "attention_dq_window", wide=_QKV_DOUT)


def backward(
    dout,
    q,
    k,
    v,
    out,
    statistics,
    cu_seqlens,
    tile_schedule,
    query_indices,
    dropout_seeds,
    max_seqlen,
    dropout_p,
    dropout_stream,
    scale,
    window=None,
):
    """Return dq [R, H, K], dk and dv [T, H, K], contiguous, in q's dtype; dout is contiguous."""
    (rows, heads, size), tokens = q.shape, k.shape[0]
    dq, dk, dv = (
        q.new_empty(rows, heads, size),
        q.new_empty(tokens, heads, size),
        q.new_empty(tokens, heads, size),
    )
    if tokens == 0:
        return dq, dk, dv
    has_query_indices, drop, precision = (
        query_indices is not None,
        dropout_p > 0,
        dot_precision(q.dtype),
    )
    tables = (_query_bounds(cu_seqlens, query_indices), cu_seqlens, query_indices, dropout_seeds)
    kind = _kind(q, k, v, has_query_indices, dropout_seeds)
    sequences, sizes, scales = (
        cu_seqlens.shape[0] - 1,
        (rows, tokens),
        (scale * _LOG2E, keep_scale(dropout_p)),
    )
    if one_tile(q.dtype, max_seqlen):
        numbers, constants = (
            (*scales, dropout_stream, threshold(dropout_p)),
            (heads, size, has_query_indices, drop, precision, window),
        )
        for one, programs, over, block in _short(
            _BACKWARD_SHORT, _BACKWARD_SMALL, sequences, max_seqlen
        ):
            kernel = one.prepare(q, size, constants, kind, BLOCK=block)
            kernel(
                (heads, programs),
                (q, k, v, dout, dq, dk, dv, *tables),
                (*kind[0], sequences, *sizes, over, *numbers),
            )
        return dq, dk, dv

    key_schedule = (
        attention_tile_schedule(cu_seqlens, tokens) if tile_schedule is None else tile_schedule
    )
    schedule = attention_tile_schedule(tables[0], rows) if has_query_indices else key_schedule
    delta = statistics.new_empty(heads, rows)
    lo, hi = (delta.new_empty(heads, rows, dtype=torch.int32) if drop else None for _ in range(2))
    kernel = _PREPARE.prepare(q, size, (heads, size, has_query_indices, drop), kind)
    grid = (heads, schedule.shape[0] * (ITEM // kernel.tile["BLOCK_Q"]))
    kernel(
        grid,
        (out, dout, delta, lo, hi, schedule, *tables),
        (sequences, *sizes, scales[1], dropout_stream),
    )

    pointers, facts = (q, k, v, dout), (*statistics.unbind(), delta, lo, hi)
    numbers = (*kind[0], sequences, *sizes, *scales, threshold(dropout_p))
    places = None if window is None else query_indices  # where the queries are, if it matters
    of_k, of_q = (_DKDV, _DQ) if window is None else (_DKDV_WINDOW, _DQ_WINDOW)
    kernel = of_k.prepare(q, size, (heads, size, drop, precision, window), kind)
    grid = (heads, key_schedule.shape[0] * (ITEM // kernel.tile["BLOCK_K"]))
    first_queries = _first_queries(places, tokens)
    pointers_of_k = (*facts, dk, dv, key_schedule, *tables[:2], places, first_queries)
    kernel(grid, (*pointers, *pointers_of_k), numbers)

    kernel = of_q.prepare(q, size, (heads, size, drop, precision, window), kind)
    grid = (heads, schedule.shape[0] * (ITEM // kernel.tile["BLOCK_Q"]))
    kernel(grid, (*pointers, *facts, dq, schedule, *tables[:2], places), numbers)
    return dq, dk, dv
