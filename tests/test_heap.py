"""The heap keeps the memory that a step frees, and oneDNN forgets shapes that are long unused.

So touching a large block again causes no page faults.
"""

import os
import resource
import subprocess
import sys

import pytest
import torch

from fastbert.heap import CACHES

PROGRAM = """
import resource, sys
from fastbert.heap import keep_heap
if sys.argv[1] == "keep":
    keep_heap()
import torch
torch.set_num_threads(1)
def touch():
    torch.empty(1 << 24).fill_(1.0)  # 64 MB
for _ in range(20):  # until the heap has found its size
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)

def product(rows):
    torch.ops.mkldnn._linear_pointwise(
        torch.ones(rows, 64), torch.ones(64, 64), None, "none", [], ""
    )
if torch.backends.mkldnn.is_available():
    for rows in range(100, 500):
        product(rows)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
        product(100)
"""


def run(how: str, **environment: str) -> str:
    # Another test may have set them.
    bare = {name: value for name, value in os.environ.items() if name not in CACHES}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        env={**bare, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture(scope="module")
def kept() -> str:
    """What the program prints with the settings."""
    return run("keep")


@pytest.fixture(scope="module")
def default() -> str:
    """What it prints with the defaults of glibc and oneDNN."""
    return run("default")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has this heap")
@pytest.mark.slow
def test_a_large_block_is_faulted_in_once(kept, default):
    ours, theirs = (int(said.split()[1]) for said in (kept, default))
    pages = 5 * (1 << 26) // resource.getpagesize()
    assert ours < pages / 100
    assert theirs > 10 * ours, (theirs, ours, pages)


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
def test_a_shape_of_long_ago_is_built_anew(kept):
    assert "create:cache_miss" in kept and "create:cache_hit" not in kept


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
def test_a_users_own_setting_is_kept(default):
    assert "create:cache_hit" in default
    assert "create:cache_hit" in run("keep", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
