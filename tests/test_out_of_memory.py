"""A command that runs out of memory ends with a line on the size needed and what to change."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.out_of_memory import shortage
from tests.ranks import Ranks, runs
from tests.tiers import slow
from tests.trials import Laboratory

GIB = 1 << 30


def error_of(action) -> BaseException:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        action()
    return caught.value


def test_a_real_failure_of_torch_and_of_numpy():
    """The size exceeds the address space of any machine."""
    assert shortage(error_of(lambda: torch.empty(1 << 50))) == (
        f"out of memory: {1 << 22:.2f} GiB more are needed"
    )
    assert shortage(error_of(lambda: np.empty(1 << 50))) == "out of memory"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "CUDA out of memory. Tried to allocate 20.00 GiB. "
            "GPU 3 has a total capacity of 79.11 GiB "
            "of which 1.20 GiB is free. Process 7 has 77.9 GiB memory in use.",
            "out of GPU memory: 20.00 GiB more are needed; GPU 3 has 79.11 GiB",
        ),
        (
            "CUDA out of memory. Tried to allocate 2.00 MiB.",
            "out of GPU memory: 2.00 MiB more are needed",
        ),
        ("CUDA out of memory.", "out of GPU memory"),
    ],
)
def test_what_torch_says_of_a_gpu(text, line):
    assert shortage(torch.OutOfMemoryError(text)) == line


def test_cublas_has_an_error_of_its_own():
    error = RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    )
    assert shortage(error) == "out of GPU memory"


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")]
)
def test_other_errors_are_not_about_memory(error):
    assert shortage(error) is None


def virtual_memory(pid: int) -> int:
    """Return the address space of a process, in bytes."""
    (size,) = re.findall(r"VmSize:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(size) * 1024


def bound_memory(ranks: Ranks, rank: int, more: int) -> None:
    """Limit a rank's address space to its present size and `more` bytes."""
    pid = ranks[rank].pid
    assert runs(pid)
    limit = virtual_memory(pid) + more
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("memory"), small_dataset.path)


@pytest.mark.parametrize("world", [1, slow(2)])
def test_a_step_that_does_not_fit(lab, world):
    """One rank has no memory for [tokens, intermediate_size].

    Every rank ends, and the line names that rank and the key.
    """
    tokens = 16384
    trial = lab.trial(
        "model.intermediate_size=65536",
        f"batch.sequences={2 * tokens // 32 * world}",
        f"batch.micro_batch_tokens={tokens}",
    )
    with trial.start(world) as ranks:
        bound_memory(ranks, world - 1, 2 * GIB)
        assert ranks.wait() == [1] * world, ranks.errors
    lines = [line for line in ranks.errors.splitlines() if line.startswith("fastbert: ")]
    assert len(lines) == world and "Traceback" not in ranks.errors, ranks.errors
    for line in lines:
        named = re.search(r"rank (\d) \(\S+, process \d+\)", line)
        assert world == 1 or (named and int(named[1]) == world - 1), line
        assert re.search(
            r"out of memory: [\d.]+ GiB more are needed; lower batch.micro_batch_tokens", line
        ), line
        assert (
            f"(now {tokens:,}) or take a smaller model, "
            f"then resume with: fastbert pretrain {trial.run}/config.toml --resume" in line
        )
    events = [
        json.loads(text).get("event")
        for text in (trial.run / "metrics.jsonl").read_text().splitlines()
    ]
    assert "save" not in events
