"""A pytest plugin: one share of the tests, with a result on disk after each, so that no plugin from elsewhere is needed on a GPU machine.

    pytest -p benchmarks.pytest_shard --shard 2/8 --results results.jsonl tests

The file gets {"test", "outcome": "started" | "passed" | "failed" | "skipped", "seconds", "message"}, one object a line. Tests that it names
already are left out: after a crash, or a fault that leaves the GPU unusable for the process (the run stops there), the same command goes
on behind the test that caused it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BROKEN = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
)  # CUDA's words


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="which share of how many, counted from 0")
    parser.addoption("--results", type=Path, required=True, help="file of results, appended to")


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
                self.session.shouldstop = "the GPU is of no more use to this process"

    def write(self, **result) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def read(path: Path) -> dict[str, dict]:
    """The last result of each test."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [
        json.loads(line) for line in lines if line.endswith("\n")
    ]  # the process may have been killed in the middle of one
    return {result["test"]: result for result in whole}
