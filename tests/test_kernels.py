"""Compare every implementation of every operation with the reference in fp64.

This covers results, gradients and dropout masks. Triton kernels run on the GPU where there is one,
and otherwise in the interpreter under `kernels/fastbert_kernels/checker/sanitizer.py`.
"""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbert_kernels import layer_norm
from fastbert_kernels._dropout import keep_mask, stream_keys
from fastbert_kernels._dropout_cpu import keep_mask_cpu, stream_keys_cpu
from fastbert_kernels.attention import cpu as attention_cpu
from fastbert_kernels.attention import groups_cpu, windowed_cpu
from fastbert_kernels.checker.noise import Noise
from fastbert_kernels.checker.sanitizer import sanitize
from fastbert_kernels.specs import SPECS

GPU = torch.cuda.is_available()
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


EXACT, USUAL, STRONG = (0.0, "fp32"), (0.1, "bf16"), (0.5, "fp16")


def pairs(number, impl):
    """Return pairs of p and dtype for the shape of that number: in both tiers, and in the slow one.

    The third shape is a usual one, and has every p and every dtype. The others take turns between
    what trains and what is most exact; the slow tier adds a second pair. Kernels that are compiled
    take little time, so there every shape has all pairs.
    """
    if impl == "cpu":  # nobody trains in fp16 on a CPU
        often = [EXACT, (0.5, "bf16")] if number == 2 else [(USUAL, EXACT)[number % 2]]
        return often, []
    often = [EXACT, USUAL, STRONG] if number == 2 else [(USUAL, EXACT)[number % 2]]
    if GPU:
        return often, [
            one for one in itertools.product((0.0, 0.1, 0.5), DTYPES) if one not in often
        ]
    return often, [] if number == 2 else [(STRONG, USUAL)[number % 2]]


def cases():
    for name, spec in SPECS.items():
        for impl in spec.implementations:
            for number, shape in enumerate(spec.shapes if impl != "reference" else ()):
                size = "-".join(str(value).replace(" ", "") for value in shape.values())
                often, rarely = pairs(number, impl)
                seen = set()
                for p, dtype in often + rarely:
                    p = p if spec.dropout else 0.0
                    if (p, dtype) in seen:
                        continue
                    seen.add((p, dtype))
                    yield pytest.param(
                        name,
                        impl,
                        shape,
                        p,
                        dtype,
                        id=f"{name}-{impl}-{size}-p{p}-{dtype}",
                        marks=pytest.mark.slow if len(seen) > len(often) else (),
                    )


