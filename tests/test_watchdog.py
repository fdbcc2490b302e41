"""Real ranks are killed, stopped or stuck, or fail: the others end soon and name them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastbert.cluster.group import form_group
from fastbert.cluster.rendezvous import RankLost
from fastbert.cluster.watchdog import LOOK_S, Watchdog
from tests.tiers import slow
from tests.toy_ranks import Toys, say

TIMEOUT_S = 3.0
NEVER_S = 60.0
FORGIVEN_S = 40.0  # a guard against an end by another, longer time-out
SINCE = f"for {TIMEOUT_S:g} s (runtime.timeout_s)"
HINT = "; resume with --resume\n"
SEEN = "(the start|step [123])"  # by the last heartbeat


def stepping(timeout_s: float, steps: int, acts: dict[tuple[int, int], str]) -> int:
    """Count steps and add up numbers; at each (rank, step) of `acts`, do that."""
    try:
        with form_group(timeout_s) as group, Watchdog(group, timeout_s) as watch:
            act(acts.get((group.rank, 0), ""), watch)
            group.connect()
            for step in range(1, steps + 1):
                watch.tick(f"step {step}")
                say("at step", step)
                act(acts.get((group.rank, step), ""), watch)
                group.sum(torch.ones(3))
        return 0
    except RankLost as error:
        print(f"fastbert: {error}{HINT}", file=sys.stderr, end="")
        return 1


def act(what: str, watch: Watchdog) -> None:
    if what == "look away":
        time.sleep(TIMEOUT_S / 4)
    elif what == "wait":
        while not Path(os.environ["GO"]).exists():
            time.sleep(0.02)
    elif what == "be stuck":
        time.sleep(NEVER_S)
    elif what == "be slow":
        for part in range(6):
            watch.tick(f"part {part}")
            time.sleep(TIMEOUT_S / 4)
    elif what == "fail":
        raise OSError("no space")
    elif what == "fail in colour":
        raise OSError("\x1b[31mno space\x9b0m\x07")
    elif what:
        os.kill(os.getpid(), getattr(signal, what))


def at_step_3(
    folder: Any, rank: int, what: str, world: int = 3, timeout_s: float = TIMEOUT_S
) -> Toys:
    """Ranks that pause at step 2, so that there are heartbeats before step 3.

    At step 3 one of them does `what`.
    """
    acts = {(other, 2): "look away" for other in range(world)} | {(rank, 3): what}
    return Toys(stepping, (timeout_s, 200, acts), folder, world)


# What a rank does at step 3, with the time-out of all three. These runs spend most of their time
# waiting, so all of them are started before the first one is looked at.
DISTURBED = [
    (1, "SIGKILL", TIMEOUT_S),
    (1, "SIGKILL", NEVER_S),
    (0, "SIGKILL", TIMEOUT_S),
    (1, "SIGSTOP", TIMEOUT_S),
    (0, "SIGSTOP", TIMEOUT_S),
    (1, "be stuck", TIMEOUT_S),
    (0, "be stuck", TIMEOUT_S),
    (1, "be slow", TIMEOUT_S),
    (1, "fail", NEVER_S),
    (0, "fail", NEVER_S),
    (1, "fail in colour", NEVER_S),
]


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory) -> Iterator[dict[tuple[int, str, float], Toys]]:
    with contextlib.ExitStack() as runs:
        found = {}
        for rank, what, timeout_s in DISTURBED:
            folder = tmp_path_factory.mktemp("disturbed")
            toys = runs.enter_context(at_step_3(folder, rank, what, timeout_s=timeout_s))
            toys.until(0, "at step 2\n")  # beginning costs time, which the others must not lack
            found[rank, what, timeout_s] = toys
        yield found


def line(text: str) -> str:
    """Return fastbert's one line in a rank's stderr."""
    (found,) = [line for line in text.splitlines(keepends=True) if line.startswith("fastbert: ")]
    return found.removeprefix("fastbert: ")


def test_nothing_happens(tmp_path):
    with Toys(stepping, (NEVER_S, 50, {}), tmp_path, 3) as toys:
        assert toys.wait() == [0, 0, 0]
        assert toys.out(0) == toys.out(1) == toys.out(2) and toys.out(0).endswith("at step 50\n")
        assert [toys.err(rank) for rank in range(3)] == [""] * 3


def test_one_rank_has_nobody_to_watch(tmp_path):
    with Toys(stepping, (0.1, 3, {(0, 2): "look away"}), tmp_path, 1) as toys:
        assert toys.wait() == [0]


@pytest.mark.parametrize("timeout_s", [TIMEOUT_S, NEVER_S])
def test_a_rank_is_killed(disturbed, timeout_s):
    """The time-out does not matter, since the connections break."""
    toys = disturbed[1, "SIGKILL", timeout_s]
    assert toys.wait(1) == [-signal.SIGKILL]
    killed = time.monotonic()
    assert toys.wait(0, 2) == [1, 1]
    assert time.monotonic() - killed < FORGIVEN_S
    for rank in (0, 2):
        assert re.fullmatch(
            re.escape(f"{toys.name(1)} has disappeared, last seen at ") + SEEN + re.escape(HINT),
            line(toys.err(rank)),
        )


def test_the_rank_that_holds_the_store_is_killed(disturbed):
    toys = disturbed[0, "SIGKILL", TIMEOUT_S]
    assert toys.wait() == [-signal.SIGKILL, 1, 1]
    for rank in (1, 2):
        assert line(toys.err(rank)).startswith(
            f"{toys.name(0)} at 127.0.0.1:{toys.port} has disappeared"
        )


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_is_killed_while_they_connect(tmp_path, lost):
    with Toys(stepping, (TIMEOUT_S, 3, {(lost, 0): "SIGKILL"}), tmp_path, 3) as toys:
        others = [rank for rank in range(3) if rank != lost]
        assert toys.wait(*others) == [1, 1]
        for rank in others:
            assert line(toys.err(rank)).startswith(toys.name(lost)), toys.err(rank)


def test_ranks_that_cannot_connect_say_so(tmp_path):
    """All ranks are there, and only gloo cannot connect them."""
    with Toys(stepping, (TIMEOUT_S, 3, {}), tmp_path, 2, GLOO_SOCKET_IFNAME="nowhere") as toys:
        assert toys.wait() == [1, 1]
        for rank in range(2):
            said = line(toys.err(rank))
            assert (
                "has met the others, but cannot connect to all of them" in said
                and "GLOO_SOCKET_IFNAME = nowhere" in said
            )


def test_all_others_are_killed(tmp_path):
    with Toys(stepping, (TIMEOUT_S, 100_000, {}), tmp_path, 3) as toys:
        toys.until(0, "at step 2\n")
        for rank in (1, 2):
            toys.signal(rank, signal.SIGKILL)
        assert toys.wait() == [1, -signal.SIGKILL, -signal.SIGKILL]
        assert line(toys.err(0)).startswith(f"{toys.name(1)}, {toys.name(2)} have disappeared")


def test_a_rank_is_stopped_and_continues_later(disturbed):
    toys = disturbed[1, "SIGSTOP", TIMEOUT_S]
    assert toys.wait(0, 2) == [1, 1]
    for rank in (0, 2):
        assert re.fullmatch(
            re.escape(f"{toys.name(1)} has not answered {SINCE}, last seen at ")
            + SEEN
            + re.escape(HINT),
            line(toys.err(rank)),
        )
    toys.signal(1, signal.SIGCONT)
    assert toys.wait(1) == [1]  # it does not continue to train alone
    assert f"{toys.name(1)} was suspended for " in line(
        toys.err(1)
    ) or f"{toys.name(0)} at " in line(toys.err(1))


def test_the_rank_that_holds_the_store_is_stopped_and_continues_later(disturbed):
    toys = disturbed[0, "SIGSTOP", TIMEOUT_S]
    assert toys.wait(1, 2) == [1, 1]
    for rank in (1, 2):
        assert (
            line(toys.err(rank))
            == f"{toys.name(0)} at 127.0.0.1:{toys.port} has not answered {SINCE}; "
            f"this rank is at step 3{HINT}"
        )
    toys.signal(0, signal.SIGCONT)
    assert toys.wait(0) == [1]
    assert f"{toys.name(0)} was suspended for " in line(toys.err(0)) or f"{toys.name(1)}, " in line(
        toys.err(0)
    )


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_rank_is_stuck(disturbed, stuck):
    """Its process lives and its heartbeat continues, but it makes no progress."""
    toys = disturbed[stuck, "be stuck", TIMEOUT_S]
    assert toys.wait() == [1, 1, 1]
    for rank in range(3):
        assert line(toys.err(rank)).startswith(
            f"{toys.name(stuck)} has kept the others waiting {SINCE}: at step 3, in "
            f"{__file__}, line "
        )


def test_a_rank_that_is_slow_but_makes_progress_is_left_alone(disturbed):
    """The others wait for it inside a collective for longer than the time-out."""
    assert disturbed[1, "be slow", TIMEOUT_S].wait() == [0, 0, 0]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_fails(disturbed, failing):
    """The others quote its error, also when the store ends with it."""
    toys = disturbed[failing, "fail", NEVER_S]
    assert toys.wait() == [1, 1, 1]
    assert "OSError: no space" in toys.err(failing)
    for rank in {0, 1, 2} - {failing}:
        assert line(toys.err(rank)) == f"{toys.name(failing)} has ended: OSError: no space{HINT}"


def test_what_a_rank_says_commands_no_terminal(disturbed):
    toys = disturbed[1, "fail in colour", NEVER_S]
    assert toys.wait() == [1, 1, 1]
    for rank in (0, 2):
        assert (
            line(toys.err(rank))
            == rf"{toys.name(1)} has ended: OSError: \x1b[31mno space\x9b0m\x07{HINT}"
        )


def step_until(timeout_s: float, enough: str) -> int:
    """Take steps until a file exists."""
    try:
        with form_group(timeout_s) as group, Watchdog(group, timeout_s) as watch:
            group.connect()
            say("begins")
            while not group.sum(torch.tensor([1.0 * Path(enough).exists()])):
                watch.tick("a step")
                time.sleep(0.02)
        return 0
    except RankLost as error:
        print(f"fastbert: {error}{HINT}", file=sys.stderr, end="")
        return 1


class Stranger:
    """A process that reaches rank 0's store and has no key."""

    def __init__(self, toys: Toys):
        self.store: Any = dist.TCPStore(
            "127.0.0.1", toys.port, None, False, timeout=timedelta(seconds=NEVER_S)
        )
        (self.prefix,) = {key.split("/")[1] for key in self.store.list_keys() if "/watch/" in key}

    def put(self, place: str, value: bytes) -> None:
        self.store.set(f"fastbert/{self.prefix}/watch/{place}", value)

    def copy(self, place: str) -> bytes:
        return self.store.get(f"fastbert/{self.prefix}/watch/{place}")

    def see_beats(self, ranks: int) -> None:
        """Return after two more heartbeats of every rank, which then has read the failure."""
        for rank in range(ranks):
            for _ in range(2):
                before, end = self.copy(str(rank)), time.monotonic() + NEVER_S
                while self.copy(str(rank)) == before:
                    assert time.monotonic() < end
                    time.sleep(0.02)


