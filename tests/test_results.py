"""Results appear by rename, are named by what they depend on, and damage in them is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastbert.data.results import (
    ArrayFile,
    disk_errors,
    key_of,
    publish,
    read_array_file,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
)
from fastbert.durable import sha256_of
from fastbert.errors import InputError


def test_keys() -> None:
    assert key_of(1, {"a": 2, "b": [3]}) == key_of(1, {"b": [3], "a": 2})
    keys = {key_of(1, "2"), key_of("1", 2), key_of(12), key_of([1, "2"]), key_of(), key_of(None)}
    assert len(keys) == 6 and all(len(key) == 24 for key in keys)


def test_a_result_is_there_or_not(tmp_path: Path) -> None:
    with pytest.raises(KeyError), publish(tmp_path / "a") as new:
        new.write_text("half")
        assert [path.name for path in tmp_path.iterdir()] == [new.name]
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with publish(tmp_path / "a") as first, publish(tmp_path / "a") as second:
        first.write_text("same")
        second.write_text("same")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["json", "arrays"])
def test_every_damaged_byte_is_noticed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    numbers = np.arange(5, dtype=np.uint16)
    if kind == "json":
        write_json(path, {"a": [1, "é"]})
        assert read_json(path) == {"a": [1, "é"]}
    else:
        write_arrays(path, {"a": 1}, numbers=numbers, empty=np.zeros(0, bool))
        facts, arrays = read_arrays(path) or ({}, {})
        assert facts == {"a": 1} and arrays["numbers"].dtype == np.uint16
        assert arrays["numbers"].tolist() == numbers.tolist() and not len(arrays["empty"])
    data = path.read_bytes()
    read = read_json if kind == "json" else read_arrays
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :])
        assert read(path) is None
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        assert read(path) is None
    path.unlink()
    assert read(path) is None


def test_arrays_one_after_another(tmp_path: Path) -> None:
    file = ArrayFile(tmp_path / "a")
    items = [[np.arange(n), np.ones(n, bool)] for n in (3, 0, 7)]
    for item in items:
        file.add(*item)
    assert file.close() == sha256_of(tmp_path / "a")
    found = list(read_array_file(tmp_path / "a", 2))
    assert [[a.tolist() for a in item] for item in found] == [
        [a.tolist() for a in item] for item in items
    ]


def test_what_the_disk_says(tmp_path: Path) -> None:
    out = Path("out")
    with pytest.raises(InputError, match=r"out: cannot be written: .*No such"), disk_errors(out):
        (tmp_path / "none" / "a").touch()
    with (
        pytest.raises(InputError, match="out: no space left on its disk"),
        disk_errors(out),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"a")
