"""Text from a model: how the next token is drawn, and the loop that draws one after the other.

Shapes: B rows that are continued together, T time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from configurator import UserError
from model import KVCache, Transformer


@dataclass(frozen=True)
class SampleOptions:
    """How the next token is drawn from the logits."""

    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0  # draw among the k most likely; 0 among all
    top_p: float = 1.0  # draw among the fewest most likely tokens whose probabilities reach top_p together
    n_valid_ids: int = 0  # ids from here on only pad the vocabulary and are never drawn; 0 means that all are real
    stop_id: int | None = None  # a row that has drawn it repeats it; generation ends when every row has

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, not {self}")


def next_token(logits: Tensor, options: SampleOptions, generator: torch.Generator | None = None) -> Tensor:
    """Draw one id a row: logits (B, V) -> (B, 1) int64. Temperature first, then top_k, then top_p."""
    logits = logits.float()
    if options.n_valid_ids:
        logits = logits[:, : options.n_valid_ids]
    if options.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        kth = logits.topk(options.top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    probabilities = logits.softmax(dim=-1)  # (B, V)
    if options.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of everything more likely; 0 for the first, which always stays
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(before >= options.top_p, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator)


class Decoder:
    """A model that goes on token by token: a call takes the new tokens, (B, T) int64, and gives the logits behind them, (B, V).

    With `graph` the pass of a single token, on a GPU some hundred small kernels, is captured once and from then on launched as
    one (at a batch of 1 launching them takes longer than running them); with `compile` it is compiled before.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, batch: int, capacity: int, graph: bool = False, compile: bool = False) -> None:
        self._model, self.cache = model, KVCache(model.cfg, -(-capacity // 64) * 64)  # attention likes whole tiles
        self._graph: torch.cuda.CUDAGraph | None = None
        if graph:
            self._capture(batch, torch.compile(model) if compile else model)

    def __call__(self, idx: Tensor) -> Tensor:
        if self._graph is None or idx.shape[1] > 1:
            return self._model(idx, cache=self.cache, last_only=True)[:, -1]
        self._token.copy_(idx)
        self._graph.replay()
        self.cache.length += 1
        return self._logits

    def _capture(self, batch: int, forward: Callable[..., Tensor]) -> None:
        """On an empty cache, which is empty again after it."""
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=self._model.token_embedding.weight.device)
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):  # what is allocated, chosen or compiled at first use is no part of the graph
            for _ in range(2):
                forward(self._token, cache=self.cache, last_only=True)
                self.cache.clear()
        torch.cuda.current_stream().wait_stream(warm_up)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = forward(self._token, cache=self.cache, last_only=True)[:, -1]
        self.cache.length = 0  # the device has counted nothing: a capture runs nothing


@torch.no_grad()
def draw_tokens(
    model: Transformer,
    idx: Tensor,
    max_new_tokens: int,
    options: SampleOptions = SampleOptions(),
    generator: torch.Generator | None = None,
    decoder: Decoder | None = None,
) -> Iterator[Tensor]:
    """The tokens that continue every row of idx, (B, T) int64 with T >= 1: up to max_new_tokens times (B, 1).

    Up to block_size tokens go through a cache. Beyond that each new token is predicted from the last block_size tokens alone,
    at positions 0 ... block_size - 1, computed afresh as nanoGPT does: right for every position encoding, a full pass a token.
    """
    if idx.shape[1] == 0:
        raise UserError("generation needs at least one token to continue: give it a longer start")
    block_size, n_prompt = model.cfg.block_size, idx.shape[1]
    decoder = decoder or Decoder(model, len(idx), min(block_size, n_prompt + max_new_tokens))
    done = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
    ids = torch.cat((idx, idx.new_zeros(len(idx), max_new_tokens)), dim=1)  # (B, T + max_new_tokens)
    for end in range(n_prompt, n_prompt + max_new_tokens):
        if end <= block_size:
            logits = decoder(ids[:, decoder.cache.length : end])
        else:
            logits = model(ids[:, end - block_size : end], last_only=True)[:, -1]
        token = next_token(logits, options, generator)  # (B, 1)
        if options.stop_id is not None:
            token = token.masked_fill(done, options.stop_id)
            done = token == options.stop_id
        ids[:, end : end + 1] = token
        yield token
        if options.stop_id is not None and done.all():
            return


def generate(
    model: Transformer,
    idx: Tensor,
    max_new_tokens: int,
    options: SampleOptions = SampleOptions(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """idx and what `draw_tokens` continues it with, (B, T) int64 -> (B, T + up to max_new_tokens), whatever the model's mode."""
    was_training = model.training
    model.eval()
    try:
        return torch.cat((idx, *draw_tokens(model, idx, max_new_tokens, options, generator)), dim=1)
    finally:
        model.train(was_training)
