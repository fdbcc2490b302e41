"""How the processes of a run find each other: at a store, a small table that one process holds and the others reach over TCP.

torchrun's agent holds it where it offers to, else rank 0, which listens on MASTER_ADDR's own address alone (torch would listen on every
interface).

- A store that torchrun keeps over restarts still has the keys of earlier attempts, and no variable tells attempts apart when nodes come
  and go. So every process registers with a number drawn at random, rank 0 answers those who register now with a token of its own, and
  everything else is written under that token.
- Strangers may reach the store too. So all that the processes write is signed with the run's key (signature.py); what is not is taken for
  absent. Two keys in one run look like a stranger, but one who knocks again and again: that is said within seconds.
- The store's calls wait in C++ for ever when its holder is stopped, deaf to signals and time-outs. So they are made on a thread, while
  the main thread keeps the time and looks for signals.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from fastbert.cluster.launch_env import LaunchEnv
from fastbert.cluster.signals import StopRequest
from fastbert.cluster.signature import Key, find_key
from fastbert.cluster.signed_store import No, SignedStore
from fastbert.errors import InputError

T = TypeVar("T")

SILENCE_S = 5.0  # what the store gets to answer beyond the time-out, before it is given up
COMPANY_S = 5.0  # after a signal: what the others get to come, so that they learn of it and end with the same code
POLL_S = (
    0.01,
    0.25,
)  # the first pause between two looks at the store, and the longest: hundreds of ranks look
DOUBT_S = 5.0  # for how long a process sees nothing but forged knocks of another one before it is sure that there are two keys
QUIET_S = 2.0  # without another one: whoever it was has gone


class Interrupted(Exception):
    """A signal asked this process, or another one of the run, to end while it was waiting for others; the message is its name."""


class RankLost(RuntimeError):
    """Another rank did not come, does not answer, or has failed: one line that names it."""


class _GivenUp(Exception):
    """Ends a thread that nobody waits for any more."""


@dataclass(frozen=True)
class Member:
    """One process of the run; `nonce` is of this one attempt to join."""

    host: str
    process: int
    nonce: str


@dataclass(frozen=True)
class Rendezvous:
    """What comes of it.

    Attributes:
        members: the processes, by rank.
        prefix: the part of the store that is this attempt's alone.
        address: the store's, in numbers.
    """

    members: list[Member]
    prefix: SignedStore
    address: str


class Deadline:
    """How long to wait for other processes, and what to look at meanwhile."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._end, self._given_up = 0.0, threading.Event()
        self._interruption: StopRequest | None = None

    def run(self, work: Callable[[], T], whose: str, interruption: StopRequest | None = None) -> T:
        """Return what `work` returns, or raise what it raises. It runs on a thread: a store that is silent keeps nobody here.

        Args:
            work: waits by `until` and in no other way.
            whose: the holder of the store that it talks to, for messages.
            interruption: when a signal is noted in it, the time is over soon, and `until` then raises Interrupted.

        Raises:
            RankLost: the store is gone or does not answer.
        """
        found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._end, self._given_up, self._interruption = (
            time.monotonic() + self.timeout_s,
            threading.Event(),
            interruption,
        )

        def run() -> None:
            try:
                found.put((work(), None))
            except BaseException as error:
                found.put((None, error))

        threading.Thread(target=run, daemon=True, name="fastbert-meeting").start()
        end, asked = self._end + SILENCE_S, None
        try:
            while True:
                try:
                    value, error = found.get(timeout=0.05)
                    break
                except queue.Empty:
                    if asked is None and (asked := self._asked()):
                        self._end = min(self._end, time.monotonic() + COMPANY_S)
                        end = self._end + SILENCE_S
                    if time.monotonic() > end:
                        if asked:
                            raise Interrupted(asked) from None
                        raise RankLost(f"{whose} does not answer") from None
        finally:
            self._given_up.set()
        if isinstance(error, dist.DistError):
            raise RankLost(f"{whose} has disappeared") from None
        if error is not None:
            raise error
        return value

    def until(self, come: Callable[[], bool], absent: Callable[[], str]) -> None:
        """Within `run`: return when `come()`, raise RankLost with `absent()` when the time is over."""
        pause = POLL_S[0]
        while not come():
            self.rest(pause, absent)
            pause = min(1.5 * pause, POLL_S[1])

    def rest(self, seconds: float, absent: Callable[[], str]) -> None:
        """Within `run`: wait for so long, if there is still time."""
        if time.monotonic() > self._end:
            if asked := self._asked():
                raise Interrupted(asked)
            raise RankLost(f"{absent()} within {self.timeout_s:g} s (runtime.timeout_s)")
        if self._given_up.wait(seconds):
            raise _GivenUp

    def _asked(self) -> str | None:
        return self._interruption.asked if self._interruption is not None else None


