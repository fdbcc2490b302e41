"""The order in which a warp executes instructions: loops, and one path through the kernel."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from benchmarks.machine_code.counts import matrix_flops
from benchmarks.machine_code.decode import Code, Instruction


def loops(code: Code) -> list[tuple[int, int]]:
    """Numbers of the first and last instruction of each innermost loop.

    The trap after the end of the code, which jumps to itself, does not count as a loop.
    """
    spans = [
        (to, at)
        for at in range(len(code.instructions))
        if (to := code.target(at)) is not None and to < at
    ]
    return [
        span
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]


def flops_between(code: Code, first: int, last: int) -> int:
    """FLOPs of a warp in the matrix products from instruction `first` to `last` inclusive."""
    return sum(map(matrix_flops, code.instructions[first : last + 1]))


def main_loop(code: Code, which: str = "products") -> tuple[int, int] | None:
    """First and last instruction of the loop that does the work; None if there is none.

    Args:
        code: the kernel.
        which: "products" for the loop with most matrix products (None if all products are outside
            of loops), "longest", or "0", "1", ... for one of those with products, in the code's
            order.
    """
    spans = loops(code)
    if not spans:
        return None
    if which.isdigit():
        return [span for span in spans if flops_between(code, *span)][int(which)]
    if which == "products":
        most = max(spans, key=lambda span: (flops_between(code, *span), span[1] - span[0]))
        return (
            most
            if flops_between(code, *most) or not any(map(matrix_flops, code.instructions))
            else None
        )
    return max(spans, key=lambda span: span[1] - span[0])


def way_through(
    code: Code, passes: int, which: str = "products", inner: int = 1
) -> list[Instruction]:
    """All instructions that a warp executes with `passes` passes of the main loop and no tail.

    Other loops are executed once. A conditional forward branch is not taken, with four exceptions:

    - a branch without which the main loop would be missed;
    - a branch after the main loop that jumps over matrix products: those of the tail;
    - a branch before a main loop with matrix products that jumps over a loop without any: it
      handles a sum of no terms;
    - with `inner` above 1, a branch within the main loop, except in every `inner`-th pass: the
      compiler fused two nested loops, and it jumps over the end of an iteration of the outer one.
    """
    main = main_loop(code, which)
    forward = {
        at: to
        for at in range(len(code.instructions))
        if (to := code.target(at)) is not None and to > at
    }
    if main is None:
        products = [
            at for at, instruction in enumerate(code.instructions) if matrix_flops(instruction)
        ]
        return walk(code, {}, _needed(code, forward, products[0]) if products else None)
    first, last = main
    taken = _needed(code, forward, first)
    taken |= {at: 0 for at, to in forward.items() if at > last and flops_between(code, at, to - 1)}
    if flops_between(code, *main):
        empty = [span for span in loops(code) if span[1] < first and not flops_between(code, *span)]
        taken |= {
            at: 0
            for at, to in forward.items()
            if to <= first and any(at < start and end < to for start, end in empty)
        }
    if inner > 1:
        taken |= {
            at: inner
            for at, to in forward.items()
            if first <= at and to <= last and not flops_between(code, at, to - 1)
        }
    found = walk(code, {last: passes}, taken)
    assert found.count(code.instructions[last]) == passes, (
        "the path through the kernel misses its main loop"
    )
    return found


def _needed(code: Code, forward: Mapping[int, int], goal: int) -> dict[int, int]:
    """The forward branches that must be taken to reach instruction `goal`."""
    reached = leading_to(code, goal)
    return {
        at: 0 for at, to in forward.items() if at < goal and to in reached and at + 1 not in reached
    }


def leading_to(code: Code, goal: int) -> set[int]:
    """Numbers of the instructions from which instruction `goal` can be reached."""
    before: dict[int, list[int]] = defaultdict(list)
    for at, instruction in enumerate(code.instructions):
        to, always = code.target(at), not instruction.predicate
        if to is not None:
            before[to].append(at)
        if not (always and (to is not None or instruction.base == "EXIT")):
            before[at + 1].append(at)
    found, ahead = set(), [goal]
    while ahead:
        if (at := ahead.pop()) not in found:
            found.add(at)
            ahead.extend(before[at])
    return found


def walk(
    code: Code, passes: Mapping[int, int], taken: Mapping[int, int] | None = None
) -> list[Instruction]:
    """Instructions in the order of execution.

    Args:
        code: the kernel.
        passes: by the number of a loop's last instruction, how often the loop runs; by default 1.
        taken: numbers of the conditional forward branches that are taken. The value n means that
            the branch is not taken every n-th time; with 0 it is always taken.
    """
    taken = taken or {}
    found: list[Instruction] = []
    met: Counter[int] = Counter()  # executions of each branch
    at = 0
    while at < len(code.instructions):
        instruction = code.instructions[at]
        found.append(instruction)
        if instruction.base == "EXIT" and not instruction.predicate:
            break
        to = code.target(at)
        if to is None:
            at += 1
            continue
        if to == at:
            break  # the trap after the end
        met[at] += 1
        if to < at:
            jumps = met[at] % passes.get(at, 1) != 0
        else:
            jumps = not instruction.predicate or (
                at in taken and (not taken[at] or met[at] % taken[at] != 0)
            )
        at = to if jumps else at + 1
    return found
