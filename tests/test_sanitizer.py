"""The sanitizer of Triton kernels.

It finds and names planted faults of each kind, its arithmetic is torch's, and its counts are exact.
"""

import operator
import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1, which tests/conftest.py sets where there is no GPU",
        allow_module_level=True,
    )

import triton
import triton.language as tl
from triton.runtime import interpreter

from fastbert_kernels.checker.sanitizer import SanitizerError, sanitize


def launch(kernel, grid, *args, **kwargs):
    """Return the faults of one launch, as text."""
    with sanitize(raise_on_fault=False) as report:
        kernel[grid](*args, **kwargs)
    return [str(fault) for fault in report.faults]


# ---- bounds


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, load_below, store_below, shift, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns + shift, mask=columns < load_below, other=0.0)
    tl.store(y_ptr + columns, x, mask=columns < store_below)


@triton.jit
def copy_rows_kernel(x_ptr, y_ptr, stride_x, stride_y, BLOCK_T: tl.constexpr, D: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = tl.arange(0, D)[None, :]
    tl.store(y_ptr + rows * stride_y + columns, tl.load(x_ptr + rows * stride_x + columns))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64], ids=str
)
def test_a_correct_copy_is_counted_exactly(dtype):
    x = torch.arange(100).to(dtype)
    y = torch.zeros(100, dtype=dtype)
    with sanitize() as report:
        copy_kernel[(4,)](x, y, 100, 100, 100, 0, BLOCK=32)
    assert torch.equal(x, y)
    (launch,) = report.launches
    size = 100 * dtype.itemsize
    assert (launch.kernel, launch.grid, launch.loaded, launch.stored, launch.flops) == (
        "copy_kernel",
        (4, 1, 1),
        size,
        size,
        0,
    )
    assert (launch.tensors["x_ptr"].loaded, launch.tensors["x_ptr"].stored) == (size, 0)
    assert (launch.tensors["y_ptr"].loaded, launch.tensors["y_ptr"].stored) == (0, size)


OUTSIDE = {
    "one past the end": (
        (101, 100, 0),
        [
            "program (3, 0, 0): x_ptr[100] out of bounds: "
            "loads 1 element past the end: the tensor spans 100 elements"
        ],
    ),
    "before the start": (
        (100, 100, -2),
        ["program (0, 0, 0): x_ptr[-2, -1] out of bounds: loads 2 elements before the start"],
    ),
    "no mask on the store": (
        (100, 128, 0),
        [
            "program (3, 0, 0): y_ptr[100, 101, 102, 103, ... 127] out of bounds: "
            "stores 28 elements past the end"
        ],
    ),
}


@pytest.mark.parametrize(("limits", "messages"), OUTSIDE.values(), ids=OUTSIDE)
def test_accesses_out_of_bounds_are_named_and_not_performed(limits, messages):
    memory = torch.full((300,), 7.0)
    # Elements outside of one tensor may be inside of its neighbour in the storage.
    x, y = (memory[50:150], memory[160:260])
    faults = launch(copy_kernel, (4,), x, y, 100, *limits, BLOCK=32)
    assert len(faults) == len(messages)
    for fault, message in zip(faults, messages, strict=True):
        assert message in fault
        assert "copy_kernel" in fault
        assert "test_sanitizer.py:" in fault
    assert (memory == 7).sum() >= 298


def test_a_wrong_stride_leaves_the_tensor_or_the_view():
    x, y = torch.randn(8, 64), torch.empty(8, 64)
    assert not launch(copy_rows_kernel, (2,), x, y, 64, 64, BLOCK_T=4, D=64)
    assert torch.equal(x, y)
    (fault,) = launch(copy_rows_kernel, (2,), x, y, 80, 64, BLOCK_T=4, D=64)
    assert (
        "program (1, 0, 0): x_ptr[512, 513, 514, 515, ... 623] out of bounds: loads 96 elements "
        "past the end" in fault
    )
    view = x[:, :32]
    assert not launch(copy_rows_kernel, (2,), view, y, 64, 64, BLOCK_T=4, D=32)
    (fault,) = launch(copy_rows_kernel, (2,), view, y, 32, 64, BLOCK_T=4, D=32)
    assert (
        "x_ptr[32, 33, 34, 35, ... 127] out of bounds: loads 64 elements between those of the "
        "view, of shape (8, 32)" in fault
    )


