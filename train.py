"""Train a language model: `python train.py config/quickstart.py [--knob=value ...]`; `--help` lists the knobs.

Read `train` from top to bottom: it is the table of contents of the whole system.
"""

from __future__ import annotations

from configurator import Config, answer_early, run_command
from plan import config_or_plan

if __name__ == "__main__":  # before torch, which takes seconds to import
    answer_early(config_or_plan)

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

import startup
from checkpoint import CheckpointStore
from data.loader import Loader, SampleOrder
from data.tokens import Dataset, load_dataset
from evaluation import Evaluator
from fp8 import by_class, choose_fp8, losses_above
from micro_step import MicroStep, build_micro_step, compile_model
from optim import describe_groups, learning_rate, update
from parallel import ReadBack, StopRequest, ending_together, memory_gb, start_ranks
from precision import choose_dtype
from profiling import Profiler
from sharding import choose_layout
from start_report import marker_lines, notes_on, start_report
from startup import TrainState
from training_logger import StepRecord, TrainingLogger


def main(argv: list[str]) -> int:
    cfg = config_or_plan(argv)
    with ExitStack() as stack:
        return train(cfg, stack)


def train(cfg: Config, stack: ExitStack) -> int:
    """One run, from its configuration to its exit code; what must be closed at the end is put on the stack."""
    stack.enter_context(ending_together(lambda error: startup.explain(cfg, error)))  # of cfg as it is settled by then
    # 1. Ranks: process group, device, seeds; from here on a signal ends the run in an orderly way.
    ranks = start_ranks(cfg.run, cfg.parallel, stack)
    dtype = choose_dtype(cfg.run.dtype, ranks.device)
    stop = StopRequest(cfg.run.max_hours, ranks)
    startup.check_same_knobs(cfg, ranks, dtype)
    cfg, pretrained = startup.with_weights(cfg, ranks)
    ops, chosen_kernels = startup.choose_kernels(cfg, ranks.device)
    cfg, fp8, fp8_notes = choose_fp8(cfg, ranks, dtype, ops)

    # 2. Data, and what is on disk: whatever can be wrong is found before the model is built.
    dataset = load_dataset(cfg.data, cfg.model.block_size)
    cfg = startup.with_vocabulary(cfg, dataset, pretrained)
    order = SampleOrder(len(dataset.train), cfg.model.block_size, cfg.run.seed)
    prompt, questions = startup.load_prompt(cfg, dataset), startup.load_questions(cfg, dataset, ranks)
    cfg, layout, parallel = choose_layout(cfg, ranks, dtype)
    checkpoint, notes = startup.claim_out_dir(cfg, dataset, ranks, stack)

    # 3. Model and optimizer: shapes on meta, then shard, then storage and values. AdamW's state exists from the start, so that
    #    every checkpoint holds the same tensors. What compiles comes below, where there is a log to say so.
    state = startup.build_state(cfg, ops, layout, fp8, startup.run_name_of(cfg, checkpoint, ranks))

    # 4. Resume: everything that moves is tracked by this one object, so everything is restored.
    notes = [*fp8_notes, *notes, *startup.restore(state, checkpoint, pretrained)]
    loader = Loader(dataset.train, order, cfg.data, ranks.device, ranks.rank, ranks.world_size, state.samples)
    stack.callback(loader.close)

    # 5. Logger: the start report, then one record a logged step. Rank 0 writes, the others are silent.
    resume_iter = state.step if checkpoint and not cfg.eval.eval_only else None
    log = TrainingLogger(cfg, state.run_name, resume_iter, checkpoint and checkpoint.state["run_name"], active=ranks.is_main)
    stack.push(lambda kind, error, _: log.close(startup.ending(kind, error, stop), (state.step, state.tokens)))
    info, throughput = start_report(cfg, dataset, state, dtype, chosen_kernels, parallel)
    log.report(info, throughput)
    notes = [*marker_lines(info, layout), *describe_groups(state.model, cfg.optim), *notes_on(cfg, state, order), *notes]
    log.line("\n".join(notes))
    forward = compile_model(layout, cfg, log.line)
    micro_step = build_micro_step(forward, layout, state.loss_scale, cfg)
    evaluator = Evaluator(cfg, dataset, dtype, state.model, forward, ranks, stop, prompt, questions)
    store = startup.open_store(cfg, dataset, checkpoint, log, state)
    stack.push(lambda kind, *_: store.close(wait=kind is None or ranks.world_size == 1))  # until everything is on the disk

    # 6. Loop: one step, then whatever is due after it.
    ranks.set_timeout(cfg.parallel.step_timeout_s)
    readback, in_latest = ReadBack(ranks.device, ranks.timeout_s), startup.in_latest(cfg, checkpoint, state)
    profiler = stack.enter_context(Profiler(cfg.run, state.run_name, ranks, log.line, readback.restart_clock))
    loop(Run(cfg, dataset, order, state, loader, micro_step, log, store, evaluator, readback, profiler, stop, in_latest))
    return stop.exit_code


