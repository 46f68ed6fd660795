"""kernels/swiglu.py against reference.py: outputs and gradients; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernels import reference
from kernels.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-11,
}  # of the largest element; interpreted, bfloat16 is cut off, not rounded


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def assert_equals_reference(function, gate_up: Tensor) -> None:
    """Value and gradient, against the reference's on the same numbers in float64 (which it computes in float32)."""
    x, exact = gate_up.detach().requires_grad_(), gate_up.detach().double().requires_grad_()
    y, truth = function(x), reference.swiglu(exact)
    dy = normal(*y.shape, dtype=y.dtype, seed=9)
    y.backward(dy)
    truth.backward(dy.double())
    assert y.dtype == x.grad.dtype == gate_up.dtype
    for name, got, want in (("y", y, truth), ("gradient", x.grad, exact.grad)):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error <= TOLERANCE[gate_up.dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("shape", ((2,), (1, 1, 2), (2, 3, 14), (3, 2048), (2, 4100)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(shape, dtype):
    assert_equals_reference(swiglu, normal(*shape, dtype=dtype))


@pytest.mark.parametrize("layout", ("gaps between rows", "gaps within rows"))
def test_strides(layout):
    x = normal(2, 3, 40)[..., 3:17] if layout == "gaps between rows" else normal(2, 14, 3).transpose(1, 2)
    assert_equals_reference(swiglu, x)


def test_gradient_with_strides():
    x = normal(4, 6).requires_grad_()
    swiglu(x).sum().backward()  # its gradient is one number, expanded
    exact = x.detach().requires_grad_()
    reference.swiglu(exact).sum().backward()
    torch.testing.assert_close(x.grad, exact.grad, rtol=2e-6, atol=2e-6)


def test_far_gates():
    """silu(-1e4) is 0 and silu(1e4) is 1e4, without inf - inf on the way."""
    x = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], device=DEVICE, requires_grad=True)
    y = swiglu(x)
    y.sum().backward()
    torch.testing.assert_close(y.tolist(), [[0.0, 3e4]])
    torch.testing.assert_close(x.grad.tolist(), [[0.0, 3.0, 0.0, 1e4]])


def test_no_rows():
    x = normal(0, 6).requires_grad_()
    y = swiglu(x)
    y.sum().backward()
    assert y.shape == (0, 3) and x.grad.shape == (0, 6)


@pytest.mark.parametrize(
    "x", (torch.zeros(2, 5), torch.zeros(2, 0), torch.zeros(2, 4).long(), torch.zeros(2, 4, device="meta")), ids=str
)
def test_bad_input_is_named(x):
    with pytest.raises(ValueError, match="gate_up"):
        swiglu(x if x.is_meta else x.to(DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: compiles for minutes on a small CPU")
def test_compiles_without_a_graph_break():
    assert_equals_reference(torch.compile(swiglu, fullgraph=True), normal(4, 200, dtype=torch.bfloat16))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: 4.3 GB of input")
def test_more_than_2_to_the_31_elements():
    n_rows = 2**31 // 8192 + 5
    x = torch.zeros(n_rows, 8192, device=DEVICE, dtype=torch.bfloat16)
    x[-1] = normal(8192, dtype=torch.bfloat16)
    torch.testing.assert_close(swiglu(x)[-1], reference.swiglu(x[-1]), rtol=2**-7, atol=0)
