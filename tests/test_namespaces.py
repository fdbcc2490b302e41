"""Nodes made of namespaces are separate except for the cable, and leave no trace."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from tests.namespaces import Nodes, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ROOT = Path(__file__).parents[1]
SERVE = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as server:
    print("listening", flush=True)
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"x" * int(sys.argv[2]))
"""
FETCH = """
import socket, sys
with socket.create_connection(("node1", 7000), timeout=5) as connection:
    print(sum(map(len, iter(lambda: connection.recv(65536), b""))))
"""


def gone(marker: str) -> bool:
    """Return whether no process has this word in its command line, within a generous time."""
    deadline = time.monotonic() + 60
    while any(
        marker in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])
    ):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_nodes_have_names_and_reach_each_other_through_their_cables():
    with Nodes(2) as nodes:
        assert [node.run(["hostname"]).strip() for node in (nodes[0], nodes[1])] == [
            "node0",
            "node1",
        ]
        server = nodes[1].popen(
            [sys.executable, "-c", SERVE, nodes[1].address, "100000"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout and server.stdout.readline() == "listening\n"
        (listener,) = nodes[1].listening()
        assert (listener.address, listener.port) == (
            nodes[1].address,
            7000,
        ) and "-c" in listener.command
        assert nodes[0].listening() == []
        before = nodes[0].sent_bytes(), nodes[1].sent_bytes()
        assert nodes[0].run([sys.executable, "-c", FETCH]) == "100000\n"
        assert (
            0
            < nodes[0].sent_bytes() - before[0]
            < 100_000
            <= nodes[1].sent_bytes() - before[1]
            < 120_000
        )
        nodes.cut(1)
        with pytest.raises(subprocess.CalledProcessError) as refused:
            nodes[0].run([sys.executable, "-c", FETCH])
        assert "TimeoutError" in refused.value.stderr
        nodes.reconnect(1)
        assert nodes[0].run([sys.executable, "-c", FETCH]) == "100000\n"


def test_signals_reach_the_command_and_its_exit_code_comes_back():
    note = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "print('ready', flush=True); time.sleep(60)"
    )
    with Nodes(1) as nodes:
        assert nodes[0].popen(["sh", "-c", "exit 3"]).wait(20) == 3
        process = nodes[0].popen([sys.executable, "-c", note], stdout=subprocess.PIPE, text=True)
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)
        process.terminate()
        assert process.wait(20) == 75
        stopped = nodes[0].popen(["sleep", "60"])
        stopped.send_signal(signal.SIGSTOP)
        stopped.kill()
        assert stopped.wait(20) == -signal.SIGKILL


def test_a_killed_node_has_no_process_left_and_can_start_new_ones():
    with Nodes(2) as nodes:
        parent = nodes[0].popen(["sh", "-c", "setsid sleep 60 & sleep 60"])
        other = nodes[1].popen(["sleep", "60"])
        while len(nodes[0].processes()) < 3:
            time.sleep(0.01)
        nodes[0].kill()
        assert nodes[0].processes() == [] and parent.wait(20) == -signal.SIGKILL
        assert other.poll() is None and len(nodes[1].processes()) == 1
        assert nodes[0].run(["hostname"]) == "node0\n"


@pytest.mark.parametrize("end", ["leave", "raise", "kill"])
def test_nothing_is_left_however_the_test_ends(end):
    marker = uuid.uuid4().hex
    script = f"""
import os, signal, sys
from tests.namespaces import Nodes
with Nodes(2) as nodes:
    nodes[1].popen(["sh", "-c", "setsid sleep 60 & wait # {marker}"])
    print("there", flush=True)
    sys.stdin.read()
    if {end!r} == "raise": raise SystemExit(3)
    if {end!r} == "kill": os.kill(os.getpid(), signal.SIGKILL)
"""
    test = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert test.stdin and test.stdout and test.stdout.readline() == "there\n"
    below = psutil.Process(test.pid).children(recursive=True)
    # The waiting processes of the switch and the nodes, and the process that was started in one.
    assert len(below) >= 3 + 3
    test.stdin.close()
    assert test.wait(60) == {"leave": 0, "raise": 3, "kill": -signal.SIGKILL}[end]
    test.stdout.close()
    assert gone(marker)
    assert psutil.wait_procs(below, timeout=60)[1] == []
