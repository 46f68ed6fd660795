"""hellaswag.py: texts and tokens, scores against a full pass for every ending, the command, several ranks, and in a run."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import evaluation
import hellaswag
from configurator import ROOT, ModelConfig, UserError
from data.tokenizer import CharacterTokenizer
from hellaswag import clean, log_likelihoods, parse_item, read_items, score_of, tokenize
from model import Transformer
from parallel import Ranks
from pretrained import Pretrained
from tiny_runs import Runs, tiny_text, write_dataset

ITEM = {
    "activity_label": "Walking",
    "ctx_a": "the dog sat on a mat.",
    "ctx_b": "the",
    "endings": ["cat saw one dog", "red hat", "mat run to a café in a hat", "dog"],
    "label": 1,
}
ALONE = Ranks(0, 1, torch.device("cpu"))
WORDS = "the cat sat on a mat in a café and saw one dog run to its red hat".split()


def items(n: int) -> list[dict]:
    """Of the words of tiny_text, in short."""
    draw = np.random.default_rng(3)
    return [
        {
            "activity_label": "a",
            "ctx_a": " ".join(draw.choice(WORDS, draw.integers(1, 3))),
            "ctx_b": "",
            "endings": [" ".join(draw.choice(WORDS, draw.integers(1, 3))) for _ in range(4)],
            "label": int(draw.integers(4)),
        }
        for _ in range(n)
    ]


def written(folder: Path, entries: list[dict]) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def tokenizer_of(entries: list[dict]) -> CharacterTokenizer:
    return CharacterTokenizer.of_texts([json.dumps(entry, ensure_ascii=False) + ":TH" for entry in entries])


# ---------------------------------------------------------------------------------------------------------------------
# Items
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" Cut it. [title] Fold it. [step] Press it. ", "Cut it.. Fold it. Press it."),
        ("a [substeps] b", "a b"),
        ("a   b", "a  b"),  # one pass over the blanks, as lm-evaluation-harness makes it
        ("[header] How to sit", " How to sit"),
    ],
)
def test_marks_of_wikihow_are_taken_out(text, cleaned):
    assert clean(text) == cleaned


def test_the_context_is_label_and_both_parts():
    item = parse_item(json.dumps(ITEM), "here")
    assert (item.context, item.label) == ("Walking: the dog sat on a mat. The", 1)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "items.jsonl:2: not JSON"),
        ("[1]", "items.jsonl:2: no item of HellaSwag"),
        (json.dumps(ITEM | {"ctx_a": None}), "needs the texts activity_label, ctx_a, ctx_b"),
        (json.dumps(ITEM | {"endings": ["a"]}), "items.jsonl:2: endings must be a list"),
        (json.dumps(ITEM | {"endings": ["a", "[step]"]}), "items.jsonl:2: endings must be a list"),
        (json.dumps(ITEM | {"label": 4}), "label=4 does not name one of the 4 endings"),
        (json.dumps(ITEM | {"label": ""}), "the test set has no labels"),
    ],
)
def test_a_malformed_line_is_named(line, says, tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEM) + "\n" + line + "\n")
    with pytest.raises(UserError, match=re.escape(says)) as error:
        read_items(tmp_path / "items.jsonl")
    assert "\n" not in str(error.value)


def test_tokens_of_an_ending_are_those_behind_the_context():
    entries = [ITEM | {"ctx_b": "[step]"}]  # leaves a blank at the end of the context
    tokenizer = tokenizer_of(entries)
    (question,) = tokenize([parse_item(json.dumps(entry), "here") for entry in entries], tokenizer, 100).all
    texts = [tokenizer.decode(question.context), *map(tokenizer.decode, question.endings)]
    assert texts == ["Walking: the dog sat on a mat.", *(f"  {ending}" for ending in ITEM["endings"])]


@pytest.mark.parametrize("block_size", [100, 30])
def test_a_prefix_belongs_to_the_context(block_size):
    parsed, tokenizer = [parse_item(json.dumps(ITEM), "here")], tokenizer_of([ITEM])
    plain, prefixed = (tokenize(parsed, tokenizer, block_size, prefix).all for prefix in ((), (7, 8)))
    assert [q.endings for q in prefixed] == [q.endings for q in plain]
    assert [q.context for q in prefixed] == [([7, 8, *q.context] if block_size == 100 else q.context) for q in plain]


def test_a_line_ends_at_a_line_break_only(tmp_path):
    """JSON may hold the other characters at which Python splits lines."""
    endings = ["one\u2028two", "three\x85four", "five\u2029six", "seven"]
    (tmp_path / "items.jsonl").write_text((json.dumps(ITEM | {"endings": endings}, ensure_ascii=False) + "\r\n") * 2)
    assert [item.endings for item in read_items(tmp_path / "items.jsonl")] == [endings, endings]


def test_a_run_of_ours_begins_a_text_with_nothing():
    """Its characters need not include the letter that a prefix is found with."""
    tokenizer = CharacterTokenizer.of_texts(["xyz"])
    ours = Pretrained("a test", ModelConfig(), lambda name: None, lambda: tokenizer)
    assert hellaswag.prefix_of(ours) == []


@pytest.mark.parametrize("flags", [("--source",), ()])
@pytest.mark.parametrize("source", ["", "nowhere.jsonl"])
def test_the_flag_that_is_named_is_the_commands_own(flags, source, tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/items.jsonl")
    monkeypatch.setattr(hellaswag, "DOWNLOADED", tmp_path / "items.jsonl")
    with pytest.raises(UserError, match=rf"(^| ){(flags or ('--hellaswag_source',))[0]}( with a local copy|=nowhere.jsonl: )"):
        hellaswag.find_source(source, *flags)


def test_an_ending_that_does_not_fit():
    with pytest.raises(UserError, match="item 1 has 27 tokens, and the model a context of 26"):
        tokenize([parse_item(json.dumps(ITEM), "here")], tokenizer_of([ITEM]), 26)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [100, 30], ids=["whole", "cut"])
@pytest.mark.parametrize(
    "knobs",
    [{}, {"position_encoding": "rope", "n_kv_head": 1, "ffn_type": "swiglu", "normalization": "rmsnorm", "qk_norm": True}],
    ids=["gpt2", "llama"],
)
def test_scores_are_those_of_a_full_pass_for_every_ending(knobs, block_size, monkeypatch):
    monkeypatch.setattr(hellaswag, "BATCH_POSITIONS", 80)
    entries = [ITEM, ITEM | {"ctx_b": "hat"}, *items(7)]
    tokenizer = tokenizer_of(entries)
    parsed = [parse_item(json.dumps(entry), "here") for entry in entries]
    cfg = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=block_size, vocab_size=tokenizer.vocab_size, **knobs)
    model = Transformer(cfg)
    model.init_weights(1)
    questions = tokenize(parsed, tokenizer, block_size)
    assert (len(questions.all) > len(parsed)) == (block_size == 30)
    scores = log_likelihoods(model, questions, ALONE)
    assert model.training
    model.eval()
    right, right_norm = 0, 0
    for number, item in enumerate(parsed):
        expected = []
        for ending in item.endings:
            ids = tokenizer.encode(f"{item.context} {ending}")[-(block_size + 1) :]
            n = len(tokenizer.encode(f"{item.context} {ending}")) - len(tokenizer.encode(item.context.rstrip()))
            with torch.no_grad():
                rows = F.log_softmax(model(torch.tensor([ids[:-1]]))[0], dim=-1)
            expected.append(rows[range(len(rows) - n, len(rows)), ids[-n:]].sum().item())
        assert scores[number].tolist() == pytest.approx(expected, rel=1e-5)
        right += int(np.argmax(expected)) == item.label
        right_norm += int(np.argmax(np.array(expected) / [len(e) for e in item.endings])) == item.label
    score = score_of(scores, questions)
    assert (score.acc, score.acc_norm) == (right / len(parsed), right_norm / len(parsed))


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that measured itself at steps 4 and 6."""
    folder = tmp_path_factory.mktemp("hellaswag")
    source = written(folder, items(9))
    write_dataset(folder / "data" / "tiny", f"a: {tiny_text(880)}", tiny_text(300))
    with Runs(folder) as runs:
        knobs = ["--block_size=32", "--hellaswag_interval=4", f"--hellaswag_source={source}", "--run_name=mine"]
        runs.run("out", "--max_iters=6", *knobs, "--use_tensorboard")
    return folder


