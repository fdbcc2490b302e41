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

FAULTS = """
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
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has this heap")
def test_a_large_block_is_faulted_in_once():
    def faults(how: str) -> int:
        return int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
            ).stdout
        )

    pages = 5 * (1 << 26) // resource.getpagesize()
    kept, default = faults("keep"), faults("default")
    assert kept < pages / 100
    assert default > 10 * kept, (default, kept, pages)


SHAPES = """
import sys
from fastbert.heap import keep_heap
if sys.argv[1] == "keep":
    keep_heap()
import torch
def product(rows):
    torch.ops.mkldnn._linear_pointwise(
        torch.ones(rows, 64), torch.ones(64, 64), None, "none", [], ""
    )
for rows in range(100, 200):
    product(rows)
with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
    product(100)
"""


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
def test_a_shape_of_long_ago_is_built_anew():
    def said(how: str, **environment: str) -> str:
        # Another test may have set them.
        bare = {name: value for name, value in os.environ.items() if name not in CACHES}
        return subprocess.run(
            [sys.executable, "-c", SHAPES, how],
            env={**bare, **environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert "create:cache_miss" in said("keep")
    assert "create:cache_hit" in said("default")
    # The user's own setting.
    assert "create:cache_hit" in said("keep", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
