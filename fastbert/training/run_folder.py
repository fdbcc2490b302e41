"""The run folder: taken over by the newest start, with the files that a run begins with."""

from __future__ import annotations

import errno
import time
from pathlib import Path

from fastbert.checkpoints.bucket import BucketLock
from fastbert.checkpoints.ownership import LostOwnership, RunLock
from fastbert.cluster.group import Group
from fastbert.data.manifest import tokenizer_files
from fastbert.durable import write_whole
from fastbert.errors import InputError
from fastbert.presence import unreadable
from fastbert.recipe import dump_config
from fastbert.regular_file import read_bytes
from fastbert.storage import answering
from fastbert.training.setup import Setup

SHARED_DISK_S = 20.0  # how long another machine may take to see a new file on a shared disk


def take_folder(setup: Setup, group: Group) -> RunLock | BucketLock:
    """Take over the run folder, and write the files that a run begins with.

    Raises:
        InputError: the folder cannot be made or written, or a rank does not see it.
    """
    bucket, token = setup.start.bucket, None
    with group.raise_on_all_ranks(), answering():
        if group.is_main:
            token = _prepare(setup)
    token = group.broadcast(token)
    owner = RunLock(setup.start.run, token) if bucket is None else BucketLock(bucket, int(token))
    with group.raise_on_all_ranks(), answering():
        deadline = time.monotonic() + SHARED_DISK_S
        while not owner.holds():
            if time.monotonic() > deadline:
                raise InputError(
                    f"run = {setup.config.run!r}: what rank 0 wrote there does not show here; "
                    "give a folder on a disk that all machines share"
                )
            time.sleep(0.1)
    if group.is_main and isinstance(owner, BucketLock):
        owner.watch()
    return owner


def _prepare(setup: Setup) -> str:
    """Claim the folder, and write the resolved recipe and a copy of the tokenizer.

    With the copy, the run's model can be used when the dataset is gone.

    Returns:
        The token of the claim.
    """
    start, config = setup.start, setup.config
    tokenizer = {
        Path(name).name: _read_plain(setup.dataset.path / name)
        for name in tokenizer_files(setup.dataset.has_words)
    }
    try:
        start.run.mkdir(parents=True, exist_ok=True)
        if start.bucket is None:
            token = RunLock.claim(start.run).token
        else:
            step = start.checkpoint.step if start.checkpoint else 0
            token = start.bucket.claim(step).token
            if start.checkpoint is None or start.branches:
                start.bucket.remove_records()
        write_whole(start.run / "config.toml", dump_config(config).encode())
        (start.run / "tokenizer").mkdir(exist_ok=True)
        for name, data in tokenizer.items():
            write_whole(start.run / "tokenizer" / name, data)
        if start.bucket is not None:
            start.bucket.upload_records(int(token))
        return token
    except LostOwnership as error:
        raise InputError(f"{error}; two starts at the same time") from None
    except OSError as error:
        raise InputError(
            f"run = {config.run!r}: {error.filename or start.run} cannot be written: "
            f"{error.strerror}"
        ) from None


def _read_plain(file: Path) -> bytes:
    """Read a file that is copied into the run, and may be published with it.

    Links are refused, since a link might name any file of this machine.
    """
    try:
        return read_bytes(file, follow=False)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(
                f"{file}: a link, which is not followed; put the file itself there"
            ) from None
        raise unreadable(file, error) from None
