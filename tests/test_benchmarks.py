"""Benchmarks that a CPU can run, on models so small that only their working shows: their figures are for GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import ROOT

TINY = "--device=cpu --compile=False --n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=2".split()


def run(program: str, *flags: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / program), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_train_overhead(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    output = run("train_overhead.py", "--rounds=1", "--steps=24", *TINY, f"--json={figures}")
    assert "of the bare loop (medians)" in output
    assert json.loads(figures.read_text())["train.py"]["median_ms"] > 0


def test_scaling(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    run("scaling.py", "config/train_gpt2.py", *TINY, "--vocab_size=64", "--steps=2", "--micro_steps=1", f"--json={figures}")
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["ranks"], row["strategy"]) for row in rows] == [(1, "alone"), (2, "ddp"), (2, "zero1"), (2, "fsdp")]
    assert rows[0]["efficiency"] == 1 and all(row["of_slowest"] > 0 for row in rows)


@pytest.mark.parametrize(
    "program", ["loss_parity.py", "fp8_accuracy.py", "stop_and_resume.py", "throughput.py", "scaling.py", "simulation.py"]
)
def test_a_mistake_is_answered_in_a_line(program: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / program, "nope.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "nope.py: no such config file" in done.stderr and "Traceback" not in done.stderr
