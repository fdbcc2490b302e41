"""The smallest shape that still shows a finding."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

from fastbert_kernels.checker.report import Finding, Shape

TRIES = 24  # cases run for one finding


def shrink(finding: Finding, examine: Callable[[Shape], list[Finding]]) -> Finding:
    """Make one size after the other smaller, as long as the same finding shows.

    Args:
        finding: found at `finding.shape`.
        examine: from a shape to the findings there.

    Returns:
        The finding with `smallest`.
    """
    best, tries = finding.shape, 0
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(best):
            if tries == TRIES:
                break
            tries += 1
            try:
                shown = examine(smaller)
            except Exception:  # the inputs, the reference or the kernel do not take that shape
                continue
            if any(other.key == finding.key for other in shown):
                best, progress = smaller, True
                break
    return replace(finding, smallest=best)


def _smaller(shape: Shape) -> Iterator[Shape]:
    """Shapes with one size less, the smallest first."""
    for name, value in shape.items():
        for candidate in _candidates(value):
            yield shape | {name: candidate}


def _candidates(value: Any) -> Iterator[Any]:
    if isinstance(value, int) and not isinstance(value, bool):
        seen = {value}
        for number in (1, value // 4, value // 2, 3 * value // 4, value - 1):
            if 0 < number < value and number not in seen:
                seen.add(number)
                yield number
    elif isinstance(value, (list, tuple)):
        items = cast("list[Any] | tuple[Any, ...]", value)
        for i in range(len(items)):
            if len(items) > 1:
                yield type(items)([*items[:i], *items[i + 1 :]])
            for candidate in _candidates(items[i]):
                yield type(items)([*items[:i], candidate, *items[i + 1 :]])
