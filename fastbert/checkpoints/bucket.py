"""A run folder in a bucket, with the promises of one on a disk.

    URL/.owners/00000002          written by the second start; the newest one owns the run
    URL/config.toml, metrics.jsonl, log.txt, loss.png, tokenizer/, ...
    URL/checkpoints/step-00000200-00000002-1/
        tensors-00000-00000.safetensors, ...
        manifest.json             put last: without it there is no checkpoint

A bucket has no rename and no lock, so:

- **Every attempt to save has a folder of its own**, named by step, start and number. No object of a
  checkpoint is ever replaced, and one without a manifest is no checkpoint.
- **A start is the object that it alone could make** (put if absent): its number is the fencing
  token. It says at which step it began. What an earlier start publishes after that step, because it
  was cut off and does not know yet, is not part of the run: no start resumes from it, and the next
  one deletes it. So it does not matter how late a process finds out that it has lost the run.
- **Each process works in a folder of its own on a local disk**, and uploads from there: its share
  of a checkpoint, and on rank 0 the records. Nothing is shared but the bucket.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbert import storage
from fastbert.cache import Copy, workspace
from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.checkpoint import MANIFEST, Checkpoint, Manifest
from fastbert.checkpoints.failpoint import reach
from fastbert.checkpoints.ownership import LostOwnership
from fastbert.durable import sha256_of
from fastbert.errors import InputError
from fastbert.storage import Place, Url

OWNERS, CHECKPOINTS = ".owners", "checkpoints"
RECORDS = ("metrics.jsonl", "log.txt", "loggers.json")  # that a resumed run continues
POLL_S = 10.0  # between two looks whether another start has taken over
_ATTEMPT = re.compile(r"step-(\d{8,})-(\d{8,})-(\d+)")
_OWNER = re.compile(r"(\S+) (\S*) (\d+) (\d+)\n")  # nonce, machine, process, step


@dataclass(frozen=True, order=True)
class Attempt:
    """An attempt to save, by the name of its folder."""

    step: int
    owner: int
    number: int

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}-{self.owner:08d}-{self.number}"

    @staticmethod
    def of(name: str) -> Attempt | None:
        found = _ATTEMPT.fullmatch(name)
        return found and Attempt(*map(int, found.groups()))


@dataclass(frozen=True)
class Owner:
    """What a start has written about itself; `step` is where it began."""

    number: int
    host: str
    process: int
    step: int


class Bucket:
    """A run folder in a bucket, as one process of the run sees it.

    Args:
        url: of the run folder.

    Attributes:
        work: this process's own folder, a local picture of the run; `close` removes it.
    """

    def __init__(self, url: Url):
        self.url = url
        self._stack = ExitStack()
        # Its name is that of the run, for pictures and trackers.
        self.work = self._stack.enter_context(workspace("runs")) / url.name
        self.work.mkdir()
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._uploading = threading.Lock()

    def close(self) -> None:
        self._stack.close()

    def owners(self) -> list[Owner]:
        """All starts, oldest first. Raises as storage.objects, or OSError for a damaged one."""
        return [self._owner(number) for number in self._numbers()]

    def _numbers(self) -> list[int]:
        found = storage.objects(self.url / OWNERS)
        return sorted(int(entry.name) for entry in found if entry.name.isdecimal())

    def _owner(self, number: int) -> Owner:
        at = self.url / OWNERS / f"{number:08d}"
        found = _OWNER.fullmatch(storage.read(at).decode("utf-8", "replace"))
        if found is None:
            raise InputError(f"{at}: not written by fastbert; give another folder by run=...")
        return Owner(number, found[2], int(found[3]), int(found[4]))

    def claim(self, step: int) -> BucketLock:
        """Take the run over: become its newest start.

        Args:
            step: where this start begins.

        Raises:
            OSError, InputError: as storage.write_new.
        """
        nonce = f"{time.time_ns():x}{os.urandom(4).hex()}"
        data = f"{nonce} {socket.gethostname()} {os.getpid()} {step}\n".encode()
        while True:
            number = max(self._numbers(), default=0) + 1
            if storage.write_new(self.url / OWNERS / f"{number:08d}", data):
                return BucketLock(self, number)

    def check_folder(self) -> None:
        """Raise InputError where there is something else than a run."""
        names = storage.names(self.url)
        if names and OWNERS not in names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(
                f"holds {', '.join(names[:3])}{more}, and is no run; "
                "give a new or an empty folder by run=..."
            )

    def attempts(self) -> dict[Attempt, dict[str, int]]:
        """All attempts to save, also incomplete ones: size by name of their objects."""
        found: dict[Attempt, dict[str, int]] = {}
        for entry in storage.objects(self.url / CHECKPOINTS):
            folder, _, name = entry.name.partition("/")
            if name and (attempt := Attempt.of(folder)) is not None:
                found.setdefault(attempt, {})[name] = entry.size
        return found

    def checkpoints(self) -> dict[Attempt, dict[str, int]]:
        """The attempts that became checkpoints of this run, newest first."""
        owners, found = self.owners(), self.attempts()
        return {
            attempt: found[attempt]
            for attempt in sorted(found, reverse=True)
            if MANIFEST in found[attempt] and _belongs(attempt, owners)
        }

    def read_manifest(self, attempt: Attempt, there: Mapping[str, int]) -> Manifest | str:
        """Read a checkpoint's manifest and compare the sizes; a string says what is damaged."""
        parsed = checkpoint.parse_manifest(storage.read(self._at(attempt) / MANIFEST))
        if isinstance(parsed, str):
            return parsed
        for name, (size, _) in parsed.files.items():
            if name not in there:
                return f"{name} is missing"
            if there[name] != size:
                return f"{name} has {there[name]:,} bytes in place of {size:,}"
        return parsed

    def read_records(self) -> None:
        """Copy the records that a resumed run continues into `work`."""
        for name in RECORDS:
            with contextlib.suppress(FileNotFoundError):
                length = storage.size(self.url / name)
                if length is not None:
                    for _ in storage.fetch(self.url / name, self.work / name, length, None):
                        pass

    def upload_records(self, number: int) -> None:
        """Upload what has changed in `work`, but checkpoints; only while start `number` owns it.

        Raises:
            LostOwnership: it does not.
            OSError, InputError: as storage.put.
        """
        with self._uploading:
            self.check_owner(number)
            for entry in storage.objects(self.work):
                file = self.work / entry.name
                if entry.name.startswith(f"{CHECKPOINTS}/"):
                    continue
                with contextlib.suppress(FileNotFoundError):  # a temporary file of this process
                    stamp = file.stat().st_size, file.stat().st_mtime_ns
                    if self._uploaded.get(entry.name) != stamp and ".writing-" not in entry.name:
                        storage.put(file, self.url / entry.name)
                        self._uploaded[entry.name] = stamp

    def remove_records(self) -> None:
        """Remove the records of an earlier start that left no checkpoint, and nothing else."""
        for entry in storage.objects(self.url):
            if entry.name.split("/")[0] in (*RECORDS, "loss.png", "tensorboard"):
                storage.remove(self.url / entry.name)

    def check_owner(self, number: int) -> None:
        """Raise LostOwnership where another start has taken the run over.

        Raises also as storage.objects.
        """
        newest = max(self._numbers(), default=0)
        if newest == number:
            return
        if newest < number:
            raise LostOwnership(f"{self.url / OWNERS} is gone: the run was deleted or moved")
        where = "elsewhere"
        with contextlib.suppress(OSError, InputError):
            owner = self._owner(newest)
            where = f"on {owner.host}, process {owner.process}"
        raise LostOwnership(f"another start of this run ({where}) has taken {self.url} over")

    def _at(self, attempt: Attempt) -> Url:
        return self.url / CHECKPOINTS / attempt.name


