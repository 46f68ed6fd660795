"""Plots: what is read from a log in any state, which panels are drawn, what a comparison says, and what bad input gets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from configurator import ROOT, Config, ModelConfig, OptimConfig, RunConfig
from run_file import StepRecord, Throughput, log_path
from training_logger import TrainingLogger
from visualize_training import (
    DRAWN_POINTS,
    LogError,
    Overlay,
    differences,
    draw_overlay,
    dress,
    in_words,
    labels,
    log_scale,
    main,
    moving_mean,
    read_run,
    thinned,
    wall_seconds,
)

PNG = b"\x89PNG\r\n\x1a\n"


def write_log(folder: Path, name: str = "a", steps: int = 40, gpu: bool = False, optim: OptimConfig | None = None) -> Path:
    """A log as a run writes it: an evaluation every 10 steps, gradient statistics every 5, one skipped step, one resume."""
    cfg = Config(run=RunConfig(out_dir=str(folder)), optim=optim or OptimConfig(), model=ModelConfig(n_layer=2))
    resume_iter = None
    for end in (steps // 2, steps):
        log = TrainingLogger(cfg, name, resume_iter)
        log.report({"model": {"architecture": "2L", "parameters": 7}}, Throughput(6e9, 5e9, 989.5 if gpu else None, 1_000))
        for i in range((resume_iter or 0) + 1, end + 1):
            memory = (1.0, 2.0, 3.0) if gpu else (None, None, None)
            moments = (1e-6, 1e-3) if i % 5 == 0 else (None, None)
            log.step(StepRecord(i, 5.0 - i / 50, 1e-3, 100.0, 0.5, 1_000 * i, 0.5 + i / 100, *moments, *memory))
            if i % 10 == 0:
                log.evaluation(i, 5.0 - i / 50, 5.1 - i / 50, 2.0, 1e-3, 1_000 * i)
                log.checkpoint(dict(iter=i, tier="latest", path="out/latest", val_loss=None, bytes=1, save_s=0.1))
        if resume_iter is None:
            log.event("skipped_step", end, "a skipped step")
        log.close("stopped")
        resume_iter = end
    return log_path(folder, name)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that were saved, for a look at what is in them."""
    figures, save = [], Figure.savefig

    def saving(figure: Any, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saving)
    yield figures


def titles(figure: Any) -> list[str]:
    return [ax.get_title(loc="left") for ax in figure.axes]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def test_a_log_is_read_into_columns(tmp_path: Path) -> None:
    run = read_run(write_log(tmp_path, gpu=True))
    assert run.name == "a" and run.knobs["n_layer"] == 2 and run.summary["status"] == "stopped"
    np.testing.assert_array_equal(run.steps["iter"], np.arange(1, 41))
    np.testing.assert_allclose(run.steps["loss"], 5 - np.arange(1, 41) / 50)
    np.testing.assert_allclose(run.steps["tokens_per_sec"], 10_000)
    assert list(np.flatnonzero(np.isfinite(run.steps["grad_std"])) + 1) == list(range(5, 41, 5))
    assert run.best("val_loss") == pytest.approx(4.3) and list(run.evaluations("iter")) == [10, 20, 30, 40]
    assert [event["kind"] for event in run.events] == ["start", "skipped_step", "stop", "resume", "stop"]


@pytest.mark.parametrize("cut", range(1, 1_000, 83))
def test_a_torn_log_gives_all_that_is_whole(tmp_path: Path, cut: int) -> None:
    path = write_log(tmp_path)
    whole, content = read_run(path), path.read_bytes()
    path.write_bytes(content[:-cut])
    torn = read_run(path)
    kept = len(torn.steps["iter"])
    assert 40 - kept <= 1 + cut // 300  # a record is a little longer than that
    np.testing.assert_array_equal(torn.steps["loss"], whole.steps["loss"][:kept])
    assert torn.eval_steps == whole.eval_steps and torn.events == whole.events


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "no run log"),
        (b"loss 3.2\n", "no run log"),
        (b"[1, 2, 3]", "no run log"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "no run log"),
        (b'{"run_name": "x",\n "training_iterations": [\n  3\n]}\n', "no run log"),
    ],
)
def test_a_bad_file_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "run_bad.json"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and str(path) in error
    assert list(tmp_path.glob("*.png")) == []


