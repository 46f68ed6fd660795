"""What these programs have in common: their command lines, and a run of train.py's to measure.

Whoever imports this may import the project's modules after it.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import Config, load_config
from memory import STRATEGIES
from plan import UNKNOWN_VOCABULARY

if TYPE_CHECKING:  # --help is there before torch is
    from parallel import Ranks
    from startup import TrainState


def parser_of(description: str | None) -> ArgumentParser:
    """Shows the description as it is written, and takes no abbreviations: what it does not know may be a knob of train.py's."""
    return ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)


def output_file(text: str) -> Path:
    """The type of an option that names a file to write when all is measured. Raises ArgumentTypeError where that could not be."""
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"{path}: there is no folder {path.parent}")
    return path


def nanogpt_folder(text: str) -> str:
    """The type of an option that names the folder of nanoGPT's model.py. Raises ArgumentTypeError where that is not there."""
    if not (text and Path(text, "model.py").is_file()):
        raise ArgumentTypeError(f"{text}: there is no model.py of nanoGPT's")
    return text


def strategies(text: str) -> list[str]:
    """The type of --strategies, names with commas between. Raises ArgumentTypeError for one that there is not."""
    if unknown := set(text.split(",")).difference(STRATEGIES):
        raise ArgumentTypeError(f"no {unknown.pop()!r}; there are {', '.join(STRATEGIES)}")
    return text.split(",")


def positive_int(text: str) -> int:
    """The type of an option that counts something. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def positive_ints(text: str) -> list[int]:
    """The type of an option that has several such numbers, with commas between. Raises ArgumentTypeError."""
    return [positive_int(number) for number in text.split(",")]


def with_strategy(cfg: Config, n_ranks: int, strategy: str, micro_steps: int) -> Config:
    """cfg for so many ranks, by this strategy whatever the short forms --use_fsdp and --use_zero1 ask for; micro-steps a rank."""
    data = dataclasses.replace(cfg.data, gradient_accumulation_steps=micro_steps * n_ranks)
    parallel = dataclasses.replace(cfg.parallel, parallel=strategy, use_fsdp=False, use_zero1=False)
    return dataclasses.replace(cfg, data=data, parallel=parallel)


def load_model_config(knobs: list[str]) -> Config:
    """train.py's, for random tokens: a vocabulary left to the dataset counts as --plan's. Raises UserError as it does."""
    cfg = load_config(knobs)
    return cfg if cfg.model.vocab_size else load_config([*knobs, f"--vocab_size={UNKNOWN_VOCABULARY}"])


def fresh_state(cfg: Config, ranks: Ranks, say: Callable[[str], object]) -> tuple[Config, TrainState]:
    """(cfg as these ranks settle it, what train.py would begin with). A collective; `say` gets lines on FP8."""
    from fp8 import choose_fp8
    from precision import choose_dtype
    from sharding import choose_layout
    from startup import build_state, choose_kernels

    dtype, (ops, _) = choose_dtype(cfg.run.dtype, ranks.device), choose_kernels(cfg, ranks.device)
    cfg, fp8, notes = choose_fp8(cfg, ranks, dtype, ops)
    for line in notes:
        say(line)
    cfg, layout, _ = choose_layout(cfg, ranks, dtype)
    return cfg, build_state(cfg, ops, layout, fp8)
