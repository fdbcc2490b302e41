"""What the tests over SPECS do not cover of the operations of ModernBERT.

They are compared with the layers of transformers and with torch's own functions.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastbert_kernels import (
    add_layer_norm,
    bias_geglu,
    embedding_layer_norm,
    packed_positions,
    rotary_embedding,
    rotary_table,
    varlen_attention,
)
from fastbert_kernels.checker.sanitizer import sanitize
from fastbert_kernels.specs import SPECS
from tests.test_kernels import GPU, fresh_memory_is_nan, place, run, watched

__all__ = ["fresh_memory_is_nan"]  # used by every test
IMPLEMENTATIONS = ["triton", "cpu", "reference"]
PARTS = ("ids", "embeddings")  # of a look-up


def device(impl: str) -> str:
    return "cuda" if GPU and impl == "triton" else "cpu"


def config(**more):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "pad_token_id": 0}
    return transformers.ModernBertConfig(**{"intermediate_size": 24, **small, **more})


# GeGLU


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_geglu_is_that_of_transformers(impl, bias):
    """Between the two matrices of its feed-forward sublayer; the gate is the second half."""
    settings = config(mlp_bias=bias)
    from transformers.models.modernbert.modeling_modernbert import ModernBertMLP

    torch.manual_seed(1)
    mlp = ModernBertMLP(settings)
    hidden = torch.randn(7, 32)
    x = functional.linear(hidden, mlp.Wi.weight).detach()
    with watched(impl):
        y = bias_geglu(**place({"x": x, "bias": mlp.Wi.bias}, device(impl)), impl=impl).cpu()
    torch.testing.assert_close(functional.linear(y, mlp.Wo.weight, mlp.Wo.bias), mlp(hidden))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("impl", ["triton", "cpu"])
def test_the_gradients_of_geglu_are_those_of_finite_differences(impl, bias):
    """By the difference quotient in fp64 of torch's own GELU."""
    torch.manual_seed(2)
    x, b = torch.randn(3, 10, dtype=torch.float64), torch.randn(10, dtype=torch.float64) * bias
    upstream, step = torch.randn(3, 5, dtype=torch.float64), 1e-6

    def loss(z: torch.Tensor) -> torch.Tensor:
        return (functional.gelu(z[:, :5]) * z[:, 5:] * upstream).sum()

    expected = torch.zeros_like(x)
    for index in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=torch.float64)
        shift[index] = step
        shift = shift.view(x.shape)
        expected.view(-1)[index] = (loss(x + b + shift) - loss(x + b - shift)) / (2 * step)
    given = place({"x": x.float(), "bias": b.float() if bias else None}, device(impl))
    leaves = [value.requires_grad_() for value in given.values() if value is not None]
    with watched(impl):
        bias_geglu(**given, impl=impl).backward(upstream.float().to(device(impl)))
    torch.testing.assert_close(leaves[0].grad.cpu(), expected.float())
    if bias:
        torch.testing.assert_close(leaves[1].grad.cpu(), expected.sum(0).float())


# Rotary embeddings


