"""A mixture has exact shares in every block, and uses every running number of a source once."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.config import BatchConfig, ObjectiveConfig, RunConfig, SourceConfig
from fastbert.data.batches import Batches
from fastbert.data.dataset import TokenDataset
from fastbert.data.mixture import BLOCK, Mixture, quotas, source_of, source_seed
from fastbert.data.stream import Stream
from fastbert.errors import InputError
from fastbert.training.verified_dataset import open_sources
from tests.tiny_dataset import tiny_dataset

SIZES = 60, 25, 9  # documents of the three sources


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    """Three datasets with one vocabulary, whose documents differ in number and length."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(7)
    return [
        tiny_dataset(
            folder / name,
            [rng.integers(1, 12, rng.integers(2, 9)).tolist() for _ in range(size)],
            vocab_size=1 << 14,
        )
        for name, size in zip("abc", SIZES, strict=True)
    ]


def recipe(datasets: list[TokenDataset], sequences: int = 64, **changes) -> RunConfig:
    config = RunConfig(
        data=tuple(SourceConfig(str(dataset.path)) for dataset in datasets),
        weights=(0.5, 0.3, 0.2)[: len(datasets)],
        batch=BatchConfig(sequences, 32, 256),
        objective=ObjectiveConfig(segments="single"),
    )
    return replace(config, **changes)


def mixture(batches: Batches) -> Mixture:
    (era,) = batches.timetable.eras
    return batches.streams.mixture(era)


# Quotas


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda w: sum(w) > 0))
def test_quotas_are_whole_exact_in_sum_and_within_one_of_the_share(weights):
    found = quotas(weights)
    total = sum(map(Fraction, weights))
    assert sum(found) == BLOCK
    for weight, quota in zip(weights, found, strict=True):
        assert abs(quota - Fraction(weight) / total * BLOCK) < 1 + Fraction(1, 10**6)


def test_quotas_by_hand():
    assert quotas([1, 1, 2]) == (1024, 1024, 2048)
    assert quotas([1, 1, 1]) == (1366, 1365, 1365)  # the remainders are equal: the first gains
    assert quotas([0, 3]) == (0, 4096)


# The order


class Numbers(Stream):
    """A stream that keeps the running numbers that it is asked for."""

    def __init__(self, stream: Stream):
        self.stream, self.asked = stream, list[int]()

    def draw(self, numbers):
        self.asked += numbers.tolist()
        return self.stream.draw(numbers)


@settings(max_examples=15)
@given(
    weights=st.lists(st.integers(0, 50), min_size=2, max_size=6).filter(any),
    seed=st.integers(0, 2**63 - 1),
    block=st.integers(0, 10**6),
    size=st.integers(1, 3000),
)
def test_every_block_has_its_quotas_and_every_running_number_occurs_once(
    weights, seed, block, size
):
    shares = quotas(weights)
    first = list(range(100, 100 + len(shares)))
    mixed = Mixture([None] * len(shares), shares, first, seed)  # pyright: ignore[reportArgumentType]
    source, running = mixed.places(np.arange(block * BLOCK, (block + 1) * BLOCK))
    assert np.bincount(source, minlength=len(shares)).tolist() == list(shares)
    for s, share in enumerate(shares):
        expected = np.arange(first[s] + block * share, first[s] + (block + 1) * share)
        assert running[source == s].tolist() == expected.tolist()
    # Wherever it stops, what was used is a prefix of each source.
    used = mixed.used(block * BLOCK + size)
    begun = np.bincount(source[:size], minlength=len(shares)).tolist()
    assert used == [block * share + n for share, n in zip(shares, begun, strict=True)]
    # A part of it, in any order, is the same.
    some = np.random.default_rng(seed % 2**32).permutation(BLOCK)[:size]
    again = mixed.places(block * BLOCK + some)
    assert (again[0] == source[some]).all() and (again[1] == running[some]).all()


