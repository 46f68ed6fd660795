"""What every kernel asks of its inputs, and how it says no: a ValueError that names the tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}  # by PyTorch's Triton's
DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"  # interpreted for tests: known when the kernels are decorated


def check_devices(**tensors: Tensor | None) -> None:
    """All of them on one device, where the kernels run."""
    first, where = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != DEVICE:
            raise ValueError(f"{name}: expected a tensor on {DEVICE}, got one on {tensor.device}")
        if where is None:
            first, where = name, tensor.device
        if tensor.device != where:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {where}")


def check_dtypes(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")


def as_rows(x: Tensor) -> Tensor:
    """(..., C) -> (N, C) whose elements of a row are neighbours in memory; a copy only where strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
