"""Vocabulary projection and softmax cross-entropy of the masked tokens, forward and backward, without their [M, V] logits.

With h the masked token's hidden state, W and b the vocabulary's matrix and bias, y the label as a one-hot row, and
everything in bits (times log2 e), so that an exponential is one exp2:

    z = (h W' + b) log2 e      lse = log2(sum over V of 2^z)      loss = (lse - z[label]) ln 2
    dz = 2^(z - lse) - y       dh = dz W      dW = dz' h      db = sum over M of dz      all times dloss / total

Saved: the inputs and lse, fp32 [M].

Forward. A program owns BLOCK_M masked tokens, whose rows it gathers, and a run of vocabulary tiles. Over the run it keeps, for
each token, the largest logit, the sum of exponentials relative to it, the label's logit, and the largest logit before the
label's, which is how the first of equals is the arg-max, as in torch. A second kernel combines the runs. No address depends on a
label, so a label outside [0, V) reads nothing; it makes its loss, and then every gradient, NaN, as a position outside [0, T) does.

Backward, by slabs of `_SLAB` words. A program owns one tile of the slab: it computes the logits again and writes dz to a workspace
[M, _SLAB] and the sum of dz over its tokens, for db, to fp32 [M / BLOCK_M, V]. Two plain products, which are torch's, do the
rest: a row of dW is complete after its slab and is written once; dh grows from slab to slab in fp32. The factor dloss / total comes
last, in fp32: in the workspace it would push fp16 below its smallest number.

Memory beside the results, at M = 8,192, D = 768, V = 30,522 in bf16: 67 MB of workspace, 13 + 13 MB for the rows and their
gradient, 25 MB for dh, 13 MB for the slab of dW, 8 MB for db; 139 MB. (fp32 weights: a rounded copy, 47 MB, in the forward pass alone.)
Eager torch holds the logits four times over: 2 GB in bf16 throughout, more with a softmax in fp32.

Source: Milakov and Gimelshein, 2018, algorithm 3 (running maximum and sum); the slabs are our own.
"""

import functools

import torch
import triton
import triton.language as tl

from fastbert_kernels._tiles import tile
from fastbert_kernels._triton import FUSE, Production, architecture, dot_precision, multiprocessors

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1e30)  # below any logit, yet finite: a tile whose biases are all minus infinity must not give inf - inf
_SLAB = 4096  # words: products of this depth run at full speed, and the slab of W (6 MB at D = 768) stays in the L2 cache


@functools.cache
def _run(row_tiles: int, vocabulary_tiles: int, slots: int) -> int:
    """How many vocabulary tiles a program walks, such that `slots` programs at a time are done first.

    A program costs its tiles and about a quarter of one to start.
    """

    def duration(run: int) -> int:
        return triton.cdiv(row_tiles * triton.cdiv(vocabulary_tiles, run), slots) * (4 * run + 1)

    return min(range(1, vocabulary_tiles + 1), key=duration)


