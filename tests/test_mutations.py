"""Small changes to our kernels are really made, and judged: `benchmarks.kernels.mutations`."""

import ast
import importlib.util
import json
import os
import random

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1, which tests/conftest.py sets where there is no GPU",
        allow_module_level=True,
    )

import torch

from benchmarks.kernels import mutations
from benchmarks.kernels.mutations import PACKAGE, Change, Log, changed, changes, outcome
from fastbert_kernels.checker import check
from fastbert_kernels.gelu.reference import reference

SOURCE = """
@triton.jit
def kernel(x_ptr, n, BLOCK: tl.constexpr = 16):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if n > 3:
        x = tl.load(x_ptr + i, mask=i < n, other=0.0)
        tl.store(x_ptr + i, tl.maximum(x, 1), mask=(i < n) & (x == x))

def launcher(x):
    return x + 1
"""
CHANGES = {  # by hand: what each change makes of its line
    "no mask": "x = tl.load(x_ptr + i, other=0.0)",
    "no other": "x = tl.load(x_ptr + i, mask=i < n)",
    "Lt to LtE": "x = tl.load(x_ptr + i, mask=i <= n, other=0.0)",
    "Gt to GtE": "if n >= 3:",
    "condition negated": "if not n > 3:",
    "Mult to Div": "i = tl.program_id(0) / BLOCK + tl.arange(0, BLOCK)",
    "maximum to minimum": "tl.store(x_ptr + i, tl.minimum(x, 1), mask=(i < n) & (x == x))",
    "BitAnd to BitOr": "tl.store(x_ptr + i, tl.maximum(x, 1), mask=(i < n) | (x == x))",
    "3 to 3 + 1": "if n > 4:",
    "0.0 to 0.0 + 1": "x = tl.load(x_ptr + i, mask=i < n, other=1.0)",
}


def lines(text):
    return [line.strip() for line in ast.unparse(ast.parse(text)).splitlines()]


def possible(file):
    return [change for change in changes() if change.file == file]


def test_each_change_changes_one_line_of_a_kernel():
    changer = mutations._Changer()
    (kernel,) = mutations.kernels(ast.parse(SOURCE))
    for statement in kernel.body:
        changer.visit(statement)
    made: dict[str, list[str]] = {}
    for number, (_, what) in enumerate(changer.possible):
        pairs = zip(lines(SOURCE), lines(changed(SOURCE, number)), strict=True)
        ((_, new),) = [(old, new) for old, new in pairs if old != new]
        made.setdefault(what, []).append(new)
    assert not {what for what, line in CHANGES.items() if line not in made[what]}
    assert len(changer.possible) == sum(map(len, made.values())) == 18
    assert lines(changed(SOURCE, -1)) == lines(changed(SOURCE, 18)) == lines(SOURCE)


def test_a_change_is_found_and_the_unchanged_kernel_is_not(tmp_path):
    text = (PACKAGE / "gelu/kernel.py").read_text(encoding="utf-8")
    first = next(change for change in possible("gelu/kernel.py") if change.what == "Lt to LtE")
    for number, kinds in ((-1, set()), (first.number, {"out of bounds"})):
        file = tmp_path / f"gelu_{number + 1}.py"
        file.write_text(changed(text, number), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        report = check(
            module.forward,
            reference,
            lambda dtype, T, F: {
                "x": torch.randn(T, F).to(dtype),
                "bias": torch.randn(F).to(dtype),
            },
            [{"T": 3, "F": 17}],
            dtypes=["fp32"],
            gradients=[],
        )
        assert {finding.kind for finding in report.faults} == kinds, report


def test_the_log_keeps_what_was_judged(tmp_path, monkeypatch):
    judged = []
    monkeypatch.setattr(mutations, "outcome", lambda change: judged.append(change) or "race: ")
    some, file = random.Random(0).sample(changes(), 3), tmp_path / "log"
    for again in range(2):
        log = Log(file)
        assert [log.outcome(change) for change in some] == ["race: "] * 3
        assert judged == some, again
    known = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text(json.dumps(["another package", *known[0][1:]]), encoding="utf-8")
    assert Log(file).known == {}


@pytest.mark.slow
def test_a_change_is_judged_in_a_process_of_its_own():
    assert outcome(Change("gelu/kernel.py", -1, 0, "unchanged")) == ""
    first = next(change for change in possible("gelu/kernel.py") if change.what == "Lt to LtE")
    assert outcome(first).startswith("out of bounds: loads ")
