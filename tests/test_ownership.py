"""The newest start owns the run folder, and all earlier ones end before writing."""

from __future__ import annotations

import os
import socket

import pytest

from fastbert.checkpoints.ownership import LostOwnership, RunLock
from fastbert.errors import InputError


def test_the_newest_start_owns_the_run(tmp_path):
    first = RunLock.claim(tmp_path)
    first.check()
    assert first.holds() and first.token.isalnum()
    second = RunLock.claim(tmp_path)
    assert second.holds() and not first.holds()
    second.check()
    with pytest.raises(LostOwnership) as error:
        first.check()
    assert f"({socket.gethostname() or 'localhost'}, process {os.getpid()})" in str(
        error.value
    ).replace("on ", "", 1)
    assert [path.name for path in tmp_path.iterdir()] == [".owner"]


def test_a_folder_tells_whether_a_run_has_claimed_it(tmp_path):
    assert not RunLock.was_claimed(tmp_path) and not RunLock.was_claimed(tmp_path / "none")
    for other in (b"", b"alice\n", b"* @team\n", b"\xff" * 40):
        (tmp_path / ".owner").write_bytes(other)
        assert not RunLock.was_claimed(tmp_path)
    RunLock.claim(tmp_path)
    assert RunLock.was_claimed(tmp_path)
    (tmp_path / ".owner").unlink()
    (tmp_path / ".owner").mkdir()
    assert not RunLock.was_claimed(tmp_path)
    (tmp_path / ".owner").rmdir()
    (tmp_path / ".owner").symlink_to(".owner")
    with pytest.raises(InputError, match="Too many levels of symbolic links"):
        RunLock.was_claimed(tmp_path)


def test_a_claim_that_fails_leaves_nothing(tmp_path):
    (tmp_path / ".owner").mkdir()
    with pytest.raises(OSError):
        RunLock.claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".owner"]


def test_another_rank_knows_the_token_alone(tmp_path):
    token = RunLock.claim(tmp_path).token
    assert RunLock(tmp_path, token).holds()
    assert not RunLock(tmp_path / "elsewhere", token).holds()


def test_a_folder_that_was_taken_away_is_no_longer_owned(tmp_path):
    owner = RunLock.claim(tmp_path)
    (tmp_path / ".owner").unlink()
    with pytest.raises(LostOwnership, match="deleted or moved"):
        owner.check()
