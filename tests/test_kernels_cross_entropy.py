"""kernels/cross_entropy.py against reference.py: losses and gradients; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernels import reference
from kernels.cross_entropy import cross_entropy, linear_cross_entropy, scale_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of the largest element
SHAPES = ((1, 1, 1), (2, 3, 7), (2, 2, 1000), (1, 3, 5003))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def some_targets(*shape: int, vocab_size: int) -> Tensor:
    targets = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))
    targets.flatten()[1::3] = -1
    return targets.to(DEVICE)


def gradients(loss_of, inputs: list[Tensor], upstream: float) -> tuple[Tensor, list[Tensor]]:
    """Inputs are copied: they are no leaves, and overwriting one does no harm."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = loss_of(*(x.clone() for x in leaves))
    return loss, list(torch.autograd.grad(loss * upstream, leaves))


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Relative to the largest element; near zero to that of which the value is a difference, about 1 in a loss."""
    floor = 1.0 if want.ndim == 0 else 0.1
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(floor)
    assert error <= tolerance, f"{error:.1e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("reduction", "upstream"), (("mean", 1.0), ("mean", 0.3), ("sum", 1.0), ("sum", 0.3)))
def test_equals_reference(shape, dtype, reduction, upstream):
    logits, targets = normal(*shape, dtype=dtype), some_targets(*shape[:-1], vocab_size=shape[-1])
    loss, (grad,) = gradients(lambda x: cross_entropy(x, targets, reduction), [logits], upstream)
    true_loss, (true_grad,) = gradients(lambda x: reference.cross_entropy(x, targets, reduction), [logits.double()], upstream)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert_close(loss, true_loss, 2e-6)
    assert_close(grad, true_grad, TOLERANCE[dtype])


def test_gradient_takes_the_place_of_the_logits():
    logits = normal(4, 50).requires_grad_() * 1
    where = logits.data_ptr()
    (grad,) = torch.autograd.grad(cross_entropy(logits, some_targets(4, vocab_size=50)), logits)
    assert grad.data_ptr() == where


@pytest.mark.parametrize("mode", ("no_grad", "no gradient wanted"))
def test_evaluation_leaves_the_logits_alone(mode):
    logits, targets = normal(4, 50).requires_grad_(mode == "no_grad"), some_targets(4, vocab_size=50)
    before = logits.detach().clone()
    with torch.set_grad_enabled(mode != "no_grad"):
        loss = cross_entropy(logits, targets)
    assert_close(loss, reference.cross_entropy(before, targets), 2e-6)
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)


def test_rows_with_gaps_between_them():
    logits, targets = normal(4, 60)[:, 5:55], some_targets(4, vocab_size=50)
    loss, (grad,) = gradients(lambda x: cross_entropy(x, targets), [logits], 1.0)
    true_loss, (true_grad,) = gradients(lambda x: reference.cross_entropy(x, targets), [logits], 1.0)
    assert_close(loss, true_loss, 2e-6)
    assert_close(grad, true_grad, 2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_infinite_logits(dtype):
    """exp(3e4) overflows; -inf is a probability of zero."""
    logits = torch.tensor([[3e4, -3e4, 0.0, -float("inf")], [-float("inf"), 1.0, 2.0, 3.0]], device=DEVICE, dtype=dtype)
    targets = torch.tensor([0, 2], device=DEVICE)
    loss, (grad,) = gradients(lambda x: cross_entropy(x, targets, "sum"), [logits], 1.0)
    true_loss, (true_grad,) = gradients(lambda x: reference.cross_entropy(x, targets, "sum"), [logits], 1.0)
    assert_close(loss, true_loss, 2e-6)
    assert_close(grad, true_grad, TOLERANCE[dtype])


def test_no_target_at_all():
    targets = torch.full((3,), -1, device=DEVICE)
    assert cross_entropy(normal(3, 7), targets).isnan()
    loss, (grad,) = gradients(lambda x: cross_entropy(x, targets, "sum"), [normal(3, 7)], 1.0)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("target", (-2, 7, 10**9))
def test_a_target_outside_the_vocabulary_makes_the_step_nan(target):
    targets = torch.tensor([1, target], device=DEVICE)
    loss, (grad,) = gradients(lambda x: cross_entropy(x, targets), [normal(2, 7)], 1.0)
    assert loss.isnan()
    assert grad[1].isnan().all() and not grad[0].isnan().any()


def test_small_float16_gradients_survive_until_the_loss_scale_arrives():
    """1/3000 of a mean over 4,000 tokens is 8e-8, a single unit of float16; times 2^16 it has all its digits."""
    logits = torch.zeros(4, 3000, device=DEVICE, dtype=torch.float16)
    targets = torch.tensor([1, 2, 3, 4], device=DEVICE)
    _, (grad,) = gradients(lambda x: cross_entropy(x, targets) / 1000, [logits], 2.0**16)
    torch.testing.assert_close(grad[0, 0].item(), 2**16 / 3000 / 4000, rtol=2**-10, atol=0)


def test_the_gradient_is_scaled_once():
    """A second backward pass would scale what is scaled already: autograd refuses."""
    logits = normal(2, 7).requires_grad_() * 1
    loss = cross_entropy(logits, some_targets(2, vocab_size=7)) * 0.5
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("factor", (1.0, 0.25, 0.0))
@pytest.mark.parametrize("n", (1, 5000))
def test_scale(factor, n):
    x = normal(n)
    want = x * factor
    scale_(x, torch.tensor(factor, device=DEVICE))
    torch.testing.assert_close(x, want, rtol=0, atol=0)


@pytest.mark.parametrize("chunk_rows", (0, 1, 4, 100))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_linear_equals_reference(chunk_rows, dtype, reduction):
    x, weight, targets = normal(2, 3, 8, dtype=dtype), normal(37, 8, dtype=dtype, seed=2) / 5, some_targets(2, 3, vocab_size=37)
    inputs = [x, weight]
    loss, grads = gradients(lambda x, w: linear_cross_entropy(x, w, targets, reduction, chunk_rows), inputs, 0.3)
    exact = [x.double() for x in inputs]
    true_loss, true_grads = gradients(lambda x, w: reference.cross_entropy(x @ w.t(), targets, reduction), exact, 0.3)
    assert_close(loss, true_loss, 2e-6 if dtype == torch.float32 else TOLERANCE[dtype])  # the logits are rounded to the dtype
    for got, want in zip(grads, true_grads, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, 3 * TOLERANCE[dtype])  # logits, their gradient and the result are each rounded


def test_linear_under_autocast_gives_a_float32_weight_gradient():
    x, weight, targets = normal(6, 8), normal(37, 8, seed=2) / 5, some_targets(6, vocab_size=37)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, grads = gradients(lambda x, w: linear_cross_entropy(x, w, targets, chunk_rows=4), [x, weight], 1.0)
    true_loss, true_grads = gradients(lambda x, w: reference.cross_entropy(x @ w.t(), targets), [x, weight], 1.0)
    assert_close(loss, true_loss, 2**-7)
    for got, want in zip(grads, true_grads, strict=True):
        assert got.dtype == torch.float32
        assert_close(got, want, 3 * 2**-7)


def test_linear_without_a_gradient():
    x, weight, targets = normal(6, 8), normal(37, 8, seed=2), some_targets(6, vocab_size=37)
    with torch.no_grad():
        loss = linear_cross_entropy(x.requires_grad_(), weight, targets, chunk_rows=4)
    assert_close(loss, reference.cross_entropy(x @ weight.t(), targets), 2e-6)
    assert not loss.requires_grad


@pytest.mark.parametrize(
    ("name", "change"),
    (
        ("logits", lambda a: a | {"logits": a["logits"].long()}),
        ("logits", lambda a: a | {"logits": a["logits"][:, :0]}),
        ("targets", lambda a: a | {"targets": a["targets"].int()}),
        ("targets", lambda a: a | {"targets": a["targets"][1:]}),
        ("logits", lambda a: a | {"logits": a["logits"].to("meta")}),
        ("reduction", lambda a: a | {"reduction": "none"}),
    ),
)
def test_bad_input_is_named(name, change):
    arguments = change({"logits": normal(4, 7), "targets": some_targets(4, vocab_size=7), "reduction": "mean"})
    with pytest.raises(ValueError, match=name):
        cross_entropy(**arguments)


def test_bad_weight_is_named():
    with pytest.raises(ValueError, match="weight"):
        linear_cross_entropy(normal(4, 8), normal(37, 9), some_targets(4, vocab_size=37))
    with pytest.raises(ValueError, match="chunk_rows"):
        linear_cross_entropy(normal(4, 8), normal(37, 8), some_targets(4, vocab_size=37), chunk_rows=-1)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: compiles for minutes on a small CPU")
@pytest.mark.parametrize("loss", ("in place", "linear"))
def test_compiles_without_a_graph_break(loss):
    x, weight, targets = normal(64, 32).bfloat16(), normal(999, 32, seed=2).bfloat16() / 5, some_targets(64, vocab_size=999)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        if loss == "linear":
            return linear_cross_entropy(x, weight, targets, chunk_rows=24)
        return cross_entropy(torch.nn.functional.linear(x, weight), targets)

    eager_loss, eager = gradients(ours, [x, weight], 0.5)
    compiled_loss, compiled = gradients(torch.compile(ours, fullgraph=True), [x, weight], 0.5)
    assert_close(compiled_loss, eager_loss, 2e-6)
    for got, want in zip(compiled, eager, strict=True):
        assert_close(got, want, 2**-7)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: 4.3 GB of logits")
def test_more_than_2_to_the_31_elements():
    n_rows, vocab_size = 2**31 // 32000 + 50, 32000
    logits = torch.zeros(n_rows, vocab_size, device=DEVICE, dtype=torch.bfloat16)
    logits[-1, 5] = 8
    targets = torch.full((n_rows,), -1, device=DEVICE)
    targets[-1] = 7
    row = logits[-1:].clone()
    loss = cross_entropy(logits.requires_grad_() * 1, targets)
    assert_close(loss, reference.cross_entropy(row, targets[-1:]), 2e-6)
