"""kernels/rope.py against reference.py: outputs and gradients; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernels import reference
from kernels.rope import rope, rope_qkv_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-11,
}  # of the largest element; interpreted, bfloat16 is cut off, not rounded
HEADS = ((1, 1, 2), (4, 2, 6), (3, 3, 64), (20, 1, 10))  # H, K, D


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def angles(T: int, D: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(float(T)), 0.3 ** torch.arange(D // 2)).to(DEVICE)
    return angle.cos(), angle.sin()


def split_reference(qkv: Tensor, H: int, K: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split((H, K, K), dim=2)
    return *reference.rope(q, k, cos, sin), v


def assert_equal(ours, truth, inputs: list[Tensor]) -> None:
    """Outputs and gradients; the reference gets the same numbers in float64."""
    dtype = inputs[0].dtype
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = ours(*inputs), truth(*exact)
    upstream = [normal(*y.shape, dtype=dtype, seed=9 + i) for i, y in enumerate(got)]
    got_grads = torch.autograd.grad(got, inputs, upstream)
    want_grads = torch.autograd.grad(want, exact, [dy.double() for dy in upstream])
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error <= TOLERANCE[dtype], f"{error:.1e}"


@pytest.mark.parametrize(("H", "K", "D"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(H, K, D, dtype):
    cos, sin = angles(5, D)
    inputs = [normal(2, 5, H, D, dtype=dtype), normal(2, 5, K, D, dtype=dtype, seed=1)]
    assert_equal(lambda q, k: rope(q, k, cos, sin), lambda q, k: reference.rope(q, k, cos, sin), inputs)


@pytest.mark.parametrize(("H", "K", "D"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_qkv(H, K, D, dtype):
    cos, sin = angles(5, D)
    qkv = normal(2, 5, H + 2 * K, D, dtype=dtype)
    assert_equal(
        lambda x: rope_qkv_(x.clone(), H, K, cos, sin),  # in place: not on the leaf
        lambda x: split_reference(x, H, K, cos, sin),
        [qkv],
    )


@pytest.mark.parametrize("layout", ("transposed", "views of one tensor", "gaps within heads"))
def test_rope_strides(layout):
    cos, sin = angles(5, 6)
    if layout == "transposed":
        q, k = normal(2, 4, 5, 6).transpose(1, 2), normal(2, 2, 5, 6, seed=1).transpose(1, 2)
    elif layout == "views of one tensor":
        q, k, _ = normal(2, 5, 8, 6).split((4, 2, 2), dim=2)
    else:
        q, k = normal(2, 5, 4, 12)[..., ::2], normal(2, 5, 2, 12, seed=1)[..., 1::2]
    assert_equal(lambda q, k: rope(q, k, cos, sin), lambda q, k: reference.rope(q, k, cos, sin), [q, k])


def test_rope_qkv_with_attention_layouts():
    """Queries, keys and values leave transposed, and their gradients come back so: each with strides of its own."""
    cos, sin = angles(5, 6)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),)

    assert_equal(
        lambda x: attend(*rope_qkv_(x.clone(), 4, 2, cos, sin)),
        lambda x: attend(*split_reference(x, 4, 2, cos, sin)),
        [normal(2, 5, 8, 6)],
    )


def test_rope_qkv_turns_in_place():
    cos, sin = angles(5, 6)
    qkv = normal(2, 5, 8, 6)
    before, (q, k, v) = qkv.clone(), rope_qkv_(qkv, 4, 2, cos, sin)
    assert q.data_ptr() == qkv.data_ptr()
    torch.testing.assert_close(qkv[:, :, 6:], before[:, :, 6:], rtol=0, atol=0)
    torch.testing.assert_close((q, k, v), split_reference(before, 4, 2, cos, sin), rtol=1e-6, atol=1e-6)


def test_a_part_of_the_gradients():
    """Nothing is asked of the keys: their gradient is zero."""
    cos, sin = angles(5, 6)
    qkv = normal(2, 5, 8, 6).requires_grad_()
    q, _, v = rope_qkv_(qkv * 1, 4, 2, cos, sin)
    (q.square().sum() + v.sum()).backward()
    torch.testing.assert_close(qkv.grad[:, :, :4], 2 * qkv.detach()[:, :, :4], rtol=1e-5, atol=1e-6)  # a rotation keeps lengths
    assert not qkv.grad[:, :, 4:6].any() and (qkv.grad[:, :, 6:] == 1).all()


@pytest.mark.parametrize(
    ("name", "change"),
    (
        ("q", lambda a: a | {"q": a["q"].long()}),
        ("q", lambda a: a | {"q": a["q"][0]}),
        ("q", lambda a: a | {"q": a["q"][..., :5], "k": a["k"][..., :5]}),
        ("k", lambda a: a | {"k": a["k"].bfloat16()}),
        ("k", lambda a: a | {"k": a["k"][:1]}),
        ("cos", lambda a: a | {"cos": a["cos"][1:]}),
        ("sin", lambda a: a | {"sin": a["sin"].double()}),
        ("q", lambda a: a | {"q": a["q"].to("meta")}),
    ),
)
def test_bad_input_is_named(name, change):
    cos, sin = angles(5, 6)
    arguments = change({"q": normal(2, 5, 4, 6), "k": normal(2, 5, 2, 6), "cos": cos, "sin": sin})
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        rope(**arguments)


@pytest.mark.parametrize("flaw", ("a head missing", "gaps within heads"))
def test_bad_qkv_is_named(flaw):
    qkv = normal(2, 5, 7, 6) if flaw == "a head missing" else normal(2, 5, 8, 12)[..., ::2]
    with pytest.raises(ValueError, match=r"^qkv"):
        rope_qkv_(qkv, 4, 2, *angles(5, 6))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: compiles for minutes on a small CPU")
def test_compiles_without_a_graph_break():
    cos, sin = angles(8, 64)
    weight = normal(8 * 64, 32, seed=3) / 6

    def project(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight).view(2, 8, 8, 64)

    compiled = torch.compile(lambda x: rope_qkv_(project(x), 4, 2, cos, sin), fullgraph=True)
    x = normal(2, 8, 32).requires_grad_()
    got, want = compiled(x), split_reference(project(x), 4, 2, cos, sin)
    upstream = [normal(*y.shape, seed=9) for y in want]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream) for y in (got, want)), rtol=1e-3, atol=1e-3)
