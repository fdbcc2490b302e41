"""Vocabulary projection and softmax cross-entropy of masked tokens, without [M, V] logits.

With h the masked token's hidden state, W and b the vocabulary's matrix and bias, y the label as a
one-hot row, and everything in bits (times log2 e), so that an exponential is one exp2:

    z = (h W' + b) log2 e      lse = log2(sum over V of 2^z)      loss = (lse - z[label]) ln 2
    dz = 2^(z - lse) - y      dh = dz W      dW = dz' h      db = sum over M of dz
    all gradients times dloss / total

Saved: the inputs and lse, fp32 [M].

Forward. A program owns BLOCK_M masked tokens, whose rows it gathers, and a run of vocabulary tiles.
Over the run it keeps, for each token, the largest logit, the sum of exponentials relative to it,
the label's logit, and the largest logit before the label's. By the latter, the first of equal
logits is the arg-max, as in torch. A second kernel combines the runs. No address depends on a
label, so a label outside [0, V) reads nothing. It makes its loss NaN, and then every gradient, and
so does a position outside [0, T). The launcher then sets the loss of ignored tokens (label -100) to
zero and their lse to infinity, so that dz is zero in the backward pass.

Backward, by slabs of words. A program for each multiprocessor walks its share of the slab's tiles
and recomputes the logits. It writes dz to a workspace [M, slab], and its sum over the tile's
tokens, for db, to fp32 [M / BLOCK_M, V]. Two plain products by torch do the rest: a row of dW is
complete after its slab and is written once, and dh grows from slab to slab in fp32. The factor
dloss / total comes last, in fp32: in the workspace it would push fp16 below its smallest number.

The logits of both passes are equal to the last bit: one formula, with the sums over D in one order.
Where a label's probability is near 1, dz = 2^(z - lse) - 1 consists of their rounding errors and
little else, and these only cancel if they are the same.

Where the time goes. At D = 768 the matrix units of sm_90 need 12,288 cycles for a tile of
128 x 256. Its accumulator takes half of all registers, so the matrix units wait while a tile ends;
the exponentials alone take 2,048 cycles. So, with cycles as counted in the machine code:

- The loops over tiles and over D are flattened into one, which requests the next tile's operands
  before a tile ends.
- What a tile needs once (bias; labels and lse) is loaded one tile ahead. If it were requested when
  the tile ends, it would arrive behind 144 KB of operands, 1,900 cycles later: see `_load_ahead`.
- The forward pass finds the label's logit by halving the tile, not by comparing every column, which
  saves 2,700 cycles: see `_at_label`.
- The backward pass has words as rows and tokens as columns of its tile. Threads hold whole rows of
  it, so the sum over tokens for db needs 4 shuffles instead of 192. A program walks over tiles of
  the slab, so that all but its first start with their operands loaded.

A tile takes 18,800 cycles forward (22,200 without the above) and 20,900 backward (29,900).

Memory beside the results, at M = 8,192, D = 768, V = 30,522 in bf16: 134 MB of workspace, 13 + 13
MB for the rows and their gradient, 25 MB for dh, 25 MB for the slab of dW, 4 MB for db; 214 MB.
With fp32 weights, the forward pass also has a rounded copy, 47 MB. The workspace does not grow with
M beyond that. Eager torch holds the logits four times: 2 GB in bf16 throughout, and more with a
softmax in fp32.

Source: Milakov and Gimelshein, 2018, algorithm 3 (running maximum and sum); the slabs and the
halving are our own.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from fastbert_kernels._launch import Kernel
from fastbert_kernels._triton import dot_precision, multiprocessors
from fastbert_kernels.mlm_loss.reference import IGNORED

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Below any logit, yet finite: a tile whose biases are all minus infinity must not give inf - inf.
_LOWEST = tl.constexpr(-1e30)

# A slab is as wide as memory allows: each costs four launches on a device that is not full when
# they begin and end, about a tile's time in all, and another pass over dh.
_SLAB_NUMBERS = 1 << 26  # of the workspace: 134 MB in 16 bits
_SLAB_WORDS = 1 << 14  # also where tokens are few, since its dW is in fp32 first: 50 MB at D = 768


@functools.cache
def _run(row_tiles: int, vocabulary_tiles: int, slots: int) -> int:
    """Return how many vocabulary tiles a program walks, for the shortest time.

    `slots` programs run at a time. A program costs its tiles and about a quarter of one to start.
    """

    def duration(run: int) -> int:
        return triton.cdiv(row_tiles * triton.cdiv(vocabulary_tiles, run), slots) * (4 * run + 1)

    return min(range(1, vocabulary_tiles + 1), key=duration)


@triton.jit
def _add_product(acc, a_ptr, b_ptr, D, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + A B', fp32.

    a_ptr [rows of A, 1] and b_ptr [rows of B, 1] point to rows that exist. Tokens beyond M and
    words beyond V read the last one: a mask of rows would stay in registers all through the loop,
    where the accumulator (128 of 255 a thread) leaves none to spare.
    """
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        a = tl.load(a_ptr + d, mask=d < D, other=0.0)
        b = tl.load(b_ptr + d, mask=d < D, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _load_ahead(ptr, index, stop, other):
    """Load entries of a vector along the columns of the next tile, as [N, 1].

    `tl.max(..., 1)` makes the vector when that tile ends; until then it stays in registers. As [N],
    the compiler would keep it in the layout of the accumulator's columns, 64 registers a thread,
    which are not available. Through the maximum, which costs nothing, it sees no layout, and a
    thread keeps one register.
    """
    return tl.load(ptr + index[:, None], mask=index[:, None] < stop, other=other)


@triton.jit
def _at_label(z, place, COMPARED: tl.constexpr):
    """Return the entry at column `place` of each row of z, and the largest before it.

    z is [BLOCK_M, BLOCK_V], with 2^n columns. The half that has the label is kept, and halved
    again, down to COMPARED columns. That takes an instruction and a half for an element, where a
    comparison of every column with the label takes six. COMPARED is such that halves are in the
    same thread, so nothing moves. For a `place` outside the tile, the result means nothing.
    """
    before = tl.full(place.shape, float("-inf"), tl.float32)
    rest = z
    for level in tl.static_range(1, 6):
        if z.shape[1] >> level >= COMPARED:
            lower, upper = (
                rest.reshape([z.shape[0], 2, z.shape[1] >> level]).permute(0, 2, 1).split()
            )
            in_upper = (place & (z.shape[1] >> level)) != 0
            before = tl.where(in_upper, tl.maximum(before, tl.max(lower, 1)), before)
            rest = tl.where(in_upper[:, None], upper, lower)
    column = tl.arange(0, rest.shape[1])[None, :]
    label = (place & (rest.shape[1] - 1))[:, None]
    before = tl.maximum(before, tl.max(tl.where(column < label, rest, float("-inf")), 1))
    return tl.sum(tl.where(column == label, rest, 0.0), 1), before


@triton.jit(do_not_specialize=["T", "M", "run"])
def _forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, positions_ptr, labels_ptr, partials_ptr, stride_hidden,
    stride_weight, T, M, V, D, run,
    GATHER: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < M
    # The second kernel refuses a label that does not fit.
    label = tl.load(labels_ptr + token, mask=live, other=-1).to(tl.int32)
    row = token.to(tl.int64)
    if GATHER:
        row = tl.load(positions_ptr + token, mask=live, other=0)
    row_ptr = hidden_ptr + tl.minimum(tl.maximum(row, 0), T - 1)[:, None] * stride_hidden

    largest = tl.full([BLOCK_M], _LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    of_label = tl.zeros([BLOCK_M], tl.float32)
    before = tl.full([BLOCK_M], float("-inf"), tl.float32)
    first = tl.program_id(1) * run
    last = min(first + run, tl.cdiv(V, BLOCK_V))
    bias = _load_ahead(bias_ptr, first * BLOCK_V + tl.arange(0, BLOCK_V), V, float("-inf"))
    for number in tl.range(first, last, flatten=True):
        column = number * BLOCK_V + tl.arange(0, BLOCK_V)
        word_ptr = weight_ptr + tl.minimum(column, V - 1).to(tl.int64)[:, None] * stride_weight
        acc = _add_product(
            tl.zeros([BLOCK_M, BLOCK_V], tl.float32), row_ptr, word_ptr, D, BLOCK_D, PRECISION
        )
        # Minus infinity beyond V, so that what follows needs no mask.
        of_words = tl.max(bias, 1).to(tl.float32) * _LOG2E
        bias = _load_ahead(bias_ptr, column + BLOCK_V, V, float("-inf"))

        z = acc * _LOG2E + of_words[None, :]
        of_tile = tl.max(z, 1)
        larger = tl.maximum(largest, of_tile)
        sums = sums * tl.exp2(largest - larger) + tl.sum(tl.exp2(z - larger[:, None]), 1)
        largest = larger
        place = label - number * BLOCK_V
        at_label, before_label = _at_label(z, place, COMPARED)
        of_label += tl.where((place >= 0) & (place < BLOCK_V), at_label, 0.0)
        before = tl.maximum(
            before,
            tl.where(place < BLOCK_V, tl.where(place < 0, float("-inf"), before_label), of_tile),
        )

    at = partials_ptr + tl.program_id(1).to(tl.int64) * M + token
    plane = tl.num_programs(1).to(tl.int64) * M
    tl.store(at, largest, mask=live)
    tl.store(at + plane, sums, mask=live)
    tl.store(at + 2 * plane, of_label, mask=live)
    tl.store(at + 3 * plane, before, mask=live)


@triton.jit(do_not_specialize=["T", "M", "runs"])
def _combine_kernel(
    partials_ptr,
    positions_ptr,
    labels_ptr,
    losses_ptr,
    correct_ptr,
    lse_ptr,
    T,
    M,
    V,
    runs,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < M
    label = tl.load(labels_ptr + token, mask=live, other=0)
    valid = (label >= 0) & (label < V)
    if GATHER:
        position = tl.load(positions_ptr + token, mask=live, other=0)
        valid = valid & (position >= 0) & (position < T)

    largest = tl.full([BLOCK_M], _LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    of_label = tl.zeros([BLOCK_M], tl.float32)
    before = tl.full([BLOCK_M], float("-inf"), tl.float32)
    plane = runs.to(tl.int64) * M
    at = partials_ptr + token
    for _ in range(runs):
        of_run = tl.load(at, mask=live, other=0.0)
        larger = tl.maximum(largest, of_run)
        sums = sums * tl.exp2(largest - larger) + tl.load(
            at + plane, mask=live, other=1.0
        ) * tl.exp2(of_run - larger)
        largest = larger
        of_label += tl.load(at + 2 * plane, mask=live, other=0.0)
        before = tl.maximum(before, tl.load(at + 3 * plane, mask=live, other=0.0))
        at += M

    of_sums = tl.where(valid, tl.log2(sums), float("nan"))
    tl.store(losses_ptr + token, (largest - of_label + of_sums) * _LN2, mask=live)
    tl.store(correct_ptr + token, valid & (of_label == largest) & (before < largest), mask=live)
    tl.store(lse_ptr + token, largest + of_sums, mask=live)


_FORWARD = Kernel(_forward_kernel, "mlm_loss_forward", wide=("hidden_ptr", "weight_ptr"))
_COMBINE = Kernel(_combine_kernel, "mlm_loss_combine")


def forward(hidden, weight, bias, positions, labels):
    """Return losses fp32 [M] in nats, correct bool [M], and lse fp32 [M] in bits."""
    (T, D), M, V = hidden.shape, labels.shape[0], weight.shape[0]
    losses, lse = hidden.new_empty(M, dtype=torch.float32), hidden.new_empty(M, dtype=torch.float32)
    correct = hidden.new_empty(M, dtype=torch.bool)
    if not M:
        return losses, correct, lse
    weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    gather, strides = positions is not None, (hidden.stride(0), weight.stride(0))
    kernel = _FORWARD.prepare(hidden, D, (gather, dot_precision(hidden.dtype)), strides, V)
    row_tiles, vocabulary_tiles = (
        triton.cdiv(M, kernel.tile["BLOCK_M"]),
        triton.cdiv(V, kernel.tile["BLOCK_V"]),
    )
    run = _run(row_tiles, vocabulary_tiles, multiprocessors(hidden.device))
    # Tokens come first in the grid: the programs that work at the same time walk the same words in
    # step, so a tile of W is read from memory once and from the L2 cache by the others. Their rows
    # stay in that cache too (26 MB for 132 programs of 128 at D = 768).
    runs = triton.cdiv(vocabulary_tiles, run)
    partials = hidden.new_empty(4, runs, M, dtype=torch.float32)
    kernel(
        (row_tiles, runs),
        (hidden, weight, bias, positions, labels, partials),
        (*strides, T, M, V, D, run),
    )
    kernel = _COMBINE.prepare(hidden, 1, (gather,), V)
    grid = (triton.cdiv(M, kernel.tile["BLOCK_M"]),)
    kernel(grid, (partials, positions, labels, losses, correct, lse), (T, M, V, runs))
    ignored = labels == IGNORED
    return losses.masked_fill_(ignored, 0.0), correct, lse.masked_fill_(ignored, math.inf)


@triton.jit(do_not_specialize=["M", "V", "run"])
def _backward_kernel(
    rows_ptr, weight_ptr, bias_ptr, labels_ptr, lse_ptr, slab_ptr, dbias_ptr, stride_rows,
    stride_weight, stride_slab, stride_dbias, M, V, D,
    start, run, UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dz for the V words of a slab whose first is word `start`.

    weight and bias are the slab's, dbias its columns of the partial sums. A program walks `run`
    tiles, tokens first, then words.
    """
    words, tokens, token_tiles = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_M), tl.cdiv(M, BLOCK_M)
    first = tl.program_id(0) * run
    last = min(first + run, token_tiles * tl.cdiv(V, BLOCK_V))
    word = first // token_tiles * BLOCK_V + words
    token = first % token_tiles * BLOCK_M + tokens
    # Along rows: two registers a thread.
    bias = tl.load(bias_ptr + word, mask=word < V, other=float("-inf"))
    label = _load_ahead(labels_ptr, token, M, -1)
    lse = _load_ahead(lse_ptr, token, M, float("inf"))  # beyond M: dz = 0
    for number in tl.range(first, last, flatten=True):
        word = number // token_tiles * BLOCK_V + words
        token = number % token_tiles * BLOCK_M + tokens
        word_ptr = weight_ptr + tl.minimum(word, V - 1).to(tl.int64)[:, None] * stride_weight
        row_ptr = rows_ptr + tl.minimum(token, M - 1).to(tl.int64)[:, None] * stride_rows
        acc = _add_product(
            tl.zeros([BLOCK_V, BLOCK_M], tl.float32), word_ptr, row_ptr, D, BLOCK_D, PRECISION
        )
        z = acc * _LOG2E + (bias.to(tl.float32) * _LOG2E)[:, None]
        dz = tl.exp2(z - tl.max(lse, 1)[None, :])
        dz = tl.where(word[:, None] == (tl.max(label, 1) - start).to(tl.int32)[None, :], dz - 1, dz)
        tl.store(
            dbias_ptr + (number % token_tiles).to(tl.int64) * stride_dbias + word,
            tl.sum(dz, 1),
            mask=word < V,
        )

        ahead = number + 1
        next_word = ahead // token_tiles * BLOCK_V + words
        next_token = ahead % token_tiles * BLOCK_M + tokens
        bias = tl.load(bias_ptr + next_word, mask=next_word < V, other=float("-inf"))
        label = _load_ahead(labels_ptr, next_token, M, -1)
        lse = _load_ahead(lse_ptr, next_token, M, float("inf"))

        # Up to the stride rather than to V: as it is a multiple of 16, stores are 128 bits wide.
        within = (word < stride_slab)[:, None] & (token < M)[None, :]
        tl.store(
            slab_ptr + token.to(tl.int64)[None, :] * stride_slab + word[:, None],
            dz * UNIT,
            mask=within,
        )


_BACKWARD = Kernel(_backward_kernel, "mlm_loss_backward", wide=("rows_ptr", "weight_ptr"))


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, beta: int) -> None:
    """out = a @ b + beta * out, out in fp32 whatever a and b are."""
    if a.dtype == out.dtype or not a.is_cuda:
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)
    else:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)


def backward(scale, hidden, weight, bias, positions, labels, lse):
    """Return dhidden, dweight and dbias, shaped and typed as the inputs.

    `scale` is dloss / total, an fp32 scalar on the device.
    """
    T, D = hidden.shape
    M, V = labels.shape[0], weight.shape[0]
    dweight, dbias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    if not M:
        return hidden.new_zeros(hidden.shape), dweight.zero_(), dbias.zero_()
    # lse is NaN where the clamp changes anything.
    index = None if positions is None else positions.clamp(0, T - 1)
    rows = hidden if index is None else hidden.index_select(0, index)
    bias = bias.to(hidden.dtype)
    # |dz| <= 1, and fp16 reaches from 2^-24 to 2^16: use all of it.
    unit = 2**15 if hidden.dtype == torch.float16 else 1
    of_product = scale / unit

    options = _BACKWARD.tile(hidden, D)
    block, token_tiles = options["BLOCK_V"], triton.cdiv(M, options["BLOCK_M"])
    width = max(1, min(_SLAB_WORDS, _SLAB_NUMBERS // M, V + block - 1) // block) * block
    slab = rows.new_empty(M, width)
    drows, dwords = (rows.new_empty(size, D, dtype=torch.float32) for size in (M, min(width, V)))
    partials = rows.new_empty(token_tiles, V, dtype=torch.float32)

    for start in range(0, V, width):
        words = weight[start : start + width].to(hidden.dtype)
        size = len(words)
        # A program for each multiprocessor, with the same number of tiles. They work on a few tiles
        # of tokens at a time, and on all words of the slab, which stay in L2 (13 MB of W for 8,192
        # words at D = 768).
        tiles = triton.cdiv(size, block) * token_tiles
        run = triton.cdiv(tiles, multiprocessors(hidden.device))
        strides = (rows.stride(0), words.stride(0), width, V)
        kernel = _BACKWARD.prepare(rows, D, (unit, dot_precision(rows.dtype)), strides, start)
        pointers = (rows, words, bias[start:], labels, lse, slab, partials[:, start:])
        kernel((triton.cdiv(tiles, run),), pointers, (*strides, M, size, D, start, run))
        dz = slab[:, :size]
        _product(dz, words, drows, beta=int(start > 0))
        _product(dz.T, rows, dwords[:size], beta=0)
        torch.mul(dwords[:size], of_product, out=dweight[start : start + size])

    dbias.copy_(partials.sum(0) * scale)
    dhidden = torch.mul(drows, of_product, out=rows.new_empty(rows.shape))
    if index is not None:
        # Two addends commute. The order, which a GPU leaves open, only matters where a position
        # comes three times.
        dhidden = hidden.new_zeros(hidden.shape).index_add_(0, index, dhidden)
    return dhidden, dweight, dbias
