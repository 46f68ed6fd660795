"""GELU: y = x Phi(x), where Phi is the normal distribution, or with OpenAI's tanh in its place.

Both are written by their tail Q(a) = 1 - Phi(a) = Phi(-a) for a = |x|, which keeps its digits where Phi itself is nearly 1:

    forward   y = max(x, 0) - a Q(a): reads x, writes y
    backward  dx = dy g for x <= 0 and dy (1 - g) for x > 0, with g = Q(a) + a Q'(a): reads x and dy, writes dx. Only x is kept.

    exact     Q(a) = 2^P(a),  Q'(a) = -exp(-a^2 / 2) / sqrt(2 pi)
    tanh      Q(a) = sigmoid(-s(a)),  Q'(a) = -s'(a) Q(a) (1 - Q(a)),  s(a) = sqrt(8 / pi) (a + 0.044715 a^3)

P is a polynomial, our minimax fit of log2 Q on [0, 6]: its Q is wrong by 4e-6 of itself at the most, y and y' by 1e-8. Beyond,
P falls for ever, and with it a Q(a), from 6e-9. The erf of CUDA's library, which has two branches, takes more instructions than
memory leaves time for; this takes 17 an element forwards and 25 backwards.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import check_devices, check_dtypes

BLOCK = 2048
WARPS = 4  # 16 elements a thread
# Of P, from the coefficient of a^10 down to the constant, which makes Q(0) 1/2.
HIGH = (-2.5870254e-8, 7.877608e-7, -1.0252629e-5, 7.2526103e-5, -2.6675034e-4)
LOW = (-2.584073e-5, 6.9775073e-3, -5.246118e-2, -0.4592147, -1.1511048, -1.0)
P = tl.constexpr(HIGH + LOW)
LOG2_E = tl.constexpr(math.log2(math.e))  # exp2 is the instruction that there is
DENSITY_AT_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))
SLOPE, CUBE = tl.constexpr(math.sqrt(8 / math.pi)), tl.constexpr(0.044715)


@triton.jit
def _tail(a, TANH: tl.constexpr):
    """(Q(a), -Q'(a)); what is not used is not computed."""
    if TANH:
        q = 1 / (1 + tl.exp2(a * (SLOPE * LOG2_E) * (1 + a * a * CUBE)))
        density = q * (1 - q) * SLOPE * (1 + a * a * (3 * CUBE))
    else:
        p = P[0]
        for i in tl.static_range(1, 11):
            p = p * a + P[i]
        q = tl.exp2(p)
        density = tl.exp2(a * a * (-0.5 * LOG2_E)) * DENSITY_AT_0
    return q, density


@triton.jit
def _forward_kernel(x, y, N, TANH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # a large tensor has more than 2^31 elements
    z = tl.load(x + i, i < N).to(tl.float32)
    a = tl.abs(z)
    q, _ = _tail(a, TANH)
    tl.store(y + i, (tl.maximum(z, 0.0) - a * q).to(y.dtype.element_ty), i < N)


@triton.jit
def _backward_kernel(x, dy, dx, N, TANH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + i, i < N).to(tl.float32)
    dy = tl.load(dy + i, i < N).to(tl.float32)
    a = tl.abs(z)
    q, density = _tail(a, TANH)
    g = q - a * density
    tl.store(dx + i, (dy * tl.where(z > 0, 1 - g, g)).to(dx.dtype.element_ty), i < N)


@torch.library.custom_op("nanotrain::gelu", mutates_args=())
def gelu_forward(x: Tensor, tanh: bool) -> Tensor:
    y, N = x.new_empty(x.shape), x.numel()
    if N:
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(N, BLOCK),)](x.contiguous(), y, N, tanh, BLOCK, num_warps=WARPS)
    return y


@torch.library.custom_op("nanotrain::gelu_backward", mutates_args=())
def gelu_backward(x: Tensor, dy: Tensor, tanh: bool) -> Tensor:
    dx, N = x.new_empty(x.shape), x.numel()
    if N:
        with torch.cuda.device_of(x):
            _backward_kernel[(triton.cdiv(N, BLOCK),)](x.contiguous(), dy.contiguous(), dx, N, tanh, BLOCK, num_warps=WARPS)
    return dx


@gelu_forward.register_fake
def _(x: Tensor, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


@gelu_backward.register_fake
def _(x: Tensor, dy: Tensor, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep_input(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    x, ctx.tanh = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return gelu_backward(*ctx.saved_tensors, dy, ctx.tanh), None


gelu_forward.register_autograd(_backward, setup_context=_keep_input)


def gelu(x: Tensor, tanh: bool = False) -> Tensor:
    """x Phi(x), or its approximation by tanh, computed in float32: x of any shape -> the same, in its dtype.

    Raises ValueError for a wrong dtype or device.
    """
    check_devices(x=x)
    check_dtypes(x=x)
    return gelu_forward(x, tanh)


def gelu_tanh(x: Tensor) -> Tensor:
    """`gelu` by tanh."""
    return gelu(x, tanh=True)
