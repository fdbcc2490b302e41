"""Properties of every Triton operation in SPECS.

The tests cover random shapes, the order of programs, strides, 64-bit offsets, the place in the pack
and bad input.
"""

import contextlib
import functools
import itertools
import re
from typing import Any
from unittest import mock

import pytest
import torch

from tests.tiers import slow

pytest.importorskip("hypothesis")  # a machine with a GPU may have pytest alone

from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import GridExecutor

from fastbert_kernels import attention_tile_schedule
from fastbert_kernels._spec import Shape, Spec
from fastbert_kernels.checker.sanitizer import sanitize
from fastbert_kernels.specs import SPECS
from tests import test_kernels
from tests.test_kernels import DTYPES, GPU, fresh_memory_is_nan, place, run, watched
from tests.test_operators import DEVICE, EVERY, TRITON, assert_same, cases, inputs, kinds

__all__ = ["fresh_memory_is_nan"]  # used by every test


def tensors(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in arguments.items() if torch.is_tensor(value)}


# Shapes


@st.composite
def shapes(draw: st.DrawFn, spec: Spec) -> Shape:
    """Draw a shape with the axes of one of the spec's shapes.

    Its sizes are close to the sizes that the spec lists, which are around tiles.
    """
    shape: Shape = {}
    for axis in draw(st.sampled_from(list(kinds(spec)))):
        listed = [other[axis] for other in spec.shapes if axis in other]
        if axis == "lengths":
            near = st.sampled_from(sorted({0, *itertools.chain(*listed)})).flatmap(
                lambda n: st.integers(max(n - 1, 0), n + 1)
            )
            shape[axis] = draw(st.lists(near, min_size=1, max_size=3))
        elif axis == "K":
            shape[axis] = draw(st.sampled_from(range(16, 129, 16)))
        else:
            shape[axis] = max(
                draw(st.sampled_from(listed)) + draw(st.integers(-1, 1)), 0 if axis in "TM" else 1
            )
    for part, whole in (("M", shape.get("T", 0)), ("R", sum(shape.get("lengths", ())))):
        if part in shape:
            shape[part] = min(shape[part], whole)
    return shape


@pytest.mark.parametrize("examples", [1, slow(8)])
@pytest.mark.parametrize("name", TRITON)
def test_shapes_around_tiles_keep_the_bound_of_test_kernels(name, examples):
    spec = SPECS[name]

    @settings(max_examples=examples)
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        shape, dtype = data.draw(shapes(spec)), data.draw(st.sampled_from(list(DTYPES)))
        p = data.draw(st.sampled_from([0.0, 0.1, 0.5] if spec.dropout else [0.0]))
        test_kernels.test_agrees_with_the_reference_in_fp64(name, "triton", shape, p, dtype)

    holds()


@pytest.mark.parametrize("impl", [impl for name, impl in EVERY if name == "attention"])
def test_attention_of_no_query_has_zero_gradients(impl):
    arguments = inputs("attention", torch.bfloat16)
    nothing = {
        "q": arguments["q"][:0],
        "query_indices": torch.empty(0, dtype=torch.int64, device=DEVICE),
    }
    found = run(SPECS["attention"], {**arguments, **nothing}, impl)
    assert len(found["result"]) == len(found["dq"]) == 0
    assert not found["dk"].any()
    assert not found["dv"].any()


# The order of programs


@pytest.mark.skipif(GPU, reason="a GPU has an order of its own")
@pytest.mark.parametrize(("name", "shape"), cases())
def test_the_order_of_programs_does_not_matter(name, shape, monkeypatch):
    arguments = inputs(name, torch.bfloat16, shape=shape)
    ascending = run(SPECS[name], arguments, "triton")
    for order in ("reversed", 1):
        monkeypatch.setattr(test_kernels, "watched", lambda _, order=order: sanitize(order=order))
        assert_same(ascending, run(SPECS[name], arguments, "triton"))


