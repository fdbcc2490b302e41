"""`bias_gelu`: the activation between the two matrices of the feed-forward sublayer, and of the MLM head."""

import torch

from fastbert_kernels._checks import check_implementation, check_tensor
from fastbert_kernels.gelu.reference import reference

_IMPLEMENTATIONS = {"reference": reference, "cpu": reference}


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, *, impl: str = "reference") -> torch.Tensor:
    """GELU(x + bias), exact: z * (1 + erf(z / sqrt(2))) / 2.

    Args:
        x: [T, F], fp32, fp16 or bf16. bias: [F], as x.
        impl: "cpu" (the reference, which is fast enough) or "reference".

    Returns:
        [T, F], as x.

    Raises:
        ValueError: a shape that does not fit, an unknown `impl`.
        TypeError: a dtype that does not fit.

    Source: Hendrycks and Gimpel, 2016, section 2.
    """
    check_tensor("bias_gelu", "x", x, ("T", "F"), (torch.float32, torch.float16, torch.bfloat16, torch.float64))
    check_tensor("bias_gelu", "bias", bias, (x.shape[1],), x.dtype)
    check_implementation("bias_gelu", impl, tuple(_IMPLEMENTATIONS))
    return _IMPLEMENTATIONS[impl](x, bias)
