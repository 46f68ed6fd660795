"""Every knob of nanotrain, and how the knobs of one run are read.

Precedence: the defaults below < config files, left to right < flags, left to right. Knob names are unique over all sections,
so a config file and the command line use them flat (`n_layer = 12`, `--n_layer=12`), while the code receives the typed,
frozen section it needs (`ModelConfig`, `OptimConfig`, ...). The defaults are nanoGPT's: GPT-2 124 M on openwebtext.

The comment behind each knob is its documentation: `--help` prints it. Standard library only, so that `--help` is quick.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

ROOT = Path(__file__).resolve().parent  # the repository; its own files are found from here, whatever the working folder is


class UserError(ValueError):
    """A mistake of the user's: the message says what to type instead. Commands print it and exit with `exit_code`."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------------------------------
# The knobs
# ---------------------------------------------------------------------------------------------------------------------

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "relu_squared"]
Kernel = Literal["auto", "triton", "torch"]
GPT2_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's, by their names on the Hugging Face hub
DType = Literal["auto", "float32", "bfloat16", "float16"]


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
    activation: Activation = "gelu"  # of ffn_type=standard; gelu_tanh is OpenAI's
    bias: bool = False  # biases in the linear layers and in layernorm
    weight_tying: bool = True  # one matrix for the token embedding and the language-model head
    qk_norm: bool = False  # RMSNorm of queries and keys, per head
    dropout: float = 0.0  # probability, on embeddings, attention weights and residual branches
    gradient_checkpointing: bool = False  # recompute each block in the backward pass: less memory, about a third more work
    loss_chunk_rows: int = 0  # tokens whose logits are held at a time; 0 holds as many as cost no speed

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


NOT_SHAPE = ("dropout", "gradient_checkpointing", "loss_chunk_rows")  # knobs of ModelConfig that weights do not depend on


@dataclass(frozen=True)
class KernelConfig:
    norm_kernel: Kernel = "auto"  # LayerNorm, RMSNorm and the addition before: triton (GPUs only) or torch; auto is the faster
    swiglu_kernel: Kernel = "auto"  # SwiGLU's gate: triton (GPUs only) or torch; auto is the faster
    gelu_kernel: Kernel = "auto"  # GELU, exact or by tanh: triton (GPUs only) or torch; auto is the faster
    rope_kernel: Kernel = "auto"  # rotary positions: triton (GPUs only) or torch; auto is the faster
    cross_entropy_kernel: Kernel = "auto"  # the loss with the head's product: triton (GPUs only) or torch; auto is the faster
    adamw_kernel: Kernel = "auto"  # optimizer's step, gradients' sums and means: triton (GPUs only) or torch; auto is the faster
    fp8_kernel: Kernel = "auto"  # rounding to FP8, with the transpose: triton (GPUs only) or torch; auto is the faster


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
    hellaswag_interval: int = 0  # steps between evaluations on HellaSwag, which is done at the end as well; 0 never evaluates
    hellaswag_source: str = ""  # its .jsonl file; empty downloads the validation set once
    hellaswag_items: int = 0  # take so many items only; 0 takes all
    sample_interval: int = 0  # steps between text samples; 0 draws none
    sample_prompt: str = "\n"  # what a text sample continues
    sample_tokens: int = 200  # length of a text sample


@dataclass(frozen=True)
class CheckpointConfig:
    init_from: str = "scratch"  # scratch, resume, or weights: gpt2 ... gpt2-xl, a hub name, a folder, an out_dir, a ckpt.pt
    resume: str = ""  # latest, best, a tier's name or a checkpoint's folder; goes before init_from where it finds one
    save_checkpoints: bool = True  # false: none at all, as for a measurement; the weights end with the run
    always_save_checkpoint: bool = True  # false: only best_model, and latest at the end or at a signal
    checkpoint_interval: int = 250  # steps between writes of `latest`; 0 counts minutes only
    checkpoint_minutes: float = 10.0  # minutes between writes of `latest`, whichever comes first; 0 counts steps only
    rolling_interval: int = 1000  # steps between rolling_step_N checkpoints; 0 makes none
    keep_rolling: int = 3  # how many of them stay
    keep_epochs: int = 3  # how many epoch_N checkpoints stay, each checkpoint_interval steps or more apart; 0 makes none

    @property
    def resumes(self) -> bool:
        return bool(self.resume) or self.init_from == "resume"

    @property
    def pretrained(self) -> str:
        """Whose weights a run starts from; empty where it starts from none."""
        return "" if self.init_from in ("scratch", "resume") else self.init_from


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
    dtype: DType = "auto"  # of the arithmetic; auto: bfloat16 where the GPU has it, float32 on a CPU
    compile: bool = True  # torch.compile the model
    cuda_graph: bool | None = None  # replay a compiled micro-step as one launch; none: on one GPU, of small models under ddp too
    deterministic: bool = False  # bitwise reproducible on a GPU too, at some cost in speed
    max_hours: float | None = None  # save and stop after so many hours; none does not stop
    profile: str = ""  # FIRST:END, such as 10:13: trace of the steps 10, 11 and 12, a table of their kernels; empty records none
    memory_history: bool = False  # remember where every allocation came from, for the snapshot that out of memory leaves (GPUs)


