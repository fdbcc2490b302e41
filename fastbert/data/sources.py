"""Find the files to read: their formats and compressions, and what is left out of a folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbert.errors import InputError

FORMATS = {
    "txt": (".txt",),
    "lines": (".txt",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
}
TABLES = ("csv", "tsv", "jsonl", "parquet")  # formats whose records have named fields
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """One file to read."""

    path: Path
    format: str  # a key of FORMATS
    compression: str  # one of COMPRESSIONS, or ""


def find_sources(
    paths: Sequence[str | Path], text_format: str | None = None
) -> tuple[list[Source], list[Path]]:
    """Find the files to read.

    Folders are walked in sorted order, without hidden files.

    Args:
        paths: files and folders.
        text_format: a key of FORMATS; by default the suffix of each file decides.

    Returns:
        The files to read, in order, and the files in folders that are left out because of their
        suffix.

    Raises:
        InputError: a path that does not exist or cannot be read, an unknown suffix, or nothing to
            read.
    """
    if text_format is not None and text_format not in FORMATS:
        raise InputError(f"--format {text_format}: not a format; known: {', '.join(FORMATS)}")
    sources: dict[str, Source] = {}
    ignored: list[Path] = []
    for path in map(Path, paths):
        if stat.S_ISDIR(_mode(path)):
            names = list(_walk(path))
            found = [
                source for name in names if (source := _source(name, text_format, in_folder=True))
            ]
            if not found:
                raise InputError(
                    f"{path}: no file in this folder ends in {_suffixes(text_format)}; "
                    "name a file or another folder"
                )
            ignored += sorted(set(names) - {source.path for source in found})
        else:
            found = [file_source(path, text_format)]
        for source in found:
            # A file that is named twice is read once.
            sources.setdefault(os.path.realpath(source.path), source)
    if not sources:
        raise InputError("no SOURCE given; name text files or folders")
    return list(sources.values()), ignored


def file_source(
    path: Path, text_format: str | None = None, formats: Sequence[str] = tuple(FORMATS)
) -> Source:
    """Return one file to read.

    Args:
        path: the file.
        text_format: a key of FORMATS; by default the suffix decides.
        formats: those that the caller can use.

    Raises:
        InputError: no such file, no regular file, or a suffix that does not tell the format.
    """
    if not stat.S_ISREG(_mode(path)):
        raise InputError(
            f"{path}: not a regular file; sources are read twice, so write it to a file first"
        )
    source = _source(path, text_format, in_folder=False)
    if source is None and formats == tuple(FORMATS):
        raise InputError(
            f"{path}: the suffix does not tell the format; add --format {'|'.join(FORMATS)}"
        )
    if source is None or source.format not in formats:
        raise InputError(f"{path}: must end in {_suffixes(None, formats)}")
    return source


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _source(path: Path, text_format: str | None, in_folder: bool) -> Source | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    suffix = suffixes[-1] if suffixes else ""
    if text_format is None:
        # .json is often one big object, so it is not read as JSON lines unless --format says so.
        known = next(
            (name for name, endings in FORMATS.items() if suffix in endings and suffix != ".json"),
            None,
        )
    else:
        known = text_format if not in_folder or suffix in FORMATS[text_format] else None
    return Source(path, known, compression) if known else None


def _suffixes(text_format: str | None, formats: Sequence[str] = tuple(FORMATS)) -> str:
    endings = [
        ending
        for name in ([text_format] if text_format else formats)
        for ending in FORMATS[name]
        if text_format or ending != ".json"
    ]
    return f"{', '.join(dict.fromkeys(endings))} (or these with {' or '.join(COMPRESSIONS)})"
