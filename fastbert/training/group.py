"""The processes of a run: who they are, and what they agree on.

A launcher (torchrun, deepspeed, srun) starts the processes and tells each by environment variables who it is. They meet at a store, a
small table that one process holds and the others reach over TCP: torchrun's agent where it offers one, else rank 0, which listens on
MASTER_ADDR's own address alone (torch would listen on every interface). A single process needs no launcher, no store and no port;
gloo itself still opens one, which nobody is told of, on the loopback interface.

- A store that torchrun keeps over restarts still has the keys of earlier attempts, and no variable tells attempts apart when nodes come
  and go. So every process knocks with a number drawn at random, rank 0 answers those who knock now with a token of its own, and
  everything else is written under that token.
- The store's calls wait in C++ for ever when its holder is stopped, deaf to signals and time-outs. So they are made on a thread, while
  the main thread keeps the time and looks for signals.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from fastbert.errors import InputError
from fastbert.training.interruption import Interruption

T = TypeVar("T")

MARGIN_S = 60.0  # by which a collective outlasts runtime.timeout_s: watch.py speaks first, and with a name
SILENCE_S = 5.0  # what the store gets to answer beyond the time-out, before it is given up
POLL_S = (0.01, 0.25)  # the first pause between two looks at the store, and the longest: hundreds of ranks look

# How starters that know nothing of torch say how many processes there are; without WORLD_SIZE each would train alone, on the same folder.
OTHER_STARTERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


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


class Group:
    """The processes of a run, as one of them sees it; made by `join`. A context manager.

    Attributes:
        rank, world: this process's number, and how many there are.
        local_rank: its number on this machine.
        device: the GPU of that number where there is one, else the CPU.
        members: the processes, by rank.
        store: a table for small things, under keys that no other attempt uses. What may block: see `Patience`.
        holds_store: the store lives in this process, and ends with it.
        store_name: how messages call the store's holder.
    """

    device = torch.device("cpu")

    def __init__(self, seat: Seat, members: Sequence[Member], store: dist.Store, patience: Patience):
        self.rank, self.world, self.local_rank = seat.rank, seat.world, seat.local_rank
        self.members, self.store, self.holds_store = list(members), store, seat.holds_store
        self.store_name = f"torchrun's store at {seat.where}" if seat.agent_store else f"{self.name(0)} at {seat.where}"
        self._patience, self._meetings = patience, 0

    @property
    def speaks(self) -> bool:
        """This process is the one that writes to the terminal and to the run folder."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """How messages call a rank: "rank 3 (node7, process 4711)"."""
        return f"rank {rank} ({self.members[rank].host}, process {self.members[rank].process})"

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, which JSON can write, on all ranks."""
        text = _to_bytes(value if self.rank == 0 else None, self.device)
        if self.world > 1:
            size = torch.tensor([len(text)], device=self.device)
            dist.broadcast(size, 0)
            text = text if self.rank == 0 else text.new_empty(int(size))
            dist.broadcast(text, 0)
        return _from_bytes(text)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can write, in the order of ranks, on every rank."""
        text = _to_bytes(value, self.device)
        if self.world == 1:
            return [_from_bytes(text)]
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(text)], device=self.device))
        padded = text.new_zeros(max(int(size) for size in sizes))
        padded[: len(text)] = text
        texts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(texts, padded)
        return [_from_bytes(text[: int(size)]) for text, size in zip(texts, sizes, strict=True)]

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over the ranks, in place; returns them."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Go on when all ranks have come here."""
        if self.world > 1:
            dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    @contextmanager
    def same_fate(self) -> Iterator[None]:
        """What ends one rank inside this `with` ends every rank at the end of it, in the same words.

        It needs nothing but the store, so it serves before the devices are set up, and ranks may differ in what they do inside.

        Raises:
            InputError: some rank raised one; it is named unless all ranks said the same.
            Interrupted: some rank raised it.
            RankLost: another rank raised any other exception, or did not come to the end of the `with` in time.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        if self.world == 1:
            if own is not None:
                raise own
            return
        kind = next((kind.__name__ for kind in (InputError, Interrupted) if isinstance(own, kind)), "Exception")
        try:
            fates = self._meet(own and (kind, describe(own) if kind == "Exception" else str(own)))
        except RankLost:
            if own is not None:
                raise own from None
            raise
        if own is not None and kind == "Exception":
            raise own
        # A bug says more than bad input does, and that more than a signal.
        for kind in ("Exception", "InputError", "Interrupted"):
            unlucky = [rank for rank, fate in enumerate(fates) if fate and fate[0] == kind]
            if unlucky:
                rank, text = unlucky[0], fates[unlucky[0]][1]
                if kind == "Exception":
                    raise RankLost(f"{self.name(rank)} failed: {text}") from None
                if kind == "Interrupted":
                    raise Interrupted(text) from None
                shared = all(fate == [kind, text] for fate in fates)
                raise InputError(text if shared else f"rank {rank} ({self.members[rank].host}): {text}") from None

    def close(self) -> None:
        """Leave together with the others; the one that holds the store is the last to go."""
        if self.world > 1:
            self._meet(None)
        dist.destroy_process_group()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or self.world == 1:
            self.close()  # after an error the others may never come, and a group with a lost member may not let go

    def _meet(self, value: Any) -> list[Any]:
        """As `gather`, by the store alone, and within the time-out. Nobody leaves the store's holder behind: it goes when all have read."""
        self._meetings += 1
        place = dist.PrefixStore(f"meeting/{self._meetings}", self.store)
        everybody = [str(rank) for rank in range(self.world)]

        def absent() -> str:
            return f"{listed([self.name(int(rank)) for rank in everybody if not place.check([rank])])} did not come along"

        def work() -> list[Any]:
            place.set(str(self.rank), json.dumps(value))
            if place.add("come", 1) == self.world:
                place.set("all", "")
            self._patience.until(lambda: place.check(["all"]), absent)
            values = [json.loads(text) for text in place.multi_get(everybody)]
            if place.add("read", 1) == self.world:
                place.set("done", "")
            if self.holds_store:
                self._patience.until(lambda: place.check(["done"]), lambda: "not all ranks have read what the others wrote")
            return values

        return self._patience.run(work, self.store_name)


