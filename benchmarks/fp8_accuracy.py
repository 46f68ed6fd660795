"""Does FP8 change a run's loss by more than another seed does?

    python benchmarks/fp8_accuracy.py CONFIG [--knob=value ...] [--seeds 1 2 3] [--recipes delayed delayed:--fp8_less_memory]
        [--windows=10] [--at_once=1] [--json=FILE] [--figure=FILE.png]

Trains from each seed without FP8 and with each recipe, which may have knobs of its own behind a colon. A seed draws weights,
order and dropout. The table has for each tenth of the run the mean loss without FP8, the spread of the seeds (the largest less
the smallest of their means), and for each recipe the mean over the seeds of what it adds, with the smallest and the largest.
Where there is no FP8, --fp8_emulate computes such losses slowly.
"""

from __future__ import annotations

import itertools
import json
from operator import sub
from pathlib import Path
from statistics import mean

from command_line import output_file
from loss_parity import check_seeds, losses_of, losses_parser

from configurator import UserError, load_config, run_command

PLAIN, PLAIN_KNOBS = "without FP8", ["--use_fp8=False", "--fp8_required=False", "--fp8_less_memory=False"]
Losses = dict[str, list[list[float]]]  # by setting: those of each seed


def compare(losses: Losses, n_windows: int) -> tuple[list[list[float]], Losses]:
    """Means over equal stretches of the run, (windows, seeds): those without FP8, and what each recipe adds to them."""
    n_steps = len(losses[PLAIN][0])
    windows = list(itertools.pairwise(round(i * n_steps / n_windows) for i in range(n_windows + 1)))
    means = {name: [[mean(run[first:end]) for run in runs] for first, end in windows] for name, runs in losses.items()}
    plain = means.pop(PLAIN)
    added = {name: [list(map(sub, *pair)) for pair in zip(table, plain, strict=True)] for name, table in means.items()}
    return plain, added


def print_table(losses: Losses, n_windows: int) -> None:
    plain, added = compare(losses, n_windows)
    n_steps = len(losses[PLAIN][0])
    print(f"{'to step':>8s} {PLAIN:>12s} {'spread':>8s}" + "".join(f"{name:>34s}" for name in added))
    for i, (base, *others) in enumerate(zip(plain, *added.values(), strict=True)):
        row = f"{round((i + 1) * n_steps / n_windows):8d} {mean(base):12.5f} {max(base) - min(base):8.5f}"
        for shifts in others:
            row += f"{mean(shifts):+14.5f} ({min(shifts):+.5f}, {max(shifts):+.5f})"
        print(row)


def draw(losses: Losses, path: Path) -> None:
    """What each recipe adds to a seed's loss, and the mean of that, beside how far the seeds are apart without FP8."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, n_steps = figure.subplots(), len(losses[PLAIN][0])
    n_windows = min(50, n_steps)
    steps = [n_steps * (i + 0.5) / n_windows for i in range(n_windows)]
    plain, added = compare(losses, n_windows)
    distances = [[loss - mean(at) for loss in at] for at in plain]  # (windows, seeds)
    axes.fill_between(steps, list(map(min, distances)), list(map(max, distances)), color="0.9", label=f"{PLAIN}, all seeds")
    for number, (name, shifts) in enumerate(added.items()):
        axes.plot(steps, shifts, color=f"C{number}", linewidth=0.6, alpha=0.5)  # a line for each seed
        axes.plot(steps, list(map(mean, shifts)), color=f"C{number}", label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel=f"loss minus that {PLAIN}")
    axes.legend()
    figure.savefig(path, dpi=150)


def settings_of(recipes: list[str], knobs: list[str], emulate: list[str]) -> dict[str, list[str]]:
    """Knobs by setting. Raises UserError where a recipe could not run here."""
    import torch

    from fp8 import choose_fp8
    from kernels import REFERENCE
    from parallel import Ranks

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not emulate:
        raise UserError("a GPU computes in FP8, and there is none here; pass --fp8_emulate")
    settings = {PLAIN: PLAIN_KNOBS}
    for recipe in recipes:
        name, _, own = recipe.partition(":")
        if recipe in settings or not all(knob.startswith("--fp8_") for knob in own.split()):
            raise UserError(f"--recipes {recipe}: once each, and behind the colon knobs of FP8, as in delayed:--fp8_margin=1")
        settings[recipe] = ["--use_fp8", "--fp8_required", *emulate, f"--fp8_recipe={name}", *own.split()]
        choose_fp8(load_config([*knobs, *settings[recipe]]), Ranks(0, 1, device), torch.bfloat16, REFERENCE)
    return settings


def main() -> None:
    parser = losses_parser(__doc__, [1, 2, 3])
    parser.add_argument("--recipes", nargs="+", default=["delayed"], help="of delayed, current, block, each with [:--knob=value]")
    parser.add_argument("--windows", type=int, default=10, help="rows of the table")
    parser.add_argument("--figure", type=output_file, help="draw the differences here, as a .png")
    args, given = parser.parse_known_args()
    check_seeds(args.seeds)
    knobs = [knob for knob in given if not knob.startswith("--fp8_emulate")]
    emulate = [knob for knob in given if knob.startswith("--fp8_emulate")]
    steps = load_config([*knobs, *PLAIN_KNOBS]).optim.max_iters
    if not 0 < args.windows <= steps:
        raise UserError(f"--windows={args.windows} cuts {steps:,} steps into windows; pass 1 to {steps:,}")
    if args.figure and args.figure.suffix != ".png":
        raise UserError(f"--figure={args.figure} must end in .png")
    settings = settings_of(args.recipes, knobs, emulate)
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
