"""Compile every launch that the kernels and the model can make, without a GPU.

    python -m benchmarks.compiled.launches [--architecture sm_90] [--only norm model] [--everything]
    python -m benchmarks.compiled.launches --front-end

The launcher is the one that a GPU would use, so a kernel that the compiler rejects, or that does
not fit the device, is found here and not on the first GPU. Each call runs forward and backward with
`no_launch`.

The calls are derived, not listed by hand. For each operation of `fastbert_kernels.specs` they are
every choice of given and omitted tensors that its signature allows (and its reference accepts), in
each dtype, with and without dropout; and every size that the kernels or `tiles.json` distinguish.
In addition there are training and evaluation steps of the model.

Machine code takes a second for each kind of launch, and there are 698 kinds on each architecture.
`--front-end` therefore runs only Triton's front end (`front_end.py`) for each kind of launch, once
if several architectures have the same.

By default sizes are tried in bf16 and fp32, unusual head sizes in bf16 only, and rows up to 1,024.
`--everything` adds the rest and all shapes of the specs, and takes some minutes. The program prints
one line for each kind of failure. The exit code is 1 if there is a failure, if no call reached a
kernel, or if a compile-time switch always had the same value.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

import fastbert_kernels
from benchmarks.compiled.front_end import front_end
from benchmarks.compiled.no_launch import SHARED_MEMORY, no_launch
from benchmarks.harness.forked import forked
from benchmarks.kernels.cases import Case, arguments, leaves
from fastbert_kernels import layer_norm
from fastbert_kernels._spec import Shape
from fastbert_kernels._tiles import TABLE
from fastbert_kernels.specs import SPECS

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
PRECISIONS = ("bf16", "fp32", "autocast")  # in which a GPU trains
WIDEST_BY_DEFAULT = 1024
# Sequence lengths, for attention.
HALF_A_TILE, ONE_TILE, MANY_TILES = [40, 60], [40, 128], [200, 30]


class Call(NamedTuple):
    """One call of the public interface; `run` runs its forward and backward pass."""

    part: str  # the operation, or "model"
    size: str  # calls with equal part and size share most kernels, so they run in one process
    label: str
    run: Callable[[], None]


# Calls of the operations.


def operation_calls(everything: bool) -> Iterator[Call]:
    for operation, spec in SPECS.items():
        rates = (0.0, 0.1) if spec.dropout else (0.0,)
        shapes = [(shape, dtype) for shape in spec.shapes for dtype in DTYPES] if everything else []
        for (shape, dtype), p in itertools.product([*shapes, *sizes(operation, everything)], rates):
            yield operation_call(operation, shape, p, dtype)
        for shape, p, dtype in itertools.product(smallest(operation), rates, DTYPES):
            for omitted in choices(optional_tensors(spec.function)):
                yield operation_call(operation, shape, p, dtype, omitted)
        for shape in smallest(operation):  # fp32 products in the matrix units
            yield operation_call(operation, shape, rates[-1], torch.float32, precision="high")
    for dtype in DTYPES:
        yield operation_call("norm", {"T": 5, "D": 64}, 0.0, dtype, function=layer_norm)


def sizes(operation: str, everything: bool) -> list[tuple[Shape, torch.dtype]]:
    """Shapes of each size that the kernels distinguish.

    These are all head sizes of the interface, the rows of `tiles.json`, and a size in between.
    """
    dtypes = DTYPES if everything else DTYPES[:2]
    if operation == "attention":
        head_sizes, usual = range(16, 129, 16), (16, 48, 64, 128)
        fitting = [
            (K, dtype)
            for K in head_sizes
            for dtype in dtypes
            if everything or dtype.itemsize == 2 or K in usual
        ]
        return [
            ({"lengths": lengths, "H": 2, "K": K}, dtype)
            for K, dtype in fitting
            for lengths in (ONE_TILE, MANY_TILES)
        ]
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    rows = {
        row["size"]
        for kernels in table.values()
        for kernel, found in kernels.items()
        if kernel.startswith(operation)
        for row in found
    }
    wanted = sorted(row for row in rows if everything or row <= WIDEST_BY_DEFAULT)
    of_size = {
        "mlm_loss": lambda D: {"T": 10, "M": 5, "D": D, "V": 300},
        "norm": lambda D: {"T": 5, "D": D},
        "add_norm": lambda D: {"T": 5, "D": D},
        "rotary": lambda D: {"lengths": [5], "H": D // 4, "K": 4},
        "gelu": lambda F: {"T": 5, "F": F},
        "geglu": lambda F: {"T": 5, "F": F},
        "embedding": lambda D: {"T": 70, "V": 100, "P": 64, "D": D},
    }
    return [
        (of_size[operation](size), dtype)
        for size in (*wanted, 1000)
        if size > 1
        for dtype in dtypes
    ]


def smallest(operation: str) -> list[Shape]:
    """The shapes for which all choices of tensors are tried.

    Attention has sequences of one tile and of several, for some queries and for all, with a window
    and without. The MLM loss has all tokens masked, and some.
    """
    if operation == "attention":
        return [
            {"lengths": lengths, "H": 2, "K": 64, "R": R} | window
            for lengths in (HALF_A_TILE, MANY_TILES)
            for R in (0, 9)
            for window in ({}, {"window": 64})
        ]
    if operation == "mlm_loss":
        return [{"T": 10, "M": M, "D": 64, "V": 300} for M in (5, 10)]
    return [
        next(
            shape
            for shape in SPECS[operation].shapes
            if shape.get("T", sum(shape.get("lengths", ()))) > 1
        )
    ]


def optional_tensors(function: Callable) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
        if parameter.annotation == Tensor | None
    ]


def choices(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Every set of tensors that a caller may leave out."""
    for count in range(len(names) + 1):
        yield from itertools.combinations(names, count)