@dataclass(frozen=True)
class Fp8Config:
    use_fp8: bool = False  # train the blocks' matrix products in FP8 (Ada, Hopper and newer); the log says why where it cannot
    fp8_recipe: Literal["delayed", "current", "block"] = "delayed"  # a scale from earlier steps, this tensor, 128 of its elements
    fp8_history: int = 16  # delayed: steps whose largest value sets the scale
    fp8_margin: int = 0  # delayed and current: binary digits of range that the scale leaves free, up to 8
    fp8_less_memory: bool = False  # delayed and current: weights without their transpose; delayed: SwiGLU's inputs kept in FP8
    fp8_required: bool = False  # where FP8 cannot run, stop instead of going on without it
    fp8_emulate: bool = False  # round as FP8 does and multiply in float32: for tests, on any machine, slow
    fp8_warn_percent: float = 1.0  # warn where more than this share of a step's values saturates or becomes 0


@dataclass(frozen=True)
class PlanConfig:
    plan: bool = False  # print what this run would need and give (memory, time, loss) and stop: needs no GPU
    num_gpus: int = 1  # of the plan
    gpu: str = ""  # of the plan, such as H200 or A100-SXM4-80GB; empty takes this machine's, or an H200 where it has none
    plan_mfu: float = 50.0  # percent: the MFU at which hours are stated, in the plan and in the start report


@dataclass(frozen=True)
class ParallelConfig:
    parallel: Literal["auto", "ddp", "zero1", "fsdp"] = "auto"  # what ranks share out; auto: the first that fits
    use_zero1: bool = False  # the same as parallel=zero1: each rank keeps a part of AdamW's state
    use_fsdp: bool = False  # the same as parallel=fsdp: each rank keeps a part of parameters, gradients and AdamW's state
    fsdp_min_num_params: int = 1_000_000  # fsdp: blocks of so many parameters are gathered one by one, smaller ones with the rest
    fsdp_reshard_after_forward: bool | None = None  # fsdp: gather weights again for the backward pass; none: if memory is short
    fsdp_accumulate_whole: bool | None = None  # fsdp: exchange once a step, not every micro-step; none: if memory allows it
    hsdp_shard_size: int = 0  # fsdp: shard over so many ranks (those of a node) and replicate across; 0 shards over all
    exchange: Literal["auto", "copies", "collectives"] = "auto"  # copies: a host's copy engines; collectives: NCCL
    start_timeout_s: float = 1800.0  # longest wait of one rank for another until the loop begins (reading data, compilation)
    step_timeout_s: float = 600.0  # the same from then on; a rank that hangs ends the job after this time

    @property
    def asked(self) -> Literal["auto", "ddp", "zero1", "fsdp"]:
        """What `parallel` and its two short forms come to; fsdp contains what zero1 does."""
        return "fsdp" if self.use_fsdp else "zero1" if self.use_zero1 and self.parallel == "auto" else self.parallel


