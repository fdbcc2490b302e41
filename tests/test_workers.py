"""Workers return results and errors in the order of the items, with few in flight.

test_prepare.py tests how signals end them.
"""

from __future__ import annotations

import operator
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fastbert.data.documents import Chunk, parse
from fastbert.data.sources import Source
from fastbert.data.vocabulary import train_tokenizer
from fastbert.data.workers import REPORT_EVERY_S, apply_in_child, map_in_order
from fastbert.errors import InputError


def sleeper(factor: float):
    """Return later items sooner."""

    def sleep(item: int) -> int:
        time.sleep(factor * (5 - item % 6))
        return item * item

    return sleep


@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_order(count: int) -> None:
    assert list(map_in_order(sleeper, (0.01,), range(count), 3)) == [
        item * item for item in range(count)
    ]


def test_large_items_and_results() -> None:
    """More data than a pipe holds goes in both directions at once."""
    items = [(bytes([i]) * 300_000,) for i in range(20)]
    assert list(map_in_order(operator.itemgetter, (0,), items, 2)) == [item[0] for item in items]


def waiting_for_all(folder: Path, processes: int):
    """Return once each of the processes works on an item."""

    def work(item: int) -> int:
        (folder / str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while len(list(folder.iterdir())) < processes and time.monotonic() < deadline:
            time.sleep(0.01)
        return os.getpid()

    return work


def test_this_process_is_one_of_the_workers(tmp_path: Path) -> None:
    """All of them work at the same time, and share the items evenly where these are alike."""
    found = list(map_in_order(waiting_for_all, (tmp_path, 3), range(3), 3))
    assert len(set(found)) == 3 and os.getpid() in found


def test_an_error_of_this_process_comes_in_its_turn() -> None:
    results = map_in_order(failing, (os.getpid(),), range(40), 2)
    before = []
    with pytest.raises(InputError, match="in the first process"):
        before += results
    assert before == [0]  # the other one gets the first item


def failing(first: int):
    def work(item: int) -> int:
        if os.getpid() == first:
            raise InputError("in the first process")
        return item

    return work


def parser(field: str):
    return lambda data: parse(Chunk(Source(Path("a.jsonl"), "jsonl", ""), data, 1, 0, 0), field)


def test_errors_come_in_order_and_end_the_workers() -> None:
    good = b'{"text": "a"}'
    results = map_in_order(parser, ("text",), [good, good, b"{", good, b"[]", good], 2)
    assert [next(results), next(results)] == [["a"], ["a"]]
    children = psutil.Process().children()
    with pytest.raises(InputError, match=r"a\.jsonl: line 1: not JSON"):
        next(results)
    assert not any(
        "data.workers" in " ".join(child.cmdline()) for child in children if child.is_running()
    )


def reporter(seen: Path, report: Callable[[int], None]):
    """Report, and go on when that has arrived."""

    def work(item: int) -> int:
        report(item)
        time.sleep(REPORT_EVERY_S)
        report(10)
        while not seen.exists():
            time.sleep(0.01)
        report(5)
        return item

    return work


@pytest.mark.parametrize("workers", [1, 2])
def test_reports_arrive_while_an_item_is_worked_on(tmp_path: Path, workers: int) -> None:
    seen, amounts = tmp_path / "seen", list[int]()

    def advance(amount: int) -> None:
        amounts.append(amount)
        seen.touch()

    assert list(map_in_order(reporter, (seen,), [1], workers, advance)) == [1]
    assert sum(amounts) == 16 and amounts[-1] == 5


def test_little_is_on_its_way() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(1000):
            taken += 1
            yield item

    results = map_in_order(sleeper, (0.0,), items(), 2)
    for given in range(1, 50):
        next(results)
        assert taken <= given + 4 * 2
    results.close()  # type: ignore[attr-defined]
    assert taken < 100


def no_worker_left(before: list[psutil.Process]) -> bool:
    return {child.pid for child in psutil.Process().children()} <= {child.pid for child in before}


def test_one_call_in_a_child() -> None:
    before = psutil.Process().children()
    item = (bytes(300_000),)
    assert apply_in_child(operator.itemgetter, (0,), item) == item[0]
    with pytest.raises(InputError, match=r"a\.jsonl: line 1: not JSON"):
        apply_in_child(parser, ("text",), b"{")
    with pytest.raises(InputError, match="a process ended before its work was done"):
        apply_in_child(dying, (), 1)
    assert no_worker_left(before)


def dying():
    return os._exit


def training():
    return lambda text: train_tokenizer([text.decode()], 5000).to_str()


class Stop(Exception):
    pass


def test_a_signal_ends_the_training_of_a_vocabulary_at_once() -> None:
    """It comes during a call into Rust, for which Python's handlers would wait."""

    def stop(*_: object) -> None:
        raise Stop

    before = psutil.Process().children()
    bases = os.urandom(40 << 20).translate(b"acgt" * 64)  # minutes of training
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 2)
    begin = time.monotonic()
    try:
        with pytest.raises(Stop):
            apply_in_child(training, (), bases)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert no_worker_left(before)
    interrupted = time.monotonic() - begin
    begin = time.monotonic()
    training()(bases[: 1 << 20])
    assert interrupted < 40 * (time.monotonic() - begin)
