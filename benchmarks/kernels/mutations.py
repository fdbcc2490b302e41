"""Make small changes to our kernels, one at a time, and count those that the checker finds.

    python -m benchmarks.kernels.mutations --log FILE           100 changes; 61 took 23 CPU minutes
    python -m benchmarks.kernels.mutations --count 10 --seed 3  others

The log has one line for each change that was judged. An interrupted run that is started again with
the same log judges only the others, as long as the package is the same.

A change is one of these: another comparison, plus for minus, times for divided by, a constant off
by one, a mask or an `other` left out, a minimum for a maximum, a condition negated. They are drawn
among all places in the `kernel.py` files and in `_rows.py`. A change is found if the checker
reports a fault of an operation that uses the file, at the shapes of its spec. Some changes leave
the results as they are, such as the number of programs in a grid; nothing can find these, and they
count as missed. The unchanged kernels are judged first: if the checker reports a fault of one of
them, what it finds says nothing, and the program stops.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.cores import one_on_each
from benchmarks.harness.machine import ROOT

PACKAGE = ROOT / "kernels/fastbert_kernels"
CPU_S = 600  # of the processor; a change that makes a kernel run for ever counts as found
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.And: ast.Or,
    ast.BitAnd: ast.BitOr,
}
NAMES = {"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum", "exp2": "exp"}
# Which operations use a file that several share.
SHARED = {"_rows.py": ("norm", "add_norm", "gelu", "geglu", "embedding")}


class Change(NamedTuple):
    """The `number`-th change that is possible in a file; none for the number -1."""

    file: str
    number: int
    line: int
    what: str


class _Changer(ast.NodeTransformer):
    """Goes through the kernels of a file; makes the change of one number, or lists all."""

    def __init__(self, wanted: int = -1):
        self.wanted, self.count = wanted, 0
        self.possible: list[tuple[int, str]] = []

    def _turn(self, line: int, what: str) -> bool:
        self.possible.append((line, what))
        self.count += 1
        return self.count - 1 == self.wanted

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        other = SWAPS.get(type(node.ops[0]))
        if other and self._turn(node.lineno, f"{type(node.ops[0]).__name__} to {other.__name__}"):
            node.ops[0] = other()
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        other = SWAPS.get(type(node.op))
        if other and self._turn(node.lineno, f"{type(node.op).__name__} to {other.__name__}"):
            node.op = other()
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
            return node
        if self._turn(node.lineno, f"{node.value} to {node.value} + 1"):
            return ast.copy_location(ast.Constant(node.value + 1), node)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if self._turn(node.lineno, "condition negated"):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        for keyword in list(node.keywords):
            left_out = keyword.arg in ("mask", "other")
            if left_out and self._turn(node.lineno, f"no {keyword.arg}"):
                node.keywords.remove(keyword)
        name = getattr(node.func, "attr", "")
        if name in NAMES and self._turn(node.lineno, f"{name} to {NAMES[name]}"):
            node.func.attr = NAMES[name]  # type: ignore[attr-defined]
        return node


def kernels(tree: ast.Module) -> list[ast.FunctionDef]:
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.dump(decorator) for decorator in node.decorator_list)
    ]


def changes() -> list[Change]:
    """All changes that are possible, in the order of files and lines."""
    found: list[Change] = []
    for path in [*sorted(PACKAGE.glob("*/kernel.py")), PACKAGE / "_rows.py"]:
        changer = _Changer()
        for node in kernels(ast.parse(path.read_text(encoding="utf-8"))):
            node.decorator_list, arguments = [], node.args
            node.args = ast.arguments([], [], None, [], [], None, [])
            changer.visit(node)
            node.args = arguments
        name = path.relative_to(PACKAGE).as_posix()
        found += [Change(name, i, line, what) for i, (line, what) in enumerate(changer.possible)]
    return found


def changed(text: str, number: int) -> str:
    """The source with one change."""
    tree = ast.parse(text)
    changer = _Changer(number)
    for node in kernels(tree):
        decorators, node.decorator_list, arguments = node.decorator_list, [], node.args
        node.args = ast.arguments([], [], None, [], [], None, [])
        changer.visit(node)
        node.args, node.decorator_list = arguments, decorators
    return ast.unparse(ast.fix_missing_locations(tree))


def operations(file: str) -> tuple[str, ...]:
    return SHARED.get(file, (file.partition("/")[0],))


def judge(names: list[str]) -> str:
    """The first fault of these operations; "" if there is none."""
    from fastbert_kernels.checker.cases import Check, examine
    from fastbert_kernels.specs import SPECS

    for name in names:
        spec = SPECS[name]

        def inputs(dtype: Any, spec: Any = spec, **shape: Any) -> Any:
            given = spec.inputs(shape, dtype, 0.1 if spec.dropout else 0.0)
            if not spec.dropout:
                given = {k: v for k, v in given.items() if not k.startswith("dropout")}
            return given

        check = Check(
            kernel=lambda spec=spec, **given: spec.function(**given, impl="triton"),
            reference=lambda spec=spec, **given: spec.function(**given, impl="reference"),
            inputs=inputs,
            shapes=spec.shapes,
            gradients=spec.differentiable,
        )
        for number, shape in enumerate(spec.shapes):
            for finding in examine(check, dict(shape), ("fp32", "bf16")[number % 2]).findings:
                if finding.severity == "fault":
                    return f"{finding.kind}: {finding.message}"
    return ""


def outcome(change: Change) -> str:
    """Plant a change in a copy of the package, and judge it in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "fastbert_kernels"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / change.file
        file.write_text(changed(file.read_text(encoding="utf-8"), change.number), encoding="utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT)]),
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "benchmarks.kernels.mutations", "--judge"]
        done = subprocess.run(
            [*command, *operations(change.file)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode == -signal.SIGXCPU:
        return "does not end"
    if done.returncode:
        return f"stops: {(done.stderr.strip() or '?').splitlines()[-1][:100]}"
    return done.stdout.strip()


class Log:
    """What was judged before, in a file of one JSON array [digest, change, found] a line.

    The digest is that of the package, so that results of another package do not count.
    """

    def __init__(self, path: Path | None):
        files = sorted(PACKAGE.rglob("*.py"))
        texts = [file.read_bytes() for file in files]
        self.path, self.digest = path, hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
        self.known: dict[Change, str] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        for line in lines:
            digest, change, found = json.loads(line)
            if digest == self.digest:
                self.known[Change(*change)] = found

    def outcome(self, change: Change) -> str:
        """Judge a change, unless the log has it."""
        if change not in self.known:
            self.known[change] = outcome(change)
            if self.path:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([self.digest, change, self.known[change]]) + "\n")
        return self.known[change]


def report(seed: int, count: int, log: Log) -> Iterator[str]:
    drawn = random.Random(seed).sample(changes(), count)
    files = sorted({change.file for change in drawn})
    unchanged = [Change(file, -1, 0, "unchanged") for file in files]
    found = zip(files, one_on_each(log.outcome, unchanged), strict=True)
    if wrong := [f"{file}: {text}" for file, text in found if text]:
        raise SystemExit("unchanged kernels have faults:\n" + "\n".join(wrong))
    kinds: Counter[str] = Counter()
    for change, text in zip(drawn, one_on_each(log.outcome, drawn), strict=True):
        kinds[text.partition(":")[0] or "missed"] += 1
        yield f"{change.file}:{change.line} {change.what}: {text[:100] or 'MISSED'}"
    yield ""
    yield f"{count - kinds['missed']} of {count} found: " + ", ".join(
        f"{kind} {n}" for kind, n in kinds.most_common()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="where results are kept and resumed from")
    parser.add_argument("--judge", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
        print(judge(options.judge))
        return
    for line in report(options.seed, options.count, Log(options.log)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
