"""The compiler accepts every launch of the kernels and of the model.

This is checked for three generations of GPUs, on the newest and the oldest version of Triton that
are supported. Machine code takes a second for each of 698 kinds of launches, so the work is
divided:

- The default tier runs Triton's front end for the launches of the model on sm_90 with the newest
  version. The front end is where the compiler rejects what the interpreter accepts; another
  architecture only means other tiles.
- `slow` runs the front end for every launch: on sm_90 and sm_100 with the newest version, and on
  sm_80 with the oldest. There it also makes machine code of every launch of the model in bf16.
  test_ahead_of_time.py makes machine code of every kernel for sm_90, sm_100 and gfx942 with the
  newest version, and checks the limits of sm_90.
- Machine code of all launches takes 7 minutes of the processor for one architecture. It is made by
  hand before kernels meet a GPU (`python -m benchmarks.compiled.launches`).
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
from tests.uninterpreted import ROOT, run_module

# `make test` puts the oldest Triton there that pyproject.toml allows.
OLDEST = Path(sys.prefix) / "triton-oldest"
ALL, OF_THE_MODEL, IN_BF16 = 690, 125, 70  # kinds of launches, at least


def launches(*arguments: str, **where: Path | None) -> subprocess.CompletedProcess[str]:
    """Run `python -m benchmarks.compiled.launches` with other kernels or another Triton."""
    return run_module("benchmarks.compiled.launches", *arguments, **where)


@pytest.fixture(scope="module")
def oldest() -> Path:
    [allowed] = re.findall(
        r'"triton>=([\d.]+)"', (ROOT / "kernels/pyproject.toml").read_text(encoding="utf-8")
    )
    found = [path.name for path in OLDEST.glob("triton-*.dist-info")]
    assert found == [f"triton-{allowed}.0.dist-info"], (
        f"{OLDEST} holds {found}: remove it, and .venv/.installed-test, and run make test"
    )
    return OLDEST


def assert_all_compile(
    result: subprocess.CompletedProcess[str], architectures: list[str], least: int = ALL
) -> None:
    """Check that no call failed.

    There must be `least` kinds of launches or more, so that none is left out unnoticed.
    """
    assert result.returncode == 0, result.stderr
    found = re.findall(r"(sm_\d+): \d+ calls, 0 fail; (\d+) kinds", result.stdout)
    assert [architecture for architecture, _ in found] == architectures, result.stdout
    assert all(int(kinds) >= least for _, kinds in found), result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architectures", "triton"), [(["sm_90", "sm_100"], "newest"), (["sm_80"], "oldest")]
)
def test_every_launch_passes_the_front_end(oldest, architectures, triton):
    result = launches(
        *("--front-end", "--architecture", *architectures),
        triton=oldest if triton == "oldest" else None,
    )
    assert_all_compile(result, architectures)


def test_every_launch_of_the_model_passes_the_front_end():
    result = launches("--front-end", "--only", "model", "--architecture", "sm_90")
    assert_all_compile(result, ["sm_90"], OF_THE_MODEL)


@pytest.mark.slow
def test_every_launch_of_the_model_compiles_to_machine_code(oldest):
    result = launches(
        *("--architecture", "sm_80", "--only", "model", "--precision", "bf16"), triton=oldest
    )
    assert_all_compile(result, ["sm_80"], IN_BF16)


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A copy of the kernels, in which tests plant faults."""
    return Path(
        shutil.copytree(
            ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__")
        )
    )


NORM = ("--front-end", "--architecture", "sm_90", "--only", "norm")


def replace(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_none_inside_a_tuple_is_found(kernels):
    """The interpreter accepts it, and no compiler does."""
    none = "    chunks = ()\n    if ptr is None:\n        chunks += (None,)\n    else:"
    replace(
        kernels / "fastbert_kernels/_rows.py",
        ("    chunks = ()\n    if ptr is not None:", none),
    )
    result = launches(*NORM, kernels=kernels)
    assert f"kernels of {kernels}" in result.stdout
    assert result.returncode == 1
    assert re.search(r"FAULT sm_90 AttributeError: .*: \d+ calls, such as ", result.stderr), (
        result.stderr
    )


@pytest.mark.slow
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
    result = launches(*NORM, kernels=kernels, triton=oldest)
    assert result.returncode == 1
    assert re.search(r"FAULT sm_90 .*: \d+ calls, such as ", result.stderr), result.stderr


@pytest.mark.slow
def test_a_tile_of_any_row_that_does_not_fit_the_device_is_found(kernels):
    """Shared memory has the limit of a GPU's launcher.

    Two rows of the MLM loss, for 16 and for 32 bits, keep eight tiles there.
    """
    path = kernels / "fastbert_kernels/tiles.json"
    tiles = json.loads(path.read_text(encoding="utf-8"))
    rows = tiles["sm_80"]["mlm_loss_forward"]
    assert [row["bits"] for row in rows] == [16, 32]
    for row in rows:
        row.update(BLOCK_D=64, num_stages=8)
    path.write_text(json.dumps(tiles), encoding="utf-8")
    result = launches("--architecture", "sm_80", "--only", "mlm_loss", kernels=kernels)
    assert result.returncode == 1
    found = [line for line in result.stderr.splitlines() if "OutOfResources" in line]
    for dtype in ("bfloat16", "float32"):
        assert any(re.search(rf"such as .* {dtype}\b", line) for line in found), result.stderr


def test_a_kernel_that_no_call_reaches_is_found():
    reached = {"gelu._forward_kernel": {"GATED": {True}}}
    assert unreached(reached, ["gelu"]) == [
        "gelu._forward_kernel: GATED is always True",
        "gelu._backward_kernel: no call launches it",
    ]
