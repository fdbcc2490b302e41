"""Nodes of a cluster on one machine.

Each node has a network, processes and a hostname of its own, and a cable to a common switch.

A node is a set of Linux namespaces (network, processes, mounts, hostname), not a virtual machine.
It sees the same files and runs the same programs. It reaches the other nodes only through its
cable, an Ethernet interface `eth0`. The names `node0`, `node1`, ... resolve on every node. The
switch is a bridge in a network namespace of its own. The machine's own network is never touched.

Nothing needs cleaning up. All nodes live in one process namespace below a process that waits for a
pipe to close. The pipe closes when the context is left or when the test's process dies. That
process then ends, the kernel kills every process in the namespace and below, and the networks
vanish with the last process. No name is left anywhere in the system.

This works as root, and for other users where the system allows them user namespaces.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import psutil

NETWORK = "10.77.0"  # the same for every switch, since switches are separate
TOOLS = ("ip", "unshare", "nsenter", "mount", "sh")
PATIENCE_S = 60.0  # for operations that take milliseconds
T = TypeVar("T")

# The first commands of a node: it sets its hostname, makes the names of all nodes resolve, and
# waits. The bind mount keeps the file that it was made from.
NODE = """
set -e
hostname {name} 2>/dev/null || echo {name} > /proc/sys/kernel/hostname
mount -t tmpfs none /mnt
printf '%s\\n' {hosts} > /mnt/hosts
mount --bind /mnt/hosts /etc/hosts
umount /mnt
exec {wait}
"""

# The first process of a namespace inherits its orphans. It ignores SIGCHLD, so the kernel removes
# them at once. (dash cannot ignore SIGCHLD.)
WAIT = (
    "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
    "print('ready', flush=True); sys.stdin.read()"
)

# Prints the open ports of the namespace it runs in: a list of [address, port, command].
LISTENING = """
import json, psutil, shlex, socket
found = []
for c in psutil.net_connections("inet"):
    datagrams = c.type == socket.SOCK_DGRAM and not c.raddr
    if c.laddr and (c.status == psutil.CONN_LISTEN or datagrams):
        try:
            found.append((*c.laddr, shlex.join(psutil.Process(c.pid).cmdline()) if c.pid else "?"))
        except psutil.NoSuchProcess:
            pass
print(json.dumps(found))
"""


class Unavailable(RuntimeError):
    """This machine or this user's rights do not allow such nodes; the message says why."""


class Listener(NamedTuple):
    """A port that a process of a node has open to other processes."""

    address: str  # "0.0.0.0" and "::" are every interface
    port: int
    command: str  # the full command of the process


class Process(subprocess.Popen):
    """A process of a node.

    Signals go to the process itself. Its parent, the `nsenter` that Popen started, would not pass
    them on.
    """

    def send_signal(self, sig: int) -> None:
        if self.poll() is None and (inside := self.inside()):
            inside.send_signal(sig)
            if sig in (signal.SIGCONT, signal.SIGKILL):
                self.wake()

    def wake(self) -> None:
        """Continue nsenter, which stops when its child is stopped.

        It must run to notice when the child continues or ends.
        """
        if self.poll() is None:
            super().send_signal(signal.SIGCONT)

    def inside(self) -> psutil.Process | None:
        """Return the command itself, or None when it has ended.

        nsenter needs a few milliseconds to start it.
        """

        def find() -> list[psutil.Process] | None:
            try:
                return psutil.Process(self.pid).children() or (
                    [] if self.poll() is not None else None
                )
            except psutil.NoSuchProcess:
                return []

        return next(iter(_until(find, f"nsenter {self.pid} starts nothing")), None)


