"""Text from a model: the draw of a token, and the loop, with the cache and beyond it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configurator import UserError
from generation import Decoder, SampleOptions, draw_tokens, generate, next_token
from test_model import TINY, build, each_generating, lively, tokens


@each_generating
@pytest.mark.parametrize("prompt_length", (1, 5, 16, 20))
def test_greedy_generation_takes_the_argmax_of_the_last_block(knobs, prompt_length):
    """Within the context and beyond it, a row at a time or batched."""
    cfg = replace(TINY, **knobs)
    model, prompt = lively(cfg), tokens(cfg, length=prompt_length)
    expected = prompt
    with torch.no_grad():
        for _ in range(20):
            token = model(expected[:, -cfg.block_size :])[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, token), dim=1)
    assert torch.equal(generate(model, prompt, 20, SampleOptions(temperature=0)), expected)
    assert len(expected[:, prompt_length:].unique()) > 2


@pytest.mark.parametrize("training", (True, False))
def test_generation_restores_the_mode_and_ignores_dropout(training):
    model = build(replace(TINY, dropout=0.5)).train(training)
    prompt = tokens(TINY, length=3)
    a, b = (generate(model, prompt, 5, SampleOptions(temperature=0)) for _ in range(2))
    assert torch.equal(a, b)
    assert model.training == training
    with pytest.raises(IndexError):
        generate(model, torch.full((1, 2), 10_000), 1)
    assert model.training == training


def test_sampling_is_a_function_of_the_generator():
    model, prompt = build(TINY), tokens(TINY, length=3)
    a, b, c = (generate(model, prompt, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def drawn(logits: list[float], options: SampleOptions) -> Tensor:
    """Shares of the ids among 20,000 draws."""
    generator = torch.Generator().manual_seed(0)
    ids = next_token(torch.tensor(logits).expand(20_000, -1), options, generator)
    return ids.flatten().bincount(minlength=len(logits)) / 20_000


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        (SampleOptions(), [0.5, 0.3, 0.15, 0.05]),
        (SampleOptions(temperature=0), [1, 0, 0, 0]),
        (SampleOptions(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),  # squares, made to sum to 1
        (SampleOptions(top_k=1), [1, 0, 0, 0]),
        (SampleOptions(top_k=2), [0.625, 0.375, 0, 0]),
        (SampleOptions(top_k=99), [0.5, 0.3, 0.15, 0.05]),
        (SampleOptions(top_p=0.4), [1, 0, 0, 0]),  # the most likely always stays
        (SampleOptions(top_p=0.79), [0.625, 0.375, 0, 0]),
        (SampleOptions(top_p=0.81), [0.5263, 0.3158, 0.1579, 0]),
        (SampleOptions(top_k=2, top_p=0.6), [1, 0, 0, 0]),  # 0.625 of the two that top_k leaves
        (SampleOptions(n_valid_ids=2), [0.625, 0.375, 0, 0]),
    ],
    ids=str,
)
def test_sampling_probabilities(options, shares):
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert drawn(logits, options).tolist() == pytest.approx(shares, abs=0.012)


def test_padding_ids_are_never_taken_even_when_most_likely():
    assert drawn([0.0, 0.0, 50.0], SampleOptions(n_valid_ids=2))[2] == 0
    assert drawn([0.0, 1.0, 50.0], SampleOptions(n_valid_ids=2, temperature=0)).tolist() == [0, 1, 0]


def test_generation_stops_when_every_row_has_met_the_stop_id():
    model, prompt = lively(TINY), tokens(TINY, batch=6, length=4)
    free = generate(model, prompt, 12, SampleOptions(temperature=0))
    stop_id = int(free[0, 6])  # what the first row says third
    stopped = generate(model, prompt, 12, SampleOptions(temperature=0, stop_id=stop_id))
    for row, until in zip(stopped, free, strict=True):
        hits = (until[4:] == stop_id).nonzero()
        end = 4 + int(hits[0]) + 1 if len(hits) else 16
        assert torch.equal(row[:end], until[:end])
        assert (row[end:] == stop_id).all()
    alone = generate(model, prompt[:1], 12, SampleOptions(temperature=0, stop_id=stop_id))
    assert alone.shape[1] <= 7


@pytest.mark.parametrize("knobs", ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}), ids=str)
def test_impossible_sampling_is_refused(knobs):
    with pytest.raises(UserError, match="sampling needs"):
        SampleOptions(**knobs)


def test_generation_needs_a_prompt():
    with pytest.raises(UserError, match="at least one token"):
        generate(build(TINY), torch.zeros(1, 0, dtype=torch.int64), 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", (False, True))
@pytest.mark.parametrize("prompt_length", (1, 5))
@each_generating
def test_a_cuda_graph_draws_the_same_tokens(knobs, prompt_length, compile):
    model = lively(replace(TINY, **knobs)).cuda()
    prompt = tokens(TINY, batch=3, length=prompt_length).cuda()
    greedy = SampleOptions(temperature=0)
    expected = generate(model, prompt, 20, greedy)
    decoder = Decoder(model, 3, 16, graph=True, compile=compile)
    drawn = torch.cat((prompt, *draw_tokens(model, prompt, 20, greedy, decoder=decoder)), dim=1)
    assert torch.equal(drawn, expected)


@each_generating
def test_a_decoder_may_hold_less_than_a_block(knobs):
    cfg = replace(TINY, **knobs)
    model, prompt = lively(cfg), tokens(cfg, length=3)
    decoder, greedy = Decoder(model, 2, 9), SampleOptions(temperature=0)
    short = torch.cat((prompt, *draw_tokens(model, prompt, 6, greedy, decoder=decoder)), dim=1)
    assert torch.equal(short, generate(model, prompt, 20, greedy)[:, :9])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@each_generating
def test_generation_under_autocast(knobs, dtype):
    """As train.py draws its samples: float32 weights, queries and keys in half precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, prompt = lively(replace(TINY, **knobs)).to(device), tokens(TINY, length=5).to(device)
    with torch.autocast(device, dtype):
        drawn = generate(model, prompt, 20, SampleOptions(temperature=0))
        with torch.no_grad():
            for end in range(5, 25):
                logits = model(drawn[:, max(0, end - TINY.block_size) : end])[:, -1].float()  # (B, V)
                behind = logits.max(-1).values - logits.gather(1, drawn[:, end : end + 1]).squeeze(1)
                assert behind.max() < 0.05  # the likeliest, but where rounding with and without a cache decides
    assert torch.equal(drawn[:, :5], prompt)
