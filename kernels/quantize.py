"""Rounding to FP8 in Triton, with the transpose: x is read once, the rounded matrix written twice, along rows and columns.

    rows[m, k] = fp8(clamp(scale x[m, k])),  columns[k, m] = rows[m, k]

Hopper multiplies FP8 only where both operands have the summed axis last: the forward product and the input's gradient want
rows, the weight's gradient wants columns. A program has one square tile, which is transposed through shared memory, so that
both are written in whole sectors. Where each FP8_BLOCK elements have a scale of their own, it depends on nothing but the tile.
Statistics are added up in memory, by the few programs that have something to add.

Legend: M rows, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import check_devices, check_dtypes
from kernels.reference import FP8_BLOCK, Quantized

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
TILE, TILE_WARPS = 64, 4  # with one scale; with many a tile has FP8_BLOCK rows and columns
BLOCK_WARPS = 16


@triton.jit
def round_to(z, LARGEST: tl.constexpr, DTYPE: tl.constexpr):
    clamped = tl.minimum(tl.maximum(z, -LARGEST), LARGEST)
    return (clamped + (z - z)).to(DTYPE)  # what is not finite becomes NaN: inf - inf


@triton.jit
def _inverse(amax, LARGEST: tl.constexpr):
    return tl.where(amax > 0, tl.div_rn(amax, LARGEST), 1.0)


@triton.jit
def _add(total, count):
    tl.atomic_add(total, tl.cast(count, tl.int64), count > 0)


@triton.jit
def _count(stats, values, y, n_saturated, n_values):
    """`n_values`: all of the matrix, from one program, and 0 from the others."""
    amax = tl.max(tl.abs(values)).to(tl.int32, bitcast=True).to(tl.int64)
    tl.atomic_max(stats, amax, amax > tl.load(stats))  # what is read may be old, and so too small, but never too large
    _add(stats + 1, n_saturated)
    _add(stats + 2, tl.sum(((y.to(tl.float32) == 0) & (values != 0)).to(tl.int32)))
    _add(stats + 3, n_values)


@triton.jit
def store_columns(columns, y, m, k, inside, M):
    tl.store(columns + tl.trans(k) * M + tl.trans(m), tl.trans(y), tl.trans(inside))


@triton.jit
def write_scaled(values, scale, rows, columns, stats, m, k, inside, M, K, n_values, LARGEST: tl.constexpr):
    """Rounds a tile of float32 values, at rows m (R, 1) and columns k (1, C), int64, of (M, K), with one scale.

    `values` is 0 outside of the matrix; `columns` may be None.
    """
    z = values * tl.load(scale)
    y = round_to(z, LARGEST, rows.dtype.element_ty)
    tl.store(rows + m * K + k, y, inside)
    if columns is not None:
        store_columns(columns, y, m, k, inside, M)
    _count(stats, values, y, tl.sum((tl.abs(z) > LARGEST).to(tl.int32)), n_values)


@triton.jit
def _kernel(
    x,
    scale,  # None where blocks have their own
    rows,
    rows_inverse,
    columns,
    columns_inverse,
    stats,
    M,
    K,
    x_stride,
    LARGEST: tl.constexpr,
    SIZE: tl.constexpr,
):
    m = tl.program_id(0) * SIZE + tl.arange(0, SIZE)[:, None]  # (SIZE, 1)
    k = tl.program_id(1) * SIZE + tl.arange(0, SIZE)[None, :]  # (1, SIZE)
    inside = (m < M) & (k < K)
    m, k = m.to(tl.int64), k.to(tl.int64)  # a large tensor has more than 2^31 elements
    values = tl.load(x + m * x_stride + k, inside, 0.0).to(tl.float32)  # (SIZE, SIZE)
    is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    n_values = tl.where(is_first, tl.full((), 1, tl.int64) * M * K, 0)
    if scale is not None:
        write_scaled(values, scale, rows, columns, stats, m, k, inside, M, K, n_values, LARGEST)
    else:
        inverse_m = _inverse(tl.max(tl.abs(values), 1, keep_dims=True), LARGEST)  # (SIZE, 1)
        inverse_k = _inverse(tl.max(tl.abs(values), 0, keep_dims=True), LARGEST)  # (1, SIZE)
        y = round_to(tl.div_rn(values, inverse_m), LARGEST, rows.dtype.element_ty)
        y_columns = round_to(tl.div_rn(values, inverse_k), LARGEST, rows.dtype.element_ty)
        tl.store(rows_inverse + tl.program_id(1).to(tl.int64) * M + m, inverse_m, m < M)
        tl.store(columns_inverse + tl.program_id(0).to(tl.int64) * K + k, inverse_k, k < K)
        tl.store(rows + m * K + k, y, inside)
        store_columns(columns, y_columns, m, k, inside, M)
        _count(stats, values, y, tl.zeros((), tl.int32), n_values)


@torch.library.custom_op("nanotrain::quantize", mutates_args=("stats",))
def quantize_op(x: Tensor, dtype: torch.dtype, scale: Tensor | None, stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize`'s four tensors; the inverse scales are empty where there is one scale."""
    outputs = quantize_outputs(x, dtype, scale, stats)
    _launch(x, scale, outputs, stats)
    return outputs


