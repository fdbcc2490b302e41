"""Parts of a page that a program makes: what stands between `<!-- NAME -->` and `<!-- end of NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping

PLACE = re.compile(r"(<!-- (?P<name>\w+) -->\n).*?(<!-- end of (?P=name) -->)", re.DOTALL)


def places(page: str) -> list[str]:
    """The names that the text has a place for."""
    return [match["name"] for match in PLACE.finditer(page)]


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The text with these parts in their places.

    Raises:
        SystemExit: a part has not exactly one place.
    """
    there = places(page)
    for name in parts:
        if (times := there.count(name)) != 1:
            raise SystemExit(
                f"<!-- {name} --> ... <!-- end of {name} --> is there {times} times, must be once"
            )
    return PLACE.sub(
        lambda match: (
            f"{match[1]}{parts[match['name']]}\n{match[3]}" if match["name"] in parts else match[0]
        ),
        page,
    )
