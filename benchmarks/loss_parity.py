"""Do the Triton kernels change a run's losses by more than chance does?

    python benchmarks/loss_parity.py CONFIG [--knob=value ...] [--seeds 1337 1338] [--at_once=1] [--json=FILE]

Trains with every kernel by Triton, with every kernel by PyTorch, and with one at a time by PyTorch, all from the first seed; then
with all and with none from the other seeds. The figure is the difference of two runs' losses at the same step: the mean of its
size over all steps and over the last quarter. The noise is the same figure between two seeds of one setting.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from command_line import output_file, parser_of

from configurator import ROOT, UserError, load_config, run_command


def train(knobs: list[str], out_dir: Path) -> list[float]:
    """The loss of every step of a run. Raises UserError where it does not come to its end."""
    command = [sys.executable, str(ROOT / "train.py"), *knobs, f"--out_dir={out_dir}", "--run_name=run", "--log_interval=1"]
    done = subprocess.run([*command, "--eval_interval=0", "--always_save_checkpoint=False"], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"train.py {' '.join(knobs)} ended with exit code {done.returncode}: see above")
    records = json.loads((out_dir / "run_run.json").read_text())["training_iterations"]
    return [round(record["loss"], 6) for record in records]


def losses_of(runs: dict[str, list[str]], knobs: list[str], at_once: int) -> dict[str, list[float]]:
    """The losses of runs that have `knobs` in common, and knobs of their own by name; so many of them share the machine.

    Raises UserError before the first of them begins where one could not.
    """
    if any(knob.startswith("--seed") for knob in knobs):
        raise UserError("--seed is each run's own; pass --seeds 1 2")
    if len({load_config([*knobs, *own]).optim.max_iters for own in runs.values()}) > 1:
        raise UserError("runs of different lengths do not compare; pass the same --max_iters to all")
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        numbered = enumerate(runs.items())
        futures = {pool.submit(train, [*knobs, *own], Path(folder, str(n))): name for n, (name, own) in numbered}
        for future in concurrent.futures.as_completed(futures):
            print(f"{futures[future]}: ended at loss {future.result()[-1]:.4f}", file=sys.stderr, flush=True)
        return {name: future.result() for future, name in futures.items()}


def losses_parser(description: str | None, seeds: list[int]) -> argparse.ArgumentParser:
    """Of what programs that compare losses have in common; what it does not know are knobs."""
    parser = parser_of(description)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="two or more")
    parser.add_argument("--at_once", type=int, default=1, help="runs that share the machine")
    parser.add_argument("--json", type=output_file, help="write every loss here as well")
    return parser


def check_seeds(seeds: list[int]) -> None:
    """Raises UserError where there would be nothing to compare."""
    if len(set(seeds)) != len(seeds) or len(seeds) < 2:
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: pass two or more, all different")


def settings(seeds: list[int]) -> dict[str, list[str]]:
    """Knobs by name of the run."""
    from kernels import GROUPS

    knobs = [knob for knob in GROUPS if knob != "fp8_kernel"]  # benchmarks/fp8_accuracy.py's

    def kernels(seed: int, by_torch: list[str]) -> list[str]:
        return [f"--seed={seed}", *(f"--{knob}={'torch' if knob in by_torch else 'triton'}" for knob in knobs)]

    runs = {f"{knob}=torch": kernels(seeds[0], [knob]) for knob in knobs}
    for seed in seeds:
        runs |= {f"triton, seed {seed}": kernels(seed, []), f"torch, seed {seed}": kernels(seed, knobs)}
    return runs


def main() -> None:
    args, knobs = losses_parser(__doc__, [1337, 1338]).parse_known_args()
    check_seeds(args.seeds)
    load_config(knobs)
    import torch

    if not torch.cuda.is_available():
        raise UserError("the Triton kernels run on a GPU, and there is none here")
    losses = losses_of(settings(args.seeds), knobs, args.at_once)
    if args.json:
        args.json.write_text(json.dumps({"knobs": knobs, "losses": losses}) + "\n")
    reference = f"triton, seed {args.seeds[0]}"
    pairs = [(reference, name) for name in losses if name.endswith(("=torch", f"seed {args.seeds[0]}")) and name != reference]
    for kind in ("triton", "torch"):
        pairs += itertools.combinations([f"{kind}, seed {seed}" for seed in args.seeds], 2)
    first, *_, final = losses[reference]
    print(f"{len(losses[reference])} steps, loss {first:.3f} to {final:.3f}; size of the difference")
    print(f"{'':60s} {'mean':>9s} {'last quarter':>13s} {'largest':>9s}")
    for a, b in pairs:
        sizes = [abs(x - y) for x, y in zip(losses[a], losses[b], strict=True)]
        last = sizes[-len(sizes) // 4 :]
        print(f"{a + ' and ' + b:60s} {statistics.mean(sizes):9.5f} {statistics.mean(last):13.5f} {max(sizes):9.5f}")


if __name__ == "__main__":
    run_command(lambda argv: main())
