"""A dataset is deleted or truncated while a run trains on it."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from fastbert.checkpoints import checkpoint
from tests.tiers import slow
from tests.trials import Laboratory, Trial, lines_so_far, wait_for


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("vanished"), small_dataset.path)


def on_a_copy(lab: Laboratory, small_dataset, stage: int = 0) -> Trial:
    """Make a trial on its own copy of the dataset."""
    trial = lab.trial(stage=stage)
    copy = shutil.copytree(small_dataset.path, trial.folder / "dataset")
    trial.recipe.write_text(trial.recipe.read_text().replace(str(small_dataset.path), str(copy)))
    trial.dataset = copy
    return trial


@pytest.mark.slow
def test_a_dataset_deleted_while_training(lab, small_dataset):
    """Mapped files stay readable, so the run ends well, but it cannot be resumed."""
    trial = on_a_copy(lab, small_dataset)
    with trial.start() as ranks:
        wait_for(lambda: lines_so_far(trial) >= 4 or ranks.codes != [None])
        shutil.rmtree(trial.dataset)
        assert ranks.wait() == [0], ranks.errors
    tally = trial.compare(lab.undisturbed(1, 0))
    assert tally.compared == tally.equal > 0 and not tally.problems
    with trial.start(1, "stop.steps=30") as ranks:
        assert ranks.wait() == [2]
    assert f"{trial.dataset}: no such dataset" in ranks.errors


@pytest.mark.parametrize("world, stage", [(1, 0), slow(2, 1)])
def test_a_dataset_cut_short_while_training(lab, small_dataset, world, stage):
    """Reading the truncated file ends the process with a message, and the other ranks name it.

    The checkpoints are valid. With the file restored, the run resumes as if undisturbed.
    """
    trial = on_a_copy(lab, small_dataset, stage)
    file = trial.dataset / "part-00000" / "train-00000"
    with trial.start(world) as ranks:
        wait_for(lambda: trial.checkpoints or None not in ranks.codes)
        os.truncate(file, 0)
        codes = ranks.wait()
    assert -signal.SIGBUS in codes and set(codes) <= {1, -signal.SIGBUS}
    assert "Fatal Python error: Bus error" in ranks.errors and "block_split.py" in ranks.errors
    found, complaints = checkpoint.newest_valid(trial.run)
    assert found is not None and complaints == []
    with trial.start(world) as ranks:
        assert ranks.wait() == [2] * world
    assert f"{file}: the block at byte 0: its SHA-256 differs from the table's" in ranks.errors
    shutil.copy(small_dataset.path / "part-00000" / file.name, file)
    trial.resume(world)
    tally = trial.compare(lab.undisturbed(world, stage))
    assert tally.compared == tally.equal > 0 and not tally.problems