def join(timeout_s: float, interruption: Interruption | None = None) -> Group:
    """Meet the other processes that the launcher has started.

    Args:
        timeout_s: how long to wait for the others, now and at every later meeting, in seconds.
        interruption: when a signal is noted in it, the waiting ends.

    Raises:
        InputError: an environment variable of the launcher is missing or contradicts another.
        Interrupted: a signal asked for it.
        RankLost: not all ranks have come in time; the message says which.
    """
    seat, patience = read_seat(), Patience(timeout_s)
    if seat.world == 1:
        group = Group(seat, [Member(socket.gethostname(), os.getpid(), "")], dist.HashStore(), patience)
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():  # DeepSpeed reads them
            os.environ.setdefault(name, value)
        address = "127.0.0.1"
    else:
        group, address = patience.run(lambda: _find_each_other(seat, patience), f"rank 0 at {seat.where}", interruption)
    with group.same_fate():
        if interruption is not None and interruption.asked:
            raise Interrupted(interruption.asked)
        group.device = _device(seat)
    _check_alike(group)
    _share_cores(seat, group.device)
    _choose_interface(address)
    if group.device.type == "cuda":
        torch.cuda.set_device(group.device)
    try:
        dist.init_process_group(
            "nccl" if group.device.type == "cuda" else "gloo",
            store=group.store,
            rank=seat.rank,
            world_size=seat.world,
            timeout=timedelta(seconds=timeout_s + MARGIN_S),
        )
    except RuntimeError as error:
        raise RankLost(
            f"{group.name(seat.rank)} has met the others at {seat.where}, but cannot connect to all of them: {describe(error)}; "
            f"look at GLOO_SOCKET_IFNAME = {os.environ.get('GLOO_SOCKET_IFNAME')} and at the firewall between the machines"
        ) from error
    return group


