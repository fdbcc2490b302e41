"""A Transformer layer on the Triton kernels as one autograd function.

On a GPU, Python's overhead limits the speed of small models and small batches. The composed layer
of `bert.py` has about 25 operations, and each passes Python's wrappers and autograd once forward
and once backward. Here the same kernels and matrix products are called directly one after another,
which takes two thirds of the CPU time, forward and backward (benchmarks/step/bench_launch.py).

The outputs equal those of the composed layer. The gradients agree up to rounding, for two reasons.
The gradient that arrives through a residual connection is added inside the matrix product, which
saves one rounding and one pass over [T, D]. Where only some rows are selected, their gradients are
added to those of x in one call of index_add_, because no row occurs twice; autograd would sort
the rows first.

Autocast casts between the operations, so `bert.py` composes the layer under autocast. Axes are
those of `bert.py`; R is the number of selected rows, or T where all are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, mm
from torch.nn.functional import linear

from fastbert_kernels._checks import INT64, check_tensors
from fastbert_kernels._function import backward_once
from fastbert_kernels.attention import op as attention
from fastbert_kernels.gelu import op as gelu
from fastbert_kernels.norm import op as norm


class Parameters(NamedTuple):
    """The parameters of a layer, in the order in which the layer reads them."""

    qkv_weight: Tensor  # [3 D, D]
    qkv_bias: Tensor  # [3 D]
    output_weight: Tensor  # [D, D]
    output_bias: Tensor  # [D]
    attention_norm_weight: Tensor  # [D]
    attention_norm_bias: Tensor  # [D]
    inner_weight: Tensor  # [F, D]
    inner_bias: Tensor  # [F]
    outer_weight: Tensor  # [D, F]
    outer_bias: Tensor  # [D]
    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]


class Call(NamedTuple):
    """The arguments of a layer besides x and its parameters."""

    heads: int
    cu_seqlens: Tensor  # int32 [B + 1]
    max_seqlen: int  # tokens
    tile_schedule: Tensor | None  # as in `bert.MicroBatchTables`
    sequence_seeds: Tensor | None  # int64 [B]
    token_seeds: Tensor | None  # int64 [R], of the selected rows
    rows: Tensor | None  # int64 [R], ascending; None for all
    attention_dropout: float
    hidden_dropout: float
    stream: int  # of the attention weights; the ends of the two sublayers use the next two
    eps: float
    # Whether an earlier layer has validated these very tables, so that no second check is needed.
    checked: bool = False


def fused_layer(x: Tensor, parameters: Parameters, call: Call) -> Tensor:
    """LN(y + dropout(GELU(y W' + b) W' + b)) of y = LN(x + dropout(attention(x) W' + b)).

    Args:
        x: [T, D], contiguous, as the embeddings and the layers return it.
        parameters: in the dtype and on the device of x.
        call: the tables of the micro-batch, and the settings.

    Returns:
        [R, D], in the dtype of x.

    Raises:
        ValueError, TypeError: a parameter or a table does not fit x in shape or dtype, or is on
            another device; as `varlen_attention`.
    """
    _check_parameters(x, parameters)
    if not call.checked:
        _check_tables(x, call)
    return _Layer.apply(x, call, *parameters)  # type: ignore[no-any-return]


def _check_parameters(x: Tensor, parameters: Parameters) -> None:
    """Compare all shapes at once, for speed; find out which one differs only on failure."""
    D, F = x.shape[1], parameters.inner_weight.shape[0]
    shapes = [
        (3 * D, D),
        (3 * D,),
        (D, D),
        (D,),
        (D,),
        (D,),
        (F, D),
        (F,),
        (D, F),
        (D,),
        (D,),
        (D,),
    ]
    same = [p.shape for p in parameters] == shapes and {p.dtype for p in parameters} == {x.dtype}
    if not same or {p.device for p in parameters} != {x.device}:
        named = zip(Parameters._fields, parameters, shapes, [(x.dtype,)] * len(shapes), strict=True)
        check_tensors("fused_layer", x.device, *named)


def _check_tables(x: Tensor, call: Call) -> None:
    attention.check_head_size(x.shape[1] // call.heads)
    tables = call.sequence_seeds, call.rows, call.tile_schedule
    attention.check_tables(
        x, call.cu_seqlens, call.max_seqlen, call.attention_dropout, *tables, None, "triton"
    )
    R = x.shape[0] if call.rows is None else call.rows.shape[0]
    check_tensors("fused_layer", x.device, ("token_seeds", call.token_seeds, (R,), INT64))


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, call, *parameters):
        p = Parameters(*parameters)
        rows, size, heads = call.rows, x.shape[1], call.heads

        if rows is None:
            residual = x
            qkv = linear(x, p.qkv_weight, p.qkv_bias)
            q, k, v = qkv.view(-1, 3, heads, size // heads).unbind(1)
        else:
            residual = x[rows]
            q = linear(residual, p.qkv_weight[:size], p.qkv_bias[:size])
            q = q.view(-1, heads, size // heads)
            kv = linear(x, p.qkv_weight[size:], p.qkv_bias[size:])
            k, v = kv.view(-1, 2, heads, size // heads).unbind(1)
        context, statistics = attention.FORWARD(q, k, v, *_attention_arguments(call, size))
        projected = linear(context.view(-1, size), p.output_weight)
        y, *moments = _residual_norm(
            projected,
            p.output_bias,
            residual,
            p.attention_norm_weight,
            p.attention_norm_bias,
            call,
            1,
        )

        inner = linear(y, p.inner_weight)
        active = gelu.FORWARD(inner, p.inner_bias)
        outer = linear(active, p.outer_weight)
        z, *outer_moments = _residual_norm(
            outer, p.outer_bias, y, p.norm_weight, p.norm_bias, call, 2
        )

        saved = (
            x,
            residual,
            q,
            k,
            v,
            context,
            statistics,
            projected,
            *moments,
            y,
            inner,
            active,
            outer,
            *outer_moments,
        )
        tables = (
            call.cu_seqlens,
            call.tile_schedule,
            call.sequence_seeds,
            call.token_seeds,
            call.rows,
        )
        ctx.save_for_backward(*saved, *parameters, *tables)
        ctx.call = call
        return z

    @staticmethod
    @backward_once
    def backward(ctx, dz):  # type: ignore[override]
        (
            x,
            residual,
            q,
            k,
            v,
            context,
            statistics,
            projected,
            mean,
            rstd,
            y,
            inner,
            active,
            outer,
            outer_mean,
            outer_rstd,
            *rest,
        ) = ctx.saved_tensors
        # `rest` ends with the tables of the call, which are saved so that autograd tracks them.
        parameters = rest[: len(Parameters._fields)]
        p, call, rows, size = Parameters(*parameters), ctx.call, ctx.call.rows, x.shape[1]

        douter, dy, outer_vectors = _residual_norm_backward(
            dz, outer, p.outer_bias, y, p.norm_weight, outer_mean, outer_rstd, call, 2
        )
        douter_weight = mm(douter.t(), active)
        dinner, dinner_bias = gelu.BACKWARD(mm(douter, p.outer_weight), inner, p.inner_bias)
        dinner_weight = mm(dinner.t(), y)
        dy.addmm_(dinner, p.inner_weight)

        dprojected, dresidual, vectors = _residual_norm_backward(
            dy, projected, p.output_bias, residual, p.attention_norm_weight, mean, rstd, call, 1
        )
        doutput_weight = mm(dprojected.t(), context.view(-1, size))
        dcontext = mm(dprojected, p.output_weight).view(q.shape)
        dq, dk, dv = attention.BACKWARD(
            dcontext, q, k, v, context, statistics, *_attention_arguments(call, size)
        )
        if rows is None:
            dqkv = torch.stack((dq, dk, dv), 1).view(-1, 3 * size)
            dqkv_weight, dqkv_bias = mm(dqkv.t(), x), dqkv.sum(0)
            dx = dresidual.addmm_(dqkv, p.qkv_weight)
        else:
            dq, dkv = dq.view(-1, size), torch.stack((dk, dv), 1).view(-1, 2 * size)
            dqkv_weight = torch.cat((mm(dq.t(), residual), mm(dkv.t(), x)))
            dqkv_bias = torch.cat((dq.sum(0), dkv.sum(0)))
            # The selected rows get the gradients of their queries and of the residual on top of
            # those of the keys and values, which every row has.
            dselected = dresidual.addmm_(dq, p.qkv_weight[:size])
            dx = mm(dkv, p.qkv_weight[size:]).index_add_(0, rows, dselected)

        dnorm_weight, dnorm_bias, doutput_bias = vectors.unbind()
        douter_norm_weight, douter_norm_bias, douter_bias = outer_vectors.unbind()
        gradients = Parameters(
            *(dqkv_weight, dqkv_bias, doutput_weight, doutput_bias, dnorm_weight, dnorm_bias),
            *(
                dinner_weight,
                dinner_bias,
                douter_weight,
                douter_bias,
                douter_norm_weight,
                douter_norm_bias,
            ),
        )
        return dx, None, *gradients


def _attention_arguments(call: Call, size: int) -> tuple:
    """The arguments of the attention's operators that are not floating-point tensors."""
    tables = call.cu_seqlens, call.tile_schedule, call.rows, call.sequence_seeds
    return (
        *tables,
        call.max_seqlen,
        call.attention_dropout,
        call.stream,
        (size // call.heads) ** -0.5,
    )


def _residual_norm(x, bias, residual, norm_weight, norm_bias, call: Call, sublayer: int) -> Any:
    """The end of a sublayer: LN(residual + dropout(x + bias)), and mean and rstd for backward."""
    return norm.FORWARD(
        x,
        bias,
        residual,
        norm_weight,
        norm_bias,
        call.token_seeds,
        call.eps,
        call.hidden_dropout,
        call.stream + sublayer,
    )


def _residual_norm_backward(
    dy, x, bias, residual, norm_weight, mean, rstd, call: Call, sublayer: int
) -> Any:
    """Return dx, dresidual, and the gradients of the vectors as rows of [3, D].

    The vectors are norm_weight, norm_bias and bias. Without dropout, dx and dresidual are the same
    tensor.
    """
    p, seeds = call.hidden_dropout, call.token_seeds
    dx, dresidual, vectors = norm.BACKWARD(
        dy.contiguous(),
        x,
        bias,
        residual,
        norm_weight,
        seeds,
        mean,
        rstd,
        p,
        call.stream + sublayer,
    )
    return dx, dresidual if p > 0 else dx, vectors
