"""`torchrun --rdzv-backend fastbert`: where it listens, and how nodes join, leave and are lost."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest
from torch.distributed import DistStoreError, PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _BackendRendezvousStateHolder
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.utils.store import barrier

from fastbert.cluster import torchrun_backend as rendezvous
from fastbert.cluster.rendezvous import hold_store, listens
from fastbert.cluster.signature import SIGNATURE, Key, find_key
from fastbert.cluster.torchrun_rounds import SignedRounds
from tests.ranks import PATIENCE_S, environment, free_port
from tests.toy_ranks import FORKED, listening

# With fewer attempts, a busy node would look like a lost one; so would one that is slow to close.
QUICK = {
    "keep_alive_interval": 1,
    "keep_alive_max_attempt": 8,
    "last_call_timeout": 1,
    "close_timeout": 120,
}


def parameters(port: int, host: str = "127.0.0.1", least: int = 1, **more) -> RendezvousParameters:
    return RendezvousParameters(
        "fastbert", f"{host}:{port}", "a-run", least, 2, **{**QUICK, **more}
    )


@pytest.fixture(autouse=True)
def _variables(monkeypatch):
    # Handlers set it, so it is restored afterwards.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")


def test_torchrun_finds_it():
    (entry,) = [
        entry for entry in entry_points(group="torchrun.handlers") if entry.name == "fastbert"
    ]
    assert entry.value == "fastbert.cluster.torchrun_backend:handler"
    handler = get_rendezvous_handler(parameters(free_port()))
    assert handler.get_backend() == "fastbert" and not handler.use_agent_store


def test_its_import_is_light():
    """torchrun imports it at every start, also where another backend is used."""
    code = (
        "import sys, fastbert.cluster.torchrun_backend; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'psutil')))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=environment(), timeout=PATIENCE_S
        ).returncode
        == 0
    )


def test_defaults_and_options():
    handler = get_rendezvous_handler(
        RendezvousParameters(
            "fastbert", f"localhost:{free_port()}", "a-run", 1, 2, keep_alive_interval="7"
        )
    )
    assert handler.settings.keep_alive_interval.seconds == 7  # the value of --rdzv-conf
    assert handler.settings.keep_alive_max_attempt == 5
    assert handler.settings.timeout.last_call.seconds == 10


def test_it_listens_on_the_endpoint_alone():
    before, port = listening(os.getpid()), free_port()
    # The second one reaches the first one's store.
    handlers = [get_rendezvous_handler(parameters(port)) for _ in range(2)]
    assert {(address, number) for _, address, number in listening(os.getpid()) - before} == {
        ("127.0.0.1", port)
    }
    del handlers


def meet(*handlers: RendezvousHandler) -> list[tuple[int, int, str, int]]:
    """Return rank, size and the address of rank 0's store, as each node receives them."""
    found: dict[int, tuple[int, int, str, int]] = {}

    def run(i: int) -> None:
        info = handlers[i].next_rendezvous()
        found[i] = (
            info.rank,
            info.world_size,
            info.bootstrap_store_info.master_addr,
            info.bootstrap_store_info.master_port,
        )

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(handlers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return [found[i] for i in range(len(handlers))]


def test_nodes_meet_again_and_again():
    """torch's c10d sends the store's address only once, so a late node never gets it."""
    port = free_port()
    first, second = (get_rendezvous_handler(parameters(port)) for _ in range(2))
    (alone,) = meet(first)
    assert alone[:3] == (0, 1, "127.0.0.1")
    waiting = threading.Thread(target=lambda: found.extend(meet(second)), daemon=True)
    found: list = []
    waiting.start()
    end = time.monotonic() + PATIENCE_S
    while first.num_nodes_waiting() == 0:
        assert time.monotonic() < end
        time.sleep(0.05)
    (again,) = meet(first)
    waiting.join(PATIENCE_S)
    assert {again[0], found[0][0]} == {0, 1}
    assert again[1:] == found[0][1:] == (2, "127.0.0.1", again[3])
    for handler in (first, second):
        handler.shutdown()


def test_an_endpoint_where_nobody_listens():
    with pytest.raises(
        RendezvousConnectionError,
        match=r"--rdzv-endpoint 192\.0\.2\.1:29400: after 1 s, nobody listens on 192\.0\.2\.1; is "
        r"it",
    ):
        get_rendezvous_handler(parameters(29400, host="192.0.2.1", join_timeout=1))


def test_a_name_that_nobody_knows():
    with pytest.raises(
        RendezvousConnectionError,
        match=r"--rdzv-endpoint nowhere\.invalid:29400: after 1 s, .*[Nn]ame",
    ):
        get_rendezvous_handler(parameters(29400, host="nowhere.invalid", join_timeout=1))


def test_a_host_that_cannot_listen():
    store = hold_store("127.0.0.1", 0)
    with pytest.raises(
        RendezvousConnectionError,
        match=f"127.0.0.1:{store.port}: cannot listen on 127.0.0.1: .*in use",
    ):
        get_rendezvous_handler(parameters(store.port, is_host="1"))


OTHER_KEY = "another key, with 32 characters or more"
ANOTHER_KEY = (
    "fastbert: --rdzv-endpoint 127.0.0.1:{port}: the nodes that are there and this process "
    "(FASTBERT_RENDEZVOUS_KEY) do not have the same key, which every process of a run needs; where "
    "the nodes do not share home directories, set FASTBERT_RENDEZVOUS_KEY to the same value on "
    "each of them, or copy ~/.fastbert/rendezvous.key to each\n"
)


def test_a_node_with_another_key_is_turned_away(capfd):
    """It gets one line, and the others are not disturbed."""
    port = free_port()
    first = get_rendezvous_handler(parameters(port, least=2))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setenv("FASTBERT_RENDEZVOUS_KEY", OTHER_KEY)
        get_rendezvous_handler(parameters(port, least=2))
    assert ended.value.code == 2
    assert capfd.readouterr().err == ANOTHER_KEY.format(port=port)
    second = get_rendezvous_handler(parameters(port, least=2))
    assert {found[:2] for found in meet(first, second)} == {(0, 2), (1, 2)}
    assert capfd.readouterr().err == ""
    for handler in (first, second):
        handler.shutdown()


def hold(connection) -> None:
    """Hold a store in a process that a test stops."""
    store = hold_store("127.0.0.1", 0)
    connection.send(store.port)
    connection.recv()
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_store_that_stops_answering(monkeypatch):
    """torch's own backend would wait about a quarter of an hour, until TCP gives up.

    The agent of a node that is cut off would wait as long.
    """
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.0)
    ours, theirs = FORKED.Pipe()
    holder = FORKED.Process(target=hold, args=(theirs,))
    holder.start()
    try:
        handler = get_rendezvous_handler(parameters(ours.recv(), is_host="0"))
        assert handler.num_nodes_waiting() == 0
        ours.send("stop")
        with pytest.raises(
            RendezvousConnectionError,
            match=r"the store of --rdzv-endpoint 127\.0\.0\.1:\d+ does not answer",
        ):
            while True:
                handler.num_nodes_waiting()
    finally:
        holder.kill()
        holder.join()


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self._path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (self._path, os.O_CREAT)


