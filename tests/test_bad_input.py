"""What a user can get wrong: one readable message on stderr, exit code 2, and everything on disk as it was."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from configurator import ROOT, load_config
from data.tokens import load_dataset
from memory import GIB, predict_memory
from startup import with_vocabulary
from tiny_runs import Runs, become_rank, nothing


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a finished run, whose checkpoints and log must survive every mistake."""
    folder = tmp_path_factory.mktemp("trained")
    with Runs(folder) as runs:
        runs.run("out", "--max_iters=4", "--rolling_interval=2", "--run_name=mine")
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Iterator[Runs]:
    shutil.copytree(trained, tmp_path / "runs", ignore=shutil.ignore_patterns("*.stdout", "*.stderr"))
    with Runs(tmp_path / "runs") as runs:
        yield runs


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Every file but those that hold what the processes print, and the lock, which says who held it last."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".stdout", ".stderr"))
    return {path: path.read_bytes() for path in files if path.name != ".lock"}


def refused(runs: Runs, *flags: str, out_dir: str = "out", prepare: Callable[[], None] = nothing) -> str:
    """The message of a run that is refused, after checking that it is nothing but a message."""
    before = snapshot(runs.folder)
    process = runs.start(out_dir, *flags, prepare=prepare)
    assert process.wait() == 2, process.output
    assert snapshot(runs.folder) == before
    assert process.stdout == "" and "Traceback" not in process.stderr
    assert process.stderr.startswith("error: ") and process.stderr.count("error: ") == 1
    return process.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Knobs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--n_layers=2", "--n_layers: unknown knob 'n_layers'; did you mean 'n_layer'?"),
        ("--n_layer=two", "--n_layer: n_layer='two' is not an int"),
        ("--n_embd=30 --n_head=4", "n_head=4 does not divide n_embd=30"),
        ("nowhere.py", "nowhere.py: no such config file"),
        ("--device=cuda:99", "--device=cuda:99: "),
        (
            "--init_from=there/is_none --dataset=nowhere",
            "there/is_none: there is no such file or folder, and the Hugging Face hub",
        ),
        ("--init_from=gtp2", "init_from='gtp2' is not scratch, resume, gpt2, gpt2-medium"),
        ("--vocab_size=5", "--vocab_size=5: tiny has 18 ids; pass at least that, or 0"),
        ("--block_size=100000", "block_size=100000 needs 100,001"),
        ("--dataset=nowhere", "prepared there: tiny; to prepare: fineweb_edu, openwebtext, python_stdlib, "),
        ("--dataset=openwebtext", "run python data/openwebtext/prepare.py"),
        ("--sample_interval=1 --sample_prompt=Ω", "--sample_prompt='Ω': this dataset's 18 characters do not include 'Ω'"),
        ("--sample_interval=1", "--sample_prompt='\\n': this dataset's 18 characters do not include '\\n'"),
        ("--sample_interval=1 --sample_prompt=", "--sample_prompt='': needs at least one token"),
        ("--n_layer=1000000000", "not even two fit"),
        ("--resume=rolling_step_7", "no checkpoint 'rolling_step_7'"),
        ("--resume=best", "which holds latest, rolling_step_4, rolling_step_2"),
        ("--resume=latest --n_embd=32", "n_embd  16          32"),
        ("--resume=latest --position_encoding=rope", "position_encoding  learned_absolute  rope"),
        ("--resume=latest --block_size=8", "block_size  16          8"),
        ("--run_name=a/b", "must not contain a slash"),
        ("--plan --use_fp8 --fp8_required --gpu=A100-SXM4-80GB", "--fp8_required: A100-SXM4-80GB is older than Ada and Hopper"),
    ],
)
def test_knobs(runs: Runs, flags: str, says: str) -> None:
    assert says in refused(runs, *flags.split(" "))


def test_a_malformed_config_file(runs: Runs) -> None:
    path = runs.folder / "broken.py"
    path.write_text("n_layer = 2\nn_head = (\n")
    assert f"{path}:2: not a Python config file" in refused(runs, str(path))


def test_ranks_that_cannot_meet(runs: Runs) -> None:
    assert "start them with torchrun" in refused(runs, prepare=claim_to_be_one_of_two)


def test_a_port_in_use(runs: Runs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused(runs, prepare=partial(become_rank, 0, 2, port, nothing))
    assert f"the ranks cannot meet at 127.0.0.1:{port}" in message and "on a free --master_port" in message


def claim_to_be_one_of_two() -> None:
    os.environ["WORLD_SIZE"] = "2"  # and no address, as torchrun would give it


def test_an_evaluation_of_nothing(runs: Runs) -> None:
    assert "holds no checkpoint" in refused(runs, "--init_from=resume", "--eval_only", out_dir="empty")


def test_tensorboard_that_is_not_installed(runs: Runs) -> None:
    assert "pip install tensorboard" in refused(runs, "--use_tensorboard", "--run_name=new", prepare=hide_tensorboard)


def hide_tensorboard() -> None:
    sys.modules["tensorboard"] = None


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def empty(folder: Path) -> None:
    (folder / "train.bin").write_bytes(b"")


def torn(folder: Path) -> None:
    path = folder / "val.bin"
    path.write_bytes(path.read_bytes()[:-1])


def torn_without_manifest(folder: Path) -> None:
    torn(folder)
    without_manifest(folder)


def short(folder: Path) -> None:
    (folder / "val.bin").write_bytes(bytes(2 * 16))
    without_manifest(folder)


def wider(folder: Path) -> None:
    for path in folder.glob("*.bin"):
        path.write_bytes(np.frombuffer(path.read_bytes(), "<u2").astype("<u4").tobytes())


def wider_without_manifest(folder: Path) -> None:
    wider(folder)
    without_manifest(folder)


def ids_beyond(folder: Path) -> None:
    ids = np.fromfile(folder / "train.bin", "<u2")
    ids[1000] = 18
    ids.tofile(folder / "train.bin")


def garbage_meta(folder: Path) -> None:
    (folder / "meta.pkl").write_bytes(b"\x80garbage")


class RunsCode:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("hacked",)


def malicious_meta(folder: Path) -> None:
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 18, "itos": RunsCode()}))


