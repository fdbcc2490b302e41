"""The wheel, built from the sdist and installed outside the checkout, works from any directory."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.ranks import LAUNCHER

ROOT = Path(__file__).parents[1]
RECIPES = ["base.toml", "demo.toml", "ds_config.json", "large.toml", "library.toml", "mini.toml"]

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    # Neither the checkout nor what pytest was started with may show through.
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", *LAUNCHER}
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
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from what the sdist holds."""
    folder = tmp_path_factory.mktemp("dist")
    # hatchling in a separate environment, as pip builds; `build` is not needed.
    venv.create(folder / "builder", with_pip=True)
    python = folder / "builder/bin/python"
    run(python, "-m", "pip", "install", "-qq", "hatchling>=1.26", cwd=folder)
    run(python, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(python, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel and our dependencies, but no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    run(python, "-m", "pip", "install", "-qq", "--no-deps", archives[1], cwd=folder)
    found = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    # A .pth file adds this folder to the path. Its own .pth files, such as that of an editable
    # install of this checkout, are not read.
    dependencies = Path(found.stdout.strip()) / "dependencies.pth"
    dependencies.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    where = run(python, "-c", "import fastbert; print(fastbert.__file__)", cwd=folder)
    assert Path(where.stdout.strip()).is_relative_to(folder)
    return folder / "bin"


def test_the_archives_hold_the_recipes_and_nothing_outside_the_packages(archives):
    sdist, wheel = archives
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "fastbert",
        "fastbert_kernels",
    }
    assert {f"fastbert/recipes/{name}" for name in RECIPES} < set(names)
    assert "fastbert/planning/gpus.toml" in names
    with tarfile.open(sdist) as archive:
        unpacked = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "tests/test_wheel.py"} < unpacked
    assert {f"fastbert/recipes/{name}" for name in RECIPES} < unpacked


def test_from_a_text_to_an_exported_model(installed, english_jsonl, tmp_path):
    fastbert = installed / "fastbert"
    assert "mini" in run(fastbert, "recipes", cwd=tmp_path).stdout
    done = run(
        fastbert, "prepare", english_jsonl, "--out", "data/my own", "--vocab-size", 500,
        "--workers", 1, cwd=tmp_path,
    )  # fmt: skip
    # The command that `prepare` ends with, in another directory.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = done.stdout.splitlines()[-1].partition("next: fastbert ")[2]
    short = "stop.steps=2 batch.sequences=8 evaluate.sequences=16"
    shell = f"'{fastbert}' {command} {short}"
    run("sh", "-c", shell, cwd=elsewhere)
    run(fastbert, "export", "runs/mini", "--out", "model", cwd=elsewhere)
    assert (elsewhere / "model/model.safetensors").is_file()
    # The Python interface trains a copied recipe.
    run(fastbert, "recipes", "mini", "--out", "my.toml", cwd=tmp_path)
    code = (
        "import fastbert; print(fastbert.pretrain('my.toml', data='data/my own', run='run', "
        "stop={'steps': 1}, batch={'sequences': 8}, evaluate={'sequences': 16}).reason)"
    )
    done = run(installed / "python", "-c", code, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "stop.steps = 1"


def test_the_default_settings_do_not_come_from_the_working_directory(installed, tmp_path):
    (tmp_path / "ds_config.json").write_text("not for us", encoding="utf-8")
    done = run(installed / "fastbert", "plan", "mini", "--gpus", 1, cwd=tmp_path)
    assert "ZeRO stage 1: an estimate" in done.stdout
