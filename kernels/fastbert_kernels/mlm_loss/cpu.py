"""`masked_cross_entropy` on a CPU: by slabs of masked tokens, and the gradient at once, while a slab's logits are at hand.

For each slab of rows h = hidden[positions], with y the one-hot labels:

    z = h W' + b      loss = logsumexp(z) - z[label]      dz = (softmax(z) - y) / total      dh = dz W      dW += dz' h      db += sum(dz)

so no product is computed twice and no more than `_SLAB` logits exist at a time. Saved for the backward pass: the three
gradients, which it only scales (by 1 in ordinary training). Without gradients (evaluation) only the losses are computed.
"""

import torch

_SLAB = 1 << 22  # logits held at once: 16 MB in fp32


def _loss_slab(rows, weight, bias, labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities [m, V], losses [m] and hits [m] of one slab."""
    log_p = torch.addmm(bias, rows, weight.T)
    hits = log_p.argmax(-1) == labels
    log_p = torch.log_softmax(log_p, -1, dtype=torch.promote_types(rows.dtype, torch.float32))
    return log_p, -log_p.gather(1, labels[:, None])[:, 0], hits


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, positions, labels, total):
        rows = hidden.index_select(0, positions)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        size = max(1, _SLAB // weight.shape[0])
        with_gradient = any(ctx.needs_input_grad[:3])
        losses = rows.new_empty(len(rows), dtype=wide)
        hits = torch.empty(len(rows), dtype=torch.bool)
        if with_gradient:
            drows = torch.empty_like(rows)
            dweight = torch.zeros_like(weight, dtype=wide)
            dbias = torch.zeros_like(bias, dtype=wide)
        for first in range(0, len(rows), size):
            slab = slice(first, first + size)
            log_p, losses[slab], hits[slab] = _loss_slab(rows[slab], weight, bias, labels[slab])
            if with_gradient:
                dz = log_p.exp_()
                dz[torch.arange(len(dz)), labels[slab]] -= 1
                dz = dz.div_(total)
                dbias += dz.sum(0)
                dz = dz.to(rows.dtype)
                torch.mm(dz, weight, out=drows[slab])
                if wide == rows.dtype:
                    dweight.addmm_(dz.T, rows[slab])
                else:
                    dweight += dz.T @ rows[slab]
        if with_gradient:
            ctx.save_for_backward(drows, dweight.to(weight.dtype), dbias.to(bias.dtype), positions)
            ctx.tokens = len(hidden)
        ctx.mark_non_differentiable(losses, hits)
        return losses.sum() / total, losses, hits

    @staticmethod
    def backward(ctx, dloss, _losses, _hits):  # type: ignore[override]
        drows, dweight, dbias, positions = ctx.saved_tensors
        if dloss != 1:
            drows, dweight, dbias = (x * dloss for x in (drows, dweight, dbias))
        dhidden = drows.new_zeros(ctx.tokens, drows.shape[1]).index_add_(0, positions, drows)
        return dhidden, dweight, dbias, None, None, None


def cpu(hidden, weight, bias, positions, labels, total):
    """Arguments and result as in `op.py`."""
    return _MaskedCrossEntropy.apply(hidden, weight, bias, positions, labels, total)
