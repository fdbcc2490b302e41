"""Torch's own defaults for the time of a call, whatever the caller's script or notebook has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Within the block new tensors are fp32 on the CPU, gradients are recorded, autocast is off.

    Otherwise a default type of fp64, or autocast around the call, would train other weights than
    the recipe says without a word, and `torch.no_grad` or a default device would end in an error.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # A default device costs time at every call of torch, so none is set where none was.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
