"""Run the tests of the kernels in several concurrent processes (`benchmarks.harness.pytest_shard`).

The result of every test is written to disk as soon as it ends.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from benchmarks.harness import pytest_shard
from benchmarks.harness.children import ROOT

FOLDER = "tests"  # inside OUT
PROCESSES = 8  # each waits for the compiler most of the time
DRY_PROCESSES = 2
PYTEST = [
    "-q",
    "--tb=short",
    "-p",
    "no:cacheprovider",
    "-p",
    "benchmarks.harness.pytest_shard",
    "-o",
    "faulthandler_timeout=60",
    "--continue-on-collection-errors",
]
# Exit codes of a pytest that ran to its end: all passed, some failed, no tests left.
FINISHED, GOOD = (0, 1, 5), (0, 5)
SHOWN_FAILURES = 30


def missing() -> str | None:
    """Why the tests cannot run here; None if they can."""
    return None if importlib.util.find_spec("pytest") else "pytest is not installed: no tests"


def commands(out: Path, dry: bool) -> list[list[str]]:
    """The command of each process: a share of the kernel tests; and one for tests that need a GPU.

    A dry run has only a few tests, in Triton's interpreter. The test of these benchmarks is left
    out, because it is for machines without a GPU.
    """
    kernels = sorted(
        {*ROOT.glob("tests/test_*kernel*.py"), ROOT / "tests/test_operators.py"}
        - {ROOT / "tests/test_bench_kernels.py"}
    )
    marked = [
        path
        for path in sorted(ROOT.glob("tests/test_*.py"))
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    (out / FOLDER).mkdir(exist_ok=True)
    count = DRY_PROCESSES if dry else max(1, min(PROCESSES, (os.cpu_count() or 2) // 2))
    chosen = (
        ["-k", "gelu and fp32 and triton", str(ROOT / "tests/test_kernels.py")]
        if dry
        else ["-m", "not gpu", *map(str, kernels)]
    )
    shards = [
        [*_results(out, str(number)), "--shard", f"{number}/{count}", *chosen]
        for number in range(count)
    ]
    if marked:
        shards.append([*_results(out, "gpu"), "-m", "gpu", *map(str, marked)])
    return [[sys.executable, "-m", "pytest", *PYTEST, *shard] for shard in shards]


def _results(out: Path, name: str) -> list[str]:
    return ["--results", str(out / FOLDER / f"{name}.jsonl")]


def begun(command: list[str]) -> int:
    """The number of tests of a command that have begun."""
    return len(pytest_shard.read(Path(command[command.index("--results") + 1])))


def results(out: Path) -> list[dict]:
    return [
        result
        for path in sorted((out / FOLDER).glob("*.jsonl"))
        for result in pytest_shard.read(path).values()
    ]


def counts(out: Path) -> dict[str, int]:
    found = results(out)
    return {
        word: sum(result["outcome"] == word for result in found)
        for word in ("passed", "failed", "skipped", "started")
    }


def summary_of_tests(out: Path) -> str:
    """The section of the report on the tests."""
    found = results(out)
    if not found:
        return ""
    text = [
        "## Tests",
        "",
        ", ".join(f"{count} {word}" for word, count in counts(out).items()) + " but not finished.",
        "",
    ]
    bad = [result for result in found if result["outcome"] in ("failed", "started")]
    text += [
        f"- `{result['test']}`: {' '.join(result['message'].splitlines()[-1:])[:300]}"
        for result in bad[:SHOWN_FAILURES]
    ]
    return "\n".join(
        text
        + (
            [f"- and {len(bad) - SHOWN_FAILURES} more, in the log"]
            if len(bad) > SHOWN_FAILURES
            else []
        )
    ).rstrip()
