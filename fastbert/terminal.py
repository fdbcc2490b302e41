"""What may be written to a terminal, and how."""

from __future__ import annotations

import importlib.util
import sys
import unicodedata
from typing import Any

# Characters that change the direction of the text around them, and so what a line seems to say.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def can_redraw(console: Any) -> bool:
    """Whether a rich console is a terminal, or a notebook that has the widgets rich draws with.

    If not, progress is printed as lines.
    """
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


def is_terminal(stream: Any) -> bool:
    """Whether a stream, which is None where the process was started without it, is a terminal."""
    return stream is not None and stream.isatty()


def safe(text: object, encoding: str | None = None) -> str:
    r"""Return a text as one may show it on a terminal.

    Names of files, tokens and texts are the user's or a stranger's. Control characters in them
    would change the terminal's title, or clear what it shows. They become \x1b and the like, except
    for tabs and line feeds.

    Args:
        text: what to show.
        encoding: of the stream; what it cannot represent is escaped too.
    """
    shown = "".join(_escaped(c) for c in str(text))
    if encoding is not None:
        shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    return shown


def one_line(text: object, encoding: str | None = None) -> str:
    r"""Return a text as `safe` does, with line feeds as \n: those in a name may forge a line."""
    return safe(text, encoding).replace("\n", "\\n")


def tell(line: object) -> None:
    """Print a line of fastbert's on stderr, if there is one."""
    if sys.stderr is not None:
        encoding = getattr(sys.stderr, "encoding", None)
        print(one_line(f"fastbert: {line}", encoding), file=sys.stderr)


def _escaped(c: str) -> str:
    if c < "\x7f" and (c >= " " or c in "\t\n"):
        return c
    wrong = unicodedata.category(c) in ("Cc", "Cs") or c in _TURNING
    return c.encode("unicode_escape").decode() if wrong else c
