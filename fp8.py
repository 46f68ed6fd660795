"""FP8 training: which products run in it, how their operands are scaled, and what rounding does to their values.

    y = x W^T                    x and W in e4m3 (4 exponent bits, up to 448), dy in e5m2 (5, up to 57,344)
    dx = dy W,  dW = dy^T x      (Micikevicius et al. 2022, "FP8 formats for deep learning")

FP8_PRODUCTS run so in training; head, embeddings, norms, attention's own products and every evaluation stay in the run's
dtype. Weights are rounded from float32 masters once a step (where fsdp gathers one for each pass, at each use), and their
gradients come out in the run's dtype. A tensor with one scale is multiplied by 2^-margin largest / amax, with the amax of the
last steps (`delayed`: one pass over the tensor; in the first step a weight's own) or its own (`current`: two). With `block`
every 128 elements have a scale of their own (DeepSeek-V3, section 3.3.2).

Shapes: M tokens, K inputs and N outputs of a product; L products in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import Config, Fp8Config
from flops import FP8_SIDES, why_no_fp8, without_fp8
from kernels import REFERENCE, Operations
from kernels.reference import FP8_BLOCK, Kept, Quantized
from parallel import Ranks
from precision import dtype_name

FP8_PRODUCTS = ("attention.qkv", "attention.out", "ffn.up", "ffn.out")  # of a block
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CLASSES = ("activations", "weights", "gradients")
OLDEST, HOPPER = (8, 9), 9  # compute capability: Ada's, and the first digit of the one whose products have scales of blocks
OLDEST_WITH_BLOCKS = (12, 9)  # CUDA
Table = Callable[[Tensor, list[float]], Tensor]
Arrival = Literal["never", "once", "often"]  # at a rank, of the weights that others have updated: once or more often a step


# ---------------------------------------------------------------------------------------------------------------------
# One product
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic:
    """What all products of a run have in common."""

    recipe: str
    margin: int
    dtype: torch.dtype  # of what goes in and comes out
    emulated: bool
    less_memory: bool
    ops: Operations

    def round(self, x: Tensor, dtype: torch.dtype, delayed_scale: Tensor, stats: Tensor) -> Quantized:
        """Activations or gradients x (M, K) in an FP8 dtype, scaled by the recipe."""
        scale = None if self.recipe == "block" else delayed_scale
        if self.recipe == "current":
            scale = scale_of(torch.linalg.vector_norm(x, torch.inf), dtype, self.margin, 1.0)
        return self.ops.quantize(x, dtype, scale, stats)

    def rounded_weight(self, weight: Tensor, own: Operands) -> Quantized:
        """A gathered weight, unless this rank has it rounded all along."""
        return own.copies or self.round_weight(weight, own)

    def round_weight(self, weight: Tensor, own: Operands, with_columns: bool = True) -> Quantized:
        """Through the run's dtype, which others get it in: weights are the same however they lie on the ranks."""
        return self.ops.quantize(weight, E4M3, own.scale_w, own.stats_w, own.copies, with_columns, self.dtype)

    def weight_columns(self, weight: Tensor, own: Operands) -> tuple[Tensor, Tensor]:
        """Its transpose, which may not be kept, and the inverse scale: for the input's gradient."""
        w = self.rounded_weight(weight, own)
        return w.columns if w.columns.numel() else self.ops.transpose_bytes(w.rows), w.columns_inverse

    def multiply(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool = False) -> Tensor:
        """a b^T of rounded matrices (M, K) and (N, K), each with its inverse scales -> (M, N).

        `fast` adds up in fewer bits: Hopper's tensor cores keep 14 of them, and otherwise bring partial sums to float32.
        """
        if self.emulated:
            with torch.autocast(a[0].device.type, enabled=False):
                # A copy: from an alias, which float32's would be, PyTorch 2.11 compiles gradients of zero.
                return (restore(*a) @ restore(*b).t()).to(dtype, copy=True)
        fast = fast and self.recipe != "block"
        return torch._scaled_mm(a[0], b[0].t(), a[1], b[1].t(), out_dtype=dtype, use_fast_accum=fast)


