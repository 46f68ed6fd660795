"""Weights that are there already: nanoGPT's ckpt.pt, folders, and what train.py makes of --init_from."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

import hf_convert
from configurator import ROOT, ModelConfig, UserError, load_config
from data.tokenizer import CharacterTokenizer, JsonTokenizer, train_bpe
from data.tokens import Dataset
from flops import count_parameters
from hf_convert import export_model
from hf_format import TENSORS
from model import build_model
from plan import plan_text
from pretrained import Pretrained, check_tokenizer, load_model, open_pretrained
from tiny_runs import Runs, tiny_text

CPU = torch.device("cpu")
TEXT = tiny_text(880)  # what the dataset of tiny runs is made of


# --- nanoGPT -----------------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 18
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32
    dropout: float = 0.0
    bias: bool = False


class NanoBlock(nn.Module):
    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        C = cfg.n_embd
        self.n_head = cfg.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=cfg.bias), nn.LayerNorm(C, bias=cfg.bias)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, cfg.bias), "c_proj": nn.Linear(C, C, cfg.bias)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, cfg.bias), "c_proj": nn.Linear(4 * C, C, cfg.bias)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    """nanoGPT's model in its own arithmetic and under its own names."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        tables = {"wte": nn.Embedding(cfg.vocab_size, cfg.n_embd), "wpe": nn.Embedding(cfg.block_size, cfg.n_embd)}
        blocks = nn.ModuleList(NanoBlock(cfg) for _ in range(cfg.n_layer))
        self.transformer = nn.ModuleDict({**tables, "h": blocks, "ln_f": nn.LayerNorm(cfg.n_embd, bias=cfg.bias)})
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.lm_head.weight = tables["wte"].weight

    def forward(self, idx: Tensor) -> Tensor:
        parts = self.transformer
        x = parts["wte"](idx) + parts["wpe"].weight[: idx.shape[1]]
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


def write_nanogpt(path: Path, cfg: GPTConfig, prefix: str = "") -> NanoGPT:
    torch.manual_seed(0)
    model = NanoGPT(cfg)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    saved = {"model": {prefix + name: tensor for name, tensor in model.state_dict().items()}, "model_args": asdict(cfg)}
    saved |= {"optimizer": torch.optim.AdamW(model.parameters()).state_dict(), "iter_num": 7, "best_val_loss": torch.tensor(1.5)}
    torch.save({**saved, "config": {"dataset": "tiny", "device": "cpu"}}, path)
    return model


@pytest.mark.parametrize(("bias", "prefix"), [(True, ""), (False, "_orig_mod.")])
def test_nanogpts_checkpoint_is_loaded(tmp_path, bias, prefix):
    theirs = write_nanogpt(tmp_path / "ckpt.pt", GPTConfig(bias=bias), prefix)
    CharacterTokenizer.of_texts([TEXT]).save(make(tmp_path / "data" / "tiny"))
    source = open_pretrained(str(tmp_path / "ckpt.pt"), data_dir=str(tmp_path / "data"))
    assert source.cfg == ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=18, bias=bias)
    assert source.name == f"{tmp_path / 'ckpt.pt'}, step 7"
    assert source.load_tokenizer().encode(TEXT) == CharacterTokenizer.of_texts([TEXT]).encode(TEXT)
    idx = torch.randint(18, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(load_model(source, CPU, torch.float32)(idx), theirs(idx), rtol=0, atol=1e-5)


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful(), "model_args": {}}, "ckpt.pt")
    with pytest.raises(UserError, match=r"is no ckpt.pt of nanoGPT: it holds more than tensors and plain values, and nothing"):
        open_pretrained("ckpt.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"plain.pt is not a PyTorch file"):
        open_pretrained("plain.pt")
    with zipfile.ZipFile("other.pt", "w") as file:
        file.writestr("a.txt", "text")
    with pytest.raises(UserError, match=r"other.pt is not a PyTorch file"):
        open_pretrained("other.pt")
    assert not (tmp_path / "harmed").exists()


def test_a_checkpoint_that_lacks_a_tensor(tmp_path):
    write_nanogpt(tmp_path / "ckpt.pt", GPTConfig())
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del saved["model"]["transformer.h.1.mlp.c_fc.weight"]
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"lacks transformer\.h\.1\.mlp\.c_fc\.weight"):
        open_pretrained(str(tmp_path / "ckpt.pt"))


def test_a_folder_that_holds_a_nanogpt_checkpoint(tmp_path):
    write_nanogpt(tmp_path / "ckpt.pt", GPTConfig())
    assert open_pretrained(str(tmp_path)).name == f"{tmp_path / 'ckpt.pt'}, step 7"


