"""The optimizer: schedules against their formulas, the guarded update against textbook AdamW."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from configurator import OptimConfig
from kernels.reference import AdamW
from optim import Gradients, build_optimizer, describe_groups, learning_rate, optimizer_tensors, update

ONE = torch.ones(())


def config(**knobs) -> OptimConfig:
    return OptimConfig(
        **{"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 10, "lr_decay_iters": 110, "max_iters": 200} | knobs
    )


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 1e-3 / 11),
        ("cosine", 9, 1e-3 * 10 / 11),
        ("cosine", 10, 1e-3),
        ("cosine", 60, 5.5e-4),
        ("cosine", 35, 1e-4 + 0.5 * (1 + math.cos(math.pi / 4)) * 9e-4),
        ("cosine", 110, 1e-4),
        ("cosine", 199, 1e-4),
        ("linear", 60, 5.5e-4),
        ("linear", 35, 1e-3 - 0.25 * 9e-4),
        ("wsd", 87, 1e-3),
        ("wsd", 99, 5.5e-4),
        ("wsd", 110, 1e-4),
        ("constant", 5, 1e-3 * 6 / 11),
        ("constant", 150, 1e-3),
    ],
)
def test_schedules(schedule, step, expected):
    assert learning_rate(step, config(lr_schedule=schedule)) == pytest.approx(expected, rel=1e-12)


def test_no_decay_means_no_warmup_either():
    assert {learning_rate(step, config(decay_lr=False)) for step in range(200)} == {1e-3}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = nn.Parameter(torch.randn(5, 7, generator=generator))
        self.vector = nn.Parameter(torch.randn(7, generator=generator))


def moving(net: Net, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    parameters = dict(net.named_parameters())
    return parameters | optimizer_tensors(parameters, optimizer)


def set_gradients(net: Net, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(2)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * factor


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("grad_clip", [0.0, 0.5, 1e3])
def test_update_is_adamw_with_clipping(scale, grad_clip):
    cfg, net, reference = config(grad_clip=grad_clip), Net(), Net()
    optimizer = build_optimizer(net.parameters(), cfg, AdamW)
    groups = [{"params": [reference.matrix], "weight_decay": 0.1}, {"params": [reference.vector], "weight_decay": 0.0}]
    textbook = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(3):
        set_gradients(net, scale * (step + 1))
        result = update(optimizer, cfg, 1e-3, torch.tensor(scale), with_moments=True)
        set_gradients(reference, step + 1)
        everything = torch.cat([p.grad.flatten() for p in reference.parameters()])
        torch.testing.assert_close(result.norm, everything.norm())
        torch.testing.assert_close(result.moments, (everything.mean(), everything.std(correction=0)))
        if grad_clip:
            nn.utils.clip_grad_norm_(reference.parameters(), grad_clip)
        textbook.step()
    torch.testing.assert_close(net.matrix, reference.matrix, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.vector, reference.vector, rtol=1e-5, atol=1e-6)
    assert net.matrix.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    cfg, net = config(), Net()
    optimizer = build_optimizer(net.parameters(), cfg, AdamW)
    set_gradients(net)
    update(optimizer, cfg, 1e-3, ONE, with_moments=False)
    before = {name: t.clone() for name, t in moving(net, optimizer).items()}
    set_gradients(net)
    net.vector.grad[3] = bad
    assert update(optimizer, cfg, 1e-3, ONE, with_moments=False).overflow == 1
    after = moving(net, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    set_gradients(net)
    assert update(optimizer, cfg, 1e-3, ONE, with_moments=False).overflow == 0
    assert not torch.equal(before["matrix"], net.matrix)


def test_a_rank_without_rows_takes_part():
    """More ranks than a matrix has rows: the norm is the others', and so is its mean."""
    rows = nn.Parameter(torch.empty(0, 7))
    optimizer = build_optimizer([rows], config(), AdamW)
    gradients = Gradients([], n_elements=12, total=lambda own: own + 6.0)
    result = update(optimizer, config(), 1e-3, torch.ones(()), with_moments=True, gradients=gradients)
    assert result.norm.item() == pytest.approx(6**0.5) and result.overflow.item() == 0
    assert [moment.item() for moment in result.moments] == pytest.approx([0.5, 0.5])  # 6 / 12 each: std^2 = 6 / 12 - 0.5^2


def test_vectors_do_not_decay_and_the_report_says_so():
    net = Net()
    optimizer = build_optimizer(net.parameters(), config(weight_decay=0.3), AdamW)
    assert [(g["weight_decay"], [p.dim() for p in g["params"]]) for g in optimizer.param_groups] == [(0.3, [2]), (0.0, [1])]
    assert describe_groups(net, config(weight_decay=0.3)) == [
        "num decayed parameter tensors: 1, with 35 parameters",
        "num non-decayed parameter tensors: 1, with 7 parameters",
    ]


def test_moments_lie_in_one_piece_of_memory():
    """Each at a place where a GPU reads fast; a rank may have no rows of a matrix."""
    tensors = [torch.ones(shape, requires_grad=True) for shape in ((3, 5), (7,), (0, 4), (64,), (2, 2))]
    optimizer = build_optimizer(tensors, config(), AdamW)
    for name in ("exp_avg", "exp_avg_sq"):
        moments = [optimizer.state[p][name] for p in tensors]
        assert len({moment.untyped_storage().data_ptr() for moment in moments}) == 1
        assert [moment.storage_offset() for moment in moments] == [0, 64, 128, 128, 192]
        assert all(moment.shape == p.shape and not moment.any() for moment, p in zip(moments, tensors, strict=True))


def test_state_is_there_before_the_first_step():
    net = Net()
    names = {f"optim.{p}.{key}" for p in ("matrix", "vector") for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(optimizer_tensors(dict(net.named_parameters()), build_optimizer(net.parameters(), config(), AdamW))) == names
