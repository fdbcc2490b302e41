"""Files on local disks and objects in stores, such as S3, by one set of functions.

A place is a `Path`, or a `Url`, which any store that fsspec knows may hold (s3, gs, hf, memory,
...). Objects differ from files in what can be promised: there is no rename, so an object is put
whole, and a put that fails or is killed leaves nothing. Nothing is streamed into its final name.

Every request is tried again, with growing pauses, when the store throttles it (503 SlowDown), does
not answer, or a connection is cut. When all attempts have failed, OSError names the URL. What the
user must change raises InputError: a missing package, credentials or rights, no such bucket.
"Not there" is only what the store says explicitly.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from fastbert.errors import InputError
from fastbert.presence import names_in, status
from fastbert.regular_file import LARGEST, fetched, read_bytes

T = TypeVar("T")

ATTEMPTS = 7  # of a request
FIRST_PAUSE_S = 0.5  # doubles after each attempt: 32 s in all
REQUEST_S = 60.0  # how long a store may send nothing before a request is tried again
RANGE_BYTES = 16 << 20  # of one request
AT_ONCE = 8  # requests
READ_AHEAD = 16 << 20  # bytes that a stream asks for at a time

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:([A-Z_][A-Z0-9_]*)\b|\{([A-Za-z_]\w*)\})")
# The package and the extra of this project that open a kind of URL.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# What the threads of this process wait for; the one that has waited longest comes first.
_WAITING: dict[int, Url] = {}
# Errors of the libraries that mean that nobody has said who we are, by name.
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "NoAuthTokenError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
    "ProfileNotFound",
    "DefaultCredentialsError",
}


@dataclass(frozen=True, order=True)
class Url:
    """The URL of an object, or of a folder of objects; `/` joins as with Path.

    It is no os.PathLike, so that no function for local files takes it by mistake.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text.rstrip('/')}/{name}")

    @property
    def scheme(self) -> str:
        return self.text.partition("://")[0]

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def suffix(self) -> str:
        return self._path.suffix

    @property
    def suffixes(self) -> list[str]:
        return self._path.suffixes

    @property
    def parent(self) -> Url:
        return Url(self.text.rstrip("/").rpartition("/")[0])

    @property
    def _path(self) -> PurePosixPath:
        return PurePosixPath(self.text.partition("://")[2])


Place = Path | Url


def is_url(text: str | os.PathLike[str] | Url) -> bool:
    """Whether it is the URL of an object; file:// is a local path."""
    found = _URL.fullmatch(str(text))
    return found is not None and found[1] not in ("file", "local")


def place(text: str | os.PathLike[str] | Url) -> Place:
    """Return the place that a text names: a Url where it has a scheme, else a Path.

    Raises:
        InputError: a URL with credentials in it, which would be written into recipes and logs.
    """
    if isinstance(text, Url):
        return text
    found = _URL.fullmatch(os.fspath(text))
    if found is None:
        return Path(text)
    if found[1] in ("file", "local"):
        return Path(found[2])
    host = found[2].partition("/")[0]
    if "@" in host:
        shown = f"{found[1]}://...@{host.rpartition('@')[2]}"
        raise InputError(
            f"{shown}: credentials in a URL would end up in recipes and logs; "
            "give them by environment variables or files of the store's own tools"
        )
    return Url(found[0].rstrip("/") if found[2].strip("/") else found[0])


def as_text(text: str) -> str:
    """Return a path as it is, the path of a file:// URL, and another URL without a last slash.

    Raises:
        InputError: as `place`.
    """
    return str(place(text)) if _URL.fullmatch(text) else text


def expanded(path: str | os.PathLike[str]) -> str:
    """Return a path with ~ and variables such as $SCRATCH replaced, as by a shell.

    A recipe and Python have no shell, and a folder named "$SCRATCH" would fill the wrong disk. A
    name in small letters or digits is a variable in braces only: a run may be called cost_$5.

    Raises:
        InputError: a variable that is not set.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if (known := os.environ.get(name)) is None:
            raise InputError(f"{os.fspath(path)}: the variable {name} is not set; set it")
        return known

    return os.path.expanduser(_VARIABLE.sub(value, os.fspath(path)))


@contextlib.contextmanager
def answering(at: Place | None = None) -> Iterator[None]:
    """Raise InputError where a store or disk does not answer.

    Args:
        at: is named where the error names no file.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or at
        reason = error.strerror or error
        raise InputError(f"{where}: {reason}" if where else str(reason)) from error


