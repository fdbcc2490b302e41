"""A disk that is too small or read-only: a tmpfs that only the processes of one test see.

It lies in a mount namespace of its own, so the machine's own mounts are never touched. It
disappears with the last process in that namespace. A full disk and a read-only disk also stop root,
whereas the permissions of a folder do not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

PATIENCE_S = 20.0  # for operations that take milliseconds


class Unavailable(RuntimeError):
    """This machine or this user's rights do not allow it; the message says why."""


class SmallDisk:
    """Context manager: in a mount namespace of its own, `folder` is an empty disk.

    Args:
        folder: an existing folder.
        size: the size in the syntax of mount, for example "2m".

    Attributes:
        pid: the id of a process in that namespace.
        enter: the prefix of a command that runs there.

    Raises:
        Unavailable: on entering.
    """

    def __init__(self, folder: Path, size: str):
        self.folder, self._size = folder, size

    def __enter__(self) -> SmallDisk:
        if missing := [
            tool for tool in ("unshare", "nsenter", "mount") if shutil.which(tool) is None
        ]:
            raise Unavailable(f"{missing[0]} is not installed")
        # Only root may create a mount namespace without a user namespace around it. In a user
        # namespace everybody is root.
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        script = 'mount -t tmpfs -o "size=$1" none "$0" && echo ready && exec cat'
        command = ["unshare", *user, "--mount", "sh", "-c", script, str(self.folder), self._size]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(command, start_new_session=True, **pipes)
        assert self._process.stdout and self._process.stderr
        if self._process.stdout.readline() != b"ready\n":
            raise Unavailable(
                self._process.stderr.read().decode(errors="replace").strip() or "no answer"
            )
        self.pid = self._process.pid  # unshare, sh and cat in turn have this id
        self.enter = [
            "nsenter",
            "--target",
            str(self.pid),
            "--mount",
            *(["--user", "--preserve-credentials"] if user else []),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=PATIENCE_S)

    def seen(self, path: Path) -> Path:
        """Return a path of the disk as seen from outside the namespace."""
        return Path(f"/proc/{self.pid}/root{path}")

    def resize(self, size: str) -> None:
        self._mount("-o", f"remount,size={size}", str(self.folder))

    def write_protect(self, folder: Path) -> None:
        """Make the folder read-only for new files; files that are already open can be finished."""
        self._mount("--bind", str(folder), str(folder))
        self._mount("-o", "remount,bind,ro", str(folder))

    def release(self, folder: Path) -> None:
        """Undo `write_protect`."""
        self._run("umount", str(folder))

    def _mount(self, *arguments: str) -> None:
        self._run("mount", *arguments)

    def _run(self, *command: str) -> None:
        subprocess.run([*self.enter, *command], check=True, capture_output=True, timeout=PATIENCE_S)
