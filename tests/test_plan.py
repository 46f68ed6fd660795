"""--plan: what it prints, without torch and at once; and the start report's share of it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import plan
from configurator import ROOT, UserError, load_config
from fp8 import choose_fp8
from kernels import REFERENCE
from memory import GIB, predict_memory, settled
from parallel import Ranks
from tiny_runs import Runs, write_dataset

LLAMA = ["config/full_llama_1.36b.py", "--gpu=H200"]


def planned(*argv: str) -> str:
    return plan.plan_text(load_config([*LLAMA, *argv]))


def figure(text: str, name: str) -> float:
    found = re.search(rf"^{name} +([\d,.]+)$", text, flags=re.M)
    assert found, text
    return float(found[1].replace(",", ""))


def test_a_plan_needs_no_torch_and_no_time(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')")
    before = os.times()
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *LLAMA, "--plan", "--num_gpus=4", "--use_fp8"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "1,294,159,104 parameters" in done.stdout and "4 x H200" in done.stdout
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp"])
def test_memory_is_the_predicted_one(strategy):
    row = next(line for line in planned("--num_gpus=8").splitlines() if line.startswith(strategy)).split()
    cfg = settled(load_config(LLAMA), "bfloat16", 8, 140)
    use = predict_memory(cfg, "bfloat16", strategy, 8)
    assert cfg.parallel.fsdp_accumulate_whole  # what a run on such a GPU does
    assert row[1:8] == [f"{value / GIB:.2f}" for value in vars(use).values()]
    assert row[8] == "yes"


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ("--num_gpus=2", "fsdp: exchanging once a step; "),
        ("--num_gpus=2", "parallel=auto takes ddp"),
        ("--num_gpus=2 --gradient_accumulation_steps=2 --use_fsdp", "fsdp: gathering weights for both passes at once; "),
        ("--num_gpus=8 --gpu=T4", "fsdp: exchanging in each micro-step, gathering weights for each pass; "),
        ("--num_gpus=8 --gpu=T4 --use_zero1", "parallel=zero1, as asked for"),
        ("--use_fsdp", "one process shards nothing by fsdp: --num_gpus=N plans for several"),
    ],
)
def test_what_the_strategies_do_is_said(knobs, line):
    assert f"\n{line}" in planned(*knobs.split())


@pytest.mark.parametrize(("gpu", "strategy"), [("H200", "ddp"), ("RTX 4090", "zero1"), ("T4", "fsdp"), ("V100", "ddp")])
def test_the_largest_batch_fits_and_the_next_does_not(gpu, strategy):
    knobs = ["--num_gpus=4", f"--gpu={gpu}"]
    row = next(line for line in planned(*knobs).splitlines() if line.startswith(strategy))
    largest = int(row.split()[-1])
    fits = [
        next(line for line in planned(*knobs, f"--batch_size={size}").splitlines() if line.startswith(strategy)).split()[-2]
        for size in (max(1, largest), largest + 1)
    ]
    assert fits == ["yes" if largest else "no", "no"]


def test_time_and_loss():
    """8.341 GF a token at half of 4 x 989.5 TFLOP/s are 237,253 tokens/s; L(N, D) at 6 B tokens is 2.77."""
    text = planned("--num_gpus=4")
    assert (figure(text, "steps"), figure(text, "tokens")) == (22_888, 22_888 * 262_144)
    assert figure(text, "tokens per s") == 237_253
    assert figure(text, "hours") == pytest.approx(22_888 * 262_144 / 237_253 / 3600, rel=1e-2)
    assert figure(planned("--num_gpus=4", "--plan_mfu=25"), "hours") == pytest.approx(2 * figure(text, "hours"), rel=1e-2)
    assert figure(text, "expected loss") == 2.77


@pytest.mark.parametrize("knob", ["--vocab_size=65", "--n_layer=1 --n_embd=36", "--max_iters=100"])
def test_no_loss_where_the_law_does_not_hold(knob):
    assert "expected loss" not in planned(*knob.split())


def test_epochs_of_prepared_data(tmp_path: Path) -> None:
    write_dataset(tmp_path / "words", "the cat sat on a mat " * 500, "one dog ran " * 300)
    text = planned(f"--data_dir={tmp_path}", "--dataset=words", "--vocab_size=0")
    tokens = 22_888 * 262_144
    assert figure(text, "epochs") == pytest.approx(tokens / 10_500, rel=1e-2)
    assert "not known" not in text


def test_what_is_not_prepared_is_said():
    text = planned("--dataset=openwebtext", "--vocab_size=0", "--data_dir=/nonexistent")
    assert "epochs are not known: /nonexistent/openwebtext has no train.bin" in text and "counts as 50,304" in text


def test_what_does_not_fit_names_what_does():
    text = planned("--gpu=RTX 4090", "--num_gpus=2")
    assert "what needs less" in text and "--gradient_checkpointing" in text


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("h200", "H200"),
        ("NVIDIA H200", "H200"),
        ("H100", "H100 80GB HBM3"),
        ("A10", "A10"),
        ("4090", "GeForce RTX 4090"),
        ("RTX4090", "GeForce RTX 4090"),
        ("rtx-4090", "GeForce RTX 4090"),
        ("a100 sxm4 80gb", "A100-SXM4-80GB"),
    ],
)
def test_names_of_gpus(asked, name):
    assert plan.find_gpu(asked) == name


def test_a_name_of_several_gpus_says_which_is_taken():
    assert "\nH100 is taken as H100 80GB HBM3; also known: H100 NVL, H100 PCIe\n" in planned("--gpu=H100")
    assert "is taken as" not in planned("--gpu=H200") + planned("--gpu=4090")


def test_without_a_name_the_gpu_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert plan.find_gpu("") == "H200"
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA L40S'\necho 'NVIDIA L40S'\n")
    driver.chmod(0o755)
    assert plan.find_gpu("") == "L40S"


@pytest.mark.parametrize("name", ["TPU", "H2000", "1", "100"])
def test_unknown_gpu(name):
    with pytest.raises(UserError, match=rf"--gpu={name}: .*known are .*H200.*T4") as error:
        planned(f"--gpu={name}")
    assert "\n" not in str(error.value)


def test_a_mistyped_gpu_is_told_the_nearest():
    with pytest.raises(UserError, match=r"--gpu=RTX 4900: .*; did you mean GeForce RTX 4090\? known are "):
        plan.find_gpu("RTX 4900")


def test_gpus_that_do_not_share_the_micro_steps_evenly():
    with pytest.raises(UserError, match="nearest: --gradient_accumulation_steps=15 and 18"):
        planned("--num_gpus=3")


@pytest.mark.parametrize("size", [3, 8])
def test_shards_that_do_not_divide_the_gpus(size):
    near = {3: "2 and 4", 8: "4"}[size]
    with pytest.raises(UserError, match=f"--hsdp_shard_size={size} does not divide --num_gpus=4; the nearest that do: {near}$"):
        planned("--num_gpus=4", f"--hsdp_shard_size={size}")


@pytest.mark.parametrize(("gpus", "rows"), [(1, ["ddp"]), (2, ["ddp", "zero1", "fsdp"])])
@pytest.mark.parametrize("gpu", ["H200", "T4"])
def test_only_what_so_many_gpus_can_run_has_a_row(gpus, rows, gpu):
    text = planned(f"--num_gpus={gpus}", f"--gpu={gpu}")
    assert re.findall(r"^(ddp|zero1|fsdp) ", text, flags=re.M) == rows
    assert ("fsdp" in text) == (gpus > 1)


@pytest.mark.parametrize(("asked", "says"), [("auto", True), ("fsdp", False), ("ddp", False)])
def test_what_auto_takes_is_said_where_auto_is_asked_for(asked, says):
    assert ("parallel=auto takes ddp" in planned("--num_gpus=4", f"--parallel={asked}")) == says


def test_a_dtype_that_the_gpu_has_not():
    with pytest.raises(UserError, match="Tesla T4 has no bfloat16; pass --dtype=float16"):
        planned("--gpu=T4", "--dtype=bfloat16")
    assert "1 x Tesla T4, float16" in planned("--gpu=T4", "--dtype=auto")


@pytest.mark.parametrize(
    ("knobs", "dtype", "reason"),
    [
        ("--gpu=A100-SXM4-80GB", "bfloat16", "A100-SXM4-80GB is older than Ada and Hopper; --fp8_emulate"),
        ("--gpu=V100", "float16", "Tesla V100-SXM2-16GB is older than Ada and Hopper; --fp8_emulate"),
        ("--gpu=T4 --fp8_emulate", "float16", "its products give float32 or bfloat16 and not float16; pass --dtype=float32"),
        ("--n_embd=2312 --n_head=17", "bfloat16", "n_embd=2,312, the width of qkv=6,936: must be a multiple of 16 for"),
        ("--n_embd=2320 --n_head=10 --fp8_recipe=block", "bfloat16", "n_embd=2,320, .*: must be a multiple of 128 for "),
        ("--gpu=L40S --fp8_recipe=block", "bfloat16", "blocks .* need Hopper and CUDA 12.9, not L40S; pass --fp8_recipe=delayed"),
    ],
)
def test_fp8_that_cannot_run_is_no_part_of_the_plan(knobs, dtype, reason):
    flags = ["--num_gpus=4", *knobs.split()]
    text = planned("--use_fp8", *flags)
    said = re.search(rf"^FP8 is left out, and products run in {dtype}: ({reason}.*)\n", text, flags=re.M)
    assert said, text
    assert text.replace(said[0], "") == planned(*(flag for flag in flags if flag != "--fp8_emulate"))
    with pytest.raises(UserError, match=f"^--fp8_required: {re.escape(said[1])}$"):
        planned("--use_fp8", "--fp8_required", *flags)


@pytest.mark.parametrize("knobs", ["--n_embd=2312 --n_head=17", "--n_embd=2320 --n_head=10 --fp8_recipe=block", "--block_size=9"])
def test_what_keeps_a_plan_from_fp8_keeps_a_run_from_it(knobs):
    """In the same words. What else it takes is a GPU, for which FP8 is emulated here."""
    cfg = load_config([*LLAMA, "--use_fp8", "--fp8_required", "--fp8_emulate", "--batch_size=1", *knobs.split()])
    with pytest.raises(UserError) as planned_error:
        plan.plan_text(cfg)
    with pytest.raises(UserError, match=f"^{re.escape(str(planned_error.value))}$"):
        choose_fp8(cfg, Ranks(0, 1, torch.device("cpu")), torch.bfloat16, REFERENCE)


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ("--gpu=L4", "FP8 is planned as bfloat16, which takes more time and keeps larger activations"),
        ("--gpu=H100 --fp8_recipe=block", "FP8 is planned as bfloat16, which takes more time and keeps larger activations"),
        ("--gpu=A100 --fp8_emulate", "FP8 is planned as bfloat16; emulated it takes far more time"),
    ],
)
def test_fp8_is_planned_as_what_it_replaces(knobs, line):
    assert f"\n{line}\n" in planned("--use_fp8", "--fp8_required", *knobs.split())


def test_a_vocabulary_that_the_data_goes_beyond(tmp_path: Path) -> None:
    write_dataset(tmp_path / "words", "the cat sat on a mat " * 500, "one dog ran " * 300)
    with pytest.raises(UserError, match="--vocab_size=3: words has 13 ids; pass at least that, or 0"):
        planned(f"--data_dir={tmp_path}", "--dataset=words", "--vocab_size=3")


def test_the_start_report_has_the_plan(tmp_path: Path) -> None:
    with Runs(tmp_path) as runs:
        runs.run("out", "--max_iters=2", "--run_name=mine", "--plan_mfu=40")
    section = json.loads((tmp_path / "out" / "run_mine.json").read_text())["startup_info"]["plan"]
    assert section["tokens"] == 256
    assert section["hours"] is None  # a CPU has no peak rate


def test_the_start_report_of_gpus():
    cfg = load_config([*LLAMA])
    section = plan.start_section(cfg, 10**10, 4 * 989.5, "bfloat16", 4)
    assert section["hours"] == 7.02 and section["expected_loss"] == 2.77
    peak = float(section["ddp_gib"].split("peak ")[1])
    assert math.isclose(peak, predict_memory(cfg, "bfloat16", "ddp", 4).peak / GIB, abs_tol=0.01)