PLACES = ("failure", "0", "1", "heard", "heard/0", "heard/1", "heard/2")
STRANGE = {
    "a failure": b'["bye", 0]',
    "another": b'["gone, \x1b[2J", 7]',
    "a number": b"1",
    "a beat": b'[-1, 3, "the end", true, "", true]',
    "no JSON": b"[",
    "no text": b"\xff\x00\x9b2J",
    "nothing": b"",
    "a signature of zeros": b"0" * 64 + b'["bye", 0]',
    "as large as it can be": b"[" * (8 * 2**20 - 1000),
}


FIRST = ("a failure", "as large as it can be")


@pytest.mark.parametrize("values", [FIRST, slow([name for name in STRANGE if name not in FIRST])])
def test_a_stranger_ends_no_run(tmp_path, values):
    with Toys(step_until, (NEVER_S, str(tmp_path / "enough")), tmp_path, 3) as toys:
        for rank in range(3):
            toys.until(rank, "begins")
        stranger = Stranger(toys)
        for value in values:
            for place in PLACES:
                stranger.put(place, STRANGE[value])
                stranger.store.set(f"watch/{place}", STRANGE[value])
            stranger.see_beats(3)
        (tmp_path / "enough").touch()
        assert toys.wait() == [0, 0, 0], [toys.err(rank) for rank in range(3)]
        assert [toys.err(rank) for rank in range(3)] == [""] * 3


