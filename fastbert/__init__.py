"""fastbert: pre-train a BERT of your own, from raw text to a model that Hugging Face loads.

    import fastbert

    fastbert.prepare("my.txt", "data/my")
    result = fastbert.pretrain("mini", data="data/my", run="runs/my", stop={"seconds": 600})
    print(result.load().fill_mask("The capital of France is [MASK]."))

These functions are imported at their first use, so that neither
`import fastbert` nor `fastbert --help` waits for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.api import RunResult, load, prepare, pretrain
    from fastbert.errors import InputError

__all__ = ["InputError", "RunResult", "__version__", "load", "prepare", "pretrain"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "InputError":
        from fastbert.errors import InputError

        return InputError
    if name in __all__:
        from fastbert import api

        return getattr(api, name)
    raise AttributeError(f"module 'fastbert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
