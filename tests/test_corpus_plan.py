"""Pieces hold every segment once, are of equal size, and mix a long text but not a short one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.corpus_plan import Part, Plan
from fastbert.data.segments import SEGMENT_BYTES, File
from fastbert.data.sources import Source

MIB = 1 << 20


def plan_of(sizes: list[int], cut: bool = True, piece: int = 16 * MIB) -> Plan:
    source = Source(Path("a.txt"), "txt", "")
    return Plan([File(source, size, "", SEGMENT_BYTES if cut else 0) for size in sizes], piece)


def parts_of(plan: Plan) -> list[list[Part]]:
    return [plan.piece(number) for number in range(plan.pieces)]


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=12),
    st.booleans(),
    st.sampled_from([MIB, 3 * MIB, 16 * MIB]),
)
def test_every_segment_is_in_one_piece(sizes: list[int], cut: bool, piece: int) -> None:
    plan = plan_of(sizes, cut, piece)
    pieces = parts_of(plan)
    found = sorted((part.file, part.segment) for parts in pieces for part in parts)
    wanted = [(i, n) for i, file in enumerate(plan.files) for n in range(file.segments)]
    assert found == wanted and all(pieces)
    for number, parts in enumerate(pieces):
        bounds = [plan.files[part.file].bounds(part.segment) for part in parts]
        assert plan.piece_size(number) == sum(end - begin for begin, end in bounds)
        assert [(p.file, p.segment) for p in parts] == sorted((p.file, p.segment) for p in parts)
        # A large segment is a piece of its own; of others at most one exceeds the size.
        longest = max(end - begin for begin, end in bounds)
        assert plan.piece_size(number) <= piece + longest or len(parts) == 1
        assert longest < piece or len(parts) == 1
    assert sum(map(plan.piece_size, range(plan.pieces))) == plan.size == sum(sizes)


def test_a_text_of_one_piece_keeps_its_order() -> None:
    plan = plan_of([5 * MIB, 1, 10 * MIB, MIB - 1])
    assert plan.pieces == 1
    assert [part.file for part in plan.piece(0)] == [0] * 5 + [1] + [2] * 10 + [3]


def test_a_long_text_is_mixed() -> None:
    """Each piece has segments of all tenths of a text, as independent draws would."""
    plan = plan_of([3200 * MIB])
    assert plan.pieces == 200
    spread = [len({part.segment // 320 for part in parts}) for parts in parts_of(plan)]
    # Of 16 draws from 10 kinds 10 (1 - 0.9^16) = 8.1 are different on average.
    assert abs(np.mean(spread) - 8.15) < 0.3
    sizes = list(map(plan.piece_size, range(plan.pieces)))
    assert max(sizes) - min(sizes) <= MIB
    assert parts_of(plan) == parts_of(plan_of([3200 * MIB]))


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [[1], [64 * MIB], [65 * MIB], [1000 * MIB], [10_000] * 20_000, [MIB, 500 * MIB, 3], [7] * 5],
)
def test_the_sample_for_the_vocabulary(sizes: list[int], cut: bool) -> None:
    plan = plan_of(sizes, cut)
    sample = plan.sample()
    total = sum(limit for _, limit in sample)
    assert total <= 64 * MIB
    for part, limit in sample:
        begin, end = plan.files[part.file].bounds(part.segment)
        assert 0 < limit <= end - begin
    # As much as fits, up to the whole text; a stride loses less than half.
    assert total == plan.size or total > 32 * MIB
    places = np.array([plan.first_segment[part.file] + part.segment for part, _ in sample])
    assert len(set(np.diff(places))) <= 1


def test_a_stretch_is_a_segment_or_a_block_of_a_file_that_is_not_cut() -> None:
    """In bytes of token ids, which are half of those of the text here."""
    assert plan_of([64 * MIB] * 2).stretch(64 * MIB, longest=16 * MIB) == MIB / 2
    assert plan_of([64 * MIB] * 2, cut=False).stretch(64 * MIB, longest=16 * MIB) == 16 * MIB
    assert plan_of([8 * MIB] * 2, cut=False).stretch(8 * MIB, longest=16 * MIB) == 4 * MIB
    # Three quarters of the text lie in stretches of 12 MiB, and a quarter in stretches of 4 MiB.
    assert plan_of([24 * MIB, 8 * MIB], cut=False).stretch(16 * MIB, 16 * MIB) == 10 * MIB
