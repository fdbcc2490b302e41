"""Checkpoints are asynchronous: every rank copies its share to the CPU, and a thread writes it.

begin     all ranks   copy the share: training waits for this only
(thread)  all ranks   staging/tensors-RANK-NUMBER.safetensors: write, fsync, read back
finish    all ranks   gather what was written; rank 0: manifest, fsync, rename, fsync
(thread)  rank 0      delete checkpoints that are too old

Where the copy turns out to be of weights that give no finite loss, `discard` replaces `finish`:

discard   all ranks   delete what was written; older checkpoints stay
"""

from __future__ import annotations

import copy
import functools
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.bucket import InBucket
from fastbert.checkpoints.failpoint import reach
from fastbert.cluster.group import Group
from fastbert.errors import InputError
from fastbert.storage import Place, place


@dataclass(frozen=True)
class Saved:
    """The result of a save, the same on every rank.

    Attributes:
        step: optimizer steps done.
        path: the checkpoint; None where the save failed.
        problem: why it failed, in one line with the rank, the file and the reason; else None.
        stall_s: for how many seconds training waited for it.
    """

    step: int
    path: Place | None
    problem: str | None
    stall_s: float


GIVE_UP_S = 30.0  # how long a run that fails waits for the disk


class OnDisk:
    """Checkpoints on a file system that all ranks see.

    All methods but `sweep` belong to one attempt to save.

    Args:
        folder: the run's checkpoints/; made where it is missing.
        keep: how many checkpoints stay.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep = folder, keep

    def sweep(self) -> None:
        """On rank 0 at the start: delete what processes left that died while they saved."""
        checkpoint.sweep(self._folder)

    def staging(self, step: int, token: str) -> Path:
        """The folder of an attempt, on a disk of this machine."""
        return checkpoint.staging_of(self._folder, step, token)

    def write(
        self, staging: Path, rank: int, share: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Any]]:
        """On every rank, in a thread: write its share; as `checkpoint.write_share`."""
        return checkpoint.write_share(staging, rank, share)

    def publish(
        self,
        step: int,
        staging: Path,
        files: Mapping[str, Mapping[str, Any]],
        metadata: Mapping[str, Any],
    ) -> Place:
        """On rank 0: make the shares a checkpoint; as `checkpoint.publish`."""
        return checkpoint.publish(self._folder, step, staging, files, metadata)

    def retire(self, step: int) -> Callable[[], None]:
        """On rank 0: choose checkpoints that are too old; the result deletes them, in a thread."""
        retired = checkpoint.retire(self._folder, step, self._keep)
        return lambda: checkpoint.delete(retired)

    def discard(self, staging: Path, is_main: bool) -> None:
        """On every rank: delete what was written of an attempt."""
        shutil.rmtree(staging, ignore_errors=True)


Destination = OnDisk | InBucket  # where the checkpoints of a run go


class Saver:
    """Writes the checkpoints of a run in the background, one at a time.

    A save that fails does not raise. `Saved.problem` gives the reason, older checkpoints are
    untouched, and nothing half-written is left.

    Args:
        group: all ranks of the run; they must make the same calls in the same order.
        destination: where they go.
        token: unique to this start of the run. It is part of the staging folder's name, so that a
            process of an earlier start that is still alive does not write into ours.
    """

    def __init__(self, group: Group, destination: Destination, token: str):
        self._group, self._destination, self._token = group, destination, token
        self._begun = 0
        self._save: _Save | None = None
        self._cleaning: threading.Thread | None = None

    def sweep(self) -> None:
        """At the start: delete what processes left that died while they saved.

        Raises:
            InputError: the folder cannot be read.
        """
        # All ranks wait for it, or the first share of a quick rank would be deleted.
        with self._group.raise_on_all_ranks():
            if self._group.is_main:
                self._destination.sweep()

    @property
    def busy(self) -> bool:
        """Whether a save has begun and is not finished; the same on all ranks."""
        return self._save is not None

    @property
    def written(self) -> bool:
        """Whether this rank's part of the save is done or has failed, or there is no save."""
        return self._save is None or not self._save.is_alive()

    def give_up(self) -> None:
        """Wait some seconds for the thread of a save that is not published any more.

        A process that exits while a thread writes may abort, with another exit code.
        """
        if self._save is not None:
            self._save.join(GIVE_UP_S)

    def begin(
        self, step: int, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, Any]
    ) -> None:
        """Copy this rank's share, and start a thread that writes it.

        The previous save must be finished.

        Args:
            step: optimizer steps done.
            tensors: names ("weight/...", "exp_avg/...") and fp32 tensors: all of them, in the same
                order on every rank.
            metadata: goes into the manifest as JSON; that of rank 0 is used.
        """
        assert not self.busy, "one save at a time"
        started = time.perf_counter()
        self._begun += 1  # a step that could not be saved may be tried again
        staging = self._destination.staging(step, f"{self._token}-{self._begun}")
        share = checkpoint.share_of(self._group.rank, self._group.world, tensors)
        reach("copied")
        write = functools.partial(self._destination.write, staging, self._group.rank, share)
        self._save = _Save(step, copy.deepcopy(dict(metadata)), staging, write)
        self._save.stall_s = time.perf_counter() - started

    def finish(self) -> Saved:
        """Turn the save that has begun into a checkpoint.

        It waits for this rank's thread and for the other ranks, so call it when all have `written`.
        """
        save, started = self._save, time.perf_counter()
        assert save is not None, "nothing was begun"
        self._group.tick(f"the checkpoint of step {save.step}")
        save.join()
        shares = self._group.gather(
            {"files": save.files, "problem": save.problem, "stall_s": save.stall_s}
        )
        reach("gathered")
        path, problem = None, self._problem([share["problem"] for share in shares])
        if self._group.is_main and problem is None:
            try:
                files = {name: entry for share in shares for name, entry in share["files"].items()}
                path = str(self._destination.publish(save.step, save.staging, files, save.metadata))
                self._clean_up(save.step)
            except (OSError, InputError) as error:
                problem = self._problem([_one_line(error, save.staging)])
        stall_s = max(share["stall_s"] for share in shares) + time.perf_counter() - started
        path, problem, stall_s = self._group.broadcast([path, problem, stall_s])
        if problem is not None:
            self._destination.discard(save.staging, self._group.is_main)
        self._save = None
        return Saved(save.step, path and place(path), problem, stall_s)

    def discard(self, problem: str) -> Saved:
        """Give up the save that has begun, and delete what is written of it.

        All ranks call it.

        Args:
            problem: the reason, for `Saved.problem`.
        """
        save = self._save
        assert save is not None, "nothing was begun"
        save.join()
        self._group.barrier()  # a thread that still writes would create the folder again
        self._destination.discard(save.staging, self._group.is_main)
        self._save = None
        return Saved(save.step, None, problem, save.stall_s)

    def wait(self) -> Saved | None:
        """At the end: finish the save in flight, and wait until old checkpoints are deleted.

        Returns:
            The result of the save; None where there is none.
        """
        saved = self.finish() if self.busy else None
        if self._cleaning is not None:
            self._cleaning.join()
        return saved

    def _problem(self, problems: list[str | None]) -> str | None:
        """The first rank's problem, with its rank and the number of others where world > 1."""
        found = [(rank, problem) for rank, problem in enumerate(problems) if problem]
        if not found or self._group.world == 1:
            return found[0][1] if found else None
        (rank, problem), *others = found
        more = f" (and {len(others)} more of {self._group.world})" if others else ""
        return f"rank {rank}: {problem}{more}"

    def _clean_up(self, step: int) -> None:
        """On rank 0: choose checkpoints that are too old, and start a thread that deletes them."""
        if self._cleaning is not None:
            self._cleaning.join()
        self._cleaning = threading.Thread(
            target=_delete,
            args=(self._destination.retire(step),),
            name="old checkpoints",
            daemon=True,
        )
        self._cleaning.start()


