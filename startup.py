"""What a run settles before its first step: what moves in it, its place on disk, what it resumes, and the start report.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from checkpoint import (
    FOLDER,
    Checkpoint,
    CheckpointStore,
    check_compatible,
    check_free_space,
    find_checkpoint,
    lock_out_dir,
    most_copies,
    set_aside,
)
from configurator import Config, UserError
from data.loader import SampleOrder
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokens import Dataset, padded_vocab_size
from flops import checkpoint_bytes, count_parameters, flops_per_token, peak_tflops
from model import Transformer
from optim import optimizer_tensors
from parallel import Ranks, StopRequest, device_name, random_state, set_random_state
from precision import LossScale, autocast
from training_logger import Throughput, TrainingLogger, new_run_name

NOT_SHAPE = ("dropout", "gradient_checkpointing", "loss_chunk_rows")  # model knobs that a resumed run may change


def with_vocabulary(cfg: Config, dataset: Dataset) -> Config:
    """The configuration with `vocab_size` settled: the dataset's, padded, unless it was given."""
    vocab_size = cfg.model.vocab_size or padded_vocab_size(dataset.vocab_size)
    if vocab_size < dataset.vocab_size:
        raise UserError(f"--vocab_size={vocab_size}: {dataset.name} has {dataset.vocab_size:,} ids; pass at least that, or 0")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))


@dataclass
class TrainState:
    """Everything that moves during training: `tensors` and `to_json` are a checkpoint's content, `restore` their inverse."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    loss_scale: LossScale
    ranks: Ranks
    run_name: str
    step: int = 0  # finished steps
    samples: int = 0  # sequences they have read: the position in the global sample order
    evaluated_step: int = -1
    val_loss: float | None = None  # of the last evaluation
    best_val_loss: float | None = None
    skipped: int = 0  # steps with a gradient that was not finite
    skipped_in_a_row: int = 0

    COUNTERS = ("step", "samples", "evaluated_step", "val_loss", "best_val_loss", "skipped", "skipped_in_a_row")

    @property
    def tokens(self) -> int:
        return self.samples * self.model.cfg.block_size

    def tensors(self) -> dict[str, Tensor]:
        weights = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        return weights | optimizer_tensors(self.model, self.optimizer) | self.loss_scale.tensors()

    def to_json(self, cfg: Config, dataset: Dataset) -> dict[str, Any]:
        return {
            "run_name": self.run_name,
            "val_loss": self.val_loss,
            "counters": {name: getattr(self, name) for name in self.COUNTERS},
            "rng": {str(self.ranks.rank): random_state(self.ranks.device)},
            "config": {"values": cfg.values(), "origins": cfg.origins},
            **identity(cfg, dataset),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Raises UserError where the checkpoint is of another model."""
        # A run may go on in another dtype: a loss scale that was not saved starts afresh, one that is not needed is dropped.
        unused_scale = LossScale(torch.float16, self.ranks.device).tensors()
        tensors, saved = unused_scale | self.tensors(), checkpoint.metadata.state_dict_metadata
        checkpoint.load({name: t for name, t in tensors.items() if name in saved or name not in unused_scale})
        for name in self.COUNTERS:
            setattr(self, name, checkpoint.state["counters"].get(name, getattr(self, name)))
        set_random_state(checkpoint.state["rng"].get(str(self.ranks.rank), {}), self.ranks.device)


def schedule_notes(cfg: Config) -> list[str]:
    """A line where the learning rate will not go where the user may think."""
    o = cfg.optim
    if o.decay_lr and o.max_iters <= o.warmup_iters:
        return [f"note: all {o.max_iters:,} steps are warm-up: --warmup_iters={o.warmup_iters}"]
    if o.decay_lr and o.lr_schedule != "constant" and o.max_iters < o.lr_decay_iters // 2:
        return [f"note: the learning rate decays over --lr_decay_iters={o.lr_decay_iters} steps; this run makes {o.max_iters:,}"]
    return []


