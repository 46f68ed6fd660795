"""ddp, zero1 and fsdp: the same losses on any number of ranks, checkpoints that any set-up resumes, one end for all ranks.

Over gloo on the CPU; where there are as many GPUs as ranks, over NCCL too.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import checkpoint
import checkpoint_files
import evaluation
import sharding
import train
from checkpoint_files import open_checkpoint
from configurator import ROOT, Fp8Config, load_config
from exchange import own_rows
from fp8 import Fp8
from kernels import REFERENCE
from layout import Layout
from memory import USABLE, predict_memory
from model import build_model
from optim import Gradients, build_optimizer, optimizer_tensors, update
from parallel import Ranks, start_ranks
from precision import LossScale, autocast
from sharding import DataParallelBehind, ReduceScatterByCopies, choose_layout, put_rows
from startup import TrainState
from tiny_runs import LLAMA, Runs, nothing

STRATEGIES = ("ddp", "zero1", "fsdp")
# 8 micro-steps for 1, 2, 4 and 8 ranks, which cannot share the embedding's 27 rows evenly. The width is a multiple of what a CPU
# adds at a time: it computes the rest at the end of a tensor by other instructions, which round differently.
SHAPE = "--gradient_accumulation_steps=8 --n_layer=2 --n_head=3 --n_embd=48 --vocab_size=27 --fsdp_min_num_params=0".split()
STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    with Runs(tmp_path_factory.mktemp("sharding")) as runs:
        yield runs


@pytest.fixture(scope="module")
def saved(runs: Runs) -> dict[tuple[int, str], str]:
    """out_dir by (ranks, strategy) of twelve runs of STEPS steps, each with its checkpoint."""
    flags = [*SHAPE, f"--max_iters={STEPS}"]
    for strategy in STRATEGIES:
        runs.run(f"1-{strategy}", *flags, f"--parallel={strategy}")
        for n in (2, 4, 8):
            runs.run_ranks(n, f"{n}-{strategy}", *flags, f"--parallel={strategy}")
    return {(n, strategy): f"{n}-{strategy}" for n in (1, 2, 4, 8) for strategy in STRATEGIES}


@pytest.mark.parametrize("n", [2, 4, 8])
def test_zero1_is_bitwise_ddp(n: int, runs: Runs, saved: dict[tuple[int, str], str]) -> None:
    assert runs.losses(saved[n, "zero1"]) == runs.losses(saved[n, "ddp"])
    ddp, zero1 = runs.tensors(saved[n, "ddp"]), runs.tensors(saved[n, "zero1"])
    assert ddp.keys() == zero1.keys() and all(torch.equal(ddp[name], zero1[name]) for name in ddp)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_do_not_depend_on_the_ranks(n: int, strategy: str, runs: Runs, saved: dict[tuple[int, str], str]) -> None:
    alone, together = (runs.log(saved[key])["training_iterations"] for key in ((1, "ddp"), (n, strategy)))
    for one, many in zip(alone, together, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert many["gradients"]["global_norm"] == pytest.approx(one["gradients"]["global_norm"], rel=1e-5)
        assert many["tokens"] == one["tokens"]
    assert "ranks" not in together[0] and all(record["ranks"]["slowest_ms"] > 0 for record in together[1:])


def test_fsdp_is_ddp_but_for_rounding(runs: Runs) -> None:
    for strategy in ("ddp", "fsdp"):
        runs.run_ranks(4, f"20-steps-{strategy}", *SHAPE, "--max_iters=20", f"--parallel={strategy}")
    ddp, fsdp = (list(runs.losses(f"20-steps-{strategy}").values()) for strategy in ("ddp", "fsdp"))
    assert len(fsdp) == 20 and fsdp == pytest.approx(ddp, rel=1e-6)


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_draw_different_random_numbers(n: int, runs: Runs, saved: dict[tuple[int, str], str]) -> None:
    """Dropout must not be the same on all."""
    generators = runs.checkpoint(saved[n, "ddp"]).state["rng"]
    assert len({generators[str(rank)]["cpu"] for rank in range(n)}) == n


@pytest.mark.parametrize(
    "knob",
    [
        "hsdp_shard_size=2",
        "hsdp_shard_size=2 --fsdp_accumulate_whole",
        "fsdp_accumulate_whole=True",
        "fsdp_reshard_after_forward=False",
        "fsdp_min_num_params=1e9",
    ],
)
def test_fsdp_by_other_knobs(knob: str, runs: Runs, saved: dict[tuple[int, str], str]) -> None:
    """The same losses; and what four ranks have saved, one alone goes on with."""
    n, out_dir = (4 if "hsdp" in knob else 2), knob.replace(" ", "")
    output = runs.run_ranks(n, out_dir, *SHAPE, "--use_fsdp", *f"--{knob}".split(), f"--max_iters={STEPS}")
    assert "Wrapping model with FSDP..." in output and "FSDP enabled with min_params=" in output
    # The others keep weights for all micro-steps.
    gathers = {"fsdp_reshard_after_forward=False": ["for both passes at once"], "hsdp_shard_size=2": ["for each pass"]}
    assert re.findall("gathering weights (.*)$", output, flags=re.M) == gathers.get(out_dir, [])
    assert list(runs.losses(out_dir).values()) == pytest.approx(list(runs.losses(saved[1, "ddp"]).values()), rel=1e-6)
    runs.run(out_dir, *SHAPE, f"--max_iters={STEPS + 1}", "--resume=latest")


def losses_and_norms(log: dict[str, Any]) -> tuple[list[float], list[float]]:
    records = log["training_iterations"]
    return [record["loss"] for record in records], [record["gradients"]["global_norm"] for record in records]


def test_fsdp_adds_up_bfloat16_in_float32(runs: Runs) -> None:
    """Once a step, or in each micro-step: the gradients of the same products, and their sums in another order."""
    flags = [*SHAPE, "--use_fsdp", "--dtype=bfloat16", "--max_iters=3"]
    for whole in (True, False):
        runs.run_ranks(2, f"whole-{whole}", *flags, f"--fsdp_accumulate_whole={whole}")
    losses, norms = zip(*(losses_and_norms(runs.log(f"whole-{whole}")) for whole in (True, False)), strict=True)
    assert losses[0][0] == losses[1][0] and norms[0][0] == pytest.approx(norms[1][0], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class SaysSo(DataParallelBehind):
    def gradients(self) -> Gradients:
        print("all together")
        return super().gradients()


def exchange_behind() -> None:
    """What a rank becomes before it starts: one of ddp whose micro-steps would be replayed, were this a GPU."""
    sharding.LAYOUTS["ddp"] = SaysSo


@pytest.mark.parametrize(("dtype", "micro_steps"), [("float32", 2), ("bfloat16", 2), ("bfloat16", 4)])
def test_gradients_that_are_exchanged_behind_the_backward_pass(dtype: str, micro_steps: int, runs: Runs) -> None:
    """Bitwise as within it, where they are not clipped: their norm is summed in another order."""
    micro = f"--gradient_accumulation_steps={micro_steps}"
    flags = [*SHAPE, f"--dtype={dtype}", micro, "--parallel=ddp", "--max_iters=4", "--grad_clip=0"]
    names = [f"{where}-{dtype}-{micro_steps}" for where in ("within", "behind")]
    runs.run_ranks(2, names[0], *flags)
    processes = runs.start_ranks(2, names[1], *flags, prepare=[exchange_behind] * 2)
    assert [process.wait() for process in processes] == [0, 0], processes[0].output
    assert processes[1].output.count("all together") == 4
    (losses, norms), (losses_behind, norms_behind) = map(losses_and_norms, map(runs.log, names))
    assert losses == losses_behind and norms == pytest.approx(norms_behind, rel=1e-5)
    within, behind = map(runs.tensors, names)
    assert all(torch.equal(within[name], behind[name]) for name in within)


def resume_all(argv: list[str]) -> None:
    """On every rank of a launch: resumes each checkpoint with each strategy, and compares what the rank holds, bit by bit."""
    with ExitStack() as stack:
        cfg = load_config(argv)
        ranks = start_ranks(cfg.run, cfg.parallel, stack)
        for folder, strategy in itertools.product(sorted(Path(cfg.run.out_dir).parent.glob("?-*")), STRATEGIES):
            saved = open_checkpoint(folder / "checkpoints" / "latest")
            _, layout, _ = choose_layout(replace(cfg, parallel=replace(cfg.parallel, parallel=strategy)), ranks, torch.float32)
            model = build_model(cfg.model, ranks.device, 0, shard=layout.shard, put=put_rows)
            layout.attach(model)
            optimizer = build_optimizer(layout.rows.values(), cfg.optim, REFERENCE.AdamW, layout.rounded)
            state = TrainState(model, layout, optimizer, LossScale(torch.float32, ranks.device), Fp8(Fp8Config()), ranks, "")
            state.restore(saved)
            layout.settle()
            expected = saved.read_tensors(saved.metadata.state_dict_metadata)
            for name, piece, _ in state.held():
                rows = expected[name][piece.first_row :][: len(piece.rows)] if piece.shape else expected[name]
                assert torch.equal(piece.rows, rows), (folder, strategy, name)
            if strategy == "zero1":  # holds all of the weights
                assert all(torch.equal(p, expected[f"model.{name}"]) for name, p in model.named_parameters())
            assert (state.step, state.samples) == (STEPS, STEPS * cfg.data.batch_size * cfg.data.gradient_accumulation_steps)
            print(f"{folder.name} by {strategy}: same")


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_every_checkpoint_resumes_everywhere(n: int, runs: Runs, saved: dict[tuple[int, str], str]) -> None:
    """144 pairs in all: twelve checkpoints, each by three strategies on 1, 2, 4 and 8 ranks."""
    output = runs.run_ranks(n, f"resume-{n}", *SHAPE, main=resume_all)
    assert output.count(": same") == n * len(saved) * len(STRATEGIES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_run(dtype: str, runs: Runs) -> None:
    """Bitwise, dropout and all: the random numbers of every rank go on where they were."""
    flags = [*SHAPE, "--parallel=zero1", "--dropout=0.1", f"--dtype={dtype}"]
    runs.run_ranks(2, f"whole-{dtype}", *flags, "--max_iters=6")
    runs.run_ranks(2, f"parts-{dtype}", *flags, "--max_iters=3")
    runs.run_ranks(2, f"parts-{dtype}", *flags, "--max_iters=6", "--resume=latest")
    assert runs.losses(f"parts-{dtype}") == runs.losses(f"whole-{dtype}")
    parts, whole = runs.tensors(f"parts-{dtype}"), runs.tensors(f"whole-{dtype}")
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert all(tensor.dtype == torch.float32 for tensor in whole.values())


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("architecture", [["--bias=True"], LLAMA, [*LLAMA, "--gradient_checkpointing"]], ids=str)
def test_masters_move_as_weights_under_autocast_do(architecture: list[str], micro_steps: int) -> None:
    """Bitwise, for some steps: losses, weights and AdamW's state. (Clipping has a norm in it, which adds up in another order.)"""
    cfg = load_config(["config/quickstart.py", *SHAPE, *architecture, "--grad_clip=0", "--dtype=bfloat16"])
    seen = []
    for dtype in (torch.float32, torch.bfloat16):  # of the layout: the first has no masters
        model = build_model(cfg.model, DEVICE, seed=0)
        layout = Layout(Ranks(0, 1, DEVICE), cfg.parallel, dtype)
        layout.attach(model)
        optimizer = build_optimizer(layout.rows.values(), cfg.optim, REFERENCE.AdamW, layout.rounded)
        generator, losses = torch.Generator().manual_seed(0), []
        for _ in range(4):
            for number in range(1, micro_steps + 1):
                idx = torch.randint(27, (2, 4, cfg.model.block_size), generator=generator).to(DEVICE)
                layout.begin(number, micro_steps)
                with autocast(DEVICE, torch.bfloat16):
                    losses.append(model(idx[0], idx[1]))
                losses[-1].backward()
            update(optimizer, cfg.optim, 1e-2, torch.ones((), device=DEVICE), True, layout.gradients())
            layout.finish()
        assert all(p.grad is None for p in model.parameters())
        state = optimizer_tensors({name: part.rows for name, part in layout.parts.items()}, optimizer)
        seen.append([*losses, *(part.rows for part in layout.parts.values()), *state.values()])
    assert all(map(torch.equal, *seen))
    products = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim > 1]
    assert products and {p.dtype for p in products} == {torch.bfloat16}
    assert {p.dtype for p in {*model.parameters()} - {*products}} == {torch.float32}
    assert all(torch.equal(part.parameter, part.rows.to(part.parameter.dtype)) for part in layout.parts.values())