@contextlib.contextmanager
def waiting_for(at: Url) -> Iterator[None]:
    """Let `waits` name a place during the block, in which this thread waits for it."""
    _WAITING[threading.get_ident()] = at
    try:
        yield
    finally:
        _WAITING.pop(threading.get_ident(), None)


def waits() -> str:
    """Return for what this process waits, in any of its threads: a URL, or ""."""
    return next(map(str, list(_WAITING.values())), "")


@dataclass(frozen=True)
class Entry:
    """An object below a folder: its name relative to the folder, with slashes, and its bytes."""

    name: str
    size: int


def size(at: Place) -> int | None:
    """Return the bytes of a file or object; None where the system says that there is none.

    Raises:
        InputError: it is not known, or a folder.
        OSError: the store does not answer.
    """
    if isinstance(at, Path):
        found = status(at)
        return None if found is None else found.st_size
    fs, path = _open(at)
    try:
        found = _ask(at, lambda: fs.info(path))
    except FileNotFoundError:
        _check_bucket(at)
        return None
    return None if found["type"] == "directory" else int(found["size"])


def stamp(at: Place) -> tuple[int, str]:
    """Return the bytes of a file or object and what changes when it is written again.

    Raises:
        OSError: there is none, or the store does not answer.
        InputError: as `size`.
    """
    if isinstance(at, Path):
        found = at.stat()
        return found.st_size, str(found.st_mtime_ns)
    fs, path = _open(at)
    info = _ask(at, lambda: fs.info(path))
    keys = ("ETag", "etag", "crc32c", "blob_id", "LastModified", "mtime", "created")
    return int(info["size"]), str(next((info[key] for key in keys if info.get(key)), ""))


def objects(folder: Place) -> list[Entry]:
    """Return all files below a folder, by name; none where there is no folder. As `size` raises."""
    if isinstance(folder, Path):
        return _files_below(folder)
    fs, path = _open(folder)
    prefix = path.rstrip("/") + "/"

    def find() -> dict[str, Any]:
        fs.invalidate_cache()
        return fs.find(prefix, detail=True)

    try:
        found = _ask(folder, find)
    except FileNotFoundError:
        found = {}
    if not found:
        _check_bucket(folder)
    return sorted(
        (
            Entry(name[len(prefix) :], int(info["size"] or 0))
            for name, info in found.items()
            if name.startswith(prefix) and info["type"] == "file" and name != prefix
        ),
        key=lambda entry: entry.name,
    )


def names(folder: Place) -> list[str]:
    """Return the sorted names of the files and folders in a folder; none where there is none."""
    if isinstance(folder, Path):
        return names_in(folder)
    return sorted({entry.name.partition("/")[0] for entry in objects(folder)})


def read(at: Place) -> bytes:
    """Return a file or object of settings, which is small.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, or is larger than LARGEST.
        InputError: as `size`.
    """
    if isinstance(at, Path):
        return read_bytes(at)
    if (length := size(at)) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(at))
    if length > LARGEST:
        raise OSError(errno.EFBIG, f"larger than {LARGEST >> 20} MiB", str(at))
    return fetch_range(at, 0, length)


def fetch_range(at: Url, begin: int, end: int) -> bytes:
    """Return the bytes [begin, end) of an object, all of them.

    Raises:
        OSError: the store does not answer, or has fewer bytes.
        InputError: as `size`.
    """
    if begin == end:
        return b""
    fs, path = _open(at)

    def fetch() -> bytes:
        data = fs.cat_file(path, start=begin, end=end)
        if len(data) != end - begin:
            raise OSError(errno.EIO, f"{len(data):,} bytes in place of {end - begin:,}", str(at))
        return data

    return _ask(at, fetch)


