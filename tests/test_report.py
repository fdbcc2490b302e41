"""The report's figures agree with counts by hand, and warnings appear only where they should."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from rich.console import Console

from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.encode import LONGEST_SENTENCE, ChunkEncoder, Documents, hash_spans
from fastbert.data.encoder import Losses
from fastbert.data.prepare import prepare
from fastbert.data.report import (
    About,
    CorpusStats,
    DuplicateEstimator,
    Report,
    TextStats,
    make_report,
)

BASELINES = {"unigram": 6.0, "train_tokens": 10}


def bad(line: int, reason: str) -> dict[str, Any]:
    return {"file": "a", **({"line": line} if line else {}), "reason": reason}


class Chunk(NamedTuple):
    """Documents of both splits, and counts of the text."""

    train: Documents
    heldout: Documents
    text: TextStats
    hashes: np.ndarray
    bad: list[dict[str, Any]]


def chunk(
    documents: list[list[int]],
    heldout: list[list[int]] | None = None,
    unknown: int = 0,
    same: bool = False,
    hashes: np.ndarray | None = None,
    bad: Sequence[dict[str, Any]] = (),
    **options: Any,
) -> Chunk:
    """Make a chunk from documents given as lists of sentence lengths.

    `unknown` tokens are 1. No two sentences are equal, unless they are to be the `same`.
    """
    number = itertools.count(2)

    def part(documents: list[list[int]]) -> Documents:
        sentences = np.array([length for document in documents for length in document], np.int64)
        tokens = [np.full(length, 2 if same else next(number)) for length in sentences]
        return Documents(
            np.concatenate([np.zeros(0, np.int64), *tokens]),
            sentences,
            np.array([len(document) for document in documents], np.int64),
        )

    both = documents + (heldout or [])
    train = part(documents)
    train.tokens[:unknown] = 1
    text = TextStats(documents=len(both), **options)
    if hashes is None:
        hashes = np.arange(len(both), dtype=np.uint64)
    return Chunk(train, part(heldout or []), text, hashes, list(bad))


def report_of(
    *chunks: Chunk,
    vocab_size: int = 1000,
    asked: int | None = 1000,
    stretches: int | None = None,
) -> Report:
    """Merge the counts of the chunks, as if a task had counted each."""
    stats, text, estimator = CorpusStats(unknown=1), TextStats(), DuplicateEstimator()
    for one in chunks:
        counted = CorpusStats(unknown=1)
        counted.add(one.train)
        counted.add(one.heldout, heldout=True)
        stats.merge(*counted.to_arrays())
        text += TextStats.from_json(json.loads(json.dumps(one.text.to_json())))
        estimator.add(one.hashes)
    duplicates = estimator.duplicates(), estimator.sampled
    bad = [record for one in chunks for record in one.bad]
    about = About(
        vocab_size,
        asked,
        BASELINES,
        duplicates=duplicates,
        bad_records=bad,
        stretches=stretches,
    )
    return make_report(stats, text, about)


def test_windows_of_few_stretches_are_a_warning() -> None:
    name = "stretches of text that a window mixes"
    for stretches, value, warns in ((511, "511", True), (512, "512", False)):
        report = report_of(chunk([[10]]), stretches=stretches)
        (row,) = [row for row in report.rows if row.name == name]
        assert row.value == value and ("unpack them" in row.advice) == warns
        assert report.figures["stretches_per_window"] == stretches
    alone = report_of(chunk([[10]]))
    assert name not in [row.name for row in alone.rows]
    assert "stretches_per_window" not in alone.figures


def test_figures() -> None:
    report = report_of(
        chunk([[10, 20], [100]], [[130]], unknown=13, empty_documents=2),
        chunk([[254, 254, 92]], hashes=np.array([0], np.uint64), cut_sentences=1),
    )
    figures = report.figures
    assert (figures["documents"], figures["sentences"], figures["tokens"]) == (4, 7, 860)
    assert (
        figures["heldout_documents"],
        figures["heldout_tokens"],
        figures["empty_documents"],
    ) == (1, 130, 2)
    assert figures["unknown_share"] == pytest.approx(13 / 860, abs=1e-6)
    assert figures["single_sentence_share"] == 0.5
    assert figures["duplicate_document_share"] == pytest.approx(1 / 4)
    assert figures["cut_sentences"] == 1
    # Documents of 30, 100, 130 and 600 tokens.
    assert figures["document_tokens"] == {
        "0.05": 30,
        "0.25": 30,
        "0.5": 100,
        "0.75": 130,
        "0.95": 600,
        "longest": 600,
    }
    assert figures["sentence_tokens"]["longest"] == 254
    assert figures["truncated_share"] == {
        "128": pytest.approx((4 + 474) / 860, abs=1e-6),
        "512": pytest.approx(90 / 860, abs=1e-6),
    }
    # 125 tokens of text in a sequence of 128: 1 + 1 + 2 + 5 sequences; 509 in 512: 1 + 1 + 1 + 2.
    assert figures["padding_share"]["128"] == pytest.approx(1 - (860 + 3 * 9) / (9 * 128), abs=1e-6)
    assert figures["padding_share"]["512"] == pytest.approx(1 - (860 + 3 * 5) / (5 * 512), abs=1e-6)
    assert figures["baselines"] == BASELINES


def test_a_chunk_without_text_changes_nothing() -> None:
    assert (
        report_of(chunk([[5, 5]])).figures
        == report_of(chunk([]), chunk([[5, 5]]), chunk([])).figures
    )


HEALTHY = chunk([[20] * 50] * 1100, [[20] * 50] * 30)


@pytest.mark.parametrize(
    ("row", "made", "words"),
    [
        (
            "[UNK]",
            lambda: report_of(chunk([[20] * 50] * 1100, unknown=12_000)),
            "--vocab-size",
        ),
        (
            "[UNK]",
            lambda: report_of(chunk([[20] * 50] * 1100, unknown=12_000), asked=None),
            "leave out --tokenizer",
        ),
        (
            "[UNK]",
            lambda: report_of(
                chunk([[20] * 50] * 1100, losses=Losses(characters=1000, unknown_characters=11))
            ),
            "--vocab-size",
        ),
        (
            "accents and vowel signs dropped",
            lambda: report_of(chunk([[20] * 50], losses=Losses(words=1000, marked_words=11))),
            "--keep-accents",
        ),
        (
            "accents and vowel signs dropped",
            lambda: report_of(
                chunk([[20] * 50], losses=Losses(words=1000, marked_words=11)), asked=None
            ),
            "no --tokenizer",
        ),
        (
            "capitals inside words, lower-cased",
            lambda: report_of(chunk([[20] * 50], losses=Losses(words=100, inner_capitals=3))),
            "--cased",
        ),
        (
            "characters removed inside words",
            lambda: report_of(
                chunk([[20] * 50], losses=Losses(words=1000, removed_words=2, removed=("U+200B",)))
            ),
            "spaces",
        ),
        (
            "bad records, left out",
            lambda: report_of(chunk([[20] * 50], bad=[bad(1, "no"), bad(2, "no")], bad_records=2)),
            "a: line 1: no; a: line 2: no",
        ),
        (
            "copies of documents",
            lambda: report_of(chunk([[20, 20]] * 90, hashes=np.zeros(90, np.uint64))),
            "by heart",
        ),
        (
            "copies of sentences",
            lambda: report_of(chunk([[20, 20]] * 90, same=True)),
            "footers",
        ),
        (
            "documents of one sentence",
            lambda: report_of(chunk([[20]] * 90)),
            'objective.kind = "mlm"',
        ),
        (
            f"sentences cut at {LONGEST_SENTENCE} tokens",
            lambda: report_of(chunk([[20, 20]] * 90, cut_sentences=90)),
            "tables",
        ),
        ("vocabulary", lambda: report_of(HEALTHY, vocab_size=800), "1,000 tokens asked for"),
        ("tokens", lambda: report_of(chunk([[20, 20]])), "100 million"),
        ("documents", lambda: report_of(chunk([[200] * 100])), "--format lines"),
        ("held out for evaluation", lambda: report_of(chunk([[20, 20]], [[20, 20]])), "--heldout"),
    ],
)
def test_advice(row: str, made: object, words: str) -> None:
    report = made()  # type: ignore[operator]
    assert words in next(line.advice for line in report.rows if line.name == row)
    assert not any(line.advice for line in report_of(HEALTHY).rows)


def test_what_is_stored_and_shown(
    small_dataset: TokenDataset, english_jsonl: Path, tmp_path: Path
) -> None:
    report = prepare(
        [english_jsonl], tmp_path / "dataset", vocab_size=5000, workers=1, progress=False
    )
    stored = json.loads(
        (tmp_path / "dataset" / "part-00000" / "report.json").read_text(encoding="utf-8")
    )
    advice = stored.pop("advice")
    assert stored == json.loads(json.dumps(report.figures))
    assert "100 million" in advice["tokens"]
    markdown = (tmp_path / "dataset" / "part-00000" / "report.md").read_text(encoding="utf-8")
    assert (
        markdown == report.markdown() and f"| tokens | {report.figures['tokens']:,} |" in markdown
    )
    assert report.table().row_count == len(report.rows)
    dataset = open_dataset(tmp_path / "dataset")
    counts = dataset.manifest["parts"][0]["splits"]
    for kind in ("documents", "sentences", "tokens"):
        assert report.figures[kind] == counts["train"][kind] + counts["heldout"][kind]
    assert report.figures["baselines"] == dataset.baselines


@pytest.mark.parametrize("most", [100, 1000, 10**6])
def test_distinct(most: int) -> None:
    """10,000 things, of which half occur twice and a hundred ten times more.

    An estimate from a sample is close to the true share.
    """
    draw = np.random.default_rng(3)
    things = draw.integers(0, 2**64, 10_000, np.uint64)
    stream = np.concatenate([things, things[:5000], *[things[:100]] * 10])
    share = 1 - 10_000 / len(stream)
    estimator = DuplicateEstimator(most)
    for part in np.array_split(draw.permutation(stream), 37):
        estimator.add(part)
    assert estimator.sampled == (most < len(stream))
    assert len(estimator.sample()) <= most
    assert estimator.duplicates() == pytest.approx(
        share, abs=3 / most**0.5 if estimator.sampled else 1e-12
    )


@pytest.mark.parametrize("most", [50, 1000, 10**6])
def test_samples_of_parts_are_merged(most: int) -> None:
    """The merged sample is that of one estimator, which has seen everything."""
    hashes = np.random.default_rng(4).integers(0, 2**64, 5000, np.uint64)
    whole, merged = DuplicateEstimator(most), DuplicateEstimator(most)
    whole.add(hashes)
    for size in (1, 99, 4000, 900):
        part, hashes = DuplicateEstimator(most), np.roll(hashes, -size)
        part.add(hashes[-size:])
        merged.add(part.sample(), part.bits)
    assert merged.bits == whole.bits
    assert sorted(merged.sample().tolist()) == sorted(whole.sample().tolist())
    assert [DuplicateEstimator.bits_for(n, 100) for n in (0, 1, 100, 101, 200, 201, 401)] == [
        *(0, 0, 0),
        *(1, 1, 2, 3),
    ]


def test_sentence_hashes(small_dataset: TokenDataset) -> None:
    """Hashes are equal for equal sentences anywhere, and differ for all other sentences.

    That includes sentences with the same words.
    """
    tokenizer = (small_dataset.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    encoder = ChunkEncoder(tokenizer, "text")

    def hashes(text: str) -> list[int]:
        documents = encoder.encode(text.splitlines()).documents
        return hash_spans(documents.tokens, documents.sentences).tolist()

    first = hashes("a b c\nc b a\na b\na b c a b c\na\na a\n")
    assert len(set(first)) == 6
    assert hashes("of the\na b c\na\n")[1:] == [first[0], first[4]]
    many = hashes("".join(f"{i} of {j}\n" for i in range(100) for j in range(100)))
    assert len(set(many)) == 10_000


def test_files_and_what_ends_a_document(small_dataset: TokenDataset, tmp_path: Path) -> None:
    """Once 1,314 files became 43,066 documents without any message."""
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"Paragraph {i} alone.\n\nAnother of {i}.\n")
    vocabulary = tmp_path / "vocab" / "vocab.txt"
    vocabulary.parent.mkdir()
    known = (small_dataset.tokenizer_dir / "vocab.txt").read_text(encoding="utf-8")
    vocabulary.write_text(known + "login_ok\n", encoding="utf-8")
    sources = [tmp_path / f"{i}.txt" for i in range(4)]
    rows = {}
    for text_format in ("txt", "file"):
        report = prepare(
            sources,
            tmp_path / text_format,
            tokenizer=vocabulary,
            text_format=text_format,
            workers=1,
            progress=False,
        )
        rows[text_format] = {row.name: row for row in report.rows}
    assert rows["txt"]["documents"].value == (
        "8 in 4 files; a blank line ends a document (with --format file, the end of the file)"
    )
    assert "--format file" in rows["txt"]["documents of one sentence"].advice
    assert rows["file"]["documents"].value == "4 in 4 files"
    dead = rows["txt"]["tokens that no text gives"]
    assert dead.value == "1" and "login_ok: BERT splits at punctuation" in dead.advice
    assert not any(row.name == dead.name for row in report_of(HEALTHY).rows)


def test_what_is_quoted_is_no_markup() -> None:
    """Neither of rich, which would raise at "[/b]", nor of Markdown, HTML and the terminal."""
    losses = Losses(words=10, marked_words=1, examples=("a\u0301 → a",))
    report = report_of(
        chunk([[20] * 50], bad=[bad(0, "'[/b] x|y [red]'")], losses=losses, bad_records=1)
    )
    out = io.StringIO()
    Console(file=out, width=300).print(report.table())
    assert "a: '[/b] x|y [red]'" in out.getvalue() and "[UNK]" in out.getvalue()
    line = next(line for line in report.markdown().splitlines() if "bad records" in line)
    assert line == r"| bad records, left out | 1 | a: '[/b] x\|y [red]' |"


class _Cells(HTMLParser):
    """The text of each cell of a page's tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert tag in ("table", "tr", "th", "td")
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


def test_a_notebook_shows_a_line_or_a_table() -> None:
    report = report_of(chunk([[10, 20], [100]], bad=[bad(0, "<b>'x' & \"y\"</b>")], bad_records=1))
    assert repr(report) == (
        "<report on a dataset: 2 documents, 3 sentences, 130 tokens, vocabulary of 1,000; "
        f"advice on {sum(bool(row.advice) for row in report.rows)} of its rows>"
    )
    shown = _Cells(report._repr_html_()).cells
    cells = [cell for row in report.rows for cell in (row.name, row.value, row.advice)]
    assert shown == ["data", "", "what to do", *cells]
    assert any("<b>'x'" in cell for cell in shown)
