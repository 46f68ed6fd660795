"""SwiGLU whose result or gradient is rounded to FP8 on its way to memory: swiglu.py and quantize.py in one pass.

    forward   reads gate_up, writes y's rows: 2 x 2 + 1 = 5 bytes for an element of y
    backward  reads gate_up and dy, writes rows and columns of d_gate_up, and now y's columns: 2 x 2 + 2 + 2 + 2 + 1 = 11 bytes

One after the other they move 28. Where gate_up itself is kept in FP8 the forward pass writes 2 bytes more, and the backward
pass reads 2 less. The product behind y wants its columns in the backward pass only, where they cost no read: they are not kept
meanwhile. Values go to FP8 from float32, without the rounding to gate_up's dtype in between.

Legend: M rows, Q = M / 4, F width of gate, of up and of y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import check_devices, check_dtypes
from kernels.quantize import FP8_DTYPES, INTERPRETED, Tile, count, load_four, scaled, store_columns, store_rows
from kernels.reference import FP8_BLOCK, Kept, Quantized, fp8_limits

KEPT_DTYPE = torch.float8_e4m3fn
BLOCK = tl.constexpr(FP8_BLOCK)
TINY = tl.constexpr(1e-30)  # the largest of a block is taken to be no less: what is divided by it is a float32
FORWARD_TILE, KEEPING_TILE = Tile(8, 512, 4), Tile(1, 2048, 4)  # the second where gate_up is kept in FP8
BACKWARD_TILE, KEPT_TILE = Tile(32, 64, 2), Tile(32, 128, 4)


@triton.jit
def _sigmoid(x):
    """As exact as Triton's, of which half the instructions see to results below 2^-126: here those are 0."""
    if INTERPRETED:
        return tl.sigmoid(x)
    ASM: tl.constexpr = "ex2.approx.ftz.f32 $0, $1; add.f32 $0, $0, 1.0; rcp.approx.ftz.f32 $0, $0;"
    return tl.inline_asm_elementwise(ASM, "=f,f", [x * -1.4426950408889634], tl.float32, is_pure=True, pack=1)


