"""Can a progress bar be redrawn in place? If not, progress is printed as lines."""

from __future__ import annotations

import importlib.util
from typing import Any


def can_redraw(console: Any) -> bool:
    """Whether a rich console is a terminal, or a notebook that has the widgets rich draws with."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal
