"""Find the files to read: their formats and compressions, and what is left out of a folder."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BufferedReader
from pathlib import Path, PurePosixPath

from fastbert import storage
from fastbert.errors import InputError
from fastbert.presence import status
from fastbert.storage import Place, Url, place

FORMATS = {
    "txt": (".txt",),
    "lines": (".txt",),
    "file": (".txt",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "json": (".json",),
}
TABLES = ("csv", "tsv", "jsonl", "parquet", "arrow")  # formats whose records have named fields
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
# Archives hold files with names; the command that unpacks them.
ARCHIVES = {
    ".tar": "tar -xf",
    ".tgz": "tar -xf",
    ".tbz2": "tar -xf",
    ".txz": "tar -xf",
    ".zip": "unzip",
    ".7z": "7z x",
    ".rar": "unrar x",
}


# Reasons to leave a file of a folder out.
SUFFIX, JSON = "unknown suffix", "may hold settings; --format json reads it"
WORK = "_ marks files of Spark and Hadoop that are no data; name it to read it"
# What Dataset.save_to_disk of Hugging Face writes beside its .arrow files.
_CACHE = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")  # of its `map` and `filter`
_STATE, _INFO = "state.json", ("state.json", "dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """One file or object to read."""

    path: Place
    format: str  # a key of FORMATS
    compression: str  # one of COMPRESSIONS, or ""


@dataclass(frozen=True)
class LeftOut:
    """Something in a folder that is not read."""

    path: Place
    reason: str


@contextmanager
def reading(path: Place) -> Iterator[None]:
    """Raise InputError where a file or object cannot be read in this block."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextmanager
def open_source(source: Source) -> Iterator[BufferedReader]:
    """Open a file or object for a block, which may raise InputError as `reading` does."""
    # A table is read here and there, and all else from front to back.
    ahead = 1 << 20 if source.format == "parquet" else storage.READ_AHEAD
    with reading(source.path), storage.open_reading(source.path, ahead) as file:
        yield file


def find_sources(
    paths: Sequence[str | Path], text_format: str | None = None
) -> tuple[list[Source], list[LeftOut]]:
    """Find the files to read.

    Folders are walked in sorted order, without hidden files and without what Spark and Hadoop mark
    by "_": unfinished copies of the data in _temporary, logs, and files such as _SUCCESS. Links are
    followed, after everything else in a folder. A file or folder that is reached in several ways is
    read once.

    Args:
        paths: files and folders, also as URLs (s3://bucket/folder, hf://datasets/x/y), in which
            * and ? stand for any letters.
        text_format: a key of FORMATS; by default the suffix of each file decides. In folders it is
            for files of its suffixes, and for those without a suffix, such as wiki_00 or part.001.

    Returns:
        The files to read, in order, and what is left out of folders, apart from hidden files.

    Raises:
        InputError: a path that does not exist or cannot be read, an unknown suffix, or nothing to
            read.
    """
    if text_format is not None and text_format not in FORMATS:
        raise InputError(f"--format {text_format}: not a format; known: {', '.join(FORMATS)}")
    sources: dict[str, Source] = {}
    left_out: list[LeftOut] = []
    for path in map(place, paths):
        if isinstance(path, Url):
            found = _remote_sources(path, text_format, left_out)
        elif stat.S_ISDIR(_mode(path)):
            found = list[Source]()
            for item in _walk(path):
                source = _source(item, text_format, True) if isinstance(item, Path) else None
                if source:
                    found.append(source)
                else:
                    left_out.append(item if isinstance(item, LeftOut) else _left_out(item))
            if not found:
                raise _nothing_in(path, text_format, left_out)
        else:
            found = [file_source(path, text_format)]
        for source in found:
            # A file that is named twice is read once.
            remote = isinstance(source.path, Url)
            sources.setdefault(
                str(source.path) if remote else os.path.realpath(str(source.path)), source
            )
    if not sources:
        raise InputError("no SOURCE given; name text files or folders")
    return list(sources.values()), left_out


def _remote_sources(url: Url, text_format: str | None, left_out: list[LeftOut]) -> list[Source]:
    """Find the objects of a URL: one, those of a folder, or those that match * and ?."""
    folder = url
    with reading(url):
        if any(sign in url.text for sign in "*?"):
            while any(sign in folder.text for sign in "*?"):
                folder = folder.parent
            pattern = url.text[len(folder.text) + 1 :]
            found = [e.name for e in storage.objects(folder) if fnmatchcase(e.name, pattern)]
            if not found:
                raise InputError(f"{url}: nothing there has such a name")
            return [file_source(folder / name, text_format) for name in found]
        if storage.size(url) is not None:
            return [file_source(url, text_format)]
        names = [entry.name for entry in storage.objects(url)]
    if not names:
        raise InputError(f"{url}: no such object, and nothing below it")
    datasets = {
        name.rpartition("/")[0] for name in names if PurePosixPath(name).name == "manifest.json"
    }
    saved = {
        name.rpartition("/")[0]: _saved_to_disk((url / name).parent)
        for name in names
        if PurePosixPath(name).name == _STATE
    }
    found = list[Source]()
    for name in names:
        top, _, last = name.rpartition("/")
        data = saved.get(top)
        other = data is not None and last.endswith(".arrow") and last not in data
        if other or _CACHE.fullmatch(last):
            left_out.append(LeftOut(url / name, "a cache of datasets"))
            continue
        if last in _INFO and any(n.endswith(".arrow") for n in names):
            continue
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if any(map(_is_work, PurePosixPath(name).parts[:-1])):
            left_out.append(LeftOut(url / name, WORK))
        elif any(str(parent) in datasets for parent in PurePosixPath(f"./{name}").parents):
            left_out.append(LeftOut(url / name, "of a dataset of fastbert"))
        elif (source := _source(url / name, text_format, True)) is not None:
            found.append(source)
        else:
            left_out.append(_left_out(url / name))
    if not found:
        raise _nothing_in(url, text_format, left_out)
    return found


def file_source(
    path: Place, text_format: str | None = None, formats: Sequence[str] = tuple(FORMATS)
) -> Source:
    """Return one file to read.

    Args:
        path: the file.
        text_format: a key of FORMATS; by default the suffix decides.
        formats: those that the caller can use.

    Raises:
        InputError: no such file, no regular file, or a suffix that does not tell the format.
    """
    if isinstance(path, Path) and not stat.S_ISREG(_mode(path)):
        raise InputError(
            f"{path}: not a regular file; sources are read in parts, so write it to a file first"
        )
    source = _source(path, text_format, in_folder=False)
    if source is None and (command := ARCHIVES.get(_suffix(path)[0])):
        raise InputError(
            f"{path}: an archive; unpack it with {command} {shlex.quote(str(path))}, "
            "and name the folder"
        )
    if source is None and formats == tuple(FORMATS):
        raise InputError(
            f"{path}: the suffix does not tell the format; add --format {'|'.join(FORMATS)}"
        )
    if source is None or source.format not in formats:
        raise InputError(f"{path}: must end in {_suffixes(None, formats)}")
    return source


def _mode(path: Path) -> int:
    if (found := status(path)) is None:
        hint = "; standard input cannot be read: write it to a file first" * (str(path) == "-")
        raise InputError(f"{path}: no such file or folder{hint}")
    return found.st_mode


def _walk(top: Path) -> Iterator[Path | LeftOut]:
    """Yield the files below a folder: those of a folder, then those of its subfolders.

    Folders behind links come last, unless they were walked already.
    """
    walked = set[tuple[int, int]]()
    links = list[Path]()  # to folders, not followed yet

    def walk(folder: Path) -> Iterator[Path | LeftOut]:
        walked.add(_identity(folder))
        subfolders = list[Path]()
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        names = {entry.name for entry in entries}
        if {"manifest.json", "tokenizer"} <= names:
            yield LeftOut(folder, "a dataset of fastbert")
            return
        data = _saved_to_disk(folder) if _STATE in names else None
        yield from (folder / name for name in data or ())
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith(".") or (data is not None and entry.name in (*data, *_INFO)):
                continue
            if _CACHE.fullmatch(entry.name) or (data is not None and path.suffix == ".arrow"):
                yield LeftOut(path, "a cache of datasets")
                continue
            if _leads_nowhere(entry):
                yield LeftOut(path, "a link to nothing")
            elif entry.is_dir() and _is_work(entry.name):
                yield LeftOut(path, WORK)
            elif entry.is_dir():
                (links if entry.is_symlink() else subfolders).append(path)
            else:
                yield path if entry.is_file() else LeftOut(path, "not a regular file")
        for subfolder in subfolders:
            yield from walk(subfolder)

    try:
        yield from walk(top)
        for link in links:  # which grows while links are followed
            if _identity(link) in walked:
                continue
            # A link to a folder above would add everything that lies beside the folder.
            if link.resolve() in (*top.resolve().parents, *link.parent.resolve().parents):
                yield LeftOut(link, "a link to a folder above")
            else:
                yield from walk(link)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _saved_to_disk(folder: Place) -> list[str] | None:
    """Return the data files of a folder that Dataset.save_to_disk wrote; None for any other.

    Raises:
        InputError: its rows are chosen by a file of indices, as older releases wrote them.
    """
    try:
        state = json.loads(storage.read(folder / _STATE))
        names = [str(file["filename"]) for file in state["_data_files"]]
        indices = state.get("_indices_files") or state.get("_indices_data_files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if any("/" in name or name.startswith(".") for name in names):
        return None
    if indices:
        raise InputError(
            f"{folder}: its rows are chosen by a file of indices, as old releases of datasets "
            f"wrote them; write it again in Python: datasets.load_from_disk({str(folder)!r})"
            ".flatten_indices().save_to_disk(...)"
        )
    return names


def _is_work(folder: str) -> bool:
    """Whether a folder's name marks it as none of the data; `_column=value` is a partition."""
    return folder.startswith("_") and "=" not in folder


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link whose target is missing, or which leads to itself."""
    if not entry.is_symlink():
        return False
    try:
        entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return True
        raise
    return False


def _source(path: Place, text_format: str | None, in_folder: bool) -> Source | None:
    suffix, compression = _suffix(path)
    if text_format is None:
        # In a folder, .json is often a file of settings, so it is read only where --format says so.
        known = next(
            (name for name, endings in FORMATS.items() if suffix in endings and suffix != ".json"),
            "json" if suffix == ".json" and not in_folder else None,
        )
    else:
        bare = (not suffix or suffix[1:].isdigit()) and not path.name.startswith("_")
        fits = suffix in FORMATS[text_format] or bare
        known = text_format if fits or not in_folder else None
    return Source(path, known, compression) if known else None


def _left_out(path: Place) -> LeftOut:
    suffix = _suffix(path)[0]
    if not suffix and path.name.startswith("_"):
        return LeftOut(path, WORK)
    return LeftOut(path, JSON if suffix == ".json" else SUFFIX)


def _nothing_in(folder: Place, text_format: str | None, left_out: Sequence[LeftOut]) -> InputError:
    """Return the error for a folder without a file to read."""
    advice = "name a file or another folder"
    if any(item.reason == JSON for item in left_out):
        advice = "its .json files are read with --format json, also where each line is an object"
    elif text_format is None:
        advice += ", or add --format to read files without a suffix"
    return InputError(
        f"{folder}: no file in this folder ends in {_suffixes(text_format)}; {advice}"
    )


def _suffix(path: Place) -> tuple[str, str]:
    """Return the suffix that tells the format, and the one that tells the compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return suffixes[-1] if suffixes else "", compression


def _suffixes(text_format: str | None, formats: Sequence[str] = tuple(FORMATS)) -> str:
    endings = [
        ending
        for name in ([text_format] if text_format else formats)
        for ending in FORMATS[name]
        if text_format or ending != ".json"
    ]
    return f"{', '.join(dict.fromkeys(endings))} (or these with {', '.join(COMPRESSIONS)})"
