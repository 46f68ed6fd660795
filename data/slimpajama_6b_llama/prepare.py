"""SlimPajama's 6-billion-token sample (or the whole, with --full) in LLaMA-2's tokens, with its own validation split."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import command_errors, run_command

with command_errors():  # where numpy or tqdm is not installed
    from data.corpus import Recipe, prepare
    from data.source import HubSource

RECIPE = Recipe(
    folder=Path(__file__).resolve().parent,
    tokenizer="meta-llama/Llama-2-7b-hf",
    val_fraction=0.001,  # of a --source; the hub's has a validation split
    source=lambda *_: HubSource("DKYoon/SlimPajama-6B"),
    full_source=lambda *_: HubSource("cerebras/SlimPajama-627B", streaming=True),
)


if __name__ == "__main__":
    run_command(lambda argv: prepare(RECIPE, argv))
