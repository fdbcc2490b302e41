"""Generated parts of a page: the text between `<!-- NAME -->` and `<!-- end of NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping

PLACE = re.compile(r"(<!-- (?P<name>\w+) -->\n).*?(<!-- end of (?P=name) -->)", re.DOTALL)


def places(page: str) -> list[str]:
    """The names of the places in the text."""
    return [match["name"] for match in PLACE.finditer(page)]


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The text with these parts in their places.

    Raises:
        SystemExit: a part has no place, or more than one.
    """
    there = places(page)
    for name in parts:
        if (times := there.count(name)) != 1:
            raise SystemExit(
                f"<!-- {name} --> ... <!-- end of {name} --> is there {times} times; "
                "it must be there once"
            )
    return PLACE.sub(
        lambda match: (
            f"{match[1]}{parts[match['name']]}\n{match[3]}" if match["name"] in parts else match[0]
        ),
        page,
    )
