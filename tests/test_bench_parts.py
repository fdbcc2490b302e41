"""The split of a training step counts every moment once, in the right part, in both directions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.step.bench_parts import (
    EMBEDDING,
    LOSS,
    NORM,
    OPTIMIZER,
    PARTS,
    PRODUCTS,
    PROJECTIONS,
    SCORES,
    STEP,
    flops,
    mark,
    split,
)
from fastbert.config import BertConfig
from fastbert.models.bert import BertForPreTraining
from fastbert.models.heads import losses
from fastbert.planning.flops import executed_flops
from tests.random_batch import VOCAB, make_batch

ROOT = Path(__file__).parents[1]
MODEL = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
)
PAUSE = 0.5  # seconds: far more than a step of so small a model takes


def profiled(model: BertForPreTraining) -> tuple[dict[str, float], float]:
    """Return milliseconds by part of one step, and of the whole step."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = make_batch([20, 13, 9])
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(STEP):
        losses(model.train()(batch)).loss.backward()
        optimizer.step()
    events = profiler.events() or []
    return split(events), sum(event.cpu_time_total for event in events if event.name == STEP) / 1e3


def test_every_moment_is_counted_once():
    model = BertForPreTraining(MODEL, VOCAB)
    mark(model)
    parts, whole = profiled(model)
    assert sum(parts.values()) == pytest.approx(whole, rel=1e-3)
    # The first part is the data, of which there are none.
    assert set(parts) <= set(PARTS) and all(parts[part] > 0 for part in PARTS[1:])


def pause_forward(
    module: Callable[[BertForPreTraining], torch.nn.Module],
) -> Callable[[BertForPreTraining], None]:
    return lambda model: module(model).register_forward_hook(lambda *_: time.sleep(PAUSE)) and None


def pause_backward(
    parameter: Callable[[BertForPreTraining], torch.Tensor],
) -> Callable[[BertForPreTraining], None]:
    return lambda model: parameter(model).register_hook(lambda _: time.sleep(PAUSE)) and None


@pytest.mark.parametrize(
    ("plant", "part"),
    [
        (pause_forward(lambda model: model.embeddings), EMBEDDING),
        (pause_forward(lambda model: model.layers[0].attention), PROJECTIONS),
        (pause_forward(lambda model: model.mlm_head), LOSS),
        (pause_backward(lambda model: model.embeddings.position), EMBEDDING),
        (pause_backward(lambda model: model.layers[0].attention.qkv_weight), PROJECTIONS),
        (pause_backward(lambda model: model.layers[1].feed_forward.weight), PRODUCTS),
        (pause_backward(lambda model: model.layers[1].feed_forward.output.norm_weight), NORM),
        (pause_backward(lambda model: model.nsp_head.pooler.weight), LOSS),
    ],
)
def test_a_pause_is_found_where_it_was_put(plant, part):
    model = BertForPreTraining(MODEL, VOCAB)
    plant(model)  # before the marks, so that a forward pause lies within the module's
    mark(model)
    parts, _ = profiled(model)
    assert max(parts, key=lambda name: parts[name]) == part and parts[part] > 900 * PAUSE, parts


def test_the_parts_add_up_to_what_is_executed():
    lengths, masked = [128, 70, 33, 12], 36
    parts = flops(MODEL, 4096, lengths, masked, len(lengths))
    assert sum(parts.values()) == pytest.approx(
        executed_flops(MODEL, 4096, lengths, masked, len(lengths)), rel=1e-12
    )
    assert set(parts) == {PROJECTIONS, SCORES, PRODUCTS, LOSS}


@pytest.mark.slow
def test_a_short_one_runs_and_is_reported(small_dataset, tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [
        sys.executable,
        "-m",
        "benchmarks.step.bench_parts",
        str(small_dataset.path),
        "--out",
        str(tmp_path),
        "--quick",
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {
        row["part"]: row
        for row in json.loads((tmp_path / "parts.json").read_text(encoding="utf-8"))["rows"]
    }
    assert list(rows) == [*PARTS, "rest", "step"]
    assert sum(rows[part]["ms"] for part in (*PARTS, "rest")) == pytest.approx(rows["step"]["ms"])
    assert all(rows[part]["ms"] > 0 for part in PARTS) and rows[OPTIMIZER]["ideal_ms"] > 0
    assert "| norm |" in (tmp_path / "parts.md").read_text(encoding="utf-8")
