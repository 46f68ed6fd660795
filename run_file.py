"""The file format of the run log: `out_dir/run_X.json`, one strict-JSON document that parses whenever it is opened.

It can, at a constant cost a record, because

* `training_iterations` comes last and holds one record a line. A new record overwrites only the few bytes that close the
  document: one `pwrite` of about 430 bytes, a few microseconds, so nothing waits in memory and kill -9 loses nothing.
* every other section is a slot padded with blanks, which JSON ignores. An entry overwrites the slot's closing bracket and some
  of the blanks. Where it does not fit, the document is written anew with doubled slots and renamed over the old one.

A write that a crash cut short leaves one line that does not parse. `read_log` leaves that line out; so does the next writer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

VALUES = ("run_name", "config", "startup_info", "summary")  # sections that hold one value
LISTS = ("events", "checkpoints", "eval_steps")  # sections that grow, one entry a line
RECORDS = "training_iterations"  # the last section, which grows without a limit
SLOT_BYTES = 4_096  # set aside for each section at least
RETRY_S = 5.0  # after a failed write, how long until the next try


def log_path(out_dir: str | Path, run_name: str) -> Path:
    return Path(out_dir) / f"run_{run_name}.json"


def strict_json(value: Any) -> str:
    """JSON as the standard has it: NaN and infinities become null, paths and the like become strings."""
    try:
        return json.dumps(value, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value, default=str), parse_constant=lambda name: None))


# ---------------------------------------------------------------------------------------------------------------------
# A training iteration
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Throughput:
    """What turns the time of a step into FLOP/s and MFU. All figures are over all GPUs."""

    flops_per_token: float  # training, attention counted in full
    flops_per_token_causal: float  # attention counted causally
    peak_tflops: float | None  # of all GPUs together; None where the hardware is unknown
    tokens_per_step: int
    peak_fp8_tflops: float | None = None  # the same in FP8, where that is what the run computes in


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
    own_ms: Sequence[float] = ()  # of each rank, its own work of the newest step that it knows, before it waits; 0: none yet
    fp8: Mapping[str, Any] | None = None  # of FP8 training: what rounding did to each class of tensors


def slowest_rank(own_ms: Sequence[float]) -> dict[str, Any]:
    """What a record says of several ranks; nothing where no step of theirs has been measured yet."""
    if len(own_ms) < 2 or not any(own_ms):
        return {}
    slowest = max(range(len(own_ms)), key=lambda rank: own_ms[rank])
    return {"ranks": {"slowest": slowest, "slowest_ms": round(own_ms[slowest], 3)}}


def step_record(step: StepRecord, throughput: Throughput) -> dict[str, Any]:
    """A step as it stands in the file. achieved = FLOPs a token x tokens/s; MFU = achieved / peak, of all GPUs together."""
    time_ms = round(step.time_ms, 3)
    tokens_per_sec = round(throughput.tokens_per_step * 1e3 / time_ms, 3)
    achieved_tflops = throughput.flops_per_token * tokens_per_sec / 1e12
    causal_tflops = throughput.flops_per_token_causal * tokens_per_sec / 1e12
    peak = throughput.peak_tflops
    gradients = {"global_norm": step.grad_norm}
    if step.grad_std is not None:
        gradients |= {"grad_mean": step.grad_mean, "grad_std": step.grad_std}
    memory = {"allocated_gb": step.allocated_gb, "peak_gb": step.peak_gb, "reserved_gb": step.reserved_gb}
    peak_fp8 = throughput.peak_fp8_tflops
    over_fp8 = {"mfu_fp8_percent": round(100 * achieved_tflops / peak_fp8, 4)} if peak_fp8 else {}
    return {
        "iter": step.iter,
        "loss": step.loss,
        "lr": step.lr,
        "time_ms": time_ms,
        "data_wait_ms": round(step.data_wait_ms, 3),
        "tokens": step.tokens,
        "mfu": {
            "mfu_percent": round(100 * achieved_tflops / peak, 4) if peak else None,
            "mfu_causal_percent": round(100 * causal_tflops / peak, 4) if peak else None,
            "achieved_tflops": round(achieved_tflops, 9),
            "peak_tflops": peak,
            "flops_per_token": throughput.flops_per_token,
            "tokens_per_sec": tokens_per_sec,
            **over_fp8,
        },
        "memory": None if step.allocated_gb is None else {name: round(size, 3) for name, size in memory.items()},
        "gradients": gradients,
        **slowest_rank(step.own_ms),
        **({"fp8": step.fp8} if step.fp8 else {}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_log(path: Path) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """(every other section, the training iterations one by one) of a log: finished, being written, or torn.

    A section is absent where its line is torn, a list lacks the entries that are; without `run_name` it is no log of ours.
    Raises OSError.
    """
    sections: dict[str, Any] = {name: [] for name in LISTS}
    entries = whole_lines(path)
    for section, entry in entries:
        if section == RECORDS:
            return sections, (record for _, record in chain([(section, entry)], entries))
        if section in LISTS:
            sections[section].append(entry)
        else:
            sections[section] = entry
    return sections, iter(())


def whole_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(section, value or entry) of every line that parses; nothing of a file that RunFile did not write."""
    section = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith(' "' if section else '{"run_name": '):
                section, _, line = line[2:].partition('": ')
            with suppress(ValueError):  # a torn line, or a bracket
                yield section, json.loads(line.strip(" ,\n"))


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Slot:
    start: int  # offset of the section's value in the file
    used: int  # bytes of it, brackets included
    size: int  # bytes it may take