@triton.jit
def _logits(row_ptr, weight_ptr, bias_ptr, column, stride_weight, V, D, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """z of one tile, fp32 [BLOCK_M, BLOCK_V]; minus infinity beyond V, so that what follows needs no mask.

    `row_ptr` [BLOCK_M, 1] points to rows that exist. Words beyond V read the last one: a mask of rows or words would stay in
    registers all through the inner loop, where the accumulator leaves none to spare.
    """
    word_ptr = weight_ptr + tl.minimum(column, V - 1).to(tl.int64)[:, None] * stride_weight
    acc = tl.zeros([row_ptr.shape[0], column.shape[0]], tl.float32)

    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        rows = tl.load(row_ptr + d, mask=d < D, other=0.0)
        words = tl.load(word_ptr + d, mask=d < D, other=0.0)
        acc = tl.dot(rows, words.T, acc, input_precision=PRECISION)

    # Only now: loaded earlier, the bias would sit in registers through the loop.
    bias = tl.load(bias_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
    return acc * _LOG2E + (bias * _LOG2E)[None, :]


@triton.jit(do_not_specialize=["T", "M", "run"])
def _forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, positions_ptr, labels_ptr, partials_ptr, stride_hidden, stride_weight, T, M, V, D, run,
    GATHER: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < M
    label = tl.load(labels_ptr + token, mask=live, other=-1).to(tl.int32)  # what does not fit is refused by the second kernel
    row = token.to(tl.int64)
    if GATHER:
        row = tl.load(positions_ptr + token, mask=live, other=0)
    row_ptr = hidden_ptr + tl.minimum(tl.maximum(row, 0), T - 1)[:, None] * stride_hidden

    largest = tl.full([BLOCK_M], _LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    of_label = tl.zeros([BLOCK_M], tl.float32)
    before = tl.full([BLOCK_M], float("-inf"), tl.float32)
    first = tl.program_id(1) * run
    for number in tl.range(first, min(first + run, tl.cdiv(V, BLOCK_V)), flatten=True):
        column = number * BLOCK_V + tl.arange(0, BLOCK_V)
        z = _logits(row_ptr, weight_ptr, bias_ptr, column, stride_weight, V, D, BLOCK_D, PRECISION)

        larger = tl.maximum(largest, tl.max(z, 1))
        sums = sums * tl.exp2(largest - larger) + tl.sum(tl.exp2(z - larger[:, None]), 1)
        largest = larger
        of_label += tl.sum(tl.where(column[None, :] == label[:, None], z, 0.0), 1)
        before = tl.maximum(before, tl.max(tl.where(column[None, :] < label[:, None], z, float("-inf")), 1))

    at = partials_ptr + tl.program_id(1).to(tl.int64) * M + token
    plane = tl.num_programs(1).to(tl.int64) * M
    tl.store(at, largest, mask=live)
    tl.store(at + plane, sums, mask=live)
    tl.store(at + 2 * plane, of_label, mask=live)
    tl.store(at + 3 * plane, before, mask=live)


@triton.jit(do_not_specialize=["T", "M", "runs"])
def _combine_kernel(
    partials_ptr, positions_ptr, labels_ptr, losses_ptr, hits_ptr, lse_ptr, T, M, V, runs, GATHER: tl.constexpr, BLOCK_M: tl.constexpr
):
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < M
    label = tl.load(labels_ptr + token, mask=live, other=0)
    sound = (label >= 0) & (label < V)
    if GATHER:
        position = tl.load(positions_ptr + token, mask=live, other=0)
        sound = sound & (position >= 0) & (position < T)

    largest = tl.full([BLOCK_M], _LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    of_label = tl.zeros([BLOCK_M], tl.float32)
    before = tl.full([BLOCK_M], float("-inf"), tl.float32)
    plane = runs.to(tl.int64) * M
    at = partials_ptr + token
    for _ in range(runs):
        of_run = tl.load(at, mask=live, other=0.0)
        larger = tl.maximum(largest, of_run)
        sums = sums * tl.exp2(largest - larger) + tl.load(at + plane, mask=live, other=1.0) * tl.exp2(of_run - larger)
        largest = larger
        of_label += tl.load(at + 2 * plane, mask=live, other=0.0)
        before = tl.maximum(before, tl.load(at + 3 * plane, mask=live, other=0.0))
        at += M

    of_sums = tl.where(sound, tl.log2(sums), float("nan"))
    tl.store(losses_ptr + token, (largest - of_label + of_sums) * _LN2, mask=live)
    tl.store(hits_ptr + token, sound & (of_label == largest) & (before < largest), mask=live)
    tl.store(lse_ptr + token, largest + of_sums, mask=live)


def forward(hidden, weight, bias, positions, labels):
    """Losses fp32 [M] in nats, hits bool [M], and lse fp32 [M] in bits."""
    M, D, V = len(labels), hidden.shape[1], len(weight)
    losses, lse = (hidden.new_empty(M, dtype=torch.float32) for _ in range(2))
    hits = hidden.new_empty(M, dtype=torch.bool)
    if not M:
        return losses, hits, lse
    weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    options = tile("mlm_loss_forward", architecture(hidden.device), hidden.dtype, D)
    row_tiles, vocabulary_tiles = triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(V, options["BLOCK_V"])
    run = _run(row_tiles, vocabulary_tiles, multiprocessors(hidden.device))
    # Tokens come first in the grid: the programs that work at the same time walk the same words in step, so a tile of W comes from
    # memory once and from the L2 cache for the others, where their rows stay, too (26 MB for 132 programs of 128 at D = 768).
    grid = (row_tiles, triton.cdiv(vocabulary_tiles, run))
    partials = hidden.new_empty(4, grid[1], M, dtype=torch.float32)
    _forward_kernel[grid](
        hidden, weight, bias, positions, labels, partials, hidden.stride(0), weight.stride(0), len(hidden), M, V, D, run,
        GATHER=positions is not None, PRECISION=dot_precision(hidden.dtype), **options, **FUSE,
    )  # fmt: skip
    options = tile("mlm_loss_combine", architecture(hidden.device), hidden.dtype, 1)
    _combine_kernel[(triton.cdiv(M, options["BLOCK_M"]),)](
        partials, positions, labels, losses, hits, lse, len(hidden), M, V, grid[1], GATHER=positions is not None, **options, **FUSE
    )
    return losses, hits, lse


@triton.jit(do_not_specialize=["M"])
def _backward_kernel(
    rows_ptr, weight_ptr, bias_ptr, labels_ptr, lse_ptr, slab_ptr, dbias_ptr, stride_rows, stride_weight, stride_slab, stride_dbias, M, V, D,
    start, UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of the V words of a slab whose first is word `start`; weight, bias and dbias are the slab's."""
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = token < M
    row = token.to(tl.int64)[:, None]

    z = _logits(rows_ptr + tl.minimum(row, M - 1) * stride_rows, weight_ptr, bias_ptr, column, stride_weight, V, D, BLOCK_D, PRECISION)
    label = (tl.load(labels_ptr + token, mask=live, other=-1) - start).to(tl.int32)
    lse = tl.load(lse_ptr + token, mask=live, other=float("inf"))  # beyond M: dz = 0
    dz = tl.exp2(z - lse[:, None])
    dz = tl.where(column[None, :] == label[:, None], dz - 1, dz)

    tl.store(dbias_ptr + tl.program_id(1).to(tl.int64) * stride_dbias + column, tl.sum(dz, 0), mask=column < V)
    # Up to the stride rather than to V: it is a multiple of 16, which is what lets the stores be 128 bits wide.
    tl.store(slab_ptr + row * stride_slab + column[None, :], dz * UNIT, mask=live[:, None] & (column < stride_slab)[None, :])


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, beta: int) -> None:
    """out = a @ b + beta * out, out in fp32 whatever a and b are."""
    if a.dtype == out.dtype or not a.is_cuda:
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)
    else:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)


def backward(scale, hidden, weight, bias, positions, labels, lse):
    """dhidden, dweight and dbias, shaped and typed as the inputs; `scale` is dloss / total, an fp32 scalar on the device."""
    T, D = hidden.shape
    M, V = len(labels), len(weight)
    dweight, dbias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    if not M:
        return hidden.new_zeros(hidden.shape), dweight.zero_(), dbias.zero_()
    index = None if positions is None else positions.clamp(0, T - 1)  # lse is NaN where this changes anything
    rows = hidden if index is None else hidden.index_select(0, index)
    bias = bias.to(hidden.dtype)
    unit = 2**15 if hidden.dtype == torch.float16 else 1  # |dz| <= 1, and fp16 reaches from 2^-24 to 2^16: use all of it
    of_product = scale / unit

    options = tile("mlm_loss_backward", architecture(hidden.device), hidden.dtype, D)
    width = min(_SLAB, triton.cdiv(V, 16) * 16)
    slab = rows.new_empty(M, width)
    drows, dwords = (rows.new_empty(size, D, dtype=torch.float32) for size in (M, width))
    partials = rows.new_empty(triton.cdiv(M, options["BLOCK_M"]), V, dtype=torch.float32)

    for start in range(0, V, width):
        words = weight[start : start + width].to(hidden.dtype)
        size = len(words)
        # Words come first in the grid: the programs that work at the same time share a few tiles of rows, and the slab of W stays in L2.
        grid = (triton.cdiv(size, options["BLOCK_V"]), len(partials))
        _backward_kernel[grid](
            rows, words, bias[start:], labels, lse, slab, partials[:, start:],
            rows.stride(0), words.stride(0), width, V, M, size, D, start,
            UNIT=unit, PRECISION=dot_precision(hidden.dtype), **options, **FUSE,
        )  # fmt: skip
        dz = slab[:, :size]
        _product(dz, words, drows, beta=int(start > 0))
        _product(dz.T, rows, dwords[:size], beta=0)
        torch.mul(dwords[:size], of_product, out=dweight[start : start + width])

    dbias.copy_(partials.sum(0) * scale)
    dhidden = drows.mul_(of_product).to(hidden.dtype)
    if index is not None:
        # Two addends commute: only where a position comes three times does the order, which a GPU leaves open, matter.
        dhidden = hidden.new_zeros(hidden.shape).index_add_(0, index, dhidden)
    return dhidden, dweight, dbias


def production() -> list[Production]:
    """For the ahead-of-time gate: BERT-base and BERT-large with V = 30,522."""
    found = []
    for dtype, name in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        matrix = {"weight_ptr": name, "bias_ptr": name, "stride_weight": "i32", "D": "i32"}
        batch = {"labels_ptr": "*i64", "M": "i32", "V": "i32"}
        gathered = {"positions_ptr": "*i64", "T": "i32", "GATHER": True, "partials_ptr": "*fp32"}
        results = {"losses_ptr": "*fp32", "hits_ptr": "*i1", "lse_ptr": "*fp32", "runs": "i32"}
        found.append(Production(_combine_kernel, "mlm_loss_combine", 1, dtype, batch | gathered | results))
        for size in (768, 1024):
            rows = {"hidden_ptr": name, "stride_hidden": "i32", "run": "i32", "PRECISION": "ieee"}
            aligned, wide = ("stride_hidden", "stride_weight", "D"), ("hidden_ptr", "weight_ptr")
            for gather in (True, False):
                arguments = matrix | batch | gathered | rows | {"GATHER": gather}
                found.append(Production(_forward_kernel, "mlm_loss_forward", size, dtype, arguments, aligned, wide))
            rows = {"rows_ptr": name, "stride_rows": "i32", "lse_ptr": "*fp32", "UNIT": 1, "PRECISION": "ieee"}
            slab = {"slab_ptr": name, "stride_slab": "i32", "dbias_ptr": "*fp32", "stride_dbias": "i32", "start": "i32"}
            aligned, wide = ("stride_rows", "stride_weight", "stride_slab", "D", "start"), ("rows_ptr", "weight_ptr")
            arguments = matrix | batch | rows | slab
            found.append(Production(_backward_kernel, "mlm_loss_backward", size, dtype, arguments, aligned, wide))
    return found
