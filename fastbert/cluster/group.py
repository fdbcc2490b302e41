"""The processes of a run: their ranks, their device, and the values they exchange.

A single process needs no launcher, no store and no port. gloo still opens a port of its own, on
the loopback interface, which is never advertised.
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

# By how much a collective outlasts runtime.timeout_s. The watchdog therefore reports first, and
# unlike the collective it names the rank.
MARGIN_S = 60.0


class Unconnected(RankLost):
    """All ranks have registered, but this one cannot connect to some; the cause is unknown."""


class Group:
    """The processes of a run, as seen by one of them.

    It is made by `join` or `form_group`, and is a context manager.

    Attributes:
        rank, world: this process's rank, and the number of ranks.
        local_rank: this process's number on its machine.
        local_world: the number of processes on this machine; 1 where the launcher did not say.
        device: the GPU with that number where the machine has GPUs, else the CPU.
        members: the processes, by rank.
        prefix: a part of the store for small signed values, under keys that no other attempt
            uses. Its calls may block; see `Deadline`.
        holds_store: the store lives in this process, and ends with it.
        store_name: what messages call the process that holds the store.
        stop_request: records signals; None where nothing does.
        tick: tells the group's Watchdog, if there is one, that this process makes progress, and
            with what.
    """

    device = torch.device("cpu")
    stop_request: StopRequest | None = None

    def __init__(
        self, launch: LaunchEnv, members: Sequence[Member], prefix: SignedStore, deadline: Deadline
    ):
        self.rank, self.world, self.local_rank = launch.rank, launch.world, launch.local_rank
        self.local_world = launch.local_world or 1
        self.members, self.prefix, self.holds_store = list(members), prefix, launch.holds_store
        self.store_name = (
            f"torchrun's store at {launch.where}"
            if launch.agent_store
            else f"{self.name(0)} at {launch.where}"
        )
        self.tick: Callable[[str], None] = lambda what: None
        self._deadline, self._meetings = deadline, 0
        # Environment variables that `join` has set for torch and DeepSpeed.
        self._variables: list[str] = []

    def connect(self) -> None:
        """Open torch's process group.

        Raises:
            Unconnected: this process cannot reach all others.
        """
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
            if self.world == 1:
                raise InputError(
                    "no network interface is up, not even the loopback, through which torch's "
                    f"process group of one process talks to itself ({describe(error)}); "
                    "start it with: ip link set lo up"
                ) from None
            raise Unconnected(
                f"{self.name(self.rank)} has met the others, but cannot connect to all of them: "
                f"{describe(error)}; look at GLOO_SOCKET_IFNAME = "
                f"{os.environ.get('GLOO_SOCKET_IFNAME')} and at the firewall between the machines"
            ) from error

    @property
    def timeout_s(self) -> float:
        """How long the ranks wait for each other, in seconds."""
        return self._deadline.timeout_s

    @property
    def is_main(self) -> bool:
        """Whether this process writes to the terminal and to the run folder."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """What messages call a rank: "rank 3 (node7, process 4711)"."""
        return f"rank {rank} ({self.members[rank].host}, process {self.members[rank].process})"

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on all ranks. JSON must represent it."""
        text = _to_bytes(value if self.rank == 0 else None, self.device)
        if self.world > 1:
            size = torch.tensor([len(text)], device=self.device)
            dist.broadcast(size, 0)
            text = text if self.rank == 0 else text.new_empty(int(size))
            dist.broadcast(text, 0)
        return _from_bytes(text)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on every rank. JSON must represent it."""
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
        """Add up `values` over the ranks, in place, and return them."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, share: Tensor) -> Tensor:
        """Return the ranks' tensors [n], of equal sizes, joined in the order of the ranks."""
        share = share.to(self.device)
        if self.world == 1:
            return share
        whole = share.new_empty(self.world * share.numel())
        dist.all_gather_into_tensor(whole, share)
        return whole

    def heed(self) -> None:
        """Raise Interrupted where a signal has asked this process to stop.

        Call it inside `raise_on_all_ranks`, which tells the other ranks.
        """
        if self.stop_request is not None and self.stop_request.asked:
            raise Interrupted(self.stop_request.asked)

    def set_default(self, name: str, value: str) -> None:
        """Set an environment variable until the group closes, unless it is already set."""
        if name not in os.environ:
            os.environ[name] = value
            self._variables.append(name)

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.world > 1:
            dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """An exception on one rank inside this `with` is raised on every rank at its end.

        It needs only the store, so it works before the devices are set up. Ranks may do different
        things inside.

        Raises:
            InputError: some rank raised one; it is named unless all ranks raised the same.
            Interrupted: some rank raised it.
            RankLost: another rank raised any other exception, or did not reach the end of the
                `with` in time.
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
            outcomes = self._exchange(
                own and (kind, describe(own) if kind == "Exception" else str(own))
            )
        except RankLost:
            if own is not None:
                raise own from None
            raise
        if own is not None and kind == "Exception":
            raise own
        # A bug is more informative than bad input, and bad input more than a signal.
        for kind in ("Exception", "InputError", "Interrupted"):
            affected = [
                rank for rank, outcome in enumerate(outcomes) if outcome and outcome[0] == kind
            ]
            if affected:
                rank, text = affected[0], outcomes[affected[0]][1]
                if kind == "Exception":
                    raise RankLost(f"{self.name(rank)} failed: {text}") from None
                if kind == "Interrupted":
                    raise Interrupted(text) from None
                shared = all(outcome == [kind, text] for outcome in outcomes)
                raise InputError(
                    text if shared else f"rank {rank} ({self.members[rank].host}): {text}"
                ) from None

    def close(self) -> None:
        """Leave together with the others; the rank that holds the store leaves last."""
        if self.world > 1:
            self._exchange(None)
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in self._variables:
            os.environ.pop(name, None)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # After an error the others may never call `close`, and destroying a process group that
        # has lost a member may block.
        if error is None or self.world == 1:
            self.close()

    def _exchange(self, value: Any) -> list[Any]:
        """Do what `gather` does through the store alone, within the time-out.

        The process that holds the store stays until all ranks have read the values.
        """
        self._meetings += 1
        place = self.prefix.part(f"meeting/{self._meetings}")
        everybody = [str(rank) for rank in range(self.world)]
        values: list[Any] | None = None

        def absent(prefix: str = "") -> str:
            missing = [
                rank for rank in range(self.world) if isinstance(place.read(f"{prefix}{rank}"), No)
            ]
            names = listed([self.name(rank) for rank in missing or [0]])
            return f"{names} did not respond"

        def complete() -> bool:
            nonlocal values
            if self.rank == 0 and (values := place.read_all(everybody)) is not None:
                # One combined value, so that each of hundreds of ranks reads one key.
                place.write("all", values)
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


def join(timeout_s: float, stop_request: StopRequest | None = None) -> Group:
    """Find the other processes of the launch and connect to them.

    This is `form_group` followed by `Group.connect`.

    Raises:
        InputError, Interrupted, RankLost: see those two.
    """
    group = form_group(timeout_s, stop_request)
    group.connect()
    return group


def form_group(timeout_s: float, stop_request: StopRequest | None = None) -> Group:
    """Find the other processes that the launcher has started.

    Collectives also need `Group.connect`. It is separate so that a Watchdog can supervise it.

    Args:
        timeout_s: how long to wait for the others, now and at every later exchange, in seconds.
        stop_request: a signal that it records ends the waiting.

    Raises:
        InputError: an environment variable of the launcher is missing or contradicts another.
        Interrupted: a signal asked for it.
        RankLost: some ranks have not come in time; the message names them.
    """
    launch, deadline = read_launch_env(), Deadline(timeout_s)
    if launch.world == 1:
        prefix = SignedStore(dist.HashStore(), Key(secrets.token_bytes(), "this process"), "alone")
        group = Group(launch, [Member(socket.gethostname(), os.getpid(), "")], prefix, deadline)
        # DeepSpeed reads these variables even where there is one process.
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            group.set_default(name, value)
        address = "127.0.0.1"
    else:
        meeting = deadline.run(
            lambda: rendezvous(launch, deadline), f"rank 0 at {launch.where}", stop_request
        )
        group, address = Group(launch, meeting.members, meeting.prefix, deadline), meeting.address
    group.stop_request = stop_request
    with group.raise_on_all_ranks():
        group.heed()
        group.device = _device(launch)
    _check_alike(group)
    _choose_interface(group, address)
    _ignore_dump_requests(group)
    return group


def _device(launch: LaunchEnv) -> torch.device:
    """The GPU with this process's local rank where the machine has GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.local_rank >= (count := torch.cuda.device_count()):
        gpus = f"{count} GPU{'s' if count > 1 else ''}"
        raise InputError(
            f"LOCAL_RANK = {launch.local_rank}, but this process sees {gpus}; start one process "
            "a GPU, and let each of them see all GPUs of its machine"
        )
    return torch.device("cuda", launch.local_rank)


