"""Plots of one run, or of several side by side: `python visualize_training.py [run_X.json ...]`.

With no file it takes the newest run under out*/. One log becomes run_X_analysis.png beside it; several become one picture
that overlays them by tokens and by wall time, above a table of the knobs and results that differ (also printed).
A log may be read while it is written, or after a crash. Needs numpy and matplotlib, and nothing else of this repository.
"""

from __future__ import annotations

import argparse
import json
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported after the arguments are parsed, so that --help is quick
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = {  # what is plotted of a training iteration: name -> where it stands in the record
    "iter": ("iter",),
    "loss": ("loss",),
    "lr": ("lr",),
    "time_ms": ("time_ms",),
    "data_wait_ms": ("data_wait_ms",),
    "tokens": ("tokens",),
    "mfu_percent": ("mfu", "mfu_percent"),
    "mfu_causal_percent": ("mfu", "mfu_causal_percent"),
    "flops_per_token": ("mfu", "flops_per_token"),
    "tokens_per_sec": ("mfu", "tokens_per_sec"),
    "allocated_gb": ("memory", "allocated_gb"),
    "peak_gb": ("memory", "peak_gb"),
    "reserved_gb": ("memory", "reserved_gb"),
    "global_norm": ("gradients", "global_norm"),
    "grad_std": ("gradients", "grad_std"),
}
DRAWN_POINTS = 3_000  # a line of more points than the picture has pixels is thinned to its extremes
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")  # Okabe and Ito's, and brown
BLUE, ORANGE, GREEN, PINK, GREY = *COLOURS[:4], "0.5"


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

    def has(self, *columns: str) -> bool:
        import numpy as np

        return any(np.isfinite(self.steps[column]).any() for column in columns)

    def evaluations(self, key: str) -> np.ndarray:
        """One figure of every evaluation; NaN where it is missing."""
        import numpy as np

        return np.array([record.get(key) for record in self.eval_steps], dtype=float)

    def best(self, key: str) -> float | None:
        return min((record[key] for record in self.eval_steps if record.get(key) is not None), default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def log_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(section, value or record) of a run log. Its writer puts one record on a line, so a torn line costs that line only."""
    section = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith('{"run_name": ' if not section else ' "'):
                section, _, line = line[2:].partition('": ')
            with suppress(ValueError):  # a bracket, or what a crash left
                yield section, json.loads(line.strip(" ,\n"))


def read_run(path: Path) -> Run:
    """Reads a log: finished, being written, or torn. Raises LogError where it is no run log or has no training iteration."""
    import numpy as np

    values: dict[str, Any] = {}
    lists: dict[str, list[dict[str, Any]]] = {"eval_steps": [], "checkpoints": [], "events": []}
    columns = {name: array("d") for name in COLUMNS}
    try:
        for section, entry in log_entries(path):
            if section == "training_iterations":
                for name, keys in COLUMNS.items():
                    value: Any = entry
                    for key in keys:
                        value = value and value.get(key)
                    columns[name].append(float("nan") if value is None else value)
            elif section in lists:
                lists[section].append(entry)
            else:
                values[section] = entry
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}") from None
    except (AttributeError, TypeError):
        values = {}
    if "run_name" not in values:
        raise LogError(f"{path}: this is no run log; a run writes its own as out_dir/run_<name>.json")
    if not columns["iter"]:
        raise LogError(f"{path}: no training iteration is logged yet; try again after the run's first step")
    steps = {name: np.frombuffer(column) for name, column in columns.items()}
    knobs = values.get("config", {}).get("values", {})
    return Run(path, values["run_name"], knobs, values.get("startup_info", {}), values.get("summary", {}), **lists, steps=steps)


def newest_log() -> Path:
    """The log written last under out*/ of the working folder, or else of the repository. Raises LogError."""
    for folder in (Path.cwd(), Path(__file__).resolve().parent):
        if logs := list(folder.glob("out*/run_*.json")):
            return max(logs, key=lambda path: path.stat().st_mtime)
    raise LogError("there is no out*/run_*.json here; name a log: python visualize_training.py FOLDER/run_X.json")


# ---------------------------------------------------------------------------------------------------------------------
# Lines and axes
# ---------------------------------------------------------------------------------------------------------------------


def moving_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` records around each one; what is not finite does not count."""
    import numpy as np

    finite = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(y))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + (window + 1) // 2, len(y))
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """About DRAWN_POINTS points at most that look the same: the lowest and the highest of each stretch."""
    import numpy as np

    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    size = 2 * len(y) // DRAWN_POINTS
    if size < 3:
        return x, y
    whole = len(y) // size * size
    stretches, starts = y[:whole].reshape(-1, size), np.arange(0, whole, size)
    index = np.unique(np.concatenate([starts + stretches.argmin(1), starts + stretches.argmax(1), [len(y) - 1]]))
    return x[index], y[index]


