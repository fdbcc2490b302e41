"""A Python process in which Triton compiles its kernels.

The tests' own process interprets them (conftest.py), and Triton decides that at import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_module(
    *arguments: str, kernels: Path = ROOT / "kernels", triton: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m` with these arguments in the project's root.

    Args:
        arguments: the module and its arguments.
        kernels: the folder that holds the package fastbert_kernels.
        triton: a folder with another Triton; None for the installed one.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        map(str, [*([triton] if triton else []), ROOT, kernels])
    )
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
