"""The order in which a warp meets the instructions of a kernel: its loops, and one way through all of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from benchmarks.machine_code.counts import matrix_flops
from benchmarks.machine_code.decode import Code, Instruction


def loops(code: Code) -> list[tuple[int, int]]:
    """Numbers of the first and last instruction of each innermost loop; the trap behind the end, which jumps to itself, is none."""
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
    """Of the matrix products from instruction `first` to `last`, both included; of a warp."""
    return sum(map(matrix_flops, code.instructions[first : last + 1]))


def main_loop(code: Code, which: str = "products") -> tuple[int, int] | None:
    """First and last instruction of the loop that does the work; None where there is no loop.

    Args:
        which: "products" for the loop with most matrix products (None where all products are outside of loops), "longest", or "0", "1", ... for
            one of those with products, in the code's order.
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
    """All that a warp executes whose main loop is passed `passes` times, and that has no tail.

    Other loops are passed once. A conditional branch forward is not taken, but for four kinds:

    - one that must be, or the main loop would be missed;
    - one behind the main loop that jumps over matrix products: they are those of the tail;
    - one before a main loop with matrix products that jumps over a loop without any: that is for a sum of no terms;
    - with `inner` above 1, one within the main loop, in all but every `inner`-th pass: two nested loops were made one, and it jumps over the end of a turn
      of the outer one.
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
        "the way through the kernel misses its main loop"
    )
    return found


def _needed(code: Code, forward: Mapping[int, int], goal: int) -> dict[int, int]:
    """The branches forward that must be taken, or instruction `goal` would be missed."""
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
        passes: of the loop that ends with instruction number ..., how often it is passed; once if it is not named.
        taken: numbers of the conditional branches forward that are taken, with n for one that is not taken each n-th time, 0 for one that always is.
    """
    taken = taken or {}
    found: list[Instruction] = []
    met: Counter[int] = Counter()  # branches, how often
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
            break  # the trap behind the end
        met[at] += 1
        if to < at:
            jumps = met[at] % passes.get(at, 1) != 0
        else:
            jumps = not instruction.predicate or (
                at in taken and (not taken[at] or met[at] % taken[at] != 0)
            )
        at = to if jumps else at + 1
    return found
