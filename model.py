"""One decoder, assembled from independent choices: GPT-2, LLaMA and what lies between, each choice a knob of ModelConfig.

    idx -> token_embedding (+ position_embedding) -> n_layer x Block -> (final_norm) -> head -> logits
    Block, pre-norm:  x = x + attention(norm(x));  x = x + ffn(norm(x))
    Block, post-norm: x = norm(x + attention(x));  x = norm(x + ffn(x)), and no final norm

Shapes: B batch, T time, S time including what a cache holds, C width (n_embd), H query heads, K key/value heads,
D head size, F hidden width of the feed-forward, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configurator import ModelConfig, UserError
from kernels import REFERENCE, Operations

Rope = tuple[Tensor, Tensor]  # cos and sin, (T, D/2) each
Stream = tuple[Tensor, Tensor | None]  # the residual stream, and the branch that it still lacks; (B, T, C) each

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def autocast_to_bfloat16(device: str) -> bool:
    if device == "meta":  # knows no autocast: asking raises
        return False
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16


class Norm(nn.Module):
    """LayerNorm, with or without a bias, or RMSNorm over the last axis."""

    def __init__(self, width: int, kind: str, bias: bool, eps: float, ops: Operations) -> None:
        super().__init__()
        self.rms = kind == "rmsnorm"
        self.eps = eps
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + branch, its norm), in one pass over memory where the kernel can; without a branch (x, its norm)."""
        if branch is None:
            if self.rms:
                return x, self.ops.rms_norm(x, self.weight, self.eps)
            return x, self.ops.layer_norm(x, self.weight, self.bias, self.eps)
        if self.rms:
            return self.ops.add_rms_norm(branch, x, self.weight, self.eps)
        return self.ops.add_layer_norm(branch, x, self.weight, self.bias, self.eps)


class LayerCache:
    """Keys and values of one layer, (B, K, block_size, D) each, of which the first `length` positions are filled."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.length = 0
        self.keys = self.values = torch.empty(0)  # allocated by the first append, which knows shape, dtype and device

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, D) behind what is there; returns all keys and values, (B, K, S, D) each."""
        if self.length == 0:
            shape = (*k.shape[:2], self.block_size, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """What generation remembers: every layer's keys and values, so that a new token costs one position, not all of them."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.layers = [LayerCache(cfg.block_size) for _ in range(cfg.n_layer)]

    @property
    def length(self) -> int:
        return self.layers[0].length


class Attention(nn.Module):
    """Causal self-attention; K < H is grouped-query attention: each key/value head serves H/K query heads in a row."""

    def __init__(self, cfg: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.ops = ops
        self.heads, self.kv_heads, self.head_dim, self.dropout = cfg.n_head, cfg.kv_heads, cfg.head_dim, cfg.dropout
        self.qkv = nn.Linear(cfg.n_embd, (cfg.n_head + 2 * cfg.kv_heads) * cfg.head_dim, bias=cfg.bias)
        self.q_norm = Norm(cfg.head_dim, "rmsnorm", False, cfg.norm_eps, ops) if cfg.qk_norm else None
        self.k_norm = Norm(cfg.head_dim, "rmsnorm", False, cfg.norm_eps, ops) if cfg.qk_norm else None
        self.out = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=cfg.bias)

    def forward(self, x: Tensor, rope: Rope | None, cache: LayerCache | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_dim)  # (B, T, H + 2K, D)
        if rope is not None and self.q_norm is None:
            q, k, v = self.ops.rope_qkv_(qkv, self.heads, self.kv_heads, *rope)  # (B, T, H, D), (B, T, K, D), (B, T, K, D)
        else:
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
            if self.q_norm is not None:
                q, k = self.q_norm(q)[1], self.k_norm(k)[1]
            if rope is not None:
                q, k = self.ops.rope(q, k, *rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, K, T, D), (B, K, T, D)
        mask = None
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D) each
            S = k.shape[2]
            if 1 < T < S:  # is_causal aligns the first query with the first key, wrong where the cache holds earlier ones
                mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)  # (T, S)
        dropout, causal, gqa = self.dropout if self.training else 0.0, mask is None and T > 1, self.kv_heads < self.heads
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=gqa)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class FeedForward(nn.Module):
    """Two matrices and an activation, or SwiGLU's three, the first two of which (gate and up) are one product."""

    def __init__(self, cfg: ModelConfig, ops: Operations) -> None:
        super().__init__()
        swiglu = cfg.ffn_type == "swiglu"
        self.activation = ops.swiglu if swiglu else ACTIVATIONS[cfg.activation]
        self.up = nn.Linear(cfg.n_embd, (2 if swiglu else 1) * cfg.ffn_hidden, bias=cfg.bias)  # swiglu: gate, then up
        self.out = nn.Linear(cfg.ffn_hidden, cfg.n_embd, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.up(x)))  # (B, T, C) -> (B, T, F) -> (B, T, C)


