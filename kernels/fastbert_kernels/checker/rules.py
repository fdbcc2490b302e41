"""The rules of the lint: patterns in the source of a kernel that have gone wrong before.

Each rule is a function from a kernel's source to lines and messages. docs/checker/rules/ has a page
for each, with a wrong and a right example.
"""

import ast
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

from fastbert_kernels.checker.kernel_source import (
    ATOMICS,
    REDUCTIONS,
    SIXTEEN,
    KernelSource,
    argument_of,
    language_call,
    mask_of,
)
from fastbert_kernels.checker.report import FAULT, NOTE


class Hit(NamedTuple):
    """One place at which a rule applies."""

    line: int
    severity: str
    message: str


def two_dots_one_accumulator(kernel: KernelSource) -> Iterator[Hit]:
    """Two `tl.dot` that add to one accumulator in one turn of a loop.

    Triton before 3.8.1 pipelines them wrongly on Blackwell. Source: triton-lang/triton #10821, and
    linkedin/Liger-Kernel #1413 and #1435.
    """
    for loop in kernel.nodes:
        if isinstance(loop, (ast.For, ast.While)):
            for name, lines in _accumulating_dots(loop.body).items():
                if len(lines) > 1:
                    yield Hit(
                        lines[1],
                        FAULT,
                        f"a second tl.dot adds to {name} in the same turn of the loop, which "
                        "Triton computes wrongly on Blackwell (#10821); "
                        "use two accumulators, or two loops",
                    )


def _accumulating_dots(statements: list[ast.stmt]) -> dict[str, list[int]]:
    """By accumulator, the lines of the dots that one turn executes at most."""
    found: dict[str, list[int]] = {}
    for statement in statements:
        if isinstance(statement, ast.If):
            branches = [_accumulating_dots(b) for b in (statement.body, statement.orelse)]
            for name in branches[0].keys() | branches[1].keys():
                longest = max((branch.get(name, []) for branch in branches), key=len)
                found.setdefault(name, []).extend(longest)
        elif isinstance(statement, ast.With):
            for name, lines in _accumulating_dots(statement.body).items():
                found.setdefault(name, []).extend(lines)
        elif name := _dot_into(statement):
            found.setdefault(name, []).append(statement.lineno)
    return found


def _dot_into(statement: ast.stmt) -> str:
    """The accumulator of a statement that adds a dot to it; else ""."""
    if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
        target, value = statement.target, statement.value
        return target.id if isinstance(target, ast.Name) and language_call(value) == "dot" else ""
    if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
        return ""
    name, value = statement.targets[0].id, statement.value
    if isinstance(value, ast.Call) and language_call(value) == "dot":
        into = argument_of(value, 2, "acc")
        return name if isinstance(into, ast.Name) and into.id == name else ""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        sides = [value.left, value.right]
        own = any(isinstance(side, ast.Name) and side.id == name for side in sides)
        return name if own and any(language_call(side) == "dot" for side in sides) else ""
    return ""


def dot_recurrence(kernel: KernelSource) -> Iterator[Hit]:
    """A state that one `tl.dot` adds to and another one multiplies, in one turn of a loop.

    Triton 3.6 on sm_100, and 3.6 and 3.7 on sm_103, compute it differently from run to run for some
    tiles and numbers of warps. Source: triton-lang/triton #9871 and #10590.
    """
    for loop in kernel.nodes:
        if not isinstance(loop, (ast.For, ast.While)):
            continue
        states = _accumulating_dots(loop.body)
        for call in (node for node in ast.walk(loop) if language_call(node) == "dot"):
            operands = [
                argument_of(cast("ast.Call", call), i, n) for i, n in ((0, "input"), (1, "other"))
            ]
            read = {
                node.id
                for operand in operands
                if operand is not None
                for node in kernel.sources(operand)
                if isinstance(node, ast.Name)
            }
            for name in sorted(read & states.keys()):
                yield Hit(
                    cast("ast.Call", call).lineno,
                    NOTE,
                    f"multiplies {name}, to which another tl.dot of the loop adds; Triton 3.6 and "
                    "3.7 may compute this differently from run to run on Blackwell (#9871, "
                    "#10590): compare two runs there",
                )