@dataclass(frozen=True)
class Seat:
    """What the launcher said to this process; `local_world` is None where it did not say how many there are on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int | None = 1
    address: str = ""
    port: int = 0
    agent_store: bool = False  # the launcher holds a store at that address

    @property
    def holds_store(self) -> bool:
        return self.rank == 0 and not self.agent_store

    @property
    def where(self) -> str:
        return f"{self.address}:{self.port}"


def read_seat() -> Seat:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; raises InputError naming the one that is missing or wrong."""
    given = os.environ.get
    if not given("WORLD_SIZE"):
        if given("RANK", "0") != "0":
            raise InputError(f"RANK = {given('RANK')}, but WORLD_SIZE is not set; a launcher such as torchrun sets both")
        for name, starter in OTHER_STARTERS.items():
            if given(name, "1") != "1":
                raise InputError(
                    f"{name} = {given(name)}: {starter} has started several processes, but WORLD_SIZE is not set, so each would train alone; "
                    "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or start one torchrun a machine: see docs/multi-node.md"
                )
        return Seat()
    world = _whole("WORLD_SIZE", 1)
    rank = _whole("RANK", 0, world, f"WORLD_SIZE = {world}")
    if world == 1:
        return Seat(local_rank=_whole("LOCAL_RANK", 0) if given("LOCAL_RANK") else 0)
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if given(name)), None)  # torchrun's name, DeepSpeed's name
    local_world = _whole(local, 1, world + 1, f"WORLD_SIZE = {world}") if local else None
    if not given("MASTER_ADDR"):
        raise InputError(f"MASTER_ADDR is not set, but WORLD_SIZE = {world}; give the address of rank 0's machine")
    return Seat(
        rank=rank,
        world=world,
        local_rank=_whole("LOCAL_RANK", 0, local_world or world, f"{local or 'WORLD_SIZE'} = {local_world or world}"),
        local_world=local_world,
        address=given("MASTER_ADDR", ""),
        port=_whole("MASTER_PORT", 1, 65536, "the number of ports"),
        agent_store=given("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


class Patience:
    """How long to wait for other processes, and what to look at meanwhile."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._end, self._given_up = 0.0, threading.Event()
        self._interruption: Interruption | None = None

    def run(self, work: Callable[[], T], whose: str, interruption: Interruption | None = None) -> T:
        """Return what `work` returns, or raise what it raises. It runs on a thread: a store that is silent keeps nobody here.

        Args:
            work: waits by `until` and in no other way.
            whose: the holder of the store that it talks to, for messages.
            interruption: when a signal is noted in it, `until` raises Interrupted.

        Raises:
            RankLost: the store is gone or does not answer.
        """
        found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._end, self._given_up, self._interruption = time.monotonic() + self.timeout_s, threading.Event(), interruption

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
                        end = time.monotonic() + SILENCE_S
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
            if asked := self._asked():
                raise Interrupted(asked)
            if time.monotonic() > self._end:
                raise RankLost(f"{absent()} within {self.timeout_s:g} s (runtime.timeout_s)")
            if self._given_up.wait(pause):
                raise _GivenUp
            pause = min(1.5 * pause, POLL_S[1])

    def _asked(self) -> str | None:
        return self._interruption.asked if self._interruption is not None else None


def _find_each_other(seat: Seat, patience: Patience) -> tuple[Group, str]:
    """The group, when all its ranks have come to the store; and the store's address in numbers."""
    me = Member(socket.gethostname(), os.getpid(), secrets.token_hex(8))
    address = _resolve(seat, patience)
    while True:
        try:
            store = _hold_store(seat, address) if seat.holds_store else _reach_store(seat, address, patience)
            room, roll = _enter(dist.PrefixStore("fastbert", store), seat, me, patience)
            break
        except dist.DistError:
            if seat.holds_store:
                raise
            # That was the store of an attempt that has just ended. The next one comes to the same port.
    if isinstance(roll, dict):
        if seat.holds_store:
            time.sleep(2 * POLL_S[1])  # so that the others can read why, before the store ends with this process
        raise {"Interrupted": Interrupted, "RankLost": RankLost}[roll["end"]](roll["why"])
    members = [Member(**member) for member in roll]
    if (other := members[seat.rank]) != me:
        raise InputError(f"RANK = {seat.rank} is given to two processes: {me.process} on {me.host}, and {other.process} on {other.host}")
    return Group(seat, members, room, patience), address


def _enter(table: dist.Store, seat: Seat, me: Member, patience: Patience) -> tuple[dist.Store, Any]:
    """The part of the table that is this attempt's alone; and the members by rank, or {"end", "why"} where one of them left again.

    Which of the two it is, is settled by one write: nobody can leave a group whose other members believe that he is in.
    """
    token, answered = secrets.token_hex(8) if seat.rank == 0 else _knock(table, seat, me, patience), set()
    room, everybody = dist.PrefixStore(token, table), [str(rank) for rank in range(seat.world)]
    room.set(str(seat.rank), json.dumps(asdict(me)))

    def complete() -> bool:
        if seat.rank == 0:
            _answer(table, seat, token, answered)
        return room.check(["roll"]) or (seat.rank == 0 and room.check(everybody))

    def absent() -> str:
        return f"{listed([f'rank {rank}' for rank in everybody if not room.check([rank])])} did not come to {seat.where}"

    try:
        patience.until(complete, absent)
        roll = [json.loads(text) for text in room.multi_get(everybody)] if room.check(everybody) else None
    except (Interrupted, RankLost) as end:
        roll = {"end": type(end).__name__, "why": str(end)}
    return room, json.loads(room.compare_set("roll", "", json.dumps(roll)))  # writes only the first time; returns what is there


def _knock(table: dist.Store, seat: Seat, me: Member, patience: Patience) -> str:
    """The token that rank 0 answers to this process."""
    table.set(f"knock/{seat.rank}", json.dumps([me.nonce, seat.world]))
    patience.until(lambda: table.check([me.nonce]), lambda: f"rank 0 did not answer rank {seat.rank} at {seat.where}")
    token, problem = json.loads(table.get(me.nonce))
    if problem:
        raise InputError(problem)
    return token


def _answer(table: dist.Store, seat: Seat, token: str, answered: set[str]) -> None:
    """Rank 0: tell the token to all who have knocked; one who did so in an earlier attempt reads nothing any more."""
    for rank in range(1, seat.world):
        if table.check([f"knock/{rank}"]):
            nonce, world = json.loads(table.get(f"knock/{rank}"))
            if nonce not in answered:
                answered.add(nonce)
                problem = f"WORLD_SIZE = {world} for rank {rank}, but {seat.world} for rank 0; start all with the same"
                table.set(nonce, json.dumps([token, problem if world != seat.world else None]))


def hold_store(address: str, port: int) -> dist.TCPStore:
    """A store that listens on one address of this machine and no other; raises OSError where it cannot. Port 0 is any that is free."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(socket.SOMAXCONN)
        port, listener = server.getsockname()[1], server.detach()
    return dist.TCPStore(address, port, None, True, master_listen_fd=listener, wait_for_workers=False, use_libuv=True)


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
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing; any port
            return probe.getsockname()[0]
    except OSError:
        return None


def numeric(name: str, port: int) -> str:
    """The address that a host's name stands for, IPv4 where it has both; raises OSError where it has none."""
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda item: item[0] != socket.AF_INET)[4][0])


