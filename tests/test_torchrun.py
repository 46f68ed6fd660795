"""The launcher's side: scripts/slurm.sbatch on two nodes, which are two torchrun agents here, and what a failure does to them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from configurator import ROOT
from tiny_runs import Runs, free_port

# Each task of srun is an agent; it gets the script's command.
SRUN = """#!/bin/bash
[[ "$*" == *"--cpus-per-task=3"* ]] || exit 1
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    with Runs(tmp_path) as runs:
        yield runs


def rank_process(out_dir: Path, rank: int) -> int:
    """The process id of a rank of the run in out_dir."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if f"--out_dir={out_dir}".encode() in words and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(
                b"\0"
            ):
                return int(folder.name)
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    raise AssertionError(f"no process is rank {rank} of {out_dir}")


@contextmanager
def torchrun(out_dir: Path, output: Path, *command: object) -> Iterator[subprocess.Popen[bytes]]:
    """A launch of two ranks on this host; none of its processes outlives the `with` block."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with output.open("wb") as file:
        job = subprocess.Popen([*launcher, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
    try:
        yield job
    finally:
        job.kill()
        for rank in (0, 1):
            with suppress(AssertionError):
                os.kill(rank_process(out_dir, rank), signal.SIGKILL)


def wait_for_step(step: int, job: subprocess.Popen[bytes], output: Path) -> None:
    deadline_s = time.monotonic() + 120
    while f"Iter {step} " not in output.read_text():
        assert job.poll() is None and time.monotonic() < deadline_s, output.read_text()
        time.sleep(0.01)


@pytest.mark.slow
def test_two_nodes_go_on_after_a_rank_was_killed(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho 127.0.0.1\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"JOB_ID": "7", "SUBMIT_DIR": ROOT, "NNODES": 2, "GPUS_ON_NODE": 2, "JOB_NODELIST": "here", "CPUS_PER_TASK": 3}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in job.items()}
    environment |= {"PYTHON": sys.executable, "PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    flags = ["--gradient_accumulation_steps=4", "--parallel=zero1", "--max_iters=40", "--checkpoint_interval=5"]
    output, out_dir = tmp_path / "job.txt", tmp_path / "nodes"
    with output.open("wb") as file:
        script = ["bash", ROOT / "scripts" / "slurm.sbatch", *runs.argv("nodes", *flags)]
        batch = subprocess.Popen(script, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline_s = time.monotonic() + 120
        while "Iter 12 " not in output.read_text():
            assert batch.poll() is None and time.monotonic() < deadline_s, output.read_text()
            time.sleep(0.01)
        os.kill(rank_process(out_dir, 3), signal.SIGKILL)
        assert batch.wait(120) == 0, output.read_text()
    finally:
        if batch.poll() is None:
            os.killpg(batch.pid, signal.SIGKILL)
    assert "resuming" in output.read_text()
    runs.run_ranks(4, "uninterrupted", *flags)
    assert runs.losses("nodes") == runs.losses("uninterrupted")


@pytest.mark.slow
def test_one_host_goes_on_after_a_rank_was_killed(runs: Runs, tmp_path: Path) -> None:
    """Twice, from `latest`: not from the checkpoint that the command began with."""
    flags = ["--gradient_accumulation_steps=2", "--parallel=zero1", "--max_iters=60", "--checkpoint_interval=5"]
    runs.run_ranks(2, "out", *flags, "--max_iters=5", "--rolling_interval=5")
    output, out_dir = tmp_path / "job.txt", tmp_path / "out"
    command = ["--max_restarts=3", ROOT / "train.py", *runs.argv("out", *flags, "--resume=rolling_step_5")]
    with torchrun(out_dir, output, *command) as job:
        for step, rank in ((16, 1), (32, 0)):
            wait_for_step(step, job, output)
            os.kill(rank_process(out_dir, rank), signal.SIGKILL)
        assert job.wait(120) == 0, output.read_text()
    said = re.findall(r"resuming (\S+)", output.read_text())
    assert [Path(path).name for path in said] == ["rolling_step_5", "latest", "latest"]
    runs.run_ranks(2, "uninterrupted", *flags)
    assert runs.losses("out") == runs.losses("uninterrupted")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "flags", "cause"),
    [
        (None, ["--gradient_accumulation_steps=7"], "2 ranks cannot share them evenly"),
        (signal.SIGSTOP, ["--step_timeout_s=2"], "this rank has waited too long for another"),
        (signal.SIGKILL, [], "Signal 9 (SIGKILL) received by PID"),
    ],
    ids=str,
)
def test_torchruns_last_words_are_the_cause(
    stop: signal.Signals | None, flags: list[str], cause: str, runs: Runs, tmp_path: Path
) -> None:
    output, out_dir = tmp_path / "job.txt", tmp_path / "out"
    with torchrun(out_dir, output, ROOT / "train.py", *runs.argv("out", "--max_iters=1000000", *flags)) as job:
        if stop:
            wait_for_step(3, job, output)
            os.kill(rank_process(out_dir, 1), stop)
        assert job.wait(120) == 1
    last_words = [line for line in output.read_text().splitlines() if line.strip(" =")][-1]
    assert cause in last_words, output.read_text()


def be_started_again(launch: str, count: int) -> None:
    """What torchrun tells the processes of its attempt number `count` + 1; its run id is "none" unless the user names one."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": str(count)}
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"/tmp/torchelastic_x/{launch}/attempt_{count}/0/error.json"


def test_another_attempt_goes_on_unasked(runs: Runs) -> None:
    flags = ["--run_name=mine", "--max_iters=4"]
    runs.run("out", *flags, prepare=partial(be_started_again, "none_first", 0))
    output = runs.run("out", *flags, "--max_iters=6", prepare=partial(be_started_again, "none_first", 1))
    assert "resuming" in output and list(runs.losses("out")) == [1, 2, 3, 4, 5, 6]
    output = runs.run("out", *flags, "--run_name=other", prepare=partial(be_started_again, "none_second", 1))
    assert "the checkpoints of run mine are now in" in output  # they are not its own


SAY_LAUNCH = """import os, sys; sys.path.insert(0, {root!r})
from startup import launch_id
print("launch", launch_id(), flush=True)
sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")"""


@pytest.mark.slow
def test_a_launch_is_torchruns_own(tmp_path: Path) -> None:
    """Two launches of torchrun, each of which starts its process twice."""
    program = tmp_path / "say.py"
    program.write_text(SAY_LAUNCH.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "--max_restarts=1"]
    launches = [subprocess.Popen([*command, program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [launch.communicate(timeout=120)[0].splitlines() for launch in launches]
    (first, again), (second, _) = said
    assert first == again != second and first != "launch None"
