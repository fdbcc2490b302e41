"""kill -9 at random moments, and bits flipped at random places; tests/torture.py does the same for hours."""

from __future__ import annotations

import pytest

from tests.trials import Laboratory, flips, kills

SEED = 1


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_store) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("kills"), small_store.path)


def test_kill_9_at_any_moment(lab):
    """Of one rank or of all, on one rank and on two, at every stage; every later loss is that of the run that was left alone."""
    tally = kills(lab, 30, SEED)
    print(tally)
    assert tally.sound and tally.tried == 30, tally


def test_one_flipped_bit_anywhere(lab):
    tally = flips(lab, 10, SEED)
    print(tally)
    assert tally.sound and tally.tried == 10, tally
