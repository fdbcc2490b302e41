"""BERT against ModernBERT: the tables, and the fine-tuning of every pre-trained model."""

from __future__ import annotations

import shutil

import pytest
from tiny_bert import make_hugging_face_folder, make_run

from benchmarks.quality.bench_architectures import (
    EXAMPLES,
    MODELS,
    architectures_table,
    fine_tuned,
    tasks_table,
)
from benchmarks.quality.bench_downstream import QUICK, SEARCH_SEED, TASKS
from tests.test_bench_downstream import one_core as one_core
from tests.test_bench_downstream import texts as texts


def test_each_table_has_its_own_rows():
    pretrained = {
        "part": "pre-training",
        "side": "BERT",
        "seed": 1,
        "minutes": 4.0,
        "steps": 3000,
        "tokens": 5_500_000,
        "loss_mlm": 3.25,
        "loss_mask_token": 3.5,
    }
    rows = [
        pretrained,
        {"part": "task", "task": "topics", "majority": 0.25},
        *(
            {
                "part": "trial",
                "task": "topics",
                "side": side,
                "seed": seed,
                "examples": examples,
                "lr": 1e-3,
                "test_accuracy": accuracy,
            }
            for side, seed, examples, accuracy in [
                ("BERT", SEARCH_SEED, None, 0.99),
                ("BERT", 1, EXAMPLES, 0.7),
                ("BERT", 2, EXAMPLES, 0.8),
                ("ModernBERT", 1, EXAMPLES, 0.6),
                ("ModernBERT", 2, EXAMPLES, 0.6),
            ]
        ),
    ]
    assert architectures_table(rows).splitlines()[2:] == [
        "| 1 | BERT | 4 | 3,000 | 5.5 M | 3.250 | 3.500 |"
    ]
    assert tasks_table(rows).splitlines()[2:] == [
        "| encyclopedia topics | 25.0% | BERT | 0.001 | 70.0% | 80.0% | 75.0% ± 7.1% |",
        "| encyclopedia topics | 25.0% | ModernBERT | 0.001 | 60.0% | 60.0% | 60.0% ± 0.0% |",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("one_core")
def test_every_model_is_fine_tuned_on_both_tasks(texts, small_dataset, tmp_path):
    model = make_run(
        tmp_path / "run",
        make_hugging_face_folder(tmp_path / "hf", small_dataset.tokenizer_dir),
        str(small_dataset.path),
    )
    for side in MODELS:
        for seed in (1, 2):
            shutil.copytree(model, tmp_path / f"architectures/{side}-{seed}")
    rows = fine_tuned(texts, [1, 2], tmp_path, QUICK)
    found = {
        (row["task"], row["seed"], row["side"]): row["test_accuracy"]
        for row in rows
        if row["part"] == "trial" and row["seed"] != SEARCH_SEED
    }
    assert set(found) == {(t, seed, side) for t in TASKS for seed in (1, 2) for side in MODELS}
    assert all(found[t, s, "BERT"] == found[t, s, "ModernBERT"] for t in TASKS for s in (1, 2))
    assert fine_tuned(texts, [1, 2], tmp_path, QUICK) == rows  # kept, and not trained again
