"""The processes of a run: who they are, and what they agree on.

A single process needs no launcher, no store and no port; gloo itself still opens one, which nobody is told of, on the loopback
interface.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from fastbert.cluster.launch_env import LaunchEnv, read_launch_env
from fastbert.cluster.rendezvous import (
    Deadline,
    Interrupted,
    Member,
    RankLost,
    describe,
    listed,
    own_address,
    rendezvous,
)
from fastbert.cluster.signals import StopRequest
from fastbert.cluster.signature import Key
from fastbert.cluster.signed_store import No, SignedStore
from fastbert.errors import InputError

MARGIN_S = 60.0  # by which a collective outlasts runtime.timeout_s: watchdog.py speaks first, and with a name


class Unconnected(RankLost):
    """All ranks have met, but this one cannot connect to all others; it does not know whose fault it is."""


class Group:
    """The processes of a run, as one of them sees it; made by `join` or `form_group`. A context manager.

    Attributes:
        rank, world: this process's number, and how many there are.
        local_rank: its number on this machine.
        device: the GPU of that number where there is one, else the CPU.
        members: the processes, by rank.
        prefix: a table for small things, signed, and under keys that no other attempt uses. What may block: see `Deadline`.
        holds_store: the store lives in this process, and ends with it.
        store_name: how messages call the store's holder.
        interruption: what notes signals, where somebody does.
        tick: tells the Watchdog that looks after the group, if one does, that this process goes on, and at what.
    """

    device = torch.device("cpu")
    interruption: StopRequest | None = None

    def __init__(
        self, launch: LaunchEnv, members: Sequence[Member], prefix: SignedStore, deadline: Deadline
    ):
        self.rank, self.world, self.local_rank = launch.rank, launch.world, launch.local_rank
        self.members, self.prefix, self.holds_store = list(members), prefix, launch.holds_store
        self.store_name = (
            f"torchrun's store at {launch.where}"
            if launch.agent_store
            else f"{self.name(0)} at {launch.where}"
        )
        self.tick: Callable[[str], None] = lambda what: None
        self._deadline, self._meetings = deadline, 0
        self._variables: list[
            str
        ] = []  # of the environment, that `join` has set for torch and DeepSpeed

    def connect(self) -> None:
        """Open torch's process group; raises Unconnected where it cannot be."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        try:
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                store=self.prefix.raw,
                rank=self.rank,
                world_size=self.world,
                timeout=timedelta(seconds=self._deadline.timeout_s + MARGIN_S),
            )
        except RuntimeError as error:
            raise Unconnected(
                f"{self.name(self.rank)} has met the others, but cannot connect to all of them: {describe(error)}; "
                f"look at GLOO_SOCKET_IFNAME = {os.environ.get('GLOO_SOCKET_IFNAME')} and at the firewall between the machines"
            ) from error

    @property
    def timeout_s(self) -> float:
        """How long the ranks wait for each other."""
        return self._deadline.timeout_s

    @property
    def is_main(self) -> bool:
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

    def heed(self) -> None:
        """Raises Interrupted where a signal has asked this process to end; for `raise_on_all_ranks`, which tells the others."""
        if self.interruption is not None and self.interruption.asked:
            raise Interrupted(self.interruption.asked)

    def set_default(self, name: str, value: str) -> None:
        """Give an environment variable a value for as long as the group lasts, unless it has one."""
        if name not in os.environ:
            os.environ[name] = value
            self._variables.append(name)

    def barrier(self) -> None:
        """Go on when all ranks have come here."""
        if self.world > 1:
            dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """What ends one rank inside this `with` ends every rank at the end of it, in the same words.

        It needs nothing but the store, so it serves before the devices are set up, and ranks may differ in what they do inside.

        Raises:
            InputError: some rank raised one; it is named unless all ranks said the same.
            Interrupted: some rank raised it.
            RankLost: another rank raised any other exception, or did not come to the end of the `with` in time.
        """
        if self.world == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        kind = next(
            (kind.__name__ for kind in (InputError, Interrupted) if isinstance(own, kind)),
            "Exception",
        )
        try:
            fates = self._exchange(
                own and (kind, describe(own) if kind == "Exception" else str(own))
            )
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
                raise InputError(
                    text if shared else f"rank {rank} ({self.members[rank].host}): {text}"
                ) from None

    def close(self) -> None:
        """Leave together with the others; the one that holds the store is the last to go."""
        if self.world > 1:
            self._exchange(None)
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in self._variables:
            os.environ.pop(name, None)

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self.world == 1:
            self.close()  # after an error the others may never come, and a group with a lost member may not let go

    def _exchange(self, value: Any) -> list[Any]:
        """As `gather`, by the store alone, and within the time-out. The process that holds the store stays until all have read."""
        self._meetings += 1
        place = self.prefix.part(f"meeting/{self._meetings}")
        everybody = [str(rank) for rank in range(self.world)]
        values: list[Any] | None = None

        def absent(prefix: str = "") -> str:
            missing = [
                rank for rank in range(self.world) if isinstance(place.read(f"{prefix}{rank}"), No)
            ]
            return f"{listed([self.name(rank) for rank in missing or [0]])} did not come along"

        def complete() -> bool:
            nonlocal values
            if self.rank == 0 and (values := place.read_all(everybody)) is not None:
                place.write("all", values)  # so that hundreds of ranks read one value each
            elif self.rank != 0 and not isinstance(found := place.read("all"), No):
                values = found
            return values is not None

        def work() -> list[Any]:
            place.write(str(self.rank), value)
            self._deadline.until(complete, absent)
            assert values is not None
            place.write(f"read/{self.rank}", None)
            if self.holds_store:
                read = [f"read/{rank}" for rank in everybody]
                self._deadline.until(
                    lambda: place.read_all(read) is not None, lambda: absent("read/")
                )
            return values

        return self._deadline.run(work, self.store_name)


