"""Rounding to FP8 in Triton, with the transpose: x is read once, the rounded matrix written twice, along rows and columns.

    rows[m, k] = fp8(clamp(scale x[m, k])),  columns[k, m] = rows[m, k]

Hopper multiplies FP8 only where both operands have the summed axis last: the forward product and the input's gradient want
rows, the weight's gradient wants columns. A program has one tile, which is transposed through shared memory, so that
both are written in whole sectors. Where each FP8_BLOCK elements have a scale of their own, it depends on nothing but the tile.
Statistics are added up in memory, by the few programs that have something to add.

The assembler that comes with Triton 3.6 to 3.8, of CUDA 12, gives wrong bytes where numbers that were rounded once are both
stored and transposed (triton issue 11111). Here they are rounded twice, by a scale that is loaded twice: else the compiler would
see that it is the same.

Legend: M rows, K columns.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import check_devices, check_dtypes
from kernels.reference import FP8_BLOCK, Quantized

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class Tile(NamedTuple):
    """What a program has of a matrix."""

    rows: int
    columns: int
    warps: int

    def grid(self, M: int, K: int) -> tuple[int, int]:
        return triton.cdiv(M, self.rows), triton.cdiv(K, self.columns)


TILE = Tile(64, 64, 4)
BLOCK_TILE = Tile(FP8_BLOCK, FP8_BLOCK, 16)


@triton.jit
def scale_and_round(values, scale, LARGEST: tl.constexpr, DTYPE: tl.constexpr):
    """What is too large becomes the largest number, and what is not finite NaN: inf - inf."""
    z = values * scale + (values - values)
    if INTERPRETED:  # the hardware's rounding stops there by itself
        z = tl.minimum(tl.maximum(z, -LARGEST, tl.PropagateNan.ALL), LARGEST, tl.PropagateNan.ALL)
    return z.to(DTYPE)


@triton.jit
def _inverse(amax, LARGEST: tl.constexpr):
    return tl.where(amax > 0, tl.div_rn(amax, LARGEST), 1.0)


@triton.jit
def _add(total, count):
    tl.atomic_add(total, tl.cast(count, tl.int64), count > 0)


@triton.jit
def _count(stats, values, z, n_values, E4M3: tl.constexpr):
    """`z`: scaled values; `n_values`: all of the matrix, from one program, and 0 from the others. The largest |value|."""
    BECOMES_ZERO: tl.constexpr = 2.0**-10 if E4M3 else 2.0**-17  # half of the smallest number, and less
    amax = tl.max(tl.abs(values))
    amax_bits = amax.to(tl.int32, bitcast=True).to(tl.int64)
    tl.atomic_max(stats, amax_bits, amax_bits > tl.load(stats))  # what is read may be old, and so too small, but never too large
    _add(stats + 2, tl.sum(((tl.abs(z) <= BECOMES_ZERO) & (values != 0)).to(tl.int32)))
    _add(stats + 3, n_values)
    return amax


@triton.jit
def store_columns(columns, y, m, k, inside, M):
    """`y`: rounded apart from what is stored as rows."""
    tl.store(columns + tl.trans(k) * M + tl.trans(m), tl.trans(y), tl.trans(inside))


@triton.jit
def write_scaled(values, scale, rows, columns, stats, m, k, inside, M, K, n_values, LARGEST: tl.constexpr):
    """Rounds a tile of float32 values, at rows m (R, 1) and columns k (1, C), int64, of (M, K), with one scale.

    `values` is 0 outside of the matrix; `columns` may be None.
    """
    DTYPE: tl.constexpr = rows.dtype.element_ty
    factor = tl.load(scale)
    tl.store(rows + m * K + k, scale_and_round(values, factor, LARGEST, DTYPE), inside)
    if columns is not None:
        store_columns(columns, scale_and_round(values, tl.load(scale, volatile=True), LARGEST, DTYPE), m, k, inside, M)
    z = values * factor
    amax = _count(stats, values, z, n_values, tl.float8e4nv == DTYPE)
    if amax * factor > LARGEST:  # seldom
        _add(stats + 1, tl.sum((tl.abs(z) > LARGEST).to(tl.int32)))


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
    R: tl.constexpr,
    C: tl.constexpr,
):
    m = tl.program_id(0) * R + tl.arange(0, R)[:, None]  # (R, 1)
    k = tl.program_id(1) * C + tl.arange(0, C)[None, :]  # (1, C)
    inside = (m < M) & (k < K)
    m, k = m.to(tl.int64), k.to(tl.int64)  # a large tensor has more than 2^31 elements
    values = tl.load(x + m * x_stride + k, inside, 0.0).to(tl.float32)  # (R, C)
    is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    n_values = tl.where(is_first, tl.full((), 1, tl.int64) * M * K, 0)
    if scale is not None:
        write_scaled(values, scale, rows, columns, stats, m, k, inside, M, K, n_values, LARGEST)
    else:
        inverse_m = _inverse(tl.max(tl.abs(values), 1, keep_dims=True), LARGEST)  # (R, 1)
        inverse_k = _inverse(tl.max(tl.abs(values), 0, keep_dims=True), LARGEST)  # (1, C)
        z, z_columns = tl.div_rn(values, inverse_m), tl.div_rn(values, inverse_k)
        tl.store(rows_inverse + tl.program_id(1).to(tl.int64) * M + m, inverse_m, m < M)
        tl.store(columns_inverse + tl.program_id(0).to(tl.int64) * K + k, inverse_k, k < K)
        tl.store(rows + m * K + k, scale_and_round(z, 1.0, LARGEST, rows.dtype.element_ty), inside)
        store_columns(columns, scale_and_round(z_columns, 1.0, LARGEST, rows.dtype.element_ty), m, k, inside, M)
        _count(stats, values, z, n_values, tl.float8e4nv == rows.dtype.element_ty)


@torch.library.custom_op("nanotrain::quantize", mutates_args=("stats",))
def quantize_op(x: Tensor, dtype: torch.dtype, scale: Tensor | None, stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize`'s four tensors; the inverse scales are empty where there is one scale."""
    outputs = quantize_outputs(x, dtype, scale, stats)
    _launch(x, scale, outputs, stats)
    return outputs


def _launch(x: Tensor, scale: Tensor | None, outputs: tuple[Tensor, Tensor, Tensor, Tensor], stats: Tensor) -> None:
    if x.stride(1) != 1:
        x = x.contiguous()
    tile = BLOCK_TILE if scale is None else TILE
    largest = torch.finfo(outputs[0].dtype).max
    with torch.cuda.device_of(x):
        _kernel[tile.grid(*x.shape)](
            x, scale, *outputs, stats, *x.shape, x.stride(0), largest, tile.rows, tile.columns, num_warps=tile.warps
        )


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
