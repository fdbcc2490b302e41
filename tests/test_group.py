"""Real processes form a group, exchange values and leave, or fail with a clear message."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastbert.cluster.group import join
from fastbert.cluster.launch_env import launched, read_launch_env
from fastbert.cluster.rendezvous import Interrupted, RankLost, hold_store, listens
from fastbert.cluster.signals import StopRequest
from fastbert.cluster.signature import Key, find_key
from fastbert.cluster.signed_store import No, SignedStore
from fastbert.errors import InputError
from tests.ranks import LAUNCHER, environment, free_port
from tests.tiers import slow
from tests.toy_ranks import HOST, Toys, listening, say

SOON_S = 3.0  # a time-out that tests reach
NEVER_S = 60.0  # a time-out that no test reaches


def member(timeout_s: float, **acts: str) -> int:
    """Run one rank: join the group, do this rank's act, exchange some values and leave.

    `acts` maps ranks to acts, for example "1" to "InputError: text". An act runs under
    `raise_on_all_ranks`.
    """
    with StopRequest() as stop_request:
        try:
            with join(timeout_s, stop_request) as group:
                say("joined", group.rank)
                if "stop" in acts.values():
                    # Nothing supervises `join`: a rank that is still connecting when another one
                    # stops would wait for ever.
                    group.barrier()
                with group.raise_on_all_ranks():
                    act(acts.get(str(group.rank), ""))
                say(
                    "gathered",
                    group.gather({"rank": group.rank, "text": "é" * group.rank}),
                    group.broadcast([group.rank, None]),
                )
                say(
                    "sum",
                    group.sum(torch.tensor([1.0, group.rank])).tolist(),
                    "is_main",
                    group.is_main,
                )
                while os.environ.get("LINGER") and not os.path.exists(os.environ["LINGER"]):
                    time.sleep(0.02)
                group.barrier()
            return 0
        except InputError as error:
            say("InputError:", error)
            return 2
        except Interrupted as error:
            say("Interrupted:", error)
            return 75
        except RankLost as error:
            say("RankLost:", error)
            return 1


def act(what: str) -> None:
    kind, _, text = what.partition(": ")
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind:
        raise {"InputError": InputError, "Interrupted": Interrupted, "ValueError": ValueError}[
            kind
        ](text)


def members(
    folder, world: int, timeout_s: float = NEVER_S, only=None, acts=None, **more: str
) -> Toys:
    return Toys(_member, (timeout_s, acts or {}), folder, world, only, **more)


def _member(timeout_s: float, acts: dict[str, str]) -> int:
    return member(timeout_s, **acts)


# Groups that wait for a time-out, so all of them are started before the first one is looked at.
WAITING: dict[str, dict[str, Any]] = {
    "ranks 1 and 3 never come": {"world": 4, "only": (0, 2)},
    "rank 0 never comes": {"world": 2, "only": (1,)},
    "rank 0 is stopped": {"world": 2, "acts": {"0": "stop"}},
    "rank 1 is stopped": {"world": 2, "acts": {"1": "stop"}},
    "no such name": {"world": 2, "only": (0,), "MASTER_ADDR": "nowhere.invalid"},
}


@pytest.fixture(scope="module")
def waiting(tmp_path_factory) -> Iterator[dict[str, Toys]]:
    with contextlib.ExitStack() as groups:
        yield {
            what: groups.enter_context(
                members(tmp_path_factory.mktemp("waiting"), timeout_s=SOON_S, **given)
            )
            for what, given in WAITING.items()
        }


def entered(toys: Toys, rank: int, pid: int) -> None:
    """Return when a process has registered as this rank, and so waits for others."""
    end = time.monotonic() + NEVER_S
    while not listens("127.0.0.1", toys.port):
        assert time.monotonic() < end
        time.sleep(0.02)
    table = table_of(toys)
    while True:
        register = table.read(f"register/{rank}")
        answer = register if isinstance(register, No) else table.read(register[0])
        member = answer if isinstance(answer, No) else table.part(answer[0]).read(str(rank))
        if not isinstance(member, No) and member["process"] == pid:
            return
        assert time.monotonic() < end
        time.sleep(0.02)


def table_of(toys: Toys, key: Key | None = None) -> SignedStore:
    """Open the store of the ranks over a separate connection."""
    store = dist.TCPStore("127.0.0.1", toys.port, None, False, timeout=timedelta(seconds=NEVER_S))
    return SignedStore(dist.PrefixStore("fastbert", store), key or find_key(), "fastbert")


def test_what_they_agree_on(tmp_path):
    with members(tmp_path, 3) as toys:
        assert toys.wait() == [0, 0, 0]
        for rank in range(3):
            everybody = [
                {"rank": 0, "text": ""},
                {"rank": 1, "text": "é"},
                {"rank": 2, "text": "éé"},
            ]
            assert (
                f"gathered {everybody} [0, None]\nsum [3.0, 3.0] is_main {rank == 0}"
                in toys.out(rank)
            )


def test_ports_are_open_on_the_given_address_alone(tmp_path):
    with members(tmp_path, 2, LINGER=str(tmp_path / "go")) as toys:
        for rank in range(2):
            toys.until(rank, "sum")
        ports = listening(toys.pid(0), toys.pid(1))
        (tmp_path / "go").touch()
        assert {address for _, address, _ in ports} == {"127.0.0.1"}
        assert [pid for pid, _, port in ports if port == toys.port] == [toys.pid(0)]
        assert toys.wait() == [0, 0]


def test_one_process_needs_no_launcher_and_no_store(tmp_path):
    with members(tmp_path, 1, LINGER=str(tmp_path / "go")) as toys:
        toys.until(0, "sum [1.0, 0.0] is_main True")
        assert {address for _, address, _ in listening(toys.pid(0))} <= {"127.0.0.1"}
        (tmp_path / "go").touch()
        assert toys.wait() == [0]


def test_a_rank_that_never_comes_is_named(waiting):
    toys = waiting["ranks 1 and 3 never come"]
    assert toys.wait() == [1, 1]
    for rank in (0, 2):
        assert (
            toys.out(rank) == f"RankLost: rank 1, rank 3 did not come to 127.0.0.1:{toys.port} "
            "within 3 s (runtime.timeout_s)\n"
        )


def test_rank_0_never_comes(waiting):
    toys = waiting["rank 0 never comes"]
    assert toys.wait() == [1]
    assert "RankLost: rank 0 did not come to 127.0.0.1:" in toys.out(1)


@pytest.mark.parametrize("asked", [slow(0), 1])
def test_a_signal_while_waiting_ends_all_who_wait(tmp_path, asked):
    with members(tmp_path, 3, only=(0, 1)) as toys:
        entered(toys, 1, toys.pid(1))
        toys.signal(asked, signal.SIGTERM)
        assert toys.wait() == [75, 75]
        assert toys.out(0) == toys.out(1) == "Interrupted: SIGTERM\n"


def test_bad_input_on_one_rank_ends_all_with_its_name(tmp_path):
    with members(tmp_path, 3, acts={"1": "InputError: data = 'x': not there"}) as toys:
        assert toys.wait() == [2, 2, 2]
        for rank in range(3):
            assert toys.out(rank).endswith(f"InputError: rank 1 ({HOST}): data = 'x': not there\n")


def test_bad_input_on_all_ranks_is_said_plainly(tmp_path):
    with members(tmp_path, 2, acts={"0": "InputError: bad", "1": "InputError: bad"}) as toys:
        assert toys.wait() == [2, 2]
        assert toys.out(0).endswith("\nInputError: bad\n") and toys.out(1).endswith(
            "\nInputError: bad\n"
        )


def test_another_exception_on_one_rank_ends_all(tmp_path):
    """This rank holds the store, which must not be gone before the others know."""
    with members(
        tmp_path, 3, acts={"0": "ValueError: a bug", "1": "InputError: less telling"}
    ) as toys:
        assert toys.wait() == [1, 1, 1]
        assert "ValueError: a bug" in toys.err(0)
        for rank in (1, 2):
            assert toys.out(rank).endswith(f"RankLost: {toys.name(0)} failed: ValueError: a bug\n")


def test_a_signal_noticed_by_one_rank_ends_all(tmp_path):
    with members(tmp_path, 2, acts={"1": "Interrupted: SIGUSR1"}) as toys:
        assert toys.wait() == [75, 75]
        assert toys.out(0).endswith("Interrupted: SIGUSR1\n")


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_on_the_way_is_named(waiting, stopped):
    """Rank 0 is tested too: without its answer every call to the store would wait for ever."""
    toys, other = waiting[f"rank {stopped} is stopped"], 1 - stopped
    assert toys.wait(other) == [1]
    assert f"RankLost: {toys.name(stopped)} " in toys.out(other)


def test_different_world_sizes(tmp_path):
    with members(tmp_path, 2, SOON_S, only=(0,)) as toys:
        toys.variables["WORLD_SIZE"] = "3"
        toys.start([1])
        assert toys.wait() == [1, 2]
        assert (
            toys.out(1)
            == "InputError: WORLD_SIZE = 3 for rank 1, but 2 for rank 0; start all with the same\n"
        )


def test_one_rank_twice(tmp_path):
    (tmp_path / "other").mkdir()
    with members(tmp_path, 3, only=(0, 1)) as toys:
        entered(toys, 1, toys.pid(1))
        with members(tmp_path / "other", 3, only=(1,), MASTER_PORT=str(toys.port)) as others:
            entered(toys, 1, others.pid(1))
            toys.start([2])
            assert others.wait() + toys.wait() == [0, 0, 2, 0]
        both = f"{toys.pid(1)} on {HOST}, and {others.pid(1)} on {HOST}"
        assert toys.out(1) == f"InputError: RANK = 1 is given to two processes: {both}\n"


def test_the_port_is_taken(tmp_path):
    port = free_port()
    store = hold_store("127.0.0.1", port)
    with members(tmp_path, 2, SOON_S, only=(0,), MASTER_PORT=str(port)) as toys:
        assert toys.wait() == [2]
        assert (
            toys.out(0)
            == f"InputError: MASTER_PORT = {port}: another process listens there on 127.0.0.1; "
            "choose another port\n"
        )
    del store


def test_an_address_of_another_machine(tmp_path):
    with members(tmp_path, 2, SOON_S, only=(0,), MASTER_ADDR="192.0.2.1") as toys:
        assert toys.wait() == [2]
        assert (
            f"MASTER_ADDR = 192.0.2.1: 192.0.2.1 is not an address of {HOST}, where rank 0 runs"
            in toys.out(0)
        )


def test_a_name_that_nobody_knows(waiting):
    toys = waiting["no such name"]
    assert toys.wait() == [1]
    assert (
        "MASTER_ADDR = nowhere.invalid: the name did not resolve to an address within 3 s"
        in toys.out(0)
    )


def test_a_launchers_store_still_has_the_keys_of_earlier_attempts(tmp_path):
    agent = hold_store("127.0.0.1", 0)
    given = {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for attempt, (world, only) in enumerate([(3, (0, 1)), (3, None), (2, None), (3, None)]):
        (folder := tmp_path / str(attempt)).mkdir()
        with members(folder, world, SOON_S if only else NEVER_S, only, **given) as toys:
            assert toys.wait() == [1, 1] if only else [0] * world, toys.out(0)
    del agent


def test_the_store_of_an_attempt_that_ends_just_now(tmp_path):
    """Rank 1 of the next attempt comes before rank 0 of the last one has ended.

    Both attempts have the same port.
    """
    port = free_port()
    old = hold_store("127.0.0.1", port)
    with members(tmp_path, 2, only=(1,), MASTER_PORT=str(port)) as toys:
        dist.PrefixStore("fastbert", old).wait(["register/1"])
        del old
        toys.start([0])
        assert toys.wait() == [0, 0]


OTHER_KEY = "another key, with 32 characters or more"


@pytest.mark.parametrize("odd", [0, slow(1)])
def test_ranks_with_two_keys_say_so_at_once(tmp_path, odd):
    """This happens where home directories are not shared.

    The error comes before the time-out, and no rank continues without the others.
    """
    with members(
        tmp_path, 3, 10 * NEVER_S, only=[rank for rank in range(3) if rank != odd]
    ) as toys:
        toys.variables |= {"FASTBERT_RENDEZVOUS_KEY": OTHER_KEY}
        toys.start([odd])
        assert toys.wait() == [2, 2, 2]
        said = [toys.out(rank) for rank in range(3)]
        todo = (
            "and this process (FASTBERT_RENDEZVOUS_KEY) do not have the same key, "
            "which every process of a run needs; where the nodes do not "
            "share home directories, set FASTBERT_RENDEZVOUS_KEY to the same value on each of "
            "them, or copy ~/.fastbert/rendezvous.key to each"
        )
        stranger_to_0 = f"InputError: rank 0 at 127.0.0.1:{toys.port} {todo}\n"
        if odd == 0:
            assert said[1] == said[2] == stranger_to_0
            assert said[0] in [
                f"InputError: {whom} {todo}\n" for whom in ("rank 1", "rank 2", "rank 1, rank 2")
            ]
        else:
            assert said[1] == stranger_to_0 and said[0] == said[2] == f"InputError: rank 1 {todo}\n"


@pytest.mark.slow
def test_a_rank_that_came_just_before_the_other_key_ended_rank_0_says_so(tmp_path):
    """The rank saw rank 0's registration once, and then the store was gone."""
    port = free_port()
    store: Any = hold_store("127.0.0.1", port)
    store.set("fastbert/register/0", b"signed with another key")
    with members(tmp_path, 2, 10 * NEVER_S, only=(1,), MASTER_PORT=str(port)) as toys:
        while store.get("fastbert/register/0"):  # until the rank has seen and emptied it
            time.sleep(0.01)
        del store
        assert toys.wait() == [2]
        assert toys.out(1).startswith(f"InputError: rank 0 at 127.0.0.1:{port} and this process")


