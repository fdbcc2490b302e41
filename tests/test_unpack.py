"""Compressed files: read in bounded memory, and refused in one line where they are something else."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard

from fastbert.data import unpack
from fastbert.data.documents import read_documents
from fastbert.data.sources import file_source
from fastbert.errors import InputError

BLOCK = 128 << 10  # the largest block of zstd


def run_length_frame(blocks: int, byte: bytes = b"\n") -> bytes:
    """A zstd frame whose blocks hold one byte each, repeated 131,072 times."""

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
    """Unpacked pieces that hold nothing are no end of a line."""
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
    """The limit counts before the line is whole, so memory has a limit too."""
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