class _Save(threading.Thread):
    """A save in flight: a thread that writes this rank's share.

    It is a daemon thread, so that a run that fails does not wait for the disk.
    """

    def __init__(
        self,
        step: int,
        metadata: dict[str, Any],
        staging: Path,
        write: Callable[[], dict[str, dict[str, Any]]],
    ):
        super().__init__(name="checkpoint", daemon=True)
        self.step, self.metadata, self.staging, self.stall_s = step, metadata, staging, 0.0
        self.files: dict[str, dict[str, Any]] = {}
        self.problem: str | None = None
        self._write: Callable[[], dict[str, dict[str, Any]]] | None = write
        self.start()

    def run(self) -> None:
        try:
            assert self._write is not None
            self.files = self._write()
        except Exception as error:  # any: training continues, and `finish` reports it
            self.problem = _one_line(error, self.staging)
        self._write = None  # which holds the share


def _delete(remove: Callable[[], None]) -> None:
    remove()
    reach("saved")


def _one_line(error: Exception, place: Path) -> str:
    """Format an error as one line with the file and the reason."""
    if isinstance(error, OSError):
        return f"{error.filename or place}: {error.strerror or error}"
    if isinstance(error, InputError):
        return str(error)
    return f"{place}: {' '.join(str(error).split()) or type(error).__name__}"
