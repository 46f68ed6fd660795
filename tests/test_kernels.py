"""kernels/reference.py against each formula written out in float64, values and gradients, and its behaviour in low precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import kernels
from configurator import KernelConfig, ModelConfig
from kernels import reference
from model import Transformer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {
    torch.float32: 4e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # of the largest element: a unit in its last place
SHAPES = ((1, 1, 3), (2, 3, 7), (1, 5, 768), (2, 4, 100))
EPS = 1e-5


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return weight * centered / (centered.square().mean(-1, keepdim=True) + EPS).sqrt() + (0 if bias is None else bias)


def naive_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def naive_swiglu(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    return gate / (1 + torch.exp(-gate)) * up


def naive_gelu(x: Tensor) -> Tensor:
    return x * torch.distributions.Normal(0.0, 1.0).cdf(x)


def naive_gelu_tanh(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def naive_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pair by pair, as a complex product."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1)


def naive_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over the targets that are not -1."""
    losses = [
        torch.log(torch.exp(row).sum()) - row[t]
        for row, t in zip(logits.flatten(0, -2), targets.flatten(), strict=True)
        if t >= 0
    ]
    return torch.stack(losses).sum()


def assert_equal_to_float64(ours, naive, inputs: list[Tensor], tolerance: float) -> None:
    """Value and every gradient, relative to the largest element."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y, truth = ours(*inputs), naive(*exact)
    grad = normal(*y.shape, dtype=y.dtype, seed=9)
    y.backward(grad)
    truth.backward(grad.double())
    for name, got, want in (
        ("value", y, truth),
        *((f"gradient {i}", a.grad, b.grad) for i, (a, b) in enumerate(zip(inputs, exact, strict=True))),
    ):
        error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-3)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", (True, False))
def test_layer_norm(shape, dtype, bias):
    weights = [normal(shape[-1], seed=2), normal(shape[-1], seed=3)][: 1 + bias]
    assert_equal_to_float64(
        lambda x, w, b=None: reference.layer_norm(x, w, b, EPS),
        lambda x, w, b=None: naive_layer_norm(x, w, b),
        [normal(*shape, dtype=dtype), *weights],
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(shape, dtype):
    inputs = [normal(*shape, dtype=dtype), normal(shape[-1], seed=2)]
    assert_equal_to_float64(lambda x, w: reference.rms_norm(x, w, EPS), naive_rms_norm, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("scale", (1e-3, 1.0, 1e4))
def test_rms_norm_is_llamas(scale):
    theirs = LlamaRMSNorm(96, eps=EPS)
    theirs.weight.data = normal(96, seed=2)
    x = normal(4, 96) * scale
    torch.testing.assert_close(reference.rms_norm(x, theirs.weight, EPS), theirs(x), rtol=1e-6, atol=1e-6)


def test_norm_statistics_do_not_overflow_in_float16():
    x = torch.full((2, 64), 3e4, dtype=torch.float16)  # its square is far beyond float16's 65,504
    torch.testing.assert_close(reference.rms_norm(x, torch.ones(64), EPS), torch.ones_like(x))
    torch.testing.assert_close(reference.layer_norm(x, torch.ones(64), None, EPS), torch.zeros_like(x))


@pytest.mark.parametrize("shape", ((1, 1, 2), (2, 3, 14), (1, 5, 1024)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(shape, dtype):
    assert_equal_to_float64(reference.swiglu, naive_swiglu, [normal(*shape, dtype=dtype)], TOLERANCE[dtype])


@pytest.mark.parametrize("gelu", ((reference.gelu, naive_gelu), (reference.gelu_tanh, naive_gelu_tanh)), ids=("exact", "tanh"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu(gelu, dtype):
    assert_equal_to_float64(*gelu, [3 * normal(5, 100, dtype=dtype)], TOLERANCE[dtype])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), ((1, 1, 2), (4, 2, 6), (3, 3, 64)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(heads, kv_heads, head_dim, dtype):
    angle = torch.outer(torch.arange(5.0), 0.3 ** torch.arange(head_dim // 2))
    cos, sin = angle.cos(), angle.sin()
    q, k = normal(2, 5, heads, head_dim, dtype=dtype), normal(2, 5, kv_heads, head_dim, dtype=dtype, seed=1)
    for i, x in enumerate((q, k)):
        assert_equal_to_float64(
            lambda x, i=i: reference.rope(*((x, k) if i == 0 else (q, x)), cos, sin)[i],
            lambda x: naive_rope(x, cos.double(), sin.double()),
            [x],
            TOLERANCE[dtype],
        )


def test_rope_is_llamas():
    q, k = normal(2, 5, 4, 6), normal(2, 5, 2, 6, seed=1)
    angle = torch.outer(torch.arange(5.0), 0.3 ** torch.arange(3))
    ours = reference.rope(q, k, angle.cos(), angle.sin())
    twice = torch.cat((angle, angle), dim=-1)[None]
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), twice.cos(), twice.sin())
    torch.testing.assert_close(ours, tuple(x.transpose(1, 2) for x in theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", ((1, 1, 1), (2, 3, 7), (4, 5, 1000)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_cross_entropy(shape, dtype, reduction):
    logits = normal(*shape, dtype=dtype)
    targets = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(1))
    targets.flatten()[1::3] = -1
    valid = int((targets >= 0).sum()) if reduction == "mean" else 1
    loss = reference.cross_entropy(logits, targets, reduction)
    assert loss.dtype == torch.float32
    assert_equal_to_float64(
        lambda x: reference.cross_entropy(x, targets, reduction),
        lambda x: naive_cross_entropy(x, targets) / valid,
        [logits],
        TOLERANCE[dtype],
    )


def test_cross_entropy_of_large_logits_is_finite():
    logits = torch.tensor([[[3e4, -3e4, 0.0]]], dtype=torch.float16)
    loss = reference.cross_entropy(logits, torch.tensor([[1]]))
    assert loss.item() == pytest.approx(6e4, rel=1e-3)


def test_cross_entropy_of_no_target_is_nan_as_a_mean_and_zero_as_a_sum():
    logits, targets = normal(1, 2, 3), torch.full((1, 2), -1)
    assert math.isnan(reference.cross_entropy(logits, targets))
    assert reference.cross_entropy(logits, targets, "sum") == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype):
    x, w = normal(2, 3, 4, 8, dtype=dtype), normal(8, seed=2)
    cos, sin = normal(3, 4, seed=3), normal(3, 4, seed=4)

    def everything() -> list[Tensor]:
        norms = [reference.layer_norm(x, w, w, EPS), reference.rms_norm(x, w, EPS)]
        return [*norms, reference.swiglu(x), reference.gelu(x), reference.gelu_tanh(x), *reference.rope(x, x, cos, sin)]

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = everything()
    for a, b in zip(plain, under_autocast, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_choose_takes_the_reference_where_nothing_is_asked_for() -> None:
    ops, chosen = kernels.choose(vars(KernelConfig()), "cpu")
    assert ops == kernels.REFERENCE and set(chosen.values()) == {"torch"} and chosen.keys() == vars(KernelConfig()).keys()


def test_triton_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="--swiglu_kernel=triton needs a GPU"):
        kernels.choose(vars(KernelConfig(swiglu_kernel="triton")), "cpu")


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        {"normalization": "layernorm", "ffn_type": "swiglu"},
        {"normalization": "rmsnorm", "activation": "gelu"},
        {"normalization": "rmsnorm", "activation": "gelu_tanh", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_model_of_triton_kernels_is_the_same_model(parts: dict[str, Any], qk_norm: bool) -> None:
    sizes = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=24, block_size=8, vocab_size=32, position_encoding="rope")
    cfg = ModelConfig(**sizes, **parts, bias=True, qk_norm=qk_norm)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(32, (2, 2, 8), generator=torch.Generator().manual_seed(0)).to(device)
    gradients = []
    for ops in (kernels.REFERENCE, kernels.triton_kernels()):
        model = Transformer(cfg, ops).to(device)
        model.init_weights(seed=1)
        loss = model(ids[0], ids[1])
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 3, 6, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_in_chunks_is_the_one_of_all_rows(chunk_rows: int, reduction: reference.Reduction) -> None:
    x, weight = normal(2, 3, 4), normal(11, 4, seed=2)
    targets = torch.tensor([[1, -1, 10], [0, 5, -1]])
    results = []
    for rows in (0, chunk_rows):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = reference.linear_cross_entropy(*leaves, targets, reduction, rows)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0][0], reference.cross_entropy(x @ weight.t(), targets, reduction))
