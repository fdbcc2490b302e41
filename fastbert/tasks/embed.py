"""`fastbert embed`: write a vector for each text of a file, as `Pretrained.encode` computes it.

The texts are processed in chunks of about a MiB, so memory does not grow with the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from fastbert.data.documents import parse, read_chunks
from fastbert.data.sources import Source, file_source
from fastbert.durable import exit_at_signals, replaceable, replacing
from fastbert.errors import InputError
from fastbert.presence import is_folder

if TYPE_CHECKING:
    # Not imported at run time: it imports torch, and arguments are checked before that.
    from fastbert.tasks.pretrained import Pretrained


class Writer(Protocol):
    """Writes vectors, float32 [n, D] for n texts at a time."""

    def write(self, texts: Sequence[str], vectors: np.ndarray) -> None: ...

    def close(self) -> None: ...


class NpyWriter:
    """Writes the vectors only, as `numpy.load` reads them."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._rows, self._size = file, 0, size
        self._header()

    def write(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(vectors, "<f4").tobytes())
        self._rows += len(vectors)

    def close(self) -> None:
        end = self._file.tell()
        self._file.seek(0)
        self._header()
        self._file.seek(end)

    def _header(self) -> None:
        # NumPy reserves space in the header for the first axis to grow, so the header has the same
        # length for any number of rows.
        shape = (self._rows, self._size)
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )


class JsonLinesWriter:
    """Writes one object per line, with the fields text and vector."""

    def __init__(self, file: BinaryIO, size: int):
        self._file = file

    def write(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            self._file.write(
                json.dumps({"text": text, "vector": vector}, ensure_ascii=False).encode() + b"\n"
            )

    def close(self) -> None:
        pass


class ParquetWriter:
    """Writes the columns text and vector; a vector is a list of D float32 values."""

    def __init__(self, file: BinaryIO, size: int):
        import pyarrow
        import pyarrow.parquet

        self._arrow = pyarrow
        self._schema = pyarrow.schema(
            [("text", pyarrow.string()), ("vector", pyarrow.list_(pyarrow.float32(), size))]
        )
        self._writer = pyarrow.parquet.ParquetWriter(file, self._schema)

    def write(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        flat = self._arrow.array(vectors.reshape(-1))
        lists = self._arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        self._writer.write_table(
            self._arrow.table([self._arrow.array(list(texts)), lists], schema=self._schema)
        )

    def close(self) -> None:
        self._writer.close()


WRITERS: dict[str, Any] = {".npy": NpyWriter, ".jsonl": JsonLinesWriter, ".parquet": ParquetWriter}


def source_of(file: str | Path, text_format: str | None = None) -> Source:
    """Return the file to read; a .txt holds one text per line.

    Raises:
        InputError: no such file, a folder, or a suffix that does not tell the format.
    """
    file = Path(file)
    if file.is_dir():
        raise InputError(f"{file}: a folder; give one file of texts")
    if text_format is None and ".txt" in file.suffixes:
        text_format = "lines"
    return file_source(file, text_format)


def check_out(out: str | Path, source: Source | None = None) -> Path:
    """Return `out` as a path. An earlier result that it holds is replaced later.

    Args:
        out: the file to write.
        source: what is read, which must not be replaced.

    Raises:
        InputError: vectors cannot be written to it.
    """
    out = Path(out)
    if out.suffix not in WRITERS:
        raise InputError(f"--out {out}: must end in {', '.join(WRITERS)}")
    if not is_folder(out.parent):
        raise InputError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if problem := replaceable(out):
        raise InputError(f"--out {out}: {problem}")
    if source is not None and out.exists() and out.samefile(str(source.path)):
        raise InputError(f"--out {out}: is the file of the texts; give another name")
    if not _is_result(out):
        raise InputError(
            f"--out {out}: exists, and holds no vectors of texts; remove it or give another name"
        )
    return out


def _is_result(out: Path) -> bool:
    """Whether a file is empty, missing, or what a writer of its suffix may have made."""
    try:
        with open(out, "rb") as file:
            begin = file.read(_SIGN_BYTES)
    except FileNotFoundError:
        return True
    if out.suffix == ".parquet" and begin:
        return _columns_of(out) == ["text", "vector"]
    return not begin or _SIGNS[out.suffix].match(begin) is not None


def _columns_of(out: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(out).names
    except (pyarrow.ArrowException, OSError):
        return []


_SIGN_BYTES = 1 << 20
_SIGNS = {
    ".npy": re.compile(rb"\x93NUMPY.{4}\{'descr': '<f4', [^}]*'shape': \(\d+, \d+\)", re.DOTALL),
    ".jsonl": re.compile(rb'\{"text": "[^"\\]*(?:\\.[^"\\]*)*", "vector": \['),
}


def embed(
    pretrained: Pretrained,
    source: Source,
    text_field: str,
    out: Path,
    pool: str | None,
    layers: Sequence[int],
    normalize: bool | None,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[int, int]:
    """Write a vector for each text of `source` to `out`.

    Args:
        pretrained: the model.
        source: from `source_of`.
        text_field: as in `fastbert.data.documents`.
        out: from `check_out`; written atomically.
        pool, layers, normalize: as in `Pretrained.encode`.
        advance: called with the bytes of the source that are done.

    Returns:
        The number of vectors and their size D.

    Raises:
        InputError: text that cannot be read, with file and line, or a setting that the model does
            not support.
    """
    model = pretrained.path.resolve()
    # A checkpoint is in the folder `checkpoints` of its run.
    if (model.parents[1] if pretrained.recipe else model) in out.resolve().parents:
        raise InputError(f"--out {out}: lies in the folder of the model; give another place")
    size, rows = pretrained.config.hidden_size, 0
    pretrained.encode([], pool, layers)  # checks the settings before anything is written
    with _writer(out, size) as writer:
        for chunk in read_chunks([source], text_field):
            texts = parse(chunk, text_field)
            writer.write(texts, pretrained.encode(texts, pool, layers, normalize))
            rows += len(texts)
            advance(chunk.read_bytes)
    return rows, size


@contextmanager
def _writer(out: Path, size: int) -> Iterator[Writer]:
    """Yield a writer of a temporary file that becomes `out` at the end of the block."""
    with exit_at_signals(), replacing(out) as staging, open(staging, "wb") as file:
        writer: Writer = WRITERS[out.suffix](file, size)
        yield writer
        writer.close()
