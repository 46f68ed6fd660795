"""The operations around the matrix products, and the optimizer, in plain PyTorch: the truth, and what torch.compile fuses.

Each one computes in float32 whatever its inputs are and returns its input's dtype, so that autocast changes nothing in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Reduction = Literal["mean", "sum"]
FP8_BLOCK = 128  # elements that share a scale where a tensor has many


class Quantized(NamedTuple):
    """A matrix rounded to FP8, and its transpose: a product's two operands both have the summed axis last.

    An inverse scale is what the rounded values are multiplied with to be the matrix again: one for all, (), or one for every
    FP8_BLOCK elements of a row, (rows, columns / FP8_BLOCK) with neighbours in a column, as torch._scaled_mm wants it.
    """

    rows: Tensor  # (M, K)
    rows_inverse: Tensor
    columns: Tensor  # (K, M)
    columns_inverse: Tensor


def fp8_limits(dtype: torch.dtype) -> tuple[float, float, float]:
    """The largest number; the most that is rounded to it, without which it would be the next; the most that becomes 0."""
    limits = torch.finfo(dtype)
    step = 2.0 ** math.floor(math.log2(limits.max)) * limits.eps
    return limits.max, limits.max + step / 2, limits.smallest_normal * limits.eps / 2


class AdamW(torch.optim.AdamW):
    """PyTorch's fused one. `rounded`: by parameter a tensor of another dtype that follows it; gradients may have that dtype too.

    What a GradScaler would give stands in `grad_scale` and `found_inf`, tensors or None.
    """

    def __init__(self, groups: list[dict[str, Any]], rounded: Mapping[Tensor, Tensor] | None = None, **options: Any) -> None:
        super().__init__(groups, fused=True, **options)
        self.grad_scale = self.found_inf = None
        self.rounded = dict(rounded or {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None and p.grad.dtype != p.dtype:
                p.grad = p.grad.to(p.dtype)
        super().step()
        if self.rounded:
            torch._foreach_copy_(list(self.rounded.values()), list(self.rounded))


def accumulate_(total: Tensor, gradient: Tensor, is_first: bool) -> None:
    """total (...), float32, becomes the gradient (...), of any dtype, if that `is_first`, else their sum."""
    if is_first:
        total.copy_(gradient)
    else:
        total.add_(gradient)


def average_(output: Tensor, own: Tensor, arrived: Tensor, factor: float, also: Tensor | None = None) -> None:
    """output (E,), float32, becomes factor times the sum of own (E,) and arrived (parts, E), of any dtype; `also` (E,) too."""
    total = own.to(torch.float32, copy=True)  # the output may be `own`
    for part in arrived:
        total += part
    output.copy_(total.mul_(factor))
    if also is not None:
        also.copy_(output)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """weight * (x - mean) / sqrt(var + eps) + bias, over the last axis: x (..., C), weight and bias (C,) -> (..., C)."""
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis: x (..., C), weight (C,) -> (..., C)."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual and its layer_norm: x and residual (..., C) -> (..., C) each. The norm is that of the rounded sum."""
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual and its rms_norm: x and residual (..., C) -> (..., C) each. The norm is that of the rounded sum."""
    total = x + residual
    return total, rms_norm(total, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(z) = z * sigmoid(z): gate_up (..., 2F), gate first -> (..., F)."""
    gate, up = gate_up.chunk(2, dim=-1)  # (..., F) each
    return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), where Phi is the normal distribution: x (...) -> (...). PyTorch's computes low precision in float32 by itself."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """OpenAI's: x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, x (...) -> (...)."""
    return F.gelu(x, approximate="tanh")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each pair (i, i + D/2) of a head by its position's angle: (a, b) -> (a cos - b sin, b cos + a sin).

    q (B, T, H, D), k (B, T, K, D), cos and sin (T, D/2) float32 -> q and k rotated, in their dtypes. LLaMA's convention
    as `transformers` has it; the pairs of the RoFormer paper, section 3.2.2, are neighbours instead: the same up to an order.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]  # (T, 1, D/2), the same for every head

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)  # (B, T, heads, D/2) each
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def rope_qkv_(qkv: Tensor, n_head: int, n_kv_head: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv (B, T, H + 2K, D) into q (B, T, H, D), k and v (B, T, K, D), with q and k rotated; may overwrite qkv."""
    q, k, v = qkv.split((n_head, n_kv_head, n_kv_head), dim=2)
    return *rope(q, k, cos, sin), v


