"""What a run prints, and the same figures in its log (run_file.py), in TensorBoard and in Weights & Biases.

Only rank 0 logs: `TrainingLogger(..., active=False)` is the silent twin that the other ranks call.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from configurator import Config, UserError
from run_file import LISTS, RECORDS, RunFile, StepRecord, Throughput, log_path, read_log, step_record

SUMMARY_S = 5.0  # the summary in the file is never older than this
START_KNOBS = {"init_from", "resume", "run_name"}  # they say how a process was started, not what the run is
OF_PROCESSES = {"start", "resume", "stop"}  # events that stay when the steps they happened at are taken back
BOLD, DIM, GREEN, RESET = "\033[1m", "\033[2m", "\033[32m", "\033[0m"


def new_run_name() -> str:
    return datetime.now().strftime("%Y%m%d_%H%M%S")


@dataclass
class Mean:
    """A mean over time: total work by total time."""

    weighted: float = 0.0
    weight: float = 0.0

    def add(self, value: float | None, weight: float) -> None:
        if value is not None:
            self.weighted += value * weight
            self.weight += weight

    def rounded(self, digits: int) -> float | None:
        return round(self.weighted / self.weight, digits) if self.weight else None


@dataclass
class Progress:
    """Running sums behind `summary`, so that it costs the same at every step.

    The first record of each process is left out of the means, because it pays for what happens once (allocator,
    autotuning, lazy initialisation).
    """

    time_ms: Mean = field(default_factory=Mean)
    tokens_per_sec: Mean = field(default_factory=Mean)
    mfu_percent: Mean = field(default_factory=Mean)
    last_step: dict[str, Any] = field(default_factory=dict)
    best_evaluation: dict[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0
    starts: list[int] = field(default_factory=lambda: [-1])  # steps after which a process began
    at_end: dict[str, int] = field(default_factory=dict)  # last_iter and total_tokens, which the last record may lag behind

    def add_step(self, record: dict[str, Any]) -> None:
        previous, self.last_step = self.last_step.get("iter", -1), record
        if not any(previous <= start < record["iter"] for start in self.starts):
            self.time_ms.add(record["time_ms"], 1)
            self.tokens_per_sec.add(record["mfu"]["tokens_per_sec"], record["time_ms"])
            self.mfu_percent.add(record["mfu"]["mfu_percent"], record["time_ms"])

    def add_evaluation(self, record: dict[str, Any]) -> None:
        loss = record["val_loss"]  # None in the file where it was not finite
        if loss is not None and loss < self.best_evaluation.get("val_loss", math.inf):
            self.best_evaluation = record

    def summary(self, wall_s: float, status: str) -> dict[str, Any]:
        return {
            "avg_mfu": self.mfu_percent.rounded(4),
            "avg_time_ms": self.time_ms.rounded(3),
            "avg_tokens_per_sec": self.tokens_per_sec.rounded(3),
            "final_train_loss": self.last_step.get("loss"),
            "best_val_loss": self.best_evaluation.get("val_loss"),
            "best_val_iter": self.best_evaluation.get("iter"),
            "total_tokens": self.last_step.get("tokens", 0),
            "last_iter": self.last_step.get("iter"),
            "skipped_steps": self.skipped_steps,
            "wall_s": wall_s,
            "status": status,
            **self.at_end,
        }


class Console:
    """Standard output, and the same text without colour in `run_X.log`. Losing either of them does not stop training."""

    def __init__(self, path: Path, style: str) -> None:
        """Raises OSError where the file cannot be opened."""
        self._file = path.open("ab", buffering=0)
        self.block = style == "block" or (style == "auto" and sys.stdout.isatty())
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def print(self, text: str, style: str = "") -> None:
        shown = f"{style}{text}{RESET}" if style and self._colour else text
        encoding = sys.stdout.encoding or "utf-8"  # a terminal may be unable to show all letters
        try:
            sys.stdout.write(shown.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            sys.stdout.flush()
        except OSError:  # the terminal or the pipe is gone
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        with suppress(OSError):  # a full disk, of which RunFile warns
            self._file.write(f"{text}\n".encode(errors="replace"))

    def close(self) -> None:
        self._file.close()


def step_lines(record: dict[str, Any]) -> list[str]:
    """The console block of one step. What was not measured (MFU on unknown hardware, memory on a CPU) is not printed."""
    mfu, memory, gradients = record["mfu"], record["memory"], record["gradients"]
    time_text = f"{record['time_ms']:.{0 if record['time_ms'] >= 10 else 2}f}ms"
    rates = f"Achieved: {figure(mfu['achieved_tflops'])} TF"
    if mfu["peak_tflops"] is not None:
        of_fp8 = f" ({mfu['mfu_fp8_percent']:.2f}% of FP8's peak)" if "mfu_fp8_percent" in mfu else ""
        rates = f"MFU: {mfu['mfu_percent']:.2f}%{of_fp8} | {rates} | Peak: {figure(mfu['peak_tflops'])} TF"
    flops = mfu["flops_per_token"]
    per_token = f"{flops / 1e9:.1f} GF" if flops >= 1e9 else f"{figure(flops / 1e6)} MF"
    lines = [
        f"Iter {record['iter']} | Loss: {record['loss']:.4f} | Time: {time_text} | LR: {record['lr']:.2e}",
        f"{rates} | Tokens/s: {mfu['tokens_per_sec']:,.0f} | FLOPs/token: {per_token}",
    ]
    if memory is not None:
        allocated, peak, reserved = memory.values()
        lines.append(f"Memory: {allocated:.2f} GB alloc | {peak:.2f} GB peak | {reserved:.2f} GB reserved")
    lines.append(f"Gradients: norm={gradients['global_norm']:.4f}")
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


def report_text(info: dict[str, dict[str, Any]]) -> str:
    """The start report: a heading for each section, its entries aligned below; what is not known is left out."""
    width = max((len(name) for entries in info.values() for name in entries), default=0)
    lines = []
    for section, entries in info.items():
        known = {name.replace("_", " "): readable(value) for name, value in entries.items() if value is not None}
        lines += [f"{section}:", *(f"  {name:<{width}}  {text}" for name, text in known.items())]
    return "\n".join(lines)


def readable(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(readable, value)) or "none"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if type(value) is int else str(value)


def tagged(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a step by tag; what was not measured is absent."""
    rates = ["time_ms", "data_wait_ms", "tokens", "tokens_per_sec", "achieved_tflops"]
    rates += [key for key in record["mfu"] if key.startswith("mfu_")]
    step = record | record["mfu"]
    tags = {"loss/train": step["loss"], "loss/lr": step["lr"]} | {f"perf/{key}": step[key] for key in rates}
    tags |= {f"fp8/{name}_{key}": share for name, shares in record.get("fp8", {}).items() for key, share in shares.items()}
    tags |= {f"{group}/{key}": value for group in ("memory", "gradients") for key, value in (record[group] or {}).items()}
    return {tag: value for tag, value in tags.items() if value is not None}


