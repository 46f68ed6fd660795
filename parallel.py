"""Ranks and devices: who this process is, where it computes, what the ranks agree on, and reading figures back without waiting.

torchrun starts one process a GPU (or several on a CPU) and tells each its rank. They meet in a process group: NCCL carries
tensors on GPUs, gloo carries tensors on CPUs and everything that is said between hosts. Without torchrun there is one rank
and no group, and nothing here waits for anybody.
"""

from __future__ import annotations

import math
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from configurator import ParallelConfig, RunConfig, UserError, error_text

T = TypeVar("T")
MEETING_TIMEOUT_S = 300.0  # longest wait for all ranks to be there; nodes may start minutes apart
ANSWER_S = 5.0  # longest wait for the process that keeps count of failures
GLOO_TIMEOUTS = ("Timed out waiting", "Application timeout")
GRACE_S = 2.0  # for which a rank that failed because another one did lets that one go first


@dataclass(eq=False)
class Ranks:
    """This process among all of them. Where it is not said, a method is a collective: all ranks call it, in the same order."""

    rank: int
    world_size: int
    device: torch.device
    group: Any = None  # the process group that these ranks talk in; None is torch.distributed's own
    timeout_s: float = math.inf  # longest wait for another rank; of a rank alone there is none
    beside: list[Any] = field(default_factory=list)  # groups of threads, which have limits of their own

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def with_own_group(self, timeout_s: float) -> Ranks:
        """The same ranks in a group of their own on the hosts, for a thread that talks beside training."""
        if self.world_size == 1:
            return self
        self.beside.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))
        return replace(self, group=self.beside[-1])

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; on a GPU only the stream waits for it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def table(self, figures: torch.Tensor, host_figures: Sequence[float]) -> torch.Tensor:
        """Everybody's figures, a row for each rank: (n,) on the device and m on the host -> (world_size, n + m)."""
        on_gpu = self.device.type == "cuda"
        host = torch.tensor(host_figures, dtype=torch.float32, pin_memory=on_gpu)
        row = torch.cat([figures, host.to(self.device, non_blocking=True)])
        if self.world_size == 1:
            return row[None]
        rows = torch.zeros(self.world_size, len(row), device=self.device)
        rows[self.rank] = row
        return self.sum_(rows)

    def all_of(self, value: T) -> list[T]:
        """Everybody's value, by rank: what pickle can carry, between hosts."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, decide: Callable[[], T]) -> T:
        """What `decide` returns on rank 0, where alone it is called, on every rank. Its exception is raised on all of them."""
        if self.world_size == 1:
            return decide()
        said: list[Any] = [None, None]  # result, error
        if self.is_main:
            try:
                said[0] = decide()
            except (UserError, OSError) as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0, group=self.group)
        if said[1] is not None:
            raise said[1]
        return said[0]

    def set_timeout(self, timeout_s: float) -> None:
        """From now on a rank that waits longer than this for another gives up, which ends the job. Not a collective."""
        if self.world_size > 1:
            self.timeout_s = timeout_s
            for group in dist.distributed_c10d._world.pg_map:  # a mesh has groups of its own
                if group not in self.beside:
                    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)

    def finish_device(self) -> None:
        """Returns when the device has done what the current stream was given. Not a collective.

        Before what is read from it; that alone would wait for ever for a rank that hangs. Raises RanksApart.
        """
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            wait_for(event, self.timeout_s)


class RanksApart(UserError):
    """A rank has waited too long for another."""

    exit_code = 1


def wait_for(event: Any, limit_s: float) -> None:
    """On the host for a CUDA event; raises RanksApart. NCCL notices a rank that hangs, but cannot end who waits for it."""
    deadline_s = time.monotonic() + limit_s
    while limit_s < math.inf and not event.query():
        if time.monotonic() > deadline_s:
            raise RanksApart(f"the GPU has waited {limit_s:g} s for another rank, which hangs or has gone (--step_timeout_s)")
        time.sleep(1e-4)  # in training the GPU has the next step to do meanwhile
    event.synchronize()


def choose_device(name: str, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """The device that `name` asks for; `auto` is the rank's own GPU, or the CPU where there is none. Raises UserError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device={name}: no usable CUDA GPU here; pass --device=cpu")
    if local_world_size > 1:
        if name not in ("auto", "cuda"):
            raise UserError(f"--device={name}: torchrun started {local_world_size} processes, each for a GPU; leave it out")
        if local_world_size > torch.cuda.device_count():
            raise UserError(
                f"torchrun started {local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs; "
                f"pass --nproc_per_node={torch.cuda.device_count()}"
            )
    index = local_rank if name in ("auto", "cuda") else torch.device(name).index
    if index >= torch.cuda.device_count():
        raise UserError(f"--device={name}: the last GPU here is cuda:{torch.cuda.device_count() - 1}")
    torch.cuda.set_device(index)
    torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32, as nanoGPT does
    return torch.device("cuda", index)


