"""How deeply values of settings are nested, found without recursion.

No settings of ours have more than five levels. Functions that follow values all the way down, such
as `repr` and `json.dumps`, raise RecursionError at about a thousand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

MOST = 32  # levels


def is_too_deep(value: Any) -> bool:
    """Whether tables and lists lie in each other in more than MOST levels, or for ever."""
    level: Collection[Any] = [value]
    for _ in range(MOST + 1):
        # Each object once: a list that holds itself twice would double the level each time.
        level = {id(item): item for value in level for item in _items(value)}.values()
    return bool(level)


def _items(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else []
