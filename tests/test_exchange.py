"""The exchange by copies, as real processes with one file for the memories of all; and between GPUs where there are two."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import exchange
import kernels
import parallel
import sharding
from configurator import ROOT, UserError, load_config
from exchange import Collectives, Copies, all_gather_single, own_rows, share_of
from flops import count_parameters
from memory import GIB, predict_memory, ring_bytes, settled
from parallel import Ranks, start_ranks
from tiny_runs import LLAMA, Main, Runs

# As in test_sharding.py: four ranks cannot share 27 rows evenly.
SHAPE = "--gradient_accumulation_steps=4 --n_layer=2 --n_head=3 --n_embd=48 --vocab_size=27".split()
SHAPES = [(27, 48), (48, 5), (3, 7), (1, 1), (200, 33)]


class MappedMemory:
    """PeerMemory of processes: parts of a file that all map. Signals come late, and are polled."""

    uncounted_bytes = 0

    def __init__(self, ranks: Ranks, n_bytes: int) -> None:
        n, flag_bytes = ranks.world_size, 6 * 4 * ranks.world_size**2
        size = flag_bytes + n * n_bytes
        path = Path(ranks.agree(lambda: f"/dev/shm/nanotrain-test-{random.randrange(10**12)}"))
        if ranks.is_main:
            path.write_bytes(bytes(size))
        ranks.all_of(None)
        whole = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        ranks.all_of(None)
        path.unlink(missing_ok=True)
        self.flags = whole[:flag_bytes].view(torch.int32).view(6, n, n)  # channel, owner, sender
        self.memory = [whole[flag_bytes + rank * n_bytes :][:n_bytes] for rank in range(n)]
        self.me = ranks.rank

    def signal(self, channel: int, value: int) -> None:
        time.sleep(random.random() * 1e-3)
        assert int(self.flags[channel, :, self.me].max()) <= value, "a signal only grows"
        self.flags[channel, :, self.me] = value

    def wait(self, channel: int, value: int) -> None:
        deadline = time.monotonic() + 60
        while int(self.flags[channel, self.me].min()) < value:
            assert time.monotonic() < deadline, "no signal"
            time.sleep(0)
        time.sleep(random.random() * 1e-3)


def copy_in_memory() -> None:
    """What a rank becomes before it starts: one that exchanges by copies, each where the one before has been."""
    exchange.PIECE, exchange.RING_PIECES, exchange.PeerMemory = 1000, 1, MappedMemory
    sharding.choose_exchange = lambda *args, **kwargs: ("copies", "")


def copy_behind() -> None:
    """Likewise, and as ddp of a small model would be on GPUs, whose micro-steps are replayed."""
    copy_in_memory()
    sharding.exchanges_behind = lambda cfg, strategy: strategy == "ddp"


def share_gpus() -> None:
    """What a rank becomes before it starts: one of several on a GPU, where NCCL refuses to work and gloo does not."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    choose_device, n_gpus = parallel.choose_device, torch.cuda.device_count()
    parallel.choose_device = lambda name, local_rank, local_world_size: choose_device(name, local_rank % n_gpus)
    parallel.connect = lambda device: dist.init_process_group("gloo")
    exchange.why_not_copies = lambda ranks: None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    with Runs(tmp_path_factory.mktemp("exchange")) as runs:
        yield runs


def run_copies(
    runs: Runs,
    n: int,
    out_dir: str,
    *flags: str,
    main: Main | None = None,
    become: Callable[[], None] = copy_in_memory,
    timeout_s: float = 120,
) -> str:
    processes = runs.start_ranks(n, out_dir, *flags, prepare=[become] * n, main=main)
    codes = [process.wait(timeout_s) for process in processes]
    output = "".join(process.output for process in processes)
    assert codes == [0] * n, output
    return output


