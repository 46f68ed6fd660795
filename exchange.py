"""What ranks exchange in a step: gradients become averages, and rows that one rank has updated go to all.

`Collectives` are torch.distributed's, between any ranks. `Copies` are for GPUs of one host that reach each other's memory: the
GPUs' copy engines move everything while all multiprocessors go on computing. NCCL's kernels run on multiprocessors, and a matrix
product that was cut for all of them takes longer by a whole round where some are taken; docs/RESULTS.md has the figures.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from configurator import UserError
from parallel import Ranks, first_line

if hasattr(dist, "all_gather_single"):
    from torch.distributed import all_gather_single
else:  # its name before torch 2.13
    from torch.distributed import all_gather_into_tensor as all_gather_single

PIECE = 2**24  # bytes that one rank sends another at a time, with which a copy reaches nine tenths of NVLink's speed
ALIGNMENT = 512  # bytes, as the caching allocator's: products are slower, or refused, at less than 16
RING_PIECES = 4  # of each rank's gradients, on their way at the same time
MEAN_BYTES = 4  # of an element of an average: float32, whatever is averaged
UNSUPPORTED = (RuntimeError, OSError, AttributeError, ImportError)  # by the GPUs, the driver or PyTorch
T = TypeVar("T")
Wait = Callable[[], None]  # returns when what is under way may be read; on a GPU the stream waits, not the host


def own_rows(n_rows: int, share: int, n_shares: int) -> tuple[int, int]:
    """First row and the one behind the last of share number `share`; a late share of a few rows may be empty."""
    size = -(-n_rows // n_shares)
    return min(share * size, n_rows), min((share + 1) * size, n_rows)


def share_of(parameters: Iterable[Tensor], n_shares: int) -> int:
    """Elements of the first of so many shares of rows, which none is larger than."""
    return sum(own_rows(len(p), 0, n_shares)[1] * p[0].numel() for p in parameters)


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


class Collectives:
    """torch.distributed's: NCCL between GPUs, gloo between CPUs."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._averages: list[tuple[Any, Tensor]] = []
        self._can_average = ranks.device.type == "cuda"  # NCCL divides on its way, gloo does not

    def average(self, gradient: Tensor, everywhere: bool) -> Tensor:
        """Starts on the mean over the ranks, in float32, of (rows, ...) of any dtype, which then belongs to the exchange.

        What it returns will have this rank's rows of the mean or, `everywhere`, all of it.
        """
        mean, op = gradient.float(), dist.ReduceOp.AVG if self._can_average else dist.ReduceOp.SUM
        self._averages.append((dist.all_reduce(mean, op, async_op=True), mean))
        first, end = own_rows(len(mean), self.ranks.rank, self.ranks.world_size)
        return mean if everywhere else mean[first:end]

    def finish_averages(self) -> None:
        """Returns when all that was started may be read: on a GPU the stream waits, not the host."""
        for work, _ in self._averages:
            work.wait()
        if not self._can_average:
            torch._foreach_div_([gradient for _, gradient in self._averages], self.ranks.world_size)
        self._averages.clear()

    def spread(self, parameter: Tensor) -> Wait:
        """Starts bringing everybody's own rows into everybody's (rows, ...)."""
        n, arriving = self.ranks.world_size, parameter
        first, end = own_rows(len(parameter), self.ranks.rank, n)
        rows, n_rows = parameter[first:end], -(-len(parameter) // n)
        if len(parameter) % n:  # some have fewer rows, or none: all send as many, and what is too much is left out
            arriving = parameter.new_zeros(n * n_rows, *parameter.shape[1:])
            rows = arriving[self.ranks.rank * n_rows :][:n_rows]
            rows[: end - first] = parameter[first:end]
        work = all_gather_single(arriving.view(-1), rows.view(-1), async_op=True)

        def wait() -> None:
            work.wait()
            if arriving is not parameter:
                parameter.copy_(arriving[: len(parameter)])

        return wait


class Ring:
    """Places in a part of everybody's peer memory that are used again and again, the same on all ranks; a place is a number.

    Numbers grow, and are the same on all ranks too: in the backward pass gradients come in the same order everywhere.
    """

    def __init__(self, size: int) -> None:
        """`size` and everything in here in bytes."""
        self.size, self.end, self.newest = size, 0, 0
        self.in_use: list[tuple[int, int, int]] = []  # (number, start, end)

    def place(self, size: int) -> tuple[int, int, int]:
        """(the next number, where it starts, the newest number that was there before: all ranks must have finished with it)."""
        start = self.end if self.end + size <= self.size else 0
        self.end, self.newest = start + size, self.newest + 1
        before = max((number for number, first, end in self.in_use if first < self.end and start < end), default=0)
        self.in_use = [place for place in self.in_use if place[0] > before] + [(self.newest, start, self.end)]
        return self.newest, start, before


class Copies:
    """Copies between the memories of a host's GPUs, beside the stream that computes.

    What is averaged is cut into a share for each rank, and shares into pieces. Of each piece every rank sends every other what it
    has of the other's share (ARRIVED), averages its own with what it has got in float32, and, where all want all, fetches the
    others' averages (AVERAGED): one rank computes them, so all have the same bits. What arrives lies in a ring until no rank,
    itself included, needs it any more (FINISHED). What is gathered lies in a second ring, where others fetch it (READY, FETCHED).

    `largest_share`: elements of the largest share; `everywhere`: whether averages are for all; `add`: who computes them, as
    kernels/average.py does; `at_home`: the parameters whose rows are to be `spread`, which move to memory that the other ranks
    reach; `gathers`: whether there is anything to `gather`, no more than a largest share at a time.
    """

    ARRIVED, AVERAGED, FINISHED, READY, FETCHED, SPREAD = range(6)

    def __init__(
        self,
        ranks: Ranks,
        largest_share: int,
        everywhere: bool,
        add: Callable[..., None],
        at_home: Sequence[Tensor] = (),
        gathers: bool = False,
    ) -> None:
        self.me, self.n, self.add = ranks.rank, ranks.world_size, add
        self.others = [(self.me + k) % self.n for k in range(1, self.n)]  # not all to the same one first
        own = RING_PIECES * aligned(min(PIECE, 4 * largest_share))
        # The averages of a piece take twice its bytes where it is in a dtype half as wide.
        self.averages, self.gathers = Ring((self.n - 1 + 2 * everywhere) * own), Ring(own if gathers else 0)
        sizes = [self.averages.size, self.gathers.size, *(p.nbytes for p in at_home)]
        *starts, total = itertools.accumulate(map(aligned, sizes), initial=0)
        self.peers = PeerMemory(ranks, total)
        spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        parts = [[memory[span] for span in spans] for memory in self.peers.memory]
        self.arriving = [part[0] for part in parts]  # by rank, as all of these
        self.offered = [part[1] for part in parts]
        self.homes: dict[int, list[Tensor]] = {}  # by address: a parameter in everybody's memory
        for number, p in enumerate(at_home, 2):
            homes = [part[number].view(p.dtype).view(p.shape) for part in parts]
            homes[self.me].copy_(p.detach())
            p.data = homes[self.me]
            self.homes[p.data_ptr()] = homes
        self.n_spread = 0
        self.sending: list[Tensor] = []  # whose memory nobody else may have before it has been read
        on_gpu = ranks.device.type == "cuda"
        self.outgoing, self.incoming = (torch.cuda.Stream() if on_gpu else None for _ in range(2))
        if on_gpu:
            torch.cuda.synchronize(ranks.device)
        ranks.all_of(None)  # nobody spreads rows into a parameter that is still moving

    def average(self, gradient: Tensor, everywhere: bool) -> Tensor:
        """As Collectives does: each share by its rank, `everywhere` sent on to all. A float32 gradient becomes its mean."""
        first, end = own_rows(len(gradient), self.me, self.n)
        if gradient.dtype == torch.float32:
            mean = gradient if everywhere else gradient[first:end]
        else:
            mean = torch.empty_like(gradient if everywhere else gradient[first:end], dtype=torch.float32)
        means = self._shares(mean) if everywhere else []
        self._average(self._shares(gradient), means[self.me] if means else mean.view(-1), 1 / self.n, means)
        self.sending.append(gradient)
        return mean

    def _shares(self, tensor: Tensor) -> list[Tensor]:
        """By rank, flat; a late one may be shorter, or empty."""
        flat, share = tensor.view(-1), share_of([tensor], self.n)
        return [flat[rank * share : (rank + 1) * share] for rank in range(self.n)]

    def reduce_scatter(self, output: Tensor, whole: Tensor, op: dist.ReduceOp) -> None:
        """output (E,): the sum or average over the ranks of this rank's part of `whole` (ranks E,); the current stream waits."""
        self._average(list(whole.view(self.n, -1)), output, 1 / self.n if op == dist.ReduceOp.AVG else 1.0, [])
        self.finish_averages()

    def _average(self, shares: list[Tensor], output: Tensor, factor: float, means: list[Tensor]) -> None:
        """`factor` times the own share's sum into `output`; the others' into `means`, which there are none of or one a share."""
        _follow(self.outgoing)
        length = PIECE // shares[0].itemsize
        for first in range(0, len(shares[0]), length):
            piece = slice(first, first + length)
            self._average_piece([s[piece] for s in shares], output[piece], factor, [m[piece] for m in means])

    def _average_piece(self, pieces: list[Tensor], output: Tensor, factor: float, means: list[Tensor]) -> None:
        """Of each rank's share one piece, no longer than rank 0's."""
        dtype, width = pieces[0].dtype, pieces[0].itemsize
        size = aligned(width * len(pieces[0]))  # of a place's parts: what each of the others sends, and the average
        sent = len(self.others) * size
        number, start, before = self.averages.place(sent + bool(means) * aligned(MEAN_BYTES * len(pieces[0])))

        def slot(owner: int) -> Tensor:  # of this rank: the first is of the rank behind the owner
            first = start + (self.me - owner - 1) % self.n * size
            return self.arriving[owner][first:][: width * len(pieces[owner])].view(dtype)

        def average(owner: int) -> Tensor:
            return self.arriving[owner][start + sent :][: MEAN_BYTES * len(pieces[owner])].view(torch.float32)

        with torch.cuda.stream(self.outgoing):
            self.peers.wait(self.FINISHED, before)
            for owner in self.others:
                slot(owner).copy_(pieces[owner])
            self.peers.signal(self.ARRIVED, number)
        with torch.cuda.stream(self.incoming):
            _follow(self.incoming, self.outgoing)
            self.peers.wait(self.ARRIVED, number)
            others = self.arriving[self.me][start : start + sent].view(dtype).view(len(self.others), size // width)
            self.add(output, pieces[self.me], others[:, : len(output)], factor, average(self.me) if means else None)
            if means:
                self.peers.signal(self.AVERAGED, number)
                self.peers.wait(self.AVERAGED, number)
                for owner in self.others:
                    means[owner].copy_(average(owner))
            self.peers.signal(self.FINISHED, number)

    def finish_averages(self) -> None:
        if self.incoming is not None:
            torch.cuda.current_stream().wait_stream(self.incoming)
        self.sending.clear()

    def gather(self, output: Tensor, own: Tensor) -> None:
        """output (ranks E,): everybody's `own` (E,), which may lie in it; in the current stream."""
        parts, given = list(output.view(self.n, -1).view(torch.uint8)), own.view(torch.uint8)
        if parts[self.me].data_ptr() != given.data_ptr():
            parts[self.me].copy_(given)
        for first in range(0, len(given), PIECE):
            size = len(given[first : first + PIECE])
            number, start, before = self.gathers.place(size)
            self.peers.wait(self.FETCHED, before)
            self.offered[self.me][start : start + size].copy_(given[first : first + size])
            self.peers.signal(self.READY, number)
            self.peers.wait(self.READY, number)
            for rank in self.others:
                parts[rank][first : first + size].copy_(self.offered[rank][start : start + size])
            self.peers.signal(self.FETCHED, number)

    def spread(self, parameter: Tensor) -> Wait:
        """As Collectives does. Nobody reads what it overwrites: the gradient's norm has come from all, behind their backward."""
        homes = self.homes[parameter.data_ptr()]
        first, end = own_rows(len(parameter), self.me, self.n)
        self.n_spread += 1
        number = self.n_spread
        _follow(self.outgoing)
        with torch.cuda.stream(self.outgoing):
            for rank in self.others:
                homes[rank][first:end].copy_(parameter[first:end])
            self.peers.signal(self.SPREAD, number)
        return lambda: self.peers.wait(self.SPREAD, number)


def _follow(stream: Any, other: Any = None) -> None:
    """What `stream` does next waits for what the other, by itself the current one, has been given; on a CPU there is none."""
    if stream is not None:
        stream.wait_stream(other or torch.cuda.current_stream())


class PeerMemory:
    """Memory of every rank that all ranks of the host reach, (n_bytes,) uint8 each, and signals between their streams.

    A signal is a number that only grows. A stream waits in the GPU's front end and not in a kernel, which would take a
    multiprocessor. A collective. Raises RuntimeError, on all ranks, where one has no such thing.
    """

    CHANNELS, FLAG_BYTES = 6, 4096
    # CUstreamBatchMemOpParams of cuda.h: a union of 48 bytes, of which waiting and writing use these.
    OPERATION = np.dtype(
        {"names": ["kind", "address", "value"], "formats": ["<u4", "<u8", "<u4"], "offsets": [0, 8, 16], "itemsize": 48}
    )
    WAIT, WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32 (flags 0: until it is as large), ..._WRITE_VALUE_32

    def __init__(self, ranks: Ranks, n_bytes: int) -> None:
        self.device, self.uncounted_bytes = ranks.device, 0
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # another thing that could fail, and is not used
        own = together(ranks, lambda: self._allocate(self.FLAG_BYTES + n_bytes))
        whole = together(ranks, lambda: self._everybodys(ranks, own))  # when all have theirs, all flags are zero
        self.memory = [each[self.FLAG_BYTES :] for each in whole]
        self.flags = own[: 4 * self.CHANNELS * len(whole)].view(torch.int32).view(self.CHANNELS, -1)  # (channels, ranks)

        def flag(owner: int, channel: int, sender: int) -> int:
            return whole[owner].data_ptr() + 4 * (channel * len(whole) + sender)

        self._signals, self._waits = [], []
        for channel in range(self.CHANNELS):
            self._signals.append(self._operations(self.WRITE, [flag(owner, channel, ranks.rank) for owner in range(len(whole))]))
            self._waits.append(self._operations(self.WAIT, [flag(ranks.rank, channel, sender) for sender in range(len(whole))]))

    def _allocate(self, n_bytes: int) -> Tensor:
        import torch.distributed._symmetric_memory as symmetric_memory

        self._driver = ctypes.CDLL("libcuda.so.1").cuStreamBatchMemOp_v2
        self._driver.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]
        before = torch.cuda.memory_allocated(self.device)
        try:
            own = symmetric_memory.empty(n_bytes, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            raise torch.OutOfMemoryError(str(error)) if "out of memory" in str(error) else error from None
        # torch 2.11 does not count it, later versions do.
        self.uncounted_bytes = max(0, n_bytes - (torch.cuda.memory_allocated(self.device) - before))
        own[: self.FLAG_BYTES].zero_()
        torch.cuda.synchronize(self.device)
        return own

    def _everybodys(self, ranks: Ranks, own: Tensor) -> list[Tensor]:
        import torch.distributed._symmetric_memory as symmetric_memory

        self._handle = symmetric_memory.rendezvous(own, dist.group.WORLD)
        return [self._handle.get_buffer(rank, own.shape, own.dtype) for rank in range(ranks.world_size)]

    def _operations(self, kind: int, addresses: list[int]) -> np.ndarray:
        made = np.zeros(len(addresses), self.OPERATION)
        made["kind"], made["address"] = kind, addresses
        return made

    def signal(self, channel: int, value: int) -> None:
        """Every rank, this one too, sees `value` when what the current stream has been given is done."""
        self._queue(self._signals[channel], value)

    def wait(self, channel: int, value: int) -> None:
        """The current stream waits until every rank, this one too, has signalled so much."""
        self._queue(self._waits[channel], value)

    def _queue(self, operations: np.ndarray, value: int) -> None:
        operations["value"] = value
        stream = torch.cuda.current_stream().cuda_stream
        if code := self._driver(stream, len(operations), operations.ctypes.data, 0):
            raise RuntimeError(f"cuStreamBatchMemOp failed with CUDA error {code}")


def together(ranks: Ranks, do: Callable[[], T]) -> T:
    """What `do` returns, once it has on all ranks. Where one fails all raise: its own error, the others a RuntimeError of it."""
    result, error = None, None
    try:
        result = do()
    except UNSUPPORTED as caught:
        error = caught
    reasons = ranks.all_of(error and first_line(error))
    if error is not None:
        raise error
    if reason := next(filter(None, reasons), None):
        raise RuntimeError(reason)
    return cast(T, result)


def choose_exchange(asked: Literal["auto", "copies", "collectives"], ranks: Ranks, in_groups: bool) -> tuple[str, str]:
    """(copies or collectives, why): by itself copies where they work, which is not in groups of the ranks.

    A collective. Raises UserError where what is asked for does not work.
    """
    if asked == "collectives":
        return asked, "as asked for"
    reason = "--hsdp_shard_size makes groups of ranks" if in_groups else None
    reason = reason or next(filter(None, ranks.all_of(why_not_copies(ranks))), None) or try_copies(ranks)
    if reason and asked == "copies":
        raise UserError(f"--exchange=copies: {reason}; pass --exchange=auto")
    return ("collectives", reason) if reason else ("copies", "")


def why_not_copies(ranks: Ranks) -> str | None:
    """What this rank sees that keeps ranks from copying into each other's memory."""
    if ranks.device.type != "cuda":
        return "a CPU has no copy engines"
    if os.environ.get("LOCAL_WORLD_SIZE") != str(ranks.world_size):
        return "copy engines do not reach the GPUs of other hosts"
    others = (index for index in range(ranks.world_size) if index != ranks.device.index)
    if not all(torch.cuda.can_device_access_peer(ranks.device, other) for other in others):
        return "these GPUs do not reach each other's memory"
    return None


def try_copies(ranks: Ranks) -> str | None:
    """Sends a byte and a signal from each rank to each; what went wrong. A collective; no stream waits for what may not come."""

    def send() -> None:
        for memory in peers.memory:
            memory[ranks.rank] = 1 + ranks.rank
        peers.signal(0, 1)
        torch.cuda.synchronize(peers.device)

    def look() -> None:
        sent = list(range(1, ranks.world_size + 1))
        if peers.memory[ranks.rank].tolist() != sent or peers.flags[0].tolist() != [1] * len(sent):
            raise RuntimeError("what one GPU copies into another's memory does not arrive there")
        peers.wait(0, 1)
        torch.cuda.synchronize(peers.device)

    try:
        peers = PeerMemory(ranks, ranks.world_size)
        together(ranks, send)
        together(ranks, look)
    except UNSUPPORTED as error:
        return first_line(error)
    return None
