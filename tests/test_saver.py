"""Asynchronous checkpoints in real processes.

Every rank ends with the same outcome, whatever happens to one of them. As a program (`python -m
tests.test_saver`), this file imports torch once and forks those processes; see `main`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbert.checkpoints import checkpoint, saver
from fastbert.checkpoints.checkpoint import MANIFEST, newest_valid, read_all
from fastbert.checkpoints.failpoint import POINTS, reach
from fastbert.checkpoints.saver import OnDisk, Saver
from fastbert.cluster.group import join
from tests.one_process import save
from tests.ranks import LAUNCHER, ROOT, environment, free_port

TIMEOUT_S = 60.0  # a guard
BESIDE_A_DAMAGED_ONE = ("moving-aside", "moved-aside")
ON_EVERY_RANK = POINTS[: POINTS.index("gathered") + 1]
CRASHES = (
    [(1, 0, point) for point in POINTS]
    + [(2, 0, "manifest-half"), (2, 0, "renamed")]
    + [(2, 1, point) for point in ON_EVERY_RANK]
)
# Where a save asks the disk for something.
REFUSALS = [
    (1, 0, p)
    for p in POINTS
    if p not in (*BESIDE_A_DAMAGED_ONE, "copied", "gathered", "published", "deleting", "saved")
]
REFUSALS += [(3, 1, "staging-made"), (3, 2, "tensors-half"), (2, 0, "manifest-half")]


def tensors(seed: int) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    names = [
        f"{slot}/layer.{layer}"
        for layer in range(4)
        for slot in ("weight", "exp_avg", "exp_avg_sq")
    ]
    return [
        (name, torch.randn(20 + number, 7, generator=generator))
        for number, name in enumerate(names)
    ]


def holds(path: Path, seed: int) -> bool:
    """Return whether a checkpoint has exactly the tensors of a seed."""
    state = {
        f"{slot}/{name}": tensor
        for slot, named in read_all(path).items()
        for name, tensor in named.items()
    }
    expected = dict(tensors(seed))
    return state.keys() == expected.keys() and all(
        torch.equal(state[name], tensor) for name, tensor in expected.items()
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What one rank does. Every scenario returns what the test checks.


def saves(group, folder: Path, *steps: int, keep: int = 2, limit: int | None = None) -> list[dict]:
    """Save states at these steps in turn.

    On the last rank no file may exceed `limit` bytes until a save has failed.
    """
    saver, ends = Saver(group, OnDisk(folder, keep), "token"), []
    saver.sweep()
    for step in steps:
        if limit and group.rank == group.world - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit if not ends else -1, -1))
        assert not saver.busy and saver.written
        saver.begin(step, iter(tensors(step)), {"by": group.rank, "step": step})
        assert saver.busy
        while group.gather(saver.written) != [True] * group.world:
            time.sleep(0.001)
        ends.append(dataclasses.asdict(saver.finish()))
    assert saver.wait() is None
    return json.loads(json.dumps(ends, default=str))


def continues(group, folder: Path) -> bool:
    """Delay the thread at its first access to the disk, and change the tensors meanwhile."""
    gate, write = threading.Event(), checkpoint.write_share
    checkpoint.write_share = lambda *arguments: gate.wait(TIMEOUT_S) and write(*arguments)
    saver, state, metadata = (
        Saver(group, OnDisk(folder, 2), "token"),
        tensors(5),
        {"progress": {"seconds": 1.0}},
    )
    saver.begin(5, state, metadata)
    began = not saver.written
    for _, tensor in state:
        tensor.zero_()
    metadata["progress"]["seconds"] = 2.0
    gate.set()
    saved = saver.wait()
    return began and saved is not None and saved.problem is None and not saver.busy


def not_finite(group, folder: Path) -> str | None:
    saver, state = Saver(group, OnDisk(folder, 2), "token"), tensors(5)
    state[1][1][3, 3] = float("inf")
    saver.begin(5, state, {})
    return saver.finish().problem


def apart(group, folder: Path) -> str | None:
    """Save where every rank has a disk of its own."""
    saver = Saver(group, OnDisk(folder / f"disk{group.rank}", 2), "token")
    saver.begin(5, tensors(5), {})
    return saver.finish().problem


SCENARIOS = {scenario.__name__: scenario for scenario in (saves, continues, not_finite, apart)}


# Starting them


def main() -> None:
    """For each line on stdin, fork its ranks, and print their exit codes and results."""
    for line in sys.stdin:
        assert len(os.listdir("/proc/self/task")) == 1, (
            "forking is not safe where there are threads"
        )
        job = json.loads(line)
        children = []
        for rank, variables in enumerate(job["variables"]):
            result = Path(job["results"]) / f"{rank}.json"
            pid = os.fork()
            if pid == 0:
                run_as_rank(job, variables, result)
            children.append((pid, result))
        codes, until = {}, time.monotonic() + TIMEOUT_S
        while len(codes) < len(children):
            for pid, _ in children:
                if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(found[1])
                elif pid not in codes and time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        print(
            json.dumps(
                [
                    [codes[pid], json.loads(file.read_text()) if file.exists() else None]
                    for pid, file in children
                ]
            ),
            flush=True,
        )


def run_as_rank(job: dict[str, Any], variables: dict[str, str], result: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os.environ.update(variables)
    code = 1
    try:
        with join(TIMEOUT_S) as group:
            value = SCENARIOS[job["scenario"]](
                group, Path(job["folder"]), *job["arguments"], **job["options"]
            )
        result.write_text(json.dumps(value))
        code = 0
    except Exception:  # gloo's error where another rank was killed
        traceback.print_exc()
    finally:
        os._exit(code)


class Server:
    """The client of `main`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.test_saver"]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        scenario: str,
        folder: Path,
        world: int,
        *arguments: Any,
        failpoint: str = "",
        **options: Any,
    ) -> tuple[list[int], list[Any]]:
        """Run a scenario, and return exit codes and results by rank."""
        folder.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        variables = [
            {
                **dict(
                    zip(
                        LAUNCHER,
                        (str(rank), str(world), str(rank), str(world), "127.0.0.1", port),
                        strict=True,
                    )
                ),
                "FASTBERT_FAILPOINT": failpoint,
            }
            for rank in range(world)
        ]
        results = folder.parent / "results"
        results.mkdir(exist_ok=True)
        for old in results.iterdir():
            old.unlink()
        job = {
            "scenario": scenario,
            "folder": str(folder),
            "arguments": arguments,
            "options": options,
        }
        assert self.process.stdin and self.process.stdout
        print(
            json.dumps({**job, "variables": variables, "results": str(results)}),
            file=self.process.stdin,
            flush=True,
        )
        codes, values = zip(*json.loads(self.process.stdout.readline()), strict=True)
        return list(codes), list(values)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.communicate(timeout=TIMEOUT_S)