@dataclass
class Run:
    """The parts of a run that its loop works with."""

    cfg: Config
    dataset: Dataset
    order: SampleOrder
    state: TrainState
    loader: Loader
    micro_step: MicroStep
    log: TrainingLogger
    store: CheckpointStore
    evaluator: Evaluator
    readback: ReadBack
    profiler: Profiler
    stop: StopRequest
    in_latest: tuple[int, int, int] | None  # the state.progress that `latest` holds
    overdue: bool = False  # rank 0 says that `latest` was last written checkpoint_minutes ago
    fp8_warned: set[str] = field(default_factory=set)  # what was lost in the step before: a loss that lasts is told once
    saved_s: float = field(default_factory=time.monotonic)  # when `latest` was last written


def loop(run: Run) -> None:
    """Step until max_iters or a stop request; after each step evaluate, sample and save what is due."""
    cfg, state = run.cfg, run.state
    if cfg.eval.eval_only:
        evaluate(run)
        measure_if_due(run)
        return
    run.store.reserve(state.to_save() if cfg.checkpoint.save_checkpoints else {})
    improved = evaluate_if_due(run)  # at step 0; after a resume what a stop cut short
    save_latest(run, *(["best_model"] if improved else []))
    measure_if_due(run)
    save_latest(run)
    run.readback.restart_clock()
    while state.step < cfg.optim.max_iters and not run.stop:
        epoch = run.order.epoch(state.samples)
        with run.profiler.step(state.step + 1):
            train_step(run)
        report_steps(run, keep=run.readback.depth)
        improved = evaluate_if_due(run)
        measure_if_due(run)
        if cfg.checkpoint.save_checkpoints and (tiers := tiers_due(run, improved, epoch)):
            save(run, tiers)
        run.store.poll()
    report_steps(run, keep=0)
    save_latest(run)


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def train_step(run: Run) -> None:
    """Queue one step on the device: its micro-batches, then the guarded update. Nothing in here waits for the device."""
    cfg, state, layout, device = run.cfg, run.state, run.state.layout, run.state.ranks.device
    micro_steps = cfg.data.gradient_accumulation_steps // state.ranks.world_size
    lr = learning_rate(state.step, cfg.optim)
    logged = due(state.step + 1, cfg.log.log_interval) or state.step + 1 in (1, cfg.optim.max_iters)
    loss = torch.zeros((), device=device)
    state.fp8.begin_step()
    for number, (x, y) in enumerate(run.loader.step(), 1):  # (B, T) each, equally long: the mean of their means is the mean
        layout.begin(number, micro_steps)
        loss += run.micro_step(x, y)
    run.readback.mark()
    overdue = 0 < cfg.checkpoint.checkpoint_minutes <= (time.monotonic() - run.saved_s) / 60
    table = state.ranks.table(loss[None], [run.stop.code, run.readback.own_ms, overdue])  # (ranks, 4)
    with_moments = logged and due(state.step + 1, cfg.log.gradient_log_interval)
    result = update(state.optimizer, cfg.optim, lr, state.loss_scale.scale, with_moments, layout.gradients())
    fp8_losses = state.fp8.finish_step(result.overflow)
    layout.finish()  # what it brings is under way into the next forward pass: nothing else may be exchanged behind it here
    state.loss_scale.update(result.overflow)
    state.step, state.samples = state.step + 1, run.loader.position
    figures = torch.cat([table.flatten(), fp8_losses.flatten(), torch.stack([result.norm, result.overflow, *result.moments])])
    run.readback.push(QueuedStep(state.step, lr, 1e3 * run.loader.wait_s, state.tokens, logged), figures)


@dataclass(frozen=True)
class QueuedStep:
    """What the host knows of a step when it has queued it."""

    iter: int
    lr: float
    data_wait_ms: float
    tokens: int
    logged: bool


def report_steps(run: Run, keep: int) -> None:
    """Log the steps whose figures have arrived, all but the newest `keep`. Raises NonFiniteRun."""
    state, layout, n = run.state, run.state.layout, run.state.ranks.world_size
    for step, figures, time_ms in run.readback.pop(keep):
        losses, codes, own_ms, overdue = (figures[column : 4 * n : 4] for column in range(4))  # of each rank
        fp8 = by_class(figures[4 * n : 4 * n + 6 * state.fp8.active])
        loss, (norm, overflow, *moments) = sum(losses) / n, figures[4 * n + 6 * state.fp8.active :]
        run.stop.hear(codes)
        run.overdue = bool(overdue[0])
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if overflow else 0
        if overflow:
            state.skipped += 1
            run.log.event("skipped_step", step.iter, f"step {step.iter} skipped: its gradient is not finite", loss=loss)
        if state.skipped_in_a_row >= run.cfg.optim.max_skipped_steps:
            raise startup.NonFiniteRun(state.skipped_in_a_row, step.iter)
        above = losses_above(fp8, run.cfg.fp8.fp8_warn_percent)
        if new := [text for what, text in above.items() if what not in run.fp8_warned]:
            run.log.event("fp8_losses", step.iter, f"warning: at step {step.iter} {', '.join(new)}", **fp8)
        run.fp8_warned = set(above)
        if step.logged:
            run.log.step(
                StepRecord(
                    step.iter, loss, step.lr, time_ms, step.data_wait_ms, step.tokens, norm, *(moments or (None, None)),
                    *(memory_gb(state.ranks.device, layout.uncounted_bytes) or (None, None, None)), state.skipped, own_ms, fp8,
                )
            )  # fmt: skip


