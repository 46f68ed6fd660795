"""sample.py: text from a checkpoint that train.py wrote, and its mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import sample
import train
from checkpoint import find_checkpoint
from configurator import UserError
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


def test_the_weights_are_the_checkpoints(out_dir):
    checkpoint = find_checkpoint(out_dir, "latest", print)
    weights = checkpoint.read_tensors()
    model = sample.load_model(checkpoint, torch.device("cpu"))
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


def test_another_tokenizer_is_refused(out_dir, tmp_path):
    write_dataset(tmp_path / "words", tiny_text(200).upper(), tiny_text(200))
    with pytest.raises(UserError, match="is not the one that"):
        sample.main([f"--out_dir={out_dir}", f"--data_dir={tmp_path}", "--device=cpu", "--start=a"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--start="], "at least one character"),
        (["--start=FILE:nowhere.txt"], "--start=FILE:nowhere.txt: cannot read"),
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
    with pytest.raises(UserError, match="nothing"):
        sample.main([f"--out_dir={tmp_path}"])
