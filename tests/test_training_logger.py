"""The run log: its file under every kind of interruption, the console's formats, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

import training_logger
from configurator import ROOT, Config, EvalConfig, LogConfig, OptimConfig, RunConfig, UserError
from run_file import StepRecord, Throughput, log_path, step_record
from training_logger import TrainingLogger, duration, figure, new_run_name

THROUGHPUT = Throughput(flops_per_token=6.43e9, flops_per_token_causal=6.0e9, peak_tflops=312.0, tokens_per_step=5_135)
BLOCK = """\
Iter 5 | Loss: 3.2145 | Time: 234ms | LR: 1.50e-06
MFU: 45.23% | Achieved: 141.1 TF | Peak: 312.0 TF | Tokens/s: 21,944 | FLOPs/token: 6.4 GF
Memory: 2.34 GB alloc | 3.12 GB peak | 4.00 GB reserved
Gradients: norm=1.2345 | mean=-5.67e-06 | std=2.34e-04
"""


def config(folder: Path, **log: Any) -> Config:
    optim, evaluation = OptimConfig(max_iters=1_000), EvalConfig(eval_interval=10)
    return Config(optim=optim, eval=evaluation, log=LogConfig(**log), run=RunConfig(out_dir=str(folder)))


def opened(folder: Path, run_name: str = "x", resume_iter: int | None = None, **log: Any) -> TrainingLogger:
    logger = TrainingLogger(config(folder, **log), run_name, resume_iter)
    logger.report({"model": {"architecture": "2L", "parameters": 124_440_000}}, THROUGHPUT)
    return logger


def step(iter: int, **changes: Any) -> StepRecord:
    figures = dict(loss=3.2145, lr=1.5e-6, time_ms=234.0, data_wait_ms=0.1, tokens=5_135 * iter, grad_norm=1.2345)
    return StepRecord(**{"iter": iter} | figures | changes)


GPU_STEP = step(5, grad_mean=-5.67e-6, grad_std=2.34e-4, allocated_gb=2.34, peak_gb=3.12, reserved_gb=4.0)


def strict(path: Path) -> dict[str, Any]:
    """The document as a strict parser sees it: NaN and Infinity are errors."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def iters(document: dict[str, Any], section: str = "training_iterations") -> list[int]:
    return [record["iter"] for record in document[section]]


def log_everything(logger: TrainingLogger, i: int) -> None:
    logger.step(step(i, loss=5.0 - i / 100, time_ms=100.0 + i % 7))
    if i % 10 == 0:
        logger.evaluation(i, 2.0, 3.0 - i / 100, 1.1, 1e-4, 5_135 * i)
        logger.checkpoint(
            dict(iter=i, tier="latest", path=Path("out/checkpoints/latest"), val_loss=None, bytes=1_000_000, save_s=0.5)
        )


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def test_everything_that_is_logged_is_in_the_file(tmp_path: Path) -> None:
    logger = opened(tmp_path)
    logger.step(GPU_STEP)
    logger.evaluation(5, 1.97, 2.04, 0.98, 1e-4, 25)
    logger.checkpoint(dict(iter=5, tier="best_model", path="out/best", val_loss=2.04, bytes=10, save_s=0.1234))
    logger.event("note", 5, "a note", number=1, where=Path("a/b"))
    logger.text(5, "def f():\n    return 'ü'")
    logger.close("finished")
    document = strict(log_path(tmp_path, "x"))
    assert document["training_iterations"] == [step_record(GPU_STEP, THROUGHPUT)]
    [evaluation], [checkpoint] = document["eval_steps"], document["checkpoints"]
    assert evaluation.pop("wall_s") >= 0
    assert evaluation == {"iter": 5, "train_loss": 1.97, "val_loss": 2.04, "val_bits_per_byte": 0.98, "lr": 1e-4, "tokens": 25}
    assert checkpoint == {"iter": 5, "tier": "best_model", "path": "out/best", "val_loss": 2.04, "bytes": 10, "save_s": 0.123}
    assert [event["kind"] for event in document["events"]] == ["start", "note", "sample", "stop"]
    assert document["events"][1].items() >= {"iter": 5, "message": "a note", "number": 1, "where": "a/b"}.items()
    assert document["events"][2]["text"] == "def f():\n    return 'ü'"
    assert document["run_name"] == "x" and document["config"]["values"]["max_iters"] == 1_000
    assert document["config"]["origins"] == config(tmp_path).origins
    assert document["startup_info"] == {"model": {"architecture": "2L", "parameters": 124_440_000}}


