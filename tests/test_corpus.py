"""Preparing datasets: what is written, from any source, by any number of threads, through any kill."""

import errno
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configurator import ROOT, DataConfig, UserError
from data import corpus, source
from data.corpus import Recipe, prepare, split_of
from data.source import Document, FileSource, HubSource, cut_pieces, local_source
from data.tokenizer import load_tokenizer, open_tokenizer, train_bpe
from data.tokens import Dataset, load_dataset
from real_inputs import provide_gpt2_vocabulary, shared_file

DOCUMENTS = [f"Document {i}: {'naïve ' * (i % 7)}text\n\n  of {i * i}.\n" * (1 + i % 3) for i in range(200)]
NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}


def write_source(folder: Path, kind: str) -> Path:
    """DOCUMENTS in one file of this kind."""
    path = folder / f"documents.{kind}"
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), path)
    elif kind == "jsonl.zst":  # two frames, as parallel compressors write
        path.write_bytes(
            pyarrow.compress(lines[:1000], "zstd", asbytes=True) + pyarrow.compress(lines[1000:], "zstd", asbytes=True)
        )
    else:
        path.write_bytes(gzip.compress(lines) if kind.endswith(".gz") else lines)
    return path


def prepared(out: Path, source_path: Path, *flags: str, tokenizer: str = "bpe:300") -> dict:
    """Prepares `source_path` into `out` and returns its manifest."""
    assert prepare(Recipe(out, tokenizer, 0.1, local_source), ["--source", str(source_path), *flags]) == 0
    return json.loads((out / "manifest.json").read_text())


def dataset(folder: Path):
    return load_dataset(DataConfig(dataset=folder.name, data_dir=str(folder.parent), check_data=True), 8)


def what_files_hold(manifest: dict) -> dict:
    return {key: value for key, value in manifest.items() if key not in ("digest", "source")}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_documents_come_back_in_order_with_an_end_of_text_each(tmp_path, kind):
    manifest = prepared(tmp_path / "set", write_source(tmp_path, kind))
    data = dataset(tmp_path / "set")
    tokenizer = load_tokenizer(data)
    for split, tokens in (("train", data.train), ("val", data.val)):
        expected = [text for i, text in enumerate(DOCUMENTS) if split_of(Document(f"documents.{kind}:{i}", []), 0.1) == split]
        assert tokenizer.decode(tokens.tolist()).split("<|endoftext|>") == [*expected, ""]
        assert manifest[split]["documents"] == len(expected)
        assert manifest[split]["bytes"] == sum(len(text.encode()) for text in expected)
    assert 5 <= manifest["val"]["documents"] <= 40
    assert not (tmp_path / "set" / "parts").exists()


def test_files_do_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_CHARS", 200)  # many batches
    path = write_source(tmp_path, "jsonl")
    manifests = [prepared(tmp_path / f"set{n}", path, "--num_proc", str(n)) for n in (1, 2, 7)]
    assert manifests[0] == manifests[1] == manifests[2]


def test_folder_of_texts_is_a_document_a_file(tmp_path):
    folder = tmp_path / "texts"
    for i, text in enumerate(DOCUMENTS[:40]):
        (folder / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"{i % 3}" / f"{i}.txt").write_text(text, newline="")
    (folder / "empty.txt").touch()
    (folder / ".hidden").write_text("not for training")
    manifest = prepared(tmp_path / "set", folder)
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == 40
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] == sum(len(text.encode()) for text in DOCUMENTS[:40])


def texts_of(data: Dataset) -> dict[str, list[str]]:
    """The documents of each split."""
    tokenizer = load_tokenizer(data)
    return {split: tokenizer.decode(getattr(data, split).tolist()).split("<|endoftext|>")[:-1] for split in ("train", "val")}