def open_reading(at: Place, ahead: int = READ_AHEAD) -> io.BufferedReader:
    """Open a file or object for reading, with `seek` and `tell`.

    Args:
        at: the place.
        ahead: how many bytes of an object are asked for at a time.

    Raises:
        OSError: from this call or a later one: there is none, it is a pointer to a file that was
            not fetched, or the store does not answer.
    """
    if isinstance(at, Path):
        return fetched(open(at, "rb"), at)
    length = size(at)
    if length is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(at))
    return io.BufferedReader(_Ranges(at, length), ahead)


class _Ranges(io.RawIOBase):
    """An object as a file: each read is a request."""

    def __init__(self, at: Url, length: int):
        self._at, self._length, self._position = at, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._length)
        if end <= self._position:
            return 0
        data = fetch_range(self._at, self._position, end)
        buffer[: len(data)] = data
        self._position = end
        return len(data)


def write(at: Url, data: bytes) -> None:
    """Put a whole object; one of that name is replaced.

    Raises:
        OSError, InputError: as `fetch_range`.
    """
    fs, path = _open(at)
    _ask(at, lambda: fs.pipe_file(path, data))


def write_new(at: Url, data: bytes) -> bool:
    """Put a whole object if there is none of that name; of several writers one succeeds.

    Args:
        at: the object.
        data: different for every writer.

    Returns:
        Whether the object is ours.

    Raises:
        OSError, InputError: as `fetch_range`.
    """
    fs, path = _open(at)
    try:
        _ask(at, lambda: fs.pipe_file(path, data, mode="create"))
        return True
    except FileExistsError:
        # The answer to an attempt that succeeded may have been lost.
        return read(at) == data


def put(file: Path, at: Url) -> None:
    """Put a file as an object; one of that name is replaced. Raises as `write`."""
    fs, path = _open(at)
    _ask(at, lambda: fs.put_file(str(file), path))


def upload(file: Path, at: Url, sha256: str) -> None:
    """Put a file as an object, and read it back from the store.

    Args:
        file: it must not change.
        at: the object; one of that name is replaced.
        sha256: of the file.

    Raises:
        OSError: the store does not answer, or gives back other bytes.
        InputError: as `size`.
    """
    put(file, at)
    digest, length = hashlib.sha256(), file.stat().st_size
    for data in _pieces(at, length):
        digest.update(data)
    if digest.hexdigest() != sha256:
        raise OSError(errno.EIO, "read back wrong right after it was put", str(at))


def remove(at: Url) -> None:
    """Remove an object; one that is not there is fine. Raises as `fetch_range`."""
    fs, path = _open(at)
    with contextlib.suppress(FileNotFoundError):
        _ask(at, lambda: fs.rm_file(path))


def fetch(at: Url, file: Path, length: int, sha256: str | None) -> Iterator[int]:
    """Copy an object into a new file and verify it; yield the bytes of each part that has come.

    Args:
        at: the object.
        file: the file; it is complete when this generator ends.
        length: its bytes.
        sha256: of the object; None where it is verified later.

    Raises:
        OSError: the store does not answer, the object has other bytes, or the disk refused.
        InputError: as `size`.
    """
    there = size(at)
    if there != length:
        raise OSError(
            errno.EIO,
            "is not there" if there is None else f"has {there:,} bytes in place of {length:,}",
            str(at),
        )
    digest = hashlib.sha256()
    with open(file, "wb") as out:
        for data in _pieces(at, length):
            digest.update(data)
            out.write(data)
            yield len(data)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise OSError(errno.EIO, "does not have the SHA-256 of its manifest", str(at))


def _pieces(at: Url, length: int) -> Iterator[bytes]:
    """Yield an object in order, in ranges of which several are asked for at once."""
    starts = iter(range(0, length, RANGE_BYTES))
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetch") as pool:
        waiting: list[Any] = []
        for begin in starts:
            waiting.append(pool.submit(fetch_range, at, begin, min(begin + RANGE_BYTES, length)))
            if len(waiting) == AT_ONCE:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


