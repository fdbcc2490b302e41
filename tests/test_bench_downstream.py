"""The fine-tuning benchmark runs to its end on small files.

It selects by the held-out part, and splits its texts by title.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_bert import make_hugging_face_folder, make_run

from benchmarks.harness.record import read_record
from benchmarks.quality.bench_downstream import (
    PRETRAINED,
    SCRATCH,
    SEARCH_SEED,
    WORDS,
    main,
    searched,
    sides,
)

ROOT = Path(__file__).parents[1]
RECORDED = "benchmarks/results/amd-epyc-2-cores/downstream.json"


@pytest.fixture(scope="module")
def texts(english_documents, tmp_path_factory) -> Path:
    """Two tasks on the Python language reference: whether a text is about strings or classes."""
    folder = tmp_path_factory.mktemp("labelled")
    for task, word in (("topics", "string"), ("films", "class")):
        rows = [
            {"text": text[:200], "label": str(word in text)}
            for text in english_documents
            if len(text) > 80
        ]
        for part, some in (("train", rows[:240]), ("test", rows[240:300])):
            (folder / f"{task}-{part}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in some)
            )
    (folder / "pretrain.jsonl").touch()  # the model is given
    return folder


@pytest.fixture
def one_core() -> Iterator[None]:
    """Only one core, so that only one process imports torch for the trials."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "none"], "none: no such model"),
        (["--data", "none"], "--data none: no dataset to pre-train on"),
        (
            ["--model", ".", "--beside", "docs", "--beside", "from scratch"],
            "from scratch: no such model",
        ),
        (["--record", "downstream.json"], "--record measures only the models of --beside"),
        (["--record", "none.json", "--beside", "docs"], "--record none.json: no such file"),
        (
            ["--record", "README.md", "--beside", "docs"],
            "--record README.md: not a downstream.json",
        ),
        (
            ["--record", str(Path(RECORDED).with_name("kernels.json")), "--beside", "docs"],
            "kernels.json: not a downstream.json",
        ),
        (
            ["--model", ".", "--beside", "docs", "--beside", "fastbert/../docs"],
            "--beside fastbert/../docs: there is already a side named 'docs'",
        ),
        (
            [
                "--model",
                ".",
                *(
                    x
                    for name in ("docs", "examples", "kernels", "fastbert")
                    for x in ("--beside", name)
                ),
            ],
            "--beside fastbert: 7 sides, but the figure can show at most 6",
        ),
        (
            ["--record", RECORDED, "--beside", "docs"],
            f"--record {RECORDED}: was measured with other settings, or with other texts than",
        ),
    ],
)
def test_bad_input(arguments, message, texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["bench_downstream", str(texts), "--out", str(out), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and message in capsys.readouterr().err and not out.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_core")
def test_it_runs_to_its_end(texts, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def bench(*arguments: object) -> None:
        command = ["bench_downstream", texts, "--quick", *arguments]
        monkeypatch.setattr("sys.argv", list(map(str, command)))
        main()

    model = make_run(
        tmp_path / "run",
        make_hugging_face_folder(tmp_path / "hf", small_dataset.tokenizer_dir),
        str(small_dataset.path),
    )
    shutil.copytree(model, tmp_path / "another")
    bench("--out", tmp_path, "--model", model, "--beside", tmp_path / "another")
    record, page = (
        read_record(tmp_path / "downstream.json"),
        (tmp_path / "downstream.md").read_text(),
    )
    trials = [row for row in record.rows if row["part"] == "trial"]
    measured = [row for row in trials if row["seed"] != SEARCH_SEED]
    assert {(row["task"], row["side"]) for row in measured} == {
        (t, s) for t in ("topics", "films") for s in sides(record.rows)
    }
    assert sides(record.rows) == [WORDS, SCRATCH, PRETRAINED, "another"]
    assert all(0 <= row["test_accuracy"] <= 1 and 0 <= row["heldout"] <= 1 for row in trials)
    pretrained, another = (
        [(r["task"], r["test_accuracy"]) for r in measured if r["side"] == side]
        for side in (PRETRAINED, "another")
    )
    assert pretrained == another  # the same model, examples and seed
    assert (
        tmp_path / "downstream.png"
    ).stat().st_size > 10_000 and "| encyclopedia topics | 100 |" in page

    shutil.copytree(model, tmp_path / "later")
    before = tmp_path / "downstream.json"
    bench("--out", tmp_path / "more", "--record", before, "--beside", tmp_path / "later")
    more = read_record(tmp_path / "more/downstream.json").rows
    assert sides(more) == [*sides(record.rows), "later"]
    # It is not measured again.
    assert [row for row in more if row.get("side") != "later"] == list(record.rows)
    later = [
        (r["task"], r["test_accuracy"])
        for r in more
        if r["part"] == "trial" and r["side"] == "later" and r["seed"] != SEARCH_SEED
    ]
    assert later == another


def test_the_rate_is_the_one_that_was_best_on_the_held_out_part():
    tried = itertools.product((SCRATCH, PRETRAINED), (1e-3, 1e-4))
    rows = [
        {"task": "topics", "side": side, "lr": lr, "heldout": score, "test_accuracy": 1 - score}
        for (side, lr), score in zip(tried, (0.5, 0.6, 0.9, 0.2), strict=True)
    ]
    assert searched(rows) == {("topics", SCRATCH): 1e-4, ("topics", PRETRAINED): 1e-3}


def test_a_fifth_of_the_titles_is_for_testing(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    spec = importlib.util.find_spec("labelled_texts")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chosen = [module.is_test(f"title {i}") for i in range(5000)]
    assert 0.18 < sum(chosen) / len(chosen) < 0.22
    assert chosen[:3] == [module.is_test(f"title {i}") for i in range(3)]
