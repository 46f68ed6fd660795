"""The model: equal to transformers' GPT-2 and LLaMA, right in every combination; its cache and initialisation."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from configurator import ModelConfig
from model import KVCache, Transformer

LLAMA = {"normalization": "rmsnorm", "position_encoding": "rope", "ffn_type": "swiglu", "weight_tying": False}
GPT2 = {"bias": True, "activation": "gelu_tanh"}
TINY = ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=61)


def build(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """The way a run builds it: shapes first, storage and values after."""
    with torch.device("meta"):
        model = Transformer(cfg)
    model.to_empty(device="cpu").init_weights(seed)
    return model


def tokens(cfg: ModelConfig, batch: int = 2, length: int | None = None, seed: int = 0) -> Tensor:
    return torch.randint(cfg.vocab_size, (batch, length or cfg.block_size), generator=torch.Generator().manual_seed(seed))


def gradients(model: Transformer, idx: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(idx, idx.roll(-1, 1)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# Equal to transformers
# ---------------------------------------------------------------------------------------------------------------------


def copy_weights(model: Transformer, theirs: dict[str, Tensor], names: dict[str, str | tuple[str, ...]], transpose: bool) -> None:
    """Fill each parameter from theirs: `names` maps our names to one or several (concatenated) of theirs, {i} is the layer."""
    for name, parameter in model.named_parameters():
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        plain = name.replace(f"blocks.{layer}.", "")
        sources = (names[plain],) if isinstance(names[plain], str) else names[plain]
        parts = [theirs[source.replace("{i}", layer)] for source in sources]
        value = torch.cat([part.T if transpose and part.ndim == 2 and layer else part for part in parts])
        assert value.shape == parameter.shape, name
        parameter.data.copy_(value)


GPT2_NAMES = {
    "token_embedding.weight": "transformer.wte.weight",
    "position_embedding.weight": "transformer.wpe.weight",
    **{
        f"{ours}.{kind}": f"transformer.h.{{i}}.{theirs}.{kind}"
        for kind in ("weight", "bias")
        for ours, theirs in (
            ("attention_norm", "ln_1"),
            ("attention.qkv", "attn.c_attn"),
            ("attention.out", "attn.c_proj"),
            ("ffn_norm", "ln_2"),
            ("ffn.up", "mlp.c_fc"),
            ("ffn.out", "mlp.c_proj"),
        )
    },
    "final_norm.weight": "transformer.ln_f.weight",
    "final_norm.bias": "transformer.ln_f.bias",
}
LLAMA_NAMES = {
    "token_embedding.weight": "model.embed_tokens.weight",
    "attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "attention.qkv.weight": tuple(f"model.layers.{{i}}.self_attn.{x}_proj.weight" for x in "qkv"),
    "attention.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "attention.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    "attention.out.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "ffn.up.weight": tuple(f"model.layers.{{i}}.mlp.{x}_proj.weight" for x in ("gate", "up")),
    "ffn.out.weight": "model.layers.{i}.mlp.down_proj.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def llama_shape(cfg: ModelConfig) -> dict:
    return {
        **{"num_hidden_layers": cfg.n_layer, "num_attention_heads": cfg.n_head, "num_key_value_heads": cfg.kv_heads},
        **{"hidden_size": cfg.n_embd, "intermediate_size": cfg.ffn_hidden, "max_position_embeddings": cfg.block_size},
        **{"vocab_size": cfg.vocab_size, "rms_norm_eps": cfg.norm_eps, "tie_word_embeddings": cfg.weight_tying},
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
    }


def randomise(module: torch.nn.Module) -> dict[str, Tensor]:
    """Random norms and biases too, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.data.copy_(noise if parameter.ndim == 2 else parameter.data + noise)
    return module.state_dict()


