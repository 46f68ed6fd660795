"""Tokens a second, MFU and peak memory of a whole training step, ours and our peers' on the same card.

    python benchmarks/throughput.py CONFIG [--knob=value ...] [--peer nanogpt:PATH] [--peer transformers] [--peer torchtitan]
        [--peer transformer_engine:RECIPE] [--peer "nanotrain:--knob=value ..."] [--rounds=2] [--steps=40] [--profile]
        [--json=FILE]

A step is one micro-batch of `batch_size` x `block_size` random tokens: forward, backward, clipping at 1.0, fused AdamW; products
in bfloat16, float32 weights (ours as masters of the blocks' matrices, peers' under autocast), torch.compile. Each contestant runs
in a process of its own, in the order A B A B; a figure is the median step of all rounds. Memory is what PyTorch has reserved on
the GPU, at its peak during those steps. Peers run their own model code: nanoGPT's from a checkout at PATH, `transformers` and
`torchtitan` as installed, Transformer Engine's TransformerLayer with RECIPE bf16, delayed or current; and ourselves with other
knobs. `--profile` prints where our own step's time goes, kernel by kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from command_line import fresh_state, load_model_config, nanogpt_folder, output_file, parser_of, with_strategy

from configurator import Config, UserError, run_command

WARMUP_STEPS = 10
RECIPES = ("bf16", "delayed", "current")  # of Transformer Engine
Step = Callable[[Any, Any], Any]  # idx, targets (B, T) int64 each -> the loss


def nanotrain(cfg: Config, _: str) -> Step:
    import torch

    from micro_step import build_micro_step, compile_model
    from optim import update
    from parallel import Ranks

    one = with_strategy(cfg, n_ranks=1, strategy="auto", micro_steps=1)
    one = dataclasses.replace(one, run=dataclasses.replace(one.run, dtype="bfloat16", compile=True))  # as the peers
    cfg, state = fresh_state(one, Ranks(0, 1, torch.device("cuda", 0)), print)
    micro_step = build_micro_step(compile_model(state.layout, cfg, print), state.layout, state.loss_scale, cfg)

    def step(idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        state.fp8.begin_step()
        state.layout.begin(1, micro_steps=1)
        loss = micro_step(idx, targets)
        gradients = state.layout.gradients()
        done = update(state.optimizer, cfg.optim, cfg.optim.learning_rate, state.loss_scale.scale, False, gradients)
        state.fp8.finish_step(done.overflow)
        return loss

    return step


def peer_step(model: Any, loss_of: Callable[[Any, Any], Any], cfg: Config) -> Step:
    """A peer's step: its loss, clipping and fused AdamW as their own training loops have them."""
    import torch

    update = peer_update(model, cfg)

    def step(idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(idx, targets)
        loss.backward()
        update()
        return loss.detach()

    return step


def peer_update(model: Any, cfg: Config) -> Callable[[], None]:
    import torch

    optim = cfg.optim
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


@contextmanager
def importing(package: str, remedy: str) -> Iterator[None]:
    """Around the imports of a peer, whatever they raise. Raises UserError where it is not installed, or does not load."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{package} cannot be imported ({type(error).__name__}: {reason}): {remedy}") from None


def nanogpt(cfg: Config, path: str) -> Step:
    import torch

    model = nanogpt_model(cfg, path).cuda()
    compiled = torch.compile(model)
    return peer_step(model, lambda idx, targets: compiled(idx, targets)[1], cfg)


def nanogpt_model(cfg: Config, path: str) -> Any:
    """Of its own code, with the sizes of `cfg`."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(path) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    m = cfg.model
    sizes = dict(n_layer=m.n_layer, n_head=m.n_head, n_embd=m.n_embd, block_size=m.block_size, vocab_size=m.vocab_size)
    return module.GPT(module.GPTConfig(**sizes, bias=m.bias, dropout=m.dropout))


def transformers(cfg: Config, _: str) -> Step:
    import torch

    with importing("transformers", "pip install -r requirements.txt"):
        from transformers import LlamaConfig, LlamaForCausalLM

    m = cfg.model
    config = LlamaConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.n_embd,
        intermediate_size=m.ffn_hidden,
        num_hidden_layers=m.n_layer,
        num_attention_heads=m.n_head,
        num_key_value_heads=m.kv_heads,
        max_position_embeddings=m.block_size,
        tie_word_embeddings=m.weight_tying,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).float()
    compiled = torch.compile(model)

    def loss(idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = compiled(input_ids=idx).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return peer_step(model, torch.compile(loss), cfg)


def torchtitan(cfg: Config, _: str) -> Step:
    import torch

    with importing("torchtitan", "pip install torchtitan==0.2.2"):
        from torchtitan.models.llama3.model.args import TransformerModelArgs
        from torchtitan.models.llama3.model.model import Transformer

    m = cfg.model
    sizes = dict(dim=m.n_embd, n_layers=m.n_layer, n_heads=m.n_head, n_kv_heads=m.kv_heads, vocab_size=m.vocab_size)
    args = TransformerModelArgs(**sizes, max_seq_len=m.block_size, rope_theta=m.rope_theta)
    with torch.device("cuda"):
        model = Transformer(args)
        with torch.no_grad():
            model.init_weights()
    for name, block in model.layers.named_children():  # as its own apply_compile does
        model.layers.register_module(name, torch.compile(block, fullgraph=True))
    loss_of_logits = torch.compile(lambda logits, y: torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten()))
    return peer_step(model, lambda idx, targets: loss_of_logits(model(idx), targets), cfg)


