"""`torchrun --rdzv-backend fastbert`: where it listens, when nodes are let in, and what happens when one is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType

import psutil
import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from fastbert.training import rendezvous
from fastbert.training.meeting import hold_store
from tests.ranks import PATIENCE_S, environment, free_port
from tests.toy_ranks import FORKED, listening

QUICK = {"keep_alive_interval": 1, "keep_alive_max_attempt": 8, "last_call_timeout": 1}  # fewer, and a busy machine looks like a lost one


def parameters(port: int, host: str = "127.0.0.1", least: int = 1, **more) -> RendezvousParameters:
    return RendezvousParameters("fastbert", f"{host}:{port}", "a-run", least, 2, **{**QUICK, **more})


@pytest.fixture(autouse=True)
def _variables(monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")  # which handlers set: restored afterwards


def test_torchrun_finds_it():
    (entry,) = [entry for entry in entry_points(group="torchrun.handlers") if entry.name == "fastbert"]
    assert entry.value == "fastbert.training.rendezvous:handler"
    handler = get_rendezvous_handler(parameters(free_port()))
    assert handler.get_backend() == "fastbert" and not handler.use_agent_store


def test_its_import_is_light():
    """torchrun makes it at every start, also where another backend is asked for."""
    code = "import sys, fastbert.training.rendezvous; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'psutil')))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=PATIENCE_S).returncode == 0


def test_defaults_and_options():
    handler = get_rendezvous_handler(RendezvousParameters("fastbert", f"localhost:{free_port()}", "a-run", 1, 2, keep_alive_interval="7"))
    assert handler.settings.keep_alive_interval.seconds == 7  # as --rdzv-conf gives it
    assert handler.settings.keep_alive_max_attempt == 5
    assert handler.settings.timeout.last_call.seconds == 10


def test_it_listens_on_the_endpoint_alone():
    before, port = listening(os.getpid()), free_port()
    handlers = [get_rendezvous_handler(parameters(port)) for _ in range(2)]  # the second one reaches the first one's store
    assert {(address, number) for _, address, number in listening(os.getpid()) - before} == {("127.0.0.1", port)}
    del handlers


def meet(*handlers: RendezvousHandler) -> list[tuple[int, int, str, int]]:
    """Rank, size, and where rank 0's worker will make its store, as each node is told."""
    found: dict[int, tuple[int, int, str, int]] = {}

    def run(i: int) -> None:
        info = handlers[i].next_rendezvous()
        found[i] = info.rank, info.world_size, info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(handlers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return [found[i] for i in range(len(handlers))]


def test_nodes_meet_again_and_again():
    """With torch's c10d a node that comes later is never told where the store is: rank 0 says it only once."""
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
        RendezvousConnectionError, match=r"--rdzv-endpoint 192\.0\.2\.1:29400: after 1 s, nobody listens on 192\.0\.2\.1; is it"
    ):
        get_rendezvous_handler(parameters(29400, host="192.0.2.1", join_timeout=1))


def test_a_name_that_nobody_knows():
    with pytest.raises(RendezvousConnectionError, match=r"--rdzv-endpoint nowhere\.invalid:29400: after 1 s, .*[Nn]ame"):
        get_rendezvous_handler(parameters(29400, host="nowhere.invalid", join_timeout=1))


def test_a_host_that_cannot_listen():
    store = hold_store("127.0.0.1", 0)
    with pytest.raises(RendezvousConnectionError, match=f"127.0.0.1:{store.port}: cannot listen on 127.0.0.1: .*in use"):
        get_rendezvous_handler(parameters(store.port, is_host="1"))


def hold(connection) -> None:
    """A process that holds a store, and is stopped when it is told to."""
    store = hold_store("127.0.0.1", 0)
    connection.send(store.port)
    connection.recv()
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_store_that_falls_silent(monkeypatch):
    """torch's own would wait until TCP gives up, a quarter of an hour, and with it the agent of a node that is cut off."""
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.0)
    ours, theirs = FORKED.Pipe()
    holder = FORKED.Process(target=hold, args=(theirs,))
    holder.start()
    try:
        handler = get_rendezvous_handler(parameters(ours.recv(), is_host="0"))
        assert handler.num_nodes_waiting() == 0
        ours.send("stop")
        with pytest.raises(RendezvousConnectionError, match=r"the store of --rdzv-endpoint 127\.0\.0\.1:\d+ does not answer"):
            while True:
                handler.num_nodes_waiting()
    finally:
        holder.kill()
        holder.join()


WORKER = """
import sys, time
import torch
from pathlib import Path
from fastbert.training.group import join
from fastbert.training.meeting import RankLost
from fastbert.training.watch import Watch
from tests.toy_ranks import say
try:
    with join(60) as group, Watch(group, 60) as watch:
        say("rank", group.rank, "of", group.world)
        while not group.sum(torch.tensor([1.0 * Path("enough").exists()])):
            watch.tick("a step")
            time.sleep(0.1)
except RankLost:
    sys.exit(1)
"""


class Node:
    """A torchrun with one worker; `--nnodes 1:2`. Leaving kills both."""

    def __init__(self, folder: Path, port: int, name: str):
        self._out = folder / f"{name}.out"
        conf = ",".join(f"{key}={value}" for key, value in QUICK.items())
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--max-restarts", "3", "--rdzv-backend", "fastbert"]
        command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "a-run", "--rdzv-conf", conf, "worker.py"]
        with open(self._out, "w") as out:
            self._agent = subprocess.Popen(command, cwd=folder, env=environment(), stdout=out, stderr=subprocess.STDOUT)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lose_power()

    @property
    def family(self) -> list[psutil.Process]:
        return [agent := psutil.Process(self._agent.pid), *agent.children(recursive=True)] if self._agent.poll() is None else []

    def lose_power(self) -> None:
        for process in self.family:
            process.kill()
        self._agent.wait(PATIENCE_S)

    def wait(self) -> int:
        return self._agent.wait(PATIENCE_S)

    def until(self, *worlds: int) -> None:
        """Return when its worker has been in worlds of these sizes, one after the other."""
        end = time.monotonic() + PATIENCE_S
        while [int(line.split()[-1]) for line in self._out.read_text().splitlines() if line.startswith("rank ")] != list(worlds):
            assert time.monotonic() < end and self._agent.poll() is None, self._out.read_text()
            time.sleep(0.05)


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
