"""Download one version of a package from the Python index or the npm registry, and check it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path


def from_pip(name: str, sha256: str, folder: Path) -> Path:
    """Download the wheel of a package ("name==version") into `folder`.

    Raises:
        SystemExit: the download failed; the message is pip's.
    """
    requirements = folder / f"{name}.txt"
    requirements.write_text(f"{name} --hash=sha256:{sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
    ]
    result = subprocess.run(
        [*command, "--dest", folder / name, "--requirement", requirements],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"pip could not download {name}:\n{result.stderr.strip()}")
    return next((folder / name).glob("*.whl"))


def from_npm(name: str, sha256: str, folder: Path) -> Path:
    """Download the tarball of a package ("name@version") into `folder`.

    Raises:
        SystemExit: the download failed, or the file has another SHA-256.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(
            f"npm is missing, which fetches {name}. On Debian or Ubuntu: apt-get install npm"
        )
    result = subprocess.run(
        [npm, "pack", "--silent", "--pack-destination", folder, name],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"npm could not download {name}:\n{result.stderr.strip()}")
    path = folder / result.stdout.split()[-1]
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise SystemExit(f"{name}: the file has SHA-256 {found}, expected {sha256}")
    return path
