"""The start report: what a run is, and what in it does nothing, in the log and on the console before its first step."""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from checkpoint import most_copies
from configurator import Config
from data.loader import SampleOrder
from data.tokens import Dataset
from flops import FP8_LEFT_OUT, checkpoint_bytes, count_parameters, flops_per_token, peak_tflops
from layout import Layout
from micro_step import compiles, replays_graph
from parallel import device_name
from plan import LAW, start_section, three_digits
from precision import dtype_name
from startup import TrainState
from training_logger import Throughput


def start_report(
    cfg: Config, dataset: Dataset, state: TrainState, dtype: torch.dtype, chosen_kernels: dict[str, str], parallel: str
) -> tuple[dict[str, dict[str, Any]], Throughput]:
    """(what the run is, for the console and the log; what turns its step times into MFU)."""
    ranks = state.ranks
    full, causal = flops_per_token(cfg.model), flops_per_token(cfg.model, causal=True)
    name, precision = device_name(ranks.device), dtype_name(dtype)
    arithmetic = precision
    if dtype == torch.float32 and peak_tflops(name, "tf32"):
        arithmetic = "tf32"  # what choose_device sets for the products of float32
    peak = peak_tflops(name, arithmetic) if ranks.device.type == "cuda" else None
    peak_fp8 = peak_tflops(name, "fp8") if state.fp8.active and peak else None
    products = f"fp8 products in the blocks ({cfg.fp8.fp8_recipe} scaling), " if state.fp8.active else ""
    factors = (cfg.data.batch_size, cfg.data.gradient_accumulation_steps, cfg.model.block_size)
    tokens_per_step = math.prod(factors)
    info = {
        "model": model_info(cfg, full, causal),
        "hardware": {
            "device": name,
            "gpus": ranks.world_size if ranks.device.type == "cuda" else 0,
            "memory_gb": gpu_memory_gb(ranks.device),
            "peak_tflops": peak,
            "peak_precision": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(arithmetic, arithmetic),
            "cpu_threads": torch.get_num_threads(),
        },
        "data": data_info(cfg, dataset),
        "training": {
            "batch": " x ".join(map(str, factors)) + f" = {tokens_per_step:,} tokens a step",
            "steps": cfg.optim.max_iters,
            "parallel": parallel,
            "precision": products + precision + ", master weights and AdamW in float32" * (dtype != torch.float32),
            **{knob: who for knob, who in chosen_kernels.items() if state.fp8.active or knob != "fp8_kernel"},
            "attention": attention_backend(cfg, ranks.device, dtype),
            "compile": compiles(cfg, ranks.device),
            "cuda_graph": replays_graph(cfg, state.layout),
            "deterministic": cfg.run.deterministic,
            "seed": cfg.run.seed,
        },
        "plan": start_section(
            cfg, len(dataset.train), peak and peak * ranks.world_size, arithmetic, ranks.world_size if peak else 0
        ),
        "output": output_info(cfg),
        "software": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
    }
    peaks = (peak and peak * ranks.world_size, tokens_per_step, peak_fp8 and peak_fp8 * ranks.world_size)
    return info, Throughput(full, causal, *peaks)


def marker_lines(info: dict[str, dict[str, Any]], layout: Layout) -> list[str]:
    """The lines of the start report that other tools look for."""
    hardware = info["hardware"]
    lines = [f"number of parameters: {info['model']['parameters'] / 1e6:.2f}M"]
    if hardware["peak_tflops"]:
        name = hardware["device"].removeprefix("NVIDIA ")
        lines.append(f"Hardware peak: {hardware['peak_tflops']:g} TFLOPS ({name} {hardware['peak_precision']})")
    if info["training"]["norm_kernel"] == "triton":
        norm = "RMSNorm" if info["model"]["normalization"].startswith("rmsnorm") else "LayerNorm"
        lines.append(f"using Triton-accelerated {norm}")
    return lines + layout.marker_lines()


