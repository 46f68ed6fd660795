"""Text from a checkpoint: `python sample.py --out_dir=out --start="To be"`; `--help` lists the knobs."""

from __future__ import annotations

import sys

from configurator import DataConfig, ModelConfig, SampleConfig, UserError, command_errors, load_section, run_command, section_from

if __name__ == "__main__":  # torch takes seconds to import: --help and a mistyped flag are answered before that
    with command_errors():
        load_section(sys.argv[1:], SampleConfig)

import time

import torch

from checkpoint import Checkpoint, find_checkpoint
from data.tokenizer import load_tokenizer
from data.tokens import Dataset, load_dataset
from model import SampleOptions, Transformer, generate
from parallel import choose_device
from precision import autocast, choose_dtype


def main(argv: list[str]) -> int:
    cfg = load_section(argv, SampleConfig)
    checkpoint = open_checkpoint(cfg)
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.dtype, device)
    dataset = dataset_of(checkpoint)
    tokenizer = load_tokenizer(dataset)
    prompt = tokenizer.encode(cfg.start)
    if not prompt:
        raise UserError("--start: needs at least one character to continue")
    model = load_model(checkpoint, device)
    idx = torch.tensor([prompt], device=device).expand(cfg.num_samples, -1)  # (B, T)
    options = SampleOptions(cfg.temperature, cfg.top_k, cfg.top_p, n_valid_ids=dataset.vocab_size)
    t0_s = time.perf_counter()
    with autocast(device, dtype):
        rows = generate(model, idx, cfg.max_new_tokens, options, torch.Generator(device).manual_seed(cfg.seed)).tolist()
    elapsed_s = time.perf_counter() - t0_s
    for row in rows:
        print(tokenizer.decode(row), end=f"\n{'-' * 15}\n")
    drawn = len(rows) * (len(rows[0]) - len(prompt))
    print(f"{checkpoint.path}, step {checkpoint.iter}: {drawn} tokens, {drawn / elapsed_s:,.0f} tokens/s", file=sys.stderr)
    return 0


def open_checkpoint(cfg: SampleConfig) -> Checkpoint:
    """The checkpoint asked for; without a best one, which needs an evaluation, the latest. Raises UserError."""

    def warn(line: str) -> None:
        print(line, file=sys.stderr)

    checkpoint = find_checkpoint(cfg.out_dir, cfg.checkpoint, warn)
    if checkpoint is None:
        raise UserError(f"{cfg.out_dir} holds no checkpoint; pass --out_dir=... of a run that saved one")
    return checkpoint


def dataset_of(checkpoint: Checkpoint) -> Dataset:
    """The dataset that the checkpoint's run was trained on."""
    values = checkpoint.state["config"]["values"]
    return load_dataset(section_from(DataConfig, values), values["block_size"])


def load_model(checkpoint: Checkpoint, device: torch.device) -> Transformer:
    """The checkpoint's model, in evaluation mode."""
    with torch.device("meta"):
        model = Transformer(section_from(ModelConfig, checkpoint.state["config"]["values"]))
    model.to_empty(device=device).init_weights(seed=0)  # init_weights also fills the rotary tables
    weights = checkpoint.read_tensors([f"model.{name}" for name, _ in model.named_parameters()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[f"model.{name}"])
    return model.eval()


if __name__ == "__main__":
    run_command(main)
