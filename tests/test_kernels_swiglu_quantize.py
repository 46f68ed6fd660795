"""kernels/swiglu_quantize.py against reference.py; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernels import reference
from kernels.swiglu_quantize import swiglu_backward_quantize, swiglu_quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# A last bit of float32 may decide a rounding; the interpreter moreover does not carry into the exponent where it rounds up.
DIFFERING = 0.08 if DEVICE == "cpu" else 0.002  # largest share of the values
SHAPES = [(4, 2), (16, 32), (72, 2 * 80), (128, 2 * 48), (8, 2 * 656), (4, 2 * 2049), (4, 2 * 4226)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def no_stats() -> Tensor:
    return torch.zeros(4, dtype=torch.int64, device=DEVICE)


def assert_agree(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
    assert (got.float() != want.float()).float().mean() <= max(DIFFERING, 1.5 / want.numel())


def assert_counts_agree(stats: Tensor, true_stats: Tensor) -> None:
    largest, true_largest = (s[:1].to(torch.int32).view(torch.float32) for s in (stats, true_stats))
    torch.testing.assert_close(largest, true_largest, rtol=1e-5, atol=0)
    assert stats[3] == true_stats[3] and (stats[1:3] - true_stats[1:3]).abs().max() <= 2 + 0.02 * stats[3]


@pytest.mark.parametrize("shape", [(1, 2), (70, 2 * 80), *SHAPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep_rounded", [False, True])
def test_forward(shape: tuple[int, int], dtype: torch.dtype, keep_rounded: bool) -> None:
    x, scale = 3 * normal(*shape, dtype=dtype), torch.tensor(60.0, device=DEVICE)
    stats, true_stats = no_stats(), no_stats()
    (got, kept), (want, true_kept) = (
        swiglu_quantize(x, E4M3, scale, stats, keep_rounded),
        reference.swiglu_quantize(x, E4M3, scale, true_stats, keep_rounded),
    )
    assert_agree(got, want)
    assert_counts_agree(stats, true_stats)
    if keep_rounded:
        assert_agree(kept.values, true_kept.values)
        torch.testing.assert_close(kept.inverse, true_kept.inverse, rtol=1e-6, atol=0)
        torch.testing.assert_close(reference.restore_kept(true_kept), x.float(), rtol=2**-4, atol=2e-2)
    else:
        assert torch.equal(kept.values, x) and kept.inverse is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep_rounded", [False, True])
def test_backward(shape: tuple[int, int], dtype: torch.dtype, keep_rounded: bool) -> None:
    x, dy = 3 * normal(*shape, dtype=dtype), normal(shape[0], shape[1] // 2, dtype=dtype, seed=1)
    scale, stats, true_stats = torch.tensor(1000.0, device=DEVICE), no_stats(), no_stats()
    forward = E4M3, torch.tensor(60.0, device=DEVICE)
    _, kept = reference.swiglu_quantize(x, *forward, no_stats(), keep_rounded)
    got, y = swiglu_backward_quantize(kept, dy, E5M2, scale, stats, forward)
    want, true_y = reference.swiglu_backward_quantize(kept, dy, E5M2, scale, true_stats, forward)
    for mine, truth in ((got.rows, want.rows), (got.columns, want.columns), (y, true_y)):
        assert_agree(mine, truth)
    assert torch.equal(got.rows_inverse, want.rows_inverse) and torch.equal(got.columns_inverse, want.columns_inverse)
    assert torch.equal(got.columns.float(), got.rows.t().float())
    if not keep_rounded:
        assert torch.equal(y.float(), swiglu_quantize(x, *forward, no_stats())[0].t().float())
    assert_counts_agree(stats, true_stats)


def test_the_references_gradient_is_autograds() -> None:
    x, dy = normal(8, 32).double().requires_grad_(), normal(8, 16, seed=1)
    reference.swiglu(x.float()).backward(dy)
    scale = torch.tensor(64.0, device=DEVICE)
    got, _ = reference.swiglu_backward_quantize(reference.Kept(x.detach(), None), dy, E4M3, scale, no_stats(), (E4M3, scale))
    torch.testing.assert_close(got.rows.float() * got.rows_inverse, x.grad.float(), rtol=2**-4, atol=2**-15)


def test_strides() -> None:
    x, scale = normal(64, 32).t(), torch.tensor(16.0, device=DEVICE)
    assert_agree(swiglu_quantize(x, E4M3, scale, no_stats())[0], reference.swiglu_quantize(x, E4M3, scale, no_stats())[0])


def test_what_is_kept_of_zeros() -> None:
    """Rows and blocks without another number have a scale, and do not touch their neighbours."""
    x, scale = 3 * normal(8, 2 * 300, dtype=torch.bfloat16), torch.tensor(60.0, device=DEVICE)
    x[2], x[:, 128:256] = 0, 0
    _, kept = swiglu_quantize(x, E4M3, scale, no_stats(), True)
    back = reference.restore_kept(kept)
    assert (kept.inverse > 0).all()
    assert torch.equal(back[x == 0], x[x == 0].float())
    assert ((back - x).abs() > 2e-2 + 2**-4 * x.abs()).float().mean() <= DIFFERING


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter converts NaN to a number")
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_kept_of_no_number_is_none(value: float) -> None:
    x, scale = 3 * normal(8, 2 * 300, dtype=torch.bfloat16), torch.tensor(60.0, device=DEVICE)
    x[3, 7] = value
    back = reference.restore_kept(swiglu_quantize(x, E4M3, scale, no_stats(), True)[1])
    assert not back[3, 7].isfinite() and back[3, 128:].isfinite().all() and back[4:].isfinite().all()


BYTES = torch.zeros(4, 4, dtype=E4M3)


@pytest.mark.parametrize(
    ("x", "inverse", "dy", "message"),
    [
        (torch.zeros(4, 5), None, None, "gate_up: expected a matrix with an even"),
        (torch.zeros(4, 4).long(), None, None, "gate_up: expected float32"),
        (BYTES, None, None, "gate_up: expected float32"),
        (torch.zeros(4, 4), None, torch.zeros(4, 4), "dy: expected half the columns"),
        (torch.zeros(6, 4), None, torch.zeros(6, 2), "gate_up: expected a multiple of 4 rows"),
        (BYTES, None, torch.zeros(4, 2), "gate_up: expected float32"),
        (torch.zeros(4, 4), torch.ones(4, 2), torch.zeros(4, 2), "gate_up: expected torch.float8_e4m3fn, as it has inverse"),
        (BYTES, torch.ones(4, 1), torch.zeros(4, 2), r"inverse: expected shape \[4, 2\]"),
        (BYTES, torch.ones(4, 2).double(), torch.zeros(4, 2), "inverse: .* got .*float64"),
        (BYTES, torch.ones(2, 4).t(), torch.zeros(4, 2), "inverse: .* contiguous, got"),
    ],
    ids=str,
)
def test_bad_input_is_named(x: Tensor, inverse: Tensor | None, dy: Tensor | None, message: str) -> None:
    x, scale = x.to(DEVICE), torch.tensor(1.0, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        if dy is None:
            swiglu_quantize(x, E4M3, scale, no_stats())
        else:
            kept = reference.Kept(x, inverse if inverse is None else inverse.to(DEVICE))
            swiglu_backward_quantize(kept, dy.to(DEVICE), E5M2, scale, no_stats(), (E4M3, scale))