def identity(cfg: Config, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """What a checkpoint must share with the run that resumes it: the model's shape, and the data with its tokenizer."""
    shape = {name: value for name, value in vars(cfg.model).items() if name not in NOT_SHAPE}
    return {"model": shape, "data": dataset.fingerprint()}


def refuse_pretrained(cfg: Config) -> None:
    """Raises UserError where nanoGPT would load OpenAI's weights: said before anything is prepared for it."""
    if cfg.checkpoint.init_from not in ("scratch", "resume"):
        raise UserError(
            f"--init_from={cfg.checkpoint.init_from}: this version loads no pretrained weights; pass scratch or resume"
        )


def claim_out_dir(cfg: Config, dataset: Dataset, stack: ExitStack) -> tuple[Checkpoint | None, list[str]]:
    """(the checkpoint to resume, lines to log). Locks out_dir until the stack is closed; an evaluation only reads it."""
    notes: list[str] = []
    out_dir, writes = Path(cfg.run.out_dir), not cfg.eval.eval_only
    if writes:
        stack.callback(lock_out_dir(out_dir, notes.append).close)
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
    replaces = is_own(cfg, checkpoint)
    if writes and (warning := check_free_space(out_dir, checkpoint_bytes(cfg.model), cfg.checkpoint, replaces)):
        notes.append(warning)
    return checkpoint, notes


def is_own(cfg: Config, checkpoint: Checkpoint | None) -> bool:
    """Whether there is one and it lies in this run's out_dir; `--resume=PATH` may name another run's."""
    return checkpoint is not None and checkpoint.path.parent.resolve() == (Path(cfg.run.out_dir) / FOLDER).resolve()


def in_latest(cfg: Config, checkpoint: Checkpoint | None) -> tuple[int, int] | None:
    """(finished steps, last evaluated step) of what `latest` holds, if it was resumed; any other has yet to become it."""
    if checkpoint and is_own(cfg, checkpoint) and checkpoint.path.name == "latest":
        return checkpoint.iter, checkpoint.state["counters"]["evaluated_step"]
    return None


def open_store(cfg: Config, checkpoint: Checkpoint | None, log: TrainingLogger) -> CheckpointStore:
    """The run's checkpoints. Those of another run are set aside: only now, when nothing can be refused any more."""
    out_dir = Path(cfg.run.out_dir)
    if not is_own(cfg, checkpoint) and not cfg.eval.eval_only and (line := set_aside(out_dir)):
        log.line(line)
    return CheckpointStore(out_dir, cfg.checkpoint, lambda saved: log.checkpoint(**vars(saved)), log.line)


@dataclass(frozen=True)
class Prompt:
    """What a text sample continues."""

    tokenizer: Tokenizer
    ids: list[int]


def load_prompt(cfg: Config, dataset: Dataset) -> Prompt | None:
    """The prompt of text samples, where they are asked for; what is wrong with it is said now and not at the first sample."""
    if cfg.eval.sample_interval == 0 or cfg.eval.eval_only:
        return None
    tokenizer, text = load_tokenizer(dataset), cfg.eval.sample_prompt
    try:
        ids = tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"--sample_prompt={text!r}: {error}; pass another prompt, or --sample_interval=0") from None
    if not ids:
        raise UserError(f"--sample_prompt={text!r}: needs at least one token to continue; or pass --sample_interval=0")
    return Prompt(tokenizer, ids)


def choose_kernels(cfg: Config, device: torch.device) -> tuple[kernels.Operations, dict[str, str]]:
    """(the operations of the model, who computes them by knob: triton or torch)."""
    try:
        return kernels.choose(vars(cfg.kernels), device.type)
    except ValueError as error:
        raise UserError(str(error)) from None


def run_name_of(cfg: Config, checkpoint: Checkpoint | None) -> str:
    """The name given, else the resumed run's, else the time; an evaluation has a log of its own."""
    if cfg.eval.eval_only:
        return f"eval_{cfg.run.run_name or new_run_name()}"
    return cfg.run.run_name or (checkpoint.state["run_name"] if checkpoint else new_run_name())


def ending(kind: type[BaseException] | None, error: BaseException | None, stop: StopRequest) -> str:
    """How the run ended, in a word or a line."""
    return f"{kind.__name__}: {error}" if kind else stop.reason or "finished"


