"""Tokens a second of generation, ours and transformers' with a static cache, compiled, on the same GPU and the same weights.

    python benchmarks/sampling.py [CONFIG] [--knob=value ...] [--batch=1] [--prompt=32] [--tokens=512] [--rounds=2] [--json=FILE]

A model of random weights (GPT-2 124 M unless CONFIG says otherwise) is written as a Hugging Face folder, which all contestants
load in bfloat16: sample.py's loop with its CUDA graph, the same with the pass compiled before, and transformers' `generate` with
cache_implementation="static", which compiles by itself. Each runs in a process of its own, in turns; the first generation
(compilation, capture) is not timed. A figure is the median of `--repeats` generations, prompt included, over all rounds. Greedy
unless --temperature is given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line import load_model_config, output_file, parser_of

from configurator import Config, KernelConfig, run_command

CONTESTANTS = ("nanotrain", "nanotrain, compiled", "transformers")
TOP_K = 200
Generation = Callable[[], list[int]]  # a whole one: the tokens of the first row, on the host


def write_model(cfg: Config, folder: Path) -> None:
    """Random weights as a Hugging Face folder, without a tokenizer and with nothing that ends a text."""
    import torch

    from hf_format import FAMILIES, config_json, layout, model_type_of, theirs_from_ours, write_tensors
    from model import build_model

    weights = dict(build_model(cfg.model, torch.device("cpu"), cfg.run.seed).named_parameters())
    config = config_json(cfg.model) | {"bos_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {tensor.name: tensor for tensor in layout(FAMILIES[model_type_of(cfg.model)], cfg.model, config)}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with torch.no_grad():
        write_tensors(folder, shapes, torch.float32, lambda n: theirs_from_ours(tensors[n], weights.__getitem__), 10**10)


def ours(args: argparse.Namespace, compile: bool) -> Generation:
    """What sample.py does, but for turning ids into text."""
    import torch

    import kernels
    from generation import Decoder, SampleOptions, draw_tokens
    from parallel import ReadBack
    from pretrained import load_model, open_pretrained

    device, dtype = device_and_dtype()
    ops, _ = kernels.choose(vars(KernelConfig()), device.type)
    model = load_model(open_pretrained(args.folder), device, dtype, ops)
    options = SampleOptions(args.temperature, TOP_K)
    decoder = Decoder(model, args.batch, args.prompt + args.tokens, graph=device.type == "cuda", compile=compile)

    def run() -> list[int]:
        decoder.cache.clear()
        readback, drawn, generator = ReadBack(device), [], torch.Generator(device).manual_seed(0)
        for token in draw_tokens(model, prompt_of(args, model.cfg.vocab_size), args.tokens, options, generator, decoder):
            readback.push(None, token.flatten())
            drawn += readback.pop(readback.depth)
        return [int(ids[0]) for _, ids, _ in drawn + readback.pop(0)]

    return run


def theirs(args: argparse.Namespace) -> Generation:
    import torch
    from transformers import AutoModelForCausalLM

    device, dtype = device_and_dtype()
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=dtype).to(device).eval()
    prompt = prompt_of(args, model.config.vocab_size)
    sampling = {"do_sample": args.temperature > 0}
    if args.temperature:
        sampling |= {"temperature": args.temperature, "top_k": TOP_K}

    def run() -> list[int]:
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.tokens,
            cache_implementation="static",
            pad_token_id=0,
            **sampling,
        )
        return ids[0, args.prompt :].tolist()

    return run


def device_and_dtype() -> tuple[Any, Any]:
    """A GPU and bfloat16; to try this script without one, the CPU and float32."""
    import torch

    return (torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else (torch.device("cpu"), torch.float32)


def prompt_of(args: argparse.Namespace, vocab_size: int) -> Any:
    import torch

    ids = torch.randint(vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    return ids.expand(args.batch, -1).to(device_and_dtype()[0])


def run_contestant(args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: seconds of each generation, and the tokens of the last."""
    import torch

    run = theirs(args) if args.contestant == "transformers" else ours(args, "compiled" in args.contestant)
    t0_s = time.perf_counter()
    run()
    first_s, times_s = time.perf_counter() - t0_s, []
    for _ in range(args.repeats):
        t0_s = time.perf_counter()
        tokens = run()
        times_s.append(time.perf_counter() - t0_s)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {"first_s": first_s, "times_s": times_s, "tokens": tokens, "peak_gib": peak_gib}


def report(figures: dict[str, list[dict[str, Any]]], args: argparse.Namespace, cfg: Config) -> None:
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{cfg.model.architecture}, batch {args.batch}, {args.prompt} + {args.tokens} tokens, {device}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{'':22s} {'ms a token':>10s} {'tokens/s':>9s} {'/ theirs':>9s} {'first, s':>9s}  rounds, tokens/s")
    rate = {name: args.batch * args.tokens / median_s(rounds) for name, rounds in figures.items()}
    for name, rounds in figures.items():
        each = ", ".join(f"{args.batch * args.tokens / median_s([one]):,.0f}" for one in rounds)
        ms, first_s = 1e3 * args.batch / rate[name], rounds[0]["first_s"]
        print(f"{name:22s} {ms:10.3f} {rate[name]:9,.0f} {rate[name] / rate['transformers']:9.2f} {first_s:9.1f}  {each}")
    if args.temperature == 0:
        ours, theirs = figures["nanotrain"][0]["tokens"], figures["transformers"][0]["tokens"]
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
        print(f"the first {same} of {args.tokens} greedy tokens are the same")
    if args.json:
        options = {name: vars(args)[name] for name in ("batch", "prompt", "tokens", "temperature")}
        for each in itertools.chain(*figures.values()):
            del each["tokens"]
        args.json.write_text(json.dumps({"device": device, "options": options, "contestants": figures}, indent=1) + "\n")


def median_s(rounds: list[dict[str, Any]]) -> float:
    return statistics.median(time_s for each in rounds for time_s in each["times_s"])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens that are there [32]")
    parser.add_argument("--tokens", type=int, default=512, help="tokens to draw [512]")
    parser.add_argument("--temperature", type=float, default=0.0, help=f"above 0: sample, among the {TOP_K} likeliest [0]")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=output_file, help="write the figures here as well")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args, knobs = parser.parse_known_args()
    if args.contestant:
        args.json.write_text(json.dumps(run_contestant(args)))
        return
    cfg = load_model_config(knobs or ["config/train_gpt2.py"])
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        write_model(cfg, Path(folder))
        options = [f"--{name}={vars(args)[name]}" for name in ("batch", "prompt", "tokens", "temperature", "repeats")]
        for _, name in itertools.product(range(args.rounds), CONTESTANTS):
            child = [f"--contestant={name}", f"--folder={folder}", f"--json={folder}/figures", *options]
            subprocess.run([sys.executable, __file__, *child], check=True)
            figures[name].append(json.loads(Path(folder, "figures").read_text()))
    report(figures, args, cfg)


if __name__ == "__main__":
    run_command(lambda argv: main())
