"""`dropout_add_layer_norm`, the end of every sublayer of BERT, and plain `layer_norm`."""

import torch

from fastbert_kernels._checks import check_dropout, check_implementation, check_tensor
from fastbert_kernels.norm.cpu import cpu
from fastbert_kernels.norm.reference import reference

_IMPLEMENTATIONS = {"cpu": cpu, "reference": reference}


def dropout_add_layer_norm(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    keys: torch.Tensor | None = None,
    site: int = 0,
    impl: str = "reference",
) -> torch.Tensor:
    """LayerNorm(residual + dropout(x + bias)) over the last axis.

    Args:
        x: [T, D], fp32, fp16 or bf16; the product of the sublayer's last matrix, without its bias.
        bias: [D] or None. residual: [T, D] or None. All as x.
        weight, shift: [D], LayerNorm's gamma and beta, as x.
        eps: added to the variance.
        dropout_p: probability to drop an element of x + bias, rounded to a multiple of 2**-16.
        keys: int64 [T], one key a row (`row_keys`). site: which operation of the model this is.
        impl: "cpu" or "reference".

    Returns:
        [T, D], as x; statistics are fp32.

    Raises:
        ValueError: a shape that does not fit, dropout without keys, an unknown `impl`.
        TypeError: a dtype that does not fit.

    Source: Ba et al., 2016, equation 4; post-norm sublayer of Vaswani et al., 2017, section 3.1.
    """
    name = "dropout_add_layer_norm"
    check_tensor(name, "x", x, ("T", "D"), (torch.float32, torch.float16, torch.bfloat16, torch.float64))
    for label, row in (("bias", bias), ("weight", weight), ("shift", shift)):
        if row is not None:
            check_tensor(name, label, row, (x.shape[1],), x.dtype)
    if residual is not None:
        check_tensor(name, "residual", residual, tuple(x.shape), x.dtype)
    check_dropout(name, dropout_p, keys, x.shape[0])
    check_implementation(name, impl, tuple(_IMPLEMENTATIONS))
    return _IMPLEMENTATIONS[impl](x, bias, residual, weight, shift, eps, dropout_p, keys, site)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, *, eps: float = 1e-12, impl: str = "reference") -> torch.Tensor:
    """LayerNorm over the last axis of x [T, D]: `dropout_add_layer_norm` without its bias, dropout and residual."""
    return dropout_add_layer_norm(x, None, None, weight, shift, eps=eps, impl=impl)