def assert_same_logits(model: Transformer, theirs: torch.nn.Module, idx: Tensor) -> None:
    with torch.no_grad():
        difference = (model.eval()(idx) - theirs.eval()(idx).logits).abs().max()
    assert difference <= 1e-5


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"),
    [(2, 4, 32, 16, 61), (3, 1, 24, 33, 257), (1, 12, 768, 128, 5003), (12, 6, 96, 64, 1000)],
)
def test_logits_equal_gpt2(n_layer, n_head, n_embd, block_size, vocab_size):
    cfg = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size, **GPT2)
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": block_size, "vocab_size": vocab_size}
    theirs = GPT2LMHeadModel(GPT2Config(**shape))
    model = build(cfg)
    copy_weights(model, randomise(theirs), GPT2_NAMES, transpose=True)
    assert_same_logits(model, theirs, tokens(cfg))


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_kv_head", "n_embd", "d_ff", "block_size", "vocab_size", "theta", "tied"),
    [
        (2, 4, 4, 32, 0, 16, 61, 1e4, False),
        (2, 4, 2, 32, 0, 16, 61, 1e4, True),
        (3, 6, 1, 48, 131, 33, 257, 5e5, False),
        (1, 18, 6, 2304, 6144, 256, 1001, 1e4, False),
        (12, 6, 3, 96, 0, 512, 1000, 1e6, True),
    ],
)
def test_logits_equal_llama(n_layer, n_head, n_kv_head, n_embd, d_ff, block_size, vocab_size, theta, tied):
    cfg = ModelConfig(
        **LLAMA | {"weight_tying": tied},
        **{"n_layer": n_layer, "n_head": n_head, "n_kv_head": n_kv_head, "n_embd": n_embd, "d_ff": d_ff},
        **{"block_size": block_size, "vocab_size": vocab_size, "rope_theta": theta},
    )
    theirs = LlamaForCausalLM(LlamaConfig(**llama_shape(cfg)))
    model = build(cfg)
    copy_weights(model, randomise(theirs), LLAMA_NAMES, transpose=False)
    assert_same_logits(model, theirs, tokens(cfg))


@pytest.mark.parametrize("n_kv_head", (1, 4))
def test_qk_norm_is_qwen3s(n_kv_head):
    cfg = replace(TINY, n_kv_head=n_kv_head, qk_norm=True, **LLAMA)
    theirs = Qwen3ForCausalLM(Qwen3Config(**llama_shape(cfg), head_dim=cfg.head_dim))
    model = build(cfg)
    copy_weights(model, randomise(theirs), LLAMA_NAMES, transpose=False)
    assert_same_logits(model, theirs, tokens(cfg))


# ---------------------------------------------------------------------------------------------------------------------
# Every combination
# ---------------------------------------------------------------------------------------------------------------------

STANDARD = [("standard", activation) for activation in ("gelu", "gelu_tanh", "relu", "silu", "relu_squared")]
OPTIONS = list(itertools.product((False, True), repeat=4))  # bias, weight_tying, qk_norm, grouped-query attention


def combinations() -> list:
    """Every combination; of the activations beside GELU, which meet the options nowhere, only the plain ones."""
    components = itertools.product(
        ("layernorm", "layernorm_nobias", "rmsnorm"),
        ("learned_absolute", "rope", "none"),
        ("pre", "post"),
        [*STANDARD, ("swiglu", "gelu")],
    )
    params = []
    for normalization, position, norm_position, (ffn_type, activation) in components:
        for bias, tying, qk_norm, grouped in OPTIONS if activation == "gelu" else OPTIONS[:1]:
            cfg = replace(TINY, normalization=normalization, position_encoding=position, norm_position=norm_position)
            cfg = replace(cfg, ffn_type=ffn_type, activation=activation, bias=bias, weight_tying=tying, qk_norm=qk_norm)
            options = [
                name for name, on in zip(("bias", "tied", "qk", "gqa"), (bias, tying, qk_norm, grouped), strict=True) if on
            ]
            name = "-".join((cfg.architecture.split("D-")[1], *options))
            params.append(pytest.param(replace(cfg, n_kv_head=2 if grouped else 0), id=name))
    return params