def test_the_sources_are_mixed_within_a_block_and_differently_in_each():
    mixed = Mixture([None] * 2, quotas([1, 1]), [0, 0], seed=5)  # pyright: ignore[reportArgumentType]
    source, _ = mixed.places(np.arange(64 * BLOCK))
    # Runs of one source: their number has mean n / 2 and variance n / 4 in a random order.
    runs = 1 + int((np.diff(source) != 0).sum())
    assert abs(runs - 32 * BLOCK) < 5 * np.sqrt(16 * BLOCK)
    blocks = source.reshape(64, BLOCK)
    assert len(np.unique(blocks, axis=0)) == 64
    # By place in the block: 64 coins, whose variance over the places is 16.
    counts = blocks.sum(0)
    assert abs(counts.var() - 16) < 5 * 16 * np.sqrt(2 / BLOCK)


def test_the_examples_of_a_source_are_those_of_its_own_run(datasets):
    """Keys, spans and tokens: source 0 as in a run on it alone, the others under their own seed."""
    mixed = mixture(Batches(datasets, recipe(datasets)))
    spans = mixed.draw(np.arange(3 * BLOCK))
    source, index = source_of(spans.index)
    tokens = np.split(mixed.tokens(spans), np.cumsum(spans.ordinary)[:-1])
    begins = 0
    for s, dataset in enumerate(datasets):
        config = replace(recipe([dataset]), weights=None, seed=source_seed(1, s))
        alone = mixture(Batches(dataset, config))
        own = alone.draw(np.arange(int((source == s).sum())))
        for f in fields(own):
            values = index if f.name == "index" else getattr(spans, f.name)
            assert (values[source == s] == getattr(own, f.name)).all(), f.name
        chosen = np.flatnonzero(source == s)
        assert np.concatenate([tokens[i] for i in chosen]).tolist() == alone.tokens(own).tolist()
        begins += len(own.keys)
    assert begins == 3 * BLOCK
    assert len(np.unique(spans.keys)) == len(spans.keys)
    # Tokens come in the order of the spans also where that is another one.
    order = np.random.default_rng(1).permutation(len(source))
    shuffled = mixed.tokens(spans.take(order))
    assert shuffled.tolist() == np.concatenate([tokens[i] for i in order]).tolist()


def test_source_0_has_the_seed_of_the_run_and_the_others_have_their_own():
    seeds = [source_seed(seed, s) for seed in range(20) for s in range(20)]
    assert [source_seed(seed, 0) for seed in range(20)] == list(range(20))
    assert len(set(seeds)) == 400 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_wrong_next_sentence_comes_from_the_same_source(datasets):
    """Every token of `tiny_dataset` is its own position, and each source has other lengths."""
    mixed = mixture(Batches(datasets, recipe(datasets)))
    spans = mixed.draw(np.arange(BLOCK))
    source, _ = source_of(spans.index)
    for s, dataset in enumerate(datasets):
        end = dataset.split("train").tokens
        own = spans.take(np.flatnonzero(source == s))
        assert (own.labels == 1).any() and (own.b_start + own.b_length <= end).all()


# Batches