def test_what_a_rank_has_signed_counts_at_its_own_place_alone(tmp_path):
    """A stranger copies heartbeats to other ranks, to the failure, and back in time."""
    with Toys(step_until, (NEVER_S, str(tmp_path / "enough")), tmp_path, 3) as toys:
        for rank in range(3):
            toys.until(rank, "begins")
        stranger = Stranger(toys)
        old = stranger.copy("1")
        stranger.see_beats(3)
        for place in ("failure", "0", "1", "2", "heard/0"):
            stranger.put(place, old)
        stranger.see_beats(3)
        (tmp_path / "enough").touch()
        assert toys.wait() == [0, 0, 0], [toys.err(rank) for rank in range(3)]


@pytest.mark.parametrize("whose", [slow((1,)), (0, 1, 2)])
def test_a_slow_rank_is_left_alone_whatever_a_stranger_writes(tmp_path, whose):
    """While the others wait for a slow rank beyond the time-out, a stranger overwrites heartbeats.

    It overwrites those of one rank, or those of all.
    """
    with Toys(stepping, (TIMEOUT_S, 5, {(1, 3): "be slow"}), tmp_path, 3) as toys:
        toys.until(1, "at step 3")
        stranger = Stranger(toys)
        end = time.monotonic() + NEVER_S
        while "at step 4" not in toys.out(1):
            assert time.monotonic() < end
            for rank in whose:
                stranger.put(str(rank), b'[-1, 0, "the start", false, "", false]')
        assert toys.wait() == [0, 0, 0], [toys.err(rank) for rank in range(3)]
        assert [toys.err(rank) for rank in range(3)] == [""] * 3


