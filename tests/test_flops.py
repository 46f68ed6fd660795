"""The closed forms against the built model, PyTorch's FLOP counter and published figures."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configurator import ROOT, Fp8Config, ModelConfig
from flops import (
    FP8_SIDES,
    PEAKS,
    checkpoint_bytes,
    count_parameters,
    flops_per_token,
    forward_flops_per_token,
    fp8_recipes,
    loss_prediction,
    peak_tflops,
)
from kernels.reference import FP8_BLOCK
from model import Transformer

LLAMA = {"normalization": "rmsnorm", "position_encoding": "rope", "ffn_type": "swiglu", "weight_tying": False}
SMALL = {"n_layer": 2, "n_head": 6, "n_embd": 96, "block_size": 40, "vocab_size": 67}
PRESETS = {
    "arch_gpt2": ModelConfig(vocab_size=50304, normalization="layernorm_nobias", norm_position="post"),
    "arch_llama": ModelConfig(vocab_size=50304, **LLAMA),
    "arch_custom": ModelConfig(vocab_size=50304, position_encoding="rope"),
    "train_gpt2": ModelConfig(vocab_size=50304),
    "openai_gpt2": ModelConfig(vocab_size=50257, bias=True, activation="gelu_tanh"),
    "train_shakespeare_char": ModelConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, dropout=0.2),
    "full_llama_1.36b": ModelConfig(n_layer=18, n_head=18, n_embd=2304, block_size=2048, vocab_size=32000, **LLAMA),
    "full_gpt2_1.36b": ModelConfig(
        n_layer=18, n_head=19, n_embd=2432, block_size=2048, vocab_size=50304, normalization="layernorm_nobias"
    ),
}
COMBINATIONS = {
    "plain": {},
    "untied": {"weight_tying": False},
    "biases": {"bias": True},
    "biases_nobias_norm": {"bias": True, "normalization": "layernorm_nobias"},
    "post_norm": {"norm_position": "post", "bias": True},
    "no_position": {"position_encoding": "none"},
    "rope": {"position_encoding": "rope"},
    "gqa": {"n_kv_head": 2},
    "one_kv_head_biases": {"n_kv_head": 1, "bias": True},
    "qk_norm": {"qk_norm": True, "n_kv_head": 3},
    "swiglu": {"ffn_type": "swiglu", "normalization": "rmsnorm"},
    "swiglu_biases": {"ffn_type": "swiglu", "bias": True, "d_ff": 131},
    "d_ff": {"d_ff": 101},
}
CONFIGS = PRESETS | {name: ModelConfig(**SMALL, **knobs) for name, knobs in COMBINATIONS.items()}
each_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)


def build_on_meta(cfg: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(cfg)


@each_config
def test_parameters_equal_the_built_model(cfg):
    ours = count_parameters(cfg)
    built = {name: p for name, p in build_on_meta(cfg).named_parameters()}

    def of(*parts: str) -> int:
        return sum(p.numel() for name, p in built.items() if any(part in name for part in parts))

    assert ours.token_embedding == of("token_embedding")
    assert ours.position_embedding == of("position_embedding")
    assert ours.attention == of(".attention.")
    assert ours.ffn == of(".ffn.")
    assert ours.norms == of("attention_norm", "ffn_norm", "final_norm")
    assert ours.head == of("head.")
    assert ours.total == sum(p.numel() for p in built.values())
    assert checkpoint_bytes(cfg) == 12 * ours.total


@each_config
def test_flops_equal_pytorchs_count(cfg):
    """On the meta device, where attention is counted in full and fused kernels recompute nothing."""
    model = build_on_meta(cfg)
    batch = 2
    idx = torch.empty(batch, cfg.block_size, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as forward:
        loss = model(idx, idx)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    tokens = batch * cfg.block_size
    assert forward.get_total_flops() == forward_flops_per_token(cfg) * tokens
    assert forward.get_total_flops() + backward.get_total_flops() == flops_per_token(cfg) * tokens


def test_flops_of_a_shorter_context():
    cfg = PRESETS["train_gpt2"]
    shorter = dataclasses.replace(cfg, block_size=256)
    assert flops_per_token(cfg, block_size=256) == flops_per_token(shorter)
    assert flops_per_token(cfg, block_size=256, causal=True) == flops_per_token(shorter, causal=True)


@pytest.mark.parametrize(
    ("name", "total", "non_embedding"),
    [
        ("full_llama_1.36b", 1_294_159_104, 1_294_159_104 - 32_000 * 2304),
        ("full_gpt2_1.36b", 1_404_968_832, 1_404_968_832 - 2048 * 2432),
        ("openai_gpt2", 124_439_808, 124_439_808 - 1024 * 768),
        ("train_gpt2", 124_373_760, 123_587_328),  # the second is what nanoGPT prints: 123.59M
    ],
)
def test_published_parameter_counts(name, total, non_embedding):
    count = count_parameters(PRESETS[name])
    assert (count.total, count.non_embedding) == (total, non_embedding)


@pytest.mark.parametrize(
    ("name", "matmul_gf", "attention_gf", "full_gf", "causal_gf"),
    [
        ("full_llama_1.36b", 7.322, 1.019, 8.341, 7.832),
        ("full_gpt2_1.36b", 8.399, 1.076, 9.475, 8.937),
        ("train_gpt2", 0.741, 0.113, 0.855, 0.798),
    ],
)
def test_flops_per_token_table(name, matmul_gf, attention_gf, full_gf, causal_gf):
    cfg = PRESETS[name]
    matmul, full, causal = 6 * count_parameters(cfg).matmul, flops_per_token(cfg), flops_per_token(cfg, causal=True)
    assert [round(x / 1e9, 3) for x in (matmul, full - matmul, full, causal)] == [matmul_gf, attention_gf, full_gf, causal_gf]
    assert (full - matmul) == 2 * (causal - matmul)


@pytest.mark.parametrize(
    ("device_name", "dtype", "tflops"),
    [
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H20", "bfloat16", 148),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("A100-SXM4-40GB", "tf32", 156),  # older drivers leave the maker out
        ("NVIDIA B200", "bfloat16", 2250),
        ("Tesla T4", "float16", 65),
        ("Tesla T4", "bfloat16", None),  # has no such mode
        ("Tesla V100-SXM2-32GB", "float32", 15.7),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H2000", "bfloat16", None),
        ("NVIDIA H200 NVL MIG 1g.18gb", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA A100X", "bfloat16", None),
        ("", "bfloat16", None),
    ],
)
def test_peaks(device_name, dtype, tflops):
    assert peak_tflops(device_name, dtype) == tflops


def test_no_device_is_listed_twice():
    names = [name for gpu in PEAKS for name in gpu.device_names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("gpu", PEAKS, ids=lambda gpu: gpu.device_names[0])
def test_peaks_are_dense_and_consistent(gpu):
    """Tensor cores run fp8 at twice and tf32 at half of bf16's rate; a sparse figure among them would break the pattern."""
    if gpu.bfloat16:
        assert gpu.float16 == gpu.bfloat16
        assert gpu.tf32 == pytest.approx(gpu.bfloat16 / 2, rel=0.02)
    if gpu.fp8:
        assert gpu.fp8 == pytest.approx(2 * gpu.bfloat16, rel=0.02)
    assert gpu.source