def import_tensorboard() -> tuple[Any, Any]:
    """(Summary, SummaryWriter). Raises UserError where the package is missing."""
    try:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--use_tensorboard: {error}; type: pip install tensorboard, or leave the flag out") from None
    return Summary, SummaryWriter


class TensorBoard:
    def __init__(self, folder: Path, resume_iter: int | None, knobs: dict[str, Any]) -> None:
        self._summary, SummaryWriter = import_tensorboard()
        from torch.utils.tensorboard.summary import hparams

        # From purge_step on, TensorBoard hides what an earlier process of this run wrote.
        purge_step = None if resume_iter is None else resume_iter + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=5)
        # The first of the three describes an experiment and is left out: TensorBoard would take one run's for all of them, but
        # without any it finds the knobs and figures of every run, and shows the knobs that differ.
        table = {name: str(value) if isinstance(value, bool) else value for name, value in knobs.items() if value is not None}
        _, start, self._end = hparams(table, {})
        self._writer.file_writer.add_summary(start)

    def scalars(self, figures: dict[str, float], step: int) -> None:
        # One protocol buffer for all figures: a tenth of the time that add_scalar takes for each.
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._writer.file_writer.add_summary(self._summary(value=values), step)

    def text(self, text: str, step: int) -> None:
        self._writer.add_text("sample", "    " + text.replace("\n", "\n    "), step)  # Markdown: indented is verbatim

    def close(self) -> None:
        self._writer.file_writer.add_summary(self._end)
        self._writer.close()


