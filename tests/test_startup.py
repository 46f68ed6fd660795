"""What a run settles before its first step: the shape it resumes with, what the report says, and which knobs do nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor

import micro_step
import start_report
import startup
from configurator import load_config
from data.loader import SampleOrder
from data.tokens import load_dataset
from flops import flops_per_token
from fp8 import Fp8
from hf_convert import export_model
from kernels import REFERENCE
from layout import Layout
from memory import settled
from parallel import Ranks
from pretrained import open_pretrained
from run_file import StepRecord, step_record
from sharding import DataParallel, DataParallelBehind, FullyShard, Zero1
from tiny_runs import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    with Runs(tmp_path) as runs:
        yield runs


# ---------------------------------------------------------------------------------------------------------------------
# A run that began with weights
# ---------------------------------------------------------------------------------------------------------------------


class RunsOfAnySize(Runs):
    """Without the sizes of a tiny model: they come with the weights."""

    def argv(self, out_dir: str, *flags: str) -> list[str]:
        sizes = ("--n_layer=", "--n_head=", "--n_embd=", "--block_size=")
        return [flag for flag in super().argv(out_dir) if not flag.startswith(sizes)] + list(flags)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps that began with the weights in hf/, which are gone."""
    folder = tmp_path_factory.mktemp("begun")
    with Runs(folder) as runs:
        runs.run("donor", "--max_iters=2", "--n_layer=1", "--n_embd=32")
    export_model(open_pretrained(str(folder / "donor")), folder / "hf", "float32", 10**9)
    with RunsOfAnySize(folder) as runs:
        runs.run("out", f"--init_from={folder / 'hf'}", "--block_size=8", "--max_iters=3")
    (folder / "hf").rename(folder / "gone")
    return folder


@pytest.mark.parametrize("flags", [["--init_from=resume"], ["--resume=latest"], ["--init_from={folder}/hf", "--resume=latest"]])
def test_a_run_that_began_with_weights_goes_on_without_them(begun: Path, tmp_path: Path, flags: list[str]) -> None:
    for name in ("data", "out"):
        shutil.copytree(begun / name, tmp_path / name)
    flags = [flag.format(folder=begun) for flag in flags]
    with RunsOfAnySize(tmp_path) as runs:
        for last in (4, 5):  # and once more
            assert f"after step {last - 1}" in runs.run("out", f"--max_iters={last}", *flags)
        config = runs.checkpoint("out").state["config"]
        assert (config["values"]["n_embd"], config["values"]["block_size"]) == (32, 8)
        assert config["origins"]["n_embd"] == f"--init_from={begun / 'hf'}"
        assert len(runs.losses("out")) == 5


def test_another_shape_is_refused_still(begun: Path, tmp_path: Path) -> None:
    for name in ("data", "out"):
        shutil.copytree(begun / name, tmp_path / name)
    with RunsOfAnySize(tmp_path) as runs:
        message = runs.run("out", "--resume=latest", "--n_embd=48", exit_code=2)
        assert "n_embd" in message and "32" in message and "n_layer" not in message
        missing = runs.run("new", "--resume=latest", f"--init_from={begun / 'hf'}", exit_code=2)
        assert "there is no such file or folder" in missing and "Traceback" not in missing


# ---------------------------------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------------------------------


def lose_the_compiler() -> None:
    micro_step.missing_compiler = lambda device: "a C++ compiler"


def test_the_report_says_compiled_only_where_it_is(runs: Runs) -> None:
    output = runs.run("out", "--compile=True", "--max_iters=1", prepare=lose_the_compiler)
    training = runs.log("out")["startup_info"]["training"]
    assert "not compiled" in output and (training["compile"], training["cuda_graph"]) == (False, False)


