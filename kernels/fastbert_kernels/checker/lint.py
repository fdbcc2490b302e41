"""The lint: applies the rules of `rules.py` to source files and to the kernels of a check.

A comment `# checker: allow RULE` on the line of a finding, on the line above, or on the line of the
kernel's `def` silences a rule there.
"""

import ast
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastbert_kernels.checker.kernel_source import KernelSource, kernels_of
from fastbert_kernels.checker.report import Finding
from fastbert_kernels.checker.rules import RULES, Hit, interpreted_bf16

INTERPRETED_BF16 = "interpreted-bf16"
NAMES = (*RULES, INTERPRETED_BF16)
Types = Mapping[tuple[str, str], set[str]]


def lint_file(path: Path) -> list[Finding]:
    """Apply all rules to the kernels of a Python file."""
    return lint_source(path.read_text(encoding="utf-8"), "/".join(path.parts[-2:]))


def lint_source(
    text: str, name: str, types: Types | None = None, only: Collection[str] | None = None
) -> list[Finding]:
    """Apply all rules to the kernels of a source text.

    Args:
        text: of a Python file.
        name: of the file, for the findings.
        types: by kernel and argument, the dtypes of tensors, for the rules that ask for them.
        only: names of the kernels; None for all, and for the rules on whole files.

    Raises:
        SyntaxError: the text is no Python.
    """
    tree = ast.parse(text)
    lines = text.splitlines()
    findings: list[Finding] = []
    if only is None:
        findings += _findings(INTERPRETED_BF16, "", interpreted_bf16(tree), name, lines, 0)
    for node in kernels_of(tree):
        if only is not None and node.name not in only:
            continue
        known = {a: kinds for (k, a), kinds in (types or {}).items() if k == node.name}
        source = KernelSource(node, known)
        for rule, apply in RULES.items():
            findings += _findings(rule, node.name, apply(source), name, lines, node.lineno)
    return findings


def lint_functions(functions: Iterable[Any], types: Types) -> list[Finding]:
    """Apply the rules to the kernels that were launched, and to the functions that they call."""
    names: dict[str, set[str]] = {}
    for function in _reached(functions):
        names.setdefault(function.__code__.co_filename, set()).add(function.__name__)
    findings: list[Finding] = []
    for filename, only in names.items():
        path = Path(filename)
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            findings += lint_source(text, "/".join(path.parts[-2:]), types, only)
    return findings


def _reached(functions: Iterable[Any]) -> list[Any]:
    """These functions, and the `@triton.jit` functions that their globals name."""
    found: dict[tuple[str, str], Any] = {}
    waiting = list(functions)
    while waiting:
        function = waiting.pop(0)
        key = function.__code__.co_filename, function.__name__
        if key in found:
            continue
        found[key] = function
        for name in function.__code__.co_names:
            called = function.__globals__.get(name)
            while hasattr(called, "fn"):  # what decorators wrap
                called = called.fn
            wrapped = called is not function.__globals__.get(name)
            if wrapped and hasattr(called, "__code__"):
                waiting.append(called)
    return list(found.values())


def _findings(
    rule: str, kernel: str, hits: Iterable[Hit], name: str, lines: list[str], definition: int
) -> list[Finding]:
    return [
        Finding(f"lint {rule}", hit.message, hit.severity, kernel=kernel, line=f"{name}:{hit.line}")
        for hit in hits
        if not _allowed(rule, lines, hit.line, definition)
    ]


def _allowed(rule: str, lines: list[str], line: int, definition: int) -> bool:
    for number in (line, line - 1, definition):
        if 0 < number <= len(lines):
            comment = re.search(r"# checker: allow ([\w, -]+)", lines[number - 1])
            if comment and rule in re.split(r"[,\s]+", comment[1]):
                return True
    return False
