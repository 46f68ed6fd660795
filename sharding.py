"""How parameters, gradients and AdamW's state lie on several ranks: layout.py's `Layout` by ddp, zero1 and fsdp.

             parameters   gradients   masters and AdamW's state
    ddp      all          all         all
    zero1    all          all*        own rows         (Rajbhandari et al. 2020, ZeRO stage 1)
    fsdp     own rows     own rows    own rows         (PyTorch's fully_shard; between the steps)

    * own rows of the averages of matrices that are not float32, where nothing is added up and copy engines bring them

Of a tensor with R rows rank r of N owns rows [r c, (r + 1) c) with c = ceil(R / N), as torch.chunk cuts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from configurator import Config, UserError, nearest
from exchange import Collectives, Copies, Wait, choose_exchange, own_rows, share_of
from layout import Layout, Part
from memory import GIB, USABLE, exchanges_behind, first_that_fits, how_often, predict_memory, settled
from optim import LAID_ROW, Gradients, laid_out, laid_rows, laid_zeros
from parallel import Ranks
from precision import dtype_name


def put_rows(parameter: Tensor, values: Tensor) -> None:
    """Gives a parameter its values, (whole shape); one that is sharded keeps its own rows of them."""
    if isinstance(parameter, DTensor):
        rows, first = parameter.to_local(), first_row_of(parameter)
        rows.copy_(values[first : first + len(rows)])
    else:
        parameter.copy_(values)


def first_row_of(parameter: DTensor) -> int:
    mesh = parameter.device_mesh  # over all ranks, or (replicas, ranks of a node)
    return own_rows(parameter.shape[0], mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1))[0]


class DataParallel(Layout):
    """ddp: a gradient is averaged over the ranks while the backward pass goes on with the next.

    PyTorch's DistributedDataParallel does the same with a second copy of the gradients, in buckets. Vectors (norms, biases), a
    ten-thousandth of the elements, follow together at the end.
    """

    name = "ddp"
    exchanges_within = True
    everywhere = True  # each rank wants the average of all rows

    def share(self, parameters: list[nn.Parameter]) -> None:
        matrices, self.vectors = ([p for p in parameters if (p.ndim > 1) is wanted] for wanted in (True, False))
        largest_share = max(share_of([p], self.ranks.world_size) for p in matrices)
        self.exchange = self._choose_copies(largest_share, [] if self.everywhere else matrices)
        self._means: dict[Tensor, Tensor] = {}  # of a step, by matrix
        for p in matrices:
            p.register_post_accumulate_grad_hook(self._exchange_gradient)

    def _choose_copies(self, largest_share: int, at_home: list[nn.Parameter]) -> Copies | Collectives:
        if self.exchange_by != "copies":
            return Collectives(self.ranks)
        copies = Copies(self.ranks, largest_share, self.everywhere, self.model.ops.average_, at_home)
        self.uncounted_bytes = copies.peers.uncounted_bytes
        return copies

    def _exchange_gradient(self, parameter: Tensor) -> None:
        if self._is_last:
            self._means[parameter] = self.exchange.average(self.take_gradient(parameter), self.everywhere)

    def gradients(self) -> Gradients:
        vectors = [p.grad for p in self.vectors]
        if vectors:
            flat = self.ranks.sum_(torch.cat([v.flatten() for v in vectors])) / self.ranks.world_size
            torch._foreach_copy_(vectors, list(flat.split([v.numel() for v in vectors])))  # vectors have one dimension
        self.exchange.finish_averages()
        own, matrices = [], [part for part in self.parts.values() if part.parameter.ndim > 1]
        for part in matrices:
            mean = self._means.pop(part.parameter)
            own.append(self.own_rows_of(mean) if self.everywhere else mean)
            if len(part.rows):  # AdamW passes over what has no gradient
                part.rows.grad = mean
        counted = [rows for rows in own if len(rows)] + (vectors if self.ranks.is_main else [])
        return Gradients(counted, self.n_elements, self.ranks.sum_)

    def own_rows_of(self, tensor: Tensor) -> Tensor:
        first, end = own_rows(len(tensor), self.ranks.rank, self.ranks.world_size)
        return tensor[first:end]


class DataParallelBehind(DataParallel):
    """ddp of a small model, whose gradients are exchanged behind the last backward pass, all together.

    Its kernels are over before the host has launched them, so a micro-step is a CUDA graph, which exchanges nothing, and what
    follows is few launches: gradients are copied to one memory for each dtype, and that is averaged like one matrix.
    """

    exchanges_within = False

    def share(self, parameters: list[nn.Parameter]) -> None:
        _, end = own_rows(laid_rows(parameters), 0, self.ranks.world_size)
        self.exchange = self._choose_copies(end * LAID_ROW, [])
        self._memory: dict[torch.dtype, tuple[Tensor, list[Tensor]]] = {}  # laid_zeros for the gradients of that dtype

    def gradients(self) -> Gradients:
        gradients = {part.rows: self.take_gradient(part.parameter) for part in self.parts.values()}
        means = []
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients.values()):
            rows, own = zip(*((r, g) for r, g in gradients.items() if g.dtype == dtype), strict=True)
            if dtype not in self._memory:
                self._memory[dtype] = laid_zeros(own)
            memory, places = self._memory[dtype]
            torch._foreach_copy_(places, own)
            means.append((rows, self.exchange.average(memory, everywhere=True)))
        self.exchange.finish_averages()
        for rows, mean in means:
            for updated, gradient in zip(rows, laid_out(mean, rows), strict=True):
                updated.grad = gradient
        counted = [self.own_rows_of(mean) for _, mean in means]
        return Gradients([rows for rows in counted if len(rows)], self.n_elements, self.ranks.sum_)


class Zero1(DataParallel):
    """zero1: every rank updates its own rows of the matrices and gathers the others' while the next forward pass begins.

    Vectors are updated by all. Gradients, their norm and so every weight are bitwise DataParallel's.
    """

    name = "zero1"
    weights_arrive = "once"
    everywhere = False

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        self._waits: dict[nn.Module, list[Wait]] = {}  # by the module that reads the parameters: what is under way to them
        units = model.shard_units()
        for unit in (model, *units):
            unit.register_forward_pre_hook(lambda module, args: self._wait_for(module))
        reader_of = {p: unit for unit in units for p in unit.parameters()}
        order = [model, *units]
        if model.head is not None:
            reader_of[model.head.weight] = model.head
            order.append(model.head)
            units[-1].register_forward_hook(lambda module, args, output: self._wait_for(model.head))
        sharded = [part for part in self.parts.values() if part.rows is not part.parameter]
        readers = [(reader_of.get(part.parameter, model), part) for part in sharded]
        self._sharded = sorted(readers, key=lambda pair: order.index(pair[0]))  # as the forward pass waits for them

    def marker_lines(self) -> list[str]:
        return ["Using ZeRO-1 optimizer state sharding"]

    def master_of(self, values: Tensor) -> Tensor:
        return self.own_rows_of(values).clone()  # a view would keep all of them

    def part_of(self, parameter: nn.Parameter, master: Tensor | None) -> Part:
        if parameter.ndim < 2:
            return super().part_of(parameter, master)
        first, _ = own_rows(len(parameter), self.ranks.rank, self.ranks.world_size)
        rows = self.own_rows_of(parameter.detach())
        return Part(parameter, rows, first, 1) if master is None else Part(parameter, master, first, 1, rows)

    def finish(self) -> None:
        for reader, part in self._sharded:
            self._waits.setdefault(reader, []).append(self.exchange.spread(part.parameter.detach()))

    def _wait_for(self, reader: nn.Module) -> None:
        for wait in self._waits.pop(reader, []):
            wait()

    def settle(self) -> None:
        for reader in list(self._waits):
            self._wait_for(reader)


class GatherByCopies:
    """What fully_shard exchanges by in place of NCCL, in streams of its own: methods of its AllGather."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        self.copies.gather(output_tensor, input_tensor)