class WeightsAndBiases:
    def __init__(self, out_dir: Path, id: str, cfg: Config) -> None:
        """Raises ImportError where the package is missing, and what it raises itself (no account, no network)."""
        import wandb

        project, name = cfg.log.wandb_project, cfg.log.wandb_run_name or id
        self._run = wandb.init(project=project, name=name, id=id, resume="allow", dir=str(out_dir), config=cfg.values())

    def scalars(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def text(self, text: str, step: int) -> None:
        self._run.log({"sample": text}, step=step)

    def close(self) -> None:
        self._run.finish()


class TrainingLogger:
    """One run's log. Methods are called from the training thread; none of them raises when a disk or a service fails."""

    def __init__(
        self,
        cfg: Config,
        run_name: str,
        resume_iter: int | None = None,
        resumed_name: str | None = None,
        active: bool = True,
    ) -> None:
        """Opens the log of `run_name`: the run's own file, cut back to `resume_iter`, or a new one.

        Never overwrites another run's: files with this name are set aside by a run from scratch (resume_iter None), and by
        one that goes on under another name than the checkpoint's, `resumed_name`.
        With `active` False every method works and does nothing. Raises UserError where out_dir cannot be written.
        """
        self.active = active
        if not active:
            return
        if cfg.log.use_tensorboard:
            import_tensorboard()  # a missing package is said before any file is touched
        self._cfg, self._t0_s, self._wall_before_s, self._iter = cfg, time.monotonic(), 0.0, resume_iter or 0
        self._progress, self._throughput = Progress(), None
        out_dir = Path(cfg.run.out_dir)
        path, board = log_path(out_dir, run_name), out_dir / "tensorboard" / run_name
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            is_new = resume_iter is None or resumed_name not in (None, run_name)
            moved = set_aside([path, path.with_suffix(".log"), board]) if is_new else []
            self._console = Console(path.with_suffix(".log"), cfg.log.console)
            sections = {"run_name": run_name, "config": {"values": cfg.values(), "origins": cfg.origins}}
            # A second run of this name must not go on in the first one's page on Weights & Biases.
            self._wandb_id = f"{run_name}-{new_run_name()}" if moved else run_name
            if resume_iter is None:
                self._file = RunFile(path, sections, [], self.line)
                self.event("start", 0, f"run {run_name} starts", wandb_id=self._wandb_id)
            else:
                self._resume(path, sections, resume_iter)
        except OSError as error:
            raise UserError(f"out_dir={cfg.run.out_dir}: the run log cannot be written there: {error}") from None
        if moved:
            self.line(f"an earlier run was named {run_name} too; its files are kept as {', '.join(moved)}")
        self._put_summary("running")
        self._sinks: list[TensorBoard | WeightsAndBiases] = []
        if cfg.log.use_tensorboard:
            knobs = {name: value for name, value in cfg.values().items() if name not in START_KNOBS}
            self._sinks.append(TensorBoard(board, resume_iter, knobs))
        if cfg.log.wandb_log:
            try:
                self._sinks.append(WeightsAndBiases(out_dir, self._wandb_id, cfg))
            except Exception as error:  # no package, no account, no network: a service must not stop a run
                self.line(f"wandb_log: training goes on without Weights & Biases: {error}")

    def report(self, startup_info: dict[str, dict[str, Any]], throughput: Throughput) -> None:
        """Prints the start report and stores it; MFU of every step is computed with `throughput`."""
        if not self.active:
            return
        self._throughput = throughput
        self._file.put("startup_info", startup_info)
        self._console.print(report_text(startup_info))

    def line(self, text: str) -> None:
        """Prints a line, and writes it to run_X.log."""
        if self.active:
            self._console.print(text)

    def event(self, kind: str, iter: int, message: str, **details: Any) -> None:
        """Prints the message and keeps it, with its details, among the run's events."""
        if not self.active:
            return
        self._console.print(message)
        self._file.append("events", {"kind": kind, "iter": iter, "message": message, "wall_s": self._wall_s()} | details)

    def step(self, step: StepRecord) -> None:
        """Records a step that is due for it. Costs some tens of microseconds, most of them the console's."""
        if not self.active:
            return
        assert self._throughput is not None, "report() comes before the first step"
        record = step_record(step, self._throughput)
        self._file.append(RECORDS, record)
        self._progress.add_step(record)
        self._progress.skipped_steps, self._iter = step.skipped, step.iter
        self._print_step(record)
        self._tell(lambda sink: sink.scalars(tagged(record), step.iter))
        if time.monotonic() >= self._summary_due_s:
            self._put_summary("running")

    def evaluation(
        self, iter: int, train_loss: float, val_loss: float, val_bits_per_byte: float | None, lr: float, tokens: int
    ) -> None:
        """Records an evaluation; the loss is in nats a token."""
        if not self.active:
            return
        losses = {"train_loss": train_loss, "val_loss": val_loss, "val_bits_per_byte": val_bits_per_byte}
        record = {"iter": iter} | losses | {"lr": lr, "tokens": tokens, "wall_s": self._wall_s()}
        bits = "" if val_bits_per_byte is None else f", val bits per byte {val_bits_per_byte:.4f}"
        self._console.print(f"step {iter}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{bits}", GREEN)
        self._file.append("eval_steps", record)
        self._progress.add_evaluation(record)
        self._put_summary("running")
        figures = {f"eval/{name}": loss for name, loss in losses.items() if loss is not None}
        self._tell(lambda sink: sink.scalars(figures, iter))

    def score(self, iter: int, message: str, figures: dict[str, float]) -> None:
        """Records what a benchmark gave: an event, and charts in the group eval/."""
        if not self.active:
            return
        self.event("score", iter, message, **figures)
        self._tell(lambda sink: sink.scalars({f"eval/{name}": value for name, value in figures.items()}, iter))

    def checkpoint(self, saved: Mapping[str, Any]) -> None:
        """Records a published checkpoint (iter, tier, path, val_loss, bytes, save_s; stood_still_s is what training lost).

        Brings the log itself to the disk: what it resumes from is then on record.
        """
        if not self.active:
            return
        record = {name: round(value, 3) if name.endswith("_s") else value for name, value in saved.items()}
        what, size_gb = f"{record['tier']} at step {record['iter']}", figure(record["bytes"] / 1e9)
        self._console.print(f"checkpoint {what}: {record['path']} ({size_gb} GB in {record['save_s']:.1f} s)")
        self._file.append("checkpoints", record)
        self._put_summary("running")
        self._file.sync()

    def text(self, iter: int, text: str) -> None:
        """Shows and keeps a generated text."""
        if not self.active:
            return
        self.event("sample", iter, f"sample at step {iter}:", text=text)
        self._console.print(text)
        self._tell(lambda sink: sink.text(text, iter))

    def close(self, reason: str, last: tuple[int, int] | None = None) -> None:
        """Ends the log: last summary, a closing line, and everything flushed. A second call does nothing.

        `last`: steps and tokens of the run so far, where the last step may not have been logged.
        """
        if not self.active:
            return
        if last:
            self._iter = last[0]
            self._progress.at_end = {"last_iter": last[0], "total_tokens": last[1]}
        best, summary = self._progress.best_evaluation, self._progress.summary(self._wall_s(), reason)
        loss = f"best val loss {best['val_loss']:.4f} at step {best['iter']}, " if best else ""
        about = f"{summary['total_tokens']:,} tokens, {duration(self._wall_s())}; log in {self._file.path}"
        self.event("stop", self._iter, f"{reason} after step {self._iter}: {loss}{about}", reason=reason)
        self._put_summary(reason)
        self._tell(lambda sink: sink.close())
        self._file.close()
        self._console.close()
        self.active = False

    def _resume(self, path: Path, sections: dict[str, Any], resume_iter: int) -> None:
        """Goes on in the log of an earlier process: what is whole and not beyond `resume_iter` stays, and OF_PROCESSES."""
        old, records = read_log(path) if path.exists() else ({}, iter(()))
        if path.exists() and "run_name" not in old:
            self.line(f"{path} is not a run log that this program wrote; it is kept as {set_aside([path])[0]}")
        for name in LISTS:
            entries = old.get(name, [])
            sections[name] = [each for each in entries if each["iter"] <= resume_iter or each.get("kind") in OF_PROCESSES]
        self._wandb_id = next((e["wandb_id"] for e in reversed(sections["events"]) if "wandb_id" in e), self._wandb_id)
        for record in sections["eval_steps"]:
            self._progress.add_evaluation(record)
        summary = old.get("summary", {})  # absent where it was torn
        self._wall_before_s = max([summary.get("wall_s", 0.0), *(record["wall_s"] for record in sections["eval_steps"])])
        self._progress.skipped_steps = summary.get("skipped_steps", 0)
        self._progress.starts += [event["iter"] for event in sections["events"] if event["kind"] == "resume"] + [resume_iter]

        def replayed() -> Iterator[dict[str, Any]]:
            for record in takewhile(lambda record: record["iter"] <= resume_iter, records):
                self._progress.add_step(record)
                yield record

        self._file = RunFile(path, sections, replayed(), self.line)
        was, now = old.get("config", {}).get("values", {}), self._cfg.values()
        names = sorted(was.keys() & now.keys() - START_KNOBS)
        changed = {name: (was[name], now[name]) for name in names if was[name] != now[name]}
        notes = [f"{name} was {before!r}, is {after!r}" for name, (before, after) in changed.items()]
        message = "; ".join([f"resumed at step {resume_iter}; log in {path}", *notes])
        self.event("resume", resume_iter, message, changed=changed, wandb_id=self._wandb_id)

    def _print_step(self, record: dict[str, Any]) -> None:
        lines = step_lines(record)
        if self._console.block:
            self._console.print(lines[0], BOLD)
            self._console.print("\n".join(lines[1:]), DIM)
        else:
            left = self._cfg.optim.max_iters - record["iter"]
            eta = duration(left * (self._progress.time_ms.rounded(3) or record["time_ms"]) / 1e3)
            self._console.print(" | ".join([*lines, f"ETA: {eta}"]))

    def _put_summary(self, status: str) -> None:
        self._file.put("summary", self._progress.summary(self._wall_s(), status))
        self._summary_due_s = time.monotonic() + SUMMARY_S

    def _tell(self, call: Callable[[TensorBoard | WeightsAndBiases], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:  # a full disk under TensorBoard, a lost connection: the run itself goes on
                self._sinks.remove(sink)
                self.line(f"{type(sink).__name__} is left out from here on: {error}")

    def _wall_s(self) -> float:
        """Seconds that the processes of this run have lived, up to now."""
        return round(self._wall_before_s + time.monotonic() - self._t0_s, 3)


def set_aside(paths: list[Path]) -> list[str]:
    """Renames what is there to the first free .1, .2, ... and returns the new names."""
    old = [path for path in paths if path.exists()]
    number = next(n for n in count(1) if not any(path.with_name(f"{path.name}.{n}").exists() for path in old))
    return [str(path.rename(path.with_name(f"{path.name}.{number}"))) for path in old]
