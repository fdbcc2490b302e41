"""Examples: how pairs are made, what labels may show, and independence of everything but indices.

An example is a function of (seed, epoch, index) alone.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastbert.config import ObjectiveConfig
from fastbert.data import example_counts
from fastbert.data import examples as module
from fastbert.data.examples import Examples, Spans
from fastbert.data.split import Split
from fastbert.errors import InputError
from fastbert.recipe import parse_config
from tests.tiny_dataset import tiny_split

ROOT = Path(__file__).parents[1]
# Documents of one sentence, of one token, of very long sentences, of many short ones.
DOCUMENTS = [
    [5, 9, 4],
    [7],
    [3, 3, 3, 3, 3, 3, 3],
    [1, 1],
    [60, 2, 70],
    [12, 15, 9, 20, 11, 8],
    [200],
    [6, 6, 6, 6],
    [30, 31, 2, 29],
]
SEGMENTS = ("single", "fill")

corpora = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=2, max_size=10)
lengths = st.sampled_from([8, 16, 33, 128])


@pytest.fixture
def split(tmp_path) -> Split:
    return tiny_split(tmp_path / "split", DOCUMENTS)


def make(
    split: Split, kind: str = "mlm+nsp", segments: str = "fill", max_length: int = 32, seed: int = 1
) -> Examples:
    return Examples(
        split, ObjectiveConfig(kind=kind, segments=segments), max_length, seed, "corpus"
    )


def epoch_of(examples: Examples, epoch: int = 0) -> Spans:
    return examples.draw(epoch, np.arange(len(examples)))


def sentence_starts(documents: list[list[int]]) -> list[np.ndarray]:
    """Return each document's offsets of the first tokens of sentences, and of its end."""
    flat = np.concatenate(
        [[0], np.cumsum([length for sentences in documents for length in sentences])]
    )
    first = np.concatenate([[0], np.cumsum([len(sentences) for sentences in documents])])
    return [flat[first[i] : first[i + 1] + 1] for i in range(len(documents))]


def document_at(documents: list[list[int]], tokens: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum([sum(sentences) for sentences in documents]), tokens, "right")


# How pairs are made


@settings(max_examples=60)
@given(
    documents=corpora,
    segments=st.sampled_from(SEGMENTS),
    max_length=lengths,
    seed=st.integers(0, 2**63 - 1),
)
def test_pairs_of_any_corpus(documents, segments, max_length, seed):
    with tempfile.TemporaryDirectory() as folder:
        split = tiny_split(Path(folder) / "split", documents)
        try:
            examples = make(split, segments=segments, max_length=max_length, seed=seed)
        except InputError:
            assume(False)
        spans = epoch_of(examples)
    starts = sentence_starts(documents)
    joins = np.concatenate([of[1:-1] for of in starts])
    a_end, b_end = spans.a_start + spans.a_length, spans.b_start + spans.b_length
    assert (
        spans.a_length.min() >= 1
        and spans.b_length.min() >= 1
        and spans.lengths.max() <= max_length
    )
    np.testing.assert_array_equal(spans.lengths, spans.a_length + spans.b_length + 3)
    # A ends and B begins between two sentences, so a wrong B could also be a true one.
    assert np.isin(a_end, joins).all() and np.isin(spans.b_start, joins).all()
    a_document, b_document = (
        document_at(documents, spans.a_start),
        document_at(documents, spans.b_start),
    )
    np.testing.assert_array_equal(document_at(documents, a_end - 1), a_document)
    np.testing.assert_array_equal(document_at(documents, b_end - 1), b_document)
    np.testing.assert_array_equal(a_document == b_document, spans.labels == 0)
    np.testing.assert_array_equal((a_end == spans.b_start)[spans.labels == 0], True)
    assert (
        set(spans.labels) <= {0, 1}
        and spans.keys.min() >= 0
        and len(set(spans.keys)) == len(examples)
    )


def test_single_is_every_sentence_with_the_next_one_once_an_epoch(split):
    spans = epoch_of(make(split, segments="single", max_length=512))
    pairs = [of[i : i + 3] for of in sentence_starts(DOCUMENTS) for i in range(len(of) - 2)]
    assert sorted(zip(spans.a_start, spans.a_length, strict=True)) == [
        (begin, join - begin) for begin, join, _ in pairs
    ]
    ends = {join: end for _, join, end in pairs}
    assert all(ends[b] == b + n for b, n in zip(spans.b_start, spans.b_length, strict=True))