# The tests


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_writes_its_share_and_learns_the_same_end(ranks, tmp_path, world):
    codes, (first, *others) = ranks.run(
        "saves", tmp_path / "checkpoints", world, 10, 20, 30, keep=2
    )
    assert codes == [0] * world and all(other == first for other in others)
    paths = [tmp_path / f"checkpoints/step-000000{step}" for step in (10, 20, 30)]
    assert [(end["step"], end["path"], end["problem"]) for end in first] == [
        (s, str(p), None) for s, p in zip((10, 20, 30), paths, strict=True)
    ]
    assert all(end["stall_s"] > 0 for end in first)
    assert names(tmp_path / "checkpoints") == ["step-00000020", "step-00000030"]
    found, complaints = newest_valid(tmp_path)
    assert found is not None and (found.step, found.metadata, complaints) == (
        30,
        {"by": 0, "step": 30},
        [],
    )
    assert holds(paths[1], 20) and holds(paths[2], 30)
    assert names(paths[2]) == [
        MANIFEST,
        *(f"tensors-{rank:05d}-00000.safetensors" for rank in range(world)),
    ]
    sizes = [path.stat().st_size for path in paths[2].glob("tensors-*")]
    assert max(sizes) < 1.3 * min(sizes)


def test_training_continues_while_a_copy_is_written(ranks, tmp_path):
    assert ranks.run("continues", tmp_path / "checkpoints", 2) == ([0, 0], [True, True])
    found, _ = newest_valid(tmp_path)
    assert (
        found is not None
        and holds(found.path, 5)
        and found.metadata == {"progress": {"seconds": 1.0}}
    )


def test_a_save_reaches_every_point_in_the_order_of_the_list(tmp_path, monkeypatch):
    """A place that the list lacks would be killed by no test."""
    folder, seen = tmp_path / "checkpoints", list[str]()
    for module in (checkpoint, saver):
        monkeypatch.setattr(module, "reach", seen.append)
    save(folder, 1, tensors(1), {}, 1)
    os.truncate(save(folder, 2, tensors(2), {}, 2) / MANIFEST, 100)
    seen.clear()
    with join(TIMEOUT_S) as group:
        saves(group, folder, 2, keep=1)
    assert list(dict.fromkeys(seen)) == list(POINTS)  # two old ones are deleted


