"""kernels/quantize.py against reference.py, bit by bit; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernels import reference, triton_kernels
from kernels.quantize import quantize, transpose_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The interpreter has no subnormals and no NaN in FP8, and does not carry into the exponent where it rounds up.
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter does not round to FP8 as the hardware does: needs a GPU")


def numbers(*shape: int, fp8: torch.dtype = E4M3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of both signs and some 0, each up to 3 % above a normal number of the FP8 dtype: that is what it is rounded to."""
    draw = torch.Generator().manual_seed(1)
    exact = (torch.randn(shape, generator=draw) * 20).to(fp8).float()
    exact = torch.where(exact.abs() < 0.1, 0.0, exact)
    return (exact * (1 + 0.03 * torch.rand(shape, generator=draw))).to(DEVICE, dtype)


def no_stats() -> Tensor:
    """Two."""
    return torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)


def assert_equals_reference(x: Tensor, dtype: torch.dtype, scale: float | None) -> None:
    factor = None if scale is None else torch.tensor(scale, device=DEVICE)
    stats, true_stats = (torch.tensor([7, 1, 2, 3], device=DEVICE) for _ in range(2))
    got, want = quantize(x, dtype, factor, stats), reference.quantize(x, dtype, factor, true_stats)
    for name, mine, truth in zip(want._fields, got, want, strict=True):
        assert mine.shape == truth.shape and mine.dtype == truth.dtype and mine.stride() == truth.stride(), name
        torch.testing.assert_close(mine.float(), truth.float(), rtol=0, atol=0, equal_nan=True, msg=name)
    assert stats.tolist() == true_stats.tolist()
    other = torch.ones_like(x) if scale is None else torch.zeros_like(x)
    again = quantize(x, dtype, factor, stats, quantize(other, dtype, factor, stats))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(again, got, strict=True))


@pytest.mark.parametrize("shape", [(4, 3), (16, 48), (132, 144), (256, 16)], ids=str)
@pytest.mark.parametrize(("fp8", "scale"), [(E4M3, 16.0), (E5M2, 2.0**11)], ids=str)
def test_one_scale(shape: tuple[int, int], fp8: torch.dtype, scale: float) -> None:
    """The scale makes some numbers too large."""
    assert_equals_reference(numbers(*shape, fp8=fp8), fp8, scale)


@needs_gpu
def test_rounded_to_another_dtype_first() -> None:
    x, scale, (stats, true_stats) = torch.randn(132, 144, device=DEVICE), torch.tensor(16.0, device=DEVICE), no_stats()
    got = quantize(x, E4M3, scale, stats, through=torch.bfloat16)
    want = quantize(x.bfloat16(), E4M3, scale, true_stats)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, want, strict=True)) and torch.equal(stats, true_stats)
    again = quantize(x, E4M3, scale, stats, got._replace(rows=torch.empty_like(got.rows)), through=torch.bfloat16)
    assert torch.equal(again.rows.float(), want.rows.float())