@pytest.mark.parametrize(("fraction", "lone", "nearest"), [(1e-6, "val", min), (1 - 1e-6, "train", max)])
def test_no_split_stays_empty_where_there_are_two_documents(tmp_path, monkeypatch, capsys, fraction, lone, nearest):
    """The document whose hash is nearest goes there, by any number of threads and through a stop in either pass."""
    folder, texts = tmp_path / "texts", {f"{i}.txt": f"Text {i} has {i * i} words. " * 30 for i in range(20)}
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "empty.txt").touch()
    flags = ["--val_fraction", str(fraction)]
    manifest = prepared(tmp_path / "set", folder, *flags)
    name = nearest(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    held = texts_of(dataset(tmp_path / "set"))
    assert held[lone] == [texts[name]] and sum(map(len, held.values())) == 20
    assert (
        f"none of 20 documents fell to {lone}.bin (--val_fraction={fraction}): document {name} goes there"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(corpus, "PIECE_CHARS", 200)
    assert prepared(tmp_path / "threads", folder, *flags, "--num_proc", "5") == manifest
    for batches in (10, 30):
        stop_after(folder, tmp_path / f"stopped{batches}", batches, *flags, "--num_proc", "1")
        assert prepared(tmp_path / f"stopped{batches}", folder, *flags) == manifest
        assert "going on behind" in capsys.readouterr().out


def test_limit(tmp_path):
    manifest = prepared(tmp_path / "set", write_source(tmp_path, "jsonl"), "--limit", "50")
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == 50


def test_what_a_short_text_gives_less_of_is_said(tmp_path, capsys):
    """Entries of a tokenizer and tokens for validation; the training error for the latter names --val_fraction too."""
    (tmp_path / "text.txt").write_text("".join(DOCUMENTS))
    manifest = prepared(tmp_path / "set", tmp_path / "text.txt", "--val_fraction", "0.01", tokenizer="bpe:99999999")
    text, n_val = capsys.readouterr().out, manifest["val"]["tokens"]
    assert f"--tokenizer=bpe:99999999: the text gave only {manifest['vocab_size']:,} entries\n" in text
    assert f"note: val.bin has only {n_val} tokens" in text and "--val_fraction larger than 0.01" in text
    with pytest.raises(UserError, match="or prepare again with a larger --val_fraction"):
        load_dataset(DataConfig(dataset="set", data_dir=str(tmp_path)), n_val)
    prepared(tmp_path / "enough", tmp_path / "text.txt", "--val_fraction", "0.5")
    assert "note:" not in capsys.readouterr().out


def test_wide_vocabulary_gets_uint32(tmp_path):
    text = "".join(c for c in map(chr, range(0x12000)) if not 0xD800 <= ord(c) < 0xE000)
    (tmp_path / "text.txt").write_text(text * 2, newline="")
    manifest = prepared(tmp_path / "set", tmp_path / "text.txt", tokenizer="characters")
    data = dataset(tmp_path / "set")
    assert manifest["dtype"] == "uint32" and data.train.dtype == np.uint32 and data.train.max() > 65_535
    assert load_tokenizer(data).decode(data.train.tolist()) == (text * 2)[: int(len(text * 2) * 0.9)]


# --- one long text -----------------------------------------------------------------------------------------------------


def test_shakespeare_by_characters_is_nanogpts(tmp_path):
    text = shared_file("tinyshakespeare.txt").read_text()
    run_script("shakespeare_char", "--source", str(shared_file("tinyshakespeare.txt")), "--out", str(tmp_path / "set"))
    data = dataset(tmp_path / "set")
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = np.array([stoi[character] for character in text])
    assert (len(data.train), len(data.val), data.vocab_size, data.eot_id) == (1_003_854, 111_540, 65, None)
    assert (np.concatenate([data.train, data.val]) == ids).all()


def test_shakespeare_in_gpt2s_tokens_is_nanogpts(tmp_path):
    provide_gpt2_vocabulary()
    prepared(tmp_path / "set", shared_file("tinyshakespeare.txt"), tokenizer="gpt2")
    data = dataset(tmp_path / "set")
    assert (len(data.train), len(data.val)) == (301_966 + 1, 36_059 + 1)  # nanoGPT's, and an end of text
    assert data.train[-1] == data.val[-1] == 50_256


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe", "sentencepiece"])
def test_cutting_a_long_document_does_not_change_its_tokens(tmp_path, monkeypatch, tokenizer):
    text = Path(corpus.__file__).read_text() + "end.\n\n\n   \n\tx = 'naïve'\r\n" * 9 + Path(source.__file__).read_text()
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in (text, *DOCUMENTS)))
    if tokenizer == "gpt2":
        provide_gpt2_vocabulary()
    elif tokenizer == "bpe":
        train_bpe(400, [text]).save(tmp_path)
    name = {"gpt2": "gpt2", "bpe": str(tmp_path / "tokenizer.json")}.get(tokenizer) or str(shared_file("sentencepiece_32k"))
    monkeypatch.setattr(source, "PIECE_CHARS", 300)
    assert len(list(cut_pieces([text[i : i + 300] for i in range(0, len(text), 300)]))) > 50
    prepared(tmp_path / "set", path, tokenizer=name)
    tokens = dataset(tmp_path / "set").train.tolist()
    whole = open_tokenizer(name).encode(text)
    assert tokens[: len(whole) + 1] == [*whole, open_tokenizer(name).eot_id]