# Strides. Between the elements there is NaN, or zero for integers.


def around(x: torch.Tensor, *size: int) -> torch.Tensor:
    return x.new_full(size, float("nan") if x.is_floating_point() else 0)


def in_wider_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows begin at any address, so not even the first one is aligned."""
    view = around(x, *x.shape[:-1], x.shape[-1] + 4)[..., 1:-3]
    return view.copy_(x)


def every_other_row(x: torch.Tensor) -> torch.Tensor:
    return around(x, 2 * len(x), *x.shape[1:])[::2].copy_(x) if x.dim() > 1 else x


def every_other_column(x: torch.Tensor) -> torch.Tensor:
    return around(x, *x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


@pytest.mark.parametrize(("name", "shape"), cases())
def test_strided_inputs_give_the_same_bits_as_contiguous_ones(name, shape):
    arguments = inputs(name, torch.bfloat16, shape=shape)
    compact = {key: value.contiguous() for key, value in tensors(arguments).items()}
    one = run(SPECS[name], arguments | compact, "triton")
    for layout in (in_wider_rows, every_other_row):
        strided = {key: layout(value) for key, value in compact.items()}
        other = run(SPECS[name], arguments | strided, "triton")
        if name == "mlm_loss" and GPU:
            # Its backward products are torch's, which may go another way through other strides.
            torch.testing.assert_close(one, other)
        else:
            assert_same(one, other)


@pytest.mark.parametrize(("name", "shape"), cases())
def test_columns_that_lie_apart_are_refused_by_name(name, shape):
    arguments = inputs(name, torch.bfloat16, shape=shape)
    several = {key: x for key, x in tensors(arguments).items() if x.shape[-1] > 1}
    for key, value in several.items():
        with (
            pytest.raises(
                ValueError, match=rf": {key} has stride 2 along its last axis, expected 1"
            ),
            watched("triton"),
        ):
            SPECS[name].function(**{**arguments, key: every_other_column(value)}, impl="triton")


# 64-bit offsets


# The same loads with another axis or table, for the slow tier.
ALIKE = [("q", 1), ("k", 0), ("v", 1), ("position_embeddings", 0), ("token_type_embeddings", 0)]
FAR = [
    pytest.param(
        name,
        key,
        axis,
        id=f"{name}-{key}-{axis}",
        marks=pytest.mark.slow if (key, axis) in ALIKE else (),
    )
    for name in TRITON
    for key, value in tensors(inputs(name)).items()
    for axis in range(value.dim() - 1)
    if value.shape[axis] > 1
]


def far_apart(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the same values, with the last slice along `axis` over 2^31 elements after the first.

    The tensor spans 8 GB, of which almost nothing is touched. An offset that overflows points into
    the lower half, and not to unmapped memory.
    """
    strides = list(x.contiguous().stride())
    strides[axis] = 2**31 // (x.shape[axis] - 1) // 16 * 16 + 16
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        storage = x.new_empty(
            2**31
            + 1
            + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
        )
    except RuntimeError as error:
        pytest.skip(f"no room for 2^31 elements of {x.element_size()} bytes: {error}")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    return storage.as_strided(x.shape, strides, 2**31).copy_(x)


