"""W&B, MLflow and Trackio: what a run measures and says, sent to the trackers of its recipe.

A tracker may be slow, or fail at any time, and no run ends for it. So each has a thread of its own,
which alone calls its library. The run only leaves values for it. A tracker that fails is dropped,
with one line for the user. Where it sends or stores what it gets, its own environment variables
decide (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, ...).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import queue
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastbert.config import RunConfig, by_key
from fastbert.durable import write_whole
from fastbert.errors import InputError
from fastbert.presence import unreadable
from fastbert.regular_file import read_bytes

FILE = "loggers.json"  # in the run folder: the id of the run by tracker
MOST_WAITING = 10_000  # values that a tracker has not taken yet; at more of them it is dropped
CLOSE_S = 30.0  # how long the end of a run waits for a tracker
STOP_REASON = "stop_reason"  # the key of the words that say why a run ended

Values = Mapping[str, float]


class Logger(ABC):
    """One tracker, open for one run. All methods are called in one thread, and may raise anything.

    Args:
        project: the project or experiment, from the recipe.
        name: of the run, for people.
        config: the settings of the recipe by dotted key.
        earlier: the id that an earlier start of the run had; None for a new run.

    Attributes:
        id: identifies the run in the tracker, so that a resumed run continues it.
    """

    id: str

    @abstractmethod
    def __init__(self, project: str, name: str, config: Mapping[str, Any], earlier: str | None): ...

    @abstractmethod
    def log(self, step: int, values: Values) -> None:
        """Send numbers of a step by name."""

    @abstractmethod
    def note(self, step: int, key: str, text: str) -> None:
        """Send a line of text; a later one of the same key replaces it."""

    @abstractmethod
    def finish(self, done: bool) -> None:
        """Send all that is left; `done` where a stop condition was reached."""


class WandbLogger(Logger):
    """Weights & Biases: notes are in the run's summary."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], earlier: str | None):
        import wandb  # pyright: ignore[reportMissingImports]

        settings = wandb.Settings(console="off", silent=True)
        mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
        # `init` would ask for the key on the terminal.
        if mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("not logged in; run `wandb login`, or set WANDB_MODE=offline")
        self.id = earlier or secrets.token_hex(4)
        self._run = wandb.init(
            project=project,
            name=name,
            id=self.id,
            resume="allow",
            config=dict(config),
            settings=settings,
        )
        if earlier:
            self._run.config.update(dict(config), allow_val_change=True)

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def note(self, step: int, key: str, text: str) -> None:
        self._run.summary[key] = text

    def finish(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class MlflowLogger(Logger):
    """MLflow: the recipe's settings are parameters, and notes are tags."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], earlier: str | None):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        self._client = client = MlflowClient()
        settings = {key: str(value) for key, value in config.items()}
        if earlier:
            self.id = earlier
            client.update_run(self.id, status="RUNNING")
            before = client.get_run(self.id).data.params
            for key, value in settings.items():
                if key not in before:
                    client.log_param(self.id, key, value)
                elif before[key] != value:  # a parameter cannot be changed
                    client.set_tag(self.id, f"resumed.{key}", value)
            return
        experiment = client.get_experiment_by_name(project)
        place = experiment.experiment_id if experiment else client.create_experiment(project)
        self.id = client.create_run(place, run_name=name).info.run_id
        client.log_batch(self.id, params=[Param(key, value) for key, value in settings.items()])

    def log(self, step: int, values: Values) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]
        from mlflow.utils.time import get_current_time_millis  # pyright: ignore[reportMissingImports]

        now = get_current_time_millis()
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def note(self, step: int, key: str, text: str) -> None:
        self._client.set_tag(self.id, key, text)

    def finish(self, done: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if done else "KILLED")


class TrackioLogger(Logger):
    """Trackio: notes are alerts."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], earlier: str | None):
        import trackio  # pyright: ignore[reportMissingImports]

        # It finds an earlier run by its name, which need not be unique elsewhere.
        self.id = earlier or f"{name}-{secrets.token_hex(4)}"
        self._run = trackio.init(
            project=project, name=self.id, config=dict(config), resume="allow", embed=False
        )

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def note(self, step: int, key: str, text: str) -> None:
        from trackio import AlertLevel  # pyright: ignore[reportMissingImports]

        level = AlertLevel.INFO if key == STOP_REASON else AlertLevel.WARN
        self._run.alert(title=key, text=text, level=level, step=step)

    def finish(self, done: bool) -> None:
        self._run.finish()


# By the key of [log] in a recipe, which is also the name of the package and of the extra.
LOGGERS: dict[str, type[Logger]] = {
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "trackio": TrackioLogger,
}


def check_loggers(config: RunConfig, recipe: str) -> None:
    """Raise InputError where the recipe names a tracker whose package is not installed."""
    for key, project in _chosen(config).items():
        if importlib.util.find_spec(key) is None:
            raise InputError(
                f"{recipe}: log.{key} = {project!r}: {key} is not installed; "
                f"pip install 'fastbert-pretrain[{key}]', or remove the key"
            )


class Loggers:
    """The trackers of a run; without any in the recipe it does nothing.

    Args:
        run: the run folder.
        config: the recipe.
        fresh: the run begins; otherwise it continues the runs whose ids are in the folder.
    """

    def __init__(self, run: Path, config: RunConfig, fresh: bool):
        self._senders: list[_Sender] = []
        self._close_s = min(CLOSE_S, config.runtime.timeout_s / 2)
        file, name, chosen = run / FILE, run.absolute().name, _chosen(config)
        if fresh:
            file.unlink(missing_ok=True)
        if not chosen:
            return
        ids, lock, settings = _read_ids(file), threading.Lock(), by_key(config)

        def keep(key: str, run_id: str) -> None:
            with lock:
                ids[key] = run_id
                write_whole(file, (json.dumps(ids, indent=1) + "\n").encode())

        for key, project in chosen.items():
            arguments = project, name, settings, ids.get(key)
            self._senders.append(_Sender(key, arguments, keep))

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Send the values that are finite numbers."""
        numbers = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
        self._put(lambda logger: logger.log(step, numbers))

    def note(self, step: int, key: str, text: str) -> None:
        """Send a line of text."""
        self._put(lambda logger: logger.note(step, key, text))

    def close(self, done: bool) -> None:
        """Send all that is left, and wait for it for a bounded time.

        Args:
            done: a stop condition was reached.
        """
        self._put(lambda logger: logger.finish(done))
        for sender in self._senders:
            sender.waiting.put(None)
        for sender in self._senders:
            sender.join(self._close_s)
            if sender.is_alive():
                sender.drop(f"took longer than {self._close_s:g} s to send the last values")

    def problems(self) -> Iterator[str]:
        """Yield a line on each tracker that has been dropped since the last call."""
        for sender in list(self._senders):
            if sender.problem is not None:
                self._senders.remove(sender)
                yield f"nothing more goes to {sender.key}: {sender.problem}; the run continues"

    def _put(self, call: Callable[[Logger], None]) -> None:
        for sender in self._senders:
            if sender.waiting.qsize() < MOST_WAITING:
                sender.waiting.put(call)
            else:
                sender.drop(f"{MOST_WAITING:,} values wait for it")


class _Sender(threading.Thread):
    """The thread of one tracker. It is a daemon thread, so that a tracker that hangs holds nothing.

    Args:
        key: of LOGGERS.
        arguments: of its class.
        keep: receives the key and the id of the run.

    Attributes:
        waiting: calls to make; None ends the thread.
        problem: why the tracker was dropped; None where it was not.
    """

    def __init__(self, key: str, arguments: tuple[Any, ...], keep: Callable[[str, str], None]):
        super().__init__(name=f"log.{key}", daemon=True)
        self.key, self._arguments, self._keep = key, arguments, keep
        self.waiting = queue.SimpleQueue[Callable[[Logger], None] | None]()
        self.problem: str | None = None
        self.start()

    def run(self) -> None:
        try:
            logger = LOGGERS[self.key](*self._arguments)
            self._keep(self.key, logger.id)
            while self.problem is None and (call := self.waiting.get()) is not None:
                call(logger)
        except BaseException as error:  # a library may even call sys.exit
            self.drop(" ".join(str(error).split())[:300] or type(error).__name__)

    def drop(self, problem: str) -> None:
        self.problem = self.problem or problem


def _chosen(config: RunConfig) -> dict[str, str]:
    """The project by tracker."""
    return {key: name for key in LOGGERS if (name := getattr(config.log, key)) is not None}


def _read_ids(file: Path) -> dict[str, str]:
    """Read the ids of earlier starts; a file that is damaged or missing has none.

    Raises:
        InputError: it cannot be read.
    """
    with contextlib.suppress(ValueError, RecursionError):
        try:
            found = json.loads(read_bytes(file))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise unreadable(file, error) from None
        if isinstance(found, dict):
            return {k: v for k, v in found.items() if isinstance(v, str)}
    return {}