class ReduceScatterByCopies:
    """As its ReduceScatter. What is sent is in `dtype()`, that of the gradients; what comes out in the one that is asked for."""

    def __init__(self, copies: Copies, dtype: Callable[[], torch.dtype]) -> None:
        self.copies, self.dtype, self._is_output = copies, dtype, True

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._is_output = not self._is_output  # fully_shard asks for memory to send from, and then for the result's
        return torch.empty(size, dtype=dtype if self._is_output else self.dtype(), device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        self.copies.reduce_scatter(output_tensor, input_tensor, op)


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class FullyShard(Layout):
    """fsdp: a block's parameters are gathered, in the dtype of the arithmetic, just before they are needed."""

    name = "fsdp"
    exchanges_within = True

    def marker_lines(self) -> list[str]:
        both = ["fsdp contains zero1: --use_zero1 adds nothing to it"] if self.cfg.use_zero1 else []
        least, precision = self.cfg.fsdp_min_num_params, dtype_name(self.dtype)
        enabled = f"FSDP enabled with min_params={least:,}, mixed_precision={precision}"
        return [*both, "Wrapping model with FSDP...", enabled]

    def shard(self, model: nn.Module) -> None:
        n, size = self.ranks.world_size, self.cfg.hsdp_shard_size or self.ranks.world_size
        device = self.ranks.device.type
        if size < n:  # the ranks of a node share a copy; copies are averaged
            mesh = init_device_mesh(device, (n // size, size), mesh_dim_names=("copy", "shard"))
        else:
            mesh = init_device_mesh(device, (n,))
        # Positions and rotary tables come in as they are: rounding them to the parameters' dtype would move the model.
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.dtype != torch.float32:
            policy = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        rest, largest_share = set(model.parameters()), 0
        for unit in model.shard_units():
            own = list(unit.parameters())
            if sum(p.numel() for p in own) >= self.cfg.fsdp_min_num_params:
                fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=self.gathers_again)
                rest, largest_share = rest.difference(own), max(largest_share, share_of(own, n))
        largest_share = max(largest_share, share_of(rest, n))
        # The rest has the head, which the backward pass wants first.
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self._sharing = mesh.get_group(mesh.ndim - 1)
        if self.exchange_by == "copies":
            copies = Copies(self.ranks, largest_share, False, model.ops.average_, gathers=True)
            self.uncounted_bytes = copies.peers.uncounted_bytes
            for unit in fsdp_units(model):
                unit.set_custom_all_gather(GatherByCopies(copies))
                unit.set_custom_reduce_scatter(ReduceScatterByCopies(copies, self.dtype_of_gradients))

    @property
    def weights_arrive(self) -> Literal["once", "often"]:
        return "often" if self.gathers_again else "once"

    @property
    def gathers_again(self) -> bool:
        """Whether a block's weights are freed between its forward and its backward pass."""
        return self.cfg.fsdp_reshard_after_forward is not False and not self.cfg.fsdp_accumulate_whole

    def attach(self, model: nn.Module) -> None:
        for unit in fsdp_units(model):
            unit.unshard()  # fully_shard moves uneven shards to padded memory when they are first used
            if self.cfg.fsdp_accumulate_whole and self.dtype != torch.float32:
                for p in (p for p in unit.parameters() if not isinstance(p, DTensor)):
                    p.grad_dtype = None  # float32 where gradients have been added up
                    self._add_up(p)
            unit.reshard()
        super().attach(model)

    def _add_gradient(self, parameter: Tensor) -> None:
        super()._add_gradient(parameter)
        if self._adds and self._is_last:
            parameter.grad = self._sums[parameter]

    def dtype_of_gradients(self) -> torch.dtype:
        """When they are exchanged."""
        return torch.float32 if self._adds and self.cfg.fsdp_accumulate_whole else self.dtype

    def round_products(self) -> dict[Tensor, Tensor]:
        return {}  # fully_shard rounds what it gathers

    def part_of(self, parameter: nn.Parameter, master: Tensor | None) -> Part:
        assert isinstance(parameter, DTensor), "fully_shard leaves no parameter out"
        copies = parameter.device_mesh.size() // parameter.device_mesh.size(parameter.device_mesh.ndim - 1)
        return Part(parameter, parameter.detach().to_local(), first_row_of(parameter), copies)

    def begin(self, number: int, micro_steps: int) -> None:
        super().begin(number, micro_steps)
        exchange = self._is_last or not self.cfg.fsdp_accumulate_whole
        self.model.set_requires_gradient_sync(exchange)
        self.model.set_reshard_after_backward(exchange)  # until then weights stay gathered

    def gradients(self) -> Gradients:
        parts = [part for part in self.parts.values() if len(part.rows)]  # AdamW passes over what has no gradient
        for part in parts:
            part.rows.grad = part.parameter.grad.to_local()
        return Gradients([part.rows.grad for part in parts], self.n_elements, self._total)

    def _total(self, figure: Tensor) -> Tensor:
        dist.all_reduce(figure, group=self._sharing)
        return figure

    def finish(self) -> None:
        for part in self.parts.values():
            part.parameter.grad = None


LAYOUTS = {layout.name: layout for layout in (DataParallel, Zero1, FullyShard)}


def choose_layout(cfg: Config, ranks: Ranks, dtype: torch.dtype) -> tuple[Config, Layout, str]:
    """(cfg with what it leaves to the memory settled, how the model lies on the ranks, what the report says of it).

    A collective. Raises UserError where the ranks cannot share the work.
    """
    n, steps, size = ranks.world_size, cfg.data.gradient_accumulation_steps, cfg.parallel.hsdp_shard_size
    if steps % n:
        near = nearest([k * n for k in range(1, steps // n + 2)], steps)
        raise UserError(
            f"--gradient_accumulation_steps={steps} counts the micro-steps of all ranks together, and {n} ranks cannot share "
            f"them evenly; the nearest that work: {near}"
        )
    if n == 1:
        return settled(cfg, dtype_name(dtype), n, 0.0), Layout(ranks, cfg.parallel, dtype), "one process"
    if size and n % size:
        near = nearest([k for k in range(1, n + 1) if n % k == 0], size)
        raise UserError(f"--hsdp_shard_size={size} does not divide the {n} ranks; the nearest that do: {near}")
    on_gpu, asked = ranks.device.type == "cuda", cfg.parallel.asked
    # The smallest GPU's; a CPU's memory is not predicted, and so taken to be short.
    memory_gib = min(ranks.all_of(torch.cuda.get_device_properties(ranks.device).total_memory / GIB)) if on_gpu else 0.0
    cfg, name, why = settled(cfg, dtype_name(dtype), n, memory_gib), asked, "as asked for"
    if asked == "auto":
        name, why = choose_by_memory(cfg, dtype, n, memory_gib) if on_gpu else ("ddp", "the default on a CPU")
    if name == "fsdp":
        why = ", ".join([why, *how_often(cfg, n)])
    exchange_by, why_not = choose_exchange(cfg.parallel.exchange, ranks, in_groups=name == "fsdp" and 0 < size < n)
    kind = LAYOUTS[name]
    if exchange_by == "copies":
        why += ", by the GPUs' copy engines"
        if exchanges_behind(cfg, name):
            kind, why = DataParallelBehind, f"{why}, behind the backward pass"
    elif on_gpu:
        why += f", through NCCL ({why_not})"
    return cfg, kind(ranks, cfg.parallel, dtype, exchange_by), f"{name} over {n} ranks, {why}"


def choose_by_memory(cfg: Config, dtype: torch.dtype, n_ranks: int, memory_gib: float) -> tuple[str, str]:
    """(the first strategy whose predicted peak fits so much memory, why)."""
    name = first_that_fits(cfg, dtype_name(dtype), n_ranks, memory_gib)
    peak_gib = predict_memory(cfg, dtype_name(dtype), name or "fsdp", n_ranks).peak / GIB
    need = f"predicted to need {peak_gib:.1f} of {USABLE * memory_gib:.1f} usable GiB"
    return name or "fsdp", f"the first that fits: {need}" if name else f"though {need}: nothing needs less"
