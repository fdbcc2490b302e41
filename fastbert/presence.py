"""Whether a file or folder exists, with an error where the disk does not answer.

`Path.exists`, `is_dir` and `glob` report "does not exist" in that case, and such an answer may
decide whether a run starts from scratch. Here something is absent only where the system says so
explicitly. Missing permissions, a stale network disk, a loop of links, or a link to a disk that is
not mounted raise an InputError with the path and the reason.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from fastbert.errors import InputError

# The beginning of a URL; as a path it has lost one of its slashes.
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_REMOTE = re.compile(r"([a-z][a-z0-9+.-]+):/")


def status(path: Path) -> os.stat_result | None:
    """Return the `os.stat` of the file or folder at `path`, following links; None where none is.

    Raises:
        InputError: the path cannot be inspected, is a URL, or a link in it points nowhere.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                target = os.readlink(place)
                raise InputError(
                    f"{place}: a link to {target}, which is not there; mount its disk, "
                    "or correct or remove the link"
                ) from None
        if found := _REMOTE.match(str(path)):
            url = str(path).replace(":/", "://", 1)
            raise InputError(
                f"{url}: files are read and written on local disks only; "
                f"copy them from or to {found[1]}: by a tool of its own"
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def hub_hint(name: str | Path) -> str:
    """Return what to do where a missing folder has the name of a model of the Hub, else ""."""
    if not _HUB_NAME.fullmatch(str(name)) or ("/" in str(name) and Path(name).parent.exists()):
        return ""
    return f"; for a model of the Hub, give the folder that `hf download {name}` prints"


def is_folder(path: Path) -> bool:
    """Whether there is a folder at `path`. Raises InputError as `status`."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: Path) -> bool:
    """Whether there is a regular file at `path`. Raises InputError as `status`.

    A pipe is not one: it would keep its reader waiting.
    """
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def names_in(folder: Path) -> list[str]:
    """Return the sorted names in a folder; none where there is no folder."""
    if status(folder) is None:
        return []
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from None


def unreadable(path: Path, error: Exception) -> InputError:
    """Return the error for a path that could not be inspected."""
    why = getattr(error, "strerror", None) or str(error)
    advice = "mount its disk, or get the right to read it"
    if isinstance(error, ValueError) or getattr(error, "errno", None) == errno.ENAMETOOLONG:
        advice = "no file can have this name"
    return InputError(f"{path}: cannot be read: {why}; {advice}")
