"""--profile on a real run, and what is said when memory runs out."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from configurator import UserError, load_config
from profiling import SNAPSHOT, is_out_of_memory, out_of_memory_help
from tiny_runs import Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    with Runs(tmp_path_factory.mktemp("profiling")) as runs:
        yield runs


def table(log: str) -> list[list[str]]:
    """(us a step, percent, calls, name) of each row that is printed."""
    return re.findall(r"^ +([\d,]+) +([\d.]+)% +(\d+)  (\S.*)$", log, flags=re.M)


def test_a_profile_has_the_named_steps(runs: Runs) -> None:
    runs.run("profiled", "--max_iters=8", "--profile=3:6", "--run_name=mine")
    folder = runs.folder / "profiled"
    events = json.loads(gzip.decompress((folder / "trace_mine.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::_fused_adamw_" for event in events) == 3 * 2  # matrices and vectors
    log = (folder / "run_mine.log").read_text()
    assert "trace of 3 steps" in log
    rows = table(log)
    assert sum(float(share) for _, share, _, _ in rows) <= 100.5
    assert all(int(calls) > 0 for _, _, calls, name in rows if name == "aten::mm") and len(rows) > 10
    iterations = json.loads((folder / "run_mine.json").read_text())["training_iterations"]
    assert [step["iter"] for step in iterations] == list(range(1, 9))


def test_a_run_that_ends_early_keeps_what_was_recorded(runs: Runs) -> None:
    runs.run("early", "--max_iters=4", "--profile=4:9", "--run_name=mine")
    assert "trace of 1 steps" in (runs.folder / "early" / "run_mine.log").read_text()


@pytest.mark.parametrize("steps", ["10", "13:10", "0:3", "a:b", "3:3"])
def test_no_range_of_steps(steps):
    with pytest.raises(UserError, match="type 10:13 for the steps 10, 11 and 12"):
        load_config([f"--profile={steps}"])


def test_what_a_step_needs_when_memory_runs_out():
    cfg = load_config(["config/full_llama_1.36b.py", "--dtype=bfloat16"])
    text = out_of_memory_help(cfg, MemoryError("no room"))
    assert text.startswith("out of memory: no room")
    assert re.search(r"optimizer +9\.64 GiB", text) and re.search(r"activations +20\.34 GiB", text)
    assert "--batch_size=4 --gradient_accumulation_steps=32" in text


@pytest.mark.parametrize(
    ("knobs", "advice"),
    [
        ("--batch_size=1 --gradient_accumulation_steps=40", "What needs less: --gradient_checkpointing"),
        ("--batch_size=5 --gradient_accumulation_steps=8", "What needs less: --batch_size=1 --gradient_accumulation_steps=40 "),
        ("--batch_size=9 --gradient_accumulation_steps=4", "What needs less: --batch_size=3 --gradient_accumulation_steps=12 "),
        ("--batch_size=1 --gradient_checkpointing", "What needs less: a shorter --block_size"),
    ],
)
def test_what_needs_less_is_the_same_step(knobs, advice):
    assert advice in out_of_memory_help(load_config(knobs.split()), MemoryError("no room"))


def test_other_errors_stay_what_they_are():
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_out_of_memory_leaves_a_snapshot(runs: Runs, tmp_path: Path) -> None:
    flags = "--device=cuda --batch_size=4096 --block_size=1024 --n_embd=4096 --dtype=bfloat16 --memory_history".split()
    process = runs.start("full", *flags)
    assert process.wait() == 4
    assert "memory of the GPU" in process.stderr and SNAPSHOT in process.stderr
    assert (runs.folder / "full" / SNAPSHOT).stat().st_size > 0
