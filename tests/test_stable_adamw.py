"""StableAdamW against its formula in fp64, and the same steps at each ZeRO stage."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastbert.config import OptimizerConfig
from fastbert.data.batches import Batches
from fastbert.training.stable_adamw import StableAdamW
from tests.test_engine import CONFIG, engine, state_of
from tests.tiers import slow

LR, BETAS, EPS, DECAY = 0.02, (0.8, 0.95), 1e-3, 0.3
RECIPE = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(name="stable_adamw"))


def formula(x, gradients, decay):
    """Return x after each step, and the RMS of each step."""
    (b1, b2), m, v = BETAS, torch.zeros_like(x), torch.zeros_like(x)
    found, sizes = [], []
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        mean, square = m / (1 - b1**t), v / (1 - b2**t)
        rms = (g * g / square.clamp(min=EPS**2)).mean().sqrt()
        step = LR / max(1.0, float(rms))
        x = x - step * (decay * x + mean / (square.sqrt() + EPS))
        found.append(x)
        sizes.append(float(rms))
    return found, sizes


def test_it_follows_the_formula():
    draw = torch.Generator().manual_seed(0)
    # The last gradients are far larger than the first, so that the step is made smaller.
    gradients = [
        [torch.randn(shape, generator=draw) * size for shape in ((5, 7), (5,))]
        for size in (1, 0.1, 1e-5, 4, 20)
    ]
    start = [torch.randn(5, 7, generator=draw), torch.randn(5, generator=draw)]
    ours = [torch.nn.Parameter(x.clone()) for x in start]
    groups = [
        {"params": ours[:1], "weight_decay": DECAY},
        {"params": ours[1:], "weight_decay": 0.0},
    ]
    optimizer = StableAdamW(groups, LR, BETAS, EPS)
    expected = [
        formula(x.double(), [pair[i].double() for pair in gradients], decay)
        for i, (x, decay) in enumerate(zip(start, (DECAY, 0.0), strict=True))
    ]
    assert min(expected[0][1]) < 0.9 and max(expected[0][1]) > 1.5
    for t, pair in enumerate(gradients):
        for parameter, gradient in zip(ours, pair, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for parameter, (values, _) in zip(ours, expected, strict=True):
            torch.testing.assert_close(parameter.detach().double(), values[t], rtol=1e-5, atol=1e-6)


def test_without_gradients_nothing_changes():
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = StableAdamW([{"params": [parameter], "weight_decay": DECAY}], LR, BETAS, EPS)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3, 3)) and not optimizer.state[parameter]


@pytest.fixture(scope="module")
def packs(small_dataset):
    batches = Batches(small_dataset, RECIPE)
    return [batches.step(i) for i in range(5)]


@pytest.fixture(scope="module")
def at_stage_0(small_dataset, packs):
    """The losses of five steps, and the state after three of them."""
    with engine(small_dataset, 0, RECIPE) as built:
        losses = [built.step(packs[i], lr=1e-2).loss for i in range(3)]
        state = state_of(built)
        return losses + [built.step(packs[i], lr=1e-2).loss for i in (3, 4)], state


@pytest.mark.parametrize("stage", [1, slow(2)])
def test_a_higher_stage_makes_the_same_steps(small_dataset, packs, at_stage_0, stage):
    with engine(small_dataset, stage, RECIPE) as built:
        losses = [built.step(packs[i], lr=1e-2).loss for i in range(3)]
        state = state_of(built)
    assert losses == pytest.approx(at_stage_0[0][:3], rel=1e-5)
    for name, weight in at_stage_0[1]["weight"].items():
        torch.testing.assert_close(state["weight"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, slow(2)])
def test_a_state_of_stage_0_continues_at_any_stage(small_dataset, packs, at_stage_0, stage):
    losses, state = at_stage_0
    with engine(small_dataset, stage, RECIPE, state=state, step=3) as built:
        found = [built.step(packs[i], lr=1e-2).loss for i in (3, 4)]
    assert found == (losses[3:] if stage == 0 else pytest.approx(losses[3:], rel=1e-5))
