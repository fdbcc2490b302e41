"""A step is the same with any number of ranks, any packs and any ZeRO stage.

A run may change all of them midway.
"""

from __future__ import annotations

import pytest
import torch

from fastbert.data.batches import Batches
from fastbert.models.bert import BertForPreTraining
from fastbert.models.heads import losses
from fastbert.recipe import load_config
from fastbert.training.optimizer import build_optimizer
from fastbert.training.schedule import factor
from tests.tiers import typical
from tests.trials import Laboratory, Trial

STEPS = 20
# These must be equal, since every step has the same examples with the same masks.
COUNTS = ("step", "tokens", "masked", "sequences")
LOSSES = ("loss", "loss_mlm", "loss_nsp", "grad_norm")  # these to rounding
# The most tokens of a pack. A step has about 500: one pack, about five, about ten.
PACKS = (1000, 128, 64)
# (ranks, stage, tokens of a pack). test_engine.py has every stage on one rank.
SHARED = [(1, 2, PACKS[2])]
SHARED += [(2, 0, PACKS[1]), (2, 1, PACKS[0]), (2, 2, PACKS[2]), (2, 3, PACKS[0])]
SHARED += [(4, 0, PACKS[0]), (4, 3, PACKS[1])]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("ranks"), small_dataset.path)


def shared(lab: Laboratory, world: int, stage: int, tokens: int) -> list[dict]:
    """Return the steps of a run on `world` ranks."""
    trial = lab.trial(
        f"batch.micro_batch_tokens={tokens}",
        "checkpoint.every=1000",
        "evaluate.every=1000",
        stage=stage,
        steps=STEPS,
    )
    trial.resume(world)
    return trial.steps


@pytest.fixture(scope="module")
def alone(lab) -> list[dict]:
    """The steps of one process, with one pack per step."""
    return shared(lab, 1, 0, PACKS[0])


def far(steps: list[dict], others: list[dict]) -> float:
    """Return the largest relative difference of a loss or a norm between two runs."""
    assert len(steps) == len(others) > 0
    return max(
        abs(a[key] - b[key]) / abs(b[key])
        for a, b in zip(steps, others, strict=True)
        for key in LOSSES
    )


@pytest.fixture(scope="module")
def plain(lab, small_dataset) -> list[dict]:
    """The steps of plain torch, in single precision."""
    return by_torch(lab, small_dataset, torch.float32)


@pytest.fixture(scope="module")
def rounding(plain, lab, small_dataset) -> float:
    """The difference caused by rounding alone.

    It is measured on these steps by torch in single and double precision.
    """
    return 4 * far(plain, by_torch(lab, small_dataset, torch.float64))


def by_torch(lab: Laboratory, dataset, dtype: torch.dtype, ranks: int | None = None) -> list[dict]:
    """Train the same run with plain torch.

    With `ranks`, their mean losses are averaged, which is common and wrong.
    """
    config = load_config(lab.trial(steps=STEPS).recipe, [f"batch.micro_batch_tokens={PACKS[0]}"])
    torch.manual_seed(config.seed)
    model = BertForPreTraining(config.model, dataset.vocab_size, "reference").to(dtype).train()
    optimizer, batches, steps = (
        build_optimizer(model, config.optimizer),
        Batches(dataset, config),
        [],
    )
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * factor(config.schedule, step / STEPS)
        mlm = nsp = 0.0
        for rank in range(ranks or 1):
            for pack in batches.step(step, rank, ranks or 1):
                found = losses(model(pack))
                scale = (
                    (pack.masked_total / len(pack.labels), pack.pairs_total / pack.sequences)
                    if ranks
                    else (1.0, 1.0)
                )
                (
                    found.mlm * scale[0] / (ranks or 1) + found.nsp * scale[1] / (ranks or 1)
                ).backward()
                mlm, nsp = mlm + float(found.mlm.detach()), nsp + float(found.nsp.detach())
        norm = float(
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        )
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": mlm + nsp, "loss_mlm": mlm, "loss_nsp": nsp, "grad_norm": norm})
    return steps


