"""Memory of one GPU at the peak of a training step, in closed form and without torch; docs/PARAMETER_FORMULAS.md derives it.

It is a prediction for a compiled model: what autograd keeps for the backward pass is what torch.compile's partitioner chooses to
keep, and tests/test_memory.py holds it to that choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from configurator import Config, ModelConfig
from flops import Precision, count_parameters

GIB = 2**30
Strategy = Literal["ddp", "zero1", "fsdp"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "fsdp")
LOGITS_BYTES = 2**31  # kernels/cross_entropy.py's CHUNK_BYTES
RING_BYTES, HOST_RANKS = 2**26, 8  # exchange.py's ring, for each other rank of a host, and as many ranks as share one
REPLAYED_PARAMETERS = 200_000_000  # up to which ddp by itself replays micro-steps: that saves launches, and hides no exchange
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
class MemoryUse:
    """Bytes on one GPU: what each component takes at most, and the peak, where not all are there at the same time."""

    parameters: int  # float32, with the masters of those that are rounded
    gradients: int  # float32; what is never added up or averaged stays as the products make it
    optimizer: int  # AdamW's two moments
    weight_copies: int  # weights in the arithmetic's dtype: rounded parameters, autocast's copy, or what fsdp has gathered
    activations: int  # what the backward pass needs of the forward pass
    logits: int  # as many as are held at a time, overwritten by their gradient; with the head's input and its gradients
    peak: int


def predict_memory(cfg: Config, dtype: Precision, strategy: Strategy = "ddp", ranks: int = 1) -> MemoryUse:
    """The peak of a training step, AdamW and what it updates in float32, products in `dtype`; vocab_size must be known.

    fsdp is taken to exchange in every micro-step and to gather for each pass, unless the knobs say otherwise (`settled`).

    Two moments can be the highest. When the backward pass begins, all activations and the logits are there; gradients only where
    an earlier micro-step has left some. When it ends, activations are gone and all gradients there, with what is on its way to
    them: a whole compiled model hands over all at once, among several ranks a unit does.
    """
    m, parallel, width = cfg.model, cfg.parallel, bytes_of(dtype)
    tokens, n, accumulates = cfg.data.batch_size * m.block_size, count_parameters(m).total, adds_up(cfg, ranks)
    ring = ring_bytes(cfg, strategy, ranks)
    behind = ring > 0 and exchanges_behind(cfg, strategy)
    if strategy == "fsdp":
        shards = parallel.hsdp_shard_size or ranks
        whole = accumulates and bool(parallel.fsdp_accumulate_whole)
        parameters, optimizer, rounded = 4 * n // shards, 8 * n // shards, 0
        gradients = parameters + 4 * n * whole
        copies, arriving = fsdp_in_flight(cfg, width, keeps=whole or parallel.fsdp_reshard_after_forward is False)
    else:
        parameters, gradients, arriving = held_whole(cfg, width, strategy, ranks, behind)
        optimizer = 8 * n // (ranks if strategy == "zero1" else 1)
        # FP8's two copies of a weight take the place of the one in a dtype twice as wide, but not where that comes from others.
        rounded = width * rounded_elements(m, width) * (2 if cfg.fp8.use_fp8 and strategy == "zero1" else 1)
        copies = head_copy(m, width)
    activations = tokens * kept_per_token(cfg, dtype)
    _, logits = loss_bytes(cfg, dtype)
    # Behind the head the gradients inside a feed-forward take the logits' place, and what a block computes again.
    inside = tokens * width * (up_width(m) + m.ffn_hidden + m.n_embd)
    if m.gradient_checkpointing:
        inside += tokens * kept_in_block(cfg, dtype)
    at_start = gradients * accumulates + copies + activations + max(logits, inside)
    always = parameters + rounded + optimizer + ring
    if behind:  # what the graph makes is copied as wide as it is, and averaged in float32, in none of the graph's memory
        always += 4 * n + width * rounded_elements(m, width) * (not accumulates)
    peak = always + max(at_start, gradients + arriving)
    return MemoryUse(parameters, gradients, optimizer, rounded + copies, activations, logits, peak)


def exchanges_behind(cfg: Config, strategy: str) -> bool:
    """Whether ranks that exchange by copy engines replay micro-steps as a CUDA graph, and average gradients behind the last."""
    asked = cfg.run.cuda_graph
    replays = count_parameters(cfg.model).total <= REPLAYED_PARAMETERS if asked is None else asked
    return replays and cfg.run.compile and strategy == "ddp"


def adds_up(cfg: Config, ranks: int) -> bool:
    """Whether a rank has several micro-steps in a step."""
    return cfg.data.gradient_accumulation_steps > ranks


def held_whole(cfg: Config, width: int, strategy: Strategy, ranks: int, behind: bool) -> tuple[int, int, int]:
    """One process, ddp, zero1: bytes of (float32 parameters, gradients, and of what is on its way to the gradients).

    A matrix's gradient is made in the products' dtype, and one process with one micro-step leaves it so, as do ranks that average
    `behind`. Sums and averages are float32; zero1 has the masters of its own rows and, where nothing is added up and copy engines
    bring them, those rows' averages; embeddings and head, float32 from the start, are averaged where they lie, and what a
    collective averages is whole. What copy engines have sent is kept until all have.
    """
    n, accumulates = count_parameters(cfg.model).total, adds_up(cfg, ranks)
    matrices = rounded_elements(cfg.model, width)
    made = 4 * (n - matrices) + width * matrices
    own = 4 * (n - matrices) + 4 * matrices // ranks
    if ranks == 1 or behind:
        return 4 * n, 4 * n if accumulates else made, made * accumulates
    as_made = not accumulates and ring_bytes(cfg, strategy, ranks) > 0
    gradients = own if strategy == "zero1" and as_made else 4 * n
    arriving = width * matrices if as_made else width * unit_parameters(cfg.model)
    return own if strategy == "zero1" else 4 * n, gradients, arriving


def settled(cfg: Config, dtype: Precision, ranks: int, memory_gib: float) -> Config:
    """`cfg` with what fsdp holds for the sake of speed decided; where that is left to a GPU's memory, what it has room for."""

    def asked(knob: str, value: bool) -> Config:
        return replace(cfg, parallel=replace(cfg.parallel, **{knob: value}))

    for knob, fast in (("fsdp_accumulate_whole", True), ("fsdp_reshard_after_forward", False)):
        if getattr(cfg.parallel, knob) is None:
            fits = predict_memory(asked(knob, fast), dtype, "fsdp", ranks).peak <= USABLE * memory_gib * GIB
            cfg = replace(asked(knob, fast if fits else not fast), origins=cfg.origins | {knob: "default"})  # `none` asks nothing
    return cfg if adds_up(cfg, ranks) else asked("fsdp_accumulate_whole", False)


