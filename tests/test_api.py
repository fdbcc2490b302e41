"""The Python interface, from a text to a filled mask; it raises where the command exits."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_bert import make_hugging_face_folder

import fastbert
from fastbert import api
from fastbert.recipe import load_config
from fastbert.training.metrics import read_metrics
from tests.ranks import environment

# A script of a beginner: no `if __name__ == "__main__":`, and two worker processes.
SCRIPT = """
import fastbert, json
fastbert.prepare("english.jsonl", "data", vocab_size=500, workers=2)
model = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
result = fastbert.pretrain("demo.toml", data="data", run="run", model=model,
                           stop={"seconds": None, "steps": 3}, schedule={"over": "steps"})
masks = result.load().fill_mask("The [MASK] statement and the [MASK] type.", k=4)
print(json.dumps([result.exit_code, result.reason, [len(best) for best in masks]]))
"""


@pytest.fixture
def recipe(tmp_path, small_dataset) -> dict:
    """Return the tables of a recipe for a model that trains in a second."""
    return {
        "data": small_dataset.path,  # a Path
        "run": str(tmp_path / "run"),
        "model": {
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
        },
        "batch": {"sequences": 8, "max_length": 64},
        "stop": {"steps": 3},
        "evaluate": {"every": 2, "sequences": 16},
    }


def run_script(folder: Path, script: str, english_jsonl: Path) -> str:
    """Run a script beside english.jsonl, and return the last line that it prints."""
    os.link(english_jsonl, folder / "english.jsonl")
    (folder / "first.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "first.py"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_script_prepares_with_two_workers(tmp_path, english_jsonl):
    """The first lines of the script below."""
    first_lines = SCRIPT.partition("model = ")[0]
    run_script(tmp_path, first_lines + 'print("done")\n', english_jsonl)
    assert (tmp_path / "data/manifest.json").is_file()


@pytest.mark.slow
def test_from_a_text_to_a_filled_mask(tmp_path, english_jsonl):
    code, reason, found = json.loads(run_script(tmp_path, SCRIPT, english_jsonl))
    assert (code, reason, found) == (0, "stop.steps = 3", [4, 4])


def test_a_dict_of_tables_is_a_recipe_and_can_be_trained_twice(recipe, tmp_path):
    given = json.dumps(recipe, default=str)
    first = fastbert.pretrain(recipe)
    again = fastbert.pretrain(recipe, {"run": tmp_path / "again"}, stop={"steps": 3})
    assert json.dumps(recipe, default=str) == given  # it is unchanged
    assert (first.run, again.run) == (tmp_path / "run", tmp_path / "again")
    for result in (first, again):
        assert (result.exit_code, result.reason) == (0, "stop.steps = 3")
        records = list(read_metrics(result.run / "metrics.jsonl"))
        steps = [record for record in records if "event" not in record]
        evaluations = [record for record in records if record.get("event") == "evaluate"]
        assert result.metrics == {"train": steps[-1], "heldout": evaluations[-1]}
        assert [record["step"] for record in steps] == [1, 2, 3]
        assert [record["step"] for record in evaluations] == [2, 3]
    assert first.metrics["train"]["loss"] == again.metrics["train"]["loss"]
    assert first.load("cpu").config.hidden_size == 32
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.exit_code = 1


def test_what_the_caller_has_set_in_torch_changes_nothing(recipe, tmp_path):
    plain = fastbert.pretrain(recipe)
    vector = plain.load("cpu").encode("a text")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")  # on which nothing can be computed
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            other = fastbert.pretrain(recipe, {"run": tmp_path / "other"})
            model = other.load("cpu")
        assert (torch.get_default_dtype(), torch.zeros(1).device.type) == (torch.float64, "meta")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert other.metrics["train"]["loss"] == plain.metrics["train"]["loss"]
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    assert not any(p.is_inference() for p in model.model.parameters())
    assert np.array_equal(model.encode("a text"), vector)


def test_paths_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("One text. It has two sentences.\n\nAnother one.\n")
    fastbert.prepare("~/a.txt", "~/data", vocab_size=100, workers=1, progress=False)
    assert (tmp_path / "data/manifest.json").is_file()
    with pytest.raises(fastbert.InputError, match=f"^{tmp_path}/data: a dataset of text"):
        fastbert.load("~/data")


def test_variables_in_paths(tmp_path, monkeypatch):
    """As a shell replaces them: a folder named $SCRATCH would be on the wrong disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", str(tmp_path / "big"))
    monkeypatch.setenv("user_1", "ann")
    monkeypatch.delenv("NOWHERE", raising=False)
    for written in ("$SCRATCH/${user_1}/runs", "${SCRATCH}/ann/runs"):
        assert load_config("mini", {"data": "d", "run": written}).run == f"{tmp_path}/big/ann/runs"
    for written in ("cost_$5_vs_$6", "a$b", "$", "$user_1", "x_$"):
        assert load_config("mini", {"data": "d", "run": written}).run == written
    listed = {"data": [{"path": "$SCRATCH/d"}], "init": "$SCRATCH/i"}
    config = load_config("mini", listed)
    assert (config.sources[0].path, config.init) == (f"{tmp_path}/big/d", f"{tmp_path}/big/i")
    (tmp_path / "big").mkdir()
    (tmp_path / "big/a.txt").write_text("One text. It has two sentences.\n\nAnother one.\n")
    size = np.int64(100)
    fastbert.prepare("$SCRATCH/a.txt", "$SCRATCH/data", vocab_size=size, progress=np.bool_(False))
    again = {"tokenizer": "$SCRATCH/data/tokenizer", "workers": np.int32(1), "progress": False}
    fastbert.prepare("$SCRATCH/a.txt", "$SCRATCH/again", heldout=np.float32(0.25), **again)
    assert (tmp_path / "big/again/manifest.json").is_file()
    for call in (
        lambda: load_config("mini", {"data": "$NOWHERE/d"}),
        lambda: fastbert.prepare("$NOWHERE/a.txt", "out"),
        lambda: fastbert.prepare("$SCRATCH/a.txt", "/mnt/${NOWHERE}/out"),
        lambda: fastbert.load("$NOWHERE/run"),
    ):
        with pytest.raises(fastbert.InputError, match="the variable NOWHERE is not set"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


def test_resume(recipe):
    fastbert.pretrain(recipe)
    with pytest.raises(fastbert.InputError, match="holds a run with checkpoints"):
        fastbert.pretrain(recipe)
    result = fastbert.pretrain(recipe, {"stop.steps": 5}, resume=True)
    steps = [r["step"] for r in read_metrics(result.run / "metrics.jsonl") if "event" not in r]
    assert (result.reason, steps) == ("stop.steps = 5", [1, 2, 3, 4, 5])


def test_ctrl_c_saves_and_returns(recipe, tmp_path):
    metrics = tmp_path / "run/metrics.jsonl"
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    result = fastbert.pretrain(recipe, stop={"steps": 100_000})
    thread.join()
    assert (result.exit_code, result.reason) == (75, "interrupted by SIGINT")
    assert signal.getsignal(signal.SIGINT) is before  # a second Ctrl-C would have reached it
    step = result.metrics["train"]["step"]
    assert 1 < step < 100_000
    assert (tmp_path / f"run/checkpoints/step-{step:08}").is_dir()
    resumed = fastbert.pretrain(
        recipe,
        stop={"steps": step + 1},
        schedule={"warmup": 0.0, "decay": "constant"},
        resume=True,
    )
    assert (resumed.exit_code, resumed.metrics["train"]["step"]) == (0, step + 1)


def test_weights_that_diverge_are_a_result(recipe):
    optimizer = {"name": "sgd", "lr": 100.0, "max_grad_norm": 0.0}
    result = fastbert.pretrain(
        recipe,
        optimizer=optimizer,
        stop={"steps": 50},
        schedule={"warmup": 0.0, "decay": "constant"},
    )
    assert result.exit_code == 1 and "finite" in result.reason


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("minni",), {}, "minni: no such recipe; did you mean mini[?] .* base, demo, large"),
        (("mini",), {"data": "nowhere"}, "nowhere"),
        (({},), {}, "recipe: data is missing"),
        (({"data": "x", "stop": 3},), {"stop": {"steps": 1}}, "'stop' is not a section"),
        (({"data": "x", "batch": {"size": 1}},), {}, "recipe: unknown key 'batch.size'"),
        (("mini",), {"steps": 3}, "overrides: unknown key 'steps'"),
        (("mini", {"stop.steps": 0}), {}, "overrides: stop.steps = 0; must be 1 or more"),
        (("mini", {"stop.epochs": "9" * 400}), {}, "overrides: stop.epochs = .* must be a number"),
        (("mini", {"stop.epochs": 10**400}), {}, "overrides: stop.epochs = .* must be a number"),
        (("mini", {"data": "x"}), {"data": "y"}, "overrides: data is given twice"),
    ],
)
def test_what_is_wrong_raises_input_error(arguments, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fastbert.InputError, match=message):
        fastbert.pretrain(*arguments, **options)
    assert list(tmp_path.iterdir()) == []


