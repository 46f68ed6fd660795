"""Does FP8 change a run's loss by more than another seed does?

    python benchmarks/fp8_accuracy.py CONFIG [--knob=value ...] [--seeds 1 2 3] [--recipes delayed] [--windows=10] [--at_once=1]
        [--json=FILE] [--figure=FILE.png]

Trains without FP8 from each seed, and with each recipe from the first. A seed draws weights, order and dropout. The table has for
each tenth of the run the mean loss of the first seed, the spread of the seeds (the largest less the smallest of their means), and
FP8's mean minus the first seed's. Where there is no FP8, --fp8_emulate computes such losses slowly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

from loss_parity import losses_of, run_command


def window_means(losses: list[float], windows: int) -> list[float]:
    """The means of so many equal stretches."""
    borders = [round(i * len(losses) / windows) for i in range(windows + 1)]
    return [statistics.mean(losses[first:end]) for first, end in itertools.pairwise(borders)]


def print_table(losses: dict[str, list[float]], seeds: list[str], recipes: list[str], windows: int) -> None:
    means = {name: window_means(values, windows) for name, values in losses.items()}
    n_steps = len(losses[seeds[0]])
    print(f"{'to step':>8s} {seeds[0]:>14s} {'spread of seeds':>16s}" + "".join(f"{recipe:>18s}" for recipe in recipes))
    for i in range(windows):
        spread = max(means[seed][i] for seed in seeds) - min(means[seed][i] for seed in seeds)
        base = means[seeds[0]][i]
        shifts = "".join(f"{means[recipe][i] - base:+18.5f}" for recipe in recipes)
        print(f"{round((i + 1) * n_steps / windows):8d} {base:14.5f} {spread:16.5f}{shifts}")


def draw(losses: dict[str, list[float]], seeds: list[str], recipes: list[str], path: Path) -> None:
    """Differences from the first seed's loss, each a mean over a fiftieth of the run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, windows = figure.subplots(), min(50, len(losses[seeds[0]]))
    base = window_means(losses[seeds[0]], windows)
    steps = [len(losses[seeds[0]]) * (i + 0.5) / windows for i in range(windows)]
    for name in [*seeds[1:], *recipes]:
        shifts = [mean - first for mean, first in zip(window_means(losses[name], windows), base, strict=True)]
        axes.plot(steps, shifts, label=name, color="0.7" if name in seeds else None)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel=f"loss minus that of {seeds[0]}")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipes", nargs="+", default=["delayed"], help="of delayed, current, block")
    parser.add_argument("--windows", type=int, default=10, help="rows of the table")
    parser.add_argument("--at_once", type=int, default=1, help="runs that share the machine")
    parser.add_argument("--json", type=Path, help="write every loss here as well")
    parser.add_argument("--figure", type=Path, help="draw the differences here")
    args, given = parser.parse_known_args()
    knobs = [knob for knob in given if not knob.startswith("--fp8_emulate")]
    emulate = [knob for knob in given if knob.startswith("--fp8_emulate")]
    runs = {f"seed {seed}": [f"--seed={seed}"] for seed in args.seeds}
    fp8 = [f"--seed={args.seeds[0]}", "--use_fp8", "--fp8_required", *emulate]
    runs |= {f"fp8 {recipe}": [*fp8, f"--fp8_recipe={recipe}"] for recipe in args.recipes}
    losses = losses_of(runs, knobs, args.at_once)
    if args.json:
        args.json.write_text(json.dumps({"knobs": given, "losses": losses}) + "\n")
    seeds, recipes = [f"seed {seed}" for seed in args.seeds], [f"fp8 {recipe}" for recipe in args.recipes]
    print_table(losses, seeds, recipes, args.windows)
    if args.figure:
        draw(losses, seeds, recipes, args.figure)


if __name__ == "__main__":
    run_command(lambda argv: main())