def restore(rounded: Tensor, inverse: Tensor) -> Tensor:
    """The matrix in float32 again."""
    if inverse.ndim == 0:
        return rounded.float() * inverse
    return (rounded.float().unflatten(1, (-1, FP8_BLOCK)) * inverse[..., None]).flatten(1)


def scale_of(amax: Tensor, dtype: torch.dtype, margin: int, otherwise: float | Tensor) -> Tensor:
    """2^-margin largest / amax, float32; `otherwise` where that is no number to multiply with, as before anything was seen."""
    scale = torch.finfo(dtype).max / 2**margin / amax.float()
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, otherwise)


class Operands(NamedTuple):
    """What the products of a layer need beside its weight."""

    copies: Quantized | None  # of the weight; None where it is gathered for each pass, and rounded at each use
    scale_w: Tensor | None  # () for that; None where blocks have their own
    scale_x: Tensor  # delayed scales, ()
    scale_dy: Tensor
    stats_x: Tensor  # what rounding has met in this step, (4,) each
    stats_w: Tensor
    stats_dy: Tensor


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, own: Operands, arithmetic: Arithmetic) -> Tensor:
        rounded = arithmetic.round(x, E4M3, own.scale_x, own.stats_x)
        w = arithmetic.rounded_weight(weight, own)
        ctx.save_for_backward(weight, *rounded[2:])
        ctx.own, ctx.arithmetic, ctx.dtype = own, arithmetic, x.dtype
        return arithmetic.multiply(rounded[:2], w[:2], arithmetic.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        own, arithmetic, (weight, *x) = ctx.own, ctx.arithmetic, ctx.saved_tensors
        rounded = arithmetic.round(dy, E5M2, own.scale_dy, own.stats_dy)
        dx = arithmetic.multiply(rounded[:2], arithmetic.weight_columns(weight, own), ctx.dtype)
        return dx, arithmetic.multiply(rounded[2:], x, weight.dtype), None, None


def unflatten(rows: Tensor, x: Tensor) -> Tensor:
    """(M, N) -> (..., N), as x (..., K) is. Not a view for autograd: fully_shard's hooks warn of a block that returns one."""
    return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])