def rotated_by_transformers(qkv: torch.Tensor, lengths: list[int], theta: float) -> list:
    """Return q and k of a pack [T, 3, H, K], one sequence after the other."""
    settings = config(
        hidden_size=qkv.shape[2] * qkv.shape[3],
        num_attention_heads=qkv.shape[2],
        max_position_embeddings=8192,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": theta}
            for kind in ("full_attention", "sliding_attention")
        },
    )
    from transformers.models.modernbert import modeling_modernbert

    rotary = modeling_modernbert.ModernBertRotaryEmbedding(settings)
    found = []
    for x in qkv.split(lengths):
        q, k, _ = x[None].transpose(1, 3).unbind(2)  # [1, H, n, K]
        cos, sin = rotary(x.float(), torch.arange(len(x))[None], "full_attention")
        rotated = modeling_modernbert.apply_rotary_pos_emb(q, k, cos, sin)
        found.append([y[0].transpose(0, 1) for y in rotated])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("theta", [160000.0, 10000.0])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_is_the_rotary_embedding_of_transformers(impl, theta):
    """Positions start again at each sequence, and the longest has those up to 8,191."""
    lengths, heads, size = ([5, 1, 30] if impl == "triton" else [5, 1, 8192]), 2, 16
    torch.manual_seed(3)
    qkv = torch.randn(sum(lengths), 3, heads, size)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    given = {
        "qkv": qkv,
        "position_ids": packed_positions(bounds, len(qkv)),
        "table": rotary_table(max(lengths), size, theta),
    }
    with watched(impl):
        q, k, v = rotary_embedding(**place(given, device(impl)), impl=impl)
    expected = rotated_by_transformers(qkv, lengths, theta)
    torch.testing.assert_close([q.cpu(), k.cpu(), v.cpu()], [*expected, qkv[:, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_backward_pass_is_the_inverse_rotation_and_packs_all_three_gradients(impl, dtype):
    """What is rotated forward comes back, and the gradient of v arrives as it is."""
    given = SPECS["rotary"].inputs({"lengths": [9, 1, 40], "H": 3, "K": 32}, dtype, 0.0)
    given = place(given, device(impl))
    with watched(impl):
        qkv = given["qkv"].requires_grad_()
        rotated = rotary_embedding(**given, impl=impl)
        ours = torch.autograd.grad(rotated, qkv, [x.detach() for x in rotated])[0]
    assert torch.equal(ours[:, 2], qkv[:, 2])
    eps = 4 * torch.finfo(dtype).eps  # each rotation rounds twice to a result of one pair's length
    lengths = qkv.detach().float().unflatten(-1, (2, 16)).norm(dim=-2).repeat(1, 1, 1, 2)
    assert ((ours.float() - qkv.float()).abs() <= eps * lengths).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_gradients_of_q_k_and_v_are_those_of_autograd(impl):
    """Through attention, whose gradients of q, k and v all differ."""
    shape = {"lengths": [9, 1, 20], "H": 2, "K": 32}
    found = []
    for one in (impl, "plain"):
        given = SPECS["rotary"].inputs(shape, torch.float32, 0.0)
        bounds = torch.tensor([0, 9, 10, 30], dtype=torch.int32)
        where = device(one)
        given, bounds = place(given, where), bounds.to(where)
        qkv = given["qkv"].requires_grad_()
        with watched(one):
            if one == "plain":
                table = given["table"][given["position_ids"]][:, None, None]
                turn = torch.polar(torch.ones(30, 1, 1, 16), table[..., 16:].atan2(table[..., :16]))
                a, b = qkv[:, :2].chunk(2, dim=-1)
                turned = torch.complex(a, b) * turn
                q, k = torch.cat((turned.real, turned.imag), dim=-1).unbind(1)
                v = qkv[:, 2]
            else:
                q, k, v = rotary_embedding(**given, impl=one)
            out = varlen_attention(q, k, v, bounds, 20, impl="reference")
            out.square().sum().backward()
        found.append([out.detach().cpu(), qkv.grad.cpu()])
    torch.testing.assert_close(*found)


@pytest.mark.skipif(GPU, reason="it counts in the interpreter")
def test_v_is_not_read_forward():
    given = SPECS["rotary"].inputs({"lengths": [6], "H": 2, "K": 32}, torch.bfloat16, 0.0)
    with sanitize() as report:
        _, _, v = rotary_embedding(**given, impl="triton")
    assert v.data_ptr() == given["qkv"][:, 2].data_ptr()
    (launch,) = report.launches
    assert launch.tensors["qkv_ptr"].loaded == 2 * given["qkv"][:, :2].numel()


def test_positions_of_a_pack():
    bounds = torch.tensor([0, 3, 3, 5, 6, 6], dtype=torch.int32)
    assert packed_positions(bounds, 9).tolist() == [0, 1, 2, 0, 1, 0, 0, 0, 0]
    assert packed_positions(torch.zeros(1, dtype=torch.int32), 2).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotary_table(4, 7), "rotary_table: size = 7; must be an even number"),
        (lambda: rotary_table(4, 8, 0.0), "rotary_table: theta = 0.0; must be positive"),
        (
            lambda: rotary_embedding(
                torch.zeros(2, 3, 1, 5), torch.zeros(2, dtype=torch.int64), torch.zeros(4, 5)
            ),
            r"rotary_embedding: qkv has shape \[2, 3, 1, 5\], expected an even head size K",
        ),
        (
            lambda: rotary_embedding(
                torch.zeros(2, 3, 1, 8), torch.tensor([0, 4]), rotary_table(4, 8)
            ),
            r"rotary_embedding: position_ids span 0 to 4; must be in \[0, N = 4\)",
        ),
    ],
)
def test_bad_input_of_rotary_embeddings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The residual stream and its norm