def unwatched(name: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Run it without the sanitizer, whose shadow of such a tensor would need real memory."""
    with (
        mock.patch.object(test_kernels, "watched", lambda _: contextlib.nullcontext()),
        # Stock, it copies storages onto themselves.
        mock.patch.object(GridExecutor, "_restore_args_dev", lambda *_: None),
    ):
        return run(SPECS[name], arguments, "triton")


@functools.cache
def close_together(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return arguments in fp16, because the stock interpreter is wrong in bf16, and the results."""
    arguments = inputs(name, torch.float16)
    return arguments, unwatched(name, arguments)


@pytest.mark.parametrize(("name", "key", "axis"), FAR)
def test_offsets_beyond_32_bits(name, key, axis):
    arguments, near = close_together(name)
    assert_same(near, unwatched(name, arguments | {key: far_apart(arguments[key], axis)}))


# Place in the pack


@pytest.mark.parametrize("cut", [False, True], ids=["all", "cut"])
@pytest.mark.parametrize(
    "longest", [pytest.param(128, id="one tile"), slow(129, id="several tiles")]
)
def test_attention_of_a_sequence_does_not_depend_on_its_place_in_the_pack(longest, cut):
    lengths, order = [40, longest, 1, 0, 33, 16], [3, 4, 1, 5, 0, 2]
    arguments = inputs(
        "attention",
        torch.bfloat16,
        shape={"lengths": lengths, "H": 2, "K": 32} | ({"R": 90} if cut else {}),
    )
    upstream = torch.randn(arguments["q"].shape, generator=torch.Generator().manual_seed(2)).to(
        arguments["q"]
    )

    def outcome(order: list[int]) -> list[dict[str, torch.Tensor]]:
        """Return results and gradients of each sequence in the order of `lengths`.

        The sequences are packed in `order`.
        """
        ends = list(itertools.accumulate(lengths, initial=0))
        tokens = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in order]).to(DEVICE)
        rows, more = tokens, {}
        if cut:
            place = torch.searchsorted(arguments["query_indices"], tokens).clamp(
                max=len(upstream) - 1
            )
            asked = arguments["query_indices"][place] == tokens
            rows, more = place[asked], {"query_indices": asked.nonzero()[:, 0]}
        bounds = list(itertools.accumulate((lengths[i] for i in order), initial=0))
        more |= {
            "cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=DEVICE),
            "dropout_seeds": arguments["dropout_seeds"][order],
        }
        leaves = {
            "q": arguments["q"][rows],
            "k": arguments["k"][tokens],
            "v": arguments["v"][tokens],
        }
        leaves = {key: value.detach().requires_grad_() for key, value in leaves.items()}
        with watched("triton"):
            result = SPECS["attention"].function(**arguments | more | leaves, impl="triton")
            result.backward(upstream[rows])
        back = {"result": rows, "q": rows, "k": tokens, "v": tokens}
        found = {"result": result.detach()} | {key: leaf.grad for key, leaf in leaves.items()}
        return {
            key: torch.empty_like(value).index_copy_(0, back[key], value)
            for key, value in found.items()
        }

    assert_same(outcome(list(range(len(lengths)))), outcome(order))


@pytest.mark.parametrize(
    ("size", "dtype", "cut", "p"),
    [(48, "bf16", False, 0.0), (48, "bf16", True, 0.1), slow(64, "fp16", False, 0.1)],
)
def test_attention_of_a_sequence_does_not_depend_on_the_longest_of_the_pack(size, dtype, cut, p):
    """A sequence of up to 64 tokens goes through the same tile in any pack.

    Longer sequences in the pack take another launch.
    """
    lengths = [64, 128, 1, 65, 33, 0]
    arguments = inputs(
        "attention",
        DTYPES[dtype],
        p,
        {"lengths": lengths, "H": 2, "K": size} | ({"R": 100} if cut else {}),
    )
    together = run(SPECS["attention"], arguments, "triton")
    ends = arguments["cu_seqlens"].tolist()
    # The same upstream gradients as in `run`, of which each sequence takes its own.
    upstream = torch.randn(
        arguments["q"].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    ).to(arguments["q"])
    for i, length in enumerate(lengths):
        tokens = rows = slice(ends[i], ends[i + 1])
        alone = {"cu_seqlens": torch.tensor([0, length], dtype=torch.int32), "max_seqlen": length}
        if p:
            alone["dropout_seeds"] = arguments["dropout_seeds"][i : i + 1]
        if cut:
            first, last = torch.searchsorted(
                arguments["query_indices"], torch.tensor(ends[i : i + 2])
            ).tolist()
            rows, alone["query_indices"] = (
                slice(first, last),
                arguments["query_indices"][first:last] - ends[i],
            )
        if rows.start == rows.stop:
            continue
        leaves = {
            key: arguments[key][rows if key == "q" else tokens].detach().requires_grad_()
            for key in "qkv"
        }
        with watched("triton"):
            result = SPECS["attention"].function(
                **arguments | place(alone | leaves, DEVICE), impl="triton"
            )
            result.backward(upstream[rows].to(DEVICE))
        assert torch.equal(result.cpu(), together["result"][rows]), f"{length} tokens"
        for key, leaf in leaves.items():
            assert torch.equal(
                leaf.grad.cpu(), together[f"d{key}"][rows if key == "q" else tokens]
            ), f"d{key} of {length} tokens"


