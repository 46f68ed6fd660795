"""Every kernel against eager PyTorch, torch.compile and liger-kernel: `python benchmarks/kernels.py [--only=NAME] [--json=FILE]`.

Needs a GPU. Before it is timed each implementation is compared with float64: the largest error of an output or a gradient, as a
norm relative to the true one's. Times are medians of CUDA graph replays on random bfloat16 data, over sets of inputs that do not
fit into the L2 cache together. Bytes are the fewest that the operation can move, every tensor read or written once, and `of copy`
is the share of the bandwidth that a copy of as many bytes reaches in the same run. What works in place gets its input afresh
before each call; the time of that copy is subtracted. liger's losses wait for the host, which no graph can: each call is timed as
it runs.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from command_line import output_file, parser_of

if TYPE_CHECKING:
    from torch import Tensor

N_TOKENS = 16_384  # 8 x 2,048
EPS = 1e-5
CACHE_BYTES = 400e6  # several times the L2 cache of any GPU
REPLAYS = 15
MAX_ERROR = 1e-2  # of bfloat16: several roundings of 2^-9


@dataclass(frozen=True)
class Case:
    """One operation at one size. Functions take what `inputs` returns; its floating-point tensors get gradients, if at all."""

    name: str
    size: str
    inputs: Callable[[], list[Tensor]]  # draws new ones
    exact: Callable[..., object]  # in float64
    functions: dict[str, Callable[..., object]]  # by implementation; torch.compile's is eager's
    gigabytes: dict[str, float]  # by phase: forward, backward, or both together; 0 where the operation is no matter of bytes
    in_place: tuple[str, ...] = ()  # implementations that overwrite their first input
    waiting: tuple[str, ...] = ()  # implementations that wait for the host
    differentiable: bool = True

    def leaves(self, inputs: list[Tensor]) -> list[Tensor]:
        return [x.requires_grad_() for x in inputs if x.is_floating_point()] if self.differentiable else []


def norm_cases() -> Iterator[Case]:
    import torch.nn.functional as F

    from kernels import reference
    from kernels.layer_norm import add_layer_norm, layer_norm
    from kernels.rms_norm import add_rms_norm, rms_norm

    def pair(norm: Callable[..., object]) -> Callable[..., object]:
        return lambda x, r, w: ((s := x + r), norm(s, w))

    kinds = {
        "rms_norm": (
            lambda x, w: F.rms_norm(x, w.shape, w, EPS),
            lambda x, w: reference.rms_norm(x, w, EPS),
            lambda x, w: rms_norm(x, w, EPS),
            lambda x, r, w: add_rms_norm(x, r, w, EPS),
        ),
        "layer_norm": (
            lambda x, w: F.layer_norm(x, w.shape, w, None, EPS),
            lambda x, w: reference.layer_norm(x, w, None, EPS),
            lambda x, w: layer_norm(x, w, None, EPS),
            lambda x, r, w: add_layer_norm(x, r, w, None, EPS),
        ),
    }
    for name, (exact, eager, ours, fused) in kinds.items():
        for width in (2304, 768, 4096):
            gb = N_TOKENS * width * 2 / 1e9
            size = f"{N_TOKENS:,} x {width:,}"
            functions = {"eager": eager, "ours": ours} | liger(name)
            inputs = lambda width=width: [normal(N_TOKENS, width), weight(width)]  # noqa: E731
            yield Case(name, size, inputs, exact, functions, {"forward": 2 * gb, "backward": 3 * gb})
            functions = {"eager": pair(eager), "ours, unfused": pair(ours), "ours": fused} | liger(f"add_{name}")
            inputs = lambda width=width: [normal(N_TOKENS, width), normal(N_TOKENS, width), weight(width)]  # noqa: E731
            phases = {"forward": 4 * gb, "backward": 4 * gb, "both": 8 * gb}
            yield Case(f"add_{name}", size, inputs, pair(exact), functions, phases)


def loss_cases() -> Iterator[Case]:
    import torch
    import torch.nn.functional as F

    from kernels import reference
    from kernels.cross_entropy import cross_entropy, linear_cross_entropy

    def targets(V: int) -> Tensor:
        return torch.randint(V, (N_TOKENS,), device="cuda")

    for V in (32_000, 50_304):
        functions = {"eager": reference.cross_entropy, "ours": cross_entropy} | liger("cross_entropy")
        gb = 2 * N_TOKENS * V * 2 / 1e9
        inputs = lambda V=V: [2 * normal(N_TOKENS, V), targets(V)]  # noqa: E731
        size, places = f"{N_TOKENS:,} x {V:,}", ("ours", "liger")
        yield Case("cross_entropy", size, inputs, F.cross_entropy, functions, {"both": gb}, places, ("liger",))
    functions = {
        "eager": lambda x, w, t: reference.cross_entropy(x @ w.t(), t),
        "ours": linear_cross_entropy,
        "ours, one chunk": lambda x, w, t: linear_cross_entropy(x, w, t, chunk_rows=len(x)),
    } | liger("linear_cross_entropy")
    C, V = 2304, 32_000
    inputs = lambda: [normal(N_TOKENS, C), normal(V, C) / 25, targets(V)]  # noqa: E731
    exact = lambda x, w, t: F.cross_entropy(x @ w.t(), t)  # noqa: E731
    size = f"{N_TOKENS:,} x {C:,} x {V:,}"
    yield Case("linear_cross_entropy", size, inputs, exact, functions, {"both": 0}, waiting=("liger",))


def block_cases() -> Iterator[Case]:
    import torch
    import torch.nn.functional as F

    from kernels import reference
    from kernels.gelu import gelu
    from kernels.rope import rope_qkv_
    from kernels.swiglu import swiglu

    width = 6144
    gb = N_TOKENS * width * 2 / 1e9
    functions = {"eager": reference.swiglu, "ours": swiglu} | liger("swiglu")
    exact = lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]  # noqa: E731
    phases = {"forward": 3 * gb, "backward": 5 * gb}
    yield Case("swiglu", f"{N_TOKENS:,} x {width:,}", lambda: [normal(N_TOKENS, 2 * width)], exact, functions, phases)

    width = 4 * 2432  # full_gpt2_1.36b.py's
    gb = N_TOKENS * width * 2 / 1e9
    functions, phases = {"eager": reference.gelu, "ours": gelu}, {"forward": 2 * gb, "backward": 3 * gb}
    yield Case("gelu", f"{N_TOKENS:,} x {width:,}", lambda: [normal(N_TOKENS, width)], F.gelu, functions, phases)

    B, T, H, D = 8, N_TOKENS // 8, 18, 128
    angle = torch.outer(torch.arange(T, device="cuda"), 1e-4 ** (torch.arange(D // 2, device="cuda") * 2 / D))
    cos, sin = angle.cos(), angle.sin()

    def split(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.split((H, H, H), dim=2)
        return *reference.rope(q, k, cos, sin), v

    def split_float64(qkv: Tensor) -> tuple[Tensor, ...]:
        turned = (
            torch.complex(*qkv[:, :, : 2 * H].chunk(2, -1))
            * torch.polar(torch.ones_like(angle), angle).to(torch.complex128)[:, None]
        )
        return *torch.cat((turned.real, turned.imag), -1).split((H, H), dim=2), qkv[:, :, 2 * H :]

    gb = N_TOKENS * 3 * H * D * 2 / 1e9
    functions = {"eager": split, "ours": lambda qkv: rope_qkv_(qkv, H, H, cos, sin)}
    phases = {"forward": 2 * gb * 2 / 3, "backward": 2 * gb}  # forwards the values stay where they are
    inputs = lambda: [normal(B, T, 3 * H, D)]  # noqa: E731
    yield Case("rope", f"{B} x {T:,} x 3 x {H} x {D}", inputs, split_float64, functions, phases)


def gradient_cases() -> Iterator[Case]:
    import torch

    from kernels.accumulate import accumulate_
    from kernels.average import average_

    rows, columns = 12_288, 2304  # full_llama_1.36b.py's gate and up projection
    functions = {"eager": lambda total, g: total.add_(g), "ours": lambda total, g: accumulate_(total, g, False) or total}
    inputs = lambda: [torch.randn(rows, columns, device="cuda"), normal(rows, columns)]  # noqa: E731
    yield Case(
        "accumulate", f"{rows:,} x {columns:,}", inputs, torch.add, functions, {"forward": rows * columns * 10 / 1e9},
        in_place=("eager", "torch.compile", "ours"), differentiable=False,
    )  # fmt: skip
    size, ranks = 2**23, 2  # elements of a piece that exchange.py sends of a bfloat16 gradient

    def ours(parts: Tensor) -> tuple[Tensor, Tensor]:
        output, also = (torch.empty(size, device="cuda") for _ in range(2))
        average_(output, parts[0], parts[1:], 1 / ranks, also)
        return output, also

    def mean(parts: Tensor) -> tuple[Tensor, Tensor]:
        output = torch.mean(parts, 0, dtype=parts.dtype if parts.dtype == torch.float64 else torch.float32)
        return output, output.clone()

    functions, phases = {"eager": mean, "ours": ours}, {"forward": size * (2 * ranks + 8) / 1e9}
    yield Case("average", f"{ranks} x {size:,}", lambda: [normal(ranks, size)], mean, functions, phases, differentiable=False)


def liger(name: str) -> dict[str, Callable[..., object]]:
    """liger-kernel's function for the operation, where it is installed and has one."""
    if not importlib.util.find_spec("liger_kernel"):
        return {}
    import torch
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    def first(result: object) -> object:
        return result[0] if isinstance(result, tuple) else result

    functions = {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, EPS),
        "add_rms_norm": lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS)[::-1],
        "layer_norm": lambda x, w: LigerLayerNormFunction.apply(x, w, torch.zeros_like(w), EPS),
        "cross_entropy": lambda x, t: first(LigerCrossEntropyFunction.apply(x, t, None)),
        "linear_cross_entropy": lambda x, w, t: first(LigerFusedLinearCrossEntropyFunction.apply(x, w, t)),
        "swiglu": lambda x: LigerFusedGateUpSiLUMulFunction.apply(x),
    }
    return {"liger": functions[name]} if name in functions else {}