STATE = "torch.rendezvous.a-run"


def stranger_at(port: int) -> Any:
    """Connect as a stranger who reaches the port and has no key."""
    return TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=PATIENCE_S))


def put(stranger: Any, value: bytes, place: str = STATE) -> None:
    stranger.set(place, value)
    stranger.check([place])  # `set` does not wait until it is done


def test_a_trap_works(tmp_path):
    """torch itself would run it; otherwise the tests below would show nothing."""
    store = hold_store("127.0.0.1", 0)
    backend = C10dRendezvousBackend(store, "a-run")
    put(stranger_at(store.port), b64encode(pickle.dumps(Trap(tmp_path / "trapped"))))
    holder = _BackendRendezvousStateHolder(
        backend, get_rendezvous_handler(parameters(free_port())).settings
    )
    with suppress(AttributeError):  # the result is not a state
        holder.sync()
    assert (tmp_path / "trapped").exists()


def forgeries(stranger: Any, trap: Path) -> dict[str, bytes]:
    """Values that a stranger may write over the state; none may be unpickled or accepted."""
    state, pickled, key = stranger.get(STATE), pickle.dumps(Trap(trap)), find_key()
    content = key.verify(STATE, state)
    assert content is not None
    start, later = content[:16], (2**40).to_bytes(8, "big")  # the nodes continue to count
    return {
        "a pickle as torch would have it": b64encode(pickled),
        "a pickle": pickled,
        "one behind the signature of a state": state[:SIGNATURE] + start + later + pickled,
        "one signed by another key": Key(OTHER_KEY.encode(), "").sign(
            STATE, start + later + pickled
        ),
        "one signed for another run": key.sign(
            "torch.rendezvous.another-run", start + later + pickled
        ),
        "one signed for another place": key.sign("fastbert/roster", start + later + pickled),
        "one of an earlier run with this id": key.sign(STATE, b"x" * 16 + later + pickled),
        "one that is older": key.sign(STATE, start + (0).to_bytes(8, "big") + pickled),
        "a signed value that is too short": key.sign(STATE, start),
        "a state that is cut short": state[:-1],
        "torch's word for no state": b"Y2FuaW1hZGFt",
        "nothing": b"",
        "no text": b"\xff\x00",
        "as large as it can be": b"=" * (8 * 2**20 - 1000),
    }


