"""`fastbert_kernels.linear`: whichever library computes it, it is `x W' + b`."""

from __future__ import annotations

import pytest
import torch

from fastbert_kernels import _linear, _processor, linear, masked_cross_entropy

SHAPES = [
    (1, 1, 1),
    (0, 64, 128),
    (37, 256, 100),
    (300, 128, 4096),
    (1900, 256, 1024),
    (1900, 1024, 256),
    (300, 2048, 512),
]


@pytest.fixture
def onednn(monkeypatch):
    """Use oneDNN on every processor, not only where it is the faster library."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(_linear, "_onednn_is_faster", lambda: True)


def results(function, x, weight, bias, dy, dtype=torch.float32):
    """Return y, dx, dW and db in fp64."""
    x, weight, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight, bias))
    y = function(x, weight, bias)
    return [
        tensor.detach().double()
        for tensor in (y, *torch.autograd.grad(y, (x, weight, bias), dy.to(dtype)))
    ]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_error_is_at_most_twice_that_of_torch_plus_one_ulp(onednn, rows, inputs, outputs):
    draw = torch.Generator().manual_seed(rows)
    x, weight, bias, dy = (
        torch.randn(s, generator=draw)
        for s in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    exact = results(torch.nn.functional.linear, x, weight, bias, dy, torch.float64)
    plain = results(torch.nn.functional.linear, x, weight, bias, dy)
    ours = results(lambda *arguments: linear(*arguments, impl="cpu"), x, weight, bias, dy)
    for name, wanted, torchs, found in zip(
        ("y", "dx", "dW", "db"), exact, plain, ours, strict=True
    ):
        assert found.shape == wanted.shape
        # The root of the mean square: the largest of a million differences is luck.
        ulp = torch.finfo(torch.float32).eps * wanted.norm()
        assert (found - wanted).norm() <= 2 * (torchs - wanted).norm() + ulp, name


def test_strides_do_not_matter(onednn):
    """A slice of a weight, columns of a wider x, and the gradient of a sum, which is expanded."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 192, generator=draw)[:, 64:128], torch.randn(96, 64, generator=draw)
    for part in (weight[:32], weight[32:], weight[::3]):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours, plain = linear(a[:, :], part, impl="cpu"), b @ part.T
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(linear(x, part, impl="cpu"), plain)
        ours.sum().backward(), plain.sum().backward()
        torch.testing.assert_close(a.grad, b.grad)


def test_nothing_is_computed_for_what_is_frozen(onednn):
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16)
    (y := linear(x, weight, impl="cpu")).sum().backward()
    assert x.grad is not None and y.grad_fn.needs_input_grad == (True, False, False)


def test_the_same_twice(onednn):
    """Results are equal bit for bit; otherwise a resumed run would differ."""
    x, weight = torch.randn(1234, 256), torch.randn(1024, 256)
    assert torch.equal(linear(x, weight, impl="cpu"), linear(x.clone(), weight.clone(), impl="cpu"))


def test_other_dtypes_and_implementations_are_torchs_own(onednn, monkeypatch):
    monkeypatch.setattr(_linear, "_product", None)
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert torch.equal(linear(x, weight, impl="reference"), x @ weight.T)
    assert torch.equal(
        linear(x.double(), weight.double(), impl="cpu"), x.double() @ weight.double().T
    )
    with pytest.raises(TypeError, match="NoneType"):
        linear(x, weight, impl="cpu")


def test_the_maker_of_the_processor_decides(monkeypatch, tmp_path):
    for maker, flags, wanted in (
        ("GenuineIntel", "avx2 avx512f", False),
        ("AuthenticAMD", "avx2 avx512f", torch.backends.mkldnn.is_available()),
        ("AuthenticAMD", "avx2", False),
    ):
        text = f"processor\t: 0\nvendor_id\t: {maker}\nflags\t: fpu {flags}\n"
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(_processor, "Path", lambda _: tmp_path / "cpuinfo")
        monkeypatch.setattr(_linear, "flags", _processor.flags.__wrapped__)
        assert _linear._onednn_is_faster.__wrapped__() == wanted
    (tmp_path / "cpuinfo").unlink()
    assert not _linear._onednn_is_faster.__wrapped__()


# With operands in bf16. `TOO_FEW` has just fewer multiplications than are rounded.
BF16 = torch.bfloat16
# 1,900 and 300 get rows of zeros, 64 gets none.
LARGE, TOO_FEW = [(300, 128, 4096), (1900, 256, 1024), (64, 256, 256)], (63, 256, 256)