def transformer_engine(cfg: Config, recipe: str) -> Step:
    import torch
    from torch.nn.functional import cross_entropy

    with importing("transformer_engine", "pip install -r requirements-gpu.txt, with the PyTorch and CUDA that it is built for"):
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

    m = cfg.model
    layer = dict(bias=False, normalization="RMSNorm", activation="swiglu", hidden_dropout=0.0, attention_dropout=0.0)
    layer |= dict(self_attn_mask_type="causal", attn_input_format="bshd", fuse_qkv_params=True, num_gqa_groups=m.kv_heads)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(m.vocab_size, m.n_embd)
            layers = (te.TransformerLayer(m.n_embd, m.ffn_hidden, m.n_head, **layer) for _ in range(m.n_layer))
            self.layers = torch.nn.ModuleList(layers)
            self.norm = te.RMSNorm(m.n_embd)
            self.head = torch.nn.Linear(m.n_embd, m.vocab_size, bias=False)
            self.rope = te.RotaryPositionEmbedding(m.head_dim)(m.block_size)

        def forward(self, idx: torch.Tensor) -> torch.Tensor:
            x = self.embedding(idx).bfloat16()
            with te.fp8_autocast(enabled=recipe != "bf16", fp8_recipe=recipes.get(recipe)):
                for block in self.layers:
                    x = block(x, rotary_pos_emb=self.rope)
            return self.head(self.norm(x))

    recipes = {"delayed": DelayedScaling(), "current": Float8CurrentScaling()}
    with torch.device("cuda"):
        model = Model()
    loss_of_logits = torch.compile(lambda logits, y: cross_entropy(logits.flatten(0, 1).float(), y.flatten()))
    return peer_step(model, lambda idx, targets: loss_of_logits(model(idx), targets), cfg)


CONTESTANTS = {
    contestant.__name__: contestant for contestant in (nanotrain, nanogpt, transformers, torchtitan, transformer_engine)
}


def peer(name: str) -> str:
    """The type of --peer: a contestant, with what it takes behind a colon. Raises ArgumentTypeError where it is none."""
    contestant, _, argument = name.partition(":")
    if contestant not in CONTESTANTS:
        raise argparse.ArgumentTypeError(f"no {contestant!r}; there are {', '.join(CONTESTANTS)}")
    if contestant == "transformer_engine" and argument not in RECIPES:
        raise argparse.ArgumentTypeError(f"{name}: {contestant}:RECIPE takes one of {', '.join(RECIPES)}")
    if contestant == "nanogpt":
        nanogpt_folder(argument)
    return name


def run_contestant(name: str, cfg: Config, steps: int, profile: bool) -> dict[str, Any]:
    """In a process of its own: step times in milliseconds, peak memory, and the losses of the first step and of the last.

    Raises UserError where that is not finite: with such numbers a GPU draws less power, and so is faster.
    """
    import torch

    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    contestant, _, argument = name.partition(":")
    step = CONTESTANTS[contestant](cfg, argument)
    batches = torch.randint(cfg.model.vocab_size, (4, 2, cfg.data.batch_size, cfg.model.block_size), device="cuda")
    events, losses = [], []
    for number in range(WARMUP_STEPS + steps + 1):
        if number == WARMUP_STEPS // 2:  # what compiling has left goes; what a CUDA graph has reserved for itself stays
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if number >= WARMUP_STEPS:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        loss = step(*batches[number % 4])
        if number in (0, WARMUP_STEPS + steps):
            losses.append(loss.item())
    if not math.isfinite(losses[-1]):
        raise UserError(f"{name}: the loss went from {losses[0]:.4f} to {losses[-1]}")
    if profile and contestant == "nanotrain":
        print_profile(step, batches)
    times_ms = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return {"times_ms": times_ms, "peak_gib": torch.cuda.max_memory_reserved() / 2**30, "losses": losses}


