"""Who started last owns the run folder; everybody else ends before writing."""

from __future__ import annotations

import os
import socket

import pytest

from fastbert.training.ownership import Ownership, TakenOver


def test_the_newest_start_owns_the_run(tmp_path):
    first = Ownership.claim(tmp_path)
    first.check()
    assert first.holds() and first.token.isalnum()
    second = Ownership.claim(tmp_path)
    assert second.holds() and not first.holds()
    second.check()
    with pytest.raises(TakenOver) as error:
        first.check()
    assert f"({socket.gethostname() or 'localhost'}, process {os.getpid()})" in str(error.value).replace("on ", "", 1)
    assert [path.name for path in tmp_path.iterdir()] == [".owner"]


def test_another_rank_knows_the_token_alone(tmp_path):
    token = Ownership.claim(tmp_path).token
    assert Ownership(tmp_path, token).holds()
    assert not Ownership(tmp_path / "elsewhere", token).holds()


def test_a_folder_that_was_taken_away_is_no_longer_owned(tmp_path):
    owner = Ownership.claim(tmp_path)
    (tmp_path / ".owner").unlink()
    with pytest.raises(TakenOver, match="elsewhere"):
        owner.check()