def test_a_picture_of_no_known_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(write_log(tmp_path)), "--output", str(tmp_path / "plot.doc")])
    assert "ends in .png, .pdf or .svg" in capsys.readouterr().err


def test_a_run_before_its_first_step_says_so(tmp_path: Path) -> None:
    TrainingLogger(Config(run=RunConfig(out_dir=str(tmp_path))), "a").close("finished")
    with pytest.raises(LogError, match="no training iteration is logged yet"):
        read_run(log_path(tmp_path, "a"))


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def test_the_newest_run_that_trained_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = TrainingLogger(Config(run=RunConfig(out_dir=str(tmp_path))), "eval_a")
    evaluation.evaluation(40, 4.2, 4.3, None, 1e-3, 40_000)
    evaluation.close("finished")
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path}: no run_*.json has a training iteration" in capsys.readouterr().err
    os.utime(write_log(tmp_path), (1_000_000, 1_000_000))
    assert main([str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["run_a_analysis.png"]


def test_the_newest_run_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, folder in enumerate(("out", "out-b", "out-c")):
        path = write_log(tmp_path / folder, "a")
        os.utime(path, (1_000_000 + 10 * (number == 1), 1_000_000 + 10 * (number == 1)))
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert (tmp_path / "out-b" / "run_a_analysis.png").read_bytes().startswith(PNG)
    assert len(list(tmp_path.glob("*/*.png"))) == 1


def test_a_folder_stands_for_its_newest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("a", "b", "c")):
        os.utime(write_log(tmp_path, name), (1_000_000 + 10 * (number == 1), 1_000_000 + 10 * (number == 1)))
    assert main([str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["run_b_analysis.png"]
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert f"{tmp_path / 'empty'}: no run_*.json" in capsys.readouterr().err


ALWAYS = ["Loss", "Learning rate", "Throughput", "Step time", "Gradient norm, before clipping", "Gradient elements"]


@pytest.mark.parametrize("gpu", [False, True])
def test_panels_without_a_figure_are_left_out(tmp_path: Path, drawn: list[Any], gpu: bool) -> None:
    assert main([str(write_log(tmp_path, gpu=gpu))]) == 0
    [figure] = drawn
    assert set(titles(figure)) == {*ALWAYS, *(["Model FLOPs utilisation", "GPU memory"] if gpu else [])}
    assert all(ax.get_xlabel() == "step" and ax.get_ylabel() and ax.has_data() for ax in figure.axes)


def test_the_loss_panel_marks_what_happened(tmp_path: Path, drawn: list[Any]) -> None:
    path = write_log(tmp_path)
    TrainingLogger(Config(run=RunConfig(out_dir=str(tmp_path))), "a", 40).close("finished")  # resumed, and nothing left to do
    assert main([str(path), "--smooth", "8"]) == 0
    loss = drawn[0].axes[0]
    names = [text.get_text() for text in loss.get_legend().get_texts()]
    best = "best: 4.3000 at step 40, 2.0000 bits per byte"
    events = ["checkpoint", "skipped step", "resumed"]
    assert names == ["train, mean of 8 records", "train, evaluated", "validation", best, *events]
    lines = {line.get_label(): list(line.get_xdata()) for line in loss.lines}
    assert lines[best] == [40]
    assert lines["checkpoint"] == [10, 20, 30, 40] and lines["skipped step"] == [20] and lines["resumed"] == [20, 20]
    assert [line.get_linestyle() for line in loss.lines].count("--") == 1


def test_the_loss_panel_shows_every_later_evaluation(tmp_path: Path, drawn: list[Any]) -> None:
    path = write_log(tmp_path)
    record = '"train_loss": 4.2'
    assert path.read_text().count(record) == 1
    path.write_text(path.read_text().replace(record, '"train_loss": 0.2'))  # far below the loss with dropout
    assert main([str(path)]) == 0
    [evaluated] = [line for line in drawn[0].axes[0].lines if line.get_label() == "train, evaluated"]
    low, high = drawn[0].axes[0].get_ylim()
    assert min(evaluated.get_ydata()) == 0.2 and all(low < y < high for y in evaluated.get_ydata())


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_of_few_records_is_drawn(tmp_path: Path, steps: int) -> None:
    path = write_log(tmp_path, steps=steps)
    assert main([str(path), "--output", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


def test_several_runs_are_overlaid_above_a_table(tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    a = write_log(tmp_path, "a", gpu=True)
    b = write_log(tmp_path, "b", steps=20, optim=OptimConfig(learning_rate=1e-3))
    capsys.readouterr()
    assert main([str(a), str(b), "--output", str(tmp_path / "both.png")]) == 0
    [figure] = drawn
    curves = ["Loss by tokens", "Loss by wall time", "Validation", "Gradient norm, before clipping", "Throughput"]
    assert titles(figure) == [*curves, "Model FLOPs utilisation", ""]  # the table has no title
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == ["a", "b"]
    assert [line[0] for line in printed].count("learning_rate") == 1
    assert ["learning_rate", "6e-4", "1e-3"] in printed and ["steps", "40", "20"] in printed
    assert ["best", "val", "loss", "4.3", "4.7"] in printed and ["tokens", "40k", "20k"] in printed
    assert not any(line[0] in ("n_layer", "run_name", "out_dir") for line in printed)
    table = [cell.get_text().get_text() for cell in figure.axes[-1].tables[0].get_celld().values()]
    assert {"learning_rate", "6e-4", "1e-3", "best val bits per byte"} <= set(table)


def test_a_comparison_lies_beside_the_first_log_under_a_legend(tmp_path: Path, drawn: list[Any]) -> None:
    logs = [write_log(tmp_path / "out-a", "20261120_154630"), write_log(tmp_path / "out-b", "named")]
    assert main([str(path) for path in logs]) == 0
    assert (tmp_path / "out-a" / "comparison.png").read_bytes().startswith(PNG)
    [figure] = drawn
    [legend] = figure.subfigs[0].legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["20261120_154630  2L", "named"]
    boxes = [ax.get_tightbbox() for ax in figure.axes if ax.get_title(loc="left")]
    assert len(boxes) == 5 and not any(legend.get_window_extent().overlaps(box) for box in boxes)


@pytest.mark.parametrize("evaluations", [2, 3, 20])
def test_the_validation_panel_shows_the_curve_however_few_its_points(tmp_path: Path, evaluations: int) -> None:
    runs = [read_run(write_log(tmp_path, name)) for name in "abc"]
    steps = np.linspace(0, 40, evaluations)
    runs[0].eval_steps = runs[1].eval_steps = [{"iter": step, "val_bits_per_byte": 3 - step / 40} for step in steps]
    runs[2].eval_steps = []
    ax = Figure().subplots()
    draw_overlay(ax, runs, Overlay("Validation", "bits per byte", None, "val_bits_per_byte"), 1)
    low, high = ax.get_ylim()
    assert len(ax.lines) == 2 and 1.5 < low < 2 and 3 < high < 3.5


@pytest.mark.parametrize(("step_ms", "unit", "wall"), [(2_000, "s", 80), (6_000, "min", 4), (360_000, "h", 4)])
def test_the_wall_time_axis_picks_its_unit(tmp_path: Path, step_ms: int, unit: str, wall: float) -> None:
    runs = [read_run(write_log(tmp_path, name)) for name in "ab"]
    for run in runs:
        run.eval_steps, run.steps["time_ms"] = [], np.full(40, step_ms)
    ax = Figure().subplots()
    draw_overlay(ax, runs, Overlay("Loss", "nats", "loss", "val_loss", by_time=True), 1)
    assert ax.get_xlabel() == unit and ax.lines[0].get_xdata()[-1] == pytest.approx(wall)


@pytest.mark.parametrize(("eval_iters", "name"), [(200, "best val loss"), (20, "best val loss (eval_iters differ)")])
def test_validation_losses_of_other_samples_are_flagged(tmp_path: Path, eval_iters: int, name: str) -> None:
    runs = [read_run(write_log(tmp_path, each)) for each in "ab"]
    runs[1].knobs["eval_iters"] = eval_iters
    assert [row[0] for row in differences(runs) if "val loss" in row[0]] == [name]


def test_a_knob_with_a_line_break_stays_in_its_line(tmp_path: Path) -> None:
    runs = [read_run(write_log(tmp_path, each)) for each in "ab"]
    runs[1].knobs["sample_prompt"] = "def"
    assert ["sample_prompt", "\\n", "def"] in differences(runs)


def test_runs_of_one_name_are_told_apart_by_their_folder(tmp_path: Path) -> None:
    runs = [read_run(write_log(tmp_path / folder)) for folder in ("out-a", "out-b")]
    assert labels(runs) == ["out-a/a", "out-b/a"]
    assert not any(row[0] in ("out_dir", "learning_rate") for row in differences(runs))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (0.25, "0.25"), (0.0006, "6e-4"), (0.00123, "1.23e-3"), (999.9, "1k"), (999_999, "1M"), (2.5e6, "2.5M")],
)
def test_numbers_in_words(number: float, text: str) -> None:
    assert in_words(number) == text


@pytest.mark.parametrize(
    ("top", "ticks"),
    [
        (2_500_000, ["0", "500k", "1M", "1.5M", "2M", "2.5M"]),
        (1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (0.02, ["0", "5e-3", "1e-2", "1.5e-2", "2e-2"]),
        (0.001, ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]),
    ],
)
def test_ticks_of_an_axis_are_of_one_kind(top: float, ticks: list[str]) -> None:
    ax = Figure().subplots()
    dress(ax, "", "", "step")
    ax.set_ylim(0, top)
    at = np.linspace(0, top, len(ticks))
    assert [ax.yaxis.get_major_formatter()(value) for value in at] == ticks


@pytest.mark.parametrize(("low", "high"), [(0.3, 900.0), (1.1, 1.9), (0.53, 1.97), (9.8e-4, 1.02e-3)])
def test_a_log_axis_has_two_labels_at_least(low: float, high: float) -> None:
    ax = Figure().subplots()
    ax.set_ylim(low, high)
    log_scale(ax)
    labels = [label for at, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True) if low <= at <= high]
    assert len({label.get_text() for label in labels}) >= 2


# ---------------------------------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_the_moving_mean_leaves_out_what_is_not_finite(window: int) -> None:
    y = np.array([3.0, np.nan, 1.0, 4.0, np.inf, 5.0, 9.0, 2.0])
    expected = []
    for i in range(len(y)):
        near = y[max(0, i - window // 2) : i + (window + 1) // 2]
        near = near[np.isfinite(near)]
        expected.append(near.mean() if len(near) else np.nan)
    np.testing.assert_allclose(moving_mean(y, window), expected)


@pytest.mark.parametrize("points", [10, DRAWN_POINTS, 1_000_003])
def test_a_thinned_line_keeps_its_ends_and_its_peaks(points: int) -> None:
    y = np.random.default_rng(0).normal(size=points)
    y[[points // 3, points // 2, points // 4]] = [99.0, -99.0, np.nan]
    x, thin = thinned(np.arange(points), y)
    assert len(thin) <= 1.1 * DRAWN_POINTS and len(thin) >= min(points - 1, DRAWN_POINTS // 2)
    assert thin.max() == 99.0 and thin.min() == -99.0 and x[-1] == points - 1
    np.testing.assert_array_equal(y[x], thin)


def test_wall_time_follows_the_clock_where_it_was_read(tmp_path: Path) -> None:
    run = read_run(write_log(tmp_path, steps=20))
    run.eval_steps = [{"iter": 10, "wall_s": 31.0}, {"iter": 20, "wall_s": 42.0}]  # the steps themselves took 1 s each ten
    seconds = wall_seconds(run)
    assert seconds[9] == pytest.approx(31.0) and seconds[19] == pytest.approx(42.0)
    assert seconds[0] == pytest.approx(31.0 - 0.9) and (np.diff(seconds) > 0).all()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["out"], "out: No such file or directory; there are logs in out-a, out-b"),
        (["elsewhere"], "FOLDER/run_X.json; there are logs in out-a, out-b"),
        (
            ["out-a", "--output=pictures/a.png"],
            "--output=pictures/a.png: there is no folder pictures; mkdir -p pictures makes it",
        ),
    ],
)
def test_mistakes_name_what_there_is(tmp_path: Path, args: list[str], says: str) -> None:
    for name in ("out-a", "out-b", "elsewhere"):
        (tmp_path / name).mkdir()
        if name != "elsewhere":
            write_log(tmp_path / name, steps=2)
    done = subprocess.run([sys.executable, ROOT / "visualize_training.py", *args], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr


def test_help_is_quick() -> None:
    command = [sys.executable, "-X", "importtime", "visualize_training.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "--smooth" in done.stdout and "run_file" in imported
    assert not {"numpy", "matplotlib", "torch", "configurator", "training_logger"} & imported
