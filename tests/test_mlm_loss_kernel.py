"""What the tests over SPECS do not cover of the Triton `masked_cross_entropy`.

That is bad indices, ties, dtypes of weights, and scaling.
"""

from typing import Any

import pytest
import torch

from fastbert_kernels import masked_cross_entropy
from fastbert_kernels.mlm_loss import cpu, kernel
from fastbert_kernels.mlm_loss.kernel import _run
from fastbert_kernels.specs import SPECS
from tests.test_kernels import GPU, place, watched

SPEC = SPECS["mlm_loss"]


def inputs(dtype: torch.dtype = torch.bfloat16, **shape: int) -> dict[str, Any]:
    return place(
        SPEC.inputs({"T": 40, "M": 20, "D": 32, "V": 300} | shape, dtype, 0.0),
        "cuda" if GPU else "cpu",
    )


def outcome(arguments: dict[str, Any], impl: str = "triton", **more: Any) -> dict[str, Any]:
    """Return the loss, the losses, which are correct, and the gradients by name."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in SPEC.differentiable}
    with watched(impl):
        results = masked_cross_entropy(**{**arguments, **leaves, **more}, impl=impl)
        results[0].backward()
    return dict(zip(("loss", "losses", "correct"), results, strict=True)) | {
        name: leaf.grad for name, leaf in leaves.items()
    }


def assert_same(one, other):
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
def test_no_positions_are_all_positions(impl):
    arguments = inputs(T=20)
    assert_same(
        outcome({**arguments, "positions": None}, impl),
        outcome({**arguments, "positions": arguments["labels"].new_tensor(range(20))}, impl),
    )


def test_strided_rows_give_the_same_as_contiguous_ones():
    arguments = inputs()
    strided = {
        name: torch.nn.functional.pad(arguments[name], (0, 8))[:, :32]
        for name in ("hidden", "weight")
    }
    one, other = outcome(arguments), outcome({**arguments, **strided})
    for key in one:
        torch.testing.assert_close(
            one[key], other[key]
        )  # torch's products may take another way through other strides


def test_repeated_positions_add_up():
    arguments = inputs(torch.float32)
    arguments["positions"] = arguments["positions"] // 7
    rows = arguments["hidden"][arguments["positions"]]
    each = outcome({**arguments, "hidden": rows, "positions": None})["hidden"]
    summed = torch.zeros_like(arguments["hidden"]).index_add_(0, arguments["positions"], each)
    torch.testing.assert_close(outcome(arguments)["hidden"], summed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_master_weights_are_rounded_for_the_products_and_get_gradients_that_are_not(dtype):
    arguments = inputs(dtype)
    master = {name: arguments[name].float() * (1 + 1e-4) for name in ("weight", "bias")}
    plain = outcome({**arguments, **{name: value.to(dtype) for name, value in master.items()}})
    wide = outcome({**arguments, **master})
    assert wide["weight"].dtype == wide["bias"].dtype == torch.float32
    assert not torch.equal(wide["weight"], wide["weight"].to(dtype).float())
    assert_same(plain, {key: value.to(plain[key].dtype) for key, value in wide.items()})


def test_autocast_rounds_as_a_caller_would():
    arguments = inputs(torch.float32)
    with torch.autocast("cuda" if GPU else "cpu", torch.bfloat16):
        automatic = outcome(arguments)
    by_hand = outcome({**arguments, "hidden": arguments["hidden"].bfloat16()})
    assert automatic["hidden"].dtype == torch.float32
    assert_same({key: value.to(automatic[key].dtype) for key, value in by_hand.items()}, automatic)


def test_a_large_total_does_not_underflow_in_fp16():
    """2^17 is more than 100,000 tokens, and fp32 multiplies by it exactly."""
    arguments = inputs(torch.float16)
    arguments["weight"] = arguments["weight"].float()
    whole, divided = (outcome({**arguments, "total": total})["weight"] for total in (1, 2**17))
    assert torch.equal(whole, divided * 2**17)


def test_a_bad_label_or_position_reads_nothing_and_is_loud():
    arguments = inputs()
    arguments["labels"][:3] = torch.tensor([-1, 300, 2**40])
    arguments["positions"][5:8] = torch.tensor([-1, 40, 2**40])
    found = outcome(arguments, check_values=False)
    bad = torch.tensor([0, 1, 2, 5, 6, 7])
    assert found["losses"].isnan().nonzero()[:, 0].tolist() == bad.tolist()
    assert not found["correct"][bad].any()
    assert found["loss"].isnan()
    assert all(found[name].isnan().any() for name in SPEC.differentiable)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((20,), 300)}, "labels span 300 to 300; must be in \\[0, V = 300\\)"),
        (
            {"positions": torch.full((20,), -1)},
            "positions span -1 to -1; must be in \\[0, T = 40\\)",
        ),
        ({"positions": None}, "labels has shape \\[20\\], expected \\[40\\]"),
        ({"total": 0}, "total = 0; must be above 0"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        outcome({**inputs(), **place(change, "cuda" if GPU else "cpu")}, check_values=True)


def test_the_first_of_equal_logits_is_the_arg_max():
    arguments = inputs(torch.float32, V=700, M=6)
    arguments["weight"].zero_()
    arguments["bias"].zero_()[[3, 300, 600]] = 1.0  # in three tiles
    arguments["labels"].copy_(torch.tensor([0, 3, 4, 300, 600, 699]))
    assert outcome(arguments)["correct"].tolist() == [False, True, False, False, False, False]


def first_of(chosen: torch.Tensor) -> torch.Tensor:
    """Return the column of the first true value in each row."""
    return (chosen & (chosen.int().cumsum(1) == 1)).int().argmax(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_word_is_found_as_the_label_and_as_the_first_of_equals(dtype):
    """Logits are small integers, so sums are exact and many are equal."""
    V, D = 600, 16  # three tiles of 256 words in 16 bits, the last of which is cut
    draw = torch.Generator().manual_seed(3)
    weight = torch.randint(-1, 2, (V, D), generator=draw).to(dtype)
    bias = torch.zeros(
        V, dtype=dtype
    )  # logits and biases are scaled apart, which would break ties by rounding
    hidden = torch.randint(-1, 2, (3 * V, D), generator=draw).to(dtype)
    logits = hidden.float() @ weight.float().T + bias.float()
    equal = logits == logits.amax(1, keepdim=True)
    first, last = first_of(equal), V - 1 - first_of(equal.flip(1))
    labels = torch.cat([torch.arange(V), first[V : 2 * V], last[2 * V :]])
    assert (first != last)[2 * V :].any()  # otherwise ties would not be tested

    arguments = place(
        {"hidden": hidden, "weight": weight, "bias": bias, "positions": None, "labels": labels},
        "cuda" if GPU else "cpu",
    )
    with watched("triton"):
        _, losses, correct = masked_cross_entropy(**arguments, impl="triton")
    torch.testing.assert_close(
        losses.cpu(), torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    )
    assert torch.equal(correct.cpu(), first == labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_certain_token_has_no_gradient(dtype):
    """Its label's logit is so far ahead that the label's probability is 1 and that of all others 0.

    The numbers are small and whole, so that both passes have the same logits, in whatever order a
    processor adds.
    """
    arguments = inputs(dtype, D=96)
    for name in ("hidden", "weight", "bias"):
        arguments[name] = (2 * arguments[name]).round().clamp(-4, 4)
    arguments["bias"] -= 500 * torch.arange(300, device=arguments["bias"].device).ne(7)
    arguments["labels"].fill_(7)
    found = outcome(arguments)
    assert found["correct"].all()
    assert not any(found[name].any() for name in SPEC.differentiable)


def test_words_of_bias_minus_infinity_have_no_probability():
    """A whole tile of them comes before any other word."""
    arguments = inputs(torch.float32, V=700)
    arguments["bias"][:400] = -torch.inf
    arguments["labels"].clamp_(min=400)
    found, truth = outcome(arguments), outcome(arguments, "reference")
    for key in found:
        torch.testing.assert_close(found[key], truth[key])
    assert not found["weight"][:400].any()


@pytest.mark.parametrize(
    ("words", "numbers"), [(256, 1 << 26), (1 << 14, 20 * 384), (128, 1 << 26), (1, 1)]
)
def test_slabs_of_the_triton_implementation_add_up(monkeypatch, words, numbers):
    """There are several complete slabs and a partial one; a slab has at least one tile."""
    arguments = inputs(torch.float32, V=1000)
    whole = outcome(arguments)
    launches = []
    launch = kernel._product
    monkeypatch.setattr(
        kernel, "_product", lambda *rest, **more: (launches.append(0), launch(*rest, **more))
    )
    monkeypatch.setattr(kernel, "_SLAB_WORDS", words)
    monkeypatch.setattr(kernel, "_SLAB_NUMBERS", numbers)
    parts = outcome(arguments)
    assert len(launches) >= 2 * 3
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key])


@pytest.mark.parametrize("multiprocessors", [1, 5])
def test_programs_that_walk_many_tiles_give_the_same(monkeypatch, multiprocessors):
    """Programs continue past the last tokens to the next words; the last one has fewer tiles."""
    arguments = inputs(T=600, M=600, V=700)
    many = outcome(arguments)
    monkeypatch.setattr(kernel, "multiprocessors", lambda _: multiprocessors)
    few = outcome(arguments)
    for key in many:
        torch.testing.assert_close(few[key], many[key])


def test_slabs_of_the_cpu_implementation_add_up(monkeypatch):
    arguments = inputs(torch.float32)
    whole = outcome(arguments, "cpu")
    monkeypatch.setattr(cpu, "_SLAB", 7 * 300)
    parts = outcome(arguments, "cpu")
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key])


@pytest.mark.parametrize(
    ("row_tiles", "vocabulary_tiles", "run"),
    [(64, 120, 60), (1, 120, 1), (100, 120, 24), (128, 120, 120), (1, 1, 1)],
)
def test_runs_of_vocabulary_tiles_fill_the_device(row_tiles, vocabulary_tiles, run):
    assert _run(row_tiles, vocabulary_tiles, 132) == run