# Padding: rows behind the last sequence, and empty sequences at the end

PADDED = [
    pytest.param(
        {"lengths": lengths, "H": 2, "K": 32, "rest": rest} | cut,
        id=f"{label}-{'cut' if cut else 'all'}",
    )
    for label, lengths, rest in (
        ("one tile", [40, 9, 100, 0, 0], 200),
        ("small tile", [40, 9, 64], 17),
        ("several tiles", [200, 3, 0], 129),
        ("nothing else", [], 5),
    )
    for cut in ({}, {"R": 30})
    if sum(lengths) or not cut
]


@pytest.mark.parametrize(
    ("impl", "listed"),
    [
        ("triton", False),
        pytest.param("triton", True, id="triton-listed"),
        *((impl, False) for impl in ("cpu", "reference") if ("attention", impl) in EVERY),
    ],
)
@pytest.mark.parametrize("shape", PADDED)
def test_rows_behind_the_last_sequence_are_zero_and_change_nothing(impl, shape, listed):
    """Padding may contain anything: here NaN, also in the upstream gradient.

    The other rows are bit for bit as without padding.
    """
    spec = SPECS["attention"]
    arguments = inputs("attention", torch.bfloat16, 0.1, shape)
    end = int(arguments["cu_seqlens"][-1])
    kept = {"q": end, "k": end, "v": end}
    if "query_indices" in arguments:
        kept["q"] = int((arguments["query_indices"] < end).sum())
        assert 0 < kept["q"] < len(arguments["query_indices"])
    arguments |= {
        key: arguments[key].clone() for key in kept
    }  # separate tensors, not slices of one projection
    for key, rows in kept.items():
        arguments[key][rows:] = float("nan")
    real = next(
        i for i in range(len(shape["lengths"]) + 1) if not any(shape["lengths"][i:])
    )  # sequences but for empty ones at the end
    bare = arguments | {key: arguments[key][:rows] for key, rows in kept.items()}
    bare |= {
        "cu_seqlens": arguments["cu_seqlens"][: real + 1],
        "dropout_seeds": arguments["dropout_seeds"][:real],
    }
    if "query_indices" in arguments:
        bare["query_indices"] = arguments["query_indices"][: kept["q"]]
    found = []
    for pack in (arguments, bare):
        if listed:
            pack["tile_schedule"] = attention_tile_schedule(pack["cu_seqlens"], len(pack["k"]))
        leaves = {key: pack[key].detach().requires_grad_() for key in kept}
        with watched(impl):
            result = spec.function(**pack | leaves, impl=impl)
            upstream = torch.ones_like(result)
            upstream[kept["q"] :] = float("nan")
            result.backward(upstream)
        found.append(
            {"result": result.detach(), **{f"d{key}": leaf.grad for key, leaf in leaves.items()}}
        )
    padded, plain = found
    for key, value in padded.items():
        rows = kept["q" if key == "result" else key[1:]]
        assert not value[rows:].any(), f"{key} behind the last sequence"
        assert torch.equal(value[:rows], plain[key]), key


