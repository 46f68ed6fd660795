"""SwiGLU: y = silu(gate) * up with silu(z) = z sigmoid(z), where gate and up are the halves of one product's rows.

    forward   reads gate_up, writes y: three tensor passes
    backward  d_up = dy silu(gate);  d_gate = dy up sigmoid(gate) (1 + gate (1 - sigmoid(gate))): reads gate_up and dy, writes
              d_gate_up: five. Nothing is kept but the input.

Legend: N rows, F width of gate, of up and of y.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import as_rows, check_devices, check_dtypes

MAX_BLOCK = 1024
WARPS = 4


@triton.jit
def _forward_kernel(gate_up, y, row_stride, F, BLOCK: tl.constexpr):
    """One program a block of one row's columns."""
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # a large tensor has more than 2^31 elements
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    gate_up += row * row_stride + column
    gate = tl.load(gate_up, column < F).to(tl.float32)
    up = tl.load(gate_up + F, column < F).to(tl.float32)
    tl.store(y + row * F + column, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), column < F)


@triton.jit
def _backward_kernel(gate_up, dy, d_gate_up, row_stride, dy_stride, F, BLOCK: tl.constexpr):
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    gate_up += row * row_stride + column
    d_gate_up += row * 2 * F + column
    gate = tl.load(gate_up, column < F).to(tl.float32)
    up = tl.load(gate_up + F, column < F).to(tl.float32)
    dy = tl.load(dy + row * dy_stride + column, column < F).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(d_gate_up, d_gate.to(d_gate_up.dtype.element_ty), column < F)
    tl.store(d_gate_up + F, (dy * gate * sigmoid).to(d_gate_up.dtype.element_ty), column < F)


@torch.library.custom_op("nanotrain::swiglu", mutates_args=())
def swiglu_forward(gate_up: Tensor) -> Tensor:
    rows, F = as_rows(gate_up), gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], F)
    block = min(MAX_BLOCK, triton.next_power_of_2(F))
    if y.numel():
        with torch.cuda.device_of(y):
            _forward_kernel[(len(rows) * triton.cdiv(F, block),)](rows, y, rows.stride(0), F, block, num_warps=WARPS)
    return y


@torch.library.custom_op("nanotrain::swiglu_backward", mutates_args=())
def swiglu_backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    rows, dy_rows, F = as_rows(gate_up), as_rows(dy), dy.shape[-1]
    d_gate_up = gate_up.new_empty(gate_up.shape)
    block = min(MAX_BLOCK, triton.next_power_of_2(F))
    if dy.numel():
        with torch.cuda.device_of(dy):
            _backward_kernel[(len(rows) * triton.cdiv(F, block),)](
                rows, dy_rows, d_gate_up, rows.stride(0), dy_rows.stride(0), F, block, num_warps=WARPS
            )
    return d_gate_up


@swiglu_forward.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@swiglu_backward.register_fake
def _(gate_up: Tensor, dy: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _keep_input(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    return swiglu_backward(*ctx.saved_tensors, dy)


swiglu_forward.register_autograd(_backward, setup_context=_keep_input)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, computed in float32: gate_up (..., 2F), gate first -> (..., F) in its dtype.

    Raises ValueError for a wrong shape, dtype or device.
    """
    check_devices(gate_up=gate_up)
    check_dtypes(gate_up=gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2 or gate_up.shape[-1] == 0:
        raise ValueError(f"gate_up: expected a last axis of even length, gate and up, got shape {tuple(gate_up.shape)}")
    return swiglu_forward(gate_up)
