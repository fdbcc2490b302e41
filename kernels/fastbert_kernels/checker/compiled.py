"""Compile the kernels of a check for GPUs that are not there: `--compile sm_90,gfx942`.

The check runs once more, at its last shape, in a Python process in which Triton compiles. Launches
are compiled, with the types, constants and alignments of their arguments, and launch nothing. The
compiler refuses some code that the interpreter runs, and says what a kernel needs of a GPU.
"""

# pyright: basic
# Triton has no types.

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from fastbert_kernels.checker.execute import NO_BACKWARD
from fastbert_kernels.checker.report import FAULT, NOTE, Finding, count

if TYPE_CHECKING:
    from fastbert_kernels.checker.cases import Check
    from fastbert_kernels.checker.report import Report


def add_compiled(report: Report, path: Path, targets: str, checked: Check) -> None:
    """Compile the kernels of a check file, and add lines and findings to its report.

    Raises:
        ValueError: the process failed.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    places = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    request = {
        "path": str(path),
        "targets": architectures(targets),
        "shape": dict(checked.shapes[-1]),
        "dtypes": list(checked.dtypes),
    }
    command = [sys.executable, "-m", "fastbert_kernels.checker.compiled", json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--compile {targets}: {(done.stderr.strip() or '?').splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["error"]:
        report.remarks.append(f"compilation: {found['error']}")
    elif not found["backward"]:
        report.remarks.append(f"compilation: {NO_BACKWARD}")
    for row in found["rows"]:
        line, finding = describe(row)
        report.compiled.append(line)
        if finding is not None:
            report.add(finding)


def architectures(text: str) -> list[str]:
    """The architectures that are named on the command line.

    Raises:
        ValueError: there is none, or an unknown one.
    """
    from fastbert_kernels.checker.machine_code import DEVICES

    found = [word for word in text.split(",") if word]
    for name in found or [text]:
        if name not in DEVICES:
            raise ValueError(
                f"--compile: unknown architecture {name!r}; known are {', '.join(DEVICES)}"
            )
    return found


def describe(row: dict[str, Any]) -> tuple[str, Finding | None]:
    """A line for a kernel on one architecture, and what is wrong with it."""
    where = f"{row['target']}: {row['kernel']}, {row['dtype']}"
    at: dict[str, Any] = {"kernel": row["kernel"], "dtype": row["dtype"], "shape": row["shape"]}
    if row["error"]:
        message = f"on {row['target']}: {row['error']}"
        return f"{where}: does not compile", Finding("does not compile", message, FAULT, **at)
    loads = ", ".join(f"{name} {bits} bits" for name, bits in sorted(row["widths"].items()))
    line = (
        f"{where}: {count(row['registers'], 'register')}, {count(row['spilled'], 'byte')} spilled, "
        f"{count(row['shared'], 'byte')} of shared memory, "
        f"{count(row['programs'], 'program')} at a time"
        + (f", narrowest load of {loads}" if loads else "")
    )
    if row["shared"] > row["limit"]:
        has, needs = count(row["limit"], "byte"), f"{row['shared']:,}"
        message = f"{row['target']} has {has} of shared memory, not {needs}"
        return line, Finding("shared memory", message, FAULT, **at)
    if row["spilled"]:
        message = f"{count(row['spilled'], 'byte')} a thread on {row['target']}"
        return line, Finding("spilled registers", message, NOTE, **at)
    return line, None


class _Driver:
    """The part of Triton's driver that is asked before a launch."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def main(arguments: Sequence[str]) -> None:
    """What the process does: prints JSON with a row for each kernel and architecture."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    from fastbert_kernels.checker.cases import DTYPES
    from fastbert_kernels.checker.command import load
    from fastbert_kernels.checker.execute import draw, launch_both_ways, what_and_where
    from fastbert_kernels.checker.machine_code import DEVICES

    request = json.loads(arguments[0])
    launches: list[tuple[Any, tuple, dict[str, Any], str]] = []
    dtype = ""

    def record(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        for hook in function.pre_run_hooks:
            hook(*args, **kwargs)
        launches.append((function, args, kwargs, dtype))

    first: Any = _Driver(DEVICES[request["targets"][0]].target)
    driver.set_active(first)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        stack.enter_context(mock.patch.object(Autotuner, "_bench", lambda *_, **__: [0.0]))
        checked = load(Path(request["path"]))
        backward, stopped = True, ""
        for dtype in request["dtypes"]:
            inputs = draw(checked.inputs, DTYPES[dtype], request["shape"])
            try:
                backward &= launch_both_ways(checked.kernel, inputs, checked.gradients)
            except Exception as error:  # of somebody else's function
                stopped = f"stopped by {': '.join(filter(None, what_and_where(error)))}"
    rows: dict[str, dict[str, Any]] = {}
    for name in request["targets"]:
        active: Any = _Driver(DEVICES[name].target)
        driver.set_active(active)
        for function, args, kwargs, dtype in launches:
            row = {"target": name, "kernel": function.__name__, "dtype": dtype}
            row |= {"shape": request["shape"], **_measure(function, args, kwargs, name)}
            rows.setdefault(json.dumps(row, sort_keys=True), row)
    print(json.dumps({"rows": list(rows.values()), "backward": backward, "error": stopped}))


def _measure(function: Any, args: tuple, kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """Compile one launch for one architecture."""
    import triton
    from triton.compiler import ASTSource

    from fastbert_kernels.checker import machine_code
    from fastbert_kernels.checker.machine_code import DEVICES

    device = DEVICES[name]
    cuda = device.target.backend == "cuda"
    empty = {"error": "", "registers": 0, "spilled": 0, "shared": 0, "programs": 0, "widths": {}}
    empty["limit"] = device.shared
    try:
        given = {"debug": False, **kwargs}
        _, _, target, backend, binder = function.create_binder()
        bound, specialization, options = binder(*args, **given)
        options, signature, constants, attributes = function._pack_args(
            backend, given, bound, specialization, options
        )
        source = ASTSource(function, signature, constants, attributes)
        built = triton.compile(source, target=target, options=options.__dict__)
    except Exception as error:  # of any kind: the compiler's are not one family
        text = str(error).strip().splitlines()
        return empty | {"error": f"{type(error).__name__}: {text[-1] if text else ''}"}
    read = machine_code.cuda_registers if cuda else machine_code.amd_registers
    registers, spilled = read(built.asm)
    shared = built.metadata.shared
    tensor_columns = getattr(built.metadata, "tmem_size", 0) or 0
    return empty | {
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "programs": machine_code.programs(
            device, registers, shared, built.metadata.num_warps, tensor_columns
        ),
        "widths": machine_code.load_widths(built.asm, signature)
        if cuda
        else machine_code.amd_load_widths(built.asm),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