def test_a_tile_schedule_for_another_batch_is_refused():
    arguments = inputs("attention", shape=PACK)
    other = attention_tile_schedule(arguments["cu_seqlens"][:-1], len(arguments["k"]))
    with pytest.raises(
        ValueError, match=r"varlen_attention: tile_schedule has shape \[4, 2\], expected \[5, 2\]"
    ):
        SPECS["attention"].function(**arguments, tile_schedule=other, impl="triton")


# Bad input


@pytest.mark.parametrize(("name", "impl"), EVERY)
def test_another_dtype_shape_or_device_is_refused_by_name(name, impl):
    spec, arguments, leaders = SPECS[name], inputs(name), []
    for key, value in tensors(arguments).items():
        with pytest.raises(TypeError, match=rf": {key} is int8, expected "):
            spec.function(**{**arguments, key: value.to(torch.int8)}, impl=impl)
        with pytest.raises(ValueError, match=rf": {key} has shape \[1, "):
            spec.function(**{**arguments, key: value[None]}, impl=impl)
        with pytest.raises(
            ValueError, match=r": \w+ has shape \["
        ):  # if it sets a size, the other arguments are refused
            spec.function(**{**arguments, key: value[..., :-1]}, impl=impl)
        with pytest.raises(
            ValueError,
            match=rf": \w+ is on (meta|{DEVICE}).*, the other tensors on (meta|{DEVICE})",
        ) as error:
            spec.function(**{**arguments, key: value.to("meta")}, impl=impl)
        if f": {key} is on meta" not in str(error.value):
            leaders.append(key)
    assert len(leaders) == 1, (
        "one argument sets the device; of that one it is the others that are refused"
    )


@pytest.mark.parametrize("name", TRITON)
def test_fp64_is_refused_by_name(name):
    spec = SPECS[name]
    wide = {
        key: value.double()
        for key, value in tensors(inputs(name)).items()
        if value.is_floating_point()
    }
    with pytest.raises(
        TypeError,
        match=rf": ({'|'.join(wide)}) is float64, which impl = \"triton\" does not compute in",
    ):
        spec.function(**inputs(name) | wide, impl="triton")


@pytest.mark.skipif(GPU, reason="nothing is interpreted")
@pytest.mark.parametrize("name", TRITON)
def test_without_a_gpu_or_the_interpreter_triton_is_refused(name, monkeypatch):
    monkeypatch.setattr("fastbert_kernels._triton.INTERPRETED", False)
    with pytest.raises(
        ValueError,
        match=r": \w+ is on the CPU, where impl = \"triton\" only runs in Triton's interpreter",
    ):
        SPECS[name].function(**inputs(name), impl="triton")


@pytest.mark.parametrize(
    ("name", "impl"), [(name, impl) for name, impl in EVERY if SPECS[name].dropout]
)
def test_dropout_is_checked(name, impl):
    spec, arguments = SPECS[name], inputs(name)
    for p in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"dropout_p = {p}; must be at least 0 and below 1"):
            spec.function(**{**arguments, "dropout_p": p}, impl=impl)
    with pytest.raises(ValueError, match=r"dropout_p = 0\.1 needs dropout_seeds"):
        spec.function(**{**arguments, "dropout_seeds": None}, impl=impl)


FURTHER_TABLES = ("token_type_ids", "position_ids")
INDICES = [
    pytest.param(name, key, shape, id=f"{name}-{key}")
    for name in TRITON
    for shape in [max(kinds(SPECS[name]).values(), key=len)]  # attention: with queries
    for key, value in tensors(inputs(name, shape=shape)).items()
    if not value.is_floating_point() and key != "dropout_seeds"
]


