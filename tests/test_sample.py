"""sample.py: text from a checkpoint that train.py wrote, and its mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sample
import train
from checkpoint import find_checkpoint
from configurator import SampleConfig, UserError
from data.tokenizer import Tokenizer, open_tokenizer, train_bpe
from hf_convert import export_model
from pretrained import load_model, open_pretrained
from real_inputs import shared_file
from sample import SEPARATOR
from tiny_runs import TINY, tiny_text, write_dataset


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny model, long enough to have learned words."""
    folder = tmp_path_factory.mktemp("sample")
    text = tiny_text(3000)
    write_dataset(folder / "data" / "words", text[:-2000], text[-2000:])
    knobs = [f"--data_dir={folder}/data", "--dataset=words", f"--out_dir={folder}/out", "--max_iters=150", "--eval_interval=150"]
    assert train.main([*TINY, *knobs]) == 0
    return folder / "out"


def run(capsys: pytest.CaptureFixture[str], out_dir: Path, *flags: str) -> str:
    capsys.readouterr()
    assert sample.main([f"--out_dir={out_dir}", "--device=cpu", *flags]) == 0
    return capsys.readouterr().out


def test_every_sample_continues_the_start(out_dir, capsys):
    samples = run(capsys, out_dir, "--start=the c", "--num_samples=2", "--max_new_tokens=40").split("\n---------------\n")
    assert [len(text) for text in samples] == [45, 45, 0] and all(text.startswith("the c") for text in samples[:2])
    assert samples[0] != samples[1]
    known = set(tiny_text(3000).split())
    words = " ".join(samples).split()[1:-2]
    assert sum(word in known for word in words) > len(words) / 3  # it has learned something: random letters make no words


def test_the_seed_decides_and_temperature_0_is_greedy(out_dir, capsys):
    flags = ["--start=a", "--num_samples=1", "--max_new_tokens=30"]
    first, again, other = (run(capsys, out_dir, *flags, f"--seed={seed}") for seed in (1, 1, 2))
    assert first == again != other
    greedy = [run(capsys, out_dir, *flags, f"--seed={seed}", "--temperature=0") for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    assert run(capsys, out_dir, *flags, "--num_samples=3", "--temperature=0") == greedy[0], "once: all are the same"


def test_the_weights_are_the_checkpoints(out_dir):
    checkpoint = find_checkpoint(out_dir, "latest", print)
    weights = checkpoint.read_tensors()
    model = load_model(open_pretrained(str(out_dir), "latest"), torch.device("cpu"), torch.float32)
    assert all(torch.equal(weights[f"model.{name}"], p) for name, p in model.named_parameters())


def test_without_a_best_checkpoint_it_is_the_latest(out_dir, tmp_path, capsys):
    shutil.copytree(out_dir / "checkpoints" / "latest", tmp_path / "checkpoints" / "latest")
    assert run(capsys, tmp_path, "--num_samples=1", "--start=a") == run(capsys, out_dir, "--num_samples=1", "--start=a")


def test_the_tokens_may_be_elsewhere_and_the_start_in_a_file(out_dir, tmp_path, capsys):
    (tmp_path / "words").mkdir()
    for name in ("meta.pkl", "manifest.json"):
        shutil.copy(out_dir.parent / "data" / "words" / name, tmp_path / "words")
    (tmp_path / "start.txt").write_text("the c")
    moved = [f"--data_dir={tmp_path}", f"--start=FILE:{tmp_path / 'start.txt'}"]
    assert run(capsys, out_dir, *moved) == run(capsys, out_dir, "--start=the c")


def test_greedy_text_is_that_of_transformers(out_dir, tmp_path, capsys):
    """From a checkpoint, from the folder it is exported to, and by transformers' own generate."""
    export_model(open_pretrained(str(out_dir)), tmp_path / "hf", "float32", 10**9)
    flags = ["--start=the c", "--max_new_tokens=11", "--temperature=0"]
    ours = run(capsys, out_dir, *flags)
    model, tokenizer = (auto.from_pretrained(tmp_path / "hf") for auto in (AutoModelForCausalLM, AutoTokenizer))
    theirs = model.generate(**tokenizer("the c", return_tensors="pt"), max_new_tokens=11, do_sample=False)
    assert ours == f"{tokenizer.decode(theirs[0])}{SEPARATOR}"
    assert run(capsys, tmp_path / "hf", *flags) == ours
    assert run(capsys, tmp_path, f"--init_from={tmp_path / 'hf'}", *flags) == ours


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [[], ["--compile"]], ids=("graph", "compiled"))
def test_a_gpu_draws_the_same_text(out_dir, capsys, flags):
    """In float32, with the kernels and the CUDA graph, and the tokens read back a step late; beyond the context too."""
    common = ["--start=the c", "--max_new_tokens=20", "--temperature=0"]
    assert run(capsys, out_dir, *common, "--device=cuda", "--dtype=float32", *flags) == run(capsys, out_dir, *common)


def test_a_continuation_ends_before_the_stop_text(out_dir, capsys):
    flags = ["--start=the c", "--num_samples=4", "--max_new_tokens=40"]
    free = run(capsys, out_dir, *flags).split(SEPARATOR)[:-1]
    stopped = run(capsys, out_dir, *flags, "--stop=a ").split(SEPARATOR)[:-1]
    assert stopped == ["the c" + text.removeprefix("the c").split("a ")[0] for text in free] != free


