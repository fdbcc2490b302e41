"""`fastbert init` on real datasets: what it sees of them, the speed, and the file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.data.dataset import open_dataset
from fastbert.data.examples import Examples
from fastbert.data.prepare import prepare
from fastbert.errors import InputError
from fastbert.planning.advise import STEP_TOKENS, Speed, advise
from fastbert.planning.new_recipe import look_at, new_recipe
from fastbert.planning.step_speed import measure_speed
from fastbert.recipe import load_config, packaged_recipes


@pytest.mark.slow  # README.md runs the command, and trains by its recipe
def test_the_recipe_is_written_for_the_dataset(small_dataset, tmp_path):
    out = tmp_path / "mine.toml"
    made = new_recipe(small_dataset.path, 2, out)
    config = load_config(out)
    assert config.data == str(small_dataset.path) and config.run == "runs/mine"
    assert config.stop.seconds == 108.0  # 2 minutes without a tenth
    assert set(made.hours) == set(packaged_recipes())
    hours = list(made.hours.values())
    assert all(hours) and hours == sorted(hours, key=float)  # type: ignore[arg-type]
    assert made.hours["demo"] == pytest.approx(240 / 3600, rel=0.05)
    assert f"{small_dataset.split('train').tokens:,} tokens" in dict(made.choice)["text"]
    before = out.read_text()
    with pytest.raises(InputError, match="exists already"):
        new_recipe(small_dataset.path, 2, out)
    assert out.read_text() == before


def test_what_is_seen_of_a_dataset(small_dataset):
    found, split = look_at(small_dataset), small_dataset.split("train")
    bounds = split.first_token(np.arange(split.sentences + 1))
    assert found.median_sentence == pytest.approx(np.median(np.diff(bounds)), abs=1)
    assert (found.documents, found.tokens) == (split.documents, split.tokens)
    assert found.can_pair and 0 <= found.single_sentence_share < 0.5


@pytest.mark.parametrize("text_format", ["lines", "txt"])
def test_a_text_without_pairs_gives_masked_tokens_alone(
    text_format, english_documents, tmp_path, small_dataset
):
    """A sentence in each line; and two documents, so that each part of the dataset has one."""
    text = " ".join(" ".join(english_documents).split())
    if text_format == "lines":
        text = "\n".join(sentence + "." for sentence in text.split(". "))
    else:
        half = text.index(". ", len(text) // 2) + 1
        text = f"{text[:half]}\n\n{text[half:]}"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    prepare(
        [tmp_path / "text.txt"],
        tmp_path / "data",
        tokenizer=small_dataset.tokenizer_dir,
        text_format=text_format,
        heldout=0.5,
        workers=1,
        progress=False,
    )
    corpus = look_at(open_dataset(tmp_path / "data"))
    advice = advise(corpus, 5, "runs/x", lambda config: Speed(1e4, 50.0))
    assert advice.config.objective.kind == "mlm" and advice.why_alone


def test_the_speed_is_that_of_whole_steps(small_dataset):
    """With a clock that ticks once a reading, the speed is the tokens of a step."""
    config = load_config("demo", {"data": str(small_dataset.path), "model.hidden_size": 32})
    ticks, state = itertools.count(), torch.get_rng_state()
    found = measure_speed(
        config, small_dataset, torch.device("cpu"), clock=lambda: float(next(ticks))
    )
    assert 0.8 * STEP_TOKENS < found.tokens_per_s < 1.2 * STEP_TOKENS
    assert torch.equal(torch.get_rng_state(), state)
    examples = Examples(small_dataset.split("train"), config.objective, 128, config.seed, "train")
    lengths = examples.draw(0, np.arange(len(examples))).lengths
    assert found.example_tokens == pytest.approx(lengths.mean(), rel=0.1)


def test_prepare_ends_with_the_command(english_jsonl, tmp_path, capsys, monkeypatch):
    import shlex

    from fastbert.cli import run

    monkeypatch.chdir(tmp_path)
    out = Path("my data")
    assert run(["prepare", str(english_jsonl), "--out", str(out), "--vocab-size", "500"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    command = shlex.split(last.partition("next: ")[2])
    assert command == [
        *("fastbert", "init", str(tmp_path / out)),
        *("--minutes", "30", "--out", "my data.toml"),
    ]
    assert json.loads((out / "manifest.json").read_text())["vocab_size"] == 500
