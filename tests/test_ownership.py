"""Who started last owns the run folder; everybody else ends before writing."""

from __future__ import annotations

import os
import socket

import pytest

from fastbert.checkpoints.ownership import Ownership, TakenOver
from fastbert.errors import InputError


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


def test_a_folder_tells_whether_a_run_has_claimed_it(tmp_path):
    assert not Ownership.was_claimed(tmp_path) and not Ownership.was_claimed(tmp_path / "none")
    for other in (b"", b"alice\n", b"* @team\n", b"\xff" * 40):
        (tmp_path / ".owner").write_bytes(other)
        assert not Ownership.was_claimed(tmp_path)
    Ownership.claim(tmp_path)
    assert Ownership.was_claimed(tmp_path)
    (tmp_path / ".owner").unlink()
    (tmp_path / ".owner").mkdir()
    assert not Ownership.was_claimed(tmp_path)
    (tmp_path / ".owner").rmdir()
    (tmp_path / ".owner").symlink_to(".owner")
    with pytest.raises(InputError, match="Too many levels of symbolic links"):
        Ownership.was_claimed(tmp_path)


def test_a_claim_that_fails_leaves_nothing(tmp_path):
    (tmp_path / ".owner").mkdir()
    with pytest.raises(OSError):
        Ownership.claim(tmp_path)
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