def normal(*shape: int) -> Tensor:
    import torch

    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def weight(width: int) -> Tensor:
    import torch

    return 1 + 0.1 * torch.randn(width, device="cuda")  # float32, as parameters are


def as_tuple(result: object) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def error(case: Case, function: Callable[..., object]) -> float:
    """The largest relative error of an output or a gradient."""
    import torch

    inputs = case.inputs()
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    wanted = case.leaves(exact)
    truth = [*as_tuple(case.exact(*exact))]
    upstream = [normal(*y.shape) if y.ndim else torch.ones((), device="cuda") for y in truth]
    if wanted:
        truth += torch.autograd.grad(truth, wanted, [dy.double() for dy in upstream])
    leaves = case.leaves(inputs)
    outputs = as_tuple(function(*inputs))
    got = [y.detach().clone() for y in outputs]
    if leaves:
        got += torch.autograd.grad(outputs, leaves, [dy.clone() for dy in upstream])
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, truth, strict=True))


def median_us(calls: list[Callable[[], object]], in_graph: bool = True) -> float:
    """Microseconds of one call, all of them in a row."""
    import torch

    def all_calls() -> list[object]:
        return [call() for call in calls]  # held together, so that no result is written to memory that the cache still has

    all_calls()  # compiles, and chooses algorithms
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if in_graph:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            all_calls()
    replay = graph.replay if in_graph else all_calls
    replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for begin, end in events:
        begin.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(begin.elapsed_time(end) for begin, end in events) / len(calls)


