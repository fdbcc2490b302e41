"""Right kernels of the usual kinds, Triton's tutorials among them, written anew.

The checker must find nothing in those of `RIGHT`. Those of `ROUNDING` add in an order that depends
on the order of the programs, as the tutorial's LayerNorm does, which is a note and no fault. The
programs of `WAITING` wait for those before them, which is a note, too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert_kernels.checker.cases import Check
from tests.wrong_kernels import blocked_argmax

RIGHT: dict[str, Check] = {}
ROUNDING: dict[str, Check] = {}
WAITING: dict[str, Check] = {}


def normal(*names: str) -> Any:
    """Inputs of one shape for each name."""

    def inputs(dtype, **shape):
        return {name: torch.randn(*shape.values()).to(dtype) for name in names}

    return inputs


# ---- vector addition


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    y = tl.load(y_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x + y, mask=i < n)


def add(x, y):
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), 32),)](x, y, out, x.numel(), BLOCK=32)
    return out


RIGHT["vector addition"] = Check(
    add,
    lambda x, y: x + y,
    normal("x", "y"),
    [{"n": 1}, {"n": 32}, {"n": 100}],
    dtypes=["fp32", "bf16", "fp16"],
)


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 64})], key=["n"])
@triton.jit
def tuned_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n) * 0.5, mask=i < n)


def tuned(x):
    y = torch.empty_like(x)
    tuned_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel())
    return y


RIGHT["autotuned"] = Check(tuned, lambda x: x * 0.5, normal("x"), [{"n": 100}])

# ---- softmax of rows, forward and backward; rows may be strided


@triton.jit
def softmax_kernel(x_ptr, y_ptr, stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < N
    x = tl.load(x_ptr + row * stride + column, mask=mask, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * N + column, e / tl.sum(e, 0), mask=mask)


@triton.jit
def softmax_backward_kernel(dy_ptr, y_ptr, dx_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < N
    dy = tl.load(dy_ptr + row * N + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * N + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * N + column, y * (dy - tl.sum(dy * y, 0)), mask=mask)


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        rows, N = x.shape
        y = x.new_empty(rows, N)
        BLOCK = triton.next_power_of_2(N)
        softmax_kernel[(rows,)](x, y, x.stride(0), N, BLOCK=BLOCK)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dx = torch.empty_like(y)
        BLOCK = triton.next_power_of_2(y.shape[1])
        softmax_backward_kernel[(len(y),)](dy.contiguous(), y, dx, y.shape[1], BLOCK=BLOCK)
        return dx


def left_half(dtype, rows, columns):
    return {"x": torch.randn(rows, 2 * columns).to(dtype)[:, :columns]}


RIGHT["softmax"] = Check(
    Softmax.apply,
    lambda x: torch.softmax(x, -1),
    left_half,
    [{"rows": 3, "columns": 33}, {"rows": 1, "columns": 1}],
)

# ---- matrix product in groups of tiles, with a leaky ReLU


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, LEAKY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK), tl.cdiv(N, BLOCK)
    group = program // (GROUP * tiles_n)
    size = min(tiles_m - group * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    tile_m, tile_n = group * GROUP + within % size, within // size
    row = tile_m.to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tile_n.to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inner = tl.arange(0, BLOCK).to(tl.int64)
    a_ptrs = a_ptr + (row % M)[:, None] * stride_am + inner[None, :] * stride_ak
    b_ptrs = b_ptr + inner[:, None] * stride_bk + (column % N)[None, :] * stride_bn
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(tl.cdiv(K, BLOCK)):
        a = tl.load(a_ptrs, mask=inner[None, :] < K - k * BLOCK, other=0.0)
        b = tl.load(b_ptrs, mask=inner[:, None] < K - k * BLOCK, other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK * stride_ak
        b_ptrs += BLOCK * stride_bk
    if LEAKY:
        acc = tl.where(acc >= 0, acc, 0.01 * acc)
    c_row, c_column = row[:, None], column[None, :]
    c_ptrs = c_ptr + c_row * stride_cm + c_column * stride_cn
    mask = (c_row < M) & (c_column < N)
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask)


def product(a, b, leaky=True):
    (M, K), N = a.shape, b.shape[1]
    c = a.new_empty(M, N)
    grid = (triton.cdiv(M, 16) * triton.cdiv(N, 16),)
    strides = (*a.stride(), *b.stride(), *c.stride())
    product_kernel[grid](a, b, c, M, N, K, *strides, BLOCK=16, GROUP=2, LEAKY=leaky)
    return c


def matrices(dtype, M, K, N):
    return {"a": torch.randn(M, K).to(dtype), "b": torch.randn(N, K).to(dtype).t()}


RIGHT["matrix product"] = Check(
    product,
    lambda a, b: torch.nn.functional.leaky_relu(a @ b),
    matrices,
    [{"M": 33, "K": 40, "N": 17}, {"M": 1, "K": 1, "N": 1}],
)


@triton.jit
def grouped_kernel(
    a_ptr, b_ptr, c_ptr, sizes_ptr, groups, programs, K: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first_tile, first_row = 0, tl.cast(0, tl.int64)
    for group in range(groups):
        rows = tl.load(sizes_ptr + group)
        tiles = tl.cdiv(rows, BLOCK)
        while (tile >= first_tile) & (tile < first_tile + tiles):
            row = first_row + (tile - first_tile) * BLOCK + tl.arange(0, BLOCK)[:, None]
            mask = row < first_row + rows
            k, n = tl.arange(0, K), tl.arange(0, N)[None, :]
            a = tl.load(a_ptr + row * K + k[None, :], mask=mask, other=0.0)
            b = tl.load(b_ptr + group * K * N + k[:, None] * N + n)
            c = tl.dot(a, b)
            tl.store(c_ptr + row * N + n, c.to(c_ptr.dtype.element_ty), mask=mask)
            tile += programs
        first_tile += tiles
        first_row += rows


def grouped(a, b, sizes):
    c = a.new_empty(len(a), b.shape[2])
    grouped_kernel[(3,)](
        a, b, c, torch.tensor(sizes), len(sizes), 3, K=a.shape[1], N=b.shape[2], BLOCK=16
    )
    return c


def groups(dtype, sizes):
    a, b = torch.randn(sum(sizes), 16), torch.randn(len(sizes), 16, 16)
    return {"a": a.to(dtype), "b": b.to(dtype), "sizes": sizes}


RIGHT["grouped matrix products"] = Check(
    grouped,
    lambda a, b, sizes: torch.cat([x @ y for x, y in zip(a.split(sizes), b, strict=True)]),
    groups,
    [{"sizes": [20, 1, 16, 33]}],
)


@triton.jit
def descriptor_kernel(a_desc, b_desc, c_desc, K, BLOCK: tl.constexpr):
    m, n = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        acc = tl.dot(a_desc.load([m, k]), b_desc.load([k, n]), acc)
    c_desc.store([m, n], acc.to(c_desc.dtype))


def by_descriptors(a, b):
    c = a.new_empty(len(a), b.shape[1])
    descriptors = [TensorDescriptor.from_tensor(x, [16, 16]) for x in (a, b, c)]
    grid = (triton.cdiv(len(a), 16), triton.cdiv(b.shape[1], 16))
    descriptor_kernel[grid](*descriptors, a.shape[1], BLOCK=16)
    return c


def aligned(dtype, M, K, N):
    return {"a": torch.randn(M, K).to(dtype), "b": torch.randn(K, N).to(dtype)}


RIGHT["tensor descriptors"] = Check(
    by_descriptors, lambda a, b: a @ b, aligned, [{"M": 20, "K": 24, "N": 40}]
)


@triton.jit
def block_pointer_kernel(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    x = tl.make_block_ptr(x_ptr, (M, N), (N, 1), (row, column), (BLOCK, BLOCK), (1, 0))
    y = tl.make_block_ptr(y_ptr, (N, M), (M, 1), (column, row), (BLOCK, BLOCK), (1, 0))
    tile = tl.load(x, boundary_check=(0, 1), padding_option="zero")
    tl.store(y, tl.trans(tile), boundary_check=(0, 1))


def transposed(x):
    M, N = x.shape
    y = x.new_empty(N, M)
    grid = (triton.cdiv(M, 16), triton.cdiv(N, 16))
    block_pointer_kernel[grid](x, y, M, N, BLOCK=16)
    return y


BLOCK_POINTERS = Check(  # right until Triton 3.8; in 3.9 every call of make_block_ptr raises
    transposed, lambda x: x.t().contiguous(), normal("x"), [{"rows": 20, "columns": 33}]
)

# ---- dropout


@triton.jit
def dropout_kernel(x_ptr, y_ptr, n, p, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    keep = tl.rand(seed, i.to(tl.int32)) > p
    tl.store(y_ptr + i, tl.where(keep, x / (1 - p), 0.0), mask=i < n)


def dropout(x, seed):
    y = torch.empty_like(x)
    dropout_kernel[(triton.cdiv(x.numel(), 32),)](x, y, x.numel(), 0.5, seed, BLOCK=32)
    return y


def philox(seed, offset):
    """The first word of Philox 4x32-10, by its definition (Salmon et al., 2011)."""
    word = 2**32 - 1
    c, key = [offset, 0, 0, 0], [seed & word, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ key[0], b & word, (a >> 32) ^ c[3] ^ key[1], a & word]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return c[0]


def dropped(x, seed):
    words = [philox(seed, i) for i in range(x.numel())]
    signed = [w - 2**32 if w >= 2**31 else w for w in words]
    uniform = torch.tensor([(-w - 1 if w < 0 else w) * 2.0**-31 for w in signed])
    return torch.where(uniform > 0.5, x / 0.5, 0.0)


def seeded(dtype, n):
    return {"x": torch.randn(n).to(dtype), "seed": 123}


RIGHT["dropout"] = Check(dropout, dropped, seeded, [{"n": 100}])


# ---- LayerNorm: gradients of the weights by parts, and by a lock as in the tutorial


@triton.jit
def norm_kernel(x_ptr, w_ptr, y_ptr, mean_ptr, rstd_ptr, N, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < N
    x = tl.load(x_ptr + row * N + column, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / N
    centered = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 0) / N + eps)
    w = tl.load(w_ptr + column, mask=mask).to(tl.float32)
    tl.store(y_ptr + row * N + column, centered * rstd * w, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def norm_gradient(dy_ptr, x_ptr, w_ptr, dx_ptr, mean_ptr, rstd_ptr, row, N, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = column < N
    x = tl.load(x_ptr + row * N + column, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * N + column, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    normed = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
    g = dy * w
    a, b = tl.sum(normed * g, 0) / N, tl.sum(g, 0) / N
    tl.store(dx_ptr + row * N + column, (g - (normed * a + b)) * rstd, mask=mask)
    return dy * normed


@triton.jit
def norm_backward_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, share_ptr, mean_ptr, rstd_ptr, T, N, BLOCK: tl.constexpr
):
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(row, tl.int64)
        dw += norm_gradient(dy_ptr, x_ptr, w_ptr, dx_ptr, mean_ptr, rstd_ptr, row, N, BLOCK)
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * N + column
    tl.store(share_ptr + place, dw, mask=column < N)


@triton.jit
def norm_locked_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, share_ptr, mean_ptr, rstd_ptr, lock_ptr, N,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dw = norm_gradient(dy_ptr, x_ptr, w_ptr, dx_ptr, mean_ptr, rstd_ptr, row, N, BLOCK)
    group = row % GROUPS
    column = tl.arange(0, BLOCK)
    count_ptr = lock_ptr + GROUPS + group
    while tl.atomic_cas(lock_ptr + group, 0, 1) == 1:
        pass
    count = tl.load(count_ptr)
    if count == 0:
        tl.atomic_xchg(count_ptr, 1)
    else:
        dw += tl.load(share_ptr + group * N + column, mask=column < N, other=0.0)
    tl.store(share_ptr + group * N + column, dw, mask=column < N)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr + group, 0)


def layer_norm(locked):
    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            T, N = x.shape
            y, mean, rstd = torch.empty_like(x), torch.empty(T), torch.empty(T)
            norm_kernel[(T,)](x, w, y, mean, rstd, N, 1e-5, BLOCK=triton.next_power_of_2(N))
            ctx.save_for_backward(x, w, mean, rstd)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, w, mean, rstd = ctx.saved_tensors
            (T, N), dy = x.shape, dy.contiguous()
            dx, BLOCK = torch.empty_like(x), triton.next_power_of_2(N)
            share = torch.empty(2, N)
            inputs = (dy, x, w, dx, share, mean, rstd)
            if locked:
                lock = torch.zeros(4, dtype=torch.int32)
                norm_locked_kernel[(T,)](*inputs, lock, N, GROUPS=2, BLOCK=BLOCK)
            else:
                norm_backward_kernel[(2,)](*inputs, T, N, BLOCK=BLOCK)
            return dx, share.sum(0).to(w.dtype)

    return Norm.apply


def norm_inputs(dtype, rows, columns):
    return {"x": torch.randn(rows, columns).to(dtype), "w": torch.randn(columns).to(dtype)}


def normed(x, w):
    return torch.nn.functional.layer_norm(x, (len(w),), w)


SIZES = [{"rows": 9, "columns": 33}]
RIGHT["layer norm"] = Check(layer_norm(False), normed, norm_inputs, SIZES)
ROUNDING["layer norm with a lock"] = Check(layer_norm(True), normed, norm_inputs, SIZES)

# ---- attention, by tiles of keys


@triton.jit
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, n, scale, K: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64) * n * K
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    size = tl.arange(0, K)
    q = tl.load(q_ptr + head + row * K + size[None, :], mask=row < n, other=0.0)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, K), tl.float32)
    for first in range(0, n, BLOCK):
        column = first + tl.arange(0, BLOCK)
        keys = head + column[None, :].to(tl.int64) * K + size[:, None]
        k = tl.load(k_ptr + keys, mask=column[None, :] < n, other=0.0)
        values = head + column[:, None].to(tl.int64) * K + size[None, :]
        v = tl.load(v_ptr + values, mask=column[:, None] < n, other=0.0)
        scores = tl.where(column[None, :] < n, tl.dot(q, k) * scale, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        top = higher
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head + row * K + size[None, :], out, mask=row < n)


def attention(q, k, v):
    heads, n, K = q.shape
    out = torch.empty_like(q)
    grid = (triton.cdiv(n, 16), heads)
    attention_kernel[grid](q, k, v, out, n, K**-0.5, K=K, BLOCK=16)
    return out


RIGHT["attention"] = Check(
    attention,
    lambda q, k, v: torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v,
    normal("q", "k", "v"),
    [{"heads": 2, "n": 37, "K": 16}, {"heads": 1, "n": 1, "K": 16}],
)

# ---- loss, look-ups, counts


@triton.jit
def loss_kernel(x_ptr, labels_ptr, loss_ptr, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top, total = -float("inf"), 0.0
    for first in range(0, V, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * V + i, mask=i < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    right = tl.load(x_ptr + row * V + tl.load(labels_ptr + row)).to(tl.float32)
    tl.store(loss_ptr + row, top + tl.log(total) - right)


def loss(x, labels):
    out = torch.empty(len(x))
    loss_kernel[(len(x),)](x, labels, out, x.shape[1], BLOCK=32)
    return out


def labelled(dtype, rows, V):
    return {"x": torch.randn(rows, V).to(dtype), "labels": torch.randint(V, (rows,))}


RIGHT["cross-entropy"] = Check(
    loss,
    lambda x, labels: torch.nn.functional.cross_entropy(x, labels, reduction="none"),
    labelled,
    [{"rows": 3, "V": 100}],
    dtypes=["fp32"],
)


@triton.jit
def embedding_kernel(ids_ptr, table_ptr, out_ptr, D: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    index = tl.load(ids_ptr + row)
    tl.store(out_ptr + row * D + column, tl.load(table_ptr + index * D + column))


def embedding(ids, table):
    out = table.new_empty(len(ids), table.shape[1])
    embedding_kernel[(len(ids),)](ids, table, out, D=table.shape[1])
    return out


def table_and_ids(dtype, T, V):
    return {"ids": torch.randint(V, (T,)), "table": torch.randn(V, 16).to(dtype)}


RIGHT["embedding"] = Check(
    embedding, lambda ids, table: table[ids], table_and_ids, [{"T": 9, "V": 30}]
)


@triton.jit
def count_kernel(ids_ptr, counts_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + i, mask=i < n)
    tl.atomic_add(counts_ptr + ids, 1, mask=i < n)


def counted(ids, table):
    counts = torch.zeros(len(table), dtype=torch.int64)
    count_kernel[(triton.cdiv(len(ids), 16),)](ids, counts, len(ids), BLOCK=16)
    return counts


RIGHT["counts by atomics"] = Check(
    counted,
    lambda ids, table: torch.bincount(ids, minlength=len(table)),
    table_and_ids,
    [{"T": 50, "V": 5}],
    dtypes=["fp32"],
)


@triton.jit
def largest_kernel(x_ptr, parts_ptr, counter_ptr, out_ptr, n, PARTS: tl.constexpr):
    """The last program to finish reduces what all have written."""
    i = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    x = tl.load(x_ptr + i, mask=i < n, other=-1)
    tl.store(parts_ptr + tl.program_id(0), tl.max(x, 0))
    finished = tl.atomic_add(counter_ptr, 1)
    if finished == tl.num_programs(0) - 1:
        part = tl.arange(0, PARTS)
        mask = part < tl.num_programs(0)
        parts = tl.load(parts_ptr + part, mask=mask, other=-1)
        tl.store(out_ptr, tl.max(parts, 0))


def largest(x):
    parts, out = x.new_empty(8), x.new_empty(1)
    counter = torch.zeros(1, dtype=torch.int32)
    grid = (triton.cdiv(x.numel(), 16),)
    largest_kernel[grid](x, parts, counter, out, x.numel(), PARTS=8)
    return out


RIGHT["the last program reduces"] = Check(
    largest,
    lambda x: x.max().reshape(1),
    lambda dtype, n: {"x": torch.randint(999, (n,))},
    [{"n": 70}],
    dtypes=["fp32"],
)

# ---- one thing each


@triton.jit
def gelu_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n).to(tl.float32)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tl.store(y_ptr + i, 0.5 * x * (1 + libdevice.tanh(inner)), mask=i < n)


def gelu(x):
    y = torch.empty_like(x)
    gelu_kernel[(triton.cdiv(x.numel(), 32),)](x, y, x.numel(), BLOCK=32)
    return y


RIGHT["a function of libdevice"] = Check(
    gelu, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), normal("x"), [{"n": 50}]
)


@triton.jit
def rotary_kernel(x_ptr, angle_ptr, y_ptr, K: tl.constexpr):
    row, pair = tl.program_id(0).to(tl.int64), tl.arange(0, K)
    x = tl.load(x_ptr + row * K + pair).to(tl.float32)
    left, right = tl.split(tl.reshape(x, (K // 2, 2)))
    angle = tl.load(angle_ptr + row * (K // 2) + tl.arange(0, K // 2)).to(tl.float32)
    cos, sin = tl.cos(angle), tl.sin(angle)
    y = tl.interleave(left * cos - right * sin, right * cos + left * sin)
    tl.store(y_ptr + row * K + pair, y)


def rotary(x, angle):
    y = torch.empty_like(x)
    rotary_kernel[(len(x),)](x, angle, y, K=x.shape[1])
    return y


def rotated(x, angle):
    left, right = x[:, ::2], x[:, 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([left * cos - right * sin, right * cos + left * sin], -1).flatten(1)


RIGHT["rotary"] = Check(
    rotary,
    rotated,
    lambda dtype, T: {"x": torch.randn(T, 16).to(dtype), "angle": torch.rand(T, 8).to(dtype)},
    [{"T": 5}],
)


@triton.jit
def scan_kernel(x_ptr, sum_ptr, first_ptr, N: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    x = tl.load(x_ptr + row * N + column).to(tl.float32)
    tl.store(sum_ptr + row * N + column, tl.cumsum(x, 0))
    tl.store(first_ptr + row, tl.argmax(x, 0).to(tl.int64))


def scanned(x):
    total, first = torch.empty_like(x), torch.empty(len(x), dtype=torch.int64)
    scan_kernel[(len(x),)](x, total, first, N=x.shape[1])
    return total, first


RIGHT["cumulative sum and argmax"] = Check(
    scanned,
    lambda x: (x.cumsum(1), x.argmax(1)),
    normal("x"),
    [{"rows": 3, "columns": 32}],
    dtypes=["fp32"],
)


@triton.jit
def several_kernel(tensors, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(tensors[0] + i, mask=i < n) + tl.load(tensors[1] + i, mask=i < n)
    tl.store(y_ptr + i, x, mask=i < n)


def several(x, y):
    out = torch.empty_like(x)
    several_kernel[(triton.cdiv(x.numel(), 16),)]((x, y), out, x.numel(), BLOCK=16)
    return out


RIGHT["tensors in a tuple"] = Check(several, lambda x, y: x + y, normal("x", "y"), [{"n": 20}])


@triton.jit
def persistent_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        i = first + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, tl.abs(tl.load(x_ptr + i, mask=i < n)), mask=i < n)


def persistent(x):
    y = torch.empty_like(x)
    persistent_kernel[(2,)](x, y, x.numel(), BLOCK=16)
    return y


RIGHT["persistent programs"] = Check(persistent, lambda x: x.abs(), normal("x"), [{"n": 100}])


def in_place(x, y):
    out = x.detach().clone()
    add_kernel[(triton.cdiv(x.numel(), 32),)](out, y, out, x.numel(), BLOCK=32)
    return out


RIGHT["in place"] = Check(in_place, lambda x, y: x + y, normal("x", "y"), [{"n": 70}])


@triton.jit
def row_sum_kernel(x_ptr, y_ptr, rows, N: tl.constexpr, ROWS: tl.constexpr):
    acc = tl.zeros((N,), tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        x = tl.load(x_ptr + row * N + tl.arange(0, N), mask=row < rows, other=0.0)
        first = tl.load(x_ptr + row * N, mask=row < rows, other=0.0)  # a scalar
        acc += x.to(tl.float32) * first.to(tl.float32)
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * N + tl.arange(0, N), acc)


def row_sum(x):
    y = torch.empty(triton.cdiv(len(x), 4), 16, dtype=torch.float32)
    row_sum_kernel[(len(y),)](x, y, len(x), N=16, ROWS=4)
    return y.sum(0).to(x.dtype)


RIGHT["scalars that are turned off"] = Check(
    row_sum,
    lambda x: (x * x[:, :1]).sum(0),
    lambda dtype, rows: {"x": torch.randn(rows, 16).to(dtype)},
    [{"rows": 6}, {"rows": 1}],
)


@triton.jit
def fp8_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x.to(tl.float8e4nv), mask=i < n)


def to_fp8(x):
    y = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    fp8_kernel[(triton.cdiv(x.numel(), 32),)](x, y, x.numel(), BLOCK=32)
    return y


RIGHT["rounding to fp8"] = Check(
    to_fp8,
    lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn),
    lambda dtype, n: {"x": (200 * torch.randn(n)).to(dtype)},
    [{"n": 100}],
    dtypes=["fp32", "bf16", "fp16"],
    gradients=[],
)


@triton.jit
def exp2_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, tl.exp2(x * 1.4426950408889634), mask=i < n)


def exponential(x):
    y = torch.empty_like(x)
    exp2_kernel[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), BLOCK=64)
    return y


RIGHT["exponential by powers of two"] = Check(
    exponential,
    torch.exp,
    lambda dtype, n: {"x": torch.linspace(-60, 20, n).to(dtype)},
    [{"n": 200}],
)

# ---- other styles


@triton.jit
def column_sums_kernel(x_ptr, y_ptr, rows, N, BLOCK: tl.constexpr):
    """One row after the other, so that rounding errors are larger than torch's."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        place = tl.cast(row, tl.int64) * N + column
        acc += tl.load(x_ptr + place, mask=column < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + column, acc, mask=column < N)


