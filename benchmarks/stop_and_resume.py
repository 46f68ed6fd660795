"""Does a run that is stopped and resumed end with the weights of the run that never stopped, bit by bit?

    python benchmarks/stop_and_resume.py [--stops=5] [--seed=0] CONFIG [--knob=value ...]

Trains once without a stop; then again, sending SIGTERM to train.py at random places and starting it again with
`--resume latest` each time. Compares every tensor of the two last checkpoints (weights, AdamW's moments) and every loss in
the two logs. On a GPU pass --deterministic=True. Exits with 1 where anything differs.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from command_line import parser_of

from configurator import ROOT, UserError, load_config, run_command


def start(knobs: list[str], out_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "train.py"), *knobs, f"--out_dir={out_dir}", "--resume=latest", "--run_name=run"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def losses(out_dir: Path) -> dict[int, float]:
    """Loss by step; raises where the log has a step twice or misses one."""
    path = out_dir / "run_run.json"
    records = json.loads(path.read_text())["training_iterations"] if path.exists() else []
    steps = [record["iter"] for record in records]
    assert steps == list(range(1, len(steps) + 1)), f"{path} does not have every step once"
    return {record["iter"]: record["loss"] for record in records}


def train_with_stops(knobs: list[str], out_dir: Path, stop_steps: list[int]) -> None:
    """One run to its end; the process is stopped at some moment after each of `stop_steps`, and started again.

    Raises UserError where it ends in another way: SIGTERM ends a run with 143.
    """
    for stop_step in stop_steps:
        before = len(losses(out_dir))
        process = start(knobs, out_dir)
        while len(losses(out_dir)) < max(stop_step, before + 1) and process.poll() is None:  # it has begun to train
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        print(f"stopped after step {max(losses(out_dir), default=0)}, exit code {code}", flush=True)
        if code != 143:
            raise UserError("SIGTERM ends a run with 143: see above")
    if code := start(knobs, out_dir).wait():
        raise UserError(f"the run ended with exit code {code}: see above")


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the places to stop at")
    args, knobs = parser.parse_known_args()
    import torch

    from checkpoint import find_checkpoint

    steps = load_config(knobs).optim.max_iters
    knobs += ["--log_interval=1"]
    with tempfile.TemporaryDirectory() as name:
        whole, pieces = Path(name) / "whole", Path(name) / "pieces"
        train_with_stops(knobs, whole, [])
        train_with_stops(knobs, pieces, sorted(random.Random(args.seed).sample(range(1, steps - 1), args.stops)))
        a, b = (find_checkpoint(out_dir, "latest", print) for out_dir in (whole, pieces))
        names = list(a.metadata.state_dict_metadata)
        first, second = a.read_tensors(names), b.read_tensors(names)
        different = [n for n in names if not torch.equal(first[n], second[n])]
        unequal_losses = [step for step, loss in losses(whole).items() if losses(pieces).get(step) != loss]
    print(
        f"step {a.iter} and {b.iter}; {len(names)} tensors, {len(different)} differ; {steps} losses, {len(unequal_losses)} differ"
    )
    return 1 if different or unequal_losses or a.iter != b.iter else 0


if __name__ == "__main__":
    run_command(lambda argv: main())
