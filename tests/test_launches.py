"""The compiler accepts every launch of the kernels and of the model.

This is checked on two versions of Triton and for three generations of GPUs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiled.launches import unreached
from tests.tiers import typical
from tests.uninterpreted import ROOT, run_module

# `make test` puts the oldest Triton there that pyproject.toml allows.
OLDEST = Path(sys.prefix) / "triton-oldest"


def launches(*arguments: str, **where: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m benchmarks.compiled.launches` with other kernels or another Triton."""
    return run_module("benchmarks.compiled.launches", *arguments, **where)


@pytest.fixture(scope="module")
def oldest() -> Path:
    [allowed] = re.findall(
        r'"triton>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )
    found = [path.name for path in OLDEST.glob("triton-*.dist-info")]
    assert found == [f"triton-{allowed}.0.dist-info"], (
        f"{OLDEST} holds {found}: remove it, and .venv/.installed-test, and run make test"
    )
    return OLDEST


# All launches take five minutes of one core for each architecture and version of Triton. So the
# tests compile all for one architecture, and those of the model for the others.
def test_every_launch_compiles():
    result = launches("--architecture", "sm_90")
    assert result.returncode == 0, result.stderr
    assert re.search(r"sm_90: \d{3} calls, 0 fail", result.stdout), result.stdout


@pytest.mark.slow
def test_every_launch_compiles_with_the_oldest_triton(oldest):
    result = launches("--architecture", "sm_90", triton=oldest)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_the_model_compiles(architecture):
    result = launches("--architecture", architecture, "--only", "model")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("architecture", typical(["sm_80", "sm_90", "sm_100"], "sm_90"))
def test_the_model_compiles_with_the_oldest_triton(architecture, oldest):
    result = launches("--architecture", architecture, "--only", "model", triton=oldest)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A copy of the kernels, in which tests plant faults."""
    return Path(
        shutil.copytree(
            ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__")
        )
    )


def replace(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


def test_none_inside_a_tuple_is_found(kernels):
    """The interpreter accepts it, and no compiler does."""
    none = "    chunks = ()\n    if ptr is None:\n        chunks += (None,)\n    else:"
    replace(
        kernels / "fastbert_kernels/_rows.py",
        ("    chunks = ()\n    if ptr is not None:", none),
    )
    result = launches("--architecture", "sm_90", "--only", "norm", kernels=kernels)
    assert f"kernels of {kernels}" in result.stdout
    assert result.returncode == 1
    assert re.search(r"FAULT sm_90 AttributeError: .*: \d+ calls, such as ", result.stderr), (
        result.stderr
    )


def test_results_of_two_types_are_found_by_the_oldest_triton(kernels, oldest):
    """Triton 3.7 accepts it; Triton 3.6 does not."""
    none = (
        "    if dropout_seeds_ptr is None:\n        return ()",
        "    if dropout_seeds_ptr is None:\n        return None, None",
    )
    replace(
        kernels / "fastbert_kernels/_rows.py",
        none,
        ("if len(keys) == 0:", "if keys[0] is None:"),
    )
    result = launches("--architecture", "sm_90", "--only", "norm", kernels=kernels, triton=oldest)
    assert result.returncode == 1
    assert re.search(r"FAULT sm_90 .*: \d+ calls, such as ", result.stderr), result.stderr


def test_a_tile_that_does_not_fit_the_device_is_found(kernels):
    """Shared memory has the limit of a GPU's launcher."""
    path = kernels / "fastbert_kernels/tiles.json"
    tiles = json.loads(path.read_text(encoding="utf-8"))
    tiles["sm_80"]["mlm_loss_forward"] = [
        {**row, "num_stages": 8} for row in tiles["sm_90"]["mlm_loss_forward"]
    ]
    path.write_text(json.dumps(tiles), encoding="utf-8")
    result = launches("--architecture", "sm_80", "--only", "mlm_loss", kernels=kernels)
    assert result.returncode == 1
    assert "OutOfResources" in result.stderr


def test_a_kernel_that_no_call_reaches_is_found():
    reached = {"gelu._forward_kernel": {"GATED": {True}}}
    assert unreached(reached, ["gelu"]) == [
        "gelu._forward_kernel: GATED is always True",
        "gelu._backward_kernel: no call launches it",
    ]
