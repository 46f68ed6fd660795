"""What rms_norm.py and layer_norm.py share: one Triton kernel forwards, one backwards, and one that adds up weight gradients.

With s = x (+ residual), m = mean(s) (0 for RMSNorm), r = 1 / sqrt(mean((s - m)^2) + eps), z = (s - m) r, all in float32:

    forward   y = weight z (+ bias)
    backward  g = weight dy;  ds = r (g - z mean(g z) - mean(g)) (+ d_sum), without mean(g) for RMSNorm
              d_weight = sum of dy z over the rows, d_bias = sum of dy over the rows

Memory traffic is all that they cost, so each tensor passes once. A row is two blocks of columns, each a power of two as Triton
wants it, the first one full: 2,304 = 2,048 + 256, where one block under a mask would idle 1,792 of 4,096 lanes. Forwards a
narrow row belongs to one warp, which adds it up without a barrier: Triton spreads the last dimension of a tile over the lanes
first and then, before the middle one, the first over the warps, so that a block of (R, N, K) with K columns for 32 lanes gives
every lane 16 bytes of each of the N chunks. Backwards a program walks over every P-th tile, keeps its part of the weight
gradients in registers and writes it once; `_sum_partials` adds the parts in a fixed order. So two runs on the same GPU agree
bit for bit. Beyond 8,192 columns a row with its gradients no longer fits into the registers: right, but slower.

Legend: M rows, C columns of a row, A and B columns of its two blocks, K of a chunk of them, N chunks, R rows of a tile,
P programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import as_rows, check_devices, check_dtypes

MAX_WIDTH = 65_536
NARROW = 1280  # columns, up to which a warp of the forward kernel has a whole row
SUM_ROWS, SUM_COLUMNS = 32, 16  # of the tiles in which partial sums are added up


@triton.jit
def _row_sum(a, b):
    """(R, N, K) of each block -> (R, 1, 1). Where the K are the same, the lanes exchange one sum for both."""
    a, b = tl.sum(a, 1, keep_dims=True), tl.sum(b, 1, keep_dims=True)  # (R, 1, K)
    if a.shape[2] == b.shape[2]:
        total = tl.sum(a + b, 2, keep_dims=True)
    else:
        total = tl.sum(a, 2, keep_dims=True) + tl.sum(b, 2, keep_dims=True)
    return total


@triton.jit
def _forward(
    x,
    residual,  # None without the addition
    weight,
    bias,  # None without one
    total,
    y,
    mean,
    rstd,
    M,
    x_stride,
    residual_stride,
    eps,
    RMS: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
):
    KA: tl.constexpr = min(A, K)
    KB: tl.constexpr = min(B, K)
    # As large as the row's tiles, so that they get the same layout.
    a = tl.arange(0, A // KA)[None, :, None] * KA + tl.arange(0, KA)[None, None, :]
    b = tl.arange(0, B // KB)[None, :, None] * KB + tl.arange(0, KB)[None, None, :] + A
    a, b = tl.broadcast_to(a, (R, A // KA, KA)), tl.broadcast_to(b, (R, B // KB, KB))
    # Asked for before the row, not where it is needed: behind the sums nothing would hide its latency. The assembler moves loads
    # there all the same, to save registers, but not across a barrier. One warp with a wide row needs those registers.
    weight_a = tl.load(weight + a).to(tl.float32)
    weight_b = tl.load(weight + b, b < C, 0.0).to(tl.float32)
    if R > 1:
        tl.debug_barrier()
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None, None]  # (R, 1, 1)
    in_a = row < M
    in_b = in_a & (b < C)
    row = row.to(tl.int64)  # a large tensor has more than 2^31 elements
    s_a = tl.load(x + row * x_stride + a, in_a, 0.0)  # (R, A / KA, KA)
    s_b = tl.load(x + row * x_stride + b, in_b, 0.0)  # (R, B / KB, KB)
    if residual is not None:
        s_a = (s_a.to(tl.float32) + tl.load(residual + row * residual_stride + a, in_a, 0.0).to(tl.float32)).to(s_a.dtype)
        s_b = (s_b.to(tl.float32) + tl.load(residual + row * residual_stride + b, in_b, 0.0).to(tl.float32)).to(s_b.dtype)
        tl.store(total + row * C + a, s_a, in_a)
        tl.store(total + row * C + b, s_b, in_b)
    z_a, z_b = s_a.to(tl.float32), s_b.to(tl.float32)
    if not RMS:
        m = _row_sum(z_a, z_b) / C  # (R, 1, 1)
        z_a, z_b = z_a - m, tl.where(in_b, z_b - m, 0.0)
    r = tl.rsqrt(_row_sum(z_a * z_a, z_b * z_b) / C + eps)  # (R, 1, 1)
    y_a, y_b = z_a * r * weight_a, z_b * r * weight_b
    if bias is not None:
        y_a += tl.load(bias + a).to(tl.float32)
        y_b += tl.load(bias + b, b < C, 0.0).to(tl.float32)
    tl.store(y + row * C + a, y_a.to(s_a.dtype), in_a)
    tl.store(y + row * C + b, y_b.to(s_b.dtype), in_b)
    if not RMS:
        tl.store(mean + row, m, in_a)
    tl.store(rstd + row, r, in_a)


@triton.jit
def _load_rows(rows, a, b, in_a, in_b):
    """Both blocks of the rows at these addresses, in float32: (R, A), (R, B)."""
    return tl.load(rows + a, in_a, 0.0).to(tl.float32), tl.load(rows + b, in_b, 0.0).to(tl.float32)


@triton.jit
def _row_gradient(g_a, g_b, z_a, z_b, r, RMS: tl.constexpr, C: tl.constexpr):
    """r (g - z mean(g z) - mean(g)), without mean(g) for RMSNorm: (R, A), (R, B)."""
    if RMS:
        gz = (tl.sum(g_a * z_a, 1, keep_dims=True) + tl.sum(g_b * z_b, 1, keep_dims=True)) / C  # (R, 1)
        ds_a, ds_b = g_a - z_a * gz, g_b - z_b * gz
    else:
        both = (tl.sum(tl.join(g_a, g_a * z_a), 1) + tl.sum(tl.join(g_b, g_b * z_b), 1)) / C  # (R, 2): one pass for two sums
        g, gz = tl.split(both)
        ds_a, ds_b = g_a - z_a * gz[:, None] - g[:, None], g_b - z_b * gz[:, None] - g[:, None]
    return ds_a * r, ds_b * r


@triton.jit
def _store_partial(partials, a, b, sum_a, sum_b, C: tl.constexpr):
    """What the program has summed, (R, A) and (R, B), becomes its row of the partial sums."""
    partial = partials + tl.program_id(0) * C
    tl.store(partial + a, tl.sum(sum_a, 0, keep_dims=True))
    tl.store(partial + b, tl.sum(sum_b, 0, keep_dims=True), b < C)


@triton.jit
def _backward(
    dy,
    d_total,  # None where there was no addition, or nothing but the norm used its result
    s,
    weight,
    mean,
    rstd,
    ds,
    weight_partials,  # (P, C) float32
    bias_partials,  # the same, None without a bias
    M,
    dy_stride,
    d_total_stride,
    s_stride,
    RMS: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
    AHEAD: tl.constexpr,
):
    a, b = tl.arange(0, A)[None, :], A + tl.arange(0, B)[None, :]  # (1, A), (1, B)
    weight_a = tl.load(weight + a).to(tl.float32)
    weight_b = tl.load(weight + b, b < C, 0.0).to(tl.float32)
    d_weight_a, d_weight_b = tl.zeros((R, A), tl.float32), tl.zeros((R, B), tl.float32)
    d_bias_a, d_bias_b = d_weight_a, d_weight_b
    for first in tl.range(tl.program_id(0) * R, M, tl.num_programs(0) * R, num_stages=1 + AHEAD):
        row = first + tl.arange(0, R)[:, None]  # (R, 1)
        in_a = row < M
        in_b = in_a & (b < C)
        r = tl.load(rstd + first + tl.arange(0, R), first + tl.arange(0, R) < M, 0.0)[:, None]  # (R, 1)
        row = row.to(tl.int64)  # a large tensor has more than 2^31 elements
        z_a, z_b = _load_rows(s + row * s_stride, a, b, in_a, in_b)
        dy_a, dy_b = _load_rows(dy + row * dy_stride, a, b, in_a, in_b)
        if d_total is not None:  # asked for with the others, long before it is needed
            d_total_a, d_total_b = _load_rows(d_total + row * d_total_stride, a, b, in_a, in_b)
        if RMS:
            z_a, z_b = z_a * r, z_b * r
        else:
            m = tl.load(mean + first + tl.arange(0, R), first + tl.arange(0, R) < M, 0.0)[:, None]
            z_a, z_b = (z_a - m) * r, (z_b - m) * r  # beyond the last column it is not 0, but dy is
        d_weight_a += dy_a * z_a
        d_weight_b += dy_b * z_b
        if bias_partials is not None:
            d_bias_a += dy_a
            d_bias_b += dy_b
        ds_a, ds_b = _row_gradient(dy_a * weight_a, dy_b * weight_b, z_a, z_b, r, RMS, C)
        if d_total is not None:
            ds_a, ds_b = ds_a + d_total_a, ds_b + d_total_b
        tl.store(ds + row * C + a, ds_a.to(ds.dtype.element_ty), in_a)
        tl.store(ds + row * C + b, ds_b.to(ds.dtype.element_ty), in_b)
    _store_partial(weight_partials, a, b, d_weight_a, d_weight_b, C)
    if bias_partials is not None:
        _store_partial(bias_partials, a, b, d_bias_a, d_bias_b, C)


@triton.jit
def _sum_partials(
    weight_partials, bias_partials, d_weight, d_bias, P, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program a few columns: (P, C) -> (C,)."""
    partials, out = weight_partials, d_weight
    if bias_partials is not None and tl.program_id(1) == 1:
        partials, out = bias_partials, d_bias
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # (1, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, P, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
        total += tl.load(partials + row * C + column, (row < P) & (column < C), 0.0)
    tl.store(out + column, tl.sum(total, 0, keep_dims=True).to(out.dtype.element_ty), column < C)


