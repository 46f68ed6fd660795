"""data/peek.py: what a token file says."""

import shutil
import subprocess
import sys

import pytest

from configurator import ROOT
from tiny_runs import tiny_text, write_dataset

TRAIN, VAL = tiny_text(500), tiny_text(100)


def peek(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "data" / "peek.py", *args], capture_output=True, text=True, cwd="/")


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / "set", TRAIN, VAL)
    return tmp_path / "set"


def test_a_stretch_is_decoded(folder):
    done = peek(str(folder / "val.bin"), "--at=7", "--tokens=20")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{folder / 'val.bin'}: {len(VAL):,} tokens of uint16, tokenizer characters, {len(set(TRAIN)):,} ids"
    assert lines[1] == f"1 documents, {len(VAL.encode()):,} bytes of text, from test"
    assert lines[2:] == ["--- from token 7", VAL[7:27]]


def test_a_folder_stands_for_its_val_bin(folder):
    assert peek(str(folder), "--at=7").stdout == peek(str(folder / "val.bin"), "--at=7").stdout != ""


def test_what_is_not_prepared_names_its_prepare():
    done = peek("data/slimpajama_6b_llama/val.bin")
    assert done.returncode == 2 and "has no train.bin and val.bin: run python data/slimpajama_6b_llama/prepare.py" in done.stderr


def test_stretches_are_drawn_by_the_seed(folder):
    first, again, other = (peek(str(folder / "train.bin"), "--samples=2", f"--seed={seed}").stdout for seed in (1, 1, 2))
    assert first == again != other and first.count("--- from token ") == 2
    assert all(text.split("\n", 1)[1].rstrip("\n") in TRAIN for text in first.split("--- from token ")[1:])


def test_a_file_without_a_manifest(folder):
    (folder / "manifest.json").unlink()
    assert peek(str(folder / "val.bin"), "--at=0", "--tokens=9").stdout.endswith(f"--- from token 0\n{VAL[:9]}\n")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["val.bin", "--at=100000"], "val.bin has tokens 0 to"),
        (["val.bin", "--tokens=0"], "must be at least 1"),
        (["nowhere.bin"], "nowhere.bin: no such file; name train.bin or val.bin"),
        (["../nowhere.bin"], "nowhere.bin: no such file; name train.bin or val.bin"),
        (["train.bin"], "it is torn or of another run"),
    ],
)
def test_mistakes(folder, args, says):
    shutil.copy(folder / "val.bin", folder / "train.bin")
    done = peek(str(folder / args[0]), *args[1:])
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "is_advised"), [("train.bin", True), ("other.bin", False)])
def test_prepare_is_advised_for_its_own_files_only(tmp_path, name, is_advised):
    (tmp_path / name).write_bytes(b"abc")
    done = peek(str(tmp_path / name))
    assert done.returncode == 2 and "3 bytes, which are not whole uint16 tokens" in done.stderr
    assert ("run prepare.py again" in done.stderr) is is_advised
