"""Rotary embeddings of queries and keys, forward and backward, one pass each.

For the halves a, b of a row of q or k, and the cosines and sines of its position (RoPE in the
layout of GPT-NeoX, which pairs columns i and i + K / 2):

    a' = a cos - b sin        b' = b cos + a sin
    da = da' cos + db' sin        db = db' cos - da' sin        (the inverse rotation)

A program owns a token with all its heads, so it reads cosines and sines once. The forward pass
leaves v where it is, in the projection. The backward pass writes the gradient of the whole
projection, v included, which autograd would otherwise put together from its three parts in a pass
of its own. Saved: positions and table alone, since a rotation has no need of its input.

A position outside the table reads nothing and makes q and k of its token NaN, and their gradients.

Source: Su et al., 2021 (RoFormer), equation 34.
"""

import triton
import triton.language as tl

from fastbert_kernels._launch import Kernel


@triton.jit
def _angles(position_ids_ptr, table_ptr, stride_table, token, N, K: tl.constexpr):
    """Return cosines and sines of a token, [1, K / 2 rounded up to a power of two]."""
    position = tl.load(position_ids_ptr + token)
    column = tl.arange(0, triton.next_power_of_2(K // 2))[None, :]
    inside = (column < K // 2) & (position >= 0) & (position < N)
    angles = table_ptr + position * stride_table + column
    cos = tl.load(angles, mask=inside, other=float("nan"))
    sin = tl.load(angles + K // 2, mask=inside, other=float("nan"))
    return cos, sin


@triton.jit
def _heads(stride_head, H: tl.constexpr, K: tl.constexpr):
    """Return the offsets of the first halves of all heads of a token, and which of them exist."""
    head = tl.arange(0, triton.next_power_of_2(H)).to(tl.int64)[:, None]
    column = tl.arange(0, triton.next_power_of_2(K // 2))[None, :]
    return head * stride_head + column, (head < H) & (column < K // 2)


@triton.jit
def _rotate(x_ptr, y_ptr, offset_x, offset_y, exists, cos, sin, K: tl.constexpr):
    a = tl.load(x_ptr + offset_x, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + K // 2 + offset_x, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset_y, a * cos - b * sin, mask=exists)
    tl.store(y_ptr + K // 2 + offset_y, b * cos + a * sin, mask=exists)


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    qkv_ptr,
    position_ids_ptr,
    table_ptr,
    q_ptr,
    k_ptr,
    stride_token,
    stride_part,
    stride_head,
    stride_table,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cos, sin = _angles(position_ids_ptr, table_ptr, stride_table, token, N, K)
    from_head, exists = _heads(stride_head, H, K)
    to_head, _ = _heads(K, H, K)

    qkv_ptr += token * stride_token
    to = token * H * K
    _rotate(qkv_ptr, q_ptr + to, from_head, to_head, exists, cos, sin, K)
    _rotate(qkv_ptr + stride_part, k_ptr + to, from_head, to_head, exists, cos, sin, K)


_FORWARD = Kernel(_forward_kernel, "rotary_forward", wide=("qkv_ptr",))


def forward(qkv, position_ids, table):
    """Return the rotated q and k, [T, H, K] each."""
    T, _, H, K = qkv.shape
    q, k = qkv.new_empty(T, H, K), qkv.new_empty(T, H, K)
    if T and H:
        strides = (*qkv.stride()[:3], table.stride(0))
        kernel = _FORWARD.prepare(qkv, H * K, (H, K), strides)
        kernel((T,), (qkv, position_ids, table, q, k), (*strides, table.shape[0]))
    return q, k


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    position_ids_ptr,
    table_ptr,
    dqkv_ptr,
    stride_table,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cos, sin = _angles(position_ids_ptr, table_ptr, stride_table, token, N, K)
    head, exists = _heads(K, H, K)

    of, to = token * H * K, token * 3 * H * K
    _rotate(dq_ptr + of, dqkv_ptr + to, head, head, exists, cos, -sin, K)
    _rotate(dk_ptr + of, dqkv_ptr + to + H * K, head, head, exists, cos, -sin, K)
    for half in tl.static_range(2):
        place = head + half * (K // 2)
        dv = tl.load(dv_ptr + of + place, mask=exists, other=0.0)
        tl.store(dqkv_ptr + to + 2 * H * K + place, dv, mask=exists)


_BACKWARD = Kernel(_backward_kernel, "rotary_backward", wide=("dq_ptr", "dk_ptr", "dv_ptr"))


def backward(dq, dk, dv, position_ids, table):
    """Return the gradient of the projection, [T, 3, H, K]; dq, dk and dv are contiguous."""
    T, H, K = dq.shape
    dqkv = dq.new_empty(T, 3, H, K)
    if T and H:
        kernel = _BACKWARD.prepare(dq, H * K, (H, K), table.stride(0))
        numbers = (table.stride(0), table.shape[0])
        kernel((T,), (dq, dk, dv, position_ids, table, dqkv), numbers)
    return dqkv
