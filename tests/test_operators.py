"""Each Triton operation of SPECS as a torch operator.

The tests cover opcheck, torch.compile, autocast, and what autograd may ask of it.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert_kernels._spec import Shape, Spec
from fastbert_kernels.specs import SPECS
from tests.test_kernels import GPU, fresh_memory_is_nan, place, run, watched
from tests.tiers import typical

__all__ = ["fresh_memory_is_nan"]  # used by every test

DEVICE = "cuda" if GPU else "cpu"
TRITON = [name for name, spec in SPECS.items() if "triton" in spec.implementations]
EVERY = [
    (name, impl)
    for name, spec in SPECS.items()
    for impl in spec.implementations
    if not (GPU and impl == "cpu")
]


def kinds(spec: Spec) -> dict[tuple[str, ...], Shape]:
    """Map each set of axes of a spec's shapes to a shape: its third one, or its last.

    Sets of axes differ, for example, by cut queries or a bare call.
    """
    found: dict[tuple[str, ...], list[Shape]] = {}
    for shape in spec.shapes:
        found.setdefault(tuple(shape), []).append(shape)
    return {axes: shapes[:3][-1] for axes, shapes in found.items()}


def usual(name: str) -> Shape:
    return next(iter(kinds(SPECS[name]).values()))


def cases() -> list[Any]:
    """(name, shape) of every Triton operation, one shape of each kind.

    The default tier has the set with the most axes, apart from a bare call.
    """
    found = []
    for name in TRITON:
        every = kinds(SPECS[name])
        most = max((axes for axes in every if "bare" not in axes), key=len)
        found += [
            pytest.param(
                name,
                shape,
                id=f"{name}-{''.join(axes)}",
                marks=() if axes == most else pytest.mark.slow,
            )
            for axes, shape in every.items()
        ]
    return found


def inputs(
    name: str, dtype: torch.dtype = torch.float32, p: float = 0.1, shape: Shape | None = None
) -> dict[str, Any]:
    return place(SPECS[name].inputs(shape or usual(name), dtype, p), DEVICE)


def forward(
    name: str, impl: str, arguments: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the result, and the leaves that it is differentiable in."""
    spec = SPECS[name]
    leaves = {
        key: arguments[key].detach().requires_grad_()
        for key in spec.differentiable
        if arguments[key] is not None
    }
    result = spec.function(**{**arguments, **leaves}, impl=impl)
    return result[0] if isinstance(result, tuple) else result, leaves


def with_function(spec: Spec, function: Any) -> Spec:
    """Return the same operation for `run`, called in another way."""
    return dataclasses.replace(spec, function=function)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key], other[key]), key


# Registration


