"""The run log: what a run prints, and the same figures in a file, in TensorBoard and in Weights & Biases.

`out_dir/run_X.json` is one strict-JSON document that parses whenever it is opened. It can, at a constant cost a record, because

* `training_iterations` comes last and holds one record a line. A new record overwrites only the few bytes that close the
  document: one `pwrite` of about 400 bytes, a few microseconds, so nothing waits in memory and kill -9 loses nothing.
* every other section is a slot padded with blanks, which JSON ignores. An entry overwrites the slot's closing bracket and some
  of the blanks. A slot that is full is doubled, and the document written anew beside the old one and renamed over it.

A write that a crash cut short leaves one line that does not parse. Readers leave that line out; so does the next writer.
Only rank 0 logs: `TrainingLogger(..., active=False)` is the silent twin that the other ranks call.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from configurator import Config, UserError

VALUES = ("run_name", "config", "startup_info", "summary")  # sections that hold one value
LISTS = ("events", "checkpoints", "eval_steps", "training_iterations")  # sections that grow; the last one without a limit
RETRY_S = 5.0  # after a failed write, how long until the next try
SUMMARY_S = 5.0  # the summary in the file is never older than this
SLOT_BYTES = (2_048, 131_072)  # least and most that is set aside for a section before it is known to need more
BOLD, DIM, GREEN, RESET = "\033[1m", "\033[2m", "\033[32m", "\033[0m"


@dataclass(frozen=True)
class Throughput:
    """What turns the time of a step into FLOP/s and MFU. All figures are over all GPUs."""

    flops_per_token: float  # training, attention counted in full
    flops_per_token_causal: float  # attention counted causally
    peak_tflops: float | None  # of all GPUs together; None where the hardware is unknown
    tokens_per_step: int


@dataclass(frozen=True)
class StepRecord:
    """One logged step, as the loop measured it."""

    iter: int
    loss: float
    lr: float
    time_ms: float
    data_wait_ms: float
    tokens: int  # seen since the first step of the run
    grad_norm: float
    grad_mean: float | None = None  # with grad_std: every gradient_log_interval steps
    grad_std: float | None = None
    allocated_gb: float | None = None  # None where there is no GPU
    peak_gb: float | None = None
    reserved_gb: float | None = None
    skipped: int = 0  # steps skipped so far because of a non-finite gradient


def new_run_name() -> str:
    return datetime.now().strftime("%Y%m%d_%H%M%S")


def log_path(out_dir: str | Path, run_name: str) -> Path:
    return Path(out_dir) / f"run_{run_name}.json"


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def strict_json(value: Any) -> str:
    """JSON as the standard has it: NaN and infinities become null, paths and the like become strings."""
    try:
        return json.dumps(value, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def surviving_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(section, value) and (section, record) of every line that is whole; nothing of a file that was not written here."""
    section = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith('{"run_name": ' if not section else ' "'):  # a value, or a list with a record on each line
                section, _, line = line[2:].partition('": ')
            with suppress(ValueError):  # a torn line, or a bracket
                yield section, json.loads(line.strip(" ,\n"))


@dataclass
class Slot:
    start: int  # offset of the section's value in the file
    used: int  # bytes of it, brackets included
    size: int  # bytes it may take