@dataclass(frozen=True)
class SampleConfig:
    """The knobs of sample.py, which is a command of its own."""

    out_dir: str = "out"  # of the run whose checkpoint is read
    init_from: str = "resume"  # resume: out_dir's; or weights as train.py takes them: gpt2 ... gpt2-xl, a folder, a ckpt.pt
    checkpoint: str = "best"  # best (the latest where none is marked best), latest, a tier's name or a checkpoint's folder
    data_dir: str = ""  # the folder that holds the run's dataset, for its tokenizer; empty takes the run's own data_dir
    start: str = "\n"  # the text to continue, or FILE:path of a file that holds it
    prompt_file: str = ""  # a file of texts to continue, one a line, in place of start
    num_samples: int = 3  # continuations of each text, drawn together as one batch
    max_new_tokens: int = 200  # length of each
    stop: str = ""  # end a continuation before this text
    temperature: float = 0.8  # below 1 safer, above 1 wilder; 0 always takes the most likely token
    top_k: int = 200  # draw among the k most likely tokens; 0 among all
    top_p: float = 1.0  # draw among the fewest tokens whose probabilities reach top_p
    seed: int = 1337  # of the draws
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: DType = "auto"  # of weights and arithmetic; auto: bfloat16 where the GPU has it, float32 on a CPU
    compile: bool = False  # torch.compile the pass of one token: half a minute that long texts get back


@dataclass(frozen=True)
class HellaswagConfig:
    """The knobs of hellaswag.py, which is a command of its own."""

    out_dir: str = "out"  # of the run whose checkpoint is read
    init_from: str = "resume"  # resume: out_dir's; or weights as train.py takes them: gpt2 ... gpt2-xl, a folder, a ckpt.pt
    checkpoint: str = "best"  # best (the latest where none is marked best), latest, a tier's name or a checkpoint's folder
    data_dir: str = ""  # the folder that holds the run's dataset, for its tokenizer; empty takes the run's own data_dir
    source: str = ""  # a .jsonl file of items as HellaSwag publishes them; empty downloads the validation set once
    limit: int = 0  # take so many items only, from the first one on; 0 takes all
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: DType = "auto"  # of weights and arithmetic; auto: bfloat16 where the GPU has it, float32 on a CPU


@dataclass(frozen=True)
class Config:
    """All sections of a run, and where each knob's value came from."""

    model: ModelConfig = ModelConfig()
    kernels: KernelConfig = KernelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    parallel: ParallelConfig = ParallelConfig()
    run: RunConfig = RunConfig()
    fp8: Fp8Config = Fp8Config()
    plan: PlanConfig = PlanConfig()
    origins: dict[str, str] = field(default_factory=dict)  # knob -> "default", "config/x.py:12" or "command line"

    def is_given(self, name: str) -> bool:
        """Whether a knob's value is not just its default."""
        return self.origins.get(name, "default") != "default"

    def values(self) -> dict[str, Any]:
        """Every knob, flat: what is logged and saved with a checkpoint."""
        return {name: value for section in SECTIONS for name, value in vars(getattr(self, section)).items()}


SECTIONS = {f.name: type(f.default) for f in dataclasses.fields(Config) if f.name != "origins"}
ALIASES = {"eval_freq": "eval_interval", "checkpoint_freq": "checkpoint_interval"}


# ---------------------------------------------------------------------------------------------------------------------
# Reading them
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knob:
    """One knob: its section, its type (`optional` ones may be none) and its default."""

    name: str
    section: str
    owner: str  # the section's class
    type: Any
    optional: bool
    default: Any

    @property
    def type_name(self) -> str:
        name = "|".join(typing.get_args(self.type)) if typing.get_origin(self.type) is Literal else self.type.__name__
        return f"{name} or none" if self.optional else name


@dataclass(frozen=True)
class Given:
    """A value as the user gave it: text from the command line (`is_text`) or an object from a config file."""

    name: str
    value: Any
    origin: str
    is_text: bool


def knobs_of(sections: dict[str, type]) -> dict[str, Knob]:
    """All knobs of the sections by name; names are unique, so a flat namespace serves all of them."""
    knobs: dict[str, Knob] = {}
    for section, cls in sections.items():
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            kind, optional = hints[f.name], False
            if isinstance(kind, types.UnionType):  # X | None
                kind, optional = next(a for a in typing.get_args(kind) if a is not type(None)), True
            assert f.name not in knobs, f"two knobs are named {f.name}"
            knobs[f.name] = Knob(f.name, section, cls.__name__, kind, optional, f.default)
    return knobs


def load_config(argv: Sequence[str]) -> Config:
    """The configuration of a run from its command line: `[config.py ...] [--knob=value ...]`.

    Raises UserError listing every problem at once. `--help` and `--print_config` print and exit.
    """
    given = read_knobs(argv, SECTIONS)
    sections = {name: section_from(cls, given.values) for name, cls in SECTIONS.items()}
    if sections["checkpoint"].resume and not sections["checkpoint"].pretrained:  # resume=latest is an order to resume
        sections["checkpoint"] = dataclasses.replace(sections["checkpoint"], init_from="resume")
    cfg = Config(**sections, origins=given.origins)
    given.check(impossible(cfg.values()) or impossible_combinations(cfg))
    if "--print_config" in argv:
        print_config(cfg.values(), cfg.origins)
        sys.exit(0)
    return cfg