@pytest.mark.parametrize(("n", "dtype"), [(2, "float32"), (4, "float32"), (2, "bfloat16"), (4, "bfloat16")])
def test_copies_train_as_collectives_do(n: int, dtype: str, runs: Runs) -> None:
    """ddp and zero1 bitwise each other, and fsdp; the losses of all-reduce; and a checkpoint that either goes on with.

    With two ranks there are two micro-steps, with four there is one: gradients are sent in float32, and in bfloat16.
    """
    flags, name = [*SHAPE, f"--dtype={dtype}"], f"{n}-{dtype}"
    runs.run_ranks(n, f"{name}-collectives", *flags, "--max_iters=5", "--parallel=ddp")
    for strategy in ("ddp", "zero1", "fsdp"):
        output = run_copies(runs, n, f"{name}-{strategy}", *flags, "--max_iters=5", f"--parallel={strategy}")
        assert re.search(f"{strategy} over {n} ranks, as asked for.*, by the GPUs' copy engines", output)
    ddp, zero1 = runs.tensors(f"{name}-ddp"), runs.tensors(f"{name}-zero1")
    assert ddp.keys() == zero1.keys() and all(torch.equal(ddp[key], zero1[key]) for key in ddp)
    assert runs.losses(f"{name}-ddp") == runs.losses(f"{name}-zero1")
    expected, tolerance = list(runs.losses(f"{name}-collectives").values()), 1e-6 if dtype == "float32" else 1e-3
    output = run_copies(runs, n, f"{name}-behind", *flags, "--max_iters=5", "--parallel=ddp", become=copy_behind)
    assert "by the GPUs' copy engines, behind the backward pass" in output
    for variant in ("ddp", "behind", "fsdp"):
        assert list(runs.losses(f"{name}-{variant}").values()) == pytest.approx(expected, rel=tolerance)
    # What a GPU's memory allows. Of two micro-steps the sums are float32, and are sent so.
    held = "--fsdp_accumulate_whole" if n == 2 else "--fsdp_reshard_after_forward=False"
    holding = [*flags, "--max_iters=5", "--use_fsdp", held]
    runs.run_ranks(n, f"{name}-held-collectives", *holding)
    run_copies(runs, n, f"{name}-held", *holding)
    by_gloo, by_copies = (runs.losses(f"{name}-{which}").values() for which in ("held-collectives", "held"))
    assert list(by_copies) == pytest.approx(list(by_gloo), rel=1e-6 if n == 2 else tolerance)
    run_copies(runs, n, f"{name}-collectives", *flags, "--parallel=zero1", "--max_iters=7", "--resume=latest")
    runs.run_ranks(n, f"{name}-zero1", *flags, "--parallel=ddp", "--max_iters=7", "--resume=latest")
    assert runs.losses(f"{name}-zero1")[7] == pytest.approx(runs.losses(f"{name}-collectives")[7], rel=10 * tolerance)


def average_and_spread(argv: list[str]) -> None:
    """On every rank: random gradients of many shapes, some rounds, by copies and by all-reduce."""
    with ExitStack() as stack:
        cfg = load_config(argv)
        ranks = start_ranks(cfg.run, cfg.parallel, stack)
        device = ranks.device
        weights = [torch.zeros(shape, device=device) for shape in SHAPES]
        largest = max(share_of([weight], ranks.world_size) for weight in weights)
        add = kernels.choose(vars(cfg.kernels), device.type)[0].average_
        copies, collectives = Copies(ranks, largest, True, add, at_home=weights, gathers=True), Collectives(ranks)
        for step in range(20):
            generator = torch.Generator().manual_seed(100 * step + ranks.rank)
            whole, dtype = step % 2 == 0, torch.bfloat16 if step % 3 == 1 else torch.float32
            mine = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
            expected = [collectives.average(gradient.clone(), whole) for gradient in mine]
            collectives.finish_averages()
            got = [copies.average(gradient, whole) for gradient in mine]
            copies.finish_averages()
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            for weight in weights:
                first, end = own_rows(len(weight), ranks.rank, ranks.world_size)
                weight[first:end] = step + torch.arange(first, end, device=device)[:, None]
            ranks.sum_(torch.zeros((), device=device))  # as the gradient's norm: all have read what comes to be overwritten
            for wait in [copies.spread(weight) for weight in weights]:
                wait()
            for weight in weights:
                assert torch.equal(weight, (step + torch.arange(len(weight), device=device)[:, None]).expand_as(weight).float())
            own = torch.randn(largest - step, generator=generator).to(device, torch.bfloat16)
            together, expected = (own.new_zeros(ranks.world_size * len(own)) for _ in range(2))
            copies.gather(together, own)
            all_gather_single(expected, own)
            assert torch.equal(together, expected)
            share, whole = torch.zeros(len(own), device=device), expected.float() + ranks.rank
            copies.reduce_scatter(share, whole, dist.ReduceOp.SUM if step % 2 else dist.ReduceOp.AVG)
            ranks.sum_(whole)
            want = whole.view(ranks.world_size, -1)[ranks.rank] / (1 if step % 2 else ranks.world_size)
            torch.testing.assert_close(share, want, rtol=1e-5, atol=1e-6)
        assert copies.averages.newest >= 120 and copies.gathers.newest >= 20
        print("all the same")