def model_info(cfg: Config, full: float, causal: float) -> dict[str, Any]:
    m, count = cfg.model, count_parameters(cfg.model)
    kind = f"{m.ffn_type} {m.activation}" if m.ffn_type == "standard" else m.ffn_type
    return {
        "architecture": m.architecture,
        "normalization": f"{m.normalization}, {m.norm_position}-norm, eps {m.norm_eps:g}",
        "position_encoding": m.position_encoding + (f", theta {m.rope_theta:g}" if m.position_encoding == "rope" else ""),
        "attention": f"{m.n_head} heads of {m.head_dim}, {m.kv_heads} key/value heads" + (", qk_norm" if m.qk_norm else ""),
        "feed_forward": f"{kind}, {m.ffn_hidden:,} wide",
        "bias": m.bias,
        "weight_tying": m.weight_tying,
        "dropout": m.dropout,
        "block_size": m.block_size,
        "vocab_size": m.vocab_size,
        "parameters": count.total,
        "trainable_parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "flops_per_token": full,
        "flops_per_token_causal": causal,
    }


def data_info(cfg: Config, dataset: Dataset) -> dict[str, Any]:
    order = SampleOrder(len(dataset.train), cfg.model.block_size, cfg.run.seed)
    return {
        "dataset": dataset.name,
        "folder": str(dataset.folder),
        "train_tokens": len(dataset.train),
        "val_tokens": len(dataset.val),
        "tokenizer": dataset.tokenizer,
        "vocab_size": dataset.vocab_size,
        "epochs": three_digits(epochs_of(cfg, order)),
    }


def output_info(cfg: Config) -> dict[str, Any]:
    size_gb, free_gb = checkpoint_bytes(cfg.model) / 1e9, shutil.disk_usage(Path(cfg.run.out_dir)).free / 1e9
    return {
        "out_dir": cfg.run.out_dir,
        "checkpoint_gb": three_digits(size_gb),
        "all_checkpoints_gb": three_digits(most_copies(cfg.checkpoint) * size_gb),  # at most, while one is being written
        "free_disk_gb": round(free_gb, 1),
    }


def attention_backend(cfg: Config, device: torch.device, dtype: torch.dtype) -> str:
    """Which of its implementations scaled_dot_product_attention takes for this model: cuDNN's before others on Hopper."""
    m = cfg.model
    q = torch.empty(1, m.n_head, m.block_size, m.head_dim, device=device, dtype=dtype, requires_grad=True)
    k = torch.empty(1, m.kv_heads, m.block_size, m.head_dim, device=device, dtype=dtype, requires_grad=True)
    choice = torch._fused_sdp_choice(q, k, k, None, m.dropout, True, enable_gqa=m.kv_heads < m.n_head)
    names = {SDPBackend.CUDNN_ATTENTION: "cuDNN", SDPBackend.FLASH_ATTENTION: "FlashAttention"}
    names |= {SDPBackend.EFFICIENT_ATTENTION: "memory-efficient attention", SDPBackend.MATH: "plain products"}
    return f"scaled_dot_product_attention by {names[SDPBackend(choice)]}"


def gpu_memory_gb(device: torch.device) -> float | None:
    return round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1) if device.type == "cuda" else None


def notes_on(cfg: Config, state: TrainState, order: SampleOrder) -> list[str]:
    """A line for each knob that does nothing in this run, and where learning rate or data are not what the user may think."""
    return [f"note: {line}" for line in [*idle_knobs(cfg, state), *schedule_notes(cfg), *data_notes(cfg, order)]]