def test_a_mistyped_out_dir_is_told_the_runs_that_are_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^out-nope: there is no such file or folder; the hub has gpt2, .* such as org/model$"):
        open_pretrained("out-nope")
    for name in ("out-b", "out-a"):
        make(tmp_path / name / "checkpoints")
    for name in ("out-nope", "./out-nope", str(tmp_path / "runs" / "out-nope")):
        with pytest.raises(UserError, match=r"^.*: there is no such file or folder; runs here: out-a, out-b$"):
            open_pretrained(name)


def test_the_hubs_refusal_is_quoted_by_a_whole_sentence(monkeypatch):
    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        raise OSError("Not in the cache of version 1.2\nand no network. Set A=0 to " + 200 * "x")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("pretrained.go_offline_without_network", lambda: None)
    with pytest.raises(UserError, match=r"(?s)`hf download org/model .*\(Not in the cache of version 1\.2\nand no network\.\)$"):
        open_pretrained("org/model")


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("model_args", {"n_head": 0}, "n_head=0 must be greater than 0"),
        ("model_args", {"n_head": 5}, "n_head=5 does not divide n_embd=32"),
        ("model_args", {"bias": "no"}, "bias='no' is not a bool"),
        ("model_args", {"vocab_size": 0}, "vocab_size is needed"),
        ("model", {"lm_head.weight": 3}, "is no ckpt.pt of nanoGPT: its model_args, model or config"),
        ("model", {"transformer.wte.weight": torch.zeros(2, 3)}, r"transformer.wte.weight is \(2, 3\), not \(18, 32\)"),
        ("model_args", [], "is no ckpt.pt of nanoGPT"),
        ("config", ["tiny"], "is no ckpt.pt of nanoGPT"),
    ],
)
def test_a_checkpoint_whose_values_cannot_be(tmp_path, entry, value, says):
    write_nanogpt(tmp_path / "ckpt.pt", GPTConfig())
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    saved[entry] = saved[entry] | value if isinstance(value, dict) else value
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=f"ckpt.pt.*{says}"):
        open_pretrained(str(tmp_path / "ckpt.pt"))


def test_a_checkpoint_without_settings_is_loaded(tmp_path):
    write_nanogpt(tmp_path / "ckpt.pt", GPTConfig())
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    torch.save(saved | {"config": None}, tmp_path / "ckpt.pt")
    assert open_pretrained(str(tmp_path / "ckpt.pt")).cfg.n_embd == 32


# --- folders -----------------------------------------------------------------------------------------------------------

CFG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=18, bias=True, dropout=0.0)


def write_folder(folder: Path, tokenizer=None, cfg: ModelConfig = CFG) -> Pretrained:
    """A Hugging Face folder, and the same model as a source that is no file."""
    model = build_model(cfg, CPU, seed=3)
    source = Pretrained(
        "made", cfg, dict(model.named_parameters()).__getitem__, lambda: tokenizer or CharacterTokenizer.of_texts([TEXT])
    )
    export_model(source, folder, "float32", 10**9)
    return source


def test_positions_are_cropped(tmp_path):
    whole = write_folder(tmp_path / "hf")
    cropped = open_pretrained(str(tmp_path / "hf")).cropped(10)
    idx = torch.randint(18, (2, 10))
    with torch.no_grad():
        difference = load_model(cropped, CPU, torch.float32)(idx) - load_model(whole, CPU, torch.float32)(idx)
    assert difference.abs().max() < 1e-6 and cropped.read("position_embedding.weight").shape == (10, 16)


