"""Options of the benchmark suites, and the report: our rows, page and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.machine import device_name, header, peak_of
from benchmarks.harness.record import Record, Row
from benchmarks.kernels import kernel_report
from benchmarks.kernels.cases import Case

NOTES: list[Row] = []  # missing contenders, with the reason


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastbert")
    group.addoption("--out", type=Path, help="folder for the report")
    group.addoption(
        "--seconds", type=float, default=240, help="approximate time for all cases together (240)"
    )
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--tokens", type=int, help="tokens of a pack (16,384; on a CPU 512)")
    group.addoption(
        "--compile",
        choices=["one", "all", "none"],
        default="one",
        help="the cases of an operation that are measured with torch.compile (one)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.out:
        config.option.out.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = str(config.option.out / "pytest-benchmark.json")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: pytest.CallInfo[None]) -> Any:
    report = (yield).get_result()
    if report.when == "call" and report.skipped and "contender" in item.callspec.params:
        note = report.longrepr[2].removeprefix("Skipped: ")
        NOTES.append(
            {
                "case": str(item.callspec.params["case"]),
                "implementation": item.callspec.params["contender"],
                "note": note,
            }
        )


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    if config.option.out:
        write(config.option.out, torch.device(config.option.device), output_json["benchmarks"])


def write(out: Path, device: torch.device, benchmarks: list[dict[str, Any]]) -> None:
    """Write kernels.json, kernels.md and kernels.png from the measurements of pytest-benchmark."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in benchmarks:
        info = entry["extra_info"]
        groups.setdefault((str(Case(**info["case"])), info["pass"]), []).append(info)
    rows: list[Row] = []
    peak = peak_of(device)
    for infos in groups.values():
        case, which, element = Case(**infos[0]["case"]), infos[0]["pass"], infos[0]["element"]
        seconds = {info["implementation"]: info["rounds"] for info in infos}
        found = kernel_report.rows_of(case, which, seconds, peak, element)
        for row, info in zip(found, infos, strict=True):
            rows.append(
                row
                | {
                    "extra_bytes": info["extra_bytes"],
                    "error_over_allowed": info.get("error_over_allowed"),
                }
            )
    rows += [dict(row) for row in {tuple(note.items()): note for note in NOTES}.values()]
    kernel_report.draw(rows, out / "kernels.png")
    record = Record(header(device), rows, kernel_report.ratios(rows))
    record.write(out, "kernels", kernel_report.page(device_name(device), rows, peak))
