"""AdamW (Loshchilov and Hutter 2019, algorithm 2) in Triton: one launch a parameter group, whatever the number of its tensors.

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr decay) - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

g is the gradient over `grad_scale`, and where `found_inf` is 1 nothing at all is written: the protocol of torch.amp.GradScaler.
PyTorch's fused AdamW writes the scaled gradient back; this one reads g and reads and writes p, m and v: 28 bytes an element. With
the parameter rounded to another dtype beside it, and the gradient in that, it is 28 too, and nobody else has to convert anything.

The kernel finds its tensors through a table of addresses. A tensor is cut into chunks, and a program has one chunk.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.inputs import DTYPES

CHUNK = 2048  # elements
WARPS = 8
ALIGNMENT = 16  # bytes: what a thread reads and writes at a time


@triton.jit
def _one_minus_power(t, log_beta):
    """1 - beta^t; where beta^t is near 1 by the series of exp, because a difference would have no digits left."""
    u = t * log_beta
    return tl.where(u > -0.05, -u * (1 + u / 2 * (1 + u / 3 * (1 + u / 4 * (1 + u / 5)))), 1 - tl.exp(u))


@triton.jit
def _update(p, g, m, v, rounded, i, inside, decay, step_size, rate1, rate2, root_correction, eps, divisor, ROUNDED):
    gradient = tl.load(g + i, inside).to(tl.float32) / divisor
    mean = tl.load(m + i, inside)
    mean += rate1 * (gradient - mean)
    square = tl.load(v + i, inside)
    square += rate2 * (gradient * gradient - square)
    value = tl.load(p + i, inside) * decay - step_size * mean / (tl.sqrt(square) / root_correction + eps)
    tl.store(m + i, mean, inside)
    tl.store(v + i, square, inside)
    tl.store(p + i, value, inside)
    if ROUNDED is not None:
        tl.store(rounded + i, value.to(ROUNDED), inside)


@triton.jit
def _kernel(
    addresses,  # (tensors, 6) int64: parameter, gradient, mean, mean of squares, number of steps, rounded parameter
    tensor_of_chunk,  # (programs,) int32
    chunk_in_tensor,  # (programs,) int32
    sizes,  # (tensors,) int64
    divisor,  # float32 scalar
    found_inf,  # the same
    lr,
    rate1,  # 1 - beta1
    rate2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    GRADIENT: tl.constexpr,  # its dtype; everything else is float32
    ROUNDED: tl.constexpr,  # the rounded parameter's, or None
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    if tl.load(found_inf) != 0:
        return
    tensor = tl.load(tensor_of_chunk + tl.program_id(0))
    first = tl.load(chunk_in_tensor + tl.program_id(0)).to(tl.int64) * CHUNK
    n = tl.load(sizes + tensor) - first
    row = addresses + tensor * 6
    float_pointer: tl.constexpr = tl.pointer_type(tl.float32)
    p = tl.multiple_of(tl.load(row).to(float_pointer), ALIGNMENT) + first
    g = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(GRADIENT)), ALIGNMENT) + first
    m = tl.multiple_of(tl.load(row + 2).to(float_pointer), ALIGNMENT) + first
    v = tl.multiple_of(tl.load(row + 3).to(float_pointer), ALIGNMENT) + first
    t = tl.load(tl.load(row + 4).to(float_pointer))
    rounded = p
    if ROUNDED is not None:
        rounded = tl.multiple_of(tl.load(row + 5).to(tl.pointer_type(ROUNDED)), ALIGNMENT) + first
    step_size = lr / _one_minus_power(t, log_beta1)
    root_correction = tl.sqrt(_one_minus_power(t, log_beta2))
    decay, i, scale = 1 - lr * weight_decay, tl.arange(0, CHUNK), tl.load(divisor)
    if n >= CHUNK:  # without a mask, which would keep a thread from reading 16 bytes at a time
        _update(p, g, m, v, rounded, i, None, decay, step_size, rate1, rate2, root_correction, eps, scale, ROUNDED)
    else:
        _update(p, g, m, v, rounded, i, i < n, decay, step_size, rate1, rate2, root_correction, eps, scale, ROUNDED)


class _Table(NamedTuple):
    """Where tensors are, and how they are cut."""

    pointers: tuple[int, ...]
    lengths: tuple[int, ...]
    addresses: Tensor
    tensor_of_chunk: Tensor
    chunk_in_tensor: Tensor
    sizes: Tensor


Kind = tuple[int, torch.dtype, torch.dtype | None, int]  # group's number, dtypes of gradient and rounded parameter, alignment
Row = tuple[Tensor | None, ...]  # what the kernel's table has of a parameter, in its order


class AdamW(reference.AdamW):
    """reference.AdamW, its step by the Triton kernel where all is contiguous on a GPU, and float32 but for what may be rounded.

    State and its names are PyTorch's. Tensors of other kinds, and state that PyTorch would create, are left to PyTorch's step.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        self._tables: dict[Kind, _Table] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        rows: dict[Kind, list[Row]] = defaultdict(list)
        for number, group in enumerate(self.param_groups):
            for row in map(self._row, (p for p in group["params"] if p.grad is not None)):
                rows[number, row[1].dtype, None if row[5] is None else row[5].dtype, _alignment(row)].append(row)
        if not all(_suits_kernel(row) for each in rows.values() for row in each):
            super().step()
            return
        for kind, each in rows.items():
            self._launch(kind, each)

    def _row(self, p: Tensor) -> Row:
        """Parameter, gradient, the three states, and the rounded parameter: this rank's parts where they are sharded."""
        state = [self.state[p].get(name) for name in ("exp_avg", "exp_avg_sq", "step")]
        return tuple(map(local, (p, p.grad, *state, self.rounded.get(p))))

    def _launch(self, kind: Kind, rows: list[Row]) -> None:
        number, gradient, rounded, alignment = kind
        group, device = self.param_groups[number], rows[0][0].device
        divisor = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
        found_inf = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        steps = [row[4] for row in rows]
        torch._foreach_add_(steps, [1 - found_inf] * len(steps))  # a list: for a tensor alone PyTorch waits for the device
        # In double precision: what is left of 1 when a beta near it is taken away has few digits.
        rates = [1 - beta for beta in group["betas"]]
        logarithms = [math.log(beta) if beta else -math.inf for beta in group["betas"]]
        table = self._tables[kind] = _table(rows, self._tables.get(kind))
        if len(table.tensor_of_chunk):
            with torch.cuda.device_of(divisor):
                _kernel[(len(table.tensor_of_chunk),)](
                    *table[2:], divisor, found_inf, group["lr"], *rates, *logarithms, group["eps"],
                    group["weight_decay"], DTYPES[gradient], DTYPES.get(rounded), alignment, CHUNK, num_warps=WARPS,
                )  # fmt: skip


