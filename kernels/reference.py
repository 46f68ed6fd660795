"""The operations around the matrix products, and the optimizer, in plain PyTorch: the truth, and what torch.compile fuses.

Each one computes in float32 whatever its inputs are and returns its input's dtype, so that autocast changes nothing in it.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Reduction = Literal["mean", "sum"]
AdamW = partial(torch.optim.AdamW, fused=True)


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
