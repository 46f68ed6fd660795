"""Where a step's time and memory go: a Chrome trace and a table of kernels, and what a run says that is out of memory."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from configurator import Config, RunConfig
from memory import GIB, Strategy, first_that_fits, predict_memory, settled, strategies_of
from parallel import Ranks
from plan import UNKNOWN_VOCABULARY

TABLE_ROWS = 25
SNAPSHOT = "memory_snapshot.pickle"  # in out_dir


class Profiler:
    """Records the steps that `profile` names, on rank 0, and where memory comes from with `memory_history`; else does nothing."""

    def __init__(
        self, run: RunConfig, run_name: str, ranks: Ranks, say: Callable[[str], None], restart_clock: Callable[[], None]
    ) -> None:
        self.on_gpu, self.say, self.restart_clock = ranks.device.type == "cuda", say, restart_clock
        self.first, self.end = map(int, run.profile.split(":")) if run.profile and ranks.is_main else (0, 0)
        self.trace = Path(run.out_dir) / f"trace_{run_name}.json.gz"
        self.recording: profile | None = None
        self.recorded_steps = 0
        if run.memory_history and self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=200_000, stacks="python")

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step that the log calls `number`."""
        if self.recording is None and self.first <= number < self.end:
            self._wait_for_device()
            self.recording = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu)
            self.recording.start()
        yield
        if self.recording is not None:
            self.recorded_steps += 1
            if number + 1 >= self.end:
                self.finish()

    def finish(self) -> None:
        """Writes and prints what has been recorded. A disk that is full loses the trace, not the run."""
        recording, self.recording = self.recording, None
        if recording is None:
            return
        self._wait_for_device()
        recording.stop()
        self.say("\n".join(kernel_table(recording, self.recorded_steps)))
        try:
            recording.export_chrome_trace(str(self.trace))
            self.say(f"trace of {self.recorded_steps} steps, for ui.perfetto.dev: {self.trace}")
        except (OSError, RuntimeError) as error:
            self.say(f"warning: no trace in {self.trace}: {error}")
        self.restart_clock()  # the next step does not pay for this

    def _wait_for_device(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def kernel_table(recording: profile, steps: int) -> list[str]:
    """Device time of a step by kernel, the mean of the recorded ones, longest first; on a CPU the operators' own time."""
    averages = [row for row in recording.key_averages() if not row.is_user_annotation]
    kernels = [(row, row.self_device_time_total) for row in averages if row.device_type == DeviceType.CUDA]
    rows = kernels or [(row, row.self_cpu_time_total) for row in averages]
    rows, total_us = sorted(rows, key=lambda pair: -pair[1]), sum(us for _, us in rows)
    lines = [f"{'us a step':>12s} {'share':>7s} {'calls':>7s}  {'kernel' if kernels else 'operator'}"]
    for row, us in rows[:TABLE_ROWS]:
        lines.append(f"{us / steps:12,.0f} {100 * us / total_us:6.1f}% {row.count / steps:7.0f}  {row.key[:90]}")
    rest_us = sum(us for _, us in rows[TABLE_ROWS:])
    return [
        *lines,
        f"{rest_us / steps:12,.0f} {100 * rest_us / total_us:6.1f}%          the rest",
        f"{total_us / steps:12,.0f} in all",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory
# ---------------------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def out_of_memory_help(cfg: Config, error: RuntimeError | MemoryError) -> str:
    """Where the memory goes, and the knobs that need less. The vocabulary may still be unknown: then it counts as GPT-2's."""
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    vocab_size = cfg.model.vocab_size or UNKNOWN_VOCABULARY
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))
    dtype = cfg.run.dtype if cfg.run.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    ranks, strategy = int(os.environ.get("WORLD_SIZE", "1")), cfg.parallel.asked  # torchrun's: the ranks may not have met yet
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if on_gpu else math.inf
    cfg = settled(cfg, dtype, ranks, memory / GIB if on_gpu else 0.0)
    if strategy == "auto":
        strategy = first_that_fits(cfg, dtype, ranks, memory / GIB) or strategies_of(ranks)[-1]
    rows = {name.replace("_", " "): value for name, value in vars(predict_memory(cfg, dtype, strategy, ranks)).items()}
    if on_gpu:
        rows |= {"measured peak": torch.cuda.max_memory_allocated(), "memory of the GPU": memory}
    return "\n".join(
        [
            f"out of memory: {(str(error) or 'MemoryError').splitlines()[0]}",
            f"What a compiled step is predicted to need, {ranks} x {strategy}:",
            *(f"  {name:20s} {value / GIB:10.2f} GiB" for name, value in rows.items()),
            *(write_snapshot(Path(cfg.run.out_dir) / SNAPSHOT) if on_gpu else []),
            f"What needs less: {', '.join(what_needs_less(cfg, strategy))}",
        ]
    )


def what_needs_less(cfg: Config, strategy: Strategy) -> list[str]:
    """What to type; a smaller micro-batch divides the present one, so that a step has the same tokens and ranks can share it."""
    size, steps, advice = cfg.data.batch_size, cfg.data.gradient_accumulation_steps, []
    if size > 1:
        smaller = next(n for n in range(size // 2, 0, -1) if size % n == 0)
        advice.append(f"--batch_size={smaller} --gradient_accumulation_steps={steps * size // smaller} (the same tokens a step)")
    if not cfg.model.gradient_checkpointing:
        advice.append("--gradient_checkpointing")
    if strategy == "fsdp" and cfg.parallel.fsdp_accumulate_whole:
        advice.append("--fsdp_accumulate_whole=False")
    if strategy == "fsdp" and not cfg.parallel.fsdp_reshard_after_forward:
        advice.append("--fsdp_reshard_after_forward")
    return [*advice, f"a shorter --block_size (now {cfg.model.block_size:,})", "fewer or narrower layers"]


def write_snapshot(path: Path) -> list[str]:
    """What the GPU's allocator holds, in a file, and the line that says so; none where the disk is full too."""
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError):
        return []
    return [f"What the allocator held: {path}, for pytorch.org/memory_viz (--memory_history adds which line asked for it)"]