def operation_call(
    operation: str,
    shape: Shape,
    p: float,
    dtype: torch.dtype,
    omitted: tuple[str, ...] = (),
    function: Callable | None = None,
    precision: str = "highest",
) -> Call:
    without = f" without {', '.join(omitted)}" if omitted else ""
    products = f" {precision} products" if precision != "highest" else ""
    name = function.__name__ if function else operation
    axes = " ".join(f"{axis}={value}" for axis, value in shape.items())
    label = f"{name} {axes} p={p:g} {str(dtype)[6:]}{without}{products}"

    def run() -> None:
        case = Case(operation, label, shape, p)
        given = {
            name: None if name in omitted else value
            for name, value in arguments(case, dtype, torch.device("cpu")).items()
        }
        called = function or SPECS[operation].function
        given = {
            name: value
            for name, value in given.items()
            if name in inspect.signature(called).parameters
        }
        if omitted:
            try:
                called(**given, impl="reference")
            except ValueError:
                return  # the interface does not accept this call
        torch.set_float32_matmul_precision(precision)
        try:
            result = called(**given, impl="triton")
            first = result[0] if isinstance(result, tuple) else result
            wanted = [
                x
                for x in leaves(case, {**dict.fromkeys(SPECS[operation].differentiable), **given})
                if x is not None
            ]
            torch.autograd.grad(first, wanted, torch.ones_like(first), allow_unused=True)
        finally:
            torch.set_float32_matmul_precision("highest")

    return Call(operation, f"{shape} {dtype}", label, run)


# Calls of the model.


def model_calls(precisions: Sequence[str]) -> Iterator[Call]:
    """Training and evaluation steps, and the computations of `embed` and `fill_mask`."""
    for kind, precision, lengths, dropout in itertools.product(
        ("bert", "modernbert"), precisions, (ONE_TILE, MANY_TILES), (0.1, 0.0)
    ):
        label = f"step of {kind} lengths={lengths} {precision} dropout={dropout:g}"
        yield Call(
            "model",
            f"{kind} {precision}",
            label,
            lambda args=(kind, lengths, precision, dropout): model_step(*args),
        )