class RunFile:
    """The growing document. Once it is there no method raises OSError: while the disk is full, entries wait in memory."""

    def __init__(
        self, path: Path, sections: dict[str, Any], records: Iterable[dict[str, Any]], warn: Callable[[str], None]
    ) -> None:
        """Writes the document with these sections and training iterations, in the place of what was at `path`.

        Where sections are absent they start empty. Raises OSError and leaves what was there.
        """
        self.path, self._warn = path, warn
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._retry_at_s = 0.0  # 0 while writing works
        self._fd = -1
        contents = {name: strict_json(sections.get(name, {})).encode() for name in VALUES}
        contents |= {name: b"".join(list_text(name, sections.get(name, []))) for name in LISTS}
        self._build(contents, list_text(RECORDS, records))

    def append(self, section: str, entry: dict[str, Any]) -> None:
        """Adds an entry to a list. Where that fails it waits for the next try."""
        self._waiting.append((section, strict_json(entry).encode()))
        if time.monotonic() >= self._retry_at_s:
            self._flush()

    def put(self, section: str, value: Any) -> None:
        """Replaces the value of a section. Where that fails the old one stands until the next call."""
        with suppress(OSError):
            self._replace_end(section, self._slots[section].used, strict_json(value).encode())

    def sync(self) -> None:
        """Brings the file to the disk itself, so that it outlives the machine and not only the process."""
        with suppress(OSError):
            os.fsync(self._fd)

    def close(self) -> None:
        self._flush()
        if self._waiting:
            self._warn(f"{self.path}: {len(self._waiting)} entries of the log could not be written and are lost")
        os.close(self._fd)

    def _flush(self) -> None:
        """Writes what waits: the newest entry, and while the disk was full those before it."""
        try:
            while self._waiting:
                section, entry = self._waiting[0]
                end = closing(section)
                is_first = self._slots[section].used == len(b"[" + end)
                self._replace_end(section, len(end), separator(is_first) + entry + end)
                self._waiting.popleft()
        except OSError as error:
            if not self._retry_at_s:
                self._warn(f"{self.path}: {error.strerror}; training goes on, the log waits in memory and is tried again")
            self._retry_at_s = time.monotonic() + RETRY_S
        else:
            if self._retry_at_s:
                self._warn(f"{self.path}: written again, nothing is missing")
            self._retry_at_s = 0.0

    def _replace_end(self, section: str, old_bytes: int, text: bytes) -> None:
        """Writes `text` in the place of the last `old_bytes` of a section. Raises OSError and changes nothing."""
        slot = self._slots[section]
        kept = slot.used - old_bytes
        if kept + len(text) <= slot.size:
            overwrite(self._fd, text.ljust(old_bytes), slot.start + kept)
            slot.used = kept + len(text)
            return
        contents = {name: os.pread(self._fd, each.used, each.start) for name, each in self._slots.items() if name != RECORDS}
        contents[section] = contents[section][:kept] + text
        self._build(contents, self._chunks(self._slots[RECORDS].start))

    def _chunks(self, offset: int) -> Iterator[bytes]:
        """What the file holds from `offset` on."""
        while chunk := os.pread(self._fd, 1 << 20, offset):
            yield chunk
            offset += len(chunk)

    def _build(self, contents: dict[str, bytes], records: Iterable[bytes]) -> None:
        """Writes a document beside `path` and renames it over `path`. Raises OSError and leaves the old one as it was."""
        head, slots = b"{", {}
        for section, text in contents.items():
            head += f'"{section}": '.encode()
            slots[section] = Slot(len(head), len(text), max(SLOT_BYTES, 2 * len(text)))
            head += text.ljust(slots[section].size) + b",\n "
        head += f'"{RECORDS}": '.encode()
        temporary = self.path.with_name(self.path.name + ".tmp")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            end = 0
            for piece in chain([head], records):
                end = write_all(fd, piece, end)
            os.fsync(fd)
            os.replace(temporary, self.path)
        except OSError:
            os.close(fd)
            temporary.unlink(missing_ok=True)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._slots = fd, slots | {RECORDS: Slot(len(head), end - len(head), sys.maxsize)}


def closing(section: str) -> bytes:
    """What ends a list: the last one ends the document too."""
    return b"\n]}\n" if section == RECORDS else b"\n ]"


def separator(is_first: bool) -> bytes:
    """What comes before an entry: as long as what closes the document, because `tail -f` goes on behind that."""
    return b"\n   " if is_first else b",\n  "


def list_text(section: str, entries: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """A list as it stands in the file, in pieces."""
    yield b"["
    for number, entry in enumerate(entries):
        yield separator(number == 0) + strict_json(entry).encode()
    yield closing(section)


def overwrite(fd: int, data: bytes, offset: int) -> None:
    """Writes at `offset`. Raises OSError, and takes back what a full disk let through."""
    old = os.pread(fd, len(data), offset)
    try:
        write_all(fd, data, offset)
    except OSError:
        with suppress(OSError):
            os.pwrite(fd, old, offset)
            if len(old) < len(data):  # the file ended there
                os.ftruncate(fd, offset + len(old))
        raise


def write_all(fd: int, data: bytes, offset: int) -> int:
    """Writes at `offset` and returns where the data ends. Raises OSError, perhaps after a part was written."""
    while data:  # a full disk takes a part first, and raises when the rest is tried
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
    return offset