def average_without_a_break(argv: list[str]) -> None:
    """On every rank: hundreds of gradients of uneven sizes, one behind the other, on streams that are slow now and then."""
    with ExitStack() as stack:
        cfg = load_config(argv)
        ranks = start_ranks(cfg.run, cfg.parallel, stack)
        shapes = [(1000, 2304), (6912, 1200), (77, 513), (4096, 4096), (1, 9)]
        largest = max(share_of([torch.empty(shape, device="meta")], ranks.world_size) for shape in shapes)
        add = kernels.choose(vars(cfg.kernels), ranks.device.type)[0].average_
        copies, draw = Copies(ranks, largest, True, add, gathers=True), random.Random(ranks.rank)
        wrong = torch.zeros((), device=ranks.device, dtype=torch.int64)
        for number in range(300):
            shape, dtype = random.Random(number).choice(shapes), torch.bfloat16 if number % 3 == 0 else torch.float32
            value = float(number % 64 + ranks.rank)  # which bfloat16 has
            mean = copies.average(torch.full(shape, value, device=ranks.device, dtype=dtype), everywhere=True)
            for stream in (copies.incoming, copies.outgoing, torch.cuda.current_stream()):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(int(draw.random() ** 4 * 4e6))  # cycles: 2 ms at the most
            copies.finish_averages()
            wrong += (mean != number % 64 + (ranks.world_size - 1) / 2).sum()
        assert wrong.item() == 0
        print("all the same")


@pytest.mark.parametrize("n", [2, 3, 4])
def test_averages_and_rows_arrive(n: int, runs: Runs) -> None:
    output = run_copies(runs, n, f"arrive-{n}", main=average_and_spread)
    assert output.count("all the same") == n


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("main", [average_and_spread, average_without_a_break])
def test_averages_and_rows_arrive_on_gpus(main: Main, runs: Runs) -> None:
    n = 4 if torch.cuda.device_count() >= 4 else 2
    assert runs.run_ranks(n, "gpus", "--device=cuda", main=main).count("all the same") == n


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_eight_ranks_that_share_gpus(runs: Runs) -> None:
    """What eight GPUs do, on as many as there are: the averages, and training as one process does."""
    gpu = ["--device=cuda", "--exchange=copies"]
    output = run_copies(runs, 8, "eight", *gpu, main=average_without_a_break, become=share_gpus)
    assert output.count("all the same") == 8
    flags = [*SHAPE, "--device=cuda", "--gradient_accumulation_steps=16", "--max_iters=5"]
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 1e-2)):
        runs.run(f"eight-{dtype}-one", *flags, f"--dtype={dtype}")
        expected = list(runs.losses(f"eight-{dtype}-one").values())
        for strategy in ("ddp", "zero1", "fsdp"):
            name = f"eight-{dtype}-{strategy}"
            output = run_copies(
                runs, 8, name, *flags, "--exchange=copies", f"--dtype={dtype}", f"--parallel={strategy}", become=share_gpus
            )
            assert "over 8 ranks, as asked for" in output and "by the GPUs' copy engines" in output
            assert list(runs.losses(name).values()) == pytest.approx(expected, rel=tolerance)
        ddp, zero1 = runs.tensors(f"eight-{dtype}-ddp"), runs.tensors(f"eight-{dtype}-zero1")
        assert all(torch.equal(ddp[key], zero1[key]) for key in ddp)


