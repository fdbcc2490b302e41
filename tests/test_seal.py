"""A part is added to a dataset; what was published is recognised; empty shards leave no trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.data import prepare as module
from fastbert.data import seal, settle
from fastbert.data.baselines import measure
from fastbert.data.dataset import open_dataset
from fastbert.data.encode import hash_text
from fastbert.data.prepare import prepare
from fastbert.errors import InputError
from tests.prepared import files_of, small_pieces

__all__ = ["small_pieces"]

OPTIONS: dict[str, Any] = {"progress": False, "workers": 1}


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.mark.usefixtures("small_pieces")
def test_a_part_is_added(english_documents: list[str], tmp_path: Path) -> None:
    distinct = list(dict.fromkeys(english_documents))
    first = write(tmp_path / "a.jsonl", distinct[:400])
    # The second text repeats documents of the first, held-out ones among them.
    second = write(tmp_path / "b.jsonl", distinct[300:])
    out = tmp_path / "dataset"
    prepare([first], out, vocab_size=500, heldout=0.1, **OPTIONS)
    before = files_of(out)
    report = prepare([second], out, add=True, heldout=0.05, **OPTIONS)
    after = files_of(out)
    assert {n: d for n, d in after.items() if n in before and n != "manifest.json"} == {
        n: d for n, d in before.items() if n != "manifest.json"
    }
    dataset = open_dataset(out, verify=True)
    parts = dataset.manifest["parts"]
    assert [part["heldout_below"] for part in parts] == [int(s * 2**64) for s in (0.1, 0.05)]
    assert report.figures["documents"] == len(distinct) - 300
    total = sum(part["splits"][n]["documents"] for part in parts for n in ("train", "heldout"))
    assert total == len(distinct) + 100
    # No held-out document has a copy in the training text of any part.
    held = {h for h in map(hash_text, distinct[:400]) if h < int(0.1 * 2**64)}
    again = {h for h in map(hash_text, distinct[300:]) if h < int(0.05 * 2**64) or h in held}
    assert parts[1]["splits"]["heldout"]["documents"] == len(again)
    found = [np.load(out / f"part-0000{i}/heldout-hashes.npy").tolist() for i in range(2)]
    assert found == [sorted(held), sorted(again)]
    train, heldout = dataset.split("train"), dataset.split("heldout")
    assert dataset.baselines == measure(train, heldout, dataset.vocab_size)
    with pytest.raises(InputError, match="part-00001 has exactly this text already"):
        prepare([second], out, add=True, heldout=0.05, **OPTIONS)
    assert files_of(out) == after
    nothing = write(tmp_path / "nothing.jsonl", [" ", ""])
    with pytest.raises(InputError, match="no document with text; there is nothing to add"):
        prepare([nothing], out, add=True, **OPTIONS)
    assert files_of(out) == after and not (tmp_path / "dataset.work").exists()
    # Only copies of held-out documents: a part without training text.
    copies = [text for text in distinct[:400] if hash_text(text) in held]
    prepare([write(tmp_path / "c.jsonl", copies)], out, add=True, **OPTIONS)
    splits = open_dataset(out, verify=True).manifest["parts"][2]["splits"]
    assert splits["train"] == {"documents": 0, "sentences": 0, "tokens": 0, "shards": []}
    assert splits["heldout"]["documents"] == len(copies)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 5000}, "--vocab-size: --add uses the tokenizer of"),
        ({"tokenizer": "x"}, "--tokenizer: --add uses"),
        ({"lowercase": False}, "--cased: --add uses"),
        ({}, "no dataset; make it first, without --add"),
    ],
)
def test_wrong_additions(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    source = write(tmp_path / "a.jsonl", ["One.", "Two."])
    with pytest.raises(InputError, match=words):
        prepare([source], tmp_path / "dataset", add=True, **options, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_changed_tokenizer_gets_no_part(small_dataset: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_dataset.path, tmp_path / "copy"))
    file = copy / "tokenizer/tokenizer.json"
    file.write_text(file.read_text() + " ")
    source = write(tmp_path / "a.jsonl", ["One.", "Two."])
    with pytest.raises(InputError, match=r"tokenizer\.json: not the file that .* names"):
        prepare([source], copy, add=True, **OPTIONS)


def test_format_2_gets_no_part(old_dataset: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(old_dataset.path, tmp_path / "old")
    source = write(tmp_path / "a.jsonl", ["One.", "Two."])
    with pytest.raises(InputError, match="not the manifest of a dataset in format 3"):
        prepare([source], copy, add=True, **OPTIONS)


@pytest.mark.parametrize("add", [False, True])
def test_killed_after_the_dataset_had_its_name(
    english_documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add: bool
) -> None:
    source, out = write(tmp_path / "a.jsonl", english_documents[:200]), tmp_path / "dataset"
    options = {**OPTIONS} if add else {**OPTIONS, "vocab_size": 300}
    if add:
        prepare([source], out, vocab_size=300, **OPTIONS)
        source = write(tmp_path / "b.jsonl", english_documents[200:400])

    def killed(work: Path) -> None:
        for path in work.glob("piece-*"):
            path.unlink()
        raise MemoryError

    monkeypatch.setattr(module, "remove_work", killed)
    with pytest.raises(MemoryError):
        prepare([source], out, add=add, **options)
    monkeypatch.undo()
    made = files_of(out)
    report = prepare([source], out, add=add, **options)
    assert files_of(out) == made and not (tmp_path / "dataset.work").exists()
    part = out / f"part-0000{int(add)}"
    assert json.loads((part / "report.json").read_text())["tokens"] == report.figures["tokens"]
    assert (part / "report.md").read_text() == report.markdown()


def test_the_dataset_changed_meanwhile(
    english_documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts are added at once: the second call says so, and finishes when it is run again."""
    sources = [
        write(tmp_path / f"{i}.jsonl", english_documents[100 * i : 100 * i + 100]) for i in range(3)
    ]
    out = tmp_path / "dataset"
    prepare([sources[0]], out, vocab_size=300, **OPTIONS)
    other = shutil.copytree(out, tmp_path / "other")
    prepare([sources[1]], other, add=True, **OPTIONS)
    real = seal._old_manifest

    def changed(job: Any) -> Any:
        shutil.copytree(other / "part-00001", out / "part-00001")
        shutil.copy(other / "manifest.json", out / "manifest.json")
        return real(job)

    monkeypatch.setattr(seal, "_old_manifest", changed)
    with pytest.raises(InputError, match="changed meanwhile; run the same command again"):
        prepare([sources[2]], out, add=True, **OPTIONS)
    monkeypatch.undo()
    prepare([sources[2]], out, add=True, **OPTIONS)
    dataset = open_dataset(out, verify=True)
    assert len(dataset.manifest["parts"]) == 3
    assert dataset.split("train").documents + dataset.split("heldout").documents == 300


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shard_bytes", [1, 60_000])
def test_shards_without_text_leave_no_trace(
    english_documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    """Where all documents of a shard are copies of others, the next shards are renumbered."""
    monkeypatch.setattr(settle, "SHARD_BYTES", shard_bytes)
    source = write(tmp_path / "a.jsonl", english_documents[:100] * 6 + english_documents)
    out = tmp_path / "dataset"
    report = prepare([source], out, vocab_size=300, drop_copies=True, **OPTIONS)
    dataset = open_dataset(out, verify=True)
    assert report.figures["documents"] == len(set(map(str.strip, english_documents)))
    sizes = dataset.manifest["parts"][0]["splits"]["train"]["shards"]
    assert len(sizes) > 1 and min(sizes) > 0
    assert len(list((out / "part-00000").glob("train-*"))) == len(sizes)
