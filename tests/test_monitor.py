"""The output that a user sees: lines, advice, metrics, pictures and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
from dataclasses import fields
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastbert.cluster.signals import StopRequest
from fastbert.config import LOSSES, RunConfig, StopConfig
from fastbert.models.heads import Losses
from fastbert.tasks.evaluate import Evaluation, Masked, Pairs
from fastbert.training import monitor as module
from fastbert.training import picture
from fastbert.training.engine import StepResult
from fastbert.training.heldout import HeldOut
from fastbert.training.history import History
from fastbert.training.metrics import STEP_KEYS, read_metrics
from fastbert.training.monitor import Monitor
from fastbert.training.picture import loss_figure, write_picture
from fastbert.training.train_state import StopCriteria, TrainState

BASELINES = {
    "unigram": 6.7,
    "left_bigram": 5.1,
    "two_sided_bigram": 4.3,
    "two_sided_trigram": 3.7,
    "tokens": 1e6,
}
FIRST = math.log(1000) + math.log(2)


def result(loss: float = FIRST, norm: float = 1.0, pairs: bool = True) -> StepResult:
    return StepResult(
        loss, loss - 0.7, 0.7 if pairs else None, 0.05, 0.5 if pairs else None, norm, 1000, 150, 16
    )


def heldout(mask: float = 6.0, nsp: float = 0.6) -> HeldOut:
    return HeldOut(6.5, 5.9, 0.1, mask, 0.08, nsp, 0.7)


def monitor(run, step: int = 0, is_main: bool = True, peak: float = 1e18) -> Monitor:
    criteria = StopCriteria(RunConfig(data="dataset", stop=StopConfig(steps=200)), 50)
    return Monitor(
        run,
        step=step,
        criteria=criteria,
        peak=peak,
        vocab_size=1000,
        recipe=RunConfig(data="dataset"),
        baselines=BASELINES,
        is_main=is_main,
    )


def take_step(to: Monitor, step: int, loss: float = FIRST, **changes) -> None:
    to.step(
        TrainState(step=step, seconds=step * 0.1),
        result(loss, **changes),
        lr=1e-3,
        seconds=0.1,
        waited=0.01,
        flops=5e7,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_an_objective_is_reported(name):
    """LOSSES comes from the words of `objective.kind`; the message names the file to change."""
    assert name in [f.name for f in fields(Losses)], f"models/heads.py: Losses has no {name}"
    masked = Masked(1, 2.0, 0.5, 0.5, 3.0, 3.0)
    evaluated = Evaluation(masked, Pairs(1, 0.7, 0.5), {}, {}, {}, 1, 9, {}).flat()
    page = (Path(__file__).parents[1] / "docs/reference/run-folder.md").read_text("utf-8")
    for key in (f"loss_{name}", f"accuracy_{name}"):
        assert key in STEP_KEYS
        assert key in [f.name for f in fields(StepResult)], f"training/engine.py: no {key}"
        assert key in [f.name for f in fields(HeldOut)], f"training/heldout.py: no {key}"
        assert key in evaluated, f"tasks/evaluate.py: Evaluation.flat has no {key}"
        assert f"`{key}`" in page, f"docs/reference/run-folder.md: no `{key}`"


def test_every_loss_belongs_to_an_objective():
    """The scalars of Losses are the losses; the other fields are by token or by pair."""
    scalars = [f.name for f in fields(Losses) if not f.name.endswith(("_losses", "_correct"))]
    assert scalars == list(LOSSES), "config.py: OBJECTIVES does not name these losses"


def test_a_step_has_exactly_the_keys_that_others_script_against(tmp_path):
    with monitor(tmp_path) as to:
        take_step(to, 1, loss=7.1 + 1e-15)
        take_step(to, 2, pairs=False)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert tuple(first) == STEP_KEYS
    assert first["loss"] == 7.1 + 1e-15 and first["tokens_per_s"] == 1000 / 0.1
    assert second["loss_nsp"] is None and second["accuracy_nsp"] is None


def test_lines_without_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    with monitor(tmp_path) as to:
        take_step(to, 50)
    line = capsys.readouterr().out.strip()
    assert line.startswith("25%, step 50, loss 7.601, 0:15 left, ") and line.endswith("% wait")
    assert " tok/s, " in line and "% of peak, " in line and "\n" not in line
    assert line in (tmp_path / "log.txt").read_text()


def test_the_line_has_the_last_held_out_loss_and_every_part_is_explained(
    tmp_path, capsys, monkeypatch
):
    """Also in a process that has resumed the run, and has not evaluated yet."""
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    state = TrainState(step=50, seconds=5.0, heldout_loss=5.5)
    with monitor(tmp_path, step=49) as to:
        to.step(state, result(7.1), lr=1e-3, seconds=0.1, waited=0.01, flops=5e7)
    parts = capsys.readouterr().out.strip().split(", ")
    assert parts[:5] == ["25%", "step 50", "loss 7.100", "held-out 5.500", "0:15 left"]
    page = (Path(__file__).parents[1] / "docs/reference/run-folder.md").read_text("utf-8")
    names = [re.sub(r"[\d.,:%]+", "", part).strip() for part in parts[2:]]
    table = page.partition("## The progress line")[2].partition("## ")[0]
    assert names == re.findall(r"^\| `(.+)` \|", table, re.M)


def test_no_share_where_the_peak_was_measured_too_low(tmp_path, capsys, monkeypatch):
    """Other processes may have slowed down its measurement, and it says nothing then."""
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    with monitor(tmp_path, peak=1.0) as to:
        take_step(to, 50)
        to.step(
            TrainState(step=51), result(), lr=1e-3, seconds=0.1, waited=0.0, flops=1e-9
        )  # a slow step
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("tok/s" in line for line in lines)
    assert not any("peak" in line for line in lines)


def test_training_that_explodes_is_noted_before_the_first_evaluation(tmp_path, capsys):
    with monitor(tmp_path) as to:
        for step, loss in enumerate((FIRST, 1e3, 1e4, 1e5, 1e5, 1e5), 1):
            take_step(to, step, loss=loss)
    said = capsys.readouterr().out
    assert said.count("training has diverged") == 1 and "the loss of step 4 is 1e+05" in said


def test_stdout_that_cannot_be_written_does_not_end_a_run(tmp_path):
    with monitor(tmp_path) as to, open("/dev/full", "w") as full:
        to._console = Console(file=full)
        to.say("one")
        to.say("two")
        with contextlib.suppress(OSError):
            full.close()
    log = (tmp_path / "log.txt").read_text()
    assert " one\n" in log and " two\n" in log
    assert log.count("nothing more is printed: standard output: No space left on device") == 1


def test_a_log_on_a_full_disk_is_named(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with monitor(tmp_path, step=1) as to, pytest.raises(OSError, match="No space left") as raised:
        to.say("a line")
    assert raised.value.filename == str(tmp_path / "log.txt")


def test_a_pipe_as_the_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "log.txt")
    with pytest.raises(OSError, match="No such device"):
        monitor(tmp_path, step=1)


def test_held_out_losses_are_set_against_the_baselines(tmp_path, capsys):
    with monitor(tmp_path) as to:
        to.evaluate(TrainState(step=20), heldout(), 0.5)
    assert capsys.readouterr().out.strip() == (
        "held-out at step 20: MLM loss 5.900, accuracy 10.0%; NSP loss 0.600, accuracy 70.0%; "
        "on [MASK] 6.000, below word frequencies (6.70), above the left neighbour (5.10)"
    )
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (
        record["event"] == "evaluate" and record["step"] == 20 and record["loss_mask_token"] == 6.0
    )


def test_advice_is_given_once(tmp_path, capsys):
    with monitor(tmp_path) as to:
        take_step(to, 1, loss=30.0)
        to.evaluate(TrainState(step=199), heldout(mask=6.69, nsp=0.693), 0.5)  # too early
        (note,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
        assert "the first loss is 30.00" in note
        for step in (200, 201, 202):
            to.evaluate(TrainState(step=step), heldout(mask=6.69, nsp=0.693), 0.5)
        for step in range(2, 103):
            take_step(to, step)
        for step in range(103, 110):
            take_step(to, step, norm=500.0)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 3
    for note, part in zip(
        notes,
        [
            "on [MASK] is 6.69",
            "NSP loss is 0.693",
            "gradient norm is 500",
        ],
        strict=True,
    ):
        assert part in note


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e10])
def test_a_loss_that_is_not_finite_is_not_taken_for_a_plateau(tmp_path, capsys, loss):
    with monitor(tmp_path) as to:
        to.evaluate(TrainState(step=190), HeldOut(loss, loss, 0.0, loss, 0.0, loss, 0.4), 0.5)
        to.stop(190, "stop.steps = 190")
    said = capsys.readouterr().out
    (note,) = (line for line in said.splitlines() if line.startswith("note: "))
    assert "training has diverged" in note and "neighbours yet" not in said and "nan" not in said
    records = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert records[0]["loss"] == (loss if math.isfinite(loss) else None)
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[0] > 500


def test_a_bad_line_of_metrics_is_skipped(tmp_path, capsys):
    """A message says so, and the run continues in the same file."""
    with monitor(tmp_path) as to:
        take_step(to, 1)
        take_step(to, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        path.read_bytes().replace(b"\n", b'\n{"step": 2, "lo{"step": 2, "loss": 7.1}\n', 1)
    )
    with monitor(tmp_path, step=2) as to:
        take_step(to, 3)
    assert (
        f"{path}: 1 of its lines cannot be read and are left out; the first is line 2"
        in capsys.readouterr().out
    )
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


def test_a_fresh_start_does_not_write_through_links(tmp_path):
    """A file that the user has linked in place of a run's file stays as it is."""
    notes = tmp_path / "my notes.txt"
    notes.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("log.txt", "metrics.jsonl"):
        (run / name).symlink_to(notes)
    with monitor(run) as to:
        take_step(to, 1)
    assert notes.read_text() == "mine" and not (run / "log.txt").is_symlink()


