"""Losses that are not finite, from real causes.

They are reported with their examples, skipped up to a limit, and never part of a checkpoint.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fastbert.checkpoints import checkpoint
from fastbert.data.batches import Batches, heldout_batches
from fastbert.data.packing import PackedBatch
from fastbert.recipe import load_config
from tests import one_process
from tests.tiers import slow
from tests.trials import Laboratory, Trial, wait_for

# The position of a token in its sequence. One sequence in four is longer, so about a third of the
# steps have none.
PLACE = 62
SUDDEN = ("schedule.warmup=0", "schedule.decay=constant", "evaluate.every=1000")
FEW = ("batch.sequences=4", *SUDDEN)
HUGE = 3e38  # finite in single precision, though no sum of two such numbers is


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("not-finite"), small_dataset.path)


def damage(trial: Trial, place: int = PLACE) -> None:
    """Make one position's embedding huge in a checkpoint whose hashes are right."""
    found, _ = checkpoint.newest_valid(trial.run)
    assert found is not None
    state = {slot: dict(tensors) for slot, tensors in checkpoint.read_all(found.path).items()}
    state["weight"]["embeddings.position"][place] = HUGE
    for path in trial.checkpoints:
        checkpoint.delete([path])
    tensors = [
        (f"{slot}/{name}", tensor)
        for slot, named in state.items()
        for name, tensor in named.items()
    ]
    one_process.save(found.path.parent, found.step, tensors, found.metadata, 1)


def examples(trial: Trial, dataset, longer_than: int = 0) -> dict[int, list[int]]:
    """Map each step to those of its examples that have more tokens."""
    batches, found = Batches(dataset, load_config(trial.recipe, trial.overrides)), {}
    for step in range(trial.records(None, "skip")[-1]["step"]):
        packs = batches.step(step)
        indices = np.concatenate(
            [pack.examples[pack.cu_seqlens.diff() > longer_than] for pack in packs]
        )
        found[step + 1] = sorted(int(i) for i in indices)
    return found


def all_finite(trial: Trial) -> bool:
    found, complaints = checkpoint.newest_valid(trial.run)
    assert found is not None and complaints == []
    return all(
        bool(tensor.isfinite().all())
        for slot in checkpoint.read_all(found.path).values()
        for tensor in slot.values()
    )


def fails(trial: Trial, world: int, *overrides: str) -> list[str]:
    """Train to an end with exit code 1, and return the lines that rank 0 printed."""
    with trial.start(world, *overrides) as ranks:
        assert ranks.wait() == [1] * world and "Traceback" not in ranks.errors, ranks.errors
        return ranks[0].out.read_text().splitlines()


@pytest.mark.parametrize("world, stage", [(1, 0), slow(2, 3)])
def test_examples_that_break_the_loss_are_skipped(lab, small_dataset, world, stage):
    """Only long sequences use a damaged embedding.

    Every other step is the same as without the damage, on any number of ranks. The held-out text
    uses the embedding too. So the run does not end well, but its weights are saved, because they
    give finite losses elsewhere.
    """
    trial = lab.trial(*FEW, "stop.skipped=20", stage=stage)
    trial.resume(world, "stop.steps=3")
    damage(trial)
    said = fails(trial, world)
    expected = {
        step: found
        for step, found in examples(trial, small_dataset, PLACE).items()
        if found and step > 3
    }
    skips = trial.records("skip")
    assert len(skips) > 2 and {skip["step"]: skip["examples"] for skip in skips} == {
        s: e for s, e in expected.items() if s <= skips[-1]["step"]
    }
    assert all("not finite" in skip["reason"] for skip in skips)
    assert sorted([s["step"] for s in trial.steps] + [s["step"] for s in skips]) == list(
        range(1, lab.steps + 1)
    )
    assert sum("is skipped" in line and str(skips[0]["examples"][0]) in line for line in said) >= 1
    assert all_finite(trial)
    assert (
        trial.records("save")[-1]["step"] == lab.steps and "checkpoint" in trial.records("save")[-1]
    )
    assert said[-1].startswith(
        f"stopped at step {lab.steps}: stop.steps = {lab.steps}, but the held-out loss is not "
        f"finite; "
    )
    assert trial.records("evaluate")[-1]["loss"] is None
    if world == 1:
        # There is nothing left to do, but that is no success.
        assert fails(trial, world)[-1] == said[-1]