def test_a_rank_without_a_key_says_so(tmp_path):
    with members(tmp_path, 2, SOON_S, only=(0,), FASTBERT_RENDEZVOUS_KEY="short") as toys:
        assert toys.wait() == [2]
        assert toys.out(0).startswith(
            "InputError: FASTBERT_RENDEZVOUS_KEY has 5 characters; must have at least 32"
        )


STRANGE = [b'["bye", 0]', b'["gone", "\x1b[2J", 7]', b"\xff\x00", b"", b"{", b"[" * (7 << 20)]


def test_a_stranger_does_not_keep_ranks_from_meeting(tmp_path):
    """A stranger writes to every key that can be guessed before the ranks come, and again later."""
    agent: Any = hold_store("127.0.0.1", 0)
    stranger: Any = dist.PrefixStore(
        "fastbert",
        dist.TCPStore("127.0.0.1", agent.port, None, False, timeout=timedelta(seconds=NEVER_S)),
    )

    def scribble(value: bytes) -> None:
        for place in (
            "register/0",
            "register/1",
            "register/2",
            "0",
            "1",
            "roster",
            "meeting/1/all",
            "watch/failure",
        ):
            stranger.set(place, value)
        stranger.check(["roster"])

    given: Any = {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    scribble(STRANGE[0])
    with members(tmp_path, 3, only=(0, 1), **given) as toys:
        entered(toys, 1, toys.pid(1))
        (prefix,) = {
            key.split("/")[1]
            for key in agent.list_keys()
            if key.endswith("/1") and key.count("/") == 2 and "/register/" not in key
        }
        for value in STRANGE:
            scribble(value)
            for place in (
                "roster",
                "2",
                "meeting/1/all",
                "meeting/1/2",
                "meeting/1/read/1",
                "meeting/2/all",
                "watch/failure",
                "watch/1",
            ):
                stranger.set(f"{prefix}/{place}", value)
        stranger.check(["roster"])
        toys.start([2])
        assert toys.wait() == [0, 0, 0], [toys.err(rank) + toys.out(rank) for rank in range(3)]
    del agent


def test_a_registration_that_is_overwritten_is_repeated(tmp_path):
    """Rank 1 waits for rank 0, which comes later and finds a stranger's value."""
    agent: Any = hold_store("127.0.0.1", 0)
    given: Any = {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with members(tmp_path, 2, only=(1,), **given) as toys:
        agent.wait(["fastbert/register/1"])
        agent.set("fastbert/register/1", b'["bye", 0]')
        toys.start([0])
        assert toys.wait() == [0, 0]
    del agent


def test_what_was_signed_for_an_earlier_attempt_is_refused(tmp_path):
    """A stranger copies all messages between the ranks and replays them in the next attempt.

    gloo's own keys are not signed.
    """
    agent: Any = hold_store("127.0.0.1", 0)
    given: Any = {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    (tmp_path / "first").mkdir()
    with members(tmp_path / "first", 2, **given) as toys:
        assert toys.wait() == [0, 0]
    (old,) = {key.split("/")[1] for key in agent.list_keys() if key.endswith("/roster")}
    places = [
        key.split("/", 2)[2] for key in agent.list_keys() if key.startswith(f"fastbert/{old}/")
    ]
    copies = {
        place: agent.get(f"fastbert/{old}/{place}")
        for place in places
        if place.split("/")[0] in ("roster", "meeting")
    }
    assert {"roster", "meeting/1/0", "meeting/1/all"} <= set(copies)
    with members(tmp_path, 3, only=(0, 1), **given) as toys:
        entered(toys, 1, toys.pid(1))
        prefixes = {
            key.split("/")[1]
            for key in agent.list_keys()
            if key.endswith("/0") and key.count("/") == 2
        }
        (prefix,) = prefixes - {old, "register"}
        for place, value in copies.items():
            agent.set(f"fastbert/{prefix}/{place}", value)
        agent.check(["fastbert"])
        toys.start([2])
        assert toys.wait() == [0, 0, 0], [toys.err(rank) + toys.out(rank) for rank in range(3)]
        assert (
            "gathered [{'rank': 0, 'text': ''}, {'rank': 1, 'text': 'é'}, "
            "{'rank': 2, 'text': 'éé'}]" in toys.out(0)
        )
    del agent


WRONG = {
    "RANK": ({"RANK": "3"}, "RANK = 3, but WORLD_SIZE is not set"),
    "no RANK": ({"WORLD_SIZE": "2"}, "RANK is not set, but WORLD_SIZE = 2"),
    "RANK too large": (
        {"WORLD_SIZE": "2", "RANK": "2"},
        "RANK = 2; must be less than 2 (WORLD_SIZE = 2)",
    ),
    "WORLD_SIZE": (
        {"WORLD_SIZE": "two"},
        "WORLD_SIZE = 'two'; must be a whole number of 1 or more",
    ),
    "no world": ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
    "no MASTER_ADDR": (
        {"WORLD_SIZE": "2", "RANK": "0"},
        "MASTER_ADDR is not set, but WORLD_SIZE = 2",
    ),
    "no LOCAL_RANK": (
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"},
        "LOCAL_RANK is not set",
    ),
    "LOCAL_RANK": (
        {
            "WORLD_SIZE": "4",
            "RANK": "3",
            "MASTER_ADDR": "x",
            "LOCAL_RANK": "2",
            "LOCAL_WORLD_SIZE": "2",
        },
        "LOCAL_RANK = 2; must be less than 2 (LOCAL_WORLD_SIZE = 2)",
    ),
    "LOCAL_SIZE": (
        {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "x", "LOCAL_RANK": "0", "LOCAL_SIZE": "8"},
        "LOCAL_SIZE = 8; must be less than 5 (WORLD_SIZE = 4)",
    ),
    "no MASTER_PORT": (
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "LOCAL_RANK": "0"},
        "MASTER_PORT is not set",
    ),
    "MASTER_PORT": (
        {
            "WORLD_SIZE": "2",
            "RANK": "0",
            "MASTER_ADDR": "x",
            "LOCAL_RANK": "0",
            "MASTER_PORT": "99999",
        },
        "MASTER_PORT = 99999",
    ),
    "srun": (
        {"SLURM_STEP_NUM_TASKS": "8"},
        "SLURM_STEP_NUM_TASKS = 8: srun has started several processes, but WORLD_SIZE is not set",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_variables_are_named(monkeypatch, case):
    variables, message = WRONG[case]
    for name in (*LAUNCHER, "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        read_launch_env()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "several"), [(None, False), ("", False), ("1", False), ("2", True)]
)
def test_whether_a_launcher_has_started_several_processes(monkeypatch, value, several):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("WORLD_SIZE", value)
    assert launched() is several


@pytest.mark.parametrize("value", ["two", "1_0", "２", "-2", "0", "1.0"])
def test_a_world_size_that_is_no_number_is_named(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(InputError, match=f"WORLD_SIZE = '{value}'; must be a whole number of 1"):
        launched()


def test_no_interface_at_all_is_one_line():
    """A new network namespace only has the loopback interface, and that is down."""
    script = "from fastbert.cluster.group import join\nwith join(5): pass"
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"]).returncode != 0:
        pytest.skip("no namespaces here")
    done = subprocess.run(
        [*alone, sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "InputError: no network interface is up" in done.stderr
    assert "start it with: ip link set lo up" in done.stderr
