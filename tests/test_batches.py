"""Batches contain the same examples at any number of ranks, fit their packs, and are prefetched.

The tests also cover the layout and the held-out batches.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.config import BatchConfig, ObjectiveConfig, RunConfig
from fastbert.data.batches import Batches, heldout_batches, share_out
from fastbert.data.dataset import TokenDataset
from fastbert.data.examples import Examples
from fastbert.data.manifest import SpecialIds
from fastbert.data.masking import selected_counts
from fastbert.data.packing import PackedBatch, pack_texts
from fastbert.data.prefetch import STEPS_AHEAD, Prefetch
from fastbert.errors import InputError
from tests.tiny_dataset import tiny_dataset

TRAIN = [
    [5, 9, 4],
    [7],
    [3, 3, 3, 3, 3, 3, 3],
    [12, 15, 9, 20, 11, 8],
    [30, 31, 2, 29],
    [6, 6, 6, 6],
    [1, 1],
] * 6
HELDOUT = [[5, 6, 7], [8, 4], [30, 9, 12, 7], [2], [6, 6]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return tiny_dataset(tmp_path_factory.mktemp("dataset") / "dataset", TRAIN, HELDOUT)


def recipe(
    sequences: int = 12,
    max_length: int = 32,
    micro_batch_tokens: int = 256,
    seed: int = 1,
    **objective,
) -> RunConfig:
    batch = BatchConfig(sequences, max_length, micro_batch_tokens)
    return RunConfig(data="dataset", seed=seed, batch=batch, objective=ObjectiveConfig(**objective))


def contents(packs: list[PackedBatch]) -> dict[int, tuple]:
    """Map each example's seed to all its values in the packs."""
    found = {}
    for pack in packs:
        for i, (begin, end) in enumerate(
            zip(pack.cu_seqlens.tolist(), pack.cu_seqlens.tolist()[1:], strict=False)
        ):
            inside = (pack.masked_positions >= begin) & (pack.masked_positions < end)
            seed = int(pack.dropout_seeds[i])
            assert seed not in found
            found[seed] = (
                int(pack.examples[i]),
                int(pack.next_sentence_labels[i]),
                *(
                    getattr(pack, name)[begin:end].tolist()
                    for name in ("input_ids", "token_type_ids", "position_ids")
                ),
                (pack.masked_positions[inside] - begin).tolist(),
                pack.labels[inside].tolist(),
            )
    return found


# The step does not depend on how it is shared


@pytest.mark.parametrize(
    "objective", [{}, {"segments": "single"}, {"kind": "mlm"}, {"whole_word": True}]
)
def test_ranks_share_the_same_examples(dataset, objective):
    batches = Batches(dataset, recipe(sequences=16, micro_batch_tokens=128, **objective))
    for step in (0, 7, 123_456_789):
        whole = batches.step(step)
        expected = contents(whole)
        assert len(expected) == 16
        for world, at_once in ((2, 1), (4, 1), (1, 2), (2, 3)):
            ranks = [batches.step(step, rank, world, at_once) for rank in range(world)]
            (number,) = {len(packs) for packs in ranks}
            assert number % at_once == 0
            packs = [pack for packs in ranks for pack in packs]
            assert contents(packs) == expected
            for pack in [*packs, *whole]:
                assert pack.masked_total == sum(len(p.labels) for p in whole)
                assert pack.pairs_total == sum(
                    int((p.next_sentence_labels >= 0).sum()) for p in whole
                )


