"""The order by windows: complete, well mixed, read once, verified before it is drawn."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastbert.config import BatchConfig, ObjectiveConfig, OrderConfig, RunConfig
from fastbert.data import block_writer, corpus_plan, segments
from fastbert.data.batches import Batches
from fastbert.data.block_split import BlockSplit
from fastbert.data.block_table import Blocks
from fastbert.data.blocks import BLOCK_BYTES
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.example_counts import LENGTHS
from fastbert.data.examples import Examples, Spans
from fastbert.data.prepare import prepare
from fastbert.data.verify import Claim
from fastbert.data.window_order import Windows, count_by_block, most_by_block
from fastbert.errors import InputError
from tests.block_dataset import Text, blocks_of, in_blocks
from tests.tiers import slow
from tests.trials import Trial

PAIRS = ObjectiveConfig()
SINGLE = ObjectiveConfig(kind="mlm", segments="single")
ONCE = ObjectiveConfig(kind="mlm", segments="windows")
OBJECTIVES = [PAIRS, ObjectiveConfig(segments="single"), SINGLE, ONCE, ObjectiveConfig(kind="mlm")]


def texts(count: int, seed: int = 0) -> list[Text]:
    """Blocks of random documents; each token is its own position."""
    draw, found, at = np.random.default_rng(seed), [], 0
    for _ in range(count):
        documents = draw.integers(1, 9, draw.integers(2, 6))
        sentences = draw.integers(1, 30, documents.sum())
        tokens = np.arange(at, at := at + sentences.sum())
        found.append((tokens, sentences, documents, tokens % 3 == 0))
    return found


def windows_of(blocks: Blocks, objective: ObjectiveConfig, count: int, length: int = 20) -> Windows:
    return Windows(blocks, objective, length, 7, count * BLOCK_BYTES, "the text")


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    return blocks_of(tmp_path, texts(23), 100_000, per_shard=4)


def test_every_sentence_of_an_epoch_once(blocks):
    whole = BlockSplit(blocks)
    stream = windows_of(blocks, SINGLE, 4, length=40)
    assert stream.windows == 5 and len(stream) == whole.sentences
    begins = whole.gather(
        whole.first_token(np.arange(whole.sentences)), np.ones(whole.sentences, np.int64)
    )
    orders = []
    for epoch in range(3):
        numbers = epoch * len(stream) + np.arange(len(stream))
        drawn = stream.draw(numbers)
        tokens = stream.tokens(drawn)
        firsts = tokens[np.cumsum(drawn.ordinary) - drawn.ordinary]
        assert sorted(firsts) == sorted(begins)
        assert drawn.index.tolist() == list(range(len(stream)))
        assert (np.diff(drawn.split) >= 0).all() and len(set(drawn.split.tolist())) == 5
        assert np.array_equal(stream.begins_word(drawn), tokens % 3 == 0)
        orders.append(firsts.tolist())
    assert orders[0] != orders[1] != orders[2]
    assert len(set(map(tuple, orders))) == 3


def test_every_token_of_an_epoch_once(blocks):
    stream = windows_of(blocks, ONCE, 4)
    tokens = stream.tokens(stream.draw(np.arange(len(stream))))
    assert np.array_equal(np.sort(tokens), np.arange(BlockSplit(blocks).tokens))


def test_every_pair_of_an_epoch_once_and_wrong_ones_from_other_documents(blocks):
    """With segments = "single" each join of two sentences is the end of one A."""
    whole = BlockSplit(blocks)
    stream = windows_of(blocks, ObjectiveConfig(segments="single"), 6)
    drawn = stream.draw(np.arange(len(stream)))
    tokens = stream.tokens(drawn)
    last_of_a = tokens[np.cumsum(drawn.ordinary) - drawn.b_length - 1]
    first_of_b = tokens[np.cumsum(drawn.ordinary) - drawn.b_length]
    starts = whole.first_token(np.arange(whole.sentences))
    inner = np.setdiff1d(
        starts, whole.first_token(whole.first_sentence(np.arange(whole.documents)))
    )
    assert np.array_equal(np.sort(last_of_a + 1), inner)
    follows = first_of_b == last_of_a + 1
    assert np.array_equal(follows, drawn.labels == 0)
    assert 0.4 < follows.mean() < 0.6
    sentence = np.searchsorted(starts, np.stack([last_of_a, first_of_b])[:, ~follows], "right") - 1
    first = whole.first_sentence(np.arange(whole.documents))
    a, b = np.searchsorted(first, sentence, "right") - 1
    assert (a != b).all()


def fields_of(spans: Spans) -> list[list[int]]:
    return [getattr(spans, name).tolist() for name in vars(spans)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_example_is_a_function_of_its_number(blocks, objective):
    """In any order, in any company, from a new stream or from one that is somewhere else."""
    stream = windows_of(blocks, objective, 4)
    numbers = np.random.default_rng(1).integers(0, 3 * len(stream), 200)
    drawn = stream.draw(numbers)
    tokens = np.split(stream.tokens(drawn), np.cumsum(drawn.ordinary)[:-1])
    other = windows_of(blocks, objective, 4)
    for place in np.random.default_rng(2).permutation(200)[:40].tolist():
        one = other.draw(numbers[place : place + 1])
        assert fields_of(one) == fields_of(drawn.take(np.array([place])))
        assert np.array_equal(other.tokens(one), tokens[place])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_window_is_a_split_of_its_own(blocks, objective):
    """Its examples are those that the class Examples gives its blocks, and all of them."""
    stream = windows_of(blocks, objective, 4)
    drawn = stream.draw(np.arange(len(stream)))
    hashes = [
        row.tobytes()
        for i in range(stream.windows)
        for row in stream.blocks_of(i).entries["sha256"]
    ]
    assert sorted(hashes) == sorted(row.tobytes() for row in blocks.entries["sha256"])
    for window in range(stream.windows):
        chosen = np.flatnonzero(drawn.split == window)
        examples = Examples(BlockSplit(stream.blocks_of(window)), objective, 20, 7, "")
        assert len(examples) == len(chosen)
        expected = examples.draw(0, chosen, window, int(chosen[0]))
        assert fields_of(drawn.take(chosen))[:-1] == fields_of(expected)[:-1]


def test_one_window_is_the_global_order(small_dataset, tmp_path):
    """A dataset in blocks that fits a window gives the batches of today, to the last bit."""
    copy = in_blocks(small_dataset, tmp_path / "copy", 30)
    config = RunConfig(data="", batch=BatchConfig(sequences=32))
    old, new = (Batches(dataset, config) for dataset in (small_dataset, copy))
    assert old.examples_per_epoch == new.examples_per_epoch
    for step in (0, 1, int(old.timetable.steps_per_epoch), 1000):
        a, b = (packed.step(step) for packed in (old, new))
        assert [vars(p).keys() for p in a] == [vars(p).keys() for p in b]
        for mine, theirs in zip(a, b, strict=True):
            assert mine.input_ids.tolist() == theirs.input_ids.tolist()
            assert mine.labels.tolist() == theirs.labels.tolist()


def test_resuming_across_borders_of_windows(small_dataset, tmp_path):
    """Batches from the middle of a run are those of the whole run, over two epochs."""
    copy = in_blocks(small_dataset, tmp_path / "copy", 12)
    config = RunConfig(
        data="",
        batch=BatchConfig(sequences=64),
        order=OrderConfig(window=5 * BLOCK_BYTES),
    )
    windows = copy.windows(config.order.window)
    whole = Batches(copy, config)
    steps = int(2.2 * whole.timetable.steps_per_epoch)
    assert 4 <= windows and steps > 2 * windows
    kept = [[pack.input_ids.tolist() for pack in whole.step(step)] for step in range(steps)]
    for first in range(0, steps, 3):
        later = Batches(copy, config)
        later.draw(first)
        for step in range(first, min(first + 3, steps)):
            assert [pack.input_ids.tolist() for pack in later.step(step)] == kept[step]
    # Ranks share the examples of a step in windows as they do without.
    shares = [whole.step(3, rank, 4) for rank in range(4)]
    examples = sorted(e for packs in shares for pack in packs for e in pack.examples.tolist())
    assert examples == sorted(e for pack in whole.step(3) for e in pack.examples.tolist())


# What is read


class Reads:
    """Counts the blocks that are read to be verified, by their first byte and file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seen = Counter[tuple[str, int]]()
        self.threads = set[str]()
        problem = Claim.problem

        def counted(claim: Claim, *args: object) -> str | None:
            self.seen[claim.name, claim.offset] += 1
            self.threads.add(threading.current_thread().name)
            return problem(claim, *args)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(Claim, "problem", counted)