class ForwardPlan(NamedTuple):
    """How the forward kernel is laid over the device."""

    first: int  # columns of a row's two blocks
    second: int
    chunk: int  # columns, no more than the first block's
    rows: int  # of a tile
    warps: int
    programs: int


class BackwardPlan(NamedTuple):
    """How the backward kernel is."""

    rows: int  # of a tile
    warps: int
    programs: int
    ahead: int  # tiles that a program loads ahead of the one at work


def blocks(width: int) -> tuple[int, int]:
    """The columns of a row's two blocks, powers of two: the largest one below the width (1 for 1), and what covers the rest."""
    first = 1 << max(0, (width - 1).bit_length() - 1)
    return first, triton.next_power_of_2(max(1, width - first))


def tile_rows(width: int) -> int:
    """A tile has up to 1,024 elements, or is one row."""
    return max(1, 1024 // triton.next_power_of_2(width))


def warps_for(width: int, columns_per_warp: int) -> int:
    return min(32, triton.next_power_of_2(triton.cdiv(width, columns_per_warp)))


def forward_plan(n_rows: int, width: int, element_bytes: int, one_pass: bool) -> ForwardPlan:
    """One tile a program.

    A narrow row belongs to one warp of four, or to a part of one. Where a wider one is added up twice (LayerNorm), or what it
    gives is written twice, one warp has up to 2,304 columns and waits at no barrier; RMSNorm alone, `one_pass`, is quicker with
    more loads under way.
    """
    first, second = blocks(width)
    if width <= NARROW:
        chunk = min(512 // element_bytes, first)  # 16 bytes for each of 32 lanes
        rows = 4 * 512 // (chunk * element_bytes)
        return ForwardPlan(first, max(second, chunk), chunk, rows, 4, triton.cdiv(n_rows, rows))
    warps = 1 if width <= 2304 and not one_pass else warps_for(width, 1024)
    return ForwardPlan(first, second, first, 1, warps, n_rows)


def backward_plan(s: Tensor, n_rows: int) -> BackwardPlan:
    """Few programs, because each one writes partial sums: tiles that are loaded ahead hide the memory's latency instead.

    A multiprocessor works on 16 KiB of each tensor, up to 5 tiles, while 32 KiB of each (of three, where fused) are on the way.
    """
    width = s.shape[-1]
    rows = tile_rows(width)
    tile_bytes = rows * sum(blocks(width)) * s.element_size()
    multiprocessors = torch.cuda.get_device_properties(s.device).multi_processor_count if s.is_cuda else 1
    resident = min(5, max(1, 16_384 // tile_bytes))
    ahead = min(3, 32_768 // (resident * tile_bytes))
    return BackwardPlan(rows, warps_for(width, 1024), min(multiprocessors * resident, triton.cdiv(n_rows, rows)), ahead)


@torch.library.custom_op("nanotrain::row_norm", mutates_args=())
def row_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and residual (..., C) -> x + residual and its norm, (..., C) each, mean and 1/deviation of each row, (M,) float32 each.

    The sum is empty without a residual, the mean with `rms`.
    """
    total, y, mean, rstd = row_norm_outputs(x, residual, weight, bias, eps, rms)
    rows = as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    plan = forward_plan(len(rows), x.shape[-1], x.element_size(), rms and residual is None)
    if len(rows):
        with torch.cuda.device_of(x):
            _forward[(plan.programs,)](
                rows, residual_rows, weight.contiguous(), None if bias is None else bias.contiguous(), total, y, mean, rstd,
                len(rows), rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), eps,
                rms, x.shape[-1], plan.first, plan.second, plan.chunk, plan.rows, num_warps=plan.warps,
            )  # fmt: skip
    return total, y, mean, rstd


@row_norm.register_fake
def row_norm_outputs(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_rows = x.numel() // x.shape[-1]
    total = x.new_empty(0 if residual is None else x.shape)
    mean = x.new_empty(0 if rms else n_rows, dtype=torch.float32)
    return total, x.new_empty(x.shape), mean, x.new_empty(n_rows, dtype=torch.float32)


@torch.library.custom_op("nanotrain::row_norm_backward", mutates_args=())
def row_norm_backward(
    dy: Tensor, d_total: Tensor | None, s: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum, of which x and the residual have the same, of weight, and of bias (empty without one)."""
    ds, d_weight, d_bias = row_norm_backward_outputs(dy, d_total, s, weight, bias, mean, rstd, rms)
    width = s.shape[-1]
    s_rows, dy_rows = as_rows(s), as_rows(dy)
    d_total_rows = None if d_total is None else as_rows(d_total)
    plan = backward_plan(s, len(s_rows))
    weight_partials = s.new_empty(plan.programs, width, dtype=torch.float32)
    bias_partials = None if bias is None else torch.empty_like(weight_partials)
    with torch.cuda.device_of(s):
        if plan.programs:
            _backward[(plan.programs,)](
                dy_rows, d_total_rows, s_rows, weight.contiguous(), mean, rstd, ds, weight_partials, bias_partials,
                len(s_rows), dy_rows.stride(0), 0 if d_total_rows is None else d_total_rows.stride(0), s_rows.stride(0),
                rms, width, *blocks(width), plan.rows, plan.ahead, num_warps=plan.warps,
            )  # fmt: skip
        grid = (triton.cdiv(width, SUM_COLUMNS), 1 if bias is None else 2)
        _sum_partials[grid](
            weight_partials, bias_partials, d_weight, d_bias, plan.programs, width, SUM_ROWS, SUM_COLUMNS, num_warps=8
        )
    return ds, d_weight, d_bias


@row_norm_backward.register_fake
def row_norm_backward_outputs(
    dy: Tensor, d_total: Tensor | None, s: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return s.new_empty(s.shape), weight.new_empty(weight.shape), d_bias


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, ctx.rms = inputs
    total, _, mean, rstd = output
    ctx.fused, ctx.has_bias = residual is not None, bias is not None
    ctx.save_for_backward(total if ctx.fused else x, weight, bias, mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros are written and read for a result that nothing used


def _gradients(
    ctx: Any, d_total: Tensor | None, dy: Tensor | None, d_mean: Tensor | None, d_rstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return d_total, d_total, None, None, None, None
    ds, d_weight, d_bias = row_norm_backward(dy, d_total, *ctx.saved_tensors, ctx.rms)
    return ds, ds if ctx.fused else None, d_weight, d_bias if ctx.has_bias else None, None, None


row_norm.register_autograd(_gradients, setup_context=_setup_context)


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    """Raise ValueError, naming the tensor, where the kernels cannot take these."""
    check_devices(x=x, weight=weight, bias=bias, residual=residual)
    check_dtypes(x=x)
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x has shape {tuple(x.shape)}; the norm kernels take rows of 1 to {MAX_WIDTH:,} columns")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"residual is {tuple(residual.shape)} {residual.dtype}, but x is {tuple(x.shape)} {x.dtype}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; rows of x have {x.shape[-1]} columns")
        if vector.dtype not in (torch.float32, x.dtype):
            raise ValueError(f"{name} is {vector.dtype}; it must be float32 or x's {x.dtype}")
