"""Places in a save where the tests make a process die or stop, or the disk be full.

Nothing happens unless FASTBERT_FAILPOINT is set.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import signal

# In the order in which a save reaches them. All ranks reach those marked "every rank", and RANK
# selects one of them. Only rank 0 reaches the others.
POINTS = (
    "copied",  # every rank: its share is in memory, nothing is written yet
    "staging-made",  # every rank
    "tensors-half",  # every rank: half a tensor file is written
    "tensors-written",  # every rank: before its fsync
    "tensors-synced",  # every rank: before it is read back
    "tensors-read-back",  # every rank
    "share-written",  # every rank: its files are on the disk, but the others do not know yet
    "gathered",  # every rank: all know that all shares are written; before the manifest
    "manifest-half",
    "manifest-written",  # before its fsync
    "manifest-synced",
    "manifest-read-back",
    "moving-aside",  # only with a damaged checkpoint of the same step: before it is renamed
    "moved-aside",  # only then: between the two renames
    "renamed",  # before the fsync of the folder
    "published",  # before old checkpoints are renamed for deletion
    "deleting",  # only where there is an old checkpoint: half of its files are deleted
    "saved",  # after all of it
)
# The same for a run in a bucket, beside those above up to "share-written" and "gathered".
UPLOAD_POINTS = (
    "uploading",  # every rank: before each file of its share
    "share-uploaded",  # every rank
    "records-uploaded",  # metrics and log
    "publishing",  # before the manifest
    "manifest-uploaded",
    "retiring",  # only where there is an old checkpoint: its manifest is deleted, its files are not
    "retired",
)
ACTIONS = ("kill", "stop", "full")


def reach(name: str) -> None:
    """Do nothing, unless FASTBERT_FAILPOINT = "NAME[:RANK][@N][=kill|stop|full]" selects `name`.

    It triggers on the Nth hit (default: the first), on that rank (default: all ranks). `kill`, the
    default, sends SIGKILL to this process; `stop` sends SIGSTOP.

    Raises:
        OSError: `full` was asked for; the error is that of a full disk.
    """
    text = os.environ.get("FASTBERT_FAILPOINT")
    if not text:
        return
    wanted = _wanted(text)
    if wanted.name != name or wanted.rank not in (None, os.environ.get("RANK", "0")):
        return
    wanted.left -= 1
    if wanted.left:
        return
    if wanted.action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), signal.SIGSTOP if wanted.action == "stop" else signal.SIGKILL)


class _Wanted:
    def __init__(self, name: str, rank: str | None, times: str | None, action: str | None):
        self.name, self.rank, self.left, self.action = name, rank, int(times or 1), action or "kill"


@functools.cache
def _wanted(text: str) -> _Wanted:
    points = "|".join(POINTS + UPLOAD_POINTS)
    match = re.fullmatch(rf"({points})(?::(\d+))?(?:@(\d+))?(?:=({'|'.join(ACTIONS)}))?", text)
    if match is None:  # a test of a misspelt name would pass without testing anything
        raise ValueError(
            f"FASTBERT_FAILPOINT = {text!r}: must be NAME[:RANK][@N][=kill|stop|full], "
            f"NAME one of {', '.join(POINTS + UPLOAD_POINTS)}"
        )
    return _Wanted(*match.groups())