def print_profile(step: Step, batches: Any) -> None:
    """Device time of one step by kernel, the mean of three steps, and how long these steps took with what lies between."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from profiling import kernel_table

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for number in range(3):
            step(*batches[number])
        torch.cuda.synchronize()
    ranges = [event.time_range for event in recorded.events()]
    span_us = max(r.end for r in ranges) - min(r.start for r in ranges)  # one stream: what no kernel covers is idle
    print("\n".join(kernel_table(recorded, steps=3)))
    print(f"{span_us / 3:12,.0f} from the first kernel to the last, a step")


def report(figures: dict[str, list[dict[str, Any]]], cfg: Config, path: Path | None) -> None:
    import torch

    from flops import flops_per_token, peak_tflops

    tokens = cfg.data.batch_size * cfg.model.block_size
    peak = peak_tflops(torch.cuda.get_device_name(), "bfloat16")
    result = {}
    for name, rounds in figures.items():
        step_ms = statistics.median(t for r in rounds for t in r["times_ms"])
        tokens_per_s = 1e3 * tokens / step_ms
        result["nanogpt" if name.startswith("nanogpt:") else name] = {
            "step_ms": round(step_ms, 3),
            "rounds_ms": [round(statistics.median(r["times_ms"]), 3) for r in rounds],
            "tokens_per_s": round(tokens_per_s),
            "mfu_percent": peak and round(100 * flops_per_token(cfg.model) * tokens_per_s / peak / 1e12, 2),
            "peak_gib": round(max(r["peak_gib"] for r in rounds), 2),
            "losses": [round(loss, 4) for loss in rounds[0]["losses"]],
        }
    ours, gpu = result.get("nanotrain", {}).get("tokens_per_s", math.nan), torch.cuda.get_device_name()
    print(f"\n{cfg.model.architecture}, {cfg.data.batch_size} x {cfg.model.block_size:,}, {gpu}, torch {torch.__version__}")
    print(f"{'':32s} {'ms':>9s} {'tokens/s':>10s} {'MFU %':>7s} {'GiB':>7s} {'ours / theirs':>14s}  rounds, ms (losses)")
    for name, row in result.items():
        ratio, mfu = ours / row["tokens_per_s"], row["mfu_percent"] or float("nan")
        figures_of_row = f"{row['step_ms']:9.2f} {row['tokens_per_s']:10,d} {mfu:7.2f} {row['peak_gib']:7.2f} {ratio:14.3f}"
        losses = " to ".join(f"{loss:.3f}" for loss in row["losses"])
        print(f"{name:32s} {figures_of_row}  {', '.join(f'{ms:.2f}' for ms in row['rounds_ms'])} ({losses})")
    if path:
        about = {"architecture": cfg.model.architecture, "batch": [cfg.data.batch_size, cfg.model.block_size]}
        software = {"gpu": gpu, "torch": torch.__version__}
        path.write_text(json.dumps(about | software | {"contestants": result}, indent=1) + "\n")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--peer", type=peer, action="append", default=[], help="another contestant; may be repeated")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contestant")
    parser.add_argument("--steps", type=int, default=40, help="that each of them takes, behind the first ones")
    parser.add_argument("--profile", action="store_true", help="print where our own step's time goes")
    parser.add_argument("--json", type=output_file, help="write the figures here as well")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)  # the child process
    args, knobs = parser.parse_known_args()
    cfg = load_model_config(knobs)
    if args.contestant:
        args.json.write_text(json.dumps(run_contestant(args.contestant, cfg, args.steps, args.profile)))
        return
    names = ["nanotrain", *args.peer]
    import torch

    if not torch.cuda.is_available():
        parser.error("a whole step is measured on a GPU, and there is none here")
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in itertools.product(range(args.rounds), names):
            child = [
                sys.executable,
                __file__,
                f"--contestant={name}",
                f"--json={folder}/figures.json",
                f"--steps={args.steps}",
                *knobs,
                *(name.partition(":")[2].split() if name.startswith("nanotrain:") else ()),
            ]
            done = subprocess.run([*child, "--profile"] if args.profile and number == 0 else child)
            if done.returncode:  # the others' figures stand
                print(f"{name}: failed, exit code {done.returncode}", flush=True)
                continue
            figures[name].append(json.loads(Path(folder, "figures.json").read_text()))
            print(f"{name}: {statistics.median(figures[name][-1]['times_ms']):.2f} ms", flush=True)
    report({name: rounds for name, rounds in figures.items() if rounds}, cfg, args.json)


if __name__ == "__main__":
    run_command(lambda argv: main())