def column_sums(x):
    y = x.new_empty(x.shape[1])
    column_sums_kernel[(triton.cdiv(x.shape[1], 32),)](x, y, *x.shape, BLOCK=32)
    return y


RIGHT["sums of many rows"] = Check(
    column_sums, lambda x: x.sum(0), normal("x"), [{"rows": 500, "columns": 50}]
)


@triton.jit
def normed_kernel(x_ptr, mean_ptr, y_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < N
    x = tl.load(x_ptr + row * N + column, mask=mask).to(tl.float32)
    mean = tl.load(mean_ptr + row).to(tl.float32)
    tl.store(y_ptr + row * N + column, x - mean, mask=mask)


def centered(x, mean):
    y = torch.empty_like(x)
    normed_kernel[(len(x),)](x, mean, y, x.shape[1], BLOCK=64)
    return y


def with_means(dtype, rows, columns):
    x = torch.randn(rows, columns).to(dtype)
    return {"x": x, "mean": x.double().mean(1).float()}


RIGHT["a statistic that the reference does not read"] = Check(
    centered,
    lambda x, mean: x - x.mean(1, keepdim=True),
    with_means,
    [{"rows": 5, "columns": 50}],
)


@triton.jit
def tiles_kernel(x_ptr, y_ptr, counter_ptr, n, tiles, BLOCK: tl.constexpr):
    tile = tl.atomic_add(counter_ptr, 1)
    while tile < tiles:
        i = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n) * 3, mask=i < n)
        tile = tl.atomic_add(counter_ptr, 1)