def test_what_is_not_known_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TrainingLogger(config(tmp_path), "x")
    logger.report({}, Throughput(6e6, 5e6, None, 5_135))
    logger.step(step(1, loss=math.nan, grad_norm=math.inf))
    logger.evaluation(1, math.nan, math.inf, None, 1e-4, 1)
    logger.close("finished")
    document = strict(log_path(tmp_path, "x"))
    [record] = document["training_iterations"]
    assert record["loss"] is None and record["memory"] is None and record["gradients"] == {"global_norm": None}
    assert record["mfu"]["mfu_percent"] is record["mfu"]["mfu_causal_percent"] is record["mfu"]["peak_tflops"] is None
    assert record["mfu"]["tokens_per_sec"] > 0 and record["mfu"]["achieved_tflops"] > 0
    assert document["summary"]["best_val_loss"] is None and document["summary"]["avg_mfu"] is None
    assert "MFU" not in capsys.readouterr().out


def test_a_record_costs_one_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_logger, "SUMMARY_S", math.inf)  # the summary has a write of its own every few seconds
    logger, sizes, write = opened(tmp_path), [], os.pwrite
    logger.step(step(1))

    def measured_write(fd: int, data: bytes, offset: int) -> int:
        sizes.append(len(data))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", measured_write)
    for i in range(2, 3_002):
        logger.step(step(i))
    assert len(sizes) == 3_000
    assert max(sizes) < 500 and max(sizes[-100:]) - min(sizes[:100]) < 20


CHILD = """
import sys, itertools
sys.path[:0] = [{root!r}, {tests!r}]
from test_training_logger import *
logger = opened(Path({folder!r}), resume_iter={resume})
for i in itertools.count(({resume} or 0) + 1):
    log_everything(logger, i)
    logger.event("note", i, "n" * (i % 300))
"""


def test_kill_9_at_any_moment_loses_nothing_that_was_logged(tmp_path: Path) -> None:
    path, resume, draw = log_path(tmp_path, "x"), None, random.Random(1)
    for _ in range(6):
        code = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path), resume=resume)
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout:
                if line.startswith("Iter"):
                    break
            time.sleep(draw.uniform(0.0, 0.25))
            child.send_signal(signal.SIGKILL)
            printed = [int(line.split()[1]) for line in child.stdout.read().splitlines() if re.match(r"Iter \d+ \|.*ETA", line)]
        document = strict(path)
        last = iters(document)[-1]
        assert iters(document) == list(range(1, last + 1)), "a step is missing or doubled"
        assert last >= max(printed, default=0)
        resume = last - draw.randrange(3)


@pytest.mark.parametrize("cut", range(1, 330, 23))
def test_a_torn_last_write_is_mended(tmp_path: Path, cut: int) -> None:
    path, logger = log_path(tmp_path, "x"), opened(tmp_path)
    for i in range(1, 31):
        log_everything(logger, i)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])

    opened(tmp_path, resume_iter=30).close("finished")
    document = strict(path)
    assert iters(document) == list(range(1, 31 if cut <= len("\n]}\n") else 30))
    assert iters(document, "eval_steps") == [10, 20, 30]


@pytest.mark.parametrize("section", ["events", "checkpoints", "eval_steps", "summary"])
def test_a_write_torn_in_the_middle_costs_that_entry_only(tmp_path: Path, section: str) -> None:
    path, logger = log_path(tmp_path, "x"), opened(tmp_path)
    for i in range(1, 31):
        log_everything(logger, i)
        logger.event("note", i, "a note")
    content = path.read_bytes()
    start = content.index(f'"{section}": '.encode())
    middle = content.index(b"}", start) - 9 if section == "summary" else content.index(b"\n ]", start) - 9
    path.write_bytes(content[:middle] + b"\0" * 12 + content[middle + 12 :])

    opened(tmp_path, resume_iter=30).close("finished")
    document, lost = strict(path), lambda name: int(name == section)
    assert iters(document) == list(range(1, 31))
    assert len(document["eval_steps"]) == 3 - lost("eval_steps") and len(document["checkpoints"]) == 3 - lost("checkpoints")
    assert [event["kind"] for event in document["events"]].count("note") == 30 - lost("events")


