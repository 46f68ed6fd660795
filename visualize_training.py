"""Plots of one run, or of several side by side: `python visualize_training.py [run_X.json | FOLDER ...]`.

A folder stands for its newest run that trained; where nothing is named, it is the newest one under out*/. One log becomes
run_X_analysis.png beside it; several become comparison.png beside the first: overlays by tokens and by wall time, above a table
of the knobs and results that differ (also printed). A log may be read while it is written, or after a crash.
"""

from __future__ import annotations

import argparse
import re
import sys
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

from run_file import LISTS, read_log


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plot one training run, or compare several.")
    parser.add_argument("logs", nargs="*", type=Path, help="run_X.json, or a folder for its newest [the newest under out*/]")
    parser.add_argument("--output", type=Path, help="the picture [beside the first log: run_X_analysis.png, or comparison.png]")
    parser.add_argument("--smooth", type=int, help="records in the moving mean; 1 does not smooth [a fiftieth of the records]")
    args = parser.parse_args(argv)
    if args.output and args.output.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--output={args.output}: the name of a picture ends in .png, .pdf or .svg")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output={args.output}: there is no folder {args.output.parent}; mkdir -p {args.output.parent} makes it")
    return args


if __name__ == "__main__":  # matplotlib takes half a second to import: --help and a mistyped flag are answered before that
    arguments(sys.argv[1:])
    for package in ("numpy", "matplotlib"):
        if find_spec(package) is None:
            text = f"error: this Python has no {package}: run `make quickstart` once, then `source .venv/bin/activate`"
            print(text, file=sys.stderr)
            sys.exit(2)

import numpy as np  # noqa: E402
from matplotlib import rc_context  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.axis import Axis  # noqa: E402
from matplotlib.figure import Figure, SubFigure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter  # noqa: E402

COLUMNS = {  # what is plotted of a training iteration, by the object of the record that holds it
    "": ("iter", "loss", "lr", "time_ms", "data_wait_ms", "tokens"),
    "mfu": ("mfu_percent", "mfu_causal_percent", "tokens_per_sec"),
    "memory": ("allocated_gb", "peak_gb", "reserved_gb"),
    "gradients": ("global_norm", "grad_std"),
}
TIME_STAMP = re.compile(r"\d{8}_\d{6}")  # the name of a run that was given none
DRAWN_POINTS = 3_000  # a line of more points than the picture has pixels is thinned to its extremes
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")  # Okabe and Ito's, and brown
BLUE, ORANGE, GREY = *COLOURS[:2], "0.5"


class LogError(ValueError):
    """A log that cannot be plotted; the message is for the user."""


@dataclass
class Run:
    """One run log; its training iterations as columns, NaN where a figure was not measured."""

    path: Path
    name: str
    knobs: dict[str, Any]
    startup_info: dict[str, Any]
    summary: dict[str, Any]
    eval_steps: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    events: list[dict[str, Any]]
    steps: dict[str, np.ndarray]

    def has(self, column: str) -> bool:
        return bool(np.isfinite(self.steps[column]).any())

    def evaluations(self, key: str) -> np.ndarray:
        """One figure of every evaluation; NaN where it is missing."""
        return np.array([record.get(key) for record in self.eval_steps], dtype=float)

    def best(self, key: str) -> float | None:
        return min((record[key] for record in self.eval_steps if record.get(key) is not None), default=None)