def rendezvous(launch: LaunchEnv, deadline: Deadline) -> Rendezvous:
    """Come to the store, and return when all ranks have come. To be called within `Deadline.run`.

    Raises:
        InputError: MASTER_ADDR, MASTER_PORT or RANK cannot be what was meant; or this process has no key, or another one than the others.
        Interrupted: a signal asked for it, here or on another rank that was waiting already.
        RankLost: not all ranks have come in time.
    """
    me, key = Member(socket.gethostname(), os.getpid(), secrets.token_hex(8)), find_key()
    address = _resolve(launch, deadline)
    while True:
        try:
            store = (
                _hold_store(launch, address)
                if launch.holds_store
                else _reach_store(launch, address, deadline)
            )
            table = SignedStore(dist.PrefixStore("fastbert", store), key, "fastbert")
            prefix, roster = _enter(table, launch, me, key, deadline)
            break
        except dist.DistError:
            if launch.holds_store:
                raise
            # That was the store of an attempt that has just ended. The next one comes to the same port.
            deadline.rest(POLL_S[1], lambda: f"rank 0 did not come to {launch.where}")
    if isinstance(roster, dict):
        if launch.holds_store:
            time.sleep(
                2 * POLL_S[1]
            )  # so that the others can read why, before the store ends with this process
        raise {"InputError": InputError, "Interrupted": Interrupted, "RankLost": RankLost}[
            roster["end"]
        ](roster["why"])
    members = [Member(**member) for member in roster]
    if (other := members[launch.rank]) != me:
        raise InputError(
            f"RANK = {launch.rank} is given to two processes: {me.process} on {me.host}, and {other.process} on {other.host}"
        )
    return Rendezvous(members, prefix, address)


def _enter(
    table: SignedStore, launch: LaunchEnv, me: Member, key: Key, deadline: Deadline
) -> tuple[SignedStore, Any]:
    """The part of the table that is this attempt's alone; and the members by rank, or {"end", "why"} where one of them left again.

    Which of the two it is, is settled by one write: nobody can leave a group whose other members believe that he is in.
    """
    everybody = [str(rank) for rank in range(launch.world)]
    reception = _Reception(table, launch, me, key) if launch.rank == 0 else None
    prefix = table.part(
        reception.token if reception is not None else _register(table, launch, me, key, deadline)
    )
    prefix.write(str(launch.rank), asdict(me))
    proposed = settled = None

    def complete() -> bool:
        nonlocal proposed, settled
        if reception is not None:
            reception.answer()
            proposed = prefix.read_all(everybody)
        if not isinstance(found := prefix.read("roster"), No):
            settled = found
        return proposed is not None or settled is not None

    def absent() -> str:
        missing = [f"rank {rank}" for rank in everybody if isinstance(prefix.read(rank), No)]
        return f"{listed(missing) or 'rank 0'} did not come to {launch.where}"

    try:
        deadline.until(complete, absent)
    except (InputError, Interrupted, RankLost) as end:
        proposed = {"end": type(end).__name__, "why": str(end)}
    return prefix, prefix.settle("roster", proposed) if settled is None else settled


def _register(
    table: SignedStore, launch: LaunchEnv, me: Member, key: Key, deadline: Deadline
) -> str:
    """The token that rank 0 answers to this process."""
    answer: Any = No.ABSENT
    doubt, other_key = _Doubt(), InputError(key.mismatch(f"rank 0 at {launch.where}"))

    def answered() -> bool:
        nonlocal answer
        table.write(
            f"register/{launch.rank}", [me.nonce, launch.world]
        )  # again, should somebody have written over it
        answer = table.read(me.nonce)
        if isinstance(answer, No):
            doubt.look(table, 0)
            if doubt.for_s > DOUBT_S:
                raise other_key
        return not isinstance(answer, No)

    try:
        deadline.until(
            answered, lambda: f"rank 0 did not answer rank {launch.rank} at {launch.where}"
        )
    except dist.DistError:  # rank 0 is gone, with the store
        if doubt.for_s > DOUBT_S / 5:
            raise other_key from None
        raise
    token, problem = answer
    if problem:
        raise InputError(problem)
    return token