def test_nodes_meet_whatever_a_stranger_writes(tmp_path, capfd):
    """A stranger overwrites the state of connected nodes, and another node can still join."""
    port, trap = free_port(), tmp_path / "trapped"
    handlers = [get_rendezvous_handler(parameters(port, least=2)) for _ in range(2)]
    assert {found[:2] for found in meet(*handlers)} == {(0, 2), (1, 2)}
    stranger = stranger_at(port)
    for name, value in forgeries(stranger, trap).items():
        before = stranger.get(STATE)
        put(stranger, value)
        end = time.monotonic() + PATIENCE_S
        while stranger.get(STATE) == value:  # the nodes' heartbeats overwrite it
            assert time.monotonic() < end, name
            time.sleep(0.05)
        assert handlers[0].num_nodes_waiting() == 0 and not handlers[1].is_closed(), name
        content, after = (
            find_key().verify(STATE, state) for state in (before, stranger.get(STATE))
        )
        assert (
            content is not None
            and after is not None
            and content[:16] == after[:16]
            and content[16:24] <= after[16:24]
        ), name
    stranger.delete_key(STATE)
    end = time.monotonic() + PATIENCE_S
    while not stranger.check([STATE]):
        assert time.monotonic() < end
        time.sleep(0.05)
    put(stranger, b"x")
    third = get_rendezvous_handler(parameters(port, least=2))
    assert third.num_nodes_waiting() == 0
    handlers[0].shutdown()
    end = time.monotonic() + PATIENCE_S
    while not (handlers[1].is_closed() and third.is_closed()):  # they read it once per second
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not trap.exists()
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fastbert: ")]
    one = (
        f"fastbert: --rdzv-endpoint 127.0.0.1:{port}: somebody without the key of this run has "
        "written over the state of the rendezvous; "
    )
    assert said == [one + "it was refused and put back, and the run continues (reported once)"] * 2
    for handler in (handlers[1], third):
        handler.shutdown()


