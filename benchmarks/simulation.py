"""Memory and traffic of one rank among many, without the hardware: PyTorch's fake process group and fake tensors.

    python benchmarks/simulation.py CONFIG [--knob=value ...] [--ranks=8,64,1024] [--strategies=ddp,zero1,fsdp] [--micro_steps=1]
        [--json=FILE]

Builds the model as rank 0 of so many ranks by train.py's own layouts, takes a whole step but for the arithmetic, and adds up what
the rank holds between its steps (parameters, AdamW's state), what its gradients take, and the bytes that it must send in a step,
as a ring does: of an all-reduce of S bytes among n ranks 2 S (n-1)/n, of an all-gather into S or a reduce-scatter of S bytes
S (n-1)/n. The peak is memory.py's prediction for a GPU, without the ring that copies between a host's GPUs take. What fsdp would
hold for the sake of speed where memory allows it must be asked for by its knobs. Time is not simulated.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from command_line import load_model_config, output_file, parser_of, positive_int, positive_ints, strategies, with_strategy

from configurator import Config, run_command
from memory import GIB


def count_traffic(sent: dict[str, float]) -> AbstractContextManager:
    """While it is entered, the bytes of every collective are added to `sent`, by kind."""
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    class Traffic(TorchDispatchMode):
        """Sees every collective, with its tensors."""

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(op).removeprefix("c10d.")
            if name != str(op):
                share = (len_of_group(args) - 1) / len_of_group(args)
                if name.startswith("allreduce"):
                    sent["all-reduce"] += 2 * share * bytes_of(args[0])
                elif name.startswith("_allgather_base"):
                    sent["all-gather"] += share * bytes_of(args[0])
                elif name.startswith("_reduce_scatter_base"):
                    sent["reduce-scatter"] += share * bytes_of(args[1])
                else:
                    raise NotImplementedError(name)
            return op(*args, **kwargs or {})

    def bytes_of(tensors: Any) -> int:
        return sum(t.nbytes for t in (tensors if isinstance(tensors, (list, tuple)) else [tensors]))

    def len_of_group(args: Any) -> int:
        return dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject))).size()

    return Traffic()


def simulate(cfg: Config, n_ranks: int, strategy: str, micro_steps: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from kernels import REFERENCE
    from memory import predict_memory
    from model import Transformer
    from optim import build_optimizer
    from parallel import Ranks
    from precision import autocast, choose_dtype
    from sharding import choose_layout

    sent = {"all-reduce": 0.0, "all-gather": 0.0, "reduce-scatter": 0.0}
    cfg = with_strategy(cfg, n_ranks, strategy, micro_steps)
    cfg = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, exchange="collectives"))  # as between hosts
    with ExitStack() as stack:
        dist.init_process_group("fake", rank=0, world_size=n_ranks, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        ranks = Ranks(0, n_ranks, torch.device("cpu"))
        dtype = choose_dtype(cfg.run.dtype, ranks.device)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        cfg, layout, _ = choose_layout(cfg, ranks, dtype)
        model = Transformer(cfg.model)
        with unset_fake_temporarily():  # a mesh of ranks is made of real numbers
            layout.shard(model)
        layout.attach(model)
        optimizer = build_optimizer(layout.rows.values(), cfg.optim, REFERENCE.AdamW, layout.rounded)
        idx = torch.zeros(cfg.data.batch_size, cfg.model.block_size, dtype=torch.int64)
        with count_traffic(sent):
            for number in range(1, micro_steps + 1):
                layout.begin(number, micro_steps)
                with autocast(ranks.device, dtype):
                    loss = model(idx, idx)
                loss.backward()
            layout.gradients()
            gradient_bytes = layout.gradient_bytes()
            layout.finish()
            layout.settle()
        held_parameters = [*model.parameters(), *layout.rounded]  # and masters
        held = {
            "parameters": sum(getattr(p, "_local_tensor", p).untyped_storage().nbytes() for p in held_parameters),
            "gradients": gradient_bytes,
            "optimizer": sum(t.nbytes for state in optimizer.state.values() for t in state.values()),
        }
    held["peak"] = predict_memory(cfg, "bfloat16", strategy, n_ranks).peak
    return {"ranks": n_ranks, "strategy": strategy, "bytes_held": held, "bytes_sent": {k: round(v) for k, v in sent.items()}}


def report(rows: list[dict[str, Any]]) -> None:
    held, sent = rows[0]["bytes_held"], rows[0]["bytes_sent"]
    header = ["ranks", "strategy", *(f"{name}, GiB" for name in held), *(f"{name}, GB sent" for name in sent)]
    print("  ".join(header))
    for row in rows:
        sizes = [f"{size / GIB:.4f}" for size in row["bytes_held"].values()] + [
            f"{n / 1e9:.3f}" for n in row["bytes_sent"].values()
        ]
        cells = [str(row["ranks"]), row["strategy"], *sizes]
        print("  ".join(cell.rjust(len(name)) for cell, name in zip(cells, header, strict=True)))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=positive_ints, default="8,64,1024")
    parser.add_argument("--strategies", type=strategies, default="ddp,zero1,fsdp")
    parser.add_argument("--micro_steps", type=positive_int, default=1, help="a rank")
    parser.add_argument("--json", type=output_file, help="write the figures here as well")
    args, knobs = parser.parse_known_args()
    cfg = load_model_config([*knobs, "--device=cpu", "--dtype=bfloat16"])
    settings = itertools.product(args.ranks, args.strategies)
    rows = [simulate(cfg, n, strategy, args.micro_steps) for n, strategy in settings]
    report(rows)
    if args.json:
        args.json.write_text(json.dumps({"config": cfg.model.architecture, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(lambda argv: main())