def test_an_epoch_gives_every_example_once_even_where_it_ends_within_a_step(dataset):
    batches = Batches(dataset, recipe(sequences=32))
    n = batches.examples_per_epoch
    assert n % 32
    drawn = np.concatenate(
        [
            np.sort(np.concatenate([p.examples for p in batches.step(step)]))
            for step in range(2 * n // 32 + 1)
        ]
    )
    assert np.bincount(drawn[: n // 32 * 32], minlength=n).max() == 1
    counts = np.bincount(drawn, minlength=n)
    assert set(counts[: 2 * n % 32]) <= {2, 3} and counts.min() >= 2
    assert batches.timetable.steps_per_epoch == n / 32
    assert batches.timetable.epochs(0) == [0] and batches.timetable.epochs(5) == [5 * 32 / n]


def test_a_step_larger_than_several_epochs(tmp_path):
    small = tiny_dataset(tmp_path / "small", [[5, 5], [6, 6], [7, 7]])
    packs = Batches(small, recipe(sequences=10)).step(1)  # examples 10 to 19 of epochs of 3
    examples = np.sort(np.concatenate([p.examples for p in packs]))
    assert np.bincount(examples).tolist() == [3, 4, 3]
    assert len(contents(packs)) == 10  # keys, and with them masks, differ between epochs


def test_masks_and_partners_differ_between_epochs(tmp_path):
    two = tiny_dataset(tmp_path / "two", [[20, 20], [20, 20]])
    batches = Batches(two, recipe(sequences=2, max_length=64, segments="single"))
    steps = [contents(batches.step(epoch)) for epoch in range(20)]
    masked = {tuple(labels) for step in steps for *_, labels in step.values()}
    assert len(masked) == 40
    assert {label for step in steps for _, label, *_ in step.values()} == {0, 1}


@pytest.mark.parametrize(("segments", "fill"), [("fill", 0.9), ("single", 0.75)])
def test_real_text(small_dataset, segments, fill):
    config = recipe(sequences=64, max_length=64, micro_batch_tokens=2048, segments=segments)
    batches = Batches(small_dataset, config)
    packs = [
        pack for step in range(batches.examples_per_epoch // 64) for pack in batches.step(step)
    ]
    tokens, selected = sum(p.tokens for p in packs), sum(len(p.labels) for p in packs)
    sequences = sum(p.sequences for p in packs)
    shown = sum(
        int((p.input_ids[p.masked_positions] == small_dataset.special.mask).sum()) for p in packs
    )
    assert tokens / sequences > fill * 64
    assert selected / (tokens - 3 * sequences) == pytest.approx(
        0.15, abs=0.005
    ) and shown / selected == pytest.approx(0.8, abs=0.02)
    assert np.mean(np.concatenate([p.next_sentence_labels for p in packs])) == pytest.approx(
        0.5, abs=4 * 0.5 / np.sqrt(sequences)
    )


# Packs


@settings(max_examples=200)
@given(data=st.data(), world=st.integers(1, 6), limit=st.integers(20, 200))
def test_sequences_are_shared_out_evenly_and_fit(data, world, limit):
    lengths = np.array(data.draw(st.lists(st.integers(3, limit), min_size=world, max_size=60)))
    lengths = lengths[: len(lengths) // world * world]
    bins = share_out(lengths, world, limit)
    assert len(bins) % world == 0 and all(len(of) for of in bins)
    np.testing.assert_array_equal(np.sort(np.concatenate(bins)), np.arange(len(lengths)))
    loads = [int(lengths[of].sum()) for of in bins]
    assert max(loads) <= limit and max(loads) - min(loads) <= lengths.max()
    assert all((np.diff(lengths[of]) <= 0).all() for of in bins)
    assert len(bins) == world or lengths.sum() > (len(bins) - world) * (limit - lengths.max())


@pytest.mark.parametrize("world", [1, 4])
def test_packs_fit_and_are_balanced(dataset, world):
    batches = Batches(dataset, recipe(sequences=64, micro_batch_tokens=128))
    ranks = [batches.step(3, rank, world) for rank in range(world)]
    tokens = [[pack.tokens for pack in packs] for packs in ranks]
    assert len(tokens[0]) > 1 and np.max(tokens) <= 128 and np.ptp(tokens) <= 32
    assert (
        max(pack.tokens for pack in heldout_batches(dataset, recipe(micro_batch_tokens=40), 99))
        <= 40
    )


def test_layout(dataset):
    """Token ids are positions in the split here, so that each sequence can be reconstructed."""
    config = recipe(sequences=40, micro_batch_tokens=512)
    special = dataset.special
    examples = Examples(dataset.split("train"), config.objective, 32, config.seed, "")
    for pack in Batches(dataset, config).step(0):
        spans = examples.draw(0, pack.examples.numpy())
        original = pack.input_ids.clone()
        original[pack.masked_positions] = pack.labels
        lengths = np.diff(pack.cu_seqlens.numpy())
        np.testing.assert_array_equal(lengths, spans.lengths)
        assert pack.cu_seqlens[0] == 0 and pack.cu_seqlens[-1] == pack.tokens == len(pack.input_ids)
        assert pack.max_seqlen == lengths.max() and pack.sequences == len(lengths)
        for i, begin in enumerate(pack.cu_seqlens.tolist()[:-1]):
            a, b = spans.a_length[i], spans.b_length[i]
            sequence = [
                special.cls, *range(spans.a_start[i], spans.a_start[i] + a), special.sep,
                *range(spans.b_start[i], spans.b_start[i] + b), special.sep,
            ]  # fmt: skip
            assert original[begin : begin + lengths[i]].tolist() == sequence
            assert pack.token_type_ids[begin : begin + lengths[i]].tolist() == [0] * (a + 2) + [
                1
            ] * (b + 1)
            assert pack.position_ids[begin : begin + lengths[i]].tolist() == list(range(a + b + 3))
        np.testing.assert_array_equal(pack.next_sentence_labels, spans.labels)
        assert (
            len(pack.labels)
            == len(pack.masked_positions)
            == selected_counts(spans.ordinary, config.objective).sum()
        )
        assert (pack.masked_positions.diff() > 0).all()
        assert not set(original[pack.masked_positions].tolist()) & {special.cls, special.sep}


def test_dtypes(dataset):
    for pack in (Batches(dataset, recipe()).step(0)[0], pack_texts([[1]], None, dataset.special)):
        for name, value in vars(pack).items():
            counts = (
                "max_seqlen",
                "masked_total",
                "pairs_total",
                "padding_tokens",
                "padding_sequences",
            )
            expected = (
                int if name in counts else torch.int32 if name == "cu_seqlens" else torch.int64
            )
            assert (type(value) if expected is int else value.dtype) is expected, name


def test_without_pairs_there_is_no_b_and_nothing_to_say_of_it(dataset):
    (pack,) = Batches(dataset, recipe(kind="mlm", micro_batch_tokens=4096)).step(0)
    assert (
        set(pack.next_sentence_labels.tolist()) == {-100}
        and pack.pairs_total == 0
        and not pack.token_type_ids.any()
    )
    assert (pack.input_ids == dataset.special.sep).sum() == 12


def test_moves_to_another_device(dataset):
    moved = Batches(dataset, recipe()).step(0)[0].to("meta")
    assert {
        value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)
    } == {"meta"}


class Copies(TorchDispatchMode):
    """Count copies to another device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def copies(pack: PackedBatch) -> int:
    with Copies() as found:
        moved = pack.to("meta")
    for name, value in vars(pack).items():
        if torch.is_tensor(value):
            there = getattr(moved, name)
            assert (there.device.type, there.dtype, there.shape) == (
                "meta",
                value.dtype,
                value.shape,
            )
    return found.count


@pytest.mark.parametrize("sequences", [12, 13])  # an odd and an even number of 32-bit bounds
def test_a_batch_in_one_piece_is_the_same_and_moves_at_once(dataset, sequences):
    """The layout is also tested without a GPU, where no memory is page-locked."""
    for pack in (
        *Batches(dataset, recipe(sequences=sequences)).step(0),
        pack_texts([[1], [2, 3]], None, dataset.special),
    ):
        joined = pack.pinned(page_locked=False)
        for name, value in vars(pack).items():
            assert (
                torch.equal(getattr(joined, name), value)
                if torch.is_tensor(value)
                else getattr(joined, name) == value
            )
        tensors = [value for value in vars(pack).values() if torch.is_tensor(value)]
        assert copies(pack) == len(tensors) and copies(joined) == 1


def test_what_was_replaced_in_a_batch_in_one_piece_moves_as_it_is(dataset):
    joined = Batches(dataset, recipe()).step(0)[0].pinned(page_locked=False)
    seeds = joined.dropout_seeds + 1
    changed = dataclasses.replace(joined, dropout_seeds=seeds)
    assert copies(changed) > 1 and torch.equal(changed.to("cpu").dropout_seeds, seeds)
    # These are other parts of the same memory.
    swapped = dataclasses.replace(
        joined, labels=joined.masked_positions, masked_positions=joined.labels
    )
    assert copies(swapped) > 1 and torch.equal(swapped.to("cpu").labels, joined.masked_positions)


def test_every_token_id_may_be_a_label_also_0(dataset):
    batches = Batches(
        dataset, recipe(sequences=64, max_length=64, micro_batch_tokens=8192, kind="mlm")
    )
    labels = {
        label for step in range(60) for pack in batches.step(step) for label in pack.labels.tolist()
    }
    assert labels == set(range(dataset.vocab_size - 5))


# Held-out


def test_heldout_batches_are_the_same_for_every_run(dataset):
    one, other = (
        heldout_batches(dataset, recipe(seed=seed, micro_batch_tokens=limit), 4)
        for seed, limit in ((1, 64), (99, 4096))
    )
    assert contents(one) == contents(other) and len(one) > len(other) == 1
    assert all(
        p.masked_total == sum(len(q.labels) for q in one) and p.pairs_total == 4 for p in one
    )


def test_heldout_batches_are_of_the_heldout_split_and_no_more_than_it_has(dataset):
    packs = heldout_batches(dataset, recipe(kind="mlm", segments="single", max_length=64), 1000)
    examples = Examples(
        dataset.split("heldout"), ObjectiveConfig(kind="mlm", segments="single"), 64, 0, ""
    )
    assert (
        sorted(np.concatenate([p.examples for p in packs]))
        == list(range(len(examples)))
        == list(range(12))
    )
    assert max(p.labels.max() for p in packs) < sum(map(sum, HELDOUT))


# Inference


def test_pack_texts():
    special = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
    pack = pack_texts([[7, 8], [], [9]], [[5], [6, 6], []], special)
    assert pack.input_ids.tolist() == [2, 7, 8, 3, 5, 3, 2, 3, 6, 6, 3, 2, 9, 3]
    assert pack.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 1, 2]
    assert pack.cu_seqlens.tolist() == [0, 6, 11, 14] and pack.max_seqlen == 6
    assert (
        pack.next_sentence_labels.tolist() == [-100] * 3
        and len(pack.masked_positions) == len(pack.labels) == 0
    )
    assert pack.examples.tolist() == [0, 1, 2] and pack.masked_total == pack.pairs_total == 0
    single = pack_texts([[7, 8], [9]], None, special)
    assert single.input_ids.tolist() == [2, 7, 8, 3, 2, 9, 3] and not single.token_type_ids.any()
    empty = pack_texts([], None, special)
    assert (
        empty.tokens == empty.sequences == empty.max_seqlen == 0
        and empty.cu_seqlens.tolist() == [0]
    )


# What cannot be done


def test_too_few_sequences_for_the_ranks(dataset):
    with pytest.raises(InputError, match=r"batch.sequences = 3 cannot be shared by 4 ranks"):
        Batches(dataset, recipe(sequences=3)).step(0, 0, 4)
    with pytest.raises(
        InputError,
        match=r"batch.sequences = 5 .* batch.micro_batch_tokens = 40; make it a multiple of 4",
    ):
        Batches(dataset, recipe(sequences=5, micro_batch_tokens=40)).step(0, 0, 4)
    batches = Batches(dataset, recipe(sequences=5, micro_batch_tokens=64))
    assert all(
        pack.sequences
        for rank in range(4)
        for step in range(20)
        for pack in batches.step(step, rank, 4)
    )


def test_a_dataset_without_an_example(tmp_path: Path):
    lonely = tiny_dataset(tmp_path / "lonely", [[5], [6]], [[7, 7], [8]])
    with pytest.raises(
        InputError,
        match=r"lonely: split train: none of its 2 documents has two sentences, "
        r"and objective.kind = \"mlm\+nsp\"",
    ):
        Batches(lonely, recipe())
    with pytest.raises(
        InputError, match=r"lonely: split heldout: document 0 gives 1 of the 1 examples"
    ):
        heldout_batches(lonely, recipe(), 4)
    assert Batches(lonely, recipe(sequences=2, kind="mlm")).step(0)[0].sequences == 2


# The thread


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_gives_the_steps_in_order_from_any_one(dataset):
    batches = Batches(dataset, recipe())
    with Prefetch(batches, 5) as ahead:
        for expected in (5, 6, 7, 8, 9, 10):
            step, packs, waited = next(ahead)
            assert step == expected and 0 <= waited < 10
            assert contents(packs) == contents(batches.step(step))


class Slow(Batches):
    """A slow source that counts requests, and optionally fails at step 2."""

    def __init__(self, dataset: TokenDataset, seconds: float = 0.0, fails: bool = False):
        super().__init__(dataset, recipe())
        self.asked, self.seconds, self.fails = [], seconds, fails

    def step(self, step: int, rank: int = 0, world: int = 1, at_once: int = 1) -> list[PackedBatch]:
        self.asked.append((step, rank, world))
        time.sleep(self.seconds)
        if self.fails and step == 2:
            raise OSError("the disk is gone")
        return super().step(step, rank, world)


def test_prefetch_runs_no_further_ahead_than_it_should_and_ends(dataset):
    batches = Slow(dataset)
    ahead = Prefetch(batches, 0, rank=1, world=2)
    next(ahead)
    deadline = time.monotonic() + 30
    while len(batches.asked) < STEPS_AHEAD + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # enough time for a thread without a bound to run ahead
    # One step is taken, STEPS_AHEAD are in the queue, and the thread holds one.
    assert batches.asked == [(step, 1, 2) for step in range(1 + STEPS_AHEAD + 1)]
    ahead.close()
    ahead.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(ahead)


def test_prefetch_measures_the_wait(dataset):
    with Prefetch(Slow(dataset, seconds=0.15), 0) as ahead:
        assert next(ahead)[2] > 0.1


def test_an_exception_in_the_thread_belongs_to_its_step(dataset):
    with Prefetch(Slow(dataset, fails=True), 0) as ahead:
        assert [next(ahead)[0] for _ in range(2)] == [0, 1]
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
        assert not threads()