def test_rows_alone() -> None:
    x, scale, (stats, true_stats) = numbers(132, 144), torch.tensor(16.0, device=DEVICE), no_stats()
    want, rows = reference.quantize(x, E4M3, scale, true_stats), quantize(x, E4M3, scale, stats, with_columns=False)
    again = quantize(x, E4M3, scale, stats.clone(), rows._replace(rows=torch.empty_like(rows.rows)), with_columns=False)
    assert torch.equal(rows.rows.float(), want.rows.float()) and torch.equal(again.rows.float(), want.rows.float())
    assert rows.columns.shape == (0, 132) == reference.quantize(x, E4M3, scale, true_stats, with_columns=False).columns.shape
    assert torch.equal(2 * stats[1:], true_stats[1:])
    with pytest.raises(ValueError, match="with_columns: columns whose blocks"):
        quantize(numbers(128, 128), E4M3, None, stats, with_columns=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inputs(dtype: torch.dtype) -> None:
    assert_equals_reference(numbers(32, 64, dtype=dtype), E4M3, 8.0)


@pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
def test_scales_of_blocks(fp8: torch.dtype) -> None:
    """In each block of 128 x 128 the largest is the same in all rows and columns; it differs from block to block."""
    largest = torch.eye(128, device=DEVICE).repeat(2, 3) * torch.finfo(fp8).max
    block = 2.0 ** torch.tensor([[-3.0, 0.0, 5.0], [7.0, -12.0, 1.0]], device=DEVICE)
    x = torch.where(largest > 0, largest, numbers(256, 384, fp8=fp8)) * block.repeat_interleave(128, 0).repeat_interleave(128, 1)
    x[:128, :128] = 0
    assert_equals_reference(x, fp8, None)


def test_strides() -> None:
    assert_equals_reference(numbers(64, 32).t(), E4M3, 8.0)
    assert_equals_reference(numbers(32, 96)[:, 16:80], E4M3, 8.0)


@needs_gpu
@pytest.mark.parametrize("scale", [1.0, None])
def test_subnormals_and_nonsense(scale: float | None) -> None:
    x = torch.randn(128, 128, device=DEVICE) * torch.logspace(-6, 3, 128, device=DEVICE)
    x[0, 0], x[1, 1], x[2, 2] = torch.inf, -torch.inf, torch.nan
    stats = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    factor = None if scale is None else torch.tensor(scale, device=DEVICE)
    got, want = quantize(x, E4M3, factor, stats), reference.quantize(x, E4M3, factor, stats.clone())
    torch.testing.assert_close(got.rows.float(), want.rows.float(), rtol=0, atol=0, equal_nan=True)


@needs_gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs FP8 products")
@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
@pytest.mark.parametrize(("M", "N", "K"), [(128, 256, 384), (16384, 2304, 6144)], ids=str)
def test_products_of_the_hardware_are_the_emulated_ones(recipe: str, M: int, N: int, K: int) -> None:
    """All three products' layouts, and both output dtypes."""
    from fp8 import Arithmetic

    hardware = Arithmetic(recipe, 0, torch.bfloat16, False, False, triton_kernels())
    emulated = Arithmetic(recipe, 0, torch.bfloat16, True, False, triton_kernels())
    scale, stats = torch.tensor(30.0, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    x, w = (hardware.round(torch.randn(*shape, device=DEVICE), E4M3, scale, stats) for shape in ((M, K), (N, K)))
    dy = hardware.round(torch.randn(M, N, device=DEVICE), E5M2, scale, stats)
    for a, b, dtype, fast in (
        (x[:2], w[:2], torch.bfloat16, True),
        (dy[:2], w[2:], torch.bfloat16, False),
        (dy[2:], x[2:], torch.float32, False),
    ):
        got, want = hardware.multiply(a, b, dtype, fast), emulated.multiply(a, b, dtype)
        assert got.dtype == dtype and (got.float() - want.float()).norm() <= 5e-3 * want.float().norm()


@pytest.mark.parametrize(
    ("x", "dtype", "scale", "message"),
    [
        (torch.zeros(4), E4M3, 1.0, "x: expected a matrix"),
        (torch.zeros(6, 4), E4M3, 1.0, "x: expected a multiple of 4 rows"),
        (torch.zeros(4, 4).long(), E4M3, 1.0, "x: expected float32"),
        (torch.zeros(4, 4, device="meta"), E4M3, 1.0, "x: expected a tensor on"),
        (torch.zeros(4, 4), torch.int8, 1.0, "dtype: expected float8"),
        (torch.zeros(128, 64), E4M3, None, "x: blocks have 128 elements"),
    ],
    ids=str,
)
def test_bad_input_is_named(x: Tensor, dtype: torch.dtype, scale: float | None, message: str) -> None:
    x = x if x.is_meta else x.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        quantize(x, dtype, None if scale is None else torch.tensor(scale, device=DEVICE), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(4, 1), (132, 3), (128, 256), (260, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_transpose_is_of_bytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    columns = transpose_bytes(rows.view(dtype))
    assert columns.dtype == dtype and torch.equal(columns.view(torch.uint8), rows.t())
    assert torch.equal(columns.view(torch.uint8), reference.transpose_bytes(rows.view(dtype)).view(torch.uint8))


@pytest.mark.parametrize(
    "rows", [torch.zeros(4, 4), torch.zeros(6, 4).to(torch.float8_e5m2), torch.zeros(8).to(torch.float8_e5m2)]
)
def test_what_is_no_rounded_matrix_has_no_transpose(rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^rows"):
        transpose_bytes(rows.to(DEVICE))
