"""Rotary positions: each pair (a, b) = (x[i], x[i + D/2]) of a head turns by its position's angle.

    forward   (a, b) -> (a cos - b sin, b cos + a sin)
    backward  the same with -sin: the inverse of a rotation is its transpose

`rope_qkv_` turns queries and keys where they lie in the fused projection, and its backward pass writes the gradients of query,
key and value straight into one fused gradient, turned back: no concatenation. `rope` makes new tensors, for queries and keys that
were normalized and lie in tensors of their own. One program a token, whose angles it loads once.

Legend: B batch, T time, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import check_devices, check_dtypes

MAX_HEADS = 16  # that a program holds at a time
WARPS = 4


@triton.jit
def _rotate(x, out, x_stride, out_stride, cos, sin, i, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The heads of one token; cos, sin and i (columns of a head's half): (1, power of two)."""
    for first in tl.static_range(0, HEADS, BLOCK):
        head = first + tl.arange(0, BLOCK)[:, None]  # (BLOCK, 1)
        inside = (head < HEADS) & (i < HALF)
        a = tl.load(x + head * x_stride + i, inside).to(tl.float32)
        b = tl.load(x + head * x_stride + i + HALF, inside).to(tl.float32)
        tl.store(out + head * out_stride + i, (a * cos - b * sin).to(out.dtype.element_ty), inside)
        tl.store(out + head * out_stride + i + HALF, (b * cos + a * sin).to(out.dtype.element_ty), inside)


