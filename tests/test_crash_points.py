"""A rank dies, or the disk fails, at every point of a save.

The run resumes from a valid checkpoint and gives the same results.
"""

from __future__ import annotations

import pytest

from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.failpoint import POINTS
from tests.disks import SmallDisk, Unavailable
from tests.tiers import slow, typical
from tests.trials import (
    BESIDE_A_DAMAGED_ONE,
    ON_EVERY_RANK,
    Laboratory,
    Trial,
    crashes,
    flip,
    wait_for,
)

WORLD, STAGE = 2, 2
# Operations on the disk; test_saver.py has all of them.
REFUSING = ("tensors-half", "manifest-half", "renamed")


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("crashes"), small_dataset.path)


# A save changes what resume finds at these: a torn file, and a folder that has just got its name.
TELLING = ("tensors-half", "renamed")
# The other points that every rank reaches are divided between two ranks; test_saver.py kills each
# rank at each of them.
OF_ANOTHER_RANK = ON_EVERY_RANK[::2]
OTHERS = [
    point for point in POINTS if point not in (*BESIDE_A_DAMAGED_ONE, *TELLING, *OF_ANOTHER_RANK)
]


@pytest.mark.parametrize("points", [TELLING, slow(OTHERS)])
def test_the_first_rank_dies(lab, points):
    tally = crashes(lab, points, 0, WORLD, STAGE)
    assert tally.passed and tally.tried == len(points), str(tally)


@pytest.mark.slow
def test_another_rank_dies(lab):
    tally = crashes(lab, OF_ANOTHER_RANK, 1, WORLD, STAGE)
    assert tally.passed and tally.tried == len(OF_ANOTHER_RANK), str(tally)


@pytest.mark.parametrize("point", typical(BESIDE_A_DAMAGED_ONE, "moved-aside"))
def test_it_dies_while_a_damaged_checkpoint_makes_room(lab, point):
    trial = lab.trial().copy_of(lab.undisturbed(1, 0))
    before, damaged = trial.checkpoints[-2:]
    flip(damaged / checkpoint.MANIFEST, 800)
    with trial.start(FASTBERT_FAILPOINT=point) as ranks:
        assert ranks.wait() == [-9]
    found, _ = checkpoint.newest_valid(trial.run)
    assert found is not None and found.path == before
    assert lab.finish(trial, 1, 0).passed


@pytest.mark.parametrize(
    "rank, point",
    typical([*((0, point) for point in REFUSING), (1, "tensors-synced")], (0, "tensors-half")),
)
def test_the_disk_refuses_at_one_point_of_a_save(lab, rank, point):
    """Training continues with a message, and the next save succeeds."""
    world = rank + 1
    trial = lab.trial(stage=STAGE if rank else 0)
    with trial.start(world, FASTBERT_FAILPOINT=f"{point}:{rank}@2=full") as ranks:
        assert ranks.wait() == [0] * world, ranks.errors
    saves = trial.records("save")
    (failed,) = [save for save in saves if "problem" in save]
    assert "No space left on device" in failed["problem"] and (
        world == 1 or failed["problem"].startswith("rank 1: ")
    )
    assert saves.index(failed) == 1 and all(
        trial.run / "checkpoints" / save["checkpoint"] for save in saves if save != failed
    )
    # There are only two step-... folders.
    assert [path.name[0] for path in (trial.run / "checkpoints").iterdir()] == ["s", "s"]
    assert trial.compare(lab.undisturbed(world, STAGE if rank else 0)).passed


@pytest.fixture
def disk(lab, request):
    """A trial whose `folder` lies on a small disk."""
    folder, size, world = request.param
    trial = lab.trial(stage=STAGE if world > 1 else 0)
    place = trial.run / folder
    place.mkdir(parents=True)
    try:
        with SmallDisk(place, size) as disk:
            trial.namespaces, trial.seen = disk.pid, disk.seen(trial.run)
            yield disk, trial, world
    except Unavailable as why:
        pytest.skip(f"no disk of its own for this test: {why}")


def newest_valid_step(trial: Trial) -> int:
    """Return the step of the newest checkpoint, which must be valid."""
    found, complaints = checkpoint.newest_valid(trial.seen)
    assert found is not None and complaints == []
    return found.step


def saves(trial: Trial) -> list[dict]:
    return trial.records("save")


@pytest.mark.slow
@pytest.mark.parametrize("disk", [("checkpoints", "1400k", 2)], indirect=True)
def test_no_room_for_a_checkpoint(lab, disk):
    """Two checkpoints fill the disk, and training continues.

    At the end the last state cannot be saved, which is an error. With free space the run resumes
    and gives the same results.
    """
    disk, trial, world = disk
    with trial.start(world) as ranks:
        assert ranks.wait() == [1] * world, ranks.errors
        assert "No space left on device" in ranks[0].out.read_text().splitlines()[-1]
    assert len(trial.steps) == lab.steps and newest_valid_step(trial) == 6
    problems = [save["problem"] for save in saves(trial) if "problem" in save]
    assert problems and all("No space left on device" in problem for problem in problems)
    disk.resize("8m")
    trial.resume(world)
    assert trial.compare(lab.undisturbed(world, STAGE)).passed
    assert newest_valid_step(trial) == lab.steps


@pytest.mark.slow
@pytest.mark.parametrize("disk", [(".", "8m", 2)], indirect=True)
def test_no_room_for_anything(lab, disk):
    """Another program fills the disk of the whole run folder.

    The run ends with one line and leaves a valid checkpoint.
    """
    disk, trial, world = disk
    ballast = trial.seen / "ballast"
    with trial.start(world) as ranks:
        wait_for(lambda: len(saves(trial)) >= 2)
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        assert ranks.wait() == [1] * world
        said = ranks.errors.splitlines()
        assert len(said) == world and all(
            "No space left on device" in line and "--resume" in line for line in said
        ), said
    newest_valid_step(trial)
    ballast.unlink()
    trial.resume(world)
    assert trial.compare(lab.undisturbed(world, STAGE)).passed


@pytest.mark.slow
@pytest.mark.parametrize("disk", [(".", "8m", 1)], indirect=True)
def test_checkpoints_become_read_only(lab, disk):
    disk, trial, world = disk
    with trial.start(world) as ranks:
        wait_for(lambda: len(saves(trial)) >= 1)
        disk.write_protect(trial.run / "checkpoints")
        assert ranks.wait() == [1], ranks.errors
        assert "Read-only file system" in ranks[0].out.read_text().splitlines()[-1]
    assert len(trial.steps) == lab.steps
    newest_valid_step(trial)
    disk.release(trial.run / "checkpoints")
    trial.resume(world)
    assert trial.compare(lab.undisturbed(world, 0)).passed


@pytest.mark.slow
@pytest.mark.parametrize("disk", [(".", "8m", 2)], indirect=True)
def test_a_read_only_folder_from_the_start(lab, disk):
    disk, trial, world = disk
    disk.write_protect(trial.run)
    with trial.start(world) as ranks:
        assert ranks.wait() == [2] * world
        (line,) = set(ranks.errors.splitlines())
        assert "run = " in line and "Read-only file system" in line
    assert list(trial.seen.iterdir()) == []