def test_prepare_and_load_raise_input_error(tmp_path):
    with pytest.raises(fastbert.InputError, match=r"none\.txt"):
        fastbert.prepare(tmp_path / "none.txt", tmp_path / "out")
    with pytest.raises(fastbert.InputError, match="nowhere"):
        fastbert.load(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fastbert.prepare(3, "out"), "sources = 3; must be a path, or a list of paths"),
        (lambda: fastbert.prepare(None, "out"), "sources = None"),
        (lambda: fastbert.prepare(b"a", "out"), "sources = b'a'"),
        (lambda: fastbert.prepare([], "out"), "sources is empty"),
        (
            lambda: fastbert.prepare(["a", 3], "out"),
            r"sources\[1\] = 3; must be a string or a path",
        ),
        (lambda: fastbert.prepare("a", None), "out = None; must be a string or a path"),
        (
            lambda: fastbert.prepare("a", "out", vocab_size="300"),
            "vocab_size = '300'; must be a whole number$",
        ),
        (
            lambda: fastbert.prepare("a", "out", workers=1.5),
            "workers = 1.5; must be a whole number or",
        ),
        (lambda: fastbert.prepare("a", "out", heldout=True), "heldout = True; must be a number"),
        (lambda: fastbert.prepare("a", "out", lowercase=1), "lowercase = 1; must be True or False"),
        (
            lambda: fastbert.prepare("a", "out", text_field=None),
            "text_field = None; must be a string",
        ),
        (lambda: fastbert.pretrain(3), "recipe = 3; must be a path"),
        (lambda: fastbert.pretrain(None), "recipe = None"),
        (lambda: fastbert.pretrain(["mini"]), r"recipe = \['mini'\]"),
        (lambda: fastbert.pretrain("mini", resume="yes"), "resume = 'yes'; must be True or False"),
        (lambda: fastbert.pretrain("mini", data=object()), "data = <object .*; must be a string"),
        (
            lambda: fastbert.pretrain("mini", data="x", run=threading.Lock()),
            "run = .*must be a string",
        ),
        (lambda: fastbert.pretrain("mini", data="x", stop=[3]), r"stop = \[3\]; must be a section"),
        (lambda: fastbert.pretrain({3: 4}), "data is missing"),
        (lambda: fastbert.load(3), "path = 3; must be a string or a path"),
        (lambda: fastbert.load("x", 0), "device = 0; must be a string or None"),
    ],
)
def test_a_wrong_type_is_one_clear_line(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("")
    with pytest.raises(fastbert.InputError, match=words) as error:
        call()
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["a"]


def test_an_option_that_does_not_exist_is_a_type_error(tmp_path):
    with pytest.raises(
        TypeError, match=r"prepare has no option 'vocabsize'; did you mean vocab_size"
    ):
        fastbert.prepare("a", tmp_path / "out", vocabsize=300)


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("gpu", 'must be "cpu" or "cuda"'),
        ("meta", 'must be "cpu" or "cuda"'),
        pytest.param("cuda", "no GPU here", marks=without_gpu),
        pytest.param("cuda:7", "no GPU here", marks=without_gpu),
    ],
)
def test_a_device_that_is_not_there(tmp_path, device, words):
    folder = make_hugging_face_folder(tmp_path / "hf")
    with pytest.raises(fastbert.InputError, match=words):
        fastbert.load(folder, device)