@triton.jit
def _kernel(
    q, k, v,  # k and v may be None
    q_out, k_out, v_out,
    cos, sin,
    q_stride, k_stride, v_stride,  # of batch, time and head
    q_out_stride, k_out_stride, v_out_stride,
    T,
    INVERSE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # a large tensor has more than 2^31 elements
    b, t = token // T, token % T
    i = tl.arange(0, COLUMNS)[None, :]  # (1, COLUMNS)
    c = tl.load(cos + t * HALF + i, i < HALF)
    s = tl.load(sin + t * HALF + i, i < HALF)
    if INVERSE:
        s = -s
    _rotate(
        q + b * q_stride[0] + t * q_stride[1], q_out + b * q_out_stride[0] + t * q_out_stride[1],
        q_stride[2], q_out_stride[2], c, s, i, H, HALF, BLOCK,
    )  # fmt: skip
    if k is not None:
        _rotate(
            k + b * k_stride[0] + t * k_stride[1], k_out + b * k_out_stride[0] + t * k_out_stride[1],
            k_stride[2], k_out_stride[2], c, s, i, K, HALF, BLOCK,
        )  # fmt: skip
    if v is not None:
        _rotate(
            v + b * v_stride[0] + t * v_stride[1], v_out + b * v_out_stride[0] + t * v_out_stride[1],
            v_stride[2], v_out_stride[2], 1.0, 0.0, i, K, HALF, BLOCK,
        )  # fmt: skip


Triple = tuple[Tensor | None, Tensor | None, Tensor | None]


def _launch(inputs: Triple, outputs: Triple, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """Turn query and key into the outputs and copy value; each (B, T, heads, D), their last axis without gaps, or None."""
    q, k, _ = inputs
    B, T, H, D = q.shape
    K = 0 if k is None else k.shape[2]
    block = min(MAX_HEADS, triton.next_power_of_2(H))
    strides = [(0, 0, 0) if x is None else x.stride()[:3] for x in (*inputs, *outputs)]
    if B * T:
        with torch.cuda.device_of(q):
            _kernel[(B * T,)](
                *inputs, *outputs, cos, sin, *strides, T, inverse, H, K, D // 2, triton.next_power_of_2(D // 2), block,
                num_warps=WARPS,
            )  # fmt: skip


def _without_gaps(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


@torch.library.custom_op("nanotrain::rope", mutates_args=())
def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """New tensors of q (B, T, H, D) and k (B, T, K, D) turned by the angle of their position, or back."""
    outputs = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch((_without_gaps(q), _without_gaps(k), None), (*outputs, None), cos, sin, inverse)
    return outputs


@torch.library.custom_op("nanotrain::rope_qkv_", mutates_args=("qkv",))
def rotate_(qkv: Tensor, n_rotated: int, cos: Tensor, sin: Tensor) -> None:
    """Turn the first heads of qkv (B, T, heads, D) where they are."""
    heads = (qkv[:, :, :n_rotated], None, None)
    _launch(heads, heads, cos, sin, False)


@torch.library.custom_op("nanotrain::rope_qkv_backward", mutates_args=())
def fused_gradient(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """dq (B, T, H, D), dk and dv (B, T, K, D) -> the gradient of what rope_qkv_ was given, (B, T, H + 2K, D)."""
    B, T, H, D = dq.shape
    K = dk.shape[2]
    fused = dq.new_empty(B, T, H + 2 * K, D)
    inputs = (_without_gaps(dq), _without_gaps(dk), _without_gaps(dv))
    _launch(inputs, fused.split((H, K, K), dim=2), cos, sin, True)
    return fused


@rotated.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@fused_gradient.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return dq.new_empty(*dq.shape[:2], dq.shape[2] + 2 * dk.shape[2], dq.shape[3])


def _keep_angles(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.inverse = inputs[4]


def _turn_back(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *rotated(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None


rotated.register_autograd(_turn_back, setup_context=_keep_angles)


class _InPlace(torch.autograd.Function):
    """An autograd.Function because register_autograd refuses operators that mutate."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: tuple[int, int, int], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        rotate_(qkv, heads[0] + heads[1], cos, sin)
        return qkv.split(heads, dim=2)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return fused_gradient(dq, dk, dv, *ctx.saved_tensors), None, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k (B, T, K, D), cos and sin (T, D/2) float32 -> q and k rotated, in their dtypes.

    Raises ValueError for inputs of a wrong shape, dtype or device.
    """
    _check({"q": q, "k": k}, cos, sin)
    if k.dtype != q.dtype or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(f"k: expected {q.dtype} and B, T and D of q, {tuple(q.shape)}, got {k.dtype} {tuple(k.shape)}")
    return rotated(q, k, cos.contiguous(), sin.contiguous(), False)


def rope_qkv_(qkv: Tensor, n_head: int, n_kv_head: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv (B, T, H + 2K, D) into q (B, T, H, D), k and v (B, T, K, D), after turning q and k where they lie.

    The three are views of qkv, which nothing else may read afterwards. cos and sin (T, D/2) float32. Raises ValueError for inputs
    of a wrong shape, dtype or device, or heads with gaps.
    """
    _check({"qkv": qkv}, cos, sin)
    if qkv.shape[2] != n_head + 2 * n_kv_head or qkv.stride(3) != 1:
        raise ValueError(
            f"qkv: expected shape (B, T, {n_head} + 2 x {n_kv_head}, D), the last axis without gaps, "
            f"got {tuple(qkv.shape)} with strides {qkv.stride()}"
        )
    return _InPlace.apply(qkv, (n_head, n_kv_head, n_kv_head), cos.contiguous(), sin.contiguous())


def _check(inputs: dict[str, Tensor], cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError naming what the kernel cannot take."""
    check_devices(**inputs, cos=cos, sin=sin)
    check_dtypes(**inputs)
    for name, x in inputs.items():
        if x.ndim != 4 or x.shape[3] % 2 or 0 in x.shape[2:]:
            raise ValueError(f"{name}: expected shape (B, T, heads, D) with an even D, got {tuple(x.shape)}")
        for angle_name, angle in (("cos", cos), ("sin", sin)):
            if angle.dtype != torch.float32 or angle.shape != (x.shape[1], x.shape[3] // 2):
                expected = (x.shape[1], x.shape[3] // 2)
                raise ValueError(f"{angle_name}: expected float32 of shape {expected}, got {angle.dtype} {tuple(angle.shape)}")
