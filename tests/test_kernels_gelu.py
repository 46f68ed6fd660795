"""kernels/gelu.py against reference.py: outputs and gradients; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernels import reference
from kernels.gelu import gelu, gelu_tanh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # interpreted, bfloat16 is cut off, not rounded
BOTH = pytest.mark.parametrize(
    ("ours", "truth"), ((gelu, reference.gelu), (gelu_tanh, reference.gelu_tanh)), ids=("exact", "tanh")
)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def assert_equals_reference(ours, truth, values: Tensor) -> None:
    """Value and gradient, against the reference's on the same numbers in float64."""
    x, exact = values.detach().requires_grad_(), values.detach().double().requires_grad_()
    y, true_y = ours(x), truth(exact)
    dy = normal(*y.shape, dtype=y.dtype, seed=9)
    y.backward(dy)
    true_y.backward(dy.double())
    assert y.dtype == x.grad.dtype == values.dtype
    for got, want in ((y, true_y), (x.grad, exact.grad)):  # element by element
        torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[values.dtype], atol=2e-6)


@BOTH
@pytest.mark.parametrize("shape", ((), (1,), (2, 3, 7), (3, 2048), (2, 4100)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(ours, truth, shape, dtype):
    assert_equals_reference(ours, truth, normal(*shape, dtype=dtype))


@BOTH
def test_far_left_the_digits_are_right(ours, truth):
    """Where 1 + erf(x / sqrt(2)), or 1 + tanh, has none left in float32."""
    x = torch.linspace(-6, -1, 500, device=DEVICE)
    torch.testing.assert_close(ours(x).double(), truth(x.double()), rtol=1e-5, atol=0)


@BOTH
def test_far_beyond(ours, truth):
    """0 or x, with slopes 0 and 1, without inf - inf on the way; what is no number stays none."""
    x = torch.tensor([-1e18, -1e4, -20.0, 20.0, 1e4, 1e18, torch.nan], device=DEVICE, requires_grad=True)
    y = ours(x)
    y.sum().backward()
    torch.testing.assert_close(y.tolist(), [0.0, 0.0, 0.0, 20.0, 1e4, x[5].item(), torch.nan], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.grad.tolist(), [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, torch.nan], rtol=0, atol=0, equal_nan=True)


@BOTH
@pytest.mark.parametrize("layout", ("gaps between rows", "gaps within rows"))
def test_strides(ours, truth, layout):
    x = normal(2, 3, 40)[..., 3:17] if layout == "gaps between rows" else normal(2, 14, 3).transpose(1, 2)
    assert_equals_reference(ours, truth, x)


def test_gradient_with_strides():
    x = normal(4, 6).requires_grad_()
    gelu(x).sum().backward()  # its gradient is one number, expanded
    exact = x.detach().requires_grad_()
    reference.gelu(exact).sum().backward()
    torch.testing.assert_close(x.grad, exact.grad, rtol=1e-6, atol=1e-6)


def test_only_the_input_is_kept():
    x, kept = normal(4, 6).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
        gelu(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_no_rows():
    x = normal(0, 6).requires_grad_()
    y = gelu(x)
    y.sum().backward()
    assert y.shape == (0, 6) and x.grad.shape == (0, 6)


@pytest.mark.parametrize("x", (torch.zeros(2, 4).long(), torch.zeros(2, 4, device="meta")), ids=str)
def test_bad_input_is_named(x):
    with pytest.raises(ValueError, match="x: expected"):
        gelu(x if x.is_meta else x.to(DEVICE))


@BOTH
def test_compiles_without_a_graph_break(ours, truth):
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"  # inductor takes minutes on a small CPU
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    assert_equals_reference(compiled, truth, normal(4, 200, dtype=torch.bfloat16))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: 4.3 GB of input")
def test_more_than_2_to_the_31_elements():
    n_rows = 2**31 // 8192 + 5
    x = torch.zeros(n_rows, 8192, device=DEVICE, dtype=torch.bfloat16)
    x[-1] = normal(8192, dtype=torch.bfloat16)
    torch.testing.assert_close(gelu(x)[-1], reference.gelu(x[-1]), rtol=2**-7, atol=2e-6)
