"""A dataset's files: what they say, and every way in which they can be wrong."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from configurator import DataConfig, UserError
from data.tokens import Manifest, SplitManifest, load_dataset, padded_vocab_size

BLOCK_SIZE = 8
TOKENS = np.arange(100) % 50


def write_dataset(folder: Path, tokens: np.ndarray = TOKENS, dtype: str = "uint16", manifest: bool = True, meta: object = None):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        tokens.astype(dtype).tofile(folder / f"{split}.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    if manifest:
        split_manifest = SplitManifest(tokens=len(tokens), bytes=350, documents=2, sha256="0" * 64)
        Manifest(dtype, 50, "gpt2", "abc", 49, "a test", "def", split_manifest, split_manifest).write(folder / "manifest.json")


def load(folder: Path, **knobs):
    return load_dataset(DataConfig(dataset=folder.name, data_dir=str(folder.parent), **knobs), BLOCK_SIZE)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_dataset_with_manifest(tmp_path, dtype):
    write_dataset(tmp_path / "set", dtype=dtype)
    dataset = load(tmp_path / "set")
    assert dataset.train.dtype == dtype and dataset.train.tolist() == TOKENS.tolist()
    assert (dataset.vocab_size, dataset.eot_id, dataset.tokenizer) == (50, 49, "gpt2")
    assert dataset.val_bytes_per_token == 3.5
    with pytest.raises(ValueError, match="read-only"):
        dataset.train[0] = 1


def test_folder_is_taken_from_where_the_user_stands(tmp_path, monkeypatch):
    write_dataset(tmp_path / "mine" / "set")
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset(DataConfig(dataset="set", data_dir="mine"), BLOCK_SIZE).train) == 100


@pytest.mark.parametrize(("meta", "vocab_size"), [(None, 50_257), ({"vocab_size": 65, "stoi": {"a": 0}}, 65)])
def test_another_trainers_files(tmp_path, meta, vocab_size):
    write_dataset(tmp_path / "set", manifest=False, meta=meta)
    dataset = load(tmp_path / "set")
    assert dataset.vocab_size == vocab_size and dataset.tokenizer is None and dataset.val_bytes_per_token is None
    assert dataset.fingerprint()["train_sha256"] is None


def test_fingerprint_tells_datasets_apart(tmp_path):
    for name, length in (("a", 100), ("b", 90)):
        write_dataset(tmp_path / name, TOKENS[:length])
    one, other = (load(tmp_path / name).fingerprint() for name in "ab")
    assert {key for key in one if one[key] != other[key]} == {"dataset", "train_tokens", "val_tokens"}


def corrupt(folder: Path, how: str) -> None:
    train = folder / "train.bin"
    if how == "missing":
        train.unlink()
    elif how == "empty":
        train.write_bytes(b"")
    elif how == "torn":
        os.truncate(train, 150)
    elif how == "odd":
        os.truncate(train, 151)
    elif how == "wide":
        TOKENS.astype("uint32").tofile(train)
    elif how == "short":
        TOKENS[:BLOCK_SIZE].astype("uint16").tofile(train)
    elif how == "beyond":
        np.append(TOKENS[:-1], 60_000).astype("uint16").tofile(train)
    elif how == "manifest":
        (folder / "manifest.json").write_text('{"format_version": 1, "dtype":')
    elif how == "version":
        (folder / "manifest.json").write_text('{"format_version": 99}')


@pytest.mark.parametrize(
    ("how", "manifest", "message"),
    [
        ("missing", True, "has no train.bin and val.bin: "),
        ("empty", True, "train.bin is empty"),
        ("torn", True, "150 bytes, but manifest.json says 100 tokens of uint16 .200 bytes.: it is torn"),
        ("odd", False, "151 bytes, which are not whole uint16 tokens"),
        ("wide", True, "its dtype is uint32"),
        ("wide", False, "looks like uint32"),
        ("short", False, "has 8 tokens, but block_size=8 needs 9"),
        ("beyond", True, "id 60,000 at token 99, beyond the vocabulary of 50"),
        ("beyond", False, "id 60,000 at token 99, beyond the vocabulary of 50,257"),
        ("manifest", True, "manifest.json is damaged"),
        ("version", True, "format version 99, this program reads 1"),
    ],
)
def test_bad_files(tmp_path, how, manifest, message):
    write_dataset(tmp_path / "set", manifest=manifest)
    corrupt(tmp_path / "set", how)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "set")


def test_dataset_that_only_needs_preparing():
    with pytest.raises(UserError, match=r"run python data/openwebtext/prepare\.py --out /nowhere/openwebtext"):
        load_dataset(DataConfig(dataset="openwebtext", data_dir="/nowhere"), BLOCK_SIZE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_txt",
            r"my_txt has no train\.bin and val\.bin: did you mean my_text\? prepared there: my_text, other; to prepare: .*",
        ),
        ("opnwebtext", r"did you mean openwebtext\? prepared there: my_text, other; to prepare: fineweb_edu, openwebtext, "),
        ("sets/my_text", r"is a path, and takes a name: pass --dataset=my_text --data_dir=sets"),
    ],
)
def test_a_mistyped_dataset_is_told_what_there_is(tmp_path, name, message):
    for other in ("other", "my_text"):
        write_dataset(tmp_path / other)
    with pytest.raises(UserError, match=message):
        load_dataset(DataConfig(dataset=name, data_dir=str(tmp_path)), BLOCK_SIZE)


def test_a_path_into_data_is_explained():
    with pytest.raises(UserError, match=r"--dataset=data/openwebtext is a path, and takes a name: pass --dataset=openwebtext$"):
        load_dataset(DataConfig(dataset="data/openwebtext"), BLOCK_SIZE)


def test_check_data_finds_what_a_sample_misses(tmp_path):
    tokens = np.zeros(3_000_000, np.uint16)
    tokens[1::2] = 1
    tokens[5_000] = 55
    write_dataset(tmp_path / "set", tokens)
    load(tmp_path / "set")
    with pytest.raises(UserError, match="id 55 at token 5,000"):
        load(tmp_path / "set", check_data=True)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("the_code_ran",)


@pytest.mark.parametrize("meta", [RunsCode(), {"vocab_size": RunsCode()}, {"stoi": {}}, {"vocab_size": "65"}, [1]])
def test_meta_that_is_no_plain_meta(tmp_path, monkeypatch, meta):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "set", meta=meta)
    with pytest.raises(UserError, match=r"meta\.pkl is not a plain nanoGPT meta\.pkl"):
        load(tmp_path / "set")
    assert not (tmp_path / "the_code_ran").exists()


def test_torn_meta(tmp_path):
    write_dataset(tmp_path / "set", manifest=False)
    (tmp_path / "set" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65})[:-3])
    with pytest.raises(UserError, match=r"meta\.pkl"):
        load(tmp_path / "set")


@pytest.mark.parametrize(("vocab_size", "padded"), [(65, 65), (1023, 1023), (1024, 1024), (1025, 1088), (50_257, 50_304)])
def test_padded_vocab_size(vocab_size, padded):
    assert padded_vocab_size(vocab_size) == padded
