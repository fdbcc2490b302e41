"""`x W' + b`, by the faster of the two libraries that torch brings for a CPU.

torch gives fp32 products to MKL, which only uses AVX2 on processors that are not Intel's. oneDNN,
which torch uses for convolutions and bf16, uses what the processor has: on an AMD EPYC with AVX-512
it is 5 to 20 % faster for y and dx. Without AVX-512 the two are equally fast, and oneDNN takes
another 0.7 ms for every new number of rows (AMD EPYC with AVX2).

Three products stay with MKL: dW = dy' x, for which oneDNN would copy both factors; sums of more
than `_LONGEST` terms, whose rounding errors would be three times as large; and the logits of the
vocabulary, where even 1.5 times the error shows in the loss. The processor and the sizes decide,
and no measurement does: two runs on one machine must round alike.

Operands in bf16 (`operands`) are for processors with bf16 instructions, which multiply them at
twice the rate of fp32. Everything else stays in fp32. Library products of bf16 factors add up in
fp32 and round their results to bf16, as under autocast; torch's only product with an fp32 result is
MKL's, which runs at the rate of fp32 (93 against 205 GFLOP/s on an AMD EPYC).

oneDNN compiles a product for each new shape. That takes 0.5 ms with AVX-512 and 0.5 to 3 ms with
AMX, up to twenty times as long as the product. Packs differ in their number of tokens, so nearly
every product would have a new shape. Rounded factors therefore end with rows of zeros, up to a
multiple of 64 (of 16 below 512 rows), and the same few shapes come again.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels._processor import flags

# oneDNN adds up in longer chains: its error against fp64 is 1.4 to 1.7 times MKL's up to this
# length, and 2.1 times at 1,536.
_LONGEST = 1024
# Products of fewer multiplications stay in fp32, since converting the factors would take what they
# gain. A layer's three products with the conversions are 1.25 times as fast at this size, and with
# a quarter of it slower than in fp32 (AMD EPYC).
FEWEST_MULTIPLICATIONS = 1 << 22

_ROWS = 256  # whose fp32 copy stays in a core's cache

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of a, b and c: a b' + c


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    operands: torch.dtype | None = None,
    keep_rounded: bool = False,
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.linear`: x [N, D], weight [F, D] and bias [F] to [N, F].

    Args:
        x: [N, D]; with operands in bf16, fp32 or bf16, for a weight in fp32.
        weight: [F, D], in the dtype of x.
        bias: [F], in the dtype of x; or None.
        operands: bf16 or None. With bf16, x, weight, bias and dy are rounded to it for the three
            products, which add up in fp32, and so are the products; the results and the gradients
            are then fp32 (that of x is in its dtype), and so is the sum that is the gradient of
            the bias. Products of fewer than 2^22 multiplications are not rounded.
        keep_rounded: whether to return a rounded product in bf16, without the pass to fp32, for an
            operation whose results are the operands of another product.
        impl: with "cpu", or "auto" on a CPU, oneDNN computes it where that is faster; see above.
            Any other is torch's own. "reference" with bf16 operands multiplies the rounded
            factors in fp32, and is slow.

    Raises:
        TypeError: `operands` is not bf16, or weight is not fp32 where it is.
    """
    on_cpu = impl == "cpu" or (impl == "auto" and x.is_cpu)
    if rounds("linear", operands, weight, len(x) * weight.numel()):
        multiply = _reference_product if impl == "reference" else torch.nn.functional.linear
        y = _Rounded.apply(x, weight, bias, multiply)
        return y if keep_rounded else y.to(weight.dtype)
    if operands is not None:
        x = x.to(weight.dtype)
    if (
        on_cpu
        and x.dtype == torch.float32
        and _onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
    ):
        return _Linear.apply(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def rounds(name: str, operands: torch.dtype | None, weight: Tensor, multiplications: int) -> bool:
    """Whether a product with this weight and number of multiplications has rounded operands.

    Raises:
        TypeError: `operands` is not bf16, or weight is not fp32; `name` is for the message.
    """
    if operands is None:
        return False
    if operands != torch.bfloat16:
        raise TypeError(f"{name}: operands = {operands}; must be torch.bfloat16 or None")
    if weight.dtype != torch.float32:
        raise TypeError(f"{name}: operands = {operands} for a weight in {weight.dtype}; give fp32")
    return multiplications >= FEWEST_MULTIPLICATIONS


def rounded(x: Tensor) -> Tensor:
    """Return x [N, D] in bf16; on a CPU with rows of zeros up to a shape that comes again."""
    missing = -len(x) % (64 if len(x) >= 512 else 16) if x.is_cpu else 0
    if not missing:
        return x.to(torch.bfloat16)
    result = x.new_empty(len(x) + missing, x.shape[1], dtype=torch.bfloat16)
    result[: len(x)], result[len(x) :] = x, 0
    return result


def _reference_product(a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    exact = torch.nn.functional.linear(a.float(), b.float(), None if c is None else c.float())
    return exact.to(a.dtype)


def _sum_of_rows(x: Tensor) -> Tensor:
    """The sum over the rows of x [N, F] in fp32.

    torch would make an fp32 copy of x first, which takes as long as a quarter of a product.
    """
    if len(x) <= _ROWS:
        return x.sum(0, dtype=torch.float32)
    return torch.stack([rows.sum(0, dtype=torch.float32) for rows in torch.split(x, _ROWS)]).sum(0)


class _Rounded(Function):
    """y = x W' + b in bf16; the factors of all three products are rounded to it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, multiply: Product
    ) -> Tensor:
        ctx.multiply, ctx.dtype, rows = multiply, x.dtype, len(x)
        x, weight = rounded(x), weight.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, None if bias is None else bias.to(torch.bfloat16))[:rows]

    @staticmethod
    @backward_once
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        factor = rounded(dy)
        if ctx.needs_input_grad[0]:
            dx = ctx.multiply(factor, weight.T, None)[: len(dy)].to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dweight = ctx.multiply(factor.T, x.T, None).float()
        dbias = _sum_of_rows(dy) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether this is an x86 processor with AVX-512 that is not Intel's.

    On Arm and macOS torch has no MKL.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(flags() & {"AuthenticAMD", "HygonGenuine"}) and "avx512f" in flags()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.shape[1] > _LONGEST:
        return torch.nn.functional.linear(x, weight, bias)
    # For rows of a wider matrix, oneDNN has a loop that is a hundred times slower.
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @backward_once
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        dx = _product(dy, weight.T) if ctx.needs_input_grad[0] else None
        dweight = dy.T @ x if ctx.needs_input_grad[1] else None
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias
