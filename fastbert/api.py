"""The Python interface: `fastbert.prepare`, `fastbert.pretrain` and `fastbert.load`.

The command line and these functions do the same work. The functions raise InputError where the
command line prints a line and exits. They show progress on a terminal and in a notebook, need no
`if __name__ == "__main__":` guard, and can be called any number of times in a process, one after
another. Under a launcher such as torchrun a process can make one run.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import threading
import types
import typing
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastbert.errors import InputError
from fastbert.heap import keep_heap

if TYPE_CHECKING:
    from fastbert.data.report import Report
    from fastbert.storage import Place
    from fastbert.tasks.pretrained import Pretrained

# A run uses what a process has once: its signal handlers, its log, torch's process group and
# random numbers.
_ONE_RUN = threading.Lock()
_LAUNCHED = threading.Event()  # this process has made a run under a launcher
# The ids of this process, if it has begun a run, and of such processes that it was forked from.
_TRAINED: set[int] = set()


@dataclass(frozen=True)
class RunResult:
    """How a call of `pretrain` ended.

    Attributes:
        run: the folder of the run; its URL where it is in a bucket.
        reason: why it stopped, in words, for example "stop.steps = 100".
        exit_code: that of `fastbert pretrain`: 0 when a stop condition was reached, 1 when the run
            failed, 75 when it was interrupted; `pretrain(..., resume=True)` then resumes it.
        metrics: the newest records of the run's metrics.jsonl: "train" is the last step and
            "heldout" the last evaluation. A key is missing if the run has no such record.
    """

    run: Path | str
    reason: str
    exit_code: int
    metrics: dict[str, dict[str, Any]] = field(repr=False)

    def load(self, device: str | None = None) -> Pretrained:
        """The trained model, from the newest valid checkpoint of the run; see `fastbert.load`."""
        return load(self.run, device)


def load(path: str | Path, device: str | None = None) -> Pretrained:
    """Open a model.

    Args:
        path: a run folder (its newest valid checkpoint is loaded), a checkpoint folder of a run, or
            a Hugging Face folder (config.json, model.safetensors, tokenizer.json or
            vocab.txt).
        device: "cpu" or "cuda"; by default a GPU where there is one.

    Raises:
        InputError: something in the folder is missing or wrong, or too few threads can be started;
            one line says what to do.
    """
    with _in_python():
        _check_type("path", path, str | os.PathLike)
        _check_type("device", device, str | None)
        from fastbert.storage import expanded
        from fastbert.tasks.load import load
        from fastbert.torch_defaults import torch_defaults

        with torch_defaults():
            return load(expanded(path), device)


def prepare(sources: str | Path | Iterable[str | Path], out: str | Path, **options: Any) -> Report:
    """Turn text into a dataset: a tokenizer, token ids, a held-out part and a report on the data.

    Args:
        sources: a text file or a folder, or several of them: txt, jsonl, csv, tsv or parquet.
        out: the folder to make, or its URL; it must not exist yet, unless `add=True` adds a part
            to it.
        options: attributes of `fastbert.data.prepare.Options`: `vocab_size`, `algorithm`,
            `lowercase`, `keep_accents`, `tokenizer`, `heldout`, `text_format`, `text_field`,
            `bad_records`, `drop_copies`, `without`, `add`, `workers`, `engine`, `ray_address` and
            `progress`.

    Returns:
        The report: `figures` is a dict of numbers, `rows` has their meaning and advice in words.

    Raises:
        InputError: something is wrong with the sources, an option or the disk. What is finished
            stays in the folder `out`.work, and the same call continues there.
        TypeError: there is no such option.
    """
    from fastbert.data.prepare import Options, prepare
    from fastbert.data.remote_dataset import uploading
    from fastbert.recipe import plain
    from fastbert.storage import Url, expanded, place

    with _in_python():
        if isinstance(sources, bytes) or not isinstance(sources, (str, os.PathLike, Iterable)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"sources = {sources!r:.60}; must be a path, or a list of paths")
        paths = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
        for i, path in enumerate(paths):
            _check_type(f"sources[{i}]", path, str | os.PathLike)
        if not paths:
            raise InputError("sources is empty; give a text file or a folder")
        _check_type("out", out, str | os.PathLike)
        options = {n: v if isinstance(v, os.PathLike) else plain(v) for n, v in options.items()}
        if isinstance(without := options.get("without"), str | os.PathLike):
            options["without"] = [without]
        _check_options(Options, options)
        for i, path in enumerate(options.get("without", ())):
            _check_type(f"without[{i}]", path, str | os.PathLike)
        options["without"] = tuple(map(expanded, options.get("without", ())))
        if options.get("tokenizer") is not None:
            options["tokenizer"] = expanded(options["tokenizer"])
        keep_heap()
        paths = [expanded(path) for path in paths]
        at = place(expanded(out))
        if isinstance(at, Url):
            with uploading(at, paths, options, add=bool(options.get("add"))) as made:
                return prepare(paths, made, **options)
        return prepare(paths, at, **options)


def pretrain(
    recipe: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    branch_from: str | None = None,
    **tables: Any,
) -> RunResult:
    """Train a model from a dataset, as a recipe says.

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP stop the run after its current step and save a checkpoint.
    A second Ctrl-C raises KeyboardInterrupt at once.

    Args:
        recipe: the path of a TOML file, the name of a packaged recipe ("mini"; `fastbert recipes`
            lists them), or a dict of a recipe's tables, such as
            `{"data": "data/my", "model": {"preset": "mini"}}`.
        overrides: values that win over the recipe's, by dotted key: `{"stop.steps": 100}`.
        resume: resume the run that is in the folder from its newest valid checkpoint.
        tables: overrides as keyword arguments: `run="runs/my", stop={"steps": 100}`. A table is
            merged into the recipe's. None removes a key, so that its default applies.

    Returns:
        The folder, the reason why the run stopped, and its last metrics. A run that failed, for
        example because its weights diverged, returns a result whose exit_code is 1.

    Raises:
        InputError: the recipe, an override, the dataset or the run's folder is wrong; or this
            process makes another run, has a process group of its own, or has made a run under a
            launcher.
    """
    # Callers that no type checker sees may pass anything.
    if not isinstance(recipe, str | os.PathLike | Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"recipe = {recipe!r:.60}; must be a path, the name of a recipe, or a dict of tables"
        )
    if not isinstance(overrides, Mapping | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"overrides = {overrides!r}; must be a dict, such as {{'stop.steps': 100}}"
        )
    _check_type("resume", resume, bool)
    _check_type("branch_from", branch_from, str | None)
    if not _ONE_RUN.acquire(blocking=False):
        raise InputError("another run is going on in this process; start a process for each run")
    hook = sys.excepthook
    try:
        with _in_python():
            return _pretrain(recipe, overrides or {}, resume, branch_from, tables)
    finally:
        sys.excepthook = hook  # which torch.distributed replaces
        _ONE_RUN.release()


def _pretrain(
    recipe: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any],
    resume: bool,
    branch_from: str | None,
    tables: Mapping[str, Any],
) -> RunResult:
    # Before torch is imported: a broken connection would print a page of C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    keep_heap()
    from fastbert.cluster.signals import StopRequest
    from fastbert.recipe import OVERRIDES, check_nesting, load_config

    check_nesting([overrides, tables], OVERRIDES)
    if twice := sorted(_keys(overrides) & _keys(tables)):
        raise InputError(f"overrides: {twice[0]} is given twice; remove one")
    with StopRequest() as stop_request:  # from here on a signal means: stop after this step
        config = load_config(recipe, {**overrides, **tables}, branch_from)
        import torch

        from fastbert.storage import is_url, place
        from fastbert.torch_defaults import torch_defaults
        from fastbert.training.loop import pretrain
        from fastbert.training.metrics import read_metrics

        _check_process(torch.distributed)
        _TRAINED.add(os.getpid())
        name = "recipe" if isinstance(recipe, Mapping) else str(recipe)
        random: Any = torch.random  # which has no complete types
        # The caller's random number generators are not advanced.
        with random.fork_rng(), torch_defaults():
            ending = pretrain(config, name, resume, stop_request)
    with _records(place(config.run)) as folder:
        metrics: dict[str, dict[str, Any]] = {}
        for record in read_metrics(folder / "metrics.jsonl"):
            if (kind := record.get("event")) in (None, "evaluate"):
                metrics["heldout" if kind else "train"] = record
    run = str(config.run) if is_url(config.run) else Path(config.run).absolute()
    return RunResult(run, _as_python(ending.reason), ending.exit_code, metrics)


@contextmanager
def _records(run: Place) -> Generator[Path, None, None]:
    """Yield a folder with the records of a run."""
    if isinstance(run, Path):
        yield run
        return
    import tempfile

    from fastbert import storage

    with tempfile.TemporaryDirectory() as folder:
        with suppress(OSError):  # the store does not answer: a result without metrics
            data = storage.read(run / "metrics.jsonl")
            (Path(folder) / "metrics.jsonl").write_bytes(data)
        yield Path(folder)


@contextmanager
def _in_python() -> Generator[None, None, None]:
    """Name Python arguments in error messages, where the command line names options."""
    try:
        yield
    except InputError as error:
        raise InputError(_as_python(str(error))) from error.__cause__


# Options that are switches; and what is called otherwise here.
_SWITCHES = {
    "resume": "resume=True",
    "cased": "lowercase=False",
    "keep-accents": "keep_accents=True",
    "drop-copies": "drop_copies=True",
    "add": "add=True",
}
_RENAMED = {"format": "text_format"}
_COMMAND = re.compile(r"fastbert pretrain (\S+) --resume")
# An option, and the value behind it if it has one: a word of the sentence is none.
_OPTION = re.compile(
    r"(?<![\w-])--([a-z][a-z-]*)(?: (?!(?:among|and|is|or|says|to)\b)(?=[^\s;,]))?"
)


def _as_python(message: str) -> str:
    def argument(found: re.Match[str]) -> str:
        name = found[1]
        if name in _SWITCHES:
            return _SWITCHES[name] + found[0][2 + len(name) :]
        shown = _RENAMED.get(name, name.replace("-", "_"))
        return f"{shown} = " if found[0].endswith(" ") else shown

    message = _COMMAND.sub(r'fastbert.pretrain("\1", resume=True)', message)
    return _OPTION.sub(argument, message)


def _check_type(name: str, value: object, wanted: Any) -> None:
    """Raise InputError where a value has another type; true and false are no numbers."""
    kinds = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
    if float in kinds:
        kinds = (*kinds, int)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = {str: "a string", os.PathLike: "a path", Path: "a path", types.NoneType: "None"}
        names |= {int: "a whole number", float: "a number", bool: "True or False"}
        names |= {Sequence: "a list"}
        shown = [kind for kind in kinds if not (kind is int and float in kinds)]
        wanted_names = dict.fromkeys(names.get(kind, kind.__name__) for kind in shown)
        raise InputError(f"{name} = {value!r:.60}; must be {' or '.join(wanted_names)}")


def _check_options(wanted: type, options: Mapping[str, Any]) -> None:
    """Check keyword arguments by the types that a dataclass gives them."""
    hints = typing.get_type_hints(wanted)
    known = list(hints)
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise TypeError(f"prepare has no option {name!r}; {hint}")
        _check_type(name, value, hints[name])


def _keys(values: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The dotted keys that overrides set."""
    keys = set[str]()
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            keys |= _keys(cast("Mapping[str, Any]", value), f"{key}.")
        else:
            keys.add(key)
    return keys


def _check_process(distributed: Any) -> None:
    """Raise InputError where this process cannot take part in a run."""
    from fastbert.cluster.launch_env import launched

    if distributed.is_initialized():
        raise InputError(
            "torch.distributed is initialized in this process; fastbert makes its own process "
            "group: call destroy_process_group() before"
        )
    if _TRAINED and os.getpid() not in _TRAINED:
        raise InputError(
            "this process was forked from one that has trained, and lacks its threads, so that a "
            'run would never end; start it by multiprocessing.get_context("spawn")'
        )
    if _LAUNCHED.is_set():
        raise InputError("this process has made a run under a launcher; start it for each run")
    if launched():
        _LAUNCHED.set()
