"""train.py as whole runs: exact sums, exact resumption after any end, exit codes, tiers, precisions."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import evaluation
import precision
import train
from configurator import ROOT, Config, load_config
from data.loader import SampleOrder
from data.tokens import load_dataset
from micro_step import missing_compiler
from model import Transformer
from optim import learning_rate
from startup import with_vocabulary
from tiny_runs import Runs

SAMPLES_PER_STEP, BLOCK_SIZE = 8, 16
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    with Runs(tmp_path) as runs:
        yield runs


def resolved(runs: Runs, *flags: str) -> Config:
    cfg = load_config(runs.argv("out", *flags))
    return with_vocabulary(cfg, load_dataset(cfg.data, cfg.model.block_size))


def assert_equal_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and len(one) > 0
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_is_what_twenty_plain_lines_compute(runs: Runs) -> None:
    """Loss, gradient norm and learning rate of every step against a loop of textbook parts: nothing fused, nothing guarded."""
    runs.run("out", "--gradient_log_interval=1", "--grad_clip=0.6", "--weight_decay=0.3")
    cfg = resolved(runs, "--grad_clip=0.6")
    tokens = torch.from_numpy(load_dataset(cfg.data, BLOCK_SIZE).train.astype(np.int64))
    order = SampleOrder(len(tokens), BLOCK_SIZE, cfg.run.seed)
    model = Transformer(cfg.model)
    model.init_weights(cfg.run.seed)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False, fused=False)
    for record in runs.log("out")["training_iterations"]:
        step = record["iter"] - 1
        starts = order.starts(np.arange(step * SAMPLES_PER_STEP, (step + 1) * SAMPLES_PER_STEP))
        windows = torch.stack([tokens[start : start + BLOCK_SIZE + 1] for start in starts])
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        moments = torch.std_mean(torch.cat([p.grad.flatten() for p in model.parameters()]), correction=0)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.6)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, cfg.optim)
        adamw.step()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert record["gradients"]["global_norm"] == pytest.approx(norm.item(), rel=1e-2)
        assert record["gradients"]["grad_std"] == pytest.approx(moments[0].item(), rel=1e-2)
        assert record["gradients"]["grad_mean"] == pytest.approx(moments[1].item(), abs=1e-5)
        assert record["lr"] == learning_rate(step, cfg.optim)
        assert record["tokens"] == (step + 1) * SAMPLES_PER_STEP * BLOCK_SIZE
    assert step == 19


def test_golden_losses(runs: Runs) -> None:
    """Numbers of an earlier day: whoever changes initialisation, sample order or arithmetic changes them, and says so here."""
    runs.run("out", "--max_iters=60", "--position_encoding=rope", "--normalization=rmsnorm", "--ffn_type=swiglu")
    losses = runs.losses("out")
    golden = {1: 2.92079, 10: 2.41941, 30: 1.80493, 60: 1.36237}
    assert {step: losses[step] for step in golden} == pytest.approx(golden, abs=2e-3)


def test_micro_batches_only_share_the_work(runs: Runs) -> None:
    splits = {"4x2": (4, 2), "8x1": (8, 1), "2x4": (2, 4), "1x8": (1, 8)}
    for name, (batch_size, micro_steps) in splits.items():
        runs.run(name, f"--batch_size={batch_size}", f"--gradient_accumulation_steps={micro_steps}")
    expected = runs.losses("4x2")
    for name in splits:
        assert runs.losses(name) == pytest.approx(expected, rel=2e-5), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_what_float32_learns(runs: Runs, dtype: str) -> None:
    for name in ("float32", dtype):
        runs.run(name, f"--dtype={name}", "--max_iters=60")
    exact, rounded = runs.losses("float32"), runs.losses(dtype)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded[60] < 0.75 * rounded[1]
    assert all(t.dtype == torch.float32 for t in runs.tensors(dtype).values())


def test_evaluation_and_sampling_leave_training_alone(runs: Runs) -> None:
    noise = "--dropout=0.2"
    runs.run("quiet", noise)
    output = runs.run("busy", noise, "--eval_interval=1", "--sample_interval=1", "--sample_prompt=the", "--sample_tokens=8")
    assert runs.losses("busy") == runs.losses("quiet")
    assert_equal_bits(runs.tensors("busy"), runs.tensors("quiet"))
    samples = [event for event in runs.log("busy")["events"] if event["kind"] == "sample"]
    assert [event["iter"] for event in samples] == list(range(1, 21))
    assert all(event["text"].startswith("the") and len(event["text"]) == 3 + 8 for event in samples)
    assert "sample at step 20:\nthe" in output


def test_an_evaluation_is_the_mean_over_the_whole_split(runs: Runs) -> None:
    runs.run("out", "--eval_interval=20", "--eval_iters=0", "--dropout=0.3")
    cfg = resolved(runs, "--dropout=0.3")
    dataset = load_dataset(cfg.data, BLOCK_SIZE)
    model = Transformer(cfg.model).eval()
    model.load_state_dict({name.removeprefix("model."): t for name, t in runs.checkpoint("out").read_tensors().items()})
    ids = torch.from_numpy(dataset.val.astype(np.int64))
    total = 0.0
    for start in range(0, len(ids) - 1, BLOCK_SIZE):
        window = ids[start : start + BLOCK_SIZE + 1]
        with torch.no_grad():
            total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    loss = total / (len(ids) - 1)
    evaluation = runs.log("out")["eval_steps"][-1]
    assert (evaluation["iter"], len(runs.log("out")["eval_steps"])) == (20, 2)
    assert evaluation["val_loss"] == pytest.approx(loss, rel=1e-6)
    text = (runs.folder / "data" / "tiny" / "val.txt").read_text()
    assert len(text.encode()) > len(text)
    assert evaluation["val_bits_per_byte"] == pytest.approx(loss / math.log(2) * len(text) / len(text.encode()), rel=1e-6)


def test_eval_only_reads_and_reports(runs: Runs) -> None:
    trained = runs.run("out", "--eval_interval=20", "--eval_iters=3", "--run_name=mine")
    before = {path: path.read_bytes() for path in (runs.folder / "out").rglob("*") if path.is_file()}
    output = runs.run("out", "--init_from=resume", "--eval_only=True", "--eval_iters=3", "--run_name=mine")
    (line,) = (line for line in trained.splitlines() if line.startswith("step 20: train loss"))
    assert line in output.splitlines() and "Iter" not in output
    after = {path: path.read_bytes() for path in (runs.folder / "out").rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} == {"run_eval_mine.json", "run_eval_mine.log"}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_and_plain_agree(runs: Runs) -> None:
    flags = ("--max_iters=4", "--n_layer=1", "--eval_interval=4", "--eval_iters=2", "--batch_size=2")
    output = runs.run("compiled", "--compile=True", *flags)
    runs.run("plain", *flags)
    assert "compiled in " in output
    assert runs.losses("compiled") == pytest.approx(runs.losses("plain"), rel=1e-4)
    for kind in ("train_loss", "val_loss"):
        of = {name: [e[kind] for e in runs.log(name)["eval_steps"]] for name in ("compiled", "plain")}
        assert of["compiled"] == pytest.approx(of["plain"], rel=1e-4)


@pytest.mark.parametrize(("device", "compiler"), [("cpu", "a C++ compiler"), ("cuda", "a C compiler")])
def test_a_missing_compiler_is_known_before_compiling(device: str, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    assert missing_compiler(torch.device(device)) == compiler
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setenv("CXX", sys.executable)
    assert missing_compiler(torch.device(device)) is None


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and resumed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["--device=cpu", pytest.param("--device=cuda --deterministic", marks=gpu)])
def test_stopped_at_five_random_places_and_resumed_bit_for_bit(runs: Runs, where: str) -> None:
    """150 steps over five epochs, with dropout and accumulation; most signals find a checkpoint or an evaluation under way."""
    knobs = f"--max_iters=150 --dropout=0.1 --eval_interval=10 --eval_iters=0 {where}".split()
    runs.run("whole", *knobs)
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    stops = []
    for number in range(5):
        process = runs.start("stopped", *knobs, "--resume=latest", f"--checkpoint_interval={draw.choice([1, 5])}")
        step = 20 * number + draw.randrange(1, 20)
        process.wait_for(f"Iter {step} |")
        time.sleep(draw.random() / 100)
        process.send(signal.SIGTERM)
        assert process.wait() == 143, process.output
        stops.append(runs.checkpoint("stopped").iter)
        assert step <= stops[-1] < 150
    runs.run("stopped", *knobs, "--resume=latest")

    print(f"seed {seed}, stopped after steps {stops}")
    assert_equal_bits(runs.tensors("stopped"), runs.tensors("whole"))
    states = {name: runs.checkpoint(name).state for name in ("stopped", "whole")}
    assert states["stopped"]["counters"] == states["whole"]["counters"]
    assert states["stopped"]["counters"]["samples"] == 150 * SAMPLES_PER_STEP
    assert states["stopped"]["rng"] == states["whole"]["rng"]
    assert runs.losses("stopped") == runs.losses("whole") and len(runs.losses("whole")) == 150
    assert evaluations(runs, "stopped") == evaluations(runs, "whole")
    assert runs.tiers("stopped")["best_model"] == runs.tiers("whole")["best_model"]


def evaluations(runs: Runs, out_dir: str) -> list[tuple[int, float, float]]:
    return [(e["iter"], e["train_loss"], e["val_loss"]) for e in runs.log(out_dir)["eval_steps"]]


def test_an_evaluation_cut_short_is_made_up_for_once(runs: Runs) -> None:
    knobs = "--max_iters=30 --eval_interval=10 --eval_iters=0 --dropout=0.1 --checkpoint_interval=1000".split()
    runs.run("whole", *knobs)
    process = runs.start("stopped", *knobs, prepare=dawdle_in_evaluations)
    process.wait_for("Iter 20 |")
    time.sleep(0.2)
    process.send(signal.SIGTERM)
    assert process.wait() == 143
    assert runs.checkpoint("stopped").iter == 20
    assert [e[0] for e in evaluations(runs, "stopped")] == [0, 10]

    process = runs.start("stopped", *knobs, "--resume=latest", prepare=dawdle_in_evaluations)
    process.wait_for("checkpoint latest at step 20")  # the evaluation of step 20 is done, and that it is done is saved
    process.send(signal.SIGKILL)
    process.wait()
    runs.run("stopped", *knobs, "--resume=latest")
    assert evaluations(runs, "stopped") == evaluations(runs, "whole")
    assert runs.tiers("stopped")["best_model"] == runs.tiers("whole")["best_model"]
    assert runs.losses("stopped") == runs.losses("whole")


def dawdle_in_evaluations() -> None:
    """After step 0, half a second for every evaluation of a split."""
    batches = evaluation.evaluation_batches

    def slowly(*args: object) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, batch in enumerate(batches(*args)):
            if number < 10:
                time.sleep(0.05)
            yield batch

    evaluation.evaluation_batches = slowly


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0), (signal.SIGUSR1, 0)])
def test_a_signal_saves_and_ends_the_run(runs: Runs, number: signal.Signals, exit_code: int) -> None:
    process = runs.start("out", "--max_iters=1000000", "--checkpoint_minutes=0")
    process.wait_for("Iter 5 |")
    process.send(number)
    assert process.wait() == exit_code
    last = runs.log("out")["training_iterations"][-1]["iter"]
    assert runs.tiers("out") == {"latest": last} and last >= 5
    assert runs.log("out")["summary"]["status"] == number.name


def test_max_hours_saves_and_ends_the_run(runs: Runs) -> None:
    runs.run("out", "--max_iters=1000000", f"--max_hours={0.5 / 3600}")
    last = runs.log("out")["training_iterations"][-1]["iter"]
    assert runs.tiers("out")["latest"] == last > 1
    assert runs.log("out")["summary"]["status"].startswith("max_hours")


def test_a_second_signal_does_not_wait(runs: Runs) -> None:
    process = runs.start("out", "--sample_interval=1", "--sample_prompt=a", "--sample_tokens=10000000")
    process.wait_for("Iter 1 |")
    process.send(signal.SIGTERM)
    process.wait_for("SIGTERM: finishing the step")
    process.send(signal.SIGTERM)
    assert process.wait(timeout_s=5) == 143
    assert runs.tiers("out") == {}


def test_killed_and_resumed(runs: Runs) -> None:
    knobs = "--max_iters=60 --dropout=0.1 --checkpoint_interval=10".split()
    runs.run("whole", *knobs)
    process = runs.start("killed", *knobs)
    process.wait_for("checkpoint latest at step 20")
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    steps = len(runs.log("killed")["training_iterations"])  # the document is whole
    resumed = runs.checkpoint("killed").iter
    assert 20 <= resumed <= steps < 60
    runs.run("killed", *knobs, "--resume", "latest")
    assert_equal_bits(runs.tensors("killed"), runs.tensors("whole"))
    assert runs.losses("killed") == runs.losses("whole")


def test_train_py_as_a_command(runs: Runs) -> None:
    """The real thing once: interpreter, imports, main, signal, exit code, streams."""
    argv = runs.argv("out", "--max_iters=1000000", "--console=block")
    out = runs.folder / "stdout"
    with out.open("wb") as stdout:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *argv], stdout=stdout, stderr=subprocess.PIPE, cwd=runs.folder
        )
    while "Iter 3 |" not in out.read_text() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert stderr.decode() == "SIGTERM: finishing the step, then saving\n"
    assert "number of parameters: 0.01M" in out.read_text()
    assert "latest" in runs.tiers("out")


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite
# ---------------------------------------------------------------------------------------------------------------------


def test_weights_that_blow_up_end_the_run_with_code_3(runs: Runs) -> None:
    runs.run("out", "--max_iters=10")
    before = runs.tensors("out")
    blow_up = "--max_iters=100 --learning_rate=1e30 --decay_lr=False --max_skipped_steps=5 --checkpoint_interval=1000".split()
    output = runs.run("out", "--resume=latest", *blow_up, exit_code=3)
    assert "5 steps in a row had no finite gradient, the last at step 16" in output and "Traceback" not in output
    log = runs.log("out")
    assert [event["iter"] for event in log["events"] if event["kind"] == "skipped_step"] == [12, 13, 14, 15, 16]
    assert log["summary"]["status"].startswith("NonFiniteRun") and log["summary"]["skipped_steps"] == 4
    assert_equal_bits(runs.tensors("out"), before)
    runs.run("out", "--resume=latest", "--max_iters=20")
    assert all(math.isfinite(loss) for loss in runs.losses("out").values())


def try_a_larger_scale_every_step() -> None:
    precision.LossScale.GROWTH_INTERVAL = 1


def test_a_skipped_step_changes_nothing_but_the_loss_scale(runs: Runs) -> None:
    knobs = "--dtype=float16 --max_iters=12 --rolling_interval=1 --keep_rolling=99".split()
    runs.run("out", *knobs, prepare=try_a_larger_scale_every_step)
    skipped = [event["iter"] for event in runs.log("out")["events"] if event["kind"] == "skipped_step"]
    assert skipped and len(skipped) < 11
    before = runs.tensors("out", "rolling_step_1")
    for step in range(2, 13):
        after = runs.tensors("out", f"rolling_step_{step}")
        scale_before, scale = (float(tensors.pop("loss_scale.scale")) for tensors in (dict(before), dict(after)))
        changed = {name for name in after if not name.startswith("loss_scale") and not torch.equal(before[name], after[name])}
        assert scale == scale_before * (0.5 if step in skipped else 2.0)
        assert bool(changed) == (step not in skipped)
        before = after
    assert runs.checkpoint("out").state["counters"]["skipped"] == len(skipped)


def test_the_loss_scale_survives_a_resume(runs: Runs) -> None:
    knobs = ("--dtype=float16", "--dropout=0.1")
    runs.run("whole", *knobs, prepare=try_a_larger_scale_every_step)
    runs.run("stopped", *knobs, "--max_iters=9", prepare=try_a_larger_scale_every_step)
    runs.run("stopped", *knobs, "--resume=latest", prepare=try_a_larger_scale_every_step)
    assert runs.tensors("whole")["loss_scale.scale"] != 2.0**16
    assert_equal_bits(runs.tensors("stopped"), runs.tensors("whole"))


@pytest.mark.parametrize(("dtype", "then"), [("float16", "bfloat16"), ("float32", "float16")])
def test_a_run_may_go_on_in_another_dtype(runs: Runs, dtype: str, then: str) -> None:
    runs.run("out", f"--dtype={dtype}", "--max_iters=10")
    runs.run("out", f"--dtype={then}", "--resume=latest")
    assert runs.losses("out")[20] < runs.losses("out")[10] < runs.losses("out")[1]
    assert ("loss_scale.scale" in runs.tensors("out")) == (then == "float16")


# ---------------------------------------------------------------------------------------------------------------------
# Tiers
# ---------------------------------------------------------------------------------------------------------------------


def test_tiers(runs: Runs) -> None:
    """An epoch is 25.4 steps: the data starts again in steps 26 (epoch 1), 51 (2) and 77 (3)."""
    knobs = "--max_iters=90 --checkpoint_interval=20 --rolling_interval=10 --keep_rolling=2 --keep_epochs=2".split()
    runs.run("out", *knobs, "--eval_interval=30", "--eval_iters=2")
    best = min(runs.log("out")["eval_steps"], key=lambda e: e["val_loss"])["iter"]
    whole = {"latest": 90, "latest_backup": 80, "rolling_step_80": 80, "rolling_step_90": 90, "best_model": best}
    assert runs.tiers("out") == whole | {"epoch_2": 51, "epoch_3": 77}
    saved = {(record["tier"], record["iter"]) for record in runs.log("out")["checkpoints"]}
    assert {("epoch_1", 26), ("rolling_step_10", 10), ("latest", 20), ("latest", 90)} <= saved


def test_epochs_closer_together_than_checkpoint_interval_are_passed_over(runs: Runs) -> None:
    runs.run("out", "--max_iters=115", "--checkpoint_interval=40")
    assert runs.tiers("out") == {"latest": 115, "latest_backup": 80, "epoch_2": 51, "epoch_4": 102}


def test_only_the_best_and_the_last(runs: Runs) -> None:
    knobs = "--always_save_checkpoint=False --checkpoint_interval=5 --rolling_interval=5 --eval_interval=10 --max_iters=60"
    runs.run("out", *knobs.split())
    assert runs.tiers("out").keys() == {"latest", "best_model"}
    assert {record["tier"] for record in runs.log("out")["checkpoints"] if record["iter"] < 60} == {"best_model"}


def test_nothing_is_saved_where_nothing_shall_be(runs: Runs) -> None:
    output = runs.run("out", "--save_checkpoints=False", "--eval_interval=10", "--checkpoint_interval=5")
    assert "what is trained ends with this run" in output and not list((runs.folder / "out").glob("checkpoints*/*"))
    assert runs.log("out")["checkpoints"] == []
    runs.run("saved", "--max_iters=5")
    runs.run("saved", "--max_iters=3", "--save_checkpoints=False")
    assert runs.tiers("saved") == {"latest": 5}


def test_a_latest_of_an_earlier_process_does_not_outlive_a_newer_best(runs: Runs) -> None:
    knobs = "--always_save_checkpoint=False --eval_interval=10".split()
    runs.run("out", *knobs, "--max_iters=5")
    runs.start("out", *knobs, "--max_iters=100000", "--resume=latest").wait_for("checkpoint latest at step 20")
    assert runs.tiers("out")["latest"] >= 20


def test_going_on_under_the_name_of_another_run_keeps_its_log(runs: Runs) -> None:
    runs.run("out", "--run_name=first")
    runs.run("out", "--run_name=second", "--max_iters=4")
    before = (runs.folder / "out" / "run_first.json").read_bytes()
    runs.run("out", "--run_name=first", "--max_iters=6", "--resume=latest")
    assert (runs.folder / "out" / "run_first.json.1").read_bytes() == before
    (log,) = (path for path in (runs.folder / "out").glob("run_first.json"))
    assert [record["iter"] for record in json.loads(log.read_text())["training_iterations"]] == [5, 6]


def test_minutes_between_checkpoints(runs: Runs) -> None:
    runs.run("out", "--max_iters=100", f"--checkpoint_minutes={0.05 / 60}")
    saved = [record["iter"] for record in runs.log("out")["checkpoints"] if record["tier"] == "latest"]
    assert 1 < len(saved) < 90 and saved[-1] == 100


def test_from_scratch_sets_an_earlier_run_aside(runs: Runs) -> None:
    runs.run("out", "--run_name=first", "--checkpoint_interval=10")
    before = runs.tensors("out")
    output = runs.run("out", "--run_name=second", "--seed=7")
    aside = runs.folder / "out" / "checkpoints.first"
    assert f"the checkpoints of run first are now in {aside}" in output
    assert {path.name for path in aside.iterdir()} == {"latest", "latest_backup"}
    assert runs.tiers("out") == {"latest": 20}
    assert_equal_bits(runs.tensors("out", str(aside / "latest")), before)
    assert {path.name for path in (runs.folder / "out").glob("run_*.json")} == {"run_first.json", "run_second.json"}


def test_resume_latest_with_nothing_saved_starts_from_scratch(runs: Runs) -> None:
    runs.run("plain")
    output = runs.run("plian", "--resume=latest")
    assert "nothing saved" in output and f"starting from scratch; there are checkpoints in {runs.folder / 'plain'}\n" in output
    assert runs.losses("plian") == runs.losses("plain")


def test_resuming_a_finished_run_says_that_nothing_is_left(runs: Runs) -> None:
    assert "nothing left" not in runs.run("out", "--max_iters=4") + runs.run("out", "--max_iters=6", "--resume=latest")
    before = runs.losses("out")
    output = runs.run("out", "--max_iters=6", "--resume=latest")
    assert "nothing left to do: step 6 of --max_iters=6; a larger --max_iters goes on" in output
    assert runs.losses("out") == before


def test_going_back_to_an_older_tier_makes_it_the_latest(runs: Runs) -> None:
    """Whatever happens next, `--resume latest` goes on from there and not from the steps that were given up."""
    runs.run("out", "--max_iters=30", "--rolling_interval=10")
    runs.run("out", "--max_iters=10", "--resume=rolling_step_10")
    assert runs.tiers("out")["latest"] == 10 and len(runs.losses("out")) == 10
    runs.run("out", "--max_iters=30", "--resume=latest", "--seed=1337")
    runs.run("plain", "--max_iters=30")
    assert runs.losses("out") == runs.losses("plain")


def test_going_on_from_another_run(runs: Runs) -> None:
    """`--resume=PATH` takes the steps of another out_dir along; what lay here before is set aside."""
    runs.run("out", "--run_name=first")
    runs.run("here", "--run_name=second", "--max_iters=4")
    runs.run("here", "--run_name=third", f"--resume={runs.folder / 'out' / 'checkpoints' / 'latest'}")
    assert runs.tiers("here") == {"latest": 20}
    assert_equal_bits(runs.tensors("here"), runs.tensors("out"))
    relative = os.path.relpath(runs.folder / "here" / "checkpoints" / "latest", "/")
    runs.run("here", f"--resume={relative}", "--max_iters=22", prepare=stand_in_the_root)
    assert runs.tiers("here") == {"latest": 22, "latest_backup": 20}
    assert {path.name for path in (runs.folder / "here").glob("checkpoints*")} == {"checkpoints", "checkpoints.second"}


def stand_in_the_root() -> None:
    os.chdir("/")


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------------


@gpu
def test_a_step_does_not_wait_for_the_gpu(runs: Runs) -> None:
    runs.run("out", "--device=cuda", "--gradient_log_interval=1", "--log_interval=3", prepare=forbid_waiting_in_steps)
    assert runs.log("out")["training_iterations"][-1]["iter"] == 20


def forbid_waiting_in_steps() -> None:
    """From the third step on, whatever synchronises in train_step raises: the first ones initialise libraries."""
    train_step = train.train_step

    def strict_step(run: train.Run) -> None:
        torch.cuda.set_sync_debug_mode("error" if run.state.step >= 2 else "default")
        train_step(run)
        torch.cuda.set_sync_debug_mode("default")

    train.train_step = strict_step


@gpu
def test_the_peak_is_the_gpus_own(runs: Runs) -> None:
    for dtype, short in (("bfloat16", "bf16"), ("float32", "tf32")):
        output = runs.run(dtype, "--device=cuda", f"--dtype={dtype}", "--max_iters=2")
        hardware = runs.log(dtype)["startup_info"]["hardware"]
        if hardware["peak_tflops"] is None:
            pytest.skip(f"{hardware['device']} is not in the table of peaks")
        name = hardware["device"].removeprefix("NVIDIA ")
        assert f"Hardware peak: {hardware['peak_tflops']:g} TFLOPS ({name} {short})" in output