def read_run(path: Path) -> Run:
    """Reads a log: finished, being written, or torn. Raises LogError where it is no run log or has no training iteration."""
    columns = {name: array("d") for names in COLUMNS.values() for name in names}
    try:
        sections, records = read_log(path)
        for record in records:
            for group, names in COLUMNS.items():
                figures = (record.get(group) or {}) if group else record
                for name in names:
                    value = figures.get(name)
                    columns[name].append(float("nan") if value is None else value)
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}{folders_with_logs()}") from None
    except (AttributeError, TypeError):  # its lines hold something else than records
        sections = {}
    if "run_name" not in sections:
        raise LogError(f"{path}: this is no run log; a run writes its own as out_dir/run_<name>.json")
    if not columns["iter"]:
        raise LogError(f"{path}: no training iteration is logged yet; try again after the run's first step")
    knobs, *others = sections.get("config", {}).get("values", {}), sections.get("startup_info", {}), sections.get("summary", {})
    lists = {name: sections[name] for name in LISTS}
    return Run(path, sections["run_name"], knobs, *others, **lists, steps={name: np.frombuffer(y) for name, y in columns.items()})


def newest_run(pattern: str, *folders: Path) -> Run:
    """The run written last in the first of the folders that has any; logs without a training iteration are passed over.

    Raises LogError.
    """
    for folder in folders:
        for path in sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True):
            with suppress(LogError):
                return read_run(path)
    raise LogError(
        f"{folders[0]}: no {pattern} has a training iteration; name a log: python visualize_training.py FOLDER/run_X.json"
        f"{folders_with_logs()}"
    )


def folders_with_logs() -> str:
    """For an error: the folders out*/ that hold logs."""
    folders = sorted({path.parent.name for path in Path.cwd().glob("out*/run_*.json")})
    return f"; there are logs in {', '.join(folders)}" if folders else ""


