"""The optimizers' arithmetic against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastbert.config import BertConfig, OptimizerConfig
from fastbert.models.bert import BertForPreTraining
from fastbert.training.optimizer import Lamb, build_optimizer, decay_groups, slots


def two_parameters() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    module.weight, module.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(4))
    return module


def gradients(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator))
        for _ in range(steps)
    ]


def train(config: OptimizerConfig, steps: int = 5) -> nn.Module:
    module = two_parameters()
    optimizer = build_optimizer(module, config)
    for weight, bias in gradients(steps):
        module.weight.grad, module.bias.grad = weight, bias
        optimizer.step()
    return module


def test_only_matrices_decay():
    model = BertForPreTraining(
        BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
        50,
    )
    decaying, others = decay_groups(model.parameters(), 0.01)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decaying["weight_decay"] == 0.01 and others["weight_decay"] == 0.0
    assert not [names[p] for p in decaying["params"] if "bias" in names[p] or "norm" in names[p]]
    assert all("bias" in names[p] or "norm" in names[p] for p in others["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(names)


def adamw(x, grads, config, decay):
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, g in enumerate(grads, 1):
        (b1, b2), g = config.betas, g.double()
        x = x - config.lr * decay * x
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        x = x - config.lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + config.eps)
    return x


def lamb(x, grads, config, decay, adapt):
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, g in enumerate(grads, 1):
        (b1, b2), g = config.betas, g.double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + config.eps) + decay * x
        x = x - config.lr * (x.norm() / update.norm() if adapt else 1.0) * update
    return x


def sgd(x, grads, config, decay):
    buffer = torch.zeros_like(x)
    for g in grads:
        buffer = config.momentum * buffer + g.double() + decay * x
        x = x - config.lr * buffer
    return x


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_five_steps_follow_the_formula(name):
    config = OptimizerConfig(
        name=name, lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3, momentum=0.7
    )
    start, end = two_parameters(), train(config)
    weights, biases = zip(*gradients(5), strict=True)
    formula = {"adamw": adamw, "lamb": lamb, "sgd": sgd}[name]
    adapt = {"lamb": [(True,), (False,)]}.get(name, [(), ()])
    weight = formula(start.weight.detach().double(), weights, config, 0.3, *adapt[0])
    # It has no decay, and for LAMB no ratio.
    bias = formula(start.bias.detach().double(), biases, config, 0.0, *adapt[1])
    torch.testing.assert_close(end.weight.double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(end.bias.double(), bias, rtol=1e-5, atol=1e-6)


def test_lamb_takes_a_ratio_of_one_where_a_norm_is_zero():
    zero = nn.Parameter(torch.zeros(2, 2))
    still = nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([zero, still], lr=0.5, weight_decay=0.0)
    zero.grad, still.grad = torch.full((2, 2), 3.0), torch.zeros(2, 2)
    optimizer.step()
    # Adam's first step: the sign of the gradient.
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.5))
    assert torch.equal(still.detach(), torch.ones(2, 2))


@pytest.mark.parametrize(
    "name, momentum",
    [
        ("adamw", 0.9),
        ("stable_adamw", 0.9),
        ("lamb", 0.9),
        ("sgd", 0.9),
        ("sgd", 0.0),
        ("muon", 0.95),
    ],
)
def test_slots_are_what_the_optimizer_keeps(name, momentum):
    config = OptimizerConfig(name=name, momentum=momentum)
    # One matrix is Muon's, the other AdamW's.
    module = nn.ModuleDict({"layers": two_parameters(), "head": two_parameters()})
    optimizer = build_optimizer(module, config)
    for part in module.values():
        part.weight.grad, part.bias.grad = gradients(1)[0]
    optimizer.step()
    for name, parameter in module.named_parameters():
        kept = {
            k
            for k, v in optimizer.state[parameter].items()
            if isinstance(v, torch.Tensor) and v.shape == parameter.shape
        }
        assert kept == set(slots(config, name, parameter.shape))
