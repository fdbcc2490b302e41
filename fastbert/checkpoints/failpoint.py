"""Where the tests let a process die, stop or meet a full disk in the middle of a save. Nothing happens unless FASTBERT_FAILPOINT is set."""

from __future__ import annotations

import errno
import functools
import os
import re
import signal

# In the order in which a save reaches them. Those of "every rank" need RANK where one alone is meant, the others are reached by rank 0.
POINTS = (
    "copied",  # every rank: its share is in memory, nothing is written yet
    "staging-made",  # every rank
    "tensors-half",  # every rank: half a tensor file is written
    "tensors-written",  # every rank: before its fsync
    "tensors-synced",  # every rank: before it is read back
    "tensors-read-back",  # every rank
    "share-written",  # every rank: all that it has to write is on the disk, before the others know
    "gathered",  # every rank: all know that all shares are there, before the manifest
    "manifest-half",
    "manifest-written",  # before its fsync
    "manifest-synced",
    "manifest-read-back",
    "moving-aside",  # only where a damaged checkpoint of the same step is there: before it makes room
    "moved-aside",  # only then: between the two renames
    "renamed",  # before the fsync of the folder
    "published",  # before old checkpoints are renamed for deletion
    "deleting",  # only where there is an old one: in the middle of its files
    "saved",  # after all of it
)
ACTIONS = ("kill", "stop", "full")


def reach(name: str) -> None:
    """Nothing, unless FASTBERT_FAILPOINT = "NAME[:RANK][@N][=kill|stop|full]" means this.

    N is the how manieth time the process reaches it, the first where it is left out; every rank is meant where RANK is. `kill` is kill -9
    of the process itself (and what happens where nothing is said), `stop` SIGSTOP, `full` an OSError as of a full disk.
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
    match = re.fullmatch(
        rf"({'|'.join(POINTS)})(?::(\d+))?(?:@(\d+))?(?:=({'|'.join(ACTIONS)}))?", text
    )
    if match is None:  # a test with a name that is never reached would prove nothing
        raise ValueError(
            f"FASTBERT_FAILPOINT = {text!r}: must be NAME[:RANK][@N][=kill|stop|full], NAME one of {', '.join(POINTS)}"
        )
    return _Wanted(*match.groups())
