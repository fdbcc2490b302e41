"""Checks that the public functions share; each message names the function, the argument, its value and what is expected."""

import torch

IMPLEMENTATIONS = ("triton", "cpu", "reference")


def check_tensor(
    function: str, name: str, x: torch.Tensor, shape: tuple, dtype: torch.dtype | tuple[torch.dtype, ...] | None = None
) -> None:
    """`shape` holds sizes, or a letter where any size will do."""
    if x.dim() != len(shape) or any(isinstance(want, int) and want != have for want, have in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{function}: {name} has shape {list(x.shape)}, expected [{', '.join(map(str, shape))}]")
    if dtype is not None:
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        if x.dtype not in allowed:
            names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(f"{function}: {name} is {str(x.dtype).removeprefix('torch.')}, expected {names}")


def check_dropout(function: str, p: float, keys: torch.Tensor | None, length: int) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"{function}: dropout_p = {p}; must be at least 0 and below 1")
    if p > 0:
        if keys is None:
            raise ValueError(f"{function}: dropout_p = {p} needs keys, int64 [{length}]: masks are a function of them")
        check_tensor(function, "keys", keys, (length,), torch.int64)


def check_implementation(function: str, name: str, offered: tuple[str, ...]) -> None:
    if name not in offered:
        raise ValueError(f"{function}: impl = {name!r}; this operation has {', '.join(offered)}")