def settle(stream: Windows) -> None:
    """Wait until the window ahead is open."""
    if stream._ahead:
        stream._ahead.result()


def test_blocks_are_read_once_an_epoch_and_one_window_ahead(blocks, monkeypatch):
    reads = Reads(monkeypatch)
    stream = windows_of(blocks, PAIRS, 4)
    assert not reads.seen
    for epoch in range(2):
        for window in range(stream.windows):
            first = epoch * len(stream) + int(stream._epoch(epoch).first[window])
            stream.tokens(stream.draw(np.arange(first, first + 2)))
            settle(stream)
            assert len(stream._open) == 1
            ahead = epoch * stream.windows + window + 1
            expected = sum(len(stream.blocks_of(number)) for number in range(ahead + 1))
            assert sum(reads.seen.values()) == expected
        assert min(reads.seen[key] for key in reads.seen) == epoch + 1
    assert len(reads.seen) == len(blocks) and max(reads.seen.values()) <= 3


def test_the_offsets_are_not_read_where_the_table_has_the_counts(blocks, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("a block was mapped")

    monkeypatch.setattr("fastbert.data.window_order.BlockSplit", never)
    for objective in OBJECTIVES:
        windows_of(blocks, objective, 6, length=64)
    with pytest.raises(AssertionError, match="mapped"):
        windows_of(blocks, PAIRS, 6, length=65)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("length", [*LENGTHS, 8, 20, 100])
def test_counts_of_the_table_are_those_of_examples(tmp_path, objective, length):
    draw = np.random.default_rng(0)
    found = texts(6)
    long = draw.integers(1, 255, 900)
    found.append((np.zeros(long.sum(), np.int64), long, np.array([1, 890, 9]), None))
    found = [(*text[:3], None) for text in found]
    blocks = blocks_of(tmp_path, found, 100_000)
    counts = count_by_block(blocks, objective, length)
    most = most_by_block(blocks, objective, length)
    for i, (_, sentences, documents, _) in enumerate(found):
        sizes = np.add.reduceat(sentences, np.cumsum(documents) - documents)
        own = []
        for tokens, count in zip(sizes.tolist(), documents.tolist(), strict=True):
            joins = count - 1
            cut = -(-tokens // (length - 2 - objective.pairs))
            if objective.segments == "single":
                own.append(joins if objective.pairs else count)
            else:
                own.append(min(cut, joins) if objective.pairs else cut)
        assert counts[i] == sum(own) and most[i] >= max(own)


# Damage


def flip(blocks: Blocks, block: int) -> None:
    file, offset, size = blocks.ranges()[block]
    data = bytearray(file.read_bytes())
    data[offset + size // 2] ^= 1
    file.write_bytes(data)


def test_damage_ends_the_run_before_an_example_of_its_window_is_drawn(blocks):
    stream = windows_of(blocks, PAIRS, 4)
    damaged = int(stream._epoch(0).order[9])
    flip(blocks, damaged)
    first = stream._epoch(0).first
    stream.draw(np.arange(0, first[2]))
    where = f"{blocks.name(damaged)}: the block at byte {blocks.entries['offset'][damaged]:,}: "
    for number in (first[2], first[3] - 1):
        with pytest.raises(InputError, match=where + "its SHA-256 differs"):
            stream.draw(np.array([number]))
    with pytest.raises(InputError, match=where):
        windows_of(blocks, PAIRS, 4).draw(np.arange(first[2] - 1, first[2] + 1))


def test_wrong_counts_of_examples_in_the_table(blocks):
    entries = blocks.entries.copy()
    entries["examples"][5] += 1
    stream = windows_of(replace(blocks, entries=entries), ObjectiveConfig(kind="mlm"), 4, 64)
    with pytest.raises(InputError, match="examples, and the table of blocks says"):
        stream.draw(np.arange(len(stream)))


def test_a_document_of_more_than_half_a_window(tmp_path):
    found = [(*text[:3], None) for text in texts(20)]
    sentences = np.full(600, 20)
    found[7] = (np.zeros(sentences.sum(), np.int64), sentences, np.array([600]), None)
    blocks = blocks_of(tmp_path, found, 100_000)
    with pytest.raises(InputError, match=r"more than half: raise order.window \(now 64 MiB\)"):
        windows_of(blocks, PAIRS, 4)
    windows_of(blocks, SINGLE, 4)


def test_a_window_without_a_pair(tmp_path):
    found = [(*text[:3], None) for text in texts(20)]
    for i in range(5):
        found[i] = (np.zeros(9, np.int64), np.full(3, 3), np.full(3, 1), None)
    blocks = blocks_of(tmp_path, found, 100_000)
    with pytest.raises(InputError, match=r"may have no example.*raise order.window"):
        windows_of(blocks, PAIRS, 4)
    windows_of(blocks, SINGLE, 4)


# How well it mixes


BATCH, EPOCHS = 256, 16


def chi_squares(stream: Windows, sources: int) -> np.ndarray:
    """Return the chi square per degree of freedom of the sources in batches of the first window.

    The token that an example begins with says its source. There is one number for each of EPOCHS,
    the mean over the window's batches. The permutations of epochs are independent, and so are
    these.
    """
    blocks = BlockSplit(stream.blocks)
    sentences = np.arange(blocks.sentences)
    own, total = np.unique(
        blocks.gather(blocks.first_token(sentences), np.ones_like(sentences)), return_counts=True
    )
    assert len(own) == sources
    expected = BATCH * total / total.sum()
    found = []
    for epoch in range(EPOCHS):
        first = epoch * len(stream)
        size = int(stream._epoch(epoch).first[1]) // BATCH * BATCH
        drawn = stream.draw(np.arange(first, first + size))
        begins = stream.tokens(drawn)[np.cumsum(drawn.ordinary) - drawn.ordinary]
        source = np.searchsorted(own, begins).reshape(-1, BATCH)
        counts = np.stack([np.bincount(row, minlength=sources) for row in source])
        found.append(((counts - expected) ** 2 / expected).sum(1).mean() / (sources - 1))
    return np.array(found)


def predicted(stream: Windows, pieces: int) -> float:
    """Return the expectation of `chi_squares`, of sources of equal size.

    Without replacement, a window draws n of N pieces of one source each, and a batch S of the M
    examples of the window. With v = (1 - n / N) / n, the expectation is v S + 1 - v, and where M
    and N are large that is the 1 + S / n of the documentation.

    Args:
        pieces: in a block.
    """
    n, total = stream._per_window * pieces, len(stream.blocks) * pieces
    variance = (total - n) / (total - 1) / n
    examples = int(stream._epoch(0).first[1])
    return variance * BATCH + (1 - variance) * (examples - BATCH) / (examples - 1)


def standard_errors(found: np.ndarray, expected: float) -> float:
    """Return by how many standard errors the mean of independent numbers is off."""
    return abs(found.mean() - expected) / (found.std(ddof=1) / np.sqrt(len(found)))


def test_the_chi_square_is_what_the_pieces_of_a_window_predict(tmp_path):
    """16 sources lie one behind the other, in blocks of their own, or in the pieces of blocks."""
    blocks, pieces, window = 256, 16, 64
    source = np.arange(blocks * pieces) * 16 // (blocks * pieces)
    means = []
    for name, order, own in (
        ("blocks", np.arange(blocks * pieces), 1),
        ("pieces", np.random.default_rng(0).permutation(blocks * pieces), pieces),
    ):
        texts = [
            (np.repeat(ids, 8), np.ones(8 * pieces, int), np.full(pieces, 8), None)
            for ids in source[order].reshape(blocks, pieces)
        ]
        stream = windows_of(blocks_of(tmp_path / name, texts, 1000, 64), SINGLE, window)
        found = chi_squares(stream, 16)
        # A right order is further off once in 900 trials, by Student's t with 15 degrees.
        assert standard_errors(found, predicted(stream, own)) < 4
        means.append(found.mean())
    assert means[0] > 1.5 > means[1]


@pytest.mark.slow
def test_what_prepare_made_of_sorted_sources_mixes(tmp_path, monkeypatch):
    """A window of 4 GiB has 4,096 segments of 1 MiB where two bytes of text make a token.

    So the windows here have as many, of 64 bytes. Of English a window has twice as many. A piece of
    text becomes a block, as it does in 16 MiB. Both are of 128 segments and not of 16, so that
    there are few files: their order is the same, since a block is a part of the order of segments.
    """
    segment, per_block, window, windows = 64, 128, 32, 2
    for name in ("SEGMENT_BYTES", "_MARGIN"):
        monkeypatch.setattr(segments, name, segment)
    for module, name in ((corpus_plan, "PIECE_BYTES"), (block_writer, "BLOCK_BYTES")):
        monkeypatch.setattr(module, name, segment * per_block)
    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    for source in range(16):
        # Two documents fill a segment, and the first letter of each is that of the source.
        documents = 2 * per_block * window * windows // 16
        words = letters[draw.integers(0, 26, (documents, segment // 4))]
        words[:, 0] = letters[source]
        text = "".join(" ".join(row) + "\n" for row in words)
        (tmp_path / f"{source:02}.txt").write_text(text)
    files = sorted(tmp_path.glob("*.txt"))
    prepare(
        files,
        tmp_path / "data",
        text_format="lines",
        vocab_size=100,
        heldout=0.01,
        workers=1,
        progress=False,
    )
    blocks = open_dataset(tmp_path / "data").blocks["train"]
    stream = windows_of(blocks, SINGLE, window)
    assert stream.windows == windows
    found = chi_squares(stream, 16)
    assert found.mean() <= 1.5
    assert standard_errors(found, predicted(stream, per_block)) < 4
    # A window of two blocks mixes as few segments do, so the measure would show it.
    stream = windows_of(blocks, SINGLE, 2)
    found = chi_squares(stream, 16)
    assert found.mean() > 1.5
    assert standard_errors(found, predicted(stream, per_block)) < 4


# Runs


WINDOW = ("order.window=32 MiB", 'objective.kind="mlm"')  # two blocks


@pytest.fixture(scope="module")
def dataset(small_dataset, tmp_path_factory) -> TokenDataset:
    """The small dataset in blocks of three documents."""
    return in_blocks(small_dataset, tmp_path_factory.mktemp("windows") / "dataset", 3)


def borders(dataset: TokenDataset, steps: int) -> list[int]:
    """Return the steps of tests.trials.RECIPE in which a window begins."""
    objective = ObjectiveConfig(kind="mlm", segments="single")
    stream = Windows(dataset.blocks["train"], objective, 64, 1, 2 * BLOCK_BYTES, "")
    drawn = stream.draw(np.arange(10 * steps))
    return (1 + np.flatnonzero(np.diff(drawn.split))).tolist()


@pytest.mark.parametrize("world", [1, slow(2)])
def test_a_run_resumes_across_a_border_to_the_last_digit(dataset, tmp_path, world):
    found = borders(dataset, 16)
    assert any(0 < border % 10 for border in found) and len(found) >= 2
    data = f"data={dataset.path}"
    same = data, *WINDOW, "schedule.warmup=0", 'schedule.decay="constant"'
    whole = Trial(tmp_path / "whole", dataset.path, *same)
    whole.resume(world)
    parts = Trial(tmp_path / "parts", dataset.path, *same)
    for last in (found[0] // 10, found[0] // 10 + 1, 16):
        parts.resume(world, f"stop.steps={max(last, 1)}")
    assert parts.steps == whole.steps and len(whole.steps) == 16


@pytest.mark.parametrize("world", [1, slow(2)])
def test_a_run_ends_where_a_window_is_damaged(dataset, tmp_path, world):
    """With one line, on each rank, and without a run folder where it is the first window."""
    copy = shutil.copytree(dataset.path, tmp_path / "copy")
    blocks = open_dataset(copy, verify=False).blocks["train"]
    stream = Windows(blocks, SINGLE, 64, 1, 2 * BLOCK_BYTES, "")
    order = stream._epoch(0).order
    flip(blocks, int(order[4]))
    trial = Trial(tmp_path / "later", copy, f"data={copy}", *WINDOW, "checkpoint.every=1")
    with trial.start(world, "stop.steps=1000") as ranks:
        assert 2 in ranks.wait(), ranks.errors
    where = f"{blocks.name(int(order[4]))}: the block at byte"
    (line,) = {line for line in ranks.errors.splitlines() if where in line}
    assert "its SHA-256 differs" in line and "--resume" in line
    begins = int(stream._epoch(0).first[2]) // 10
    assert 0 < len(trial.steps) <= begins
    flip(blocks, int(order[4]))
    trial.resume(world, f"stop.steps={begins + 2}")

    flip(blocks, int(order[0]))
    trial = Trial(tmp_path / "first", copy, f"data={copy}", *WINDOW)
    with trial.start(world) as ranks:
        assert ranks.wait() == [2] * world, ranks.errors
    assert blocks.name(int(order[0])) in ranks.errors and not trial.run.exists()


def test_the_window_of_a_run_changes_only_where_the_order_does_not(dataset, tmp_path):
    trial = Trial(tmp_path / "run", dataset.path, f"data={dataset.path}", *WINDOW[1:])
    trial.resume(1, "stop.steps=2")
    trial.resume(1, "stop.steps=3", "order.window=100 GiB")
    with trial.start(1, "stop.steps=4", "order.window=32 MiB") as ranks:
        assert ranks.wait() == [2]
    assert "order.window = 33554432, but the checkpoint" in ranks.errors
