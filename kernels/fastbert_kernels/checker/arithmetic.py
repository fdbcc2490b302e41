"""Make Triton's interpreter compute as a GPU does, where the stock interpreter is wrong.

It knows nothing about memory, and changes these operations:

- bf16: handles hold float32 values that are rounded to nearest even when a handle is made, unless a
  cast asks for rounding towards zero;
- fp8: numbers are rounded to nearest even, too large ones become the largest, and NaN stays NaN;
- fp16 dot products and sums are computed in fp32;
- `fma` rounds once;
- `maximum` and `minimum` of NaN;
- `umulhi` of negative numbers;
- the smallest size of `tl.dot` (an inner dimension of 16);
- `tl.reduce` and `tl.associative_scan`, which combine lanes in another order than the stock
  interpreter.
"""

# pyright: basic
# Triton's interpreter has no types.

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

_stock_np_dtype = interpreter._get_np_dtype
_stock_post_init = TensorHandle.__post_init__
_stock_validate = interpreter._validate_np_data_size


class GpuArithmetic(InterpreterBuilder):
    """The interpreter's arithmetic, corrected; it also needs `ARITHMETIC_PATCHES`."""

    def __init__(self):
        super().__init__()
        # CUDA does the same.
        self.codegen_fns["min_dot_size"] = lambda lhs, rhs: (
            1,
            1,
            32 if lhs.scalar.primitive_bitwidth == 8 else 16,
        )

    def get_bf16(self, value):
        return TensorHandle(np.array([value], np.float32), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        return TensorHandle(src.data.astype(np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        source, target = src.dtype.scalar, dst_type.scalar
        nearest = rounding_mode in (None, ir.ROUNDING_MODE.RTNE)
        if nearest and target.name in FP8 and not source.is_fp8():
            return TensorHandle(round_fp8(src.data, FP8[target.name]), target)
        if source.name in FP8 and not target.is_fp8():  # which can hold every fp8 value
            wide = torch.from_numpy(np.array(src.data)).view(FP8[source.name]).float().numpy()
            return TensorHandle(wide.astype(np_dtype(target)), target)
        if nearest and (source.is_bf16() or target.is_bf16()):
            return self.cast_impl(src, target)
        if target.is_bf16():
            return TensorHandle(truncate_bf16(src.data), target)
        if source.is_bf16():
            src = TensorHandle(src.data, tl.float32)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        data = op(lhs.data, rhs.data)
        if data.dtype == bool:
            return TensorHandle(data, tl.int1)
        return TensorHandle(data.astype(np_dtype(lhs.dtype), copy=False), lhs.dtype.scalar)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_fma(self, x, y, z):
        # The product of two fp32 is exact in fp64.
        wide = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    def create_fabs(self, arg):
        return TensorHandle(np.fabs(arg.data), arg.dtype.scalar)

    def create_erf(self, arg):
        return TensorHandle(
            torch.erf(torch.from_numpy(np.array(arg.data))).numpy(), arg.dtype.scalar
        )

    def create_umulhi(self, lhs, rhs):
        unsigned = [
            TensorHandle(x.data.view(f"u{x.data.itemsize}"), x.dtype.scalar) for x in (lhs, rhs)
        ]
        high = super().create_umulhi(*unsigned).data
        return TensorHandle(high.view(lhs.data.dtype), lhs.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar.primitive_bitwidth == 8 or a.data.dtype == np.float64:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(
            a.data.astype(np.float32, copy=False), b.data.astype(np.float32, copy=False)
        )
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


# ---- bf16: a float32 array whose values bf16 can hold


def round_bf16(data: np.ndarray) -> np.ndarray:
    """Round float32 to nearest even; NaN stays NaN."""
    return torch.from_numpy(np.array(data)).bfloat16().float().numpy()


def truncate_bf16(data: np.ndarray) -> np.ndarray:
    """Round float32 or float64 towards zero; NaN stays NaN."""
    data = np.asarray(data)
    with np.errstate(over="ignore"):
        narrow = data.astype(np.float32)
    narrow = np.where(np.abs(narrow) > np.abs(data), np.nextafter(narrow, np.float32(0)), narrow)
    cut = (narrow.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(data), np.float32(np.nan), cut)


FP8 = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}


def round_fp8(data: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Round to nearest even; too large numbers become the largest, as in `cvt.rn.satfinite`."""
    limit = torch.finfo(dtype).max
    rounded = torch.from_numpy(np.array(data, np.float32)).clamp(-limit, limit).to(dtype)
    return rounded.view(torch.uint8).numpy()


def encode(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Return the values of a handle as the unsigned integers that memory holds."""
    if dtype.is_bf16():
        return (np.ascontiguousarray(data, np.float32).view(np.uint32) >> np.uint32(16)).astype(
            np.uint16
        )
    data = np.ascontiguousarray(data, np_dtype(dtype))
    return data.view(f"u{data.itemsize}")


def decode(raw: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """The inverse of `encode`."""
    return (
        (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if dtype.is_bf16()
        else raw.view(np_dtype(dtype))
    )


np_dtypes: dict[str, np.dtype] = {}


def np_dtype(dtype: Any) -> np.dtype:
    """Cached, because the stock function rebuilds its table in every call."""
    name = dtype.scalar.name
    if name not in np_dtypes:
        np_dtypes[name] = np.dtype(np.float32) if name == "bf16" else _stock_np_dtype(dtype)
    return np_dtypes[name]


def _fits(data: np.ndarray, dtype: Any) -> bool:
    return dtype.scalar.is_bf16() or _stock_validate(data, dtype)


def _round_new_handle(handle: TensorHandle) -> None:
    if handle.dtype.scalar.is_bf16() and handle.data.dtype == np.float32:
        handle.data = round_bf16(handle.data)
    else:
        _stock_post_init(handle)


# ---- reductions


def _sum(self: ReduceOps, input: tl.tensor) -> tl.tensor:
    """Sum in pairs, as a GPU does; NumPy adds row after row unless the axis is the last."""
    data = input.handle.data
    if data.dtype == np.float16:
        data = data.astype(np.float32)
    if (
        self.axis is None
        or self.axis % data.ndim == data.ndim - 1
        or not np.issubdtype(data.dtype, np.floating)
    ):
        return self.to_tensor(np.sum(data, axis=self.axis, keepdims=self.keep_dims), input.dtype)
    data = np.moveaxis(data, self.axis, 0)
    while len(data) > 1:
        data = data[: len(data) // 2] + data[len(data) // 2 :]
    return self.to_tensor(
        np.expand_dims(data[0], self.axis) if self.keep_dims else data[0], input.dtype
    )


def _reduce(self: ReduceOps, inputs: tuple[tl.tensor, ...]) -> Any:
    """Reduce whole slices with any function, the first half with the second, as a GPU's lanes do.

    So a function that is not associative and commutative shows. The stock interpreter takes one
    element after the other, which is slow, too.
    """
    if self.combine_fn in (
        tl.standard._argmax_combine_tie_break_fast,
        tl.standard._argmin_combine_tie_break_fast,
    ):
        most = self.combine_fn == tl.standard._argmax_combine_tie_break_fast
        return self.min_max(inputs[0], *((np.max, np.argmax) if most else (np.min, np.argmin)))
    dtypes = [x.dtype for x in inputs]
    arrays = [
        x.handle.data.ravel() if self.axis is None else np.moveaxis(x.handle.data, self.axis, 0)
        for x in inputs
    ]
    while len(arrays[0]) > 1:
        half = len(arrays[0]) // 2
        pairs = zip(
            [x[:half] for x in arrays] + [x[half:] for x in arrays], dtypes * 2, strict=True
        )
        result = self.combine_fn.fn(*[self.to_tensor(x, dtype) for x, dtype in pairs])
        arrays = [x.handle.data for x in (result if isinstance(result, tuple) else (result,))]
    arrays = [x[0] for x in arrays]
    if self.keep_dims:
        axes = tuple(range(len(inputs[0].shape))) if self.axis is None else self.axis
        arrays = [np.expand_dims(x, axes) for x in arrays]
    return [self.to_tensor(x, dtype) for x, dtype in zip(arrays, dtypes, strict=True)]


def _scan(self: ScanOps, inputs: list[tl.tensor]) -> list[tl.tensor]:
    """Scan whole slices with any function, in steps of 1, 2, 4, ..., as a GPU's lanes do.

    So a function that is not associative shows. The stock interpreter takes one element after the
    other, which is slow, too.
    """
    dtypes = [x.dtype for x in inputs]
    arrays = [np.moveaxis(np.array(x.handle.data), self.axis, 0) for x in inputs]
    length, step = len(arrays[0]), 1
    first = np.arange(length).reshape(-1, *[1] * (arrays[0].ndim - 1))
    while step < length:
        before = [np.roll(x, step, 0) for x in arrays]  # of the first `step` lanes: unused
        pairs = zip(before + arrays, dtypes * 2, strict=True)
        result = self.combine_fn.fn(*[self.to_tensor(x, dtype) for x, dtype in pairs])
        parts = result if isinstance(result, tuple) else (result,)
        arrays = [
            np.where(first < step, x, part.handle.data)
            for x, part in zip(arrays, parts, strict=True)
        ]
        step *= 2
    arrays = [np.ascontiguousarray(np.moveaxis(x, 0, self.axis)) for x in arrays]
    return [self.to_tensor(x, dtype) for x, dtype in zip(arrays, dtypes, strict=True)]


ARITHMETIC_PATCHES = [
    (interpreter, "_get_np_dtype", np_dtype),
    (interpreter, "_validate_np_data_size", _fits),
    (TensorHandle, "__post_init__", _round_new_handle),
    (ReduceOps, "sum", _sum),
    (ReduceOps, "generic_reduce", _reduce),
    (ScanOps, "generic_scan", _scan),
]