def how_often(cfg: Config, ranks: int) -> list[str]:
    """What reports say of fsdp in a `settled` configuration: when it reduces gradients, and when it gathers weights."""
    parallel = cfg.parallel
    exchanging = "exchanging once a step" if parallel.fsdp_accumulate_whole else "exchanging in each micro-step"
    said = [exchanging] if adds_up(cfg, ranks) else []
    if parallel.fsdp_accumulate_whole or unit_parameters(cfg.model) < parallel.fsdp_min_num_params:  # the root keeps its weights
        return said
    return [*said, f"gathering weights {'for each pass' if parallel.fsdp_reshard_after_forward else 'for both passes at once'}"]


def first_that_fits(cfg: Config, dtype: Precision, ranks: int, memory_gib: float) -> Strategy | None:
    """The first of the strategies whose peak is usable memory of a GPU that has `memory_gib`; None where none is."""
    usable = USABLE * memory_gib * GIB
    return next((each for each in strategies_of(ranks) if predict_memory(cfg, dtype, each, ranks).peak <= usable), None)


def strategies_of(ranks: int) -> tuple[Strategy, ...]:
    """Those that so many ranks can run: one has nobody to share with, which is ddp in all that memory is about."""
    return STRATEGIES if ranks > 1 else STRATEGIES[:1]


def unit_parameters(m: ModelConfig) -> int:
    """Of one block."""
    count = count_parameters(m)
    return (count.attention + count.ffn + count.norms) // m.n_layer


def largest_unit(cfg: Config) -> int:
    """Parameters that fsdp gathers at a time, at most: a block's or the root's, which has all where blocks are no units."""
    total, unit = count_parameters(cfg.model).total, unit_parameters(cfg.model)
    return max(total - cfg.model.n_layer * unit, unit) if unit >= cfg.parallel.fsdp_min_num_params else total


