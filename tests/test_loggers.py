"""What reaches W&B, MLflow and Trackio, read from the files that the real packages write."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fastbert.config import LogConfig, RunConfig, RuntimeConfig, by_key
from fastbert.errors import InputError
from fastbert.recipe import load_config
from fastbert.training import loggers as module
from fastbert.training.loggers import FILE, LOGGERS, Logger, Loggers, check_loggers
from fastbert.training.monitor import TENSORBOARD_EVERY
from tests.trials import Trial


def variables(folder: Path) -> dict[str, str]:
    """Let every package store what it gets below a folder, without a network."""
    return {
        "HOME": str(folder),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "MLFLOW_TRACKING_URI": f"file:{folder}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
        "TRACKIO_STORAGE_MODE": "sqlite",
    }


class Stored:
    """What a tracker has stored of its runs.

    Attributes:
        ids: of the runs, in the order in which they were begun or continued.
        values: numbers by name and step.
        notes: lines of text by key.
        config: the recipe's settings, as text.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.values: dict[tuple[str, int], float] = {}
        self.notes: dict[str, str] = {}
        self.config: dict[str, str] = {}


def leveldb_records(data: bytes, at: int) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format; the first of its bytes is byte `at`."""
    record, place, block = b"", 0, 32768
    while place < len(data):
        if block - (at + place) % block < 7:  # no header fits, so the block ends
            place += block - (at + place) % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole of a record, or its last part
            yield record
            record = b""


def wandb_stored(folder: Path) -> Stored:
    from wandb.proto.wandb_internal_pb2 import Record

    stored = Stored()
    for file in sorted(
        folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime
    ):
        stored.ids.append(file.stem.removeprefix("run-"))
        for text in leveldb_records(file.read_bytes()[7:], 7):
            record = Record()
            record.ParseFromString(text)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json)
                    for i in record.history.item
                }
                step = int(items["_step"])
                stored.values |= {
                    (key, step): value for key, value in items.items() if key[0] != "_"
                }
            elif kind == "summary":
                for item in record.summary.update:
                    key = item.key or "/".join(item.nested_key)
                    if isinstance(value := json.loads(item.value_json), str):
                        stored.notes[key] = value
            elif kind in ("run", "config"):
                updates = (record.run.config if kind == "run" else record.config).update
                for item in updates:
                    key = item.key or ".".join(item.nested_key)
                    stored.config[key] = str(json.loads(item.value_json))
    return stored


def mlflow_stored(folder: Path) -> Stored:
    stored = Stored()
    for run in sorted(folder.glob("mlruns/*/*/meta.yaml")):
        if run.parent.parent.name == "models":
            continue
        run = run.parent
        stored.ids.append(run.name)
        for file in (run / "metrics").rglob("*"):
            if file.is_file():
                for line in file.read_text().splitlines():
                    _, value, step = line.split()[:3]
                    stored.values[file.relative_to(run / "metrics").as_posix(), int(step)] = float(
                        value
                    )
        tags = run / "tags"
        stored.notes |= {
            file.relative_to(tags).as_posix(): file.read_text()
            for file in tags.rglob("*")
            if file.is_file()
        }
        stored.config |= {file.name: file.read_text() for file in (run / "params").iterdir()}
    return stored


def trackio_stored(folder: Path) -> Stored:
    stored = Stored()
    (file,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as db:
        for name, step, text in db.execute("SELECT run_name, step, metrics FROM metrics"):
            stored.ids = list(dict.fromkeys([*stored.ids, name]))
            stored.values |= {(k, step): v for k, v in json.loads(text).items()}
        stored.notes = dict(db.execute("SELECT title, text FROM alerts ORDER BY id"))
        for (text,) in db.execute("SELECT config FROM configs"):
            stored.config |= {k: str(v) for k, v in json.loads(text).items()}
    return stored


READERS = {"wandb": wandb_stored, "mlflow": mlflow_stored, "trackio": trackio_stored}


def need(key: str) -> None:
    if importlib.util.find_spec(key) is None:
        pytest.skip(f"{key} is not installed: pip install 'fastbert-pretrain[{key}]'")


@pytest.mark.parametrize("key", LOGGERS)
@pytest.mark.slow
def test_a_tracker_gets_what_metrics_jsonl_gets_also_after_a_resume(key, tmp_path, small_dataset):
    need(key)
    place = variables(tmp_path / "tracker")
    overrides = (f"log.{key}=my-project", "evaluate.every=10", "checkpoint.every=20")
    trial = Trial(tmp_path / "trial", small_dataset.path, *overrides, steps=30)
    trial.resume(1, "stop.steps=20", "schedule.warmup=0", "schedule.decay='constant'", **place)
    trial.resume(1, "schedule.warmup=0", "schedule.decay='constant'", **place)
    stored = READERS[key](tmp_path / "tracker")
    ids = json.loads((trial.run / FILE).read_text())
    assert set(stored.ids) == {ids[key]}, "a resumed run continues the same run of the tracker"
    expected: dict[tuple[str, int], float] = {}
    for record in trial.records(None, "evaluate"):
        group = "heldout" if "event" in record else "train"
        if group == "heldout" or record["step"] % TENSORBOARD_EVERY == 0:
            for name, value in record.items():
                if isinstance(value, float):
                    expected[f"{group}/{name}", record["step"]] = value
    assert len({step for _, step in expected}) == 3
    found = {place: stored.values.get(place) for place in expected}
    assert found == expected
    assert stored.notes["stop_reason"] == "stop.steps = 30"
    assert stored.config["optimizer.lr"] == "0.003" and stored.config["model.hidden_size"] == "32"
    assert set(by_key(load_config(trial.recipe, overrides))) <= set(stored.config) or key == "wandb"


@pytest.mark.parametrize("key", LOGGERS)
def test_a_tracker_that_cannot_store_anything_ends_no_run(key, tmp_path, small_dataset):
    need(key)
    blocked = tmp_path / "tracker"
    blocked.write_text("a file, where a folder is needed")
    place = {**variables(blocked), "HOME": str(tmp_path)}
    trial = Trial(tmp_path / "trial", small_dataset.path, f"log.{key}=p", steps=3)
    out = trial.resume(1, **place)
    if key == "mlflow":  # the others keep what they get in memory or in a temporary folder
        (line,) = [line for line in out if f"nothing more goes to {key}: " in line]
        assert line.endswith("; the run continues")
    assert len(trial.steps) == 3


def test_a_package_that_is_missing_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    config = RunConfig(data="d", log=LogConfig(mlflow="e"))
    with pytest.raises(
        InputError, match=r"r.toml: log.mlflow = 'e': .*fastbert-pretrain\[mlflow\]"
    ):
        check_loggers(config, "r.toml")
    check_loggers(RunConfig(data="d"), "r.toml")


class Recorder(Logger):
    """A tracker in memory, which can fail and hang."""

    calls: ClassVar[list[Any]] = []
    fail = False
    released = threading.Event()

    def __init__(self, project, name, config, earlier):
        self.id = earlier or f"id-{len(self.calls)}"
        self.calls.append((project, name, earlier))

    def log(self, step, values):
        if self.fail:
            raise SystemExit("no\nnetwork")
        self.released.wait()
        self.calls.append((step, dict(values)))

    def note(self, step, key, text):
        self.calls.append((step, key, text))

    def finish(self, done):
        self.calls.append(done)


@pytest.fixture
def recorder(monkeypatch):
    class Fresh(Recorder):
        calls, released = [], threading.Event()

    Fresh.released.set()
    monkeypatch.setitem(LOGGERS, "wandb", Fresh)
    return Fresh


def config(timeout_s: float = 600.0) -> RunConfig:
    return RunConfig(data="d", log=LogConfig(wandb="p"), runtime=RuntimeConfig(timeout_s=timeout_s))


def test_the_id_is_kept_in_the_run_folder_until_a_run_begins_anew(recorder, tmp_path):
    for fresh in (True, False, True):
        Loggers(tmp_path, config(), fresh).close(True)
    opened = [call for call in recorder.calls if isinstance(call, tuple)]
    name = tmp_path.name
    assert opened == [("p", name, None), ("p", name, "id-0"), ("p", name, None)]
    (tmp_path / FILE).write_text("[damaged")
    Loggers(tmp_path, config(), False).close(True)
    assert recorder.calls[-2] == ("p", name, None)


def test_only_finite_numbers_are_sent(recorder, tmp_path):
    loggers = Loggers(tmp_path, config(), True)
    loggers.log(3, {"a": 1.5, "b": None, "c": float("nan"), "d": float("inf")})
    loggers.note(3, "note/x", "words")
    loggers.close(False)
    assert recorder.calls[1:] == [(3, {"a": 1.5}), (3, "note/x", "words"), False]
    assert list(loggers.problems()) == []


def test_a_failure_is_said_once(recorder, tmp_path):
    recorder.fail = True
    loggers = Loggers(tmp_path, config(), True)
    for step in range(3):
        loggers.log(step, {"a": 1.0})
    loggers.close(True)
    said = list(loggers.problems())
    assert said == ["nothing more goes to wandb: no network; the run continues"]
    loggers.log(4, {"a": 1.0})
    assert list(loggers.problems()) == []


def test_a_tracker_that_hangs_holds_nothing(recorder, tmp_path, monkeypatch):
    recorder.released.clear()
    loggers = Loggers(tmp_path, config(timeout_s=1.0), True)
    loggers.log(1, {"a": 1.0})
    loggers.close(True)
    (line,) = loggers.problems()
    assert "took longer than 0.5 s" in line
    monkeypatch.setattr(module, "MOST_WAITING", 5)
    loggers = Loggers(tmp_path, config(), True)
    for step in range(9):
        loggers.log(step, {"a": 1.0})
    (line,) = loggers.problems()
    assert "5 values wait for it" in line
    recorder.released.set()


def test_without_a_tracker_nothing_is_written(tmp_path):
    loggers = Loggers(tmp_path, RunConfig(data="d"), True)
    loggers.log(1, {"a": 1.0})
    loggers.close(True)
    assert list(tmp_path.iterdir()) == []
