"""How the processes of a run find each other: through a key-value store that they reach over TCP.

torchrun's agent holds the store where it offers one. Otherwise rank 0 does, and listens on the
address MASTER_ADDR alone; torch would listen on every interface.

- A store that torchrun keeps over restarts still has the keys of earlier attempts, and no variable
  tells attempts apart when nodes come and go. So every process registers with a random number, and
  rank 0 answers each registration with the token of this attempt. Everything else is written under
  that token.
- Strangers may reach the store too. So everything the processes write is signed with the run's
  key (signature.py), and a value without a valid signature counts as absent. A process with
  another key looks like a stranger at first, but it registers again and again. That difference is
  noticed and reported within seconds.
- A call to the store blocks in C++ for ever when the store's holder is stopped, and neither
  signals nor time-outs interrupt it. So the calls are made on a thread, while the main thread
  watches the clock and the signals.
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

# How long the store may take to answer beyond the time-out before it is given up.
SILENCE_S = 5.0
# How long a process waits for the others after a signal, so that they learn of the signal and end
# with the same exit code.
COMPANY_S = 5.0
# The first and the longest pause between two reads of the store. The pause grows, since hundreds
# of ranks may be reading.
POLL_S = (0.01, 0.25)
# A process that sees only forged registrations of a rank for this long concludes that the rank
# has another key.
DOUBT_S = 5.0
# When no forged registration has come for this long, their writer has gone.
QUIET_S = 2.0


class Interrupted(Exception):
    """A signal asked this process, or another one of the run, to stop while it waited for others.

    The message is the signal's name.
    """


class RankLost(RuntimeError):
    """Another rank did not come, does not answer, or has failed; the one-line message names it."""


class _GivenUp(Exception):
    """Ends a thread whose result is no longer needed."""


@dataclass(frozen=True)
class Member:
    """One process of the run; `nonce` identifies this one attempt to join."""

    host: str
    process: int
    nonce: str


@dataclass(frozen=True)
class Rendezvous:
    """The result of a rendezvous.

    Attributes:
        members: the processes, by rank.
        prefix: the part of the store that only this attempt uses.
        address: the store's numeric address.
    """

    members: list[Member]
    prefix: SignedStore
    address: str


class Deadline:
    """How long to wait for other processes, and which signals to notice meanwhile.

    Args:
        timeout_s: the time that each call of `run` gets, in seconds.
    """

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._end, self._given_up = 0.0, threading.Event()
        self._stop_request: StopRequest | None = None

    def run(self, work: Callable[[], T], whose: str, stop_request: StopRequest | None = None) -> T:
        """Return what `work` returns, or raise what it raises.

        `work` runs on a thread, so that a store that does not answer cannot block the caller.

        Args:
            work: waits by `until` and in no other way.
            whose: what messages call the holder of the store.
            stop_request: a signal that it records shortens the deadline; `until` then raises
                Interrupted.

        Raises:
            RankLost: the store is gone or does not answer.
        """
        found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._end = time.monotonic() + self.timeout_s
        self._given_up = threading.Event()
        self._stop_request = stop_request

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
        """Within `run`: return when `come()` is true.

        Raises:
            Interrupted: the time is over because of a signal.
            RankLost: the time is over; the message begins with `absent()`.
        """
        pause = POLL_S[0]
        while not come():
            self.rest(pause, absent)
            pause = min(1.5 * pause, POLL_S[1])

    def rest(self, seconds: float, absent: Callable[[], str]) -> None:
        """Within `run`: sleep for `seconds`, or raise as `until` does where the time is over."""
        if time.monotonic() > self._end:
            if asked := self._asked():
                raise Interrupted(asked)
            raise RankLost(f"{absent()} within {self.timeout_s:g} s (runtime.timeout_s)")
        if self._given_up.wait(seconds):
            raise _GivenUp

    def _asked(self) -> str | None:
        return self._stop_request.asked if self._stop_request is not None else None


def rendezvous(launch: LaunchEnv, deadline: Deadline) -> Rendezvous:
    """Reach the store, and return when all ranks have registered. Call it within `Deadline.run`.

    Raises:
        InputError: MASTER_ADDR, MASTER_PORT or RANK is wrong, or this process has no key or
            another key than the others.
        Interrupted: a signal asked for it, here or on another rank that was already waiting.
        RankLost: some ranks have not come in time.
    """
    me, key = Member(socket.gethostname(), os.getpid(), secrets.token_hex(8)), find_key()
    address, suspicion = _resolve(launch, deadline), _Suspicion()
    while True:
        try:
            store = (
                _hold_store(launch, address)
                if launch.holds_store
                else _reach_store(launch, address, deadline)
            )
            table = SignedStore(dist.PrefixStore("fastbert", store), key, "fastbert")
            prefix, roster = _enter(table, launch, me, key, suspicion, deadline)
            break
        except dist.DistError:
            if launch.holds_store:
                raise
            # That store belonged to an attempt that has just ended. The next one uses the same
            # port. But if rank 0's registration looked forged and no next attempt begins, rank 0
            # has most likely ended because the keys differ.
            doubted_until = time.monotonic() + (0.0 if suspicion.for_s > DOUBT_S / 5 else DOUBT_S)
            while True:
                deadline.rest(POLL_S[1], lambda: f"rank 0 did not come to {launch.where}")
                if not suspicion.forged or listens(address, launch.port):
                    break
                if time.monotonic() > doubted_until:
                    raise _other_key(key, launch) from None
    if isinstance(roster, dict):
        if launch.holds_store:
            # The others read why the attempt failed before the store ends with this process.
            time.sleep(2 * POLL_S[1])
        raise {"InputError": InputError, "Interrupted": Interrupted, "RankLost": RankLost}[
            roster["end"]
        ](roster["why"])
    members = [Member(**member) for member in roster]
    if (other := members[launch.rank]) != me:
        raise InputError(
            f"RANK = {launch.rank} is given to two processes: {me.process} on {me.host}, "
            f"and {other.process} on {other.host}"
        )
    return Rendezvous(members, prefix, address)


def _enter(
    table: SignedStore,
    launch: LaunchEnv,
    me: Member,
    key: Key,
    suspicion: _Suspicion,
    deadline: Deadline,
) -> tuple[SignedStore, Any]:
    """Register in the store and agree with the others on the members of this attempt.

    Returns:
        The part of the table that only this attempt uses, and the members by rank, or
        {"end", "why"} where one of them left again. A single atomic write decides between the
        two, so no process can leave a group whose other members believe that it has joined.
    """
    everybody = [str(rank) for rank in range(launch.world)]
    registrar = _Registrar(table, launch, me, key) if launch.rank == 0 else None
    prefix = table.part(
        registrar.token
        if registrar is not None
        else _register(table, launch, me, key, suspicion, deadline)
    )
    prefix.write(str(launch.rank), asdict(me))
    proposed = settled = None

    def complete() -> bool:
        nonlocal proposed, settled
        if registrar is not None:
            registrar.answer()
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
    table: SignedStore,
    launch: LaunchEnv,
    me: Member,
    key: Key,
    suspicion: _Suspicion,
    deadline: Deadline,
) -> str:
    """Register at rank 0, and return the token that it answers."""
    answer: Any = No.ABSENT

    def answered() -> bool:
        nonlocal answer
        # Written every time, since a stranger may have written over it.
        table.write(f"register/{launch.rank}", [me.nonce, launch.world])
        answer = table.read(me.nonce)
        if isinstance(answer, No):
            suspicion.look(table, 0)
            if suspicion.for_s > DOUBT_S:
                raise _other_key(key, launch)
        return not isinstance(answer, No)

    deadline.until(answered, lambda: f"rank 0 did not answer rank {launch.rank} at {launch.where}")
    token, problem = answer
    if problem:
        raise InputError(problem)
    return token


def _other_key(key: Key, launch: LaunchEnv) -> InputError:
    return InputError(key.mismatch(f"rank 0 at {launch.where}"))


class _Registrar:
    """Rank 0's part: tells the attempt's token to every process that registers now.

    A process of an earlier attempt no longer reads the answer.
    """

    def __init__(self, table: SignedStore, launch: LaunchEnv, me: Member, key: Key):
        self.token = secrets.token_hex(8)
        self._table, self._launch, self._me, self._key = table, launch, me, key
        self._suspicions = {rank: _Suspicion() for rank in range(1, launch.world)}
        self._odd_since = time.monotonic()

    def answer(self) -> None:
        """Answer the registrations that are there; to be called repeatedly.

        Raises:
            InputError: another rank certainly has another key.
        """
        # No rank needs this value, but a rank that cannot verify it learns that the keys differ.
        self._table.write("register/0", [self._me.nonce, self._launch.world])
        for rank, suspicion in self._suspicions.items():
            suspicion.look(self._table, rank)
            if not isinstance(suspicion.register, No):
                nonce, world = suspicion.register
                problem = (
                    f"WORLD_SIZE = {world} for rank {rank}, but {self._launch.world} for rank 0; "
                    "start all with the same"
                )
                self._table.write(
                    nonce, [self.token, problem if world != self._launch.world else None]
                )
        # Ranks with another key cannot read what rank 0 writes. They get the time to find out by
        # themselves, also those that come late, before rank 0 ends and takes the store with it.
        odd = [rank for rank, one in self._suspicions.items() if one.for_s > DOUBT_S / 2]
        if not odd:
            self._odd_since = time.monotonic()
        gone = all(one.seen and one.quiet_s > QUIET_S for one in self._suspicions.values())
        if odd and (gone or time.monotonic() - self._odd_since > 2 * DOUBT_S):
            raise InputError(self._key.mismatch(listed([f"rank {rank}" for rank in odd])))


class _Suspicion:
    """Whether a rank has another key.

    A single forged registration may be a stranger's. A process with another key registers again
    and again.
    """

    def __init__(self) -> None:
        self.register: Any = No.ABSENT
        self.seen = self.forged = False  # a registration of any kind; a forged one
        self._first = self._last = 0.0

    @property
    def for_s(self) -> float:
        """Seconds between the first and the last forged registration of a series."""
        return self._last - self._first

    @property
    def quiet_s(self) -> float:
        """Seconds since the last forged registration."""
        return time.monotonic() - self._last

    def look(self, table: SignedStore, rank: int) -> None:
        """Read the registration of a rank, and delete it where it is forged."""
        self.register, now = table.read(f"register/{rank}"), time.monotonic()
        self.seen |= self.register is not No.ABSENT
        if self.register is No.FORGED:
            self.forged = True
            table.sweep(f"register/{rank}")
            if now - self._last > QUIET_S:
                self._first = now
            self._last = now
        elif self.register is not No.ABSENT:
            self._first = self._last


def hold_store(address: str, port: int) -> dist.TCPStore:
    """Open a store that listens on one address of this machine and no other.

    Args:
        address: numeric, IPv4 or IPv6.
        port: 0 means any free port.

    Raises:
        OSError: the address or the port cannot be used.
    """
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(socket.SOMAXCONN)
        port, listener = server.getsockname()[1], server.detach()
    return dist.TCPStore(
        address, port, None, True, master_listen_fd=listener, wait_for_workers=False, use_libuv=True
    )


def listens(address: str, port: int) -> bool:
    """Whether something listens at this address.

    TCPStore retries the connection too, but it prints a page of C++ frames on every failure.
    """
    try:
        socket.create_connection((address, port), timeout=SILENCE_S).close()
    except OSError:
        return False
    return True


def own_address(address: str) -> str | None:
    """The address from which this machine reaches another one; None where it cannot reach it."""
    try:
        with socket.socket(
            socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
        ) as probe:
            probe.connect((address, 9))  # a UDP connect sends nothing, so any port will do
            return probe.getsockname()[0]
    except OSError:
        return None


def numeric(name: str, port: int) -> str:
    """Resolve a host name to an address, to IPv4 where it has both kinds.

    Raises:
        OSError: the name has no address.
    """
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda item: item[0] != socket.AF_INET)[4][0])


def _hold_store(launch: LaunchEnv, address: str) -> dist.Store:
    try:
        return hold_store(address, launch.port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"MASTER_PORT = {launch.port}: another process listens there on {address}; "
                "choose another port"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(
                f"MASTER_ADDR = {launch.address}: {address} is not an address of "
                f"{socket.gethostname()}, where rank 0 runs; "
                "give the one by which the other machines reach it"
            ) from None
        raise InputError(
            f"MASTER_ADDR = {launch.address}, MASTER_PORT = {launch.port}: cannot listen there: "
            f"{error.strerror}"
        ) from None


def _reach_store(launch: LaunchEnv, address: str, deadline: Deadline) -> dist.Store:
    """Connect to the store that another process holds, as soon as it listens."""
    deadline.until(
        lambda: listens(address, launch.port), lambda: f"rank 0 did not come to {launch.where}"
    )
    return dist.TCPStore(
        address, launch.port, None, False, timeout=timedelta(seconds=deadline.timeout_s)
    )


def _resolve(launch: LaunchEnv, deadline: Deadline) -> str:
    """Resolve MASTER_ADDR; its name may become known only after the processes have started."""
    found: list[str] = []

    def known() -> bool:
        with suppress(OSError):
            found.append(numeric(launch.address, launch.port))
        return bool(found)

    deadline.until(
        known, lambda: f"MASTER_ADDR = {launch.address}: the name did not resolve to an address"
    )
    several_machines = (launch.local_world or launch.world) < launch.world
    if (
        several_machines
        and ipaddress.ip_address(found[0]).is_loopback
        and launch.address not in (found[0], "localhost")
    ):
        raise InputError(
            f"MASTER_ADDR = {launch.address}: on {socket.gethostname()} this name means "
            f"{found[0]}, which no other machine can reach; "
            "give the address that the machine has in their network"
        )
    return found[0]


def listed(names: list[str]) -> str:
    """The first eight names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def describe(error: BaseException) -> str:
    """Format an exception as one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
