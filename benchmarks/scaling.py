"""Tokens a second a GPU, scaling efficiency, peak memory by component and exposed communication, by strategy and number of ranks.

    python benchmarks/scaling.py CONFIG [--knob=value ...] [--ranks=1,2,4] [--strategies=ddp,zero1,fsdp] [--micro_steps=1,4]
        [--steps=10] [--nanogpt=PATH] [--no_profile] [--json=FILE]

A step is `micro_steps` micro-batches a rank of `batch_size` x `block_size` random tokens, with train.py's own layout, compiled
units and update; a vocabulary that is left to the dataset counts as GPT-2's. Efficiency is a rank's tokens a second over those of
one rank alone with as many micro-steps, by the mean of the GPUs: `--ranks=1,4` first runs each of the four GPUs alone, all at the
same time. GPUs of a host differ, and together they are as fast as the slowest; `of_slowest` is over that one. Exposed
communication is the time in which a GPU runs NCCL's kernels, or copies to another, and nothing else. All settings of one number
of ranks share a launch. With the folder of nanoGPT's model.py, its model in DistributedDataParallel takes the same steps.
Needs as many GPUs as ranks; with --device=cpu it runs over gloo, to try the script itself.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import (
    fresh_state,
    load_model_config,
    nanogpt_folder,
    output_file,
    parser_of,
    positive_int,
    positive_ints,
    strategies,
    with_strategy,
)

from configurator import Config, UserError, run_command
from memory import GIB, STRATEGIES

if TYPE_CHECKING:  # --help is there before torch is
    from torch import Tensor

# (a step on idx[0] and its targets idx[1], both (B, T), which returns the loss; bytes it holds, by component; those not counted)
Built = tuple[Callable[[], "Tensor"], dict[str, int], int]
Build = Callable[["Tensor"], Built]
WARMUP_STEPS = 3
MEMORY = ("peak", "parameters", "gradients", "optimizer", "activations_and_rest")


def measure(build: Build, cfg: Config, ranks: Any, n_steps: int, profile: bool) -> dict[str, Any]:
    """Step times and memory of one setting, on every rank of a launch; the figures are rank 0's."""
    import torch

    on_gpu = ranks.device.type == "cuda"
    start_bytes = torch.cuda.memory_allocated() if on_gpu else 0
    idx = torch.randint(cfg.model.vocab_size, (2, cfg.data.batch_size, cfg.model.block_size), device=ranks.device)
    step, split, uncounted_bytes = build(idx)
    if on_gpu:  # before the first steps: what a CUDA graph has set aside for itself no later step allocates
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP_STEPS):
        step()
    times_ms = step_times_ms(step, n_steps, ranks.device)
    if not torch.isfinite(loss := step()):
        raise UserError(f"the loss has become {loss.item()}: what takes no time with such numbers means nothing")
    if on_gpu:
        peak_bytes = torch.cuda.max_memory_allocated() - start_bytes + uncounted_bytes
        split |= {"peak": peak_bytes, **({"activations_and_rest": peak_bytes - sum(split.values())} if split else {})}
    return {
        "step_ms": round(statistics.median(times_ms), 3),
        "steps_ms": [round(ms, 2) for ms in times_ms],
        **{f"{name}_gib": round(split[name] / GIB, 3) if name in split else None for name in MEMORY},
        "exposed_communication_ms": exposed_ms(step) if profile and on_gpu and ranks.world_size > 1 else None,
    }


def own_step(cfg: Config, ranks: Any, micro_steps: int, say: Callable[[str], None], idx: Tensor) -> Built:
    """train.py's; `say` gets its notes."""
    import torch

    from micro_step import build_micro_step, compile_model
    from optim import update

    on_gpu = ranks.device.type == "cuda"
    start_bytes = torch.cuda.memory_allocated() if on_gpu else 0
    cfg, state = fresh_state(cfg, ranks, say)
    split = held_bytes(state, start_bytes) if on_gpu else {}
    micro_step = build_micro_step(compile_model(state.layout, cfg, say), state.layout, state.loss_scale, cfg)

    def step() -> Tensor:
        state.fp8.begin_step()
        for number in range(1, micro_steps + 1):
            state.layout.begin(number, micro_steps)
            loss = micro_step(idx[0], idx[1])
        gradients = state.layout.gradients()
        if on_gpu and "gradients" not in split:
            split["gradients"] = state.layout.gradient_bytes()
        done = update(state.optimizer, cfg.optim, 1e-4, state.loss_scale.scale, with_moments=False, gradients=gradients)
        state.fp8.finish_step(done.overflow)
        state.layout.finish()
        return loss

    return step, split, state.layout.uncounted_bytes


