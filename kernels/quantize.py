"""Rounding to FP8 in Triton, with the transpose: x is read once, the rounded matrix written twice, along rows and columns.

    rows[m, k] = fp8(scaled(scale x[m, k])),  columns[k, m] = rows[m, k]

Hopper multiplies FP8 only where both operands have the summed axis last: the forward product and the input's gradient want
rows, the weight's gradient wants columns. A program has one tile, which is transposed through shared memory, so that
both are written in whole sectors. A thread has four rows at once, whose bytes are packed to a word of a column before that:
shared memory has no single bytes to move. Where each FP8_BLOCK elements have a scale of their own, it depends on nothing but the
tile. Statistics are added up in memory, by the few programs that have something to add.

The assembler that comes with Triton 3.6 to 3.8, of CUDA 12, gives wrong bytes where numbers that were rounded once are both
stored and transposed (triton issue 11111). Here rows and columns are rounded apart, for pairs of neighbours are, and those in a
row are others than those in a column.

Legend: M rows, Q = M / 4, K columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import DTYPES, check_devices, check_dtypes
from kernels.reference import FP8_BLOCK, Quantized, fp8_limits

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
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
BYTES_TILE = Tile(128, 256, 8)


@triton.jit
def scaled(values, scale, LARGEST: tl.constexpr):
    """values * scale for a conversion to FP8, NaN where a value is not finite, as 0 inf is.

    What is too large the hardware's conversion makes the largest number, the interpreter's does not. In place of 0 |values|,
    values - values would not do: where a product's are fused with it, it is their rounding error.
    """
    z = tl.fma(values, scale, tl.abs(values) * 0.0)
    if INTERPRETED:
        z = tl.minimum(tl.maximum(z, -LARGEST, tl.PropagateNan.ALL), LARGEST, tl.PropagateNan.ALL)
    return z


@triton.jit
def _byte(z, DTYPE: tl.constexpr):
    return z.to(DTYPE).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _pack(a, b, c, d, DTYPE: tl.constexpr):
    """Rounded to FP8, each a byte of an int32, the first the lowest. `cvt` wants the upper byte first."""
    if INTERPRETED:
        return _byte(a, DTYPE) | (_byte(b, DTYPE) << 8) | (_byte(c, DTYPE) << 16) | (_byte(d, DTYPE) << 24)
    ROUND: tl.constexpr = "cvt.rn.satfinite.e4m3x2.f32 " if tl.float8e4nv == DTYPE else "cvt.rn.satfinite.e5m2x2.f32 "
    ASM: tl.constexpr = "{.reg .b16 x, y; " + ROUND + "x, $2, $1; " + ROUND + "y, $4, $3; mov.b32 $0, {x, y};}"
    return tl.inline_asm_elementwise(ASM, "=r,f,f,f,f", [a, b, c, d], tl.int32, is_pure=True, pack=1)


@triton.jit
def load_four(x, stride, inside):
    """The row at the pointers `x` and the three after it, in float32; 0 outside."""
    return [tl.load(x + i * stride, inside, 0.0).to(tl.float32) for i in (0, 1, 2, 3)]


@triton.jit
def store_rows(rows, z, stride, inside):
    for i in tl.static_range(4):
        tl.store(rows + i * stride, z[i].to(rows.dtype.element_ty), inside)


@triton.jit
def _store_words(columns, words, q, k, inside, Q):
    """`columns`: the matrix (K, 4 Q) of bytes; `words`: rows 4 q to 4 q + 3, which are a word of a column."""
    to = columns.to(tl.pointer_type(tl.int32), bitcast=True) + tl.trans(k) * Q + tl.trans(q)
    tl.store(to, tl.trans(words), tl.trans(inside))


@triton.jit
def store_columns(columns, z, q, k, inside, Q):
    """The four rows `z`, rounded, to `columns`."""
    _store_words(columns, _pack(z[0], z[1], z[2], z[3], columns.dtype.element_ty), q, k, inside, Q)


@triton.jit
def _inverse(amax, LARGEST: tl.constexpr):
    return tl.where(amax > 0, tl.div_rn(amax, LARGEST), 1.0)


@triton.jit
def _add(total, count):
    tl.atomic_add(total, tl.cast(count, tl.int64), count > 0, sem="relaxed")


@triton.jit
def _add_true(total, masks):
    counts = masks[0].to(tl.int32)
    for i in tl.static_range(1, len(masks)):
        counts += masks[i].to(tl.int32)
    _add(total, tl.sum(counts))


@triton.jit
def _largest(values):
    """Of some tiles, element by element."""
    largest = tl.abs(values[0])
    for i in tl.static_range(1, len(values)):
        largest = tl.maximum(largest, tl.abs(values[i]))
    return largest


@triton.jit
def _note(stats, amax, M, K):
    """The largest |value| of a tile of a matrix (M, K), and from one tile the number of values."""
    bits = amax.to(tl.int32, bitcast=True).to(tl.int64)
    # What is read may be old, and so too small, but never too large.
    tl.atomic_max(stats, bits, bits > tl.load(stats), sem="relaxed")
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        _add(stats + 3, tl.cast(M, tl.int64) * K)


@triton.jit
def count(stats, values, scale, M, K, MOST: tl.constexpr, LEAST: tl.constexpr):
    """Adds tiles of a matrix (M, K), which are 0 outside of it, to `stats`, as multiplied by scale and rounded."""
    smallest = tl.abs(values[0])
    for i in tl.static_range(1, len(values)):
        smallest = tl.minimum(smallest, tl.abs(values[i]))
    amax, amin = tl.max(_largest(values)), tl.min(smallest)
    if (amax * scale > MOST) | (amin * scale <= LEAST):  # seldom
        if amax * scale > MOST:
            _add_true(stats + 1, [tl.abs(v * scale) > MOST for v in values])
        _add_true(stats + 2, [(tl.abs(v * scale) <= LEAST) & (v != 0) for v in values])
    _note(stats, amax, M, K)


@triton.jit
def _kernel(
    x,
    scale,  # None where blocks have their own
    rows,
    rows_inverse,
    columns,  # None where they are not wanted
    columns_inverse,
    stats,
    Q,
    K,
    x_stride,
    THROUGH: tl.constexpr,  # what x is rounded to first, or None
    LARGEST: tl.constexpr,
    MOST: tl.constexpr,
    LEAST: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A tile of R x C, as four of every fourth row."""
    q = tl.program_id(0) * (R // 4) + tl.arange(0, R // 4)[:, None]  # (R / 4, 1)
    k = tl.program_id(1) * C + tl.arange(0, C)[None, :]  # (1, C)
    inside = (q < Q) & (k < K)
    q, k = q.to(tl.int64), k.to(tl.int64)  # a large tensor has more than 2^31 elements
    values = load_four(x + 4 * q * x_stride + k, x_stride, inside)  # (R / 4, C) each
    if THROUGH is not None:
        values = [v.to(THROUGH).to(tl.float32) for v in values]
    rows += 4 * q * K + k
    if scale is not None:
        factor = tl.load(scale)
        z = [scaled(v, factor, LARGEST) for v in values]
        store_rows(rows, z, K, inside)
        if columns is not None:
            store_columns(columns, z, q, k, inside, Q)
        count(stats, values, factor, 4 * Q, K, MOST, LEAST)
    else:
        inverse_m = [_inverse(tl.max(tl.abs(v), 1, keep_dims=True), LARGEST) for v in values]  # (R / 4, 1) each
        amax_k = tl.max(_largest(values), 0, keep_dims=True)  # (1, C)
        inverse_k = _inverse(amax_k, LARGEST)
        for i in tl.static_range(4):
            tl.store(rows_inverse + tl.program_id(1).to(tl.int64) * 4 * Q + 4 * q + i, inverse_m[i], q < Q)
        tl.store(columns_inverse + tl.program_id(0).to(tl.int64) * K + k, inverse_k, k < K)
        z = [tl.div_rn(values[i], inverse_m[i]) for i in (0, 1, 2, 3)]
        store_rows(rows, [scaled(v, 1.0, LARGEST) for v in z], K, inside)
        store_columns(columns, [scaled(tl.div_rn(v, inverse_k), 1.0, LARGEST) for v in values], q, k, inside, Q)
        _note(stats, tl.max(amax_k), 4 * Q, K)
        _add_true(stats + 2, [(tl.abs(z[i]) <= LEAST) & (values[i] != 0) for i in (0, 1, 2, 3)])


@triton.jit
def _transpose_kernel(rows, columns, Q, K, R: tl.constexpr, C: tl.constexpr):
    """Bytes, four rows at once as in `_kernel`."""
    q = (tl.program_id(0) * (R // 4) + tl.arange(0, R // 4)[:, None]).to(tl.int64)
    k = (tl.program_id(1) * C + tl.arange(0, C)[None, :]).to(tl.int64)
    inside = (q < Q) & (k < K)
    x = rows + 4 * q * K + k
    a, b, c, d = [tl.load(x + i * K, inside, 0).to(tl.int32) for i in (0, 1, 2, 3)]
    _store_words(columns, a | (b << 8) | (c << 16) | (d << 24), q, k, inside, Q)


@torch.library.custom_op("nanotrain::transpose_bytes", mutates_args=())
def transpose_op(rows: Tensor) -> Tensor:
    columns, (M, K) = transposed_output(rows), rows.shape
    with torch.cuda.device_of(rows):
        args = rows.view(torch.uint8), columns.view(torch.uint8), M // 4, K, BYTES_TILE.rows, BYTES_TILE.columns
        _transpose_kernel[BYTES_TILE.grid(M, K)](*args, num_warps=BYTES_TILE.warps)
    return columns


@transpose_op.register_fake
def transposed_output(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[1], rows.shape[0])


def transpose_bytes(rows: Tensor) -> Tensor:
    """(M, K) in an FP8 dtype -> (K, M); M is a multiple of 4. Raises ValueError for a wrong shape, dtype or device."""
    check_devices(rows=rows)
    if rows.dtype not in FP8_DTYPES:
        raise ValueError(f"rows: expected float8_e4m3fn or float8_e5m2, got {rows.dtype}")
    if rows.ndim != 2 or rows.shape[0] % 4:
        raise ValueError(f"rows: expected a matrix with a multiple of 4 rows, got shape {list(rows.shape)}")
    return transpose_op(rows.contiguous())


@torch.library.custom_op("nanotrain::quantize", mutates_args=("stats",))
def quantize_op(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None, stats: Tensor, with_columns: bool, through: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize`'s four tensors; the inverse scales are empty where there is one scale."""
    outputs = quantize_outputs(x, dtype, scale, stats, with_columns, through)
    _launch(x, scale, outputs, stats, through)
    return outputs


def _launch(
    x: Tensor,
    scale: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    stats: Tensor,
    through: torch.dtype | None,
) -> None:
    if x.stride(1) != 1:
        x = x.contiguous()
    through = None if through in (None, x.dtype) else DTYPES[through]
    tile = BLOCK_TILE if scale is None else TILE
    rows, rows_inverse, columns, columns_inverse = outputs
    to = rows, rows_inverse, columns if len(columns) else None, columns_inverse
    (M, K), limits = x.shape, fp8_limits(rows.dtype)
    with torch.cuda.device_of(x):
        _kernel[tile.grid(M, K)](
            x, scale, *to, stats, M // 4, K, x.stride(0), through, *limits, tile.rows, tile.columns, num_warps=tile.warps
        )


@quantize_op.register_fake
def quantize_outputs(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None, stats: Tensor, with_columns: bool, through: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, K = x.shape
    m_blocks, k_blocks = (M // FP8_BLOCK, K // FP8_BLOCK) if scale is None else (0, 0)
    rows_inverse = x.new_empty(k_blocks, M, dtype=torch.float32)
    columns_inverse = x.new_empty(m_blocks, K, dtype=torch.float32)
    columns = x.new_empty(K if with_columns else 0, M, dtype=dtype)
    return x.new_empty(M, K, dtype=dtype), rows_inverse, columns, columns_inverse


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None,
    stats: Tensor,
    out: Quantized | None = None,
    with_columns: bool = True,
    through: torch.dtype | None = None,
) -> Quantized:
    """What reference.quantize is. x is float32, bfloat16 or float16, and has a multiple of 4 rows.

    Raises ValueError for a wrong shape, dtype or device.
    """
    check_devices(x=x, scale=scale)
    check_dtypes(x=x)
    if through is not None and through not in DTYPES:
        raise ValueError(f"through: expected float32, bfloat16 or float16, got {through}")
    if x.ndim != 2:
        raise ValueError(f"x: expected a matrix, got shape {list(x.shape)}")
    if x.shape[0] % 4:
        raise ValueError(f"x: expected a multiple of 4 rows, got shape {list(x.shape)}")
    if dtype not in FP8_DTYPES:
        raise ValueError(f"dtype: expected float8_e4m3fn or float8_e5m2, got {dtype}")
    if scale is None and (x.shape[0] % FP8_BLOCK or x.shape[1] % FP8_BLOCK):
        raise ValueError(f"x: blocks have {FP8_BLOCK} elements, which do not divide both of {list(x.shape)}")
    if scale is None and not with_columns:
        raise ValueError("with_columns: columns whose blocks have scales of their own do not follow from the rows")
    if out is not None:
        if scale is not None:
            out.rows_inverse.copy_(scale.reciprocal())
        _launch(x, scale, (out.rows, out.rows_inverse.t(), out.columns, out.columns_inverse.t()), stats, through)
        return out
    rows, rows_inverse, columns, columns_inverse = quantize_op(x, dtype, scale, stats, with_columns, through)
    if scale is not None:
        inverse = scale.reciprocal()
        return Quantized(rows, inverse, columns, inverse)
    return Quantized(rows, rows_inverse.t(), columns, columns_inverse.t())