def test_a_run_is_what_plain_torch_makes_of_it(alone, plain, rounding):
    assert far(alone, plain) < rounding


def test_averaging_the_means_of_ranks_would_be_noticed(alone, lab, small_dataset, rounding):
    """Ranks differ in their masked tokens and pairs, so the mean of their means is not the mean."""
    assert far(by_torch(lab, small_dataset, torch.float32, ranks=2), alone) > 100 * rounding


@pytest.mark.parametrize("world, stage, tokens", typical(SHARED, (4, 0, PACKS[0])))
def test_every_step_is_that_of_the_whole_batch(lab, alone, rounding, world, stage, tokens):
    steps = shared(lab, world, stage, tokens)
    assert [[s[key] for key in COUNTS] for s in steps] == [
        [s[key] for key in COUNTS] for s in alone
    ]
    assert far(steps, alone) < rounding


# What may change when a run is resumed: (ranks, stage, precision) of each leg in turn.
LEGS = {
    "ranks and stage": [(1, 1, "fp32"), (2, 3, "fp32"), (4, 2, "fp32"), (2, 0, "fp32")],
    "all": [(1, 0, "fp32"), (2, 3, "bf16"), (1, 2, "fp32")],
}
LEG = 5  # steps
BF16 = 2.0**-8  # its rounding, relative


@pytest.fixture(scope="module")
def constant(lab) -> list[dict]:
    """A run of one process whose learning rate does not depend on the run's length."""
    return leg(lab.trial(*CONSTANT, steps=LEG * 4), 1, LEG * 4).steps


CONSTANT = (
    "schedule.warmup=0",
    "schedule.decay=constant",
    "evaluate.every=1000",
    "checkpoint.every=1000",
)


def leg(trial: Trial, world: int, until: int, parameters: str = "fp32") -> Trial:
    trial.resume(world, f"stop.steps={until}", FASTBERT_TEST_PARAMETERS=parameters)
    return trial


@pytest.mark.slow
@pytest.mark.parametrize("legs", LEGS)
def test_a_run_may_change_its_ranks_stage_and_precision(lab, constant, rounding, legs, request):
    if any(precision == "bf16" for *_, precision in LEGS[legs]):
        request.getfixturevalue("bf16_products")
    trial, tolerance = lab.trial(*CONSTANT), rounding
    for i, (world, stage, precision) in enumerate(LEGS[legs]):
        trial.set_stage(stage)
        leg(trial, world, LEG * (i + 1), parameters=precision)
        ours, expected = trial.steps[LEG * i :], constant[LEG * i : LEG * (i + 1)]
        assert [[s[key] for key in COUNTS] for s in ours] == [
            [s[key] for key in COUNTS] for s in expected
        ]
        if precision == "bf16":
            tolerance = 16 * BF16  # a rounded model stays another model
        assert far(ours, expected) < tolerance


MUON = ("optimizer.name=muon", *CONSTANT)


@pytest.fixture(scope="module")
def alone_with_muon(lab) -> list[dict]:
    return leg(lab.trial(*MUON), 1, 2 * LEG).steps


# The shares of two and four ranks cut through matrices.
@pytest.mark.parametrize("world, stage", [(2, 0), (2, 2), (4, 1)])
@pytest.mark.slow
def test_a_run_with_muon_may_change_its_ranks(lab, alone_with_muon, rounding, world, stage):
    """From some ranks to one, and from some stage to stage 0."""
    trial = lab.trial(*MUON, stage=stage)
    leg(trial, world, LEG)
    trial.set_stage(0)
    leg(trial, 1, 2 * LEG)
    assert far(trial.steps, alone_with_muon) < rounding


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.slow
def test_muon_on_ranks_resumes_to_the_last_digit(lab, stage):
    whole, parts = (lab.trial(*MUON, stage=stage, steps=2 * LEG) for _ in range(2))
    leg(whole, 2, 2 * LEG)
    leg(leg(parts, 2, LEG), 2, 2 * LEG)
    assert parts.steps == whole.steps
