"""From text to a dataset: complete, reproducible and never partial."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert import progress
from fastbert.data import corpus_plan, segments, settle
from fastbert.data import prepare as module
from fastbert.data.copies import Seen
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.documents import read_documents
from fastbert.data.encode import LONGEST_SENTENCE, ChunkEncoder, hash_text
from fastbert.data.prepare import prepare
from fastbert.data.sentences import split_sentences
from fastbert.data.split import Split
from fastbert.data.tokenizer import load_tokenizer
from fastbert.errors import InputError
from fastbert.machine import usable_cores
from tests.tiers import slow


@pytest.fixture(scope="module")
def several_chunks(english_documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 2.6 MB, which has several chunks."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": f"Copy {i}. {document}"}) + "\n"
            for i in range(6)
            for document in english_documents
        )
    )
    return path


def texts_of(split: Split) -> list[list[list[int]]]:
    """Return all ids of a split as [document][sentence][token]."""
    sentences = split.first_token(np.arange(split.sentences + 1))
    documents = split.first_sentence(np.arange(split.documents + 1))
    tokens = split.gather(np.zeros(1, np.int64), np.array([split.tokens])).tolist()
    cut = [tokens[a:b] for a, b in itertools.pairwise(sentences)]
    return [cut[a:b] for a, b in itertools.pairwise(documents)]


def files_of(dataset: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(dataset)): path.read_bytes()
        for path in sorted(dataset.rglob("*"))
        if path.is_file()
    }


REPORTS = {"manifest.json", "part-00000/report.json", "part-00000/report.md"}


def test_every_sentence_is_there(small_dataset: TokenDataset, english_documents: list[str]) -> None:
    """Compare with the plain way: split, encode one by one, choose by hash."""
    tokenizer = load_tokenizer(small_dataset.tokenizer_dir)
    expected: dict[str, list[list[list[int]]]] = {"train": [], "heldout": []}
    for document in english_documents:
        ids = [
            tokenizer.encode(sentence, add_special_tokens=False).ids
            for sentence in split_sentences(document)
        ]
        pieces = [
            sentence[i : i + LONGEST_SENTENCE]
            for sentence in ids
            for i in range(0, len(sentence), LONGEST_SENTENCE)
        ]
        if pieces:
            expected["heldout" if hash_text(document) < 0.05 * 2**64 else "train"].append(pieces)
    # Otherwise the share alone would not decide.
    assert len(expected["heldout"]) >= settle.LEAST_HELDOUT
    for name, documents in expected.items():
        assert texts_of(small_dataset.split(name)) == documents


def test_the_same_bytes_whatever_the_workers(several_chunks: Path, tmp_path: Path) -> None:
    made = []
    for workers in (1, 3):
        out = tmp_path / f"dataset{len(made)}"
        prepare([several_chunks], out, vocab_size=2000, workers=workers, progress=False)
        made.append(files_of(out))
    assert made[0] == made[1]
    dataset = open_dataset(tmp_path / "dataset1", verify=True)
    splits = dataset.manifest["parts"][0]["splits"]
    assert sum(split["documents"] for split in splits.values()) > 4000
    text = json.dumps(dataset.manifest)
    assert str(tmp_path) not in text and str(several_chunks) not in text


def test_formats_make_the_same_dataset(english_documents: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(english_documents))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"body": document}) + "\n" for document in english_documents)
    )
    for name in ("txt", "jsonl"):
        prepare(
            [tmp_path / f"a.{name}"],
            tmp_path / name,
            vocab_size=1000,
            text_field="body",
            workers=1,
            progress=False,
        )
    made = [files_of(tmp_path / name) for name in ("txt", "jsonl")]
    # The report says what ends a document, and the manifest has its hash.
    different = {name for name in made[0] if made[0][name] != made[1][name]}
    assert different <= REPORTS
    assert b"a blank line ends a document" in made[0]["part-00000/report.md"]
    assert b"a blank line" not in made[1]["part-00000/report.md"]


def test_given_tokenizer(small_dataset: TokenDataset, english_jsonl: Path, tmp_path: Path) -> None:
    report = prepare(
        [english_jsonl],
        tmp_path / "dataset",
        tokenizer=small_dataset.tokenizer_dir,
        heldout=0.05,
        workers=1,
        progress=False,
    )
    dataset = open_dataset(tmp_path / "dataset", verify=True)
    made, wanted = files_of(dataset.path), files_of(small_dataset.path)
    assert made["part-00000/train-00000"] == wanted["part-00000/train-00000"]
    assert made["part-00000/blocks"] == wanted["part-00000/blocks"]
    assert report.figures["vocab_size"] == 1000
    assert "lowercase" not in dataset.manifest["parts"][0]["options"]


def test_long_sentences_are_cut_and_nothing_is_lost(small_dataset: TokenDataset) -> None:
    lengths = [1, 253, 254, 255, 508, 509, 1000]
    tokenizer = (small_dataset.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    data = "\n".join("a " * length for length in lengths).encode() + b"\n\n\x00\x01\n\n."
    encoded = ChunkEncoder(tokenizer, "text").encode(data.decode().split("\n\n"))
    made = encoded.documents
    assert made.sentences.tolist() == [
        1,
        253,
        254,
        254,
        1,
        254,
        254,
        254,
        254,
        1,
        254,
        254,
        254,
        238,
        1,
    ]
    assert made.documents.tolist() == [14, 1]
    assert len(made.tokens) == sum(lengths) + 1
    assert (encoded.cut_sentences, encoded.empty_documents) == (4, 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_copies_are_left_out(
    several_chunks: Path, small_dataset: TokenDataset, tmp_path: Path, workers: int
) -> None:
    """The dataset is that of the same text without the copies, of which the first one stays.

    The tokenizer is given: a vocabulary is trained on a sample in which copies count.
    """
    lines = list(dict.fromkeys(several_chunks.read_text().splitlines()[:1500]))
    empty = json.dumps({"text": " "})
    padded = [json.dumps({"text": f"\n{json.loads(line)['text']} "}) for line in lines]
    (tmp_path / "once.jsonl").write_text("\n".join([*lines[:700], empty, *lines[700:], empty]))
    text = [*lines[:700], empty, *padded[10:600], *lines[300:], empty, *lines[::3]]
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.jsonl").write_text("\n".join(text))
    (tmp_path / "more/b.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {"heldout": 0.1, "workers": workers, "progress": False}
    options["tokenizer"] = small_dataset.tokenizer_dir
    report = prepare([tmp_path / "more"], tmp_path / "once", drop_copies=True, **options)
    plain = prepare([tmp_path / "once.jsonl"], tmp_path / "plain", **options)
    made, wanted = files_of(tmp_path / "once"), files_of(tmp_path / "plain")
    assert made.keys() == wanted.keys()
    differ = {name for name in made if made[name] != wanted[name]}
    assert differ == REPORTS
    assert report.figures["documents"] == plain.figures["documents"] == len(lines)
    assert report.figures["copies_left_out"] == len(text) - 2
    assert report.figures["empty_documents"] == plain.figures["empty_documents"] == 2
    assert "copies_left_out" not in plain.figures
    (row,) = (row for row in report.rows if row.name.startswith("copies of documents"))
    assert row.value == f"{report.figures['copies_left_out']:,}" and not row.advice
    assert open_dataset(tmp_path / "once").manifest["parts"][0]["options"]["drop_copies"]


def test_copies_are_counted_without_bad_records(tmp_path: Path) -> None:
    texts = ["One is here.", None, "Two is here.", "One is here.", 3, "Two is here.", "Three."]
    text = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(text.replace('{"text": 3}', "rubbish"))
    options = {"vocab_size": 100, "workers": 1, "progress": False}
    report = prepare(
        [tmp_path / "a.jsonl"], tmp_path / "d", bad_records="skip", drop_copies=True, **options
    )
    figures = report.figures
    assert (figures["documents"], figures["copies_left_out"], figures["bad_records"]) == (3, 2, 1)


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=20))
def test_the_first_of_equal_hashes(chunks: list[list[int]]) -> None:
    seen, before, found = Seen(), set[int](), list[bool]()
    wanted = list[bool]()
    for chunk in chunks:
        found += seen.add(np.array(chunk, np.uint64)).tolist()
        for value in chunk:
            wanted.append(value not in before)
            before.add(value)
    assert found == wanted
    assert sum(map(len, seen._runs)) == len(before)  # 8 bytes for each, and nothing else


def test_copies_are_on_one_side(english_documents: list[str], tmp_path: Path) -> None:
    documents = [*english_documents, *reversed(english_documents), *english_documents[::2]]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in documents)
    )
    report = prepare(
        [tmp_path / "a.jsonl"],
        tmp_path / "dataset",
        vocab_size=500,
        heldout=0.3,
        workers=1,
        progress=False,
    )
    dataset = open_dataset(tmp_path / "dataset")
    sides = [
        {json.dumps(document) for document in texts_of(dataset.split(name))}
        for name in ("train", "heldout")
    ]
    assert sides[1] and not sides[0] & sides[1]
    (row,) = (row for row in report.rows if row.name == "copies of documents")
    assert (
        row.value.endswith(" %; none on both sides of the split") and "--drop-copies" in row.advice
    )
    distinct = len(set(map(str.strip, english_documents)))
    assert report.figures["duplicate_document_share"] == pytest.approx(
        1 - distinct / len(documents), abs=1e-6
    )
    assert report.figures["heldout_documents"] / len(documents) == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize(("count", "heldout"), [(2, 1), (3, 1), (8, 2), (63, 15), (200, 16)])
def test_little_text_is_held_out_too(tmp_path: Path, count: int, heldout: int) -> None:
    (tmp_path / "a.txt").write_text(
        "\n".join(f"This is the document number {i}. It is short." for i in range(count))
    )
    report = prepare(
        [tmp_path / "a.txt"],
        tmp_path / "dataset",
        vocab_size=120,
        text_format="lines",
        heldout=1e-9,
        workers=1,
        progress=False,
    )
    assert (report.figures["heldout_documents"], report.figures["documents"]) == (heldout, count)
    prepare(
        [tmp_path / "a.txt"],
        tmp_path / "half",
        vocab_size=120,
        text_format="lines",
        heldout=0.5,
        workers=1,
        progress=False,
    )
    assert all(
        open_dataset(tmp_path / "half").split(name).documents for name in ("train", "heldout")
    )


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("a\n\nb", {"heldout": 0.0}, ["--heldout 0.0", "above 0"]),
        ("a\n\nb", {"heldout": 0.6}, ["--heldout 0.6", "0.5"]),
        ("a\n\nb", {"workers": 0}, ["--workers 0", "1 or more"]),
        ("a\n\nb", {"vocab_size": 5}, ["--vocab-size 5", "100"]),
        ("a\n\nb", {"text_format": "doc"}, ["doc", "jsonl"]),
        ("a\n\nb", {"tokenizer": "nowhere"}, ["nowhere", "no such tokenizer"]),
        (" \n\n \n", {}, ["every document is empty"]),
        (" \n\n \n", {"tokenizer": True}, ["a.txt", "no document with text"]),
        (
            "One.\n\nOne.\n",
            {},
            [
                "a.txt",
                "one distinct document",
                "at least two",
                "a blank line between",
                "--format lines",
            ],
        ),
        ("", {"tokenizer": True}, ["a.txt", "is empty"]),
        (b"good\n\n\xff", {}, ["a.txt", "line 3", "not UTF-8"]),
        (b"good\n\n\xff", {"tokenizer": True, "workers": 2}, ["a.txt", "line 3", "not UTF-8"]),
    ],
)
def test_bad_calls(
    small_dataset: TokenDataset,
    tmp_path: Path,
    text: str | bytes,
    options: dict[str, Any],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    if options.get("tokenizer") is True:
        options = {**options, "tokenizer": small_dataset.tokenizer_dir}
    with pytest.raises(InputError) as raised:
        prepare([tmp_path / "a.txt"], tmp_path / "dataset", **{"progress": False, **options})
    message = str(raised.value)
    assert all(word in message for word in words) and "\n" not in message, message
    # What was finished before the text turned out to be wrong is kept, and announced.
    left = {path.name for path in tmp_path.iterdir()} - {"a.txt"}
    said = "dataset.work: holds what is finished; run the same command again to continue"
    assert left <= {"dataset.work"} and (said in capsys.readouterr().err) == bool(left)
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_a_target_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder may be a dataset, to which text is added."""
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n\nThree.\n")
    options: dict[str, Any] = {"workers": 1, "progress": False}
    prepare([tmp_path / "a.txt"], tmp_path / "data/set", vocab_size=120, **options)
    monkeypatch.chdir(tmp_path / "data/set")
    for out in (".", "..", "/"):
        with pytest.raises(InputError, match=r"exists already|the root of the file system"):
            prepare([tmp_path / "a.txt"], out, **options)
    (tmp_path / "b.txt").write_text("Four.\n\nFive.\n")
    prepare([tmp_path / "b.txt"], ".", add=True, **options)
    assert len(open_dataset(tmp_path / "data/set").manifest["parts"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "data"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["set"]


def test_existing_target(english_jsonl: Path, tmp_path: Path) -> None:
    for name, make in [
        ("file", Path.touch),
        ("folder", Path.mkdir),
        ("link", lambda path: path.symlink_to("nowhere")),
    ]:
        make(tmp_path / name)
        with pytest.raises(
            InputError, match=f"{name}: exists already; remove it or choose another --out"
        ):
            prepare([english_jsonl], tmp_path / name, progress=False)
    with pytest.raises(InputError, match="file/dataset: cannot be written"):
        prepare([english_jsonl], tmp_path / "file" / "dataset", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize("limit", [1000, 200_000])
def test_no_space(english_jsonl: Path, tmp_path: Path, limit: int) -> None:
    """The system limits file sizes: for the tokenizer, or for the tokens."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(InputError, match="dataset: no space left") as raised:
            prepare(
                [english_jsonl], tmp_path / "dataset", vocab_size=1000, workers=1, progress=False
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"dataset.work"}
    # With space again, the same call finishes.
    options: dict[str, Any] = {"vocab_size": 1000, "workers": 1, "progress": False}
    prepare([english_jsonl], tmp_path / "dataset", **options)
    prepare([english_jsonl], tmp_path / "at once", **options)
    assert files_of(tmp_path / "dataset") == files_of(tmp_path / "at once")
    assert not (tmp_path / "dataset.work").exists()


def test_a_folder_without_the_right_to_write(english_jsonl: Path, tmp_path: Path) -> None:
    """Root may write anywhere, but not where a user namespace does not know its number."""
    (tmp_path / "closed").mkdir(mode=0o500)
    unprivileged = ["unshare", "--user"] if os.geteuid() == 0 else []
    if unprivileged and subprocess.run([*unprivileged, "true"], capture_output=True).returncode:
        pytest.skip("root may write anywhere, and there are no user namespaces here")
    out = tmp_path / "closed" / "dataset"
    command = [sys.executable, "-m", "fastbert", "prepare", english_jsonl, "--out", out]
    done = subprocess.run([*unprivileged, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and f"{out}: cannot be written" in done.stderr, done.stderr
    assert not list((tmp_path / "closed").iterdir())


# Text of 2.6 MB makes some twelve pieces here.
RUN = (
    "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # as it is without nohup
    "import sys; from fastbert.data import corpus_plan; corpus_plan.PIECE_BYTES = 1 << 18; "
    "from fastbert.data import segments; segments.SEGMENT_BYTES = 1 << 16; "
    "from fastbert.data.prepare import prepare; "
    "prepare([sys.argv[1]], sys.argv[2], workers=3, vocab_size=8000)"
)


def started(
    text: Path, out: Path, until: Callable[[], bool]
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start RUN, and wait until a condition is met and its two other workers are there."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, text, out],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        workers = []
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                if "data.workers" in " ".join(child.cmdline()):
                    workers.append(child)
        if len(workers) == 2 and until():
            break
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[1]
    return process, workers


def pieces_in(work: Path) -> dict[str, int]:
    """Return the finished pieces, with the time when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in work.glob("piece-*.npz")}


@pytest.mark.parametrize(
    "end", [slow("interrupt"), slow("SIGTERM"), slow("SIGHUP"), slow("SIGQUIT"), "worker killed"]
)
def test_ended_from_outside(several_chunks: Path, tmp_path: Path, end: str) -> None:
    """After Ctrl-C, a signal or a killed worker the next run uses what is finished."""
    work = tmp_path / "dataset.work"
    process, workers = started(
        several_chunks, tmp_path / "dataset", lambda: len(pieces_in(work)) >= 2
    )
    if end == "interrupt":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    elif end == "worker killed":
        workers[0].kill()
    else:
        process.send_signal(signal.Signals[end])
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    if end.startswith("SIG"):
        assert process.returncode == 128 + signal.Signals[end]
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.work"]
    assert not psutil.wait_procs(workers, timeout=60)[1]
    expected = {
        "interrupt": "KeyboardInterrupt",
        "worker killed": "InputError: a worker ended before its work was done",
    }
    assert expected.get(end, "") in errors and ("Traceback" in errors) == (end in expected)
    assert f"{work}: holds what is finished; run the same command again" in errors
    before = pieces_in(work)
    assert before
    process, _ = started(several_chunks, tmp_path / "dataset", lambda: True)
    assert all(pieces_in(work)[name] == time for name, time in before.items())
    assert process.wait(timeout=120) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]
    open_dataset(tmp_path / "dataset", verify=True)


def test_no_orphans(several_chunks: Path, tmp_path: Path) -> None:
    """After SIGKILL no worker is left."""
    process, workers = started(several_chunks, tmp_path / "dataset", lambda: True)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.work"]


def test_progress_and_left_out_files(
    english_jsonl: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(english_jsonl.read_bytes())
    (folder / "b.md").write_text("x")
    (folder / "c.json").write_text('[{"text": "x"}]')
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    prepare([folder], tmp_path / "dataset", vocab_size=500, workers=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"left out (unknown suffix): 1: {folder / 'b.md'}" in captured.err
    assert f"--format json reads it): 1: {folder / 'c.json'}" in captured.err
    assert re.search(r"^prepare: training the vocabulary, \d+ s$", captured.err, re.MULTILINE)
    assert re.search(
        r"^prepare: documents, sentences, tokens, \d+ %, \d+ s$", captured.err, re.MULTILINE
    )
    assert (
        sum(1 for _ in read_documents([folder]))
        == open_dataset(tmp_path / "dataset").split("train").documents + 16
    )


@pytest.mark.parametrize("change", ["grows", "other text of the same size", "goes away"])
def test_a_source_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Otherwise vocabulary and tokens would come from different texts."""
    path = tmp_path / "a.txt"
    path.write_text("One text.\n\nAnother one.\n")
    os.utime(path, ns=(1, 1))

    train = module.train_vocabulary

    def train_and_change(*arguments: Any) -> None:
        train(*arguments)
        if change == "grows":
            path.write_text(path.read_text() + "\n\nMore.\n")
        elif change == "goes away":
            path.unlink()
        else:
            path.write_text("One thing.\n\nAnother on.\n")

    monkeypatch.setattr(module, "train_vocabulary", train_and_change)
    with pytest.raises(InputError, match=r"a\.txt: (changed while it was read|cannot be read)"):
        prepare([path], tmp_path / "out", vocab_size=100, workers=1, progress=False)
    assert not (tmp_path / "out").exists()


def test_many_workers_are_no_more_than_a_few_per_core(
    english_jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    real = module.map_in_order

    def counted(make: Any, arguments: Any, items: Any, workers: int, advance: Any) -> Any:
        started.append(workers)
        return real(make, arguments, items, 1, advance)

    monkeypatch.setattr(module, "map_in_order", counted)
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1 << 14)
    monkeypatch.setattr(corpus_plan, "PIECE_BYTES", 1 << 14)
    for workers in (100_000, 2, None):
        out = tmp_path / str(workers)
        prepare([english_jsonl], out, vocab_size=200, workers=workers, progress=False)
    assert max(started) == min(module.MOST_PER_CORE * usable_cores(), 30)
    assert 2 in started and started[-1] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records(english_documents: list[str], tmp_path: Path, workers: int) -> None:
    """The dataset is the same without the bad records, and the report counts and quotes them."""
    good = [json.dumps({"text": document}) for document in english_documents[:100]]
    bad = ['{"text": ', "[]", '{"body": ""}', '{"text": 1}']
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    (tmp_path / "bad.jsonl").write_text("\n".join([*good[:50], *bad, *good[50:]]))
    options: dict[str, Any] = {"vocab_size": 300, "progress": False, "workers": workers}
    with pytest.raises(InputError, match=r"line 51: not JSON.*--bad-records skip"):
        prepare([tmp_path / "bad.jsonl"], tmp_path / "no", **options)
    prepare([tmp_path / "good.jsonl"], tmp_path / "good", **options)
    report = prepare([tmp_path / "bad.jsonl"], tmp_path / "bad", bad_records="skip", **options)
    made = [files_of(tmp_path / name) for name in ("good", "bad")]
    assert {n for n in made[0] if made[0][n] != made[1][n]} == REPORTS
    assert report.figures["bad_records"] == 4
    listed = report.figures["bad_records_listed"]
    assert [record["line"] for record in listed] == [51, 52, 53, 54]
    assert {record["file"] for record in listed} == {str(tmp_path / "bad.jsonl")}
    assert listed[0]["reason"].startswith("not JSON")
    with pytest.raises(InputError, match="--bad-records maybe: must be error or skip"):
        prepare([tmp_path / "good.jsonl"], tmp_path / "no", bad_records="maybe", **options)


@pytest.mark.parametrize("segment", [300, 1 << 20])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_number_of_bad_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, segment: int
) -> None:
    """Two may be skipped, and three are an error, also where each is in a piece of its own."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", segment)
    monkeypatch.setattr(corpus_plan, "PIECE_BYTES", segment)
    lines = [json.dumps({"text": f"This is the text number {i}. It is short."}) for i in range(60)]
    for line in (7, 30, 50):
        lines[line] = f"bad {line}"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {"vocab_size": 120, "progress": False, "workers": workers}
    with pytest.raises(InputError, match="bad records") as raised:
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", bad_records=2, **options)
    assert not (tmp_path / "out").exists() and "\n" not in str(raised.value)
    report = prepare([tmp_path / "a.jsonl"], tmp_path / "out", bad_records="3", **options)
    assert report.figures["bad_records"] == 3 and report.figures["documents"] == 57
    lines_of = [record["line"] for record in report.figures["bad_records_listed"]]
    assert lines_of == [8, 31, 51]
    assert "line 8: not JSON" in (tmp_path / "out/part-00000/report.md").read_text()