def test_numbers_of_numpy_are_numbers(recipe):
    config = load_config(
        recipe,
        {
            "stop.steps": np.int64(7),
            "optimizer": {"lr": np.float32(0.5), "betas": (np.float64(0.5), 0.9)},
        },
    )
    assert (config.stop.steps, config.optimizer.lr) == (7, 0.5)
    assert config.optimizer.betas == (0.5, 0.9)


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("--heldout 0.9: must be above 0", "heldout = 0.9: must be above 0"),
        ("a.xyz: no format; give --format lines", "a.xyz: no format; give text_format = lines"),
        ("exists already; choose another --out", "exists already; choose another out"),
        ("x; resume with --resume", "x; resume with resume=True"),
        ("if it has ended, --resume starts it", "if it has ended, resume=True starts it"),
        (
            "resume with: fastbert pretrain runs/a/config.toml --resume",
            'resume with: fastbert.pretrain("runs/a/config.toml", resume=True)',
        ),
        ("try --cased or --keep-accents", "try lowercase=False or keep_accents=True"),
        ("--format says nothing", "text_format says nothing"),
        ("a--b and -- c and run=x--y", "a--b and -- c and run=x--y"),
    ],
)
def test_messages_speak_of_arguments(message, wanted):
    assert api._as_python(message) == wanted


def test_no_message_of_the_python_interface_has_an_option(tmp_path, recipe):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "there").mkdir()
    fastbert.pretrain(recipe)
    for call in (
        lambda: fastbert.prepare(tmp_path / "a.txt", tmp_path / "there"),
        lambda: fastbert.prepare(tmp_path / "a.txt", tmp_path / "out", heldout=0.9),
        lambda: fastbert.prepare(tmp_path / "a.txt", tmp_path / "out", workers=0),
        lambda: fastbert.prepare(tmp_path / "a.txt", tmp_path / "out", vocab_size=2),
        lambda: fastbert.prepare(tmp_path / "a.txt", tmp_path / "out", text_format="x"),
        lambda: fastbert.prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="nowhere"),
        lambda: fastbert.pretrain(recipe),
        lambda: fastbert.load(tmp_path / "there"),
    ):
        with pytest.raises(fastbert.InputError) as error:
            call()
        assert "--" not in str(error.value)


