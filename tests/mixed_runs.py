"""A recipe on two datasets with and without phases, and how its runs are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastbert.data.dataset import TokenDataset
from fastbert.errors import InputError
from fastbert.recipe import load_config
from fastbert.training.loop import pretrain
from fastbert.training.metrics import read_metrics
from tests.trials import CLOCK

ROOT = Path(__file__).parents[1]

RECIPE = """
data = [{{path = "{a}"}}, {{path = "{b}"}}]
weights = [0.7, 0.3]
run = "{run}"
[model]
num_hidden_layers = 1
hidden_size = 32
num_attention_heads = 2
intermediate_size = 48
max_position_embeddings = 64
[batch]
sequences = 8
max_length = 32
micro_batch_tokens = 200
[optimizer]
lr = 3e-3
[schedule]
warmup = 0
decay = "constant"
[stop]
steps = 12
[evaluate]
every = 4
sequences = 16
[checkpoint]
every = 4
keep = 9
[runtime]
precision = "fp32"
deepspeed = "{deepspeed}"
"""

PHASES = """
[[phase]]
steps = 4
objective.mask_rate = 0.3

[[phase]]
steps = 8
weights = [0.2, 0.8]
batch.sequences = 16
batch.max_length = 64
batch.warmup_tokens = 1000

[[phase]]
steps = 12
weights = [0.2, 0.8]
objective.mask_rate = 0.05
batch.max_length = 64
schedule.decay = "linear"
"""


def write(folder: Path, sources: list[TokenDataset], phases: str = "") -> Path:
    path = folder / "recipe.toml"
    text = RECIPE.format(
        a=sources[0].path,
        b=sources[1].path,
        run=folder / "run",
        deepspeed=ROOT / "fastbert/recipes/ds_config.json",
    )
    path.write_text(text + phases, encoding="utf-8")
    return path


def train(recipe: Path, *overrides: str, resume: bool = False, branch_from: str | None = None):
    config = load_config(recipe, overrides, branch_from)
    assert pretrain(config, str(recipe), resume).exit_code == 0


def records(run: Path, *events: str | None) -> list[dict[str, Any]]:
    """Return lines of metrics.jsonl without timings: steps (None), or events of these kinds."""
    found = (r for r in read_metrics(run / "metrics.jsonl") if r.get("event") in events)
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in found]


def newest(found: list[dict[str, Any]]) -> dict[tuple[Any, int], dict[str, Any]]:
    """Keep one record of each step and kind; a step that was done again must be the same."""
    kept: dict[tuple[Any, int], dict[str, Any]] = {}
    for record in found:
        key = record.get("event"), record["step"]
        assert kept.setdefault(key, record) == record
    return kept


def refusal(recipe: Path, *overrides: str, **options: Any) -> str:
    before = sorted(recipe.parent.rglob("*"))
    with pytest.raises(InputError) as error:
        pretrain(
            load_config(recipe, overrides, options.pop("branch_from", None)),
            str(recipe),
            options.pop("resume", False),
        )
    assert sorted(recipe.parent.rglob("*")) == before and "\n" not in str(error.value)
    return str(error.value)
