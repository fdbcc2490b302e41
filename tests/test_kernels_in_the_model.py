"""The encoder trains the same with all kernels: losses, gradients and a run of 20 steps."""

import contextlib
import copy
import dataclasses

import pytest
import torch

from fastbert.models.heads import losses
from fastbert_kernels.checker.sanitizer import sanitize
from tests.random_batch import make_batch
from tests.random_model import build, build_modern
from tests.tiers import slow

GPU = torch.cuda.is_available()
IMPLEMENTATIONS = ("triton", "reference") if GPU else ("triton", "cpu", "reference")
LENGTHS = [33, 8, 150, 21]  # one of them too long for a single tile


def watched(impl):
    """Return the sanitizer if the implementation runs in the interpreter."""
    return sanitize() if impl == "triton" and not GPU else contextlib.nullcontext()


def step(model, impl, batch):
    """Return the loss and every gradient, on the CPU."""
    model = copy.deepcopy(model)
    model.impl = impl
    if GPU:
        model, batch = model.cuda(), batch.to("cuda")
    with watched(impl):
        loss = losses(model(batch)).loss
        loss.backward()
    return {"loss": loss.detach().cpu()} | {
        name: parameter.grad.cpu() for name, parameter in model.named_parameters()
    }


@pytest.fixture(scope="module", params=[build, slow(build_modern)])
def build_one(request):
    return request.param


@pytest.fixture(scope="module")
def exact(build_one):
    """The reference in fp64 with dropout 0."""
    return step(build_one().double(), "reference", make_batch(LENGTHS))


@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "reference"])
def test_loss_and_gradients_without_dropout(impl, exact, build_one):
    """|ours - exact| <= 2 |reference in fp32 - exact| + eps |exact|, tensor by tensor."""
    plain, ours = (step(build_one(), name, make_batch(LENGTHS)) for name in ("reference", impl))
    for name, truth in exact.items():
        rounding = torch.finfo(torch.float32).eps * float(truth.norm())
        allowed = 2 * float((plain[name] - truth).norm()) + rounding
        error = float((ours[name] - truth).norm())
        assert error <= allowed, f"{name} with {impl} is off by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "reference"])
def test_the_same_masks_with_dropout(impl, build_one):
    """A single wrong element in a mask would show in the third digit."""
    batch = make_batch(LENGTHS)
    want, have = (step(build_one(0.2), name, batch) for name in ("reference", impl))
    others = dataclasses.replace(batch, dropout_seeds=batch.dropout_seeds + 1)
    other = step(build_one(0.2), "reference", others)
    assert abs(want["loss"] - other["loss"]) > 1e-3
    for name, value in want.items():
        torch.testing.assert_close(
            have[name],
            value,
            rtol=1e-4,
            atol=1e-4 * float(value.abs().max()),
            msg=lambda m, name=name: f"{name}: {m}",
        )


def padded(batch, rest):
    """Return the same pack with `rest` padding tokens after the last sequence."""
    rows = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, rest))
        for name in ("input_ids", "token_type_ids", "position_ids")
    }
    return dataclasses.replace(batch, **rows)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_padded_pack_has_the_loss_and_gradients_of_the_bare_one(impl, build_one):
    """This includes dropout, so the masks are the same too."""
    batch = make_batch([33, 8, 100])
    want, have = (
        step(build_one(0.2), name, pack)
        for name, pack in (("reference", batch), (impl, padded(batch, 37)))
    )
    for name, value in want.items():
        torch.testing.assert_close(
            have[name],
            value,
            rtol=1e-4,
            atol=1e-4 * float(value.abs().max()),
            msg=lambda m, name=name: f"{name}: {m}",
        )


def curve(build_one, impl, steps=20):
    """Return the losses of a short run of a smaller model on four repeated batches."""
    model = build_one(heads=2)
    model.impl = impl
    model = model.cuda() if GPU else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for index in range(steps):
        batch = make_batch([17, 30], seed=index % 4)
        with watched(impl):
            loss = losses(model(batch.to("cuda" if GPU else "cpu"))).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.slow
def test_20_steps_give_the_same_curve(build_one):
    curves = {impl: curve(build_one, impl) for impl in IMPLEMENTATIONS}
    want = curves["reference"]
    assert want[-4:].mean() < want[:4].mean() - 0.5  # it learns
    for impl, have in curves.items():
        torch.testing.assert_close(
            have, want, rtol=1e-3, atol=0, msg=lambda m, impl=impl: f"{impl}: {m}"
        )
