"""What the tests over SPECS do not cover of attention with a window.

That is windows of 0 and 1, windows that reach over the sequence, the sliding window of
transformers' ModernBERT, how the work grows, and the memory of the CPU implementation.
"""

from __future__ import annotations

import pytest
import torch

from fastbert_kernels import varlen_attention
from fastbert_kernels._dropout import keep_mask, row_seeds, stream_keys
from fastbert_kernels.attention import windowed_cpu
from fastbert_kernels.checker.sanitizer import sanitize
from fastbert_kernels.specs import SPECS
from tests.test_kernels import GPU, fresh_memory_is_nan, place, run, watched
from tests.test_kernels import (
    test_agrees_with_the_reference_in_fp64 as agrees,
)  # by another name, not to be collected again
from tests.tiers import slow

__all__ = ["fresh_memory_is_nan"]  # used by every test
SPEC = SPECS["attention"]
IMPLEMENTATIONS = [slow("reference"), "cpu", "triton"]


@pytest.mark.parametrize("cut", [{}, {"R": 60, "rest": 20}], ids=["all", "cut"])
@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("cpu", "fp32"), ("triton", "bf16"), slow("triton", "fp16")],
)
def test_the_smallest_windows(impl, dtype, window, cut):
    """fp32 is left to the CPU: where a query sees one key, plain torch makes no error at all."""
    for lengths in ([1, 2, 128, 40], [64, 1, 300, 2]):
        shape = {"lengths": lengths, "H": 2, "K": 64, **cut, "window": window}
        agrees("attention", impl, shape, 0.1, dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_with_window_0_a_query_sees_itself(impl):
    arguments = SPEC.inputs({"lengths": [3, 200, 1], "H": 2, "K": 32}, torch.float32, 0.0)
    found = run(SPEC, arguments | {"window": 0}, impl)
    torch.testing.assert_close(found["result"], arguments["v"])
    # Of a softmax over one key, nothing depends on the scores.
    for key in ("dq", "dk"):
        assert float(found[key].abs().max()) < 1e-5 * float(found["dv"].abs().max())


@pytest.mark.parametrize("lengths", [[40, 1, 0, 128], [300, 7, 129]], ids=["one tile", "several"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_window_that_reaches_over_the_sequence_hides_nothing(impl, lengths):
    arguments = SPEC.inputs({"lengths": lengths, "H": 1, "K": 16}, torch.bfloat16, 0.1)
    without = run(SPEC, arguments, impl)
    for window in (max(lengths) - 1, max(lengths), 10**6):
        found = run(SPEC, arguments | {"window": window}, impl)
        for key, value in without.items():
            if impl == "cpu":  # other blocks of queries
                torch.testing.assert_close(found[key], value)
            else:
                assert torch.equal(found[key], value), key
    narrow = run(SPEC, arguments | {"window": max(lengths) - 2}, impl)
    assert not torch.equal(narrow["result"], without["result"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_mask_is_that_of_the_position_and_not_of_the_tile(impl):
    """Which weights are dropped does not depend on the window: with v = 1 for one key, it shows."""
    n, window, p = 300, 20, 0.4
    seeds = torch.tensor([77])
    bounds = torch.tensor([0, n], dtype=torch.int32)
    lo, hi = stream_keys(row_seeds(seeds, bounds, n), 3, heads=1)
    kept = keep_mask(lo[:, 0], hi[:, 0], n, p)
    for key in (0, 17, 150, n - 1):
        q, k, v = torch.zeros(3, n, 1, 16)
        v[key] = 1
        arguments = {"q": q, "k": k, "v": v, "cu_seqlens": bounds, "dropout_seeds": seeds}
        arguments = place(arguments, "cuda" if GPU and impl == "triton" else "cpu")
        with watched(impl):
            out = varlen_attention(
                **arguments, max_seqlen=n, dropout_p=p, dropout_stream=3, window=window, impl=impl
            )
        near = (torch.arange(n) - key).abs() <= window
        assert torch.equal(out[:, 0, 0].cpu() > 0, near & kept[:, key])


def test_it_is_the_sliding_window_of_transformers():
    """Against ModernBERT's own attention layer, for odd and even `local_attention`."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.modernbert.modeling_modernbert import ModernBertModel

    for local in (2, 7, 8, 128):
        config = transformers.ModernBertConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            local_attention=local,
            global_attn_every_n_layers=2,
            pad_token_id=0,
            attn_implementation="eager",
        )
        torch.manual_seed(local)
        model = ModernBertModel(config).eval()
        layer = model.layers[1].attn
        assert config.layer_types[1] == "sliding_attention"
        seen = {}

        def keep(_, arguments, options, result, seen=seen):
            seen.update(options, x=arguments[0], out=result[0])

        handle = layer.register_forward_hook(keep, with_kwargs=True)
        n = 21
        with torch.no_grad():
            model(torch.randint(1, 50, (1, n)))
            handle.remove()
            qkv = layer.Wqkv(seen["x"]).view(n, 3, 2, 16)
            cos, sin = (x[0, :, None] for x in seen["position_embeddings"])
            q, k = (
                x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin
                for x in (qkv[:, 0], qkv[:, 1])
            )
            bounds = torch.tensor([0, n], dtype=torch.int32)
            out = varlen_attention(q, k, qkv[:, 2], bounds, n, window=local // 2)
            torch.testing.assert_close(layer.Wo(out.flatten(1)), seen["out"][0])


@pytest.mark.skipif(GPU, reason="it counts in the interpreter")
@pytest.mark.parametrize("cut", [slow(False, id="all"), pytest.param(True, id="cut")])
def test_the_work_grows_with_the_length_times_the_window(cut):
    """Twice the tokens have at most twice the products and bytes, and as many more as an edge."""

    def work(n: int, window: int | None) -> tuple[int, int]:
        """Operations of dot products, and bytes, of both passes."""
        arguments = SPEC.inputs({"lengths": [n], "H": 1, "K": 16}, torch.bfloat16, 0.1)
        if cut:
            every_fourth = torch.arange(0, n, 4)
            arguments |= {"q": arguments["q"][every_fourth], "query_indices": every_fourth}
        leaves = {name: arguments[name].detach().requires_grad_() for name in "qkv"}
        with sanitize() as report:
            SPEC.function(**arguments | leaves, window=window, impl="triton").sum().backward()
        return (
            sum(launch.flops for launch in report.launches),
            sum(launch.loaded + launch.stored for launch in report.launches),
        )

    near, far = work(512, 40), work(1024, 40)
    edge, whole = work(128, None), work(1024, None)
    for one, two, at_most, full in zip(near, far, edge, whole, strict=True):
        assert two <= 2 * one + at_most
        assert two < full


def test_the_cpu_holds_no_square_of_the_length():
    """What is saved for the backward pass grows with n * window."""

    def saved(n: int) -> int:
        """Elements that the forward pass keeps."""
        arguments = SPEC.inputs({"lengths": [n], "H": 2, "K": 16}, torch.float32, 0.1)
        q, k, v = (arguments[name].detach().requires_grad_() for name in "qkv")
        sizes: list[int] = []

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            SPEC.function(**arguments | {"q": q, "k": k, "v": v}, window=64, impl="cpu")
        return sum(sizes)

    # For each query and head: a row of weights, and one of the mask; q, k and v. Before the first
    # and behind the last key there is room for the keys that a query in the middle would see.
    least = 2 * (2 * (64 + 2 * 64) + 3 * 16)
    for n in (2048, 4096):
        assert saved(n) <= n * least + 2 * 2 * 2 * 64 * 16 < 2 * n * n


def test_8192_tokens_train_on_a_cpu():
    """The scores of all pairs would take 12.9 GB; gradients are those of the reference nearby."""
    n, window = 8192, 64
    arguments = SPEC.inputs({"lengths": [n], "H": 12, "K": 16}, torch.float32, 0.1)
    leaves = {name: arguments[name].detach().requires_grad_() for name in "qkv"}
    varlen_attention(**arguments | leaves, window=window).square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())
    # The first 200 tokens see the first 264, and their gradients come from queries among these.
    first = {name: arguments[name][:328].detach().requires_grad_() for name in "qkv"}
    more = {"cu_seqlens": torch.tensor([0, 328], dtype=torch.int32), "max_seqlen": 328}
    out = varlen_attention(**arguments | more | first, window=window, impl="reference")
    out.square().sum().backward()
    for name in "qkv":
        torch.testing.assert_close(leaves[name].grad[:200], first[name].grad[:200])


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
def test_a_negative_window_is_refused(impl):
    arguments = SPEC.inputs({"lengths": [5], "H": 1, "K": 16}, torch.float32, 0.0)
    with pytest.raises(ValueError) as error:
        varlen_attention(**arguments, window=-1, impl=impl)
    assert str(error.value) == (
        "varlen_attention: window = -1; must be at least 0, or None for all keys"
    )


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("window", [0, 1, 15, 64, 65, 200])
def test_blocks_of_queries_show_each_query_the_keys_that_it_sees_and_no_other(window, aligned):
    bounds = torch.tensor([0, 1, 1, 130, 400], dtype=torch.int32)
    layout, mask, first_columns = windowed_cpu._layout(bounds, window, aligned)
    rows = torch.arange(400)[layout.rows] if isinstance(layout.rows, slice) else layout.rows
    token_of = dict(zip(rows.tolist(), range(400), strict=True))
    for row, token in token_of.items():
        block, query = divmod(row, layout.size)
        key = block * layout.size - layout.reach  # the row of the first one
        seen = (mask[block, query] == 0).nonzero()[:, 0] + key
        start = max(b for b in bounds.tolist() if b <= token)
        end = min(b for b in bounds.tolist() if b > token)
        expected = range(max(start, token - window), min(end, token + window + 1))
        assert [token_of[row] for row in seen.tolist()] == list(expected)
        column = first_columns[block, query]
        assert column == token - start - (row - key)
        assert column % 16 == 0 or not aligned
