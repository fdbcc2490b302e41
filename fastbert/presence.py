"""Whether something is there, where a disk that does not answer is an error: `Path.exists`, `is_dir` and `glob` take that for a no.

Whether a run is started over hangs on such an answer. So "not there" is only what the system says in so many words. Missing rights, a
network disk that has gone stale, a loop of links, or a link to a disk that is not mounted is an InputError with the path and the reason.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fastbert.errors import InputError


def status(path: Path) -> os.stat_result | None:
    """What the system says of the file or folder at `path`, links followed; None where there is nothing."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                target = os.readlink(place)
                raise InputError(
                    f"{place}: a link to {target}, which is not there; mount its disk, or correct or remove the link"
                ) from None
        return None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def is_folder(path: Path) -> bool:
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: Path) -> bool:
    """Whether it is a regular file: not a folder, and no pipe, which would keep its reader waiting."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def names_in(folder: Path) -> list[str]:
    """What is in a folder, sorted; nothing where there is no folder."""
    if status(folder) is None:
        return []
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from None


def unreadable(path: Path, error: Exception) -> InputError:
    """The one line for what could not be looked at."""
    why = getattr(error, "strerror", None) or str(error)
    return InputError(f"{path}: cannot be read: {why}; mount its disk, or get the right to read it")
