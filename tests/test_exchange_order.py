"""That no two accesses of the exchange by copies to the same memory are left to chance, by its own code on traced streams.

Every rank's `Copies` runs with streams that compute nothing: an operation notes what it reads and writes and comes after its
stream's last one, after what its stream has waited for, and after the signals that it waits for. Two operations on the same bytes
of which one writes, and neither comes after the other, are a race: on GPUs the slower one would decide.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

import exchange
from exchange import Copies, Ring, own_rows

SHAPES = [(27, 48), (48, 5), (3, 7), (1, 1), (200, 33), (64, 8), (64, 8)]
PIECE = 200  # bytes
STEPS = 3
FLOAT32, BFLOAT16, UINT8 = (SimpleNamespace(itemsize=size) for size in (4, 2, 1))


class Trace:
    def __init__(self) -> None:
        self.before: list[list[int]] = []  # by operation, those that it directly follows
        self.accesses: dict[Any, list[tuple[int, int, bool, int]]] = defaultdict(list)  # memory -> start, end, writes, operation
        self.signals: dict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(
            list
        )  # channel, to, from -> value, operation
        self.waits: list[tuple[int, tuple[int, int, int], int]] = []
        self.current: Stream

    def operation(self, reads: tuple[Memory, ...] = (), writes: tuple[Memory, ...] = ()) -> int:
        number, stream = len(self.before), self.current
        self.before.append([] if stream.last is None else [stream.last])
        stream.last = number
        for each, writing in [*((m, False) for m in reads), *((m, True) for m in writes)]:
            if each.end > each.start:
                self.accesses[each.name].append((each.start, each.end, writing, number))
        return number

    @contextmanager
    def stream(self, stream: Stream) -> Any:
        old, self.current = self.current, stream
        yield
        self.current = old

    def races(self) -> list[Any]:
        """The memories of unordered accesses; an assertion fails where a wait has no signal, or operations wait in a circle."""
        for operation, key, value in self.waits:
            self.before[operation].append(next(sender for sent, sender in self.signals[key] if sent >= value))
        reached = self._all_before()
        return [
            name
            for name, accesses in self.accesses.items()
            for (start, end, writes, a), (first, last, wrote, b) in itertools.combinations(accesses, 2)
            if (writes or wrote) and start < last and first < end and a != b
            if not (reached[a] >> b & 1 or reached[b] >> a & 1)
        ]

    def _all_before(self) -> list[int]:
        """By operation a bit for each that comes before it, in order of time (Kahn 1962)."""
        after, missing = [[] for _ in self.before], [len(before) for before in self.before]
        for operation, before in enumerate(self.before):
            for each in before:
                after[each].append(operation)
        order = [operation for operation, count in enumerate(missing) if count == 0]
        reached = [0] * len(self.before)
        for operation in order:  # grows meanwhile
            for each in self.before[operation]:
                reached[operation] |= reached[each] | 1 << each
            for each in after[operation]:
                missing[each] -= 1
                if missing[each] == 0:
                    order.append(each)
        assert len(order) == len(self.before), "operations wait for each other in a circle"
        return reached


class Stream:
    def __init__(self, trace: Trace) -> None:
        self.trace, self.last = trace, None

    def wait_stream(self, other: Stream) -> None:
        with self.trace.stream(self):
            number = self.trace.operation()
        if other.last is not None:
            self.trace.before[number].append(other.last)


class Memory:
    """The bytes from start to end as a tensor, of rows of `width` elements or (0) of elements, which has no values."""

    def __init__(self, trace: Trace, name: Any, start: int, end: int, width: int = 0, dtype: Any = FLOAT32) -> None:
        self.trace, self.name, self.start, self.end, self.width, self.dtype = trace, name, start, end, width, dtype
        self.itemsize = dtype.itemsize
        self.row_bytes = max(width, 1) * dtype.itemsize

    def __len__(self) -> int:
        return (self.end - self.start) // self.row_bytes

    def part(self, first: int, end: int, width: int) -> Memory:
        start = self.start + first * self.row_bytes
        return Memory(self.trace, self.name, start, start + max(0, end - first) * self.row_bytes, width, self.dtype)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):  # [:, :n] of rows, which `reduce` gets
            return [row[key[1]] for row in self]
        if isinstance(key, int):
            return self.part(key, key + 1, 0)
        first, end, _ = key.indices(len(self))
        return self.part(first, end, self.width)

    def __iter__(self) -> Any:
        return (self[row] for row in range(len(self)))

    def view(self, *shape: Any) -> Memory:
        if not isinstance(shape[0], int):  # another dtype
            width = self.row_bytes // shape[0].itemsize if self.width else 0
            return Memory(self.trace, self.name, self.start, self.end, width, shape[0])
        width = 0 if shape == (-1,) else self.numel() // shape[0]
        return Memory(self.trace, self.name, self.start, self.end, width, self.dtype)

    def numel(self) -> int:
        return (self.end - self.start) // self.itemsize

    def data_ptr(self) -> Any:
        return self.name, self.start

    def copy_(self, other: Memory) -> None:
        assert self.numel() == other.numel()
        self.trace.operation((other,), (self,))


class TracedPeers:
    def __init__(self, trace: Trace, rank: int, n: int) -> None:
        self.trace, self.rank, self.ranks = trace, rank, range(n)

    def signal(self, channel: int, value: int) -> None:
        number = self.trace.operation()
        for to in self.ranks:
            self.trace.signals[channel, to, self.rank].append((value, number))

    def wait(self, channel: int, value: int) -> None:
        number = self.trace.operation()
        self.trace.waits += [(number, (channel, self.rank, sender), value) for sender in self.ranks if value]


def traced_copies(trace: Trace, rank: int, n: int) -> Copies:
    def add(output: Memory, own: Memory, arrived: list[Memory], factor: float, also: Memory | None) -> None:
        assert {len(part) for part in (own, *arrived)} == {len(output)} and output.dtype is FLOAT32 and len(arrived) == n - 1
        trace.operation((own, *arrived), (output,) if also is None else (output, also))

    copies = Copies.__new__(Copies)
    copies.me, copies.n, copies.add, copies.others = rank, n, add, [(rank + k) % n for k in range(1, n)]
    own = exchange.RING_PIECES * exchange.aligned(PIECE)
    copies.averages, copies.gathers, copies.peers = Ring((n + 1) * own), Ring(own), TracedPeers(trace, rank, n)
    copies.arriving = [Memory(trace, ("arriving", each), 0, (n + 1) * own, 0, UINT8) for each in range(n)]
    copies.offered = [Memory(trace, ("offered", each), 0, own, 0, UINT8) for each in range(n)]
    copies.outgoing, copies.incoming, copies.n_spread, copies.homes, copies.sending = Stream(trace), Stream(trace), 0, {}, Held()
    for number, (rows, width) in enumerate(SHAPES):
        homes = [Memory(trace, ("home", number, each), 0, 4 * rows * width, width) for each in range(n)]
        copies.homes[homes[rank].data_ptr()] = homes
    return copies


class Held(list):
    """Gradients that are kept until they have been sent."""


class TracedRank:
    """What a rank does in a step, as sharding.py has it done; `main` is the stream that computes."""

    def __init__(self, trace: Trace, rank: int, n: int, dtype: Any) -> None:
        self.trace, self.rank, self.n, self.copies = trace, rank, n, traced_copies(trace, rank, n)
        self.main, self.gathering, self.reducing = Stream(trace), Stream(trace), Stream(trace)
        self.weights = [homes[rank] for homes in self.copies.homes.values()]
        self.gradients = [
            Memory(trace, ("gradient", number, rank), 0, rows * width * dtype.itemsize, width, dtype)
            for number, (rows, width) in enumerate(SHAPES)
        ]
        self.means: list[Memory] = []

    def backward(self, everywhere: bool) -> None:
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            self.trace.operation((weight,), (gradient,))
            self.means.append(self.copies.average(gradient, everywhere))
            if not any(held is gradient for held in self.copies.sending):
                self.trace.operation((), (gradient,))  # its memory is another's now
        self.copies.finish_averages()

    def own(self, tensor: Memory) -> Memory:
        first, end = own_rows(len(tensor), self.rank, self.n)
        return tensor[first:end]

    def update(self, everywhere: bool) -> None:
        part = (lambda tensor: tensor) if everywhere else self.own
        self.trace.operation(tuple(self.means), tuple(map(part, self.weights)))
        self.trace.operation((), (*self.gradients, *self.means))  # their memory is another's now
        self.means.clear()

    def spread(self) -> None:
        for wait in [self.copies.spread(weight) for weight in self.weights]:
            wait()
        self.trace.operation(tuple(self.weights))  # the forward pass

    def fsdp_step(self) -> None:
        for number, (rows, width) in enumerate(SHAPES):
            share = own_rows(rows, 0, self.n)[1] * width
            whole = Memory(self.trace, ("whole", number, self.rank), 0, 4 * self.n * share)
            with self.trace.stream(self.gathering):
                self.trace.operation((), (whole[self.rank * share : (self.rank + 1) * share],))
                self.copies.gather(whole, whole[self.rank * share : (self.rank + 1) * share])
            self.main.wait_stream(self.gathering)
            self.trace.operation((whole,))
            self.gathering.wait_stream(self.main)
            reduced = Memory(self.trace, ("reduced", number % 2, self.rank), 0, 4 * self.n * share)
            self.main.wait_stream(self.reducing)
            self.trace.operation((), (reduced,))
            self.reducing.wait_stream(self.main)
            with self.trace.stream(self.reducing):
                self.copies.reduce_scatter(Memory(self.trace, ("shard", number, self.rank), 0, 4 * share), reduced, None)


def all_reduce(trace: Trace, ranks: list[TracedRank]) -> None:
    """The gradient's norm, which comes from all: nobody goes on before all have come so far."""
    arrived = []
    for rank in ranks:
        trace.current = rank.main
        arrived.append(trace.operation())
    for rank in ranks:
        trace.current = rank.main
        trace.before[trace.operation()] += arrived


