"""The order of samples, and the batches that reach the device."""

import time
from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from configurator import DataConfig
from data.loader import Loader, SampleOrder, evaluation_batches

CPU = torch.device("cpu")
BLOCK_SIZE = 8


@pytest.mark.parametrize("n_tokens", [9, 10, 15, 16, 17, 25, 100, 1_000, 12_345])
def test_an_epoch_visits_every_window_once_at_one_phase(n_tokens):
    order = SampleOrder(n_tokens, BLOCK_SIZE, seed=1)
    n = order.samples_per_epoch
    assert n == max(1, n_tokens // BLOCK_SIZE - 1)
    phases = set()
    for epoch in range(50):
        starts = order.starts(np.arange(epoch * n, (epoch + 1) * n))
        phase = starts.min()
        assert sorted(starts) == list(range(phase, phase + n * BLOCK_SIZE, BLOCK_SIZE))
        assert starts.max() + BLOCK_SIZE + 1 <= n_tokens
        phases.add(phase)
    assert phases == set(range(min(BLOCK_SIZE, n_tokens - n * BLOCK_SIZE)))


def test_order_never_changes():
    """These numbers are part of the format: a resumed run must meet the same samples, whatever numpy it has."""
    starts = SampleOrder(1_003_854, 256, seed=1337).starts(np.array([0, 1, 2, 3919, 3920, 10**9]))
    assert starts.tolist() == [338339, 756643, 333987, 31395, 565413, 280129]


def test_order_is_a_pure_function_of_seed_and_index():
    order, indices = SampleOrder(100_000, BLOCK_SIZE, seed=7), np.arange(40_000)
    starts = order.starts(indices)
    backwards = np.concatenate([order.starts(indices[i : i + 77]) for i in range(0, 40_000, 77)][::-1])
    assert sorted(starts) == sorted(backwards)
    assert order.starts(indices[12_345:12_346]) == starts[12_345]
    assert (SampleOrder(100_000, BLOCK_SIZE, seed=8).starts(indices) != starts).mean() > 0.99
    assert [order.epoch(index) for index in (0, 12_498, 12_499)] == [0, 0, 1]


def test_order_looks_random():
    """Windows of one epoch are neither sorted nor clustered: correlations of 12,499 random places stay below 0.05."""
    order = SampleOrder(100_000, BLOCK_SIZE, seed=7)
    first, second = (order.starts(np.arange(12_499) + epoch * 12_499) for epoch in range(2))
    for a, b in [(first[1:], first[:-1]), (first, np.arange(12_499)), (first, second)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


def test_a_huge_split_needs_no_memory():
    order = SampleOrder(10**12, 2048, seed=1)
    starts = order.starts(np.arange(10**8, 10**8 + 1000))
    assert len(set(starts)) == 1000 and starts.max() > 9e11


def make_loader(batch_size: int = 3, accumulation: int = 4, **arguments) -> Loader:
    tokens = np.arange(1_000, dtype=np.uint16)
    data = DataConfig(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    return Loader(tokens, SampleOrder(1_000, BLOCK_SIZE, seed=3), data, CPU, **arguments)


def read_steps(n_steps: int, **arguments) -> list[list[int]]:
    """The first token of each sample (tokens count up, so it names the sample), a list a step."""
    loader = make_loader(**arguments)
    steps = []
    for _ in range(n_steps):
        steps.append([int(row[0]) for x, _ in loader.step() for row in x])
    loader.close()
    return steps


def test_batches_are_the_orders_samples_and_their_targets():
    loader = make_loader()
    starts = SampleOrder(1_000, BLOCK_SIZE, seed=3).starts(np.arange(12)).reshape(4, 3)
    for (x, y), expected in zip(loader.step(), starts, strict=True):
        assert x.dtype == y.dtype == torch.int64
        assert x.tolist() == [list(range(start, start + BLOCK_SIZE)) for start in expected]
        assert torch.equal(y, x + 1)
    assert loader.position == 12
    loader.close()


@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), [(3, 4, 2), (3, 4, 4), (6, 2, 2), (12, 1, 1), (1, 12, 3)])
def test_a_step_holds_the_same_samples_for_any_ranks_and_micro_batches(batch_size, accumulation, world_size):
    """20 steps of 12 cross an epoch's border, which is behind sample 124."""
    shares = [
        read_steps(20, batch_size=batch_size, accumulation=accumulation, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    together = [sorted(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)]
    assert together == [sorted(step) for step in read_steps(20)]


def test_position_is_the_whole_state():
    assert read_steps(15, position=5 * 12) == read_steps(20)[5:]


def test_position_moves_with_the_last_micro_batch_even_if_the_step_is_left_there():
    loader = make_loader()
    step = loader.step()
    positions = [(next(step), loader.position)[1] for _ in range(4)]
    loader.close()
    assert positions == [0, 0, 0, 12]


def test_data_is_read_ahead():
    """Once the first step is there, steps slower than the reading never wait."""
    loader = make_loader()
    for _ in loader.step():
        time.sleep(0.01)
    for _ in loader.step():
        time.sleep(0.01)
    assert loader.wait_s < 0.002
    loader.close()


class Unreadable:
    """Tokens on a disk that fails."""

    def __getitem__(self, where: slice) -> np.ndarray:
        raise OSError("the disk is gone")


def test_an_error_of_the_thread_reaches_the_trainer():
    loader = Loader(Unreadable(), SampleOrder(1_000, BLOCK_SIZE, seed=3), DataConfig(batch_size=2), CPU)
    with pytest.raises(OSError, match="the disk is gone"):
        list(loader.step())
    loader.close()


def evaluated(n_tokens: int, eval_iters: int, batch_size: int = 4, world_size: int = 1) -> list[list[torch.Tensor]]:
    tokens = np.arange(n_tokens, dtype=np.uint16)
    data = DataConfig(batch_size=batch_size)
    return [list(evaluation_batches(tokens, BLOCK_SIZE, data, eval_iters, CPU, rank, world_size)) for rank in range(world_size)]


def targets(ranks: list[list[torch.Tensor]]) -> list[int]:
    return [int(y) for batches in ranks for _, ys in batches for y in ys.flatten() if y >= 0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("n_tokens", "eval_iters"), [(9, 0), (10, 0), (65, 0), (66, 0), (300, 0), (300, 100), (289, 9)])
def test_whole_split_predicts_every_target_once(n_tokens, eval_iters, world_size):
    ranks = evaluated(n_tokens, eval_iters, world_size=world_size)
    assert sorted(targets(ranks)) == list(range(1, n_tokens))
    assert len({len(batches) for batches in ranks}) == 1
    for x, y in (batch for batches in ranks for batch in batches):
        assert x.shape == y.shape == (4, BLOCK_SIZE)
        assert torch.equal(x[y >= 0] + 1, y[y >= 0])


def test_part_of_a_split_is_spread_evenly_without_overlap():
    first = [int(x[row, 0]) for x, _ in evaluated(10_000, eval_iters=5)[0] for row in range(4)]
    assert len(first) == 20
    assert {b - a for a, b in pairwise(first)} <= {496, 504}  # 10,000 / 20, in whole windows
    assert first[-1] > 9_000


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_same_windows(world_size):
    assert sorted(targets(evaluated(10_000, 5, world_size=world_size))) == sorted(targets(evaluated(10_000, 5)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_on_the_cpu():
    """Pinned memory is not reused before its copy is done: many small steps, compared only at the end."""
    tokens, data = np.random.default_rng(0).integers(0, 50_000, 1_000_000).astype(np.uint16), DataConfig(batch_size=8)
    batches = []
    for device in (torch.device("cuda", 0), CPU):
        loader = Loader(tokens, SampleOrder(len(tokens), 1024, seed=0), data, device)
        batches.append([torch.stack(batch) for _ in range(5) for batch in loader.step()])
        loader.close()
    assert batches[0][0].is_cuda
    assert torch.equal(torch.stack(batches[0]).cpu(), torch.stack(batches[1]))
