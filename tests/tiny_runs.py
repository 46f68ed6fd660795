"""Runs of train.py on a tiny model and a tiny dataset, each in a process of its own: what test_train and test_bad_input share."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint import Checkpoint, find_checkpoint
from configurator import ROOT, run_command
from data.tokenizer import CharacterTokenizer
from data.tokens import Manifest, SplitManifest

PORTS = itertools.cycle(range(10_000 + os.getpid() * 499 % 20_000, 32_000))  # other tests at the same time begin elsewhere
Main = Callable[[list[str]], int | None]
FORK = multiprocessing.get_context("forkserver")
# 4 x 2 x 16 = 128 tokens a step; an epoch of the dataset below takes 25 steps.
TINY = """--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=2
    --compile=False --device=cpu --learning_rate=1e-2 --min_lr=1e-3 --warmup_iters=4 --lr_decay_iters=100 --max_iters=20
    --eval_interval=0 --checkpoint_interval=0 --rolling_interval=0""".split()
LLAMA = "--normalization=rmsnorm --ffn_type=swiglu --position_encoding=rope --weight_tying=False --bias=False".split()


def tiny_text(n_words: int) -> str:
    """Words drawn by a generator that is the same in every version of Python."""
    words, draw = "the cat sat on a mat in a café and saw one dog run to its red hat".split(), random.Random(5)
    return " ".join(words[int(draw.random() ** 2 * len(words))] for _ in range(n_words))


def write_dataset(folder: Path, train_text: str, val_text: str) -> None:
    """A prepared dataset of characters, manifest and all."""
    folder.mkdir(parents=True)
    tokenizer = CharacterTokenizer.of_texts([train_text, val_text])
    tokenizer.save(folder)
    splits = {}
    for split, text in (("train", train_text), ("val", val_text)):
        data = np.array(tokenizer.encode(text), "<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(data)
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
        splits[split] = SplitManifest(len(text), len(text.encode()), 1, hashlib.sha256(data).hexdigest())
    manifest = Manifest("uint16", tokenizer.vocab_size, tokenizer.name, tokenizer.hash, None, "test", "test", **splits)
    manifest.write(folder / "manifest.json")


def nothing() -> None: ...


def run_train(argv: list[str], stdout: Path, stderr: Path, prepare: Callable[[], None], main: Main | None) -> None:
    """`python train.py ...` in the forked process, or another `main` with its arguments."""
    import train

    for number, path in ((1, stdout), (2, stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    prepare()
    sys.argv = ["train.py", *argv]
    run_command(main or train.main)


def become_rank(rank: int, world_size: int, port: int, prepare: Callable[[], None]) -> None:
    """The environment that torchrun gives a process."""
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(world_size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    prepare()


def free_port() -> int:
    """One that no other test of this process has had, below those that systems by default give to whoever asks for any."""
    for port in itertools.islice(PORTS, 1000):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("of 1,000 ports none is free")


class TrainingProcess:
    """A run of train.py, forked from a process that has imported it: real signals, without two seconds of imports each."""

    def __init__(self, argv: list[str], output: Path, prepare: Callable[[], None], main: Main | None) -> None:
        start_fork_server()
        self._files = output.with_suffix(".stdout"), output.with_suffix(".stderr")
        self._process = FORK.Process(target=run_train, args=(argv, *self._files, prepare, main))
        self._process.start()

    def wait(self, timeout_s: float = 60) -> int:
        """The exit code; of a process that a signal ended, minus its number."""
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, f"still running after {timeout_s} s:\n{self.output}"
        return self._process.exitcode

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        """Returns as soon as the run has printed `text`."""
        deadline_s = time.monotonic() + timeout_s
        while text not in self.output:
            assert self._process.is_alive() and time.monotonic() < deadline_s, f"no {text!r} in:\n{self.output}"
            time.sleep(0.001)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: int) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def stdout(self) -> str:
        return read(self._files[0])

    @property
    def stderr(self) -> str:
        return read(self._files[1])


def read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def start_fork_server() -> None:
    """One thread for everything in it: sums are the same everywhere, and a fork takes no lock along."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        FORK.set_forkserver_preload(["train", "tiny_runs", "torch._dynamo", "torch.distributed.checkpoint.state_dict_saver"])
        forkserver.ensure_running()  # does nothing when it runs