def local(tensor: Tensor | None) -> Tensor | None:
    """What this rank has of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _suits_kernel(row: Row) -> bool:
    exact = all(t is not None and t.dtype == torch.float32 for t in (row[0], *row[2:5]))
    return exact and all(t.dtype in DTYPES and t.is_contiguous() for t in row if t is not None)


def _alignment(row: Row) -> int:
    """Of all its tensors in bytes; 1 where a rank's rows begin between the places that a thread reads at a time."""
    return ALIGNMENT if all(t is None or t.ndim == 0 or t.data_ptr() % ALIGNMENT == 0 for t in row) else 1


def _table(rows: list[Row], last: _Table | None) -> _Table:
    """The last one where nothing has moved. The copy to the device waits for nothing."""
    pointers = tuple(0 if t is None else t.data_ptr() for row in rows for t in row)
    lengths = tuple(row[0].numel() for row in rows)
    device = rows[0][0].device

    def upload(values: Tensor) -> Tensor:
        return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values

    if last is None or last.lengths != lengths:
        sizes = torch.tensor(lengths)
        chunks = (sizes + CHUNK - 1) // CHUNK
        owners = torch.repeat_interleave(chunks)
        starts = torch.cumsum(chunks, 0) - chunks
        positions = torch.arange(len(owners)) - starts[owners]
        last = _Table((), lengths, sizes, *(upload(x) for x in (owners.int(), positions.int(), sizes)))
    if last.pointers != pointers:
        last = last._replace(pointers=pointers, addresses=upload(torch.tensor(pointers)))
    return last
