"""kernels/rms_norm.py and layer_norm.py against their formulas in float64: on the GPU, or in Triton's interpreter without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernels import reference, row_norm
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # of the largest element, or of 1: a unit in its last place
SHAPES = ((1, 1), (3, 17), (70, 5), (2, 3, 768), (5, 2304), (2, 5000))


def exact_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return weight * centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() + (0 if bias is None else bias)


# name: (kernel, formula, takes a residual, number of weights); layer_norm's bias is left out where there is one weight
FUNCTIONS: dict[str, tuple[Callable, Callable, bool, int]] = {
    "rms_norm": (rms_norm, exact_rms_norm, False, 1),
    "layer_norm": (layer_norm, exact_layer_norm, False, 2),
    "layer_norm_nobias": (layer_norm, exact_layer_norm, False, 1),
    "add_rms_norm": (add_rms_norm, lambda x, r, *rest: (x + r, exact_rms_norm(x + r, *rest)), True, 1),
    "add_layer_norm": (add_layer_norm, lambda x, r, *rest: (x + r, exact_layer_norm(x + r, *rest)), True, 2),
    "add_layer_norm_nobias": (add_layer_norm, lambda x, r, *rest: (x + r, exact_layer_norm(x + r, *rest)), True, 1),
}


@pytest.fixture(scope="module")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def normal(device: str) -> Callable[..., Tensor]:
    """normal(*shape) draws the next tensor of a fixed sequence."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(device, dtype)


