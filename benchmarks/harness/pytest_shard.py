"""A pytest plugin that runs a share of the tests and writes each result to disk at once.

    pytest -p benchmarks.harness.pytest_shard --shard 2/8 --results results.jsonl tests

So a GPU machine needs no third-party plugin. The file gets one object per line: {"test", "outcome":
"started" | "passed" | "failed" | "skipped", "seconds", "message"}. Tests that it already contains
are left out. So after a crash, or an error that makes the GPU unusable for the process (the run
then stops), the same command resumes after the test that caused it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BROKEN = (  # error messages of CUDA
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="share and number of shares, counted from 0")
    parser.addoption("--results", type=Path, required=True, help="file to append results to")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Results(config))


class Results:
    def __init__(self, config: pytest.Config):
        self.path: Path = config.option.results
        self.index, self.count = map(int, config.option.shard.split("/"))
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        done = read(self.path)
        mine = [item for item in items[self.index :: self.count] if item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
        items[:] = mine

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(test=nodeid, outcome="started", seconds=0.0, message="the process ended here")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = "" if report.passed else report.longreprtext.strip()
            self.write(
                test=report.nodeid,
                outcome=report.outcome,
                seconds=report.duration,
                message=text[-2000:],
            )
            if report.failed and self.session and any(words in text for words in BROKEN):
                self.session.shouldstop = "this process can no longer use the GPU"

    def write(self, **result) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def read(path: Path) -> dict[str, dict]:
    """The last result of each test."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    # The last line is incomplete if the process was killed while it wrote.
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return {result["test"]: result for result in whole}