def by_tiles(x):
    y, tiles = torch.empty_like(x), triton.cdiv(x.numel(), 16)
    counter = torch.zeros(1, dtype=torch.int32)
    tiles_kernel[(3,)](x, y, counter, x.numel(), tiles, BLOCK=16)
    return y


RIGHT["tiles from a counter"] = Check(by_tiles, lambda x: 3 * x, normal("x"), [{"n": 100}])


@triton.jit
def recur(a, b, next_a, next_b):
    return a * next_a, b * next_a + next_b


@triton.jit
def recurrence_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    a = tl.sigmoid(tl.load(a_ptr + place).to(tl.float32))  # so that infinity is multiplied nowhere
    b = tl.load(b_ptr + place).to(tl.float32)
    _, y = tl.associative_scan((a, b), 0, recur)
    tl.store(y_ptr + place, y)


def recurrence(a, b):
    y = torch.empty_like(b)
    recurrence_kernel[(len(a),)](a, b, y, N=a.shape[1])
    return y


def recurred(a, b):
    a, y = a.sigmoid(), [b[:, 0]]
    for t in range(1, a.shape[1]):
        y.append(a[:, t] * y[-1] + b[:, t])
    return torch.stack(y, 1)


RIGHT["associative scan"] = Check(
    recurrence,
    recurred,
    lambda dtype, rows, N: {
        "a": torch.randn(rows, N).to(dtype),
        "b": torch.randn(rows, N).to(dtype),
    },
    [{"rows": 3, "N": 32}],
)


