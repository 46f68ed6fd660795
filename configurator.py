"""Every knob of nanotrain, and how the knobs of one run are read.

Precedence: the defaults below < config files, left to right < the command line. Knob names are unique over all sections,
so a config file and the command line use them flat (`n_layer = 12`, `--n_layer=12`), while the code receives the typed,
frozen section it needs (`ModelConfig`, `OptimConfig`, ...). The defaults are nanoGPT's: GPT-2 124 M on openwebtext.

The comment behind each knob is its documentation: `--help` prints it. Standard library only, so that `--help` is quick.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent  # the repository; its own files are found from here, whatever the working folder is


class UserError(ValueError):
    """A mistake of the user's: the message says what to type instead. Commands print it and exit with code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# The knobs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention (query) heads
    n_kv_head: int = 0  # key/value heads, for grouped-query attention; 0 means n_head
    n_embd: int = 768  # width of the residual stream
    d_ff: int = 0  # hidden width of the feed-forward; 0 means 4 n_embd, or 8/3 n_embd rounded up to a multiple of 64 for swiglu
    block_size: int = 1024  # context length, tokens
    vocab_size: int = 0  # entries of the embedding; 0 takes the dataset's, padded to a multiple of 64 from 1,024 entries on
    normalization: Literal["layernorm", "layernorm_nobias", "rmsnorm"] = "layernorm"  # layernorm has a bias where `bias` is true
    norm_eps: float = 1e-5  # added to the variance (or mean square) before the root
    norm_position: Literal["pre", "post"] = "pre"  # pre: x + f(norm(x)) and a final norm; post: norm(x + f(x))
    position_encoding: Literal["learned_absolute", "rope", "none"] = "learned_absolute"  # how a token knows its place
    rope_theta: float = 10000.0  # base of the rotary frequencies
    ffn_type: Literal["standard", "swiglu"] = "standard"  # two matrices and an activation, or three and a SiLU gate
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "relu_squared"] = "gelu"  # of ffn_type=standard; gelu_tanh is OpenAI's
    bias: bool = False  # biases in the linear layers and in layernorm
    weight_tying: bool = True  # one matrix for the token embedding and the language-model head
    qk_norm: bool = False  # RMSNorm of queries and keys, per head
    dropout: float = 0.0  # probability, on embeddings, attention weights and residual branches
    gradient_checkpointing: bool = False  # recompute each block in the backward pass: less memory, about a third more work

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def ffn_hidden(self) -> int:
        """Hidden width of the feed-forward: `d_ff`, or the usual expansion."""
        if self.d_ff:
            return self.d_ff
        if self.ffn_type == "standard":
            return 4 * self.n_embd
        return 64 * math.ceil(8 * self.n_embd / 3 / 64)  # three matrices of 8/3 cost what two of 4 do

    @property
    def norm_bias(self) -> bool:
        return self.normalization == "layernorm" and self.bias

    @property
    def architecture(self) -> str:
        """The name that is printed and logged, e.g. `12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm`."""
        position = {"learned_absolute": "AbsPos", "rope": "RoPE", "none": "NoPos"}[self.position_encoding]
        norm = "RMS" if self.normalization == "rmsnorm" else "LN" if self.norm_bias else "LN-NB"
        activations = {"gelu": "GELU", "gelu_tanh": "GELUTanh", "relu": "ReLU", "silu": "SiLU", "relu_squared": "ReLU2"}
        ffn = "SwiGLU" if self.ffn_type == "swiglu" else activations[self.activation]
        return f"{self.n_layer}L-{self.n_head}H-{self.n_embd}D-{position}-{norm}-{ffn}-{self.norm_position.capitalize()}Norm"


@dataclass(frozen=True)
class DataConfig:
    dataset: str = "openwebtext"  # a folder under data_dir that prepare.py has filled
    data_dir: str = ""  # the folder that holds the datasets; empty means data/ of the repository
    batch_size: int = 12  # sequences in a micro-batch, on each GPU
    gradient_accumulation_steps: int = 40  # micro-batches in a step, over all GPUs together
    check_data: bool = False  # compare every token id with the vocabulary before training, not only a sample of them


