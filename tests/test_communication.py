"""The bytes that ranks send: the minimum by the formula, and the count of an interface."""

from __future__ import annotations

import json

import pytest

from benchmarks.step.communication import (
    WIDTH,
    Case,
    Measured,
    cases,
    fault,
    gloo_reduce,
    least_bytes,
    measure,
    parameters,
    record,
    table,
)
from tests import namespaces


@pytest.mark.parametrize(
    "stage, micro_batches, passes",
    [(0, 1, 2), (0, 3, 2), (1, 3, 2), (2, 1, 2), (2, 3, 4), (3, 1, 3), (3, 3, 9)],
)
def test_the_least_is_what_rings_send(stage, micro_batches, passes):
    """An all-reduce sends 2 (N - 1) / N of the gradients' bytes.

    Stage 3 sends 3 (N - 1) / N of them for each micro-batch.
    """
    for world in (1, 2, 4):
        expected = passes * (world - 1) / world * parameters() * WIDTH
        assert least_bytes(world, stage, micro_batches) == pytest.approx(expected)


def test_gloos_reduce_by_hand():
    """2 ranks and 8 MiB give 8 segments of 1 MiB, 4 per share.

    Each rank sends 6 of them. Then one rank sends its 4 to the root, which is 2 on average.
    """
    assert gloo_reduce(8 << 20, 2) == 8 << 20
    # 4 ranks and few bytes: 8 segments, 2 per share, 6 of them sent. Then three ranks send 2 to the
    # root.
    assert gloo_reduce(800, 4) == 600 + 600 / 4


def test_what_is_measured_for_one_rank_is_one_line_a_stage():
    assert cases([0, 3], 1) == [Case(0, 1), Case(3, 1)]
    assert Case(1, 2, "owners") in cases([1], 2) and Case(1, 1, "dropped") not in cases([1], 2)


def test_unexplained_bytes_are_a_fault():
    row = Measured(2, Case(1, 1), 100.0, {"all-reduce": 100.0}, 100.0, 101.0, [100.0, 102.0])
    assert fault(row) is None
    assert (
        fault(row._replace(sent=103.0))
        == "stage 1, 2 ranks, 1 micro-batches: 103 bytes a rank and step; gloo should send 100"
    )
    assert fault(row._replace(sent=0.0))


@pytest.mark.slow
def test_two_ranks_send_what_they_are_asked_for():
    """Two real processes, each in a network of its own.

    One case reduces to the owners of the gradients, and the other drops weights.
    """
    if reason := namespaces.why_not():
        pytest.skip(reason)
    rows = measure(2, [Case(1, 1, "owners"), Case(3, 2, "dropped")])
    assert [fault(row) for row in rows] == [None, None]
    owners, dropped = rows
    counts = [
        {name: round(row.passes(count), 2) for name, count in row.asked.items()} for row in rows
    ]
    assert counts[0]["reduce"] == counts[0]["all-gather"] == 1.0
    assert counts[1]["all-gather"] == 4.0 and sum(counts[1].values()) == pytest.approx(
        6.0, abs=0.01
    )
    for row in rows:
        # These two need no more than the minimum.
        assert sum(row.asked.values()) == pytest.approx(row.least, rel=0.01)
        assert row.sent > row.least
        assert json.loads(json.dumps(record(row)))["sent"] == row.sent
    line = next(line for line in table(rows).splitlines() if line.startswith("1 owners"))
    assert f"{owners.sent / 1e6:.2f}" in line and "reduce 1.00" in line
    assert len(dropped.sent_by_rank) == 2