def command(folder: Path, *flags: str) -> list[str]:
    return ["hellaswag.py", f"--out_dir={folder / 'out'}", f"--source={folder / 'items.jsonl'}", "--device=cpu", *flags]


def test_the_command_says_what_the_run_measured(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert hellaswag.main(command(trained)[1:]) == 0
    found = re.search(r"9 items of HellaSwag: acc (\S+), acc_norm (\S+)", capsys.readouterr().out)
    events = json.loads((trained / "out" / "run_mine.json").read_text())["events"]
    scores = [
        (event["iter"], event["hellaswag_acc"], event["hellaswag_acc_norm"]) for event in events if event["kind"] == "score"
    ]
    assert [iter for iter, _, _ in scores] == [4, 6]
    assert [float(figure) for figure in found.groups()] == pytest.approx(scores[-1][1:], abs=1e-4)


def test_fewer_items(trained: Path, capsys: pytest.CaptureFixture) -> None:
    hellaswag.main(command(trained, "--limit=4")[1:])
    assert "4 items" in capsys.readouterr().out


def test_two_ranks_share_the_items_out(trained: Path, capsys: pytest.CaptureFixture) -> None:
    hellaswag.main(command(trained)[1:])
    alone = capsys.readouterr().out
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, *command(trained)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.stdout == alone, done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--source=nowhere.jsonl"], "--source=nowhere.jsonl: there is no such file"),
        (["--out_dir=nowhere"], "nowhere: there is no such file or folder"),
        (["--limti=3"], "did you mean 'limit'?"),
    ],
)
def test_mistakes_are_one_message(trained: Path, flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        hellaswag.main(command(trained, *flags)[1:])


def stop_when_asked(number: int) -> None:
    """SIGTERM reaches the run as it takes the test for this time."""
    take, calls = evaluation.log_likelihoods, itertools.count(1)

    def take_or_stop(*args: object) -> object:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*args)

    evaluation.log_likelihoods = take_or_stop