@pytest.mark.parametrize(
    ("name", "key", "shape"), [case for case in INDICES if case.values[1] != "cu_seqlens"]
)
def test_an_index_out_of_range_is_refused_by_name(name, key, shape):
    spec, arguments = SPECS[name], inputs(name, shape=shape)
    for where, value in ((0, -1), (-1, 2**40)):
        arguments[key] = arguments[key].clone()
        arguments[key][where] = value
        low, high = ("-1", r"\d+") if value < 0 else (r"-?\d+", value)
        for impl in [impl for other, impl in EVERY if other == name]:
            with pytest.raises(
                ValueError, match=rf": {key} span {low} to {high}; must be in \[0, \w+ = \d+\)"
            ):
                spec.function(**arguments, check_values=True, impl=impl)


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [  # in the default tier one table of `embedding`
        slow(*case.values, id=case.id) if case.values[1] in FURTHER_TABLES else case
        for case in INDICES
    ],
)
def test_unchecked_a_bad_index_reads_and_writes_nothing_outside(name, key, shape):
    """It gives NaN where the docstring says so."""
    spec = SPECS[name]
    changes: list[dict[int, int]] = [{0: -1}, {1: -300}, {-1: 300}]
    if key != "cu_seqlens":
        bad = inputs(name, shape=shape)
        bad[key] = torch.full_like(bad[key], 2**40)
        with pytest.raises(ValueError, match=f"{key} span") as refused:
            spec.function(**bad, check_values=True, impl="triton")
        behind_the_last = re.search(r"in \[0, \w+ = (\d+)\)", str(refused.value))[1]
        changes = [{0: -1, -1: 2**40}, {0: -(2**63), 1: int(behind_the_last)}]
    for change in changes:
        arguments = inputs(name, shape=shape)
        arguments[key] = arguments[key].clone()
        for where, value in change.items():
            arguments[key][where] = value
        found = run(spec, arguments | {"check_values": False}, "triton")
        if "NaN" in str(spec.function.__doc__):
            assert found["result"].isnan().any(), f"{key}: {change}"


PACK = {"lengths": [15, 16, 17, 1], "H": 2, "K": 16}  # T = 49


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": [1, 15, 31, 48, 49]}, "cu_seqlens starts at 1, expected 0"),
        ({"cu_seqlens": [-1, 15, 31, 48, 49]}, "cu_seqlens starts at -1, expected 0"),
        (
            {"cu_seqlens": [0, 31, 15, 48, 49]},
            "cu_seqlens falls from 31 to 15 at sequence 1, expected to ascend",
        ),
        ({"cu_seqlens": [0, 15, 31, 48, 50]}, "cu_seqlens ends at 50, expected at most T = 49"),
        ({"max_seqlen": 16}, "max_seqlen = 16, but cu_seqlens has a sequence of 17 tokens"),
        ({"query_indices": [0, 5, 4]}, "query_indices holds 5 and then 4, expected to ascend"),
        ({"query_indices": [0, 5, 5]}, "query_indices holds 5 and then 5, expected to ascend"),
        ({"query_indices": [-1, 5, 6]}, r"query_indices span -1 to 6; must be in \[0, T = 49\)"),
        ({"query_indices": [0, 5, 49]}, r"query_indices span 0 to 49; must be in \[0, T = 49\)"),
        ({"query_indices": [0, 5, 2]}, "query_indices holds 5 and then 2, expected to ascend"),
        ({"scale": -1.0}, "scale = -1.0; must be positive"),
    ],
)
@pytest.mark.parametrize("impl", [impl for name, impl in EVERY if name == "attention"])
def test_the_values_of_a_pack_are_checked(change, message, impl):
    arguments = inputs("attention", shape=PACK) | {"check_values": True}
    if "query_indices" in change:
        arguments["q"] = arguments["q"][:3]
    for key, value in change.items():
        like = torch.int64 if key == "query_indices" else torch.int32
        arguments[key] = (
            torch.tensor(value, dtype=like, device=DEVICE) if isinstance(value, list) else value
        )
    with pytest.raises(ValueError, match=f"varlen_attention: {message}"):
        SPECS["attention"].function(**arguments, impl=impl)
