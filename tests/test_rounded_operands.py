"""Training on a CPU with the operands of large products rounded to bf16."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator

import pytest
import torch

from fastbert.machine import Bf16Probe
from fastbert.models.bert import BertForPreTraining
from fastbert.models.heads import losses
from fastbert.recipe import parse_config
from fastbert_kernels import _linear, varlen_attention
from fastbert_kernels.attention import cpu as attention_cpu
from fastbert_kernels.attention import products_cpu, windowed_cpu
from tests.random_batch import make_batch
from tests.tiers import slow
from tests.trials import Laboratory

BF16 = 2.0**-8  # its rounding, relative
WIDE = ("model.hidden_size=128", "model.intermediate_size=512", "runtime.precision=bf16")
STEPS = 4
EVERY = ("schedule.warmup=0", "schedule.decay=constant", "evaluate.every=1000")


@pytest.fixture(scope="module")
def model() -> BertForPreTraining:
    """Two layers; their products are large, but for that of the heads."""
    text = 'data = "none"\n[model]\nnum_hidden_layers = 2\nhidden_size = 128\n'
    config = parse_config(text + "num_attention_heads = 2\nintermediate_size = 512\n", "x").model
    torch.manual_seed(0)
    return BertForPreTraining(config, 1000).train()


def step(model, impl, operands) -> dict[str, torch.Tensor]:
    """Return the losses of the tokens and every gradient."""
    model = copy.deepcopy(model)
    model.impl, model.operands = impl, operands
    found = losses(model(make_batch([60, 128, 90, 17, 100])))
    found.loss.backward()
    return {"losses": found.token_losses} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def distance(one, other) -> float:
    """The norm of the difference over the norm, the largest of all tensors."""
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


@pytest.mark.usefixtures("bf16_products")
def test_both_implementations_round_alike(model, monkeypatch):
    """They differ by the few sums that fp32 puts on another side of a rounding border.

    The products inside attention stay in fp32 here, as the reference never rounds them. How exact
    they are in bf16 has a test of its own.
    """
    monkeypatch.setattr(attention_cpu, "FEWEST_MULTIPLICATIONS", 1 << 62)
    plain = step(model, "reference", None)
    fast, reference = (step(model, impl, torch.bfloat16) for impl in ("cpu", "reference"))
    assert {x.dtype for x in fast.values()} == {torch.float32}
    assert distance(fast, reference) < 0.5 * distance(reference, plain)
    assert BF16 / 8 < distance(reference, plain) < 16 * BF16


def test_evaluation_is_not_rounded(model):
    batch, evaluated = make_batch([60, 128, 90]), copy.deepcopy(model).eval()
    with torch.no_grad():
        plain = evaluated(batch)
        evaluated.operands = torch.bfloat16
        assert all(map(torch.equal, evaluated(batch), plain))


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("strength", [1, 4])
@pytest.mark.parametrize("window", [None, 40])
def test_attention_in_bf16_is_about_as_exact_as_torchs_own(window, strength, monkeypatch):
    """Its error against fp64 is at most twice that of torch's flash attention for a CPU.

    The scores are as even as those of a new model, or as uneven as those of a trained one.
    """
    monkeypatch.setattr(attention_cpu, "_FEWEST_IN_GROUPS", 0)
    monkeypatch.setattr(attention_cpu, "FEWEST_MULTIPLICATIONS", 0)
    monkeypatch.setattr(windowed_cpu, "FEWEST_MULTIPLICATIONS", 0)
    monkeypatch.setattr(products_cpu, "has_bf16_instructions", lambda: True)
    heads, n, size, sequences = 4, 96, 32, 3
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sequences * n, heads, size, generator=draw).bfloat16() for _ in range(4)]
    inputs[0] *= strength
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    seen = None if window is None else distance <= window
    starts = torch.arange(0, sequences * n + 1, n, dtype=torch.int32)

    def padded(x):
        return x.view(sequences, n, heads, size).transpose(1, 2)

    def torchs(q, k, v):
        attention = torch.nn.functional.scaled_dot_product_attention
        out = attention(padded(q), padded(k), padded(v), attn_mask=seen)
        return out.transpose(1, 2).reshape(sequences * n, heads, size)

    def results(function, dtype):
        q, k, v, dout = (x.to(dtype) for x in inputs)
        given = [x.requires_grad_() for x in (q, k, v)]
        out = function(*given)
        return [out, *torch.autograd.grad(out, given, dout)]

    exact = results(torchs, torch.float64)
    theirs = results(torchs, torch.bfloat16)
    ours = results(
        lambda q, k, v: varlen_attention(q, k, v, starts, n, window=window), torch.bfloat16
    )
    for one, other, right in zip(ours, theirs, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert 0 < (one - right).norm() <= 2 * (other - right).norm()


@pytest.mark.parametrize("rows", [1, 256, 257, 1000])
def test_the_gradient_of_a_bias_is_summed_in_fp32(rows):
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows)).bfloat16()
    found, exact = _linear._sum_of_rows(x), x.double().sum(0)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 2 * (x.float().sum(0) - exact).abs().max() + 1e-6


@pytest.fixture(scope="module")
def probe(bf16_products) -> Iterator[Bf16Probe]:
    """What the processes of these runs would measure, each for itself."""
    if not bf16_products.gain:
        pytest.skip(f"{bf16_products.why}, so these runs would take minutes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTBERT_TEST_BF16", json.dumps(dataclasses.asdict(bf16_products)))
        yield bf16_products


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset, probe) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("operands"), small_dataset.path)


@pytest.fixture(scope="module")
def alone(lab) -> list[dict]:
    """Four steps of one process without ZeRO."""
    trial = lab.trial(*WIDE, *EVERY, steps=STEPS)
    trial.resume(1)
    assert 'precision = "bf16"' in (trial.seen / "config.toml").read_text()
    return trial.steps


def test_a_resumed_run_is_the_same_to_the_last_digit(lab, alone, probe):
    """With "auto", it keeps its bf16 where that is faster at all."""
    trial = lab.trial(*WIDE, *EVERY, steps=STEPS)
    trial.resume(1, "stop.steps=2")
    trial.resume(1, f"runtime.precision={'auto' if probe.gain > 1 else 'bf16'}")
    assert trial.steps == alone


def test_rounding_shows_in_the_losses(lab, alone):
    trial = lab.trial(*WIDE, *EVERY, "runtime.precision=fp32", steps=STEPS)
    trial.resume(1)
    pairs = [(a["loss"], b["loss"]) for a, b in zip(alone, trial.steps, strict=True)]
    assert all(0 < abs(a - b) < BF16 * b for a, b in pairs)


@pytest.mark.parametrize("world, stage", [(2, 1), slow(2, 0), slow(2, 2), slow(2, 3)])
def test_ranks_and_stages_train_the_same(lab, alone, world, stage):
    trial = lab.trial(*WIDE, *EVERY, stage=stage, steps=STEPS)
    trial.resume(world)
    for ours, expected in zip(trial.steps, alone, strict=True):
        assert abs(ours["loss"] - expected["loss"]) < BF16 * expected["loss"]
