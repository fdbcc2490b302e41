"""Mapped files read as on disk, hold no descriptor, and are unmapped with their last view."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastbert.data.mapped_file import map_ranges
from fastbert.data.shard_split import ShardSplit
from tests.ranks import environment
from tests.shard_writer import ShardWriter

U2 = np.dtype("<u2")


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def map_file(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    size = length * dtype.itemsize
    return map_ranges([(path, 0, size)], np.array([0, size])).view(dtype)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.arange(5000, dtype=U2).tofile(tmp_path / "numbers")
    return tmp_path / "numbers"


def test_it_is_the_file_read_only(file):
    found = map_file(file, U2, 4999)
    assert found.dtype == U2 and np.array_equal(found, np.arange(4999))
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts mappings in /proc")
def test_the_last_view_unmaps_it(file):
    whole = map_file(file, U2, 5000)
    part = whole[10:20].view("u1")
    del whole
    gc.collect()
    assert mappings(file) == 1 and part[0] == 10
    del part
    gc.collect()
    assert mappings(file) == 0


def test_what_cannot_be_mapped(file):
    with pytest.raises(OSError, match="shorter than 10,002 bytes"):
        map_file(file, U2, 5001)
    with pytest.raises(FileNotFoundError):
        map_file(file.with_name("none"), U2, 1)


# Every second page of a region gets other rights, which makes mappings until there are no more.
ALL_MAPPINGS = """
import ctypes, sys
from pathlib import Path
import numpy as np
from fastbert.data import mapped_file
from fastbert.errors import InputError

libc, page = mapped_file._LIBC, 4096
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
most = int(Path("/proc/sys/vm/max_map_count").read_text())
region = mapped_file._map(None, 2 * most * page, 0, 0x4022, -1, 0)
ranges = [(Path(sys.argv[1]), page * i, page) for i in reversed(range(40))]
count = 0
while libc.mprotect(region + 2 * count * page, page, 1) == 0:
    count += 1
for i in range(count - 10, count):  # Python needs a few
    libc.mprotect(region + 2 * i * page, page, 0)
try:
    mapped_file.map_ranges(ranges, np.arange(41) * page)
except InputError as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts mappings in /proc")
def test_more_mappings_than_allowed_are_one_clear_error(tmp_path):
    (tmp_path / "blocks").write_bytes(bytes(40 * 4096))
    done = subprocess.run(
        [sys.executable, "-c", ALL_MAPPINGS, str(tmp_path / "blocks")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert done.stdout == (
        f"{tmp_path}/blocks: cannot be mapped: this process has {most:,} mappings, as many as the "
        f"system allows; lower order.window, or raise vm.max_map_count (now {most:,})\n"
    ), done.stderr


def test_a_split_of_more_shards_than_descriptors(tmp_path):
    writer = ShardWriter(tmp_path / "train", U2, 3)
    for number in range(300):
        writer.add(np.array([number, number + 1, 7]), np.array([2, 1]), np.array([2]))
    writer.close()
    assert len(writer.shards) == 300
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, before[1]))
    try:
        split = ShardSplit(tmp_path / "train", writer.shards, U2)
        tokens = split.gather(np.array([0, 3 * 299, 3]), np.array([3, 2, 1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert tokens.tolist() == [0, 1, 7, 299, 300, 1]
    assert split.first_sentence(np.array([300, 299, 1])).tolist() == [600, 598, 2]
    assert split.first_token(np.array([600, 1, 2])).tolist() == [900, 2, 3]
