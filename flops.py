"""The numbers that follow from the architecture: parameters, FLOPs, peak rates, where FP8 runs, checkpoint size, expected loss.

All in closed form and without torch; the tests compare them with the built model and with PyTorch's FlopCounterMode.
docs/PARAMETER_FORMULAS.md derives them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from configurator import Config, ModelConfig, UserError

Precision = Literal["float32", "tf32", "bfloat16", "float16", "fp8"]

# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by component. A tied head is the token embedding once more and counts 0 under `head`."""

    token_embedding: int
    position_embedding: int
    attention: int  # query, key, value and output projections of all layers, their biases and qk_norm's weights
    ffn: int  # all matrices and biases of the feed-forwards
    norms: int  # of the blocks, and the final one
    head: int
    matmul: int  # elements of the matrices that activations are multiplied with: no embedding table, but the head, tied or not

    @property
    def total(self) -> int:
        return self.token_embedding + self.position_embedding + self.attention + self.ffn + self.norms + self.head

    @property
    def non_embedding(self) -> int:
        """Total without the tables that are only looked up; a tied token table stays, because it is the head (nanoGPT's way)."""
        return self.total - self.position_embedding - (self.token_embedding if self.head else 0)


def count_parameters(cfg: ModelConfig) -> ParameterCount:
    width, hidden, q_width, kv_width = cfg.n_embd, cfg.ffn_hidden, cfg.n_head * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    up_width = 2 * hidden if cfg.ffn_type == "swiglu" else hidden
    attention = width * (q_width + 2 * kv_width) + q_width * width
    ffn = width * up_width + hidden * width
    embedding = cfg.vocab_size * width
    matmul = cfg.n_layer * (attention + ffn) + embedding
    if cfg.bias:
        attention += q_width + 2 * kv_width + width
        ffn += up_width + width
    if cfg.qk_norm:
        attention += 2 * cfg.head_dim
    n_norms = 2 * cfg.n_layer + (cfg.norm_position == "pre")
    return ParameterCount(
        token_embedding=embedding,
        position_embedding=cfg.block_size * width if cfg.position_encoding == "learned_absolute" else 0,
        attention=cfg.n_layer * attention,
        ffn=cfg.n_layer * ffn,
        norms=n_norms * width * (2 if cfg.norm_bias else 1),
        head=0 if cfg.weight_tying else embedding,
        matmul=matmul,
    )


def checkpoint_bytes(cfg: ModelConfig) -> int:
    """Size of a checkpoint's tensors: float32 weights and AdamW's two float32 moments, 12 bytes a parameter."""
    return 12 * count_parameters(cfg).total


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------------


