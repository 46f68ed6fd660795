"""Models for transformers and from there: the same logits, tokens and text, whole folders or none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

import hf_convert
from configurator import ROOT, UserError
from data.tokenizer import CharacterTokenizer, Gpt2Tokenizer, Tokenizer, open_tokenizer, train_bpe
from generation import SampleOptions, generate
from hf_convert import export_model, import_model
from model import Transformer, build_model
from pretrained import Pretrained, load_model, open_pretrained
from real_inputs import provide_gpt2_vocabulary, shared_file
from test_hf_format import MODELS
from tiny_runs import Runs, tiny_text

CPU = torch.device("cpu")
TEXT = tiny_text(200)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases too, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pretrained_of(model: Transformer, tokenizer: Tokenizer) -> Pretrained:
    return Pretrained("a test", model.cfg, dict(model.named_parameters()).__getitem__, lambda: tokenizer)


def some_ids(vocab_size: int, length: int = 16) -> Tensor:
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def assert_same_logits(model: Transformer, theirs: torch.nn.Module, length: int = 16) -> None:
    idx = some_ids(model.cfg.vocab_size, length)
    with torch.no_grad():
        difference = (model(idx) - theirs(idx).logits).abs().max()
    assert difference <= 1e-5


# --- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("name", [*MODELS, "gpt2_without_biases", "starcoder2_without_biases"])
def test_transformers_loads_what_is_exported(tmp_path, name, shard_bytes):
    cfg = MODELS.get(name) or replace(MODELS[name.split("_")[0]], bias=False)
    tokenizer = CharacterTokenizer.of_texts([TEXT])
    model = randomised(build_model(replace(cfg, block_size=64), CPU, seed=0))
    export_model(pretrained_of(model, tokenizer), tmp_path / "hf", "float32", shard_bytes)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()) and theirs.dtype == torch.float32
    assert_same_logits(model, theirs)
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = torch.tensor([their_tokenizer(TEXT[:12]).input_ids])
    text = theirs.generate(prompt, max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert torch.equal(text, generate(model, prompt, 40, SampleOptions(temperature=0, n_valid_ids=tokenizer.vocab_size)))
    assert their_tokenizer.decode(text[0]) == tokenizer.decode(text[0].tolist())
    assert text.max() < tokenizer.vocab_size < cfg.vocab_size  # ids that only pad the vocabulary are never drawn


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "starcoder2"])
def test_without_an_end_of_text_no_character_ends_a_text(tmp_path, name):
    """What config.json leaves out, transformers takes from its own models: LLaMA's ids are characters here."""
    model = build_model(MODELS[name], CPU, seed=0)
    export_model(pretrained_of(model, CharacterTokenizer.of_texts([TEXT])), tmp_path / "hf", "float32", 10**9)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_in_half_precision(tmp_path, dtype):
    model = randomised(build_model(MODELS["llama"], CPU, seed=0))
    export_model(pretrained_of(model, CharacterTokenizer.of_texts([TEXT])), tmp_path / "hf", dtype, 10**9)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert str(theirs.dtype) == f"torch.{dtype}"
    assert torch.equal(theirs.model.norm.weight, model.final_norm.weight.to(getattr(torch, dtype)))


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "llama":
        return open_tokenizer(str(shared_file("sentencepiece_32k/tokenizer.model")))
    if kind == "gpt2":
        provide_gpt2_vocabulary()
        return Gpt2Tokenizer()
    return train_bpe(300, [TEXT]) if kind == "bpe" else CharacterTokenizer.of_texts([TEXT])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bpe", "characters"])
def test_auto_tokenizer_gives_the_same_tokens(tmp_path, kind):
    tokenizer = tokenizer_of(kind)
    hf_convert.write_tokenizer(tmp_path, tokenizer, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = (
        [TEXT, TEXT[7:90]]
        if kind == "characters"
        else [TEXT, (ROOT / "configurator.py").read_text(), "  naïve\n\n\t 你好 🙂 1984"]
    )
    for text in texts:
        ids = theirs(text).input_ids
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eot_id and theirs.model_max_length == 64


@pytest.mark.parametrize("kind", ["post_norm", "existing"])
def test_what_cannot_be_exported_leaves_nothing(tmp_path, kind):
    cfg, folder = MODELS["gpt2"], tmp_path / "hf"
    if kind == "existing":
        folder.mkdir()
        (folder / "mine.txt").touch()
    model = build_model(replace(cfg, norm_position="post") if kind == "post_norm" else cfg, CPU, seed=0)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="norm_position=post" if kind == "post_norm" else "is there already"):
        export_model(pretrained_of(model, CharacterTokenizer.of_texts([TEXT])), folder, "float32", 10**9)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    model = build_model(MODELS["gpt2"], CPU, seed=0)
    weights = dict(model.named_parameters())
    n_read = iter(range(100))

    def read(name: str) -> Tensor:
        if next(n_read) == 9:
            raise OSError(28, "No space left on device")
        return weights[name]

    source = Pretrained("a test", model.cfg, read, lambda: CharacterTokenizer.of_texts([TEXT]))
    with pytest.raises(UserError, match=r"cannot write .*hf: No space left"):
        export_model(source, tmp_path / "hf", "float32", 10**9)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    with Runs(tmp_path_factory.mktemp("hf_convert")) as runs:
        runs.run("out", "--eval_interval=10", "--eval_iters=4", "--checkpoint_interval=10", "--run_name=a_run")
        yield runs