def test_weights_may_be_loaded_in_half_precision(tmp_path):
    write_folder(tmp_path / "hf", cfg=replace(CFG, position_encoding="rope", bias=False))
    model = load_model(open_pretrained(str(tmp_path / "hf")), CPU, torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "norm" not in name} == {torch.bfloat16}
    assert {p.dtype for name, p in model.named_parameters() if "norm" in name} == {torch.float32} == {model.rope_cos.dtype}
    assert model(torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.bfloat16


def test_a_folders_prompts_begin_as_its_maker_has_it(tmp_path):
    """LLaMA's <s>, which the tokenizer.json of its folder adds; a run of ours is trained without it, and exported without."""
    backend = tokenizers.Tokenizer.from_str(train_bpe(300, [TEXT]).to_json())
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer = JsonTokenizer("bpe", backend.to_str(), 0)
    plain, ours = tokenizer.encode(TEXT), write_folder(tmp_path / "ours", tokenizer, replace(CFG, vocab_size=320))
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")(TEXT).input_ids == ours.encode_prompt(TEXT) == plain
    export_model(replace(ours, is_foreign=True), tmp_path / "theirs", "float32", 10**9)
    theirs = open_pretrained(str(tmp_path / "theirs"))
    assert AutoTokenizer.from_pretrained(tmp_path / "theirs")(TEXT).input_ids == theirs.encode_prompt(TEXT) == [0, *plain]
    hf_convert.main(["import", str(tmp_path / "theirs"), str(tmp_path / "out")])
    assert open_pretrained(str(tmp_path / "out")).encode_prompt(TEXT) == [0, *plain]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "is no JSON object"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json and no tokenizer.model"),
        (lambda f: train_bpe(300, [TEXT]).save(f), "does not match its model: 295 ids for 18 embeddings"),
    ],
)
def test_folders_that_are_not_whole(tmp_path, change, says):
    write_folder(tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(UserError, match=says):
        open_pretrained(str(tmp_path / "hf")).load_tokenizer()


def test_a_name_of_the_hub_is_found_in_the_cache(tmp_path):
    """Without a network; what was downloaded once is laid out like this."""
    cached = tmp_path / "hub" / "models--openai-community--gpt2-medium"
    make(cached / "refs").joinpath("main").write_text("a1b2")
    write_folder(make(cached / "snapshots") / "a1b2")
    command = "from pretrained import open_pretrained as o; print(o('gpt2-medium').read('token_embedding.weight').sum().item())"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    weight = open_pretrained(str(cached / "snapshots" / "a1b2")).read("token_embedding.weight")
    assert done.stdout == f"{weight.sum().item()}\n", done.stderr


# --- train.py --init_from ----------------------------------------------------------------------------------------------


class RunsFromWeights(Runs):
    """Without the sizes of a tiny model: they come with the weights."""

    def argv(self, out_dir: str, *flags: str) -> list[str]:
        sizes = ("--n_layer=", "--n_head=", "--n_embd=", "--block_size=")
        return [flag for flag in super().argv(out_dir) if not flag.startswith(sizes)] + list(flags)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    with RunsFromWeights(tmp_path_factory.mktemp("pretrained")) as runs:
        write_folder(runs.folder / "hf")
        yield runs


def first_tensors(runs: Runs, out_dir: str) -> dict[str, Tensor]:
    return runs.checkpoint(out_dir).read_tensors()


def test_a_cropped_context_needs_no_window(runs):
    cfg = replace(CFG, position_encoding="rope", normalization="rmsnorm", ffn_type="swiglu", bias=False, weight_tying=False)
    write_folder(runs.folder / "window", cfg=cfg)
    config = json.loads((runs.folder / "window" / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": 8}
    (runs.folder / "window" / "config.json").write_text(json.dumps(config))
    flags = [f"--init_from={runs.folder / 'window'}", "--max_iters=1"]
    assert "sliding_window=8" in runs.run("windowed", *flags, exit_code=2)
    runs.run("windowed", *flags, "--block_size=8")
    hf_convert.main(["import", str(runs.folder / "window"), str(runs.folder / "window_imported"), "--block_size=8"])


def test_training_starts_from_the_weights(runs):
    """A step with a learning rate of 0 leaves them as they were."""
    output = runs.run(
        "start", f"--init_from={runs.folder / 'hf'}", "--block_size=8", "--max_iters=1", "--learning_rate=0", "--min_lr=0"
    )
    expected = open_pretrained(str(runs.folder / "hf")).cropped(8)
    weights = first_tensors(runs, "start")
    assert all(torch.equal(tensor, expected.read(name.removeprefix("model."))) for name, tensor in weights.items())
    config = runs.log("start")["config"]
    assert config["values"]["n_embd"] == 16 and config["origins"]["n_embd"] == f"--init_from={runs.folder / 'hf'}"
    assert "number of parameters" in output


def test_fp8_scales_the_weights_that_came(runs):
    """And not those that were drawn before: none is too large."""
    flags = (f"--init_from={runs.folder / 'hf'}", "--block_size=8", "--max_iters=1", "--log_interval=1")
    runs.run("fp8", *flags, "--use_fp8", "--fp8_emulate", "--fp8_required", "--dtype=bfloat16")
    (record,) = runs.log("fp8")["training_iterations"]
    assert record["fp8"]["weights"]["saturated_percent"] == 0


def test_a_plan_is_of_the_weights_sizes(runs):
    plan = plan_text(load_config([*runs.argv("plan"), f"--init_from={runs.folder / 'hf'}"]))
    assert plan.startswith(f"{CFG.architecture}: {count_parameters(CFG).total:,} parameters")


def test_a_plan_needs_no_weights(tmp_path, monkeypatch):
    """A name of the hub: only its config.json is asked for."""
    write_folder(tmp_path / "hf")
    (tmp_path / "hf" / TENSORS).unlink()
    asked = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path / "hf")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("pretrained.go_offline_without_network", lambda: None)
    assert f"{count_parameters(CFG).total:,} parameters" in plan_text(
        load_config(["--init_from=gpt2-xl", f"--data_dir={tmp_path}"])
    )
    assert asked == [("openai-community/gpt2-xl", ["config.json"])]
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        open_pretrained("gpt2-xl")
    assert "*.safetensors" in asked[-1][1]


@pytest.mark.parametrize("source", ["hf", "ckpt.pt"])
def test_a_model_by_itself_has_no_checkpoints(tmp_path, source):
    write_folder(tmp_path / "hf")
    write_nanogpt(tmp_path / "ckpt.pt", GPTConfig())
    with pytest.raises(
        UserError, match=f"--checkpoint=latest: .*{source} is a model by itself, without checkpoints; leave it out"
    ):
        open_pretrained(str(tmp_path / source), "latest")


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_ranks_share_the_weights(runs, tmp_path, strategy):
    """Two ranks start from a folder, and what they save is exported as the same folder again."""
    flags = [f"--init_from={runs.folder / 'hf'}", "--max_iters=1", "--learning_rate=0", "--min_lr=0", "--fsdp_min_num_params=0"]
    runs.run_ranks(2, strategy, *flags, f"--parallel={strategy}")
    export_model(open_pretrained(str(runs.folder / strategy)), tmp_path / "hf", "float32", 10**9)
    assert (tmp_path / "hf" / TENSORS).read_bytes() == (runs.folder / "hf" / TENSORS).read_bytes()


def test_one_command_line_serves_the_first_start_and_every_restart(runs):
    flags = [f"--init_from={runs.folder / 'hf'}", "--resume=latest", "--block_size=16"]
    assert f"starting from {runs.folder / 'hf'}" in runs.run("restart", *flags, "--max_iters=3")
    assert "after step 3" in runs.run("restart", *flags, "--max_iters=6")
    assert list(runs.losses("restart")) == [1, 2, 3, 4, 5, 6]
    runs.run("once", *flags, "--max_iters=6")
    assert runs.losses("once") == runs.losses("restart")


def test_another_runs_weights(runs):
    runs.run("donor", f"--init_from={runs.folder / 'hf'}", "--block_size=8", "--max_iters=4")
    runs.run("heir", f"--init_from={runs.folder / 'donor'}", "--max_iters=1", "--learning_rate=0", "--min_lr=0")
    donor, heir = first_tensors(runs, "donor"), first_tensors(runs, "heir")
    assert donor.keys() == heir.keys() and all(torch.equal(donor[name], heir[name]) for name in donor)


def test_imported_weights_are_for_init_from(runs):
    hf_convert.main(["import", str(runs.folder / "hf"), str(runs.folder / "imported"), "--block_size=16"])
    assert f"--init_from={runs.folder / 'imported'}" in runs.run("imported", "--resume=latest", exit_code=2)
    output = runs.run("imported", f"--init_from={runs.folder / 'imported'}", "--max_iters=2")
    assert "the checkpoints of run import_" in output


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--n_embd=48"], "has another n_embd=48 (command line): leave these knobs out"),
        (["--block_size=25"], "has a context of 24"),
        (["--block_size=16", "--vocab_size=64"], "has another vocab_size=64"),
    ],
)
def test_knobs_that_contradict_the_weights(runs, flags, says):
    assert says in runs.run("refused", f"--init_from={runs.folder / 'hf'}", *flags, exit_code=2)
    assert not (runs.folder / "refused").exists()


def test_a_dataset_in_other_tokens_is_refused(tmp_path):
    tokenizers = [train_bpe(300, [TEXT]), train_bpe(300, [TEXT.upper()])]
    for number, tokenizer in enumerate(tokenizers):
        tokenizer.save(make(tmp_path / str(number)))
    wide = replace(CFG, vocab_size=320)
    write_folder(tmp_path / "hf", tokenizers[0], wide)
    source = open_pretrained(str(tmp_path / "hf"))
    check_tokenizer(source, dataset_in(tmp_path / "0"))
    with pytest.raises(UserError, match="has another tokenizer than"):
        check_tokenizer(source, dataset_in(tmp_path / "1"))


def dataset_in(folder: Path) -> Dataset:
    return Dataset(folder.name, folder, np.empty(0, np.uint16), np.empty(0, np.uint16), 300)