@dataclass(frozen=True)
class OptimConfig:
    max_iters: int = 600_000  # optimizer steps
    learning_rate: float = 6e-4  # the highest learning rate
    decay_lr: bool = True  # false: learning_rate throughout, without warm-up
    lr_schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"  # what follows the warm-up; wsd is warmup-stable-decay
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int = 600_000  # the step at which min_lr is reached
    wsd_decay_fraction: float = 0.2  # of lr_decay_iters, spent in wsd's final decay
    min_lr: float = 6e-5  # the learning rate at the end of the decay
    weight_decay: float = 0.1  # of matrices and embeddings; vectors (norms, biases) are not decayed
    beta1: float = 0.9  # AdamW: decay of the mean of the gradient
    beta2: float = 0.95  # AdamW: decay of the mean of its square
    adam_eps: float = 1e-8  # AdamW: added to the root of the second moment
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 does not clip
    max_skipped_steps: int = 25  # stop after so many steps in a row with a non-finite gradient


@dataclass(frozen=True)
class EvalConfig:
    eval_interval: int = 2000  # steps between evaluations; 0 never evaluates
    eval_iters: int = 200  # micro-batches of each split in an evaluation; 0 takes the whole split
    eval_only: bool = False  # evaluate once and stop
    sample_interval: int = 0  # steps between text samples; 0 draws none
    sample_prompt: str = "\n"  # what a text sample continues
    sample_tokens: int = 200  # length of a text sample


@dataclass(frozen=True)
class CheckpointConfig:
    init_from: str = "scratch"  # scratch, or resume
    resume: str = ""  # latest, best, a tier's name or a checkpoint's folder; implies init_from=resume
    always_save_checkpoint: bool = True  # false: only best_model, and latest at the end or at a signal
    checkpoint_interval: int = 250  # steps between writes of `latest`; 0 counts minutes only
    checkpoint_minutes: float = 10.0  # minutes between writes of `latest`, whichever comes first; 0 counts steps only
    rolling_interval: int = 1000  # steps between rolling_step_N checkpoints; 0 makes none
    keep_rolling: int = 3  # how many of them stay
    keep_epochs: int = 3  # how many epoch_N checkpoints stay (one each time the data starts again); 0 makes none


@dataclass(frozen=True)
class LogConfig:
    log_interval: int = 1  # steps between log records
    gradient_log_interval: int = 10  # steps between records with gradient mean and standard deviation; 0 never
    console: Literal["auto", "block", "line"] = "auto"  # auto: a block of lines on a terminal, one greppable line elsewhere
    use_tensorboard: bool = False  # write out_dir/tensorboard/<run_name> as well
    wandb_log: bool = False  # send the same figures to Weights & Biases
    wandb_project: str = "nanotrain"  # Weights & Biases project
    wandb_run_name: str = ""  # Weights & Biases run name; empty takes run_name


@dataclass(frozen=True)
class RunConfig:
    out_dir: str = "out"  # logs and checkpoints go here
    run_name: str = ""  # names the run's files; empty takes the time stamp (a resumed run keeps its name)
    seed: int = 1337  # of initialisation, sample order and dropout
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the arithmetic; auto: bfloat16 where the GPU has it, float32 on a CPU
    compile: bool = True  # torch.compile the model
    deterministic: bool = False  # bitwise reproducible on a GPU too, at some cost in speed
    max_hours: float | None = None  # save and stop after so many hours; none does not stop


@dataclass(frozen=True)
class Config:
    """All sections of a run, and where each knob's value came from."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    run: RunConfig = RunConfig()
    origins: dict[str, str] = field(default_factory=dict)  # knob -> "default", "config/x.py:12" or "command line"

    def values(self) -> dict[str, Any]:
        """Every knob, flat: what is logged and saved with a checkpoint."""
        return {name: value for section in SECTIONS for name, value in vars(getattr(self, section)).items()}