def _files_below(folder: Path) -> list[Entry]:
    found: list[Entry] = []
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        for name in names_in(folder / prefix):
            state = status(folder / prefix / name)
            relative = f"{prefix}{name}"
            if state is not None and os.path.isdir(folder / relative):
                waiting.append(f"{relative}/")
            elif state is not None:
                found.append(Entry(relative, state.st_size))
    return sorted(found, key=lambda entry: entry.name)


def _open(at: Url) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    fs = _file_system(at.scheme, os.getpid())
    return fs, fs._strip_protocol(str(at))


@functools.lru_cache(maxsize=16)
def _file_system(scheme: str, process: int) -> Any:
    """Return fsspec's file system; a fork gets one of its own, since it has none of the threads."""
    import fsspec

    options: dict[str, Any] = {}
    if _EXTRAS.get(scheme) == "s3":
        # Attempts are made here alone, so that throttled requests do not multiply.
        options = {
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": REQUEST_S / 4,
                "read_timeout": REQUEST_S,
                "retries": {"total_max_attempts": 1, "mode": "standard"},
            },
        }
    try:
        fs = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        if extra := _EXTRAS.get(scheme):
            raise InputError(
                f"{scheme}://: its package is not installed; "
                f"pip install 'fastbert-pretrain[{extra}]'"
            ) from None
        raise InputError(f"{scheme}://: {' '.join(str(error).split())}") from None
    except ValueError:
        raise InputError(
            f"{scheme}://: no known kind of URL; give a folder, or a URL such as s3://bucket/name"
        ) from None
    if hasattr(fs, "retries"):
        fs.retries = 1
    return fs


def _ask(at: Url, request: Callable[[], T]) -> T:
    """Make a request, again where it may succeed later.

    Raises:
        FileNotFoundError, FileExistsError: what the store says.
        InputError: the user has to change something.
        OSError: the last attempt's.
    """
    with waiting_for(at):
        for attempt in range(ATTEMPTS):
            try:
                return request()
            except Exception as error:
                final = _final(at, error)
                if final is not None:
                    raise final from None
                if attempt == ATTEMPTS - 1:
                    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                    raise OSError(
                        errno.EIO, f"{' '.join(reason.split())} ({ATTEMPTS} attempts)", str(at)
                    ) from error
                # Of many ranks that were throttled together, not all should come back together.
                time.sleep(FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))
    raise AssertionError


def _final(at: Url, error: Exception) -> Exception | None:
    """Return the error to raise at once; None where another attempt may succeed."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return error
    if any(kind.__name__ in _NO_CREDENTIALS for kind in type(error).__mro__):
        return InputError(
            f"{at}: no credentials ({text}); log in with the store's own tool, or set its "
            "environment variables (s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE)"
        )
    if isinstance(error, PermissionError):
        return InputError(f"{at}: the store refuses it: {text}; get the right to read and write")
    if (
        isinstance(error, FileExistsError)
        or "PreconditionFailed" in text
        or ("pre-conditions you specified did not hold" in text)
    ):
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(at))
    if isinstance(error, FileNotFoundError):
        if "NoSuchBucket" in text or "bucket does not exist" in text:
            return _no_bucket(at)
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(at))
    if isinstance(error, OSError) and error.errno == errno.ENOSYS:
        return OSError(errno.ENOSYS, text, str(at))
    if isinstance(error, (TypeError, AttributeError, NotImplementedError, IsADirectoryError)):
        return error
    return None


def _check_bucket(at: Url) -> None:
    """Raise InputError where an object is missing because its whole bucket is.

    The answer to a HEAD request does not tell the two apart.
    """
    fs, path = _open(at)
    if not hasattr(fs, "call_s3"):
        return
    bucket = path.partition("/")[0]
    try:
        _ask(at, lambda: fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1))
    except FileNotFoundError:
        raise _no_bucket(at) from None


def _no_bucket(at: Url) -> InputError:
    bucket = at.text.partition("://")[2].partition("/")[0]
    return InputError(f"{at}: there is no bucket {bucket}; create it, or correct the name")
