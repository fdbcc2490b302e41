"""Runs, from the recipe to their folder: complete, interrupted, resumed, refused and failed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbert.checkpoints import checkpoint
from fastbert.data.batches import Batches
from fastbert.data.dataset import open_dataset
from fastbert.durable import sealed
from fastbert.errors import InputError
from fastbert.recipe import load_config
from fastbert.training.loop import pretrain
from fastbert.training.metrics import STEP_KEYS, read_metrics
from fastbert_kernels.checker.sanitizer import sanitize
from tests import one_process
from tests.ranks import Ranks, environment
from tests.trials import CLOCK

ROOT = Path(__file__).parents[1]

RECIPE = """
data = "{dataset}"
run = "{run}"
[model]
num_hidden_layers = 2
hidden_size = 32
num_attention_heads = 2
intermediate_size = 48
max_position_embeddings = 64
[batch]
sequences = 8
max_length = 64
micro_batch_tokens = 200
[optimizer]
lr = 3e-3
[schedule]
warmup = 0
decay = "constant"
[stop]
steps = 6
[evaluate]
every = 4
sequences = 16
[checkpoint]
every = 100
keep = 9
[runtime]
precision = "fp32"
deepspeed = "{deepspeed}"
"""


@pytest.fixture
def recipe(tmp_path, small_dataset) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        RECIPE.format(
            dataset=small_dataset.path,
            run=tmp_path / "run",
            deepspeed=ROOT / "fastbert/recipes/ds_config.json",
        ),
        encoding="utf-8",
    )
    return path


def train(recipe: Path, *overrides: str, resume: bool = False) -> int:
    """Train in this process."""
    return pretrain(load_config(recipe, overrides), str(recipe), resume).exit_code


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.num_hidden_layers=10000000"], "a model of [0-9,]+ parameters needs"),
        (["model.hidden_size=1048576", "model.num_attention_heads=16384"], "a model of"),
        (["model.max_position_embeddings=1" + "0" * 30], "a model of"),
        (["batch.sequences=1000000000"], "batch.sequences = 1,000,000,000 of 64 tokens needs"),
        (["batch.sequences=1" + "0" * 30], "batch.sequences = 1"),
    ],
)
def test_what_no_machine_can_hold_is_refused_before_it_is_tried(recipe, overrides, words):
    with pytest.raises(InputError, match=rf"recipe.toml: {words}.* GB or more, and this machine"):
        train(recipe, *overrides)
    assert not (recipe.parent / "run").exists()


def start(recipe: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start a process through the command line."""
    command = [sys.executable, "-m", "fastbert", "pretrain", str(recipe), *arguments]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
    return process.returncode, out, err


def finished(recipe: Path, *arguments: str) -> str:
    """Train in a process that is forked from one with all imports, and return what it prints."""
    folder = Path(tempfile.mkdtemp(dir=recipe.parent))
    with Ranks(["pretrain", str(recipe), *arguments], folder) as ranks:
        assert (ranks.wait(), ranks.errors) == ([0], "")
        return ranks[0].out.read_text()


def lines(run: Path, kind: str | None = None) -> list[dict]:
    """Return the steps, or the events of one kind, without timings."""
    found = [r for r in read_metrics(run / "metrics.jsonl") if r.get("event") == kind]
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in found]


def refusal(recipe: Path, *overrides: str, resume: bool = False) -> str:
    with pytest.raises(InputError) as error:
        train(recipe, *overrides, resume=resume)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
def test_the_triton_kernels_train_the_same_model(recipe, tmp_path):
    """The recipe selects the kernels, with dropout.

    The steps and the held-out loss are those of the reference, to rounding.
    """
    short = ("batch.sequences=3", "evaluate.sequences=2", "evaluate.every=3", "stop.steps=3")
    for kernels in ("triton", "reference"):
        with (
            sanitize()
            if kernels == "triton" and not torch.cuda.is_available()
            else contextlib.nullcontext()
        ):
            assert (
                train(recipe, f"runtime.kernels={kernels}", f"run={tmp_path / kernels}", *short)
                == 0
            )
    for kind, keys in (
        (None, ("loss_mlm", "loss_nsp", "grad_norm")),
        ("evaluate", ("loss_mlm", "loss_nsp")),
    ):
        ours, reference = (lines(tmp_path / kernels, kind) for kernels in ("triton", "reference"))
        assert len(ours) == len(reference) > 0
        for one, other in zip(ours, reference, strict=True):
            assert [one[key] for key in keys] == pytest.approx(
                [other[key] for key in keys], rel=1e-4
            )