class _Reception:
    """Rank 0's: tells the token to all who register; one who did so in an earlier attempt reads nothing any more."""

    def __init__(self, table: SignedStore, launch: LaunchEnv, me: Member, key: Key):
        self.token = secrets.token_hex(8)
        self._table, self._launch, self._me, self._key = table, launch, me, key
        self._doubts = {rank: _Doubt() for rank in range(1, launch.world)}

    def answer(self) -> None:
        """To be called again and again; raises InputError when it is sure that another rank has another key."""
        self._table.write(
            "register/0", [self._me.nonce, self._launch.world]
        )  # nobody needs it, but who cannot read it learns why
        for rank, doubt in self._doubts.items():
            doubt.look(self._table, rank)
            if not isinstance(doubt.register, No):
                nonce, world = doubt.register
                problem = f"WORLD_SIZE = {world} for rank {rank}, but {self._launch.world} for rank 0; start all with the same"
                self._table.write(
                    nonce, [self.token, problem if world != self._launch.world else None]
                )
        # Those with another key cannot read what rank 0 would tell them, so they are given the time to find out for themselves.
        odd = [rank for rank, doubt in self._doubts.items() if doubt.for_s > DOUBT_S / 2]
        gone = all(doubt.quiet_s > QUIET_S for doubt in self._doubts.values())
        if odd and (gone or max(doubt.for_s for doubt in self._doubts.values()) > 2 * DOUBT_S):
            raise InputError(self._key.mismatch(listed([f"rank {rank}" for rank in odd])))


class _Doubt:
    """Whether a rank has another key. A single registration that is forged may be a stranger's; from a process they come again and again."""

    def __init__(self) -> None:
        self.register: Any = No.ABSENT
        self._first = self._last = 0.0

    @property
    def for_s(self) -> float:
        """Between the first and the last forged one of a series."""
        return self._last - self._first

    @property
    def quiet_s(self) -> float:
        """Since the last forged one."""
        return time.monotonic() - self._last

    def look(self, table: SignedStore, rank: int) -> None:
        """Read the registration of a rank, and sweep it away where it is forged."""
        self.register, now = table.read(f"register/{rank}"), time.monotonic()
        if self.register is No.FORGED:
            table.sweep(f"register/{rank}")
            if now - self._last > QUIET_S:
                self._first = now
            self._last = now
        elif self.register is not No.ABSENT:
            self._first = self._last


def hold_store(address: str, port: int) -> dist.TCPStore:
    """A store that listens on one address of this machine and no other; raises OSError where it cannot. Port 0 is any that is free."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(socket.SOMAXCONN)
        port, listener = server.getsockname()[1], server.detach()
    return dist.TCPStore(
        address, port, None, True, master_listen_fd=listener, wait_for_workers=False, use_libuv=True
    )


def listens(address: str, port: int) -> bool:
    """Whether somebody does there. TCPStore would try by itself, but with a page of C++ frames on the terminal for every failure."""
    try:
        socket.create_connection((address, port), timeout=SILENCE_S).close()
    except OSError:
        return False
    return True


def own_address(address: str) -> str | None:
    """The address of this machine from which it reaches another one; None where there is no way."""
    try:
        with socket.socket(
            socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
        ) as probe:
            probe.connect((address, 9))  # sends nothing; any port
            return probe.getsockname()[0]
    except OSError:
        return None


def numeric(name: str, port: int) -> str:
    """The address that a host's name stands for, IPv4 where it has both; raises OSError where it has none."""
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda item: item[0] != socket.AF_INET)[4][0])


def _hold_store(launch: LaunchEnv, address: str) -> dist.Store:
    try:
        return hold_store(address, launch.port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"MASTER_PORT = {launch.port}: another process listens there on {address}; choose another port"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(
                f"MASTER_ADDR = {launch.address}: {address} is not an address of {socket.gethostname()}, where rank 0 runs; "
                "give the one by which the other machines reach it"
            ) from None
        raise InputError(
            f"MASTER_ADDR = {launch.address}, MASTER_PORT = {launch.port}: cannot listen there: {error.strerror}"
        ) from None


def _reach_store(launch: LaunchEnv, address: str, deadline: Deadline) -> dist.Store:
    """A connection to the store that another process holds, as soon as it does."""
    deadline.until(
        lambda: listens(address, launch.port), lambda: f"rank 0 did not come to {launch.where}"
    )
    return dist.TCPStore(
        address, launch.port, None, False, timeout=timedelta(seconds=deadline.timeout_s)
    )


def _resolve(launch: LaunchEnv, deadline: Deadline) -> str:
    """MASTER_ADDR in numbers; its name may come to be known only after the processes have started."""
    found: list[str] = []

    def known() -> bool:
        with suppress(OSError):
            found.append(numeric(launch.address, launch.port))
        return bool(found)

    deadline.until(
        known, lambda: f"MASTER_ADDR = {launch.address}: no address came to be known by that name"
    )
    several_machines = (launch.local_world or launch.world) < launch.world
    if (
        several_machines
        and ipaddress.ip_address(found[0]).is_loopback
        and launch.address not in (found[0], "localhost")
    ):
        raise InputError(
            f"MASTER_ADDR = {launch.address}: on {socket.gethostname()} this name means {found[0]}, which no other machine can reach; "
            "give the address that the machine has in their network"
        )
    return found[0]


def listed(names: list[str]) -> str:
    """The first few of them, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
