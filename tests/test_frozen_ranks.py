"""After SIGSTOP the frozen rank is named, all others end, and it does no harm if it resumes."""

from __future__ import annotations

import signal

import pytest

from tests.trials import MARGIN_S, Laboratory, lines_so_far, wait_for, wait_until_ready

# Hangs of toy ranks are in the default tier (test_watchdog.py).
pytestmark = pytest.mark.slow

WORLD, STAGE = 2, 1


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("frozen"), small_dataset.path)


@pytest.mark.parametrize(
    "when, frozen",
    [
        ("starting", 1),
        ("training", 0),
        ("saving", 1),
    ],
)
def test_a_rank_that_stops_answering_is_named(lab, when, frozen):
    """All others end within the recipe's limit; the frozen rank also ends if it resumes."""
    trial, limit = lab.trial(stage=STAGE), 8.0
    failpoint = {"FASTBERT_FAILPOINT": f"tensors-half:{frozen}=stop"} if when == "saving" else {}
    with trial.start(WORLD, f"runtime.timeout_s={limit:g}", **failpoint) as ranks:
        if when == "starting":
            wait_until_ready(ranks)
        elif when == "training":
            wait_for(lambda: lines_so_far(trial) >= 4)
        if when != "saving":
            ranks[frozen].signal(signal.SIGSTOP)
        other = ranks[1 - frozen]
        assert other.wait(limit + MARGIN_S) == 1
        said = other.err.read_text()
        assert f"rank {frozen}" in said and (when == "starting" or "runtime.timeout_s" in said), (
            said
        )
        assert len(said.splitlines()) == 1, said
        assert ranks[frozen].code is None
        ranks[frozen].signal(signal.SIGCONT)
        assert ranks[frozen].wait(limit + MARGIN_S) == 1, ranks[frozen].err.read_text()
    if when != "starting":
        assert lab.finish(trial, WORLD, STAGE).passed


def test_a_frozen_first_rank_does_not_write_into_the_resumed_run(lab):
    """Rank 0 is frozen, and the run is resumed without it.

    When it continues in the middle of the resumed run, it must not write to the run folder.
    """
    trial = lab.trial("runtime.timeout_s=60")
    with trial.start(1) as old:
        wait_for(lambda: lines_so_far(trial) >= 4)
        old[0].signal(signal.SIGSTOP)
        with trial.start(1) as new:
            wait_for(lambda: len(trial.records("resume")) or lines_so_far(trial) < 4)
            old[0].signal(signal.SIGCONT)
            assert new.wait() == [0]
        assert old.wait() == [1]
        assert "taken" in old.errors and str(new[0].pid) in old.errors
    assert trial.compare(lab.undisturbed(1, 0)).passed
