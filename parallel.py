"""Ranks and devices: who this process is, where it computes, when it must stop, and reading figures back without waiting.

This version trains in one process; torchrun's environment is read so that a launch with more is refused in one line.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from configurator import RunConfig, UserError


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(name: str) -> torch.device:
    """The device that `name` asks for; `auto` is the first GPU, or the CPU where there is none. Raises UserError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device={name}: no usable CUDA GPU here; pass --device=cpu")
    index = 0 if name == "auto" else torch.device(name).index or 0
    if index >= torch.cuda.device_count():
        raise UserError(f"--device={name}: the last GPU here is cuda:{torch.cuda.device_count() - 1}")
    torch.cuda.set_device(index)
    torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32, as nanoGPT does
    return torch.device("cuda", index)


def start_ranks(run: RunConfig) -> Ranks:
    """This process's rank and device, seeded and set for speed or for bitwise reproducibility.

    Raises UserError where the device is not there or torchrun started several processes.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise UserError(f"torchrun started {world_size} processes; this version trains in one: pass --nproc_per_node=1")
    device = choose_device(run.device)
    if run.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts; without it torch refuses to run
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(run.seed)
    return Ranks(rank=0, world_size=1, device=device)


def device_name(device: torch.device) -> str:
    """The GPU's name as the driver gives it, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_gb(device: torch.device) -> tuple[float, float, float] | None:
    """(allocated, peak, reserved) GB of the device's allocator; None on a CPU."""
    if device.type != "cuda":
        return None
    stats = torch.cuda.memory_stats(device)
    keys = ("allocated_bytes.all.current", "allocated_bytes.all.peak", "reserved_bytes.all.current")
    return tuple(stats.get(key, 0) / 1e9 for key in keys)


def random_state(device: torch.device) -> dict[str, str]:
    """The states of torch's random number generators, hexadecimal: what a checkpoint keeps of this rank."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: state.numpy().tobytes().hex() for name, state in states.items()}


def set_random_state(states: dict[str, str], device: torch.device) -> None:
    """The inverse of `random_state`; a generator that the checkpoint does not know (another kind of device) keeps its seed."""
    tensors = {name: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8) for name, text in states.items()}
    if "cpu" in tensors:
        torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)


class ReadBack:
    """Figures of steps under way, brought to the host without making it wait for the step it has just queued.

    On a GPU each step's scalars are copied to pinned memory behind the step; they are read once the next step is
    queued, so the device always has work. A step's time runs from the end of the step before, or from `restart_clock`
    where something else (an evaluation, a checkpoint) came in between: what the loop itself costs is in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.depth = 1 if self.on_gpu else 0  # newest steps that are left alone; a CPU has finished them anyway
        self.pending: deque[tuple[Any, torch.Tensor, Any, Any]] = deque()

    def restart_clock(self) -> None:
        """The next step starts now."""
        self.start = self._instant()

    def push(self, tag: Any, scalars: list[torch.Tensor]) -> None:
        """A step is queued whole; `tag` comes back with its scalars."""
        values = torch.stack(scalars).float()
        if self.on_gpu:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
        end = self._instant()
        self.pending.append((tag, values, self.start, end))
        self.start = end

    def pop(self, keep: int) -> list[tuple[Any, list[float], float]]:
        """(tag, figures, milliseconds) of all steps but the newest `keep`, oldest first; waits for those only."""
        read = []
        while len(self.pending) > keep:
            tag, values, start, end = self.pending.popleft()
            if self.on_gpu:
                end.synchronize()  # the copy to `values` is before it
            elapsed_ms = start.elapsed_time(end) if self.on_gpu else (end - start) * 1e3
            read.append((tag, values.tolist(), elapsed_ms))
        return read

    def _instant(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StopRequest:
    """Whether the run should end after this step: SIGTERM, SIGINT, SIGUSR1 or the end of max_hours.

    The first signal asks; a second one exits at once. `reason` is empty until then.
    """

    def __init__(self, max_hours: float | None) -> None:
        self.deadline_s = time.monotonic() + 3600 * max_hours if max_hours is not None else float("inf")
        self.max_hours = max_hours
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        with suppress(OSError):  # stderr may be a pipe whose reader is gone: Ctrl-C ends a `| tee` as well
            os.write(2, f"{signal.Signals(number).name}: finishing the step, then saving\n".encode())  # print is not reentrant

    def __bool__(self) -> bool:
        return bool(self.reason)

    @property
    def reason(self) -> str:
        if self.signal:
            return signal.Signals(self.signal).name
        return f"max_hours={self.max_hours:g}" if time.monotonic() > self.deadline_s else ""

    @property
    def exit_code(self) -> int:
        return 143 if self.signal == signal.SIGTERM else 0