def copy_us(gigabytes: float) -> float:
    """Of a copy that reads and writes as many bytes together: by the copy engine or by a kernel, whichever is faster."""
    import torch

    pairs = []
    while not pairs or sum(2 * x.nbytes for x, _ in pairs) < CACHE_BYTES:
        pairs.append((normal(int(gigabytes * 1e9 / 4)), normal(int(gigabytes * 1e9 / 4))))
    return min(
        median_us([lambda x=x, y=y: y.copy_(x) for x, y in pairs]),
        median_us([lambda x=x, y=y: torch.neg(x, out=y) for x, y in pairs]),
    )


def phase_us(case: Case, phase: str, name: str, function: Callable[..., object]) -> float:
    import torch

    sets: list[list[Tensor]] = []
    while len(sets) < 2 or sum(x.nbytes for inputs in sets for x in inputs) < CACHE_BYTES:
        sets.append(case.inputs())
    leaves = [case.leaves(inputs) for inputs in sets]
    fresh = [inputs[0].detach().clone() for inputs in sets] if name in case.in_place else []

    def restore(i: int) -> None:
        sets[i][0].detach().copy_(fresh[i])

    def forward(i: int) -> tuple[Tensor, ...]:
        if fresh:
            restore(i)
        return as_tuple(function(*sets[i]))

    def backward(i: int, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves[i], seeds[i], retain_graph=phase == "backward")

    def each(call: Callable[[int], object]) -> float:
        return median_us([lambda i=i: call(i) for i in range(len(sets))], in_graph=name not in case.waiting)

    kept = [forward(i) for i in range(len(sets))]
    seeds = [[torch.randn_like(y) if y.ndim else torch.ones_like(y) for y in outputs] for outputs in kept]
    if phase == "backward":
        return each(lambda i: backward(i, kept[i]))
    kept.clear()
    us = each(forward if phase == "forward" else lambda i: backward(i, forward(i)))
    return us - each(restore) if fresh else us