def test_resumed_in_another_process_it_is_the_same_to_the_last_digit(recipe, tmp_path):
    """Compare 12 steps with 6 and 6 more, in processes of their own, with dropout.

    Only fastbert's own messages appear on the terminal.
    """
    whole, parts = f"run={tmp_path / 'whole'}", f"run={tmp_path / 'parts'}"
    out = finished(recipe, whole, "stop.steps=12")
    assert out.splitlines()[-1] == "stopped at step 12: stop.steps = 12"
    assert all(
        line.startswith((str(tmp_path), "held-out", "note: ", "stopped")) or "%, step " in line
        for line in out.splitlines()
    )
    finished(recipe, parts, "stop.steps=6")
    out = finished(recipe, parts, "stop.steps=12", "--resume")
    assert f"resuming after step 6 from {tmp_path / 'parts/checkpoints/step-00000006'}" in out
    steps = lines(tmp_path / "whole")
    assert [s["step"] for s in steps] == list(range(1, 13))
    assert lines(tmp_path / "parts") == steps
    last = [lines(tmp_path / name, "evaluate")[-1] for name in ("whole", "parts")]
    assert last[0] == last[1] and last[0]["step"] == 12
    states = [
        checkpoint.read_all(tmp_path / name / "checkpoints/step-00000012")
        for name in ("whole", "parts")
    ]
    for slot, tensors in states[0].items():
        assert all(torch.equal(tensor, states[1][slot][name]) for name, tensor in tensors.items())


@pytest.mark.slow
def test_resumed_at_stage_1_too(recipe, tmp_path):
    settings = tmp_path / "ds.json"
    settings.write_text(
        json.dumps(
            {
                "zero_optimization": {
                    "stage": 1,
                    "reduce_bucket_size": 20_000,
                    "allgather_bucket_size": 20_000,
                }
            }
        )
    )
    assert train(recipe, f"runtime.deepspeed={settings}", "stop.steps=5", "checkpoint.every=3") == 0
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000005")
    assert train(recipe, f"runtime.deepspeed={settings}", "stop.steps=5", resume=True) == 0
    steps = lines(tmp_path / "run")
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 4, 5] and steps[3:5] == steps[5:]


def test_what_a_run_leaves(recipe, tmp_path, small_dataset):
    assert train(recipe, "checkpoint.every=2", "checkpoint.keep=2") == 0
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "loss.png",
        "log.txt",
        "tensorboard",
        "tokenizer",
        "checkpoints",
        ".owner",
    }
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-00000004", "step-00000006"}
    assert load_config(run / "config.toml") == load_config(
        recipe, ["checkpoint.every=2", "checkpoint.keep=2"]
    )
    assert (run / "tokenizer/vocab.txt").read_bytes() == (
        small_dataset.tokenizer_dir / "vocab.txt"
    ).read_bytes()
    steps = [r for r in read_metrics(run / "metrics.jsonl") if "event" not in r]
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6] and all(
        tuple(s) == STEP_KEYS for s in steps
    )
    events = [(e["event"], e["step"]) for e in read_metrics(run / "metrics.jsonl") if "event" in e]
    # Each event comes when the checkpoint is on disk, some steps later.
    assert [step for kind, step in events if kind == "save"] == [2, 4, 6]
    assert [event for event in events if event[0] != "save"] == [
        ("evaluate", 4),
        ("evaluate", 6),
        ("stop", 6),
    ] and events[-1][0] == "stop"
    found, _ = checkpoint.newest_valid(run)
    assert found is not None
    assert (
        found.metadata["dataset_sha256"] == small_dataset.sha256
        and found.metadata["vocab_size"] == 1000
    )
    assert found.metadata["progress"]["tokens"] == sum(s["tokens"] for s in steps)
    assert set(checkpoint.read_weights(found.path)) == {
        key.partition("/")[2] for key in keys(found.path, "weight/")
    }


