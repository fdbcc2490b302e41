"""The tests' processes are real, and none outlives the tests."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests.ranks import ROOT, Ranks, environment, runs
from tests.trials import wait_for

# Like the tests' process: it has two ranks, one of them stopped, and waits to be killed.
TESTS = """
import signal, sys, time
from pathlib import Path
from tests.ranks import Ranks
with Ranks(["pretrain", "no-such.toml"], Path(sys.argv[1]), 2) as ranks:
    ranks[1].signal(signal.SIGSTOP)
    print(ranks[1].parent, ranks[1].pid, flush=True)
    time.sleep(600)
"""


def test_exit_codes_and_what_was_said(tmp_path):
    with Ranks(["pretrain", "no-such.toml"], tmp_path / "bad", 2) as ranks:
        assert ranks.wait() == [2, 2]
        assert ranks.errors.startswith("fastbert: no-such.toml: no such recipe")
    with Ranks(["--version"], tmp_path / "good") as ranks:
        assert ranks.wait() == [0]
        assert ranks[0].out.read_text().startswith("fastbert ")
    with Ranks(["--version"], tmp_path / "killed") as ranks:
        ranks.signal(signal.SIGSTOP)
        assert ranks.codes in ([None], [0])
    assert ranks.codes in ([-9], [0])


def test_no_rank_outlives_the_tests(tmp_path):
    """Even a stopped rank ends when the tests die by SIGKILL."""
    command = [sys.executable, "-c", TESTS, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    ) as tests:
        assert tests.stdout is not None
        pids = [int(pid) for pid in tests.stdout.readline().split()]
        assert all(runs(pid) for pid in pids) and len(pids) == 2
        tests.kill()
    wait_for(lambda: not any(runs(pid) for pid in pids))