REFORMATTED = '{\n "run_name": "x",\n "events": [\n  {\n   "kind": "start"\n  }\n ]\n}'


@pytest.mark.parametrize("content", ["", "not a log", "[1, 2]", REFORMATTED])
def test_a_file_that_is_no_log_of_ours_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = log_path(tmp_path, "x")
    path.write_text(content)
    logger = opened(tmp_path, resume_iter=3)
    logger.step(step(4))
    assert iters(strict(path)) == [4]
    assert (tmp_path / "run_x.json.1").read_text() == content
    assert "run_x.json.1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


def test_a_resumed_log_equals_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole = opened(tmp_path / "whole")
    for i in range(1, 61):
        log_everything(whole, i)
    whole.close("finished")

    opened(tmp_path / "parts").close("stopped before its first step")
    for resume, end in ((0, 37), (30, 44), (40, 60)):  # stopped three times, each time some steps after its last checkpoint
        part = opened(tmp_path / "parts", resume_iter=resume)
        for i in range(resume + 1, end + 1):
            log_everything(part, i)
    part.close("finished")

    one, other = strict(log_path(tmp_path / "whole", "x")), strict(log_path(tmp_path / "parts", "x"))
    assert other["training_iterations"] == one["training_iterations"]
    for section in ("eval_steps", "checkpoints"):
        assert [e | {"wall_s": 0} for e in other[section]] == [e | {"wall_s": 0} for e in one[section]]
    walls = [record["wall_s"] for record in other["eval_steps"]]
    assert walls == sorted(walls)
    assert [event["iter"] for event in other["events"] if event["kind"] == "resume"] == [0, 30, 40]
    exact = ("final_train_loss", "best_val_loss", "best_val_iter", "total_tokens", "last_iter", "status")
    assert [other["summary"][key] for key in exact] == [one["summary"][key] for key in exact]
    # The first record of a process does not count in the averages: 31 and 41 here, beside the first.
    counted = [record["time_ms"] for record in one["training_iterations"] if record["iter"] not in (1, 31, 41)]
    assert other["summary"]["avg_time_ms"] == pytest.approx(sum(counted) / len(counted), abs=1e-3)
    assert other["summary"]["avg_tokens_per_sec"] == pytest.approx(5_135e3 * len(counted) / sum(counted), rel=1e-5)


def test_what_happened_at_steps_that_are_taken_back_is_not_told_twice(tmp_path: Path) -> None:
    first = opened(tmp_path)
    for i in (2, 4):
        first.score(i, f"step {i}: 25 % right", {"hellaswag_acc": 0.25})
        first.text(i, "to be")
        first.event("skipped_step", i, f"step {i} skipped")
    first.close("stopped", last=(5, 50))
    second = opened(tmp_path, resume_iter=2)
    second.score(4, "step 4: 25 % right", {"hellaswag_acc": 0.25})
    second.close("finished")
    events = [(event["kind"], event["iter"]) for event in strict(log_path(tmp_path, "x"))["events"]]
    assert events[:5] == [("start", 0), ("score", 2), ("sample", 2), ("skipped_step", 2), ("stop", 5)]
    assert [event for event in events[5:] if event[0] != "stop"] == [("resume", 2), ("score", 4)]


def test_what_adds_up_over_the_processes_goes_on(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.step(step(1, skipped=3))
    time.sleep(0.05)
    first.close("stopped")
    before = strict(log_path(tmp_path, "x"))["summary"]
    opened(tmp_path, resume_iter=1).close("finished")
    after = strict(log_path(tmp_path, "x"))["summary"]
    assert after["wall_s"] > before["wall_s"] >= 0.05 and after["skipped_steps"] == 3


def test_a_checkpoint_brings_the_log_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, synced = opened(tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.path.samestat(os.fstat(fd), log_path(tmp_path, "x").stat())))
    logger.step(step(1))
    assert synced == []
    logger.checkpoint(dict(iter=1, tier="latest", path="out/latest", val_loss=None, bytes=1, save_s=0.1))
    assert synced == [True]


def test_a_resume_says_which_knobs_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(tmp_path).close("finished")
    opened(tmp_path, resume_iter=0, log_interval=7, console="line").close("finished")
    resume = next(event for event in strict(log_path(tmp_path, "x"))["events"] if event["kind"] == "resume")
    assert resume["changed"] == {"console": ["auto", "line"], "log_interval": [1, 7]}
    assert "log_interval was 1, is 7" in capsys.readouterr().out


