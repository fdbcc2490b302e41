"""Exceptions and warnings whose message is one clear line for the user."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from pathlib import Path

# Frames in these files are passed over. The functions of a decorator such as `torch_defaults` lie
# between ours.
_OURS = f"{Path(__file__).parent}{os.sep}", contextlib.__file__


class InputError(ValueError):
    """The user's input is wrong. Exit code 2.

    The message names what is wrong, the value, the file and key, and what to do about it.
    """


class Diverged(RuntimeError):
    """A model produces values that are not finite, NaN or infinity. Exit code 1."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn, and name the line outside fastbert from which it was called.

    From Python 3.12 on, `warnings.warn` does the same with `skip_file_prefixes`.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