@pytest.mark.parametrize("cfg", combinations())
def test_every_combination_learns_and_is_causal(cfg: ModelConfig):
    model, idx = build(cfg), tokens(cfg)
    targets = idx.roll(-1, 1)
    fresh = model(idx, targets).item()
    assert fresh == pytest.approx(math.log(cfg.vocab_size), abs=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(idx, targets).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    with torch.no_grad():
        assert model(idx, targets).item() < fresh
        other = idx.clone()
        other[:, 8:] = (idx[:, 8:] + 1) % cfg.vocab_size
        before, after = model(idx), model(other)
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=1e-6)
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "knobs", [GPT2, LLAMA, LLAMA | {"qk_norm": True, "bias": True}], ids=("gpt2", "llama", "llama_qk_norm_bias")
)
@pytest.mark.parametrize("n_kv_head", (1, 2))
def test_grouped_query_attention_is_repeated_key_value_heads(knobs, n_kv_head):
    grouped_cfg = replace(TINY, n_kv_head=n_kv_head, **knobs)
    full_cfg = replace(grouped_cfg, n_kv_head=0)
    grouped, full = build(grouped_cfg), build(full_cfg)
    H, D = TINY.n_head, TINY.head_dim

    def repeated(qkv: Tensor) -> Tensor:
        q, k, v = (part.unflatten(0, (-1, D)) for part in qkv.split((H * D, n_kv_head * D, n_kv_head * D)))
        return torch.cat((q, *(part.repeat_interleave(H // n_kv_head, 0) for part in (k, v)))).flatten(0, 1)

    weights = {name: repeated(w) if "qkv" in name else w for name, w in grouped.state_dict().items()}
    full.load_state_dict(weights)
    idx = tokens(TINY)
    torch.testing.assert_close(grouped(idx), full(idx), rtol=0, atol=1e-6)


@pytest.mark.parametrize("knobs", [GPT2, LLAMA, GPT2 | {"norm_position": "post"}], ids=("gpt2", "llama", "post"))
@pytest.mark.parametrize("dropout", (0.0, 0.2))
def test_gradient_checkpointing_is_bitwise(knobs, dropout):
    cfg = replace(TINY, dropout=dropout, **knobs)
    results = []
    for recompute in (False, True):
        model = build(replace(cfg, gradient_checkpointing=recompute))
        torch.manual_seed(5)
        results.append(gradients(model, tokens(cfg)))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_gradient_checkpointing_recomputes():
    calls = 0
    model = build(replace(TINY, gradient_checkpointing=True))

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    model.blocks[0].attention.qkv.register_forward_hook(count)
    gradients(model, tokens(TINY))
    assert calls == 2


@pytest.mark.parametrize("place", ("embedding", "attention", "residual"))
def test_dropout_acts_in_training_only(place):
    """Each of the three kinds on its own, the others switched off."""
    model, idx = build(replace(TINY, dropout=0.5)), tokens(TINY)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and (place == "attention" or (place == "residual") == (module is model.dropout)):
            module.p = 0.0
        if hasattr(module, "qkv") and place != "attention":
            module.dropout = 0.0
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_loss_ignores_minus_one_and_sums():
    model, idx = build(TINY), tokens(TINY)
    targets = idx.roll(-1, 1)
    targets[:, -1] = -1
    logits = model(idx)
    each = -logits[:, :-1].log_softmax(-1).gather(-1, targets[:, :-1, None])
    torch.testing.assert_close(model(idx, targets), each.mean())
    torch.testing.assert_close(model(idx, targets, reduction="sum"), each.sum())


def test_bf16_autocast_keeps_parameters_and_loss_in_float32():
    cfg = replace(TINY, **LLAMA)
    model, idx = build(cfg), tokens(cfg)
    exact = model(idx, idx)
    stream = []
    model.blocks[0].register_forward_hook(lambda module, args, output: stream.append(output[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx)
    loss.backward()
    assert stream == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), abs=0.02)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiles_as_one_graph():
    cfg = replace(TINY, n_layer=1, n_kv_head=2, gradient_checkpointing=True, **LLAMA)
    model, idx = build(cfg), tokens(cfg)
    eager = gradients(model, idx)
    model.zero_grad()
    torch.compile(model, fullgraph=True)(idx, idx.roll(-1, 1)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, eager[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Construction and initialisation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs", [GPT2, LLAMA, LLAMA | {"norm_position": "post", "weight_tying": True}], ids=("gpt2", "llama", "post")
)
def test_initialisation_is_gpt2s(knobs):
    cfg = replace(TINY, n_layer=8, n_embd=128, vocab_size=512, **knobs)
    for name, parameter in build(cfg).named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith(".out.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name


def test_initialisation_depends_on_seed_and_name_alone():
    two, three = (dict(build(replace(TINY, n_layer=2 * n, vocab_size=61 + n)).named_parameters()) for n in (1, 2))
    other_seed = dict(build(TINY, seed=1).named_parameters())
    same = "blocks.1.attention.qkv.weight"
    assert torch.equal(two[same], three[same])  # whatever else is in the model
    assert not torch.equal(two[same], other_seed[same])
    assert not torch.equal(two[same], two["blocks.0.attention.qkv.weight"])


@pytest.mark.parametrize("knobs", [GPT2, LLAMA], ids=("gpt2", "llama"))
def test_a_model_from_meta_equals_one_built_in_place(knobs):
    cfg = replace(TINY, **knobs)
    model = Transformer(cfg)
    model.init_weights(0)
    assert torch.equal(model(tokens(cfg)), build(cfg)(tokens(cfg)))


def test_rotary_tables_are_not_saved_but_survive():
    model = build(replace(TINY, **LLAMA))
    assert not [name for name in model.state_dict() if "rope" in name]
    assert model.rope_cos.dtype == torch.float32
    angle = 7 * 10_000 ** (-2 / 8)  # position 7, second of the four pairs of a head of 8
    assert model.rope_cos[7, 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert model.rope_sin[7, 1].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_tied_head_is_the_token_embedding():
    """One parameter, reached by gradients from both ends, after the way through the meta device too."""
    model = build(TINY)
    assert not [name for name in model.state_dict() if "head" in name]
    unused = torch.zeros(1, 4, dtype=torch.int64)  # only id 0 is looked up: the other rows' gradients come from the head
    model(unused, unused).backward()
    grad = model.token_embedding.weight.grad
    assert (grad[1:].abs().sum(dim=1) > 0).all()
    with torch.no_grad():
        before = model(unused)[..., 5].clone()
        model.token_embedding.weight[5] += 1.0
        assert not torch.equal(model(unused)[..., 5], before)


def test_shard_units_are_the_blocks():
    model = build(TINY)
    assert model.shard_units() == list(model.blocks)


# ---------------------------------------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------------------------------------

GENERATING = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "no_position": {"position_encoding": "none"},
    "grouped": LLAMA | {"n_kv_head": 2, "qk_norm": True},
    "recomputing": LLAMA | {"gradient_checkpointing": True},
    "one_kv_head_post": GPT2 | {"n_kv_head": 1, "norm_position": "post", "weight_tying": False},
}
each_generating = pytest.mark.parametrize("knobs", GENERATING.values(), ids=GENERATING)


def lively(cfg: ModelConfig) -> Transformer:
    """Weights large enough that the tokens differ: a fresh model's logits are nearly flat."""
    model = build(cfg).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return model


@each_generating
@pytest.mark.parametrize("pieces", ([1] * 16, [16], [9, 1, 1, 5], [3, 13]), ids=str)
def test_cached_logits_equal_the_full_forward(knobs, pieces):
    cfg = replace(TINY, **knobs)
    model, idx, cache = lively(cfg), tokens(cfg), KVCache(cfg)
    cached = torch.cat([model(piece, cache=cache) for piece in idx.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(cached, model(idx), rtol=1e-5, atol=1e-5)
    assert cache.length == 16


def test_a_context_beyond_block_size_is_refused():
    model, cache = build(TINY), KVCache(TINY)
    with pytest.raises(ValueError, match="17 tokens"):
        model(tokens(TINY, length=17))
    model(tokens(TINY), cache=cache)
    with pytest.raises(ValueError, match="17 tokens"):
        model(tokens(TINY, length=1), cache=cache)
    cache.clear()
    model(tokens(TINY, length=1), cache=cache)
    with pytest.raises(ValueError, match="6 tokens do not fit into a context of 5"):
        model(tokens(TINY, length=6), cache=KVCache(TINY, capacity=5))


def test_last_only_gives_the_last_logits():
    model, idx = build(TINY), tokens(TINY)
    torch.testing.assert_close(model(idx, last_only=True), model(idx)[:, -1:], rtol=0, atol=1e-6)
