"""Cross-entropy over the vocabulary: the logits pass once, and their gradient takes their place.

    loss = log(sum(exp(x))) - x[target];  d_loss/d_x = exp(x) / sum(exp(x)) - [column == target];  both 0 where target is -1

One program a row. Each of its lanes keeps a maximum and a sum of exponentials relative to it, and nothing is exchanged between
lanes before the end of the row (Milakov and Gimelshein 2018, section 3). A second loop finds the row in the caches, reads it from
its end, which was seen last, and writes the gradient over it.

`linear_cross_entropy` holds a chunk of the logits at a time: their gradient is taken back through the head at once.

Legend: N rows (tokens), V vocabulary, C width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import check_devices, check_dtypes
from kernels.reference import Reduction

LOG2_E = tl.constexpr(1.4426950408889634)  # the hardware has powers of two: exp(x) = 2^(x log2(e))
LN_2 = tl.constexpr(0.6931471805599453)
CHUNK_BYTES = 2**31  # of logits: larger chunks gain nothing
LOWEST = tl.constexpr(-1e38)  # the maximum of nothing yet; finite, because inf - inf is not a number


@triton.jit
def _row_kernel(
    logits,
    targets,
    losses,
    divisor,  # float32 scalar: of the losses and, but in float16, of the gradient
    V,
    GRADIENT: tl.constexpr,  # or leave the logits as they are
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    BLOCK: tl.constexpr = UNROLL * LANES * WIDTH
    row = tl.program_id(0).to(tl.int64)  # a large tensor has more than 2^31 elements
    logits += row * V
    target = tl.load(targets + row)
    # A lane reads WIDTH neighbours, 16 bytes, UNROLL times; the same in both loops, so that none overwrites what another reads.
    column = tl.arange(0, LANES)[:, None, None] * WIDTH + tl.arange(0, UNROLL)[None, :, None] * (LANES * WIDTH)
    column += tl.arange(0, WIDTH)[None, None, :]  # (LANES, UNROLL, WIDTH)
    if target == -1:
        tl.store(losses + row, 0 / tl.load(divisor))  # NaN where there is no target at all
        if GRADIENT:
            for first in range(0, V, BLOCK):
                tl.store(logits + first + column, tl.zeros((LANES, UNROLL, WIDTH), logits.dtype.element_ty), first + column < V)
    else:
        top = tl.full((LANES,), LOWEST, tl.float32)
        total = tl.zeros((LANES,), tl.float32)  # sum of exp(x - top)
        for first in range(0, V, BLOCK):
            x = tl.load(logits + first + column, first + column < V, -float("inf"), eviction_policy="evict_last").to(tl.float32)
            new_top = tl.maximum(top, tl.max(tl.max(x, 2), 1))
            power = tl.exp2((x - new_top[:, None, None]) * LOG2_E)
            total = total * tl.exp2((top - new_top) * LOG2_E) + tl.sum(tl.sum(power, 2), 1)
            top = new_top
        # A target outside the vocabulary makes the loss and its gradient NaN, which training notices. All warps have read its
        # logit before they meet in the sums below, behind which one of them writes over it.
        valid = (target >= 0) & (target < V)
        x_target = tl.load(logits + target, valid, float("nan")).to(tl.float32)
        row_top = tl.max(top, 0)
        row_total = tl.sum(total * tl.exp2((top - row_top) * LOG2_E), 0)
        factor = 1 / tl.load(divisor)
        tl.store(losses + row, (row_top + tl.log2(row_total) * LN_2 - x_target) * factor)
        if GRADIENT:
            if logits.dtype.element_ty == tl.float16:
                factor = 1.0
            share = tl.where(valid, factor / row_total, float("nan"))
            for k in range(0, tl.cdiv(V, BLOCK)):
                at = (tl.cdiv(V, BLOCK) - 1 - k) * BLOCK + column
                x = tl.load(logits + at, at < V, 0.0, eviction_policy="evict_first").to(tl.float32)
                gradient = tl.exp2((x - row_top) * LOG2_E) * share
                tl.store(logits + at, gradient.to(logits.dtype.element_ty), at < V, eviction_policy="evict_first")
            tl.debug_barrier()  # the target's element is written again, after whichever lane wrote it first
            gradient = tl.exp2((x_target - row_top) * LOG2_E) * share - factor
            tl.store(logits + target, gradient.to(logits.dtype.element_ty), valid)


@triton.jit
def _scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    """x *= factor, and nothing at all where the factor is 1: the host need not know it, and 1 is the usual case."""
    value = tl.load(factor)
    if value != 1.0:
        for first in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
            i = first + tl.arange(0, BLOCK)
            tl.store(x + i, (tl.load(x + i, i < n).to(tl.float32) * value).to(x.dtype.element_ty), i < n)


def _launch_rows(logits: Tensor, targets: Tensor, divisor: Tensor, with_gradient: bool) -> Tensor:
    N, V = logits.shape
    losses = logits.new_empty(N, dtype=torch.float32)
    width = 16 // logits.element_size()
    # With 32 registers a thread a multiprocessor holds four rows of 16 warps or two of 32; four wide ones outgrow the L2 cache.
    warps = max(1, min(16 if V <= 32_768 else 32, triton.next_power_of_2(V) // (64 * width)))
    if N:
        with torch.cuda.device_of(logits):
            _row_kernel[(N,)](
                logits, targets, losses, divisor, V, with_gradient, 2, 32 * warps, width, num_warps=warps, maxnreg=32
            )
    return losses


@torch.library.custom_op("nanotrain::row_losses", mutates_args=())
def row_losses(logits: Tensor, targets: Tensor, divisor: Tensor) -> Tensor:
    """logits (N, V), contiguous, targets (N,) int64, divisor a float32 scalar -> each row's loss / divisor, (N,) float32."""
    return _launch_rows(logits, targets, divisor, False)