def test_too_many_in_a_row_end_the_run(lab, small_dataset):
    """This is gradient descent with learning rate 100 and without clipping."""
    limit = 3
    trial = lab.trial(
        "optimizer.name=sgd",
        "optimizer.lr=100",
        "optimizer.max_grad_norm=0",
        f"stop.skipped={limit}",
        "evaluate.every=1000",
        steps=200,
    )
    said = fails(trial, 1)[-1]
    skips = trial.records("skip")
    assert len(skips) >= limit + 1 and [s["step"] for s in skips[-limit - 1 :]] == list(
        range(skips[-1]["step"] - limit, skips[-1]["step"] + 1)
    )
    everything = examples(trial, small_dataset)
    assert skips[-1]["examples"] == everything[skips[-1]["step"]] or skips[-1]["examples"] == []
    assert f"stop.skipped = {limit}" in said and "optimizer.lr" in said
    assert all_finite(trial)
    assert trial.records("stop")[-1]["step"] == skips[-1]["step"]


@pytest.mark.slow
def test_a_loss_is_never_averaged_away(lab):
    """The loss of one rank is not finite, and both ranks skip the step together."""
    trial = lab.trial(*FEW, "stop.skipped=20", stage=1)
    trial.resume(2, "stop.steps=3")
    damage(trial)
    alone = lab.trial(*FEW, "stop.skipped=20").copy_of(trial)
    fails(trial, 2)
    fails(alone, 1)
    assert [s["step"] for s in trial.records("skip")] == [s["step"] for s in alone.records("skip")]
    ours, theirs = (torch.tensor([s["loss"] for s in t.steps[3:]]) for t in (trial, alone))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=0)


# Weights that a step has broken. The loss of this step was finite, and every later step is skipped.

BREAKS = ("optimizer.name=sgd", "optimizer.lr=100", "optimizer.max_grad_norm=0", *SUDDEN)


@pytest.fixture(scope="module")
def last(lab) -> int:
    """The step that breaks the weights, which is the last one that is applied."""
    trial = lab.trial(*BREAKS, "stop.skipped=0", steps=200)
    fails(trial, 1)
    assert trial.steps[-1]["step"] > 2
    return trial.steps[-1]["step"]


def hopeless(trial: Trial, last: int) -> list[str]:
    return fails(trial, 1)


def stopped_while_skipping(trial: Trial, last: int) -> list[str]:
    return fails(trial, 1, f"stop.steps={last + 4}")


def stopped_at_the_step_that_breaks(trial: Trial, last: int) -> list[str]:
    return fails(trial, 1, f"stop.steps={last}")


def interrupted(trial: Trial, last: int) -> list[str]:
    with trial.start(1, "stop.skipped=100000") as ranks:
        wait_for(lambda: len(trial.records("skip")) > 3)
        ranks.signal(signal.SIGTERM)
        assert ranks.wait() == [1], ranks.errors
        return ranks[0].out.read_text().splitlines()


@pytest.mark.parametrize(
    "end, every, keep",
    [
        (hopeless, 2, 2),
        slow(stopped_while_skipping, 1, 1),
        slow(stopped_at_the_step_that_breaks, 1, 1),
        slow(interrupted, 1, 1),
    ],
)
def test_broken_weights_push_out_no_checkpoint(lab, last, end, every, keep):
    """In any case the earlier checkpoints remain, and the last line says how to resume from them.

    Resuming works.
    """
    trial = lab.trial(*BREAKS, f"checkpoint.every={every}", f"checkpoint.keep={keep}", steps=200)
    said = end(trial, last)
    valid = list(range(every, last, every))[-keep:]
    assert [path.name for path in trial.checkpoints] == [f"step-{step:08}" for step in valid]
    assert [
        path.name for path in (trial.run / "checkpoints").iterdir() if path.name.startswith(".")
    ] == []
    assert said[-1].endswith(
        f"; the newest checkpoint with finite losses is {trial.checkpoints[-1]}; "
        "resume from it with a lower rate: "
        f"fastbert pretrain {trial.run / 'config.toml'} --resume optimizer.lr=10"
    )
    assert all_finite(trial) and trial.steps[-1]["step"] == last
    before = len(trial.records("skip"))
    trial.resume(1, "optimizer.lr=1e-6", f"stop.steps={last + 4}", "stop.skipped=0")
    assert trial.steps[-1]["step"] == last + 4 and len(trial.records("skip")) == before