class Fp8Linear(nn.Linear):
    """A linear layer whose products run in FP8 while it is in training."""

    def attach(self, arithmetic: Arithmetic, scales: tuple[float, float], device: torch.device, master: Tensor | None) -> None:
        """`scales`: those of the first step for activations and gradients; `master`: what to read in the weight's place."""
        self.arithmetic, self.master = arithmetic, master
        first = (torch.tensor(scale, device=device) for scale in scales)
        scale_w = None if arithmetic.recipe == "block" else torch.ones((), device=device)
        self.own = Operands(None, scale_w, *first, *(torch.zeros(4, dtype=torch.int64, device=device) for _ in CLASSES))

    def round_weight(self) -> None:
        """Into the same memory each time, where a CUDA graph finds it."""
        copies = self.arithmetic.round_weight(self.values, self.own, not self.arithmetic.less_memory)
        if self.own.copies is None:
            self.own = self.own._replace(copies=copies)

    @property
    def values(self) -> Tensor:
        return self.weight.detach() if self.master is None else self.master

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.values, self.bias)
        y = unflatten(_Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.own, self.arithmetic), x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _SwiGLU(torch.autograd.Function):
    """out(swiglu(up(x))), where what lies between the two products is rounded as it is made; otherwise as two _Products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_up: Tensor, w_out: Tensor, up: Operands, out: Operands, arithmetic: Arithmetic) -> Tensor:
        rounded = arithmetic.round(x, E4M3, up.scale_x, up.stats_x)
        gate_up = arithmetic.multiply(rounded[:2], arithmetic.rounded_weight(w_up, up)[:2], arithmetic.dtype, fast=True)
        hidden, kept = arithmetic.ops.swiglu_quantize(gate_up, E4M3, out.scale_x, out.stats_x, arithmetic.less_memory)
        ctx.save_for_backward(w_up, w_out, *rounded[2:], *kept)
        ctx.up, ctx.out, ctx.arithmetic, ctx.dtype, ctx.gate_dtype = up, out, arithmetic, x.dtype, gate_up.dtype
        w = arithmetic.rounded_weight(w_out, out)
        return arithmetic.multiply((hidden, out.scale_x.reciprocal()), w[:2], arithmetic.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        up, out, arithmetic, (w_up, w_out, *x, gate_up, inverse) = ctx.up, ctx.out, ctx.arithmetic, ctx.saved_tensors
        d = arithmetic.round(dy, E5M2, out.scale_dy, out.stats_dy)
        d_hidden = arithmetic.multiply(d[:2], arithmetic.weight_columns(w_out, out), ctx.gate_dtype)
        kept, forward = Kept(gate_up, inverse), (E4M3, out.scale_x)
        d_up, hidden = arithmetic.ops.swiglu_backward_quantize(kept, d_hidden, E5M2, up.scale_dy, up.stats_dy, forward)
        dw_out = arithmetic.multiply(d[2:], (hidden, out.scale_x.reciprocal()), w_out.dtype)
        dx = arithmetic.multiply(d_up[:2], arithmetic.weight_columns(w_up, up), ctx.dtype)
        return dx, arithmetic.multiply(d_up[2:], x, w_up.dtype), dw_out, None, None, None


class Fp8SwiGLU(nn.Module):
    """A SwiGLU feed-forward without biases, in the place of model.FeedForward; the parameters keep their names."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.activation, self.up, self.out = ffn.activation, ffn.up, ffn.out

    def forward(self, x: Tensor) -> Tensor:
        up, out = self.up, self.out
        if not self.training:
            return out(self.activation(up(x)))
        rows = x.reshape(-1, x.shape[-1])
        return unflatten(_SwiGLU.apply(rows, up.weight, out.weight, up.own, out.own, up.arithmetic), x)


