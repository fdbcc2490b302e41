"""What only a GPU can show: reproducible bits, memory use, and tensors over 2^31 elements."""

import pytest
import torch

from fastbert_kernels import layer_norm, masked_cross_entropy
from fastbert_kernels.specs import SPECS
from tests.test_kernels import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("name", SPECS)
def test_the_same_bits_at_every_run(name):
    spec = SPECS[name]
    arguments = spec.inputs(spec.shapes[-1], torch.bfloat16, 0.1)
    first = run(spec, arguments, "triton")
    for _ in range(20):
        again = run(spec, arguments, "triton")
        assert all(torch.equal(again[key], value) for key, value in first.items())


def test_the_loss_needs_a_tenth_of_the_memory_at_the_most():
    """M = 8,192, D = 768, V = 30,522, forward and backward; gradients are not counted."""
    draw = {"dtype": torch.bfloat16, "device": "cuda", "requires_grad": True}
    leaves = [
        torch.randn(8192, 768, **draw),
        torch.randn(30522, 768, **draw),
        torch.randn(30522, **draw),
    ]
    labels = torch.randint(30522, (8192,), device="cuda")
    peaks = {}
    for impl in ("triton", "reference"):
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        masked_cross_entropy(*leaves, None, labels, total=8192, impl=impl)[0].backward()
        torch.cuda.synchronize()
        gradients = sum(
            leaf.nbytes for leaf in leaves
        )  # those of this pass, before they are added to .grad
        peaks[impl] = torch.cuda.max_memory_allocated() - before - gradients
    assert peaks["triton"] <= peaks["reference"] / 10, peaks


def test_more_than_2_to_the_31_elements():
    """Compare the last rows of 4.3 GB with torch on these rows alone, forward and backward."""
    size, rows = 768, 2**31 // 768 + 1000
    if torch.cuda.mem_get_info()[0] < 6 * rows * size * 2:
        pytest.skip("needs 26 GB of free memory")
    x = torch.randn(rows, size, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    norm_weight, norm_bias = (
        torch.randn(size, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    y = layer_norm(x, norm_weight, norm_bias, impl="triton")
    y.backward(y.detach())
    last = x.detach()[-500:].float().requires_grad_()
    want = torch.nn.functional.layer_norm(
        last, (size,), norm_weight.float(), norm_bias.float(), 1e-12
    )
    want.backward(y.detach()[-500:].float())
    torch.testing.assert_close(y[-500:].float(), want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(
        x.grad[-500:].float(), last.grad, rtol=0.02, atol=0.02 * float(last.grad.abs().max())
    )
