"""SIGKILL at random moments and random bit flips; tests/torture.py does the same for hours."""

from __future__ import annotations

import signal
import socket

import pytest
import torch

from fastbert.checkpoints import checkpoint
from tests import one_process
from tests.tiers import slow
from tests.trials import SHAPES, Laboratory, dataset_flips, flip, flips, kills, wait_for

SEED = 1


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("kills"), small_dataset.path)


@pytest.mark.parametrize(
    ("number", "seed", "of_one_run"), [(3, SEED, 3), slow(2 * len(SHAPES), SEED + 1, 2)]
)
def test_kill_9_at_any_moment(lab, number, seed, of_one_run):
    """Kill one rank or all: with two ranks, and then also with one and at every stage.

    Every later loss is that of the undisturbed run.
    """
    tally = kills(lab, number, seed, of_one_run)
    print(tally)
    assert tally.passed and tally.tried == number, str(tally)


@pytest.mark.slow
def test_rank_0_dies_as_the_run_begins(lab):
    """Rank 0 has just claimed the run folder, and the other rank waits for the result.

    This is the first exchange between the ranks, before they open a dataset.
    """
    trial = lab.trial(stage=1)
    with trial.start(2) as ranks:
        wait_for(lambda: (trial.run / ".owner").exists() or None not in ranks.codes)
        ranks[0].signal(signal.SIGKILL)
        assert ranks.wait() == [-signal.SIGKILL, 1]
        said = ranks[1].err.read_text()
    assert "Traceback" not in said, said  # torch may print one about its store before our line
    (line,) = [line for line in said.splitlines() if line.startswith("fastbert: ")]
    assert f"rank 0 ({socket.gethostname()}, process {ranks[0].pid})" in line and line.endswith(
        "; resume with --resume"
    )
    assert lab.finish(trial, 2, 1).passed


@pytest.mark.parametrize("number", [2, slow(6)])
def test_one_flipped_bit_anywhere(lab, number):
    tally = flips(lab, number, SEED)
    print(tally)
    assert tally.passed and tally.tried == number, str(tally)


@pytest.mark.parametrize("number", [2, slow(6)])
def test_one_flipped_bit_anywhere_in_a_dataset(lab, number):
    tally = dataset_flips(lab, number, SEED)
    print(tally)
    assert tally.passed and tally.tried == number, str(tally)


def test_every_bit_of_a_small_checkpoint(tmp_path):
    """Flip one bit after the other, with all that JSON can write in two ways.

    These are a letter beyond ASCII, an exponent, and the seventeenth digit of a number.
    """
    metadata = {"recipe": 'run = "ü"', "progress": {"seconds": 0.1 + 0.2, "best_loss": 1e-12}}
    path = one_process.save(tmp_path / "checkpoints", 1, [("weight/a", torch.ones(3))], metadata, 1)
    missed = []
    for file in path.iterdir():
        for bit in range(8 * file.stat().st_size):
            flip(file, bit)
            if checkpoint.newest_valid(tmp_path)[0] is not None:
                missed.append((file.name, bit))
            flip(file, bit)
    assert checkpoint.newest_valid(tmp_path)[0] is not None
    assert missed == []