def outcome(given, impl, weight, dtype=None):
    """Return both results of `add_layer_norm`, and all gradients from two upstream ones."""
    given = place(given, device(impl))
    names = [n for n in SPECS["add_norm"].differentiable if given[n] is not None]
    for name in names:
        given[name] = given[name].detach().to(dtype or given[name].dtype).requires_grad_()
    with watched(impl):
        y, total = add_layer_norm(**given, impl=impl)
        draw = torch.Generator().manual_seed(5)
        up = [torch.randn(y.shape, generator=draw, dtype=torch.float64) for _ in range(2)]
        gradients = torch.autograd.grad(
            [y, total],
            [given[name] for name in names],
            [(w * u).to(y) for w, u in zip(weight, up, strict=True)],
        )
    return dict(zip(("y", "total", *names), (y.detach(), total.detach(), *gradients), strict=True))


@pytest.mark.parametrize(
    ("dtype", "bare", "weight"),
    [
        pytest.param(torch.float32, 0, (1, 1), id="fp32-both"),
        pytest.param(torch.bfloat16, 1, (1, 1), id="bf16-bare-both"),
        pytest.param(torch.bfloat16, 0, (0, 1), id="bf16-sum alone"),
    ],
)
@pytest.mark.parametrize("impl", ["triton", "cpu"])
def test_norm_and_sum_and_the_gradients_through_both(impl, dtype, bare, weight):
    """By the bound of test_kernels.py."""
    given = SPECS["add_norm"].inputs({"T": 21, "D": 257, "bare": bare}, dtype, 0.1)
    exact = outcome(given, "reference", weight, torch.float64)
    plain, ours = outcome(given, "reference", weight), outcome(given, impl, weight)
    for key, truth in exact.items():
        allowed = 2 * (plain[key] - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (ours[key].cpu() - truth).abs().max() <= allowed, key


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_block_of_transformers_is_two_sums_with_their_norms(impl):
    """The residual stream of a ModernBERT layer, whose norms have no biases."""
    from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer

    torch.manual_seed(7)
    layer = ModernBertEncoderLayer(config(attn_implementation="eager"), 3).eval()
    for norm in (layer.attn_norm, layer.mlp_norm):
        assert norm.bias is None
        torch.nn.init.normal_(norm.weight)
    stream, x = torch.randn(2, 6, 32)
    angles = torch.ones(1, 6, 16), torch.zeros(1, 6, 16)  # no rotation
    with torch.no_grad():
        expected = layer((stream + x)[None], position_embeddings=angles)[0]

    def add(x, residual, norm):
        given = place({"x": x, "residual": residual, "norm_weight": norm.weight}, device(impl))
        with torch.no_grad(), watched(impl):
            found = add_layer_norm(**given, bias=None, eps=norm.eps, impl=impl)
        return [result.cpu() for result in found]

    with torch.no_grad():
        normed, stream = add(x, stream, layer.attn_norm)
        attended, _ = layer.attn(normed[None], position_embeddings=angles)
        normed, stream = add(attended[0], stream, layer.mlp_norm)
        found = stream + layer.mlp(normed)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", ["triton", "cpu"])
def test_the_gradients_of_x_and_residual_are_two_tensors(impl):
    """Without dropout they are equal; writing to one must not change the other."""
    given = place(
        SPECS["add_norm"].inputs({"T": 5, "D": 20, "bare": 1}, torch.float32, 0.0), device(impl)
    )
    x, residual = (given[name].requires_grad_() for name in ("x", "residual"))
    with watched(impl):
        y, total = add_layer_norm(**given, impl=impl)
        (y.square().sum() + total.sum()).backward()
    assert torch.equal(x.grad, residual.grad) and x.grad.data_ptr() != residual.grad.data_ptr()


# Embeddings of words alone


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_embeddings_are_those_of_transformers(impl):
    from transformers.models.modernbert.modeling_modernbert import ModernBertEmbeddings

    torch.manual_seed(9)
    layer = ModernBertEmbeddings(config())
    torch.nn.init.normal_(layer.norm.weight)
    ids = torch.randint(1, 50, (40,))  # 0 is the padding, which has no gradient there
    expected = layer(ids)
    upstream = torch.randn(40, 32)
    expected.backward(upstream)
    given = {"word_embeddings": layer.tok_embeddings.weight, "norm_weight": layer.norm.weight}
    given = {name: value.detach().clone() for name, value in given.items()}
    given = place(given | {"input_ids": ids}, device(impl))
    leaves = [given[name].requires_grad_() for name in ("word_embeddings", "norm_weight")]
    nothing = dict.fromkeys(
        ("position_ids", "token_type_ids", "position_embeddings", "token_type_embeddings")
    )
    with watched(impl):
        found = embedding_layer_norm(**given, **nothing, eps=layer.norm.eps, impl=impl)
        found.backward(upstream.to(found))
    torch.testing.assert_close(found.cpu(), expected)
    torch.testing.assert_close(leaves[0].grad.cpu(), layer.tok_embeddings.weight.grad)
    torch.testing.assert_close(leaves[1].grad.cpu(), layer.norm.weight.grad)


@pytest.mark.parametrize("missing", ["position", "token_type"])
@pytest.mark.parametrize("impl", ["triton", "cpu"])
def test_a_missing_table_is_a_table_of_zeros(impl, missing):
    given = SPECS["embedding"].inputs({"T": 70, "V": 3, "P": 9, "D": 40}, torch.float32, 0.1)
    given[f"{missing}_embeddings"].zero_()
    whole = run(SPECS["embedding"], given, impl)
    found = run(SPECS["embedding"], given | {f"{missing}_{part}": None for part in PARTS}, impl)
    assert found.keys() == whole.keys() - {f"d{missing}_embeddings"}
    for key, value in found.items():
        assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize("given", PARTS)
@pytest.mark.parametrize("kind", ["position", "token_type"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ids_without_their_table_are_refused(impl, kind, given):
    (missing,) = set(PARTS) - {given}
    arguments = SPECS["embedding"].inputs({"T": 4, "V": 3, "P": 2, "D": 16}, torch.float32, 0.0)
    with pytest.raises(ValueError) as error:
        embedding_layer_norm(**arguments | {f"{kind}_{missing}": None}, impl=impl)
    assert str(error.value) == (
        f"embedding_layer_norm: {kind}_{given} without {kind}_{missing}; pass both or neither"
    )


# LayerNorm without a bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_norm_without_bias_is_one_with_zeros(impl, dtype):
    for name, shape in (("norm", {"T": 7, "D": 40}), ("add_norm", {"T": 7, "D": 40})):
        given = SPECS[name].inputs(shape, dtype, 0.1)
        zeros = run(SPECS[name], given | {"norm_bias": torch.zeros(40, dtype=dtype)}, impl)
        found = run(SPECS[name], given | {"norm_bias": None}, impl)
        assert found.keys() == zeros.keys() - {"dnorm_bias"}
        for key, value in found.items():
            assert torch.equal(value, zeros[key]), key
