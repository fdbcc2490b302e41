"""Compressed files are read in bounded memory, and other content is refused in one line."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from fastbert.data import documents, unpack
from fastbert.data.documents import read_documents
from fastbert.data.sources import file_source
from fastbert.errors import InputError

BLOCK = 128 << 10  # the largest block of zstd


def run_length_frame(blocks: int, byte: bytes = b"\n") -> bytes:
    """Return a zstd frame whose blocks contain one byte, repeated 131,072 times."""

    def block(last: int) -> bytes:
        return (last | 1 << 1 | BLOCK << 3).to_bytes(3, "little") + byte

    header = b"\x28\xb5\x2f\xfd" + b"\0" + bytes([7 << 3])
    return header + block(0) * (blocks - 1) + block(1)


@pytest.mark.parametrize("frames", [1, 5, 200])
def test_a_zstd_bomb_is_unpacked_in_pieces(tmp_path: Path, frames: int) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(run_length_frame(2000 // frames) * frames)  # 250 MiB
    total = most = 0
    with open(path, "rb") as file:
        for piece in unpack.unpacked(file_source(path), file):
            total, most = total + len(piece), max(most, len(piece))
    assert total == 2000 // frames * frames * BLOCK
    assert most <= 33 << 20


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_pieces_of_every_size(tmp_path: Path, suffix: str) -> None:
    """Empty unpacked pieces do not end a line."""
    text = "\n".join("x" * n for n in range(300)) + "\n"
    path = tmp_path / f"a.csv{suffix}"
    compressor = zstandard.ZstdCompressor(level=19)
    empty = compressor.compress(b"") if suffix == ".zst" else gzip.compress(b"")
    data = b"text\n" + text.encode()
    pack = compressor.compress if suffix == ".zst" else gzip.compress
    cut = [pack(data[i : i + 7]) for i in range(0, len(data), 7)]
    path.write_bytes(empty.join(cut))
    assert list(read_documents([path])) == text.split("\n")[1:-1]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.zst"])
def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The limit applies before the line is complete, so memory is bounded too."""
    monkeypatch.setattr(unpack, "LONGEST_TEXT_BYTES", 3 << 20)
    data = b"text\none\n" + b"a" * (70 << 20)
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path = tmp_path / name
    path.write_bytes(packed.get(path.suffix, bytes)(data))
    read = 0
    plain = unpack.unpacked

    def counted(*arguments):
        nonlocal read
        for piece in plain(*arguments):
            read += len(piece)
            yield piece

    monkeypatch.setattr(unpack, "unpacked", counted)
    with pytest.raises(InputError, match=r"a\..*: line 3 is longer than 3 MiB; is this [ct]sv"):
        list(read_documents([path]))
    assert read < 69 << 20


TEXT = b"One.\n\nTwo.\n"
PACK = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("packing", PACK)
def test_packed_files(tmp_path: Path, packing: str) -> None:
    """They are read also without a suffix, and refused where the suffix is wrong."""
    packed = PACK[packing](TEXT * 1000)
    for name in (f"a.txt{packing}", f"A.TXT{packing.upper()}", "b.txt"):
        (tmp_path / name).write_bytes(packed)
        assert len(list(read_documents([tmp_path / name]))) == 1001
    bad = tmp_path / f"bad.txt{packing}"
    for data, words in [
        (packed[:-9], "cut short"),
        (b"plain text", "not a valid"),
        (packed[:20] + b"????" + packed[24:], "not a valid|cut short"),
        (PACK[packing](packed), "packed twice"),
        (PACK[packing](b""), "the file is empty"),
        (b"", "the file is empty"),
    ]:
        bad.write_bytes(data)
        with pytest.raises(InputError, match=words) as raised:
            list(read_documents([bad]))
        assert str(bad) in str(raised.value)


def archive(kind: str, folder: Path) -> bytes:
    (folder / "member.txt").write_bytes(TEXT)
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.write(folder / "member.txt", "member.txt")
    else:
        with tarfile.open(fileobj=out, mode="w") as file:
            file.add(folder / "member.txt", "member.txt")
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("a.tar", "tar", r"an archive; unpack it with tar -xf .*a\.tar, and name the folder"),
        ("a.tar.gz", "tar", "an archive; unpack it with tar -xf"),
        ("a.tgz", "tar", "an archive; unpack it with tar -xf"),
        ("a.zip", "zip", "an archive; unpack it with unzip"),
        ("a.txt", "tar", "a tar archive, not text; unpack it with tar -xf"),
        ("a.jsonl.gz", "tar", "a tar archive, not text"),
        ("a.csv.xz", "tar", "a tar archive, not text"),
        ("a.txt", "zip", "a zip archive or an office document, not text; unpack it with unzip"),
    ],
)
def test_archives_are_refused(tmp_path: Path, name: str, kind: str, words: str) -> None:
    data = archive(kind, tmp_path)
    suffix = {".tgz": ".gz"}.get(Path(name).suffix, Path(name).suffix)
    (tmp_path / name).write_bytes(PACK.get(suffix, bytes)(data))
    with pytest.raises(InputError, match=words):
        list(read_documents([tmp_path / name]))
    with pytest.raises(InputError, match=r"archive"):
        list(read_documents([tmp_path / name], "txt"))


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (b"%PDF-1.7\n", "a PDF, not text.*pdftotext"),
        (b"{\\rtf1 Text.}", "an RTF document"),
        (b"PAR1", "a Parquet file, not text.*--format parquet"),
        (b"SQLite format 3\0", "an SQLite database"),
        ("Text.".encode("utf-16-le"), "every second byte is NUL.*iconv -f UTF-16LE -t UTF-8"),
        ("Text.\n\nMore".encode("utf-16-be"), "every second byte is NUL.*-f UTF-16BE"),
        ("Text.".encode("utf-16"), "the mark of UTF-16;.*convert it: iconv -f UTF-16 "),
        ("Text.".encode("utf-32"), "the mark of UTF-32"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv.gz"])
def test_what_is_no_text_is_named(tmp_path: Path, name: str, first: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(first) if name.endswith(".gz") else first)
    with pytest.raises(InputError, match=words) as raised:
        list(read_documents([path]))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("size", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"One.\rStill.\r\rTwo.\r", ["One.\nStill.", "Two.\n"]),
        ("a.csv", b'id,text\r1,one\r2,"two\rtwo"\r', ["one", "two\ntwo"]),
        ("a.jsonl", b'{"text": "one"}\r{"text": "two"}\r', ["one", "two"]),
        ("a.tsv", b"text\rone\rtwo", ["one", "two"]),
        ("b.txt", b"One.\r\n\r\nTwo\rtwo.", ["One.\r", "Two\rtwo."]),
    ],
)
def test_lines_that_end_in_carriage_returns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    name: str,
    data: bytes,
    expected: list[str],
) -> None:
    """Old Macs wrote such files. A carriage return next to line feeds does not end a line."""
    path = tmp_path / name
    path.write_bytes(data)
    monkeypatch.setattr(documents, "CHUNK_BYTES", size)
    assert list(read_documents([path])) == expected
