"""What a run will need and give, before it starts: `python train.py CONFIG --plan [--num_gpus=N] [--gpu=NAME]`.

Memory of a GPU under each strategy and what fits, steps, tokens, epochs, hours at a stated MFU, expected loss. All of it is
arithmetic: no GPU, and torch only to read the sizes of --init_from's weights. The start report of a run shows the same.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from configurator import Config, UserError, load_config, nearest
from flops import (
    PEAKS,
    Precision,
    count_parameters,
    flops_per_token,
    fp8_recipes,
    loss_prediction,
    peak_tflops,
    why_no_fp8,
    without_fp8,
)
from memory import (
    GIB,
    GPU_MEMORY_GIB,
    USABLE,
    MemoryUse,
    Strategy,
    first_that_fits,
    how_often,
    predict_memory,
    settled,
    strategies_of,
)

DEFAULT_GPU = "H200"
UNKNOWN_VOCABULARY = 50_304  # GPT-2's, padded
# Where the law of the loss holds: subwords, sizes near those it was fitted to, text that is seen four times at most, which is
# nearly as good as new (Muennighoff et al. 2023).
LAW = {"vocabulary": 10_000, "parameters": 40_000_000, "tokens": 1_000_000_000, "epochs": 4}


def config_or_plan(argv: Sequence[str]) -> Config:
    """The configuration of a run; with --plan its plan is printed, and the program ends. Raises UserError."""
    cfg = load_config(argv)
    if cfg.plan.plan:
        print(plan_text(cfg))
        sys.exit(0)
    return cfg


def plan_text(cfg: Config) -> str:
    """Raises UserError: a GPU that is not in the table, ranks that do not divide the micro-steps, weights that are not there.

    As a run does, too, where FP8 is required and cannot run.
    """
    from pretrained import with_pretrained  # with packages that --help and a mistyped flag can do without

    gpus, name = cfg.plan.num_gpus, find_gpu(cfg.plan.gpu)
    check_division(cfg, gpus)
    cfg, _ = with_pretrained(cfg, needs_weights=False)
    dtype = dtype_on(name, cfg.run.dtype)
    cfg, fp8_notes = with_fp8(cfg, name, dtype)
    cfg, train_tokens, notes = with_data(cfg)
    m = cfg.model
    peak = peak_tflops(name, dtype)
    micro_batch, micro_steps = f"{cfg.data.batch_size} x {m.block_size:,} tokens", cfg.data.gradient_accumulation_steps // gpus
    figures = outlook(cfg, train_tokens, peak and peak * gpus)
    lines = [
        f"{m.architecture}: {count_parameters(m).total:,} parameters, {flops_per_token(m) / 1e9:.3f} GFLOPs a token",
        f"{gpus} x {name}, {dtype}: {micro_steps} micro-step{'s' * (micro_steps > 1)} of {micro_batch} on each",
        *gpu_note(cfg.plan.gpu),
        *fp8_notes,
        "",
        *memory_table(cfg, dtype, gpus, GPU_MEMORY_GIB[name]),
        "",
        *(f"{key.replace('_', ' '):20s}{value:,}" for key, value in figures.items() if value is not None),
        *notes,
    ]
    return "\n".join(lines)


def find_gpu(asked: str) -> str:
    """The name in flops.PEAKS that is asked for, or the first with those words (A100: A100-SXM4-40GB); by default this machine's.

    Raises UserError naming those known.
    """
    return gpus_of_name(asked)[0]


def gpu_note(asked: str) -> list[str]:
    """A line where the name that is asked for is that of several, none where it is plain."""
    taken, *others = gpus_of_name(asked) if asked else [""]
    return [f"{asked} is taken as {taken}; also known: {', '.join(others)}"] if others else []


def gpus_of_name(asked: str) -> list[str]:
    """All names in flops.PEAKS with those words, or only the one that is just this; by default this machine's.

    Blanks, hyphens, case, NVIDIA and GeForce do not count. Raises UserError naming those known.
    """
    known = [name for gpu in PEAKS for name in gpu.device_names]
    name = asked or gpu_of_this_machine() or DEFAULT_GPU
    wanted, plain = plain_name(name), {plain_name(gpu): gpu for gpu in known}
    same = [gpu for gpu in plain if gpu.replace(" ", "") == wanted.replace(" ", "")]
    found = same or [gpu for gpu in plain if f" {wanted} " in f" {gpu} "]
    if not found:
        near = [f"did you mean {plain[gpu]}? " for gpu in difflib.get_close_matches(wanted, plain, n=1)]
        raise UserError(f"--gpu={name}: not a GPU whose rates are known; {''.join(near)}known are {', '.join(known)}")
    return [plain[gpu] for gpu in found]


def plain_name(gpu: str) -> str:
    """Its words, with a blank between."""
    return " ".join(re.findall(r"[a-z0-9]+", re.sub("nvidia|geforce", "", gpu.lower())))


def gpu_of_this_machine() -> str | None:
    """As the driver names the first one; None where there is no driver."""
    if not shutil.which("nvidia-smi"):
        return None
    query = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return query.stdout.splitlines()[0].strip() if query.returncode == 0 and query.stdout.strip() else None


def check_division(cfg: Config, gpus: int) -> None:
    """Raises UserError where the micro-steps of a step, or the GPUs themselves, cannot be shared out evenly."""
    micro_steps, shards = cfg.data.gradient_accumulation_steps, cfg.parallel.hsdp_shard_size
    if shards and gpus > 1 and gpus % shards:
        near = nearest([k for k in range(1, gpus + 1) if gpus % k == 0], shards)
        raise UserError(f"--hsdp_shard_size={shards} does not divide --num_gpus={gpus}; the nearest that do: {near}")
    if micro_steps % gpus:
        near = nearest([k * gpus for k in range(1, micro_steps + 2)], micro_steps)
        raise UserError(
            f"--num_gpus={gpus}: gradient_accumulation_steps={micro_steps} is over all GPUs together and must be a multiple; "
            f"the nearest: --gradient_accumulation_steps={near}"
        )


def with_data(cfg: Config) -> tuple[Config, int | None, list[str]]:
    """(the configuration with its vocabulary, training tokens where the data is prepared, notes on what is not known).

    Raises UserError for a vocabulary that the data goes beyond.
    """
    from data.tokens import load_dataset

    notes, train_tokens, vocab_size = [], None, cfg.model.vocab_size
    try:
        dataset = load_dataset(cfg.data, cfg.model.block_size)
    except UserError as error:
        notes.append(f"epochs are not known: {error}")
    else:
        train_tokens, vocab_size = len(dataset.train), dataset.embedding_rows(vocab_size)
    if not vocab_size:
        vocab_size = UNKNOWN_VOCABULARY
        notes.append(f"the vocabulary is not known either and counts as {vocab_size:,} entries, GPT-2's")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size)), train_tokens, notes


def dtype_on(name: str, dtype: str) -> Precision:
    """The arithmetic of a run on that GPU: what dtype=auto is there; float32's products are made in TF32 where there is one.

    Raises UserError for bfloat16 on a GPU without it.
    """
    gpu = next(gpu for gpu in PEAKS if name in gpu.device_names)
    if dtype == "bfloat16" and not gpu.bfloat16:
        raise UserError(f"--dtype: {name} has no bfloat16; pass --dtype=float16")
    if dtype == "auto":
        return "bfloat16" if gpu.bfloat16 else "float16"
    return "tf32" if dtype == "float32" and gpu.tf32 else dtype


def with_fp8(cfg: Config, name: str, dtype: Precision) -> tuple[Config, list[str]]:
    """(the configuration without FP8 where that GPU cannot run it, a line on it where it is asked for).

    Raises UserError where it is required and cannot run.
    """
    if not cfg.fp8.use_fp8:
        return cfg, []
    if reason := why_no_fp8(cfg, dtype, name, fp8_recipes(name)):
        cfg, line = without_fp8(cfg, dtype, reason)
        return cfg, [line]
    if cfg.fp8.fp8_emulate:
        return cfg, [f"FP8 is planned as {dtype}; emulated it takes far more time"]
    return cfg, [f"FP8 is planned as {dtype}, which takes more time and keeps larger activations"]


def memory_table(cfg: Config, dtype: Precision, gpus: int, memory_gib: float) -> list[str]:
    """A line for each strategy: GiB of one GPU by component, the peak of a step, and the largest micro-batch that fits."""
    usable_gib, now = USABLE * memory_gib, settled(cfg, dtype, gpus, memory_gib)
    names = [field.name.replace("_", " ") for field in dataclasses.fields(MemoryUse)]
    lines = [
        f"memory of each GPU in GiB, for a compiled model; {usable_gib:.1f} of {memory_gib:g} GiB are usable",
        f"{'':6s}{''.join(f'{name:>{len(name) + 3}s}' for name in names)}   fits  largest batch_size",
    ]
    uses = {strategy: predict_memory(now, dtype, strategy, gpus) for strategy in strategies_of(gpus)}
    for strategy, use in uses.items():
        largest = largest_batch(cfg, dtype, strategy, gpus, usable_gib)
        figures = (f"{value / GIB:{len(name) + 3}.2f}" for name, value in zip(names, vars(use).values(), strict=True))
        lines.append(f"{strategy:6s}{''.join(figures)}   {'yes' if largest >= cfg.data.batch_size else 'no':4s}  {largest}")
    if any(sum(vars(use).values()) > 2 * use.peak for use in uses.values()):  # the peak is among the values
        lines.append(
            "parts add to more than the peak because they are not all there at the same moment:\n"
            "activations and logits are when the backward pass begins, all gradients when it ends"
        )
    chosen, asked = first_that_fits(now, dtype, gpus, memory_gib), cfg.parallel.asked
    if gpus > 1 and (habits := how_often(now, gpus)):
        lines.append(f"fsdp: {', '.join(habits)}; its largest batch_size is with the least that it may hold")
    if gpus == 1 and asked in ("zero1", "fsdp"):
        lines.append(f"one process shards nothing by {asked}: --num_gpus=N plans for several")
    elif gpus > 1 and (chosen or asked != "auto"):
        lines.append(f"parallel=auto takes {chosen}" if asked == "auto" else f"parallel={asked}, as asked for")
    if not chosen:
        recomputed = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, gradient_checkpointing=True))
        last = strategies_of(gpus)[-1]
        peak_gib = predict_memory(recomputed, dtype, last, gpus).peak / GIB
        lines.append(
            f"what needs less: a smaller --batch_size; --gradient_checkpointing ({peak_gib:.2f} GiB with {last}); more GPUs"
        )
    return lines


def largest_batch(cfg: Config, dtype: Precision, strategy: Strategy, gpus: int, usable_gib: float) -> int:
    """The largest batch_size whose peak is usable, 0 where not even 1 is; the peak only grows with it."""

    def fits(batch_size: int) -> bool:
        data = dataclasses.replace(cfg.data, batch_size=batch_size)
        return predict_memory(dataclasses.replace(cfg, data=data), dtype, strategy, gpus).peak <= usable_gib * GIB

    if not fits(1):
        return 0
    too_large = 2
    while fits(too_large):
        too_large *= 2
    return bisect.bisect_left(range(too_large), True, lo=too_large // 2, key=lambda batch_size: not fits(batch_size)) - 1


def outlook(cfg: Config, train_tokens: int | None, peak: float | None) -> dict[str, Any]:
    """What the whole run comes to; `peak` is that of all GPUs, TFLOP/s. None: not known."""
    tokens_per_step = cfg.data.batch_size * cfg.data.gradient_accumulation_steps * cfg.model.block_size
    n, tokens = count_parameters(cfg.model).total, cfg.optim.max_iters * tokens_per_step
    epochs = train_tokens and tokens / train_tokens
    tokens_per_s = peak and cfg.plan.plan_mfu / 100 * peak * 1e12 / flops_per_token(cfg.model)
    large = n >= LAW["parameters"] and tokens >= LAW["tokens"]
    lawful = large and cfg.model.vocab_size >= LAW["vocabulary"] and (epochs or 0) <= LAW["epochs"]
    return {
        "steps": cfg.optim.max_iters,
        "tokens_per_step": tokens_per_step,
        "tokens": tokens,
        "epochs": epochs and three_digits(epochs),
        "assumed_mfu_percent": tokens_per_s and cfg.plan.plan_mfu,
        "tokens_per_s": tokens_per_s and round(tokens_per_s),
        "hours": tokens_per_s and three_digits(tokens / tokens_per_s / 3600),
        "expected_loss": round(loss_prediction(n, tokens), 2) if lawful else None,
    }


def start_section(cfg: Config, train_tokens: int, peak: float | None, dtype: Precision, gpus: int) -> dict[str, Any]:
    """The start report's share of the plan; `gpus` is 0 on a CPU, whose memory is not predicted."""
    figures = outlook(cfg, train_tokens, peak)
    section = {name: figures[name] for name in ("tokens", "assumed_mfu_percent", "hours", "expected_loss")}
    for strategy in strategies_of(gpus) if gpus else ():
        use = {name.replace("_", " "): value / GIB for name, value in vars(predict_memory(cfg, dtype, strategy, gpus)).items()}
        section[f"{strategy}_gib" if gpus > 1 else "memory_gib"] = ", ".join(f"{name} {gib:.2f}" for name, gib in use.items())
    return section


def three_digits(value: float) -> float:
    """Rounded to three significant digits, so that the figures of a tiny model are no zeros."""
    return float(f"{value:.3g}")