def test_an_empty_tensor_and_lanes_masked_off():
    for nothing in (torch.ones(1).expand(0), torch.empty(4, 0), torch.empty(0)):
        assert not launch(copy_kernel, (1,), nothing, nothing, 0, 0, 0, 0, BLOCK=16)
    (fault,) = launch(copy_kernel, (1,), nothing, nothing, 0, 1, 0, 0, BLOCK=16)
    assert (
        "x_ptr[0] out of bounds: loads 1 element past the end: the tensor spans 0 elements" in fault
    )


@triton.jit
def undefined_lanes_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.load(x_ptr + columns, mask=columns < n))


def test_lanes_without_other_are_poisoned():
    x, y = torch.ones(8), torch.ones(8)
    assert not launch(undefined_lanes_kernel, (1,), x, y, 5, BLOCK=8)
    assert y.isnan().tolist() == [False] * 5 + [True] * 3


@triton.jit
def foreign_pointer_kernel(x_ptr, address):
    tl.store(address.to(tl.pointer_type(tl.float32)), tl.load(x_ptr))


def test_a_pointer_from_nowhere_is_refused():
    with pytest.raises(
        interpreter.InterpreterError,
        match="foreign_pointer_kernel stores through a pointer that comes from no tensor argument",
    ):
        launch(foreign_pointer_kernel, (1,), torch.zeros(1), 2**40)


@triton.jit
def cast_pointer_kernel(x_ptr, y_ptr, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr.to(tl.pointer_type(TYPE)) + columns)
    tl.store(y_ptr + columns, x.to(tl.float32, bitcast=True))


def test_pointers_may_be_cast_to_elements_of_the_same_size():
    x, y = torch.randn(16), torch.empty(16)
    assert not launch(cast_pointer_kernel, (1,), x, y, tl.int32, BLOCK=16)
    assert torch.equal(x, y)
    with pytest.raises(
        interpreter.InterpreterError,
        match="cast_pointer_kernel casts x_ptr to a pointer to elements of another size",
    ):
        launch(cast_pointer_kernel, (1,), x, y, tl.int64, BLOCK=8)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.float64, torch.bfloat16], ids=str
)
def test_one_tensor_for_two_arguments_and_views_that_repeat(dtype):
    x = torch.ones(1, dtype=dtype).expand(64)
    y = torch.zeros(64, dtype=dtype)
    with sanitize() as report:
        copy_rows_kernel[(1,)](x, y, 0, 16, BLOCK_T=4, D=1)
        copy_rows_kernel[(2,)](y, y, 16, 16, BLOCK_T=2, D=16)
    assert y[::16].tolist() == [1, 1, 1, 1]
    traffic = report.launches[0].tensors["x_ptr"]
    assert (traffic.loaded, traffic.distinct_loaded) == (4 * dtype.itemsize, dtype.itemsize)
    assert report.launches[1].loaded == report.launches[1].stored == 64 * dtype.itemsize


# ---- races


@triton.jit
def store_kernel(y_ptr, step, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.program_id(0) * step + tl.arange(0, BLOCK), 1.0)


@triton.jit
def neighbour_kernel(x_ptr, y_ptr):
    """Read what the next program writes, if both pointers are the same."""
    i = tl.program_id(0)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i + 1))


