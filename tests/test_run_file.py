"""The run log's file: a document at every moment, its reader, and what a full disk does to it."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import run_file
from configurator import ROOT
from run_file import LISTS, RECORDS, VALUES, RunFile, StepRecord, Throughput, log_path, read_log, step_record, strict_json


def strict(path: Path) -> dict[str, Any]:
    """The document as a strict parser sees it: NaN and Infinity are errors."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def iters(document: dict[str, Any], section: str = RECORDS) -> list[int]:
    return [record["iter"] for record in document[section]]


def opened(folder: Path, warnings: list[str] | None = None) -> RunFile:
    warn = [].append if warnings is None else warnings.append
    return RunFile(log_path(folder, "x"), {"run_name": "x", "config": {"values": {"n_layer": 2}}}, [], warn)


def write_step(file: RunFile, i: int) -> None:
    """A step, a note of growing length, and every tenth time one entry in each of the other lists."""
    file.append(RECORDS, {"iter": i, "loss": 5.0 - i / 100, "mfu": {"mfu_percent": 45.0}})
    file.append("events", {"iter": i, "message": f'quotes " and \\ and\nlines and {chr(0x2028)}' * (i % 7), "where": Path("a/b")})
    if i % 10 == 0:
        file.append("eval_steps", {"iter": i, "val_loss": 3.0})
        file.append("checkpoints", {"iter": i, "tier": "latest"})
        file.put("summary", {"last_iter": i, "status": "running"})


@contextmanager
def pwrites(monkeypatch: pytest.MonkeyPatch, also: Any = lambda data: None) -> Iterator[list[int]]:
    """The sizes of all writes; `also` is called after each."""
    write, sizes = os.pwrite, []

    def watched(fd: int, data: bytes, offset: int) -> int:
        written = write(fd, data, offset)
        sizes.append(len(data))
        also(data)
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", watched)
        yield sizes


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot_bytes", [65_536, 1], ids=["roomy slots", "every slot overflows"])
def test_the_file_parses_after_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slot_bytes: int) -> None:
    monkeypatch.setattr(run_file, "SLOT_BYTES", slot_bytes)
    file, seen = opened(tmp_path), []
    with pwrites(monkeypatch, lambda _: seen.append(len(strict(file.path)[RECORDS]))) as sizes:
        for i in range(1, 101):
            write_step(file, i)
        file.put("startup_info", {"model": "m" * 10_000})
        file.put("startup_info", {"model": "m"})
        file.close()
    assert seen == sorted(seen) and len(sizes) > 220

    document = strict(file.path)
    assert list(document) == [*VALUES, *LISTS, RECORDS]
    assert iters(document) == iters(document, "events") == list(range(1, 101))
    assert iters(document, "eval_steps") == iters(document, "checkpoints") == list(range(10, 101, 10))
    assert document["run_name"] == "x" and document["config"] == {"values": {"n_layer": 2}}
    assert document["summary"] == {"last_iter": 100, "status": "running"} and document["startup_info"] == {"model": "m"}
    assert document["events"][7] == {"iter": 8, "message": f'quotes " and \\ and\nlines and {chr(0x2028)}', "where": "a/b"}
    assert os.listdir(tmp_path) == ["run_x.json"]


def test_a_record_costs_one_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = opened(tmp_path)
    file.append(RECORDS, {"iter": 1_000, "loss": 3.25})
    with pwrites(monkeypatch) as sizes:
        for i in range(1_001, 4_001):
            file.append(RECORDS, {"iter": i, "loss": 3.25})
    assert len(sizes) == 3_000 and set(sizes) == {len(b',\n  {"iter": 4000, "loss": 3.25}\n]}\n')}


