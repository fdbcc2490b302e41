"""The environment variables by which a launcher tells each process its rank.

Launchers are torchrun, deepspeed and srun.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastbert.errors import InputError

# How launchers that know nothing of torch give the number of processes. Where only these are set
# and WORLD_SIZE is not, each process would train alone, all in the same run folder.
OTHER_STARTERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
# A variable that a launcher sets, where the launcher is the parent of its ranks. `deepspeed` starts
# `python -m deepspeed.launcher.launch` on each machine, which sets it.
_PARENTS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_SIZE": "deepspeed", **OTHER_STARTERS}


@dataclass(frozen=True)
class LaunchEnv:
    """The variables that the launcher has set for this process.

    Attributes:
        rank, world: the rank of this process, and the number of ranks.
        local_rank: its number on this machine.
        local_world: processes on this machine; None where the launcher did not say.
        address, port: MASTER_ADDR and MASTER_PORT; empty and 0 for a single process.
        agent_store: the launcher holds a store at that address.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int | None = 1
    address: str = ""
    port: int = 0
    agent_store: bool = False

    @property
    def holds_store(self) -> bool:
        return self.rank == 0 and not self.agent_store

    @property
    def where(self) -> str:
        return f"{self.address}:{self.port}"


def launched() -> bool:
    """Whether a launcher has started several processes.

    Raises:
        InputError: WORLD_SIZE is not a whole number of 1 or more.
    """
    return bool(os.environ.get("WORLD_SIZE")) and _whole("WORLD_SIZE", 1) > 1


def launcher() -> str | None:
    """The launcher that is the parent of this process; None where there is none.

    A shell in a step of Slurm has Slurm's variables, but no WORLD_SIZE.
    """
    if "WORLD_SIZE" not in os.environ:
        return None
    return next((name for key, name in _PARENTS.items() if key in os.environ), None)


def read_launch_env() -> LaunchEnv:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Raises:
        InputError: one of them is missing or wrong; the message names it.
    """
    given = os.environ.get
    if not given("WORLD_SIZE"):
        if given("RANK", "0") != "0":
            raise InputError(
                f"RANK = {given('RANK')}, but WORLD_SIZE is not set; "
                "a launcher such as torchrun sets both"
            )
        for name, starter in OTHER_STARTERS.items():
            if given(name, "1") != "1":
                raise InputError(
                    f"{name} = {given(name)}: {starter} has started several processes, but "
                    "WORLD_SIZE is not set, so each would train alone; set RANK, WORLD_SIZE, "
                    "LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or start one torchrun a machine: "
                    "see docs/multi-node.md"
                )
        return LaunchEnv()
    world = _whole("WORLD_SIZE", 1)
    rank = _whole("RANK", 0, world, f"WORLD_SIZE = {world}")
    if world == 1:
        return LaunchEnv(local_rank=_whole("LOCAL_RANK", 0) if given("LOCAL_RANK") else 0)
    # torchrun's name, then DeepSpeed's name.
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if given(name)), None)
    local_world = _whole(local, 1, world + 1, f"WORLD_SIZE = {world}") if local else None
    if not given("MASTER_ADDR"):
        raise InputError(
            f"MASTER_ADDR is not set, but WORLD_SIZE = {world}; "
            "give the address of rank 0's machine"
        )
    return LaunchEnv(
        rank=rank,
        world=world,
        local_rank=_whole(
            "LOCAL_RANK",
            0,
            local_world or world,
            f"{local or 'WORLD_SIZE'} = {local_world or world}",
        ),
        local_world=local_world,
        address=given("MASTER_ADDR", ""),
        port=_whole("MASTER_PORT", 1, 65536, "the number of ports"),
        agent_store=given("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _whole(name: str, least: int, below: int | None = None, because: str = "") -> int:
    """Read an environment variable as a whole number of at least `least`, less than `below`."""
    text = os.environ.get(name, "")
    if not text:
        raise InputError(
            f"{name} is not set, but WORLD_SIZE = {os.environ.get('WORLD_SIZE')}; "
            "a launcher such as torchrun sets it"
        )
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise InputError(
            f"{name} = {text!r}; must be a whole number of {least} or more; "
            "a launcher such as torchrun sets it"
        )
    if below is not None and int(text) >= below:
        raise InputError(f"{name} = {text}; must be less than {below} ({because})")
    return int(text)
