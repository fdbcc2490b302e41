"""A Python process of our own imports what this one imports, and nothing from the folder that it happens to be started in."""

from __future__ import annotations

import sys
from pathlib import Path


def command(code: str, *arguments: str) -> list[str]:
    """The command line of a Python that runs `code`, with `arguments` from sys.argv[1] on.

    `python -c` puts the current folder first on the search path, so that a user's own `random.py` or `json.py` there would be imported in
    place of the library's, and an empty entry in PYTHONPATH means that folder too. Hence the child takes this process's search path without
    empty entries, before it imports anything. (The option -P does the same from Python 3.11 on.) Where this process has found fastbert
    through an empty entry, as in a notebook in a clone, its folder comes last.
    """
    path = [*filter(None, map(str, sys.path)), str(Path(__file__).resolve().parents[1])]
    return [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; {code}", *arguments]