def told(runs: Runs, out_dir: str) -> list[tuple[str, int]]:
    events = runs.log(out_dir)["events"]
    return [(event["kind"], event["iter"]) for event in events if event["kind"] in ("score", "sample")]


def test_what_a_stop_cut_short_is_made_up_for_once(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "data", tmp_path / "data")
    flags = ["--block_size=32", "--max_iters=6", "--hellaswag_interval=4", f"--hellaswag_source={trained / 'items.jsonl'}"]
    flags += ["--sample_interval=2", "--sample_prompt=the", "--sample_tokens=4", "--resume=latest"]
    with Runs(tmp_path) as runs:
        runs.run("out", *flags, exit_code=143, prepare=partial(stop_when_asked, 1))
        assert told(runs, "out") == [("sample", 2)] and runs.tiers("out") == {"latest": 4}
        runs.run("out", *flags, exit_code=143, prepare=partial(stop_when_asked, 2))  # at the last step
        assert told(runs, "out") == [("sample", 2), ("score", 4), ("sample", 4)]
        for _ in range(2):  # the second has nothing left to do
            runs.run("out", *flags)
            assert told(runs, "out") == [("sample", 2), ("score", 4), ("sample", 4), ("score", 6), ("sample", 6)]


def test_eval_only_takes_the_test(trained: Path, tmp_path: Path) -> None:
    for name in ("data", "out"):
        shutil.copytree(trained / name, tmp_path / name)
    flags = ["--block_size=32", "--hellaswag_interval=4", f"--hellaswag_source={trained / 'items.jsonl'}"]
    with Runs(tmp_path) as runs:
        runs.run("out", *flags, "--init_from=resume", "--eval_only", "--run_name=again")
    scores = [
        [event for event in json.loads((tmp_path / "out" / name).read_text())["events"] if event["kind"] == "score"]
        for name in ("run_mine.json", "run_eval_again.json")
    ]
    assert len(scores[1]) == 1 and scores[1][0]["hellaswag_acc"] == scores[0][-1]["hellaswag_acc"] and scores[1][0]["iter"] == 6


def test_a_run_is_refused_before_it_begins(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "data", tmp_path / "data")
    with Runs(tmp_path) as runs:
        process = runs.start("out", "--block_size=4", "--hellaswag_interval=5", f"--hellaswag_source={trained / 'items.jsonl'}")
        assert process.wait() == 2
    assert re.search(
        r"--hellaswag_interval=5: an ending of item \d+ has \d+ tokens, and the model a context of 4", process.stderr
    )
    assert not (tmp_path / "out").exists()