def draw(ax: Axes, run: Run, column: str, window: int, **style: Any) -> None:
    """A column as it was logged, faint, and its moving mean over the time of `window` records, bold."""
    import numpy as np

    measured = np.isfinite(run.steps[column])
    x, y, window = run.steps["iter"][measured], run.steps[column][measured], max(1, round(window * measured.mean()))
    if window > 1:
        ax.plot(*thinned(x, y), color=style["color"], alpha=0.22, linewidth=0.7)
    marker = "o" if len(y) == 1 else None  # a single record makes no line
    ax.plot(*thinned(x, moving_mean(y, window)), linewidth=1.6, marker=marker, **style)


def limit_to_bulk(ax: Axes, *lines: np.ndarray) -> None:
    """Vertical limits that a few outliers do not stretch: from 0 to a margin above the 99th percentile."""
    import numpy as np

    high = max(np.nanpercentile(y, 99) for y in lines if np.isfinite(y).any())
    if high > 0:
        ax.set_ylim(0, 1.4 * high)  # room for a legend


def limit_to_later(ax: Axes, *lines: tuple[np.ndarray, np.ndarray]) -> None:
    """Vertical limits of loss curves: what follows the first 4 % of each, where the differences are, fills the panel."""
    import numpy as np

    shown = np.concatenate([y[(x >= 0.04 * x[-1]) & np.isfinite(y)] for x, y in lines if len(x)])
    if len(shown) and shown.max() > shown.min():
        span = shown.max() - shown.min()
        ax.set_ylim(shown.min() - 0.14 * span, shown.max() + 0.08 * span)


