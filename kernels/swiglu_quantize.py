"""SwiGLU whose result or gradient is rounded to FP8 on its way to memory: swiglu.py and quantize.py in one pass.

    forward   reads gate_up, writes y's rows and columns: 2 x 2 + 1 + 1 = 6 bytes for an element of y instead of 10
    backward  reads gate_up and dy, writes the rows and columns of d_gate_up: 2 x 2 + 2 + 2 + 2 = 10 bytes instead of 18

Values go to FP8 from float32, without the rounding to gate_up's dtype in between. One scale for a tensor.

Legend: M rows, F width of gate, of up and of y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import check_devices, check_dtypes
from kernels.quantize import FP8_DTYPES, TILE, write_scaled
from kernels.reference import Quantized

WARPS = 8


@triton.jit
def _forward_kernel(gate_up, scale, rows, columns, stats, M, F, stride, LARGEST: tl.constexpr, SIZE: tl.constexpr):
    m = tl.program_id(0) * SIZE + tl.arange(0, SIZE)[:, None]  # (SIZE, 1)
    k = tl.program_id(1) * SIZE + tl.arange(0, SIZE)[None, :]  # (1, SIZE)
    inside = (m < M) & (k < F)
    m, k = m.to(tl.int64), k.to(tl.int64)  # a large tensor has more than 2^31 elements
    gate = tl.load(gate_up + m * stride + k, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + m * stride + F + k, inside, 0.0).to(tl.float32)
    is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    n_values = tl.where(is_first, tl.full((), 1, tl.int64) * M * F, 0)
    write_scaled(gate * tl.sigmoid(gate) * up, scale, rows, columns, stats, m, k, inside, M, F, n_values, LARGEST)


@triton.jit
def _backward_kernel(
    gate_up, dy, scale, rows, columns, stats, M, F, stride, dy_stride,
    LARGEST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Two tiles: what is F columns apart has the same inputs."""
    m = tl.program_id(0) * SIZE + tl.arange(0, SIZE)[:, None]
    k = tl.program_id(1) * SIZE + tl.arange(0, SIZE)[None, :]
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


@torch.library.custom_op("nanotrain::swiglu_quantize", mutates_args=("stats",))
def forward_op(gate_up: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = forward_outputs(gate_up, dtype, scale, stats)
    M, F = rows.shape
    grid, largest = (triton.cdiv(M, TILE), triton.cdiv(F, TILE)), torch.finfo(dtype).max
    with torch.cuda.device_of(gate_up):
        _forward_kernel[grid](gate_up, scale, rows, columns, stats, M, F, gate_up.stride(0), largest, TILE, num_warps=WARPS)
    return rows, columns


@forward_op.register_fake
def forward_outputs(gate_up: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    M, F = gate_up.shape[0], gate_up.shape[1] // 2
    return gate_up.new_empty(M, F, dtype=dtype), gate_up.new_empty(F, M, dtype=dtype)


@torch.library.custom_op("nanotrain::swiglu_backward_quantize", mutates_args=("stats",))
def backward_op(gate_up: Tensor, dy: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = backward_outputs(gate_up, dy, dtype, scale, stats)
    M, F = dy.shape
    grid, largest = (triton.cdiv(M, TILE), triton.cdiv(F, TILE)), torch.finfo(dtype).max
    with torch.cuda.device_of(gate_up):
        _backward_kernel[grid](
            gate_up, dy, scale, rows, columns, stats, M, F, gate_up.stride(0), dy.stride(0),
            largest, TILE, num_warps=WARPS,
        )  # fmt: skip
    return rows, columns


@backward_op.register_fake
def backward_outputs(gate_up: Tensor, dy: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    M, width = gate_up.shape
    return gate_up.new_empty(M, width, dtype=dtype), gate_up.new_empty(width, M, dtype=dtype)


def swiglu_quantize(gate_up: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor) -> Quantized:
    """What reference.swiglu_quantize is: gate_up (M, 2F) float32, bfloat16 or float16 -> (M, F) in an FP8 dtype.

    Raises ValueError for a wrong shape, dtype or device.
    """
    _check(dtype, scale, gate_up=gate_up)
    rows, columns = forward_op(gate_up.contiguous(), dtype, scale, stats)
    inverse = scale.reciprocal()
    return Quantized(rows, inverse, columns, inverse)


def swiglu_backward_quantize(gate_up: Tensor, dy: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor) -> Quantized:
    """What reference.swiglu_backward_quantize is: gate_up (M, 2F), dy (M, F) -> the gradient of gate_up in an FP8 dtype."""
    _check(dtype, scale, gate_up=gate_up, dy=dy)
    if dy.shape != (gate_up.shape[0], gate_up.shape[1] // 2):
        raise ValueError(f"dy: expected half the columns of gate_up's {list(gate_up.shape)}, got {list(dy.shape)}")
    rows, columns = backward_op(gate_up.contiguous(), dy.contiguous(), dtype, scale, stats)
    inverse = scale.reciprocal()
    return Quantized(rows, inverse, columns, inverse)


def _check(dtype: torch.dtype, scale: Tensor, gate_up: Tensor, **others: Tensor) -> None:
    check_devices(gate_up=gate_up, scale=scale, **others)
    check_dtypes(gate_up=gate_up, **others)
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected a matrix with an even number of columns, got shape {list(gate_up.shape)}")
    if dtype not in FP8_DTYPES:
        raise ValueError(f"dtype: expected float8_e4m3fn or float8_e5m2, got {dtype}")
