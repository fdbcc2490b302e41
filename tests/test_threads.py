"""Packs computed at once give the sums of packs computed in turn, and threads follow the quota."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from fastbert.cluster.group import join
from fastbert.data.batches import Batches, heldout_batches
from fastbert.machine import cpu_quota, share_cores, usable_cores
from fastbert.training.engine import Engine
from fastbert.training.threads import SEQUENCES_PER_THREAD, ThreadedModel, threads_for
from tests.test_engine import CONFIG, new_model, settings, sgd, state_of


@pytest.fixture
def packs(small_dataset):
    return Batches(small_dataset, CONFIG).step(0, threads=2)[:2]


@pytest.fixture
def threaded(small_dataset):
    built = ThreadedModel(new_model(small_dataset).train(), 2)
    yield built
    built.close()


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_losses_and_gradients_are_those_of_packs_in_turn(threaded, packs):
    model = threaded.model
    expected = [model(pack) for pack in packs]
    found = threaded(packs)
    for outputs, same in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outputs, same, strict=True))
    # Each loss has a factor of its own, so a mix-up shows.
    factors = [(1.0, 2.0), (3.0, -1.0)]

    def weighted(outputs):
        terms = [
            x * f
            for both, own in zip(outputs, factors, strict=True)
            for x, f in zip(both[:2], own, strict=True)
        ]
        return sum(terms[1:], start=terms[0])

    parts = [
        gradients(a * x[0] + b * x[1], model) for x, (a, b) in zip(expected, factors, strict=True)
    ]
    for got, one, other in zip(gradients(weighted(found), model), *parts, strict=True):
        assert torch.equal(got, one + other)


def test_work_is_done_at_the_same_time(threaded):
    meeting = threading.Barrier(2)  # passed only by two threads at once
    assert sorted(threaded.each(lambda _: meeting.wait(30), range(2))) == [0, 1]


def test_without_gradients_there_is_no_graph(threaded, packs):
    with torch.no_grad():
        assert not any(x.requires_grad for outputs in threaded(packs) for x in outputs)


def test_the_first_failure_is_raised_when_all_have_ended(threaded):
    began, ended = threading.Event(), []

    def work(index: int) -> None:
        if index == 0:
            began.wait(30)
            raise MemoryError("no memory")
        began.set()
        threading.Event().wait(0.05)
        ended.append(index)

    with pytest.raises(MemoryError, match="no memory"):
        threaded.each(work, range(2))
    assert ended == [1]


def test_torchs_threads_are_divided_and_given_back(small_dataset):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        built = ThreadedModel(new_model(small_dataset), 2)
        assert torch.get_num_threads() == 2
        assert built.each(lambda _: torch.get_num_threads(), range(2)) == [2, 2]
        built.close()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_engine_on_threads_trains_and_evaluates_the_same(small_dataset, stage):
    batches, config = Batches(small_dataset, CONFIG), sgd()
    heldout = heldout_batches(small_dataset, CONFIG, 9)
    ends = []
    for threads in (1, 2):
        with (
            join(60.0) as group,
            Engine(
                new_model(small_dataset),
                config,
                settings(stage),
                "fp32",
                group,
                threads=threads,
            ) as engine,
        ):
            results = [engine.step(batches.step(i, threads=2), lr=0.1) for i in range(3)]
            ends.append((results, engine.evaluate(heldout, 4), state_of(engine)))
    (results, held_out, state), (on_threads, held_out_on_threads, state_on_threads) = ends
    assert vars(held_out_on_threads) == pytest.approx(vars(held_out), rel=1e-5)
    for one, other in zip(results, on_threads, strict=True):
        assert vars(other) == pytest.approx(vars(one), rel=1e-5)
    for slot, tensors in state.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(state_on_threads[slot][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "sequences, cores, expected",
    [
        (28, 2, 2),
        (28, 16, 28 // SEQUENCES_PER_THREAD),
        (SEQUENCES_PER_THREAD - 1, 16, 1),
        (0, 2, 1),
        (512, 16, 16),
    ],
)
def test_a_thread_has_enough_sequences(sequences, cores, expected):
    assert threads_for(sequences, cores) == expected


# The cores of this process


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