def evaluate_if_due(run: Run) -> bool:
    """Evaluate at step 0, at every interval and at the end; True where validation is the best so far."""
    step, interval = run.state.step, run.cfg.eval.eval_interval
    at_end = interval > 0 and step == run.cfg.optim.max_iters
    return (due(step, interval) or at_end) and step != run.state.evaluated_step and evaluate(run)


def evaluate(run: Run) -> bool:
    """Log both splits' mean loss; True where validation is the best so far. A stop request ends it early, unlogged."""
    report_steps(run, keep=0)
    state, losses = run.state, run.evaluator.losses()
    if losses is None:
        return False
    (train_loss, val_loss), lr = losses, learning_rate(state.step, run.cfg.optim)
    run.log.evaluation(state.step, train_loss, val_loss, run.evaluator.bits_per_byte(val_loss), lr, state.tokens)
    run.readback.restart_clock()
    state.evaluated_step, state.val_loss = state.step, val_loss
    improved = math.isfinite(val_loss) and (state.best_val_loss is None or val_loss < state.best_val_loss)
    if improved:
        state.best_val_loss = val_loss
    return improved


def measure_if_due(run: Run) -> None:
    """HellaSwag at every interval and at the end, a text at every interval; a stop request ends it early, unlogged."""
    state, cfg, evaluator = run.state, run.cfg.eval, run.evaluator
    at_end = state.step == run.cfg.optim.max_iters or cfg.eval_only
    questions = evaluator.questions if at_end or due(state.step, cfg.hellaswag_interval) else None
    prompt = evaluator.prompt if due(state.step, cfg.sample_interval) else None
    if run.stop or not (questions or prompt) or (state.step in (0, state.measured_step) and not cfg.eval_only):
        return
    report_steps(run, keep=0)
    if questions:
        if not (score := evaluator.hellaswag(questions)):
            return
        figures = {"hellaswag_acc": score.acc, "hellaswag_acc_norm": score.acc_norm}
        run.log.score(state.step, f"step {state.step}: {score}", figures)
    if prompt:
        run.log.text(state.step, evaluator.sample(prompt))
    state.measured_step = state.step
    run.readback.restart_clock()


def tiers_due(run: Run, improved: bool, epoch_before: int) -> list[str]:
    """The checkpoints that are due after this step; `epoch_before` is the data's epoch before it."""
    cfg, step, tiers = run.cfg.checkpoint, run.state.step, []
    at_end = step == run.cfg.optim.max_iters
    if improved:
        tiers.append("best_model")
    if not cfg.always_save_checkpoint:  # but a `latest` that an earlier process left must not outlive a newer best_model
        return [*tiers, "latest"] if improved and (run.in_latest or at_end) else tiers
    if at_end or run.overdue or due(step, cfg.checkpoint_interval):
        tiers.append("latest")
    if due(step, cfg.rolling_interval) and cfg.keep_rolling:
        tiers.append(f"rolling_step_{step}")
    # Where the data starts again every few steps, one epoch in `every` is kept: checkpoint_interval steps lie between.
    epoch, data = run.order.epoch(run.state.samples), run.cfg.data
    samples_per_step = data.batch_size * data.gradient_accumulation_steps
    every = max(1, math.ceil(cfg.checkpoint_interval * samples_per_step / run.order.samples_per_epoch))
    if epoch // every > epoch_before // every and cfg.keep_epochs:
        tiers.append(f"epoch_{epoch}")
    return tiers


def save_latest(run: Run, *others: str) -> None:
    """And the other tiers; unless `latest` holds just this, or nothing has been trained."""
    if run.cfg.checkpoint.save_checkpoints and run.state.step > 0 and run.in_latest != run.state.progress:
        save(run, ["latest", *others])


def save(run: Run, tiers: list[str]) -> None:
    """Hand the state to the store, which writes it while training goes on."""
    report_steps(run, keep=0)  # the counters of skipped steps are in the checkpoint
    state = run.state
    if "latest" in tiers:
        run.in_latest, run.saved_s, run.overdue = state.progress, time.monotonic(), False
    run.store.save(state.step, state.to_save(), state.to_json(run.cfg, run.dataset), tiers)
    run.readback.restart_clock()


if __name__ == "__main__":
    run_command(main)
