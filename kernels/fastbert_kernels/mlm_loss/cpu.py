"""`masked_cross_entropy` on a CPU: by slabs of masked tokens, with the gradient at once.

For each slab of rows h = hidden[positions], with y the one-hot labels:

    z = h W' + b      loss = logsumexp(z) - z[label]      dz = (softmax(z) - y) / total
    dh = dz W      dW += dz' h      db += sum(dz)

So no product is computed twice, and no more than `_SLAB` logits exist at a time. Saved for the
backward pass: the three gradients, which it only scales (by 1 in ordinary training). Without
gradients (evaluation) only the losses are computed. Ignored tokens go through the products with
label 0; then their losses and their rows of dz are set to zero.

With operands in bf16, h, W and dz are rounded for the three products, and ignored tokens follow the
last one, so that few shapes occur, as `_linear.py` describes.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels._linear import rounded
from fastbert_kernels.mlm_loss.reference import IGNORED, Result

# Logits held at once, 64 MB in fp32. MKL needs 300 rows and more to be fast: with 16 MB the loss
# takes a fifth longer.
_SLAB = 1 << 24
# Of these, the logits that a core takes through all operations between the products before the
# next ones, 1 MiB in fp32. They stay in its cache. Taken as a whole, a slab is read and written ten
# times, and the loss takes 1.2 to 1.7 times as long (M = 250 to 900, V = 4,096 to 30,522).
_IN_CACHE = 1 << 18


def _losses(
    z: Tensor, labels: Tensor, ignored: Tensor, total: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses [m] of the logits z [m, V], which are correct [m], and the sum of dz [V].

    With `total`, z becomes dz; without, z may be overwritten, and the sum is zero. Loss and
    gradient share the exponentials.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    losses = torch.empty(len(z), dtype=wide)
    correct = torch.empty(len(z), dtype=torch.bool)
    dbias = torch.zeros(z.shape[1], dtype=wide)
    size = max(1, _IN_CACHE * torch.get_num_threads() // z.shape[1])
    for first in range(0, len(z), size):
        part = slice(first, first + size)
        label = labels[part, None]
        x = z[part].to(wide)  # z itself where it is wide; what changes it here is not read again
        largest = x.amax(-1, keepdim=True)
        of_label = x.gather(1, label)
        exponentials = x.sub_(largest).exp_()
        sums = exponentials.sum(-1, keepdim=True)
        losses[part, None] = sums.log() + largest - of_label
        correct[part, None] = of_label == largest
        if total is not None:
            dz = exponentials.mul_(1 / (sums * total))
            dz.scatter_add_(1, label, dz.new_full(label.shape, -1 / total))
            dz.masked_fill_(ignored[part, None], 0)
            dbias += dz.sum(0)
            if dz.dtype != z.dtype:
                z[part] = dz
    return losses, correct, dbias


class _MaskedCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        positions: Tensor | None,
        labels: Tensor,
        total: float,
        factors: torch.dtype,
    ) -> Result:
        rows = hidden if positions is None else hidden.index_select(0, positions)
        weight, bias, count = weight.to(factors), bias.to(factors), len(rows)
        rows = rounded(rows) if factors == torch.bfloat16 else rows.to(factors)
        labels = torch.nn.functional.pad(labels, (0, len(rows) - count), value=IGNORED)
        wide = torch.promote_types(factors, torch.float32)
        size = max(1, _SLAB // weight.shape[0])
        losses = rows.new_empty(len(rows), dtype=wide)
        correct = torch.empty(len(rows), dtype=torch.bool)
        ignored = labels == IGNORED
        labels = labels.masked_fill(ignored, 0)
        gradients = None  # drows and dbias
        dweight = None  # starts as the first slab's share: zeros cost a pass over [V, D]
        if any(ctx.needs_input_grad[:3]):
            gradients = torch.empty_like(rows), torch.zeros_like(bias, dtype=wide)
        for first in range(0, len(rows), size):
            slab = slice(first, first + size)
            z = torch.addmm(bias, rows[slab], weight.T)
            losses[slab], correct[slab], sums = _losses(
                z, labels[slab], ignored[slab], None if gradients is None else total
            )
            if gradients is not None:
                (drows, dbias), dz = gradients, z
                dbias += sums
                torch.mm(dz, weight, out=drows[slab])
                if dweight is None:
                    dweight = torch.mm(dz.T, rows[slab]).to(wide)
                elif wide == rows.dtype:
                    dweight.addmm_(dz.T, rows[slab])
                else:
                    dweight += dz.T @ rows[slab]
        if gradients is not None:
            drows, dbias = gradients
            dweight = torch.zeros_like(weight) if dweight is None else dweight
            gradients = drows[:count], dweight, dbias
            ctx.save_for_backward(*(x.to(hidden.dtype) for x in gradients), positions)
            ctx.tokens = len(hidden)
        losses[ignored], correct[ignored] = 0, False
        losses, correct = losses[:count], correct[:count]
        ctx.mark_non_differentiable(losses, correct)
        return losses.sum() / total, losses, correct

    @staticmethod
    @backward_once
    def backward(ctx: Any, dloss: Tensor, _losses: Tensor, _correct: Tensor) -> Gradients:
        drows, dweight, dbias, positions = ctx.saved_tensors
        if dloss != 1:
            drows, dweight, dbias = (x * dloss for x in (drows, dweight, dbias))
        if positions is not None:
            drows = drows.new_zeros(ctx.tokens, drows.shape[1]).index_add_(0, positions, drows)
        return drows, dweight, dbias, None, None, None, None


def cpu(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor | None,
    labels: Tensor,
    total: float,
    operands: torch.dtype | None,
) -> Result:
    """Arguments and result as in `op.py`."""
    weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    factors = operands or hidden.dtype
    return _MaskedCrossEntropy.apply(hidden, weight, bias, positions, labels, total, factors)
