"""What train.py costs beside the bare loop of the same model: reading data, logging every step, gradient statistics every 10.

    python benchmarks/train_overhead.py [--config=config/train_gpt2.py] [--rounds=2] [--json=FILE]

The bare loop runs forward, backward and AdamW of the same compiled model on one batch that stays on the device: no data, no
clipping, no logging. Both run in processes of their own, in the order A B A B; a figure is the median step of all rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from command_line import fresh_state, output_file, parser_of

from configurator import ROOT, Fp8Config, UserError, load_config, run_command

WARMUP_STEPS = 20


def bare_loop(argv: list[str]) -> list[float]:
    """Milliseconds of each step of the bare loop, from the end of one step to the end of the next."""
    import torch

    from data.tokens import load_dataset
    from parallel import Ranks, start_ranks
    from precision import autocast
    from startup import with_vocabulary

    cfg = load_config(argv)
    cfg = with_vocabulary(cfg, load_dataset(cfg.data, cfg.model.block_size))
    with ExitStack() as stack:
        device = start_ranks(cfg.run, cfg.parallel, stack).device
    # The same model, but for FP8: what it is made of is no overhead.
    cfg, state = fresh_state(replace(cfg, fp8=Fp8Config()), Ranks(0, 1, device), print)
    forward = torch.compile(state.model) if cfg.run.compile else state.model
    batch = torch.randint(cfg.model.vocab_size, (2, cfg.data.batch_size, cfg.model.block_size), device=device)
    instants = []
    for _ in range(cfg.optim.max_iters):
        with autocast(device, state.layout.dtype):
            loss = forward(batch[0], batch[1])
        loss.backward()
        state.layout.gradients()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            instants.append(torch.cuda.Event(enable_timing=True))
            instants[-1].record()
        else:
            instants.append(time.perf_counter())
    if device.type == "cuda":
        torch.cuda.synchronize()
    spans_ms = [a.elapsed_time(b) if device.type == "cuda" else 1e3 * (b - a) for a, b in itertools.pairwise(instants)]
    return spans_ms[WARMUP_STEPS:]


def run(command: list[str]) -> None:
    """Raises UserError where it does not come to its end."""
    code = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL).returncode
    if code:
        raise UserError(f"{Path(command[0]).name} ended with exit code {code}: see above")


def train_loop(argv: list[str], out_dir: Path) -> list[float]:
    """Milliseconds of each step of train.py, from its own log: they include whatever the loop does between two steps."""
    run([str(ROOT / "train.py"), *argv])
    (path,) = out_dir.glob("run_*.json")
    return [record["time_ms"] for record in json.loads(path.read_text())["training_iterations"]][WARMUP_STEPS:]


def write_dataset(folder: Path, vocab_size: int = 50_257, n_tokens: int = 20_000_000) -> None:
    """Random tokens, as the .bin of any trainer."""
    import numpy as np

    folder.mkdir()
    tokens = np.random.default_rng(0).integers(vocab_size, size=n_tokens, dtype=np.uint16)
    tokens.tofile(folder / "train.bin")
    tokens[:100_000].tofile(folder / "val.bin")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--config", default="config/train_gpt2.py")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--json", type=output_file, help="write the figures here as well")
    parser.add_argument("--bare", help=argparse.SUPPRESS)  # the child process: write step times to this file
    args, knobs = parser.parse_known_args()
    if args.bare:
        Path(args.bare).write_text(json.dumps(bare_loop(knobs)))
        return
    bare, train = [], []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_dataset(scratch / "random")
        common = [args.config, "--batch_size=32", "--gradient_accumulation_steps=1", f"--max_iters={args.steps}", *knobs]
        common += [
            f"--data_dir={scratch}",
            "--dataset=random",
            "--log_interval=1",
            "--gradient_log_interval=10",
            "--eval_interval=0",
        ]
        for number in range(args.rounds):
            result = scratch / f"bare_{number}.json"
            run([__file__, f"--bare={result}", *common])
            bare.append(json.loads(result.read_text()))
            out_dir = scratch / f"out_{number}"
            train.append(train_loop([*common, f"--out_dir={out_dir}"], out_dir))
    report(bare, train, args.json)


def report(bare: list[list[float]], train: list[list[float]], path: Path | None) -> None:
    def describe(times: list[list[float]]) -> dict[str, float | list[float]]:
        steps = [t for round_times in times for t in round_times]
        return {
            "median_ms": statistics.median(steps),
            "mean_ms": statistics.mean(steps),
            "rounds_median_ms": [statistics.median(r) for r in times],
        }

    figures = {"bare": describe(bare), "train.py": describe(train)}
    figures["ratio_of_medians"] = figures["bare"]["median_ms"] / figures["train.py"]["median_ms"]
    figures["ratio_of_means"] = figures["bare"]["mean_ms"] / figures["train.py"]["mean_ms"]
    for name in ("bare", "train.py"):
        rounds = ", ".join(f"{ms:.2f}" for ms in figures[name]["rounds_median_ms"])
        print(
            f"{name:10s} median {figures[name]['median_ms']:8.2f} ms  mean {figures[name]['mean_ms']:8.2f} ms  (rounds: {rounds})"
        )
    print(
        f"train.py runs at {figures['ratio_of_medians']:.4f} of the bare loop (medians), {figures['ratio_of_means']:.4f} (means)"
    )
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_command(lambda argv: main())
