"""The optimizer: which parameters decay, the learning rate as a function of the step, and one guarded update.

The update needs nothing from the host: gradient clipping and the loss scale become one divisor inside the AdamW
kernel, and a gradient that is not finite makes the kernel leave weights and state as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from configurator import OptimConfig

LAID_ROW = 64  # elements between the places where a tensor may begin in memory that several share


def learning_rate(step: int, cfg: OptimConfig) -> float:
    """The learning rate of step `step`, counted from 0: a pure function, so that a resumed run needs no scheduler state.

    Linear warm-up over `warmup_iters`, then cosine (nanoGPT's), linear, wsd (constant, then a linear decay over the last
    `wsd_decay_fraction` of `lr_decay_iters`; Hu et al. 2024, MiniCPM) or constant; `min_lr` from `lr_decay_iters` on.
    """
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if cfg.lr_schedule == "constant":
        return cfg.learning_rate
    start = cfg.warmup_iters
    if cfg.lr_schedule == "wsd":
        start = max(start, round(cfg.lr_decay_iters * (1 - cfg.wsd_decay_fraction)))
    if step < start:
        return cfg.learning_rate
    if step >= cfg.lr_decay_iters:
        return cfg.min_lr
    progress = (step - start) / (cfg.lr_decay_iters - start)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.lr_schedule == "cosine" else 1 - progress
    return cfg.min_lr + remaining * (cfg.learning_rate - cfg.min_lr)


def build_optimizer(
    parameters: Iterable[torch.Tensor],
    cfg: OptimConfig,
    adamw: Callable[..., torch.optim.AdamW],
    rounded: Mapping[torch.Tensor, torch.Tensor] | None = None,
) -> torch.optim.AdamW:
    """`adamw` of kernels/, with its state in place; `rounded` has what it is to write of a parameter in another dtype.

    Matrices and embeddings decay, vectors (norms, biases) do not. Of a parameter that is shared out among ranks it is given
    this rank's rows.
    """
    tensors = list(parameters)
    matrices, vectors = [p for p in tensors if p.dim() >= 2], [p for p in tensors if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizer = adamw(groups, rounded=rounded, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps)
    # Made now and not in the first step, so that a checkpoint always finds the same tensors.
    (_, averages), (_, squares) = laid_zeros(tensors), laid_zeros(tensors)
    for p, average, square in zip(tensors, averages, squares, strict=True):
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p].update(step=step, exp_avg=average, exp_avg_sq=square)
    return optimizer


def laid_zeros(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(one piece of memory, (laid_rows, LAID_ROW); its parts that are like these).

    CUDA's allocator may add a MiB to each piece that it is asked for: 3 % of AdamW's moments on each of four ranks.
    """
    memory = tensors[0].new_zeros(laid_rows(tensors), LAID_ROW)
    return memory, laid_out(memory, tensors)


def laid_rows(tensors: Iterable[torch.Tensor]) -> int:
    """Rows of LAID_ROW elements in which these lie, each from the beginning of one."""
    return sum(-(-t.numel() // LAID_ROW) for t in tensors)


def laid_out(memory: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The parts of `memory` (laid_rows, LAID_ROW) that have the shapes of these."""
    parts = memory.view(-1).split([LAID_ROW * laid_rows([t]) for t in tensors])
    return [part[: t.numel()].view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def describe_groups(model: nn.Module, cfg: OptimConfig) -> list[str]:
    """nanoGPT's two lines on what decays and what does not."""
    matrices, vectors = [p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]
    kinds = {"decayed": matrices, "non-decayed": vectors} if cfg.weight_decay else {"non-decayed": matrices + vectors}
    return [
        f"num {kind} parameter tensors: {len(tensors)}, with {sum(p.numel() for p in tensors):,} parameters"
        for kind, tensors in kinds.items()
        if tensors
    ]


def optimizer_tensors(named: Mapping[str, torch.Tensor], optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name (`optim.<parameter>.exp_avg`): what a checkpoint keeps."""
    return {f"optim.{name}.{key}": value for name, p in named.items() for key, value in optimizer.state[p].items()}


@dataclass(frozen=True)
class Gradients:
    """The gradient of a step, or this rank's part of it; `total` then makes a sum over its elements one over all."""

    tensors: list[torch.Tensor]
    n_elements: int  # of the whole gradient
    total: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class Update:
    """What one update measured, as float32 scalars on the device; nothing here has waited for them."""

    norm: torch.Tensor  # of the whole gradient, before clipping
    overflow: torch.Tensor  # 1 where the gradient was not finite and the step was skipped, else 0
    moments: tuple[torch.Tensor, ...]  # mean and standard deviation of all gradient elements, where asked for


def update(
    optimizer: torch.optim.AdamW,
    cfg: OptimConfig,
    lr: float,
    scale: torch.Tensor,
    with_moments: bool,
    gradients: Gradients | None = None,
) -> Update:
    """One AdamW step on the gradients in place, which are `scale` times too large; then the gradients are dropped.

    The norm is global over all parameters (`gradients`, where the optimizer has only this rank's rows); with `grad_clip` > 0 the
    gradient is divided by max(1, norm / grad_clip).
    """
    own = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    whole = gradients or Gradients(own, sum(g.numel() for g in own))
    norm = torch.linalg.vector_norm(torch.stack(norms(whole.tensors) or [torch.zeros_like(scale)]))  # a rank may have no rows
    if whole.total is not None:
        norm = whole.total(norm.square()).sqrt()
    norm = norm / scale
    overflow = 1.0 - torch.isfinite(norm).float()
    moments = gradient_moments(whole, norm, scale) if with_moments else ()
    shrink = (norm / cfg.grad_clip).clamp(min=1.0) if cfg.grad_clip > 0 else torch.ones_like(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale, optimizer.found_inf = scale * shrink, overflow  # the protocol of torch.amp.GradScaler
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Update(norm, overflow, moments)


def norms(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Each one's, as float32 scalars; in one launch for each dtype."""
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    return [norm for alike in by_dtype.values() for norm in torch._foreach_norm(alike, 2, torch.float32)]


def gradient_moments(gradients: Gradients, norm: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation over all gradient elements; std^2 = norm^2 / n - mean^2."""
    total = torch.stack([g.sum(dtype=torch.float32) for g in gradients.tensors] or [torch.zeros_like(scale)]).sum()
    if gradients.total is not None:
        total = gradients.total(total)
    mean = total / scale / gradients.n_elements
    return mean, (norm.square() / gradients.n_elements - mean.square()).clamp(min=0.0).sqrt()
