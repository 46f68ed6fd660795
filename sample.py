"""Text from a checkpoint: `python sample.py --out_dir=out --start="To be"`; `--help` lists the knobs."""

from __future__ import annotations

import sys

from configurator import DataConfig, ModelConfig, SampleConfig, UserError, answer_early, load_section, run_command, section_from

if __name__ == "__main__":  # before torch, which takes seconds to import
    answer_early(lambda argv: load_section(argv, SampleConfig))

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from checkpoint import FOLDER, Checkpoint, find_checkpoint, tiers_in
from data.tokenizer import load_tokenizer
from data.tokens import Dataset, Manifest, dataset_folder
from model import SampleOptions, Transformer, build_model, generate
from parallel import choose_device
from precision import autocast, choose_dtype


def main(argv: list[str]) -> int:
    cfg = load_section(argv, SampleConfig)
    checkpoint = open_checkpoint(cfg)
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.dtype, device)
    dataset = vocabulary_of(checkpoint, cfg.data_dir)
    tokenizer = load_tokenizer(dataset)
    if checkpoint.state["data"].get("tokenizer_hash") not in (None, tokenizer.hash):
        raise UserError(
            f"the tokenizer in {dataset.folder} is not the one that {checkpoint.path} was trained with: prepare that again"
        )
    prompt = tokenizer.encode(text_to_continue(cfg.start))
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

    which = cfg.checkpoint
    if which == "best" and "best_model" not in tiers_in(Path(cfg.out_dir) / FOLDER):
        which = "latest"
    checkpoint = find_checkpoint(cfg.out_dir, which, warn)
    if checkpoint is None:
        raise UserError(f"{cfg.out_dir} holds no checkpoint; pass --out_dir=... of a run that saved one")
    return checkpoint


def vocabulary_of(checkpoint: Checkpoint, data_dir: str) -> Dataset:
    """The dataset of the checkpoint's run without its tokens, which need not be on this machine."""
    data = section_from(DataConfig, checkpoint.state["config"]["values"])
    folder = dataset_folder(replace(data, data_dir=data_dir or data.data_dir))
    manifest = Manifest.read(folder / "manifest.json") if (folder / "manifest.json").exists() else None
    no_tokens = np.empty(0, np.uint16)
    return Dataset(data.dataset, folder, no_tokens, no_tokens, checkpoint.state["data"]["vocab_size"], manifest)


def text_to_continue(start: str) -> str:
    """`start`, or what is in the file of `FILE:path`, as in nanoGPT. Raises UserError."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--start={start}: cannot read the file: {error}") from None


def load_model(checkpoint: Checkpoint, device: torch.device) -> Transformer:
    """The checkpoint's model, in evaluation mode."""
    model = build_model(section_from(ModelConfig, checkpoint.state["config"]["values"]), device, seed=0)
    weights = checkpoint.read_tensors([f"model.{name}" for name, _ in model.named_parameters()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[f"model.{name}"])
    return model.eval()


if __name__ == "__main__":
    run_command(main)