class Block(nn.Module):
    """Attention and feed-forward. A branch joins the residual stream x together with the norm that follows: one pass for both."""

    def __init__(self, cfg: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.pre_norm = cfg.norm_position == "pre"
        self.attention_norm = Norm(cfg.n_embd, cfg.normalization, cfg.norm_bias, cfg.norm_eps, ops)
        self.attention = Attention(cfg, ops)
        self.ffn_norm = Norm(cfg.n_embd, cfg.normalization, cfg.norm_bias, cfg.norm_eps, ops)
        self.ffn = FeedForward(cfg, ops)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, branch: Tensor | None, rope: Rope | None, cache: LayerCache | None = None) -> Stream:
        """(x, the branch that x still lacks) -> the same behind this block; each (B, T, C)."""
        if self.pre_norm:
            x, h = self.attention_norm(x, branch)
            x, h = self.ffn_norm(x, self.dropout(self.attention(h, rope, cache)))
            return x, self.dropout(self.ffn(h))
        _, x = self.attention_norm(x, self.dropout(self.attention(x, rope, cache)))
        _, x = self.ffn_norm(x, self.dropout(self.ffn(x)))
        return x, None


class Transformer(nn.Module):
    """The decoder. Build it anywhere (on the meta device too), then give it values: `init_weights`, or load a state dict."""

    def __init__(self, cfg: ModelConfig, ops: Operations = REFERENCE) -> None:
        super().__init__()
        assert cfg.vocab_size > 0, "vocab_size is taken from the dataset before the model is built"
        self.cfg, self.ops = cfg, ops
        learned = cfg.position_encoding == "learned_absolute"
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.position_embedding = nn.Embedding(cfg.block_size, cfg.n_embd) if learned else None
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, ops) for _ in range(cfg.n_layer))
        pre_norm = cfg.norm_position == "pre"
        self.final_norm = Norm(cfg.n_embd, cfg.normalization, cfg.norm_bias, cfg.norm_eps, ops) if pre_norm else None
        # A tied head is the token embedding used twice, not a second name for it: nothing can untie it.
        self.head = None if cfg.weight_tying else nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.position_encoding == "rope":
            cos, sin = self._rope_tables(self.token_embedding.weight.device)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """With targets the loss, a float32 scalar over the targets that are not -1; without them logits.

        idx and targets (B, T) int64 -> () or (B, T, V); `last_only` gives the last position's logits, (B, 1, V). With a cache,
        idx goes on behind the tokens that it holds. Raises ValueError where the context would grow beyond block_size.
        """
        start = 0 if cache is None else cache.length
        end = start + idx.shape[1]
        if end > self.cfg.block_size:
            raise ValueError(f"{end} tokens do not fit into a context of block_size={self.cfg.block_size}")
        x = self.token_embedding(idx)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[start:end]
        rope = (self.rope_cos[start:end], self.rope_sin[start:end]) if self.cfg.position_encoding == "rope" else None
        if autocast_to_bfloat16(x.device.type):
            x = x.bfloat16()  # the residual stream too: half the bytes; float16 has not the range for it
        x = self.dropout(x)
        recompute = self.cfg.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        branch = None  # (B, T, C): what the last block has yet to add to x
        for i, block in enumerate(self.blocks):
            if recompute:
                x, branch = checkpoint(block, x, branch, rope, use_reentrant=False)
            else:
                x, branch = block(x, branch, rope, None if cache is None else cache.layers[i])
        if last_only:
            x, branch = x[:, -1:], None if branch is None else branch[:, -1:]
        return self.read_out(x, branch, targets, reduction)

    def read_out(self, x: Tensor, branch: Tensor | None, targets: Tensor | None, reduction: Literal["mean", "sum"]) -> Tensor:
        """What is behind the last block: final norm, head and, with targets, the loss."""
        if self.final_norm is not None:
            _, x = self.final_norm(x, branch)  # (B, T, C)
        weight = (self.head or self.token_embedding).weight
        if targets is None:
            return F.linear(x, weight)  # (B, T, V)
        return self.ops.linear_cross_entropy(x, weight, targets, reduction, self.cfg.loss_chunk_rows)

    def shard_units(self) -> list[nn.Module]:
        """The modules that may be sharded and gathered one at a time; embeddings, final norm and head are left to the root."""
        return list(self.blocks)

    def compile_units(self) -> None:
        """Compiles each block and what is behind them by itself, so that what ranks exchange can move between them."""
        for block in self.blocks:
            block.forward = torch.compile(block.forward)
        self.read_out = torch.compile(self.read_out)

    @torch.no_grad()
    def init_weights(self, seed: int, put: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        """GPT-2's initialisation: normal(0, 0.02), smaller where a branch joins the residual stream, norms 1, biases 0.

        Each parameter is drawn whole, on its device, by a generator of its own, seeded by (seed, name): values depend neither
        on the order of construction nor on how many ranks share it; `put(parameter, values)` keeps what is this rank's. Also
        fills the rotary tables, so that a model from the meta device is whole after it.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.ndim == 1:  # norms
                parameter.fill_(1.0)
            else:
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
                # 2 n_layer branches add up in the residual stream: 1/sqrt of that keeps its variance (GPT-2 paper, section 2.3).
                std = 0.02 / math.sqrt(2 * self.cfg.n_layer) if name.endswith(".out.weight") else 0.02
                put(parameter, torch.empty(parameter.shape, device=parameter.device).normal_(0.0, std, generator=generator))
        if self.cfg.position_encoding == "rope":
            cos, sin = self._rope_tables(self.rope_cos.device)
            self.rope_cos.copy_(cos)
            self.rope_sin.copy_(sin)

    def _rope_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of position x rope_theta^(-2i/D), (block_size, D/2) float32 each (RoFormer paper, section 3.2.2)."""
        D = self.cfg.head_dim
        frequency = 1.0 / self.cfg.rope_theta ** (torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)  # (D/2,)
        angle = torch.outer(torch.arange(self.cfg.block_size, device=device, dtype=torch.float32), frequency)
        return angle.cos(), angle.sin()  # (block_size, D/2) each


def build_model(
    cfg: ModelConfig,
    device: torch.device,
    seed: int,
    ops: Operations = REFERENCE,
    shard: Callable[[Transformer], Any] = lambda model: None,
    put: Callable[[Tensor, Tensor], Any] = Tensor.copy_,
) -> Transformer:
    """A fresh model on the device: shapes on meta, sharded, then storage and initialisation, so that nothing is held twice."""
    with torch.device("meta"):
        model = Transformer(cfg, ops)
    shard(model)
    model.to_empty(device=device).init_weights(seed, put)
    return model


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


@torch.no_grad()
def generate(
    model: Transformer,
    idx: Tensor,
    max_new_tokens: int,
    options: SampleOptions = SampleOptions(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue every row of idx: (B, T) int64, T >= 1 -> (B, T + up to max_new_tokens).

    Up to block_size tokens go through a cache. Beyond that each new token is predicted from the last block_size tokens alone,
    at positions 0 ... block_size - 1, computed afresh as nanoGPT does: right for every position encoding, a full pass a token.
    """
    if idx.shape[1] == 0:
        raise UserError("generation needs at least one token to continue: give it a longer start")
    block_size = model.cfg.block_size
    was_training = model.training
    model.eval()
    cache = KVCache(model.cfg)
    done = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
    try:
        for _ in range(max_new_tokens):
            if idx.shape[1] <= block_size:
                logits = model(idx[:, cache.length :], cache=cache, last_only=True)
            else:
                logits = model(idx[:, -block_size:], last_only=True)  # (B, 1, V)
            token = next_token(logits[:, -1], options, generator)  # (B, 1)
            if options.stop_id is not None:
                token = token.masked_fill(done, options.stop_id)
                done = token == options.stop_id
            idx = torch.cat((idx, token), dim=1)
            if options.stop_id is not None and done.all():
                break
    finally:
        model.train(was_training)
    return idx