def compile_model(model: Transformer, cfg: Config, dtype: torch.dtype, say: Callable[[str], None]) -> Callable[..., torch.Tensor]:
    """The model's forward pass, compiled where `compile` asks for it and a compiler is there.

    One micro-batch of random tokens goes forward and backward, so that no timed step compiles anything; weights and random
    numbers are left as they were.
    """
    device = next(model.parameters()).device
    if not cfg.run.compile:
        return model
    if missing := missing_compiler(device):
        say(f"not compiled: torch.compile needs {missing} here; install g++, or pass --compile=False")
        return model
    say("compiling the model (--compile=False starts at once and runs slower)")
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


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile would not find: for a CPU it writes C++, and for a GPU Triton builds its launchers in C."""
    if device.type == "cpu":
        kind, names = "a C++ compiler", (os.environ.get("CXX", "c++"), "g++", "clang++")
    else:
        kind, names = "a C compiler", (os.environ.get("CC", "gcc"), "clang")
    return None if any(map(shutil.which, names)) else kind


def start_report(
    cfg: Config, dataset: Dataset, ranks: Ranks, dtype: torch.dtype, chosen_kernels: dict[str, str]
) -> tuple[dict[str, dict[str, Any]], Throughput]:
    """(what the run is, for the console and the log; what turns its step times into MFU)."""
    full, causal = flops_per_token(cfg.model), flops_per_token(cfg.model, causal=True)
    name, precision = device_name(ranks.device), str(dtype).removeprefix("torch.")
    arithmetic = precision
    if dtype == torch.float32 and peak_tflops(name, "tf32"):
        arithmetic = "tf32"  # what choose_device sets for the products of float32
    peak = peak_tflops(name, arithmetic) if ranks.device.type == "cuda" else None
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
            "parallel": "one process",
            "precision": f"{precision}, weights and AdamW in float32" if dtype != torch.float32 else precision,
            **chosen_kernels,
            "attention": "scaled_dot_product_attention",
            "compile": cfg.run.compile,
            "deterministic": cfg.run.deterministic,
            "seed": cfg.run.seed,
        },
        "output": output_info(cfg),
        "software": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
    }
    return info, Throughput(full, causal, peak and peak * ranks.world_size, tokens_per_step)


def marker_lines(info: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of the start report that other tools look for."""
    hardware = info["hardware"]
    lines = [f"number of parameters: {info['model']['parameters'] / 1e6:.2f}M"]
    if hardware["peak_tflops"]:
        name = hardware["device"].removeprefix("NVIDIA ")
        lines.append(f"Hardware peak: {hardware['peak_tflops']:g} TFLOPS ({name} {hardware['peak_precision']})")
    if info["training"]["norm_kernel"] == "triton":
        norm = "RMSNorm" if info["model"]["normalization"].startswith("rmsnorm") else "LayerNorm"
        lines.append(f"using Triton-accelerated {norm}")
    return lines


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
        "epochs": three_digits(cfg.optim.max_iters * batch / per_epoch),
    }


def output_info(cfg: Config) -> dict[str, Any]:
    size_gb, free_gb = checkpoint_bytes(cfg.model) / 1e9, shutil.disk_usage(Path(cfg.run.out_dir)).free / 1e9
    return {
        "out_dir": cfg.run.out_dir,
        "checkpoint_gb": three_digits(size_gb),
        "all_checkpoints_gb": three_digits(most_copies(cfg.checkpoint) * size_gb),  # at most, while one is being written
        "free_disk_gb": round(free_gb, 1),
    }


def three_digits(value: float) -> float:
    """Rounded to three significant digits, so that the figures of a tiny model are no zeros."""
    return float(f"{value:.3g}")


def gpu_memory_gb(device: torch.device) -> float | None:
    return round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1) if device.type == "cuda" else None


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def out_of_memory_help(cfg: Config, error: RuntimeError | MemoryError) -> str:
    """Where the memory went, and the knobs that need less. The vocabulary may still be unknown: then it counts as GPT-2's."""
    model = cfg.model if cfg.model.vocab_size else dataclasses.replace(cfg.model, vocab_size=50_304)
    n = count_parameters(model).total
    rows = [("weights, float32", 4 * n / 1e9), ("gradients, float32", 4 * n / 1e9), ("AdamW's two moments, float32", 8 * n / 1e9)]
    if isinstance(error, torch.OutOfMemoryError):  # a GPU's
        peak_gb = torch.cuda.max_memory_allocated() / 1e9
        rows.append(("activations and the rest, at the peak", max(0.0, peak_gb - 16 * n / 1e9)))
        rows.append(("in use at the peak", peak_gb))
        rows.append(("memory of the GPU", torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9))
    table = "\n".join(f"  {name:40s} {gb:8.2f} GB" for name, gb in rows)
    half, double = max(1, cfg.data.batch_size // 2), 2 * cfg.data.gradient_accumulation_steps
    return (
        f"out of memory: {(str(error) or 'MemoryError').splitlines()[0]}\n{table}\n"
        f"What needs less: --batch_size={half} --gradient_accumulation_steps={double} (the same tokens a step), "
        f"--gradient_checkpointing, a shorter --block_size (now {cfg.model.block_size:,}), fewer or narrower layers"
    )
