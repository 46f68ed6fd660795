"""One micro-batch forward and backward: compiled, and called as it is, or recorded once as a CUDA graph and replayed.

A step of a small model is over before the host has launched its thousand kernels, and even between a large model's kernels
there are gaps. A graph is one launch.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from configurator import Config
from layout import Layout
from parallel import random_state, set_random_state
from precision import LossScale, autocast

MicroStep = Callable[[Tensor, Tensor], Tensor]  # idx and targets (B, T) -> the loss, whose gradients it adds up


def compiles(cfg: Config, device: torch.device) -> bool:
    """Whether the model is compiled: as asked for, where that can be."""
    return cfg.run.compile and not missing_compiler(device)


def compile_model(layout: Layout, cfg: Config, say: Callable[[str], object]) -> Callable[..., Tensor]:
    """The model's forward pass, compiled where `compile` asks for it and a compiler is there.

    One micro-batch of random tokens goes forward and backward, so that no timed step compiles anything; weights and random
    numbers are left as they were. Where ranks exchange within a micro-step blocks are compiled one by one: hooks at their borders
    move shards and gradients, which a graph of the whole model would let happen only before or after all of it.
    """
    model, device = layout.model, layout.ranks.device
    if not cfg.run.compile:
        return model
    if missing := missing_compiler(device):
        say(f"not compiled: torch.compile needs {missing} here; install g++, or pass --compile=False")
        return model
    say("compiling the model (--compile=False starts at once and runs slower)")
    t0_s, before = time.perf_counter(), random_state(device)
    if cfg.run.deterministic:
        from torch._inductor import config as inductor

        inductor.deterministic = True  # no measurement, which may turn out otherwise later, decides how a sum is computed
    if layout.exchanges_within:
        model.compile_units()
    forward = model if layout.exchanges_within else torch.compile(model)
    ids = torch.randint(cfg.model.vocab_size, (2, cfg.data.batch_size, cfg.model.block_size), device=device)
    with autocast(device, layout.dtype):
        loss = forward(ids[0], ids[1])
    loss.backward()
    model.zero_grad(set_to_none=True)
    set_random_state(before, device)
    say(f"compiled in {time.perf_counter() - t0_s:.1f} s")
    return forward


def build_micro_step(forward: Callable[..., Tensor], layout: Layout, loss_scale: LossScale, cfg: Config) -> MicroStep:
    """A micro-batch forward and backward. Its loss is its share of the step's, without the scale; as a graph where that works."""
    ranks = layout.ranks
    micro_steps = cfg.data.gradient_accumulation_steps // ranks.world_size

    def micro_step(idx: Tensor, targets: Tensor) -> Tensor:
        with autocast(ranks.device, layout.dtype):
            loss = forward(idx, targets) / micro_steps
        (loss * loss_scale.scale).backward()
        return loss.detach()

    if replays_graph(cfg, layout):
        return GraphedMicroStep(micro_step, layout.model.parameters())
    return micro_step


def replays_graph(cfg: Config, layout: Layout) -> bool:
    """Whether a compiled micro-step is recorded. One that talks to other ranks is more than a graph holds."""
    device = layout.ranks.device
    return cfg.run.cuda_graph is not False and compiles(cfg, device) and device.type == "cuda" and not layout.exchanges_within


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile would not find: for a CPU it writes C++, and for a GPU Triton builds its launchers in C."""
    if device.type == "cpu":
        kind, names = "a C++ compiler", (os.environ.get("CXX", "c++"), "g++", "clang++")
    else:
        kind, names = "a C compiler", (os.environ.get("CC", "gcc"), "clang")
    return None if any(map(shutil.which, names)) else kind


class GraphedMicroStep:
    """A micro-step whose kernels are recorded by the first two calls that need it and replayed by the others.

    The first micro-step of a step makes the gradients, later ones add to them: two graphs. Both have one pool of memory, where
    their gradients stay; whoever drops a `.grad` finds it there again after the next call. What hooks on some parameters do with
    theirs instead is recorded too. Every call must have the shapes of the first, and `micro_step` must have run once without a
    graph, so that nothing is compiled while it is recorded.
    """

    def __init__(self, micro_step: MicroStep, parameters: Iterable[nn.Parameter]) -> None:
        self.micro_step = micro_step
        self.parameters = list(parameters)
        self.inputs: list[Tensor] = []
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by whether there are gradients to add to
        self.gradients: list[Tensor | None] = []

    def __call__(self, idx: Tensor, targets: Tensor) -> Tensor:
        if not self.inputs:
            self.inputs = [idx.clone(), targets.clone()]
        for own, given in zip(self.inputs, (idx, targets), strict=True):
            own.copy_(given)
        adds = any(p.grad is not None for p in self.parameters)
        if adds not in self.graphs:
            self._record(adds)
        graph, loss = self.graphs[adds]
        graph.replay()
        if not adds:
            for p, gradient in zip(self.parameters, self.gradients, strict=True):
                p.grad = gradient
        return loss

    def _record(self, adds: bool) -> None:
        """Recording runs nothing: the replay that follows it is the call."""
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        torch.cuda.empty_cache()  # what the calls before have left, the graph's own pool cannot use
        # Other threads (the one that gets memory for checkpoints) may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            loss = self.micro_step(*self.inputs)
        self.graphs[adds] = graph, loss
        if not adds:
            self.gradients = [p.grad for p in self.parameters]