@triton.jit
def made_descriptor_kernel(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    row = tl.program_id(0) * BLOCK
    for column in range(0, N, BLOCK):
        y.store([row, column], x.load([row, column]) * 2)


def by_made_descriptors(x):
    y = torch.empty_like(x)
    made_descriptor_kernel[(triton.cdiv(len(x), 16),)](x, y, *x.shape, BLOCK=16)
    return y


RIGHT["descriptors made in the kernel"] = Check(
    by_made_descriptors, lambda x: 2 * x, normal("x"), [{"rows": 20, "columns": 40}]
)

# ---- what seemed wrong once


@triton.jit
def swapped_in_kernel(x_ptr, largest_ptr):
    x = tl.load(x_ptr + tl.program_id(0))
    seen = tl.load(largest_ptr, volatile=True)  # as good as a relaxed atomic load
    while seen < x:
        now = tl.atomic_cas(largest_ptr, seen, x)
        if now == seen:
            seen = x
        else:
            seen = now


def largest_by_swaps(x):
    y = torch.full((1,), -100, dtype=torch.int32)
    swapped_in_kernel[(x.numel(),)](x, y)
    return y


RIGHT["maximum by compare and swap"] = Check(
    largest_by_swaps,
    lambda x: x.max().reshape(1),
    lambda dtype, n: {"x": torch.randint(-50, 90, (n,), dtype=torch.int32)},
    [{"n": 9}],
    dtypes=["fp32"],
)


@triton.jit
def wider_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, x * 2, mask=i < n)