def join(timeout_s: float, interruption: StopRequest | None = None) -> Group:
    """Meet the other processes that the launcher has started, and connect to them: `form_group` and `Group.connect`.

    Raises:
        InputError, Interrupted, RankLost: as those.
    """
    group = form_group(timeout_s, interruption)
    group.connect()
    return group


def form_group(timeout_s: float, interruption: StopRequest | None = None) -> Group:
    """Meet the other processes that the launcher has started; collectives need `Group.connect` besides, which a Watchdog can look after.

    Args:
        timeout_s: how long to wait for the others, now and at every later meeting, in seconds.
        interruption: when a signal is noted in it, the waiting ends.

    Raises:
        InputError: an environment variable of the launcher is missing or contradicts another.
        Interrupted: a signal asked for it.
        RankLost: not all ranks have come in time; the message says which.
    """
    launch, deadline = read_launch_env(), Deadline(timeout_s)
    if launch.world == 1:
        prefix = SignedStore(dist.HashStore(), Key(secrets.token_bytes(), "this process"), "alone")
        group = Group(launch, [Member(socket.gethostname(), os.getpid(), "")], prefix, deadline)
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        }.items():  # DeepSpeed reads them
            group.set_default(name, value)
        address = "127.0.0.1"
    else:
        meeting = deadline.run(
            lambda: rendezvous(launch, deadline), f"rank 0 at {launch.where}", interruption
        )
        group, address = Group(launch, meeting.members, meeting.prefix, deadline), meeting.address
    group.interruption = interruption
    with group.raise_on_all_ranks():
        group.heed()
        group.device = _device(launch)
    _check_alike(group)
    _share_cores(launch, group.device)
    _choose_interface(group, address)
    _close_to_strangers(group)
    return group


def _device(launch: LaunchEnv) -> torch.device:
    """The GPU with this process's local number, where the machine has GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.local_rank >= (count := torch.cuda.device_count()):
        raise InputError(
            f"LOCAL_RANK = {launch.local_rank}, but this process sees {count} GPU{'s' if count > 1 else ''}; start one process a GPU, and let "
            "each of them see all GPUs of its machine"
        )
    return torch.device("cuda", launch.local_rank)


def _check_alike(group: Group) -> None:
    """A machine whose driver has failed has no GPU; the others would wait for it in another backend for ever."""
    if group.world > 1:
        kinds = group._exchange(group.device.type)
        if len(set(kinds)) > 1:
            raise InputError(
                f"{group.name(kinds.index('cpu'))} sees no GPU, but {group.name(kinds.index('cuda'))} does; ask fastbert doctor"
            )


def _share_cores(launch: LaunchEnv, device: torch.device) -> None:
    """Several processes that compute on one machine's cores would each start a thread for every core."""
    if (
        device.type == "cpu"
        and launch.local_world
        and launch.local_world > 1
        and "OMP_NUM_THREADS" not in os.environ
    ):
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        torch.set_num_threads(max(1, cores // launch.local_world))


def _choose_interface(group: Group, address: str) -> None:
    """Let gloo listen on the interface that leads to `address`; it would take the one that the host's name means, or none that works.

    NCCL chooses better, since it knows of InfiniBand and of several cards, and it listens on what it uses. But it never chooses the loopback
    interface, which is enough when all processes are on one machine and were told to meet there.
    """
    own = own_address(address)
    name = next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if own in {item.address for item in addresses}
        ),
        None,
    )
    if own is not None and name is not None:
        group.set_default("GLOO_SOCKET_IFNAME", name)
        if ipaddress.ip_address(own).is_loopback:
            group.set_default("NCCL_SOCKET_IFNAME", name)


def _close_to_strangers(group: Group) -> None:
    """NCCL's monitor ends the process, minutes later, when anybody has written `exception_dump` into the store, which nobody signs.

    It does so to have all ranks write down what their collectives did when one of them has waited too long; by then watchdog.py has said who is
    missing. Whoever wants that more sets the variable.
    """
    if group.world > 1:
        group.set_default("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")


def _to_bytes(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _from_bytes(text: Tensor) -> Any:
    return json.loads(text.cpu().numpy().tobytes())
