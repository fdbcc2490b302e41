"""A checker of Triton kernels against plain torch, which needs no GPU.

    with sanitize() as record: ...                   the accesses of the launches inside

The package needs torch, Triton and NumPy, and nothing of the rest of fastbert. Triton must run in
its interpreter: `TRITON_INTERPRET=1`, set before Triton is imported.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastbert_kernels.checker.sanitizer import SanitizerError, sanitize

__all__ = [
    "SanitizerError",
    "sanitize",
]

_MODULES = {
    "SanitizerError": "sanitizer",
    "sanitize": "sanitizer",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(
            f"fastbert_kernels.checker has no {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(f"fastbert_kernels.checker.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
