"""How one process holds what it trains: parameters, gradients, and what the optimizer updates. sharding.py has it of several.

Everything follows from `Part`: the optimizer works on the parts alone, and a checkpoint is made of them.

Where products run in another dtype than float32, a block's matrices are parameters in that dtype, and the optimizer updates
float32 masters of them (Micikevicius et al. 2018, section 3.1). Every value is what autocast would make of float32 parameters,
but it is rounded once a step and not in each micro-step, and a gradient that is not added to stays as the product has made it.
FP8 rounds the masters themselves where a rank has all of them; such a parameter has no memory, and is there for its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from configurator import ParallelConfig
from optim import Gradients
from parallel import Ranks


@dataclass(frozen=True)
class Part:
    """What this rank updates of a parameter: `rows`, a plain float32 tensor, in the parameter's memory if that is float32 too."""

    parameter: nn.Parameter
    rows: Tensor
    first_row: int  # of the whole parameter
    copies: int  # ranks that hold these same rows
    rounded: Tensor | None = None  # these rows of a parameter that is not float32


class Layout:
    """One process: the parameters are whole, and nothing is exchanged."""

    name = "one process"
    exchanges_within = False  # a micro-step, which then is more than a CUDA graph could hold
    weights_arrive: Literal["never", "once", "often"] = "never"  # in a step, those that other ranks have updated

    def __init__(self, ranks: Ranks, cfg: ParallelConfig, dtype: torch.dtype, exchange_by: str = "") -> None:
        self.ranks, self.cfg, self.dtype, self.exchange_by = ranks, cfg, dtype, exchange_by
        self.parts: dict[str, Part] = {}
        self.uncounted_bytes = 0  # of the GPU's memory, which the allocator does not count
        self._is_first = self._is_last = self._adds = False  # of a micro-step: its place in the step, and whether it has others
        self._summed: list[Tensor] = []  # parameters of another dtype than float32
        self._sums: dict[Tensor, Tensor] = {}  # of the gradients of micro-steps, by these

    def shard(self, model: nn.Module) -> None:
        """Before the model, which is on the meta device, has storage."""

    def attach(self, model: nn.Module) -> None:
        """When the model has its values: sets `parts`."""
        self.model = model
        masters = self.round_products()
        self.share(list(model.parameters()))
        self.parts = {name: self.part_of(p, masters.get(p)) for name, p in model.named_parameters()}
        self.n_elements = sum(p.numel() for p in model.parameters())

    def round_products(self) -> dict[Tensor, Tensor]:
        """Turns the blocks' matrices into the arithmetic's dtype, one by one: their masters."""
        if self.dtype == torch.float32:
            return {}
        linears = [m for unit in self.model.shard_units() for m in unit.modules() if isinstance(m, nn.Linear)]
        masters = {}
        for linear in linears:
            p = linear.weight
            masters[p] = self.master_of(p.detach())
            # FP8 reads whole masters: what is left of the parameter is its gradient.
            unread = type(linear) is not nn.Linear and self.weights_arrive == "never"
            p.data = p.new_full((), torch.nan, dtype=self.dtype).expand(p.shape) if unread else p.detach().to(self.dtype)
            self._add_up(p)
        return masters

    def master_of(self, values: Tensor) -> Tensor:
        """What this rank keeps of a matrix's float32 values."""
        return values

    def share(self, parameters: list[nn.Parameter]) -> None:
        """Prepares what the ranks exchange of these."""

    def part_of(self, parameter: nn.Parameter, master: Tensor | None) -> Part:
        if master is None:
            return Part(parameter, parameter, 0, self.ranks.world_size)
        rounded = parameter.detach() if parameter.is_contiguous() else None  # one without memory is not written
        return Part(parameter, master, 0, self.ranks.world_size, rounded)

    @property
    def rows(self) -> dict[Tensor, Tensor]:
        """What this rank updates, by parameter."""
        return {part.parameter: part.rows for part in self.parts.values()}

    @property
    def rounded(self) -> dict[Tensor, Tensor]:
        """What the optimizer writes beside the rows that it updates, by these."""
        return {part.rows: part.rounded for part in self.parts.values() if part.rounded is not None}

    def put(self, parameter: Tensor, values: Tensor) -> None:
        """Gives a parameter its values, (whole shape), after `attach`, and to what is updated: `round` follows."""
        part = next(part for part in self.parts.values() if part.parameter is parameter)
        part.rows.detach().copy_(values[part.first_row : part.first_row + len(part.rows)])

    @torch.no_grad()
    def round(self) -> None:
        """When the parts have got values in another way than by the optimizer: brings them to all who read them."""
        for rows, rounded in self.rounded.items():
            rounded.copy_(rows)
        self.finish()

    def begin(self, number: int, micro_steps: int) -> None:
        """Before the forward pass of a step's micro-step, from 1; gradients are exchanged in the backward pass of the last."""
        self._is_first, self._is_last, self._adds = number == 1, number == micro_steps, micro_steps > 1
        if self._adds and len(self._sums) < len(self._summed):
            self._make_sums()

    def _add_up(self, parameter: Tensor) -> None:
        """Where a step has several micro-steps, this parameter's gradients are to add up beside it, in float32."""
        self._summed.append(parameter)
        parameter.register_post_accumulate_grad_hook(self._add_gradient)

    def _make_sums(self) -> None:
        """Before anything is recorded as a CUDA graph, which finds them where they are: they stay for the whole run."""
        self._sums = {p: p.new_empty(p.shape, dtype=torch.float32) for p in self._summed}
        some = self._summed[0]
        for is_first in (True, False):  # compiles the kernel
            self.model.ops.accumulate_(self._sums[some], torch.zeros_like(self._sums[some], dtype=some.dtype), is_first)

    def _add_gradient(self, parameter: Tensor) -> None:
        if self._adds:
            self.model.ops.accumulate_(self._sums[parameter], parameter.grad, self._is_first)
            parameter.grad = None

    def take_gradient(self, parameter: Tensor) -> Tensor:
        """The gradient of the step's micro-steps, which the parameter no longer has."""
        gradient = self._sums[parameter] if parameter.grad is None else parameter.grad
        parameter.grad = None
        return gradient

    def gradients(self) -> Gradients:
        """After the last backward pass: the gradient averaged over the ranks. Every part's rows then have their `.grad`."""
        for part in self.parts.values():
            give(part.rows, self.take_gradient(part.parameter))
        return Gradients([part.rows.grad for part in self.parts.values()], self.n_elements)

    def gradient_bytes(self) -> int:
        """After `gradients`: of the memory that these lie in, which may hold more than this rank's rows, and of the sums."""
        tensors = [*(rows.grad for rows in self.rows.values() if rows.grad is not None), *self._sums.values()]
        memories = [tensor.untyped_storage() for tensor in tensors]
        return sum({memory._cdata: memory.nbytes() for memory in memories}.values())

    def finish(self) -> None:
        """After the update, which has dropped the gradients of the parts."""

    def settle(self) -> None:
        """Returns when this rank may read its parameters."""

    def marker_lines(self) -> list[str]:
        """What the start report says of it, for tools to find."""
        return []


def give(rows: Tensor, gradient: Tensor) -> None:
    """To what the optimizer updates its gradient, which may be of another dtype."""
    if gradient.dtype != rows.dtype:
        rows.grad_dtype = None  # any
    rows.grad = gradient