def test_values_that_are_put_go_to_masters_and_weights() -> None:
    cfg = load_config(["config/quickstart.py", *SHAPE])
    model = build_model(cfg.model, DEVICE, seed=0)
    expected = {name: p.detach() + 0.001 for name, p in model.named_parameters()}
    layout = Layout(Ranks(0, 1, DEVICE), cfg.parallel, torch.bfloat16)
    layout.attach(model)
    for name, p in model.named_parameters():
        layout.put(p, expected[name])
    layout.round()
    for name, part in layout.parts.items():
        assert torch.equal(part.rows, expected[name]) and torch.equal(part.parameter, expected[name].to(part.parameter.dtype))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_that_starts_from_weights_has_them_everywhere(strategy: str, runs: Runs, saved: dict[tuple[int, str], str]) -> None:
    source = f"--init_from={runs.folder / saved[1, 'ddp']}"
    flags = [*SHAPE, "--dtype=bfloat16", "--max_iters=1", source]
    runs.run(f"from-alone-{strategy}", *flags)
    runs.run_ranks(2, f"from-{strategy}", *flags, f"--parallel={strategy}")
    alone, together = (runs.losses(f"from-{name}{strategy}")[1] for name in ("alone-", ""))
    assert together == pytest.approx(alone, rel=1e-4) and alone < 0.99 * runs.losses(saved[1, "ddp"])[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("precision", ["--dtype=float32", "--dtype=bfloat16", "--use_fp8"])
def test_two_gpus(precision: str, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, with the kernels chosen on a GPU: ddp, replayed and not, = zero1 = fsdp = one GPU, and any resumes any."""
    sizes = "--n_head=4 --n_embd=256 --batch_size=8 --normalization=rmsnorm --ffn_type=swiglu --position_encoding=rope".split()
    flags = [*SHAPE, *sizes, "--device=cuda", "--compile=True", "--deterministic", precision, "--rolling_interval=6"]
    flags += [f"--max_iters={STEPS}", f"--fp8_required={precision == '--use_fp8'}"]
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # float32 is float32
    runs.run(f"{precision}-alone", *flags)
    for strategy in STRATEGIES:
        runs.run_ranks(2, f"{precision}-{strategy}", *flags, f"--parallel={strategy}")
    runs.run_ranks(2, f"{precision}-within", *flags, "--parallel=ddp", "--cuda_graph=False")
    names = ["alone", "within", *STRATEGIES]
    replayed = [name for name in names if runs.log(f"{precision}-{name}")["startup_info"]["training"]["cuda_graph"]]
    assert replayed == ["alone", "ddp"]
    alone, within, ddp, zero1, fsdp = (list(runs.losses(f"{precision}-{name}").values()) for name in names)
    assert zero1 == within, dict(zip(names, (alone, within, ddp, zero1, fsdp), strict=True))
    # The learning rate lets differences grow: of the first steps. fsdp rounds to FP8 what it has gathered in bfloat16.
    steps, tolerance = {"--dtype=float32": (4, 3e-5), "--dtype=bfloat16": (4, 1e-2), "--use_fp8": (2, 2e-3)}[precision]
    for losses in (ddp, within, fsdp):
        assert losses[:steps] == pytest.approx(alone[:steps], rel=tolerance)
    once = [*flags, "--gradient_accumulation_steps=2"]  # gradients travel as the products make them
    runs.run(f"{precision}-alone-once", *once)
    runs.run_ranks(2, f"{precision}-once", *once, "--parallel=ddp")
    alone, ddp = (list(runs.losses(f"{precision}-{name}").values()) for name in ("alone-once", "once"))
    assert ddp[:steps] == pytest.approx(alone[:steps], rel=tolerance)
    for strategy in STRATEGIES:
        runs.run_ranks(2, f"{precision}-ddp", *flags, "--max_iters=8", "--resume=rolling_step_6", f"--parallel={strategy}")


# ---------------------------------------------------------------------------------------------------------------------
# One end for all
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(strategy: str, runs: Runs) -> None:
    out_dir = f"signal-{strategy}"
    flags = [*SHAPE, f"--parallel={strategy}", "--max_iters=100000", "--eval_interval=5", "--eval_iters=2"]
    processes = runs.start_ranks(2, out_dir, *flags)
    processes[0].wait_for("Iter 7 ")
    processes[1].send(signal.SIGTERM)
    assert [process.wait() for process in processes] == [143, 143]
    assert runs.tiers(out_dir)["latest"] == len(runs.losses(out_dir)) >= 7
    assert runs.log(out_dir)["summary"]["status"] == "SIGTERM"


def be_stopped_in_an_evaluation() -> None:
    """By a signal after the third batch."""
    batches_of, seen = evaluation.evaluation_batches, itertools.count(1)

    def batches(*args: object) -> Iterator[object]:
        for batch in batches_of(*args):
            yield batch
            if next(seen) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    evaluation.evaluation_batches = batches


def test_a_signal_to_one_rank_cuts_an_evaluation_short(runs: Runs) -> None:
    """All hear of it with the next batch, and not when the evaluation, which may take long, is over and logged."""
    flags = [*SHAPE, "--max_iters=100000", "--eval_interval=100", "--eval_iters=40"]
    processes = runs.start_ranks(2, "evaluating", *flags, prepare=[nothing, be_stopped_in_an_evaluation])
    assert [process.wait() for process in processes] == [143, 143]
    log = runs.log("evaluating")
    assert log["summary"]["status"] == "SIGTERM" and log["eval_steps"] == log["training_iterations"] == []


def die_in_second_save() -> None:
    write, saves = checkpoint_files._write_tensor_file, itertools.count(1)

    def write_or_die(*args: object) -> object:
        if next(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args)

    checkpoint_files._write_tensor_file = write_or_die


def test_a_rank_that_dies_in_a_save_leaves_the_checkpoint_before(runs: Runs) -> None:
    flags = [*SHAPE, "--parallel=zero1", "--max_iters=100000", "--checkpoint_interval=4", "--step_timeout_s=20"]
    processes = runs.start_ranks(2, "killed", *flags, prepare=[nothing, die_in_second_save])
    assert [process.wait() for process in processes] == [1, -signal.SIGKILL]
    assert runs.tiers("killed") == {"latest": 4}
    saved = runs.checkpoint("killed")
    assert saved.iter == 4 and saved.read_tensors(["optim.final_norm.weight.step"]).popitem()[1] == 4


def lose_the_disk_once() -> None:
    write, saves = checkpoint_files._write_tensor_file, itertools.count(1)

    def write_or_fail(*args: object) -> object:
        if next(saves) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    checkpoint_files._write_tensor_file = write_or_fail


def test_a_full_disk_on_one_rank_is_a_warning(runs: Runs) -> None:
    flags = [*SHAPE, "--use_fsdp", "--max_iters=6", "--checkpoint_interval=3", "--sample_interval=2", "--sample_prompt=a"]
    processes = runs.start_ranks(2, "full", *flags, prepare=[nothing, lose_the_disk_once])
    assert [process.wait() for process in processes] == [0, 0]
    assert "checkpoint of step 3 not saved" in processes[0].stdout and "No space left" in processes[0].stdout
    assert runs.tiers("full") == {"latest": 6} and "sample at step 4" in processes[0].stdout
    assert runs.checkpoint("full").iter == 6


def give_also(flag: str) -> None:
    config_or_plan = train.config_or_plan
    train.config_or_plan = lambda argv: config_or_plan([*argv, flag])


@pytest.mark.parametrize(
    ("flag", "what"),
    [("--learning_rate=0.5", "learning_rate is 0.01 and 0.5"), ("--hellaswag_interval=2", "hellaswag_interval is 0 and 2")],
)
def test_ranks_with_different_knobs(flag: str, what: str, runs: Runs) -> None:
    """The second would have some of them wait for what the others never send."""
    flags = [*SHAPE, "--gradient_accumulation_steps=3"]
    processes = runs.start_ranks(3, "different", *flags, prepare=[nothing, nothing, partial(give_also, flag)])
    assert [process.wait() for process in processes] == [2, 2, 2]
    said = "".join(process.stderr for process in processes)
    assert said.count("error:") == 1 and f"ranks 0 and 2 have different knobs: {what}; give all" in said


def test_an_out_dir_that_is_not_shared(runs: Runs) -> None:
    own = [partial(os.chdir, folder) for folder in (runs.folder, runs.folder / "data")]
    processes = runs.start_ranks(2, "unused", *SHAPE, "--out_dir=relative", prepare=[own[0], partial(give_up_soon, own[1])])
    assert [process.wait() for process in processes][1] == 2
    assert "choose a folder that all nodes share" in processes[1].stderr


def give_up_soon(then: Callable[[], None]) -> None:
    checkpoint.SHARED_WITHIN_S = 0.1
    then()


@pytest.mark.parametrize(
    ("hanging", "n", "flags"),
    [(1, 2, ["--parallel=ddp"]), (0, 2, ["--parallel=zero1"]), (3, 4, ["--use_fsdp", "--hsdp_shard_size=2"])],
    ids=str,
)
def test_a_rank_that_hangs_ends_the_run(hanging: int, n: int, flags: list[str], runs: Runs) -> None:
    """Whichever it is: rank 0 keeps count of failures, and a mesh has groups of its own."""
    processes = runs.start_ranks(n, f"hangs{hanging}", *SHAPE, *flags, "--max_iters=100000", "--step_timeout_s=2")
    processes[0].wait_for("Iter 3 ")
    processes[hanging].send(signal.SIGSTOP)
    t0_s = time.monotonic()
    others = [process for rank, process in enumerate(processes) if rank != hanging]
    assert {process.wait() for process in others} == {1} and time.monotonic() - t0_s < 20
    said = "".join(process.stderr for process in others)
    assert (
        "waited too long for another, which hangs or has gone (--step_timeout_s, at the start" in said and "Traceback" not in said
    ), said
    processes[hanging].send(signal.SIGKILL)


def fail_in_step_three() -> None:
    update, steps = train.update, itertools.count(1)

    def update_or_fail(*args: object, **kwargs: object) -> object:
        if next(steps) == 3:
            raise ZeroDivisionError("of rank 1")
        return update(*args, **kwargs)

    train.update = update_or_fail


def test_the_first_cause_is_printed_once(runs: Runs) -> None:
    processes = runs.start_ranks(2, "fails", *SHAPE, "--max_iters=100000", prepare=[nothing, fail_in_step_three])
    assert [process.wait() for process in processes] == [1, 1]
    assert "ZeroDivisionError: of rank 1" in processes[1].stderr
    assert runs.log("fails")["summary"]["status"].startswith("RuntimeError")  # what rank 0 has seen of it
    assert "rank 0 ends because another rank has failed" in processes[0].stderr and "Traceback" not in processes[0].stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gradient_accumulation_steps=7"], "the nearest that work: 6 and 8"),
        (["--gradient_accumulation_steps=1"], "the nearest that work: 2"),
        (["--use_fsdp", "--hsdp_shard_size=3"], "the nearest that do: 2"),
        (["--device=cuda"], "pass --device=cpu"),
        (["--dataset=missing"], "missing"),
    ],
)
def test_bad_input_is_one_message_of_one_rank(flags: list[str], message: str, runs: Runs) -> None:
    if "--device=cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    output = runs.run_ranks(2, "bad", *SHAPE, *flags, exit_code=2)
    assert output.count("error: ") == 1 and message in output
    assert not list((runs.folder / "bad").glob("run_*"))


@pytest.mark.parametrize("n_shares", [1, 2, 3, 8])
@pytest.mark.parametrize("n_rows", [0, 1, 5, 8, 50_304])
def test_rows_are_those_of_torch_chunk(n_rows: int, n_shares: int) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(n_rows).chunk(n_shares)] if n_rows else []
    rows = [list(range(*own_rows(n_rows, share, n_shares))) for share in range(n_shares)]
    assert rows == [*chunks, *[[]] * (n_shares - len(chunks))]


def test_simulation_of_1024_ranks(tmp_path: Path) -> None:
    """The closed forms: 4 bytes of gradients and parameters and 8 of AdamW's state an element; what a ring sends.

    Blocks' matrices are in bfloat16, with float32 masters: whole ones in ddp, own rows in zero1.
    """
    sizes = "--n_layer=2 --n_head=16 --n_embd=1024 --vocab_size=1024 --block_size=1024 --batch_size=1 --position_encoding=none"
    path, program = tmp_path / "figures.json", ROOT / "benchmarks" / "simulation.py"
    subprocess.run([sys.executable, program, *sizes.split(), "--ranks=1024", f"--json={path}"], check=True, capture_output=True)
    ddp, zero1, fsdp = json.loads(path.read_text())["rows"]
    assert all(row["bytes_held"].pop("peak") > row["bytes_held"]["parameters"] for row in (ddp, zero1, fsdp))
    matrices, vectors, share = 1024 * 1024 * (2 * 12 + 1), 1024 * 5, 1023 / 1024
    n, scalars = matrices + vectors, 4 * (2 * 6 + 2)  # AdamW counts the steps of each tensor
    products = 1024 * 1024 * 2 * 12
    assert ddp["bytes_held"] == {"parameters": 4 * n + 2 * products, "gradients": 4 * n, "optimizer": 8 * n + scalars}
    assert zero1["bytes_held"]["parameters"] == 4 * (n - products + products // 1024) + 2 * products
    assert zero1["bytes_held"]["optimizer"] == 8 * (matrices // 1024 + vectors) + scalars
    assert fsdp["bytes_held"] == {"parameters": 4 * n // 1024, "gradients": 4 * n // 1024, "optimizer": 8 * n // 1024 + scalars}
    all_reduce, rows = 2 * share * 4 * n, share * (2 * products + 4 * (matrices - products))
    assert list(ddp["bytes_sent"].values()) == [pytest.approx(all_reduce), 0, 0]
    assert list(zero1["bytes_sent"].values()) == [pytest.approx(all_reduce), pytest.approx(rows), 0]
    blocks = n - 1024 * 1024 - 1024  # gathered again for the backward pass; in bfloat16, but gradients are reduced in float32
    assert list(fsdp["bytes_sent"].values()) == [0, pytest.approx(share * 2 * (n + blocks)), pytest.approx(share * 4 * n)]


@pytest.mark.parametrize(
    ("n_layer", "memory_gib", "chosen"), [(12, 140, "ddp over 8"), (60, 140, "fsdp over 8"), (2000, 140, "though predicted")]
)
def test_auto_takes_the_first_that_fits(n_layer: int, memory_gib: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(total_memory=memory_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(Ranks, "all_of", lambda ranks, value: [value] * ranks.world_size)
    flags = ["config/full_llama_1.36b.py", "--vocab_size=32000", f"--n_layer={n_layer}", "--n_embd=4608", "--n_head=36"]
    _, layout, why = choose_layout(load_config(flags), Ranks(0, 8, torch.device("cuda")), torch.bfloat16)
    assert chosen in why and f"of {0.92 * memory_gib:.1f} usable GiB" in why and why.startswith(layout.name)
    *_, why = choose_layout(load_config([*flags, "--use_fsdp"]), Ranks(0, 8, torch.device("cuda")), torch.bfloat16)
    assert ("once a step" if n_layer == 12 else "in each micro-step") in why  # the first takes 6 bytes a parameter more


def test_auto_chooses_for_the_smallest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank by its own GPU would build another layout, and wait for the others for ever."""
    cfg, chosen = load_config(["config/full_llama_1.36b.py", "--vocab_size=32000"]), []
    monkeypatch.setattr(Ranks, "all_of", lambda ranks, value: [140.0, 40.0])
    for memory_gib in (140, 40):
        gpu = SimpleNamespace(total_memory=memory_gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        chosen.append(choose_layout(cfg, Ranks(0, 2, torch.device("cuda")), torch.bfloat16)[2])
    assert chosen[0] == chosen[1] and f"of {0.92 * 40:.1f} usable GiB" in chosen[0]


def test_auto_plans_with_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """zero1 with it needs a second copy of the weights, which fsdp has room for."""
    cfg = load_config(["config/full_llama_1.36b.py", "--vocab_size=32000", "--use_fp8"])
    needed = predict_memory(replace(cfg, fp8=Fp8Config()), "bfloat16", "zero1", 2).peak / USABLE
    monkeypatch.setattr(Ranks, "all_of", lambda ranks, value: [value, value])
    gpu = SimpleNamespace(total_memory=needed + 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr("sharding.choose_exchange", lambda *args, **kwargs: ("copies", ""))
    ranks, names = Ranks(0, 2, torch.device("cuda")), []
    for fp8 in (Fp8Config(), cfg.fp8):
        names.append(choose_layout(replace(cfg, fp8=fp8), ranks, torch.bfloat16)[1].name)
    assert names == ["zero1", "fsdp"]


def test_gradients_are_sent_as_they_are_and_reduced_in_float32() -> None:
    comm = ReduceScatterByCopies(None, lambda: torch.bfloat16)
    asked = dict(dtype=torch.float32, device=torch.device("cpu"))
    sent, result = comm.allocate((8,), **asked), comm.allocate((4,), **asked)
    assert (sent.dtype, result.dtype) == (torch.bfloat16, torch.float32)
    assert comm.allocate((8,), **asked).dtype == torch.bfloat16  # of the next unit
