"""Registration of torch operators: a schema, what runs, and what shape comes out (for torch.compile and its fake tensors)."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("fastbert_kernels", "DEF")


def operator(schema: str, run: Callable, fake: Callable) -> Callable:
    """Define `schema`, such as "twice(Tensor x) -> Tensor", and return the operator torch.ops.fastbert_kernels.twice.

    `run` gets plain tensors on any device; `fake` the same arguments without data. Gradients are the business of the
    `torch.autograd.Function` that calls the operator: that costs 8 us a call, `register_autograd` 60.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastbert_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastbert_kernels, name).default