def checkpoint_steps(url: Url) -> list[int]:
    """Return the steps of a run's checkpoints, oldest first; none where there is no run.

    Raises:
        OSError, InputError: as storage.objects.
    """
    with contextlib.closing(Bucket(url)) as bucket:
        return sorted({attempt.step for attempt in bucket.checkpoints()})


def fetch_checkpoint(url: Url, step: int | None = None) -> Checkpoint:
    """Copy the newest valid checkpoint of a run to this machine, with the tokenizer.

    Args:
        url: of the run.
        step: only a checkpoint of this step.

    Returns:
        The checkpoint; its folder is one that model_folder.open_model opens.

    Raises:
        InputError: there is no run with such a checkpoint, or the store does not answer.
    """
    complaints: list[str] = []
    with storage.answering(url), contextlib.closing(Bucket(url)) as bucket:
        for attempt, there in bucket.checkpoints().items():
            if step is not None and attempt.step != step:
                continue
            manifest = bucket.read_manifest(attempt, there)
            problem = manifest if isinstance(manifest, str) else None
            if not isinstance(manifest, str):
                copy = RunCopy(url, attempt, manifest, with_tokenizer=True)
                for _ in copy:
                    pass
                if (problem := copy.problem) is None:
                    return copy.checkpoint
            complaints.append(f"{url / CHECKPOINTS / attempt.name}: damaged: {problem}")
    raise InputError(
        f"{url}: a run without a valid checkpoint: {complaints[0]}"
        if complaints
        else f"{url}: no run with a checkpoint; give the URL of a run that fastbert made"
    )


