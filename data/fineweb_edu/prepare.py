"""FineWeb-Edu's 10-billion-token sample (or the whole, with --full) in GPT-2's tokens: web pages that teach something."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import command_errors, run_command

with command_errors():  # where numpy or tqdm is not installed
    from data.corpus import Recipe, prepare
    from data.source import HubSource

RECIPE = Recipe(
    folder=Path(__file__).resolve().parent,
    tokenizer="gpt2",
    val_fraction=0.0005,  # about 5 million tokens, chosen by a hash of the page's number
    source=lambda *_: HubSource("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    full_source=lambda *_: HubSource("HuggingFaceFW/fineweb-edu", streaming=True),
)


if __name__ == "__main__":
    run_command(lambda argv: prepare(RECIPE, argv))