def keys(path: Path, prefix: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(path / "tensors-00000-00000.safetensors", framework="pt") as file:
        return [key for key in file.keys() if key.startswith(prefix)]


@pytest.mark.parametrize(
    "overrides, steps, reason",
    [
        (["stop.steps=9", "stop.tokens=600"], 2, "stop.tokens = 600"),
        (["stop.steps=9", "stop.loss=20"], 4, "stop.loss = 20.0: the held-out loss is "),
        (
            ["stop.steps=90", "stop.patience=2", "optimizer.lr=1e-30", "evaluate.every=1"],
            3,
            "stop.patience = 2: no better than ",
        ),
        (["stop.steps=900", "stop.seconds=1e-3"], 1, "stop.seconds = 0.001"),
    ],
)
def test_the_condition_that_ended_the_run_is_reported(
    recipe, tmp_path, capsys, overrides, steps, reason
):
    assert train(recipe, *overrides) == 0
    assert len(lines(tmp_path / "run")) == steps
    (stop,) = lines(tmp_path / "run", "stop")
    assert stop["step"] == steps and stop["reason"].startswith(reason)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"stopped at step {steps}: {reason}")
    assert checkpoint.newest_valid(tmp_path / "run")[0].step == steps
    assert lines(tmp_path / "run", "evaluate")[-1]["step"] == steps


def test_a_finished_run_has_nothing_to_resume(recipe, tmp_path, capsys):
    assert train(recipe, "stop.steps=2") == 0
    assert train(recipe, "stop.steps=2", resume=True) == 0
    assert len(lines(tmp_path / "run")) == 2
    assert capsys.readouterr().out.splitlines()[-1] == "stopped at step 2: stop.steps = 2"


def test_a_signal_saves_and_says_how_to_resume(recipe, tmp_path, capsys):
    run = tmp_path / "run"

    def send() -> None:
        while (
            not (run / "metrics.jsonl").exists()
            or (run / "metrics.jsonl").read_text().count("\n") < 3
        ):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert train(recipe, "stop.steps=100000") == 75
    sender.join()
    done = len(lines(run))
    assert lines(run, "stop") == [
        {"event": "stop", "step": done, "reason": "interrupted by SIGTERM"}
    ]
    out = capsys.readouterr().out.splitlines()[-1]
    assert (
        out == f"stopped at step {done}: interrupted by SIGTERM; "
        f"resume with: fastbert pretrain {run / 'config.toml'} --resume"
    )
    assert checkpoint.newest_valid(run)[0].step == done
    assert train(run / "config.toml", f"stop.steps={done + 1}", resume=True) == 0
    assert len(lines(run)) == done + 1


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_run(recipe, tmp_path):
    """This happens with `fastbert pretrain ... | head -1`."""
    process = start(recipe)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=90) == 0 and process.stderr.read() == ""
    process.stderr.close()
    assert checkpoint.newest_valid(tmp_path / "run")[0].step == 6
    assert "stopped at step 6" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.slow
def test_a_terminal_that_is_closed_saves(recipe, tmp_path):
    # It is ignored where nohup has started the tests.
    not_ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
    process = start(recipe, "stop.steps=100000", **not_ignored)
    while not (tmp_path / "run/metrics.jsonl").exists() or not lines(tmp_path / "run"):
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert finish(process)[0] == 75
    assert checkpoint.newest_valid(tmp_path / "run")[0].step == len(lines(tmp_path / "run"))


def test_a_damaged_checkpoint_is_named_and_its_steps_are_redone_with_the_same_values(
    recipe, tmp_path, capsys
):
    run = tmp_path / "run"
    assert train(recipe, "checkpoint.every=2") == 0
    bad = run / "checkpoints/step-00000006"
    os.truncate(bad / "tensors-00000-00000.safetensors", 500)
    capsys.readouterr()
    assert train(recipe, "stop.steps=8", resume=True) == 0
    out = capsys.readouterr().out
    assert f"{bad}: damaged: tensors-00000-00000.safetensors has 500 bytes" in out
    assert f"resuming from {run / 'checkpoints/step-00000004'}, the newest valid one" in out
    steps = lines(run)
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert steps[4:6] == steps[6:8]
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    assert "damaged: manifest.json is missing; no valid checkpoint is left there" in refusal(
        recipe, resume=True
    )


