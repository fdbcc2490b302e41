"""Check that the kernel that `Prepared` launches is the one that Triton would launch.

test_launch.py runs it without the interpreter. It goes through SPECS: a shape of each operation, in
bf16, with dropout, with aligned and misaligned tensors, forward and backward. The first
launch of each kind asks Triton. It prints how many launches were compared, and how many of them did
not ask.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import torch

from benchmarks.compiled.no_launch import no_launch
from fastbert_kernels._launch import Prepared
from fastbert_kernels.specs import SPECS

seen: Counter[str] = Counter()
launch = Prepared.__call__


def both(self: Prepared, grid: tuple, pointers: Any, numbers: Any) -> None:
    known = self._compiled.get(device := 90)
    launch(self, grid, pointers, numbers)
    asked = self._function[grid](*pointers, *numbers, *self._constants, **self._options)
    aligned = all(pointer is None or pointer.data_ptr() % 16 == 0 for pointer in pointers)
    seen["compared"] += 1
    if aligned:
        assert self._compiled[device][0] is asked, f"{asked.name}: another kernel than Triton's"
        seen["direct"] += known is not None
    elif known is not None:
        assert known[0] is not asked, (
            f"{asked.name}: a kernel for aligned tensors serves misaligned ones"
        )


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """Return the same values, one element past a multiple of 16 bytes."""
    whole = torch.empty(x.numel() + 17, dtype=x.dtype)
    first = (-whole.data_ptr() % 16) // x.element_size() + 1
    return whole[first : first + x.numel()].view(x.shape).copy_(x)


def run(spec: Any, shape: Any, dtype: torch.dtype, p: float, move: Any) -> None:
    arguments = {
        name: move(x) if torch.is_tensor(x) else x
        for name, x in spec.inputs(shape, dtype, p).items()
    }
    if not spec.dropout:
        arguments = {
            name: x for name, x in arguments.items() if name not in ("dropout_p", "dropout_seeds")
        }
    if "check_values" in inspect.signature(spec.function).parameters:
        arguments["check_values"] = False
    for name in spec.differentiable:
        if arguments[name] is not None:
            arguments[name] = arguments[name].detach().requires_grad_()
    result = spec.function(**arguments, impl="triton")
    result = result[0] if isinstance(result, tuple) else result
    result.sum().backward()


Prepared.__call__ = both  # type: ignore[method-assign]
with no_launch("sm_90"):
    for spec in SPECS.values():
        for move in (lambda x: x, misaligned, lambda x: x):
            run(spec, spec.shapes[-1], torch.bfloat16, 0.1 if spec.dropout else 0.0, move)
print(seen["compared"], seen["direct"])
