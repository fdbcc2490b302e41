"""The heap keeps what a step gives back: touching a large block again faults no page in."""

import resource
import subprocess
import sys

import pytest

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
        return int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)

    pages = 5 * (1 << 26) // resource.getpagesize()
    kept, default = faults("keep"), faults("default")
    assert kept < pages / 100
    assert default > 10 * kept, (default, kept, pages)
