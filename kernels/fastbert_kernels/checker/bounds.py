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

Where this is exceeded, three more things may raise `max|plain - exact|`, as relative errors:

- The change of `exact` when each input moves by one rounding of fp32. A kernel is as good as that
  if it computes `exp(x)` as `exp2(x log2(e))`, as a GPU does; torch's own `exp` is better.
- The errors of torch where every sum is taken one term after the other, in fp32 (`serial.py`). A
  kernel may add in any order; torch adds in pairs, which is better.
- The largest error of few elements is often small by chance: torch may hit a scalar exactly. So an
  output of fewer than FEW elements is judged by the largest error over DRAWS more draws.

An element that is small beside the largest one has a bound of its own, since the bound above may
exceed it many times. Instead of the largest error of all elements, this takes the largest among
those that are no larger than it, or among the FEW smallest ones: where a sum cancels, torch's own
errors in small elements are as large as in others, and else they shrink with the element. If that
is exceeded, the other draws add to the sample, and so do the moved inputs and the serial sums.
The size of an element does not tell that of the terms that it is the sum of: a row of a gradient
may cancel beside rows that are tiny. So to torch's error is added the largest change of the very
element when the inputs and the result of each operator move by one rounding of the dtype, in DRAWS
ways (`noise.py`).

Where `exact` is zero everywhere (the gradient of a softmax over one column), the result is a
difference of equal terms. These are as large as the other outputs, whose largest value then stands
in for it, times 8 for the terms of the sum.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2002, sections 2.2 and 4.2.
"""

from collections.abc import Mapping, Sequence
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
    floats = [x.dtype for x in (ours, plain) if x.dtype.is_floating_point]
    eps = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
    ours, plain, truth = ours.double(), plain.double(), exact.double()
    usable = plain.isfinite() & truth.isfinite()
    if not usable.any():
        return Comparison(0.0, (), 0.0, 0.0, 0.0)
    there = truth[usable].abs()
    scale = float(there.max()) or stand_in
    of_torch = max(float((plain - truth)[usable].abs().max()), typical * scale)
    allowed = 2 * of_torch + eps * scale
    error = (ours - truth).abs()
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
    plain, exact = plain.double(), exact.double()
    usable = plain.isfinite() & exact.isfinite()
    if not usable.any():
        return 0.0
    scale = float(exact[usable].abs().max())
    return float((plain - exact)[usable].abs().max()) / scale if scale else 0.0


def compare_small(
    ours: Tensor,
    plain: Tensor,
    exact: Tensor,
    samples: Sequence[tuple[Tensor, Tensor]],
    moved: Sequence[Tensor] = (),
) -> Comparison:
    """Compare each element with torch's errors in elements that are no larger.

    Args:
        ours: the kernel's.
        plain: the reference's, in the dtype of the inputs, of the shape of `ours`.
        exact: the reference's in fp64.
        samples: exact results, and other results of the reference for the same inputs.
        moved: exact results for these inputs, moved by a rounding.

    Elements whose exact value is zero are left out.
    """
    floats = [x.dtype for x in (ours, plain) if x.dtype.is_floating_point]
    if not floats:
        return Comparison(0.0, (), 0.0, 0.0, 0.0)
    eps = max(torch.finfo(dtype).eps for dtype in floats)
    least = max(torch.finfo(dtype).smallest_normal for dtype in floats)
    ours, truth = ours.double(), exact.double()
    sizes: list[Tensor] = []
    errors: list[Tensor] = []
    for right, other in samples:
        size, error = right.double().abs().flatten(), (other.double() - right.double()).abs()
        known = size.isfinite() & error.flatten().isfinite() & (size > 0)
        sizes.append(size[known])
        errors.append(error.flatten()[known])
    size, order = torch.cat(sizes).sort()
    if not len(size):
        return Comparison(0.0, (), 0.0, 0.0, 0.0)
    largest = torch.cat(errors)[order].cummax(0).values
    place = torch.searchsorted(size, truth.abs().contiguous(), right=True) - 1
    of_torch = largest[place.clamp(min(FEW, len(size)) - 1, len(size) - 1)]
    change = torch.zeros_like(truth)
    for other in moved:
        change = change.fmax((other.double() - truth).abs())
    allowed = 2 * (of_torch + change.nan_to_num(0, 0)) + eps * truth.abs().clamp(min=least)
    error = (ours - truth).abs()
    error[~(plain.double().isfinite() & truth.isfinite()) | (truth == 0)] = 0.0
    ratio = error / allowed
    worst = int(ratio.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape))
    return Comparison(
        *(float(ratio.flatten()[worst]), index, float(ours.flatten()[worst])),
        *(float(truth.flatten()[worst]), float(allowed.flatten()[worst])),
    )


def stand_in(exact: Mapping[str, Tensor]) -> float:
    """The scale of outputs that are zero everywhere, from the other outputs."""
    return 8 * max(
        (float(x.double().abs().max()) for x in exact.values() if x.numel()), default=0.0
    )