def test_a_is_cut_at_its_front_and_b_at_its_end(tmp_path):
    split = tiny_split(tmp_path / "split", [[100, 100], [100, 100]])
    for segments in SEGMENTS:
        spans = epoch_of(make(split, segments=segments, max_length=23))
        np.testing.assert_array_equal(np.sort((spans.a_start + spans.a_length) % 200), 100)
        np.testing.assert_array_equal(spans.b_start % 200, 100)
    assert spans.lengths.max() <= 23


@pytest.mark.parametrize("short", ["a_length", "b_length"])
def test_room_that_one_side_does_not_need_goes_to_the_other(tmp_path, short):
    documents = [[4, 40], [5, 40], [3, 40]]
    if short == "b_length":
        documents = [sentences[::-1] for sentences in documents]
    split = tiny_split(tmp_path / "split", documents)
    spans = epoch_of(make(split, segments="single", max_length=33))  # halves would be 15 and 15
    assert set(getattr(spans, short)) <= {3, 4, 5}
    assert (spans.ordinary - getattr(spans, short)).min() >= 25


def test_fill_reaches_max_length_where_documents_are_long(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHORT_SHARE", 0.0)
    documents = [[7, 12, 9, 15, 8] * 20, [11, 5, 14] * 30, [10] * 90]
    examples = make(tiny_split(tmp_path / "split", documents), max_length=64)
    assert len(examples) == sum(-(-sum(sentences) // 61) for sentences in documents)
    total, uncovered = sum(map(sum, documents)), []
    for epoch in range(10):
        spans = epoch_of(examples, epoch)
        assert spans.lengths.mean() > 0.97 * 64 and spans.lengths.max() == 64
        covered = np.zeros(total, bool)
        begin, end = (
            spans.a_start,
            np.where(
                spans.labels == 0, spans.b_start + spans.b_length, spans.a_start + spans.a_length
            ),
        )
        for b, e in zip(begin, end, strict=True):
            covered[b:e] = True
        uncovered.append(~covered)
    # In half of the examples B is from elsewhere, so one epoch omits text, and ten do not.
    assert np.mean(uncovered) < 0.35 and np.all(uncovered, axis=0).mean() < 0.01


def test_fill_takes_a_document_that_fits_whole_and_splits_it_elsewhere_in_other_epochs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "SHORT_SHARE", 0.0)
    documents = [[5, 9, 4, 6, 7]] * 6
    examples = make(tiny_split(tmp_path / "split", documents), max_length=128)
    joins = set()
    for epoch in range(20):
        spans = epoch_of(examples, epoch)
        np.testing.assert_array_equal(np.sort(spans.a_start), np.arange(6) * 31)
        joins |= set(spans.a_length)
        np.testing.assert_array_equal((spans.b_start + spans.b_length) % 31, 0)
    assert joins == {5, 14, 18, 24}


def test_some_fill_examples_are_short(tmp_path):
    documents = [[10] * 100] * 10
    spans = epoch_of(make(tiny_split(tmp_path / "split", documents), max_length=53))
    share = (spans.lengths < 45).mean()
    assert 0.03 < share < 0.15 and spans.lengths.min() < 20


# What a label may show


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("max_length", [8, 24, 40, 512])
def test_neither_a_nor_b_alone_tells_the_label(split, segments, max_length):
    """Over all examples and all shifts, both labels have exactly the same As and the same Bs.

    This holds for any fraction and any target length.
    """
    examples = make(split, segments=segments, max_length=max_length)
    n = len(examples)
    most = max(Counter(document_at(DOCUMENTS, epoch_of(examples).a_start)).values())
    places, shifts = (
        axis.ravel() for axis in np.meshgrid(np.arange(n), np.arange(most, n - most + 1))
    )
    for fraction in (0.15, 0.5, 0.85):
        for target in {examples.room, 2 + examples.room // 3}:
            offered = {}
            for label in (0, 1):
                one = np.ones_like(places)
                a_start, a_length, b_start, b_length = examples.cut_pairs(
                    places, (places + shifts) % n, one * label, one * fraction, one * target
                )
                offered[label] = (
                    Counter(zip(a_start, a_length, strict=True)),
                    Counter(zip(b_start, b_length, strict=True)),
                )
            assert offered[0] == offered[1]


@pytest.mark.parametrize("segments", SEGMENTS)
def test_labels_are_even_and_independent_of_where_b_begins_and_how_long_it_is(split, segments):
    examples = make(split, segments=segments, max_length=40)
    epochs = [epoch_of(examples, epoch) for epoch in range(600)]
    labels = np.concatenate([spans.labels for spans in epochs])
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(labels))
    for name in ("b_start", "b_length", "a_start", "a_length"):
        _, kind = np.unique(
            np.concatenate([getattr(spans, name) for spans in epochs]), return_inverse=True
        )
        table = np.stack(
            [np.bincount(kind[labels == label], minlength=kind.max() + 1) for label in (0, 1)]
        )
        table = table[:, table.sum(0) >= 40]
        expected = table.sum(0) * table.sum(1, keepdims=True) / table.sum()
        freedom = table.shape[1] - 1
        assert ((table - expected) ** 2 / expected).sum() < freedom + 4.5 * np.sqrt(
            2 * freedom
        ) + 5, name


def test_wrong_b_may_be_any_other_documents(split):
    examples = make(split, segments="single", max_length=512)
    seen = {}
    for epoch in range(400):
        spans = epoch_of(examples, epoch)
        wrong = spans.labels == 1
        for a, b in zip((spans.a_start + spans.a_length)[wrong], spans.b_start[wrong], strict=True):
            seen.setdefault(a, set()).add(b)
    joins = np.concatenate([of[1:-1] for of in sentence_starts(DOCUMENTS)])
    document = document_at(DOCUMENTS, joins)
    most = np.bincount(document).max()
    for place, join in enumerate(joins):
        reachable = {
            joins[(place + shift) % len(joins)] for shift in range(most, len(joins) - most + 1)
        }
        assert seen[join] == reachable


# Without pairs


@settings(max_examples=40)
@given(documents=corpora, segments=st.sampled_from(SEGMENTS), max_length=lengths)
def test_without_pairs_every_token_is_covered_and_every_document_takes_part(
    documents, segments, max_length
):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHORT_SHARE", 0.0)
        spans = epoch_of(
            make(tiny_split(Path(folder) / "split", documents), "mlm", segments, max_length)
        )
    room = max_length - 2
    assert set(spans.labels) == {-100} and set(spans.b_length) == {0}
    assert spans.a_length.min() >= 1 and spans.lengths.max() <= max_length
    np.testing.assert_array_equal(spans.lengths, spans.a_length + 2)
    np.testing.assert_array_equal(
        document_at(documents, spans.a_start),
        document_at(documents, spans.a_start + spans.a_length - 1),
    )
    if segments == "single":
        starts = np.concatenate([of[:-1] for of in sentence_starts(documents)])
        sizes = np.minimum([length for sentences in documents for length in sentences], room)
        assert sorted(zip(spans.a_start, spans.a_length, strict=True)) == list(
            zip(starts, sizes, strict=True)
        )
    else:
        assert len(spans.keys) == sum(-(-sum(sentences) // room) for sentences in documents)
        covered = np.concatenate(
            [np.arange(a, a + n) for a, n in zip(spans.a_start, spans.a_length, strict=True)]
        )
        np.testing.assert_array_equal(np.unique(covered), np.arange(sum(map(sum, documents))))


@settings(max_examples=60)
@given(documents=corpora, max_length=lengths, seed=st.integers(0, 2**63 - 1))
def test_windows_use_every_token_exactly_once_an_epoch(documents, max_length, seed):
    with tempfile.TemporaryDirectory() as folder:
        split = tiny_split(Path(folder) / "split", documents)
        spans = epoch_of(make(split, "mlm", "windows", max_length, seed), seed % 3)
    assert spans.a_length.min() >= 1 and spans.lengths.max() <= max_length
    assert (spans.b_length == 0).all() and (spans.labels == -100).all()
    starts, ends = np.sort(spans.a_start), np.sort(spans.a_start + spans.a_length)
    np.testing.assert_array_equal(starts, [0, *ends[:-1]])
    assert ends[-1] == sum(map(sum, documents))
    # No window holds text of two documents.
    np.testing.assert_array_equal(document_at(documents, starts), document_at(documents, ends - 1))


def test_windows_of_8192_tokens(tmp_path):
    """Three of a document of 20,000 tokens; two cuts are near the start of a sentence."""
    split = tiny_split(tmp_path / "split", [[100] * 200, [20_000], [8190], [8191]])
    spans = epoch_of(make(split, "mlm", "windows", 8192))
    order = np.argsort(spans.a_start)
    starts = spans.a_start[order].tolist()
    assert starts[:3] == [0, 6700, 13300]  # 6,666 and 13,333 are not between two sentences
    assert starts[3:6] == [20_000, 26_666, 33_333]
    assert starts[6:] == [40_000, 48_190, 52_285]


def test_windows_have_no_pairs():
    recipe = 'data = "x"\n[objective]\nsegments = "windows"'
    with pytest.raises(InputError, match=r'r.toml: objective.segments = "windows" with .*"mlm"'):
        parse_config(recipe, "r.toml")
    assert parse_config(recipe + '\nkind = "mlm"', "r.toml").objective.segments == "windows"


def test_windows_begin_with_a_sentence_where_there_is_room_to_choose(tmp_path):
    # 5 windows of up to 50 cover 204.
    examples = make(tiny_split(tmp_path / "split", [[4] * 51, [4] * 51]), "mlm", max_length=52)
    starts = np.concatenate([epoch_of(examples, epoch).a_start for epoch in range(30)])
    assert (starts % 4 == 0).mean() > 0.8 and len(np.unique(starts)) > 12
    # 10 windows of 35 cover 350: no choice.
    exact = epoch_of(make(tiny_split(tmp_path / "exact", [[7] * 50]), "mlm", max_length=37))
    np.testing.assert_array_equal(np.sort(exact.a_start), np.arange(10) * 35)


# Functions of (seed, epoch, index)


@pytest.mark.parametrize(
    ("kind", "segments"),
    [("mlm+nsp", "fill"), ("mlm+nsp", "single"), ("mlm", "fill"), ("mlm", "single")],
)
def test_an_example_does_not_depend_on_what_it_is_drawn_with(split, kind, segments):
    examples = make(split, kind, segments)
    whole = epoch_of(examples, 3)
    for i in range(len(examples)):
        alone, of_whole = examples.draw(3, np.array([i])), whole.take(np.array([i]))
        assert all((getattr(alone, name) == getattr(of_whole, name)).all() for name in vars(alone))


def test_epochs_and_seeds_differ(split):
    drawn = [
        epoch_of(make(split, segments="single", seed=seed), epoch)
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    # Epochs have the same examples in another order.
    joins = [spans.a_start + spans.a_length for spans in drawn]
    for i in range(len(drawn)):
        for j in range(i):
            assert not set(drawn[i].keys) & set(drawn[j].keys)
            assert (joins[i] == joins[j]).mean() < 0.3 and (
                drawn[i].labels != drawn[j].labels
            ).any()


def digest(spans: Spans) -> str:
    return hashlib.sha256(b"".join(value.tobytes() for value in vars(spans).values())).hexdigest()


def test_another_process_draws_the_same(tmp_path):
    split = tiny_split(tmp_path / "split", DOCUMENTS)
    code = f"""
import sys
from pathlib import Path
from tests.test_examples import DOCUMENTS, digest, epoch_of, make
from tests.tiny_dataset import tiny_split
split = tiny_split(Path(sys.argv[1]), DOCUMENTS)
print(digest(epoch_of(make(split, seed={2**63 - 1}), 2**32 - 1)), end="")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "again"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == digest(epoch_of(make(split, seed=2**63 - 1), 2**32 - 1)), done.stderr


# What gives no examples


def test_documents_of_one_sentence_give_no_pair(tmp_path):
    split = tiny_split(tmp_path / "split", [[5], [7], [9]])
    for segments in SEGMENTS:
        with pytest.raises(
            InputError,
            match=r"^corpus: none of its 3 documents has two sentences, and objective.kind = "
            r"\"mlm\+nsp\"",
        ):
            make(split, segments=segments)
        assert len(make(split, "mlm", segments)) == 3


def test_one_document_must_not_hold_more_than_half(tmp_path):
    split = tiny_split(tmp_path / "split", [[9, 9], [9, 9, 9, 9]])
    with pytest.raises(
        InputError, match=r"^corpus: document 1 gives 3 of the 4 examples, more than half"
    ):
        make(split, segments="single")
    with pytest.raises(InputError, match=r"document 0 gives 1 of the 1 examples"):
        make(tiny_split(tmp_path / "one", [[9, 9]]))
    halves = epoch_of(
        make(tiny_split(tmp_path / "halves", [[9, 9, 9], [9, 9, 9]]), segments="single")
    )
    assert len(halves.labels) == 4


def test_counting_in_several_rounds_changes_nothing(split, monkeypatch):
    whole = digest(epoch_of(make(split)))
    monkeypatch.setattr(example_counts, "DOCUMENTS_AT_ONCE", 2)
    assert digest(epoch_of(make(split))) == whole
