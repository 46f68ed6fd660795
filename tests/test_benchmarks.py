"""Benchmarks that a CPU can run, on models so small that only their working shows: their figures are for GPUs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parallel
from configurator import ROOT, Config
from tiny_runs import Runs

PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))
WRITERS = [(path.name, "--json") for path in PROGRAMS if "--json" in path.read_text(encoding="utf-8")]
WRITERS += [("fp8_accuracy.py", "--figure"), ("hellaswag_agreement.py", "--keep_items")]
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


LIKE_NANOGPT = """
import dataclasses, torch

GPTConfig = dataclasses.make_dataclass("GPTConfig", "n_layer n_head n_embd block_size vocab_size bias dropout".split())

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.head(self.embedding(idx))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_scaling(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    (tmp_path / "model.py").write_text(LIKE_NANOGPT)
    flags = ["--vocab_size=64", "--use_fp8", "--steps=2", "--micro_steps=1", f"--nanogpt={tmp_path}", f"--json={figures}"]
    output = run("scaling.py", "config/train_gpt2.py", *TINY, *flags)
    assert output.count("FP8 is left out, and products run in float32: a CPU has no FP8 products") == 2  # once a launch
    rows = json.loads(figures.read_text())["rows"]
    alone, together = [(1, "alone"), (1, "nanogpt")], [(2, "ddp"), (2, "zero1"), (2, "fsdp"), (2, "nanogpt")]
    assert [(row["ranks"], row["strategy"]) for row in rows] == [*alone, *together]
    assert rows[0]["efficiency"] == rows[1]["efficiency"] == 1 and all(row["of_slowest"] > 0 for row in rows)
    nanogpt = [row["tokens_per_s_per_rank"] for row in rows if row["strategy"] == "nanogpt"]
    assert rows[-1]["efficiency"] == pytest.approx(nanogpt[1] / nanogpt[0], abs=1e-3)  # of its own, and not of ours
    assert all(row[name] is None for row in rows for name in row if name.endswith("_gib"))  # not measured on a CPU


def test_what_is_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    exposed_us = importlib.import_module("scaling").exposed_us
    products = [(0.0, 10.0, False), (12.0, 20.0, False), (30.0, 31.0, False)]
    assert exposed_us([*products, (2.0, 9.0, True)]) == 0
    assert exposed_us([*products, (8.0, 14.0, True), (9.0, 11.0, True)]) == 2
    assert exposed_us([*products, (22.0, 25.0, True), (24.0, 26.0, True), (31.0, 99.0, True)]) == 4


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        ("transformer_engine:delayd", "transformer_engine:delayd: transformer_engine:RECIPE takes one of bf16, delayed, current"),
        ("transformer_engine", "transformer_engine: transformer_engine:RECIPE takes one of bf16, delayed, current"),
        ("nanogpt:nowhere", "nowhere: there is no model.py of nanoGPT's"),
        ("litgpt", "no 'litgpt'; there are nanotrain, nanogpt, transformers, torchtitan, transformer_engine"),
    ],
)
def test_a_peer_that_there_is_not(peer: str, says: str) -> None:
    command = [sys.executable, ROOT / "benchmarks/throughput.py", *TINY, "--peer", peer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.endswith(f"error: argument --peer: {says}\n")


@pytest.mark.parametrize(
    ("peer", "raises", "remedy"),
    [
        ("transformer_engine:delayed", "OSError: lib.so: no such file", "pip install -r requirements-gpu.txt"),
        ("transformer_engine:bf16", "ModuleNotFoundError: No module named 'pydantic'", "pip install -r requirements-gpu.txt"),
        ("torchtitan", "ImportError: of another version", "pip install torchtitan"),
        ("transformers", "RuntimeError: needs a newer PyTorch", "pip install -r requirements.txt"),
    ],
)
def test_a_peer_that_does_not_load(peer: str, raises: str, remedy: str, tmp_path: Path) -> None:
    """One line, of the child that would have measured it."""
    package, (kind, _, reason) = peer.partition(":")[0], raises.partition(": ")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise {kind}({reason!r})")
    child = [sys.executable, ROOT / "benchmarks/throughput.py", *TINY, f"--contestant={peer}", f"--json={tmp_path}/x.json"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(child, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {package} cannot be imported ({raises}): {remedy}")


def test_scaling_by_the_strategy_of_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever short form a command line has that was meant for train.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scaling = importlib.import_module("scaling")
    monkeypatch.setattr(parallel, "start_ranks", lambda *_: parallel.Ranks(0, 2, torch.device("cpu")))

    def measure(build: object, cfg: Config, *_: object) -> dict[str, object]:
        return {"asked": cfg.parallel.asked, "micro_steps_of_all": cfg.data.gradient_accumulation_steps}

    monkeypatch.setattr(scaling, "measure", measure)
    rows = tmp_path / "rows.json"
    flags = ["--strategies=ddp,zero1,fsdp", "--micro_steps=1,4", f"--rows={rows}", *TINY, "--vocab_size=64"]
    for short_form in ("--use_fsdp", "--use_zero1"):
        monkeypatch.setattr(sys, "argv", ["scaling.py", *flags, short_form])
        assert scaling.main() == 0
        for row in json.loads(rows.read_text()):
            assert (row["asked"], row["micro_steps_of_all"]) == (row["strategy"], 2 * row["micro_steps"])


def test_simulation_of_sums_beside_the_gradients(tmp_path: Path) -> None:
    """fsdp that exchanges once a step: own rows of averages, and float32 sums of whole matrices. A strategy is its row's."""
    figures = tmp_path / "figures.json"
    sizes = "--n_layer=2 --n_head=1 --n_embd=64 --vocab_size=64 --block_size=16 --batch_size=1 --position_encoding=none".split()
    flags = ["--use_fsdp", "--fsdp_accumulate_whole", "--fsdp_min_num_params=0", "--ranks=8", "--micro_steps=2"]
    run("simulation.py", *sizes, *flags, f"--json={figures}")
    ddp, zero1, fsdp = (row["bytes_held"] for row in json.loads(figures.read_text())["rows"])
    n = 64 * 64 * (2 * 12 + 1) + 64 * 5
    assert ddp["gradients"] == zero1["gradients"] == 4 * n
    assert fsdp["gradients"] == 4 * n // 8 + 4 * n
    assert ddp["optimizer"] > zero1["optimizer"] > fsdp["optimizer"]


@pytest.mark.parametrize(
    ("program", "flag"),
    [
        ("scaling.py", "--ranks=1,x"),
        ("scaling.py", "--micro_steps=0"),
        ("scaling.py", "--steps=0"),
        ("simulation.py", "--ranks=x"),
        ("simulation.py", "--ranks=8,"),
        ("simulation.py", "--micro_steps=-1"),
    ],
)
def test_numbers_that_are_none(program: str, flag: str) -> None:
    command = [sys.executable, ROOT / "benchmarks" / program, "config/quickstart.py", flag]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    name, _, text = flag.partition("=")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.endswith(f"error: argument {name}: {text.split(',')[-1]!r} is no positive whole number\n")


def test_fp8_accuracy(tmp_path: Path) -> None:
    Runs(tmp_path)  # writes a dataset
    steps = "--max_iters=4 --warmup_iters=1 --lr_decay_iters=4 --learning_rate=0.01 --gradient_accumulation_steps=1".split()
    flags = [*TINY, *steps, "--ffn_type=swiglu", "--dataset=tiny", f"--data_dir={tmp_path}/data", "--fp8_emulate"]
    seeds = ["--seeds", "1", "2", "--recipes", "delayed", "delayed:--fp8_less_memory", "--windows=2", "--at_once=2"]
    json_file, figure = tmp_path / "losses.json", tmp_path / "figure.png"
    lines = run("fp8_accuracy.py", *flags, *seeds, f"--json={json_file}", f"--figure={figure}").splitlines()
    losses = json.loads(json_file.read_text())["losses"]
    assert [*losses] == [f"{name}, seed {n}" for name in ("without FP8", "delayed", "delayed:--fp8_less_memory") for n in (1, 2)]
    assert len({tuple(values) for values in losses.values()}) == 6
    last = {name: sum(values[2:]) / 2 for name, values in losses.items()}  # the second window
    plain, shifts = [last[f"without FP8, seed {n}"] for n in (1, 2)], [last[f"delayed, seed {n}"] for n in (1, 2)]
    shifts = [a - b for a, b in zip(shifts, plain, strict=True)]
    steps, mean, spread, shift, *_ = lines[-1].split()
    assert (int(steps), float(mean)) == (4, pytest.approx(sum(plain) / 2, abs=1e-5))
    assert float(spread) == pytest.approx(abs(plain[0] - plain[1]), abs=1e-5)
    assert float(shift) == pytest.approx(sum(shifts) / 2, abs=1e-5)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "program",
    "loss_parity.py fp8_accuracy.py stop_and_resume.py throughput.py scaling.py simulation.py sampling.py".split(),
)
def test_a_mistake_is_answered_in_a_line(program: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / program, "nope.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "nope.py: no such config file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("file", "problem"), [("nowhere/x.png", ": there is no folder nowhere"), (".", " is a folder")])
@pytest.mark.parametrize(("program", "option"), WRITERS)
def test_what_could_not_be_written_is_said_before_any_work(
    program: str, option: str, file: str, problem: str, tmp_path: Path
) -> None:
    """Nothing is measured, as nothing has imported torch: minutes later the figures would be lost."""
    command = [sys.executable, "-X", "importtime", ROOT / "benchmarks" / program, f"{option}={file}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "command_line" in imported and "torch" not in imported
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert done.stderr.endswith(f"error: argument {option}: {file}{problem}\n")