def wider(x):
    y = torch.empty(x.shape, dtype=torch.float32)
    wider_kernel[(triton.cdiv(x.numel(), 16),)](x, y, x.numel(), BLOCK=16)
    return y


RIGHT["reads fp8"] = Check(
    wider,
    lambda x: x.float() * 2,
    lambda dtype, n: {"x": torch.randn(n).to(torch.float8_e4m3fn)},
    [{"n": 40}],
    dtypes=["fp32"],
    gradients=[],
)


@triton.heuristics({"EVEN": lambda given: given["n"] % given["BLOCK"] == 0})
@triton.jit
def one_more_kernel(x_ptr, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)
    else:
        x = tl.load(x_ptr + i, mask=i < n, other=0.0)
        tl.store(x_ptr + i, x + 1, mask=i < n)


def one_more(x):
    y = x.detach().clone()
    one_more_kernel[(triton.cdiv(x.numel(), 16),)](y, x.numel(), BLOCK=16)
    return y


RIGHT["adds in place in either branch"] = Check(
    one_more, lambda x: x + 1, normal("x"), [{"n": 32}, {"n": 40}], dtypes=["bf16"], gradients=[]
)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def from_below_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + place)
    tl.store(y_ptr + place, tl.associative_scan(x, 0, larger, reverse=True))