def _hold_store(seat: Seat, address: str) -> dist.Store:
    try:
        return hold_store(address, seat.port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"MASTER_PORT = {seat.port}: another process listens there on {address}; choose another port") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(
                f"MASTER_ADDR = {seat.address}: {address} is not an address of {socket.gethostname()}, where rank 0 runs; "
                "give the one by which the other machines reach it"
            ) from None
        raise InputError(f"MASTER_ADDR = {seat.address}, MASTER_PORT = {seat.port}: cannot listen there: {error.strerror}") from None


def _reach_store(seat: Seat, address: str, patience: Patience) -> dist.Store:
    """A connection to the store that another process holds, as soon as it does."""
    patience.until(lambda: listens(address, seat.port), lambda: f"rank 0 did not come to {seat.where}")
    return dist.TCPStore(address, seat.port, None, False, timeout=timedelta(seconds=patience.timeout_s))


def _resolve(seat: Seat, patience: Patience) -> str:
    """MASTER_ADDR in numbers; its name may come to be known only after the processes have started."""
    found: list[str] = []

    def known() -> bool:
        with suppress(OSError):
            found.append(numeric(seat.address, seat.port))
        return bool(found)

    patience.until(known, lambda: f"MASTER_ADDR = {seat.address}: no address came to be known by that name")
    several_machines = (seat.local_world or seat.world) < seat.world
    if several_machines and ipaddress.ip_address(found[0]).is_loopback and seat.address not in (found[0], "localhost"):
        raise InputError(
            f"MASTER_ADDR = {seat.address}: on {socket.gethostname()} this name means {found[0]}, which no other machine can reach; "
            "give the address that the machine has in their network"
        )
    return found[0]