def load_section(argv: Sequence[str], cls: type) -> Any:
    """The only section of a command that needs few knobs, such as sample.py; raises UserError as load_config does."""
    given = read_knobs(argv, {cls.__name__: cls})
    section = section_from(cls, given.values)
    given.check(impossible(vars(section)))
    if "--print_config" in argv:
        print_config(vars(section), given.origins)
        sys.exit(0)
    return section


@dataclass
class ReadKnobs:
    """What the user gave: values and their origins, and the problems found on the way."""

    values: dict[str, Any]
    origins: dict[str, str]
    problems: list[str]
    failed: set[str]  # knobs whose value could not be read

    def check(self, impossible: list[tuple[tuple[str, ...], str]]) -> None:
        """Raises UserError with all problems; what is impossible only because another value could not be read is left out."""
        found = [f"{origin_of(names, self.origins)}: {text}" for names, text in impossible if not self.failed & set(names)]
        if self.problems or found:
            raise UserError("\n".join(self.problems + found))


def read_knobs(argv: Sequence[str], sections: dict[str, type]) -> ReadKnobs:
    knobs = knobs_of(sections)
    files, flags, problems = split_command_line(argv, knobs)
    given = ReadKnobs({}, dict.fromkeys(knobs, "default"), problems, set())
    for item in [item for name in files for item in read_config_file(name, problems)] + flags:
        name = ALIASES.get(item.name, item.name)
        if name not in knobs:
            problems.append(f"{item.origin}: {unknown_knob(item.name, knobs)}")
            continue
        try:
            given.values[name] = convert(knobs[name], item)
            given.origins[name] = "command line" if item.is_text else item.origin
        except ValueError as error:
            problems.append(f"{item.origin}: {error}")
            given.failed.add(name)
    return given


def section_from(cls: type, values: dict[str, Any]) -> Any:
    """A section from flat knob values, such as those saved with a checkpoint; what is absent keeps its default."""
    return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


def split_command_line(argv: Sequence[str], knobs: dict[str, Knob]) -> tuple[list[str], list[Given], list[str]]:
    """(config files, flags, problems). A value may follow `=` or stand as the next word; a boolean may stand alone."""
    files: list[str] = []
    flags: list[Given] = []
    problems: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            print_help(knobs)
            sys.exit(0)
        if word == "--print_config":
            continue
        if not word.startswith("-"):
            files.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        knob = knobs.get(ALIASES.get(name, name))
        if not equals:
            takes_next = words and not words[0].startswith("--")
            if knob and knob.type is bool:
                values = [*BOOLEANS, "none"] if knob.optional else BOOLEANS
                value = words.pop(0) if takes_next and words[0].lower() in values else "true"
            elif takes_next:
                value = words.pop(0)
            elif knob:
                such_as = (
                    f", such as --{name}={knob.default}"
                    if knob.default not in ("", None)
                    else f": {knob_comments()[knob.owner, knob.name]}"
                )
                problems.append(f"--{name}: needs a value{such_as}")
                continue
        flags.append(Given(name, value, f"--{name}", is_text=True))
    return files, flags, problems