def cross_entropy(logits: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
    """log(sum(exp(logits))) - logits[target] in float32, mean or sum over the targets that are not -1 -> scalar.

    logits (..., V), targets (...) int64. The mean over no target at all is NaN.
    """
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=-1, reduction=reduction)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: Reduction = "mean", chunk_rows: int = 0
) -> Tensor:
    """cross_entropy(x @ weight^T, targets): x (..., C), weight (V, C), targets (...) int64 -> scalar.

    At most `chunk_rows` rows of logits are held at a time, and computed once more for their gradient; 0 holds all.
    """
    x, targets = x.flatten(0, -2), targets.flatten()
    if chunk_rows == 0 or chunk_rows >= len(x):
        return cross_entropy(F.linear(x, weight), targets, reduction)
    pairs = zip(x.split(chunk_rows), targets.split(chunk_rows), strict=True)
    sums = [checkpoint(linear_cross_entropy, rows, weight, t, "sum", use_reentrant=False) for rows, t in pairs]
    total = torch.stack(sums).sum()
    return total if reduction == "sum" else total / (targets != -1).sum()


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None,
    stats: Tensor,
    out: Quantized | None = None,
    with_columns: bool = True,
    through: torch.dtype | None = None,
) -> Quantized:
    """x (M, K), times `scale` (), rounded to an FP8 dtype; without a scale each FP8_BLOCK elements of a row (or of a column, in
    the transpose) have their own, which makes their largest the largest of the dtype.

    What is too large becomes the largest number of the dtype; what is not finite becomes NaN. Adds to `stats`, (4,) int64: the
    largest |x| so far (the bits of a float32, whose order is that of integers), values that were too large, by more than
    rounding takes away, values that became 0 and were not, and all values. M and K are multiples of FP8_BLOCK where there is no
    scale. `out`, an earlier result of the same arguments, is written anew. Without `with_columns`, for which there must be a
    scale, the transpose is (0, M): `transpose_bytes` makes it. x is rounded to the dtype `through` before anything else.
    """
    values = x.to(through or x.dtype).float()
    if scale is None:
        rows, rows_inverse = _round_blocks(values, dtype)
        columns, columns_inverse = _round_blocks(values.t(), dtype)
        saturated = torch.zeros((), dtype=torch.int64, device=x.device)
    else:
        rows, rows_inverse = _round(values * scale, dtype), scale.reciprocal()
        columns, columns_inverse = rows.t()[: None if with_columns else 0].contiguous(), rows_inverse
        saturated = ((values * scale).abs() > fp8_limits(dtype)[1]).sum()
    largest = values.abs().max().view(torch.int32).long()
    flushed = ((rows.float() == 0) & (values != 0)).sum()
    counts = torch.stack((saturated, flushed, torch.full_like(flushed, x.numel())))
    stats.copy_(torch.cat((torch.maximum(stats[:1], largest), stats[1:] + counts)))
    result = Quantized(rows, rows_inverse, columns, columns_inverse)
    for old, new in zip(out or (), result, strict=False):
        old.copy_(new)
    return out or result


def transpose_bytes(rows: Tensor) -> Tensor:
    """(M, K) in an FP8 dtype -> (K, M)."""
    return rows.t().contiguous()


class Kept(NamedTuple):
    """What SwiGLU's backward pass has of gate_up (M, 2F): itself, or rounded to e4m3 with a scale for each FP8_BLOCK of a row."""

    values: Tensor
    inverse: Tensor | None  # (M, 2 ceil(F / FP8_BLOCK)), those of gate before those of up: what the values are multiplied with


def swiglu_quantize(
    gate_up: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor, keep_rounded: bool = False
) -> tuple[Tensor, Kept]:
    """The rows of quantize(y) with y = swiglu(gate_up), rounded once, gate_up (M, 2F) -> (M, F); and what to keep of gate_up."""
    kept = _keep(gate_up.float()) if keep_rounded else Kept(gate_up, None)
    return quantize(swiglu(gate_up.float()), dtype, scale, stats).rows, kept


def _keep(gate_up: Tensor) -> Kept:
    F_ = gate_up.shape[1] // 2
    halves = [_round_blocks(F.pad(half, (0, -F_ % FP8_BLOCK)), torch.float8_e4m3fn) for half in gate_up.split(F_, dim=1)]
    values, inverses = zip(*halves, strict=True)
    rounded = torch.cat([v[:, :F_].view(torch.uint8) for v in values], dim=1)  # as bytes: autocast knows no FP8
    return Kept(rounded.view(torch.float8_e4m3fn), torch.cat(inverses, dim=1))


def restore_kept(kept: Kept) -> Tensor:
    """gate_up (M, 2F) in float32 again."""
    if kept.inverse is None:
        return kept.values.float()
    halves = zip(kept.values.float().chunk(2, dim=1), kept.inverse.chunk(2, dim=1), strict=True)
    return torch.cat([v * inverse.repeat_interleave(FP8_BLOCK, dim=1)[:, : v.shape[1]] for v, inverse in halves], dim=1)


def swiglu_backward_quantize(
    kept: Kept, dy: Tensor, dtype: torch.dtype, scale: Tensor, stats: Tensor, y: tuple[torch.dtype, Tensor]
) -> tuple[Quantized, Tensor]:
    """quantize(the gradient of gate_up), rounded once, and the columns of what swiglu_quantize gave with y's dtype and scale.

    gate_up (M, 2F), as it was kept, dy (M, F) -> (M, 2F), (F, M).
    """
    gate_up = restore_kept(kept)
    gate, up = gate_up.chunk(2, dim=-1)  # (M, F) each
    sigmoid, d = gate.sigmoid(), dy.float()
    gradient = torch.cat((d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * gate * sigmoid), dim=-1)
    columns = _round(swiglu(gate_up) * y[1], y[0]).t().contiguous()
    return quantize(gradient, dtype, scale, stats), columns


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return (values.clamp(-largest, largest) + (values - values)).to(dtype).contiguous()  # inf - inf is NaN


def _round_blocks(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rounded, inverse scales) of each FP8_BLOCK elements of a row."""
    blocks = values.unflatten(1, (-1, FP8_BLOCK))
    amax = blocks.abs().nan_to_num(0, torch.inf).amax(2)  # of the numbers
    inverse = torch.where(amax > 0, amax / torch.finfo(dtype).max, 1.0)
    return _round((blocks / inverse[..., None]).flatten(1), dtype), inverse.t().contiguous().t()