def test_a_resume_under_a_new_name_starts_a_file_of_its_own(tmp_path: Path) -> None:
    first = opened(tmp_path, "first")
    first.step(step(1))
    first.close("finished")
    before = log_path(tmp_path, "first").read_bytes()
    second = opened(tmp_path, "second", resume_iter=1)
    second.step(step(2))
    second.close("finished")
    assert log_path(tmp_path, "first").read_bytes() == before
    document = strict(log_path(tmp_path, "second"))
    assert iters(document) == [2] and document["events"][0]["kind"] == "resume" and document["events"][0]["iter"] == 1


def test_a_run_from_scratch_sets_its_namesakes_files_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        logger = opened(tmp_path, use_tensorboard=True)
        logger.step(step(number))
        logger.close("finished")
    for number, name in enumerate(("run_x.json.1", "run_x.json.2", "run_x.json")):
        assert iters(strict(tmp_path / name)) == [number]
    assert {"run_x.log", "run_x.log.1", "run_x.log.2"} <= {path.name for path in tmp_path.iterdir()}
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == ["x", "x.1", "x.2"]
    assert "run_x.json.2" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Trouble
# ---------------------------------------------------------------------------------------------------------------------

FULL_DISK = """
import resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_training_logger import *
import run_file
run_file.RETRY_S = 0.0
logger = opened(Path({folder!r}))
path = log_path({folder!r}, "x")
limit = path.stat().st_size + 5_000  # bytes: a file that reaches it takes no more, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for i in range(1, 41):
    log_everything(logger, i)
    logger.event("note", i, "n" * 400)  # its slot overflows too
    strict(path)
full = iters(strict(path))
assert full == list(range(1, len(full) + 1)) and 5 < len(full) < 12, full
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
logger.step(step(41))
logger.close("finished")
"""


def test_a_full_disk_is_one_warning_and_costs_no_record(tmp_path: Path) -> None:
    code = FULL_DISK.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = strict(log_path(tmp_path, "x"))
    assert iters(document) == list(range(1, 42)) and iters(document, "eval_steps") == [10, 20, 30, 40]
    assert [event["kind"] for event in document["events"]].count("note") == 40
    assert done.stdout.count("run_x.json: File too large; training goes on") == 1
    assert done.stdout.count("run_x.json: written again, nothing is missing") == 1


def test_a_closed_pipe_does_not_stop_training(tmp_path: Path) -> None:
    code = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path), resume=None)
    code = code.replace("itertools.count(", "range(").replace("+ 1)", "+ 1, 2_000)") + "\nlogger.close('finished')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 0
    assert iters(strict(log_path(tmp_path, "x"))) == list(range(1, 2_000))
    assert sum(line.startswith("Iter") for line in log_path(tmp_path, "x").with_suffix(".log").open()) == 1_999