def model_step(kind: str, lengths: list[int], precision: str, dropout: float) -> None:
    from fastbert.config import BertConfig, ModernBertConfig
    from fastbert.data.manifest import SpecialIds
    from fastbert.data.packing import pack_texts
    from fastbert.models.build import build_model
    from fastbert.models.heads import losses

    if kind == "bert":
        config = BertConfig(
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=512,
            max_position_embeddings=max(lengths),
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    else:
        config = ModernBertConfig(
            hidden_size=128,
            num_hidden_layers=2,  # a global one and a local one
            num_attention_heads=2,
            intermediate_size=192,
            max_position_embeddings=max(lengths),
            embedding_dropout=dropout,
            attention_dropout=dropout,
        )
    model = build_model(config, vocab_size=300, kernels="triton", device="cuda")
    if precision == "bf16":
        model.bfloat16()
    first = [[7] * (length // 2) for length in lengths]
    second = [[8] * (length - length // 2 - 3) for length in lengths]
    batch = pack_texts(first, second, SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4))
    batch = dataclasses.replace(
        batch, masked_positions=torch.tensor([3, 50]), labels=torch.tensor([7, 8]), masked_total=2
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        losses(model(batch)).loss.backward()
        model.eval()
        with torch.no_grad():
            model(batch)
            last = model.hidden_states(batch)[-1]
            model.token_logits(last)


# Compilation.


@dataclass
class Found:
    """The result of some calls on one architecture."""

    calls: int = 0
    loaded: int = 0
    # The kinds of launches, by kernel and Triton's key: what Triton compiles once.
    kinds: set[tuple[str, str]] = field(default_factory=set)
    # By error message: the calls.
    failures: dict[str, list[str]] = field(default_factory=dict)
    # By kernel ("norm._forward_kernel") and name of a constant: the values that it had.
    reached: dict[str, dict[str, set]] = field(default_factory=dict)

    def add(self, other: Found) -> None:
        self.calls += other.calls
        self.loaded += other.loaded
        self.kinds |= other.kinds
        for error, labels in other.failures.items():
            self.failures.setdefault(error, []).extend(labels)
        for kernel, constants in other.reached.items():
            for name, values in constants.items():
                self.reached.setdefault(kernel, {}).setdefault(name, set()).update(values)


class Gate:
    """Runs calls, and decides how far each kind of launch is compiled.

    Args:
        machine_code: whether to compile each kind of launch to machine code. Otherwise the front
            end runs, once for each signature with its constants.
    """

    def __init__(self, machine_code: bool):
        self.machine_code = machine_code
        self._checked: set[tuple] = set()  # what has passed the front end

    def compile(self, architecture: str, calls: list[Call]) -> Found:
        """Run these calls, and compile what they launch."""
        found = Found(calls=len(calls))

        def hook(*, key: str, fn: Any, compile: Any, **_: Any) -> bool:
            """Triton calls it before it compiles, and does not compile if it returns True."""
            function = fn.jit_function
            signature = compile["signature"]
            constants = compile["constants"]
            kernel = f"{fn.module.split('.')[-2]}.{fn.name}"
            if (kernel, key) not in found.kinds:
                found.kinds.add((kernel, key))
                mine = found.reached.setdefault(kernel, {})
                for index, value in constants.items():
                    mine.setdefault(function.arg_names[index[0]], set()).add(value)
            if self.machine_code:
                return False
            same = (kernel, str(signature), str(constants))
            if same not in self._checked:
                front_end(function, signature, constants, int(architecture.removeprefix("sm_")))
                self._checked.add(same)
            return True

        with no_launch(architecture) as seen:
            knobs.runtime.jit_cache_hook = hook
            try:
                for call in calls:
                    try:
                        call.run()
                    except Exception as error:
                        found.failures.setdefault(innermost(error), []).append(call.label)
            finally:
                knobs.runtime.jit_cache_hook = None
        found.loaded = len(seen.loaded)
        return found


def innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:200] if lines else ''}"


def kernels_of(operation: str) -> dict[str, Any]:
    """The Triton kernels of an operation, by name ("norm._forward_kernel")."""
    module = importlib.import_module(f"fastbert_kernels.{operation}.kernel")
    return {
        f"{operation}.{name}": kernel
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and hasattr(kernel, "arg_names")
    }


def unreached(reached: dict[str, dict[str, set]], parts: list[str]) -> list[str]:
    """Kernels that no call launched, and compile-time switches that always had the same value."""
    lines = []
    for full in (kernel for part in parts if part in SPECS for kernel in kernels_of(part)):
        if full not in reached:
            lines.append(f"{full}: no call launches it")
            continue
        for switch, values in reached[full].items():
            if values in ({True}, {False}) and bool in map(type, values):
                lines.append(f"{full}: {switch} is always {values.pop()}")
    return lines


def all_calls(parts: list[str], everything: bool, precisions: Sequence[str]) -> list[Call]:
    """The calls of these parts; the model's come first, in these precisions."""
    calls = itertools.chain(model_calls(precisions), operation_calls(everything))
    return [call for call in calls if call.part in parts]


def check(architecture: str, calls: list[Call]) -> Found:
    """Compile these calls to machine code."""
    groups: dict[tuple[str, str], list[Call]] = defaultdict(list)
    for call in calls:
        groups[call.part, call.size].append(call)
    found = Found()
    for one in forked(_compile_group, [(architecture, group) for group in groups.values()]):
        found.add(one)
    return found


def _compile_group(architecture: str, calls: list[Call]) -> Found:
    torch.set_num_threads(1)
    return Gate(machine_code=True).compile(architecture, calls)


def check_front_end(architectures: list[str], calls: list[Call]) -> Iterator[tuple[str, Found]]:
    """Run the front end for these calls, on one architecture after the other."""
    gate = Gate(machine_code=False)
    for architecture in architectures:
        yield architecture, gate.compile(architecture, calls)


def faults(architecture: str, found: Found, parts: list[str]) -> list[str]:
    """One line for each fault."""
    lines = [
        f"{architecture} {error}: {len(labels)} calls, such as {labels[0]}"
        for error, labels in found.failures.items()
    ]
    return lines + [f"{architecture} {line}" for line in unreached(found.reached, parts)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    architectures = [f"sm_{capability}" for capability in SHARED_MEMORY]
    parser.add_argument("--architecture", nargs="+", choices=architectures, default=architectures)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*SPECS, "model"],
        default=[*SPECS, "model"],
        help="compile only these parts",
    )
    parser.add_argument(
        "--everything",
        action="store_true",
        help="all combinations and the widest rows; takes minutes",
    )
    parser.add_argument(
        "--front-end",
        action="store_true",
        help="run only Triton's front end; takes a minute for all architectures together",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=PRECISIONS,
        help="of the steps of the model",
    )
    options = parser.parse_args()
    calls = all_calls(options.only, options.everything, options.precision)
    if options.front_end:
        torch.set_num_threads(1)
        results = check_front_end(options.architecture, calls)
    else:
        results = (
            (architecture, check(architecture, calls)) for architecture in options.architecture
        )
    wrong, start = [], time.monotonic()
    for architecture, found in results:
        wrong += faults(architecture, found, options.only)
        bad = sum(map(len, found.failures.values()))
        print(
            f"{architecture}: {found.calls} calls, {bad} fail; "
            f"{len(found.kinds)} kinds of launches, "
            f"{found.loaded} kernels compiled and loaded; {time.monotonic() - start:.0f} s",
            flush=True,
        )
    for line in wrong:
        print(f"FAULT {line}", file=sys.stderr)
    print(f"kernels of {Path(fastbert_kernels.__file__).parent}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