def test_every_line_of_a_prompt_file_is_continued(out_dir, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("the c\n\none dog\n")
    texts = run(capsys, out_dir, f"--prompt_file={tmp_path / 'prompts.txt'}", "--num_samples=2", "--max_new_tokens=9")
    assert [len(text) for text in texts.split(SEPARATOR)] == [14, 14, 16, 16, 0]
    assert [text[:5] for text in texts.split(SEPARATOR)[:4]] == ["the c", "the c", "one d", "one d"]


def test_a_prompt_may_hold_what_ends_a_line_elsewhere(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\u2028two\x0cthree\x85\nfour\r\n", encoding="utf-8")
    cfg = SampleConfig(prompt_file=str(tmp_path / "prompts.txt"))
    assert sample.texts_to_continue(cfg) == ["one\u2028two\x0cthree\x85", "four"]


def test_a_folder_has_no_checkpoint_to_choose(out_dir, tmp_path):
    export_model(open_pretrained(str(out_dir)), tmp_path / "hf", "float32", 10**9)
    with pytest.raises(UserError, match=r"--checkpoint=nonsense: .*hf is a model by itself"):
        sample.main([f"--init_from={tmp_path / 'hf'}", "--checkpoint=nonsense", "--device=cpu"])


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "llama":
        return open_tokenizer(str(shared_file("sentencepiece_32k/tokenizer.model")))
    return train_bpe(300, [WIDE])


WIDE = "naïve — 你好 🙂🙂 x = f(1)\n\n  it is  1984,\tand\n"


@pytest.mark.parametrize("kind", ["llama", "bpe"])
@pytest.mark.parametrize("stop", ["", "1984", "🙂 x", "nowhere"])
def test_text_that_streams_is_the_text(kind, stop):
    """Whatever bytes a token ends with, and however the stop text falls into tokens."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(WIDE * 2)
    row = sample.Continuation(tokenizer, ids[:3], stop)
    parts = [row.push(id) for id in ids[3:]]
    expected = tokenizer.decode(ids).removeprefix(tokenizer.decode(ids[:3])).split(stop or "nowhere")[0]
    assert "".join([*parts, row.end()]) == row.text == expected
    assert row.is_done == (stop in ("1984", "🙂 x"))
    assert "\ufffd" not in "".join(parts)
    assert stop or sum(map(bool, parts)) > 20  # in many parts


def test_bytes_that_never_become_a_character_come_at_the_end():
    tokenizer = train_bpe(300, [WIDE])
    row = sample.Continuation(tokenizer, tokenizer.encode("a"), "")
    assert [row.push(id) for id in tokenizer.encode("é")[:1]] == [""]
    assert row.end() == row.text == "\ufffd"


def test_a_run_keeps_its_tokenizer(out_dir, tmp_path, capsys):
    """Text comes from an out_dir alone, wherever it is copied."""
    expected = run(capsys, out_dir, "--num_samples=1", "--start=a")
    for name in ("checkpoints", "tokenizer"):
        shutil.copytree(out_dir / name, tmp_path / "copy" / name)
    state = tmp_path / "copy" / "checkpoints" / "latest" / "state.json"
    assert str(out_dir.parent / "data") in state.read_text()
    hidden = out_dir.parent / "data.hidden"
    (out_dir.parent / "data").rename(hidden)
    try:
        assert run(capsys, tmp_path / "copy", "--num_samples=1", "--start=a") == expected
    finally:
        hidden.rename(out_dir.parent / "data")


@pytest.mark.parametrize("gone", ["the data", "the tokenizer"])
def test_a_run_set_aside_keeps_its_tokenizer(out_dir, tmp_path, capsys, gone):
    """A run on other data has taken its place; a tokenizer that is not there is found with the data."""
    expected = run(capsys, out_dir, "--num_samples=1", "--start=a")
    for name in ("checkpoints", "tokenizer"):
        shutil.copytree(out_dir / name, tmp_path / name)
    write_dataset(tmp_path / "data" / "others", tiny_text(200).upper(), tiny_text(200).upper())
    flags = [f"--data_dir={tmp_path / 'data'}", "--dataset=others", f"--out_dir={tmp_path}", "--max_iters=1"]
    assert train.main([*TINY, *flags]) == 0
    (aside,) = tmp_path.glob("checkpoints.*")
    (tokenizer,) = tmp_path.glob("tokenizer.*")
    hidden = (tokenizer if gone == "the tokenizer" else out_dir.parent / "data").rename(tmp_path / "hidden")
    try:
        assert run(capsys, aside / "best_model", "--num_samples=1", "--start=a") == expected
        assert run(capsys, tmp_path, "--num_samples=1", "--start=A")
    finally:
        if gone == "the data":
            hidden.rename(out_dir.parent / "data")


def test_another_tokenizer_is_refused(out_dir, tmp_path):
    write_dataset(tmp_path / "words", tiny_text(200).upper(), tiny_text(200))
    with pytest.raises(UserError, match="is not the one that"):
        sample.main([f"--out_dir={out_dir}", f"--data_dir={tmp_path}", "--device=cpu", "--start=a"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--start="], "at least one character"),
        (["--start=FILE:nowhere.txt"], "--start=FILE:nowhere.txt: cannot read"),
        (["--prompt_file=nowhere.txt"], "--prompt_file=nowhere.txt: cannot read"),
        (["--prompt_file=/dev/null"], "the file has no line of text"),
        (["--init_from=nowhere"], "is not scratch, resume, gpt2"),
        (["--compile"], "compiled on a GPU only"),
        (["--start=Ω"], "do not include 'Ω'"),
        (["--checkpoint=rolling_step_7"], "rolling_step_7"),
        (["--temperature=-1"], "must not be negative"),
        (["--top_p=0"], "must be in"),
        (["--n_layer=2"], "unknown knob 'n_layer'"),
    ],
)
def test_mistakes(out_dir, flags, says):
    with pytest.raises(UserError, match=says):
        sample.main([f"--out_dir={out_dir}", "--device=cpu", *flags])


def test_nothing_to_sample_from(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        sample.main([f"--out_dir={tmp_path}"])
