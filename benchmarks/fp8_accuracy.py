"""Does FP8 change a run's loss by more than another seed does?

    python benchmarks/fp8_accuracy.py CONFIG [--knob=value ...] [--seeds 1 2 3] [--recipes delayed delayed:--fp8_less_memory]
        [--windows=10] [--at_once=1] [--json=FILE] [--figure=FILE.png]

Trains from each seed without FP8 and with each recipe, which may have knobs of its own behind a colon. A seed draws weights,
order and dropout. The table has for each tenth of the run the mean loss without FP8, the spread of the seeds (the largest less
the smallest of their means), and for each recipe the mean over the seeds of what it adds, with the smallest and the largest.
Where there is no FP8, --fp8_emulate computes such losses slowly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

from loss_parity import losses_of, run_command

PLAIN = "bfloat16"


def window_means(losses: list[float], windows: int) -> list[float]:
    """The means of so many equal stretches."""
    borders = [round(i * len(losses) / windows) for i in range(windows + 1)]
    return [statistics.mean(losses[first:end]) for first, end in itertools.pairwise(borders)]


Losses = dict[str, list[list[float]]]  # by setting: those of each seed


def print_table(losses: Losses, n_windows: int) -> None:
    plain, *others = ([window_means(run, n_windows) for run in runs] for runs in losses.values())  # (seeds, windows) each
    n_steps = len(losses[PLAIN][0])
    print(f"{'to step':>8s} {PLAIN:>10s} {'spread':>8s}" + "".join(f"{name:>34s}" for name in list(losses)[1:]))
    for i in range(n_windows):
        base = [run[i] for run in plain]
        row = f"{round((i + 1) * n_steps / n_windows):8d} {statistics.mean(base):10.5f} {max(base) - min(base):8.5f}"
        for runs in others:
            shifts = [run[i] - without for run, without in zip(runs, base, strict=True)]
            row += f"{statistics.mean(shifts):+14.5f} ({min(shifts):+.5f}, {max(shifts):+.5f})"
        print(row)


def draw(losses: Losses, path: Path) -> None:
    """What each recipe adds to the loss, the mean over the seeds, beside each seed's distance from their mean without FP8."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, n_steps = figure.subplots(), len(losses[PLAIN][0])
    n_windows = min(50, n_steps)
    steps = [n_steps * (i + 0.5) / n_windows for i in range(n_windows)]

    def mean(runs: list[list[float]]) -> list[float]:
        return [statistics.mean(at) for at in zip(*runs, strict=True)]

    means = {name: [window_means(run, n_windows) for run in runs] for name, runs in losses.items()}
    base = mean(means[PLAIN])
    lines = [(f"{PLAIN}, each seed" if n == 0 else None, run, "0.7") for n, run in enumerate(means.pop(PLAIN))]
    for label, run, color in [*lines, *((name, mean(runs), None) for name, runs in means.items())]:
        axes.plot(steps, [loss - without for loss, without in zip(run, base, strict=True)], label=label, color=color)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel=f"loss minus the mean of {PLAIN}")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipes", nargs="+", default=["delayed"], help="of delayed, current, block, each with [:--knob=value]")
    parser.add_argument("--windows", type=int, default=10, help="rows of the table")
    parser.add_argument("--at_once", type=int, default=1, help="runs that share the machine")
    parser.add_argument("--json", type=Path, help="write every loss here as well")
    parser.add_argument("--figure", type=Path, help="draw the differences here")
    args, given = parser.parse_known_args()
    knobs = [knob for knob in given if not knob.startswith("--fp8_emulate")]
    emulate = [knob for knob in given if knob.startswith("--fp8_emulate")]
    settings = {PLAIN: []}
    for recipe in args.recipes:
        name, _, own = recipe.partition(":")
        settings[recipe] = ["--use_fp8", "--fp8_required", *emulate, f"--fp8_recipe={name}", *own.split()]
    runs = {f"{name}, seed {seed}": [*own, f"--seed={seed}"] for name, own in settings.items() for seed in args.seeds}
    every = losses_of(runs, knobs, args.at_once)
    if args.json:
        args.json.write_text(json.dumps({"knobs": given, "losses": every}) + "\n")
    losses = {name: [every[f"{name}, seed {seed}"] for seed in args.seeds] for name in settings}
    print_table(losses, args.windows)
    if args.figure:
        draw(losses, args.figure)


if __name__ == "__main__":
    run_command(lambda argv: main())