def test_a_terminal_without_unicode_does_not_stop_training(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_training_logger import *
opened(Path({str(tmp_path)!r})).text(1, "naïve → 愛")
"""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "na\\xefve \\u2192 \\u611b" in done.stdout
    assert "naïve → 愛" in log_path(tmp_path, "x").with_suffix(".log").read_text(encoding="utf-8")


def test_an_out_dir_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out_dir"):
        TrainingLogger(config(tmp_path / "file"), "x")


def test_the_other_ranks_logger_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TrainingLogger(config(tmp_path / "out", use_tensorboard=True, wandb_log=True), "x", active=False)
    logger.report({"model": {}}, THROUGHPUT)
    logger.line("a line")
    logger.event("note", 1, "an event", more=1)
    logger.text(1, "a text")
    log_everything(logger, 10)
    logger.close("finished")
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""


def test_the_module_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, training_logger; assert not {'torch', 'numpy', 'tensorboard', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------------------------------------------------------------
# The console
# ---------------------------------------------------------------------------------------------------------------------


def test_the_block_is_exactly_as_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = opened(tmp_path, console="block")
    capsys.readouterr()
    logger.step(GPU_STEP)
    assert capsys.readouterr().out == BLOCK
    assert log_path(tmp_path, "x").with_suffix(".log").read_text().endswith(BLOCK)


def test_elsewhere_than_on_a_terminal_a_step_is_one_line_with_an_eta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = opened(tmp_path)
    capsys.readouterr()
    logger.step(GPU_STEP)
    # 995 steps of 234 ms are left: 233 s.
    assert capsys.readouterr().out == BLOCK.strip().replace("\n", " | ") + " | ETA: 3m53s\n"


def test_what_was_not_measured_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TrainingLogger(config(tmp_path, console="block"), "x")
    logger.report({}, Throughput(6.4e6, 6e6, None, 5))
    capsys.readouterr()
    logger.step(step(7, time_ms=3.21))
    assert capsys.readouterr().out == (
        "Iter 7 | Loss: 3.2145 | Time: 3.21ms | LR: 1.50e-06\n"
        "Achieved: 0.00997 TF | Tokens/s: 1,558 | FLOPs/token: 6.4 MF\n"
        "Gradients: norm=1.2345\n"
    )


@pytest.mark.parametrize(
    ("bits", "line"),
    [
        (None, "step 250: train loss 1.9700, val loss 2.0400\n"),
        (0.98, "step 250: train loss 1.9700, val loss 2.0400, val bits per byte 0.9800\n"),
    ],
)
def test_the_evaluation_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: float | None, line: str) -> None:
    logger = opened(tmp_path)
    capsys.readouterr()
    logger.evaluation(250, 1.97, 2.04, bits, 1e-4, 1)
    assert capsys.readouterr().out == line


def test_the_report_is_aligned_and_the_closing_line_sums_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TrainingLogger(config(tmp_path), "x")
    assert capsys.readouterr().out == "run x starts\n"
    info = {
        "model": {"architecture": "2L", "total_parameters": 124_440_000, "tied": True},
        "hardware": {"peak_tflops": None, "kernels": ["LayerNorm", "RMSNorm"], "none": []},
    }
    logger.report(info, THROUGHPUT)
    assert capsys.readouterr().out == (
        "model:\n"
        "  architecture      2L\n"
        "  total parameters  124,440,000\n"
        "  tied              True\n"
        "hardware:\n"
        "  kernels           LayerNorm, RMSNorm\n"
        "  none              none\n"
    )
    log_everything(logger, 10)
    capsys.readouterr()
    logger.close("SIGTERM", (12, 61_620))  # two steps were not logged
    logger.close("again")
    path = log_path(tmp_path, "x")
    closing = rf"SIGTERM after step 12: best val loss 2\.9000 at step 10, 61,620 tokens, \d+s; log in {re.escape(str(path))}\n"
    assert re.fullmatch(closing, capsys.readouterr().out)
    summary = strict(path)["summary"]
    assert (summary["status"], summary["last_iter"], summary["total_tokens"]) == ("SIGTERM", 12, 61_620)


@pytest.mark.parametrize("no_color", [False, True])
def test_colour_on_a_terminal_only(tmp_path: Path, no_color: bool) -> None:
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_training_logger import *
logger = opened(Path({str(tmp_path)!r}))
logger.step(GPU_STEP)
logger.evaluation(250, 1.97, 2.04, None, 1e-4, 1)
"""
    main, terminal = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | ({"NO_COLOR": "1"} if no_color else {})
    subprocess.run([sys.executable, "-c", code], stdout=terminal, env=environment, check=True)
    os.close(terminal)
    shown = os.read(main, 100_000).decode().replace("\r\n", "\n")
    os.close(main)
    assert ("\033[" in shown) != no_color
    assert BLOCK in re.sub(r"\033\[\d*m", "", shown)
    written = log_path(tmp_path, "x").with_suffix(".log").read_text()
    assert "\033" not in written and BLOCK in written


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3_725, "1h02m"), (90_000, "1d01h"), (183_600, "2d03h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(141.13, "141.1"), (6.43, "6.4"), (1.0, "1.0"), (0.05234, "0.0523"), (0.0, "0")])
def test_figure(value: float, text: str) -> None:
    assert figure(value) == text


def test_a_new_name_is_a_time_stamp() -> None:
    time.strptime(new_run_name(), "%Y%m%d_%H%M%S")


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard and Weights & Biases
# ---------------------------------------------------------------------------------------------------------------------


def test_tensorboard_receives_the_same_figures(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = opened(tmp_path, use_tensorboard=True)
    for i in range(1, 21):
        log_everything(logger, i)
    logger.text(20, "a text")
    logger.close("finished")
    resumed = opened(tmp_path, resume_iter=10, use_tensorboard=True)
    for i in range(11, 31):
        log_everything(resumed, i)
    resumed.close("finished")

    board = accumulators.EventAccumulator(str(tmp_path / "tensorboard" / "x"))
    board.Reload()
    logged = strict(log_path(tmp_path, "x"))
    losses = [(event.step, event.value) for event in board.Scalars("loss/train")]
    assert losses == [(r["iter"], pytest.approx(r["loss"])) for r in logged["training_iterations"]]
    assert [event.value for event in board.Scalars("eval/val_loss")] == pytest.approx([2.9, 2.8, 2.7])
    tags = set(board.Tags()["scalars"])
    assert {"perf/mfu_percent", "perf/tokens_per_sec", "gradients/global_norm", "eval/val_bits_per_byte"} <= tags
    assert not any(tag.startswith("memory/") for tag in tags)
    assert "sample/text_summary" in board.Tags()["tensors"]


def test_tensorboard_compares_the_knobs_of_runs(tmp_path: Path) -> None:
    """Through the backend of TensorBoard's own table: the knobs of every run, and the last value of its figures."""
    multiplexers = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_multiplexer")
    from tensorboard.plugins.hparams import metadata

    for name, interval in (("a", 1), ("b", 5)):
        logger = opened(tmp_path, name, use_tensorboard=True, log_interval=interval)
        log_everything(logger, 5)
        logger.close("finished")
    runs = multiplexers.EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload()
    found = {}
    for name in ("a", "b"):
        tags = runs.PluginRunToTagToContent("hparams")[name]
        knobs = metadata.parse_session_start_info_plugin_data(tags[metadata.SESSION_START_INFO_TAG]).hparams
        assert metadata.SESSION_END_INFO_TAG in tags and metadata.EXPERIMENT_TAG not in tags
        assert knobs["weight_tying"].string_value == "True" and "run_name" not in knobs
        found[name] = knobs["log_interval"].number_value
    assert found == {"a": 1, "b": 5}


def test_tensorboard_missing_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        opened(tmp_path, use_tensorboard=True)


class FakeWandb(types.ModuleType):
    """Stands in for the package: keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.options: dict[str, Any] = {}
        self.finished = False

    def init(self, **options: Any) -> FakeWandb:
        self.options = options
        return self

    def log(self, figures: dict[str, Any], step: int) -> None:
        self.logged.append((figures, step))

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_receives_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger = opened(tmp_path, wandb_log=True, wandb_project="p", wandb_run_name="shown")
    logger.step(GPU_STEP)
    logger.evaluation(5, 1.97, 2.04, None, 1e-4, 1)
    logger.text(5, "a text")
    logger.close("finished")
    options = fake.options
    assert (options["project"], options["name"], options["id"], options["resume"]) == ("p", "shown", "x", "allow")
    assert options["config"]["max_iters"] == 1_000
    figures, at = fake.logged[0]
    assert at == 5 and figures["loss/train"] == 3.2145 and figures["memory/peak_gb"] == 3.12
    assert fake.logged[1:] == [({"eval/train_loss": 1.97, "eval/val_loss": 2.04}, 5), ({"sample": "a text"}, 5)]
    assert fake.finished


def test_a_second_run_of_a_name_has_a_page_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, ids = FakeWandb(), []
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_iter in (None, None, 0):  # a run, another of its name, and that one resumed
        opened(tmp_path, resume_iter=resume_iter, wandb_log=True).close("finished")
        ids.append(fake.options["id"])
    assert ids[0] == "x" and ids[1].startswith("x-") and ids[2] == ids[1]


@pytest.mark.parametrize("trouble", ["missing", "fails at the start", "fails later"])
def test_trouble_with_weights_and_biases_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no network")

    fake = FakeWandb()
    if trouble != "missing":
        setattr(fake, "init" if trouble == "fails at the start" else "log", fail)
    monkeypatch.setitem(sys.modules, "wandb", None if trouble == "missing" else fake)
    logger = opened(tmp_path, wandb_log=True)
    for i in range(1, 4):
        logger.step(step(i))
    logger.close("finished")
    assert iters(strict(log_path(tmp_path, "x"))) == [1, 2, 3]
    expected = "WeightsAndBiases is left out" if trouble == "fails later" else "training goes on without Weights & Biases"
    assert capsys.readouterr().out.count(expected) == 1
