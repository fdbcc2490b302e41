"""The tier of a test's parameters: `make test` runs the typical ones, `make test-all` every one."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """Parameters that only `make test-all` runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def typical(values: Any, *chosen: Any) -> list[Any]:
    """Return all values as parameters; those that are not among the chosen ones are slow."""
    values = list(values)
    assert all(value in values for value in chosen), f"{chosen} are not all in {values}"
    return [
        value if value in chosen else slow(*value if isinstance(value, tuple) else (value,))
        for value in values
    ]
