"""The standard library's own source files: 11 MB of Python that every machine has, for a first run without a network."""

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import command_errors, run_command

with command_errors():  # where numpy or tqdm is not installed
    from data.corpus import Recipe, prepare
    from data.source import FileSource

# The last two: a manual, not code; and tables of characters, generated and so alike that validation would be recitation.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}


def standard_library(folder: Path, val_fraction: float) -> FileSource:
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py"))
    files = [(name, library / name) for name in names if LEFT_OUT.isdisjoint(name.split("/")) and is_utf8(library / name)]
    return FileSource(f"standard library of Python {sys.version.split()[0]}", files, val_fraction)


def is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


RECIPE = Recipe(
    folder=Path(__file__).resolve().parent,
    tokenizer="bpe:4096",
    val_fraction=0.05,
    source=standard_library,
)


if __name__ == "__main__":
    run_command(lambda argv: prepare(RECIPE, argv))