@pytest.mark.slow
def test_ranks_share_the_same_examples_of_a_mixture(datasets):
    batches = Batches(datasets, recipe(datasets, 96))
    counts = np.zeros(3, int)
    for step in range(BLOCK * 3 // 96):
        whole = np.concatenate([p.examples.numpy() for p in batches.step(step)])
        for world in (2, 3):
            ranks = [p for rank in range(world) for p in batches.step(step, rank, world)]
            shared = np.concatenate([p.examples.numpy() for p in ranks])
            assert np.sort(shared).tolist() == np.sort(whole).tolist()
            assert {p.masked_total for p in ranks} == {sum(len(p.labels) for p in ranks)}
        counts += np.bincount(source_of(whole)[0], minlength=3)
    assert counts.tolist() == [3 * quota for quota in quotas([0.5, 0.3, 0.2])]


def test_an_epoch_of_a_source_gives_each_of_its_examples_once(datasets):
    batches = Batches(datasets, recipe(datasets, 512))
    n = batches.streams.epoch(2, 32)
    seen = np.concatenate([p.examples.numpy() for i in range(8) for p in batches.step(i)])
    source, index = source_of(seen)
    used = int((source == 2).sum())
    counts = np.bincount(index[source == 2], minlength=n)
    assert used > 2 * n and counts.sum() == used
    assert set(counts.tolist()) <= {used // n, used // n + 1}
    assert batches.timetable.epochs(8)[2] == used / n


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.7, 1.0])
def test_weights_by_size_are_a_power_of_the_tokens(datasets, exponent):
    config = recipe(datasets, weights=f"size^{exponent}")
    sizes = [dataset.split("train").tokens for dataset in datasets]
    (era,) = Batches(datasets, config).timetable.eras
    assert era.quotas == quotas([size**exponent for size in sizes])
    if exponent == 1:
        (plain,) = Batches(datasets, recipe(datasets, weights=None)).timetable.eras
        assert plain.quotas == era.quotas


def test_a_weight_that_gives_no_example_is_an_error(datasets):
    with pytest.raises(InputError, match=r"share of 0\.0001 of the examples, less than 1 in 8,192"):
        Batches(datasets, recipe(datasets, weights=(0.5, 0.4999, 0.0001)))
    (era,) = Batches(datasets, recipe(datasets, weights=(0.5, 0.5, 0.0))).timetable.eras
    assert era.quotas == (2048, 2048, 0)


def test_a_source_is_used_for_its_epochs_at_most(datasets):
    """The error has the number of epochs, and the share and the length that it names do fit."""
    n = Batches(datasets, recipe(datasets)).streams.epoch(0, 32)

    def run(steps: float, share: float) -> Batches:
        data = tuple(
            SourceConfig(str(dataset.path), weight, epochs)
            for dataset, weight, epochs in zip(
                datasets, (share, 1 - share - 0.2, 0.2), (2.0, None, None), strict=True
            )
        )
        config = recipe(datasets, data=data, weights=None)
        return Batches(datasets, replace(config, stop=replace(config.stop, steps=int(steps))))

    steps = 100 * n // 64
    with pytest.raises(InputError, match=r"a, with a share of 0\.25") as error:
        run(steps, 0.25)
    message = str(error.value)
    assert float(message.split(" for ")[1].split()[0]) == pytest.approx(25, rel=0.01)
    share = float(message.split("a share of ")[2].split()[0])
    fitting = float(message.split("a run of ")[1].split()[0].replace(",", ""))
    assert share == pytest.approx(0.02, rel=0.01) and fitting == pytest.approx(8 * n / 64, rel=0.03)
    # They are rounded, and the last block of the mixture is not whole.
    run(steps, 0.97 * share)
    run(0.9 * fitting, 0.25)
    data = tuple(SourceConfig(str(d.path), None, 1.0) for d in datasets)
    config = recipe(datasets, data=data)
    with pytest.raises(InputError, match="run of known length"):
        Batches(datasets, replace(config, stop=replace(config.stop, seconds=10.0)))


def test_one_dataset_by_two_names_is_an_error(two_sources, tmp_path):
    a, b = (source.path for source in two_sources)
    assert len(open_sources([a, b])) == 2
    (tmp_path / "link").symlink_to(a)
    shutil.copytree(a, tmp_path / "copy")
    for other in (tmp_path / "link", tmp_path / "copy", b / ".." / a.name):
        with pytest.raises(InputError, match=f"data: {other} is the same dataset as {a}; give it"):
            open_sources([a, b, other])


def test_a_bad_example_is_named_by_its_source(datasets):
    from fastbert.training.monitor import example_name

    (pack, *_) = Batches(datasets, recipe(datasets)).step(0)
    for example in pack.examples.tolist():
        source, index = source_of(np.array(example))
        assert example_name(example, "abc") == f"{'abc'[int(source)]}:{int(index)}"