def sixteen_bit_accumulation(kernel: KernelSource) -> Iterator[Hit]:
    """A sum that is kept in 16 bits: in memory that is loaded, added to and stored, or in a loop.

    Source: apple/ml-cross-entropy #14 and #18, linkedin/Liger-Kernel #1329.
    """
    yield from _rounded_accumulators(kernel)
    yield from _rounded_atomics(kernel)
    locked = any(language_call(call) in ("atomic_cas", "atomic_xchg") for call in kernel.calls)
    for store in kernel.calls:
        if language_call(store) != "store" or len(store.args) < 2:
            continue
        pointer, value = store.args[:2]
        base = kernel.base(pointer)
        width = kernel.widths(base)
        if width == "32" or not _adds_what_it_loads(kernel, pointer, value):
            continue
        earlier = [
            other
            for other in kernel.calls
            if language_call(other) == "store"
            and other.lineno < store.lineno
            and kernel.base(other.args[0]) == base
            and not _in_other_branches(kernel, other, store)
        ]
        if locked or earlier or _in_a_loop_without(kernel, store, pointer):
            yield Hit(
                store.lineno,
                FAULT if width == "16" else NOTE,
                f"adds to what it loads from {base or 'memory'}, which is rounded to 16 bits after "
                "each addition; keep the sum in fp32",
            )


def _rounded_accumulators(kernel: KernelSource) -> Iterator[Hit]:
    """Variables that a loop adds to and rounds to 16 bits in each turn."""
    for loop in kernel.nodes:
        if not isinstance(loop, (ast.For, ast.While)):
            continue
        for node in ast.walk(loop):
            if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
                continue
            name = node.targets[0].id
            for cast_ in ast.walk(node.value):
                if isinstance(cast_, ast.Call) and _narrowing(kernel, cast_) == "16":
                    inside = list(ast.walk(cast_))
                    own = any(isinstance(n, ast.Name) and n.id == name for n in inside)
                    adds = any(isinstance(n, ast.Add) for n in inside)
                    if own and adds:
                        yield Hit(
                            node.lineno,
                            FAULT,
                            f"{name} is rounded to 16 bits after each addition; "
                            "keep the sum in fp32",
                        )


def _rounded_atomics(kernel: KernelSource) -> Iterator[Hit]:
    """Atomic additions to memory of 16 bits."""
    for call in kernel.calls:
        if language_call(call) == "atomic_add" and call.args:
            base = kernel.base(call.args[0])
            if kernel.widths(base) == "16":
                yield Hit(
                    call.lineno,
                    FAULT,
                    f"adds atomically to {base}, which is rounded to 16 bits after each addition, "
                    "in any order; keep the sum in fp32",
                )


def _adds_what_it_loads(kernel: KernelSource, pointer: ast.expr, value: ast.expr) -> bool:
    """Whether the value is a sum, one term of which was loaded through the same pointer."""
    wanted = ast.dump(pointer)
    stack, added = [(value, False)], False
    for _ in range(100):
        if not stack:
            break
        node, below_a_sum = stack.pop()
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            stack += [(node.left, True), (node.right, True)]
        elif isinstance(node, ast.Name) and kernel.definition(node) is not None:
            stack.append((kernel.definition(node) or node, below_a_sum))
        elif isinstance(node, ast.Call) and language_call(node) == "load" and node.args:
            added |= below_a_sum and ast.dump(node.args[0]) == wanted
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "to":
            stack.append((cast("ast.Attribute", node.func).value, below_a_sum))
    return added


def _in_other_branches(kernel: KernelSource, one: ast.AST, other: ast.AST) -> bool:
    """Whether the first is in the `if` and the second in the `else` of one condition."""
    return any(
        isinstance(node, ast.If)
        and any(one is n for part in node.body for n in ast.walk(part))
        and any(other is n for part in node.orelse for n in ast.walk(part))
        for node in kernel.nodes
    )