def test_a_full_slot_is_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots double, so the document is written anew about log2(entries) times."""
    renames, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (renames.append(names), replace(*names)))
    file = opened(tmp_path)
    for i in range(20_000):  # 500 kB
        file.append("eval_steps", {"iter": i, "val": 3.25})
    assert 5 <= len(renames) <= 1 + math.log2(file.path.stat().st_size / run_file.SLOT_BYTES) + 1
    assert iters(strict(file.path), "eval_steps") == list(range(20_000))


def test_tail_f_shows_whole_records(tmp_path: Path) -> None:
    file = opened(tmp_path)
    for i in range(1, 4):
        size = file.path.stat().st_size
        file.append(RECORDS, {"iter": i})
        shown = file.path.read_bytes()[size:].decode()  # what tail -f prints: it goes on where the file ended
        assert json.loads(shown.splitlines()[0])["iter"] == i and shown.splitlines()[1:] == ["]}"]


FULL_DISK = """
import resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_run_file import *
run_file.RETRY_S = 0.0
warnings = []
file = opened(Path({folder!r}), warnings)
limit = file.path.stat().st_size + {room}  # bytes: a file that reaches it takes no more, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for i in range(1, 101):
    write_step(file, i)
    strict(file.path)
    assert os.listdir({folder!r}) == ["run_x.json"]