def log_scale(ax: Axes) -> None:
    """A logarithmic vertical axis with plain numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def grid(figure: Figure, counts: Sequence[int], heights: Sequence[float]) -> list[Axes]:
    """Axes row by row, `counts` in each, as wide as the row allows: no holes."""
    axes = []
    for count, row in zip(counts, figure.add_gridspec(len(counts), 1, height_ratios=heights), strict=True):
        axes += [figure.add_subplot(place) for place in row.subgridspec(1, count)]
    return axes


def spread(panels: int, per_row: int) -> list[int]:
    """Panels in each row, as even as can be: 7 in rows of 3 at most are 3, 2, 2."""
    rows = -(-panels // per_row)
    return [panels // rows + (row < panels % rows) for row in range(rows)]


def dress(ax: Axes, title: str, y_label: str, x_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, loc="left", fontweight="bold", fontsize=10)
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.grid(True, alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.01)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "step", steps=(1, 2, 5, 10)))
    ax.xaxis.set_major_formatter(lambda value, _: in_words(value) if x_label == "tokens" else f"{value:,.10g}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")


def in_words(count: float) -> str:
    """1.24M, 6B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def span(seconds: float | None) -> str | None:
    """45 s, 12.5 min, 63.2 h."""
    if seconds is None:
        return None
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def window_of(run: Run, smooth: int | None) -> int:
    """Records in the moving mean: as asked for, or a fiftieth of the run."""
    return max(1, len(run.steps["iter"]) // 50 if smooth is None else smooth)


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


def loss_panel(ax: Axes, run: Run, window: int) -> None:
    import numpy as np

    draw(ax, run, "loss", window, color=BLUE, label="train" if window == 1 else f"train, mean of {window:,} records")
    at, val = run.evaluations("iter"), run.evaluations("val_loss")
    if np.isfinite(val).any():
        size = 4 if len(at) <= 60 else 1.5
        train = run.evaluations("train_loss")
        ax.plot(at, train, "s", color=BLUE, markersize=size, markerfacecolor="white", label="train, evaluated")
        ax.plot(at, val, "o-", color=ORANGE, markersize=size, linewidth=1.4, label="validation")
        mark_best(ax, run, int(np.nanargmin(val)))
    mark_events(ax, run)
    limit_to_later(ax, (run.steps["iter"], moving_mean(run.steps["loss"], window)), (at, val))
    ax.legend(loc="upper right", ncols=2)


def mark_best(ax: Axes, run: Run, index: int) -> None:
    record = run.eval_steps[index]
    place, bits = (record["iter"], record["val_loss"]), record.get("val_bits_per_byte")
    text = f"best {place[1]:.4f} at step {place[0]:,}" + (f"\n{bits:.4f} bits per byte" if bits else "")
    late = place[0] > run.steps["iter"].mean()  # the text stays inside the panel
    ax.plot(*place, "*", color=ORANGE, markersize=14, markeredgecolor="white", zorder=5)
    ax.annotate(
        text, place, xytext=(-12 if late else 12, 30), textcoords="offset points", ha="right" if late else "left",
        color=ORANGE, arrowprops={"arrowstyle": "-", "color": ORANGE, "linewidth": 0.8},
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
    )  # fmt: skip


def mark_events(ax: Axes, run: Run) -> None:
    """Checkpoints as ticks at the bottom, skipped steps as crosses at the top, resumes as vertical lines."""
    edge = ax.get_xaxis_transform()
    saved = sorted({record["iter"] for record in run.checkpoints})
    skipped = [event["iter"] for event in run.events if event["kind"] == "skipped_step"]
    if saved:
        ax.plot(saved, [0.02] * len(saved), "|", color="0.35", markersize=8, transform=edge, label="checkpoint")
    if skipped:
        ax.plot(skipped, [0.97] * len(skipped), "x", color="crimson", markersize=6, transform=edge, label="skipped step")
    for number, step in enumerate(sorted({event["iter"] for event in run.events if event["kind"] == "resume"})):
        ax.axvline(step, color=GREY, linestyle="--", linewidth=0.9, label=None if number else "resumed")


def lr_panel(ax: Axes, run: Run, window: int) -> None:
    draw(ax, run, "lr", 1, color=BLUE)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")


def mfu_panel(ax: Axes, run: Run, window: int) -> None:
    draw(ax, run, "mfu_percent", window, color=GREEN, label="full attention")
    draw(ax, run, "mfu_causal_percent", window, color=BLUE, label="causal attention")
    limit_to_bulk(ax, run.steps["mfu_percent"])
    ax.legend(loc="upper right", ncols=2)


def rate_panel(ax: Axes, run: Run, window: int) -> None:
    """Tokens a second, and on the right what they are in TFLOP/s: one is the other times the FLOPs of a token."""
    draw(ax, run, "tokens_per_sec", window, color=GREEN)
    limit_to_bulk(ax, run.steps["tokens_per_sec"])
    tflop = run.steps["flops_per_token"][-1] / 1e12
    ax.secondary_yaxis("right", functions=(lambda y: y * tflop, lambda y: y / tflop)).set_ylabel("TFLOP/s")


def time_panel(ax: Axes, run: Run, window: int) -> None:
    draw(ax, run, "time_ms", window, color=BLUE, label="step")
    draw(ax, run, "data_wait_ms", window, color=ORANGE, label="of it, waiting for data")
    limit_to_bulk(ax, run.steps["time_ms"])
    ax.legend(loc="upper right", ncols=2)


def memory_panel(ax: Axes, run: Run, window: int) -> None:
    for name, color in (("reserved", GREY), ("peak", ORANGE), ("allocated", BLUE)):
        draw(ax, run, f"{name}_gb", 1, color=color, label=name)
    limit_to_bulk(ax, run.steps["reserved_gb"], run.steps["peak_gb"])
    ax.legend(loc="upper right", ncols=3)


def norm_panel(ax: Axes, run: Run, window: int) -> None:
    draw(ax, run, "global_norm", window, color=PINK)
    log_scale(ax)
    if clip := run.knobs.get("grad_clip"):
        ax.axhline(clip, color=GREY, linestyle=":", linewidth=1, label=f"clipped at {clip:g}")
        ax.legend(loc="upper right")


def std_panel(ax: Axes, run: Run, window: int) -> None:
    draw(ax, run, "grad_std", window, color=PINK)
    log_scale(ax)


@dataclass(frozen=True)
class Panel:
    title: str
    y_label: str
    columns: tuple[str, ...]  # the panel is left out where none of them was measured
    draw: Callable[[Axes, Run, int], None]


PANELS = (
    Panel("Learning rate", "lr", ("lr",), lr_panel),
    Panel("Model FLOPs utilisation", "% of peak", ("mfu_percent",), mfu_panel),
    Panel("Throughput", "tokens/s", ("tokens_per_sec",), rate_panel),
    Panel("Step time", "ms", ("time_ms",), time_panel),
    Panel("GPU memory", "GB", ("allocated_gb", "peak_gb", "reserved_gb"), memory_panel),
    Panel("Gradient norm, before clipping", "L2 norm", ("global_norm",), norm_panel),
    Panel("Gradient elements", "standard deviation", ("grad_std",), std_panel),
)


def plot_run(run: Run, output: Path, smooth: int | None) -> None:
    """The picture of one run: the loss over the whole width, and below it what else was measured."""
    import matplotlib.pyplot as plt

    panels = [Panel("Loss", "nats per token", (), loss_panel), *(panel for panel in PANELS if run.has(*panel.columns))]
    counts = [1, *spread(len(panels) - 1, per_row=3)]
    heights = [1.7, *[1.0] * (len(counts) - 1)]
    figure = plt.figure(figsize=(14, 2.5 * sum(heights) + 0.6), layout="constrained")
    for ax, panel in zip(grid(figure, counts, heights), panels, strict=True):
        dress(ax, panel.title, panel.y_label, "step")
        panel.draw(ax, run, window_of(run, smooth))
    figure.suptitle(heading(run), fontsize=11)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def heading(run: Run) -> str:
    """What was trained, and how far: two lines above the picture."""
    what = [run.name, run.startup_info.get("model", {}).get("architecture"), run.knobs.get("dataset")]
    how_far = [
        f"step {run.steps['iter'][-1]:,.0f}" + (f" of {run.knobs['max_iters']:,}" if "max_iters" in run.knobs else ""),
        f"{in_words(run.steps['tokens'][-1])} tokens",
        span(run.summary.get("wall_s")),
        run.summary.get("status"),
    ]
    return "\n".join("   ·   ".join(filter(None, line)) for line in (what, how_far))


# ---------------------------------------------------------------------------------------------------------------------
# Several runs
# ---------------------------------------------------------------------------------------------------------------------


def wall_seconds(run: Run) -> np.ndarray:
    """Wall time at each record: the steps' own times added up, moved to the clock wherever an evaluation read it."""
    import numpy as np

    x = run.steps["iter"]
    # A record stands for the steps since the one before it.
    training_s = np.cumsum(np.nan_to_num(run.steps["time_ms"]) * np.diff(x, prepend=x[0] - 1)) / 1e3
    at, wall_s = run.evaluations("iter"), run.evaluations("wall_s")
    if len(at):
        training_s += np.interp(x, at, wall_s - np.interp(at, x, training_s))
    return training_s


def overlay_loss(ax: Axes, runs: Sequence[Run], smooth: int | None, place: Callable[[Run], np.ndarray]) -> None:
    """Smoothed training loss, thin, and validation loss, bold, against tokens or time."""
    import numpy as np

    lines = []
    for run, color in zip(runs, run_colours(runs), strict=True):
        x, train = place(run), moving_mean(run.steps["loss"], window_of(run, smooth))
        at, val = np.interp(run.evaluations("iter"), run.steps["iter"], x), run.evaluations("val_loss")
        ax.plot(*thinned(x, train), color=color, linewidth=0.9, alpha=0.6)
        ax.plot(at, val, "o-", color=color, linewidth=1.8, markersize=3.5)
        lines += [(x, train), (at, val)]
    limit_to_later(ax, *lines)


def overlay_bits(ax: Axes, runs: Sequence[Run], smooth: int | None) -> None:
    lines = [(run.evaluations("tokens"), run.evaluations("val_bits_per_byte")) for run in runs]
    for line, color in zip(lines, run_colours(runs), strict=True):
        ax.plot(*line, "o-", color=color, linewidth=1.8, markersize=3.5)
    limit_to_later(ax, *lines)


def overlay_column(ax: Axes, runs: Sequence[Run], smooth: int | None, column: str) -> None:
    for run, color in zip(runs, run_colours(runs), strict=True):
        ax.plot(*thinned(run.steps["tokens"], moving_mean(run.steps[column], window_of(run, smooth))), color=color, linewidth=1.5)
    if column == "global_norm":
        log_scale(ax)
    else:
        ax.set_ylim(0, 1.1 * ax.dataLim.y1)


def compare_runs(runs: Sequence[Run], rows: list[list[str]], output: Path, smooth: int | None) -> None:
    """The picture of several runs: overlaid curves, and the table of differences below."""
    import matplotlib.pyplot as plt

    def overlay(function: Callable[..., None], **options: Any) -> Callable[[Axes], None]:
        return lambda ax: function(ax, runs, smooth, **options)

    unit, unit_s = ("hours", 3600) if max(wall_seconds(run)[-1] for run in runs) > 7200 else ("minutes", 60)
    panels = [
        ("Loss by tokens", "nats per token", "tokens", overlay(overlay_loss, place=lambda run: run.steps["tokens"])),
        ("Loss by wall time", "nats per token", unit, overlay(overlay_loss, place=lambda run: wall_seconds(run) / unit_s)),
        ("Gradient norm, before clipping", "L2 norm", "tokens", overlay(overlay_column, column="global_norm")),
        ("Throughput", "tokens/s", "tokens", overlay(overlay_column, column="tokens_per_sec")),
    ]
    if any(run.best("val_bits_per_byte") for run in runs):
        panels.insert(2, ("Validation", "bits per byte", "tokens", overlay(overlay_bits)))
    if any(run.has("mfu_percent") for run in runs):
        panels.append(("Model FLOPs utilisation", "% of peak", "tokens", overlay(overlay_column, column="mfu_percent")))
    counts = spread(len(panels), per_row=2)
    curves_inches, table_inches = 3.3 * len(counts), 0.24 * (len(rows) + 1) + 0.3
    figure = plt.figure(figsize=(14, curves_inches + table_inches), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[curves_inches, table_inches])
    axes = grid(top, counts, [1.0] * len(counts))
    for ax, (title, y_label, x_label, draw_overlay) in zip(axes, panels, strict=True):
        dress(ax, title, y_label, x_label)
        draw_overlay(ax)
    handles = [plt.Line2D([], [], color=color, linewidth=3) for color in run_colours(runs)]
    axes[0].legend(handles, labels(runs), loc="upper right", title="thin: train, smoothed · bold: validation", title_fontsize=8)
    draw_table(bottom.subplots(), [["", *labels(runs)], *rows], run_colours(runs))
    figure.savefig(output, dpi=110)
    plt.close(figure)


def run_colours(runs: Sequence[Run]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(runs))]


def labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names, with their folder where two are the same."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.path.parent.name}/{run.name}" for run in runs]


RESULTS: dict[str, Callable[[Run], Any]] = {
    "architecture": lambda run: run.startup_info.get("model", {}).get("architecture"),
    "parameters": lambda run: run.startup_info.get("model", {}).get("parameters"),
    "status": lambda run: run.summary.get("status"),
    "steps": lambda run: int(run.steps["iter"][-1]),
    "tokens": lambda run: in_words(run.steps["tokens"][-1]),
    "wall time": lambda run: span(run.summary.get("wall_s")),
    "last train loss": lambda run: float(run.steps["loss"][-1]),
    "best val loss": lambda run: run.best("val_loss"),
    "best val bits per byte": lambda run: run.best("val_bits_per_byte"),
    "tokens/s": lambda run: run.summary.get("avg_tokens_per_sec"),
    "ms per step": lambda run: run.summary.get("avg_time_ms"),
    "MFU, %": lambda run: run.summary.get("avg_mfu"),
}


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of text, a name and a cell for each run: the knobs that differ, then the results that are known."""
    names = sorted(set().union(*(run.knobs for run in runs)) - {"run_name", "out_dir", "wandb_run_name"})
    knobs = [[name, *(cell(run.knobs.get(name)) for run in runs)] for name in names]
    results = [[name, *(cell(result(run)) for run in runs)] for name, result in RESULTS.items()]
    return [row for row in knobs if len(set(row[1:])) > 1] + [row for row in results if set(row[1:]) != {"-"}]


def cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def table_text(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def draw_table(ax: Axes, lines: list[list[str]], colours: Sequence[str]) -> None:
    """The differences over the whole width: columns as wide as their texts, letters as large as then fit."""
    longest = max(12, 200 // len(lines[0]))
    texts = [[text if len(text) <= longest else text[: longest - 1] + "…" for text in line] for line in lines]
    widths = [max(map(len, column)) + 3 for column in zip(*texts, strict=True)]
    ax.axis("off")
    shares = [width / sum(widths) for width in widths]
    table = ax.table(texts, colWidths=shares, bbox=[0, 0, 1, 1], cellLoc="left", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(min(9, 9 * 170 / sum(widths)))
    for (row, column), box in table.get_celld().items():
        box.set_edgecolor("0.85")
        if row == 0 or column == 0:
            box.set_text_props(fontweight="bold", color=colours[column - 1] if column else "black")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Plot one training run, or compare several.")
    parser.add_argument("logs", nargs="*", type=Path, metavar="run_X.json", help="run logs; without any, the newest under out*/")
    parser.add_argument("--output", type=Path, help="the picture [run_X_analysis.png beside the log; comparison.png for several]")
    parser.add_argument("--smooth", type=int, help="records in the moving mean; 1 does not smooth [a fiftieth of the records]")
    args = parser.parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")  # a file, not a window
    matplotlib.rcParams.update({"font.size": 9, "legend.fontsize": 8, "legend.framealpha": 0.85})
    try:
        runs = [read_run(path) for path in args.logs or [newest_log()]]
        if len(runs) == 1:
            output = args.output or runs[0].path.with_name(f"{runs[0].path.stem}_analysis.png")
            plot_run(runs[0], output, args.smooth)
        else:
            output, rows = args.output or Path("comparison.png"), differences(runs)
            print(table_text([["", *labels(runs)], *rows]))
            compare_runs(runs, rows, output, args.smooth)
    except (LogError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
