"""Opens regular files only, and reads files of settings whole up to a bounded size.

A pipe that nobody writes to would keep its reader waiting forever, and a device such as /dev/zero
never ends.
"""

from __future__ import annotations

import codecs
import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

# Far more than any manifest, recipe or vocabulary has, and read in a fraction of a second.
LARGEST = 256 << 20

# What stands in a clone for a file that was not fetched, and the command that fetches it.
_POINTERS = {
    b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}


def open_regular(path: str | Path, follow: bool = True) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: the file.
        follow: whether a link is followed; without it, a link raises ELOOP.

    Raises:
        OSError: it cannot be opened, is no regular file, or was not fetched; `strerror` says so in
            words.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # of a name with a NUL, before the system is asked
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return fetched(open(descriptor, "rb"), path)
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def fetched(file: BufferedReader, path: str | Path) -> BufferedReader:
    """Return a file that was opened just now.

    Raises:
        OSError: it is a pointer to the real file, which git alone does not fetch. As text it would
            be read without a word, as anything else it would look damaged.
    """
    head = file.peek(64)
    for begin, (what, command) in _POINTERS.items():
        if head.startswith(begin):
            file.close()
            reason = f"a pointer of {what} in place of the file; fetch the file with {command}"
            raise OSError(errno.ENODATA, reason, str(path))
    return file


def read_bytes(path: str | Path, follow: bool = True) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: as `open_regular`; or the file is larger than LARGEST.
    """
    with open_regular(path, follow) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(LARGEST + 1) if size <= LARGEST else b""
        if max(size, len(data)) > LARGEST:
            raise OSError(errno.EFBIG, f"larger than {LARGEST >> 20} MiB", str(path))
        return data


def read_text(path: str | Path, errors: str = "strict") -> str:
    r"""Return the content of a UTF-8 file, with "\n" at every line end.

    A byte order mark, which some editors put at the beginning, is left out.

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: it is not UTF-8.
    """
    text = read_bytes(path).removeprefix(codecs.BOM_UTF8).decode("utf-8", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")