@pytest.mark.parametrize("gpu", PEAKS, ids=lambda gpu: gpu.device_names[0])
def test_fp8_recipes_are_those_of_the_architecture(gpu):
    """NVIDIA's names and sources tell it. Ada and Blackwell have no scales of 128 elements, and what is older no FP8."""
    of_blocks = {fp8_recipes(f"NVIDIA {name}")[-1:] == ["block"] for name in gpu.device_names}
    assert of_blocks == {any(f"NVIDIA {name}" in gpu.source for name in ("H100", "H200", "GH200", "H20"))}
    assert [*fp8_recipes(gpu.device_names[0])][:2] == (["delayed", "current"] if gpu.fp8 else [])


def test_sides_of_fp8_are_whole_blocks():
    assert FP8_SIDES["block"] == FP8_BLOCK and set(FP8_SIDES) == set(get_args(get_type_hints(Fp8Config)["fp8_recipe"]))


@pytest.mark.parametrize(("n_parameters", "n_tokens", "loss"), [(1.294e9, 85e9, 2.37), (1.294e9, 6e9, 2.77)])
def test_loss_prediction(n_parameters, n_tokens, loss):
    assert round(loss_prediction(n_parameters, n_tokens), 2) == loss


def test_flops_needs_no_torch():
    subprocess.run([sys.executable, "-c", "import flops, sys; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)
