"""Memory of one GPU at the peak of a training step, in closed form and without torch; docs/PARAMETER_FORMULAS.md derives it.

It is a prediction for a compiled model: what autograd keeps for the backward pass is what torch.compile's partitioner chooses to
keep, and tests/test_memory.py holds it to that choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configurator import Config, ModelConfig
from flops import Precision, count_parameters

Strategy = Literal["ddp", "zero1", "fsdp"]
USABLE = 0.92  # of a GPU's memory: the CUDA context, the buffers of NCCL and cuBLAS and the allocator's gaps take the rest

# fmt: off
GPU_MEMORY_GIB: dict[str, float] = {  # by the names of flops.PEAKS; as drivers report it, which ECC makes less than data sheets
    "GB200": 184, "B200": 178, "B100": 178,
    "H200": 140, "H100 80GB HBM3": 79, "H800": 79, "GH200 120GB": 95, "GH200 480GB": 95, "GH200 144G HBM3e": 143,
    "H200 NVL": 140, "H100 NVL": 93, "H100 PCIe": 79, "H800 PCIe": 79, "H20": 95, "H20-3e": 140,
    "A100-SXM4-40GB": 39, "A100-SXM4-80GB": 79, "A100-PCIE-40GB": 39, "A100 80GB PCIe": 79,
    "A800-SXM4-80GB": 79, "A800 80GB PCIe": 79, "A30": 23, "A10": 22, "A40": 44, "RTX A6000": 47, "GeForce RTX 3090": 23,
    "L4": 22, "L40": 44, "L40S": 44, "RTX 6000 Ada Generation": 47, "GeForce RTX 4090": 23, "GeForce RTX 5090": 31,
    "Tesla V100-SXM2-16GB": 15, "Tesla V100-SXM2-32GB": 31, "Tesla V100-PCIE-16GB": 15, "Tesla V100-PCIE-32GB": 31,
    "Tesla T4": 14,
}
# fmt: on


@dataclass(frozen=True)
class Sharding:
    """How a model's state lies over the ranks."""

    strategy: Strategy = "ddp"
    ranks: int = 1
    shard_ranks: int = 0  # of fsdp: how many ranks hold one copy together (HSDP's shard size); 0: all
    min_unit_params: int = 0  # of fsdp: smaller blocks are no units of their own and join the root
    reshard_after_forward: bool = True  # of fsdp: a unit's gathered weights are dropped between its forward and its backward pass


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one GPU: what each component takes at most, and the peak, where not all are there at the same time."""

    parameters: int  # float32
    gradients: int  # float32
    optimizer: int  # AdamW's two moments
    rounded_weights: int  # the weights in the arithmetic's dtype: autocast's copies, or what fsdp has gathered
    activations: int  # what the backward pass needs of the forward pass
    logits: int  # overwritten by their gradient; with the head's gradient before it is made float32
    peak: int


def predict_memory(cfg: Config, dtype: Precision, sharding: Sharding = Sharding()) -> MemoryUse:
    """The peak of a training step, weights and AdamW in float32, products in `dtype`; vocab_size must be known.

    Two moments can be the highest. When the backward pass begins, all activations and the logits are there; gradients only where
    an earlier micro-step or a buffer of the all-reduce holds some (fsdp reduces in every micro-step, so its are sharded). When
    it ends, activations are gone, but a compiled graph hands over all its gradients at once, beside those they are added to.
    """
    m, s, width = cfg.model, sharding, bytes_of(dtype)
    tokens, n = cfg.data.batch_size * m.block_size, count_parameters(m).total
    shards = (s.shard_ranks or s.ranks) if s.strategy == "fsdp" else 1
    parameters = gradients = 4 * n // shards
    optimizer = 8 * n // (s.ranks if s.strategy == "zero1" else shards)
    rounded, arriving = fsdp_in_flight(m, width, s) if s.strategy == "fsdp" else (rounded_weights(m, width), gradients)
    activations = tokens * kept_per_token(cfg, dtype)
    logits = (tokens + m.n_embd) * m.vocab_size * width
    # Behind the head the gradients inside a feed-forward take the logits' place, and what a block computes again.
    inside = tokens * width * (up_width(m) + m.ffn_hidden + m.n_embd)
    if m.gradient_checkpointing:
        inside += tokens * kept_in_block(cfg, dtype)
    held = parameters + optimizer
    if cfg.data.gradient_accumulation_steps > s.ranks or (s.strategy != "fsdp" and s.ranks > 1):
        held += gradients
    peak = held + max(rounded + activations + max(logits, inside), arriving)
    return MemoryUse(parameters, gradients, optimizer, rounded, activations, logits, peak)


def bytes_of(dtype: Precision) -> int:
    """Of a number in the matrix products; FP8 keeps its activations in bfloat16."""
    return 4 if dtype in ("float32", "tf32") else 2


def up_width(m: ModelConfig) -> int:
    """Columns of the feed-forward's first product."""
    return 2 * m.ffn_hidden if m.ffn_type == "swiglu" else m.ffn_hidden


