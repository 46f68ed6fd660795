"""Text from a checkpoint: `python sample.py --out_dir=out --start="To be"`; `--help` lists the knobs."""

from __future__ import annotations

import sys

from configurator import KernelConfig, SampleConfig, UserError, answer_early, load_section, run_command

if __name__ == "__main__":  # before torch, which takes seconds to import
    answer_early(lambda argv: load_section(argv, SampleConfig))

import time
from pathlib import Path

import torch

import kernels
from data.tokenizer import Tokenizer
from generation import Decoder, SampleOptions, draw_tokens
from model import Transformer
from parallel import ReadBack, choose_device
from precision import choose_dtype
from pretrained import load_model, open_pretrained

SEPARATOR = f"\n{'-' * 15}\n"
HALF_A_CHARACTER = "\ufffd"  # what a decoder makes of bytes that are not a whole one yet


def main(argv: list[str]) -> int:
    cfg = load_section(argv, SampleConfig)
    device, texts = choose_device(cfg.device), texts_to_continue(cfg)
    if cfg.compile and device.type != "cuda":
        raise UserError("--compile: sampling is compiled on a GPU only; leave it out")
    source = open_pretrained(cfg.out_dir if cfg.init_from == "resume" else cfg.init_from, cfg.checkpoint, cfg.data_dir)
    tokenizer = source.load_tokenizer()
    prompts = [source.encode_prompt(text) for text in texts]
    if not all(prompts):
        raise UserError("--start: needs at least one character to continue")
    ops, _ = kernels.choose(vars(KernelConfig()), device.type)
    model = load_model(source, device, choose_dtype(cfg.dtype, device), ops)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    n_drawn, elapsed_s, n_samples = 0, 0.0, cfg.num_samples
    if cfg.temperature == 0 and n_samples > 1:
        print(f"note: at --temperature=0 all {n_samples} samples of a text are the same; one is drawn", file=sys.stderr)
        n_samples = 1
    for text, ids in zip(texts, prompts, strict=True):
        print(text, end="", flush=True)
        rows = [Continuation(tokenizer, ids, cfg.stop) for _ in range(n_samples)]
        more_s = continue_text(model, rows, cfg, generator)
        n_drawn, elapsed_s = n_drawn + sum(len(row.ids) - len(ids) for row in rows), elapsed_s + more_s
        print(end=SEPARATOR)
        for row in rows[1:]:
            print(text + row.text, end=SEPARATOR)
    print(f"{source.name}: {n_drawn} tokens, {n_drawn / elapsed_s:,.0f} tokens/s", file=sys.stderr)
    return 0


def texts_to_continue(cfg: SampleConfig) -> list[str]:
    """The lines of `prompt_file`; else `start`, or as in nanoGPT what is in the file of `FILE:path`. Raises UserError."""
    if not cfg.prompt_file and not cfg.start.startswith("FILE:"):
        return [cfg.start]
    flag = f"--prompt_file={cfg.prompt_file}" if cfg.prompt_file else f"--start={cfg.start}"
    try:
        text = Path(cfg.prompt_file or cfg.start.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: cannot read the file: {error}") from None
    texts = [line for line in text.split("\n") if line] if cfg.prompt_file else [text]
    if not texts:
        raise UserError(f"{flag}: the file has no line of text")
    return texts


class Continuation:
    """The text of one row while its tokens arrive."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: str) -> None:
        self.text = ""  # without the prompt; it ends before `stop`
        self.is_done = False  # `stop` has come
        self.ids = list(prompt)
        self.vocab_size = tokenizer.vocab_size  # ids from here on are never drawn
        self._tokenizer, self._stop = tokenizer, stop
        self._from, self._to = 0, len(prompt)  # what was decoded last: the next tokens are decoded behind it, as in their text
        self._shown = 0  # characters of `text` that are out

    def push(self, id: int) -> str:
        """Takes the next token; the text that is certain by it: no half character, nothing that may begin `stop`."""
        if self.is_done:
            return ""
        self.ids.append(id)
        before, now = (self._tokenizer.decode(self.ids[self._from : end]) for end in (self._to, len(self.ids)))
        if now.endswith(HALF_A_CHARACTER):
            return ""
        self._take(now[len(before) :])
        self._from, self._to = self._to, len(self.ids)
        return self._show(len(self.text) if self.is_done else len(self.text) - max(0, len(self._stop) - 1))

    def end(self) -> str:
        """No token comes any more: what has been held back."""
        if not self.is_done:
            before, now = (self._tokenizer.decode(self.ids[self._from : end]) for end in (self._to, len(self.ids)))
            self._take(now[len(before) :])
        return self._show(len(self.text))

    def _take(self, text: str) -> None:
        self.text += text
        found = self.text.find(self._stop, self._shown) if self._stop else -1
        if found >= 0:
            self.text, self.is_done = self.text[:found], True

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self.text[start : self._shown]


def continue_text(model: Transformer, rows: list[Continuation], cfg: SampleConfig, generator: torch.Generator) -> float:
    """Draws the rows' tokens and prints the first row meanwhile; the seconds it took, without compiling.

    The host reads a token when the device is busy with the next one.
    """
    device, prompt = generator.device, rows[0].ids
    idx = torch.tensor([prompt], device=device).expand(len(rows), -1)  # (B, T)
    capacity = min(model.cfg.block_size, len(prompt) + cfg.max_new_tokens)
    decoder = Decoder(model, len(rows), capacity, graph=device.type == "cuda", compile=cfg.compile)
    options = SampleOptions(cfg.temperature, cfg.top_k, cfg.top_p, n_valid_ids=rows[0].vocab_size)
    readback = ReadBack(device)
    t0_s = time.perf_counter()
    for token in draw_tokens(model, idx, cfg.max_new_tokens, options, generator, decoder):
        readback.push(None, token.flatten())
        take(rows, readback, keep=readback.depth)
        if all(row.is_done for row in rows):
            break
    take(rows, readback, keep=0)
    elapsed_s = time.perf_counter() - t0_s
    print(rows[0].end(), end="", flush=True)
    for row in rows[1:]:
        row.end()
    return elapsed_s


def take(rows: list[Continuation], readback: ReadBack, keep: int) -> None:
    """Gives the rows all tokens that have been read back, but those of the newest `keep` steps."""
    for _, ids, _ in readback.pop(keep):  # as float32, which is exact up to 2^24
        new = [row.push(int(id)) for row, id in zip(rows, ids, strict=True)]
        print(new[0], end="", flush=True)


if __name__ == "__main__":
    run_command(main)
