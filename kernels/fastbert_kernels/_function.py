"""`torch.autograd.Function` with the annotations that torch leaves out, differentiable once."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

Gradients = tuple[torch.Tensor | None, ...]  # what a backward pass returns: one for each argument

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        """Torch's class, whose `apply` has types, and whose backward may name its gradients."""

        @classmethod
        def apply(cls, *args: Any) -> Any: ...

        @staticmethod
        def backward(*args: Any, **kwargs: Any) -> Any: ...
else:
    Function = torch.autograd.Function


def backward_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to build a graph of a backward pass, as second derivatives need it.

    Torch's `once_differentiable` does so only where the incoming gradient has a history itself and
    is asked for it. Elsewhere, as after a loss, whose incoming gradient is a plain 1, terms of a
    second derivative are missing without a word.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            name = type(ctx).__name__.strip("_").removesuffix("Backward")
            raise RuntimeError(
                f"{name}: create_graph=True asks for second derivatives, which are not computed; "
                "use impl='reference', or in place of linear torch's own"
            )
        return backward(ctx, *gradients)

    return once