def garbage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def missing(folder: Path) -> None:
    (folder / "val.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (missing, "has no train.bin and val.bin"),
        (empty, "train.bin is empty"),
        (torn, "it is torn or of another run"),
        (torn_without_manifest, "which are not whole uint16 tokens"),
        (short, "val.bin has 16 tokens, but block_size=16 needs 17"),
        (wider, "its dtype is uint32"),
        (wider_without_manifest, "looks like uint32"),
        (ids_beyond, "train.bin has id 18 at token 1,000, beyond the vocabulary of 18"),
        (garbage_meta, "meta.pkl is not a plain nanoGPT meta.pkl"),
        (malicious_meta, "mkdir"),
        (garbage_manifest, "manifest.json is damaged"),
    ],
)
def test_data(runs: Runs, damage: Callable[[Path], None], says: str) -> None:
    folder = runs.folder / "data" / "tiny"
    damage(folder)
    message = refused(runs)
    assert says in message and str(folder) in message


def test_samples_without_a_tokenizer(runs: Runs) -> None:
    folder = runs.folder / "data" / "tiny"
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 18}))
    assert "does not say which tokenizer made it" in refused(runs, "--sample_interval=1")


def test_a_resumed_run_on_other_data(runs: Runs) -> None:
    folder = runs.folder / "data" / "tiny"
    shutil.copytree(folder, runs.folder / "data" / "other")
    message = refused(runs, "--resume=latest", "--dataset=other")
    assert "dataset  tiny        other" in message and "n_embd" not in message


# ---------------------------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------------------------


def test_out_dir_is_a_file(runs: Runs) -> None:
    (runs.folder / "file").write_text("mine")
    for out_dir in ("file", "file/below"):
        assert "cannot be written" in refused(runs, out_dir=out_dir)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no new folders: /proc")
def test_out_dir_cannot_be_made(runs: Runs) -> None:
    assert "--out_dir=..." in refused(runs, out_dir="/proc/out")


def test_two_runs_on_one_out_dir(runs: Runs) -> None:
    first = runs.start("busy", "--max_iters=1000000", "--checkpoint_minutes=0", "--keep_epochs=0", "--log_interval=1000")
    first.wait_for("Iter 1 |")
    for flags in ((), ("--resume=latest",)):
        second = runs.start("busy", *flags)
        assert second.wait() == 2 and second.stdout == ""
        assert "is in use by process" in second.stderr and "Traceback" not in second.stderr
    first.send(signal.SIGINT)
    assert first.wait() == 0
    assert len(runs.log("busy")["events"]) == 2  # it has one log, and started and stopped once
    assert runs.tiers("busy").keys() == {"latest"}


def test_every_checkpoint_damaged(runs: Runs) -> None:
    for manifest in (runs.folder / "out" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    assert "is whole; to start from scratch, move them away" in refused(runs, "--resume=latest")


def test_a_checkpoint_without_room_leaves_the_old_ones_in_place(runs: Runs) -> None:
    """A run from scratch would set them aside; one that is refused must not have."""
    refused(runs, "--n_layer=1000000000")
    assert runs.tiers("out") == {"latest": 4, "rolling_step_2": 2, "rolling_step_4": 4}


# ---------------------------------------------------------------------------------------------------------------------
# The command itself
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"), [(["--dropuot=1"], "did you mean 'dropout'?"), (["--dataset=nowhere"], "has no train.bin")]
)
def test_train_py_as_a_command(runs: Runs, flags: list[str], says: str) -> None:
    command = [sys.executable, ROOT / "train.py", *runs.argv("out", *flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runs.folder, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and says in done.stderr and "Traceback" not in done.stderr


def test_memory_that_is_not_there(runs: Runs) -> None:
    """No computer has these 2**50 bytes; an evaluation needs no disk, which would be missed first."""
    huge = f"--n_layer=1 --n_head=1 --n_embd={2**23} --eval_only".split()
    process = runs.start("out", *huge)
    assert process.wait() == 4
    assert "out of memory" in process.stderr and "--batch_size=2" in process.stderr and "Traceback" not in process.stderr
    cfg = load_config(runs.argv("out", *huge, "--dtype=float32"))
    settled = with_vocabulary(cfg, load_dataset(cfg.data, cfg.model.block_size))  # the data's few letters, not GPT-2's vocabulary
    needed = predict_memory(settled, "float32", "ddp", 1).parameters / GIB
    assert re.search(rf"parameters +{needed:.2f} GiB", process.stderr), process.stderr


def test_a_batch_job_from_another_folder(tmp_path: Path) -> None:
    """Not one message of each rank."""
    script, environment = ROOT / "scripts" / "slurm.sbatch", os.environ | {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", script, "config/quickstart.py"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no train.py in {tmp_path}: submit the job from the folder that it is in\n"