def test_a_run_becomes_a_folder_with_a_model_card(runs, tmp_path):
    flags = ["export", str(runs.folder / "out"), str(tmp_path / "hf"), "--checkpoint=latest"]
    done = subprocess.run([sys.executable, ROOT / "hf_convert.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "latest, step 20 is now" in done.stdout
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {
        *("README.md", "config.json", "generation_config.json", "loss_curve.png"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# hf\n" in card
    for line in ("| run | a_run |", "| steps | 20 |", "| tokens | 2,560 |", "| tokens per step | 128 |", "| dataset | tiny |"):
        assert line in card
    log = runs.log("out")
    last = log["eval_steps"][-1]
    assert f"| {last['iter']} | {last['train_loss']:.6g} | {last['val_loss']:.6g} | {last['val_bits_per_byte']:.6g} |" in card
    flops = log["training_iterations"][-1]["mfu"]["flops_per_token"] * 2560
    assert f"| training flops | {flops:.4g} |" in card
    assert str(runs.folder) not in card
    model = load_model(open_pretrained(str(runs.folder / "out"), "latest"), CPU, torch.float32)
    assert_same_logits(model, AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))


def test_without_a_log_the_card_says_less(runs, tmp_path):
    shutil.copytree(runs.folder / "out" / "checkpoints" / "latest", tmp_path / "elsewhere" / "checkpoints" / "latest")
    export_model(open_pretrained(str(tmp_path / "elsewhere")), tmp_path / "hf", "float32", 10**9)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "## Architecture" in card and "## Training" not in card


# --- import ------------------------------------------------------------------------------------------------------------

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 80, "vocab_size": 61}
SIZES |= {"max_position_embeddings": 32}
GPT2_SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 32, "vocab_size": 61}
THEIRS: dict[str, tuple[type, PretrainedConfig]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2_SIZES)),
    "gpt2_untied": (GPT2LMHeadModel, GPT2Config(**GPT2_SIZES, n_inner=50, tie_word_embeddings=False, activation_function="relu")),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2)),
    "llama_biased": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)),
    "starcoder2": (Starcoder2ForCausalLM, Starcoder2Config(**SIZES, num_key_value_heads=2)),
}


def theirs_in(folder: Path, name: str, shard_size: str = "1GB") -> torch.nn.Module:
    """One of their models with random weights, saved by transformers, with a tokenizer of characters."""
    cls, config = THEIRS[name]
    torch.manual_seed(0)
    model = randomised(cls(config))
    model.save_pretrained(folder, max_shard_size=shard_size)
    hf_convert.write_tokenizer(folder, CharacterTokenizer.of_texts([TEXT]), 32)
    return model


@pytest.mark.parametrize("name", THEIRS)
def test_what_transformers_saved_is_loaded(tmp_path, name):
    theirs = theirs_in(tmp_path, name, "40KB" if name == "llama" else "1GB")
    source = open_pretrained(str(tmp_path))
    assert_same_logits(load_model(source, CPU, torch.float32), theirs)
    assert source.load_tokenizer().encode(TEXT) == CharacterTokenizer.of_texts([TEXT]).encode(TEXT)


def test_the_bare_decoder_is_loaded(tmp_path):
    """As the hub's gpt2 is: names without `transformer.`, and a config.json that leaves defaults out."""
    theirs = theirs_in(tmp_path, "gpt2")
    theirs.transformer.save_pretrained(tmp_path)
    left_out = ("n_inner", "tie_word_embeddings", "scale_attn_weights", "rope_parameters")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name not in left_out}))
    assert_same_logits(load_model(open_pretrained(str(tmp_path)), CPU, torch.float32), theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_imported_model_is_a_checkpoint(tmp_path, name, capsys):
    theirs = theirs_in(tmp_path / "hf", name)
    assert hf_convert.main(["import", str(tmp_path / "hf"), str(tmp_path / "out"), "--block_size=20"]) == 0
    source = open_pretrained(str(tmp_path / "out"))
    assert source.cfg.block_size == 20
    assert_same_logits(load_model(source, CPU, torch.float32), theirs)
    assert source.load_tokenizer().encode(TEXT) == CharacterTokenizer.of_texts([TEXT]).encode(TEXT)
    assert "sample.py --out_dir=" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already"):
        import_model(source, tmp_path / "out")


@pytest.mark.parametrize("block_size", [-3, 0, 33])
def test_a_context_that_cannot_be(tmp_path, block_size):
    theirs_in(tmp_path / "hf", "gpt2")
    with pytest.raises(UserError, match=rf"--block_size={block_size}: .* has a context of 32; pass 1 to 32"):
        hf_convert.main(["import", str(tmp_path / "hf"), str(tmp_path / "out"), f"--block_size={block_size}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["export", "nowhere/there", "x"], "nowhere/there: there is no such file or folder, and the Hugging Face hub does not"),
        (["export", "data", "x"], "data holds no checkpoint and no config.json"),
        *(
            (["export", "data", "x", f"--shard_gb={size}"], f"--shard_gb={size}: it must be a number")
            for size in ("0", "nan", "inf")
        ),
        (["import", "README.md", "x"], "README.md is not a PyTorch file"),
    ],
)
def test_mistakes(flags, says, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for name in ("HF_ENDPOINT", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=says):
        hf_convert.main(flags)
    assert not (ROOT / "x").exists()
