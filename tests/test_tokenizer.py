"""Tokenizers: text comes back, special tokens are only text, and a dataset finds its own again."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from configurator import UserError
from data.tokenizer import CharacterTokenizer, Tokenizer, copy_tokenizer, load_tokenizer, open_tokenizer, train_bpe
from data.tokens import Dataset, Manifest, SplitManifest
from real_inputs import provide_gpt2_vocabulary, shared_file

CODE = "def first(self):\n        return self.items[0]  # naïve 中文 \t\r\n\n\nclass B:\n    pass\n"
SPECIAL = "a <|endoftext|> and a </s>, <s>"


@pytest.fixture(params=["characters", "bpe:400", "sentencepiece", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "characters":
        return CharacterTokenizer.of_texts([CODE, SPECIAL])
    if request.param == "bpe:400":
        return train_bpe(400, [CODE * 5])
    if request.param == "sentencepiece":
        return open_tokenizer(str(shared_file("sentencepiece_32k")))
    provide_gpt2_vocabulary()
    return open_tokenizer("gpt2")


def as_dataset(tokenizer: Tokenizer, folder: Path, tokenizer_hash: str | None = None) -> Dataset:
    split = SplitManifest(tokens=1, bytes=1, documents=1, sha256="")
    about = (tokenizer.name, tokenizer_hash or tokenizer.hash, tokenizer.eot_id)
    manifest = Manifest("uint16", tokenizer.vocab_size, *about, "a test", "", split, split)
    nothing = np.zeros(0, np.uint16)
    return Dataset("set", folder, nothing, nothing, tokenizer.vocab_size, manifest)


@pytest.mark.parametrize("text", [CODE, SPECIAL, ""])
def test_text_comes_back_and_holds_no_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_dataset_finds_its_tokenizer_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(as_dataset(tokenizer, tmp_path))
    assert (loaded.name, loaded.hash, loaded.eot_id) == (tokenizer.name, tokenizer.hash, tokenizer.eot_id)
    assert loaded.encode(CODE) == tokenizer.encode(CODE)
    with pytest.raises(UserError, match="is not the one its tokens were made with"):
        load_tokenizer(as_dataset(tokenizer, tmp_path, tokenizer_hash="another"))


def test_a_copy_takes_the_place_of_the_dataset(tokenizer, tmp_path):
    """Of the one that was there nothing stays; where the disk is full all of it stays."""
    first, second, copy = tmp_path / "first", tmp_path / "second", tmp_path / "out" / "tokenizer"
    for folder, each in ((first, train_bpe(300, [CODE])), (second, tokenizer)):
        folder.mkdir()
        each.save(folder)
        copy_tokenizer(as_dataset(each, folder), copy)
        assert load_tokenizer(as_dataset(each, copy)).hash == each.hash
    (first / "tokenizer.json").unlink()
    (first / "tokenizer.json").mkdir()  # cannot be copied
    before = sorted(copy.parent.rglob("*"))
    with pytest.raises(OSError):
        copy_tokenizer(as_dataset(tokenizer, first), copy)
    assert sorted(copy.parent.rglob("*")) == before and load_tokenizer(as_dataset(tokenizer, copy)).hash == tokenizer.hash


def test_prefix_is_counted_where_there_is_one(tokenizer):
    """The middle of a document is encoded without what encode() puts before every text."""
    whole, half = tokenizer.encode("a\na"), tokenizer.encode("\na")
    assert tokenizer.encode("a") + half[tokenizer.prefix_tokens :] == whole


def test_gpt2_is_gpt2():
    provide_gpt2_vocabulary()
    tokenizer = open_tokenizer("gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (50_257, 50_256)


def test_characters_are_nanogpts(tmp_path):
    tokenizer = CharacterTokenizer.of_texts(["ba", "nana"])
    tokenizer.save(tmp_path)
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert meta == {"vocab_size": 3, "stoi": {"a": 0, "b": 1, "n": 2}, "itos": {0: "a", 1: "b", 2: "n"}}
    with pytest.raises(UserError, match="3 characters do not include 'é'"):
        tokenizer.encode("cabané".replace("c", "b"))


def test_trained_bpe_is_the_same_each_time_and_knows_every_byte():
    one, two = (train_bpe(300, [CODE * 5, "x = 1\n"]) for _ in range(2))
    assert one.definition == two.definition and one.vocab_size == 300
    every_byte = "".join(map(chr, range(256))) + "\U0001f600"
    assert one.decode(one.encode(every_byte)) == every_byte


def test_trained_bpe_takes_indentation_as_one_token():
    tokenizer = train_bpe(400, [CODE * 5])
    ids = tokenizer.encode("def x(self):\n        return")
    assert [tokenizer.decode([i]) for i in ids][-2:] == ["):\n        ", "return"]


def test_saved_json_and_folders_open_by_path(tmp_path):
    trained = train_bpe(300, [CODE])
    trained.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        opened = open_tokenizer(str(path))
        assert opened.hash == trained.hash and opened.eot_id == trained.eot_id == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "cannot read the tokenizer .*tokenizer.json: No such file"),
        ("tokenizer.json", b"{}", "is no tokenizer.json"),
        ("tokenizer.model", b"junk", "is no SentencePiece model"),
    ],
)
def test_what_is_no_tokenizer(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_tokenizer(str(tmp_path / name))


def test_a_dataset_of_unknown_tokenizer(tmp_path):
    nothing = np.zeros(0, np.uint16)
    with pytest.raises(UserError, match=r"does not say which tokenizer made it: put its tokenizer\.json"):
        load_tokenizer(Dataset("set", tmp_path, nothing, nothing, vocab_size=32_000))