def results(function: Callable, inputs: list[Tensor], cotangents: list[Tensor], nobias: bool) -> list[Tensor]:
    """The outputs and the gradient of every input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs, *([None] if nobias else []), EPS)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, inputs, cotangents[: len(outputs)])]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        if a.numel() == 0:
            continue
        error = (a.double() - b.double()).abs().max() / b.abs().max().clamp_min(1)
        assert error <= tolerance, f"result {i}: {error:.1e}"


def assert_exact(name: str, inputs: list[Tensor], cotangents: list[Tensor]) -> None:
    ours, truth, _, _ = FUNCTIONS[name]
    nobias = name.endswith("nobias")
    got = results(ours, inputs, cotangents, nobias)
    want = results(truth, [x.double() for x in inputs], [x.double() for x in cotangents], nobias)
    n_outputs = len(got) - len(inputs)
    assert [x.dtype for x in got] == [inputs[0].dtype] * n_outputs + [x.dtype for x in inputs]
    dtype = inputs[0].dtype
    # The norm is that of the rounded sum, which a float64 sum is not: two roundings.
    assert_close(got, want, TOLERANCE[dtype] * (2 if "add" in name else 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name, shape, normal):
    _, _, residual, n_weights = FUNCTIONS[name]
    inputs = [normal(*shape) for _ in range(1 + residual)] + [normal(shape[-1]) for _ in range(n_weights)]
    assert_exact(name, inputs, [normal(*shape), normal(*shape)])


@pytest.mark.parametrize("weight_dtype", ("float32", "same"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_low_precision(name, dtype, weight_dtype, normal):
    _, _, residual, n_weights = FUNCTIONS[name]
    inputs = [normal(9, 100, dtype=dtype) for _ in range(1 + residual)]
    inputs += [normal(100, dtype=dtype if weight_dtype == "same" else torch.float32) for _ in range(n_weights)]
    assert_exact(name, inputs, [normal(9, 100, dtype=dtype), normal(9, 100, dtype=dtype)])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("rms_norm", "layer_norm"))
def test_the_fused_norm_is_that_of_the_rounded_sum(name, dtype, normal):
    """Before rounding its own result, that is: a few elements may lie across the border of two neighbours."""
    x, residual, weights = normal(6, 96, dtype=dtype), normal(6, 96, dtype=dtype), [normal(96)]
    weights += [normal(96)] if name == "layer_norm" else []
    total, normed = FUNCTIONS[f"add_{name}"][0](x, residual, *weights, EPS)
    apart = FUNCTIONS[name][0](total, *weights, EPS)
    assert (normed == apart).double().mean() > 0.99  # that of an unrounded sum agrees in 0.79 of them


@pytest.mark.parametrize("used", (0, 1), ids=("sum", "norm"))
def test_one_result_of_the_fused_pair_is_used(used, normal):
    x, residual, weight = normal(3, 17).requires_grad_(), normal(3, 17).requires_grad_(), normal(17).requires_grad_()
    cotangent = normal(3, 17)
    got = torch.autograd.grad(add_rms_norm(x, residual, weight, EPS)[used], (x, residual, weight), cotangent, allow_unused=True)
    want = torch.autograd.grad(
        reference.add_rms_norm(x, residual, weight, EPS)[used], (x, residual, weight), cotangent, allow_unused=True
    )
    assert [a is None for a in got] == [b is None for b in want]
    assert_close([a for a in got if a is not None], [b for b in want if b is not None], TOLERANCE[torch.float32])


def strided(x: Tensor, how: str) -> Tensor:
    """The same values in other memory."""
    rows = x.flatten(0, -2)
    if how == "row stride":
        return torch.cat((rows, rows + 1), dim=1)[:, : rows.shape[1]].view(x.shape)
    if how == "transposed":
        return x.mT.contiguous().mT
    return torch.stack((x, x + 1), dim=1)[:, 0]  # outer rows further apart than inner ones: no single stride


@pytest.mark.parametrize("how", ("row stride", "transposed", "two strides"))
@pytest.mark.parametrize("name", ("layer_norm", "add_rms_norm"))
def test_any_strides(name, how, normal):
    _, _, residual, n_weights = FUNCTIONS[name]
    inputs = [strided(normal(3, 4, 33), how) for _ in range(1 + residual)]
    cotangents = [strided(normal(3, 4, 33), how), strided(normal(3, 4, 33), how)]
    assert not inputs[0].is_contiguous()
    assert_exact(name, inputs + [normal(33) for _ in range(n_weights)], cotangents)


def test_a_strided_weight(normal):
    x, weight = normal(4, 8), normal(8, 2)[:, 0]
    assert torch.equal(layer_norm(x, weight, weight, EPS), layer_norm(x, weight.clone(), weight.clone(), EPS))


def test_an_expanded_gradient(normal):
    x, weight = normal(4, 8).requires_grad_(), normal(8).requires_grad_()
    got = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), (x, weight))
    want = torch.autograd.grad(reference.rms_norm(x, weight, EPS).sum(), (x, weight))
    assert_close(list(got), list(want), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_rows(name, normal):
    """Empty results, and weight gradients of zero."""
    _, _, residual, n_weights = FUNCTIONS[name]
    inputs = [normal(2, 0, 8) for _ in range(1 + residual)] + [normal(8) for _ in range(n_weights)]
    assert_exact(name, inputs, [normal(2, 0, 8), normal(2, 0, 8)])


def test_statistics_do_not_overflow_in_float16(device):
    x = torch.full((2, 64), 3e4, dtype=torch.float16, device=device)  # its square is far beyond float16's 65,504
    weight = torch.ones(64, device=device)
    torch.testing.assert_close(rms_norm(x, weight, EPS), torch.ones_like(x))
    torch.testing.assert_close(layer_norm(x, weight, None, EPS), torch.zeros_like(x))


def test_variance_does_not_cancel(normal):
    """mean(x^2) - mean(x)^2 in float32 would be off by about 10."""
    x, weight = normal(4, 256) + 1e4, torch.ones_like(normal(256))
    want = exact_layer_norm(x.double(), weight.double(), None, EPS)
    assert_close([layer_norm(x, weight, None, EPS)], [want], 1e-3)


@pytest.mark.parametrize("width", (100, 384, 768, 2304))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("rms_norm", "layer_norm_nobias"))
def test_rows_that_are_hard_to_add_up(name, dtype, width, normal):
    x, weight = normal(8, width), normal(width)
    x[0, 0], x[1, -1] = 100, 100
    x[2], x[3] = 3, 0
    x[4] += 1e3
    x[5] *= 1e-4
    assert_exact(name, [x.to(dtype), weight], [normal(8, width, dtype=dtype)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_two_runs_agree_bit_for_bit(name, normal):
    _, _, residual, n_weights = FUNCTIONS[name]
    inputs = [normal(333, 40) for _ in range(1 + residual)] + [normal(40) for _ in range(n_weights)]
    cotangents = [normal(333, 40), normal(333, 40)]
    runs = [results(FUNCTIONS[name][0], inputs, cotangents, name.endswith("nobias")) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter takes minutes for it")
@pytest.mark.parametrize("shape", ((4096, 2304), (1000, 768), (300, 16384), (300, row_norm.MAX_WIDTH)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("rms_norm", "add_layer_norm"))
def test_large(name, dtype, shape, normal):
    _, _, residual, n_weights = FUNCTIONS[name]
    inputs = [normal(*shape, dtype=dtype) for _ in range(1 + residual)] + [normal(shape[-1]) for _ in range(n_weights)]
    assert_exact(name, inputs, [normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes 9 GB")
def test_more_than_2_to_the_31_elements(device):
    n_rows = 2**31 // 4096 + 8
    x = torch.randn(n_rows, 4096, dtype=torch.bfloat16, device=device)
    weight = torch.ones(4096, device=device)
    y = rms_norm(x, weight, EPS)
    assert torch.equal(y[-8:], rms_norm(x[-8:].clone(), weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_compile_in_one_graph(dtype, normal):
    def block(x: Tensor, branch: Tensor, weight: Tensor) -> Tensor:
        total, normed = add_rms_norm(x, branch, weight, EPS)
        return total + layer_norm(normed * 2, weight, weight, EPS)

    inputs = [normal(4, 6, 24, dtype=dtype), normal(4, 6, 24, dtype=dtype), normal(24)]
    cotangent = [normal(4, 6, 24, dtype=dtype)]
    compiled = torch.compile(block, fullgraph=True, backend="inductor" if inputs[0].is_cuda else "aot_eager")
    drop_eps = lambda function: lambda *arguments: function(*arguments[:-1])  # noqa: E731
    assert_close(
        results(drop_eps(compiled), inputs, cotangent, False),
        results(drop_eps(block), inputs, cotangent, False),
        2 * TOLERANCE[dtype],
    )


def test_autocast_changes_nothing(normal, device):
    x, weight = normal(3, 16), normal(16)
    with torch.autocast(device, torch.bfloat16):
        y = layer_norm(x, weight, weight, EPS)
    assert y.dtype == torch.float32
    assert torch.equal(y, layer_norm(x, weight, weight, EPS))


@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"x": torch.ones(3, 8, dtype=torch.float64)}, "^x: expected float32, .* got torch.float64"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "^x: expected float32, .* got torch.int64"),
        ({"x": torch.ones(())}, r"^x has shape \(\)"),
        ({"x": torch.ones(3, 0)}, r"^x has shape \(3, 0\)"),
        ({"x": torch.ones(1, row_norm.MAX_WIDTH + 1)}, r"^x has shape \(1, 65537\)"),
        ({"residual": torch.ones(3, 7)}, r"^residual is \(3, 7\)"),
        ({"residual": torch.ones(3, 8, dtype=torch.bfloat16)}, r"^residual is \(3, 8\) torch.bfloat16"),
        ({"residual": torch.ones(3, 8, device="meta")}, "^residual: expected a tensor on .* on meta"),
        ({"weight": torch.ones(7)}, r"^weight has shape \(7,\)"),
        ({"weight": torch.ones(1, 8)}, r"^weight has shape \(1, 8\)"),
        ({"weight": torch.ones(8, dtype=torch.float16)}, "^weight is torch.float16"),
        ({"weight": torch.ones(8, device="meta")}, "^weight: expected a tensor on .* on meta"),
        ({"bias": torch.ones(9)}, r"^bias has shape \(9,\)"),
        ({"bias": torch.ones(8, dtype=torch.bfloat16)}, "^bias is torch.bfloat16"),
        ({"bias": torch.ones(8, device="meta")}, "^bias: expected a tensor on .* on meta"),
    ),
)
def test_bad_input_is_named(changed, message, device):
    good = {"x": torch.ones(3, 8), "residual": torch.ones(3, 8), "weight": torch.ones(8), "bias": torch.ones(8)}
    if "x" in changed:
        good["residual"] = changed["x"]
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**{name: t if t.is_meta else t.to(device) for name, t in (good | changed).items()}, eps=EPS)


@pytest.mark.parametrize("element_bytes", (2, 4))
@pytest.mark.parametrize("width", (1, 2, 3, 17, 384, 768, 1024, 1025, 2304, 4096, 5000, row_norm.MAX_WIDTH))
def test_the_forward_plan_covers_every_column_once(width, element_bytes):
    plan = row_norm.forward_plan(1001, width, element_bytes, True)
    assert [*range(plan.first), *range(plan.first, min(plan.first + plan.second, width))] == list(range(width))
    assert plan.rows * (plan.programs - 1) < 1001 <= plan.rows * plan.programs
    if width <= row_norm.NARROW:  # the rows fill the four warps' lanes with 16 bytes each
        assert plan.rows * plan.chunk * element_bytes == 4 * 32 * 16


@pytest.mark.parametrize(
    ("width", "expected"), ((1, (1, 1)), (2, (1, 1)), (3, (2, 1)), (768, (512, 256)), (2304, (2048, 256)), (4096, (2048, 2048)))
)
def test_blocks(width, expected):
    assert row_norm.blocks(width) == expected
