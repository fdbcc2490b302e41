"""Varlen attention in Triton: online softmax over tiles of keys, dropout by hash, nothing of size n x n in memory.

For one head of one sequence, with D the keep mask over its probability to be kept (1 without dropout):

    S = scale log2(e) Q K'      top_i = max_j S_ij      W = 2^(S - top)      share_i = 1 / sum_j W_ij      P = W share      O = (P D) V
    dV = (P D)' dO      dP = D (dO V')      dS = P (dP - delta)      delta_i = sum_j P_ij dP_ij = dO_i . O_i
    dQ = scale dS K      dK = scale dS' Q

Exponentials are to the base 2, as the hardware has them. Saved: q, k, v, O, top and share (fp32 [2, H, R]). Not their one-number
form top - log2(share): W made anew from that differs from the first one by the rounding of a number of the size of the scores,
which costs fp32 gradients half a digit.

Sequences of all lengths: a program owns a tile of queries of one head and walks over the keys (forward, dQ), or owns a tile of
keys and walks over the queries (dK and dV, on transposed scores, so that P' and dS' are first operands as they are). Scores are made
twice in the backward pass; in return no program adds to what another one writes: no atomics, and the same bits at every run. The tail
of a sequence, where columns must be masked, is a tile of its own after the loop; full tiles are not masked at all.

Sequences that all fit one tile (`one_tile`): a program owns a whole head of a sequence, forward and backward. The backward
pass then has whole rows of scores before it, makes them once, and needs nothing saved but q, k and v. The tile is one of 64 for a sequence
of up to 64 tokens and one of 128 for a longer one, each in a launch of its own: a 40-token sequence does not pay for the longest of
its pack.

Rows behind the last sequence of a padded pack are filled with zeros by programs that have nothing else to do.

Source: Dao, 2023 (FlashAttention-2), algorithms 1 and 2.
"""

import itertools
import math

import torch
import triton
import triton.language as tl

from fastbert_kernels._dropout import keep_scale, threshold
from fastbert_kernels._launch import Kernel
from fastbert_kernels._triton import (
    Production,
    dot_precision,
    keep_mask,
    keep_mask_transposed,
    row_key,
    site_keys,
)
from fastbert_kernels._worklist import ITEM, attention_worklist, one_tile

_LOG2E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2))
_ITEM = tl.constexpr(ITEM)
_SMALL = (
    ITEM // 2
)  # tokens: sequences of more take a tile of ITEM, where one tile holds a whole sequence
_REST = 8  # programs of a head that fill the rows behind the last sequence, where no list of work has them
_VARIES = [
    "sequences",
    "rows",
    "tokens",
    "over",
    "scale",
    "keep_scale",
    "site",
    "threshold",
]  # not worth a compilation for each value


# ------------------------------------------------------------------------------------------------------------- shared pieces