def operands(rows, inputs, outputs):
    draw = torch.Generator().manual_seed(rows)
    shapes = (rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)
    return [torch.randn(shape, generator=draw) for shape in shapes]


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), LARGE)
def test_rounded_products_are_those_of_rounded_factors(impl, rows, inputs, outputs):
    """Each entry is the exact sum, with an error of fp32's additions, rounded to bf16."""
    x, weight, bias, dy = operands(rows, inputs, outputs)
    found = results(
        lambda *arguments: linear(*arguments, operands=BF16, impl=impl), x, weight, bias, dy
    )
    x, weight, bias, dy = (tensor.to(BF16).double() for tensor in (x, weight, bias, dy))
    exact = results(torch.nn.functional.linear, x, weight, bias, dy, torch.float64)
    sizes = results(
        torch.nn.functional.linear, x.abs(), weight.abs(), bias.abs(), dy.abs(), torch.float64
    )
    for name, terms, value, wanted, size in zip(
        ("y", "dx", "dW", "db"),
        (inputs + 1, outputs, rows, rows),
        found,
        exact,
        sizes,
        strict=True,
    ):
        # Higham, 2002, section 3.1: at most n u / (1 - n u) times the sum of the sizes.
        added = terms * torch.finfo(torch.float32).eps * size
        rounded = torch.finfo(BF16).eps / 2 * (wanted.abs() + added) if name != "db" else 0
        assert ((value - wanted).abs() <= added + rounded).all(), name


@pytest.mark.usefixtures("bf16_products")
def test_a_product_that_is_kept_rounded_has_the_same_values():
    x, weight, bias, dy = operands(*LARGE[2])
    x.requires_grad_()
    kept = linear(x, weight, bias, operands=BF16, keep_rounded=True)
    whole = linear(x, weight, bias, operands=BF16)
    assert (kept.dtype, whole.dtype) == (BF16, torch.float32)
    assert torch.equal(kept.float(), whole)
    # What is rounded already is taken as it is, and has a gradient of its own dtype.
    rounded = x.detach().to(BF16).requires_grad_()
    assert torch.equal(linear(rounded, weight, bias, operands=BF16), whole)
    (dx,) = torch.autograd.grad(whole, x, dy)
    (of_rounded,) = torch.autograd.grad(linear(rounded, weight, bias, operands=BF16), rounded, dy)
    assert of_rounded.dtype == BF16
    assert torch.equal(of_rounded.float(), dx)


def compiled(capfd, compute) -> int:
    """How many operations oneDNN compiles for a computation."""
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
        compute()
    return capfd.readouterr().out.count("create:cache_miss")


def layer(rows):
    x, weight, bias, dy = operands(rows, 128, 512)
    results(lambda *arguments: linear(*arguments, operands=BF16), x, weight, bias, dy)


def loss(rows):
    x, weight, bias, _ = operands(rows, 128, 2048)
    factors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    labels = torch.arange(rows)
    value, *_ = masked_cross_entropy(*factors, None, labels, total=rows, operands=BF16)
    value.backward()


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("compute", [layer, loss])
def test_packs_of_similar_sizes_have_the_same_shapes(compute, capfd):
    """Compiling a product takes longer than the product."""
    assert compiled(capfd, lambda: compute(833)) >= 3 or not _processor.has_bf16_instructions()
    for rows in (834, 860, 896):
        assert compiled(capfd, lambda rows=rows: compute(rows)) == 0
    compute(241)
    for rows in (242, 256):
        assert compiled(capfd, lambda rows=rows: compute(rows)) == 0


def test_small_products_are_not_rounded():
    x, weight, bias, _ = operands(*TOO_FEW)
    plain = linear(x, weight, bias)
    for keep_rounded in (False, True):
        found = linear(x, weight, bias, operands=BF16, keep_rounded=keep_rounded)
        assert torch.equal(found, plain)
    low = x.to(BF16)
    assert torch.equal(linear(low, weight, operands=BF16), linear(low.float(), weight))


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "message"),
    [
        (torch.float16, torch.float32, "linear: operands = torch.float16; must be torch.bfloat16"),
        (BF16, torch.float64, "linear: operands = torch.bfloat16 for a weight in torch.float64"),
    ],
)
def test_operands_that_do_not_fit_are_refused(dtype, weight_dtype, message):
    x, weight = torch.randn(3, 4, dtype=weight_dtype), torch.randn(5, 4, dtype=weight_dtype)
    with pytest.raises(TypeError, match=message):
        linear(x, weight, operands=dtype)