@triton.jit
def sum_kernel(x_ptr, y_ptr, n, ATOMIC: tl.constexpr, CLEAR: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if CLEAR and tl.program_id(0) == 0:
        tl.store(y_ptr, 0.0)
    total = tl.sum(tl.load(x_ptr + columns, mask=columns < n, other=0.0).to(tl.float32))
    if ATOMIC:
        tl.atomic_add(y_ptr, total)
    else:
        tl.store(y_ptr, tl.load(y_ptr) + total)


@triton.jit
def lanes_kernel(y_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(y_ptr + columns // 2, columns.to(tl.float32))


def test_two_programs_that_store_one_element():
    assert not launch(store_kernel, (4,), torch.zeros(64), 16, BLOCK=16)
    (fault,) = launch(store_kernel, (4, 2), torch.zeros(64), 16, BLOCK=16)
    assert (
        "store_kernel, program (0, 1, 0): y_ptr[0, 1, 2, 3, ... 15] race: stores what program (0, "
        "0, 0) stored, and 3 times more" in fault
    )
    (fault,) = launch(store_kernel, (4,), torch.zeros(64), 15, BLOCK=16)
    assert (
        "program (1, 0, 0): y_ptr[15] race: stores what program (0, 0, 0) stored, and 2 times more"
        in fault
    )


@pytest.mark.parametrize("order", ["ascending", "reversed", 3])
def test_a_program_that_reads_what_another_writes(order):
    x = torch.arange(9.0)
    with sanitize(order=order):
        neighbour_kernel[(8,)](x, torch.empty(8))
    with (
        pytest.raises(
            SanitizerError,
            match=r"neighbour_kernel, program \(\d, 0, 0\): \w_ptr\[\d\] race: "
            r"(load|store)s what program \(\d, 0, 0\) (load|stor)ed",
        ),
        sanitize(order=order),
    ):
        neighbour_kernel[(8,)](x, x)
    with sanitize():
        neighbour_kernel[(1,)](x, x)  # a program may read what it writes


def test_atomics_race_with_everything_but_atomics():
    x = torch.arange(100.0)
    y = torch.zeros(1)
    assert not launch(sum_kernel, (7,), x, y, 100, ATOMIC=True, CLEAR=False, BLOCK=16)
    assert y.item() == 4950
    (fault,) = launch(sum_kernel, (7,), x, y, 100, ATOMIC=True, CLEAR=True, BLOCK=16)
    assert "y_ptr[0] race: atomically updates what program (0, 0, 0) stored" in fault
    faults = launch(sum_kernel, (7,), x, y, 100, ATOMIC=False, CLEAR=False, BLOCK=16)
    assert "program (1, 0, 0): y_ptr[0] race: loads what program (0, 0, 0) stored" in faults[0]


def test_lanes_of_one_store_that_differ():
    (fault,) = launch(lanes_kernel, (1,), torch.zeros(4), BLOCK=8)
    assert "y_ptr[0, 1, 2, 3] race: lanes of one store write different values" in fault


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32], ids=str
)
def test_atomic_add_with_lanes_that_share_elements(dtype):
    @triton.jit
    def histogram_kernel(index_ptr, y_ptr, n, BLOCK: tl.constexpr):
        columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        index = tl.load(index_ptr + columns, mask=columns < n)
        tl.atomic_add(y_ptr + index, 1, mask=columns < n)

    index = torch.randint(5, (50,), generator=torch.Generator().manual_seed(1))
    y = torch.zeros(5, dtype=dtype)
    with sanitize() as report:
        histogram_kernel[(4,)](index, y, 50, BLOCK=16)
    assert y.tolist() == torch.bincount(index, minlength=5).tolist()
    traffic = report.launches[0].tensors["y_ptr"]
    assert (traffic.loaded, traffic.distinct_stored) == (50 * dtype.itemsize, 5 * dtype.itemsize)


# ---- counts


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    K,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=3):
        inner = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + rows * K + inner[None, :], cache_modifier=".cg")
        b = tl.load(b_ptr + inner[:, None] * N + columns, eviction_policy="evict_last")
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rows * N + columns, acc.to(c_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matrix_product(dtype):
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, generator=draw).to(dtype) for size in ((64, 96), (96, 32)))
    c = torch.empty(64, 32, dtype=dtype)
    with sanitize() as report:
        matmul_kernel[(4, 2)](a, b, c, 96, N=32, BLOCK_M=16, BLOCK_N=16, BLOCK_K=32)
    (launch,) = report.launches
    assert launch.flops == 2 * 64 * 96 * 32
    assert launch.loaded == (2 * a.numel() + 4 * b.numel()) * dtype.itemsize
    assert launch.tensors["a_ptr"].distinct_loaded == a.numel() * dtype.itemsize
    exact = a.double() @ b.double()
    assert (c - exact).abs().max() <= 2 * ((a @ b) - exact).abs().max() + torch.finfo(
        dtype
    ).eps * exact.abs().max()


# ---- arithmetic


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "truediv":
        out = x / y
    elif OP == "lt":
        out = x < y
    elif OP == "ge":
        out = x >= y
    elif OP == "eq":
        out = x == y
    elif OP == "ne":
        out = x != y
    elif OP == "fmax":
        out = tl.maximum(x, y)
    elif OP == "fmin":
        out = tl.minimum(x, y)
    elif OP == "where":
        out = tl.where(x < y, x, -y)
    elif OP == "fma":
        out = tl.fma(x.to(tl.float32), y.to(tl.float32), 1.0)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty))


