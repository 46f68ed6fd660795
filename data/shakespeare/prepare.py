"""Shakespeare in GPT-2's tokens: 301,966 for training and 36,059 for validation, as in nanoGPT, and an end of text each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import command_errors, run_command

with command_errors():  # where numpy or tqdm is not installed
    from data.corpus import Recipe, prepare
    from data.source import SHAKESPEARE_URL, web_text

RECIPE = Recipe(
    folder=Path(__file__).resolve().parent,
    tokenizer="gpt2",
    val_fraction=0.1,
    source=lambda folder, val_fraction: web_text(SHAKESPEARE_URL, folder / "input.txt", val_fraction),
)


if __name__ == "__main__":
    run_command(lambda argv: prepare(RECIPE, argv))