def nanogpt_step(cfg: Config, ranks: Any, micro_steps: int, path: str, idx: Tensor) -> Built:
    """nanoGPT's: its model compiled, then in DistributedDataParallel, which exchanges in the last micro-step."""
    import torch
    from throughput import nanogpt_model, peer_update
    from torch.nn.parallel import DistributedDataParallel

    device = ranks.device
    model = nanogpt_model(cfg, path).to(device)
    forward = torch.compile(model) if cfg.run.compile else model
    if ranks.world_size > 1:
        forward = DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None)
    update = peer_update(model, cfg)

    def step() -> Tensor:
        for number in range(1, micro_steps + 1):
            forward.require_backward_grad_sync = number == micro_steps
            with torch.autocast(device.type, torch.bfloat16):
                loss = forward(idx[0], idx[1])[1] / micro_steps
            loss.backward()
        update()
        return loss.detach()

    return step, {}, 0


def held_bytes(state: Any, start_bytes: int) -> dict[str, int]:
    """Of a GPU's memory before the first step: AdamW's state, and the rest, with what the exchange keeps for itself."""
    import torch

    optimizer = sum(tensor.nbytes for tensors in state.optimizer.state.values() for tensor in tensors.values())
    parameters = torch.cuda.memory_allocated() - start_bytes - optimizer + state.layout.uncounted_bytes
    return {"parameters": parameters, "optimizer": optimizer}


def step_times_ms(step: Callable[[], object], n_steps: int, device: Any) -> list[float]:
    """From the end of each step to the end of the next. The host does not wait in between, as in training."""
    import torch

    from parallel import ReadBack

    readback = ReadBack(device)
    for _ in range(n_steps):
        step()
        readback.push(None, torch.zeros(1, device=device))
    return [ms for _, _, ms in readback.pop(keep=0)]


def exposed_ms(step: Callable[[], object], n_steps: int = 5) -> float:
    """Milliseconds a step in which NCCL's kernels or copies run and no kernel that computes does, the mean of some steps.

    NCCL's kernels wait, for vectors and the gradient's norm, and so for the slower rank; averages by a kernel of ours compute.
    What the last step leaves behind it does not count: in training the next forward pass hides it.
    """
    import torch

    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(n_steps):
            step()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.time_range.start, e.time_range.end, e.name.startswith(("nccl", "Memcpy PtoP"))) for e in events]
    return round(exposed_us(spans) / 1e3 / n_steps, 3)


def exposed_us(spans: list[tuple[float, float, bool]]) -> float:
    """Of spans on a GPU (start, end, whether it exchanges): how long only such run, up to the end of the last that computes."""
    edges = sorted([(t, sign, exchanges) for start, end, exchanges in spans for t, sign in ((start, 1), (end, -1))])
    running, total_us, since_us, last_us = {True: 0, False: 0}, 0.0, 0.0, 0.0
    for now_us, sign, exchanges in edges:
        if running[True] and not running[False]:
            since_us += now_us - last_us
        if running[False]:
            total_us, since_us = total_us + since_us, 0.0
        running[exchanges], last_us = running[exchanges] + sign, now_us
    return total_us


def settings(args: argparse.Namespace, n_ranks: int) -> list[tuple[str, int]]:
    """(strategy, micro-steps a rank) of one launch; one rank alone has no strategy."""
    strategies = args.strategies if n_ranks > 1 else ["alone"]
    return list(itertools.product([*strategies, *(["nanogpt"] if args.nanogpt else [])], args.micro_steps))


def run_ranks(args: argparse.Namespace, cfg: Config) -> None:
    """One launch: every setting in turn; rank 0 writes the figures."""
    import torch

    from parallel import start_ranks

    rows = []
    with ExitStack() as stack:
        ranks = start_ranks(cfg.run, cfg.parallel, stack)
        say = functools.cache(lambda line: print(line, flush=True) if ranks.is_main else None)  # each line once
        for strategy, micro_steps in settings(args, ranks.world_size):
            one = with_strategy(cfg, ranks.world_size, strategy if strategy in STRATEGIES else "auto", micro_steps)
            build = functools.partial(own_step, one, ranks, micro_steps, say)
            if strategy == "nanogpt":
                build = functools.partial(nanogpt_step, one, ranks, micro_steps, args.nanogpt)
            row = measure(build, one, ranks, args.steps, args.profile)
            rows.append({"ranks": ranks.world_size, "strategy": strategy, "micro_steps": micro_steps} | row)
            if ranks.is_main:
                print(json.dumps(rows[-1]), flush=True)
                Path(args.rows).write_text(json.dumps(rows))
            torch.compiler.reset()
            gc.collect()
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()


