"""Command lines of Python child processes that import what this process imports.

They import nothing from the folder in which they are started.
"""

from __future__ import annotations

import sys
from pathlib import Path


def command(code: str, *arguments: str) -> list[str]:
    """Return the command line of a Python that runs `code`.

    `python -c` puts the current folder first on the search path, so a user's own `random.py` or
    `json.py` there would be imported instead of the library's. An empty entry in PYTHONPATH means
    the current folder too. The child therefore takes over this process's search path without empty
    entries, before it imports anything. (From Python 3.11 on, the option -P does the same.) This
    process may have found fastbert through an empty entry, as in a notebook in a clone. So
    fastbert's folder is added as the last entry.

    Args:
        code: Python source, run after `import sys`.
        arguments: the child finds them in sys.argv[1:].
    """
    path = [*filter(None, map(str, sys.path)), str(Path(__file__).resolve().parents[1])]
    return [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; {code}", *arguments]