def test_a_normal_run_gets_no_advice(tmp_path, capsys):
    with monitor(tmp_path) as to:
        for step in range(1, 150):
            take_step(to, step, loss=FIRST - step / 100)
        to.evaluate(TrainState(step=150), heldout(mask=4.5, nsp=0.5), 0.5)
    assert "note: " not in capsys.readouterr().out


def test_only_rank_0_prints(tmp_path, capsys):
    with monitor(tmp_path, is_main=False) as to:
        take_step(to, 1, loss=99.0)
        to.evaluate(TrainState(step=1), heldout(), 0.5)
        to.say("hello")
        to.stop(1, "stop.steps = 1")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_tensorboard_has_the_curves(tmp_path):
    with monitor(tmp_path) as to:
        for step in range(1, 31):
            take_step(to, step, loss=10.0 - step)
        to.evaluate(TrainState(step=30), heldout(), 0.5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (10, 0.0),
        (20, -10.0),
        (30, -20.0),
    ]
    assert events.Scalars("heldout/loss_mask_token")[0].value == 6.0


def test_the_picture_shows_the_run(tmp_path):
    with monitor(tmp_path) as to:
        for step in range(1, 101):
            take_step(to, step, loss=FIRST - step / 50)
        to.evaluate(TrainState(step=100), heldout(), 0.5)
        to.stop(100, "stop.steps = 100")
    pixels = matplotlib.image.imread(tmp_path / "loss.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800
    colours = {
        tuple(c)
        for c in np.unique((pixels[..., :3] * 255).round().astype(int).reshape(-1, 3), axis=0)
    }
    for name in ("TRAIN", "HELDOUT", "MASKED", "NSP", "INK"):
        colour = getattr(picture, name)
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in colours, name


def test_the_picture_does_without_pairs_and_evaluations(tmp_path):
    history = History(("loss_mlm", "loss_nsp"))
    history.add({"step": 1, "loss_mlm": 7.0, "loss_nsp": None})
    write_picture(tmp_path / "loss.png", lambda: loss_figure(history, "run", BASELINES))
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_a_redone_step_replaces_the_first_in_the_picture():
    history = History(("loss_mlm", "loss_nsp"))
    history.read(
        [{"step": step, "loss_mlm": float(step), "loss_nsp": 0.0} for step in (1, 2, 3, 4)]
    )
    history.read([{"event": "resume", "step": 2}, {"step": 3, "loss_mlm": 30.0, "loss_nsp": 0.0}])
    assert history.smooth("loss_mlm") == ([1.0, 2.0, 3.0], [1.0, 2.0, 30.0])


def test_a_resume_appends_to_every_file(tmp_path, capsys):
    with monitor(tmp_path) as to:
        take_step(to, 1)
        to.say("first part")
    with monitor(tmp_path, step=1) as to:
        to.event("resume", 1, checkpoint="step-00000001")
        take_step(to, 2)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1, 2]
    assert "first part" in (tmp_path / "log.txt").read_text()
    with monitor(tmp_path):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == "" and "first part" not in (
        tmp_path / "log.txt"
    ).read_text()


def test_every_line_is_json(tmp_path):
    with monitor(tmp_path) as to:
        take_step(to, 1)
        to.event("save", 1, checkpoint="x")
        to.stop(1, 'a "reason"')
    kinds = [
        json.loads(line).get("event")
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert kinds == [None, "save", "stop"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_stop_request(number):
    before = signal.getsignal(number)
    with StopRequest() as stop_request:
        assert stop_request.asked is None
        os.kill(os.getpid(), number)
        assert stop_request.asked == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_does_not_wait():
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