def add_rates(rows: list[dict[str, Any]], cfg: Config) -> None:
    """tokens/s a rank, and its share of what one rank alone reaches with as many micro-steps: on average, and the slowest."""
    alone: dict[tuple[bool, int], list[float]] = {}  # by whether it is nanoGPT, and micro-steps
    for row in rows:
        tokens = row["micro_steps"] * cfg.data.batch_size * cfg.model.block_size
        row["tokens_per_s_per_rank"] = round(1e3 * tokens / row["step_ms"])
        if row["ranks"] == 1:
            alone.setdefault(kind_of(row), []).append(row["tokens_per_s_per_rank"])
    for row in rows:
        base, rate = alone.get(kind_of(row)), row["tokens_per_s_per_rank"]
        row["efficiency"] = round(rate / statistics.mean(base), 4) if base else None
        row["of_slowest"] = round(rate / min(base), 4) if base else None


def kind_of(row: dict[str, Any]) -> tuple[bool, int]:
    return row["strategy"] == "nanogpt", row["micro_steps"]


def report(rows: list[dict[str, Any]]) -> None:
    def shown(value: Any) -> str:
        return "-" if value is None else str(value)

    columns = "ranks strategy micro_steps step_ms tokens_per_s_per_rank efficiency of_slowest".split()
    columns += [*(f"{name}_gib" for name in MEMORY), "exposed_communication_ms"]
    widths = [max(len(name), *(len(shown(row[name])) for row in rows)) for name in columns]
    for line in (dict(zip(columns, columns, strict=True)), *rows):
        print("  ".join(shown(line[name]).rjust(width) for name, width in zip(columns, widths, strict=True)))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=positive_ints, default="1,2", help="numbers of ranks, one launch each")
    parser.add_argument("--strategies", type=strategies, default="ddp,zero1,fsdp", help="any of the three, with commas between")
    parser.add_argument("--micro_steps", type=positive_ints, default="1,4", help="micro-steps a rank")
    parser.add_argument("--steps", type=positive_int, default=10)
    parser.add_argument("--nanogpt", type=nanogpt_folder, help="the folder of nanoGPT's model.py: its DDP as well")
    parser.add_argument("--no_profile", dest="profile", action="store_false", help="do not measure exposed communication")
    parser.add_argument("--json", type=output_file, help="write the figures here as well")
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # a launch writes its figures here
    args, knobs = parser.parse_known_args()
    cfg = load_model_config(knobs)
    if args.rows:
        run_ranks(args, cfg)
        return 0
    on_gpu = cfg.run.device != "cpu"
    visible = visible_gpus() if on_gpu else []
    if on_gpu and len(visible) < max(args.ranks):
        raise UserError(
            f"{max(args.ranks)} ranks need as many GPUs, and this machine has {len(visible)}; "
            "--device=cpu tries the script, with a small model"
        )
    flags = [f"--strategies={','.join(args.strategies)}", f"--micro_steps={','.join(map(str, args.micro_steps))}"]
    flags += [f"--nanogpt={args.nanogpt}"] if args.nanogpt else []
    own = [__file__, *flags, f"--steps={args.steps}", *([] if args.profile else ["--no_profile"]), *knobs]
    rows, failed = [], False
    for n in args.ranks:
        measured, codes = launch(n, own, visible[: max(args.ranks)] if n == 1 else [])
        rows += measured  # what was measured before a failure counts
        for code in filter(None, codes):
            print(f"a launch of {n} ranks ended with exit code {code}: see above", file=sys.stderr)
            failed = True
    add_rates(rows, cfg)
    if rows:
        report(rows)
    if rows and args.json:
        args.json.write_text(json.dumps({"config": cfg.model.architecture, "rows": rows}, indent=1) + "\n")
    return int(failed)


def launch(n_ranks: int, program: list[str], gpus: list[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """(the figures, the exit codes) of torchrun: one launch, or one on each of these GPUs by itself, all at the same time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}", *program]
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number, own in enumerate([{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}]):
            path = Path(folder, f"{number}.json")
            started.append((path, subprocess.Popen([*command, f"--rows={path}"], env=os.environ | own)))
        codes = [process.wait() for _, process in started]
        return [row for path, _ in started if path.exists() for row in json.loads(path.read_text())], codes


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name; this process itself must not start CUDA, whose memory it would take."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout.splitlines()
    return [str(index) for index, line in enumerate(line for line in listed if line.startswith("GPU "))]


if __name__ == "__main__":
    run_command(lambda argv: main())