def test_a_run_that_is_there_is_not_overwritten(recipe, tmp_path):
    assert train(recipe, "stop.steps=1") == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert "holds a run with checkpoints; resume with --resume" in refusal(recipe)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_resume_without_a_checkpoint_starts_from_the_beginning(recipe, tmp_path, capsys):
    """This is also the case where a process died before its first checkpoint."""
    (tmp_path / "run/checkpoints/.writing-step-00000004").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 99.0}\n{"step": 2, "lo')
    assert train(recipe, "stop.steps=2", resume=True) == 0
    assert (
        f"{tmp_path / 'run'}: no checkpoint to resume from; starting from the beginning"
        in capsys.readouterr().out
    )
    assert [s["step"] for s in lines(tmp_path / "run")] == [1, 2] and lines(tmp_path / "run")[0][
        "loss"
    ] != 99.0


def test_a_resume_must_be_of_the_same_run(recipe, tmp_path, small_dataset, capsys):
    assert train(recipe, "stop.steps=1") == 0
    for override, key, now, before in [
        ("model.hidden_size=64", "model.hidden_size", 64, 32),
        ("objective.mask_rate=0.2", "objective.mask_rate", 0.2, 0.15),
        ("seed=7", "seed", 7, 1),
        ("batch.sequences=9", "batch.sequences", 9, 8),
        ("optimizer.name=sgd", "optimizer.name", "'sgd'", "'adamw'"),
    ]:
        message = refusal(recipe, override, resume=True)
        assert (
            f"{key} = {now}, but the checkpoint {tmp_path / 'run/checkpoints/step-00000001'} "
            f"was trained with {before}" in message
        )
    other = tmp_path / "other"
    shutil.copytree(small_dataset.path, other)
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["sha256"]
    (other / "manifest.json").write_bytes(sealed({**manifest, "options": {}}))
    assert open_dataset(other).sha256 != small_dataset.sha256
    assert f"data = '{other}': not the dataset that" in refusal(
        recipe, f"data={other}", resume=True
    )
    # These may change: the path of the dataset, the number of steps, the intervals, and the
    # packing. A changed learning rate is reported.
    moved = tmp_path / "moved"
    shutil.copytree(small_dataset.path, moved)
    changes = [
        f"data={moved}",
        "stop.steps=2",
        "evaluate.every=1",
        "checkpoint.every=1",
        "batch.micro_batch_tokens=500",
        "optimizer.lr=1e-4",
    ]
    capsys.readouterr()
    assert train(recipe, *changes, resume=True) == 0
    out = capsys.readouterr().out
    assert (
        "changed since the checkpoint: optimizer.lr was 0.003, now 0.0001" in out
        and out.count("changed since") == 1
    )


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"zero_optimization": {"reduce_buket_size": 5}},
            "unknown key 'zero_optimization.reduce_buket_size'; did you mean reduce_bucket_size",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "unknown key 'zero_optimization.offload_optimizer.devise'",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "big"}},
            "zero_optimization.reduce_bucket_size = 'big': Input should be a valid integer",
        ),
        (
            {"communication_data_type": "fp99"},
            'communication_data_type = "fp99"; must be "fp32" or "bf16"',
        ),
    ],
)
def test_what_deepspeed_refuses_is_one_line(recipe, tmp_path, values, message):
    (tmp_path / "ds.json").write_text(json.dumps(values))
    assert message in refusal(recipe, f"runtime.deepspeed={tmp_path / 'ds.json'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data=no/such"], "no/such: no such dataset"),
        (["runtime.deepspeed=no/such.json"], "runtime.deepspeed = 'no/such.json': no such file"),
        (["runtime.kernels=triton"], 'runtime.kernels = "triton" needs a GPU'),
    ],
)
def test_bad_input_leaves_nothing_behind(recipe, tmp_path, overrides, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert message in refusal(recipe, *overrides)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"run = '{tmp_path / 'file'}': a file; give a folder" in refusal(
        recipe, f"run={tmp_path / 'file'}"
    )
    assert "cannot be written: Not a directory" in refusal(recipe, f"run={tmp_path / 'file/run'}")


def test_losses_that_are_never_finite_again_end_the_run(recipe, tmp_path, capsys):
    """Gradient descent with learning rate 100 and without clipping overflows in a few steps.

    From usual weights the gradient may overflow and the loss not, which depends on the last digits.
    """
    overflow = (
        "model.initializer_range=1",
        "optimizer.name=sgd",
        "optimizer.lr=100",
        "optimizer.max_grad_norm=0",
        "stop.steps=200",
        "evaluate.every=1000",
    )
    assert train(recipe, *overflow, "stop.skipped=2") == 1
    run = tmp_path / "run"
    skips = lines(run, "skip")
    last = skips[-1]["step"]
    assert [skip["step"] for skip in skips][-3:] == [last - 2, last - 1, last] and len(
        lines(run)
    ) + len(skips) == last < 200
    assert len(skips[-1]["examples"]) == 8 and skips[-1]["reason"] == "the loss is not finite"
    assert lines(run, "stop") == [
        {
            "event": "stop",
            "step": last,
            "reason": "stop.skipped = 2: 3 steps in a row were not finite",
        }
    ]
    out = capsys.readouterr().out
    assert "for every example: the weights have diverged; no single example is to blame" in out
    said = out.splitlines()[-1]
    command = f"fastbert pretrain {run / 'config.toml'} --resume optimizer.lr=10"
    assert said.endswith(
        f"; there is no checkpoint yet; start from the beginning with a lower rate: {command}"
    )
    assert checkpoint.newest_valid(run) == (None, [])
    assert train(run / "config.toml", "optimizer.lr=1e-3", "stop.steps=2", resume=True) == 0


def test_a_loss_that_is_not_finite_is_skipped_and_names_its_examples(recipe, tmp_path):
    """In this checkpoint the embedding of the last position overflows.

    Only examples of that length use it.
    """
    run, short = (
        tmp_path / "run",
        ("objective.segments=single", "batch.sequences=4", "evaluate.every=1000"),
    )
    assert train(recipe, "stop.steps=1", *short) == 0
    found, _ = checkpoint.newest_valid(run)
    assert found is not None
    state = {slot: dict(named) for slot, named in checkpoint.read_all(found.path).items()}
    state["weight"]["embeddings.position"][-1] = 3e38
    tensors = [
        (f"{slot}/{name}", tensor)
        for slot, named in state.items()
        for name, tensor in named.items()
    ]
    shutil.rmtree(found.path)
    one_process.save(run / "checkpoints", 1, tensors, found.metadata, 1)
    assert train(recipe, "stop.steps=12", *short, resume=True) == 1  # the held-out text uses it too
    skips, steps = lines(run, "skip"), lines(run)
    assert (
        sorted(line["step"] for line in skips + steps) == list(range(1, 13))
        and len(skips) > 0
        and len(steps) > 1
    )
    config = load_config(recipe, short)
    dataset = open_dataset(config.data)
    for skip in skips:
        packs = Batches(dataset, config).step(skip["step"] - 1)
        long = [
            int(e)
            for p in packs
            for e, n in zip(p.examples, p.cu_seqlens.diff(), strict=True)
            if n == 64
        ]
        assert skip["examples"] == sorted(long)
    found, _ = checkpoint.newest_valid(run)
    assert found is not None and found.metadata["progress"]["skipped"] == len(skips)


@pytest.mark.slow
def test_a_disk_that_refuses_a_checkpoint_lets_training_go_on_to_its_end(recipe, tmp_path):
    """With a file size limit of 100 kB, metrics and log fit and the checkpoint does not."""
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))}
    code, out, err = finish(start(recipe, "checkpoint.every=2", **limit))
    assert (code, err) == (1, "")
    problem = "tensors-00000-00000.safetensors: File too large"
    said = [line for line in out.splitlines() if line.startswith("no checkpoint at step")]
    assert [line.split(":")[0] for line in said] == [
        f"no checkpoint at step {step}" for step in (2, 4, 6)
    ] and all(problem in line for line in said)
    last = out.splitlines()[-1]
    assert (
        last.startswith("stopped at step 6: stop.steps = 6, but it could not be saved: ")
        and problem in last
        and "--resume" in last
    )
    assert [s["step"] for s in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert [s["step"] for s in lines(tmp_path / "run", "save")] == [2, 4, 6] and all(
        "problem" in s for s in lines(tmp_path / "run", "save")
    )
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