@triton.jit
def _load(ptr, row, valid, stride, K: tl.constexpr):
    """Rows of one head, [BLOCK, K rounded up to a power of two]; zeros beyond K and where not `valid` (None: all are)."""
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
def _item(work_ptr, sequences, BLOCK: tl.constexpr):
    """Sequence of this program's item (-1: none, `sequences`: the rows behind the last one), and its first row within the sequence.

    ITEM // BLOCK programs share an item.
    """
    SHARE: tl.constexpr = _ITEM // BLOCK
    program = tl.program_id(1)
    entry = work_ptr + 2 * (program // SHARE)
    sequence, first = tl.load(entry), tl.load(entry + 1)
    if sequence > sequences or first < 0:  # the list of another batch
        sequence = -1
    return sequence, first + program % SHARE * BLOCK


@triton.jit
def _span(bounds_ptr, sequence, total):
    """First row of a sequence, and of the next; within [0, total] whatever the bounds say."""
    first = tl.minimum(tl.maximum(tl.load(bounds_ptr + sequence), 0), total)
    return first, tl.minimum(tl.maximum(tl.load(bounds_ptr + sequence + 1), first), total)


@triton.jit
def _rest(bounds_ptr, sequences, total):
    """The first row behind the last sequence, within [0, total]."""
    return tl.minimum(tl.maximum(tl.load(bounds_ptr + sequences), 0), total)


@triton.jit
def _fill(ptr, first, total, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros to BLOCK rows."""
    row = first + tl.arange(0, BLOCK)
    _store(
        ptr, row, row < total, H * K, tl.zeros([BLOCK, triton.next_power_of_2(K)], tl.float32), K
    )


@triton.constexpr_function
def _multiplied_by_fma(ptr, precision):
    """Whether dot products run outside the matrix units. Operands are then rows of registers: one that is kept through a loop spills
    (2 KB a thread at K = 64), so it is loaded anew for each tile, from the L1 cache."""
    return ptr.dtype.element_ty == tl.float32 and precision == "ieee"


@triton.jit
def _mask_keys(
    queries_ptr,
    keys_ptr,
    row,
    valid,
    sequence,
    first_token,
    first_row,
    site,
    head,
    CUT: tl.constexpr,
):
    """The two keys of each query row's mask: a function of where in its sequence the query stands."""
    if CUT:
        position = tl.load(queries_ptr + row, mask=valid, other=0) - first_token
    else:
        position = row - first_row
    return site_keys(row_key(tl.load(keys_ptr + sequence), position), site, head)


def _short(long, short, sequences, max_seqlen):
    """The launches of a kernel that holds a whole sequence in one tile: the `Kernel`, programs of a head, `over`, BLOCK.

    How many sequences are long and how many are short only the device knows. So each launch has a program for every sequence, and those
    whose sequence belongs to the other launch end at once. Long ones have the whole device busy first.
    """
    if max_seqlen > _SMALL and sequences:
        yield long, sequences, _SMALL, ITEM
    yield short, sequences + _REST, 0, max(16, 1 << (min(max_seqlen, _SMALL) - 1).bit_length())


def _kind(q, k, v, cut, keys):
    """What Triton compiles for besides constants: strides, which come first, and which of queries and keys there are."""
    return (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]), cut, keys is None


def _query_bounds(cu_seqlens, queries):
    """First query row of each sequence, int32 [B + 1]."""
    return (
        cu_seqlens
        if queries is None
        else torch.searchsorted(queries, cu_seqlens.long(), out_int32=True)
    )


# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _attend(
    q, acc, top, total, k_ptr, v_ptr, k_row, v_row, start, length, lo, hi, scale, threshold,
    K: tl.constexpr, TAIL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax of a tile of queries: `top` the maximum, `total` the sum of W, `acc` of W D V."""
    key = start + tl.arange(0, BLOCK_K)
    valid = key < length if TAIL else None
    k = _load(k_ptr, key, valid, k_row, K)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if TAIL:
        scores = tl.where(valid[None, :], scores, float("-inf"))

    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(tl.fma(scores, scale, -new_top[:, None]))
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    if DROPOUT:
        # A product, not a selection: that the compiler would move behind the rounding to 16 bits, where pairs are packed. And one with
        # constants: with keep_scale here, masks wait for the scores as packed bits (three instructions more a score, of 17, on sm_90).
        weights *= tl.where(keep_mask(lo, hi, start, BLOCK_K, threshold), 1.0, 0.0)

    v = _load(v_ptr, key, valid, v_row, K)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=_VARIES)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, top_ptr, share_ptr, work_ptr, query_bounds_ptr, cu_seqlens_ptr, queries_ptr, keys_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head,
    sequences, rows, tokens, scale, keep_scale, site, threshold,
    H: tl.constexpr, K: tl.constexpr, CUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    sequence, offset = _item(work_ptr, sequences, BLOCK_Q)
    if sequence < 0:
        return
    if sequence == sequences:
        start = _rest(query_bounds_ptr, sequences, rows) + offset
        _fill(out_ptr + head * K, start, rows, H, K, BLOCK_Q)
        row = start + tl.arange(0, BLOCK_Q)
        slot, nothing = head.to(tl.int64) * rows + row, tl.zeros([BLOCK_Q], tl.float32)
        tl.store(top_ptr + slot, nothing, mask=row < rows)
        tl.store(share_ptr + slot, nothing, mask=row < rows)
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
            queries_ptr, keys_ptr, row, valid, sequence, first_token, first_row, site, head, CUT
        )

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, triton.next_power_of_2(K)], tl.float32)
    full = length // BLOCK_K * BLOCK_K
    for start in range(0, full, BLOCK_K):
        if _multiplied_by_fma(q_ptr, PRECISION):
            q = _load(q_ptr + head.to(tl.int64) * q_head, row, valid, q_row, K)
        acc, top, total = _attend(
            q, acc, top, total, k_ptr, v_ptr, k_row, v_row, start, length, lo, hi, scale, threshold,
            K, False, DROPOUT, PRECISION, BLOCK_K,
        )  # fmt: skip
    if full < length:
        acc, top, total = _attend(
            q, acc, top, total, k_ptr, v_ptr, k_row, v_row, full, length, lo, hi, scale, threshold,
            K, True, DROPOUT, PRECISION, BLOCK_K,
        )  # fmt: skip

    share = 1.0 / total
    _store(out_ptr + head * K, row, valid, H * K, acc * (share * keep_scale)[:, None], K)
    slot = head.to(tl.int64) * rows + row
    tl.store(top_ptr + slot, top, mask=valid)
    tl.store(share_ptr + slot, share, mask=valid)


@triton.jit
def _softmax(q, k, valid, scale, PRECISION: tl.constexpr):
    """W over all keys of a sequence, and its sum in each row."""
    scores = tl.where(
        valid[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf")
    )
    weights = tl.exp2((scores - tl.max(scores, 1)[:, None]) * scale)
    return weights, tl.sum(weights, 1)


@triton.jit(do_not_specialize=_VARIES)
def _forward_short_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, query_bounds_ptr, cu_seqlens_ptr, queries_ptr, keys_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head,
    sequences, rows, tokens, over, scale, keep_scale, site, threshold,
    H: tl.constexpr, K: tl.constexpr, CUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
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

    weights, total = _softmax(q, k, valid, scale, PRECISION)
    if DROPOUT:
        lo, hi = _mask_keys(
            queries_ptr, keys_ptr, row, asked, sequence, first_token, first_row, site, head, CUT
        )
        weights = tl.where(keep_mask(lo, hi, 0, BLOCK, threshold), weights, 0.0)
    out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) * (keep_scale / total)[:, None]

    _store(out_ptr + head * K, row, asked, H * K, out, K)


_FORWARD = Kernel(_forward_kernel, "attention_forward")
_FORWARD_SHORT = Kernel(_forward_short_kernel, "attention_forward_short")
_FORWARD_SMALL = Kernel(_forward_short_kernel, f"attention_forward_short_{_SMALL}")


def forward(q, k, v, cu_seqlens, worklist, queries, keys, max_seqlen, dropout_p, site, scale):
    """Out [R, H, K] in q's dtype, and top and share, fp32 [2, H, R]; those are empty where sequences fit one tile."""
    rows, heads, size = q.shape
    whole, cut = one_tile(q.dtype, max_seqlen), queries is not None
    out = q.new_empty(rows, heads, size)
    statistics = q.new_empty(2, heads, 0 if whole else rows, dtype=torch.float32)
    if rows == 0:
        return out, statistics
    tables = (_query_bounds(cu_seqlens, queries), cu_seqlens, queries, keys)
    kind = _kind(q, k, v, cut, keys)
    sequences, sizes = cu_seqlens.shape[0] - 1, (rows, k.shape[0])
    numbers = (scale * _LOG2E, keep_scale(dropout_p), site, threshold(dropout_p))
    constants = (heads, size, cut, dropout_p > 0, dot_precision(q.dtype))
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
        work = attention_worklist(tables[0], rows) if worklist is None or cut else worklist
        kernel = _FORWARD.prepare(q, size, constants, kind)
        grid = (heads, work.shape[0] * (ITEM // kernel.tile["BLOCK_Q"]))
        kernel(
            grid,
            (q, k, v, out, *statistics.unbind(), work, *tables),
            (*kind[0], sequences, *sizes, *numbers),
        )
    return out, statistics


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=_VARIES)
def _prepare_kernel(
    out_ptr, dout_ptr, delta_ptr, lo_ptr, hi_ptr, work_ptr, query_bounds_ptr, cu_seqlens_ptr, queries_ptr, keys_ptr,
    sequences, rows, tokens, keep_scale, site,
    H: tl.constexpr, K: tl.constexpr, CUT: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta = dO . O / keep_scale of each row, and the keys of its mask, which the other kernels would make once for each tile of keys.

    Without keep_scale in it, D is 0 or 1 in the loops, and the factor comes once, at their end.
    """
    head = tl.program_id(0)
    sequence, offset = _item(work_ptr, sequences, BLOCK_Q)
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
            queries_ptr, keys_ptr, row, valid, sequence, first_token, first_row, site, head, CUT
        )
        tl.store(lo_ptr + slot, lo.to(tl.int32, bitcast=True), mask=valid)
        tl.store(hi_ptr + slot, hi.to(tl.int32, bitcast=True), mask=valid)


@triton.jit
def _row_facts(top_ptr, share_ptr, delta_ptr, lo_ptr, hi_ptr, slot, valid, DROPOUT: tl.constexpr):
    """top, share, delta and mask keys of query rows. Where there is no row share is zero, and so are its weights."""
    lo, hi = slot.to(tl.uint32), slot.to(tl.uint32)
    if valid is None:
        top, share, delta = (
            tl.load(top_ptr + slot),
            tl.load(share_ptr + slot),
            tl.load(delta_ptr + slot),
        )
        if DROPOUT:
            lo = tl.load(lo_ptr + slot).to(tl.uint32, bitcast=True)
            hi = tl.load(hi_ptr + slot).to(tl.uint32, bitcast=True)
    else:
        top = tl.load(top_ptr + slot, mask=valid, other=0.0)
        share = tl.load(share_ptr + slot, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + slot, mask=valid, other=0.0)
        if DROPOUT:
            lo = tl.load(lo_ptr + slot, mask=valid, other=0).to(tl.uint32, bitcast=True)
            hi = tl.load(hi_ptr + slot, mask=valid, other=0).to(tl.uint32, bitcast=True)
    return top, share, delta, lo, hi


@triton.jit
def _dkdv_tile(
    k, v, dk, dv, q_ptr, dout_ptr, top_ptr, share_ptr, delta_ptr, lo_ptr, hi_ptr, q_row, dout_row, start, end, first_key,
    scale, threshold,
    K: tl.constexpr, TAIL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to dV but for keep_scale, and to dK but for keep_scale and scale. delta is divided by keep_scale."""
    row = start + tl.arange(0, BLOCK_Q)
    valid = row < end if TAIL else None
    q = _load(q_ptr, row, valid, q_row, K)
    dout = _load(dout_ptr, row, valid, dout_row, K)
    top, share, delta, lo, hi = _row_facts(
        top_ptr, share_ptr, delta_ptr, lo_ptr, hi_ptr, row, valid, DROPOUT
    )

    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # transposed: [keys, queries]
    weights = tl.exp2(tl.fma(scores, scale, -top[None, :])) * share[None, :]
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
    q_ptr, k_ptr, v_ptr, dout_ptr, top_ptr, share_ptr, delta_ptr, lo_ptr, hi_ptr, dk_ptr, dv_ptr, work_ptr, query_bounds_ptr, cu_seqlens_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head,
    sequences, rows, tokens, scale, keep_scale, threshold,
    H: tl.constexpr, K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    sequence, offset = _item(work_ptr, sequences, BLOCK_K)
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
    top_ptr, share_ptr, delta_ptr = top_ptr + slot, share_ptr + slot, delta_ptr + slot
    if DROPOUT:
        lo_ptr, hi_ptr = lo_ptr + slot, hi_ptr + slot
    count = last_row - first_row
    full = count // BLOCK_Q * BLOCK_Q
    for start in range(0, full, BLOCK_Q):
        if _multiplied_by_fma(k_ptr, PRECISION):
            k = _load(k_ptr + head.to(tl.int64) * k_head, token, inside, k_row, K)
            v = _load(v_ptr + head.to(tl.int64) * v_head, token, inside, v_row, K)
        dk, dv = _dkdv_tile(
            k, v, dk, dv, q_ptr, dout_ptr, top_ptr, share_ptr, delta_ptr, lo_ptr, hi_ptr, q_row, H * K, start, count, offset,
            scale, threshold, K, False, DROPOUT, PRECISION, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    if full < count:
        dk, dv = _dkdv_tile(
            k, v, dk, dv, q_ptr, dout_ptr, top_ptr, share_ptr, delta_ptr, lo_ptr, hi_ptr, q_row, H * K, full, count, offset,
            scale, threshold, K, True, DROPOUT, PRECISION, BLOCK_Q, BLOCK_K,
        )  # fmt: skip

    _store(
        dk_ptr + head * K, token, inside, H * K, dk * (scale * keep_scale * _LN2), K
    )  # scale holds log2(e): ln 2 takes it out
    _store(dv_ptr + head * K, token, inside, H * K, dv * keep_scale, K)


@triton.jit
def _dq_tile(
    q, dout, dq, top, delta, lo, hi, k_ptr, v_ptr, k_row, v_row, start, length, scale, threshold,
    K: tl.constexpr, TAIL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to dQ, but for the factor scale * keep_scale * share of each row. delta is divided by keep_scale."""
    key = start + tl.arange(0, BLOCK_K)
    valid = key < length if TAIL else None
    k = _load(k_ptr, key, valid, k_row, K)
    v = _load(v_ptr, key, valid, v_row, K)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if TAIL:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    weights = tl.exp2(tl.fma(scores, scale, -top[:, None]))
    if DROPOUT:
        dweights = tl.where(keep_mask(lo, hi, start, BLOCK_K, threshold), dweights, 0.0)
    dscores = weights * (dweights - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=_VARIES)
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, top_ptr, share_ptr, delta_ptr, lo_ptr, hi_ptr, dq_ptr, work_ptr, query_bounds_ptr, cu_seqlens_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head,
    sequences, rows, tokens, scale, keep_scale, threshold,
    H: tl.constexpr, K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    sequence, offset = _item(work_ptr, sequences, BLOCK_Q)
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
    top, share, delta, lo, hi = _row_facts(
        top_ptr, share_ptr, delta_ptr, lo_ptr, hi_ptr, slot, valid, DROPOUT
    )
    k_ptr += first_token.to(tl.int64) * k_row + head.to(tl.int64) * k_head
    v_ptr += first_token.to(tl.int64) * v_row + head.to(tl.int64) * v_head

    dq = tl.zeros([BLOCK_Q, triton.next_power_of_2(K)], tl.float32)
    full = length // BLOCK_K * BLOCK_K
    for start in range(0, full, BLOCK_K):
        if _multiplied_by_fma(q_ptr, PRECISION):
            q = _load(q_ptr + head.to(tl.int64) * q_head, row, valid, q_row, K)
            dout = _load(dout_ptr + head * K, row, valid, H * K, K)
        dq = _dq_tile(
            q, dout, dq, top, delta, lo, hi, k_ptr, v_ptr, k_row, v_row, start, length, scale, threshold,
            K, False, DROPOUT, PRECISION, BLOCK_K,
        )  # fmt: skip
    if full < length:
        dq = _dq_tile(
            q, dout, dq, top, delta, lo, hi, k_ptr, v_ptr, k_row, v_row, full, length, scale, threshold,
            K, True, DROPOUT, PRECISION, BLOCK_K,
        )  # fmt: skip
    _store(
        dq_ptr + head * K, row, valid, H * K, dq * (share * (scale * keep_scale * _LN2))[:, None], K
    )


@triton.jit(do_not_specialize=_VARIES)
def _backward_short_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr, query_bounds_ptr, cu_seqlens_ptr, queries_ptr, keys_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head,
    sequences, rows, tokens, over, scale, keep_scale, site, threshold,
    H: tl.constexpr, K: tl.constexpr, CUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
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

    weights, total = _softmax(q, k, valid, scale, PRECISION)
    weights /= total[:, None]
    dropped = weights
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        lo, hi = _mask_keys(
            queries_ptr, keys_ptr, row, asked, sequence, first_token, first_row, site, head, CUT
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


_BACKWARD_SHORT = Kernel(_backward_short_kernel, "attention_backward_short")
_BACKWARD_SMALL = Kernel(_backward_short_kernel, f"attention_backward_short_{_SMALL}")
_PREPARE = Kernel(_prepare_kernel, "attention_prepare")
_DKDV = Kernel(_dkdv_kernel, "attention_dkdv")
_DQ = Kernel(_dq_kernel, "attention_dq")


def backward(
    dout,
    q,
    k,
    v,
    out,
    statistics,
    cu_seqlens,
    worklist,
    queries,
    keys,
    max_seqlen,
    dropout_p,
    site,
    scale,
):
    """dq [R, H, K], dk and dv [T, H, K], contiguous, in q's dtype; dout contiguous."""
    (rows, heads, size), tokens = q.shape, k.shape[0]
    dq, dk, dv = (
        q.new_empty(rows, heads, size),
        q.new_empty(tokens, heads, size),
        q.new_empty(tokens, heads, size),
    )
    if tokens == 0:
        return dq, dk, dv
    cut, drop, precision = queries is not None, dropout_p > 0, dot_precision(q.dtype)
    tables = (_query_bounds(cu_seqlens, queries), cu_seqlens, queries, keys)
    kind = _kind(q, k, v, cut, keys)
    sequences, sizes, scales = (
        cu_seqlens.shape[0] - 1,
        (rows, tokens),
        (scale * _LOG2E, keep_scale(dropout_p)),
    )
    if one_tile(q.dtype, max_seqlen):
        numbers, constants = (
            (*scales, site, threshold(dropout_p)),
            (heads, size, cut, drop, precision),
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

    key_work = attention_worklist(cu_seqlens, tokens) if worklist is None else worklist
    work = attention_worklist(tables[0], rows) if cut else key_work
    delta = statistics.new_empty(heads, rows)
    lo, hi = (delta.new_empty(heads, rows, dtype=torch.int32) if drop else None for _ in range(2))
    kernel = _PREPARE.prepare(q, size, (heads, size, cut, drop), kind)
    grid = (heads, work.shape[0] * (ITEM // kernel.tile["BLOCK_Q"]))
    kernel(grid, (out, dout, delta, lo, hi, work, *tables), (sequences, *sizes, scales[1], site))

    pointers, facts = (q, k, v, dout), (*statistics.unbind(), delta, lo, hi)
    numbers = (*kind[0], sequences, *sizes, *scales, threshold(dropout_p))
    kernel = _DKDV.prepare(q, size, (heads, size, drop, precision), kind)
    grid = (heads, key_work.shape[0] * (ITEM // kernel.tile["BLOCK_K"]))
    kernel(grid, (*pointers, *facts, dk, dv, key_work, *tables[:2]), numbers)

    kernel = _DQ.prepare(q, size, (heads, size, drop, precision), kind)
    grid = (heads, work.shape[0] * (ITEM // kernel.tile["BLOCK_Q"]))
    kernel(grid, (*pointers, *facts, dq, work, *tables[:2]), numbers)
    return dq, dk, dv


def production() -> list[Production]:
    """For the ahead-of-time gate: BERT-base's and BERT-large's heads of 64, q, k and v sliced out of one projection, with and without dropout."""
    found = []
    for dtype, tensor in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        q, k, v, out, dout = ((f"{name}_ptr", tensor) for name in ("q", "k", "v", "out", "dout"))
        gradients = dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr"), tensor)
        bounds = dict.fromkeys(("work_ptr", "query_bounds_ptr", "cu_seqlens_ptr"), "*i32")
        strides = dict.fromkeys(("q_row", "q_head", "k_row", "k_head", "v_row", "v_head"), "i32")
        facts = dict.fromkeys(("top_ptr", "share_ptr", "delta_ptr"), "*fp32") | dict.fromkeys(
            ("lo_ptr", "hi_ptr"), "*i32"
        )
        numbers = {
            "sequences": "i32",
            "rows": "i32",
            "tokens": "i32",
            "over": "i32",
            "scale": "fp32",
            "keep_scale": "fp32",
            "site": "i32",
            "threshold": "i32",
        }
        sizes = {
            "H": 12,
            "K": 64,
            "CUT": False,
            "PRECISION": dot_precision(dtype),
            "queries_ptr": None,
            "keys_ptr": "*i64",
        }
        inputs = dict((q, k, v, out, dout)) | gradients | bounds | strides | facts | numbers | sizes
        walked = {  # the operands of each kernel whose loads must be wide
            _forward_short_kernel: ("attention_forward_short", "q_ptr", "k_ptr", "v_ptr"),
            _forward_kernel: ("attention_forward", "q_ptr", "k_ptr", "v_ptr"),
            _backward_short_kernel: (
                "attention_backward_short",
                "q_ptr",
                "k_ptr",
                "v_ptr",
                "dout_ptr",
            ),
            _prepare_kernel: ("attention_prepare", "out_ptr", "dout_ptr"),
            _dkdv_kernel: ("attention_dkdv", "q_ptr", "k_ptr", "v_ptr", "dout_ptr"),
            _dq_kernel: ("attention_dq", "q_ptr", "k_ptr", "v_ptr", "dout_ptr"),
        }
        for kernel, (table, *wide) in walked.items():
            # (table, BLOCK) of each size class: two, where one tile holds a whole sequence; BLOCK is not in the table then.
            classes = (
                ((table, ITEM), (f"{table}_{_SMALL}", _SMALL))
                if "short" in table
                else ((table, None),)
            )
            for (name, block), drop in (
                itertools.product(classes, (False, True))
                if dtype.itemsize == 2 or "short" not in table
                else ()
            ):
                mine = {key: value for key, value in inputs.items() if key in kernel.arg_names} | {
                    "DROPOUT": drop
                }
                mine |= {"BLOCK": block} if block else {}
                aligned = tuple(key for key in strides if key in mine)
                found.append(Production(kernel, name, 64, dtype, mine, aligned, tuple(wide)))
    return found