class Node:
    """One node; made by Nodes.

    Attributes:
        name: its hostname.
        address: the address of its `eth0`.
    """

    def __init__(self, name: str, address: str, first: psutil.Process, enter: list[str]):
        self.name, self.address = name, address
        self._first, self._enter = first, enter
        self._pid_namespace = os.readlink(f"/proc/{first.pid}/ns/pid")
        self._started: list[Process] = []

    def popen(
        self,
        command: Sequence[str | os.PathLike[str]],
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Process:
        """Start a command on this node, as subprocess.Popen does; leaving the context kills it."""
        # A process that enters another mount namespace starts at its root.
        at = os.path.abspath(options.pop("cwd", None) or os.getcwd())
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', at, *command]
        process = Process([*self._enter, *inside], env=env, **options)
        self._started.append(process)
        process.inside()  # so that a later call, for example kill(), finds it
        return process

    def run(
        self, command: Sequence[str | os.PathLike[str]], timeout: float = PATIENCE_S, **options: Any
    ) -> str:
        """Return the standard output of a command that must succeed."""
        with self.popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        ) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, list(command), out, err)
        return out

    def processes(self) -> list[psutil.Process]:
        """Return all processes of this node, in the order of their start."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    os.readlink(f"/proc/{process.pid}/ns/pid") == self._pid_namespace
                    and process.pid != self._first.pid
                ):
                    found.append((process.create_time(), process.pid, process))
            except (OSError, psutil.Error):
                continue  # it has ended in the meantime
        return [process for *_, process in sorted(found)]

    def kill(self) -> None:
        """Kill every process of this node at once with SIGKILL, as a power failure would.

        The node itself stays, and new processes can be started on it.
        """
        # kill -1 reaches all processes at once, so none of them sees another one die. The shell
        # and the node's first process are spared.
        subprocess.run([*self._enter, "sh", "-c", "kill -9 -1"], check=True, timeout=PATIENCE_S)
        for process in self._started:
            process.wake()
        _until(
            lambda: None if self.processes() else True, f"{self.name}: processes outlive kill -9"
        )

    def listening(self) -> list[Listener]:
        """Return the TCP ports in LISTEN and the UDP ports open to any sender, of all processes."""
        return sorted(
            Listener(*found) for found in json.loads(self.run([sys.executable, "-c", LISTENING]))
        )

    def sent_bytes(self) -> int:
        """Return the bytes sent through the cable since the node was made, headers included."""
        with open(f"/proc/{self._first.pid}/net/dev") as file:
            (counts,) = (
                line.split(":")[1].split() for line in file if line.strip().startswith("eth0:")
            )
        return int(counts[8])


class Nodes:
    """Context manager for `count` nodes on one switch; `node0` has the address 10.77.0.1, etc.

    Raises:
        Unavailable: on entering, where such nodes cannot be made.
    """

    def __init__(self, count: int):
        self._names = [f"node{i}" for i in range(count)]
        self._nodes: list[Node] = []
        self._waiting: list[subprocess.Popen] = []  # processes that wait for their pipe to close

    def __enter__(self) -> Nodes:
        if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
            raise Unavailable(f"{missing[0]} is not installed")
        try:
            self._build()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tear_down()

    def __getitem__(self, i: int) -> Node:
        return self._nodes[i]

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes)

    def cut(self, i: int) -> None:
        """Pull node i's cable: no packet reaches or leaves it, and no process is notified."""
        self._ip("link", "set", self._names[i], "down")

    def reconnect(self, i: int) -> None:
        """Plug node i's cable in again."""
        self._ip("link", "set", self._names[i], "up")

    def _build(self) -> None:
        # Only root may create namespaces without a user namespace around them. In a user namespace
        # everybody is root.
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        wait = [sys.executable, "-ISc", WAIT]
        switch = self._wait_in(
            ["unshare", *user, "--net", "--pid", "--mount", "--mount-proc", "--fork", *wait]
        )
        enter = [
            "nsenter",
            "--target",
            str(switch.pid),
            *(["--user", "--preserve-credentials"] if user else []),
        ]
        self._ip_command = [*enter, "--net", "ip"]
        self._ip("link", "add", "switch", "type", "bridge")
        self._ip("link", "set", "switch", "up")

        addresses = [f"{NETWORK}.{i + 1}" for i in range(len(self._names))]
        hosts = [
            "127.0.0.1 localhost",
            "::1 localhost",
            *map(" ".join, zip(addresses, self._names, strict=True)),
        ]
        unshare = ["unshare", "--net", "--pid", "--uts", "--mount", "--mount-proc", "--fork"]
        for name, address in zip(self._names, addresses, strict=True):
            script = NODE.format(name=name, hosts=shlex.join(hosts), wait=shlex.join(wait))
            # Nodes are below the switch's process namespace, so they end with it.
            first = self._wait_in(
                [*enter, "--net", "--pid", "--mount", *unshare, "sh", "-c", script]
            )
            enter_node = [
                "nsenter",
                "--target",
                str(first.pid),
                *enter[3:],
                "--net",
                "--pid",
                "--uts",
                "--mount",
            ]
            self._ip(
                "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(first.pid)
            )
            self._ip("link", "set", name, "master", "switch", "up")
            node = Node(name, address, first, enter_node)
            self._nodes.append(node)
            node.run(["ip", "link", "set", "lo", "up"])
            # No automatic IPv6, so the cable is silent.
            node.run(["ip", "link", "set", "eth0", "addrgenmode", "none"])
            node.run(["ip", "address", "add", f"{address}/24", "dev", "eth0"])
            node.run(["ip", "link", "set", "eth0", "up"])
        self._until_connected()

    def _wait_in(self, command: list[str]) -> psutil.Process:
        """Start a chain of commands that ends in WAIT, and return the process that runs WAIT.

        It is the first process of its namespace.
        """
        # It has a session of its own, so that Ctrl-C reaches only the test.
        pipes: Any = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        process = subprocess.Popen(command, start_new_session=True, **pipes)
        self._waiting.append(process)
        assert process.stdout and process.stderr
        if process.stdout.readline() != b"ready\n":
            process.kill()
            raise Unavailable(
                f"{shlex.join(command[:4])} ...: "
                f"{process.stderr.read().decode(errors='replace').strip() or 'no answer'}"
            )
        last = psutil.Process(process.pid)
        while below := last.children():
            (last,) = below
        return last

    def _ip(self, *arguments: str) -> None:
        done = subprocess.run(
            [*self._ip_command, *arguments], capture_output=True, text=True, timeout=PATIENCE_S
        )
        if done.returncode:
            raise Unavailable(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    def _until_connected(self) -> None:
        """Wait, since a bridge's port forwards only shortly after its link is up."""
        command = [*self._ip_command, "-json", "link", "show", "master", "switch"]

        def connected() -> bool | None:
            links = json.loads(
                subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE_S).stdout
                or "[]"
            )
            return all(link["operstate"] == "UP" for link in links) or None

        _until(connected, f"{self._names}: their cables stay down")

    def _tear_down(self) -> None:
        for process in self._waiting:
            assert process.stdin
            process.stdin.close()  # the first one is the switch's, and all others end with it
        for node in self._nodes:
            for process in node._started:
                process.wake()
        for process in self._waiting:
            process.wait(PATIENCE_S)
            assert process.stdout and process.stderr
            process.stdout.close()
            process.stderr.close()
        for node in self._nodes:
            for process in node._started:
                process.wait(PATIENCE_S)
        self._waiting, self._nodes = [], []


@functools.cache
def why_not() -> str | None:
    """Return why this machine cannot have such nodes, or None if a trial succeeds."""
    try:
        with Nodes(1):
            return None
    except Unavailable as error:
        return f"no network namespaces here: {error}"


def available() -> bool:
    """Return whether this machine can have such nodes."""
    return why_not() is None


def _until(find: Callable[[], T | None], complaint: str) -> T:
    deadline = time.monotonic() + PATIENCE_S
    while (found := find()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(complaint)
        time.sleep(0.005)
    return found
