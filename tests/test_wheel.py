"""Both wheels, built from the sdists and installed outside the checkout, work from any directory.

fastbert-kernels is also installed alone, where nothing is visible but what it requires.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.ranks import LAUNCHER

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.name for path in (ROOT / "fastbert/recipes").glob("*.*"))
KERNELS_DATA = ["tiles.json", "resources.json", "py.typed"]

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    # Neither the checkout nor what pytest was started with may show through.
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TRITON_INTERPRET", *LAUNCHER}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> Path:
    """A Python with hatchling, in a separate environment, as pip builds; `build` is not needed.

    Its pip also installs into the other environments. They have none, and no old setuptools.
    """
    folder = tmp_path_factory.mktemp("builder")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    run(python, "-m", "pip", "install", "-qq", "hatchling>=1.26", "pip>=22.3", cwd=folder)
    return python


@dataclass(frozen=True)
class Archives:
    """The sdist of a distribution, and the wheel that is built from what the sdist holds."""

    sdist: Path
    wheel: Path

    def sources(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def modules(self) -> set[str]:
        """The files of the wheel without its metadata."""
        names = zipfile.ZipFile(self.wheel).namelist()
        return {name for name in names if ".dist-info/" not in name}


def build(python: Path, project: Path, folder: Path) -> Archives:
    # As in a release, each project is built from a copy of its own folder.
    run(python, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=project)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Archives(sdist, build_wheel(python, unpacked, folder))


def build_wheel(python: Path, project: Path, folder: Path) -> Path:
    run(python, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=project)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def kernels(builder, tmp_path_factory) -> Archives:
    return build(builder, ROOT / "kernels", tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def pretrain(builder, tmp_path_factory) -> Archives:
    return build(builder, ROOT, tmp_path_factory.mktemp("pretrain"))


def install(builder: Path, folder: Path, *wheels: Path) -> tuple[Path, Path]:
    """Make an environment with these wheels; return its Python and the folder of its packages."""
    venv.create(folder)
    python = folder / "bin/python"
    pip = [builder, "-m", "pip", "--python", python]
    run(*pip, "install", "-qq", "--no-deps", *wheels, cwd=folder)
    found = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    return python, Path(found.stdout.strip())


@pytest.fixture(scope="module")
def installed(builder, kernels, pretrain, tmp_path_factory) -> Path:
    """The bin folder of an environment with both wheels and our dependencies, but no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    python, packages = install(builder, folder, kernels.wheel, pretrain.wheel)
    # A .pth file adds this folder to the path. Its own .pth files, such as that of an editable
    # install of this checkout, are not read.
    dependencies = packages / "dependencies.pth"
    dependencies.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    for package in ("fastbert", "fastbert_kernels"):
        where = run(python, "-c", f"import {package}; print({package}.__file__)", cwd=folder)
        assert Path(where.stdout.strip()).is_relative_to(folder)
    return folder / "bin"


