"""How transformers writes a model: its table read in both directions, and safetensors files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from configurator import ModelConfig, UserError
from hf_format import FAMILIES, TensorFolder, config_json, layout, model_config, model_type_of, write_tensors

TINY = ModelConfig(n_layer=2, n_head=4, n_embd=32, d_ff=80, block_size=16, vocab_size=61, norm_eps=2e-5, bias=True)
LLAMA = replace(TINY, normalization="rmsnorm", position_encoding="rope", ffn_type="swiglu", rope_theta=5e5, weight_tying=False)
MODELS = {
    "gpt2": TINY,
    "gpt2_untied": replace(TINY, weight_tying=False, activation="gelu_tanh"),
    "gpt2_relu_squared": replace(TINY, activation="relu_squared"),
    "llama": replace(LLAMA, bias=False),
    "llama_grouped_tied": replace(LLAMA, bias=False, n_kv_head=2, weight_tying=True),
    "llama_biased": LLAMA,
    "qwen3": replace(LLAMA, bias=False, qk_norm=True, n_kv_head=1),
    "starcoder2": replace(TINY, position_encoding="rope", n_kv_head=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_knobs_come_back(name):
    cfg = MODELS[name]
    config = json.loads(json.dumps(config_json(cfg)))
    model_type, back = model_config(config, "config.json")
    assert model_type == name.split("_")[0]
    assert back == replace(cfg, n_kv_head=0 if cfg.n_kv_head == cfg.n_head else back.n_kv_head) and back.kv_heads == cfg.kv_heads


@pytest.mark.parametrize(
    ("knobs", "lacks"),
    [
        ({"norm_position": "post"}, "gpt2, lacks norm_position=post"),
        ({"position_encoding": "none"}, "gpt2, lacks position_encoding=none"),
        ({"normalization": "rmsnorm"}, "gpt2, lacks normalization=rmsnorm"),
        ({"n_kv_head": 2}, "gpt2, lacks n_kv_head=2"),
        ({"qk_norm": True}, "gpt2, lacks qk_norm=True"),
        ({"position_encoding": "rope", "ffn_type": "swiglu"}, "llama, lacks normalization=layernorm"),
        (
            {"normalization": "rmsnorm", "position_encoding": "rope", "ffn_type": "swiglu", "qk_norm": True},
            "llama, lacks qk_norm",
        ),
    ],
)
def test_what_transformers_has_not_is_named(knobs, lacks):
    with pytest.raises(UserError, match=lacks):
        model_type_of(replace(TINY, **knobs))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("gpt2", {"model_type": "bert"}, "model_type='bert' is not one of gpt2, llama"),
        ("gpt2", {"model_type": None}, "model_type=None is not one of"),
        ("gpt2", {"activation_function": "tanh"}, "activation 'tanh'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling 'llama3'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling 'yarn'"),
        ("llama", {"head_dim": 16}, "head_dim=16, where n_embd/n_head is 8"),
        ("llama", {"sliding_window": 8}, "sliding_window=8"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"n_layer": 3, "num_hidden_layers": "two"}, "num_hidden_layers='two' is not an int"),
        ("gpt2", {"n_head": 0}, "n_head=0 must be greater than 0"),
        ("gpt2", {"n_head": -2}, "n_head=-2 must be greater than 0"),
        ("gpt2", {"n_head": 5}, "n_head=5 does not divide n_embd=32"),
        ("gpt2", {"n_inner": "x"}, "n_inner='x' is not an int"),
        ("gpt2", {"n_inner": 3.5}, "n_inner=3.5 is not an int"),
        ("gpt2", {"activation_function": ["gelu"]}, r"activation_function=\['gelu'\] is not a str"),
        ("gpt2", {"model_type": ["gpt2"]}, r"model_type=\['gpt2'\] is not one of"),
        ("gpt2", {"vocab_size": 0, "n_positions": -4}, "n_positions=-4 must be .*\nconfig.json: vocab_size=0 must be"),
        ("gpt2", {"layer_norm_epsilon": "x"}, "layer_norm_epsilon='x' is not a float"),
        ("gpt2", {"layer_norm_epsilon": None}, "layer_norm_epsilon=None is not a float"),
        ("gpt2", {"layer_norm_epsilon": -1e-5}, "norm_eps=-1e-05 must be greater than 0"),
        ("gpt2", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no' is not a bool"),
        ("llama", {"attention_bias": "no"}, "attention_bias='no' is not a bool"),
        ("llama", {"rope_parameters": [1]}, r"\[1\] is not an object with the parameters of the rotary positions"),
        ("llama", {"rope_scaling": "x"}, "'x' is not an object with the parameters of the rotary positions"),
        ("llama", {"rope_theta": None}, "rope_theta=None is not a float"),
        ("llama", {"num_key_value_heads": 3}, "n_kv_head=3 does not divide n_head=4"),
    ],
)
def test_what_we_have_not_is_named(name, change, says):
    with pytest.raises(UserError, match=says):
        model_config(config_json(MODELS[name]) | change, "config.json")


@pytest.mark.parametrize(("window", "block_size", "fits"), [(16, None, True), (15, None, False), (8, 8, True), (8, 9, False)])
def test_a_window_as_long_as_the_context_is_none(window, block_size, fits):
    config = config_json(MODELS["llama"]) | {"model_type": "mistral", "sliding_window": window}
    if fits:
        assert model_config(config, "config.json", block_size)[1] == replace(MODELS["llama"], n_kv_head=4)
    else:
        with pytest.raises(UserError, match=f"sliding_window={window}"):
            model_config(config, "config.json", block_size)


def test_a_field_that_is_not_there_is_named():
    config = config_json(MODELS["llama"])
    del config["hidden_size"], config["vocab_size"]
    with pytest.raises(UserError, match=r"config\.json does not say hidden_size, vocab_size"):
        model_config(config, "config.json")


# --- safetensors -------------------------------------------------------------------------------------------------------

TENSORS = {f"layer.{i}.{'weight' * (i + 1)}": torch.randn(3 + i, 5, generator=torch.Generator().manual_seed(i)) for i in range(6)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize(("dtype", "shard_bytes", "files"), [("float32", 10**9, 1), ("bfloat16", 100, 5), ("float16", 1, 6)])
def test_files_are_those_of_the_safetensors_library(tmp_path, dtype, shard_bytes, files):
    dtype = getattr(torch, dtype)
    write_tensors(tmp_path, SHAPES, dtype, TENSORS.__getitem__, shard_bytes)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) == files
    expected = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    library = {name: t for file in names for name, t in safetensors.torch.load_file(tmp_path / file).items()}
    ours = TensorFolder(tmp_path)
    for name, tensor in expected.items():
        assert torch.equal(library[name], tensor) and torch.equal(ours.read(name), tensor)
    if files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        assert {name: file for file in names for name in safetensors.torch.load_file(tmp_path / file)} == index["weight_map"]
        assert all(
            sum(t.nbytes for t in safetensors.torch.load_file(tmp_path / f).values()) <= max(shard_bytes, 80) for f in names
        )


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (Path.unlink, "model-00002-of-00005.safetensors is missing; copy or download it again"),
        (damage, "model-00002-of-00005.safetensors is damaged"),
        (lambda path: path.with_name("model.safetensors.index.json").write_text("{"), "index.json is damaged"),
        (lambda path: path.with_name("model.safetensors.index.json").unlink(), "only safetensors are read"),
    ],
)
def test_files_that_are_missing_or_torn(tmp_path, change, says):
    write_tensors(tmp_path, SHAPES, torch.bfloat16, TENSORS.__getitem__, 100)
    change(tmp_path / "model-00002-of-00005.safetensors")
    with pytest.raises(UserError, match=says):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda shapes: shapes.pop("transformer.ln_f.weight"), r"transformer.ln_f.weight: missing, not \[32\]"),
        (
            lambda shapes: shapes.update({"transformer.wte.weight": (60, 32)}),
            r"transformer.wte.weight: \[60, 32\], not \[61, 32\]",
        ),
        (lambda shapes: shapes.update({"adapter.weight": (2, 2)}), r"adapter.weight: \[2, 2\], not in this model"),
    ],
)
def test_tensors_that_are_not_those_of_the_config(tmp_path, change, says):
    cfg = MODELS["gpt2"]
    tensors = list(layout(FAMILIES["gpt2"], cfg, config_json(cfg)))
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    write_tensors(tmp_path, shapes, torch.float32, lambda name: torch.zeros(shapes[name]), 10**9)
    TensorFolder(tmp_path).check(tensors)
    change(shapes)
    write_tensors(tmp_path, shapes, torch.float32, lambda name: torch.zeros(shapes[name]), 10**9)
    with pytest.raises(UserError, match=says):
        TensorFolder(tmp_path).check(tensors)


def test_masks_and_a_tied_head_of_older_folders_are_no_surprise(tmp_path):
    cfg = MODELS["gpt2"]
    tensors = list(layout(FAMILIES["gpt2"], cfg, config_json(cfg)))
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    shapes |= {"transformer.h.0.attn.bias": (1, 1, 16, 16), "transformer.h.0.attn.masked_bias": (1,), "lm_head.weight": (61, 32)}
    write_tensors(tmp_path, shapes, torch.float32, lambda name: torch.zeros(shapes[name]), 10**9)
    TensorFolder(tmp_path).check(tensors)