# ---------------------------------------------------------------------------------------------------------------------
# All products of a run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Fp8:
    """The FP8 state of a run; without `arithmetic` there is none, and every method does nothing."""

    cfg: Fp8Config
    arithmetic: Arithmetic | None = None
    first_scales: tuple[float, float] = (1.0, 1.0)  # of activations and gradients, before any was seen
    blocks: list[nn.Module] = field(default_factory=list)  # those that have such products
    linears: list[Fp8Linear] = field(default_factory=list)
    micro_steps: int = 1  # of a rank; its loss is divided by them
    history: Tensor = field(default_factory=lambda: torch.empty(0))  # delayed: (fp8_history, L, 3) amax by CLASSES, undivided

    @property
    def active(self) -> bool:
        return self.arithmetic is not None

    def convert(self, model: nn.Module) -> nn.Module:
        """Gives the model's blocks FP8 products; the parameters and their names stay. Before they are sharded."""
        self.blocks = list(model.blocks) if self.active else []
        for block in self.blocks:
            for name in FP8_PRODUCTS:
                owner, _, attribute = name.partition(".")
                old = getattr(block.get_submodule(owner), attribute)
                linear = Fp8Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
                linear.weight, linear.bias = old.weight, old.bias
                setattr(block.get_submodule(owner), attribute, linear)
                self.linears.append(linear)
            # Where a scale is known before its values are, a feed-forward is one function.
            if self.cfg.fp8_recipe == "delayed" and model.cfg.ffn_type == "swiglu" and not model.cfg.bias:
                block.ffn = Fp8SwiGLU(block.ffn)
        return model

    def attach(self, device: torch.device, table: Table, rows: Mapping[Tensor, Tensor], arrive: Arrival = "never") -> None:
        """When the model has its values. `table` brings together what all ranks have measured, as Ranks.table.

        `rows`, by parameter, are what this rank updates, which is all where weights never `arrive`. Those that arrive once a step
        are rounded when they have, before the first forward pass of their block.
        """
        self._table, self._arrive = table, arrive
        self._weights = [rows[linear.weight] for linear in self.linears]
        n_steps = self.cfg.fp8_history if self.cfg.fp8_recipe == "delayed" else 0
        self.history = torch.zeros(n_steps, len(self.linears), len(CLASSES), device=device)
        for linear, rows_of_weight in zip(self.linears, self._weights, strict=True):
            linear.attach(self.arithmetic, self.first_scales, device, rows_of_weight.detach() if arrive == "never" else None)
        for block in self.blocks if arrive == "once" else ():
            block.register_forward_pre_hook(lambda block, args: self._round_on_arrival(block))
        self.restore()
        self.begin_step()

    @torch.no_grad()
    def begin_step(self) -> None:
        """Before the first micro-step: forgets what was counted, and rounds the weights that are there."""
        if not self.active:
            return
        torch._foreach_zero_(self.statistics())
        if self.cfg.fp8_recipe == "current":
            self._measure_weights()
        for linear in self.linears if self._arrive == "never" else ():
            linear.round_weight()
        self._unrounded = set(self.blocks) if self._arrive == "once" else set()

    @torch.no_grad()
    def _round_on_arrival(self, block: nn.Module) -> None:
        if block.training and block in self._unrounded:
            self._unrounded.remove(block)
            for linear in block.modules():
                if isinstance(linear, Fp8Linear):
                    linear.round_weight()

    def _measure_weights(self) -> None:
        """Their scales, from what they are now. A collective where they arrive."""
        weights = [w.detach() if len(w) else w.new_zeros(1) for w in self._weights]  # a rank may have no rows
        amax = torch.stack(torch._foreach_norm(weights, torch.inf))
        if self._arrive != "never":
            amax = self._table(amax, []).amax(0)
        self._set("scale_w", scale_of(amax, E4M3, self.cfg.fp8_margin, 1.0))

    def _set(self, name: str, scales: Tensor) -> None:
        torch._foreach_copy_([getattr(linear.own, name) for linear in self.linears], list(scales))

    def statistics(self) -> list[Tensor]:
        """Of each product, in the order of CLASSES."""
        return [stats for linear in self.linears for stats in linear.own[4:]]

    @torch.no_grad()
    def finish_step(self, overflow: Tensor) -> Tensor:
        """After the update: the next step's scales, the last ones where an `overflow` of 1 says that it was skipped.

        (3, 2) shares of all values, by CLASSES: saturated, became 0. Without FP8 (0, 2).
        """
        if not self.active:
            return self.history.new_empty(0, 2)
        stats = torch.stack(self.statistics()).view(-1, 3, 4)  # (L, 3, 4)
        amax = stats[..., 0].to(torch.int32).view(torch.float32).flatten()  # (3 L,)
        counts = stats[..., 1:].sum(0).float()  # (3, 3)
        rows = self._table(torch.cat((amax, counts.flatten())), [])
        amax = rows[:, : len(amax)].amax(0).view(-1, 3)
        counts = rows[:, amax.numel() :].sum(0).view(3, 3)
        if self.cfg.fp8_recipe == "delayed":
            amax[:, CLASSES.index("gradients")] *= self.micro_steps
            self.history.copy_(torch.where(overflow > 0, self.history, torch.cat((amax[None], self.history[:-1]))))
            self._set_delayed_scales()
        return counts[:, :2] / counts[:, 2:].clamp(min=1)

    def _set_delayed_scales(self) -> None:
        """Those that the history says: a function of it alone, so that a resumed run has the same."""
        (x, w, dy), margin = self.history.amax(0).unbind(1), self.cfg.fp8_margin  # (L,) each
        measured = torch.stack([linear.own.scale_w for linear in self.linears])
        self._set("scale_x", scale_of(x, E4M3, margin, self.first_scales[0]))
        self._set("scale_w", scale_of(w, E4M3, margin, measured))
        self._set("scale_dy", self.micro_steps * scale_of(dy, E5M2, margin, self.first_scales[1]))

    def take(self, history: Tensor) -> list[str]:
        """The newest steps of a history of another length. A line for the log where it has another form."""
        if not self.active:
            return []
        if history.shape[1:] != self.history.shape[1:]:
            return ["the checkpoint's history of FP8's scales is of an earlier version: they start afresh"]
        n = min(len(history), len(self.history))
        self.history[:n] = history[:n]
        return []

    @torch.no_grad()
    def restore(self) -> None:
        """Scales for weights, and for `tensors` of a checkpoint, that have been read."""
        if self.active and self.cfg.fp8_recipe == "delayed":
            self._measure_weights()
            self._set_delayed_scales()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        return {"fp8.amax_history": self.history} if self.active and self.cfg.fp8_recipe == "delayed" else {}