def test_a_write_meets_a_strangers(tmp_path):
    """A stranger writes between a node's last read and its write.

    The node's write is rejected, and the node tries again.
    """
    port = free_port()
    handler = get_rendezvous_handler(parameters(port))
    backend = handler._state_holder._backend  # type: ignore[attr-defined]
    stranger = stranger_at(port)
    assert backend.get_state() is None
    for count, value in enumerate([b64encode(pickle.dumps(Trap(tmp_path / "trapped"))), None, b""]):
        token = None if count == 0 else backend.get_state()[1]
        stranger.delete_key(STATE) if value is None else put(stranger, value)
        last = b"state %d" % count
        found = backend.set_state(b"state %d" % (count + 1), token)
        assert found is None if count == 0 else (found[0], found[2]) == (last, False)
        known = backend.get_state()
        assert backend.set_state(b"state %d" % (count + 1), known and known[1])[::2] == (
            b"state %d" % (count + 1),
            True,
        )
        if known is not None:
            assert backend.set_state(b"with an old token", known[1])[::2] == (
                b"state %d" % (count + 1),
                False,
            )
        assert backend.set_state(b"with no token", None)[::2] == (b"state %d" % (count + 1), False)
    assert not (tmp_path / "trapped").exists()


# Messages of agents in a round, and values that a stranger may have written before.
ROUND = {
    "MASTER_ADDR": b"192.0.2.1",
    "MASTER_PORT": b"1",
    "torchelastic/role_info/0": b"[",
    "torchelastic/role_info/1": b'{"role": "default", "rank": 1, "local_world_size": 1000000}',
    "torchelastic/assigned_ranks/0": b"[1, 2, 1, 2]",
    "torchelastic/assigned_ranks/1": b"no JSON",
    "torchelastic/agent/terminal_state/num_members": b"no number",
    "torchelastic/agent/terminal_state/last_member": b"",
}


def poison_rounds(port: int) -> None:
    """Write to the keys of all future rounds, as a stranger who is faster than the nodes."""
    stranger = stranger_at(port)
    for i in range(10):
        for name, value in ROUND.items():
            put(stranger, value, f"{STATE}.{i}/{name}")


def test_nodes_believe_no_stranger_about_a_round():
    port = free_port()
    handlers = [get_rendezvous_handler(parameters(port, least=2)) for _ in range(2)]
    poison_rounds(port)
    found = meet(*handlers)
    assert {(rank, world, address) for rank, world, address, _ in found} == {
        (0, 2, "127.0.0.1"),
        (1, 2, "127.0.0.1"),
    }
    assert found[0][3] == found[1][3] != 1
    for handler in handlers:
        handler.shutdown()


@pytest.fixture
def signed_rounds() -> Callable[[Any], PrefixStore]:
    """Wrap a store as torch's handler does.

    Like the handler, this fixture keeps the wrapped store alive.
    """
    kept = []

    def make(store: Any) -> PrefixStore:
        kept.append(SignedRounds(store, find_key(), "a start"))
        return PrefixStore("a-round", kept[-1])

    return make


def test_the_values_of_a_round(signed_rounds):
    """torch's agent reads and writes them through a prefix."""
    store = hold_store("127.0.0.1", 0)
    ours, theirs = signed_rounds(store), signed_rounds(stranger_at(store.port))
    ours.set("text", "a value")
    ours.multi_set(["bytes", "é"], [b"\xff\0", "é"])
    assert theirs.multi_get(["text", "bytes", "é"]) == [b"a value", b"\xff\0", "é".encode()]
    assert theirs.check(["text", "é"]) and not theirs.check(["text", "absent"])
    late = threading.Timer(0.3, lambda: ours.set("late", "come"))
    late.start()
    assert theirs.get("late") == b"come"
    theirs.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(
        DistStoreError, match=r"after 0\.2 s no node with the run's key has written a-round/absent$"
    ):
        theirs.multi_get(["text", "absent"])
    stranger = stranger_at(store.port)
    for name, value in {
        "unsigned": b"a value",
        "moved": stranger.get("a-round/text"),
        "of another start": SignedRounds(store, find_key(), "another start")._sign(
            "a-round/of another start", "a value"
        ),
    }.items():
        put(stranger, value, f"a-round/{name}")
        assert not ours.check([name])
        with pytest.raises(DistStoreError):
            theirs.wait([name], timedelta(seconds=0.1))