@pytest.mark.parametrize("world, rank, point", CRASHES)
def test_a_crash_anywhere_in_a_save_leaves_the_newest_valid_checkpoint(
    ranks, tmp_path, world, rank, point
):
    """With keep=1 the previous checkpoint is deleted as soon as the new one exists.

    The next start saves as usual.
    """
    folder = tmp_path / "checkpoints"
    save(folder, 1, tensors(1), {}, 1)
    if point in BESIDE_A_DAMAGED_ONE:
        os.truncate(save(folder, 2, tensors(2), {}, 2) / MANIFEST, 100)
    codes, _ = ranks.run("saves", folder, world, 2, keep=1, failpoint=f"{point}:{rank}")
    assert codes == [-signal.SIGKILL if r == rank else 1 for r in range(world)]
    found, complaints = newest_valid(tmp_path)
    published = POINTS.index(point) >= POINTS.index("renamed")
    # Rank 0 may publish a complete checkpoint.
    steps = (1, 2) if (rank, point) == (1, "gathered") else (2,) if published else (1,)
    assert found is not None and found.step in steps and holds(found.path, found.step)
    assert len(complaints) == (point == "moving-aside")
    assert all(
        isinstance(checkpoint._read(path), checkpoint.Checkpoint)
        for path in folder.glob("step-*")
        if path.name not in str(complaints)
    )
    codes, (ends,) = ranks.run("saves", folder, 1, *range(found.step + 1, 4), keep=1)
    assert codes == [0] and all(end["problem"] is None for end in ends)
    assert names(folder) == ["step-00000003"] and holds(folder / "step-00000003", 3)


@pytest.mark.parametrize("world, rank, point", REFUSALS)
def test_a_full_disk_is_told_to_all_ranks_and_leaves_nothing_behind(
    ranks, tmp_path, world, rank, point
):
    """The same process can then save the same step in a second attempt."""
    folder = tmp_path / "checkpoints"
    save(folder, 1, tensors(1), {}, 1)
    codes, (ends, *others) = ranks.run(
        "saves", folder, world, 2, 2, keep=1, failpoint=f"{point}:{rank}=full"
    )
    assert codes == [0] * world and all(other == ends for other in others)
    assert (
        ends[0]["path"] is None
        and ends[0]["problem"].endswith(": No space left on device")
        and "\n" not in ends[0]["problem"]
    )
    assert ends[0]["problem"].startswith(f"rank {rank}: {folder}" if world > 1 else str(folder))
    assert (
        ends[1]["problem"] is None
        and names(folder) == ["step-00000002"]
        and holds(folder / "step-00000002", 2)
    )


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_really_refuses(ranks, tmp_path, world):
    """No file of the last rank may grow beyond 500 bytes."""
    folder = tmp_path / "checkpoints"
    codes, (ends, *_) = ranks.run("saves", folder, world, 2, 3, limit=500)
    file = f"{folder}/.writing-step-00000002-token-1/tensors-{world - 1:05d}-00000.safetensors"
    assert (
        codes == [0] * world
        and ends[0]["problem"] == f"{'rank 1: ' if world > 1 else ''}{file}: File too large"
    )
    assert names(folder) == ["step-00000003"]


def test_numbers_that_are_not_finite_are_not_saved(ranks, tmp_path):
    codes, problems = ranks.run("not_finite", tmp_path / "checkpoints", 2)
    assert codes == [0, 0] and problems[0] == problems[1] and names(tmp_path / "checkpoints") == []
    assert problems[0].startswith("rank 1: ") and problems[0].endswith(
        ": exp_avg/layer.0 holds numbers that are not finite"
    )


def test_disks_that_are_not_shared_are_noticed(ranks, tmp_path):
    """This happens where the run folder is on each machine's own disk."""
    codes, problems = ranks.run("apart", tmp_path / "checkpoints", 2)
    assert codes == [0, 0] and problems[0] == problems[1]
    assert problems[0].startswith("rank 0: ") and problems[0].endswith(
        "tensors-00001-00000.safetensors: No such file or directory"
    )
    assert [names(tmp_path / "checkpoints" / disk) for disk in ("disk0", "disk1")] == [[], []]


def test_a_failpoint_that_is_none_is_refused(monkeypatch):
    """Otherwise a test with a wrong name would prove nothing."""
    monkeypatch.setenv("FASTBERT_FAILPOINT", "tensors-hlaf:1=kill")
    with pytest.raises(ValueError, match="'tensors-hlaf:1=kill': must be NAME"):
        reach("copied")


def test_a_failpoint_counts(monkeypatch):
    monkeypatch.setenv("FASTBERT_FAILPOINT", "copied:0@3=full")
    monkeypatch.delenv("RANK", raising=False)
    for _ in range(2):
        reach("copied")
        reach("renamed")
    with pytest.raises(OSError, match="No space left"):
        reach("copied")
    reach("copied")


if __name__ == "__main__":
    main()