def choose_fp8(cfg: Config, ranks: Ranks, dtype: torch.dtype, ops: Operations) -> tuple[Config, Fp8, list[str]]:
    """(cfg without FP8 where not every rank's GPU can run it, the run's FP8, lines for the log).

    A collective where FP8 is asked for. Raises UserError where it cannot run and is required.
    """
    if not cfg.fp8.use_fp8:
        return cfg, Fp8(cfg.fp8), []
    if reason := next(filter(None, ranks.all_of(why_not(cfg, ranks.device, dtype))), None):
        cfg, line = without_fp8(cfg, dtype_name(dtype), reason)
        return cfg, Fp8(cfg.fp8), [line]
    emulated = cfg.fp8.fp8_emulate
    own_ops = REFERENCE if emulated else ops
    arithmetic = Arithmetic(cfg.fp8.fp8_recipe, cfg.fp8.fp8_margin, dtype, emulated, cfg.fp8.fp8_less_memory, own_ops)
    # What a block's products read is near 1, with outliers; the loss is a mean over the tokens, so gradients start out near
    # 1 / tokens. Either may be a hundred times larger or smaller for the one step that this has to do.
    tokens, micro_steps = cfg.data.batch_size * cfg.model.block_size, cfg.data.gradient_accumulation_steps // ranks.world_size
    how = [f"{cfg.fp8.fp8_recipe} scaling", *["less memory"] * arithmetic.less_memory, *["emulated"] * emulated]
    line = f"FP8 in {', '.join(FP8_PRODUCTS)} of each block, {', '.join(how)}"
    return cfg, Fp8(cfg.fp8, arithmetic, (16.0, float(tokens)), micro_steps=micro_steps), [line]


def why_not(cfg: Config, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps FP8 from running here, and the remedy."""
    name, recipes = "", []
    if device.type == "cuda":
        capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
        has_blocks = capability[0] == HOPPER and cuda_version() >= OLDEST_WITH_BLOCKS
        recipes = [recipe for recipe in FP8_SIDES if capability >= OLDEST and (has_blocks or recipe != "block")]
    return why_no_fp8(cfg, dtype_name(dtype), name, recipes)


def cuda_version() -> tuple[int, ...]:
    """PyTorch's; () where it has none."""
    return tuple(map(int, torch.version.cuda.split("."))) if torch.version.cuda else ()


def by_class(shares: list[float]) -> dict[str, Any]:
    """`finish_step`'s figures, read back, as the run log has them; empty without FP8."""
    pairs = zip(shares[::2], shares[1::2], strict=True)
    return {
        name: {"saturated_percent": 100 * saturated, "flushed_percent": 100 * flushed}
        for name, (saturated, flushed) in zip(CLASSES, pairs, strict=False)
    }


def losses_above(figures: dict[str, Any], percent: float) -> dict[str, str]:
    """What of `by_class` is above so many percent, in words, by its name."""
    what = {"saturated_percent": "were too large for FP8", "flushed_percent": "became 0 in FP8"}
    return {
        f"{name}.{key}": f"{share:.2f} % of the {name} {what[key]}"
        for name, shares in figures.items()
        for key, share in shares.items()
        if share > percent
    }
