"""The average of what ranks have of the same gradient: output = factor (own + arrived[0] + arrived[1] + ...) in float32.

Reads every part once, in the dtype that it was sent in, and writes the average once or, where the other ranks fetch it from
somewhere else, twice. PyTorch's mean over the first of two dimensions wants the own part copied beside the others, and the second
result is another copy: while products run each of these bytes is taken from them.
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
def _kernel(output, also, own, arrived, row, N, factor, PARTS: tl.constexpr, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # a large tensor has more than 2^31 elements
    total = tl.load(own + i, i < N).to(tl.float32)
    for _ in tl.static_range(PARTS):
        total += tl.load(arrived + i, i < N).to(tl.float32)
        arrived += row
    total *= factor
    tl.store(output + i, total, i < N)
    if TWICE:
        tl.store(also + i, total, i < N)


def average_(output: Tensor, own: Tensor, arrived: Tensor, factor: float, also: Tensor | None = None) -> None:
    """output (E,), float32, becomes factor times the sum of own (E,) and arrived (parts, E), of one dtype; `also` (E,) too.

    The output may be `own` itself. Raises ValueError for a wrong shape, dtype, stride or device.
    """
    others = {} if also is None else {"also": also}
    check_devices(output=output, own=own, arrived=arrived, **others)
    check_dtypes(own=own, arrived=arrived)
    if arrived.dtype != own.dtype:
        raise ValueError(f"arrived: expected {own.dtype} as own, got {arrived.dtype}")
    for name, tensor in {"output": output, **others}.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name}: expected float32, got {tensor.dtype}")
    for name, tensor in {"output": output, "own": own, "arrived": arrived, **others}.items():
        gaps = tensor.numel() > 1 and tensor.stride(-1) != 1
        if tensor.shape[-1:] != own.shape or tensor.ndim != 1 + (tensor is arrived) or gaps:
            kind = "(parts, E)" if tensor is arrived else "(E,)"
            raise ValueError(f"{name}: expected {kind} without gaps, E = {own.numel()}, got {tuple(tensor.shape)}")
    if own.numel():
        with torch.cuda.device_of(own):
            grid = (triton.cdiv(own.numel(), BLOCK),)
            _kernel[grid](
                output, output if also is None else also, own, arrived, arrived.stride(0), own.numel(), factor,
                len(arrived), also is not None, BLOCK, num_warps=WARPS,
            )  # fmt: skip