def _check_alike(group: Group) -> None:
    """Raise InputError where some ranks see a GPU and others do not.

    A machine whose driver has failed sees no GPU. Its ranks would open another backend than the
    others, and all would wait for ever.
    """
    if group.world > 1:
        kinds = group._exchange(group.device.type)
        if len(set(kinds)) > 1:
            without, with_one = kinds.index("cpu"), kinds.index("cuda")
            raise InputError(
                f"{group.name(without)} sees no GPU, but {group.name(with_one)} does; "
                "ask fastbert doctor"
            )


def _choose_interface(group: Group, address: str) -> None:
    """Make gloo listen on the interface that leads to `address`.

    By default gloo takes the interface that the host's name resolves to, which may not work.
    NCCL chooses better, since it knows InfiniBand and machines with several network cards, and it
    listens only on what it uses. But NCCL never chooses the loopback interface, which is enough
    when all processes are on one machine and MASTER_ADDR is a loopback address.
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


def _ignore_dump_requests(group: Group) -> None:
    """Set TORCH_NCCL_DUMP_ON_TIMEOUT to 0, unless the user has set it.

    With the dump enabled, NCCL's monitor ends the process, minutes later, when anybody has
    written `exception_dump` into the store. That key is not signed, so a stranger can write it.
    The dump makes all ranks record their collectives when one of them has waited too long. By
    then the watchdog has already named the missing rank.
    """
    if group.world > 1:
        group.set_default("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")


def _to_bytes(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _from_bytes(text: Tensor) -> Any:
    return json.loads(text.cpu().numpy().tobytes())