def closure(requirements: list[str]) -> list[importlib.metadata.Distribution]:
    """The installed distributions that these requirements need, directly or not, without extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            waiting += found[name].requires or []
    return list(found.values())


@pytest.fixture(scope="module")
def kernels_alone(builder, kernels, tmp_path_factory) -> Path:
    """The Python of an environment where only fastbert-kernels and its requirements are visible."""
    folder = tmp_path_factory.mktemp("alone")
    python, packages = install(builder, folder, kernels.wheel)
    (metadata,) = packages.glob("fastbert_kernels-*.dist-info")
    requirements = importlib.metadata.Distribution.at(metadata).requires
    assert requirements
    for distribution in closure(requirements):
        assert distribution.files is not None
        # Its modules, its metadata, and folders of shared libraries beside them.
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(distribution.locate_file(top)))
    run(builder, "-m", "pip", "--python", python, "check", cwd=folder)
    return python


def test_the_archives_hold_the_recipes_and_nothing_outside_the_packages(kernels, pretrain):
    assert {name.partition("/")[0] for name in pretrain.modules()} == {"fastbert"}
    assert {name.partition("/")[0] for name in kernels.modules()} == {"fastbert_kernels"}
    assert {f"fastbert/recipes/{name}" for name in RECIPES} < pretrain.modules()
    assert "fastbert/planning/gpus.toml" in pretrain.modules()
    assert {f"fastbert_kernels/{name}" for name in KERNELS_DATA} < kernels.modules()
    # The sdist of fastbert-pretrain is the whole project, so its Makefile and tests work.
    wanted = {"README.md", "LICENSE", "pyproject.toml", "tests/test_wheel.py"}
    assert wanted | {"kernels/pyproject.toml"} < pretrain.sources()
    assert {f"fastbert/recipes/{name}" for name in RECIPES} < pretrain.sources()
    assert {"README.md", "LICENSE", "pyproject.toml"} < kernels.sources()
    assert not any(name.startswith("tests") for name in kernels.sources())


def test_from_a_text_to_an_exported_model(installed, english_jsonl, tmp_path):
    fastbert = installed / "fastbert"
    assert "mini" in run(fastbert, "recipes", cwd=tmp_path).stdout
    done = run(
        fastbert, "prepare", english_jsonl, "--out", "data/my own", "--vocab-size", 500,
        "--workers", 1, cwd=tmp_path,
    )  # fmt: skip
    # `prepare` ends with the command that writes a recipe, and that one with the command that
    # trains by it. Both run in another directory.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for verb, options in (
        ("init", ""),
        (
            "pretrain",
            "stop.steps=2 batch.sequences=8 evaluate.sequences=16 runtime.precision=fp32",
        ),
    ):
        command = done.stdout.splitlines()[-1].partition("next: fastbert ")[2]
        assert command.startswith(f"{verb} ")
        done = run("sh", "-c", f"'{fastbert}' {command} {options}", cwd=elsewhere)
    run(fastbert, "export", "runs/my own", "--out", "model", cwd=elsewhere)
    assert (elsewhere / "model/model.safetensors").is_file()
    # The Python interface trains a copied recipe.
    run(fastbert, "recipes", "mini", "--out", "my.toml", cwd=tmp_path)
    code = (
        "import fastbert; print(fastbert.pretrain('my.toml', data='data/my own', run='run', "
        "stop={'steps': 1}, batch={'sequences': 8}, evaluate={'sequences': 16}, "
        "runtime={'precision': 'fp32'}).reason)"
    )
    done = run(installed / "python", "-c", code, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "stop.steps = 1"


def test_the_default_settings_do_not_come_from_the_working_directory(installed, tmp_path):
    (tmp_path / "ds_config.json").write_text("not for us", encoding="utf-8")
    done = run(installed / "fastbert", "plan", "mini", "--gpus", 1, cwd=tmp_path)
    assert "ZeRO stage 1: an estimate" in done.stdout


def test_the_kernels_alone_compute_on_a_cpu(kernels_alone, tmp_path):
    """Compared with torch's own attention and cross-entropy, forward and backward."""
    code = """
import importlib.util
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from fastbert_kernels import masked_cross_entropy, varlen_attention

torch.set_default_dtype(torch.float64)
for library in ("deepspeed", "transformers", "tokenizers", "fastbert"):
    assert importlib.util.find_spec(library) is None, library

qkv = torch.randn(3, 7, 2, 16, requires_grad=True)  # sequences of 4 and 3 tokens
out = varlen_attention(*qkv, torch.tensor([0, 4, 7], dtype=torch.int32), max_seqlen=4)
parts = [
    scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv[:, rows])).transpose(0, 1)
    for rows in (slice(0, 4), slice(4, 7))
]
torch.testing.assert_close(out, torch.cat(parts))
gradients = [torch.autograd.grad(y.square().sum(), qkv)[0] for y in (out, torch.cat(parts))]
torch.testing.assert_close(*gradients)

hidden = torch.randn(7, 32, requires_grad=True)
weight, bias = torch.randn(50, 32), torch.randn(50)
positions, labels = torch.tensor([1, 5]), torch.tensor([3, 49])
loss = masked_cross_entropy(hidden, weight, bias, positions, labels, total=2)[0]
expected = cross_entropy(hidden[positions] @ weight.T + bias, labels)
torch.testing.assert_close(loss, expected)
gradients = [torch.autograd.grad(y, hidden)[0] for y in (loss, expected)]
torch.testing.assert_close(*gradients)
"""
    run(kernels_alone, "-c", code, cwd=tmp_path)


def test_the_image_copies_all_that_the_wheels_are_built_from(builder, kernels, pretrain, tmp_path):
    """The wheels from the files that the Dockerfile copies are those from the sdists."""
    source = tmp_path / "source"
    source.mkdir()
    lines = re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
    for *names, target in (line.split() for line in lines):
        assert set(names) <= set(allowed), f".dockerignore leaves out {set(names) - set(allowed)}"
        for name in names:
            if (ROOT / name).is_dir():  # COPY puts what a folder holds into the target
                shutil.copytree(ROOT / name, source / target)
            else:
                shutil.copy(ROOT / name, source / target)
    for project, folder, expected in [("kernels", "one", kernels), (".", "two", pretrain)]:
        wheel = build_wheel(builder, source / project, tmp_path / folder)
        assert Archives(wheel, wheel).modules() == expected.modules()
