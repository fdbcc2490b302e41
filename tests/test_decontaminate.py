"""A document is left out exactly where it shares 13 ids in a row with an evaluation set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.dataset import TokenDataset
from fastbert.data.decontaminate import GRAM, LEAST_DIFFERENT, Shared, grams_of, read_texts
from fastbert.data.encode import ChunkEncoder, Documents
from fastbert.data.prepare import prepare
from fastbert.data.sources import find_sources
from fastbert.errors import InputError


class Ids:
    """An encoder whose texts are ids already."""

    def encode(self, texts: list[str]) -> Any:
        parts = [[int(token) for token in text.split()] for text in texts]
        return type("Encoded", (), {"documents": documents_of([part for part in parts if part])})


def documents_of(documents: list[list[int]]) -> Documents:
    """Make documents of sentences of at most 5 tokens."""
    sentences = [[min(5, len(d) - i) for i in range(0, len(d), 5)] for d in documents]
    return Documents(
        np.array([token for d in documents for token in d], np.uint16),
        np.array([length for one in sentences for length in one], np.int64),
        np.array([len(one) for one in sentences], np.int64),
    )


def runs(document: list[int]) -> set[tuple[int, ...]]:
    found = {tuple(document[i : i + GRAM]) for i in range(len(document) - GRAM + 1)}
    return {run for run in found if len(set(run)) >= LEAST_DIFFERENT}


document = st.lists(st.integers(0, 5), min_size=1, max_size=40)


@settings(max_examples=300)
@given(st.lists(document, max_size=5), st.lists(document, min_size=1, max_size=5), st.data())
def test_against_sets_of_runs(
    evaluated: list[list[int]], documents: list[list[int]], data: st.DataObject
) -> None:
    for source in evaluated:  # otherwise hardly any run occurs twice
        begin = data.draw(st.integers(0, len(source)))
        documents[0] = documents[0] + source[begin : begin + data.draw(st.integers(0, 20))]
    grams = grams_of((" ".join(map(str, d)) for d in evaluated), Ids())  # type: ignore[arg-type]
    known = set().union(*map(runs, evaluated))
    assert len(grams) == len(known) and (np.diff(grams.astype(object)) > 0).all()
    wanted = [bool(runs(document) & known) for document in documents]
    assert Shared(grams)(documents_of(documents)).tolist() == wanted


def test_tables_are_read_whole(tmp_path: Path) -> None:
    """All columns of a table may hold text, whatever their names."""
    (tmp_path / "a.tsv").write_text("question\tanswer\nWho?\tNobody.\nWhy?\tNo.\n")
    (tmp_path / "b.jsonl").write_text('{"premise": "One.", "label": 3}\n')
    (tmp_path / "c.txt").write_text("Two.\n\nThree.\n")
    sources, _ = find_sources([tmp_path])
    assert [text.strip() for text in read_texts(sources)] == [
        *("Who?", "Nobody.", "Why?", "No.", "One.", "3", "Two.", "Three.")
    ]


QUESTIONS: list[dict[str, Any]] = [
    {"ctx": "Où ?", "endings": ["Au café.", 'À la "mer".'], "answers": {"text": ["Là."]}},
    {"ctx": "Quand ?", "endings": [], "answers": {"text": []}, "note": "À midi."},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_lists_and_structures_hold_text_too(tmp_path: Path, name: str) -> None:
    """As the choices of a question; also in fields that the first record does not have."""
    file = tmp_path / name
    table = pyarrow.Table.from_pylist(QUESTIONS, pyarrow.Table.from_pylist(QUESTIONS[::-1]).schema)
    if name == "a.jsonl":
        file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    elif name == "a.parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.OSFile(str(file), "wb") as out, pyarrow.ipc.new_file(out, table.schema) as to:
            to.write_table(table)
    sources, _ = find_sources([file])
    assert {text for text in read_texts(sources) if text} == {
        *("Où ?", "Au café.", 'À la "mer".', "Là.", "Quand ?", "À midi.")
    }


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", "question,answer\nWho?,Nobody.\nWhy?,No, never.\n", "line 3: 3 fields, and"),
        ("a.jsonl", '{"question": "Who?"}\n{"question": "Why?"\n', "line 2: not JSON"),
        ("a.jsonl", '{"question": "Who?", "question": "Why?"}\n', "line 1: the field 'question'"),
    ],
)
def test_a_bad_record_of_an_evaluation_set_is_refused(
    tmp_path: Path, english_jsonl: Path, name: str, data: str, words: str
) -> None:
    """Its text would stay unknown, and the dataset would look clean."""
    (tmp_path / name).write_text(data)
    with pytest.raises(InputError, match=f"{name}: {words}"):
        prepare([english_jsonl], tmp_path / "out", vocab_size=400, without=[tmp_path / name])


@pytest.mark.parametrize("kind", ["bert", "bpe"])
def test_documents_are_left_out(
    small_dataset: TokenDataset, english_documents: list[str], tmp_path: Path, kind: str
) -> None:
    """The dataset is that of the text without them; they are counted."""
    sentence = "Zebras rarely borrow seventeen violins from an absent minded librarian in Oslo."
    chosen = english_documents[:100]
    marked = list(chosen)
    for place in (0, 30, 99):
        marked[place] = f"{marked[place]}\n{sentence.upper()} And more."
    rest = [text for i, text in enumerate(chosen) if i not in (0, 30, 99)]
    for name, texts in (("all", marked), ("rest", rest)):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "eval.csv").write_text(f'id,question\n1,"{sentence}"\n2,short\n')
    options: dict[str, Any] = {"progress": False, "workers": 1, "heldout": 0.2}
    options["tokenizer"] = small_dataset.tokenizer_dir
    if kind == "bpe":  # which keeps case: so nothing is equal here
        made = prepare(
            [tmp_path / "all.jsonl"],
            tmp_path / "bpe",
            vocab_size=320,
            algorithm="bpe",
            progress=False,
            without=[tmp_path / "eval.csv"],
        )
        assert made.figures["evaluated_left_out"] == 0
        return
    report = prepare(
        [tmp_path / "all.jsonl"], tmp_path / "a", without=[tmp_path / "eval.csv"], **options
    )
    prepare([tmp_path / "rest.jsonl"], tmp_path / "b", **options)
    assert report.figures["evaluated_left_out"] == 3 and report.figures["documents"] == len(rest)
    (row,) = (row for row in report.rows if "evaluation sets" in row.name)
    assert row.value == "3"
    for name in ("train-00000", "heldout-00000", "blocks"):
        assert (tmp_path / "a/part-00000" / name).read_bytes() == (
            tmp_path / "b/part-00000" / name
        ).read_bytes()
    with pytest.raises(InputError, match="no document with text is left by --without; a dataset"):
        prepare([tmp_path / "rest.jsonl"], tmp_path / "d", without=[tmp_path / "rest.jsonl"],
                **options)  # fmt: skip
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        prepare([tmp_path / "all.jsonl"], tmp_path / "c", without=[tmp_path / "none.txt"])


def test_the_encoder_of_documents_is_that_of_the_text(small_dataset: TokenDataset) -> None:
    tokenizer = (small_dataset.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    text = "The quick brown fox of the language reference jumps over a very lazy parser today."
    encoder = ChunkEncoder(tokenizer, "text")
    shared = Shared(grams_of([text], encoder))
    others = [f"Before it. {text}", text.replace("fox", "dog"), text[:20], text.upper()]
    ids = encoder.encode(others).documents
    # Some thirty ids, so that one other word in the middle leaves runs of 13 behind it.
    assert shared(ids).tolist() == [True, True, False, True]
