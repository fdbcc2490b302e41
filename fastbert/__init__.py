"""fastbert: pre-train a BERT of your own, from raw text to a model that Hugging Face loads.

`fastbert.load(path)` opens a run, a checkpoint or a Hugging Face folder; it is imported at its first use, so that
`import fastbert` and the command line's help do not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.tasks.load import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from fastbert.tasks.load import load

        return load
    raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