def _launch(x: Tensor, scale: Tensor | None, outputs: tuple[Tensor, Tensor, Tensor, Tensor], stats: Tensor) -> None:
    if x.stride(1) != 1:
        x = x.contiguous()
    size, warps = (FP8_BLOCK, BLOCK_WARPS) if scale is None else (TILE, TILE_WARPS)
    grid = triton.cdiv(x.shape[0], size), triton.cdiv(x.shape[1], size)
    largest = torch.finfo(outputs[0].dtype).max
    with torch.cuda.device_of(x):
        _kernel[grid](x, scale, *outputs, stats, *x.shape, x.stride(0), largest, size, num_warps=warps)


@quantize_op.register_fake
def quantize_outputs(x: Tensor, dtype: torch.dtype, scale: Tensor | None, stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, K = x.shape
    m_blocks, k_blocks = (M // FP8_BLOCK, K // FP8_BLOCK) if scale is None else (0, 0)
    rows_inverse = x.new_empty(k_blocks, M, dtype=torch.float32)
    columns_inverse = x.new_empty(m_blocks, K, dtype=torch.float32)
    return x.new_empty(M, K, dtype=dtype), rows_inverse, x.new_empty(K, M, dtype=dtype), columns_inverse


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None, stats: Tensor, out: Quantized | None = None) -> Quantized:
    """What reference.quantize is. x is float32, bfloat16 or float16; a wrong shape, dtype or device is named in a ValueError."""
    check_devices(x=x, scale=scale)
    check_dtypes(x=x)
    if x.ndim != 2:
        raise ValueError(f"x: expected a matrix, got shape {list(x.shape)}")
    if dtype not in FP8_DTYPES:
        raise ValueError(f"dtype: expected float8_e4m3fn or float8_e5m2, got {dtype}")
    if scale is None and (x.shape[0] % FP8_BLOCK or x.shape[1] % FP8_BLOCK):
        raise ValueError(f"x: blocks have {FP8_BLOCK} elements, which do not divide both of {list(x.shape)}")
    if out is not None:
        if scale is not None:
            out.rows_inverse.copy_(scale.reciprocal())
        _launch(x, scale, (out.rows, out.rows_inverse.t(), out.columns, out.columns_inverse.t()), stats)
        return out
    rows, rows_inverse, columns, columns_inverse = quantize_op(x, dtype, scale, stats)
    if scale is not None:
        inverse = scale.reciprocal()
        return Quantized(rows, inverse, columns, inverse)
    return Quantized(rows, rows_inverse.t(), columns, columns_inverse.t())
