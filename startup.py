"""What a run settles before its first step: its place on disk, what it resumes, and the start report.

Each function here either finds everything in order or raises UserError, before any work is done.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from checkpoint import Checkpoint, check_compatible, check_free_space, find_checkpoint, lock_out_dir, set_aside
from configurator import Config, UserError
from data.loader import SampleOrder
from data.tokens import Dataset, padded_vocab_size
from flops import checkpoint_bytes, count_parameters, flops_per_token, peak_tflops
from model import Transformer
from parallel import Ranks, device_name, random_state, set_random_state
from precision import autocast
from training_logger import Throughput, new_run_name

NOT_SHAPE = ("dropout", "gradient_checkpointing")  # model knobs that a resumed run may change


def with_vocabulary(cfg: Config, dataset: Dataset) -> Config:
    """The configuration with `vocab_size` settled: the dataset's, padded, unless it was given."""
    vocab_size = cfg.model.vocab_size or padded_vocab_size(dataset.vocab_size)
    if vocab_size < dataset.vocab_size:
        raise UserError(f"--vocab_size={vocab_size}: {dataset.name} has {dataset.vocab_size:,} ids; pass at least that, or 0")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))


def identity(cfg: Config, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """What a checkpoint must share with the run that resumes it: the model's shape, and the data with its tokenizer."""
    shape = {name: value for name, value in vars(cfg.model).items() if name not in NOT_SHAPE}
    return {"model": shape, "data": {name: value for name, value in dataset.fingerprint().items() if value is not None}}


def claim_out_dir(cfg: Config, dataset: Dataset, stack: ExitStack) -> tuple[Checkpoint | None, list[str]]:
    """(the checkpoint to resume, lines to log). Locks out_dir until the stack is closed; an evaluation only reads it."""
    notes: list[str] = []
    out_dir, writes = Path(cfg.run.out_dir), not cfg.eval.eval_only
    if writes:
        stack.callback(lock_out_dir(out_dir).close)
    checkpoint = None
    if cfg.checkpoint.init_from == "resume":
        checkpoint = find_checkpoint(out_dir, cfg.checkpoint.resume or "latest", notes.append)
        if checkpoint:
            check_compatible(checkpoint.state, identity(cfg, dataset))
            notes.append(f"resuming {checkpoint.path} after step {checkpoint.iter}")
        elif not writes:
            raise UserError(f"--eval_only: {out_dir} holds no checkpoint; pass --out_dir=... of a run that saved one")
        else:
            notes.append(f"nothing saved in {out_dir} yet: starting from scratch")
    if writes and not checkpoint:
        notes.append(set_aside(out_dir) or "")
    if writes:
        notes.append(check_free_space(out_dir, checkpoint_bytes(cfg.model), cfg.checkpoint) or "")
    return checkpoint, [line for line in notes if line]


def run_name_of(cfg: Config, checkpoint: Checkpoint | None) -> str:
    """The name given, else the resumed run's, else the time; an evaluation has a log of its own."""
    if cfg.run.run_name:
        return cfg.run.run_name
    if cfg.eval.eval_only:
        return f"eval_{new_run_name()}"
    return checkpoint.state["run_name"] if checkpoint else new_run_name()


def compile_model(model: Transformer, cfg: Config, dtype: torch.dtype, say: Callable[[str], None]) -> Callable[..., torch.Tensor]:
    """The model's forward pass, compiled where `compile` asks for it and a compiler is there.

    One micro-batch of random tokens goes forward and backward, so that no timed step compiles anything; weights and random
    numbers are left as they were.
    """
    device = next(model.parameters()).device
    if not cfg.run.compile:
        return model
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        say("not compiled: on a CPU torch.compile needs a C++ compiler; install g++, or pass --compile=False")
        return model
    t0_s, before = time.perf_counter(), random_state(device)
    forward = torch.compile(model)
    ids = torch.randint(cfg.model.vocab_size, (2, cfg.data.batch_size, cfg.model.block_size), device=device)
    with autocast(device, dtype):
        loss = forward(ids[0], ids[1])
    loss.backward()
    model.zero_grad(set_to_none=True)
    set_random_state(before, device)
    say(f"compiled in {time.perf_counter() - t0_s:.1f} s")
    return forward


def start_report(cfg: Config, dataset: Dataset, ranks: Ranks, dtype: torch.dtype) -> tuple[dict[str, dict[str, Any]], Throughput]:
    """(what the run is, for the console and the log; what turns its step times into MFU)."""
    full, causal = flops_per_token(cfg.model), flops_per_token(cfg.model, causal=True)
    name, precision = device_name(ranks.device), str(dtype).removeprefix("torch.")
    peak = peak_tflops(name, precision) if ranks.device.type == "cuda" else None
    factors = (cfg.data.batch_size, cfg.data.gradient_accumulation_steps, cfg.model.block_size)
    tokens_per_step = math.prod(factors)
    info = {
        "model": model_info(cfg, full, causal),
        "hardware": {
            "device": name,
            "gpus": ranks.world_size if ranks.device.type == "cuda" else 0,
            "memory_gb": gpu_memory_gb(ranks.device),
            "peak_tflops": peak,
            "cpu_threads": torch.get_num_threads(),
        },
        "data": data_info(cfg, dataset),
        "training": {
            "batch": " x ".join(map(str, factors)) + f" = {tokens_per_step:,} tokens a step",
            "steps": cfg.optim.max_iters,
            "parallel": "one process",
            "precision": f"{precision}, weights and AdamW in float32" if dtype != torch.float32 else precision,
            "kernels": "PyTorch's, attention through scaled_dot_product_attention",
            "compile": cfg.run.compile,
            "deterministic": cfg.run.deterministic,
            "seed": cfg.run.seed,
        },
        "output": output_info(cfg),
        "software": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
    }
    return info, Throughput(full, causal, peak and peak * ranks.world_size, tokens_per_step)


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
    batch = cfg.data.batch_size * cfg.data.gradient_accumulation_steps
    per_epoch = SampleOrder(len(dataset.train), cfg.model.block_size, cfg.run.seed).samples_per_epoch
    return {
        "dataset": dataset.name,
        "folder": str(dataset.folder),
        "train_tokens": len(dataset.train),
        "val_tokens": len(dataset.val),
        "tokenizer": dataset.tokenizer,
        "vocab_size": dataset.vocab_size,
        "epochs": round(cfg.optim.max_iters * batch / per_epoch, 2),
    }


def output_info(cfg: Config) -> dict[str, Any]:
    size_gb, free_gb = checkpoint_bytes(cfg.model) / 1e9, shutil.disk_usage(Path(cfg.run.out_dir)).free / 1e9
    return {"out_dir": cfg.run.out_dir, "checkpoint_gb": round(size_gb, 3), "free_disk_gb": round(free_gb, 1)}


def gpu_memory_gb(device: torch.device) -> float | None:
    return round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1) if device.type == "cuda" else None


def out_of_memory_help(cfg: Config, error: BaseException) -> str:
    """Where the memory went, and the knobs that need less. The vocabulary may still be unknown: then it counts as GPT-2's."""
    model = cfg.model if cfg.model.vocab_size else dataclasses.replace(cfg.model, vocab_size=50_304)
    n = count_parameters(model).total
    total_gb = gpu_memory_gb(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else None
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    rows = [("weights, float32", 4 * n / 1e9), ("gradients, float32", 4 * n / 1e9), ("AdamW's two moments, float32", 8 * n / 1e9)]
    rows.append(("activations and the rest, at the peak", max(0.0, peak_gb - 16 * n / 1e9)))
    table = "\n".join(f"  {name:40s} {gb:8.2f} GB" for name, gb in rows)
    half, double = max(1, cfg.data.batch_size // 2), 2 * cfg.data.gradient_accumulation_steps
    return (
        f"out of memory ({total_gb} GB on the GPU, {peak_gb:.2f} GB in use at the peak): {str(error).splitlines()[0]}\n{table}\n"
        f"What needs less: --batch_size={half} --gradient_accumulation_steps={double} (the same tokens a step), "
        f"--gradient_checkpointing, a shorter --block_size (now {cfg.model.block_size:,})"
    )