def test_a_process_that_is_killed_while_it_skips(lab, last):
    """The checkpoint of the broken weights is never published."""
    trial = lab.trial(
        *BREAKS, "checkpoint.every=1", "checkpoint.keep=1", "stop.skipped=100000", steps=200000
    )
    with trial.start(1) as ranks:
        wait_for(lambda: len(trial.records("skip")) > 3)
        ranks.signal(signal.SIGKILL)
        assert ranks.wait() == [-9]
    assert [path.name for path in trial.checkpoints] == [f"step-{last - 1:08}"]
    trial.resume(1, "optimizer.lr=1e-6", f"stop.steps={last + 2}")
    assert [path.name for path in trial.checkpoints] == [f"step-{last + 2:08}"]


@pytest.mark.slow
def test_the_same_on_two_ranks(lab):
    trial = lab.trial(*BREAKS, "checkpoint.every=1", "checkpoint.keep=1", stage=1, steps=200)
    said = fails(trial, 2)
    broke = trial.steps[-1]["step"]
    assert [path.name for path in trial.checkpoints] == [f"step-{broke - 1:08}"] and str(
        trial.checkpoints[0]
    ) in said[-1]
    assert len(list((trial.run / "checkpoints").iterdir())) == 1


def test_a_bad_text_in_the_last_steps_does_not_lose_the_run(lab, small_dataset):
    """The weights are valid, so the run ends well and saves its last step."""
    trial = lab.trial(
        *FEW, "objective.kind=mlm", "evaluate.sequences=1", "stop.skipped=20", "checkpoint.keep=1"
    )
    config = load_config(trial.recipe, trial.overrides)
    batches = Batches(small_dataset, config)
    assert longest(heldout_batches(small_dataset, config, 1)) <= PLACE
    trial.resume(1, "stop.steps=3")
    damage(trial)
    long = [longest(batches.step(step)) > PLACE for step in range(lab.steps)]
    end = next(step for step in range(6, lab.steps) if long[step] and not all(long[3:step])) + 1
    trial.resume(1, f"stop.steps={end}")
    assert (
        trial.records("skip")[-1]["step"] == end
        and trial.records("save")[-1]["checkpoint"] == f"step-{end:08}"
    )
    assert [path.name for path in trial.checkpoints] == [f"step-{end:08}"] and all_finite(trial)


def longest(packs: Sequence[PackedBatch]) -> int:
    return max(int(pack.cu_seqlens.diff().max()) for pack in packs)


@pytest.mark.parametrize("stage, more", [(0, ()), slow(0, ("optimizer.name=lamb",))])
def test_no_step_was_finite(lab, stage, more):
    """The initial weights are finite but give no finite loss.

    No step is applied, so there is nothing to save.
    """
    start = lab.trial()
    start.resume(1, "stop.steps=3")
    damage(start, 0)
    trial = lab.trial(*more, f"init={start.run}", "checkpoint.every=1", stage=stage)
    said = fails(trial, 1)
    assert trial.steps == [] and trial.checkpoints == []
    assert (
        "stop.skipped = 5: 6 steps in a row were not finite; no step was finite since the start"
        in said[-1]
    )


def test_no_step_was_finite_since_a_checkpoint(lab):
    """No learning rate helps from there; the checkpoint before it does."""
    trial = lab.trial("stop.skipped=2")
    trial.resume(1, "stop.steps=3")
    (valid,) = trial.checkpoints
    damage(trial, 0)
    said = fails(trial, 1)
    assert f"no step was finite since {valid}; move that away" in said[
        -1
    ] and trial.checkpoints == [valid]
