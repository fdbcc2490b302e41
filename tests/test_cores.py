"""The cores that a process may use, and how processes share them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastbert.machine import (
    MOST_PROCESSES,
    SEQUENCES_PER_PROCESS,
    cpu_quota,
    processes_for,
    share_cores,
    usable_cores,
)
from tests.quota import Quota, Unavailable
from tests.ranks import environment
from tests.trials import Trial


def system(root: Path, groups: str, **files: str) -> Path:
    """A file system that holds what Linux says about control groups."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    "groups, files, quota",
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 0.5),
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "300000 100000"}, 3.0),
        # The path of the host, of which the container sees only the root.
        ("0::/docker/123", {"cpu.max": "200000 100000"}, 2.0),
        (
            "4:memory:/m\n1:cpu,cpuacct:/a\n0::/",
            {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        (
            "1:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("1:cpuset:/", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, None),
    ],
)
def test_the_lowest_quota_of_the_control_groups_counts(tmp_path, groups, files, quota):
    root = system(tmp_path, groups, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()})
    assert cpu_quota(root) == quota


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None


def test_a_part_of_a_core_is_a_core(monkeypatch):
    monkeypatch.setattr("fastbert.machine.cpu_quota", lambda: 0.3)
    assert usable_cores() == 1
    monkeypatch.setattr("fastbert.machine.cpu_quota", lambda: 1e6)
    assert usable_cores() == len(os.sched_getaffinity(0))


def test_processes_share_the_cores_unless_the_user_said_how_many(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("fastbert.machine.usable_cores", lambda: 6)
    try:
        torch.set_num_threads(8)
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        assert share_cores(2) == 8
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert share_cores(2) == torch.get_num_threads() == 3
        assert share_cores(5) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "sequences, cores, expected",
    [
        (28, 2, 2),
        (28, 16, 28 // SEQUENCES_PER_PROCESS),
        (SEQUENCES_PER_PROCESS - 1, 16, 1),
        (0, 2, 1),
        (512, 16, MOST_PROCESSES),
    ],
)
def test_a_process_has_enough_sequences(sequences, cores, expected):
    assert processes_for(sequences, cores) == expected


@pytest.fixture(scope="module")
def one_core() -> Iterator[Quota]:
    """A control group that may use as much time as one core has."""
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("on one core, a quota of one lowers nothing")
    try:
        quota = Quota(1.0).__enter__()
    except Unavailable as reason:
        pytest.skip(f"no CPU quotas here: {reason}")
    yield quota
    quota.__exit__()


def run(quota: Quota, *arguments: str) -> str:
    """The output of a Python in the group, whose torch would use all cores."""
    without = {k: v for k, v in environment().items() if k != "OMP_NUM_THREADS"}
    done = quota.run([sys.executable, *arguments], env=without, timeout=300)
    assert done.returncode == 0, done.stderr[-600:]
    return done.stdout


def test_the_quota_of_a_real_control_group_is_found(one_core):
    code = "from fastbert import machine as m; print(m.cpu_quota(), m.usable_cores())"
    assert run(one_core, "-c", code) == "1.0 1\n"


@pytest.mark.slow
def test_doctor_and_a_run_keep_to_a_quota(one_core, small_dataset, tmp_path):
    """Without one, the 16 sequences would be computed in two processes."""
    found = json.loads(run(one_core, "-m", "fastbert", "doctor", "--json"))
    assert found["quota"] == 1.0
    assert [found[name] for name in ("cores", "threads", "processes")] == [1, 1, 1]
    trial = Trial(tmp_path / "trial", small_dataset.path, steps=2)
    arguments = "pretrain", str(trial.recipe), "batch.sequences=16"
    assert "ZeRO stage 0, 1 threads\n" in run(one_core, "-m", "fastbert", *arguments)
