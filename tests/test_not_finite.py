"""Losses that are not finite, from real causes: reported with their examples, skipped up to a limit, and never in a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastbert.config import load_config
from fastbert.data.batches import Batches
from fastbert.training import checkpoint
from tests.trials import Laboratory, Trial

PLACE = 62  # of a token within its sequence: one sequence in four is longer, so about a third of the steps have none
FEW = ("batch.sequences=4", "schedule.warmup=0", "schedule.decay=constant", "evaluate.every=1000")
HUGE = 3e38  # finite in single precision, though no sum of two such numbers is


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_store) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("not-finite"), small_store.path)


def damage(trial: Trial) -> None:
    """Make one position's embedding huge, in a checkpoint that is sound otherwise, hashes and all."""
    found, _ = checkpoint.newest_sound(trial.run)
    assert found is not None
    state = {slot: dict(tensors) for slot, tensors in checkpoint.read_all(found.path).items()}
    state["weight"]["embeddings.positions"][PLACE] = HUGE
    for path in trial.checkpoints:
        checkpoint.delete([path])
    tensors = [(f"{slot}/{name}", tensor) for slot, named in state.items() for name, tensor in named.items()]
    checkpoint.save(found.path.parent, found.step, tensors, found.metadata, 1)


def examples(trial: Trial, store, longer_than: int = 0) -> dict[int, list[int]]:
    """By step, those of its examples that have more tokens."""
    batches, found = Batches(store, load_config(trial.recipe, trial.overrides)), {}
    for step in range(trial.records(None, "skip")[-1]["step"]):
        packs = batches.step(step)
        indices = np.concatenate([pack.examples[pack.cu_seqlens.diff() > longer_than] for pack in packs])
        found[step + 1] = sorted(int(i) for i in indices)
    return found


def all_finite(trial: Trial) -> bool:
    found, complaints = checkpoint.newest_sound(trial.run)
    assert found is not None and complaints == []
    return all(bool(tensor.isfinite().all()) for slot in checkpoint.read_all(found.path).values() for tensor in slot.values())


@pytest.mark.parametrize("world, stage", [(1, 0), (2, 0), (2, 1), (2, 3)])
def test_examples_that_break_the_loss_are_skipped(lab, small_store, world, stage):
    """A damaged embedding that only long sequences meet. Every other step is made as if nothing were, on any number of ranks."""
    trial = lab.trial(*FEW, "stop.skipped=20", stage=stage)
    trial.go_on(world, "stop.steps=3")
    damage(trial)
    said = trial.go_on(world)
    expected = {step: found for step, found in examples(trial, small_store, PLACE).items() if found and step > 3}
    skips = trial.records("skip")
    assert len(skips) > 2 and {skip["step"]: skip["examples"] for skip in skips} == {
        s: e for s, e in expected.items() if s <= skips[-1]["step"]
    }
    assert all("not finite" in skip["reason"] for skip in skips)
    assert sorted([s["step"] for s in trial.steps] + [s["step"] for s in skips]) == list(range(1, lab.steps + 1))
    assert sum("is skipped" in line and str(skips[0]["examples"][0]) in line for line in said) >= 1
    assert all_finite(trial)
    assert trial.records("save")[-1]["step"] == lab.steps


@pytest.mark.parametrize("world, stage", [(1, 0), (2, 0)])
def test_too_many_in_a_row_end_the_run(lab, small_store, world, stage):
    """Gradient descent at rate 100 without clipping."""
    limit = 3
    trial = lab.trial(
        "optimizer.name=sgd", "optimizer.lr=100", "optimizer.clip=0", f"stop.skipped={limit}", "evaluate.every=1000", stage=stage, steps=200
    )
    with trial.start(world) as ranks:
        assert ranks.wait() == [1] * world, ranks.errors
        said = ranks[0].out.read_text().splitlines()[-1]
    skips = trial.records("skip")
    assert len(skips) >= limit + 1 and [s["step"] for s in skips[-limit - 1 :]] == list(
        range(skips[-1]["step"] - limit, skips[-1]["step"] + 1)
    )
    everything = examples(trial, small_store)
    assert skips[-1]["examples"] == everything[skips[-1]["step"]] or skips[-1]["examples"] == []
    assert f"stop.skipped = {limit}" in said and "optimizer.lr" in said
    assert all_finite(trial)
    assert trial.records("stop")[-1]["step"] == skips[-1]["step"]


def test_a_loss_is_never_averaged_away(lab):
    """One rank's loss is not finite, the other's is: both skip, and they stay together."""
    trial = lab.trial(*FEW, "stop.skipped=20", stage=1)
    trial.go_on(2, "stop.steps=3")
    damage(trial)
    alone = lab.trial(*FEW, "stop.skipped=20").copy_of(trial)
    trial.go_on(2)
    alone.go_on(1)
    assert [s["step"] for s in trial.records("skip")] == [s["step"] for s in alone.records("skip")]
    ours, theirs = (torch.tensor([s["loss"] for s in t.steps[3:]]) for t in (trial, alone))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=0)