def from_below(x):
    y = torch.empty_like(x)
    from_below_kernel[(1,)](x, y, ROWS=len(x), N=x.shape[1])
    return y


RIGHT["scan in reverse along the first axis"] = Check(
    from_below,
    lambda x: x.flip(0).cummax(0).values.flip(0),
    lambda dtype, rows, N: {"x": torch.randint(0, 99, (rows, N))},
    [{"rows": 8, "N": 16}],
    dtypes=["fp32"],
)

# ---- which of equal values

RIGHT["index of the first of the largest"] = Check(
    blocked_argmax(False), lambda x: x.argmax(-1), normal("x"), [{"rows": 4, "columns": 50}]
)


# ---- programs that wait for those before them


@triton.jit
def in_turn_kernel(x_ptr, y_ptr, turn_ptr, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32), 0)
    while tl.atomic_cas(turn_ptr, program, program) != program:
        pass
    tl.store(y_ptr, tl.load(y_ptr) + total)
    tl.atomic_xchg(turn_ptr, program + 1)


def in_turn(x):
    y, turn = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    in_turn_kernel[(triton.cdiv(x.numel(), 16),)](x, y, turn, x.numel(), BLOCK=16)
    return y.to(x.dtype)


WAITING["a sum in turn"] = Check(in_turn, lambda x: x.sum().reshape(1), normal("x"), [{"n": 100}])


@triton.jit
def chained_kernel(x_ptr, y_ptr, done_ptr, sum_ptr, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    before = 0
    if program > 0:
        while tl.atomic_add(done_ptr + program - 1, 0, sem="acquire") == 0:
            pass
        before = tl.load(sum_ptr + program - 1)
    tl.store(sum_ptr + program, before + tl.sum(x, 0))
    tl.atomic_xchg(done_ptr + program, 1, sem="release")
    tl.store(y_ptr + i, before + tl.cumsum(x, 0), mask=i < n)


def chained(x):
    y, programs = torch.empty_like(x), triton.cdiv(x.numel(), 16)
    done, sums = torch.zeros(programs, dtype=torch.int32), x.new_empty(programs)
    chained_kernel[(programs,)](x, y, done, sums, x.numel(), BLOCK=16)
    return y


WAITING["a scan from program to program"] = Check(
    chained,
    lambda x: x.cumsum(0, dtype=torch.int32),
    lambda dtype, n: {"x": torch.randint(9, (n,), dtype=torch.int32)},
    [{"n": 100}],
    dtypes=["fp32"],
)
