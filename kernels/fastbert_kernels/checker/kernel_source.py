"""The source of one kernel, with what the rules of `rules.py` ask: where a value comes from.

Definitions are found by line: a name means its last assignment above. Loops that carry a value from
one turn to the next are not followed, and calls of device functions are opaque.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

REDUCTIONS = {
    *("sum", "max", "min", "argmax", "argmin", "dot", "cumsum", "cumprod", "reduce", "xor_sum"),
    *("softmax", "sort", "associative_scan"),
}
ATOMICS = {
    *("atomic_add", "atomic_max", "atomic_min", "atomic_and", "atomic_or", "atomic_xor"),
    *("atomic_xchg", "atomic_cas"),
}
SIXTEEN = {"float16", "bfloat16"}


@dataclass
class KernelSource:
    """One `@triton.jit` function.

    Attributes:
        node: its definition.
        types: by argument, the dtypes it was launched with; empty where that is unknown.
    """

    node: ast.FunctionDef
    types: Mapping[str, set[str]] = field(default_factory=dict[str, set[str]])

    @cached_property
    def arguments(self) -> dict[str, bool]:
        """Arguments by name; whether each is a constexpr."""
        return {
            argument.arg: "constexpr" in ast.dump(argument.annotation)
            if argument.annotation
            else False
            for argument in [*self.node.args.args, *self.node.args.kwonlyargs]
        }

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.node))

    @cached_property
    def calls(self) -> list[ast.Call]:
        return [node for node in self.nodes if isinstance(node, ast.Call)]

    @cached_property
    def _definitions(self) -> dict[str, list[tuple[int, ast.expr]]]:
        found: dict[str, list[tuple[int, ast.expr]]] = {}
        for node in self.nodes:
            for name, line, value in _assigned(node):
                found.setdefault(name, []).append((line, value))
        for values in found.values():
            values.sort(key=lambda pair: pair[0])
        return found

    def definition(self, name: ast.Name) -> ast.expr | None:
        """What the name was last set to above its use."""
        before = [value for line, value in self._definitions.get(name.id, []) if line < name.lineno]
        return before[-1] if before else None

    def sources(
        self, expression: ast.AST, stop: Callable[[ast.AST], bool] = lambda _: False
    ) -> Iterator[ast.AST]:
        """All nodes that the value of an expression comes from, definitions included.

        Args:
            expression: to start from.
            stop: whether not to look into a node.
        """
        seen: set[int] = set()
        stack = [expression]
        while stack:
            node = stack.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            if stop(node):
                continue
            if isinstance(node, ast.Name):
                value = self.definition(node)
                if value is not None:
                    stack.append(value)
            stack += ast.iter_child_nodes(node)

    def base(self, pointer: ast.expr) -> str:
        """The argument that a pointer expression starts from; "" if that is not clear."""
        node: ast.expr = pointer
        for _ in range(50):
            if isinstance(node, ast.BinOp):
                node = node.left
            elif isinstance(node, ast.Name) and self.definition(node) is not None:
                node = self.definition(node) or node
            elif isinstance(node, ast.Call) and language_call(node) in ("cast", "multiple_of"):
                node = node.args[0]
            else:
                break
        return node.id if isinstance(node, ast.Name) and node.id in self.arguments else ""

    def widths(self, argument: str) -> str:
        """ "16", "32" or "unknown": of the numbers that an argument points to."""
        types = self.types.get(argument, set())
        if not types:
            return "unknown"
        return "16" if types & SIXTEEN else "32"

    def ranges(self, expression: ast.AST) -> set[str]:
        """The variables made of `tl.arange` that an expression comes from, but for remainders."""
        found: set[str] = set()
        for node in self.sources(expression, is_remainder):
            if isinstance(node, ast.Name):
                value = self.definition(node)
                if value is not None and any(
                    language_call(inner) == "arange" for inner in ast.walk(value)
                ):
                    found.add(node.id)
        return found


def _assigned(node: ast.AST) -> Iterator[tuple[str, int, ast.expr]]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, node.lineno, node.value
            elif isinstance(target, ast.Tuple):
                for item in target.elts:
                    if isinstance(item, ast.Name):
                        yield item.id, node.lineno, node.value
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
        yield node.target.id, node.lineno, node.value
    elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
        yield node.target.id, node.lineno, node.iter


def is_remainder(node: ast.AST) -> bool:
    """Whether a node is `a % b`, which needs no mask."""
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod)


def language_call(node: ast.AST) -> str:
    """The name of a function of Triton's language that a node calls, such as "load"; else ""."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id in ("tl", "language"):
            return node.func.attr
        if isinstance(owner, ast.Attribute) and owner.attr in ("language", "math"):
            return node.func.attr
    return ""


def argument_of(call: ast.Call, position: int, name: str) -> ast.expr | None:
    """An argument by its position or its name."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    return call.args[position] if len(call.args) > position else None


def mask_of(call: ast.Call) -> ast.expr | None:
    """The mask of a load or store."""
    mask = argument_of(call, 2 if language_call(call) == "store" else 1, "mask")
    return None if isinstance(mask, ast.Constant) and mask.value is None else mask


def kernels_of(tree: ast.Module) -> list[ast.FunctionDef]:
    """The functions with a decorator named `jit`."""

    def is_jit(decorator: ast.expr) -> bool:
        node = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        return name == "jit"

    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any(map(is_jit, node.decorator_list))
    ]