def idle_knobs(cfg: Config, state: TrainState) -> Iterator[str]:
    n, last = state.ranks.world_size, cfg.optim.max_iters
    if cfg.run.profile:
        first, end = map(int, cfg.run.profile.split(":"))
        if cfg.eval.eval_only or max(first, state.step + 1) >= min(end, last + 1):
            yield f"--profile={cfg.run.profile} records nothing: this run goes on after step {state.step:,}, up to {last:,}"
    if not cfg.checkpoint.save_checkpoints and not cfg.eval.eval_only:
        yield "--save_checkpoints=False: what is trained ends with this run"
    if cfg.run.memory_history and state.ranks.device.type == "cpu":
        yield "--memory_history records nothing on a CPU"
    if cfg.run.cuda_graph and not replays_graph(cfg, state.layout):
        compiled = state.ranks.device.type == "cuda" and compiles(cfg, state.ranks.device)
        why = f"{state.layout.name} here exchanges within it" if compiled else "none is compiled for a GPU"
        yield f"--cuda_graph replays no micro-step: {why}"
    if cfg.is_given("num_gpus"):
        yield f"--num_gpus is of --plan; this run has {n} rank{'s' * (n > 1)}, and torchrun --nproc_per_node=N starts N of them"
    if n == 1 and cfg.parallel.exchange != "auto":
        yield f"one process exchanges nothing by {cfg.parallel.exchange}"
    if n == 1 and cfg.parallel.asked in ("zero1", "fsdp"):
        yield f"one process shards nothing by {cfg.parallel.asked}: torchrun --nproc_per_node=N starts several"
    else:
        yield from idle_fsdp_knobs(cfg, state.layout.name, one_micro_step=cfg.data.gradient_accumulation_steps == n)
    yield from idle_fp8_knobs(cfg)


def idle_fp8_knobs(cfg: Config) -> Iterator[str]:
    fp8, m = cfg.fp8, cfg.model
    if cfg.origins.get("use_fp8") == FP8_LEFT_OUT:  # a line has said so
        return
    recipes = {"fp8_history": ("delayed",), "fp8_margin": ("delayed", "current")}  # that use it
    for name in filter(cfg.is_given, ("fp8_recipe", "fp8_warn_percent", *recipes)):
        if not fp8.use_fp8:
            yield f"--{name} is of FP8, which --use_fp8 asks for"
        elif fp8.fp8_recipe not in recipes.get(name, [fp8.fp8_recipe]):
            yield f"--{name} does nothing with fp8_recipe={fp8.fp8_recipe}"
    if fp8.fp8_less_memory and (fp8.fp8_recipe != "delayed" or m.ffn_type != "swiglu" or m.bias):
        yield "--fp8_less_memory saves the transposed weights alone: SwiGLU without biases, by delayed scaling, would keep less"


def idle_fsdp_knobs(cfg: Config, layout: str, one_micro_step: bool) -> Iterator[str]:
    names = ("fsdp_min_num_params", "fsdp_reshard_after_forward", "fsdp_accumulate_whole", "hsdp_shard_size")
    given = [name for name in names if cfg.is_given(name)]
    if layout != "fsdp":
        yield from (f"--{name} is of fsdp: {layout} does not use it" for name in given)
    elif one_micro_step and "fsdp_accumulate_whole" in given:
        yield "--fsdp_accumulate_whole does nothing: a step has one micro-step a rank"
    elif cfg.parallel.fsdp_accumulate_whole and "fsdp_reshard_after_forward" in given:
        yield "--fsdp_reshard_after_forward does nothing while fsdp exchanges once a step (--fsdp_accumulate_whole=False)"


def schedule_notes(cfg: Config) -> list[str]:
    o = cfg.optim
    if o.decay_lr and o.max_iters <= o.warmup_iters:
        return [f"all {o.max_iters:,} steps are warm-up: --warmup_iters={o.warmup_iters}"]
    if o.decay_lr and o.lr_schedule != "constant" and o.max_iters < o.lr_decay_iters // 2:
        return [f"the learning rate decays over --lr_decay_iters={o.lr_decay_iters} steps; this run makes {o.max_iters:,}"]
    return []


def epochs_of(cfg: Config, order: SampleOrder) -> float:
    """How often the whole run reads its training data."""
    return cfg.optim.max_iters * cfg.data.batch_size * cfg.data.gradient_accumulation_steps / order.samples_per_epoch


def data_notes(cfg: Config, order: SampleOrder) -> list[str]:
    epochs = epochs_of(cfg, order)
    if epochs > LAW["epochs"] and not cfg.eval.eval_only:
        worth = f"up to {LAW['epochs']} are nearly as good as new data, more teach less and less (Muennighoff et al. 2023)"
        return [f"the run makes {three_digits(epochs):,g} epochs over its training data: {worth}"]
    return []