@pytest.mark.parametrize("captures", [True, False])
def test_a_run_leaves_the_logging_of_its_host_alone(recipe, captures):
    logging.captureWarnings(captures)
    try:
        before = warnings.showwarning
        level = logging.getLogger("fastbert").level
        fastbert.pretrain(recipe)
        assert warnings.showwarning is before
        assert logging.getLogger("fastbert").level == level
    finally:
        logging.captureWarnings(False)


def test_the_names_are_listed_and_nothing_heavy_is_imported():
    code = (
        "import sys, fastbert; assert set(fastbert.__all__) <= set(dir(fastbert)); "
        "fastbert.prepare, fastbert.pretrain, fastbert.RunResult, fastbert.InputError; "
        "print(sorted({'torch', 'numpy', 'deepspeed', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert {"load", "prepare", "pretrain", "__version__"} < set(fastbert.__all__)
    with pytest.raises(AttributeError, match="no attribute 'evaluate'"):
        _ = fastbert.evaluate


def test_none_gives_a_key_its_default(recipe):
    """None restores the preset's default.

    Without a default in the preset, the key is missing.
    """
    recipe["model"] = {"preset": "small", "hidden_size": 256}
    config = load_config(recipe, {"model": {"hidden_size": None}, "stop.steps": None})
    assert (config.model.hidden_size, config.stop.steps) == (512, None)
    config = load_config(recipe, {"model": {"preset": None, "hidden_size": None}})
    assert config.model.preset == "base"
    with pytest.raises(fastbert.InputError, match="data is missing"):
        fastbert.pretrain(recipe, data=None)


@pytest.mark.parametrize(
    ("overrides", "tables", "words"),
    [
        ({}, {"seeed": None}, "unknown key 'seeed'"),
        ({}, {"stop": {"stepss": None}}, "unknown key 'stop.stepss'"),
        ({"stop.steps": 2}, {"stop": {"steps": 3}}, "stop.steps is given twice"),
        (["stop.steps=2"], {}, "must be a dict"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(recipe, overrides, tables, words):
    with pytest.raises(fastbert.InputError, match=words):
        fastbert.pretrain(recipe, overrides, **tables)


@pytest.mark.parametrize("name", ["./small", "./small.toml", "small\0", "s" * 300])
def test_only_a_bare_name_is_that_of_a_packaged_recipe(name):
    with pytest.raises(fastbert.InputError, match="no such recipe"):
        fastbert.pretrain(name)


def test_a_run_leaves_the_process_as_it_was(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = logging.getLogger("py.warnings").handlers
    before = sys.excepthook, list(handlers), torch.random.get_rng_state()
    result = fastbert.pretrain(recipe, run="here")
    assert result.run == tmp_path / "here"  # also from another folder
    assert (sys.excepthook, logging.getLogger("py.warnings").handlers) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2])


def test_one_run_at_a_time(recipe):
    """Two runs would share torch's random numbers, its process group and the log."""
    second = []

    def another() -> None:
        try:
            fastbert.pretrain(recipe)
        except fastbert.InputError as error:
            second.append(str(error))

    thread = threading.Thread(target=another)
    with api._ONE_RUN:
        thread.start()
        thread.join()
    assert second == ["another run is going on in this process; start a process for each run"]


def _run_in_a_fork(recipe, run: str, to) -> None:
    try:
        to.send(fastbert.pretrain(recipe, run=run).exit_code)
    except fastbert.InputError as error:
        to.send(str(error))


def test_a_fork_of_a_process_that_has_trained_is_refused(recipe, tmp_path):
    """It would train, and then wait forever for threads of the first run's process group."""
    fastbert.pretrain(recipe)
    forks = multiprocessing.get_context("fork")
    here, there = forks.Pipe()
    child = forks.Process(target=_run_in_a_fork, args=(recipe, str(tmp_path / "second"), there))
    child.start()
    try:
        assert here.poll(120), "the fork does not answer"
        assert 'multiprocessing.get_context("spawn")' in here.recv()
    finally:
        child.kill()
        child.join()
    assert not (tmp_path / "second").exists()


def test_a_process_group_of_the_caller_is_left_alone(recipe, tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(fastbert.InputError, match="distributed is initialized"):
            fastbert.pretrain(recipe)
        assert dist.is_initialized() and not (tmp_path / "run").exists()
    finally:
        dist.destroy_process_group()
