"""`rotary_embedding`: positions of queries and keys in ModernBERT's attention."""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._checks import (
    INT64,
    Implementations,
    check_leader,
    check_range,
    check_row_width,
    check_tensors,
    check_triton,
    chosen_implementation,
    values_checked,
)
from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels._library import operator
from fastbert_kernels.rotary.cpu import cpu
from fastbert_kernels.rotary.reference import reference

NAME = "rotary_embedding"


def rotary_embedding(
    qkv: Tensor,
    position_ids: Tensor,
    table: Tensor,
    *,
    check_values: bool | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate the queries and keys of a packed projection by the angles of their positions (RoPE).

    For the halves a, b of each row: (a cos - b sin, b cos + a sin), in fp32. The result is not
    written over qkv, as autograd would then copy the gradient of the whole projection. q and k are
    new tensors, v is the view `qkv[:, 2]`, of which nothing is copied. The backward pass writes the
    gradient of the projection once, from those of q, k and v. It needs only the positions and the
    table.

    Args:
        qkv: [T, 3, H, K], fp32, fp16 or bf16: queries, keys and values. K is even.
        position_ids: int64 [T], rows of the table: positions within the sequences, such as
            `packed_positions(cu_seqlens, T)`.
        table: fp32 [N, K], `rotary_table(N, K, theta)`; also fp64, except with "triton".
        check_values: whether to look for positions outside the table. None: on a CPU; True: also
            on a GPU, which then waits for the device. Unchecked, "triton" reads nothing for such a
            position, and the token's q and k are NaN.
        impl: "triton" (one pass each way; H * K up to 8,192; all axes but the last may be strided),
            "cpu", "reference", or "auto": "triton" on a GPU, "cpu" on a CPU.

    Returns:
        q, k and v, [T, H, K] each, as qkv.

    Raises:
        ValueError: a shape or device that does not fit, an odd head size, an unknown `impl`, a
            position outside the table (see check_values); "triton": H * K above 8,192, a last axis
            that is not contiguous.
        TypeError: a dtype that does not fit; "triton": float64.

    Source: Su et al., 2021 (RoFormer), section 3.2; pairs of columns i and i + K / 2, as in
    ModernBERT (Warner et al., 2024).
    """
    impl = chosen_implementation(NAME, impl, _IMPLEMENTATIONS, qkv)
    check(qkv, position_ids, table, check_values, impl)
    return _IMPLEMENTATIONS[impl](qkv, position_ids, table)


def check(
    qkv: Tensor, position_ids: Tensor, table: Tensor, check_values: bool | None, impl: str
) -> None:
    check_leader(NAME, "qkv", qkv, ("T", "3", "H", "K"))
    T, _, H, K = qkv.shape
    check_leader(NAME, "table", table, ("N", "K"), (torch.float32, torch.float64))
    if K % 2:
        raise ValueError(f"{NAME}: qkv has shape {list(qkv.shape)}, expected an even head size K")
    N, tables = table.shape[0], (torch.float32, torch.float64)
    tensors = (
        ("qkv", qkv, (T, 3, H, K), (qkv.dtype,)),
        ("position_ids", position_ids, (T,), INT64),
        ("table", table, (N, K), tables),
    )
    check_tensors(NAME, qkv.device, *tensors)
    if values_checked(check_values, position_ids):
        check_range(NAME, "position_ids", position_ids, N, "N")
    if impl == "triton":
        check_triton(NAME, *tensors)
        if table.dtype == torch.float64:
            raise TypeError(f'{NAME}: table is float64, expected float32 for impl = "triton"')
        check_row_width(NAME, "qkv", H * K)


def _forward_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    T, H, K = qkv.shape[0], qkv.shape[2], qkv.shape[3]
    return qkv.new_empty(T, H, K), qkv.new_empty(T, H, K)


def _backward_fake(dq: Tensor, *_: Any) -> Tensor:
    T, H, K = dq.shape
    return dq.new_empty(T, 3, H, K)


FORWARD = operator(
    "rotary_embedding_forward(Tensor qkv, Tensor position_ids, Tensor table) -> (Tensor, Tensor)",
    "rotary.kernel.forward",
    _forward_fake,
)
BACKWARD = operator(
    "rotary_embedding_backward(Tensor dq, Tensor dk, Tensor dv, Tensor position_ids, "
    "Tensor table) -> Tensor",
    "rotary.kernel.backward",
    _backward_fake,
)


class _Rotary(Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, position_ids: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k = FORWARD(qkv, position_ids, table)
        ctx.save_for_backward(position_ids, table)
        return q, k, qkv[:, 2]

    @staticmethod
    @backward_once
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        dq, dk, dv = (gradient.contiguous() for gradient in gradients)
        return BACKWARD(dq, dk, dv, *ctx.saved_tensors), None, None


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _Rotary.apply(*arguments)


_IMPLEMENTATIONS: Implementations = {"triton": _triton, "cpu": cpu, "reference": reference}
