"""One micro-batch forward and backward: called as it is, or recorded once as a CUDA graph and replayed.

A step of a small model is over before the host has launched its thousand kernels, and even between a large model's kernels
there are gaps. A graph is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

MicroStep = Callable[[Tensor, Tensor], Tensor]  # idx and targets (B, T) -> the loss, whose gradients it adds up


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