def find_file(name: str) -> Path:
    """A file the user named: from where he stands, else from the repository. Raises UserError."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    near = difflib.get_close_matches(Path(name).name, [p.name for p in (ROOT / "config").glob("*.py")], n=1)
    hint = (
        f"; did you mean config/{near[0]}?"
        if near
        else f"; config/ has {', '.join(sorted(p.name for p in (ROOT / 'config').glob('*.py')))}"
    )
    raise UserError(f"{name}: no such config file (flags are written --knob=value){hint}")


def read_config_file(name: str, problems: list[str]) -> list[Given]:
    """The public top-level names of a Python file, run in a namespace of its own.

    Imported modules, functions and classes are no knobs; neither is a `_name`. What goes wrong is added to `problems`.
    """
    try:
        path = find_file(name)
        source = path.read_text(encoding="utf-8-sig")
        tree = ast.parse(source, filename=name)
    except UserError as error:
        problems.append(str(error))
        return []
    except (SyntaxError, ValueError, OSError) as error:  # ValueError: no UTF-8, or a null byte
        problems.append(f"{name}:{getattr(error, 'lineno', 1) or 1}: not a Python config file: {getattr(error, 'msg', error)}")
        return []
    namespace: dict[str, Any] = {"__name__": "config", "__file__": str(path)}
    try:
        exec(compile(tree, name, "exec"), namespace)
    except (Exception, SystemExit) as error:
        frame = error.__traceback__
        lines = []
        while frame:
            lines += [frame.tb_lineno] if frame.tb_frame.f_code.co_filename == name else []
            frame = frame.tb_next
        problems.append(f"{name}:{lines[-1] if lines else 1}: {type(error).__name__}: {error}")
        return []
    stored = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    line_of = {n.id: n.lineno for n in sorted(stored, key=lambda n: n.lineno)}  # the last one counts
    return [
        Given(key, value, f"{name}:{line_of.get(key, 1)}", is_text=False)
        for key, value in namespace.items()
        if not key.startswith("_") and not isinstance(value, types.ModuleType) and not callable(value)
    ]


BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def convert(knob: Knob, given: Given) -> Any:
    """The value in the knob's own type. Raises ValueError that says what is accepted."""
    value = given.value
    if knob.optional and (value is None or (given.is_text and value.lower() == "none")):
        return None
    if typing.get_origin(knob.type) is Literal:
        choices = typing.get_args(knob.type)
        if value in choices:
            return value
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        raise ValueError(
            f"{knob.name}={value!r} is not one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")
        )
    wrong = ValueError(
        f"{knob.name}={value!r} is not {'an' if knob.type is int else 'a'} {knob.type_name}, such as {example(knob)}"
    )
    if knob.type is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if knob.type is bool:
        key = (
            str(value).lower()
            if given.is_text
            else {True: "true", False: "false"}.get(value, "")
            if isinstance(value, int)
            else ""
        )
        if key not in BOOLEANS:
            raise wrong
        return BOOLEANS[key]
    if given.is_text:
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                raise wrong from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:  # nor NaN
        raise wrong
    if knob.type is int and value != int(value):
        raise wrong
    return knob.type(value)


def example(knob: Knob) -> str:
    if knob.type is bool:
        return "True, False or none" if knob.optional else "True or False"
    return repr(knob.default if knob.default is not None else knob.type(8))


def unknown_knob(name: str, knobs: dict[str, Knob]) -> str:
    near = difflib.get_close_matches(name, [*knobs, *ALIASES], n=1)
    hint = f"did you mean '{near[0]}'?" if near else "--help lists all"
    negated = knobs.get(name[3:].replace("-", "_")) if name.startswith(("no-", "no_")) else None
    if negated and negated.type is bool:
        hint = f"did you mean --{negated.name}=False?"
    return f"unknown knob '{name}'; {hint}"


def model_of_file(values: dict[str, Any], where: str) -> ModelConfig:
    """A model whose knobs stand in a file, its vocabulary included. Raises UserError listing every problem."""
    knobs, problems, given = knobs_of({"model": ModelConfig}), [], {}
    for name, value in values.items():
        try:
            if name not in knobs:
                raise ValueError(unknown_knob(name, knobs))
            given[name] = convert(knobs[name], Given(name, value, where, is_text=False))
        except ValueError as error:
            problems.append(str(error))
    model = ModelConfig(**given)
    found = impossible(vars(model)) or impossible_combinations(Config(model=model))
    problems += [text for names, text in found if set(names) & set(given)]
    if not model.vocab_size:
        problems.append("vocab_size is needed, such as 50304")
    if problems:
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems))
    return model


def origin_of(names: Iterable[str], origins: dict[str, str]) -> str:
    """Where the first of the knobs that the user set himself was set."""
    names = list(names)
    name = next((n for n in names if origins.get(n, "default") != "default"), names[0])
    origin = origins.get(name, "default")
    return f"--{name}" if origin in ("command line", "default") else origin


# ---------------------------------------------------------------------------------------------------------------------
# Impossible values and combinations
# ---------------------------------------------------------------------------------------------------------------------

POSITIVE = """n_layer n_head n_embd block_size batch_size gradient_accumulation_steps log_interval adam_eps norm_eps rope_theta
    sample_tokens max_skipped_steps max_hours start_timeout_s step_timeout_s num_gpus plan_mfu num_samples
    max_new_tokens fp8_history""".split()