def _in_a_loop_without(kernel: KernelSource, store: ast.Call, pointer: ast.expr) -> bool:
    """Whether the store repeats, in a loop whose variable its pointer does not depend on."""
    for loop in kernel.nodes:
        if isinstance(loop, (ast.For, ast.While)) and any(n is store for n in ast.walk(loop)):
            names = {n.id for n in kernel.sources(pointer) if isinstance(n, ast.Name)}
            changed = {
                target.id
                for n in ast.walk(loop)
                for target in (
                    [n.target]
                    if isinstance(n, (ast.For, ast.AugAssign))
                    else n.targets
                    if isinstance(n, ast.Assign)
                    else []
                )
                if isinstance(target, ast.Name)
            }
            return not names & changed
    return False


def float_atomic(kernel: KernelSource) -> Iterator[Hit]:
    """A floating-point `tl.atomic_add`: programs add in any order, so each run rounds otherwise."""
    for call in kernel.calls:
        if language_call(call) != "atomic_add" or len(call.args) < 2:
            continue
        base = kernel.base(call.args[0])
        types = kernel.types.get(base, set())
        if types & SIXTEEN:  # which is sixteen-bit-accumulation
            continue
        whole = isinstance(call.args[1], ast.Constant) and isinstance(call.args[1].value, int)
        if types and not any("float" in name for name in types):
            continue
        if not types and whole:
            continue
        yield Hit(
            call.lineno,
            NOTE,
            f"adds floating-point numbers to {base or 'memory'} in any order, so the last digits "
            "differ from run to run; write the parts and add them in one order",
        )


def sixteen_bit_difference(kernel: KernelSource) -> Iterator[Hit]:
    """A difference or a sum of values that have been rounded to 16 bits just before.

    Where the terms are nearly equal, nothing but rounding is left. Source: linkedin/Liger-Kernel
    #1329.
    """
    for node in kernel.nodes:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
            operands, what = [node.left, node.right], "a difference"
        elif isinstance(node, ast.Call) and language_call(node) in ("sum", "cumsum") and node.args:
            operands, what = [node.args[0]], f"tl.{language_call(node)}"
        else:
            continue
        for operand in operands:
            value = kernel.definition(operand) if isinstance(operand, ast.Name) else operand
            kind = _narrowing(kernel, value)
            if kind:
                yield Hit(
                    node.lineno,
                    FAULT if kind == "16" else NOTE,
                    f"{what} of a value that was rounded to 16 bits before; "
                    "compute in fp32 and round the result",
                )


def _narrowing(kernel: KernelSource, value: ast.expr | None) -> str:
    """ "16" for a cast to 16 bits, "unknown" for one to an unknown dtype; else ""."""
    if not isinstance(value, ast.Call):
        return ""
    method = isinstance(value.func, ast.Attribute) and value.func.attr == "to"
    target = argument_of(value, 0 if method else 1, "dtype")
    if not (method or language_call(value) == "cast") or target is None:
        return ""
    if isinstance(target, ast.Attribute) and target.attr in SIXTEEN:
        return "16"
    if isinstance(target, ast.Attribute) and target.attr == "element_ty":
        width = kernel.widths(_leftmost(target))
        return "" if width == "32" else width
    return ""


