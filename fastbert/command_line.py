"""What surrounds every command: streams, arguments, and exit codes in place of tracebacks."""

from __future__ import annotations

import errno
import faulthandler
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from fastbert.errors import Diverged, InputError
from fastbert.heap import keep_heap
from fastbert.out_of_memory import shortage
from fastbert.terminal import tell

DONE, FAILED, BAD_INPUT = 0, 1, 2
TAKES_ANY_TEXT = ("fill-mask", "nsp")  # the arguments of these commands may be empty

# Errors of the system that come from the user's disk or permissions, not from a bug.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SYSTEM_ERRORS = FULL | {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
}


def set_up() -> None:
    """Set up the process of a command."""
    keep_heap()
    _open_streams()
    # A mapped file that is truncated while it is read kills the process; this shows where.
    faulthandler.enable(all_threads=False)
    # Otherwise a broken connection prints a page of C++ frames before our own line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _open_streams() -> None:
    """Make sure that stdin, stdout and stderr are there, and take any letter.

    Where a shell has closed one (`2>&-`), the next file that the process opens would get its
    number, and every line for the terminal would be written into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _why_not_text(argument: str) -> str:
    try:
        os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError:
        return "is not UTF-8; give text and names in UTF-8"
    encoding = sys.getfilesystemencoding()
    return f"is UTF-8, but Python reads it as {encoding} here; set PYTHONUTF8=1 or a UTF-8 locale"


def _check_not_empty(arguments: Sequence[str]) -> None:
    """Raise InputError for an empty argument, which as a path would mean the current folder."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if not argument or re.fullmatch("--[a-z-]+=", argument):
            place = before if argument == "" else argument
            raise InputError(
                f"the argument after {place!r} is empty, as where a shell variable is not set"
            )


_SETTING = re.compile(r"No such option: --([a-z_]+\.[a-z_.]+)")
_OPTION_AT_HOME = re.compile("^(--[a-z-]+=)(~.*)")


def _expand(option: re.Match[str]) -> str:
    return option[1] + os.path.expanduser(option[2])


def run(app: Any, arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        app: the typer application.
        arguments: the words after `fastbert`.

    Returns:
        The exit code.
    """
    warnings.showwarning = _show_warning
    try:
        # Where it is gone, oneMKL ends the process when torch loads it, with a line of its own.
        os.getcwd()
    except FileNotFoundError:
        return say("the current folder was deleted; change to another one", BAD_INPUT)
    try:
        for argument in arguments:
            # Python decodes bytes that are not UTF-8 to these surrogates.
            if any("\udc80" <= c <= "\udcff" for c in argument):
                raise InputError(f"argument {argument!r} {_why_not_text(argument)}")
        if arguments and arguments[0] not in TAKES_ANY_TEXT:
            _check_not_empty(arguments)
        # A shell expands "~" at the beginning of a word, and not in --out=~/x.
        arguments = [_OPTION_AT_HOME.sub(_expand, argument) for argument in arguments]
        # Without standalone mode typer returns the command's result, or the code of typer.Exit.
        result = app(
            args=list(arguments) or ["--help"], prog_name="fastbert", standalone_mode=False
        )
        return result if isinstance(result, int) else DONE
    except InputError as error:
        return say(error, BAD_INPUT)
    except Diverged as error:
        return say(error, FAILED)
    except OSError as error:
        if error.errno not in SYSTEM_ERRORS:
            raise
        # Files that are written are named; see `durable.named`.
        place = error.filename or "standard output"
        advice = "free disk space or " if error.errno in FULL else ""
        return say(f"{place}: {error.strerror}; {advice}choose another path", BAD_INPUT)
    except KeyboardInterrupt:
        return say("interrupted", 130)
    except Exception as error:
        if lacking := shortage(error):
            return say(f"{lacking}; use smaller batches, shorter texts or a smaller model", FAILED)
        # Typer's usage errors have a private class, which older releases take from click.
        message, context = getattr(error, "format_message", None), getattr(error, "ctx", None)
        if message is None:
            raise
        said = " ".join(message().split()).rstrip(".")
        if found := _SETTING.search(said):
            said += f"; a setting has no dashes before it: {found[1]}=VALUE"
        return say(
            f"{said}; see {context.command_path if context else 'fastbert'} --help",
            BAD_INPUT,
        )


def say(message: object, code: int) -> int:
    """Print the message as one line on stderr, once per machine; returns the exit code."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tell(message)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Show our own warnings as one line, and those of libraries as Python does."""
    if category.__module__.startswith("fastbert"):
        tell(message)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
