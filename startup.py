"""What a run settles before its first step: what moves in it, its place on disk, and what it resumes.

Each function here either finds everything in order or raises UserError, before any work is done.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kernels
from checkpoint import (
    FOLDER,
    FOLDERS,
    FP8_FOLDER,
    TOKENIZER_FOLDER,
    Checkpoint,
    CheckpointStore,
    Piece,
    check_compatible,
    check_free_space,
    check_shared,
    find_checkpoint,
    lock_out_dir,
    open_checkpoint,
    set_aside,
)
from configurator import NOT_SHAPE, Config, UserError
from data.tokenizer import copy_tokenizer, load_tokenizer
from data.tokens import Dataset
from evaluation import Prompt
from flops import checkpoint_bytes
from fp8 import Fp8
from hellaswag import Questions, find_source, read_items, tokenize
from layout import Layout
from model import build_model
from optim import build_optimizer, optimizer_tensors
from parallel import Ranks, StopRequest, random_state, set_random_state
from precision import LossScale, dtype_name
from pretrained import Pretrained, check_tokenizer, load_weights, with_pretrained
from profiling import is_out_of_memory, out_of_memory_help
from sharding import put_rows
from training_logger import TrainingLogger, new_run_name


def with_vocabulary(cfg: Config, dataset: Dataset, pretrained: Pretrained | None = None) -> Config:
    """The configuration with `vocab_size` settled: the dataset's, padded, unless it was given or comes with the weights."""
    if pretrained:
        check_tokenizer(pretrained, dataset)
    vocab_size = dataset.embedding_rows(cfg.model.vocab_size)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))


def with_weights(cfg: Config, ranks: Ranks) -> tuple[Config, Pretrained | None]:
    """As `with_pretrained`; but where a run is resumed that began so, its checkpoint says it all: its source may be gone."""
    saved = ranks.agree(lambda: shape_to_resume(cfg))
    if not saved:
        return with_pretrained(cfg)
    values, origins = ({name: pair[i] for name, pair in saved.items()} for i in range(2))
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **values), origins=cfg.origins | origins), None


def shape_to_resume(cfg: Config) -> dict[str, tuple[Any, str]]:
    """(value, origin) of the model's knobs that came with a run's --init_from, in the checkpoint to resume; none given now."""
    checkpoint = None
    if cfg.checkpoint.resumes:
        with suppress(UserError):  # said again when out_dir is locked and the checkpoint is verified
            which = cfg.checkpoint.resume or "latest"
            checkpoint = find_checkpoint(cfg.run.out_dir, which, lambda line: None, checksums=False)
    config = checkpoint.state["config"] if checkpoint else {}
    origins = {name: origin for name, origin in config.get("origins", {}).items() if origin.startswith("--init_from=")}
    mine = {name for name in vars(cfg.model) if not cfg.is_given(name)}
    return {name: (config["values"][name], origin) for name, origin in origins.items() if name in mine}


