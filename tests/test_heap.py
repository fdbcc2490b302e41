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
def touch():
    torch.zeros(1 << 24)  # 64 MB
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
    assert kept < pages / 20
    assert default > 2 * kept, f"glibc's default faulted {default} times, of {pages} pages"  # far fewer than pages where huge ones serve
