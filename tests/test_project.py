"""The repository's own rules: lint, format, types, and documented files and commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tiers import slow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

# Joined from pieces, so that this file does not contain the strings it looks for.
HOSTS = [
    ".".join(parts)
    for parts in (
        ["pypi", "org"],
        ["pythonhosted", "org"],
        ["download", "pytorch", "org"],
        ["npmjs", "org"],
    )
]
MACHINE_PATHS = [
    "/" + "/".join(parts) + "/"
    for parts in (
        ["root"],
        ["home"],
        ["work", "main"],
        ["work", "shared"],
        ["tmp", "w"],
        ["opt", "wheels"],
    )
]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    # pyright would otherwise ask the package index whether there is a newer one.
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


def project_files() -> list[Path]:
    """The files that git tracks or would track.

    Without git these are all files outside hidden and built folders.
    """
    listing = (
        run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        if (ROOT / ".git").exists()
        else None
    )
    if listing and listing.returncode == 0:
        found = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        made = {"__pycache__", "data", "runs", "build", "dist", "site"}
        found = [
            p
            for p in ROOT.rglob("*")
            if not any(
                part in made or part.startswith(".") for part in p.relative_to(ROOT).parts[:1]
            )
        ]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


FILES = project_files()
PYTHON_FILES = [path for path in FILES if path.suffix == ".py"]


@pytest.mark.parametrize(
    "command",
    [
        "ruff check",
        "ruff format --check --diff",
        slow(f"pyright --pythonpath {sys.executable}"),
    ],
    ids=lambda c: c.split(" -")[0],
)
def test_checker_finds_nothing(command):
    result = run(sys.executable, "-m", *command.split())
    assert result.returncode == 0, result.stdout + result.stderr


def test_make_check_needs_no_rivals():
    """It installs the extra `lint`, so what else `test` installs is marked where it is imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extra = project["project"]["optional-dependencies"]["test"]
    names = {canonicalize_name(Requirement(one).name) for one in extra} - {"fastbert-pretrain"}
    there = packages_distributions().items()
    modules = [module for module, by in there if names & set(map(canonicalize_name, by))]
    assert {"datasets", "liger_kernel", "sklearn", "trackio"} <= set(modules)
    imported = re.compile(rf"\s*(from|import) ({'|'.join(modules)})\b")
    read = tuple(f"{folder}/" for folder in project["tool"]["pyright"]["include"])
    unmarked = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in PYTHON_FILES
        if str(path.relative_to(ROOT)).startswith(read)
        for line in path.read_text(encoding="utf-8").splitlines()
        if imported.match(line) and "pyright: ignore[reportMissingImports]" not in line
    ]
    assert not unmarked, "\n".join(unmarked)


def test_no_machine_path_or_package_host():
    """A path of one machine, or a package index by name, breaks the project on other machines."""
    found = []
    for path in FILES:
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), 1
        ):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {word}"
                for word in [*HOSTS, *MACHINE_PATHS]
                if word in line
            ]
    assert not found, "\n".join(found)


def test_one_version_everywhere():
    """A release changes the version in these places. fastbert-pretrain requires its own kernels."""
    places = {
        "fastbert/__init__.py": r'^__version__ = "(.+)"$',
        "kernels/fastbert_kernels/__init__.py": r'^__version__ = "(.+)"$',
        "pyproject.toml": r'^    "fastbert-kernels==(.+?)",',
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## \[(.+?)\]",  # the newest one
    }
    versions = {
        name: re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)[0]
        for name, pattern in places.items()
    }
    assert len(set(versions.values())) == 1, versions


def test_the_folder_of_the_kernels_is_complete():
    """It is built from its own files, and asks for the same Python, torch and NumPy."""
    kernels, pretrain = (
        tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for folder in (ROOT / "kernels", ROOT)
    )
    assert set(kernels["dependencies"]) < set(pretrain["dependencies"])
    assert kernels["requires-python"] == pretrain["requires-python"]
    assert (ROOT / "kernels/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    # As a package it would hide the library called kernels, which transformers looks for.
    assert not (ROOT / "kernels/__init__.py").exists()


def test_no_large_file():
    large = [
        f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes"
        for path in FILES
        if path.stat().st_size > 500_000
    ]
    assert not large, f"texts, datasets and models are downloaded or made, never committed: {large}"


def test_files_are_named_for_an_idea():
    vague = re.compile(r"(^|_)(utils?|helpers?|common|misc|stuff)(_|$)")
    found = [str(path.relative_to(ROOT)) for path in PYTHON_FILES if vague.search(path.stem)]
    assert not found, (
        f"name the idea (packing.py), or keep the function beside its one caller: {found}"
    )


def test_architecture_names_every_file():
    """It names `folder/file.py`, or `file.py` and its folder.

    An `__init__.py` belongs to its folder.
    """
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    missing = []
    for path in PYTHON_FILES:
        if path.relative_to(ROOT).parts[0] not in ("fastbert", "kernels"):
            continue
        names = (
            [path.parent.name + "/"]
            if path.name == "__init__.py"
            else [path.name, path.parent.name + "/"]
        )
        if not all(
            re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-]*\.py)", text) for name in names
        ):
            missing.append(str(path.relative_to(ROOT)))
    assert not missing, f"ARCHITECTURE.md has no line for: {missing}"


def test_architecture_names_no_file_that_is_gone():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    present = {path.name for path in FILES}
    # Names that files of a kind may have, or that a run writes.
    kinds = {"kernel.py", "_triton.py", "config.toml"}
    gone = (
        {Path(name).name for name in re.findall(r"[\w./-]*\w\.(?:py|toml)\b", text)}
        - present
        - kinds
    )
    assert not gone, f"ARCHITECTURE.md names files that are not there: {sorted(gone)}"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documented_commands_exist(document):
    """Every `make TARGET`, `fastbert VERB` and repository path in a document's code exists."""
    code = "\n".join(
        re.findall(r"```.*?```|`[^`\n]+`", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    )
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    verbs = set(
        re.findall(
            r"^\W*([a-z-]+) ", run(sys.executable, "-m", "fastbert", "--help").stdout, re.MULTILINE
        )
    )
    wrong = [
        f"make {name}"
        for name in re.findall(r"(?m)(?:^|[`;&$] ?)make ([a-z-]+)", code)
        if name not in targets
    ]
    wrong += [
        f"fastbert {name}"
        for name in re.findall(r"(?m)(?:^|[`;&$/] ?)fastbert ([a-z][a-z-]*)", code)
        if name not in verbs
    ]
    folders = "fastbert|kernels|tests|benchmarks|examples|docs"
    wrong += [
        name
        for name in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]*\w\.\w+", code)
        if not (ROOT / name).exists()
    ]
    assert not wrong, f"{document} names what is not there: {wrong}"


def test_demo_and_tests_are_on_the_first_screen():
    """The continuous integration server runs the command that the README names."""
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:25]
    for command in ("make demo", "make test"):
        assert any(line.startswith(command) for line in first_screen), command
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8")