def start_ranks(run: RunConfig, cfg: ParallelConfig, stack: ExitStack) -> Ranks:
    """This process's rank and device, seeded and set for speed or for bitwise reproducibility.

    Under torchrun all ranks meet here; they part when the stack is closed. Raises UserError where the device is not there, or
    the others cannot be reached.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = choose_device(run.device, local_rank, local_world_size)
    if run.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts; without it torch refuses to run
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(run.seed + rank)  # dropout must not be the same on all ranks
    ranks = Ranks(rank, world_size, device)
    if world_size > 1:
        connect(device)
        stack.push(part)
        ranks.set_timeout(cfg.start_timeout_s)
    return ranks


def part(kind: type[BaseException] | None, *_: object) -> None:
    """The end of `start_ranks`. After an error the group stays: leaving it in order would wait for the others."""
    if kind is None:
        dist.destroy_process_group()


def connect(device: torch.device) -> None:
    """Joins the process group of torchrun's environment. Raises UserError where that fails."""
    if device.type == "cuda" and not dist.is_nccl_available():
        raise UserError("several GPUs need NCCL, which this PyTorch lacks; install a CUDA build of it, or pass --device=cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=MEETING_TIMEOUT_S)
    gpu = device if device.type == "cuda" else None  # connects NCCL now and not in the first collective
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        own = dist.PrefixStore(attempt(), store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout, device_id=gpu)
    except (RuntimeError, ValueError) as error:  # a port in use, a rank that is gone, an incomplete environment
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = first_line(error)
        raise UserError(
            f"the ranks cannot meet at {where}: {reason}; start them with torchrun, on a free --master_port"
        ) from None


def attempt() -> str:
    """A name for what torchrun has started once more, so that nobody looks for the processes of the last time.

    On one host the agent keeps the store of all attempts (torch 2.11 to 2.13). The agents of several count them differently.
    """
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if alone else "attempt"


def first_line(error: BaseException) -> str:
    """What went wrong, without the traces that PyTorch appends."""
    return (str(error) or type(error).__name__).splitlines()[0]


def is_first_to_fail() -> bool:
    """Whether it is for this rank to print what went wrong: the first of all that asks."""
    said: list[bool] = []

    def ask() -> None:
        try:
            said.append(dist.distributed_c10d._get_default_store().add("nanotrain/failed", 1) == 1)
        except dist.DistError:  # the process that keeps count is gone: it was the first
            said.append(False)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    return said == [] or said[0]  # the process that keeps count hangs: nobody else can know


def leave_to_torchrun(error: Exception) -> None:
    """For its last words, where it has started this process."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        try:
            raise error from error.__cause__
        except Exception:  # it writes down what is being handled
            get_error_handler().record_exception(error)


@contextmanager
def ending_together(explain: Callable[[Exception], Exception]) -> Iterator[None]:
    """Raises what `explain` makes of an error; but one of several ranks exits here: its threads may wait for others for ever.

    The first rank to fail prints the error, and leaves it to torchrun too, which repeats it at the very end; the others mostly
    fail because that one is gone, and say so in a line.
    """
    try:
        yield
    except Exception as error:
        error = explain(error)
        if not dist.is_initialized():
            leave_to_torchrun(error)
            raise error from error.__cause__
        if type(error) in (RuntimeError, dist.DistBackendError) and any(words in str(error) for words in GLOO_TIMEOUTS):
            limits = "--step_timeout_s, at the start --start_timeout_s"
            error = RanksApart(f"this rank has waited too long for another, which hangs or has gone ({limits})")
        is_user_error = isinstance(error, UserError)
        if not is_user_error and "by peer" in str(error):  # gloo's, of a connection that another rank's end has closed
            time.sleep(GRACE_S)
        is_first = is_first_to_fail()
        if is_first:
            print(error_text(error) if is_user_error else "".join(traceback.format_exception(error)), file=sys.stderr)
            leave_to_torchrun(error)
        elif not is_user_error:
            reason = first_line(error)
            print(f"rank {dist.get_rank()} ends because another rank has failed ({reason[:200]})", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if not is_first and "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun blames whose process ends first
            time.sleep(GRACE_S)
        os._exit(error.exit_code if is_user_error else 1)


def device_name(device: torch.device) -> str:
    """The GPU's name as the driver gives it, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_gb(device: torch.device, uncounted_bytes: int = 0) -> tuple[float, float, float] | None:
    """(allocated, peak, reserved) GB of the device: its allocator's, and what that does not count; None on a CPU."""
    if device.type != "cuda":
        return None
    stats = torch.cuda.memory_stats(device)
    keys = ("allocated_bytes.all.current", "allocated_bytes.all.peak", "reserved_bytes.all.current")
    return tuple((stats.get(key, 0) + uncounted_bytes) / 1e9 for key in keys)


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
    where something else (an evaluation, a checkpoint) came in between: what the loop itself costs is in it. Of the same
    span `own_ms` is what this rank took up to `mark`, before it waits for others.

    A step that does not end in `limit_s` waits for a rank that hangs: RanksApart.
    """

    def __init__(self, device: torch.device, limit_s: float = math.inf) -> None:
        self.on_gpu, self.limit_s = device.type == "cuda", limit_s
        self.depth = 1 if self.on_gpu else 0  # newest steps that are left alone; a CPU has finished them anyway
        self.pending: deque[tuple[Any, torch.Tensor, Any, Any, Any]] = deque()
        self.own_ms = 0.0  # of the newest step that was read
        self.restart_clock()

    def restart_clock(self) -> None:
        """The next step starts now."""
        self.start = self.marked = self._instant()

    def mark(self) -> None:
        """This rank's own work of the step is queued; what follows waits for the others."""
        self.marked = self._instant()

    def push(self, tag: Any, figures: torch.Tensor) -> None:
        """A step is queued whole; `tag` comes back with its figures, (n,) on the device."""
        values = figures.float()
        if self.on_gpu:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
        end = self._instant()
        self.pending.append((tag, values, self.start, self.marked, end))
        self.start = end

    def pop(self, keep: int) -> list[tuple[Any, list[float], float]]:
        """(tag, figures, milliseconds) of all steps but the newest `keep`, oldest first; waits for those only."""
        read = []
        while len(self.pending) > keep:
            tag, values, start, marked, end = self.pending.popleft()
            if self.on_gpu:
                wait_for(end, self.limit_s)  # the copy to `values` is before it
            self.own_ms = self._ms(start, marked)
            read.append((tag, values.tolist(), self._ms(start, end)))
        return read

    def _ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.on_gpu else (end - start) * 1e3

    def _instant(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


TIME_IS_UP = 1  # among the codes of StopRequest; its others are the numbers of signals, which are higher and win
SLURM_MARGIN_S = 300.0  # the run ends so long before its Slurm job does, whenever its process was started


class StopRequest:
    """Whether the run should end after this step: SIGTERM, SIGINT, SIGUSR1, the end of max_hours or of the Slurm job.

    The first signal asks; a second one exits at once. A rank alone obeys its own `code`. Among several a signal may reach any
    of them, so all obey what they have all `heard`: the highest code of a step, or of an evaluation's batch.
    """

    def __init__(self, max_hours: float | None, ranks: Ranks) -> None:
        own_s = 3600 * max_hours if max_hours is not None else float("inf")
        job_s = float(os.environ.get("SLURM_JOB_END_TIME", "inf")) - SLURM_MARGIN_S - time.time()
        self.deadline_s = time.monotonic() + min(own_s, job_s)
        self.deadline_name = "end of the Slurm job" if job_s < own_s else f"max_hours={max_hours}"
        self.ranks = ranks
        self.signal = self.heard = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        if not self.ranks.is_main:  # torchrun sends a signal to all of its ranks: one says so
            return
        with suppress(OSError):  # stderr may be a pipe whose reader is gone: Ctrl-C ends a `| tee` as well
            os.write(2, f"{signal.Signals(number).name}: finishing the step, then saving\n".encode())  # print is not reentrant

    @property
    def code(self) -> int:
        """What this rank alone would do: the number of a signal, TIME_IS_UP, or 0."""
        return self.signal or (TIME_IS_UP if time.monotonic() > self.deadline_s else 0)

    def hear(self, codes: Sequence[float]) -> None:
        """The codes of all ranks, the same on every rank."""
        self.heard = self.heard or int(max(codes))

    def ask(self) -> bool:
        """The ranks tell each other their codes, on the hosts; whether to stop. A collective."""
        if self.ranks.world_size > 1:
            code = torch.tensor(self.code)
            dist.all_reduce(code, dist.ReduceOp.MAX)
            self.hear([code.item()])
        return bool(self)

    def __bool__(self) -> bool:
        return bool(self.reason)

    @property
    def reason(self) -> str:
        code = self.heard if self.ranks.world_size > 1 else self.code
        return self.deadline_name if code == TIME_IS_UP else signal.Signals(code).name if code else ""

    @property
    def exit_code(self) -> int:
        return 143 if self.reason == "SIGTERM" else 0