def moving_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` records around each one; what is not finite does not count."""
    finite = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(y))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + (window + 1) // 2, len(y))
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """About DRAWN_POINTS points at most that look the same: the lowest and the highest of each stretch."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    size = 2 * len(y) // DRAWN_POINTS
    if size < 3:
        return x, y
    whole = len(y) // size * size
    stretches, starts = y[:whole].reshape(-1, size), np.arange(0, whole, size)
    index = np.unique(np.concatenate([starts + stretches.argmin(1), starts + stretches.argmax(1), [len(y) - 1]]))
    return x[index], y[index]


def window_of(run: Run, smooth: int | None) -> int:
    """Records in the moving mean: as asked for, or a fiftieth of the run."""
    return max(1, len(run.steps["iter"]) // 50 if smooth is None else smooth)


def draw(ax: Axes, run: Run, column: str, window: int, **style: Any) -> None:
    """A column as it was logged, faint, and its moving mean over the time of `window` records, bold."""
    measured = np.isfinite(run.steps[column])
    x, y, window = run.steps["iter"][measured], run.steps[column][measured], max(1, round(window * measured.mean()))
    if window > 1:
        ax.plot(*thinned(x, y), color=style["color"], alpha=0.22, linewidth=0.7)
    marker = "o" if len(y) == 1 else None  # a single record makes no line
    ax.plot(*thinned(x, moving_mean(y, window)), linewidth=1.6, marker=marker, **style)


def limit_to_bulk(ax: Axes, *lines: np.ndarray) -> None:
    """Vertical limits that a few outliers do not stretch: from 0 to a margin above the 99th percentile."""
    high = max((np.nanpercentile(y, 99) for y in lines if np.isfinite(y).any()), default=0)
    if high > 0:
        ax.set_ylim(0, 1.3 * high)  # room for a legend


def limit_to_later(ax: Axes, *lines: tuple[np.ndarray, np.ndarray]) -> None:
    """Vertical limits of loss curves: what follows the first 4 % of each, where the differences are, fills the panel."""
    shown = np.concatenate([y[(x >= 0.04 * x[-1]) & np.isfinite(y)] for x, y in lines if len(x)])
    if len(shown) and shown.max() > shown.min():
        span = shown.max() - shown.min()
        ax.set_ylim(shown.min() - 0.14 * span, shown.max() + 0.08 * span)


def log_scale(ax: Axes) -> None:
    """A logarithmic vertical axis with numbers at 1, 2, 5, 10, ...; where fewer than two of them are in sight, evenly spaced."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    at = LogLocator(subs=(1, 2, 5))
    if sum(low <= value <= high for value in at.tick_values(low, high)) < 2:
        at = MaxNLocator(4)
    ax.yaxis.set_major_locator(at)
    ax.yaxis.set_minor_formatter(NullFormatter())
    label_ticks(ax.yaxis)


def grid(figure: Figure | SubFigure, counts: Sequence[int], heights: Sequence[float]) -> list[Axes]:
    """Axes row by row, `counts` in each, as wide as the row allows: no holes."""
    rows = zip(counts, figure.add_gridspec(len(counts), 1, height_ratios=heights), strict=True)
    return [figure.add_subplot(place) for count, row in rows for place in row.subgridspec(1, count)]


def spread(panels: int, per_row: int) -> list[int]:
    """Panels in each row, as even as can be: 7 in rows of 3 at most are 3, 2, 2."""
    rows = -(-panels // per_row)
    return [panels // rows + (row < panels % rows) for row in range(rows)]


def dress(ax: Axes, title: str, y_label: str, x_label: str) -> None:
    ax.set_title(title, loc="left", fontweight="bold", fontsize=10)
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.grid(True, alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.01)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "step", steps=(1, 2, 5, 10)))
    label_ticks(ax.xaxis)
    label_ticks(ax.yaxis)


def label_ticks(axis: Axis) -> None:
    """2.5M, 500k, 0.25; with exponents (2e-4) all along an axis of small numbers."""
    axis.set_major_formatter(lambda value, _: in_words(value, 6, plain_from=0.1 if max(axis.get_view_interval()) < 0.1 else 1e-3))


def in_words(number: float, digits: int = 3, plain_from: float = 0.01) -> str:
    """1.24M, 6B, 0.25; 6e-4 where it is less than `plain_from`."""
    number = float(f"{number:.{digits}g}")  # first: 999,999 is 1M, not 1000k
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    if not 0 < abs(number) < plain_from:
        return f"{number:g}"
    mantissa, exponent = f"{number:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def time_unit(seconds: float) -> tuple[str, int]:
    """The unit that suits, and its seconds."""
    return ("s", 1) if seconds < 120 else ("min", 60) if seconds < 7200 else ("h", 3600)


def time_span(seconds: float | None) -> str | None:
    """45 s, 12.5 min, 63.2 h."""
    if seconds is None:
        return None
    unit, unit_s = time_unit(seconds)
    return f"{seconds / unit_s:.{int(unit_s > 1)}f} {unit}"


@dataclass(frozen=True)
class Panel:
    title: str
    y_label: str
    columns: dict[str, str | None]  # each with its name in the legend; the panel is left out where the first was not measured
    is_smoothed: bool = True
    is_logarithmic: bool = False


PANELS = (
    Panel("Learning rate", "lr", {"lr": None}, is_smoothed=False),
    Panel("Model FLOPs utilisation", "% of peak", {"mfu_percent": "full attention", "mfu_causal_percent": "causal attention"}),
    Panel("Throughput", "tokens/s", {"tokens_per_sec": None}),
    Panel("Step time", "ms", {"time_ms": "step", "data_wait_ms": "of it, waiting for data"}),
    Panel("GPU memory", "GB", {"allocated_gb": "allocated", "peak_gb": "peak", "reserved_gb": "reserved"}, is_smoothed=False),
    Panel("Gradient norm, before clipping", "L2 norm", {"global_norm": None}, is_logarithmic=True),
    Panel("Gradient elements", "standard deviation", {"grad_std": None}, is_logarithmic=True),
)


def draw_panel(ax: Axes, run: Run, panel: Panel, window: int) -> None:
    dress(ax, panel.title, panel.y_label, "step")
    for (column, label), color in zip(panel.columns.items(), COLOURS, strict=False):
        draw(ax, run, column, window if panel.is_smoothed else 1, color=color, label=label)
    if "global_norm" in panel.columns and (clip := run.knobs.get("grad_clip")):
        ax.axhline(clip, color=GREY, linestyle=":", linewidth=1, label=f"clipped at {clip:g}")
    if panel.is_logarithmic:
        log_scale(ax)
    else:
        limit_to_bulk(ax, *(run.steps[column] for column in panel.columns))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper right", ncols=3)


def draw_loss(ax: Axes, run: Run, window: int) -> None:
    dress(ax, "Loss", "nats per token", "step")
    draw(ax, run, "loss", window, color=BLUE, label="train" if window == 1 else f"train, mean of {window:,} records")
    at, val, train = (run.evaluations(key) for key in ("iter", "val_loss", "train_loss"))
    if np.isfinite(val).any():
        size = 4 if len(at) <= 60 else 1.5
        ax.plot(at, train, "s", color=BLUE, markersize=size, markerfacecolor="white", label="train, evaluated")
        ax.plot(at, val, "o-", color=ORANGE, markersize=size, linewidth=1.4, label="validation")
        best = run.eval_steps[int(np.nanargmin(val))]
        label = f"best: {best['val_loss']:.4f} at step {best['iter']:,}"
        if bits := best.get("val_bits_per_byte"):
            label += f", {bits:.4f} bits per byte"
        ax.plot(best["iter"], best["val_loss"], "*", color=ORANGE, markersize=14, markeredgecolor="white", zorder=5, label=label)
    mark_events(ax, run)
    limit_to_later(ax, (run.steps["iter"], moving_mean(run.steps["loss"], window)), (at, val), (at, train))
    ax.legend(loc="best", ncols=2)


def mark_events(ax: Axes, run: Run) -> None:
    """Checkpoints as ticks at the bottom, skipped steps as crosses at the top, resumes as vertical lines."""
    edge = ax.get_xaxis_transform()
    saved = sorted({record["iter"] for record in run.checkpoints})
    skipped = [event["iter"] for event in run.events if event["kind"] == "skipped_step"]
    if saved:
        ax.plot(saved, [0.02] * len(saved), "|", color="0.35", markersize=8, transform=edge, label="checkpoint")
    if skipped:
        ax.plot(skipped, [0.97] * len(skipped), "x", color="crimson", markersize=6, transform=edge, label="skipped step")
    resumed = {event["iter"] for event in run.events if event["kind"] == "resume"}
    for number, step in enumerate(sorted(step for step in resumed if step < run.steps["iter"][-1])):  # what went on from there
        ax.axvline(step, color=GREY, linestyle="--", linewidth=0.9, label=None if number else "resumed")


def plot_run(run: Run, smooth: int | None) -> Figure:
    """The picture of one run: the loss over the whole width, and below it what else was measured."""
    panels = [panel for panel in PANELS if run.has(next(iter(panel.columns)))]
    counts = [1, *spread(len(panels), per_row=3)]
    heights = [1.7, *[1.0] * (len(counts) - 1)]
    figure = Figure(figsize=(14, 2.5 * sum(heights) + 0.6), layout="constrained")
    loss, *others = grid(figure, counts, heights)
    draw_loss(loss, run, window_of(run, smooth))
    for ax, panel in zip(others, panels, strict=True):
        draw_panel(ax, run, panel, window_of(run, smooth))
    figure.suptitle(heading(run), fontsize=11)
    return figure


def heading(run: Run) -> str:
    """What was trained, and how far: two lines above the picture."""
    what = [run.name, architecture(run), run.knobs.get("dataset")]
    how_far = [
        f"step {run.steps['iter'][-1]:,.0f}" + (f" of {run.knobs['max_iters']:,}" if "max_iters" in run.knobs else ""),
        f"{in_words(run.steps['tokens'][-1])} tokens",
        time_span(run.summary.get("wall_s")),
        run.summary.get("status"),
    ]
    return "\n".join("   ·   ".join(filter(None, line)) for line in (what, how_far))


@dataclass(frozen=True)
class Overlay:
    title: str
    y_label: str
    column: str | None  # of the training iterations: drawn smoothed, thin
    evaluated: str | None = None  # of the evaluations: drawn bold
    by_time: bool = False

    def is_measured(self, run: Run) -> bool:
        return run.has(self.column) if self.column else run.best(self.evaluated) is not None


OVERLAYS = (
    Overlay("Loss by tokens", "nats per token", "loss", "val_loss"),
    Overlay("Loss by wall time", "nats per token", "loss", "val_loss", by_time=True),
    Overlay("Validation", "bits per byte", None, "val_bits_per_byte"),
    Overlay("Gradient norm, before clipping", "L2 norm", "global_norm"),
    Overlay("Throughput", "tokens/s", "tokens_per_sec"),
    Overlay("Model FLOPs utilisation", "% of peak", "mfu_percent"),
)


def wall_seconds(run: Run) -> np.ndarray:
    """Wall time at each record: the steps' own times added up, moved to the clock wherever an evaluation read it."""
    x = run.steps["iter"]
    # A record stands for the steps since the one before it.
    training_s = np.cumsum(np.nan_to_num(run.steps["time_ms"]) * np.diff(x, prepend=x[0] - 1)) / 1e3
    at, wall_s = run.evaluations("iter"), run.evaluations("wall_s")
    if len(at):
        training_s += np.interp(x, at, wall_s - np.interp(at, x, training_s))
    return training_s


def draw_overlay(ax: Axes, runs: Sequence[Run], overlay: Overlay, smooth: int | None) -> None:
    unit, unit_s = time_unit(max(wall_seconds(run)[-1] for run in runs))
    dress(ax, overlay.title, overlay.y_label, unit if overlay.by_time else "tokens")
    lines = []
    for run, color in zip(runs, cycle(COLOURS), strict=False):
        x = wall_seconds(run) / unit_s if overlay.by_time else run.steps["tokens"]
        if overlay.column:
            lines.append((x, moving_mean(run.steps[overlay.column], window_of(run, smooth))))
            ax.plot(*thinned(*lines[-1]), color=color, linewidth=1.0, alpha=0.6 if overlay.evaluated else 1.0)
        if overlay.evaluated and run.best(overlay.evaluated) is not None:
            at, y = np.interp(run.evaluations("iter"), run.steps["iter"], x), run.evaluations(overlay.evaluated)
            ax.plot(at, y, "o-", color=color, linewidth=1.8, markersize=3.5)
            lines.append((at, y) if overlay.column else (x, np.interp(x, at, y)))  # alone it counts between its points, too
    if overlay.evaluated:
        limit_to_later(ax, *lines)
    elif overlay.column == "global_norm":
        log_scale(ax)
    else:
        limit_to_bulk(ax, *(y for _, y in lines))


def compare_runs(runs: Sequence[Run], table: list[list[str]], smooth: int | None) -> Figure:
    """The picture of several runs: overlaid curves, and the table of differences below."""
    overlays = [each for each in OVERLAYS if any(each.is_measured(run) for run in runs)]
    counts = spread(len(overlays), per_row=2)
    curves_inches, table_inches = 3.3 * len(counts), 0.24 * len(table) + 0.3
    figure = Figure(figsize=(14, curves_inches + table_inches), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[curves_inches, table_inches])
    axes = grid(top, counts, [1.0] * len(counts))
    for ax, overlay in zip(axes, overlays, strict=True):
        draw_overlay(ax, runs, overlay, smooth)
    handles = [Line2D([], [], color=color, linewidth=3) for _, color in zip(runs, cycle(COLOURS), strict=False)]
    names = [f"{label}  {architecture_of_unnamed(run)}" for run, label in zip(runs, labels(runs), strict=True)]
    style = {"title": "thin: train, smoothed · bold: validation", "title_fontsize": 8}
    per_row = max(1, 180 // (8 + max(map(len, names))))  # letters
    top.legend(handles, names, loc="outside upper center", ncols=per_row, **style)
    draw_table(bottom.subplots(), table)
    return figure


def labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names, with their folder where two are the same."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.path.parent.name}/{run.name}" for run in runs]


def architecture(run: Run) -> str | None:
    return run.startup_info.get("model", {}).get("architecture")


def architecture_of_unnamed(run: Run) -> str:
    """What tells a run apart whose name is its time stamp; empty for the others."""
    return (TIME_STAMP.fullmatch(run.name) and architecture(run)) or ""


RESULTS: dict[str, Callable[[Run], Any]] = {
    "architecture": architecture,
    "parameters": lambda run: run.startup_info.get("model", {}).get("parameters"),
    "status": lambda run: run.summary.get("status"),
    "steps": lambda run: int(run.steps["iter"][-1]),
    "tokens": lambda run: in_words(run.steps["tokens"][-1]),
    "wall time": lambda run: time_span(run.summary.get("wall_s")),
    "last train loss": lambda run: float(run.steps["loss"][-1]),
    "best val loss": lambda run: run.best("val_loss"),
    "best val bits per byte": lambda run: run.best("val_bits_per_byte"),
    "tokens/s": lambda run: run.summary.get("avg_tokens_per_sec"),
    "MFU, %": lambda run: run.summary.get("avg_mfu"),
}


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of text, a name and a cell for each run: the knobs that differ, then the results that are known."""
    naming = {"run_name", "out_dir", "wandb_run_name", "init_from", "resume"}  # these say where a run is and how it was started
    names = sorted(set().union(*(run.knobs for run in runs)) - naming)
    knobs = [[name, *(cell(run.knobs.get(name)) for run in runs)] for name in names]
    results = [[name, *(cell(result(run)) for run in runs)] for name, result in RESULTS.items()]
    if len({run.knobs.get("eval_iters") for run in runs}) > 1:  # not the same tokens: the losses are not comparable
        results = [[name + " (eval_iters differ)" * ("val" in name), *cells] for name, *cells in results]
    return [row for row in knobs if len(set(row[1:])) > 1] + [row for row in results if set(row[1:]) != {"-"}]


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else in_words(value, 4)
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value).replace("\n", "\\n")


def table_text(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table)


def draw_table(ax: Axes, table: list[list[str]]) -> None:
    """The differences over the whole width: columns as wide as their texts, letters as large as then fit."""
    longest = max(12, 200 // len(table[0]))
    texts = [[text if len(text) <= longest else text[: longest - 1] + "…" for text in line] for line in table]
    widths = [max(map(len, column)) + 3 for column in zip(*texts, strict=True)]
    ax.axis("off")
    shares = [width / sum(widths) for width in widths]
    drawn = ax.table(texts, colWidths=shares, bbox=[0, 0, 1, 1], cellLoc="left", edges="horizontal")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(min(9, 9 * 170 / sum(widths)))
    for (row, column), box in drawn.get_celld().items():
        box.set_edgecolor("0.85")
        if row == 0 or column == 0:
            box.set_text_props(fontweight="bold", color=COLOURS[(column - 1) % len(COLOURS)] if column else "black")


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    try:
        runs = [newest_run("run_*.json", path) if path.is_dir() else read_run(path) for path in args.logs]
        runs = runs or [newest_run("out*/run_*.json", Path.cwd(), Path(__file__).resolve().parent)]
        with rc_context({"font.size": 9, "legend.fontsize": 8, "legend.framealpha": 0.85}):
            if len(runs) == 1:
                output = args.output or runs[0].path.with_name(f"{runs[0].path.stem}_analysis.png")
                figure = plot_run(runs[0], args.smooth)
            else:
                output, table = args.output or runs[0].path.with_name("comparison.png"), [["", *labels(runs)], *differences(runs)]
                print(table_text(table))
                figure = compare_runs(runs, table, args.smooth)
            figure.savefig(output, dpi=110)
    except (LogError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
