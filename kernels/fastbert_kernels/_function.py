"""`torch.autograd.Function` with the annotations that torch leaves out."""

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