def races(strategy: str, n: int, monkeypatch: pytest.MonkeyPatch, dtype: Any = FLOAT32) -> list[Any]:
    """`dtype`: of the gradients; their averages are float32."""
    trace, numbers = Trace(), itertools.count()

    def empty_like(other: Memory, dtype: Any) -> Memory:
        return Memory(trace, ("mean", next(numbers)), 0, other.numel() * dtype.itemsize, other.width, dtype)

    cuda = SimpleNamespace(stream=trace.stream, current_stream=lambda: trace.current)
    traced = SimpleNamespace(cuda=cuda, uint8=UINT8, float32=FLOAT32, empty_like=empty_like)
    monkeypatch.setattr(exchange, "torch", traced)
    monkeypatch.setattr(exchange, "PIECE", PIECE)
    monkeypatch.setattr(exchange, "ALIGNMENT", 4)  # so that places lie across each other
    ranks = [TracedRank(trace, rank, n, dtype) for rank in range(n)]

    def on_all(do: Callable[[TracedRank], None]) -> None:
        for rank in ranks:
            trace.current = rank.main
            do(rank)

    for _ in range(STEPS):
        if strategy == "fsdp":
            on_all(TracedRank.fsdp_step)
        else:
            everywhere = strategy == "ddp"
            on_all(partial(TracedRank.backward, everywhere=everywhere))
            all_reduce(trace, ranks)
            on_all(partial(TracedRank.update, everywhere=everywhere))
            if not everywhere:
                on_all(TracedRank.spread)
    return trace.races()


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize(
    ("strategy", "dtype"), [("ddp", FLOAT32), ("zero1", FLOAT32), ("ddp", BFLOAT16), ("zero1", BFLOAT16), ("fsdp", FLOAT32)]
)
def test_nothing_is_left_to_chance(strategy: str, dtype: Any, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert races(strategy, n, monkeypatch, dtype) == []


def without_own_signal(self: TracedPeers, channel: int, value: int) -> None:
    number = self.trace.operation()
    senders = [each for each in self.ranks if value and each != self.rank]
    self.trace.waits += [(number, (channel, self.rank, sender), value) for sender in senders]


BREAKAGES = [
    ("ddp", TracedPeers, "wait", without_own_signal),  # a rank's sending overtakes its own fetching
    ("zero1", exchange, "_follow", lambda stream, other=None: None),
    ("ddp", Copies, "finish_averages", lambda self: None),
    ("zero1", Held, "append", lambda self, gradient: None),  # a gradient's memory is given away too early
]


@pytest.mark.parametrize(("strategy", "owner", "name", "broken"), BREAKAGES)
def test_what_is_left_out_is_seen(strategy: str, owner: Any, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, broken)
    assert races(strategy, 3, monkeypatch)
