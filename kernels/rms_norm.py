"""RMSNorm (Zhang and Sennrich 2019) in Triton: y = weight * s / sqrt(mean(s^2) + eps) over the last axis.

s is x or x + residual; row_norm.py has the kernels. Every function is what reference.py's of the same name is, gradients
included: statistics and weight gradients in float32, results in the inputs' dtype.
"""

from __future__ import annotations

from torch import Tensor

from kernels.row_norm import check, row_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., C) float32, bfloat16 or float16, weight (C,) float32 or x's dtype -> (..., C).

    C up to 65,536; a tensor that does not fit is named in a ValueError.
    """
    check(x, weight)
    return row_norm(x, None, weight, None, eps, True)[1]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual and its norm in one pass over memory: x and residual (..., C) of one dtype -> (..., C) each."""
    check(x, weight, residual=residual)
    return row_norm(x, residual, weight, None, eps, True)[:2]