@pytest.mark.parametrize(("fp8", "peak_fp8"), [(True, 4 * 1979), (False, None)])
def test_mfu_is_over_the_peak_of_all_gpus(fp8: bool, peak_fp8: float | None, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """On four H200, which need not be here."""
    monkeypatch.setattr(start_report, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(start_report, "gpu_memory_gb", lambda device: 150.1)
    monkeypatch.setattr(start_report, "attention_backend", lambda *_: "plain products")
    cfg = load_config(runs.argv("out", "--vocab_size=64", f"--use_fp8={fp8}"))
    (runs.folder / "out").mkdir()
    ranks = Ranks(0, 4, torch.device("cuda"))
    layout = Layout(ranks, cfg.parallel, torch.bfloat16)
    state = SimpleNamespace(ranks=ranks, layout=layout, fp8=SimpleNamespace(active=fp8))
    dataset, chosen = load_dataset(cfg.data, cfg.model.block_size), {"norm_kernel": "torch", "fp8_kernel": "torch"}
    info, throughput = start_report.start_report(cfg, dataset, state, torch.bfloat16, chosen, "ddp")
    assert (info["hardware"]["peak_tflops"], info["hardware"]["gpus"]) == (989.5, 4)
    assert info["training"]["precision"].startswith("fp8 products in the blocks (delayed scaling), bfloat16") == fp8
    assert (throughput.peak_tflops, throughput.peak_fp8_tflops) == (4 * 989.5, peak_fp8)
    mfu = step_record(StepRecord(1, 4.0, 1e-3, time_ms=1e-3, data_wait_ms=0.0, tokens=128, grad_norm=1.0), throughput)["mfu"]
    tflops = flops_per_token(cfg.model) * 128 / 1e-6 / 1e12
    assert mfu["mfu_percent"] == pytest.approx(100 * tflops / (4 * 989.5), rel=1e-3)
    assert mfu.get("mfu_fp8_percent") == (pytest.approx(100 * tflops / peak_fp8, rel=1e-3) if fp8 else None)


@pytest.mark.parametrize(
    ("kind", "asked", "replayed"),
    [
        (Layout, "none", True),
        (Layout, "True", True),
        (Layout, "False", False),
        (DataParallelBehind, "none", True),
        (DataParallelBehind, "True", True),
        (DataParallel, "True", False),
        (Zero1, "True", False),
        (FullyShard, "True", False),
    ],
)
def test_what_is_replayed_on_gpus(kind: type[Layout], asked: str, replayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_step, "missing_compiler", lambda device: None)
    cfg = load_config([f"--cuda_graph={asked}"])
    layout = kind(Ranks(0, 1, torch.device("cuda")), cfg.parallel, torch.bfloat16)
    assert micro_step.replays_graph(cfg, layout) == replayed
    assert not micro_step.replays_graph(load_config(["--compile=False"]), layout)


def test_knobs_that_do_nothing_are_named(runs: Runs) -> None:
    idle = ["--profile=9:11", "--memory_history", "--cuda_graph", "--num_gpus=2", "--use_fsdp"]
    output = runs.run("out", *idle, "--max_iters=8")
    says = ["records nothing: this run goes on after step 0, up to 8", "nothing on a CPU", "this run has 1 rank,"]
    says.append("replays no micro-step: none is compiled for a GPU")
    assert all(line in output for line in [*says, "one process shards nothing by fsdp"])
    output = runs.run("out", "--profile=2:9", "--max_iters=10", "--resume=latest")
    assert "records nothing: this run goes on after step 8, up to 10" in output
    assert "--hsdp_shard_size is of fsdp: one process does not use it" in runs.run("hsdp", "--hsdp_shard_size=2", "--max_iters=1")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--fp8_recipe=current --fp8_margin=1", ["--fp8_recipe is of FP8", "--fp8_margin is of FP8"]),
        ("--use_fp8 --fp8_recipe=current --fp8_margin=1", []),
        ("--use_fp8=False --fp8_recipe=current", ["--fp8_recipe is of FP8"]),
        ("--use_fp8 --fp8_recipe=current --fp8_history=4", ["--fp8_history does nothing with fp8_recipe=current"]),
        ("--use_fp8 --fp8_recipe=block --fp8_margin=1", ["--fp8_margin does nothing with fp8_recipe=block"]),
        ("--use_fp8 --fp8_less_memory", ["--fp8_less_memory saves the transposed weights alone"]),
        ("--use_fp8 --fp8_less_memory --ffn_type=swiglu", []),
        ("--use_fp8 --fp8_less_memory --ffn_type=swiglu --bias", ["--fp8_less_memory saves the transposed weights alone"]),
    ],
)
def test_knobs_of_fp8_that_do_nothing_are_named(flags: str, named: list[str]) -> None:
    lines = list(start_report.idle_fp8_knobs(load_config(flags.split())))
    assert len(lines) == len(named) and all(line.startswith(start) for line, start in zip(lines, named, strict=True))


@pytest.mark.parametrize(("value", "lines"), [("none", 0), ("True", 1), ("False", 1)])
def test_a_knob_that_asks_for_nothing_is_not_idle(value: str, lines: int) -> None:
    cfg = settled(load_config(["--vocab_size=64", f"--fsdp_accumulate_whole={value}"]), "bfloat16", 2, 140.0)
    assert len(list(start_report.idle_fsdp_knobs(cfg, "fsdp", one_micro_step=True))) == lines


def test_a_run_of_many_epochs_says_so(runs: Runs) -> None:
    samples = SampleOrder(len((runs.folder / "data/tiny/train.bin").read_bytes()) // 2, 16, seed=0).samples_per_epoch
    four = [f"--batch_size={samples}", "--gradient_accumulation_steps=1", "--warmup_iters=1", "--lr_decay_iters=4"]
    assert "note:" not in runs.run("four", *four, "--max_iters=4")
    assert "note: the run makes 5 epochs over its training data: up to 4 are " in runs.run("five", *four, "--max_iters=5")
    assert "note:" not in runs.run("five", *four, "--max_iters=5", "--eval_only")


def test_knobs_that_do_something_are_not(runs: Runs) -> None:
    assert "note:" not in runs.run("out", "--profile=8:12", "--max_iters=8", "--warmup_iters=2", "--lr_decay_iters=8")


@pytest.mark.parametrize("deterministic", [False, True])
def test_no_measurement_decides_how_a_deterministic_run_adds_up(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    sizes = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --vocab_size=32 --batch_size=1".split()
    cfg, cpu = load_config([*sizes, "--compile=True", f"--deterministic={deterministic}"]), torch.device("cpu")
    with inductor.patch(deterministic=False):
        layout = Layout(Ranks(0, 1, cpu), cfg.parallel, torch.float32)
        startup.build_state(cfg, REFERENCE, layout, Fp8(cfg.fp8))
        micro_step.compile_model(layout, cfg, print)
        assert inductor.deterministic == deterministic