def test_a_failure_is_read_despite_a_strangers_value(tmp_path):
    """A stranger's value under the failure's key does not hide which rank has failed."""
    acts = {(1, 3): "fail"}
    with Toys(
        stepping,
        (NEVER_S, 200, {(0, 2): "wait", (1, 2): "wait", (2, 2): "wait", **acts}),
        tmp_path,
        3,
        GO=str(tmp_path / "go"),
    ) as toys:
        for rank in range(3):
            toys.until(rank, "at step 2")
        stranger = Stranger(toys)
        stranger.put("failure", b'["bye", 0]')
        stranger.store.check(["x"])
        (tmp_path / "go").touch()
        assert toys.wait() == [1, 1, 1]
        for rank in (0, 2):
            assert line(toys.err(rank)) == f"{toys.name(1)} has ended: OSError: no space{HINT}"


def test_how_long_it_takes(tmp_path):
    """The time from the last tick to the end of the others is little more than the time-out."""
    with at_step_3(tmp_path, 1, "SIGSTOP", world=2) as toys:
        stat = f"/proc/{toys.pid(1)}/stat"
        end = time.monotonic() + NEVER_S
        while open(stat).read().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < end
            time.sleep(0.01)
        stopped = time.monotonic()
        assert toys.wait(0) == [1]
        assert TIMEOUT_S - 1 < time.monotonic() - stopped < TIMEOUT_S + LOOK_S + FORGIVEN_S
