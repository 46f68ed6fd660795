"""kernels/adamw.py against PyTorch's own AdamW, step by step; interpreted where there is no GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
from kernels import adamw, reference
from kernels.adamw import CHUNK, AdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8)
SIZES = ((3, 5), (7,), (CHUNK,), (2, CHUNK + 3), (1,))


def parameters(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).to(DEVICE, dtype)) for size in sizes]


def groups(tensors: list[nn.Parameter]) -> list[dict]:
    return [{"params": tensors[:3], "weight_decay": 0.1}, {"params": tensors[3:], "weight_decay": 0.0}]


def optimizers(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[AdamW, torch.optim.AdamW]:
    """The same parameters and the same state, made as optim.build_optimizer makes it, twice."""
    ours, theirs = (kind(groups(parameters(*sizes, dtype=dtype)), **OPTIONS) for kind in (AdamW, reference.AdamW))
    for optimizer in (ours, theirs):
        for p in all_of(optimizer):
            step = torch.zeros((), device=DEVICE)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return ours, theirs


def all_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def draw_gradients(optimizer: torch.optim.Optimizer, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in all_of(optimizer):
        p.grad = (factor * torch.randn(p.shape, generator=generator)).to(DEVICE, p.dtype)


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for p in all_of(optimizer) for t in (p.detach(), *optimizer.state[p].values())]


def test_equals_pytorch_over_several_steps() -> None:
    ours, theirs = optimizers(*SIZES)
    for step in range(4):
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
            draw_gradients(optimizer, step)
            optimizer.step()
    torch.testing.assert_close(everything(ours), everything(theirs), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("betas", ((0.0, 0.95), (0.9, 0.9999)))
def test_equals_pytorch_with_betas_at_the_edges(betas: tuple[float, float]) -> None:
    ours, theirs = optimizers((3, 5), (7,), (4,), (5,))
    for optimizer in (ours, theirs):
        for group in optimizer.param_groups:
            group["betas"] = betas
        for step in range(3):
            draw_gradients(optimizer, step)
            optimizer.step()
    torch.testing.assert_close(everything(ours), everything(theirs), rtol=1e-5, atol=1e-6)  # 1 - 0.9999 loses digits


def test_gradients_are_divided_by_the_scale_and_left_as_they_are() -> None:
    ours, theirs = optimizers(*SIZES)
    ours.grad_scale, ours.found_inf = torch.tensor(512.0, device=DEVICE), torch.tensor(0.0, device=DEVICE)
    draw_gradients(ours, 0, factor=512.0)
    draw_gradients(theirs, 0)
    before = [p.grad.clone() for p in all_of(ours)]
    ours.step()
    theirs.step()
    torch.testing.assert_close(everything(ours), everything(theirs), rtol=2e-6, atol=2e-7)
    assert all(torch.equal(p.grad, g) for p, g in zip(all_of(ours), before, strict=True))


def test_an_overflow_leaves_everything_as_it_was() -> None:
    ours, _ = optimizers(*SIZES)
    draw_gradients(ours, 0)
    ours.step()
    before = copy.deepcopy(everything(ours))
    ours.grad_scale, ours.found_inf = torch.tensor(1.0, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    draw_gradients(ours, 1, factor=float("inf"))
    ours.step()
    torch.testing.assert_close(everything(ours), before, rtol=0, atol=0)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    ours, theirs = optimizers(*SIZES)
    for step, absent in enumerate((0, 1, 0)):
        for optimizer in (ours, theirs):
            draw_gradients(optimizer, step)
            all_of(optimizer)[absent].grad = None
            optimizer.step()
    torch.testing.assert_close(everything(ours), everything(theirs), rtol=2e-6, atol=2e-7)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU to wait for")
def test_the_host_does_not_wait_for_the_device() -> None:
    ours, _ = optimizers(*SIZES)
    for seed in range(2):
        draw_gradients(ours, seed)
        with_sync_errors(ours.step)


def with_sync_errors(call: Callable[[], None]) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_that_begin_anywhere() -> None:
    ours, theirs = optimizers((4, 6), (6,), (8,), (2, CHUNK + 3))
    for optimizer in (ours, theirs):
        for p in (all_of(optimizer)[0], all_of(optimizer)[3]):
            p.data = torch.cat([p.data.new_zeros(1), p.data.flatten()])[1:].view(p.shape)
        for step in range(2):
            draw_gradients(optimizer, step)
            optimizer.step()
    torch.testing.assert_close(everything(ours), everything(theirs), rtol=2e-6, atol=2e-7)
    assert {kind[-1] for kind in ours._tables} == {1, adamw.ALIGNMENT}


@pytest.mark.parametrize("kind", ("bfloat16", "no state yet"))
def test_other_tensors_are_left_to_pytorch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_kernel", None)
    ours, theirs = optimizers((4, 6), (6,), (8,), (5,), dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    for optimizer in (ours, theirs):
        if kind == "no state yet":
            optimizer.state.clear()
        draw_gradients(optimizer, 0)
        optimizer.step()
    tolerance = 2e-2 if kind == "bfloat16" else 2e-6
    torch.testing.assert_close(everything(ours), everything(theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_what_follows_in_another_dtype_is_the_parameter_rounded(dtype: torch.dtype) -> None:
    """Some parameters have a copy, some of these a gradient in its dtype: the update is that of the same values in float32."""
    ours, theirs = optimizers(*SIZES)
    followed = all_of(ours)[::2]
    ours.rounded = {p: p.detach().to(dtype) for p in followed}
    for step in range(3):
        for optimizer in (ours, theirs):
            draw_gradients(optimizer, step)
        for index in (0, 2):
            mine, other = all_of(ours)[index], all_of(theirs)[index]
            mine.grad_dtype = None  # any
            mine.grad = mine.grad.to(dtype)
            other.grad = mine.grad.float()
        ours.step()
        theirs.step()
        for p, rounded in ours.rounded.items():  # the interpreter cuts bfloat16 off, a GPU rounds
            tolerance = 2**-7 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0
            torch.testing.assert_close(rounded, p.detach().to(dtype), rtol=tolerance, atol=0)
    torch.testing.assert_close(everything(ours), everything(theirs), rtol=2e-6, atol=2e-7)
    before = copy.deepcopy(list(ours.rounded.values()))
    ours.found_inf = torch.tensor(1.0, device=DEVICE)
    ours.step()
    assert all(map(torch.equal, ours.rounded.values(), before))


def test_pytorchs_rounds_what_follows_too() -> None:
    theirs, plain = (optimizers(*SIZES)[1] for _ in range(2))
    theirs.rounded = {p: p.detach().bfloat16() for p in all_of(theirs)}
    for optimizer in (theirs, plain):
        draw_gradients(optimizer, 0)
    for mine, other in zip(all_of(theirs), all_of(plain), strict=True):
        mine.grad_dtype, mine.grad = None, mine.grad.bfloat16()
        other.grad = mine.grad.float()
    theirs.step()
    plain.step()
    assert all(torch.equal(rounded, p.bfloat16()) for p, rounded in theirs.rounded.items())
    assert all(map(torch.equal, everything(theirs), everything(plain)))
