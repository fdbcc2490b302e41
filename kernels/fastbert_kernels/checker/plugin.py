"""The pytest plugin: a fixture `kernel_checker` and a marker of the same name.

    @pytest.mark.kernel_checker
    def test_softmax(kernel_checker):
        kernel_checker(softmax, reference, inputs, shapes=[{"rows": 3, "columns": 100}])

The fixture is `check`, and fails the test with the report if there is a fault. The option
`--kernel-checker` makes Triton interpret kernels; without it, and without TRITON_INTERPRET=1, such
tests are skipped. The plugin is loaded wherever this distribution is installed, so it imports
nothing until it is used.
"""

# pyright: basic
# pytest is no requirement of this distribution.

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    parser.getgroup("kernel checker").addoption(
        "--kernel-checker",
        action="store_true",
        help="set TRITON_INTERPRET=1, so that tests with the fixture kernel_checker run",
    )


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "kernel_checker: checks Triton kernels in the interpreter")
    if config.getoption("--kernel-checker"):
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise pytest.UsageError(
                "--kernel-checker: Triton is imported already, and does not interpret; "
                "set TRITON_INTERPRET=1 before pytest starts"
            )
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def kernel_checker() -> Callable[..., Any]:
    """`check`, which fails the test with the report if there is a fault, and else returns it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter: run pytest with --kernel-checker")
    from fastbert_kernels.checker.cases import check

    def checked(*arguments: Any, **more: Any) -> Any:
        report = check(*arguments, **more)
        if report.faults:
            pytest.fail(str(report), pytrace=False)
        return report

    return checked