def _device(seat: Seat) -> torch.device:
    """The GPU with this process's local number, where the machine has GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if seat.local_rank >= (count := torch.cuda.device_count()):
        raise InputError(
            f"LOCAL_RANK = {seat.local_rank}, but this process sees {count} GPU{'s' if count > 1 else ''}; start one process a GPU, and let "
            "each of them see all GPUs of its machine"
        )
    return torch.device("cuda", seat.local_rank)


def _check_alike(group: Group) -> None:
    """A machine whose driver has failed has no GPU; the others would wait for it in another backend for ever."""
    if group.world > 1:
        kinds = group._meet(group.device.type)
        if len(set(kinds)) > 1:
            raise InputError(
                f"{group.name(kinds.index('cpu'))} sees no GPU, but {group.name(kinds.index('cuda'))} does; ask fastbert doctor"
            )


def _share_cores(seat: Seat, device: torch.device) -> None:
    """Several processes that compute on one machine's cores would each start a thread for every core."""
    if device.type == "cpu" and seat.local_world and seat.local_world > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // seat.local_world))


def _choose_interface(address: str) -> None:
    """Let gloo listen on the interface that leads to `address`; it would take the one that the host's name means, or none that works.

    NCCL chooses better, since it knows of InfiniBand and of several cards, and it listens on what it uses. But it never chooses the loopback
    interface, which is enough when all processes are on one machine and were told to meet there.
    """
    own = own_address(address)
    name = next((name for name, addresses in psutil.net_if_addrs().items() if own in {item.address for item in addresses}), None)
    if own is not None and name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if ipaddress.ip_address(own).is_loopback:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _whole(name: str, least: int, below: int | None = None, because: str = "") -> int:
    """An environment variable as a whole number of at least `least`, and less than `below`."""
    text = os.environ.get(name, "")
    if not text:
        raise InputError(f"{name} is not set, but WORLD_SIZE = {os.environ.get('WORLD_SIZE')}; a launcher such as torchrun sets it")
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise InputError(f"{name} = {text!r}; must be a whole number of {least} or more; a launcher such as torchrun sets it")
    if below is not None and int(text) >= below:
        raise InputError(f"{name} = {text}; must be less than {below} ({because})")
    return int(text)


def listed(names: list[str]) -> str:
    """The first few of them, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _to_bytes(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _from_bytes(text: Tensor) -> Any:
    return json.loads(text.cpu().numpy().tobytes())