class Recorder(TorchDispatchMode):
    """Record every call of this library's operators, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastbert_kernels":
            detached = tuple(x.detach() if torch.is_tensor(x) else x for x in args)
            self.calls.append((func, detached, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "shape"), cases())
def test_opcheck(name, shape):
    with watched("triton"), Recorder() as recorder:
        result, _ = forward(name, "triton", inputs(name, torch.bfloat16, shape=shape))
        result.sum().backward()
    assert len({func for func, *_ in recorder.calls}) >= 2, (
        "a forward and a backward operator at the least"
    )
    for func, args, kwargs in recorder.calls:
        with watched("triton"):
            torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize(("name", "shape"), cases())
def test_compiled_it_gives_the_same_bits(name, shape):
    """With dynamic shapes. The next test has static ones."""
    torch._dynamo.reset()
    compiled = torch.compile(
        SPECS[name].function, fullgraph=True, backend="aot_eager", dynamic=True
    )
    arguments = inputs(name, torch.bfloat16, shape=shape)
    assert_same(
        run(SPECS[name], arguments, "triton"),
        run(with_function(SPECS[name], compiled), arguments, "triton"),
    )


@pytest.mark.parametrize("name", typical(TRITON, "attention", "mlm_loss", "norm"))
def test_compiled_under_autocast_it_gives_the_same_bits(name):
    spec, arguments, function = SPECS[name], inputs(name), under_autocast(SPECS[name].function)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(
        run(with_function(spec, function), arguments, "triton"),
        run(with_function(spec, compiled), arguments, "triton"),
    )


@pytest.mark.parametrize("name", typical(TRITON, "attention", "mlm_loss"))
def test_a_batch_of_another_length_is_not_compiled_again(name):
    shape = usual(name)
    longer = {
        axis: [*size, 2] if axis == "lengths" else size + (axis in "TM")
        for axis, size in shape.items()
    }
    torch._dynamo.reset()
    compiled = torch.compile(
        SPECS[name].function, fullgraph=True, backend="aot_eager", dynamic=True
    )
    run(with_function(SPECS[name], compiled), inputs(name, shape=shape), "triton")
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(with_function(SPECS[name], compiled), inputs(name, shape=longer), "triton")


@pytest.mark.slow
def test_compiled_attention_on_a_cpu_breaks_the_graph_and_gives_the_same_bits():
    """As kernels/README.md says; the definition is compiled whole."""
    spec, arguments = (
        SPECS["attention"],
        place(SPECS["attention"].inputs(usual("attention"), torch.float32, 0.1), "cpu"),
    )
    for impl, whole in (("cpu", False), ("reference", True)):
        torch._dynamo.reset()
        compiled = torch.compile(spec.function, fullgraph=whole, backend="aot_eager")
        assert_same(run(spec, arguments, impl), run(with_function(spec, compiled), arguments, impl))
    torch._dynamo.reset()
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="data-dependent"):
        run(with_function(spec, compiled), arguments, "cpu")


# Autocast

X, ROW = torch.ones(4, 8), torch.ones(8)
AS_TORCH = {  # each operation in plain torch
    "attention": lambda: functional.scaled_dot_product_attention(X[None], X[None], X[None]),
    "mlm_loss": lambda: functional.cross_entropy(
        functional.linear(X, X), torch.zeros(4, dtype=torch.int64)
    ),
    "norm": lambda: functional.layer_norm(X, (8,), ROW, ROW),
    "add_norm": lambda: functional.layer_norm(X + X, (8,), ROW, ROW),
    "gelu": lambda: functional.gelu(functional.linear(X, torch.ones(8, 8), ROW)),
    "geglu": lambda: functional.glu(functional.linear(X, torch.ones(8, 8), ROW)),
    "rotary": lambda: X * X.cos() + X.roll(4, -1) * X.sin(),
    "embedding": lambda: functional.layer_norm(
        functional.embedding(torch.zeros(4, dtype=torch.int64), X), (8,), ROW, ROW
    ),
}


def under_autocast(function: Any, **options: Any) -> Any:
    """Run only the forward pass under autocast, as torch advises."""

    def call(**arguments: Any) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16, **options):
            return function(**arguments)

    return call


@pytest.mark.parametrize(("name", "impl"), EVERY)
def test_autocast_gives_the_dtype_that_torch_gives(name, impl):
    with torch.autocast("cpu", torch.bfloat16):
        expected = AS_TORCH[name]().dtype
    found = run(
        with_function(SPECS[name], under_autocast(SPECS[name].function)), inputs(name), impl
    )
    assert found.pop("result").dtype == expected
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


@pytest.mark.parametrize("backward", ["after", "inside"])
@pytest.mark.parametrize(
    ("name", "impl"), [(name, impl) for name, impl in EVERY if impl != "reference"]
)
def test_autocast_costs_no_more_than_its_dtype_does(name, impl, backward):
    """err(ours) <= 2 err(reference) + 1 ulp of bf16, both under autocast.

    Errors are differences from the reference in fp64. torch advises to leave autocast before the
    backward pass, but some programs do not.
    """
    spec, arguments = SPECS[name], inputs(name)
    exact = run(spec, arguments, "reference", torch.float64)
    lowered = with_function(spec, under_autocast(spec.function))
    plain = run(lowered, arguments, "reference")
    with torch.autocast(DEVICE, torch.bfloat16, enabled=backward == "inside"):
        ours = run(lowered, arguments, impl)
    for key, truth in exact.items():
        allowed = 2 * float((plain[key] - truth).abs().max()) + torch.finfo(
            torch.bfloat16
        ).eps * float(truth.abs().max())
        error = float((ours[key] - truth).abs().max())
        assert error <= allowed, f"{key} is off by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize(("name", "impl"), EVERY)
def test_nothing_is_cast_outside_autocast(name, impl):
    spec, arguments = SPECS[name], inputs(name)
    plain = run(spec, arguments, impl)
    assert {x.dtype for x in plain.values()} == {torch.float32}
    assert_same(
        plain,
        run(with_function(spec, under_autocast(spec.function, enabled=False)), arguments, impl),
    )
    elsewhere = "cpu" if GPU else "cuda"
    torch.set_autocast_enabled(elsewhere, True)
    try:
        assert_same(plain, run(spec, arguments, impl))
    finally:
        torch.set_autocast_enabled(elsewhere, False)


def test_under_autocast_the_gradient_of_the_vocabulary_is_a_sum_in_fp32():
    """A sum in bf16 would give the optimizer 8 bits."""
    spec = SPECS["mlm_loss"]
    gradients = run(
        with_function(spec, under_autocast(spec.function)), inputs("mlm_loss"), "triton"
    )
    for key in ("dweight", "dbias"):
        assert (gradients[key] != gradients[key].bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "impl"), [(name, impl) for name, impl in EVERY if SPECS[name].differentiable[1:]]
)
def test_outside_autocast_mixed_dtypes_are_refused_by_name(name, impl):
    """One argument of each operation sets the dtype; if it changes, the others are refused."""
    spec, leaders = SPECS[name], []
    for changed in spec.differentiable:
        arguments = inputs(name, torch.bfloat16)
        arguments[changed] = arguments[changed].half()
        with pytest.raises(
            TypeError, match=r": \w+ is (float16|bfloat16), expected (float16|bfloat16)"
        ) as error:
            spec.function(**arguments, impl=impl)
        if f": {changed} is float16, expected bfloat16" not in str(error.value):
            leaders.append(changed)
    assert len(leaders) == 1


# What autograd may ask


@pytest.mark.parametrize(("name", "shape"), cases())
def test_result_and_gradients_lie_apart(name, shape):
    """Writing into one of them, as `clip_grad_norm_` does, must not change another.

    Without dropout, since then there is most that could be shared.
    """
    with watched("triton"):
        arguments = inputs(name, torch.bfloat16, 0.0, shape)
        result, leaves = forward(name, "triton", arguments)
        with watched("reference"):
            expected, _ = forward(name, "reference", arguments)
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        result.sum().backward()
    tensors = {"result": result.detach(), **{f"d{key}": leaf.grad for key, leaf in leaves.items()}}
    tensors |= {key: value for key, value in arguments.items() if torch.is_tensor(value)}
    before = {key: value.clone() for key, value in tensors.items()}
    for written in ["result", *(f"d{key}" for key in leaves)]:
        tensors[written].fill_(7)
        for key in tensors.keys() - {written}:
            assert torch.equal(tensors[key], before[key]), f"{key} changes with {written}"
        tensors[written].copy_(before[written])


@pytest.mark.parametrize(("name", "impl"), EVERY)
def test_a_second_backward_pass_gives_the_same_gradients(name, impl):
    with watched(impl):
        result, leaves = forward(name, impl, inputs(name))
        upstream = torch.linspace(1, 2, result.numel(), device=result.device).view(result.shape)
        first = torch.autograd.grad(result, list(leaves.values()), upstream, retain_graph=True)
        second = torch.autograd.grad(result, list(leaves.values()), upstream)
    assert_same(dict(zip(leaves, first, strict=True)), dict(zip(leaves, second, strict=True)))


@pytest.mark.parametrize("loss_of", [torch.Tensor.square, torch.Tensor.clone])
@pytest.mark.parametrize(
    ("name", "impl"), [(name, impl) for name, impl in EVERY if impl != "reference"]
)
def test_gradients_of_gradients_are_right_or_refused(name, impl, loss_of):
    """A gradient penalty must not silently lack the part through saved tensors.

    Also where the gradient that comes in is constant, as of a sum.
    """

    def penalise(impl: str) -> dict[str, torch.Tensor]:
        result, leaves = forward(name, impl, inputs(name))
        loss = loss_of(result).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        (loss + sum(gradient.square().sum() for gradient in gradients)).backward()
        return {key: leaf.grad for key, leaf in leaves.items()}

    expected = penalise("reference")
    try:
        with watched(impl):
            found = penalise(impl)
    except RuntimeError as error:
        assert "create_graph=True asks for second derivatives" in str(error)
    else:
        torch.testing.assert_close(found, expected)
