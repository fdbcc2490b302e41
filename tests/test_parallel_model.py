"""Packs computed at once, in processes, give the sums of packs computed in turn."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fastbert import child
from fastbert.cluster.group import join
from fastbert.data.batches import Batches, heldout_batches
from fastbert.training.engine import Engine
from fastbert.training.parallel_model import ParallelModel
from tests.test_engine import CONFIG, new_model, settings, sgd, state_of
from tests.tiers import slow


@pytest.fixture(scope="module")
def packs(small_dataset):
    return Batches(small_dataset, CONFIG).step(0, at_once=2)[:2]


@pytest.fixture(scope="module")
def parallel(small_dataset):
    dropped = dataclasses.replace(
        CONFIG.model, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5
    )
    model = new_model(small_dataset, dataclasses.replace(CONFIG, model=dropped))
    built = ParallelModel(model.train(), 2)
    yield built
    built.close()


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_losses_and_gradients_are_those_of_packs_in_turn(parallel, packs):
    model = parallel.model
    expected = [model(pack) for pack in packs]
    found = parallel(packs)
    for outputs, same in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outputs, same, strict=True))
    # Each loss has a factor of its own, so a mix-up shows.
    factors = [(1.0, 2.0), (3.0, -1.0)]

    def weighted(outputs):
        terms = [
            x * f
            for both, own in zip(outputs, factors, strict=True)
            for x, f in zip(both[:2], own, strict=True)
        ]
        return sum(terms[1:], start=terms[0])

    parts = [
        gradients(a * x[0] + b * x[1], model) for x, (a, b) in zip(expected, factors, strict=True)
    ]
    for got, one, other in zip(gradients(weighted(found), model), *parts, strict=True):
        assert torch.equal(got, one + other)


def test_two_packs_of_different_sizes_and_fewer_packs_than_processes(parallel, packs):
    """The processes keep nothing of an earlier step, and see the weights as they are now."""
    model, (large, small) = parallel.model, packs
    for group in ([large, small], [small], [small, large]):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        expected = sum(gradients(sum(model(pack)[:2]), model)[0] for pack in group)
        outputs = parallel(group)
        loss = sum(x for both in outputs for x in both[:2])
        torch.testing.assert_close(gradients(loss, model)[0], expected)


def test_without_gradients_there_is_no_graph(parallel, packs):
    with torch.no_grad():
        expected = [parallel.model(pack) for pack in packs]
        found = parallel(packs)
    for outputs, same in zip(found, expected, strict=True):
        assert not any(x.requires_grad for x in outputs)
        assert all(torch.equal(a, b) for a, b in zip(outputs, same, strict=True))


def test_a_child_evaluates_where_the_model_does(parallel, packs):
    """Dropout is off in evaluation, and the same in both processes in training."""
    model, found = parallel.model, []
    with torch.no_grad():
        for mode in (False, True):
            model.train(mode)
            found.append(parallel(packs))
            for outputs, same in zip(found[-1], map(model, packs), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(outputs, same, strict=True))
    assert not torch.equal(found[0][0][0], found[1][0][0])


def test_what_a_child_raises_is_raised_here(parallel, packs):
    ids = packs[1].input_ids.clone()
    ids[0] = 10**6
    bad = dataclasses.replace(packs[1], input_ids=ids)
    with pytest.raises(ValueError, match=r"1000000"):
        parallel([packs[0], bad])
    with pytest.raises(ValueError, match=r"1000000"):
        parallel([bad, packs[0]])  # the child's answer is not read
    expected = parallel.model(packs[1])
    assert torch.equal(parallel(packs)[1][2], expected[2])


def test_a_child_that_is_killed_is_named(small_dataset, packs):
    parallel = ParallelModel(new_model(small_dataset), 2)
    pid = parallel._children[0]._process.pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        ChildProcessError, match=rf"process {pid}, .* ended: SIGKILL, as the system"
    ):
        parallel(packs)


def test_signals_of_the_terminal_do_not_end_a_child(parallel, packs):
    parallel(packs)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(parallel._children[0]._process.pid, number)
    assert len(parallel(packs)) == 2


PARENT = """
import time
from fastbert.config import BertConfig
from fastbert.models.bert import BertForPreTraining
from fastbert.training.parallel_model import ParallelModel
built = ParallelModel(BertForPreTraining(BertConfig(num_hidden_layers=1), 100), 2)
print(built._children[0]._process.pid, flush=True)
time.sleep(600)
"""


def test_a_child_ends_with_its_parent():
    """However that ends; here by SIGKILL."""
    parent = subprocess.Popen(
        child.command("exec(sys.argv[1])", PARENT), stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while state(pid) != "Z":
        assert time.monotonic() < deadline, f"process {pid} outlives its parent"
        time.sleep(0.05)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_torchs_threads_are_divided_and_given_back(small_dataset):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        built = ParallelModel(new_model(small_dataset), 2)
        assert torch.get_num_threads() == 2
        built.close()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stage", [0, slow(2)])
def test_an_engine_in_processes_trains_and_evaluates_the_same(small_dataset, stage):
    batches, config = Batches(small_dataset, CONFIG), sgd()
    heldout = heldout_batches(small_dataset, CONFIG, 9)
    ends = []
    for at_once in (1, 2):
        with (
            join(60.0) as group,
            Engine(
                new_model(small_dataset),
                config,
                settings(stage),
                "fp32",
                group,
                at_once=at_once,
            ) as engine,
        ):
            results = [engine.step(batches.step(i, at_once=2), lr=0.1) for i in range(3)]
            ends.append((results, engine.evaluate(heldout, 4), state_of(engine)))
    (results, held_out, state), (in_processes, held_out_in_processes, state_in_processes) = ends
    assert vars(held_out_in_processes) == pytest.approx(vars(held_out), rel=1e-5)
    for one, other in zip(results, in_processes, strict=True):
        assert vars(other) == pytest.approx(vars(one), rel=1e-5)
    for slot, tensors in state.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(state_in_processes[slot][name], tensor, rtol=1e-4, atol=1e-6)
