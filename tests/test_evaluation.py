"""The Evaluator: which rank shows that it works."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import evaluation
from configurator import load_config
from data.tokens import load_dataset
from evaluation import Evaluator
from model import build_model
from parallel import Ranks, StopRequest
from startup import with_vocabulary
from tiny_runs import Runs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_shows_progress(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Runs(tmp_path) as runs:
        cfg = load_config(runs.argv("out", "--eval_iters=4"))
    dataset = load_dataset(cfg.data, cfg.model.block_size)
    cfg, ranks = with_vocabulary(cfg, dataset), Ranks(rank, 2, torch.device("cpu"))
    monkeypatch.setattr(Ranks, "sum_", lambda ranks, tensor: tensor)
    monkeypatch.setattr(StopRequest, "ask", lambda stop: False)
    monkeypatch.setattr(evaluation, "tqdm", lambda *args, **options: tqdm(*args, **options | {"delay": 0}))
    monkeypatch.setattr(sys, "stderr", Terminal())
    model = build_model(cfg.model, ranks.device, 0)
    stop = StopRequest.__new__(StopRequest)  # without taking pytest's signals
    evaluator = Evaluator(cfg, dataset, torch.float32, model, model, ranks, stop, None, None)
    assert evaluator.losses() is not None
    assert ("evaluating" in sys.stderr.getvalue()) == (rank == 0)