def test_agents_count_each_other_whatever_a_stranger_writes(signed_rounds):
    store = hold_store("127.0.0.1", 0)
    stranger = stranger_at(store.port)
    put(stranger, b"no number", "a-round/x/num_members")
    put(stranger, b"", "a-round/x/last_member")
    through, lock = [], threading.Lock()

    agents = [signed_rounds(stranger_at(store.port)) for _ in range(8)]

    def run(i: int) -> None:
        barrier(agents[i], 8, "x", barrier_timeout=PATIENCE_S)
        with lock:
            through.append(i)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(8)]
    for thread in threads[:-1]:
        thread.start()
    time.sleep(0.5)
    assert through == []
    threads[-1].start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(through) == list(range(8))


WORKER = """
import sys, time
import torch
from pathlib import Path
from fastbert.cluster.group import join
from fastbert.cluster.rendezvous import RankLost
from fastbert.cluster.watchdog import Watchdog
from tests.toy_ranks import say
try:
    with join(60) as group, Watchdog(group, 60) as watch:
        say("rank", group.rank, "of", group.world)
        while not group.sum(torch.tensor([1.0 * Path("enough").exists()])):
            watch.tick("a step")
            time.sleep(0.1)
except RankLost:
    sys.exit(1)
"""


class Node:
    """A torchrun with one worker. Leaving kills both.

    Args:
        folder: the folder with worker.py.
        port: the port of the endpoint.
        name: the name of the file for their output.
        nodes: the value of --nnodes.
        more: further environment variables.
    """

    def __init__(self, folder: Path, port: int, name: str, nodes: str = "1:2", **more: str):
        self._out = folder / f"{name}.out"
        conf = ",".join(f"{key}={value}" for key, value in QUICK.items())
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            nodes,
            "--max-restarts",
            "3",
            "--rdzv-backend",
            "fastbert",
        ]
        command += [
            "--rdzv-endpoint",
            f"127.0.0.1:{port}",
            "--rdzv-id",
            "a-run",
            "--rdzv-conf",
            conf,
            "worker.py",
        ]
        with open(self._out, "w") as out:
            self._agent = subprocess.Popen(
                command, cwd=folder, env=environment(**more), stdout=out, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.lose_power()

    @property
    def family(self) -> list[psutil.Process]:
        return (
            [agent := psutil.Process(self._agent.pid), *agent.children(recursive=True)]
            if self._agent.poll() is None
            else []
        )

    @property
    def said(self) -> str:
        return self._out.read_text()

    def lose_power(self) -> None:
        for process in self.family:
            process.kill()
        self._agent.wait(PATIENCE_S)

    def wait(self) -> int:
        return self._agent.wait(PATIENCE_S)

    def until(self, *worlds: int) -> None:
        """Return when its worker has been in worlds of these sizes, in turn."""
        end = time.monotonic() + PATIENCE_S
        while [
            int(line.split()[-1]) for line in self.said.splitlines() if line.startswith("rank ")
        ] != list(worlds):
            assert time.monotonic() < end and self._agent.poll() is None, self.said
            time.sleep(0.05)


@pytest.mark.slow
def test_a_node_is_lost_and_another_one_comes(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    port = free_port()
    with Node(tmp_path, port, "first") as first:
        first.until(1)
        with Node(tmp_path, port, "lost") as lost:
            lost.until(2)
            first.until(1, 2)
            ports = listening(*(process.pid for node in (first, lost) for process in node.family))
            assert {address for _, address, _ in ports} == {"127.0.0.1"}
        first.until(1, 2, 1)
        with Node(tmp_path, port, "new") as new:
            new.until(2)
            (tmp_path / "enough").touch()
            assert [first.wait(), new.wait()] == [0, 0]


def spring(port: int, trap: Path) -> Any:
    """Put a trap in place of the state, and return when a node has read it."""
    stranger, value = stranger_at(port), b64encode(pickle.dumps(Trap(trap)))
    stranger.wait([STATE])
    put(stranger, value)
    end = time.monotonic() + PATIENCE_S
    while stranger.get(STATE) == value and not trap.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    return stranger


@pytest.mark.slow
def test_no_code_of_a_stranger_is_run_while_it_trains(tmp_path):
    """The run is not disturbed either, and a later node joins normally."""
    (tmp_path / "worker.py").write_text(WORKER)
    port, trap = free_port(), tmp_path / "trapped"
    with Node(tmp_path, port, "first") as first:
        first.until(1)
        spring(port, trap)
        poison_rounds(port)
        assert not trap.exists()
        with Node(tmp_path, port, "second") as second:
            second.until(2)
            first.until(1, 2)
            spring(port, trap)
            (tmp_path / "enough").touch()
            assert [first.wait(), second.wait()] == [0, 0], first.said + second.said
        assert first.said.count("somebody without the key of this run") == 1
    assert not trap.exists()


@pytest.mark.slow
def test_no_code_of_a_stranger_is_run_while_it_waits(tmp_path):
    """It waits for another node, which comes when the trap is set."""
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "enough").touch()
    port, trap = free_port(), tmp_path / "trapped"
    with Node(tmp_path, port, "first", nodes="2") as first:
        end = time.monotonic() + PATIENCE_S
        while not listens("127.0.0.1", port):
            assert time.monotonic() < end and first.family, first.said
            time.sleep(0.05)
        spring(port, trap)
        with Node(tmp_path, port, "second", nodes="2") as second:
            assert [first.wait(), second.wait()] == [0, 0], first.said + second.said
    assert not trap.exists()


@pytest.mark.slow
def test_a_torchrun_with_another_key_is_turned_away(tmp_path):
    """It gets one line, and the others continue to train."""
    (tmp_path / "worker.py").write_text(WORKER)
    port = free_port()
    with Node(tmp_path, port, "first") as first:
        first.until(1)
        with Node(tmp_path, port, "odd", FASTBERT_RENDEZVOUS_KEY=OTHER_KEY) as odd:
            assert odd.wait() == 2
            assert odd.said == ANOTHER_KEY.format(port=port)
        with Node(tmp_path, port, "second") as second:
            second.until(2)
            first.until(1, 2)
            (tmp_path / "enough").touch()
            assert [first.wait(), second.wait()] == [0, 0]
        assert "somebody without the key" not in first.said


@pytest.mark.slow
def test_one_machine_needs_no_set_up(tmp_path):
    """The agent or a worker makes the key, and all processes read the same one.

    A second node that shares this home directory reads it too.
    """
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "enough").touch()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "fastbert",
    ]
    command += [
        "--rdzv-endpoint",
        f"127.0.0.1:{free_port()}",
        "--rdzv-conf",
        "last_call_timeout=1",
        "worker.py",
    ]
    variables = environment(HOME=str(tmp_path))
    variables.pop("FASTBERT_RENDEZVOUS_KEY", None)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(command, cwd=tmp_path, env=variables, **pipes) for _ in range(2)]
    said = [node.communicate(timeout=PATIENCE_S)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0] and all(
        f"rank {rank} of 4\n" in "".join(said) for rank in range(4)
    ), said
    assert (tmp_path / ".fastbert/rendezvous.key").stat().st_mode & 0o777 == 0o600


def test_a_node_without_a_place_for_its_key_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("FASTBERT_RENDEZVOUS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit) as ended:
        get_rendezvous_handler(parameters(free_port()))
    said = capfd.readouterr().err
    assert ended.value.code == 2 and said.startswith(
        f"fastbert: {tmp_path}/nowhere/.fastbert/rendezvous.key: the key of the rendezvous cannot "
        f"be kept there: No such"
    )
    assert len(said.splitlines()) == 1