def measure_memory(argv: list[str]) -> None:
    """On every rank: what benchmarks/scaling.py measures."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from scaling import measure, own_step

    with ExitStack() as stack:
        cfg = load_config(argv)
        ranks = start_ranks(cfg.run, cfg.parallel, stack)
        row = measure(partial(own_step, cfg, ranks, 1, lambda line: None), cfg, ranks, n_steps=2, profile=False)
        if ranks.is_main:
            print("measured", json.dumps(row))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs GPUs")
def test_memory_of_eight_ranks_that_share_gpus(runs: Runs) -> None:
    """LLaMA 1.29 B, one sequence a rank: each rank has its own shares, whosever the GPU is."""
    if sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count())) < 220 * GIB:
        pytest.skip("needs GPUs of 220 GiB together")
    model = "--n_layer=18 --n_head=18 --n_embd=2304 --d_ff=6144 --block_size=2048 --vocab_size=32000 --batch_size=1".split()
    flags = [*model, *LLAMA, "--gradient_accumulation_steps=8", "--device=cuda", "--dtype=bfloat16", "--compile=True"]
    rows, peaks = {}, {}
    for strategy, *more in (["ddp"], ["zero1"], ["fsdp"], ["fsdp", "--fsdp_reshard_after_forward"]):
        own, name = [*flags, f"--parallel={strategy}", *more], " ".join([strategy, *more])
        output = run_copies(runs, 8, name, *own, main=measure_memory, become=share_gpus, timeout_s=300)
        rows[name] = json.loads(re.search("measured (.*)", output)[1])
        cfg = settled(load_config(runs.argv(name, *own)), "bfloat16", 8, 140.0)
        use = predict_memory(cfg, "bfloat16", strategy, 8)
        print(name, rows[name], f"predicted {use.peak / GIB:.2f}")
        peaks[name] = rows[name]["peak_gib"] / (use.peak / GIB)
    gib = count_parameters(cfg.model).total / GIB
    ring = ring_bytes(cfg, "fsdp", 8) / GIB
    assert rows["zero1"]["optimizer_gib"] == pytest.approx(8 * gib / 8, rel=0.02)
    held = sum(rows["fsdp"][f"{name}_gib"] for name in ("parameters", "gradients", "optimizer"))
    assert held - ring == pytest.approx(16 * gib / 8, rel=0.02)
    assert rows["fsdp"]["peak_gib"] < 0.40 * rows["ddp"]["peak_gib"]
    assert all(0.9 < peak < 1.05 for peak in peaks.values()), peaks


class Alone(Ranks):
    """One of two ranks, whose other does and says the same."""

    def all_of(self, value: object) -> list[object]:
        return [value, value]


class FakeMemory:
    """What PeerMemory would be, and where it fails."""

    def __init__(self, fails: str) -> None:
        if fails == "allocate":
            raise AttributeError("undefined symbol: cuStreamBatchMemOp_v2")
        self.fails, self.device = fails, torch.device("cpu")
        arrived = 0 if fails == "bytes" else 2
        self.memory = [torch.tensor([1, arrived], dtype=torch.uint8) for _ in range(2)]
        self.flags = torch.tensor([[1, 0 if fails == "signals" else 1]])

    def signal(self, channel: int, value: int) -> None:
        if self.fails == "signal":
            raise RuntimeError("cuStreamBatchMemOp failed with CUDA error 801\nat a place")

    def wait(self, channel: int, value: int) -> None: ...


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        ("nowhere", ""),
        ("allocate", "undefined symbol: cuStreamBatchMemOp_v2"),
        ("signal", "cuStreamBatchMemOp failed with CUDA error 801"),
        ("bytes", "what one GPU copies into another's memory does not arrive there"),
        ("signals", "what one GPU copies into another's memory does not arrive there"),
    ],
)
def test_where_copies_fail_nccl_is_taken_and_says_why(fails: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PeerMemory", lambda ranks, n_bytes: FakeMemory(fails))
    monkeypatch.setattr(exchange, "why_not_copies", lambda ranks: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    ranks = Alone(0, 2, torch.device("cpu"))
    expected = ("collectives", reason) if reason else ("copies", "")
    assert exchange.choose_exchange("auto", ranks, in_groups=False) == expected
    assert exchange.choose_exchange("auto", ranks, in_groups=True)[0] == "collectives"
    if reason:
        with pytest.raises(UserError, match=f"--exchange=copies: {reason}; pass --exchange=auto"):
            exchange.choose_exchange("copies", ranks, in_groups=False)


def test_copies_asked_for_where_there_are_none(runs: Runs) -> None:
    output = runs.run_ranks(2, "refused", *SHAPE, "--exchange=copies", "--parallel=ddp", exit_code=2)
    assert output.count("--exchange=copies: a CPU has no copy engines; pass --exchange=auto") == 1
