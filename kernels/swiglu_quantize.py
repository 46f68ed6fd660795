"""SwiGLU whose result or gradient is rounded to FP8 on its way to memory: swiglu.py and quantize.py in one pass.

    forward   reads gate_up, writes y's rows: 2 x 2 + 1 = 5 bytes for an element of y
    backward  reads gate_up and dy, writes rows and columns of d_gate_up, and now y's columns: 2 x 2 + 2 + 2 + 2 + 1 = 11 bytes

One after the other they move 28. The product behind y wants its columns in the backward pass only, where they cost no
read: they are not kept meanwhile. Values go to FP8 from float32, without the rounding to gate_up's dtype in between.

Legend: M rows, Q = M / 4, F width of gate, of up and of y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import check_devices, check_dtypes
from kernels.quantize import FP8_DTYPES, INTERPRETED, Tile, count, fp8_limits, load_four, scaled, store_columns, store_rows
from kernels.reference import Quantized

FORWARD_TILE = Tile(8, 512, 4)
BACKWARD_TILE = Tile(32, 64, 2)


@triton.jit
def _sigmoid(x):
    """As exact as Triton's, of which half the instructions see to results below 2^-126: here those are 0."""
    if INTERPRETED:
        return tl.sigmoid(x)
    ASM: tl.constexpr = "ex2.approx.ftz.f32 $0, $1; add.f32 $0, $0, 1.0; rcp.approx.ftz.f32 $0, $0;"
    return tl.inline_asm_elementwise(ASM, "=f,f", [x * -1.4426950408889634], tl.float32, is_pure=True, pack=1)


@triton.jit
def _forward_kernel(
    gate_up, scale, rows, stats, M, F, stride,
    LARGEST: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * R + tl.arange(0, R)[:, None]  # (R, 1)
    k = tl.program_id(1) * C + tl.arange(0, C)[None, :]  # (1, C)
    inside = (m < M) & (k < F)
    m, k = m.to(tl.int64), k.to(tl.int64)  # a large tensor has more than 2^31 elements
    gate = tl.load(gate_up + m * stride + k, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + m * stride + F + k, inside, 0.0).to(tl.float32)
    y, factor = gate * _sigmoid(gate) * up, tl.load(scale)
    tl.store(rows + m * F + k, scaled(y, factor, LARGEST).to(rows.dtype.element_ty), inside)
    count(stats, (y,), factor, M, F, LARGEST, HALF)


@triton.jit
def _derivatives(gate, up, d):
    """d_gate, d_up and y."""
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    return d * up * (sigmoid + silu * (1 - sigmoid)), d * silu, silu * up


@triton.jit
def _backward_kernel(
    gate_up, dy, scale, y_scale, rows, columns, y_columns, stats, Q, F, stride, dy_stride,
    LARGEST: tl.constexpr, HALF: tl.constexpr, Y_LARGEST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Three tiles, each as quantize's four: what is F columns apart has the same inputs, and so has y."""
    q = tl.program_id(0) * (R // 4) + tl.arange(0, R // 4)[:, None]  # (R / 4, 1)
    k = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    inside = (q < Q) & (k < F)
    q, k = q.to(tl.int64), k.to(tl.int64)
    x = gate_up + 4 * q * stride + k
    gate, up = load_four(x, stride, inside), load_four(x + F, stride, inside)  # (R / 4, C) each
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
    count(stats, d_gate + d_up, factor, 4 * Q, 2 * F, LARGEST, HALF)


@torch.library.custom_op("nanotrain::swiglu_quantize", mutates_args=("stats",))
def forward_op(gate_up: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor) -> Tensor:
    rows = forward_output(gate_up, dtype, scale, stats)
    (M, F), limits, tile = rows.shape, fp8_limits(dtype), FORWARD_TILE
    with torch.cuda.device_of(gate_up):
        _forward_kernel[tile.grid(M, F)](
            gate_up, scale, rows, stats, M, F, gate_up.stride(0), *limits, tile.rows, tile.columns, num_warps=tile.warps
        )
    return rows


@forward_op.register_fake
def forward_output(gate_up: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=dtype)


@torch.library.custom_op("nanotrain::swiglu_backward_quantize", mutates_args=("stats",))
def backward_op(
    gate_up: Tensor, dy: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor, y_dtype: torch.dtype, y_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns, y_columns = backward_outputs(gate_up, dy, dtype, scale, stats, y_dtype, y_scale)
    (M, F), tile = dy.shape, BACKWARD_TILE
    with torch.cuda.device_of(gate_up):
        _backward_kernel[tile.grid(M, F)](
            gate_up, dy, scale, y_scale, rows, columns, y_columns, stats, M // 4, F, gate_up.stride(0), dy.stride(0),
            *fp8_limits(dtype), torch.finfo(y_dtype).max, tile.rows, tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    return rows, columns, y_columns


@backward_op.register_fake
def backward_outputs(
    gate_up: Tensor, dy: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor, y_dtype: torch.dtype, y_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    M, width = gate_up.shape
    outputs = gate_up.new_empty(M, width, dtype=dtype), gate_up.new_empty(width, M, dtype=dtype)
    return *outputs, gate_up.new_empty(width // 2, M, dtype=y_dtype)


def swiglu_quantize(gate_up: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor) -> Tensor:
    """What reference.swiglu_quantize is: gate_up (M, 2F) float32, bfloat16 or float16 -> (M, F) in an FP8 dtype.

    Raises ValueError for a wrong shape, dtype or device.
    """
    _check(dtype, gate_up, scale=scale)
    return forward_op(gate_up.contiguous(), dtype, scale, stats)


def swiglu_backward_quantize(
    gate_up: Tensor, dy: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor, y: tuple[torch.dtype, Tensor]
) -> tuple[Quantized, Tensor]:
    """What reference.swiglu_backward_quantize is: gate_up (M, 2F), dy (M, F) -> the gradient of gate_up, and y's columns."""
    y_dtype, y_scale = y
    _check(dtype, gate_up, scale=scale, y_scale=y_scale, dy=dy)
    check_dtypes(dy=dy)
    if gate_up.shape[0] % 4:
        raise ValueError(f"gate_up: expected a multiple of 4 rows, got shape {list(gate_up.shape)}")
    if dy.shape != (gate_up.shape[0], gate_up.shape[1] // 2):
        raise ValueError(f"dy: expected half the columns of gate_up's {list(gate_up.shape)}, got {list(dy.shape)}")
    rows, columns, y_columns = backward_op(gate_up.contiguous(), dy.contiguous(), dtype, scale, stats, y_dtype, y_scale)
    inverse = scale.reciprocal()
    return Quantized(rows, inverse, columns, inverse), y_columns


def _check(dtype: torch.dtype, gate_up: Tensor, **others: Tensor) -> None:
    check_devices(gate_up=gate_up, **others)
    check_dtypes(gate_up=gate_up)
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected a matrix with an even number of columns, got shape {list(gate_up.shape)}")
    if dtype not in FP8_DTYPES:
        raise ValueError(f"dtype: expected float8_e4m3fn or float8_e5m2, got {dtype}")
