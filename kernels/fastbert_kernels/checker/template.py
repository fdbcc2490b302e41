"""What to check: a kernel, its reference, inputs and shapes. Replace all four by yours.

Run it with `python -m fastbert_kernels.checker THIS_FILE.py`.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    y = tl.load(y_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x + y, mask=i < n)


def kernel(x, y):
    """Launches the kernel; imported from your own module as a rule."""
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel(), BLOCK=64)
    return out


def reference(x, y):
    """The same in plain torch."""
    return x + y


def inputs(dtype, n):
    """Arguments of both by name, for one of the shapes."""
    return {"x": torch.randn(n).to(dtype), "y": torch.randn(n).to(dtype)}


shapes = [{"n": 1}, {"n": 63}, {"n": 64}, {"n": 200}]
# dtypes = ["fp32", "bf16"]                    also "fp16"
# gradients = ["x"]                            by default of all floating-point inputs
# large = [{"n": 2**31 + 64}]                  offsets beyond 32 bits; nothing is allocated
# def least_bytes(itemsize, n): ...            bytes that must be moved
# def flops(n): ...                            operations of matrix products
