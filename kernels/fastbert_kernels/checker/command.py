"""The command: `python -m fastbert_kernels.checker CHECK.py`.

CHECK.py is a Python file with the names `kernel`, `reference`, `inputs` and `shapes`; `--init`
prints one. The exit code is 0 without faults, 1 with faults, and 2 for bad input, which is one
line.
"""

import argparse
import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert_kernels.checker.cases import Check

NEEDED = ("kernel", "reference", "inputs", "shapes")


class InputError(ValueError):
    """Bad input: one line that says what is wrong and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.init:
        print((Path(__file__).parent / "template.py").read_text(encoding="utf-8"), end="")
        return 0
    path, file = list(sys.path), Path(options.check or "")
    try:
        if options.check is None:
            raise InputError("name a file to check, or print a template with --init")
        _interpret()
        if options.compile:
            from fastbert_kernels.checker.compiled import architectures

            architectures(options.compile)
        # What the file and its kernels print must not get into the JSON object.
        with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
            checked = load(file, options.shapes, options.dtypes)
            from fastbert_kernels.checker.cases import carry_out

            report = carry_out(checked)
            if options.compile:
                from fastbert_kernels.checker.compiled import add_compiled

                add_compiled(report, file, options.compile, checked)
    except (InputError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        line = _line(error, file)
        place = f" at {options.check}:{line}" if line else ""
        print(f"interrupted{place}", file=sys.stderr)
        return 130
    finally:
        sys.path[:] = path  # without the file's folder, which may hold a module of a library's name
    try:
        print(report.json() if options.json else report, flush=True)
    except OSError as error:  # a full disk, or a reader such as `head` that has ended
        sys.stdout = open(os.devnull, "w")
        print(f"error: the report cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 1 if report.faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastbert_kernels.checker",
        description="Check Triton kernels against plain torch, without a GPU.",
    )
    parser.add_argument("check", nargs="?", metavar="CHECK.py", help="what to check; see --init")
    parser.add_argument("--init", action="store_true", help="print a template of CHECK.py")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="rows=3,columns=100",
        help="in place of the file's; sizes are whole numbers",
    )
    parser.add_argument("--dtypes", metavar="bf16,fp16,fp32", help="in place of the file's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--compile",
        metavar="sm_80,sm_90,sm_100,gfx942",
        help="also compile for these, and report registers, spills, shared memory and loads",
    )
    return parser


def _interpret() -> None:
    """Make Triton interpret kernels; it decides that when it is imported."""
    for name in ("torch", "numpy", "triton"):
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"{name} is not installed; the checker needs it: "
                'pip install "fastbert-kernels[gpu]"'
            )
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            "Triton is imported already, and does not interpret; set TRITON_INTERPRET=1 before"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def load(path: Path, shapes: Sequence[str] | None = None, dtypes: str | None = None) -> "Check":
    """The check that a file describes.

    Args:
        path: of the file.
        shapes: as on the command line; None for those of the file.
        dtypes: as on the command line; None for those of the file.

    Raises:
        InputError: the file cannot be read, fails, or lacks a name; a shape that cannot be read.
    """
    from fastbert_kernels.checker.cases import Check

    module = _module(path)
    for name in NEEDED:
        if not hasattr(module, name):
            raise InputError(f"{path} has no {name}; --init prints a file with all that is needed")
    given: dict[str, Any] = {
        item.name: getattr(module, item.name)
        for item in fields(Check)
        if hasattr(module, item.name)
    }
    given.setdefault("name", path.stem)
    if shapes:
        given["shapes"] = [_shape(text) for text in shapes]
    if dtypes:
        given["dtypes"] = [word for word in dtypes.split(",") if word]
    return Check(**given)


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path} is not a file; --init prints one to start from")
    # A file may have the name of a module that is in use, such as random.py.
    name = f"{path.stem}_to_check" if path.stem in sys.modules else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module  # dataclasses and Triton look a module up by its name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        line = 0 if isinstance(error, SyntaxError) else _line(error, path)
        place = f" in line {line}" if line else ""  # a SyntaxError has it in its text
        raise InputError(f"{path} fails{place}: {type(error).__name__}: {error}") from error
    return module


def _line(error: BaseException, file: Path) -> int:
    """The line of the checked file that ran last; 0 if none did."""
    lines = [
        frame.lineno or 0
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == file.resolve()
    ]
    return lines[-1] if lines else 0


def _shape(text: str) -> dict[str, int]:
    shape: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier() or not value.strip().isdecimal():
            raise InputError(f"--shapes {text}: {part!r} is not a size such as rows=3")
        if name in shape:
            raise InputError(f"--shapes {text}: {name} has two sizes; give one")
        shape[name] = int(value)
    return shape