def rounded_weights(m: ModelConfig, width: int) -> int:
    """Autocast's copies, which the backward pass uses again; a block that is computed again makes them again."""
    if width == 4:
        return 0
    return width * (m.vocab_size * m.n_embd if m.gradient_checkpointing else count_parameters(m).matmul)


def fsdp_in_flight(m: ModelConfig, width: int, s: Sharding) -> tuple[int, int]:
    """(bytes of gathered weights when the backward pass begins, and of a unit's weights and gradients inside it).

    The root, which is embeddings and head, stays gathered; of blocks that reshard, one is in use and one on its way. A unit's
    gradients are made in `width` and reduced in float32.
    """
    count = count_parameters(m)
    unit = (count.attention + count.ffn + count.norms) // m.n_layer
    if unit < s.min_unit_params:
        return width * count.total, (width + 4) * count.total
    root, n_gathered = count.total - m.n_layer * unit, min(2, m.n_layer) if s.reshard_after_forward else m.n_layer
    gathered = width * (root + n_gathered * unit)
    return gathered, gathered + (width + 4) * max(root, unit)


def kept_per_token(cfg: Config, dtype: Precision) -> int:
    """Bytes a token that the whole forward pass keeps for the backward pass, the logits not counted."""
    m, width, stream = cfg.model, bytes_of(dtype), stream_bytes(dtype)
    per_block = m.n_embd * stream if m.gradient_checkpointing else kept_in_block(cfg, dtype)
    # Around the blocks: what the final norm keeps, or post-norm's embedding; the loss keeps two numbers a row.
    ends = m.n_embd * (stream + width) + norm_statistics(m) if m.norm_position == "pre" else m.n_embd * width
    return m.n_layer * per_block + ends + (m.n_embd if m.dropout else 0) + 8


def kept_in_block(cfg: Config, dtype: Precision) -> int:
    """Bytes a token that one block keeps: the inputs of its matrix products and norms, and what attention wants again."""
    m, width = cfg.model, bytes_of(dtype)
    q_width, kv_width = m.n_head * m.head_dim, m.kv_heads * m.head_dim
    norms = 2 * (m.n_embd * (stream_bytes(dtype) + width) + norm_statistics(m))  # the sum, and its norm
    attention = (2 * q_width + 2 * kv_width) * width + 4 * m.n_head  # queries, keys, values, result; a number a row and head
    turned_apart = m.position_encoding == "rope" and cfg.kernels.rope_kernel == "torch"  # the kernel turns them where they lie
    if m.qk_norm or turned_apart:
        attention += (q_width + kv_width) * width
    if m.qk_norm:
        attention += 4 * (m.n_head + m.kv_heads)
    relu = m.ffn_type == "standard" and m.activation == "relu"  # whose gradient its own result gives
    ffn = (m.ffn_hidden if relu else up_width(m) + m.ffn_hidden) * width
    masks = 2 * m.n_embd if m.dropout else 0
    return norms + attention + ffn + masks


def stream_bytes(dtype: Precision) -> int:
    """Of a number of the residual stream; float16 has not the range for it."""
    return 4 if dtype in ("float32", "tf32", "float16") else 2


def norm_statistics(m: ModelConfig) -> int:
    """Bytes a row: 1/deviation, and the mean, in float32."""
    return 4 if m.normalization == "rmsnorm" else 8