def ring_bytes(cfg: Config, strategy: Strategy, ranks: int) -> int:
    """What the exchange by copy engines keeps for what arrives: RING_BYTES of each other rank, or four of a largest share."""
    m, parallel = cfg.model, cfg.parallel
    groups = strategy == "fsdp" and 0 < parallel.hsdp_shard_size < ranks
    if not 1 < ranks <= HOST_RANKS or parallel.exchange == "collectives" or groups:
        return 0
    largest = m.n_embd * max(m.vocab_size, up_width(m), (m.n_head + 2 * m.kv_heads) * m.head_dim)
    if strategy == "fsdp":
        largest = largest_unit(cfg)
    elif exchanges_behind(cfg, strategy):
        largest = count_parameters(m).total
    more = {"ddp": 2, "zero1": 0, "fsdp": 1}[strategy]  # for the averages, which all fetch; for what is gathered
    return (ranks - 1 + more) * min(RING_BYTES, 16 * largest // ranks)


def bytes_of(dtype: Precision) -> int:
    """Of a number in the matrix products; what a run in FP8 keeps of a forward pass is predicted as bfloat16's, which is more."""
    return 4 if dtype in ("float32", "tf32") else 2


def up_width(m: ModelConfig) -> int:
    """Columns of the feed-forward's first product."""
    return 2 * m.ffn_hidden if m.ffn_type == "swiglu" else m.ffn_hidden


def rounded_elements(m: ModelConfig, width: int) -> int:
    """Of the blocks' matrices where products are narrower than float32: parameters in that dtype, beside float32 masters."""
    return 0 if width == 4 else count_parameters(m).matmul - m.vocab_size * m.n_embd


def head_copy(m: ModelConfig, width: int) -> int:
    """Bytes of autocast's copy of the head's weight, tied or not, which the backward pass uses again."""
    return 0 if width == 4 else width * m.vocab_size * m.n_embd


def fsdp_in_flight(cfg: Config, width: int, keeps: bool) -> tuple[int, int]:
    """(bytes of gathered weights when the backward pass begins, and of a unit's weights and gradients inside it).

    The root, which is embeddings and head, is gathered by then. Blocks all are where a rank `keeps` them; otherwise one is in use
    and one on its way. The gradients of a unit are made in `width` and reduced in float32.
    """
    m, total, unit = cfg.model, count_parameters(cfg.model).total, unit_parameters(cfg.model)
    if unit < cfg.parallel.fsdp_min_num_params:
        return width * total, (width + 4) * total
    root, n_gathered = total - m.n_layer * unit, m.n_layer if keeps else min(2, m.n_layer)
    gathered = width * (root + n_gathered * unit)
    return gathered, gathered + (width + 4) * largest_unit(cfg)


def kept_per_token(cfg: Config, dtype: Precision) -> int:
    """Bytes a token that the forward pass keeps for the backward pass, but for head and loss."""
    m, stream = cfg.model, stream_bytes(dtype)
    per_block = m.n_embd * stream if m.gradient_checkpointing else kept_in_block(cfg, dtype)
    # Around the blocks: the sum before the final norm, or post-norm's embedding; what goes into the head is counted there.
    ends = m.n_embd * stream + norm_statistics(m) if m.norm_position == "pre" else 0
    return m.n_layer * per_block + ends + (m.n_embd if m.dropout else 0)


def loss_bytes(cfg: Config, dtype: Precision) -> tuple[int, int]:
    """Bytes that head and loss (keep for the backward pass, need at most), but for the head's weight.

    The Triton kernel makes both gradients of the head at once, the weight's in float32, and holds `loss_chunk_rows` rows of
    logits, by itself equal chunks of up to LOGITS_BYTES. PyTorch keeps all logits (rows of a chunk, where that is set) and makes
    the gradients in the backward pass.
    """
    m, width = cfg.model, bytes_of(dtype)
    tokens, head = cfg.data.batch_size * m.block_size, m.vocab_size * m.n_embd
    x = tokens * m.n_embd * width
    if cfg.kernels.cross_entropy_kernel == "torch":
        kept = x + min(m.loss_chunk_rows or tokens, tokens) * m.vocab_size * width + 8 * tokens
        return kept, kept + head * width
    chunks = -(-tokens * m.vocab_size * width // LOGITS_BYTES)
    rows = min(m.loss_chunk_rows or -(-tokens // chunks), tokens)
    return x + 4 * head, 2 * x + 4 * head + rows * m.vocab_size * width


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
