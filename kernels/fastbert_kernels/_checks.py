"""Checks that the public functions share; each message names the function, the argument, its value and what is expected."""

import importlib.util

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(
    function: str, name: str, x: torch.Tensor, shape: tuple, dtype: torch.dtype | tuple[torch.dtype, ...] | None = None
) -> None:
    """`shape` holds sizes, or a letter where any size will do."""
    if x.dim() != len(shape) or any(isinstance(want, int) and want != have for want, have in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{function}: {name} has shape {list(x.shape)}, expected [{', '.join(map(str, shape))}]")
    if dtype is not None:
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        if x.dtype not in allowed:
            raise TypeError(f"{function}: {name} is {_name(x.dtype)}, expected {' or '.join(map(_name, allowed))}")


def check_device(function: str, device: torch.device, **others: torch.Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and x.device != device:
            raise ValueError(f"{function}: {name} is on {x.device}, the other tensors on {device}; move it there")


def check_dropout(function: str, p: float, keys: torch.Tensor | None, length: int) -> None:
    if not 0 <= p < 1 - 2**-17:  # beyond, it rounds to 1
        raise ValueError(f"{function}: dropout_p = {p}; must be at least 0 and below 1, to a multiple of 2**-16")
    if p > 0:
        if keys is None:
            raise ValueError(f"{function}: dropout_p = {p} needs keys, int64 [{length}]: masks are a function of them")
        check_tensor(function, "keys", keys, (length,), torch.int64)


def check_implementation(function: str, name: str, offered: tuple[str, ...]) -> None:
    if name not in offered:
        raise ValueError(f"{function}: impl = {name!r}; this operation has {', '.join(offered)}")


def check_triton(function: str, **inputs: torch.Tensor | None) -> None:
    """What the Triton implementations need beyond the rest: a device that runs them, and rows that lie in one piece, in at most 32 bits."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError(f'{function}: impl = "triton" needs Triton 3.6 or newer: pip install triton')
    for name, x in inputs.items():
        if x is None:
            continue
        if x.dtype == torch.float64:
            raise TypeError(f'{function}: {name} is float64, which impl = "triton" does not compute in; use impl = "reference"')
        if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{function}: {name} has stride {x.stride(-1)} along its last axis, expected 1; call .contiguous()")
        if x.device.type == "cpu" and not _takes_cpu_tensors():
            raise ValueError(
                f'{function}: {name} is on the CPU, where impl = "triton" runs in Triton\'s interpreter alone (TRITON_INTERPRET=1, slow); use impl = "cpu"'
            )


def _takes_cpu_tensors() -> bool:
    from fastbert_kernels._triton import takes_cpu_tensors

    return takes_cpu_tensors()


def values_checked(asked: bool | None, x: torch.Tensor) -> bool:
    """Whether to look into an index tensor: if asked to, by default on a CPU alone (a GPU would be waited for), never while compiling."""
    return (x.device.type == "cpu" if asked is None else asked) and not torch.compiler.is_compiling()


def check_range(function: str, name: str, x: torch.Tensor, bound: int, axis: str) -> None:
    """Every value of the integer tensor x must be in [0, bound); `axis` names the bound."""
    if x.numel():
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= bound:
            raise ValueError(f"{function}: {name} span {low} to {high}; must be in [0, {axis} = {bound})")
