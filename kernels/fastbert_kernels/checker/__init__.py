"""A checker of Triton kernels against plain torch, which needs no GPU.

    python -m fastbert_kernels.checker CHECK.py      the command
    def test_mine(kernel_checker): ...               a fixture of pytest
    check(...)                                       the same in Python
    with sanitize() as record: ...                   only the accesses of the launches inside

The package needs torch, Triton and NumPy, and nothing of the rest of fastbert. Triton must run in
its interpreter: `TRITON_INTERPRET=1`, set before Triton is imported. The command sets it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastbert_kernels.checker.cases import Check, check
    from fastbert_kernels.checker.lint import lint_file
    from fastbert_kernels.checker.report import Finding, Report
    from fastbert_kernels.checker.sanitizer import SanitizerError, sanitize

__all__ = [
    "Check",
    "Finding",
    "Report",
    "SanitizerError",
    "check",
    "lint_file",
    "sanitize",
]

_MODULES = {
    "Check": "cases",
    "Finding": "report",
    "Report": "report",
    "SanitizerError": "sanitizer",
    "check": "cases",
    "lint_file": "lint",
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