def _leftmost(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def int32_offset(kernel: KernelSource) -> Iterator[Hit]:
    """An index times a stride, both of 32 bits: it wraps for a tensor beyond 2^31 elements.

    Source: thu-ml/SageAttention #386, databricks/megablocks #185.
    """
    found: dict[int, str] = {}
    for call in kernel.calls:
        if language_call(call) not in ATOMICS | {"load", "store"} or not call.args:
            continue
        for node in kernel.sources(call.args[0]):
            if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
                continue
            for index, size in ((node.left, node.right), (node.right, node.left)):
                if not isinstance(size, ast.Name) or kernel.arguments.get(size.id) is not False:
                    continue
                if kernel.definition(size) is None and _is_int32(kernel, index):
                    found[node.lineno] = size.id
    if found:
        first, *others = sorted(found)
        yield Hit(
            first,
            NOTE,
            f"a 32-bit index times {found[first]} wraps beyond 2^31 elements{_also(others)}; "
            "write index.to(tl.int64)",
        )


def _is_int32(kernel: KernelSource, index: ast.expr) -> bool:
    """Whether a value comes from program_id or a loop, without a cast to 64 bits.

    An arange alone has as many elements as a block, which is too few.
    """
    nodes = list(kernel.sources(index))
    if any(isinstance(n, ast.Attribute) and n.attr in ("int64", "uint64") for n in nodes):
        return False
    return any(language_call(n) in ("program_id", "range") or _is_range(n) for n in nodes)


def _is_range(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "range"


def uncovered_mask(kernel: KernelSource) -> Iterator[Hit]:
    """An access whose mask leaves out an axis that is compared with its size elsewhere."""
    compared: set[str] = set()
    for node in kernel.nodes:
        if isinstance(node, ast.Compare):
            compared |= kernel.ranges(node)
    found: dict[int, str] = {}
    for call in kernel.calls:
        if language_call(call) not in ("load", "store") or not call.args:
            continue
        mask = mask_of(call)
        if mask is None:  # where it matters, running the kernel shows an access out of bounds
            continue
        for name in (kernel.ranges(call.args[0]) & compared) - kernel.ranges(mask):
            found.setdefault(call.lineno, name)
    if found:
        first, *others = sorted(found)
        message = f"the mask says nothing of {found[first]}, which other masks bound"
        yield Hit(first, NOTE, message + _also(others))


def _also(lines: list[int]) -> str:
    """Further lines of a kernel with the same hit."""
    if not lines:
        return ""
    return f", as in line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines))}"


def missing_other(kernel: KernelSource) -> Iterator[Hit]:
    """A masked load without `other` whose value is reduced: lanes turned off are undefined."""
    seen: set[int] = set()
    for call in kernel.calls:
        if language_call(call) not in REDUCTIONS:
            continue
        for operand in call.args[:2]:
            for node in kernel.sources(operand, _is_where):
                if not (isinstance(node, ast.Call) and language_call(node) == "load"):
                    continue
                if mask_of(node) is None or argument_of(node, 2, "other") is not None:
                    continue
                if node.lineno not in seen:
                    seen.add(node.lineno)
                    yield Hit(
                        node.lineno,
                        NOTE,
                        f"tl.{language_call(call)} takes values that the mask turns off, and they "
                        "are undefined without other=",
                    )


def _is_where(node: ast.AST) -> bool:
    return language_call(node) == "where"


RULES: dict[str, Callable[[KernelSource], Iterator[Hit]]] = {
    "two-dots-one-accumulator": two_dots_one_accumulator,
    "dot-recurrence": dot_recurrence,
    "sixteen-bit-accumulation": sixteen_bit_accumulation,
    "float-atomic": float_atomic,
    "sixteen-bit-difference": sixteen_bit_difference,
    "int32-offset": int32_offset,
    "uncovered-mask": uncovered_mask,
    "missing-other": missing_other,
}


def interpreted_bf16(tree: ast.Module) -> Iterator[Hit]:
    """A file that asks for Triton's interpreter and uses bf16, which it computes wrongly.

    This is a rule for a whole file. Source: triton-lang/triton #4972 and #5424.
    """
    nodes = list(ast.walk(tree))
    imports = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    imports += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    if any(name.startswith("fastbert_kernels.checker") for name in imports):
        return
    asks = any(isinstance(n, ast.Constant) and n.value == "TRITON_INTERPRET" for n in nodes)
    for node in nodes:
        if asks and isinstance(node, ast.Attribute) and node.attr == "bfloat16":
            yield Hit(
                node.lineno,
                NOTE,
                "Triton's interpreter takes the bits of bf16 for integers; run the kernels inside "
                "fastbert_kernels.checker.sanitize()",
            )
            return