class Runs:
    """Starts runs in `folder`; what is still running at the end of the `with` block is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[TrainingProcess] = []
        if not (folder / "data").exists():
            write_dataset(folder / "data" / "tiny", tiny_text(880), tiny_text(300))

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.send(9)
            process.wait()

    def argv(self, out_dir: str, *flags: str) -> list[str]:
        return [*TINY, f"--data_dir={self.folder / 'data'}", "--dataset=tiny", f"--out_dir={self.folder / out_dir}", *flags]

    def start(
        self, out_dir: str, *flags: str, prepare: Callable[[], None] = nothing, main: Main | None = None
    ) -> TrainingProcess:
        """`prepare`, a module's function, is called in the new process before train.py's main, or the `main` in its place."""
        process = TrainingProcess(self.argv(out_dir, *flags), self.folder / f"run_{len(self._started)}", prepare, main)
        self._started.append(process)
        return process

    def start_ranks(
        self, n: int, out_dir: str, *flags: str, prepare: Sequence[Callable[[], None]] = (), main: Main | None = None
    ) -> list[TrainingProcess]:
        """One process a rank; `prepare` has a function for each, or none."""
        port, own = free_port(), prepare or [nothing] * n
        become = [partial(become_rank, rank, n, port, own[rank]) for rank in range(n)]
        return [self.start(out_dir, *flags, prepare=prepare_rank, main=main) for prepare_rank in become]

    def run_ranks(self, n: int, out_dir: str, *flags: str, exit_code: int = 0, main: Main | None = None) -> str:
        """A whole run of n ranks: what they printed, rank 0 first."""
        processes = self.start_ranks(n, out_dir, *flags, main=main)
        codes = [process.wait() for process in processes]
        output = "".join(process.output for process in processes)
        assert codes == [exit_code] * n, f"exit codes {codes}\n{output}"
        return output

    def run(self, out_dir: str, *flags: str, exit_code: int = 0, prepare: Callable[[], None] = nothing) -> str:
        """A whole run: what it printed."""
        process = self.start(out_dir, *flags, prepare=prepare)
        code = process.wait()
        assert code == exit_code, f"exit code {code}\n{process.output}"
        return process.output

    def log(self, out_dir: str) -> dict[str, Any]:
        """The run log; there must be just one."""
        (path,) = (self.folder / out_dir).glob("run_*.json")
        return json.loads(path.read_text())

    def losses(self, out_dir: str) -> dict[int, float]:
        """Loss by step; a step that is missing, out of order or twice in the log fails here."""
        steps = [(record["iter"], record["loss"]) for record in self.log(out_dir)["training_iterations"]]
        assert [step for step, _ in steps] == list(range(1, len(steps) + 1))
        return dict(steps)

    def tiers(self, out_dir: str) -> dict[str, int]:
        """The step of every checkpoint; what is only half there has a name too and shows."""
        manifests = (self.folder / out_dir / "checkpoints").glob("*/manifest.json")
        return {path.parent.name: json.loads(path.read_text())["iter"] for path in manifests}

    def checkpoint(self, out_dir: str, which: str = "latest") -> Checkpoint:
        checkpoint = find_checkpoint(self.folder / out_dir, which, print)
        assert checkpoint is not None
        return checkpoint

    def tensors(self, out_dir: str, which: str = "latest") -> dict[str, torch.Tensor]:
        """All that a checkpoint holds, the optimizer's state too."""
        checkpoint = self.checkpoint(out_dir, which)
        return checkpoint.read_tensors(checkpoint.metadata.state_dict_metadata)