class RunCopy:
    """A verified copy of a checkpoint, laid out as a run folder; iterated as cache.Copy.

    Attributes:
        run: the folder.
        problem: after the iteration: how the checkpoint is damaged; None where it is not.
    """

    def __init__(self, url: Url, attempt: Attempt, manifest: Manifest, with_tokenizer: bool):
        self._url, self._attempt, self._manifest = url, attempt, manifest
        self._tokenizer = with_tokenizer
        self.problem: str | None = None
        digest = hashlib.sha256(repr((manifest.files, manifest.metadata)).encode()).hexdigest()
        kind = "models" if with_tokenizer else "checkpoints"
        total = sum(size for size, _ in manifest.files.values())
        self._copy = Copy(kind, f"{attempt.name}-{digest[:16]}", total, self._make)
        self.run = self._copy.path

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint; its files were verified when they were copied."""
        return Checkpoint(
            self.run / CHECKPOINTS / self._attempt.name,
            self._manifest.step,
            self._manifest.metadata,
            str(self._url / CHECKPOINTS / self._attempt.name),
        )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        try:
            yield from self._copy
        except _Damaged as damaged:
            self.problem = str(damaged)

    def _make(self, folder: Path) -> Iterator[int]:
        at = self._url / CHECKPOINTS / self._attempt.name
        to = folder / CHECKPOINTS / self._attempt.name
        to.mkdir(parents=True)
        for name, (size, digest) in self._manifest.files.items():
            if storage.size(at / name) != size:
                raise _Damaged(f"{name} is missing or has another size")
            yield from storage.fetch(at / name, to / name, size, None)
            if sha256_of(to / name) != digest:
                raise _Damaged(f"{name} does not have the SHA-256 of the manifest")
        (to / MANIFEST).write_bytes(storage.read(at / MANIFEST))
        if self._tokenizer:
            (folder / "tokenizer").mkdir()
            for name in storage.names(self._url / "tokenizer"):
                data = storage.read(self._url / "tokenizer" / name)
                (folder / "tokenizer" / name).write_bytes(data)


class _Damaged(Exception):
    """A checkpoint does not have the content that its manifest states."""


class BucketLock:
    """The ownership of a run by one start; the methods are those of RunLock.

    Args:
        bucket: the run.
        number: of this start.
    """

    def __init__(self, bucket: Bucket, number: int):
        self._bucket, self.number = bucket, number
        self.token = f"{number:08d}"
        self._lost: LostOwnership | None = None
        self._over = threading.Event()

    def watch(self) -> None:
        """Look every few seconds, in a thread, so that no step waits for the store."""
        threading.Thread(target=self._poll, name="owner", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def holds(self) -> bool:
        """Whether this start is visible here and is the newest one."""
        with contextlib.suppress(LostOwnership):
            self._bucket.check_owner(self.number)
            return True
        return False

    def check(self) -> None:
        """Raise LostOwnership where the thread has seen that another start has taken over."""
        if self._lost is not None:
            raise self._lost

    def _poll(self) -> None:
        while not self._over.wait(POLL_S):
            try:
                self._bucket.check_owner(self.number)
            except LostOwnership as lost:
                self._lost = lost
                return
            except (OSError, InputError):  # the store does not answer, which says nothing
                pass


class InBucket:
    """The checkpoints of a run in a bucket; the methods are those of saver.OnDisk.

    Args:
        bucket: the run.
        owner: the number of this start.
        keep: how many checkpoints stay.
    """

    def __init__(self, bucket: Bucket, owner: int, keep: int):
        self._bucket, self._owner, self._keep = bucket, owner, keep

    def sweep(self) -> None:
        """Delete attempts of earlier starts that are no checkpoints of this run."""
        owners = self._bucket.owners()
        for attempt, there in self._bucket.attempts().items():
            complete = MANIFEST in there and _belongs(attempt, owners)
            if attempt.owner < self._owner and not complete:
                with contextlib.suppress(OSError):
                    self._remove(attempt, there)

    def staging(self, step: int, token: str) -> Path:
        _, _, number = token.rpartition("-")
        name = Attempt(step, self._owner, int(number)).name
        return self._bucket.work / CHECKPOINTS / name

    def write(
        self, staging: Path, rank: int, share: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Any]]:
        files = checkpoint.write_share(staging, rank, share)
        for name, entry in files.items():
            reach("uploading")
            storage.upload(staging / name, self._at(staging) / name, entry["sha256"])
        shutil.rmtree(staging, ignore_errors=True)
        reach("share-uploaded")
        if rank == 0:
            with contextlib.suppress(LostOwnership):  # `publish` raises it
                self._bucket.upload_records(self._owner)
            reach("records-uploaded")
        return files

    def publish(
        self,
        step: int,
        staging: Path,
        files: Mapping[str, Mapping[str, Any]],
        metadata: Mapping[str, Any],
    ) -> Place:
        at = self._at(staging)
        there = {entry.name: entry.size for entry in storage.objects(at)}
        for name, entry in files.items():
            if there.get(name) != entry["size"]:
                raise OSError(5, "does not have the size that its rank uploaded", str(at / name))
        text = checkpoint.manifest_bytes(checkpoint.manifest_of(step, files, metadata))
        self._bucket.check_owner(self._owner)
        reach("publishing")
        storage.write(at / MANIFEST, text)
        if storage.read(at / MANIFEST) != text:
            raise OSError(5, "read back wrong right after it was put", str(at / MANIFEST))
        reach("manifest-uploaded")
        return at

    def retire(self, step: int) -> Callable[[], None]:
        def remove() -> None:
            with contextlib.suppress(OSError, InputError):
                older = [a for a in self._bucket.checkpoints() if a.step < step]
                there = self._bucket.attempts()
                for attempt in older[self._keep - 1 :]:
                    self._remove(attempt, there[attempt])
                reach("retired")

        return remove

    def discard(self, staging: Path, is_main: bool) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        attempt = Attempt.of(staging.name)
        if is_main and attempt is not None:
            with contextlib.suppress(OSError, InputError):
                self._remove(attempt, self._bucket.attempts().get(attempt, {}))

    def _at(self, staging: Path) -> Url:
        return self._bucket.url / CHECKPOINTS / staging.name

    def _remove(self, attempt: Attempt, there: Mapping[str, int]) -> None:
        """Remove an attempt, its manifest first: half of a checkpoint is none."""
        at = self._bucket.url / CHECKPOINTS / attempt.name
        for number, name in enumerate(sorted(there, key=lambda name: name != MANIFEST)):
            if number == 1:
                reach("retiring")
            storage.remove(at / name)


def _belongs(attempt: Attempt, owners: list[Owner]) -> bool:
    """Whether a checkpoint is part of the run: no later start began before it."""
    return all(owner.step >= attempt.step for owner in owners if owner.number > attempt.owner)