@dataclass
class TrainState:
    """Everything that moves during training: `tensors` and `to_json` are a checkpoint's content, `restore` their inverse."""

    model: nn.Module
    layout: Layout
    optimizer: torch.optim.AdamW
    loss_scale: LossScale
    fp8: Fp8
    ranks: Ranks
    run_name: str
    step: int = 0  # finished steps
    samples: int = 0  # sequences they have read: the position in the global sample order
    evaluated_step: int = -1
    measured_step: int = -1  # of HellaSwag and text samples
    val_loss: float | None = None  # of the last evaluation
    best_val_loss: float | None = None
    skipped: int = 0  # steps with a gradient that was not finite
    skipped_in_a_row: int = 0

    COUNTERS = ("step", "samples", "evaluated_step", "measured_step", "val_loss", "best_val_loss", "skipped", "skipped_in_a_row")

    @property
    def tokens(self) -> int:
        return self.samples * self.model.cfg.block_size

    @property
    def progress(self) -> tuple[int, int, int]:
        """What tells two states of a run apart: finished steps, and the last of them that was evaluated and measured."""
        return self.step, self.evaluated_step, self.measured_step

    def held(self) -> Iterator[tuple[str, Piece, int]]:
        """(name, piece, number of ranks that hold the same) of every tensor of a checkpoint."""
        parts, world_size = self.layout.parts, self.ranks.world_size
        scalars = self.loss_scale.tensors() | self.fp8.tensors()
        for name, tensor in optimizer_tensors({name: part.rows for name, part in parts.items()}, self.optimizer).items():
            part = parts[name.removeprefix("optim.").rpartition(".")[0]]
            if tensor.ndim:
                yield name, Piece(tensor, part.first_row, tuple(part.parameter.shape)), part.copies
            else:
                scalars[name] = tensor
        for name, part in parts.items():
            yield f"model.{name}", Piece(part.rows.detach(), part.first_row, tuple(part.parameter.shape)), part.copies
        for name, tensor in scalars.items():
            yield name, Piece.whole(tensor), world_size

    def to_save(self) -> dict[str, Piece]:
        """This rank's share of the tensors: ranks that hold the same rows divide them, so that each copies and writes as much."""
        self.layout.settle()
        self.ranks.finish_device()
        rank, n = self.ranks.rank, self.ranks.world_size
        shares = {name: piece.share(rank * copies // n, copies) for name, piece, copies in self.held()}
        return {name: share for name, share in shares.items() if share is not None}

    def to_json(self, cfg: Config, dataset: Dataset) -> dict[str, Any]:
        """Everything else that moves, of all ranks. A collective."""
        generators = self.ranks.all_of(random_state(self.ranks.device))
        return {
            "run_name": self.run_name,
            "launches": sorted({*self.ranks.all_of(launch_id())} - {None}),
            "val_loss": self.val_loss,
            "counters": {name: getattr(self, name) for name in self.COUNTERS},
            "rng": {str(rank): states for rank, states in enumerate(generators)},
            "config": {"values": cfg.values(), "origins": cfg.origins},
            **identity(cfg, dataset),
        }

    def restore(self, checkpoint: Checkpoint) -> list[str]:
        """From a checkpoint of any number of ranks and any layout; lines for the log. Raises UserError for another model."""
        pieces, saved = {name: piece for name, piece, _ in self.held()}, checkpoint.metadata.state_dict_metadata
        others: dict[str, torch.Tensor] = {}  # that have another shape here, or no place
        # A run may go on in another dtype: scales that were not saved start afresh, and those that are not needed are dropped.
        for name in {name for name in pieces | saved if name.startswith(("loss_scale.", "fp8."))}:
            if name not in saved:
                del pieces[name]
            elif name not in pieces or pieces[name].shape != tuple(saved[name].size):
                others[name] = torch.empty(saved[name].size, dtype=saved[name].properties.dtype)
                pieces[name] = Piece.whole(others[name])
        checkpoint.load(pieces)
        self.layout.round()
        notes = self.fp8.take(others["fp8.amax_history"]) if "fp8.amax_history" in others else []
        for name in self.COUNTERS:
            setattr(self, name, checkpoint.state["counters"].get(name, getattr(self, name)))
        set_random_state(checkpoint.state["rng"].get(str(self.ranks.rank), {}), self.ranks.device)
        return notes


def build_state(cfg: Config, ops: kernels.Operations, layout: Layout, fp8: Fp8, run_name: str = "") -> TrainState:
    """As a run begins: shapes on meta, FP8's products, shards, storage and values, masters, AdamW's state."""
    ranks = layout.ranks
    model = build_model(cfg.model, ranks.device, cfg.run.seed, ops, lambda model: layout.shard(fp8.convert(model)), put_rows)
    layout.attach(model)
    fp8.attach(ranks.device, ranks.table, layout.rows, layout.weights_arrive)
    optimizer = build_optimizer(layout.rows.values(), cfg.optim, ops.AdamW, layout.rounded)
    return TrainState(model, layout, optimizer, LossScale(layout.dtype, ranks.device), fp8, ranks, run_name)


def restore(state: TrainState, checkpoint: Checkpoint | None, pretrained: Pretrained | None) -> list[str]:
    """Goes on from the checkpoint; where there is none, starts from `pretrained`'s weights; else all stays as it was drawn.

    Returns lines for the log.
    """
    notes = []
    if checkpoint:
        notes = state.restore(checkpoint)
    elif pretrained:
        load_weights(state.model, pretrained, state.layout.put)
        state.layout.round()
    if checkpoint or pretrained:  # what was drawn is measured by then
        state.fp8.restore()
    return notes


def launch_id() -> str | None:
    """The folder that this machine's torchrun has made for itself: another at every launch, the same after each restart.

    Its --rdzv_id would not do: that is the same word for all launches, unless the user gives each its own.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_N/RANK/error.json
    return str(Path(error_file).parents[2]) if error_file else None


def identity(cfg: Config, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """What a checkpoint must share with the run that resumes it: the model's shape, and the data with its tokenizer."""
    shape = {name: value for name, value in vars(cfg.model).items() if name not in NOT_SHAPE}
    return {"model": shape, "data": dataset.fingerprint()}


def claim_out_dir(cfg: Config, dataset: Dataset, ranks: Ranks, stack: ExitStack) -> tuple[Checkpoint | None, list[str]]:
    """(the checkpoint to resume, lines to log). Locks out_dir until the stack is closed; an evaluation only reads it.

    Rank 0 finds and verifies the checkpoint for all.
    """
    claimed: list[Checkpoint | None] = []

    def claim() -> tuple[Path | None, list[str]]:
        checkpoint, notes = find_to_resume(cfg, dataset, stack)
        claimed.append(checkpoint)
        return checkpoint and checkpoint.path, notes

    path, notes = ranks.agree(claim)
    if not cfg.eval.eval_only:
        check_shared(cfg.run.out_dir, ranks)
    if claimed or path is None:
        return (claimed or [None])[0], notes
    return open_checkpoint(path, checksums=False), notes


def check_same_knobs(cfg: Config, ranks: Ranks, dtype: torch.dtype) -> None:
    """Of all ranks, and what became of dtype=auto, but for data_dir, which may be a disk of each node.

    Before anything that depends on them, a collective above all. Raises UserError on all ranks.
    """
    own = {name: value for name, value in cfg.values().items() if name != "data_dir"}
    first, *others = ranks.all_of(own | {"dtype": f"{cfg.run.dtype} ({dtype_name(dtype)})"})
    for rank, values in enumerate(others, 1):
        if different := [f"{name} is {first[name]!r} and {values[name]!r}" for name in first if first[name] != values[name]]:
            what = ", ".join(different)
            raise UserError(f"ranks 0 and {rank} have different knobs: {what}; give all the same command and files")


def find_to_resume(cfg: Config, dataset: Dataset, stack: ExitStack) -> tuple[Checkpoint | None, list[str]]:
    notes: list[str] = []
    out_dir, writes = Path(cfg.run.out_dir), not cfg.eval.eval_only
    if writes:
        stack.callback(lock_out_dir(out_dir, notes.append).close)
    checkpoint, asked = None, (cfg.checkpoint.resume or "latest") if cfg.checkpoint.resumes else ""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and writes  # torchrun starts what has failed once more
    if again or asked == "latest":
        checkpoint = find_checkpoint(out_dir, "latest", notes.append)
    if checkpoint and asked != "latest" and launch_id() not in checkpoint.state.get("launches", []):
        checkpoint = None  # another launch's: this one failed before it had saved anything
    if checkpoint is None and asked not in ("", "latest"):
        checkpoint = find_checkpoint(out_dir, asked, notes.append)
    if checkpoint:
        if checkpoint.state.get("weights_only"):
            raise UserError(f"{checkpoint.path} is imported and has no optimizer: train from it with --init_from={out_dir}")
        check_compatible(checkpoint.state, identity(cfg, dataset))
        notes.append(f"resuming {checkpoint.path} after step {checkpoint.iter}")
        if checkpoint.iter >= (last := cfg.optim.max_iters) and writes:
            notes.append(f"nothing left to do: step {checkpoint.iter} of --max_iters={last}; a larger --max_iters goes on")
    elif cfg.checkpoint.resumes:
        near = near_runs(out_dir)
        if not writes:
            raise UserError(f"--eval_only: {out_dir} holds no checkpoint; pass --out_dir=... of a run that saved one{near}")
        notes.append(f"nothing saved in {out_dir} yet: starting from {cfg.checkpoint.pretrained or 'scratch'}{near}")
    replaces = is_own(cfg, checkpoint)
    if writes and (warning := check_free_space(out_dir, checkpoint_bytes(cfg.model), cfg.checkpoint, replaces)):
        notes.append(warning)
    return checkpoint, notes


def near_runs(out_dir: Path) -> str:
    """For a message: the folders beside out_dir that have a name like its own, and checkpoints."""
    saved = {path.parent.name for folder in FOLDERS for path in out_dir.parent.glob(f"*/{folder}")} - {out_dir.name}
    near = difflib.get_close_matches(out_dir.name, sorted(saved))
    return f"; there are checkpoints in {', '.join(str(out_dir.with_name(name)) for name in near)}" if near else ""


def is_own(cfg: Config, checkpoint: Checkpoint | None) -> bool:
    """Whether there is one and it lies in this run's out_dir; `--resume=PATH` may name another run's."""
    own = [(Path(cfg.run.out_dir) / name).resolve() for name in FOLDERS]
    return checkpoint is not None and checkpoint.path.parent.resolve() in own


def folder_of(fp8: Fp8) -> str:
    """Where in out_dir a run saves."""
    return FP8_FOLDER if fp8.active else FOLDER


def in_latest(cfg: Config, checkpoint: Checkpoint | None, state: TrainState) -> tuple[int, int, int] | None:
    """The progress that `latest` holds, if the restored `state` came from it; any other has yet to become it."""
    if not checkpoint or not is_own(cfg, checkpoint):
        return None
    is_latest = (checkpoint.path.parent.name, checkpoint.path.name) == (folder_of(state.fp8), "latest")
    return state.progress if is_latest else None


def open_store(
    cfg: Config, dataset: Dataset, checkpoint: Checkpoint | None, log: TrainingLogger, state: TrainState
) -> CheckpointStore:
    """The run's checkpoints, and its tokenizer beside them. Those of another run are set aside: nothing is refused any more."""
    out_dir, ranks = Path(cfg.run.out_dir), state.ranks
    saves = cfg.checkpoint.save_checkpoints and not cfg.eval.eval_only
    if saves and not is_own(cfg, checkpoint) and (line := ranks.agree(lambda: set_aside(out_dir))):
        log.line(line)
    if saves and ranks.is_main:
        with suppress(OSError):  # a disk that is full is no reason not to train
            copy_tokenizer(dataset, out_dir / TOKENIZER_FOLDER)
    own = ranks.with_own_group(cfg.parallel.start_timeout_s) if ranks.world_size > 1 else None
    said = (lambda saved: log.checkpoint(vars(saved)), log.line)
    return CheckpointStore(out_dir, cfg.checkpoint, *said, own, folder_of(state.fp8))


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


def load_questions(cfg: Config, dataset: Dataset, ranks: Ranks) -> Questions | None:
    """HellaSwag in the run's tokens, where it is asked for; what is wrong with it is said now and not at the first evaluation."""
    if cfg.eval.hellaswag_interval == 0:
        return None
    items = ranks.agree(lambda: read_items(find_source(cfg.eval.hellaswag_source)))
    try:
        return tokenize(items[: cfg.eval.hellaswag_items or None], load_tokenizer(dataset), cfg.model.block_size)
    except UserError as error:
        raise UserError(f"--hellaswag_interval={cfg.eval.hellaswag_interval}: {error}; pass 0 to leave it out") from None


def choose_kernels(cfg: Config, device: torch.device) -> tuple[kernels.Operations, dict[str, str]]:
    """(the operations of the model, who computes them by knob: triton or torch)."""
    try:
        ops, chosen = kernels.choose(vars(cfg.kernels), device.type)
    except ValueError as error:
        raise UserError(str(error)) from None
    return ops, chosen | ({"fp8_kernel": "torch"} if cfg.fp8.fp8_emulate else {})


def run_name_of(cfg: Config, checkpoint: Checkpoint | None, ranks: Ranks) -> str:
    """The name given, else the resumed run's, else the time; an evaluation has a log of its own."""
    now = ranks.agree(new_run_name)
    if cfg.eval.eval_only:
        return f"eval_{cfg.run.run_name or now}"
    return cfg.run.run_name or (checkpoint.state["run_name"] if checkpoint else now)


def ending(kind: type[BaseException] | None, error: BaseException | None, stop: StopRequest) -> str:
    """How the run ended, in a word or a line."""
    return f"{kind.__name__}: {error}" if kind else stop.reason or "finished"


class NonFiniteRun(UserError):
    """Too many steps in a row had a gradient that is not finite."""

    exit_code = 3

    def __init__(self, in_a_row: int, last_step: int) -> None:
        super().__init__(
            f"{in_a_row} steps in a row had no finite gradient, the last at step {last_step}; weights and checkpoints are those "
            "from before. Try a lower --learning_rate, or another --dtype than float16"
        )


class OutOfMemory(UserError):
    exit_code = 4


def explain(cfg: Config, error: Exception) -> Exception:
    """What to raise instead: where memory has run out, an error that says what needs less."""
    if isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error):
        return OutOfMemory(out_of_memory_help(cfg, error))
    return error
