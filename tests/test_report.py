"""The report's figures agree with counts by hand, and warnings appear only where they should."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastbert.data.damage import Damage
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.encode import LONGEST_SENTENCE, ChunkEncoder, EncodedChunk, Part
from fastbert.data.encoder import Losses
from fastbert.data.prepare import prepare
from fastbert.data.report import CorpusStats, DuplicateEstimator, Report, make_report

BASELINES = {"unigram": 6.0, "train_tokens": 10}


def chunk(
    documents: list[list[int]], heldout: list[list[int]] | None = None, **options: object
) -> EncodedChunk:
    """Make a chunk from documents given as lists of sentence lengths."""

    def part(documents: list[list[int]]) -> Part:
        sentences = np.array([length for document in documents for length in document], np.int64)
        return Part(
            np.zeros(sentences.sum(), np.uint16),
            sentences,
            np.array([len(document) for document in documents], np.int64),
        )

    both = documents + (heldout or [])
    hashes = np.arange(len(both), dtype=np.uint64)
    values = {
        "document_hashes": hashes,
        "sentence_hashes": np.arange(sum(map(len, both)), dtype=np.uint64),
        "empty_documents": 0,
        "cut_sentences": 0,
        "unknown_tokens": 0,
        "losses": Losses(),
        "damage": Damage(),
        "bad_records": 0,
        "bad_examples": (),
    }
    values = {**values, **options}
    return EncodedChunk(part(documents), part(heldout or []), **values)  # type: ignore[arg-type]


def report_of(*chunks: EncodedChunk, vocab_size: int = 1000, asked: int | None = 1000) -> Report:
    stats = CorpusStats()
    for one in chunks:
        stats.add(one)
    return make_report(stats, vocab_size, asked, BASELINES)


def test_figures() -> None:
    report = report_of(
        chunk([[10, 20], [100]], [[130]], empty_documents=2, unknown_tokens=13),
        chunk(
            [[254, 254, 92]],
            document_hashes=np.array([0], np.uint64),
            sentence_hashes=np.array([7], np.uint64),
            cut_sentences=1,
        ),
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
            lambda: report_of(chunk([[20] * 50] * 1100, unknown_tokens=12_000)),
            "--vocab-size",
        ),
        (
            "[UNK]",
            lambda: report_of(chunk([[20] * 50] * 1100, unknown_tokens=12_000), asked=None),
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
            lambda: report_of(
                chunk([[20] * 50], bad_records=2, bad_examples=("a: line 1: no", "a: line 2: no"))
            ),
            "a: line 1: no; a: line 2: no",
        ),
        (
            "copies of documents",
            lambda: report_of(chunk([[20, 20]] * 90, document_hashes=np.zeros(90, np.uint64))),
            "by heart",
        ),
        (
            "copies of sentences",
            lambda: report_of(chunk([[20, 20]] * 90, sentence_hashes=np.zeros(180, np.uint64))),
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
    stored = json.loads((tmp_path / "dataset" / "report.json").read_text(encoding="utf-8"))
    advice = stored.pop("advice")
    assert stored == json.loads(json.dumps(report.figures))
    assert "100 million" in advice["tokens"]
    markdown = (tmp_path / "dataset" / "report.md").read_text(encoding="utf-8")
    assert (
        markdown == report.markdown() and f"| tokens | {report.figures['tokens']:,} |" in markdown
    )
    assert report.table().row_count == len(report.rows)
    dataset = open_dataset(tmp_path / "dataset")
    counts = dataset.manifest["splits"]
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
    assert sum(map(len, estimator._kept)) <= most
    assert estimator.duplicates() == pytest.approx(
        share, abs=3 / most**0.5 if estimator.sampled else 1e-12
    )


def test_sentence_hashes(small_dataset: TokenDataset) -> None:
    """Hashes are equal for equal sentences anywhere, and differ for all other sentences.

    That includes sentences with the same words.
    """
    from fastbert.data.documents import Chunk
    from fastbert.data.sources import Source

    tokenizer = (small_dataset.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    encoder = ChunkEncoder(tokenizer, "text", 0)

    def hashes(text: str) -> list[int]:
        return encoder(
            Chunk(Source(Path("x"), "lines", ""), text.encode(), 1, 0, 0)
        ).sentence_hashes.tolist()

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
    assert rows["txt"]["documents"].value == "8 in 4 files; a blank line ends a document"
    assert "--format file" in rows["txt"]["documents of one sentence"].advice
    assert rows["file"]["documents"].value == "4 in 4 files"
    dead = rows["txt"]["tokens that no text gives"]
    assert dead.value == "1" and "login_ok: BERT splits at punctuation" in dead.advice
    assert not any(row.name == dead.name for row in report_of(HEALTHY).rows)


def test_what_is_quoted_is_no_markup() -> None:
    """Neither of rich, which would raise at "[/b]", nor of Markdown, nor of the terminal."""
    losses = Losses(words=10, marked_words=1, examples=("a\u0301 → a",))
    report = report_of(
        chunk([[20] * 50], losses=losses, bad_records=1, bad_examples=("a: '[/b] x|y [red]'",))
    )
    out = io.StringIO()
    Console(file=out, width=300).print(report.table())
    assert "a: '[/b] x|y [red]'" in out.getvalue() and "[UNK]" in out.getvalue()
    line = next(line for line in report.markdown().splitlines() if "bad records" in line)
    assert line == r"| bad records, left out | 1 | a: '[/b] x\|y [red]' |"
