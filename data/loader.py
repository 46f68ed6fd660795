"""Which tokens make up sample number i of a run, and how they reach the device before they are needed.

B batch, T block size. A sample is T tokens and, as targets, the T tokens one further on. The order of samples is a pure
function of (seed, global sample index): a run's data position is that one integer, and neither the number of ranks nor
the size of a micro-batch changes which samples a step holds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from configurator import DataConfig

Batch = tuple[torch.Tensor, torch.Tensor]  # x and y, each (B, T) int64

FEISTEL_ROUNDS = 6
LOWEST_READ_AHEAD = 4  # micro-batches


class SampleOrder:
    """Random order without replacement, without state, the same on every machine and with every numpy.

    An epoch cuts the split into windows of `block_size` tokens, at a phase of its own in [0, block_size) (fixed windows
    overfit small texts), and visits each once, in an order of its own: the permutation is a Feistel network over the
    next power of four, walked along its cycle until it falls inside [0, samples_per_epoch) (Black and Rogaway, 2002).
    """

    def __init__(self, n_tokens: int, block_size: int, seed: int) -> None:
        assert n_tokens > block_size, "load_dataset refuses a split shorter than a block and its target"
        self.block_size = block_size
        self.seed = seed
        self.samples_per_epoch = max(1, (n_tokens - block_size) // block_size)  # windows that fit at every phase
        # A split of less than two blocks has one window, and only the phases at which it and its target fit.
        self.n_phases = min(block_size, n_tokens - self.samples_per_epoch * block_size)
        self.half_bits = max(1, ((self.samples_per_epoch - 1).bit_length() + 1) // 2)

    def epoch(self, index: int) -> int:
        """The epoch, from 0, that global sample `index` belongs to."""
        return index // self.samples_per_epoch

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """Offset of the first token of each global sample index: (N,) -> (N,) int64."""
        epochs, places = np.divmod(np.asarray(indices, dtype=np.uint64), np.uint64(self.samples_per_epoch))
        keys = _mix(epochs ^ _mix(np.full(epochs.shape, self.seed % 2**64, np.uint64)))
        phases = _mix(keys) % np.uint64(self.n_phases)
        windows = self._permute(places, keys)
        while len(outside := np.flatnonzero(windows >= self.samples_per_epoch)):
            windows[outside] = self._permute(windows[outside], keys[outside])
        return (phases + windows * np.uint64(self.block_size)).astype(np.int64)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """A permutation of [0, 2**(2 half_bits)) for each key."""
        bits, mask = np.uint64(self.half_bits), np.uint64((1 << self.half_bits) - 1)
        left, right = values >> bits, values & mask
        for number in range(1, FEISTEL_ROUNDS + 1):
            left, right = right, left ^ (_mix(right + keys * np.uint64(2 * number + 1)) & mask)
        return (left << bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's step and finaliser (Steele, Lea and Flood, 2014): (N,) uint64 -> (N,) uint64 that look random."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Loader:
    """The training batches of one rank, read ahead by a background thread.

    `position`, the global sample index at which the next step starts, is the whole state: store it, pass it in again,
    and the run goes on with the same samples. Micro-batch m of a step goes to rank m % world_size.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        order: SampleOrder,
        data: DataConfig,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
    ) -> None:
        assert data.gradient_accumulation_steps % world_size == 0, "the configuration is checked before"
        self.position = position
        self.wait_s = 0.0  # what the last step spent waiting for data
        self._tokens, self._order, self._device = tokens, order, device
        self._batch_size = data.batch_size
        self._samples_per_step = data.batch_size * data.gradient_accumulation_steps
        self._micro_starts = range(rank * data.batch_size, self._samples_per_step, world_size * data.batch_size)
        self._thread = ThreadPoolExecutor(1, "loader", _use_device, (device,))
        self._ahead: deque[Future[torch.Tensor]] = deque()
        self._upcoming = self._micro_positions(position)
        for _ in range(max(LOWEST_READ_AHEAD, len(self._micro_starts))):  # a whole step
            self._read_next()

    def step(self) -> Iterator[Batch]:
        """Yields this rank's micro-batches of the next step, x and y (B, T) int64 on the device, and moves `position`.

        An error of the background thread is raised here.
        """
        self.wait_s = 0.0
        for number in range(len(self._micro_starts)):
            t0_s = time.perf_counter()
            batch = self._ahead.popleft().result()
            self.wait_s += time.perf_counter() - t0_s
            self._read_next()
            if number == len(self._micro_starts) - 1:
                self.position += self._samples_per_step
            # PyTorch's pinned allocator reuses the memory only when the copy is done, so nothing has to wait for it.
            x, y = batch.to(self._device, non_blocking=True)
            yield x, y

    def close(self) -> None:
        """Stops the background thread."""
        self._thread.shutdown(cancel_futures=True)

    def _micro_positions(self, position: int) -> Iterator[int]:
        while True:
            for start in self._micro_starts:
                yield position + start
            position += self._samples_per_step

    def _read_next(self) -> None:
        self._ahead.append(self._thread.submit(self._read, next(self._upcoming)))

    def _read(self, first_sample: int) -> torch.Tensor:
        starts = self._order.starts(np.arange(first_sample, first_sample + self._batch_size))
        pin = self._device.type == "cuda"
        batch = torch.empty((2, len(starts), self._order.block_size), dtype=torch.int64, pin_memory=pin)  # (2, B, T)
        _fill(batch.numpy(), self._tokens, starts)
        return batch


def _use_device(device: torch.device) -> None:
    """A new thread stands on GPU 0; pinning memory from there would cost every rank a context on that GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _fill(batch: np.ndarray, tokens: np.ndarray, starts: np.ndarray) -> None:
    """Copies the windows at `starts`, and their targets, into batch (2, B, T); positions past the end keep their value."""
    block_size = batch.shape[2]
    for row, start in enumerate(starts):
        window = tokens[start : start + block_size + 1]
        batch[0, row, : len(window) - 1] = window[:-1]
        batch[1, row, : len(window) - 1] = window[1:]


def evaluation_batches(
    tokens: np.ndarray,
    block_size: int,
    data: DataConfig,
    eval_iters: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yields one rank's share of an evaluation: x and y, each (B, T) int64 on the device, the same at every call.

    The split is cut into windows; `eval_iters` batches of them, evenly spread, are taken, or all of them when
    `eval_iters` is 0 or there are no more: then every token but the first is predicted exactly once. Every rank gets
    the same number of batches of the same shape (compiled once, and collectives match). Places without a target hold
    x = 0 and y = -1, which cross_entropy(ignore_index=-1) leaves out. Sum the losses and count the targets: a mean per
    batch would weigh a padded batch like a full one.
    """
    n_windows = -(-(len(tokens) - 1) // block_size)
    n_taken = min(n_windows, eval_iters * data.batch_size) if eval_iters else n_windows
    starts = np.arange(n_taken) * n_windows // n_taken * block_size
    n_batches = -(-n_taken // data.batch_size)
    for number in range(rank, -(-n_batches // world_size) * world_size, world_size):
        batch = torch.zeros((2, data.batch_size, block_size), dtype=torch.int64)
        batch[1] = -1
        _fill(batch.numpy(), tokens, starts[number * data.batch_size :][: data.batch_size])
        x, y = batch.to(device)
        yield x, y
