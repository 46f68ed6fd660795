"""SwiGLU whose result or gradient is rounded to FP8 on its way to memory: swiglu.py and quantize.py in one pass.

    forward   reads gate_up, writes y's rows: 2 x 2 + 1 = 5 bytes for an element of y
    backward  reads gate_up and dy, writes rows and columns of d_gate_up, and now y's columns: 2 x 2 + 2 + 2 + 2 + 1 = 11 bytes

One after the other they move 28. The product behind y wants its columns in the backward pass only, where they cost no
read: they are not kept meanwhile. Values go to FP8 from float32, without the rounding to gate_up's dtype in between.

Legend: M rows, F width of gate, of up and of y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import check_devices, check_dtypes
from kernels.quantize import FP8_DTYPES, Tile, scale_and_round, store_columns, write_scaled
from kernels.reference import Quantized

FORWARD_TILE = Tile(8, 512, 4)
BACKWARD_TILE = Tile(32, 64, 4)


@triton.jit
def _forward_kernel(gate_up, scale, rows, stats, M, F, stride, LARGEST: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    m = tl.program_id(0) * R + tl.arange(0, R)[:, None]  # (R, 1)
    k = tl.program_id(1) * C + tl.arange(0, C)[None, :]  # (1, C)
    inside = (m < M) & (k < F)
    m, k = m.to(tl.int64), k.to(tl.int64)  # a large tensor has more than 2^31 elements
    gate = tl.load(gate_up + m * stride + k, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + m * stride + F + k, inside, 0.0).to(tl.float32)
    is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    n_values = tl.where(is_first, tl.full((), 1, tl.int64) * M * F, 0)
    write_scaled(gate * tl.sigmoid(gate) * up, scale, rows, None, stats, m, k, inside, M, F, n_values, LARGEST)


@triton.jit
def _backward_kernel(
    gate_up, dy, scale, y_scale, rows, columns, y_columns, stats, M, F, stride, dy_stride,
    LARGEST: tl.constexpr, Y_LARGEST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Three tiles: what is F columns apart has the same inputs, and so has y."""
    m = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    k = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    inside = (m < M) & (k < F)
    m, k = m.to(tl.int64), k.to(tl.int64)
    gate = tl.load(gate_up + m * stride + k, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + m * stride + F + k, inside, 0.0).to(tl.float32)
    d = tl.load(dy + m * dy_stride + k, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    n_values = tl.where(is_first, tl.full((), 1, tl.int64) * M * F, 0)
    d_gate, d_up = d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * gate * sigmoid
    write_scaled(d_gate, scale, rows, columns, stats, m, k, inside, M, 2 * F, n_values, LARGEST)
    write_scaled(d_up, scale, rows, columns, stats, m, k + F, inside, M, 2 * F, n_values, LARGEST)
    y = scale_and_round(gate * sigmoid * up, tl.load(y_scale), Y_LARGEST, y_columns.dtype.element_ty)
    store_columns(y_columns, y, m, k, inside, M)


@torch.library.custom_op("nanotrain::swiglu_quantize", mutates_args=("stats",))
def forward_op(gate_up: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor) -> Tensor:
    rows = forward_output(gate_up, dtype, scale, stats)
    (M, F), largest, tile = rows.shape, torch.finfo(dtype).max, FORWARD_TILE
    with torch.cuda.device_of(gate_up):
        _forward_kernel[tile.grid(M, F)](
            gate_up, scale, rows, stats, M, F, gate_up.stride(0), largest, tile.rows, tile.columns, num_warps=tile.warps
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
            gate_up, dy, scale, y_scale, rows, columns, y_columns, stats, M, F, gate_up.stride(0), dy.stride(0),
            torch.finfo(dtype).max, torch.finfo(y_dtype).max, tile.rows, tile.columns, num_warps=tile.warps,
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