def measure(case: Case) -> Iterator[dict[str, object]]:
    """A row for each phase and implementation."""
    import torch

    torch._dynamo.reset()
    functions = case.functions | {"torch.compile": torch.compile(case.functions["eager"], fullgraph=True, dynamic=False)}
    errors = {}
    for name, function in functions.items():
        errors[name] = error(case, function)
        assert not name.startswith("ours") or errors[name] <= MAX_ERROR, f"{case.name}: wrong by {errors[name]:.1e}"
    for phase, gigabytes in case.gigabytes.items():
        whole_us = copy_us(gigabytes) if gigabytes else None
        for name in sorted(functions, key=lambda name: name.startswith("ours")):
            us = phase_us(case, phase, name, functions[name])
            torch.cuda.empty_cache()
            yield {
                "kernel": case.name,
                "size": case.size,
                "phase": phase,
                "implementation": name,
                "us": us,
                "gigabytes": gigabytes or None,
                "gb_per_s": gigabytes / us * 1e6 if gigabytes else None,
                "share_of_copy": whole_us / us if whole_us else None,
                "error": errors[name],
            }


def line(row: dict[str, object]) -> str:
    what = f"{row['kernel']:20} {row['size']:23} {row['phase']:8} {row['implementation']:15} {row['error']:7.0e} {row['us']:8.1f}"
    return what if row["gb_per_s"] is None else f"{what} {row['gb_per_s']:6.0f} {row['share_of_copy']:7.1%}"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="the kernels whose name contains this")
    parser.add_argument("--json", type=output_file, help="write the figures here as well")
    args = parser.parse_args()

    import torch
    import torch._functorch.config

    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs a GPU")
    torch._functorch.config.donated_buffer = False  # or a compiled backward pass could not run twice
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'kernel':20} {'size':23} {'phase':8} {'implementation':15} {'error':>7} {'us':>8} {'GB/s':>6} of copy")
    with torch.cuda.stream(torch.cuda.Stream()):
        for case in (*norm_cases(), *loss_cases(), *block_cases(), *gradient_cases()):
            for row in measure(case) if args.only in case.name else ():
                rows.append(row)
                print(line(row), flush=True)
    if args.json:
        figures = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
