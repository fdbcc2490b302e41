"""Registration of torch operators: a schema, what runs, and what shape comes out (for torch.compile and its fake tensors)."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_LIBRARY = torch.library.Library("fastbert_kernels", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def operator(schema: str, launcher: str, fake: Callable) -> Callable:
    """Define `schema`, such as "twice(Tensor x) -> Tensor", as the operator torch.ops.fastbert_kernels.twice, and return what calls it.

    `launcher` names what runs, such as "twice.kernel.forward" in this package: a function of plain tensors on any device, imported at the first
    call, since it needs Triton. `fake` gets the same arguments without data. Gradients are the business of the
    `torch.autograd.Function` that calls the operator: that costs 8 us a call, `register_autograd` 60.

    Only what traces a program or watches it (torch.compile, a TorchDispatchMode, a subclass of Tensor) needs to see the operator. Everybody
    else gets the launcher itself: the dispatcher's way there and back costs 8 us.
    """
    name = schema.partition("(")[0]
    module, _, function = launcher.rpartition(".")

    @functools.cache
    def imported() -> Callable:
        return getattr(importlib.import_module(f"fastbert_kernels.{module}"), function)

    def run(*arguments: Any) -> Any:
        return imported()(*arguments)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastbert_kernels::{name}", fake, lib=_LIBRARY)
    dispatched = getattr(torch.ops.fastbert_kernels, name).default

    def call(first: torch.Tensor, *others: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or type(first) not in _PLAIN
        ):
            return dispatched(first, *others)
        return imported()(first, *others)

    return call


def backward_once(backward: Callable) -> Callable:
    """`once_differentiable`, which costs 3 us, only where a gradient of a gradient may be asked for."""
    careful = once_differentiable(backward)

    @functools.wraps(backward)
    def either(ctx: Any, *gradients: torch.Tensor) -> Any:
        return careful(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return either