@torch.library.custom_op("nanotrain::row_losses_and_gradient_", mutates_args=("logits",))
def row_losses_and_gradient_(logits: Tensor, targets: Tensor, divisor: Tensor) -> Tensor:
    """The same, and the gradient of the results' sum takes the place of the logits; in float16 without the divisor."""
    return _launch_rows(logits, targets, divisor, True)


@torch.library.custom_op("nanotrain::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a float32 scalar on the device; x contiguous."""
    if x.numel():
        with torch.cuda.device_of(x):
            _scale_kernel[(min(triton.cdiv(x.numel(), 4096), 2048),)](x, factor, x.numel(), 4096, num_warps=8)


@torch.library.custom_op("nanotrain::linear_cross_entropy", mutates_args=())
def linear_row_losses(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C), weight (V, C), targets (N,) -> sum of the losses, and its gradients by x (in x's dtype) and by weight (float32).

    The gradients are empty unless asked for.
    """
    loss, dx, dw = _outputs_of_linear(x, weight, targets, chunk_rows, with_gradient)
    weight = weight.to(x.dtype)
    loss.zero_()
    one = torch.ones_like(loss)  # the mean's divisor joins the gradient from above: exact in every dtype
    for first in range(0, len(x), chunk_rows):
        rows = slice(first, first + chunk_rows)
        logits = x[rows] @ weight.t()  # (chunk, V)
        loss += _launch_rows(logits, targets[rows], one, with_gradient).sum()
        if with_gradient:  # logits are their own gradient now
            torch.mm(logits, weight, out=dx[rows])
            _add_product(dw, logits.t(), x[rows], first == 0)
        del logits  # before the next chunk's are there
    return loss, dx, dw


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total += a @ b in float32, whatever a and b are; total = a @ b the first time, when it has no values yet."""
    if a.is_cuda and a.dtype != torch.float32:
        if is_first:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), beta=0 if is_first else 1, out=total)


@row_losses.register_fake
def _(logits: Tensor, targets: Tensor, divisor: Tensor) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


@row_losses_and_gradient_.register_fake
def _(logits: Tensor, targets: Tensor, divisor: Tensor) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


def _outputs_of_linear(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if with_gradient else 0)
    dw = x.new_empty(weight.shape if with_gradient else 0, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), dx, dw


@linear_row_losses.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    _announce_to_compiler()
    return _outputs_of_linear(x, weight, targets, chunk_rows, with_gradient)