class RunFile:
    """The growing document. Once it is there no method raises: while the disk is full, entries wait in memory."""

    def __init__(self, path: Path, values: dict[str, Any], slot_bytes: dict[str, int], warn: Callable[[str], None]) -> None:
        """Writes the document with its `values` and empty lists. Raises OSError."""
        self.path, self._warn, self._slot_bytes = path, warn, dict(slot_bytes)
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._retry_at_s = 0.0  # 0 while writing works
        self._fd = -1
        contents = {section: strict_json(value).encode() for section, value in values.items()}
        self._build(contents | {section: b"[" + closing(section) for section in LISTS[:-1]}, [b"[" + closing(LISTS[-1])])

    def append(self, section: str, record: dict[str, Any]) -> None:
        self._waiting.append((section, strict_json(record).encode()))
        if not self._retry_at_s or time.monotonic() >= self._retry_at_s:
            self.flush()

    def put(self, section: str, value: Any) -> None:
        """Replaces the value of a section. Where that fails the old one stands until the next call."""
        text = strict_json(value).encode()
        with suppress(OSError):
            if len(text) > self._slots[section].size:
                self._enlarge(section, len(text))
            slot = self._slots[section]
            write_all(self._fd, text.ljust(slot.used), slot.start)
            slot.used = len(text)

    def flush(self) -> int:
        """Writes what waits (nothing does, unless the disk was full) and returns how many entries still wait."""
        try:
            while self._waiting:
                self._append(*self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._retry_at_s:
                self._warn(f"{self.path}: {error.strerror}; training goes on, the log waits in memory and is tried again")
            self._retry_at_s = time.monotonic() + RETRY_S
        else:
            if self._retry_at_s:
                self._warn(f"{self.path}: written again, nothing is missing")
            self._retry_at_s = 0.0
        return len(self._waiting)

    def sync(self) -> None:
        """Brings the file to the disk itself, so that it outlives the machine and not only the process."""
        with suppress(OSError):
            os.fsync(self._fd)

    def move_to(self, path: Path) -> None:
        self.sync()
        os.replace(self.path, path)
        self.path = path

    def close(self) -> None:
        if lost := self.flush():
            self._warn(f"{self.path}: {lost} entries of the log could not be written and are lost")
        os.close(self._fd)

    def _append(self, section: str, record: bytes) -> None:
        end = closing(section)
        first = self._slots[section].used == len(b"[") + len(end)
        # `tail -f` goes on behind the old closing bytes: what comes before a record is as long as those are.
        piece = (b"\n   " if first else b",\n  ") + record + end
        grown = self._slots[section].used + len(piece) - len(end)
        bounded = section != LISTS[-1]
        if bounded and grown > self._slots[section].size:
            self._enlarge(section, grown)
        slot = self._slots[section]
        at = slot.start + slot.used - len(end)
        try:
            write_all(self._fd, piece, at)
        except OSError:  # what a full disk let through must not stay: the old ending comes back
            with suppress(OSError):
                os.pwrite(self._fd, end.ljust(len(piece)) if bounded else end, at)
                if not bounded:
                    os.ftruncate(self._fd, at + len(end))
            raise
        slot.used = grown

    def _enlarge(self, section: str, needed: int) -> None:
        """The document again, with a bigger slot. Slots double, so that this is rare however long the run."""
        self._slot_bytes[section] = 2 * needed
        slots = {name: slot for name, slot in self._slots.items() if name != LISTS[-1]}
        contents = {name: os.pread(self._fd, slot.used, slot.start) for name, slot in slots.items()}
        self._build(contents, self._records())

    def _records(self) -> Iterator[bytes]:
        """The bytes of the last section as they are in the file, in chunks."""
        offset = self._slots[LISTS[-1]].start
        while chunk := os.pread(self._fd, 1 << 20, offset):
            yield chunk
            offset += len(chunk)

    def _build(self, contents: dict[str, bytes], records: Iterable[bytes]) -> None:
        """Writes a document beside `path` and renames it over `path`. Raises OSError and leaves the old one as it was."""
        head, slots = b"{", {}
        for section in VALUES + LISTS[:-1]:
            head += f'"{section}": '.encode()
            text = contents[section]
            slot = slots[section] = Slot(len(head), len(text), max(len(text), self._slot_bytes.get(section, 0)))
            head += text.ljust(slot.size) + b",\n "
        head += f'"{LISTS[-1]}": '.encode()
        temporary = self.path.with_name(self.path.name + ".tmp")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            end = write_all(fd, head, 0)
            for chunk in records:
                end = write_all(fd, chunk, end)
            os.fsync(fd)
            os.replace(temporary, self.path)
        except OSError:
            os.close(fd)
            temporary.unlink(missing_ok=True)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._slots = fd, slots | {LISTS[-1]: Slot(len(head), end - len(head), 0)}


def closing(section: str) -> bytes:
    """What ends a list: the last one ends the document too."""
    return b"\n]}\n" if section == LISTS[-1] else b"\n ]"


def write_all(fd: int, data: bytes, offset: int) -> int:
    """Writes at `offset` and returns where the data ends. Raises OSError, perhaps after a part was written."""
    while data:  # a full disk takes a part first, and raises when the rest is tried
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
    return offset


def slot_plan(cfg: Config) -> dict[str, int]:
    """Bytes to set aside for each section, from how often the run will write to it."""

    def bytes_for(entry_bytes: int, *intervals: int) -> int:
        entries = sum(cfg.optim.max_iters // interval + 2 for interval in intervals if interval)
        return min(max(entry_bytes * entries, SLOT_BYTES[0]), SLOT_BYTES[1])

    return {
        "startup_info": SLOT_BYTES[0],
        "summary": SLOT_BYTES[0] // 2,
        "events": bytes_for(200 + 6 * cfg.eval.sample_tokens, cfg.eval.sample_interval) + SLOT_BYTES[0],
        "checkpoints": bytes_for(
            200, cfg.checkpoint.checkpoint_interval, cfg.checkpoint.rolling_interval, cfg.eval.eval_interval
        ),
        "eval_steps": bytes_for(200, cfg.eval.eval_interval),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The summary
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Running sums behind `summary`, so that it costs the same at every step.

    Averages are over time: total work by total time. The first record of each process is left out of them, because it
    pays for what happens once (allocator, autotuning, lazy initialisation).
    """

    time_ms: float = 0.0
    records: int = 0
    token_ms: float = 0.0  # sum of tokens_per_sec x time_ms
    mfu_ms: float = 0.0  # sum of mfu_percent x time_ms, over records that have an MFU
    mfu_time_ms: float = 0.0
    last_step: dict[str, Any] = field(default_factory=dict)
    best_evaluation: dict[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0

    def add_step(self, record: dict[str, Any], counts: bool) -> None:
        self.last_step = record
        if not counts:
            return
        time_ms, mfu = record["time_ms"], record["mfu"]
        self.records += 1
        self.time_ms += time_ms
        self.token_ms += mfu["tokens_per_sec"] * time_ms
        if mfu["mfu_percent"] is not None:
            self.mfu_ms += mfu["mfu_percent"] * time_ms
            self.mfu_time_ms += time_ms

    def add_evaluation(self, record: dict[str, Any]) -> None:
        loss = record["val_loss"]
        if loss is not None and math.isfinite(loss) and loss < self.best_evaluation.get("val_loss", math.inf):
            self.best_evaluation = record

    @property
    def avg_time_ms(self) -> float | None:
        return round(self.time_ms / self.records, 3) if self.records else None

    def summary(self, wall_s: float, status: str) -> dict[str, Any]:
        return {
            "avg_mfu": round(self.mfu_ms / self.mfu_time_ms, 4) if self.mfu_time_ms else None,
            "avg_time_ms": self.avg_time_ms,
            "avg_tokens_per_sec": round(self.token_ms / self.time_ms, 3) if self.time_ms else None,
            "final_train_loss": self.last_step.get("loss"),
            "best_val_loss": self.best_evaluation.get("val_loss"),
            "best_val_iter": self.best_evaluation.get("iter"),
            "total_tokens": self.last_step.get("tokens", 0),
            "last_iter": self.last_step.get("iter"),
            "skipped_steps": self.skipped_steps,
            "wall_s": round(wall_s, 3),
            "status": status,
        }


# ---------------------------------------------------------------------------------------------------------------------
# The console
# ---------------------------------------------------------------------------------------------------------------------


class Console:
    """Standard output, and the same text without colour in `run_X.log`. Losing either of them does not stop training."""

    def __init__(self, path: Path, style: str) -> None:
        """Raises OSError where the file cannot be opened."""
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.block = style == "block" or (style == "auto" and sys.stdout.isatty())
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._file_works = True

    def print(self, text: str, style: str = "") -> None:
        shown = f"{style}{text}{RESET}" if style and self._colour else text
        try:
            try:
                sys.stdout.write(f"{shown}\n")
            except UnicodeEncodeError:  # a terminal that cannot show all letters
                sys.stdout.write(shown.encode("ascii", "backslashreplace").decode() + "\n")
            sys.stdout.flush()
        except OSError:  # the terminal or the pipe is gone
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        try:
            os.write(self._fd, f"{text}\n".encode(errors="replace"))
            self._file_works = True
        except OSError as error:
            if self._file_works:
                self._file_works = False
                self.print(f"{self.path}: {error.strerror}; training goes on without this file")

    def close(self) -> None:
        os.close(self._fd)


def step_lines(record: dict[str, Any]) -> list[str]:
    """The console block of one step. What was not measured (MFU on unknown hardware, memory on a CPU) is not printed."""
    mfu, memory, gradients = record["mfu"], record["memory"], record["gradients"]
    rates = []
    if mfu["mfu_percent"] is not None:
        rates = [f"MFU: {mfu['mfu_percent']:.2f}%"]
    rates += [f"Achieved: {figure(mfu['achieved_tflops'])} TF"]
    if mfu["peak_tflops"] is not None:
        rates += [f"Peak: {figure(mfu['peak_tflops'])} TF"]
    flops = mfu["flops_per_token"]
    per_token = f"{flops / 1e9:.1f} GF" if flops >= 1e9 else f"{flops / 1e6:.1f} MF"
    rates += [f"Tokens/s: {mfu['tokens_per_sec']:,.0f}", f"FLOPs/token: {per_token}"]
    time_text = f"{record['time_ms']:.{0 if record['time_ms'] >= 10 else 2}f}ms"
    first = f"Iter {record['iter']} | Loss: {record['loss']:.4f} | Time: {time_text} | LR: {record['lr']:.2e}"
    lines = [first, " | ".join(rates)]
    if memory is not None:
        lines += [
            f"Memory: {memory['allocated_gb']:.2f} GB alloc | {memory['peak_gb']:.2f} GB peak | "
            f"{memory['reserved_gb']:.2f} GB reserved"
        ]
    lines += [f"Gradients: norm={gradients['global_norm']:.4f}"]
    if "grad_std" in gradients:
        lines[-1] += f" | mean={gradients['grad_mean']:.2e} | std={gradients['grad_std']:.2e}"
    return lines


def figure(value: float) -> str:
    """One decimal, and three significant digits for what is smaller than one: 141.1, 6.4, 0.0523."""
    return f"{value:.1f}" if value >= 1 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """45s, 3m20s, 1h02m, 2d03h."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d{h:02}h" if days else f"{h}h{m:02}m" if h else f"{m}m{s:02}s" if m else f"{s}s"


def report_lines(info: dict[str, dict[str, Any]]) -> list[str]:
    """The start report: a heading for each section, its entries aligned below."""
    width = max((len(name) for entries in info.values() for name in entries), default=0)
    lines = []
    for section, entries in info.items():
        lines += [f"{section}:", *(f"  {name.replace('_', ' '):<{width}}  {readable(value)}" for name, value in entries.items())]
    return lines


def readable(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.6g}"
        case list() | tuple():
            return ", ".join(map(readable, value)) or "none"
    return str(value)


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard and Weights & Biases
# ---------------------------------------------------------------------------------------------------------------------


def step_figures(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a step by tag; what was not measured is absent."""
    memory, gradients = record["memory"] or {}, record["gradients"]
    tags = {"loss/train": record["loss"], "loss/lr": record["lr"], "perf/time_ms": record["time_ms"]}
    tags |= {"perf/data_wait_ms": record["data_wait_ms"], "perf/tokens": record["tokens"]}
    rates = ("mfu_percent", "mfu_causal_percent", "achieved_tflops", "tokens_per_sec")
    tags |= {f"perf/{key}": record["mfu"][key] for key in rates}
    tags |= {f"memory/{key}": value for key, value in memory.items()} | {f"gradients/{key}": gradients[key] for key in gradients}
    return {tag: value for tag, value in tags.items() if value is not None}


class TensorBoard:
    def __init__(self, folder: Path, cfg: Config, resume_iter: int | None) -> None:
        """Raises UserError where the package is missing."""
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams
        except ImportError as error:
            raise UserError(f"--use_tensorboard: {error}; type: pip install tensorboard, or leave the flag out") from None
        self._summary = Summary
        # From purge_step on, TensorBoard hides what an earlier process of this run wrote.
        purge_step = None if resume_iter is None else resume_iter + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=5)
        knobs = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in cfg.values().items()}
        for summary in hparams(knobs, {"eval/val_loss": 0.0, "loss/train": 0.0}):
            self._writer.file_writer.add_summary(summary)

    def scalars(self, figures: dict[str, float], step: int) -> None:
        # One protocol buffer for all figures: a tenth of the time that add_scalar takes for each.
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._writer.file_writer.add_summary(self._summary(value=values), step)

    def text(self, text: str, step: int) -> None:
        self._writer.add_text("sample", "    " + text.replace("\n", "\n    "), step)  # Markdown: indented is verbatim

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    def __init__(self, out_dir: Path, run_name: str, cfg: Config) -> None:
        """Raises ImportError where the package is missing, and what it raises itself (no account, no network)."""
        import wandb

        name = cfg.log.wandb_run_name or run_name
        self._run = wandb.init(
            project=cfg.log.wandb_project, name=name, id=run_name, resume="allow", dir=str(out_dir), config=cfg.values()
        )

    def scalars(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def text(self, text: str, step: int) -> None:
        self._run.log({"sample": text}, step=step)

    def close(self) -> None:
        self._run.finish()


# ---------------------------------------------------------------------------------------------------------------------
# The logger
# ---------------------------------------------------------------------------------------------------------------------


class TrainingLogger:
    """One run's log. Methods are called from the training thread; none of them raises when a disk or a service fails."""

    def __init__(self, cfg: Config, run_name: str, resume_iter: int | None = None, active: bool = True) -> None:
        """Opens the log of `run_name`: the run's own file, cut back to `resume_iter`, or a new one.

        A run from scratch (resume_iter None) never overwrites: files of an earlier run with this name are set aside.
        With `active` False every method works and does nothing. Raises UserError where out_dir cannot be written.
        """
        self.active = active
        if not active:
            return
        if Path(run_name).name != run_name:
            raise UserError(f"run_name={run_name!r}: it names files, so it must not be empty or have a slash")
        self._cfg, self._t0_s, self._wall_before_s = cfg, time.monotonic(), 0.0
        self._progress, self._first_step, self._summary_due_s, self._iter = Progress(), True, 0.0, resume_iter or 0
        self._sinks: list[TensorBoard | WeightsAndBiases] = []
        self._throughput: Throughput | None = None
        out_dir = Path(cfg.run.out_dir)
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            path = log_path(out_dir, run_name)
            earlier = [path, path.with_suffix(".log"), out_dir / "tensorboard" / run_name]
            moved = set_aside(earlier) if resume_iter is None else []
            self._console = Console(path.with_suffix(".log"), cfg.log.console)
            if moved:
                self.line(f"an earlier run was named {run_name} too; its files are kept as {', '.join(moved)}")
            self._open_file(path, run_name, resume_iter)
        except OSError as error:
            raise UserError(f"out_dir={cfg.run.out_dir}: the run log cannot be written there: {error}") from None
        self._put_summary("running")
        self._open_sinks(out_dir, run_name, resume_iter)

    def report(self, startup_info: dict[str, dict[str, Any]], throughput: Throughput) -> None:
        """Prints the start report and stores it; MFU of every step is computed with `throughput`."""
        if not self.active:
            return
        self._throughput = throughput
        self._file.put("startup_info", startup_info)
        self._console.print("\n".join(report_lines(startup_info)))

    def line(self, text: str) -> None:
        """Prints a line, and writes it to run_X.log."""
        if self.active:
            self._console.print(text)

    def event(self, kind: str, iter: int, message: str, **details: Any) -> None:
        """Prints the message and keeps it, with its details, among the run's events."""
        if not self.active:
            return
        self._console.print(message)
        self._keep_event(kind, iter, message, **details)

    def step(self, step: StepRecord) -> None:
        """Records a step that is due for it. Costs some tens of microseconds, most of them the console's."""
        if not self.active:
            return
        assert self._throughput is not None, "report() comes before the first step"
        record = step_record(step, self._throughput)
        self._file.append("training_iterations", record)
        self._progress.add_step(record, counts=not self._first_step)
        self._progress.skipped_steps = step.skipped
        self._first_step, self._iter = False, step.iter
        self._print_step(record)
        if self._sinks:
            self._send(step_figures(record), step.iter)
        if time.monotonic() >= self._summary_due_s:
            self._put_summary("running")

    def evaluation(
        self, iter: int, train_loss: float, val_loss: float, val_bits_per_byte: float | None, lr: float, tokens: int
    ) -> None:
        """Records an evaluation; the loss is in nats a token."""
        if not self.active:
            return
        record = {"iter": iter, "train_loss": train_loss, "val_loss": val_loss, "val_bits_per_byte": val_bits_per_byte}
        record |= {"lr": lr, "tokens": tokens, "wall_s": self._wall_s()}
        bits = "" if val_bits_per_byte is None else f", val bits per byte {val_bits_per_byte:.4f}"
        self._console.print(f"step {iter}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{bits}", GREEN)
        self._file.append("eval_steps", record)
        self._progress.add_evaluation(record)
        self._put_summary("running")
        figures = {"eval/train_loss": train_loss, "eval/val_loss": val_loss, "eval/val_bits_per_byte": val_bits_per_byte}
        self._send({tag: value for tag, value in figures.items() if value is not None}, iter)

    def checkpoint(self, iter: int, tier: str, path: Path | str, val_loss: float | None, bytes: int, save_s: float) -> None:
        """Records a published checkpoint, and brings the log itself to the disk: what it resumes from is then on record."""
        if not self.active:
            return
        record = {"iter": iter, "tier": tier, "path": path, "val_loss": val_loss, "bytes": bytes, "save_s": round(save_s, 3)}
        self._console.print(f"checkpoint {tier} at step {iter}: {path} ({bytes / 1e9:.2f} GB in {save_s:.1f} s)")
        self._file.append("checkpoints", record)
        self._put_summary("running")
        self._file.sync()

    def text(self, iter: int, text: str) -> None:
        """Shows and keeps a generated text."""
        if not self.active:
            return
        self._console.print(f"sample at step {iter}:\n{text}")
        self._keep_event("sample", iter, "generated text", text=text)
        for sink in list(self._sinks):
            self._guarded(sink, lambda sink=sink: sink.text(text, iter))

    def close(self, reason: str) -> None:
        """Ends the log: last summary, a closing line, and everything flushed. A second call does nothing."""
        if not self.active:
            return
        best = self._progress.best_evaluation
        loss = f"best val loss {best['val_loss']:.4f} at step {best['iter']}, " if best else ""
        tokens, wall = self._progress.last_step.get("tokens", 0), duration(self._wall_s())
        self.event("stop", self._iter, f"{reason}: {loss}{tokens:,} tokens, {wall}; log in {self._file.path}", reason=reason)
        self._put_summary(reason)
        for sink in list(self._sinks):
            self._guarded(sink, sink.close)
        self._file.close()
        self._console.close()
        self.active = False

    def _open_file(self, path: Path, run_name: str, resume_iter: int | None) -> None:
        values = {"run_name": run_name, "config": {"values": self._cfg.values(), "origins": self._cfg.origins}}
        values |= {"startup_info": {}, "summary": {}}
        if resume_iter is not None and path.exists():
            self._go_on(path, values, resume_iter)
            return
        self._file = RunFile(path, values, slot_plan(self._cfg), self.line)
        if resume_iter is None:
            self._keep_event("start", 0, f"run {run_name} starts")
        else:
            self.event("resume", resume_iter, f"resumed at step {resume_iter}; the log of what follows is {path}")

    def _go_on(self, path: Path, values: dict[str, Any], resume_iter: int) -> None:
        """Takes over the log of an earlier process: what is whole and not beyond `resume_iter` stays."""
        draft = RunFile(path.with_suffix(".json.resumed"), values, slot_plan(self._cfg), self.line)
        old: dict[str, Any] = {}
        starts, previous, dropped = [-1], -1, 0  # iters after which a process wrote its first record
        for section, entry in surviving_entries(path):
            if section not in LISTS:
                old[section] = entry
                continue
            if section != "events" and entry["iter"] > resume_iter:
                dropped += 1
                continue
            draft.append(section, entry)
            if section == "training_iterations":
                self._progress.add_step(entry, counts=not any(previous <= start < entry["iter"] for start in starts))
                previous = entry["iter"]
            elif section == "eval_steps":
                self._progress.add_evaluation(entry)
                self._wall_before_s = entry["wall_s"]
            elif section == "events" and entry["kind"] == "resume":
                starts.append(entry["iter"])
        if draft.flush():
            draft.path.unlink()
            raise OSError(f"no space to take over {path}")
        if VALUES[0] not in old:
            self.line(f"{path} is not a run log that this program wrote; it is kept as {set_aside([path])[0]}")
        draft.move_to(path)
        self._file = draft
        summary = old.get("summary", {})
        self._wall_before_s = max(self._wall_before_s, summary.get("wall_s", 0.0))  # the summary is missing where it was torn
        self._progress.skipped_steps = summary.get("skipped_steps", 0)
        changed = changed_knobs(old.get("config", {}).get("values", {}), self._cfg.values())
        notes = [f"the log goes on in {path}", f"{dropped} records beyond it were dropped" if dropped else ""]
        notes += [f"{name} was {before!r}, is {now!r}" for name, (before, now) in changed.items()]
        self.event("resume", resume_iter, f"resumed at step {resume_iter}: {'; '.join(filter(None, notes))}", changed=changed)

    def _keep_event(self, kind: str, iter: int, message: str, **details: Any) -> None:
        self._file.append("events", {"kind": kind, "iter": iter, "message": message, "wall_s": self._wall_s()} | details)

    def _open_sinks(self, out_dir: Path, run_name: str, resume_iter: int | None) -> None:
        if self._cfg.log.use_tensorboard:
            self._sinks.append(TensorBoard(out_dir / "tensorboard" / run_name, self._cfg, resume_iter))
        if self._cfg.log.wandb_log:
            try:
                self._sinks.append(WeightsAndBiases(out_dir, run_name, self._cfg))
            except Exception as error:  # no package, no account, no network: a service must not stop a run
                self.line(f"wandb_log: training goes on without Weights & Biases: {error}")

    def _print_step(self, record: dict[str, Any]) -> None:
        lines = step_lines(record)
        if self._console.block:
            self._console.print(lines[0], BOLD)
            self._console.print("\n".join(lines[1:]), DIM)
        else:
            left = self._cfg.optim.max_iters - record["iter"]
            eta = duration(left * (self._progress.avg_time_ms or record["time_ms"]) / 1e3)
            self._console.print(" | ".join([*lines, f"ETA: {eta}"]))

    def _put_summary(self, status: str) -> None:
        self._file.put("summary", self._progress.summary(self._wall_s(), status))
        self._summary_due_s = time.monotonic() + SUMMARY_S

    def _send(self, figures: dict[str, float], iter: int) -> None:
        for sink in list(self._sinks):
            self._guarded(sink, lambda sink=sink: sink.scalars(figures, iter))

    def _guarded(self, sink: TensorBoard | WeightsAndBiases, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a full disk under TensorBoard, a lost connection: the run itself goes on
            self._sinks.remove(sink)
            self.line(f"{type(sink).__name__} is left out from here on: {error}")

    def _wall_s(self) -> float:
        """Seconds that the processes of this run have lived, up to now."""
        return round(self._wall_before_s + time.monotonic() - self._t0_s, 3)


def step_record(step: StepRecord, throughput: Throughput) -> dict[str, Any]:
    """A step as it stands in the file. achieved = FLOPs a token x tokens/s; MFU = achieved / peak, of all GPUs together."""
    time_ms = round(step.time_ms, 3)
    tokens_per_sec = round(throughput.tokens_per_step * 1e3 / time_ms, 3)
    achieved_tflops = throughput.flops_per_token * tokens_per_sec / 1e12
    percent = 100 / throughput.peak_tflops if throughput.peak_tflops else None
    causal_tflops = throughput.flops_per_token_causal * tokens_per_sec / 1e12
    gradients = {"global_norm": step.grad_norm}
    if step.grad_std is not None:
        gradients |= {"grad_mean": step.grad_mean, "grad_std": step.grad_std}
    memory = None
    if step.allocated_gb is not None:
        memory = {name: round(getattr(step, name), 3) for name in ("allocated_gb", "peak_gb", "reserved_gb")}
    return {
        "iter": step.iter,
        "loss": step.loss,
        "lr": step.lr,
        "time_ms": time_ms,
        "data_wait_ms": round(step.data_wait_ms, 3),
        "tokens": step.tokens,
        "mfu": {
            "mfu_percent": percent and round(achieved_tflops * percent, 4),
            "mfu_causal_percent": percent and round(causal_tflops * percent, 4),
            "achieved_tflops": round(achieved_tflops, 9),
            "peak_tflops": throughput.peak_tflops,
            "flops_per_token": throughput.flops_per_token,
            "tokens_per_sec": tokens_per_sec,
        },
        "memory": memory,
        "gradients": gradients,
    }


def changed_knobs(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Knobs whose value differs, as (before, now); those that only say how a run was started do not count."""
    names = sorted(before.keys() & now.keys() - {"init_from", "resume", "run_name"})
    return {name: (before[name], now[name]) for name in names if before[name] != now[name]}


def set_aside(paths: list[Path]) -> list[str]:
    """Renames what is there to the first free .1, .2, ... and returns the new names."""
    old = [path for path in paths if path.exists()]
    number = 1
    while any(path.with_name(f"{path.name}.{number}").exists() for path in old):
        number += 1
    return [str(path.rename(path.with_name(f"{path.name}.{number}"))) for path in old]
