"""Ranks, random states, and figures that come back in order."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from configurator import UserError
from parallel import Ranks, RanksApart, ReadBack, StopRequest, choose_device, random_state, set_random_state

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


@pytest.fixture(autouse=True)
def own_signal_handlers():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_one_line():
    with pytest.raises(UserError, match="pass --device=cpu"):
        choose_device("cuda")
    assert choose_device("auto") == CPU


def test_random_state_comes_back_bitwise():
    torch.manual_seed(3)
    state = random_state(CPU)
    first = torch.rand(5)
    set_random_state(state, CPU)
    assert torch.equal(torch.rand(5), first)


def test_read_back_returns_steps_in_order():
    read = ReadBack(CPU)
    for step in range(3):
        read.push(step, torch.tensor([step, 10.0 * step]))
    assert [(tag, figures) for tag, figures, ms in read.pop(keep=1)] == [(0, [0.0, 0.0]), (1, [1.0, 10.0])]
    assert [tag for tag, _, ms in read.pop(keep=0) if ms >= 0] == [2]


def test_read_back_does_not_wait_for_ever():
    """Of a GPU whose stream waits for a rank that hangs, the host sees an event that never comes."""

    class Never:
        def query(self) -> bool:
            return False

    read = ReadBack(CPU, limit_s=0.05)
    read.on_gpu = True
    read.pending.append((0, torch.zeros(1), Never(), Never(), Never()))
    with pytest.raises(RanksApart, match=r"waited 0.05 s for another rank, which hangs or has gone \(--step_timeout_s\)"):
        read.pop(keep=0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0), (signal.SIGUSR1, 0)])
def test_a_signal_asks_for_a_stop(number, code):
    stop = StopRequest(None, ALONE)
    assert not stop
    os.kill(os.getpid(), number)
    assert stop and stop.exit_code == code and stop.reason == signal.Signals(number).name


@pytest.mark.parametrize(("rank", "says"), [(0, "SIGUSR1: finishing the step, then saving\n"), (1, "")])
def test_rank_0_says_that_it_was_signalled(rank, says, capfd):
    stop = StopRequest(None, Ranks(rank, 2, CPU))
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.code == signal.SIGUSR1 and capfd.readouterr().err == says


def test_a_signal_is_heard_when_nobody_reads_stderr():
    """Ctrl-C ends the `tee` of `train.py 2>&1 | tee log` too: the stop must not become a BrokenPipeError."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    stderr = os.dup(2)
    os.dup2(write_end, 2)
    try:
        stop = StopRequest(None, ALONE)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(write_end)


def test_max_hours_stops():
    assert StopRequest(1e-9, ALONE).reason.startswith("max_hours") and not StopRequest(1.0, ALONE)


@pytest.mark.parametrize(
    ("left_s", "max_hours", "reason"),
    [
        (100, 1.0, "end of the Slurm job"),
        (-50, None, "end of the Slurm job"),
        (4000, 2.0, ""),
        (4000, 1e-9, "max_hours=1e-09"),
    ],
)
def test_the_end_of_a_slurm_job_stops_whenever_the_process_began(left_s, max_hours, reason, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + left_s)))
    stop = StopRequest(max_hours, ALONE)
    assert stop.reason == reason and stop.exit_code == 0


def test_a_signal_wins_over_time_that_is_up(monkeypatch):
    """Rank 0's time is up in the same step as SIGTERM reaches rank 1; they hear both."""
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    out_of_time, signalled = StopRequest(1e-9, Ranks(0, 2, CPU)), StopRequest(None, Ranks(1, 2, CPU))
    os.kill(os.getpid(), signal.SIGTERM)  # the newest handler is the second's
    for stop in (out_of_time, signalled):
        stop.hear([out_of_time.code, signalled.code])
        assert stop.reason == "SIGTERM" and stop.exit_code == 143