@triton.jit
def _forward_kernel(
    gate_up, scale, rows, kept, inverse, stats, M, F, stride, BLOCKS,
    LARGEST: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr, KEPT_LARGEST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`kept` and `inverse` are None where gate_up is kept as it is; BLOCKS: of a row of gate, or of up."""
    m = tl.program_id(0) * R + tl.arange(0, R)[:, None]  # (R, 1)
    k = tl.program_id(1) * C + tl.arange(0, C)[None, :]  # (1, C)
    inside = (m < M) & (k < F)
    m, k = m.to(tl.int64), k.to(tl.int64)  # a large tensor has more than 2^31 elements
    gate = tl.load(gate_up + m * stride + k, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + m * stride + F + k, inside, 0.0).to(tl.float32)
    y, factor = gate * _sigmoid(gate) * up, tl.load(scale)
    tl.store(rows + m * F + k, scaled(y, factor, LARGEST).to(rows.dtype.element_ty), inside)
    count(stats, (y,), factor, M, F, MOST, LEAST)
    if kept is not None:
        block = (tl.program_id(1) * (C // BLOCK) + tl.arange(0, C // BLOCK)[None, :]).to(tl.int64)  # (1, C / BLOCK)
        inside_blocks = (m < M) & (block < BLOCKS)
        _keep(gate, kept + m * 2 * F + k, inside, inverse + m * 2 * BLOCKS + block, inside_blocks, KEPT_LARGEST, R, C)
        _keep(up, kept + m * 2 * F + F + k, inside, inverse + (m * 2 + 1) * BLOCKS + block, inside_blocks, KEPT_LARGEST, R, C)


@triton.jit
def _keep(x, rows, inside, inverse, inside_blocks, LARGEST: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """x (R, C), 0 outside, rounded with a scale for each BLOCK of a row, whose inverses are (R, C / BLOCK)."""
    blocks = tl.reshape(x, (R, C // BLOCK, BLOCK))
    amax = tl.maximum(tl.max(tl.abs(blocks), 2, keep_dims=True), TINY)
    z = scaled(blocks, LARGEST / amax, LARGEST)
    tl.store(rows, tl.reshape(z, (R, C)).to(rows.dtype.element_ty), inside)
    tl.store(inverse, tl.reshape(amax / LARGEST, (R, C // BLOCK)), inside_blocks)


@triton.jit
def _derivatives(gate, up, d):
    """d_gate, d_up and y."""
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    return d * up * (sigmoid + silu * (1 - sigmoid)), d * silu, silu * up


@triton.jit
def _backward_kernel(
    gate_up, inverse, dy, scale, y_scale, rows, columns, y_columns, stats, Q, F, stride, dy_stride, BLOCKS,
    LARGEST: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr, Y_LARGEST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Three tiles, each as quantize's four: what is F columns apart has the same inputs, and so has y. C divides BLOCK."""
    q = tl.program_id(0) * (R // 4) + tl.arange(0, R // 4)[:, None]  # (R / 4, 1)
    k = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    inside = (q < Q) & (k < F)
    q, k = q.to(tl.int64), k.to(tl.int64)
    x = gate_up + 4 * q * stride + k
    gate, up = load_four(x, stride, inside), load_four(x + F, stride, inside)  # (R / 4, C) each
    if inverse is not None:
        inverse += 4 * q * 2 * BLOCKS + tl.program_id(1) * C // BLOCK  # (R / 4, 1)
        by_gate, by_up = load_four(inverse, 2 * BLOCKS, q < Q), load_four(inverse + BLOCKS, 2 * BLOCKS, q < Q)
        gate, up = [gate[i] * by_gate[i] for i in (0, 1, 2, 3)], [up[i] * by_up[i] for i in (0, 1, 2, 3)]
    d = load_four(dy + 4 * q * dy_stride + k, dy_stride, inside)
    results = [_derivatives(gate[i], up[i], d[i]) for i in (0, 1, 2, 3)]
    d_gate, d_up = [r[0] for r in results], [r[1] for r in results]
    factor, y_factor = tl.load(scale), tl.load(y_scale)
    z_gate, z_up = [scaled(v, factor, LARGEST) for v in d_gate], [scaled(v, factor, LARGEST) for v in d_up]
    rows += 4 * q * 2 * F + k
    store_rows(rows, z_gate, 2 * F, inside)
    store_rows(rows + F, z_up, 2 * F, inside)
    store_columns(columns, z_gate, q, k, inside, Q)
    store_columns(columns, z_up, q, k + F, inside, Q)
    store_columns(y_columns, [scaled(r[2], y_factor, Y_LARGEST) for r in results], q, k, inside, Q)
    count(stats, d_gate + d_up, factor, 4 * Q, 2 * F, MOST, LEAST)


@torch.library.custom_op("nanotrain::swiglu_quantize", mutates_args=("stats",))
def forward_op(
    gate_up: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor, keep_rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y's rows, and what is kept of gate_up: nothing, and its inverse scales nothing, where that is gate_up itself."""
    rows, *kept = forward_outputs(gate_up, dtype, scale, stats, keep_rounded)
    (M, F), tile = rows.shape, KEEPING_TILE if keep_rounded else FORWARD_TILE
    with torch.cuda.device_of(gate_up):
        _forward_kernel[tile.grid(M, F)](
            gate_up, scale, rows, *(kept if keep_rounded else (None, None)), stats, M, F, gate_up.stride(0),
            triton.cdiv(F, FP8_BLOCK), *fp8_limits(dtype), torch.finfo(KEPT_DTYPE).max, tile.rows, tile.columns,
            num_warps=tile.warps,
        )  # fmt: skip
    return rows, *kept


@forward_op.register_fake
def forward_outputs(
    gate_up: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor, keep_rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    M, width = gate_up.shape
    kept_rows = M if keep_rounded else 0
    kept = gate_up.new_empty(kept_rows, width, dtype=KEPT_DTYPE)
    inverse = gate_up.new_empty(kept_rows, 2 * triton.cdiv(width // 2, FP8_BLOCK), dtype=torch.float32)
    return gate_up.new_empty(M, width // 2, dtype=dtype), kept, inverse


@torch.library.custom_op("nanotrain::swiglu_backward_quantize", mutates_args=("stats",))
def backward_op(
    gate_up: Tensor, inverse: Tensor | None, dy: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor,
    y_dtype: torch.dtype, y_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, columns, y_columns = backward_outputs(gate_up, inverse, dy, dtype, scale, stats, y_dtype, y_scale)
    (M, F), tile = dy.shape, BACKWARD_TILE if inverse is None else KEPT_TILE
    with torch.cuda.device_of(gate_up):
        _backward_kernel[tile.grid(M, F)](
            gate_up, inverse, dy, scale, y_scale, rows, columns, y_columns, stats, M // 4, F, gate_up.stride(0), dy.stride(0),
            triton.cdiv(F, FP8_BLOCK), *fp8_limits(dtype), torch.finfo(y_dtype).max, tile.rows, tile.columns,
            num_warps=tile.warps,
        )  # fmt: skip
    return rows, columns, y_columns


@backward_op.register_fake
def backward_outputs(
    gate_up: Tensor, inverse: Tensor | None, dy: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor,
    y_dtype: torch.dtype, y_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    M, width = gate_up.shape
    outputs = gate_up.new_empty(M, width, dtype=dtype), gate_up.new_empty(width, M, dtype=dtype)
    return *outputs, gate_up.new_empty(width // 2, M, dtype=y_dtype)


def swiglu_quantize(
    gate_up: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor, keep_rounded: bool = False
) -> tuple[Tensor, Kept]:
    """What reference.swiglu_quantize is: gate_up (M, 2F) float32, bfloat16 or float16 -> (M, F) in an FP8 dtype.

    Raises ValueError for a wrong shape, dtype or device.
    """
    check_dtypes(gate_up=gate_up)
    _check(dtype, gate_up, scale=scale)
    gate_up = gate_up.contiguous()
    rows, *kept = forward_op(gate_up, dtype, scale, stats, keep_rounded)
    return rows, Kept(*kept) if keep_rounded else Kept(gate_up, None)


def swiglu_backward_quantize(
    kept: Kept, dy: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor, y: tuple[torch.dtype, Tensor]
) -> tuple[Quantized, Tensor]:
    """What reference.swiglu_backward_quantize is: of gate_up (M, 2F), dy (M, F) -> the gradient of gate_up, and y's columns."""
    (gate_up, inverse), (y_dtype, y_scale) = kept, y
    _check(dtype, gate_up, scale=scale, y_scale=y_scale, dy=dy, inverse=inverse)
    check_dtypes(dy=dy)
    if inverse is None:
        check_dtypes(gate_up=gate_up)
    else:
        _check_inverse(inverse, gate_up)
    if gate_up.shape[0] % 4:
        raise ValueError(f"gate_up: expected a multiple of 4 rows, got shape {list(gate_up.shape)}")
    if dy.shape != (gate_up.shape[0], gate_up.shape[1] // 2):
        raise ValueError(f"dy: expected half the columns of gate_up's {list(gate_up.shape)}, got {list(dy.shape)}")
    rows, columns, y_columns = backward_op(gate_up.contiguous(), inverse, dy.contiguous(), dtype, scale, stats, y_dtype, y_scale)
    d_inverse = scale.reciprocal()
    return Quantized(rows, d_inverse, columns, d_inverse), y_columns


def _check(dtype: torch.dtype, gate_up: Tensor, **others: Tensor | None) -> None:
    check_devices(gate_up=gate_up, **others)
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected a matrix with an even number of columns, got shape {list(gate_up.shape)}")
    if dtype not in FP8_DTYPES:
        raise ValueError(f"dtype: expected float8_e4m3fn or float8_e5m2, got {dtype}")


def _check_inverse(inverse: Tensor, gate_up: Tensor) -> None:
    if gate_up.dtype != KEPT_DTYPE:
        raise ValueError(f"gate_up: expected {KEPT_DTYPE}, as it has inverse scales, got {gate_up.dtype}")
    shape = (gate_up.shape[0], 2 * triton.cdiv(gate_up.shape[1] // 2, FP8_BLOCK))
    if inverse.shape != shape or inverse.dtype != torch.float32 or not inverse.is_contiguous():
        got = f"{list(inverse.shape)}, {inverse.dtype}, strides {inverse.stride()}"
        raise ValueError(f"inverse: expected shape {list(shape)}, float32, contiguous, got {got}")