def special(dtype, seed):
    """1,024 numbers, of which the last are infinite, NaN, huge, tiny and zero."""
    x = torch.randn(1024, generator=torch.Generator().manual_seed(seed)) * 10
    big = torch.finfo(dtype).max
    values = torch.tensor([np.inf, -np.inf, np.nan, big, -big, 1e-40, 0.0, -0.0, 1.0, 1.0])
    x[-40:] = values.repeat(4) if seed == 1 else values.roll(3).repeat_interleave(4)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "op", ["add", "sub", "mul", "truediv", "lt", "ge", "eq", "ne", "fmax", "fmin", "where", "fma"]
)
def test_arithmetic_is_torchs_bit_for_bit(op, dtype):
    x, y = special(dtype, 1), special(dtype, 2)
    if op == "where":
        expected = torch.where(x < y, x, 0 - y)  # triton's own -y is 0 - y
    elif op == "fma":
        expected = (x.double() * y.double() + 1).float().to(dtype)
    else:
        expected = getattr(torch if op.startswith("fm") else operator, op)(x, y)
    out = torch.empty_like(expected)
    with sanitize():
        binary_kernel[(1,)](x, y, out, OP=op, BLOCK=1024)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("to", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("of", [*FLOATS, torch.int32, torch.uint8], ids=str)
def test_casts_round_to_nearest_even(of, to):
    bits = torch.arange(2**16, dtype=torch.int32)
    if of == torch.float32:
        # Every bf16 number plus a little less than half of its last bit, exactly half, and a
        # little more.
        x = torch.cat([bits * 65536 + low for low in (0, 0x7FFF, 0x8000, 0x8001)]).view(
            torch.float32
        )
    elif of.is_floating_point:
        x = bits.to(torch.int16).view(of)
    else:
        x = (bits * 1001).to(of)
    out = torch.empty(x.shape, dtype=to)
    with sanitize():
        cast_kernel[(len(x) // 4096,)](x, out, BLOCK=4096)
    torch.testing.assert_close(out, x.to(to), rtol=0, atol=0, equal_nan=True)


@triton.jit
def cut_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cut = tl.load(x_ptr + i).to(out_ptr.dtype.element_ty, fp_downcast_rounding="rtz")
    tl.store(out_ptr + i, cut)


def cut(x: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=to)
    with sanitize():
        cut_kernel[(len(x) // 128,)](x, out, BLOCK=128)
    return out


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_casts_to_bf16_round_towards_zero_where_asked(low):
    """Every bf16 number, with bits behind it that bf16 cannot hold."""
    bits = torch.arange(2**16, dtype=torch.int32) << 16
    x, expected = (bits + low).view(torch.float32), bits.view(torch.float32).bfloat16()
    expected[x.isnan()] = torch.nan
    found = cut(x, torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_fp64_and_fp8_round_towards_zero_where_asked():
    """The largest fp64 below each bf16 number would become that number in fp32."""
    bits = torch.arange(0x7F80, dtype=torch.int32)
    below, above = (((bits + more) << 16).view(torch.float32).double() for more in (0, 1))
    found = cut(torch.nextafter(above, torch.zeros(())), torch.bfloat16)
    assert torch.equal(found, below.bfloat16())
    x = torch.tensor([15.9375, -15.9375, 14.0, 1.0]).bfloat16().repeat(32)
    coarse = cut(x, torch.float8_e5m2)  # steps of 2 above 8
    assert coarse.float()[:4].tolist() == [14.0, -14.0, 14.0, 1.0]


@triton.jit
def bits_kernel(x_ptr, bits_ptr, out_ptr, int_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    bits = x.to(tl.int16, bitcast=True)
    tl.store(bits_ptr + i, bits)
    tl.store(out_ptr + i, bits.to(tl.bfloat16, bitcast=True) + tl.full((BLOCK,), 0.1, tl.bfloat16))
    tl.store(int_ptr + i, tl.where(x > 0, x, 0.0).to(tl.int32))


def test_bits_constants_and_integers_of_bf16():
    x = (torch.randn(256, generator=torch.Generator().manual_seed(1)) * 100).bfloat16()
    bits, out, whole = (
        torch.empty(256, dtype=torch.int16),
        torch.empty_like(x),
        torch.empty(256, dtype=torch.int32),
    )
    with sanitize():
        bits_kernel[(1,)](x, bits, out, whole, BLOCK=256)
    assert torch.equal(bits, x.view(torch.int16))
    assert torch.equal(out, x + torch.tensor(0.1).bfloat16())
    assert torch.equal(whole, x.clamp(min=0).int())


@triton.jit
def reduce_kernel(
    x_ptr,
    sum_ptr,
    max_ptr,
    argmax_ptr,
    argmin_ptr,
    xor_ptr,
    cumsum_ptr,
    AXIS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    rows, columns = tl.arange(0, R), tl.arange(0, C)
    offsets = rows[:, None] * C + columns[None, :]
    x = tl.load(x_ptr + offsets)
    out = columns if AXIS == 0 else rows
    tl.store(sum_ptr + out, tl.sum(x, AXIS))
    tl.store(max_ptr + out, tl.max(x, AXIS))
    tl.store(argmax_ptr + out, tl.argmax(x, AXIS))
    tl.store(argmin_ptr + out, tl.argmin(x, AXIS, tie_break_left=False))
    tl.store(xor_ptr + out, tl.xor_sum(x.to(tl.int32), AXIS))
    tl.store(cumsum_ptr + offsets, tl.cumsum(x.to(tl.float32), AXIS))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reductions_and_scans(dtype, axis):
    x = (
        torch.randperm(32 * 64, generator=torch.Generator().manual_seed(1))
        .reshape(32, 64)
        .to(dtype)
        / 8
    )
    n = 64 if axis == 0 else 32
    total, most = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
    first, last, xor = (torch.empty(n, dtype=torch.int32) for _ in range(3))
    running = torch.empty(32, 64)
    with sanitize():
        reduce_kernel[(1,)](x, total, most, first, last, xor, running, AXIS=axis, R=32, C=64)
    assert torch.equal(total, x.float().sum(axis).to(dtype))
    assert torch.equal(most, x.amax(axis))
    if dtype == torch.float32:  # rounding to 16 bits gives ties
        assert torch.equal(first, x.argmax(axis).int())
        assert torch.equal(last, x.argmin(axis).int())
    assert torch.equal(xor, torch.from_numpy(np.bitwise_xor.reduce(x.int().numpy(), axis)))
    assert torch.equal(running, x.float().cumsum(axis))


@triton.jit
def unary_kernel(x_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i).to(tl.float32)
    if OP == "exp":
        y = tl.exp(x)
    elif OP == "exp2":
        y = tl.math.exp2(x)
    elif OP == "log":
        y = tl.log(x)
    elif OP == "log2":
        y = tl.math.log2(x)
    elif OP == "sqrt":
        y = tl.sqrt(x)
    elif OP == "rsqrt":
        y = tl.rsqrt(x)
    elif OP == "erf":
        y = tl.math.erf(x)
    elif OP == "abs":
        y = tl.abs(tl.load(x_ptr + i))
    elif OP == "sigmoid":
        y = tl.sigmoid(x)
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize(
    "op", ["exp", "exp2", "log", "log2", "sqrt", "rsqrt", "erf", "abs", "sigmoid"]
)
def test_functions_of_bf16_are_rounded_once(op):
    x = (torch.randn(512, generator=torch.Generator().manual_seed(1)) * 2).bfloat16()
    if op in ("log", "log2", "sqrt", "rsqrt"):
        x = x.abs()
    out = torch.empty_like(x)
    with sanitize():
        unary_kernel[(1,)](x, out, OP=op, BLOCK=512)
    expected = getattr(torch, op)(x.double())
    assert (
        (out - expected).abs() <= 0.501 * torch.finfo(torch.bfloat16).eps * expected.abs()
    ).all()


@triton.jit
def hash_kernel(x_ptr, wide_ptr, narrow_ptr, high_ptr, key, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i) + key
    u = x.to(tl.uint64)
    u = (u ^ (u >> 30)) * 0xBF58476D1CE4E5B9
    u = u ^ (u >> 31)
    tl.store(wide_ptr + i, u.to(tl.int64))
    low = u.to(tl.uint32)
    low = (low ^ (low >> 16)) * 0x21F0AAAD + i.to(tl.uint32)
    tl.store(narrow_ptr + i, tl.where(low < 0x80000000, low, low - 0x80000000).to(tl.int64))
    tl.store(high_ptr + i, tl.umulhi(low, u.to(tl.uint32)).to(tl.int64) + (x >> 40))


def test_integer_hashes_wrap_as_torchs_int64():
    x = torch.randint(-(2**63), 2**63 - 1, (256,), generator=torch.Generator().manual_seed(1))
    wide, narrow, high = (torch.empty_like(x) for _ in range(3))
    with sanitize():
        hash_kernel[(1,)](x, wide, narrow, high, 2**31 + 5, BLOCK=256)
    word = 0xFFFFFFFF
    u = x + 2**31 + 5
    shifted = u >> 40
    u = (u ^ ((u >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    u = u ^ ((u >> 31) & (2**33 - 1))
    low = u & word
    low = ((low ^ low >> 16) * 0x21F0AAAD + torch.arange(256)) & word
    assert torch.equal(wide, u)
    assert torch.equal(narrow, low & 0x7FFFFFFF)
    product = [(a * b) >> 32 for a, b in zip(low.tolist(), (u & word).tolist(), strict=True)]
    assert torch.equal(high, torch.tensor(product) + shifted)


@triton.jit
def shapes_kernel(x_ptr, y_ptr, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + rows * N + columns)
    even, odd = tl.split(tl.reshape(x, (N, N // 2, 2)))
    x = tl.reshape(tl.join(even, odd), (N, N))
    x = tl.interleave(even, odd) + x
    x = tl.permute(tl.trans(x), (1, 0))
    tl.store(
        y_ptr + rows * N + columns, tl.broadcast_to(tl.sum(x, 1, keep_dims=True), (N, N)) + x.T
    )


@triton.jit
def ranks_kernel(x_ptr, y_ptr, N: tl.constexpr):
    column = tl.arange(0, N)
    x = tl.load(x_ptr + column[:, None] * N + column[None, :])
    tl.store(y_ptr + column[:, None] * N + column[None, :], x * tl.load(x_ptr + column))


def test_tensors_of_unequal_rank_are_broadcast():
    x, y = torch.randn(16, 16), torch.empty(16, 16)
    with sanitize():
        ranks_kernel[(1,)](x, y, N=16)
    assert torch.equal(y, x * x[0])


def test_shapes():
    x, y = torch.randint(9, (16, 16)).bfloat16(), torch.empty(16, 16).bfloat16()
    with sanitize():
        shapes_kernel[(1,)](x, y, N=16)
    assert torch.equal(y, (2 * x).sum(1, keepdim=True) + 2 * x.T)


@triton.jit
def float_argument_kernel(x_ptr, out_ptr, scale, doubled, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    scaled = tl.load(x_ptr + i) * scale
    tl.static_assert(scaled.dtype == tl.float32)
    if doubled:
        scaled = scaled * 2
    tl.store(out_ptr + i, scaled)


def test_float_and_bool_arguments_are_typed_as_when_compiled():
    x, out = torch.randn(16).bfloat16(), torch.empty(16)
    with sanitize():
        float_argument_kernel[(1,)](x, out, 0.1, True, BLOCK=16)
    assert torch.equal(out, x.float() * 0.1 * 2)


@triton.jit
def claims_kernel(x_ptr, n, BLOCK: tl.constexpr):
    n = tl.multiple_of(n, 8)
    tl.assume(n > 8)
    tl.device_assert(n < 24, "n is too large")
    for i in tl.static_range(2):
        tl.store(x_ptr + i * BLOCK + tl.arange(0, BLOCK), 1.0)


CLAIMS = {
    24: "device_assert fails: n is too large",
    8: "assume does not hold",
    12: "multiple_of 8 does not hold for 12",
}


def test_assertions_and_assumptions_are_checked():
    x = torch.zeros(8)
    assert not launch(claims_kernel, (1,), x, 16, BLOCK=4)
    for n, message in CLAIMS.items():
        (fault,) = launch(claims_kernel, (1,), x, n, BLOCK=4)
        assert f"claims_kernel, program (0, 0, 0): {message}" in fault


# ---- the block itself


def stock_state():
    """Return everything that the sanitizer replaces, and the patched language."""
    state = {
        (owner.__name__, name): value
        for owner in (interpreter, tl, tl.core, tl.math)
        for name, value in vars(owner).items()
    }
    classes = (
        interpreter.TensorHandle,
        interpreter.GridExecutor,
        interpreter.ReduceOps,
        interpreter.ScanOps,
        tl.tensor,
        tl.dtype,
    )
    state |= {
        (owner.__name__, name): value for owner in classes for name, value in vars(owner).items()
    }
    return state | {
        "builder": getattr(getattr(interpreter, "interpreter_semantic", None), "builder", None)
    }


def test_the_interpreter_is_restored():
    x = torch.zeros(4)
    before = stock_state()
    with sanitize():
        store_kernel[(1,)](x, 4, BLOCK=4)
        assert stock_state() != before
    assert stock_state() == before
    with pytest.raises(KeyError), sanitize():
        lanes_kernel[(1,)](torch.zeros(4), BLOCK=8)
        raise KeyError
    assert stock_state() == before
    with pytest.raises(interpreter.InterpreterError), sanitize():
        store_kernel[(1,)](x, "four", BLOCK=4)
    assert stock_state() == before


def test_the_error_lists_every_fault_of_every_launch():
    with pytest.raises(SanitizerError) as error, sanitize():
        store_kernel[(2,)](torch.zeros(4), 0, BLOCK=4)
        lanes_kernel[(1,)](torch.zeros(2), BLOCK=8)
    lines = str(error.value).splitlines()
    assert lines[0] == "3 faults in 2 launches:"
    assert ["store_kernel" in lines[1], "lanes_kernel" in lines[2], "lanes_kernel" in lines[3]] == [
        True
    ] * 3


def test_the_writer_of_a_tensor_is_forgotten_with_its_memory():
    with sanitize() as record:
        y = torch.empty(4)
        store_kernel[(1,)](y, 4, BLOCK=4)
        kernel, line = record.writer_of(y[1:])
        assert kernel == "store_kernel" and "test_sanitizer.py:" in line
        address = y.untyped_storage().data_ptr()
        del y
        others = [torch.zeros(4) for _ in range(100)]  # one of them gets the address, as a rule
        again = [x for x in others if x.untyped_storage().data_ptr() == address]
        assert all(record.writer_of(x) == ("", "") for x in again)
        assert record.writers[address][0]() is None


def test_an_unknown_order_is_an_error():
    with (
        pytest.raises(ValueError, match="order = 'random'; known are 'ascending', 'reversed'"),
        sanitize(order="random"),
    ):
        pass


def test_blocks_do_not_nest():
    with (
        sanitize(),
        pytest.raises(RuntimeError, match="already inside a sanitize block"),
        sanitize(),
    ):
        pass


# ---- atomics that only load, store or wait, of Triton 3.9


@triton.jit
def handed_on_kernel(x_ptr, y_ptr, flag_ptr, SEM: tl.constexpr, POLL: tl.constexpr):
    program = tl.program_id(0)
    before = 0.0
    if program > 0:
        if POLL:
            tl.atomic_poll(flag_ptr + program - 1, 1, sem="acquire")
        else:
            while tl.atomic_load(flag_ptr + program - 1, sem="acquire") == 0:
                pass
        before = tl.load(y_ptr + program - 1)
    tl.store(y_ptr + program, before + tl.load(x_ptr + program))
    tl.atomic_store(flag_ptr + program, 1, sem=SEM)


@pytest.mark.skipif(not hasattr(tl, "atomic_load"), reason="needs Triton 3.9")
@pytest.mark.parametrize("poll", [False, True])
def test_atomics_that_only_load_or_store_order_programs(poll):
    x, y = torch.arange(5.0), torch.empty(5)
    flags = torch.zeros(5, dtype=torch.int32)
    assert not launch(handed_on_kernel, (5,), x, y, flags, SEM="release", POLL=poll)
    assert torch.equal(y, x.cumsum(0)) and flags.tolist() == [1] * 5
    faults = launch(handed_on_kernel, (5,), x, y, flags.zero_(), SEM="relaxed", POLL=poll)
    assert "y_ptr[0] race: loads what program (0, 0, 0) stored" in faults[0]
    with pytest.raises(interpreter.InterpreterError), sanitize(order="reversed"):
        handed_on_kernel[(5,)](x, y, flags.zero_(), SEM="release", POLL=poll)
