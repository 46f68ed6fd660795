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
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configurator import ModelConfig
from kernels import REFERENCE, Operations

Rope = tuple[Tensor, Tensor]  # cos and sin, (T, D/2) each
Stream = tuple[Tensor, Tensor | None]  # the residual stream, and the branch that it still lacks; (B, T, C) each


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
    """Keys and values of one layer, (B, K, S, D) each; zeros where no token is yet, because a mask does not hide NaN."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.keys = self.values = torch.empty(0)  # allocated by the first append, which knows shape, dtype and device

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores k and v (B, K, T, D) behind what is there: (all keys, all values, who sees whom as `KVCache.mask`).

        Several tokens that come first get back what they brought, and no mask: among themselves they are plainly causal.
        """
        if self.keys.numel() == 0:
            shape = (*k.shape[:2], self.cache.capacity, k.shape[3])
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        self.keys.index_copy_(2, self.cache.places, k)
        self.values.index_copy_(2, self.cache.places, v)
        if self.cache.length == 0 and k.shape[2] > 1:
            return k, v, None
        return self.keys, self.values, self.cache.mask


class KVCache:
    """What generation remembers: every layer's keys and values, so that a new token costs one position, not all of them.

    All shapes stay the same from token to token, and where the next one goes is known to the device alone: so the pass of one
    token can be a CUDA graph. `length`, the host's count of tokens, is what whoever replays one has to move on.
    """

    def __init__(self, cfg: ModelConfig, capacity: int = 0) -> None:
        """For `capacity` tokens; 0 takes block_size."""
        self.capacity, self.length = capacity or cfg.block_size, 0
        self.layers = [LayerCache(self) for _ in range(cfg.n_layer)]
        self._next_place = torch.empty(0, dtype=torch.int64)  # on the model's device once it is known

    def begin(self, x: Tensor) -> None:
        """Before a pass over tokens x (B, T, C): sets their `places` (T,), and `mask` (T, S), 0 where a token sees, else -inf."""
        if self._next_place.numel() == 0:
            self._next_place = torch.zeros(1, dtype=torch.int64, device=x.device)
        self.places = self._next_place + torch.arange(x.shape[1], device=x.device)
        is_later = torch.arange(self.capacity, device=x.device) > self.places[:, None]
        self.mask = torch.zeros(is_later.shape, dtype=x.dtype, device=x.device).masked_fill_(is_later, -math.inf)

    def end(self, n_tokens: int) -> None:
        """After the pass."""
        self._next_place.add_(n_tokens)
        self.length += n_tokens

    def repeat(self, times: int) -> None:
        """Every row becomes so many, one behind the other, which may go on in different ways."""
        for layer in self.layers:
            layer.keys, layer.values = (rows.repeat_interleave(times, dim=0) for rows in (layer.keys, layer.values))

    def clear(self) -> None:
        """Forgets all tokens."""
        self._next_place.zero_()
        self.length = 0


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
            k, v, mask = cache.append(k, v)  # (B, K, S, D) each, (T, S)
        if T == 1:  # the queries that share a key see the same keys: they may stand where time stood
            q = q.reshape(B, self.kv_heads, -1, self.head_dim)  # (B, K, H/K, D)
        dropout, causal, gqa = (
            self.dropout if self.training else 0.0,
            mask is None and T > 1,
            T > 1 and self.kv_heads < self.heads,
        )
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=gqa)  # as q
        y = y.reshape(B, self.heads, T, self.head_dim)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


def activation(cfg: ModelConfig, ops: Operations) -> Callable[[Tensor], Tensor]:
    """What lies between the feed-forward's two products."""
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "swiglu": ops.swiglu,
        "gelu": ops.gelu,
        "gelu_tanh": ops.gelu_tanh,
        "relu": F.relu,
        "silu": F.silu,
        "relu_squared": lambda x: F.relu(x).square(),
    }
    return kinds[cfg.activation if cfg.ffn_type == "standard" else cfg.ffn_type]


class FeedForward(nn.Module):
    """Two matrices and an activation, or SwiGLU's three, the first two of which (gate and up) are one product."""

    def __init__(self, cfg: ModelConfig, ops: Operations) -> None:
        super().__init__()
        swiglu = cfg.ffn_type == "swiglu"
        self.activation = activation(cfg, ops)
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
        room = self.cfg.block_size if cache is None else min(self.cfg.block_size, cache.capacity)
        if end > room:
            raise ValueError(f"{end} tokens do not fit into a context of {room} (block_size={self.cfg.block_size})")
        x = self.token_embedding(idx)  # (B, T, C)
        where: slice | Tensor = slice(start, end)
        if cache is not None:
            cache.begin(x)
            where = cache.places
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[where]
        rope = (self.rope_cos[where], self.rope_sin[where]) if self.cfg.position_encoding == "rope" else None
        if autocast_to_bfloat16(x.device.type):
            x = x.bfloat16()  # the residual stream too: half the bytes; float16 has not the range for it
        x = self.dropout(x)
        recompute = self.cfg.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        branch = None  # (B, T, C): what the last block has yet to add to x
        for i, block in enumerate(self.blocks):
            if recompute:  # one tensor is kept a block, so the branch joins the stream before the border
                x = x if branch is None else x + branch
                x, branch = checkpoint(block, x, None, rope, use_reentrant=False)
            else:
                x, branch = block(x, branch, rope, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.end(idx.shape[1])
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
        self.fill_rope_tables()

    def fill_rope_tables(self) -> None:
        """What a model from the meta device lacks beside its parameters."""
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