@pytest.mark.parametrize("text", ["a b " * 900_000, "x" * 3_000_000, " " * 3_000_000, "\n" * 3_000_000, "ab\n" * 1_000_000])
def test_pieces_are_bounded_whatever_the_text(text):
    pieces = list(cut_pieces(text[i : i + 100_000] for i in range(0, len(text), 100_000)))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= source.LONGEST_PIECE_CHARS + 100_000


def peak_mib(out: Path, path: Path) -> float:
    """Peak resident memory of a process that prepares `path`."""
    program = (
        "import sys; from pathlib import Path; from data.corpus import *; from data.source import local_source;"
        "prepare(Recipe(Path(sys.argv[1]), 'characters', 0.1, local_source), ['--source', sys.argv[2]]);"
        "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024)"
    )
    command = [sys.executable, "-c", program, str(out), str(path)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_memory_does_not_grow_with_the_source(tmp_path, kind):
    """Ten times the text (60 MB: one file without documents, or one row group) takes less than 30 MiB more."""
    line = "All the world's a stage, and all the men and women merely players.\n"
    for name, repeats in (("small", 90_000), ("large", 900_000)):
        if kind == "txt":
            (tmp_path / f"{name}.txt").write_text(line * repeats)
        else:
            rows = pyarrow.table({"text": [f"{i}{line * 100}" for i in range(repeats // 100)]})
            pyarrow.parquet.write_table(rows, tmp_path / f"{name}.parquet", row_group_size=10**6, use_dictionary=False)
    small, large = (peak_mib(tmp_path / name, tmp_path / f"{name}.{kind}") for name in ("small", "large"))
    assert large < small + 30


# --- stopped and started again -----------------------------------------------------------------------------------------

SLOW = (
    "import signal, sys, time; from pathlib import Path; from data import corpus; from data.source import local_source;"
    "signal.signal(signal.SIGINT, signal.default_int_handler);"  # what a shell starts in the background ignores it
    "corpus.JOURNAL_INTERVAL_S = 0; corpus.PIECE_CHARS = 500; encode = corpus._encode;"
    "corpus._encode = lambda *a: (time.sleep(0.05), encode(*a))[1];"
    "sys.exit(corpus.prepare(corpus.Recipe(Path(sys.argv[1]), 'bpe:300', 0.1, local_source), sys.argv[2:]))"
)


def start_slow(out: Path, path: Path) -> subprocess.Popen:
    """A preparation in a process of its own, and so slow that it can be stopped in the middle."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(out), "--source", str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    deadline_s = time.monotonic() + 60
    while (
        not (out / "parts" / "journal.json").exists()
        or json.loads((out / "parts" / "journal.json").read_text())["documents"] < 20
    ):
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_preparation_goes_on_where_it_was(tmp_path, signal_number, capsys):
    path = write_source(tmp_path, "jsonl")
    process = start_slow(tmp_path / "set", path)
    process.send_signal(signal_number)
    assert process.wait(30) == (130 if signal_number == signal.SIGINT else -signal_number)
    assert not list((tmp_path / "set").glob("*.*")), "nothing that looks like a dataset"
    manifest = prepared(tmp_path / "set", path)
    assert "going on behind" in capsys.readouterr().out
    assert manifest == prepared(tmp_path / "uninterrupted", path)


def test_two_at_a_time_are_refused(tmp_path):
    path = write_source(tmp_path, "jsonl")
    process = start_slow(tmp_path / "set", path)
    with pytest.raises(UserError, match=r"another prepare\.py is at work on .*set"):
        prepared(tmp_path / "set", path)
    process.kill()
    process.wait(30)


def fail_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: Exception) -> None:
    """The encoder raises `error` after so many batches of 200 characters; each batch before is in the journal."""
    encode, calls = corpus._encode, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > batches:
            raise error
        return encode(*arguments)

    monkeypatch.setattr(corpus, "_encode", failing)
    monkeypatch.setattr(corpus, "PIECE_CHARS", 200)
    monkeypatch.setattr(corpus, "JOURNAL_INTERVAL_S", -1)


def stop_after(path: Path, out: Path, batches: int, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(RuntimeError, match="stopped"):
        fail_after(monkeypatch, batches, RuntimeError("stopped"))
        prepared(out, path, *flags)


@pytest.mark.parametrize("change", ["tokenizer", "limit", "val_fraction", "source", "torn part", "torn journal"])
def test_old_parts_are_not_mixed_with_another_jobs(tmp_path, change, capsys):
    path = write_source(tmp_path, "jsonl")
    stop_after(path, tmp_path / "set", 10)
    flags = {
        "tokenizer": ["--tokenizer", "characters"],
        "limit": ["--limit", "150"],
        "val_fraction": ["--val_fraction", "0.3"],
    }.get(change, [])
    if change == "source":
        path.write_text(path.read_text().replace("Document 1:", "Document I:"))
    if change == "torn part":
        os.truncate(tmp_path / "set" / "parts" / "train.bin", 10)
    if change == "torn journal":
        os.truncate(tmp_path / "set" / "parts" / "journal.json", 30)
    manifest = prepared(tmp_path / "set", path, *flags)
    assert "going on" not in capsys.readouterr().out
    assert manifest == prepared(tmp_path / "fresh", path, *flags)


def test_stopped_inside_one_long_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(source, "PIECE_CHARS", 100)
    path = tmp_path / "text.txt"
    path.write_text("".join(DOCUMENTS))
    stop_after(path, tmp_path / "set", 12)
    manifest = prepared(tmp_path / "set", path)
    assert "going on" in capsys.readouterr().out
    assert manifest == prepared(tmp_path / "fresh", path)


def test_a_death_while_publishing_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    """Over an older dataset, too: its files are gone before the new ones come."""
    path = write_source(tmp_path, "jsonl")
    prepared(tmp_path / "set", path, "--limit", "100")
    replace = Path.replace
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="died"):

        def die(self: Path, target: Path) -> Path:
            if target == tmp_path / "set" / "train.bin":
                raise RuntimeError("died")
            return replace(self, target)

        patch.setattr(Path, "replace", die)
        prepared(tmp_path / "set", path)
    with pytest.raises(UserError, match="has no train"):
        dataset(tmp_path / "set")
    assert prepared(tmp_path / "set", path) == prepared(tmp_path / "fresh", path)


def test_what_is_prepared_is_left_alone(tmp_path, capsys):
    path = write_source(tmp_path, "jsonl")
    prepared(tmp_path / "set", path)
    before = (tmp_path / "set" / "train.bin").stat().st_mtime_ns
    prepared(tmp_path / "set", path)
    assert "is prepared already" in capsys.readouterr().out
    assert (tmp_path / "set" / "train.bin").stat().st_mtime_ns == before


# --- what can go wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "there is no such file or folder"),
        (
            "latin1.txt",
            "naïve".encode("latin-1") * 100,
            "cannot read .*latin1.txt: it is not UTF-8 text .*: take it out of the source, or convert it",
        ),
        ("torn.txt.gz", gzip.compress(os.urandom(9_000))[:5_000], "cannot read .*torn.txt.gz"),
        ("torn.txt.zst", pyarrow.compress(os.urandom(9_000), "zstd", asbytes=True)[:5_000], "torn.txt.zst: Truncated"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', 'a.jsonl: line 2 is not a JSON object with a field "text"'),
        ("a.jsonl", b'{"text": "one"}\n\n{"content": "two"}\n', "line 3 is not"),
        ("a.jsonl", b'{"text": 1}\n', 'line 1: its field "text" is not a string'),
        ("a.parquet", b"PAR1", "cannot read .*a.parquet"),
        ("one.jsonl", b'{"text": "only one document"}\n', "has only one document with text: val.bin needs one too"),
        ("empty.txt", b"", "empty.txt has no text: name a source that has some with --source"),
        ("empty.jsonl", b'{"text": ""}\n{"text": ""}\n', "empty.jsonl has no text"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bpe:300", "characters", "trained before"])
def test_bad_sources(tmp_path, name, content, message, tokenizer):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    if tokenizer == "trained before":
        tokenizer = str(tmp_path / "tokenizer.json")
        train_bpe(300, DOCUMENTS).save(tmp_path)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / "sets" / "set", tmp_path / name, tokenizer=tokenizer)
    assert not (tmp_path / "sets").exists(), "no folder is left that holds nothing"


def test_parquet_without_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match='it has no column "text", only content'):
        prepared(tmp_path / "set", tmp_path / "a.parquet")


def test_half_a_surrogate_pair_in_json_becomes_a_question_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n' + "".join(json.dumps({"text": t}) + "\n" for t in DOCUMENTS))
    prepared(tmp_path / "set", path)
    data = dataset(tmp_path / "set")
    assert load_tokenizer(data).decode(data.train[:50].tolist()).startswith("a?b \U0001f600<|endoftext|>")


def test_disk_full_is_one_error_and_loses_nothing(tmp_path, monkeypatch, capsys):
    path = write_source(tmp_path, "jsonl")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"the disk is full: make room for .*set"):
        fail_after(patch, 10, OSError(errno.ENOSPC, "No space left on device"))
        prepared(tmp_path / "set", path)
    manifest = prepared(tmp_path / "set", path)
    assert "going on" in capsys.readouterr().out
    assert manifest == prepared(tmp_path / "fresh", path)


@pytest.mark.parametrize(
    "flags",
    [
        ["--val_fraction", "0"],
        ["--val_fraction", "1"],
        ["--num_proc", "0"],
        ["--limit", "0"],
        ["--tokenizer", "bpe:9"],
        ["--tokenizer", "bpe:" + "9" * 30],
    ],
)
def test_bad_flags(tmp_path, flags):
    with pytest.raises(UserError, match=flags[0]):
        prepared(tmp_path / "set", write_source(tmp_path, "jsonl"), *flags)


# --- the scripts -------------------------------------------------------------------------------------------------------


def run_script(name: str, *flags: str, inside: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """Runs data/<name>/prepare.py from the repository, or from its own folder."""
    folder = ROOT / "data" / name
    command = [sys.executable, "prepare.py" if inside else f"data/{name}/prepare.py", *flags]
    return subprocess.run(
        command, cwd=folder if inside else ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("inside", [False, True])
def test_python_stdlib(tmp_path, inside):
    result = run_script("python_stdlib", "--limit", "150", "--out", str(tmp_path / "set"), inside=inside)
    assert result.returncode == 0, result.stderr
    data = dataset(tmp_path / "set")
    text = load_tokenizer(data).decode(np.concatenate([data.train, data.val]).tolist())
    assert data.vocab_size == 4096 and text.count("<|endoftext|>") == 150
    assert "def " in text and "test.support" not in text.split("<|endoftext|>")[0]


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare_char", "openwebtext", "slimpajama_6b_llama", "slimpajama_6b_gpt2"])
def test_without_a_network_one_error_names_the_way_out(tmp_path, name):
    provide_gpt2_vocabulary()
    cache = {"HF_HOME": str(tmp_path / "cache")}
    t0_s = time.monotonic()
    result = run_script(name, "--out", str(tmp_path / "set"), inside=True, **NO_NETWORK, **cache)
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot ") and "Traceback" not in result.stderr
    assert ("--tokenizer" if name == "slimpajama_6b_llama" else "--source") in result.stderr
    assert time.monotonic() - t0_s < 40


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_datasets_keep_their_validation_split_and_can_be_resumed(tmp_path, monkeypatch, streaming):
    """A local folder stands in for the hub: the library reads both the same way."""
    monkeypatch.setenv("HF_ENDPOINT", NO_NETWORK["HF_ENDPOINT"])
    (tmp_path / "hub").mkdir()
    for name, texts in (("train", DOCUMENTS[:30]), ("validation", DOCUMENTS[30:40])):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "hub" / f"{name}-00000-of-00001.parquet")
    hub = HubSource(str(tmp_path / "hub"), streaming=streaming)
    everything = [("val", text) for text in DOCUMENTS[30:40]] + [("train", text) for text in DOCUMENTS[:30]]
    limited = everything[:7] + everything[10:17]

    def read(skip: int, limit: int | None) -> list[tuple[str | None, str]]:
        return [(document.split, "".join(document.pieces)) for document in hub.documents(skip, limit)]

    assert read(0, None) == everything
    assert read(4, None) == everything[4:] and read(15, None) == everything[15:]
    assert read(0, 7) == limited and read(9, 7) == limited[9:]


def test_a_part_of_a_hub_dataset_is_what_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", NO_NETWORK["HF_ENDPOINT"])
    configs = []
    for part in ("sample", "default"):
        (tmp_path / "hub" / part).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": [part] * 3}), tmp_path / "hub" / part / "000.parquet")
        configs.append(f"- config_name: {part}\n  data_files: {part}/*.parquet\n")
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    sample, whole = HubSource(str(tmp_path / "hub"), "sample"), HubSource(str(tmp_path / "hub"), streaming=True)
    assert ["".join(document.pieces) for document in sample.documents(0, None)] == ["sample"] * 3
    assert ["".join(document.pieces) for document in whole.documents(0, None)] == ["default"] * 3
    assert sample.identity() != whole.identity()


def test_help_is_quick_and_names_the_flags():
    t0_s = time.monotonic()
    result = run_script("slimpajama_6b_gpt2", "--help")
    assert result.returncode == 0 and time.monotonic() - t0_s < 5
    assert all(flag in result.stdout for flag in ("--source", "--tokenizer", "--num_proc", "--limit", "--out", "--full"))


def test_a_single_file_source_reads_only_its_own_part(tmp_path):
    (tmp_path / "t.txt").write_text("0123456789" * 10)
    documents = list(FileSource("t", [("t", tmp_path / "t.txt")], 0.25).documents(0, None))
    assert [(d.split, "".join(d.pieces)) for d in documents] == [
        ("train", "0123456789" * 7 + "01234"),
        ("val", "56789" + "0123456789" * 2),
    ]
