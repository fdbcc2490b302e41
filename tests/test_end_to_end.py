"""The whole way in real processes: text, dataset, an interrupted and resumed training, export.

transformers loads the exported model.
"""

from __future__ import annotations

import json
import math
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForPreTraining

import fastbert

# The default tier goes the same way in one process (test_api.py).
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEPS = 48
VOCABULARY = 1500

RECIPE = f"""
data = "dataset"
run = "runs/whole"
seed = 3
[model]
num_hidden_layers = 2
hidden_size = 64
num_attention_heads = 4
intermediate_size = 128
max_position_embeddings = 64
[batch]
sequences = 24
max_length = 64
micro_batch_tokens = 512
[optimizer]
lr = 3e-3
[stop]
steps = {STEPS}
[evaluate]
every = 10
sequences = 32
[checkpoint]
every = 15
keep = 2
[runtime]
precision = "fp32"
deepspeed = "{ROOT / "fastbert/recipes/ds_config.json"}"
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `fastbert ...` with `folder` as its working directory."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "fastbert", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a process, which must end with `code`, and return what it printed."""
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, (
        f"{process.args} ended with {process.returncode}, not {code}:\n{out}\n{err}"
    )
    return out


def fastbert_json(folder: Path, *arguments: str) -> dict:
    return json.loads(finish(start(folder, *arguments, "--json")))


def rows(run: Path) -> list[dict]:
    """The complete lines of metrics.jsonl; the last line of a running run may be incomplete."""
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def steps(run: Path) -> dict[int, dict]:
    """Map each step to its row, without timings; a step that ran twice must have the same row."""
    found: dict[int, dict] = {}
    for row in rows(run):
        if "event" not in row:
            kept = {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")}
            kept = {k: v for k, v in kept.items() if not k.startswith(("mfu", "wait"))}
            assert found.setdefault(row["step"], kept) == kept
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with Python's help pages in `text.jsonl`, their dataset, and a recipe."""
    folder = tmp_path_factory.mktemp("end_to_end")
    texts = pydoc_data.topics.topics.values()
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    finish(
        start(
            folder,
            "prepare",
            "text.jsonl",
            "--out",
            "dataset",
            "--vocab-size",
            str(VOCABULARY),
            "--workers",
            "1",
        )
    )
    return folder


@pytest.fixture(scope="module")
def run(place) -> Path:
    """A finished run that was never interrupted."""
    finish(start(place, "pretrain", "recipe.toml"))
    return place / "runs/whole"


@pytest.fixture(scope="module")
def exported(place, run) -> Path:
    finish(start(place, "export", str(run), "--out", "exported"))
    return place / "exported"


def test_it_learns(run):
    losses = [row["loss"] for row in steps(run).values()]
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(math.log(VOCABULARY) + math.log(2), abs=0.3)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert rows(run)[-1]["event"] == "stop"
    assert {"evaluate", "save", "stop"} <= {row.get("event") for row in rows(run)}
    for name in ("config.toml", "loss.png", "log.txt"):
        assert (run / name).stat().st_size > 0, name


def test_an_interrupted_run_resumes_to_the_last_digit(place, run):
    broken = place / "runs/broken"
    process = start(place, "pretrain", "recipe.toml", "run=runs/broken")
    while process.poll() is None and len(steps(broken)) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    finish(process, code=75)
    reached = len(steps(broken))
    assert reached < STEPS
    finish(start(place, "pretrain", "recipe.toml", "run=runs/broken", "--resume"))
    assert "resume" in {row.get("event") for row in rows(broken)}
    assert steps(broken) == steps(run)


def test_evaluate(place, run):
    result = fastbert_json(place, "evaluate", str(run))
    at_chance = math.log(VOCABULARY)
    assert 0 < result["loss_mlm"] < at_chance - 0.3
    assert 0 < result["loss_nsp"] < 2
    assert result["perplexity"] == pytest.approx(math.exp(result["loss_mlm"]))
    assert 0 < result["accuracy_mlm"] < 1


def test_fill_and_nsp(place, run, exported):
    """The verbs print for the run what Python returns for the exported folder."""
    theirs = fastbert.load(exported)
    text = "The [MASK] statement is used to define a [MASK]."
    masks = fastbert_json(place, "fill-mask", str(run), text)["masks"]
    assert [
        [(guess["token"], guess["probability"]) for guess in mask] for mask in masks
    ] == theirs.fill_mask(text, k=5)
    pair = ("The class body is executed.", "A new local namespace is made.")
    assert fastbert_json(place, "nsp", str(run), *pair)["probability"] == theirs.next_sentence(
        *pair
    )


def test_embed(place, run):
    texts = ["Lists are mutable sequences.", "An exception is raised.", "Names refer to objects."]
    (place / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    finish(start(place, "embed", str(run), "texts.txt", "--pool", "mean", "--out", "texts.npy"))
    vectors = np.load(place / "texts.npy")
    assert vectors.shape == (len(texts), 64)
    np.testing.assert_allclose(
        vectors, fastbert.load(run).encode(texts, pool="mean"), rtol=1e-4, atol=1e-5
    )


def test_transformers_gives_the_same(run, exported):
    """Stock transformers computes the same logits, hidden states, fillings and pair scores."""
    model = BertForPreTraining.from_pretrained(exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ours = fastbert.load(run)

    text = "Names refer to objects. They are introduced by name binding operations."
    with torch.no_grad():
        theirs = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        states = [torch.from_numpy(state) for state in ours.hidden_states([text])[0]]
        token_logits, pair_logits = (
            ours.model.token_logits(states[-1]),
            ours.model.pair_logits(states[-1][:1]),
        )
    for state, expected in zip(states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(state, expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(token_logits, theirs.prediction_logits[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(pair_logits, theirs.seq_relationship_logits, rtol=0, atol=1e-4)

    inputs = tokenizer("The [MASK] statement is simple.", return_tensors="pt")
    with torch.no_grad():
        expected = (
            model(**inputs)
            .prediction_logits[inputs["input_ids"] == tokenizer.mask_token_id]
            .softmax(-1)
            .topk(3)
        )
    ((*best,),) = ours.fill_mask("The [MASK] statement is simple.", k=3)
    assert [token for token, _ in best] == tokenizer.convert_ids_to_tokens(
        expected.indices[0].tolist()
    )
    assert [p for _, p in best] == pytest.approx(expected.values[0].tolist(), rel=1e-3)

    pair = ("The class body is executed.", "A new local namespace is made.")
    with torch.no_grad():
        expected = (
            model(**tokenizer(*pair, return_tensors="pt"))
            .seq_relationship_logits.softmax(-1)[0, 0]
            .item()
        )
    assert ours.next_sentence(*pair) == pytest.approx(expected, rel=1e-3)
