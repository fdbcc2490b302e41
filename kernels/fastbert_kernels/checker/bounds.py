"""How large the error of a kernel may be: a bound that is derived, not set by hand.

A kernel computes in fp32 or wider from inputs of some dtype, and rounds its results to that dtype.
Let `exact` be the reference in fp64 on the same, already rounded inputs, and `plain` the reference
in the dtype itself, as plain torch computes it. Then

    |kernel - exact| <= 2 max|plain - exact| + eps max|exact|

for every element, where the maxima go over one output or gradient.

- `max|plain - exact|` measures how badly the problem is conditioned: cancellation, long sums, steep
  functions. Torch's kernels are what the kernel replaces, so it may be as wrong as they are.
- The factor of 2: both errors are sums of roundings of the same size, added in different orders.
  The largest of one draw may be small by chance, and twice the other is rarely exceeded without a
  fault.
- `eps max|exact|` is the rounding of the stored result (half a unit in the last place of the
  largest value) and one more, since plain torch may be exact where a kernel rounds once.

The largest error of few elements is often small by chance: torch may hit a scalar exactly. So an
output of fewer than FEW elements is judged by the largest relative error of torch over DRAWS more
draws of the inputs.

Where `exact` is zero everywhere (the gradient of a softmax over one column), the result is a
difference of equal terms. These are as large as the other outputs, whose largest value then stands
in for it, times 8 for the terms of the sum.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2002, sections 2.2 and 4.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 64  # elements
DRAWS = 8


@dataclass(frozen=True)
class Comparison:
    """One output against its bound.

    Attributes:
        ratio: the largest error over the bound; infinite where the result is not finite and the
            reference is.
        index: of the worst element.
        got: its value.
        expected: what it should be.
        allowed: the bound.
    """

    ratio: float
    index: tuple[int, ...]
    got: float
    expected: float
    allowed: float


def compare(
    ours: Tensor, plain: Tensor, exact: Tensor, stand_in: float, typical: float = 0.0
) -> Comparison:
    """Compare one output with the reference.

    Args:
        ours: the kernel's.
        plain: the reference's, in the dtype of the inputs, of the shape of `ours`.
        exact: the reference's in fp64.
        stand_in: the scale, where `exact` is zero everywhere.
        typical: torch's largest relative error in other draws (`relative_error`).

    Elements at which `plain` is not finite are left out: the dtype cannot hold the result there.
    """
    usable = plain.isfinite() & exact.isfinite()
    if not usable.any():
        return Comparison(0.0, (), 0.0, 0.0, 0.0)
    truth = exact.double()
    there = truth[usable].abs()
    scale = float(there.max()) or stand_in
    floats = [x.dtype for x in (ours, plain) if x.dtype.is_floating_point]
    eps = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
    of_torch = max(float((plain.double() - truth)[usable].abs().max()), typical * scale)
    allowed = 2 * of_torch + eps * scale
    error = (ours.double() - truth).abs()
    error[~ours.isfinite()] = float("inf")
    error[~usable] = 0.0
    worst = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    largest = float(error.flatten()[worst])
    ratio = largest / allowed if allowed else (float("inf") if largest else 0.0)
    got, expected = float(ours.flatten()[worst]), float(truth.flatten()[worst])
    return Comparison(ratio, index, got, expected, allowed)


def relative_error(plain: Tensor, exact: Tensor) -> float:
    """The largest error of plain torch over the largest exact value, where both are finite."""
    usable = plain.isfinite() & exact.isfinite()
    if not usable.any():
        return 0.0
    scale = float(exact[usable].double().abs().max())
    return float((plain.double() - exact.double())[usable].abs().max()) / scale if scale else 0.0


def stand_in(exact: Mapping[str, Tensor]) -> float:
    """The scale of outputs that are zero everywhere, from the other outputs."""
    return 8 * max(
        (float(x.double().abs().max()) for x in exact.values() if x.numel()), default=0.0
    )
