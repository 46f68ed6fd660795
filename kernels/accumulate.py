"""The sum of micro-steps' gradients: total += g in float32, or total = g for the first of them.

g is as the product has made it, in bfloat16 mostly: reads it and the total, writes the total, 10 bytes an element (the first 6).
PyTorch's addition of two dtypes and its conversion reach half of the memory's bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.inputs import check_devices, check_dtypes

BLOCK = 2048
WARPS = 4  # 16 elements a thread


@triton.jit
def _kernel(total, gradient, N, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # a large tensor has more than 2^31 elements
    value = tl.load(gradient + i, i < N).to(tl.float32)
    if not FIRST:
        value += tl.load(total + i, i < N)
    tl.store(total + i, value, i < N)


def accumulate_(total: Tensor, gradient: Tensor, is_first: bool) -> None:
    """total (...), float32, becomes the gradient (...) if that `is_first`, else their sum; other strides are copied before.

    Raises ValueError for a wrong shape, dtype or device, and for a total that is not contiguous.
    """
    check_devices(total=total, gradient=gradient)
    check_dtypes(gradient=gradient)
    if total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(f"total: expected contiguous float32, got {total.dtype} with strides {total.stride()}")
    if gradient.shape != total.shape:
        raise ValueError(f"gradient: expected shape {tuple(total.shape)}, got {tuple(gradient.shape)}")
    gradient = gradient.contiguous()
    if total.numel():
        with torch.cuda.device_of(total):
            grid = (triton.cdiv(total.numel(), BLOCK),)
            _kernel[grid](total, gradient, total.numel(), is_first, BLOCK, num_warps=WARPS)