NOT_NEGATIVE = """n_kv_head d_ff vocab_size max_iters learning_rate warmup_iters lr_decay_iters min_lr weight_decay grad_clip
    eval_interval eval_iters hellaswag_interval hellaswag_items sample_interval checkpoint_interval checkpoint_minutes
    rolling_interval keep_rolling keep_epochs gradient_log_interval fsdp_min_num_params hsdp_shard_size seed loss_chunk_rows
    temperature top_k limit fp8_warn_percent""".split()
FRACTIONS = ["dropout", "beta1", "beta2"]


def impossible(values: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Values that cannot be: (the knob, one line that says what to type instead)."""

    def failing(names: list[str], ok: Callable[[Any], bool], must: str) -> list[tuple[tuple[str, ...], str]]:
        here = [n for n in names if values.get(n) is not None]
        return [((n,), f"{n}={values[n]!r} {must}") for n in here if not ok(values[n])]

    return [
        *failing(POSITIVE, lambda v: v > 0, "must be greater than 0"),
        *failing(NOT_NEGATIVE, lambda v: v >= 0, "must not be negative"),
        *failing(FRACTIONS, lambda v: 0 <= v < 1, "must be in [0, 1)"),
        *failing(["seed"], lambda v: v < 2**63, "must be below 2**63"),
        *failing(["fp8_margin"], lambda v: 0 <= v <= 8, "must be 0 to 8, of the 18 binary digits of range that e4m3 has"),
        *failing(["wsd_decay_fraction", "top_p"], lambda v: 0 < v <= 1, "must be in (0, 1]"),
        *failing(
            ["init_from"],
            lambda v: (
                v in ("scratch", "resume", *GPT2_MODELS)
                or re.fullmatch(r"[\w.-]+/[\w.-]+", v)
                or (v and Path(v).exists())
                or values.get("resume")  # a run that goes on does not need it any more
            ),
            f"is not scratch, resume, {', '.join(GPT2_MODELS)}, a file or folder that is there, or a hub name such as org/model",
        ),
        *failing(["device"], lambda v: re.fullmatch(r"auto|cpu|cuda(:\d+)?", v), "is not one of auto, cpu, cuda, cuda:N"),
        *failing(
            ["profile"],
            lambda v: v == "" or (re.fullmatch(r"[1-9]\d*:\d+", v) and int(v.split(":")[0]) < int(v.split(":")[1])),
            "is no range of steps, counted from 1: type 10:13 for the steps 10, 11 and 12",
        ),
        *failing(
            ["run_name"],
            lambda v: "/" not in v and v not in (".", ".."),
            "names files: it must not contain a slash, or be . or ..",
        ),
    ]


def impossible_combinations(cfg: Config) -> list[tuple[tuple[str, ...], str]]:
    """The same for knobs together; each value alone is known to be possible."""
    m, optim, found = cfg.model, cfg.optim, []
    if m.n_embd % m.n_head:
        near = nearest([h for h in range(1, m.n_embd + 1) if m.n_embd % h == 0], m.n_head)
        found.append((("n_head", "n_embd"), f"n_head={m.n_head} does not divide n_embd={m.n_embd}; the nearest that do: {near}"))
    if m.n_head % m.kv_heads:
        near = nearest([h for h in range(1, m.n_head + 1) if m.n_head % h == 0], m.kv_heads)
        found.append((("n_kv_head", "n_head"), f"n_kv_head={m.n_kv_head} does not divide n_head={m.n_head}; the nearest: {near}"))
    if m.position_encoding == "rope" and m.head_dim % 2:
        found.append((("position_encoding", "n_head", "n_embd"), f"rope turns pairs: n_embd/n_head={m.head_dim} must be even"))
    if optim.decay_lr and optim.lr_schedule != "constant" and optim.min_lr > optim.learning_rate:
        text = f"min_lr={optim.min_lr} is above learning_rate={optim.learning_rate}; pass --min_lr={optim.learning_rate / 10:g}"
        found.append((("learning_rate", "min_lr"), text))
    for flag in ("fp8_required", "fp8_emulate", "fp8_less_memory"):
        if vars(cfg.fp8)[flag] and not cfg.fp8.use_fp8:
            found.append(((flag, "use_fp8"), f"{flag} says how FP8 is used, and use_fp8 is False: pass --use_fp8 as well"))
    if cfg.fp8.fp8_less_memory and cfg.fp8.fp8_recipe == "block":
        text = "fp8_less_memory makes transposes anew, which fp8_recipe=block rounds apart; pass --fp8_recipe=delayed, or drop it"
        found.append((("fp8_less_memory", "fp8_recipe"), text))
    if cfg.fp8.use_fp8 and cfg.run.dtype == "float16":
        found.append((("use_fp8", "dtype"), "use_fp8 and dtype=float16 do not go together; pass --dtype=bfloat16"))
    for flag, others in (("use_zero1", ("ddp",)), ("use_fsdp", ("ddp", "zero1"))):
        if vars(cfg.parallel)[flag] and cfg.parallel.parallel in others:
            found.append(((flag, "parallel"), f"{flag} and parallel={cfg.parallel.parallel} contradict each other: pass one"))
    return found


def nearest(values: list[int], target: int) -> str:
    """The closest legal values on both sides of the target."""
    below, above = [v for v in values if v <= target][-1:], [v for v in values if v > target][:1]
    return " and ".join(map(str, below + above))


# ---------------------------------------------------------------------------------------------------------------------
# Printing them
# ---------------------------------------------------------------------------------------------------------------------


def knob_comments() -> dict[tuple[str, str], str]:
    """(class of the section, knob) -> its one-line meaning: the comment behind it in this file."""
    line, comments, owner = re.compile(r"class (\w+):|    (\w+): .+? = .+?  # (.+)"), {}, ""
    for found in filter(None, map(line.fullmatch, Path(__file__).read_text(encoding="utf-8").splitlines())):
        owner = found[1] or owner
        if found[2]:
            comments[owner, found[2]] = found[3]
    return comments


def print_help(knobs: dict[str, Knob]) -> None:
    command, comments, section = Path(sys.argv[0]).name, knob_comments(), ""
    has_sections = len({knob.section for knob in knobs.values()}) > 1
    print(f"usage: python {command} [config.py ...] [--knob=value ...] [--help] [--print_config]\n")
    print("Later config files and flags win over earlier ones, and flags over files. A boolean may stand alone (--compile).")
    for knob in knobs.values():
        if knob.section != section:
            section = knob.section
            print(f"\n{section}" if has_sections else "")
        print(f"  --{knob.name}={knob.default!r} ({knob.type_name})\n        {comments[knob.owner, knob.name]}")
    if aliases := ", ".join(f"--{a} = --{b}" for a, b in ALIASES.items() if b in knobs):
        print(f"\naliases: {aliases}")


def print_config(values: dict[str, Any], origins: dict[str, str]) -> None:
    """The resolved knobs, each with its origin; the output is a config file itself."""
    for name, value in values.items():
        print(f"{name} = {value!r}  # {origins[name]}")


def error_text(error: UserError) -> str:
    return "error: " + str(error).replace("\n", "\n       ")


def not_installed(package: str) -> UserError:
    return UserError(f"this Python has no {package}: run `make quickstart` once, then `source .venv/bin/activate`")


def is_required(module: str | None) -> bool:
    """Whether requirements.txt names it. Where one of our own modules is missing, or a part of a package, nobody forgot that."""
    return f"\n{module}==" in (ROOT / "requirements.txt").read_text(encoding="utf-8")


def end_with(error: UserError) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun starts several processes that make the same mistake
        print(error_text(error), file=sys.stderr)
    sys.exit(error.exit_code)


@contextmanager
def command_errors() -> Iterator[None]:
    """A user's mistake, or a package to install, becomes one message on stderr and exit code 2, without a traceback."""
    try:
        yield
    except UserError as error:
        end_with(error)
    except ModuleNotFoundError as error:
        if not is_required(error.name):
            raise
        end_with(not_installed(error.name))
    except BrokenPipeError:  # `... | head` closed our output: nothing is wrong
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)


def answer_early(load: Callable[[list[str]], object]) -> None:
    """Read the command line before torch, which takes seconds to import: --help and a mistyped flag are answered at once."""
    with command_errors():
        load(sys.argv[1:])
        if importlib.util.find_spec("torch") is None:
            raise not_installed("PyTorch")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would halve the speed of a CPU shared with others


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command's main on the command line and exit with its code."""
    with command_errors():
        sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (None where it is closed)
        sys.stdout.reconfigure(errors="backslashreplace")  # a text may have letters that the terminal has not
        sys.exit(main(sys.argv[1:]))
