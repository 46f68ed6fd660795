"""Real inputs for the tests that need them; where they are missing, those tests are skipped."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from configurator import ROOT

SHARED = Path(os.environ.get("NANOTRAIN_SHARED", ROOT.parent / "shared"))


def shared_file(name: str) -> Path:
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"needs {name} in the folder data of NANOTRAIN_SHARED")
    return path


@functools.cache
def provide_gpt2_vocabulary() -> None:
    """Lets tiktoken find GPT-2's vocabulary without a network, in this process and its children."""
    folder = Path(tempfile.gettempdir()) / f"nanotrain-tiktoken-{os.getpid()}"  # a copy: tiktoken deletes what is damaged
    shutil.copytree(shared_file("tiktoken_cache"), folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