@functools.cache
def _announce_to_compiler() -> None:
    """Tell the compiler that the operator is not to be decomposed.

    Left to find that out, torch 2.11 prints its inputs for a message, each with its own inputs in full: at the end of a model
    with residual branches, hours of text.
    """
    from torch._inductor.lowering import fallbacks, make_fallback

    operator = torch.ops.nanotrain.linear_cross_entropy.default
    if operator not in fallbacks:
        make_fallback(operator, warn=False)


def _keep_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.weight_dtype = inputs[1].dtype


def _scale_gradients(ctx: Any, grad: Tensor, _dx: Tensor, _dw: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw = ctx.saved_tensors
    return dx * grad, (dw * grad).to(ctx.weight_dtype), None, None, None


linear_row_losses.register_autograd(_scale_gradients, setup_context=_keep_gradients)


class _InPlace(torch.autograd.Function):
    """Sum of the losses / divisor; an autograd.Function because register_autograd refuses operators that mutate."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, divisor: Tensor) -> Tensor:
        losses = row_losses_and_gradient_(logits, targets, divisor)
        ctx.save_for_backward(logits, divisor)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, divisor = ctx.saved_tensors
        if gradient.dtype == torch.float16:  # which has no digits for 1/N of a small probability before the loss scale joins it
            grad = grad / divisor
        if torch.compiler.is_compiling():  # the compiler would copy what the forward pass left and then scale the copy in place
            return gradient * grad, None, None
        scale_(gradient, grad)
        return gradient.detach(), None, None


def cross_entropy(logits: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
    """The loss over the targets that are not -1, as a float32 scalar: logits (..., V), targets (...) int64 -> ().

    Where a gradient is wanted the logits are overwritten with it: nothing else may read them afterwards. The mean over no target
    at all is NaN. Raises ValueError for inputs of a wrong shape, dtype or device.
    """
    _check({"logits": logits}, targets, reduction)
    V = logits.shape[-1]
    logits, targets = logits.reshape(-1, V).contiguous(), targets.flatten()
    divisor = _divisor(targets, reduction)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _InPlace.apply(logits, targets, divisor)
    return row_losses(logits, targets, divisor).sum()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: Reduction = "mean", chunk_rows: int = 0
) -> Tensor:
    """cross_entropy(x @ weight^T, targets): x (..., C), weight (V, C), targets (...) int64 -> float32 scalar.

    Holds `chunk_rows` rows of logits at a time, in x's dtype or autocast's; 0 takes equal chunks of up to 2 GiB. Where a gradient
    is wanted it is computed at once and held instead: by x, and by weight in float32, which each chunk reads and writes, so few
    chunks are quicker and many smaller. Raises ValueError for inputs of a wrong shape, dtype or device.
    """
    _check({"x": x, "weight": weight}, targets, reduction)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected shape (V, {x.shape[-1]}), got {tuple(weight.shape)}")
    if chunk_rows < 0:
        raise ValueError(f"chunk_rows: expected at least 0, got {chunk_rows}")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    x, targets = x.reshape(-1, x.shape[-1]), targets.flatten()
    if chunk_rows == 0:
        chunks = max(1, triton.cdiv(len(x) * len(weight) * x.element_size(), CHUNK_BYTES))
        chunk_rows = max(1, triton.cdiv(len(x), chunks))
    with_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss, _, _ = linear_row_losses(x, weight, targets, chunk_rows, with_gradient)
    return loss / _divisor(targets, reduction)


def _divisor(targets: Tensor, reduction: str) -> Tensor:
    """What the sum of the losses is divided by: float32 scalar on the device."""
    if reduction == "sum":
        return torch.ones((), device=targets.device)
    return (targets != -1).sum(dtype=torch.float32)


def _check(inputs: dict[str, Tensor], targets: Tensor, reduction: str) -> None:
    """Raises ValueError naming what the kernel cannot take."""
    shape = next(iter(inputs.values())).shape[:-1]
    check_devices(**inputs, targets=targets)
    check_dtypes(**inputs)
    for name, tensor in inputs.items():
        if tensor.ndim == 0 or tensor.shape[-1] == 0:
            raise ValueError(f"{name}: expected a last axis that is not empty, got shape {tuple(tensor.shape)}")
    if targets.dtype != torch.int64 or targets.shape != shape:
        raise ValueError(f"targets: expected int64 of shape {tuple(shape)}, got {targets.dtype} {tuple(targets.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