def forward_flops_per_token(cfg: ModelConfig, block_size: int | None = None, causal: bool = False) -> int:
    """FLOPs per token of a forward pass over `block_size` tokens (None: the model's own context length).

    2 a matrix element (multiply and add) and, for attention, 2 each for QK^T and for its product with V:
    4 n_layer n_head head_dim T. `causal` counts half of attention, what a causal mask leaves (PaLM paper, appendix B).
    """
    attention = 4 * cfg.n_layer * cfg.n_head * cfg.head_dim * (block_size or cfg.block_size)
    return 2 * count_parameters(cfg).matmul + (attention // 2 if causal else attention)


def flops_per_token(cfg: ModelConfig, block_size: int | None = None, causal: bool = False) -> int:
    """Training FLOPs per token: the backward pass costs two forward passes. Recomputation is not counted: it is no progress."""
    return 3 * forward_flops_per_token(cfg, block_size, causal)


# ---------------------------------------------------------------------------------------------------------------------
# Peak rates
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """Dense peak rates of one GPU in TFLOP/s, products accumulated in float32. None: it has no such mode."""

    device_names: tuple[str, ...]  # exactly as torch.cuda.get_device_name() gives them, but for a leading "NVIDIA "
    float32: float  # without tensor cores
    tf32: float | None
    bfloat16: float | None
    float16: float | None
    fp8: float | None
    source: str


# fmt: off
PEAKS: tuple[Gpu, ...] = (
    #   device names, then float32, tf32, bfloat16, float16, fp8; rates that a data sheet gives with sparsity are halved
    Gpu(("GB200",), 80, 1250, 2500, 2500, 5000, "NVIDIA GB200 NVL72 and HGX B200 datasheet, per GPU"),
    Gpu(("B200",), 75, 1125, 2250, 2250, 4500, "NVIDIA HGX B200 specifications: 36 PFLOPS sparse bf16 of 8 GPUs, / 16"),
    Gpu(("B100",), 60, 875, 1750, 1750, 3500, "NVIDIA HGX B100 specifications: 28 PFLOPS sparse bf16 of 8 GPUs, / 16"),
    Gpu(("H200", "H100 80GB HBM3", "H800"), 67, 494.5, 989.5, 989.5, 1979, "NVIDIA H100 and H200 SXM datasheets"),
    Gpu(("GH200 120GB", "GH200 480GB", "GH200 144G HBM3e"), 67, 494.5, 989.5, 989.5, 1979, "NVIDIA GH200 datasheet"),
    Gpu(("H200 NVL", "H100 NVL"), 60, 417.5, 835.5, 835.5, 1670.5, "NVIDIA H100 NVL and H200 NVL datasheets"),
    Gpu(("H100 PCIe", "H800 PCIe"), 51, 378, 756.5, 756.5, 1513, "NVIDIA H100 PCIe datasheet"),
    Gpu(("H20", "H20-3e"), 44, 74, 148, 148, 296, "NVIDIA H20 product brief"),
    Gpu(("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe", "A800-SXM4-80GB", "A800 80GB PCIe"),
        19.5, 156, 312, 312, None, "NVIDIA A100 datasheet"),
    Gpu(("A30",), 10.3, 82, 165, 165, None, "NVIDIA A30 datasheet"),
    Gpu(("A10",), 31.2, 62.5, 125, 125, None, "NVIDIA A10 datasheet"),
    Gpu(("A40",), 37.4, 74.8, 149.7, 149.7, None, "NVIDIA A40 datasheet"),
    Gpu(("RTX A6000",), 38.7, 77.4, 154.8, 154.8, None, "NVIDIA GA102 whitepaper, table of the RTX A6000"),
    Gpu(("GeForce RTX 3090",), 35.6, 35.6, 71, 71, None, "NVIDIA GA102 whitepaper: tensor cores with float32 accumulation"),
    Gpu(("L4",), 30.3, 60, 121, 121, 242.5, "NVIDIA L4 datasheet"),
    Gpu(("L40",), 90.5, 90.5, 181, 181, 362, "NVIDIA L40 datasheet"),
    Gpu(("L40S",), 91.6, 183, 362, 362, 733, "NVIDIA L40S datasheet"),
    Gpu(("RTX 6000 Ada Generation",), 91.1, 182.1, 364.2, 364.2, 728.5, "NVIDIA RTX 6000 Ada datasheet: 1,457 sparse fp8"),
    Gpu(("GeForce RTX 4090",), 82.6, 82.6, 165.2, 165.2, 330.3, "NVIDIA Ada whitepaper: float32 accumulation"),
    Gpu(("GeForce RTX 5090",), 104.8, 104.8, 209.5, 209.5, 419, "NVIDIA RTX Blackwell whitepaper: float32 accumulation"),
    Gpu(("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"), 15.7, None, None, 125, None, "NVIDIA V100 datasheet"),
    Gpu(("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"), 14, None, None, 112, None, "NVIDIA V100 datasheet"),
    Gpu(("Tesla T4",), 8.1, None, None, 65, None, "NVIDIA T4 datasheet"),
)
# fmt: on


def peak_tflops(device_name: str, dtype: Precision) -> float | None:
    """Dense peak of the named GPU in TFLOP/s; None where the GPU is not in the table, or has no such mode. Never another's."""
    name = device_name.removeprefix("NVIDIA ")
    return next((getattr(gpu, dtype) for gpu in PEAKS if name in gpu.device_names), None)


# ---------------------------------------------------------------------------------------------------------------------
# FP8
# ---------------------------------------------------------------------------------------------------------------------

FP8_LEFT_OUT = "left out"  # where the value of such a knob comes from
FP8_SIDES = {"delayed": 16, "current": 16, "block": 128}  # by recipe: what cuBLAS wants a product's sides to be multiples of


def fp8_recipes(device_name: str) -> list[str]:
    """Those that the named GPU, of the table, has products for; of blocks Hopper alone, whose names begin with H or GH."""
    is_hopper = device_name.removeprefix("NVIDIA ").startswith(("H", "GH"))
    return [recipe for recipe in FP8_SIDES if peak_tflops(device_name, "fp8") and (is_hopper or recipe != "block")]


def why_no_fp8(cfg: Config, dtype: str, device_name: str, recipes: Collection[str]) -> str | None:
    """What keeps a run from FP8, and the remedy. The GPU, "" for a CPU, has products for the `recipes`."""
    fp8, m = cfg.fp8, cfg.model
    if not fp8.fp8_emulate:
        if not device_name:
            return "a CPU has no FP8 products; --fp8_emulate rounds as they do, slowly"
        if not recipes:
            return f"{device_name} is older than Ada and Hopper; --fp8_emulate rounds as they do, slowly"
        if fp8.fp8_recipe not in recipes:
            return f"blocks with scales of their own need Hopper and CUDA 12.9, not {device_name}; pass --fp8_recipe=delayed"
    if dtype == "float16":  # of a GPU without bfloat16
        return "its products give float32 or bfloat16 and not float16; pass --dtype=float32"
    sides = {
        "n_embd": m.n_embd,
        "the width of qkv": (m.n_head + 2 * m.kv_heads) * m.head_dim,
        "the feed-forward's width": m.ffn_hidden,
        "batch_size x block_size": cfg.data.batch_size * m.block_size,
    }
    divisor = FP8_SIDES[fp8.fp8_recipe]
    uneven = [f"{name}={value:,}" for name, value in sides.items() if value % divisor]
    return f"{', '.join(uneven)}: must be a multiple of {divisor} for fp8_recipe={fp8.fp8_recipe}" if uneven else None


def without_fp8(cfg: Config, dtype: str, reason: str) -> tuple[Config, str]:
    """(the configuration of a run that goes on in `dtype`, the line that says so). Raises UserError where FP8 is required."""
    if cfg.fp8.fp8_required:
        raise UserError(f"--fp8_required: {reason}")
    without = {name: False for name in ("use_fp8", "fp8_emulate", "fp8_less_memory") if vars(cfg.fp8)[name]}
    cfg = replace(cfg, fp8=replace(cfg.fp8, **without), origins=cfg.origins | dict.fromkeys(without, FP8_LEFT_OUT))
    return cfg, f"FP8 is left out, and products run in {dtype}: {reason}"


# ---------------------------------------------------------------------------------------------------------------------
# Expected loss
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScalingLaw:
    """Loss in nats a token after one pass over D tokens with N parameters: E + A / N^alpha + B / D^beta."""

    E: float = 1.69
    A: float = 406.4
    alpha: float = 0.34
    B: float = 410.7
    beta: float = 0.28

    def loss(self, n_parameters: float, n_tokens: float) -> float:
        return self.E + self.A / n_parameters**self.alpha + self.B / n_tokens**self.beta

    def best_split(self, compute_flops: float) -> tuple[float, float]:
        """(N, D) of the lowest loss at 6 N D = `compute_flops` (Hoffmann et al. 2022, equation 4)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        n_parameters = ratio * (compute_flops / 6) ** (self.beta / (self.alpha + self.beta))
        return n_parameters, compute_flops / 6 / n_parameters


HOFFMANN = ScalingLaw()  # Hoffmann et al. 2022, equation 10


def loss_prediction(n_parameters: float, n_tokens: float) -> float:
    return HOFFMANN.loss(n_parameters, n_tokens)