def place(arguments, device):
    """Move tensors and keep their strides, which `to` alone does not for slices."""

    def moved(x):
        whole = x if x._base is None else x._base
        return whole.to(device).as_strided(x.size(), x.stride(), x.storage_offset())

    return {
        name: moved(value) if torch.is_tensor(value) else value for name, value in arguments.items()
    }


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """Make torch.empty return NaN, so that an unwritten result shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def watched(impl):
    """Return the sanitizer if the implementation runs in the interpreter."""
    return sanitize() if impl == "triton" and not GPU else contextlib.nullcontext()


def run(spec, arguments, impl, dtype=None):
    """Return the result and every gradient on the CPU, for seeded upstream gradients."""
    arguments = place(arguments, "cuda" if GPU and impl == "triton" else "cpu")
    arguments = {
        name: (
            value.to(dtype)
            if dtype and torch.is_tensor(value) and value.is_floating_point()
            else value
        )
        for name, value in arguments.items()
    }
    if not spec.dropout:
        arguments = {
            name: value
            for name, value in arguments.items()
            if name not in ("dropout_p", "dropout_seeds")
        }
    leaves = [name for name in spec.differentiable if arguments[name] is not None]
    for name in leaves:
        arguments[name] = arguments[name].detach().requires_grad_()
    with watched(impl):
        result = spec.function(**arguments, impl=impl)
        result = result[0] if isinstance(result, tuple) else result
        upstream = torch.randn(
            result.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
        )
        result.backward(upstream.to(result))
    return {
        "result": result.detach().cpu(),
        **{f"d{name}": arguments[name].grad.cpu() for name in leaves},
    }


@pytest.mark.parametrize(("name", "impl", "shape", "p", "dtype"), list(cases()))
def test_agrees_with_the_reference_in_fp64(name, impl, shape, p, dtype):
    """err(ours) <= 2 err(plain torch in the same dtype) + 1 ulp.

    err is the largest difference from fp64, and 1 ulp is eps * max|fp64|. Where a gradient vanishes
    (of a softmax over a single key) there is no largest value. The gradient is then the difference
    of two sums whose terms are as large as the other gradients.

    Torch adds in another order on each kind of processor, and may be nearly exact by chance. Where
    the bound is exceeded, err(plain torch) is therefore at least the error that the reference has
    in fp64 if each of its operators rounds up or down by half a unit of the dtype: the largest of
    eight draws, as a draw over the few elements of a small shape may be nearly exact by chance too.
    """
    spec = SPECS[name]
    arguments = spec.inputs(shape, DTYPES[dtype], p)
    exact = run(spec, arguments, "reference", torch.float64)
    plain = run(spec, arguments, "reference")
    ours = run(spec, arguments, impl)
    for key, truth in exact.items():
        assert ours[key].dtype == plain[key].dtype, key
        if not truth.numel():
            continue
        scale = float(truth.abs().max()) or 8 * max(
            float(other.abs().max()) for other in exact.values() if other.numel()
        )
        eps = torch.finfo(DTYPES[dtype]).eps
        allowed = 2 * float((plain[key] - truth).abs().max()) + eps * scale
        error = float((ours[key] - truth).abs().max())
        if error > allowed:
            noise = 0.0
            for seed in range(8):
                with Noise(eps / 2, seed):
                    rounded = run(spec, arguments, "reference", torch.float64)
                noise = max(noise, float((rounded[key] - truth).abs().max()))
            allowed = 2 * noise + eps * scale
        assert error <= allowed, (
            f"{name} {impl}: {key} is off by {error:.3g}, allowed {allowed:.3g}"
        )


def test_attention_takes_1_and_8192_tokens_in_one_batch():
    """Few queries, so that the reference's scores fit in memory.

    The shape is not in SPECS, because other tests draw shapes near those.
    """
    test_agrees_with_the_reference_in_fp64(
        "attention", "triton", {"lengths": [1, 8192, 130], "H": 1, "K": 32, "R": 60}, 0.1, "bf16"
    )


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 15, 16, 17, 64, 255])
def test_cpu_masks_are_those_of_the_definition(columns):
    rows = torch.randint(-(2**63), 2**63 - 1, (50,), generator=torch.Generator().manual_seed(1))
    lo, hi = stream_keys(rows, 12, heads=3)
    fast_lo, fast_hi = stream_keys_cpu(rows, 12, heads=3)
    assert torch.equal(
        keep_mask(lo, hi, columns, 0.1), keep_mask_cpu(fast_lo, fast_hi, columns, 0.1).bool()
    )


@pytest.mark.parametrize("window", [None, 20, 70])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_attention_on_a_cpu_does_not_depend_on_how_many_scores_it_has_at_once(
    window, p, monkeypatch
):
    """All sequences and blocks together, or each alone; they divide the work and no sum."""
    spec = SPECS["attention"]
    shape = {"lengths": [70, 70, 130, 5, 129, 270], "H": 2, "K": 16, "rest": 3}
    arguments = spec.inputs(shape, torch.float64, p) | {"window": window}
    together = run(spec, arguments, "cpu")
    for module in (groups_cpu, windowed_cpu):
        monkeypatch.setattr(module, "SCORES", 1)
    torch.testing.assert_close(run(spec, arguments, "cpu"), together)
    torch.testing.assert_close(run(spec, arguments, "reference"), together)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_attention_on_a_cpu_is_the_same_if_short_sequences_share_bins(p, cut, monkeypatch):
    """As they do in bf16: no key of another sequence is seen, and dropout drops the same."""
    spec = SPECS["attention"]
    shape = {"lengths": [30, 64, 0, 130, 5, 128, 17, 100, 1, 63], "H": 2, "K": 16, "rest": 3}
    arguments = spec.inputs(shape, torch.float64, p)
    if cut:
        query_indices = torch.arange(0, len(arguments["k"]), 3)
        arguments |= {"q": arguments["q"][query_indices], "query_indices": query_indices}
    apart = run(spec, arguments, "cpu")
    monkeypatch.setattr(attention_cpu, "_bin_size", lambda dtype: 128)
    torch.testing.assert_close(run(spec, arguments, "cpu"), apart)
    torch.testing.assert_close(run(spec, arguments, "reference"), apart)


@given(st.lists(st.integers(0, 150), max_size=30), st.sampled_from([0, 64, 128]), st.booleans())
def test_groups_of_attention_on_a_cpu_hold_every_token_once(lengths, size, dropout):
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    groups = groups_cpu.groups(cu_seqlens, None, total, total, 2, size, dropout)
    tokens = [row for group in groups for row in torch.arange(total + 1)[group.key_rows].tolist()]
    assert sorted(row for row in tokens if row < total) == list(range(total))


def test_cut_queries_leave_the_other_outputs_as_they_are():
    spec = SPECS["attention"]
    arguments = spec.inputs({"lengths": [12, 1, 30], "H": 2, "K": 32}, torch.float32, 0.2)
    query_indices = torch.tensor([0, 3, 11, 12, 40])
    for impl in spec.implementations:
        whole = spec.function(**arguments, impl=impl)
        cut = spec.function(
            **{**arguments, "q": arguments["q"][query_indices], "query_indices": query_indices},
            impl=impl,
        )
        torch.testing.assert_close(cut, whole[query_indices], rtol=0, atol=1e-6)


def test_masked_cross_entropy_without_tokens_is_zero():
    spec = SPECS["mlm_loss"]
    for impl in spec.implementations:
        arguments = spec.inputs(spec.shapes[0], torch.float32, 0.0)
        outcome = run(spec, arguments, impl)
        assert all(float(value.abs().sum()) == 0 for value in outcome.values())


ERRORS = [
    (
        "attention",
        {"cu_seqlens": torch.zeros(3, dtype=torch.int64)},
        TypeError,
        "cu_seqlens is int64, expected int32",
    ),
    ("attention", {"k": torch.zeros(2, 2)}, ValueError, "k has shape"),
    ("attention", {"dropout_seeds": None}, ValueError, "dropout_p = 0.1 needs dropout_seeds"),
    ("attention", {"dropout_p": 1.0}, ValueError, "dropout_p = 1.0"),
    ("norm", {"impl": "cuda"}, ValueError, "impl = 'cuda'"),
    ("norm", {"norm_weight": torch.zeros(3)}, ValueError, "norm_weight has shape"),
    ("norm", {"x": torch.zeros(2, 2, dtype=torch.int32)}, TypeError, "x is int32"),
    ("gelu", {"bias": torch.zeros(3)}, ValueError, "bias has shape"),
    (
        "geglu",
        {"x": torch.zeros(2, 7)},
        ValueError,
        r"x has shape \[2, 7\], expected an even number",
    ),
    ("attention", {"window": -1}, ValueError, "window = -1; must be at least 0"),
    (
        "embedding",
        {"token_type_ids": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        "token_type_ids has shape",
    ),
    (
        "mlm_loss",
        {"labels": torch.full((15,), 1000), "check_values": True},
        ValueError,
        "labels span 1000 to 1000",
    ),
    (
        "mlm_loss",
        {"labels": torch.full((15,), -1), "check_values": True},
        ValueError,
        "labels span -1 to -1",
    ),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_its_value(name, change, error, message):
    spec = SPECS[name]
    arguments = {"impl": "cpu", **spec.inputs(spec.shapes[2], torch.float32, 0.1), **change}
    with pytest.raises(error, match=message):
        spec.function(**arguments)


@pytest.mark.skipif(GPU, reason="there is a GPU, so nothing is interpreted")
@pytest.mark.parametrize(
    "name", [name for name in SPECS if "triton" in SPECS[name].implementations]
)
def test_bf16_is_refused_by_the_stock_interpreter(name):
    """It would read the bits as integers: a loss of 24.69 became 14,533,446,656."""
    spec = SPECS[name]
    arguments = spec.inputs(spec.shapes[0], torch.bfloat16, 0.0)
    with pytest.raises(TypeError, match="is bfloat16, which Triton's interpreter computes wrongly"):
        spec.function(**arguments, impl="triton")
    with sanitize():  # as the message says
        spec.function(**arguments, impl="triton")
    arguments = spec.inputs(spec.shapes[0], torch.float32, 0.0)
    spec.function(**arguments, impl="triton")
    if name in (
        "attention",
        "gelu",
        "geglu",
    ):  # autocast gives the others fp32, as torch's own operation has
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="bfloat16"):
            spec.function(**arguments, impl="triton")


@pytest.mark.parametrize("impl", SPECS["norm"].implementations)
def test_the_norm_of_a_constant_row_is_its_bias(impl):
    """Its variance is zero, so without eps the result would not be a number."""
    x, weight, bias = torch.full((3, 64), 2.5), torch.rand(64), torch.rand(64)
    device = "cuda" if GPU and impl == "triton" else "cpu"
    with watched(impl):
        y = layer_norm(x.to(device), weight.to(device), bias.to(device), impl=impl)
    assert torch.equal(y.cpu(), bias.expand(3, 64))
