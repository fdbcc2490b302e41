"""Registration of torch operators: a schema, what runs, and the shapes of the results."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

# Any, since its methods have no annotations.
_LIBRARY: Any = torch.library.Library("fastbert_kernels", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def operator(schema: str, launcher: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operator torch.ops.fastbert_kernels.NAME, and return a function that calls it.

    Gradients are left to the `torch.autograd.Function` that calls the operator: that costs 8 us a
    call, and `register_autograd` 60. Only what traces or watches a program (torch.compile, a
    TorchDispatchMode, a subclass of Tensor) needs to see the operator. All other calls go straight
    to the launcher, because the dispatcher costs 8 us.

    Args:
        schema: such as "twice(Tensor x) -> Tensor".
        launcher: what runs, such as "twice.kernel.forward" in this package: a function of plain
            tensors on any device. It is imported at the first call, since it needs Triton.
        fake: gets the same arguments without data and returns results of the right shapes, for
            torch.compile.
    """
    name = schema.partition("(")[0]
    module, _, function = launcher.rpartition(".")

    @functools.cache
    def imported() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"fastbert_kernels.{module}"), function)

    def run(*arguments: Any) -> Any:
        return imported()(*arguments)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(  # pyright: ignore[reportUnknownMemberType]
        f"fastbert_kernels::{name}", fake, lib=_LIBRARY
    )
    dispatched = getattr(torch.ops.fastbert_kernels, name).default

    def call(first: torch.Tensor, *others: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportPrivateUsage]
            or type(first) not in _PLAIN
        ):
            return dispatched(first, *others)
        return imported()(first, *others)

    return call
