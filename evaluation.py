"""What is measured of a model between the steps of a run: the loss of both splits, HellaSwag, a sample of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configurator import Config
from data.loader import evaluation_batches
from data.tokenizer import Tokenizer
from data.tokens import Dataset
from generation import SampleOptions, generate
from hellaswag import Questions, Score, log_likelihoods, score_of
from model import Transformer
from parallel import Ranks, StopRequest
from precision import autocast


@dataclass(frozen=True)
class Prompt:
    """What a text sample continues."""

    tokenizer: Tokenizer
    ids: list[int]


@dataclass(frozen=True)
class Evaluator:
    """All ranks call it together, and get the same figures. The model comes back in training mode."""

    cfg: Config
    dataset: Dataset
    dtype: torch.dtype
    model: Transformer
    forward: Callable[..., Tensor]  # the model, compiled where asked for
    ranks: Ranks
    stop: StopRequest
    prompt: Prompt | None  # of text samples, where they are asked for
    questions: Questions | None  # of HellaSwag, where it is asked for

    def losses(self) -> tuple[float, float] | None:
        """Mean loss of the training and of the validation split, in nats a token; None after a stop request."""
        val, cfg = self.dataset.val, self.cfg
        # Where the whole validation split is asked for, the training split gives as many tokens.
        train_iters = cfg.eval.eval_iters or math.ceil(len(val) / cfg.model.block_size / cfg.data.batch_size)
        train_loss = self._split_loss(self.dataset.train, train_iters)
        val_loss = self._split_loss(val, cfg.eval.eval_iters)
        return None if train_loss is None or val_loss is None else (train_loss, val_loss)

    def bits_per_byte(self, val_loss: float) -> float | None:
        """What that loss is a byte of validation text; None where its bytes are not known."""
        return val_loss / math.log(2) / self.dataset.val_bytes_per_token if self.dataset.val_bytes_per_token else None

    def hellaswag(self, questions: Questions) -> Score | None:
        """None after a stop request."""
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled
            scores = log_likelihoods(self.model, questions, self.ranks, self._autocast, self.stop.ask)
        return None if scores is None else score_of(scores, questions)

    def sample(self, prompt: Prompt) -> str:
        """A continuation of the prompt; a generator of its own keeps it from moving the run's random numbers."""
        device, cfg = self.ranks.device, self.cfg
        ids, generator = torch.tensor([prompt.ids], device=device), torch.Generator(device).manual_seed(cfg.run.seed)  # (1, T)
        options = SampleOptions(temperature=0.8, top_k=200, n_valid_ids=self.dataset.vocab_size)
        with self._autocast(), torch.compiler.set_stance("force_eager"):  # every length would be compiled
            text = generate(self.model, ids, cfg.eval.sample_tokens, options, generator)
        self.ranks.finish_device()
        return prompt.tokenizer.decode(text[0].tolist())

    def _autocast(self) -> torch.autocast:
        return autocast(self.ranks.device, self.dtype)

    @torch.no_grad()
    def _split_loss(self, tokens: np.ndarray, iters: int) -> float | None:
        """Over `iters` micro-batches of a split; 0 takes all of it."""
        ranks, cfg = self.ranks, self.cfg
        total = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # sum of losses, number of targets
        self.model.eval()
        try:
            batches = evaluation_batches(
                tokens, cfg.model.block_size, cfg.data, iters, ranks.device, ranks.rank, ranks.world_size
            )
            hidden = None if ranks.is_main else True  # None: shown on a terminal
            for x, y in tqdm(batches, "evaluating", delay=2, leave=False, disable=hidden):
                if self.stop.ask():
                    return None
                with self._autocast():
                    total += torch.stack([self.forward(x, y, reduction="sum"), (y >= 0).sum()])
        finally:
            self.model.train()
        ranks.sum_(total)
        ranks.finish_device()
        return (total[0] / total[1]).item()