full = iters(strict(file.path))
assert full == list(range(1, len(full) + 1)) and 0 < len(full) < 100, full
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
write_step(file, 101)
file.close()
assert len(warnings) == 2 and "File too large; training goes on" in warnings[0] and "nothing is missing" in warnings[1], warnings
"""


@pytest.mark.parametrize("room", [100, 1_000, 3_000, 5_000])
def test_a_full_disk_is_one_warning_and_costs_no_record(tmp_path: Path, room: int) -> None:
    code = FULL_DISK.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path), room=room)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = strict(log_path(tmp_path, "x"))
    assert iters(document) == iters(document, "events") == list(range(1, 102))
    assert iters(document, "eval_steps") == list(range(10, 101, 10))
    assert os.listdir(tmp_path) == ["run_x.json"]


def test_what_a_full_disk_let_through_is_taken_back(tmp_path: Path) -> None:
    """A write of which a part went in leaves the file byte for byte as it was."""
    file = opened(tmp_path)
    file.append(RECORDS, {"iter": 1})
    before = file.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
        file.append(RECORDS, {"iter": 2, "loss": 3.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.path.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def written(folder: Path, steps: int = 40) -> Path:
    file = opened(folder)
    for i in range(1, steps + 1):
        write_step(file, i)
    file.close()
    return file.path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    sections, records = read_log(path)
    assert sections | {RECORDS: list(records)} == strict(path)


def test_a_log_without_a_step_is_read(tmp_path: Path) -> None:
    sections, records = read_log(opened(tmp_path).path)
    assert sections["run_name"] == "x" and sections["events"] == [] and list(records) == []


@pytest.mark.parametrize("cut", range(1, 400, 7))
def test_a_torn_end_costs_the_last_records_only(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path)
    whole, content = strict(path), path.read_bytes()
    path.write_bytes(content[:-cut])
    sections, records = read_log(path)
    lines = content[:-cut].decode().splitlines()
    n_whole = sum(line.startswith(("   {", "  {")) and line.rstrip(",").endswith("}}") for line in lines)
    kept = list(records)
    assert len(kept) == n_whole < 41 and kept == whole[RECORDS][:n_whole]
    assert all(sections[name] == whole[name] for name in (*VALUES, *LISTS))


@pytest.mark.parametrize("section", ["events", "checkpoints", "eval_steps", "summary"])
def test_a_hole_costs_one_entry(tmp_path: Path, section: str) -> None:
    path = written(tmp_path)
    whole, content = strict(path), path.read_bytes()
    start = content.index(f'"{section}": '.encode())
    middle = content.index(b"}", start) - 9 if section == "summary" else content.index(b"\n ]", start) - 9
    path.write_bytes(content[:middle] + b"\0" * 12 + content[middle + 12 :])
    sections, records = read_log(path)
    if section == "summary":
        del whole["summary"]
    else:
        whole[section].pop()
    assert sections | {RECORDS: list(records)} == whole


REFORMATTED = '{\n "run_name": "x",\n "events": [\n  {\n   "kind": "start"\n  }\n ]\n}'


@pytest.mark.parametrize("content", [b"", b"not a log", b"[1, 2]", REFORMATTED.encode(), b"\x89PNG\r\n\x1a\n\x00\xff"])
def test_a_file_that_is_no_log_of_ours_has_no_run_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run_x.json").write_bytes(content)
    sections, records = read_log(tmp_path / "run_x.json")
    assert "run_name" not in sections and list(records) == []


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"loss": math.nan, "all": [1, math.inf, (-math.inf, 2.5)]}, '{"loss": null, "all": [1, null, [null, 2.5]]}'),
        ({"path": Path("a/b"), "loss": math.nan}, '{"path": "a/b", "loss": null}'),
        ("ü\n\u2028", '"\\u00fc\\n\\u2028"'),
    ],
)
def test_strict_json(value: Any, text: str) -> None:
    assert strict_json(value) == text


def test_a_training_iteration_has_the_documented_fields() -> None:
    step = StepRecord(5, 3.2145, 1.5e-6, 234.0, 0.1, 25_675, 1.2345, -5.67e-6, 2.34e-4, 2.34, 3.12, 4.0)
    record = step_record(step, Throughput(6.43e9, 6.0e9, peak_tflops=312.0, tokens_per_step=5_135))
    mfu, memory, gradients = record.pop("mfu"), record.pop("memory"), record.pop("gradients")
    assert record == {"iter": 5, "loss": 3.2145, "lr": 1.5e-6, "time_ms": 234.0, "data_wait_ms": 0.1, "tokens": 25_675}
    assert mfu["tokens_per_sec"] == pytest.approx(5_135 / 0.234, abs=1e-3)
    assert mfu["achieved_tflops"] == pytest.approx(mfu["flops_per_token"] * mfu["tokens_per_sec"] / 1e12, rel=1e-9)
    assert mfu["mfu_percent"] == pytest.approx(100 * mfu["achieved_tflops"] / 312.0, abs=1e-4)
    assert mfu["mfu_causal_percent"] == pytest.approx(mfu["mfu_percent"] * 6.0 / 6.43, abs=1e-4)
    assert (mfu["peak_tflops"], mfu["flops_per_token"]) == (312.0, 6.43e9)
    assert memory == {"allocated_gb": 2.34, "peak_gb": 3.12, "reserved_gb": 4.0}
    assert gradients == {"global_norm": 1.2345, "grad_mean": -5.67e-6, "grad_std": 2.34e-4}


def test_an_fp8_run_has_its_own_share_of_the_peak() -> None:
    shares = {"weights": {"saturated_percent": 0.0, "flushed_percent": 0.5}}
    throughput = Throughput(6e9, 5e9, 989.5, 5_000, peak_fp8_tflops=1979.0)
    record = step_record(StepRecord(1, 3.0, 1e-3, 100.0, 0.1, 5, 1.0, fp8=shares), throughput)
    assert record["fp8"] == shares
    assert record["mfu"]["mfu_fp8_percent"] == pytest.approx(record["mfu"]["mfu_percent"] / 2, abs=1e-4)


def test_the_slowest_rank_is_named_once_a_step_was_measured() -> None:
    def ranks(*own_ms: float) -> dict[str, Any] | None:
        step = StepRecord(3, 3.0, 1e-3, 100.0, 0.1, 5, 1.0, own_ms=own_ms)
        return step_record(step, Throughput(6e6, 5e6, None, 5)).get("ranks")

    assert ranks(3.0, 9.50049, 4.0) == {"slowest": 1, "slowest_ms": 9.5}
    assert ranks(0.0, 0.0) is ranks(7.0) is ranks() is None


def test_what_is_not_known_is_none() -> None:
    record = step_record(StepRecord(1, 3.0, 1e-3, 100.0, 0.1, 5, 1.0), Throughput(6e6, 5e6, None, 5))
    assert record["memory"] is None and record["gradients"] == {"global_norm": 1.0}
    mfu = record["mfu"]
    assert mfu["mfu_percent"] is mfu["mfu_causal_percent"] is mfu["peak_tflops"] is None
    assert mfu["tokens_per_sec"] == 50.0 and mfu["achieved_tflops"] == pytest.approx(3e-4)


def test_the_module_stands_alone() -> None:
    code = "import sys, run_file; assert not {'configurator', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
